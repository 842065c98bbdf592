"""Structured pruning, the whole road: bundles, a second call, dual encoders, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_dual
import small_sound
from packlight.bundle import open_bundle
from packlight.compress import check, compress_
from packlight.deploy import deploy
from packlight.errors import PlanError
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.pruning_effects import measure_effects
from packlight.serve import open_served
from packlight.structure import coupled
from packlight.techniques.prune_structure import PruneStructureConfig, prune_structure_
from small_dual import save_model as save_dual
from small_pruning import DECODER, ENCODER, largest_difference, long_batches
from small_whisper import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("prune") / "model")


def plan_of(config: dict[str, Any]) -> Plan:
    steps = (Step("prune_structure", config), Step("round_to_nearest", {"activations": "float"}), Step("float16"))
    return Plan(steps)


CONFIG = {
    "heads": {f"{ENCODER}.0.self_attn": 1, f"{DECODER}.1.self_attn": 1, f"{DECODER}.1.encoder_attn": 1},
    "hidden": {f"{ENCODER}.0": 64, f"{DECODER}.1": 32},
}


@pytest.mark.parametrize("layers", [(), (f"{DECODER}.0",)])
def test_a_pruned_bundle_is_smaller_and_says_what_torch_says(folder: Path, tmp_path: Path, layers: Any) -> None:
    torch.manual_seed(0)
    given, sizes = long_batches(), {}
    for name, plan in (("whole", Plan(plan_of({}).steps[1:])), ("pruned", plan_of({**CONFIG, "layers": layers}))):
        model = load(str(folder))
        records = compress_(model, plan, given, tmp_path / name)
        deploy(model, plan, records, tmp_path / f"{name}.bundle", None, "transcribe")
        sizes[name] = sum(f.stat().st_size for f in (tmp_path / f"{name}.bundle").iterdir() if f.suffix != ".gz")
    assert sizes["pruned"] < 0.95 * sizes["whole"]
    bundle = tmp_path / "pruned.bundle"
    assert open_bundle(bundle).manifest["serving"]["heads"] == (1 if layers else [2, 1])
    assert {r.path for r in records} == set(model.layers()) | {r.path for r in records}
    served = open_served(bundle, threads=2)
    encoder, decoder = model.family.graphs(model.module)
    features = given[0]["input_features"]
    with torch.no_grad():
        cross = encoder.module(features)
    ours = served.parts["encoder"].run({"input_features": features.numpy()})
    for name, tensor in zip(encoder.outputs, cross, strict=True):
        assert np.abs(ours[name].numpy() - tensor.numpy()).max() < 1e-4
    feed = [
        torch.tensor([[151, 152]]),
        *(torch.zeros_like(a)[:, :, :0] for a in decoder.args[1 : 1 + len(cross)]),
        *cross,
    ]
    with torch.no_grad():
        theirs = decoder.module(*feed)
    out = served.parts["decoder"].run({n: t.numpy() for n, t in zip(decoder.inputs, feed, strict=True)})
    assert np.abs(out["logits"].numpy() - theirs[0].numpy()).max() < 1e-4
    assert served.answer(np.zeros(16000, np.float32)).windows == 1  # the device makes empty caches of the right size


def test_a_second_call_takes_up_what_was_pruned(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = long_batches()
    first, second = load(str(folder)), load(str(folder))
    plan = plan_of({**CONFIG, "layers": [f"{DECODER}.0"]})
    compress_(first, plan, given, tmp_path / "work")
    compress_(second, plan, [torch.nan for _ in given], tmp_path / "work")  # type: ignore[misc] - never looked at
    assert first.edits == second.edits
    for (name, a), (_, b) in zip(first.module.state_dict().items(), second.module.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_steps_that_name_a_block_mean_the_original_s(folder: Path, tmp_path: Path) -> None:
    model = load(str(folder))
    steps = (
        Step("prune_structure", {"layers": [f"{DECODER}.0"]}),
        Step("round_to_nearest", {"activations": "float"}, (f"{DECODER}.1.*",)),
        Step("float16"),
    )
    records = compress_(model, Plan(steps), [], tmp_path)
    by_path = {r.path: r.technique for r in records}
    assert by_path[f"{DECODER}.0.fc1"] == "round_to_nearest"


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip", "altclip", "metaclip_2", "vit_bert"])
def test_dual_encoders_are_pruned_too(kind: str, tmp_path: Path) -> None:
    model = load(str(save_dual(tmp_path / "model", kind)))
    found = [c for tower in model.family.towers for c in coupled(model.module, tower)]
    groups = [c for c in found if not c.attention]
    assert {c.kind for c in groups} == {"heads", "hidden"} and {c.kind for c in found} > {"keys", "values"}
    assert len(groups) == 8
    for c in groups:
        with torch.no_grad():
            columns = model.module.get_submodule(c.columns).weight
            columns[:, : columns.shape[1] // 2] = 0
    draw = torch.Generator().manual_seed(0)
    given = {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw), "input_ids": torch.randint(3, 18, (4, 12))}
    given["input_ids"][:, -1] = 2
    with torch.no_grad():
        before = model.family.run(model.module, given)
    keep = {kind: {c.path: c.count // 2 for c in groups if c.kind == kind} for kind in ("heads", "hidden")}
    prune_structure_(model, PruneStructureConfig(**keep), [given])
    with torch.no_grad():
        assert (model.family.run(model.module, given) - before).abs().max() < 1e-3
    for config in (model.module.config.text_config, model.module.config.vision_config):
        assert config.intermediate_size == 32


def test_a_pruned_dual_encoder_s_bundle_says_what_torch_says(tmp_path: Path) -> None:
    model = load(str(save_dual(tmp_path / "model", "vit_bert")))
    groups = [c for tower in model.family.towers for c in coupled(model.module, tower)]
    keep = {kind: {c.path: c.count // 2 for c in groups if c.kind == kind} for kind in ("heads", "hidden")}
    prune_structure_(model, PruneStructureConfig(**keep, score="magnitude", compensate=False), [])
    plan = Plan((Step("float16"),), family="dual-encoder")
    deploy(model, plan, [], tmp_path / "bundle", None, "")
    served = open_served(tmp_path / "bundle", threads=2)
    assert largest_difference(model, served) < 1e-4


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "nothing to prune"),
        ({"heads": {f"{ENCODER}.0.self_attn": 0}}, "1 or more"),
        ({"heads": {f"{ENCODER}.0.self_attn": 1.5}}, "1 or more"),
        ({"heads": [f"{ENCODER}.0.self_attn"]}, "must be an object"),
        ({"heads": {f"{ENCODER}.9.self_attn": 1}}, "has no heads that can be pruned"),
        ({"heads": {f"{ENCODER}.0.self_attn": 3}}, "which has 2"),
        ({"hidden": {f"{ENCODER}.0": 129}}, "which has 128"),
        ({"hidden": {f"{ENCODER}.0.fc1": 16}}, "has no hidden"),
        ({"layers": f"{ENCODER}.0"}, "list of paths"),
        ({"layers": [f"{ENCODER}.2"]}, "no block that can be taken out"),
        ({"layers": [f"{ENCODER}.0", f"{ENCODER}.1"]}, "every block of the encoder"),
        ({"layers": [f"{ENCODER}.0"], "hidden": {f"{ENCODER}.0": 16}}, "a block that goes"),
        ({"hidden": {f"{ENCODER}.0": 16}, "score": "third"}, "score is 'third'"),
        ({"hidden": {f"{ENCODER}.0": 16}, "order": "worst"}, "order is 'worst'"),
        ({"hidden": {f"{ENCODER}.0": 16}, "damp": 0}, "damp is 0"),
        ({"hidden": {f"{ENCODER}.0": 16}, "share": 0.5}, "no setting share"),
    ],
)
def test_wrong_settings_are_refused_before_work(folder: Path, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        check(plan_of(config), load(str(folder)), "given")


@pytest.mark.parametrize(
    ("kind", "block", "tower"), [("align", "vision_model.encoder.blocks.1", "vision"),
                                 ("clap", "audio_model.audio_encoder.layers.0", "audio")],
)  # fmt: skip
def test_towers_of_stages_are_refused_by_name(tmp_path: Path, kind: str, block: str, tower: str) -> None:
    """As the page says: not ALIGN's pictures and not CLAP's sounds, but the texts of both."""
    saved = small_sound.save_model(tmp_path / kind) if kind == "clap" else small_dual.save_model(tmp_path / kind, kind)
    model = load(str(saved))
    for config in ({"hidden": {block: 16}}, {"layers": [block]}):
        with pytest.raises(PlanError, match=rf"{block} (has no hidden|is no block) .*text_model"):
            check(Plan((Step("prune_structure", config), Step("float16")), "dual-encoder"), model, "given")
    with pytest.raises(PlanError, match=f"no tower '{tower}' that can be pruned. Those that can: text"):
        measure_effects(model, [], [], (tower,), tmp_path / "effects.jsonl")


def test_samples_are_asked_for_where_they_are_needed(folder: Path) -> None:
    model, hidden = load(str(folder)), {f"{ENCODER}.0": 64}
    with pytest.raises(PlanError, match="needs calibration samples"):
        check(plan_of({"hidden": hidden}), model)
    check(plan_of({"hidden": hidden, "score": "magnitude", "compensate": False}), model)
    check(plan_of({"layers": [f"{ENCODER}.0"]}), model)
