"""The rung 'each part agrees with torch': every graph is compared, and a wrong one is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch

import packlight
from packlight.deploy import parity
from packlight.loading import load
from packlight.runtimes.onnx import read_graph
from packlight.runtimes.onnx_wire import parts_of
from packlight.serve import open_served
from small_whisper import save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model, and its bundle in floats, opened."""
    base = tmp_path_factory.mktemp("parity")
    model = save_model(base / "model")
    bundle = packlight.apply(str(model), packlight.Plan((packlight.Step("float16"),)), None, base / "out")
    return model, open_served(bundle, 1)


def halves(model: Any) -> Any:
    """The weights as the bundle has them."""
    for parameter in model.module.parameters():
        parameter.data.copy_(parameter.data.half().float())
    return model


def batch() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))}


def test_a_right_bundle_agrees_in_every_graph(made: tuple[Path, Any]) -> None:
    model, served = made
    found = parity(halves(load(str(model))), served, [batch()])
    assert found["passed"]
    assert found["noise"] == 0
    assert found["error"] < 1e-4


@pytest.mark.parametrize(
    ("path", "graph"),
    [("model.encoder.layers.0.fc2", "encoder"), ("model.decoder.layers.1.self_attn.out_proj", "decoder")],
)
def test_a_wrong_graph_is_named(made: tuple[Path, Any], path: str, graph: str) -> None:
    model, served = made
    other = halves(load(str(model)))
    other.module.get_submodule(path).weight.data.mul_(1.5)
    found = parity(other, served, [batch()])
    assert not found["passed"]
    assert found["graph"] == graph


def test_a_decoder_that_forgets_its_mask_is_noticed(made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, served = made
    other = halves(load(str(model)))
    attend = torch.nn.functional.scaled_dot_product_attention

    def unmasked(*args: Any, attn_mask: Any = None, is_causal: bool = False, **rest: Any) -> Any:
        return attend(*args, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", unmasked)
    found = parity(other, served, [batch()])
    assert not found["passed"]
    assert found["graph"] == "decoder"


def test_few_passes_over_the_activations(tmp_path: Path) -> None:
    """GELU is one operation, and a product of rows scales its integers itself, with the numbers of the model."""
    model = save_model(tmp_path / "model")
    step = packlight.Step("round_to_nearest", {"activations": "int8_rows"}, ("model.encoder.layers.*",))
    bundle = packlight.apply(str(model), packlight.Plan((step, packlight.Step("float16"))), None, tmp_path / "out")
    operators = [node.operator for node in parts_of(read_graph(bundle / "encoder.onnx.gz"))[0]]
    assert operators.count("Gelu") == 2 + 2  # both convolutions, and each block's feed-forward
    assert "Erf" not in operators
    assert operators.count("MatMulIntegerToFloat") == 2 * 6
    assert parity(packlight.load(bundle), open_served(bundle, 1), [batch()])["error"] < 1e-3
