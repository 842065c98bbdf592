"""Where the time goes: parts sum to the whole, and a planted heavy layer is named first."""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import small_dual
from packlight.bundle import open_bundle
from packlight.deploy import deploy
from packlight.errors import DataError
from packlight.evaluate import Asked
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.profiling import kind_of, profile, profile_text, verdict
from packlight.runtimes.onnx import read_graph
from packlight.runtimes.onnx_trace import layers_of
from packlight.serve import open_served
from small_whisper import save_model

PLAN = Plan((Step("float16"),), "whisper")
HEAVY = "model.encoder.layers.1.fc1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Whisper, one of whose layers is wider than all others together."""
    folder = tmp_path_factory.mktemp("profile")
    model = load(str(save_model(folder / "model")))
    torch.manual_seed(0)
    block = model.module.model.encoder.layers[1]
    block.fc1, block.fc2 = nn.Linear(64, 8192), nn.Linear(8192, 64)
    block.activation_fn = nn.Identity()  # else the activation of 8192 values is dearer than the product
    return deploy(model, PLAN, [], folder / "bundle", None, "transcribe").path


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(0, 0.1, 16000 * n).astype(np.float32) for n in (1, 2)]


def test_stages_sum_to_the_answer_and_the_heavy_layer_is_named_first(bundle: Path, sounds: list[np.ndarray]) -> None:
    found = profile(bundle, sounds, Asked(threads=1))
    assert sum(row["share"] for row in found["stages"]) == pytest.approx(1, abs=0.02)
    assert sum(row["seconds"] for row in found["stages"]) == pytest.approx(found["wall"], rel=0.02)
    for graph in found["graphs"].values():
        assert sum(o["seconds"] for o in graph["ops"]) == pytest.approx(graph["seconds"], rel=1e-6)
    assert found["dearest"][0]["layer"] in (HEAVY, HEAVY.replace("fc1", "fc2"))
    assert "encoder's layers" in found["verdict"]
    assert {row["stage"]: row for row in found["stages"]}["encoder"]["per_second"] > 0
    assert found["best_threads"] in [row["threads"] for row in found["by_threads"]]
    text = profile_text(found)
    assert text.index(HEAVY[:-1]) > text.index("dearest")
    json.dumps(found)


def test_the_parts_agree_with_the_time_of_an_answer_without_a_clock(bundle: Path, sounds: list[np.ndarray]) -> None:
    served = open_served(bundle, 1)
    served.answer(sounds[0])
    plain = []
    for _ in range(5):
        start = time.perf_counter()
        for sound in sounds:
            served.answer(sound)
        plain.append((time.perf_counter() - start) / len(sounds))
    found = profile(bundle, sounds, Asked(threads=1))
    total = sum(row["seconds"] for row in found["stages"])
    assert 0.4 * min(plain) < total < 2.5 * max(plain)


def test_the_profilers_files_are_gone(bundle: Path, sounds: list[np.ndarray], tmp_path: Path) -> None:
    before = sorted(bundle.iterdir())
    kept, tempfile.tempdir = tempfile.tempdir, str(tmp_path)
    try:
        profile(bundle, sounds[:1], Asked(threads=1))
    finally:
        tempfile.tempdir = kept
    assert not list(tmp_path.iterdir())
    assert sorted(bundle.iterdir()) == before


def test_nodes_belong_to_the_layer_whose_weights_they_take(bundle: Path) -> None:
    graph = read_graph(bundle / open_bundle(bundle).manifest["graphs"]["encoder"])
    layers = set(layers_of(graph).values())
    for layer in (
        "model.encoder.conv1",
        "model.encoder.layers.0.self_attn.q_proj",
        HEAVY,
        "model.encoder.layers.0.self_attn",
    ):
        assert layer in layers


def test_pictures_with_texts_have_their_own_stages(tmp_path: Path) -> None:
    model = load(str(small_dual.save_model(tmp_path / "model")))
    path = deploy(model, Plan((Step("float16"),), "dual-encoder"), [], tmp_path / "bundle", None, "").path
    found = profile(path, [(small_dual.picture(i), ("a red dot", "blue")) for i in range(2)], Asked(threads=1))
    assert [row["stage"] for row in found["stages"]] == ["picture", "image tower", "tokenizer", "text tower"]
    assert sum(row["share"] for row in found["stages"]) == pytest.approx(1, abs=0.05)
    assert set(found["graphs"]) == {"image", "text"}
    assert "per_token" not in found["stages"][0]
    for name, tower in (("image", "image tower"), ("text", "text tower")):
        row = next(r for r in found["stages"] if r["stage"] == tower)
        assert found["graphs"][name]["seconds"] == pytest.approx(row["seconds"])


def test_the_verdict_names_the_largest_and_what_helps() -> None:
    stages = [
        {"stage": "features", "share": 0.1},
        {"stage": "search", "share": 0.1},
        {"stage": "encoder", "share": 0.8},
    ]
    head = {"graph": "decoder", "op": "MatMulNBits", "layer": "model.decoder.embed_tokens", "share": 0.61}
    rest = {"graph": "encoder", "op": "MultiHeadAttention", "layer": "model.encoder.layers.0.self_attn", "share": 0.19}
    assert verdict(stages, [head, rest]).startswith("61% of the time is the decoder's head: fewer tokens")
    assert verdict(stages, [rest]).startswith("19% of the time is the encoder's attention: a shorter audio context")
    slow = [{"stage": "features", "share": 0.9}]
    assert verdict(slow, [rest]).startswith("90% of the time is the features: no compression")


@pytest.mark.parametrize(
    ("op", "layer", "kind"),
    [
        ("DynamicQuantizeMatMul", "model.encoder.conv2", "convolutions"),
        ("MatMulIntegerToFloat", "model.encoder.layers.0.fc1", "layers"),
        ("MatMul", "proj_out", "head"),
        ("MatMul", "", "small operations"),
        ("Reshape", "model.encoder.conv2", "small operations"),
    ],
)
def test_kinds(op: str, layer: str, kind: str) -> None:
    assert kind_of(op, layer) == kind


def test_bench_refuses_a_profile_against_a_model(bundle: Path) -> None:
    from packlight.benching import bench_or_profile

    with pytest.raises(DataError, match="bundle alone"):
        bench_or_profile(bundle, None, "some/model", Asked(threads=1), True)
    found, text = bench_or_profile(bundle, None, None, Asked(threads=1), True)
    assert found["verdict"] in text
