"""Convolutions of fewer operations: what is separable is found exactly, and outputs teach better than weights alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

import packlight
from packlight.compress import check, compress_
from packlight.convolutions import Grouped, Separable, separable_
from packlight.deploy import deploy
from packlight.errors import PlanError
from packlight.layers import Edit, replace_
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.reloading import skeleton
from packlight.serve import open_served
from packlight.techniques.separable import (
    GroupedConfig,
    SeparableConfig,
    blocks,
    error,
    grouping,
    replace_convolutions_,
    separated,
)
from packlight.windows import matrix_inputs
from small_whisper import save_model
from test_whole_model import batches

CONVS = ("model.encoder.conv1", "model.encoder.conv2")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.einsum("ocr,crk->ock", *pair)


def gram_of(channels: int, taps: int) -> Tensor:
    """Of inputs whose channels and taps go together, as real ones do."""
    mix = draw(channels * taps, channels * taps, seed=5) + 2 * draw(1, channels * taps, seed=6)
    rows = draw(4000, channels * taps, seed=7) @ mix
    return rows.T @ rows


@pytest.mark.parametrize("taught", [False, True])
def test_a_separable_convolution_is_found_exactly_and_a_lower_rank_is_worse(taught: bool) -> None:
    weight = whole((draw(12, 6, 2), draw(6, 2, 5, seed=1)))
    gram = gram_of(6, 5) if taught else None
    exact, worse = (error(weight, whole(separated(weight, rank, gram)), gram) for rank in (2, 1))
    assert exact < 1e-8
    assert worse > 1e-3
    assert error(weight, whole(separated(weight, 3, gram)), gram) < 1e-8


def test_without_data_no_other_pair_is_better_in_squared_error() -> None:
    weight = draw(8, 4, 3)
    best = error(weight, whole(separated(weight, 1, None)), None)
    slices = torch.linalg.svdvals(weight.movedim(1, 0)).square()
    assert best == pytest.approx(float(slices[:, 1:].sum() / slices.sum()))


def test_outputs_teach_better_than_weights_alone() -> None:
    weight, gram = draw(16, 6, 3), gram_of(6, 3)
    plain, taught = (error(weight, whole(separated(weight, 1, g)), gram) for g in (None, gram))
    assert taught < 0.8 * plain
    order, place = grouping(weight.square().sum(2), 2)
    plain, taught = (error(weight, blocks(weight, order, place, 2, g), gram) for g in (None, gram))
    assert taught < 0.8 * plain


def test_groups_that_are_there_are_found() -> None:
    energy = torch.kron(torch.eye(2), torch.ones(4, 3)).double() + 0.01
    shuffled_out, shuffled_in = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (8, 6))
    mixed = energy[shuffled_out][:, shuffled_in]
    order, place = grouping(mixed, 2)
    found = mixed[place][:, order]
    assert torch.allclose(found[:4, :3], torch.full((4, 3), 1.01).double())
    assert torch.allclose(found[4:, 3:], torch.full((4, 3), 1.01).double())


@pytest.mark.parametrize("like", [nn.Conv1d(6, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 3, padding=1, bias=False)])
def test_a_separable_layer_is_the_full_convolution_that_it_says(like: Any) -> None:
    layer = separable_(nn.ModuleDict({"conv": like}), "conv", {"rank": 2})
    assert isinstance(layer, Separable)
    x = torch.randn(2, 6, *([9] * (like.weight.dim() - 2)))
    how = {"stride": like.stride, "padding": like.padding}
    run = nn.functional.conv1d if like.weight.dim() == 3 else nn.functional.conv2d
    assert torch.allclose(layer(x), run(x, layer.weight, layer[1].bias, **how), atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("separable") / "model")


def data(count: int = 2) -> list[dict[str, Tensor]]:
    found = batches(count)
    smooth = torch.ones(1, 1, 1, 9) / 9  # neighbouring frames are alike, as in speech
    for b in found:
        x = b["input_features"][:, None]
        b["input_features"] = nn.functional.conv2d(x, smooth, padding=(0, 4))[:, 0] + 0.3
    return found


@pytest.mark.parametrize("config", [SeparableConfig(2), GroupedConfig(2)])
def test_a_model_is_taught_by_its_outputs(folder: Path, config: Any) -> None:
    model, original = load(str(folder)), load(str(folder))
    for m in (model, original):
        torch.manual_seed(0)
        nn.init.normal_(m.module.model.encoder.conv1.weight, std=0.1)
    samples = data()
    notes = replace_convolutions_(model, config, lambda path: path in CONVS, samples)
    assert [n["path"] for n in notes] == list(CONVS)
    assert not any(n["skipped"] for n in notes)
    assert all(n["error"] < n["start"] for n in notes)
    x = samples[0]["input_features"]
    conv = original.module.model.encoder.conv1
    with torch.no_grad():
        due, got = conv(x), model.module.model.encoder.conv1(x)
        rows = matrix_inputs(conv, x)
    bias = conv.bias.detach()[:, None]
    measured = float((got - due).square().sum() / (due - bias).square().sum())
    assert rows.shape[1] == 240
    assert measured == pytest.approx(notes[0]["error"], rel=0.3)  # of one of the two samples


def test_a_rank_that_saves_nothing_is_left_alone(folder: Path) -> None:
    model = load(str(folder))
    notes = replace_convolutions_(model, SeparableConfig(3, feedback=False), lambda path: path in CONVS, [])
    assert all("as many numbers" in n["skipped"] for n in notes)
    assert not model.edits


PLANS = {
    "separable": Step("separable_convolution", {"rank": 1}, ("model.encoder.conv?",)),
    "grouped": Step("grouped_convolution", {"groups": 4}, ("model.encoder.conv2",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PLANS))
def test_a_plan_gives_a_smaller_bundle_that_agrees_with_torch_and_reloads(
    folder: Path, tmp_path: Path, name: str
) -> None:
    from packlight.bundle import open_bundle
    from packlight.deploy import parity

    weights = Step("error_feedback", {"activations": "float"}, ("model.encoder.conv*", "*.fc?"))
    plan = Plan((PLANS[name], weights, Step("float16")), "whisper")
    model, samples = load(str(folder)), data()
    compress_(model, plan, samples, tmp_path / "work")
    kinds = [e.kind for e in model.edits]
    assert kinds[0] == name
    assert "codes" in kinds
    bundle = deploy(model, plan, [], tmp_path / "bundle", None, "transcribe").path
    served = open_served(bundle, 1)
    assert parity(model, served, samples[:1])["error"] < 1e-3
    served.answer(np.zeros(16000, np.float32))
    again = packlight.load(str(bundle))
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, samples[0]), model.family.run(model.module, samples[0]))
    assert open_bundle(bundle).manifest["reload"] == "packlight"
    full = load(str(folder))
    without = Plan((weights, Step("float16")), "whisper")
    compress_(full, without, samples, tmp_path / "full")
    larger = deploy(full, without, [], tmp_path / "larger", None, "transcribe")
    graphs = "encoder.onnx.gz"
    assert (bundle / "weights.safetensors").stat().st_size < (larger.path / "weights.safetensors").stat().st_size
    assert (bundle / graphs).is_file()
    resumed = load(str(folder))
    compress_(resumed, plan, samples, tmp_path / "work")  # takes up what the first call kept
    with torch.no_grad():
        assert torch.equal(resumed.family.run(resumed.module, samples[0]), model.family.run(model.module, samples[0]))


def test_refusals(folder: Path) -> None:
    model = load(str(folder))
    for step, words in (
        (Step("separable_convolution", {"rank": 0}, CONVS), "rank is 0"),
        (Step("grouped_convolution", {"groups": 1}, CONVS), "groups is 1"),
        (Step("grouped_convolution", {"groups": 7}, CONVS), "don't divide"),
        (Step("separable_convolution", {}, ("*.fc1",)), "no full convolution"),
    ):
        with pytest.raises(PlanError, match=words):
            check(Plan((step, Step("float16")), "whisper"), model, "given")
    with pytest.raises(PlanError, match="separable_convolution, which needs calibration"):
        check(Plan((PLANS["separable"], Step("float16")), "whisper"), model, None)
    with pytest.raises(PlanError, match="no full convolution"):
        replace_(model.module, Edit("proj_out", "separable", {"rank": 1}))
    with pytest.raises(PlanError, match="no number of filters"):
        replace_(model.module, Edit(CONVS[0], "separable", {"rank": 10**9}))


def test_the_skeleton_of_a_grouped_convolution_needs_no_memory(folder: Path) -> None:
    model = load(str(folder))
    fresh = skeleton("WhisperForConditionalGeneration", model.module.config.to_dict())
    with torch.device("meta"):
        layer = replace_(fresh, Edit(CONVS[1], "grouped", {"groups": 2}))
    assert isinstance(layer, Grouped)
    assert layer.conv.weight.is_meta
