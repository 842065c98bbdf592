"""Positions that are a formula: told from others, computed at load, refused where they are something else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from packlight.codec import read_weights, write_weights
from packlight.errors import BundleError, PlanError
from packlight.loading import load
from packlight.sensitivity import coded_paths, computed_paths
from packlight.sinusoids import sinusoids
from packlight.techniques.sinusoids import SinusoidsConfig, compute
from small_whisper import save_model

ENCODER, DECODER = "model.encoder.embed_positions", "model.decoder.embed_positions"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load(str(save_model(tmp_path / "model")))


def test_they_are_the_positions_of_transformers(model: Any) -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids as theirs

    assert np.abs(theirs(1500, 384).numpy() - sinusoids(1500, 384)).max() < 6e-4
    assert sinusoids(4, 8)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sinusoids(3, 8)[2, 0] == np.float32(np.float16(np.sin(2)))


def test_only_the_encoder_of_whisper_has_them(model: Any) -> None:
    assert computed_paths(model) == [ENCODER]
    assert ENCODER not in coded_paths(model) and DECODER in coded_paths(model)
    table = model.module.get_submodule(ENCODER).weight
    table.data[7, 3] += 0.01  # trained, or another formula
    assert computed_paths(model) == [] and ENCODER in coded_paths(model)


def test_the_technique_refuses_another_table(model: Any) -> None:
    made = compute(model.module.get_submodule(ENCODER).weight.detach(), None, SinusoidsConfig())
    assert made.rate == 0 and np.array_equal(made.tensors["weight"].numpy(), sinusoids(*made.approximation.shape))
    with pytest.raises(PlanError, match="sines and cosines only"):
        compute(torch.randn(10, 8), None, SinusoidsConfig())


def test_they_take_no_bytes_and_come_back_to_the_last_digit(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", {"p": sinusoids(1500, 384)})
    with safe_open(tmp_path / "w", "numpy") as file:
        assert file.get_tensor("p").size == 0
    assert dict(read_weights(tmp_path / "w"))["p"].tobytes() == sinusoids(1500, 384).tobytes()
    near = sinusoids(1500, 384)
    near[700, 100] = np.nextafter(np.float16(near[700, 100]), np.float16(2))
    write_weights(tmp_path / "w", {"p": near})  # one number is another: all are stored
    assert (tmp_path / "w").stat().st_size > near.size
    assert np.array_equal(dict(read_weights(tmp_path / "w"))["p"], near)


@pytest.mark.parametrize(
    ("shape", "dtype"), [([3], "float32"), ([4, 3], "float32"), ([4, 8], "int8"), ([10**5, 10**3], "float32")]
)
def test_impossible_sinusoids_are_refused(tmp_path: Path, shape: list[int], dtype: str) -> None:
    import json

    from safetensors.numpy import save_file

    index = {"p": {"dtype": dtype, "shape": shape, "coding": "sinusoids"}}
    save_file({"p": np.empty(0, np.uint8)}, tmp_path / "w", metadata={"packlight": json.dumps(index)})
    with pytest.raises(BundleError, match="can't be right"):
        list(read_weights(tmp_path / "w"))


def test_lessons_leave_them_as_they_are(model: Any) -> None:
    from packlight.techniques.distill import trained

    names = trained(model.module, ["model.encoder.*"])
    assert f"{ENCODER}.weight" not in names and "model.encoder.layers.0.fc1.weight" in names
