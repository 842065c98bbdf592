"""Hidden channels of inverted residual blocks: planted answers, compensation, one budget with the text tower, bundles."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import packlight
from packlight.compress import compress_
from packlight.deploy import deploy, parity
from packlight.errors import PlanError
from packlight.layers import replace_
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.pruning_effects import measure_effects
from packlight.pruning_plan import prune_step, tower_cost
from packlight.serve import WEIGHTS, open_served
from packlight.structure import coupled
from packlight.techniques import prune_structure
from packlight.techniques.prune_structure import PruneStructureConfig, prune_structure_
from test_mobile_dual import save

VISION = "vision_model.blocks"
SCORES = ("second_order", "taylor", "magnitude")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("channels") / "model")


def fresh(folder: Path) -> Model:
    """A random model whose blocks do something, with channels of very different importance."""
    model = packlight.load(str(folder))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.module.vision_model.named_parameters():
            p.normal_(std=0.1 if p.dim() == 1 else 1.2 / p[0].numel() ** 0.5, generator=draw)
            if "project.conv.weight" in name:
                p.mul_(torch.logspace(0.3, -1.2, p.shape[1])[torch.randperm(p.shape[1], generator=draw)][:, None, None])
    return model


def batches(count: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(6, 3, 32, 32, generator=draw),
            "input_ids": torch.randint(3, 18, (6, 7), generator=draw),
            "attention_mask": torch.ones(6, 7, dtype=torch.long),
        }
        for _ in range(count)
    ]


def vectors(model: Model, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.family.encode(model.module, b)["states"] for b in given])


def test_the_channels_of_widened_blocks_are_found_and_no_others(folder: Path) -> None:
    found = {c.path: c.count for c in coupled(fresh(folder).module, fresh(folder).family.towers[0])}
    assert found == {f"{VISION}.1": 16, f"{VISION}.2": 24, f"{VISION}.3": 36}  # block 0 widens nothing


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("compensate", [True, False])
def test_dead_channels_go_first_and_nothing_changes(folder: Path, score: Any, compensate: bool) -> None:
    model = fresh(folder)
    dead = {f"{VISION}.2": [1, 2, 9, 23], f"{VISION}.3": [0, 17, 30, 31]}
    kept = {}
    with torch.no_grad():
        for path, gone in dead.items():
            block = model.module.get_submodule(path)
            block.project.conv.weight[:, gone] = 0
            alive = [i for i in range(block.depthwise.conv.out_channels) if i not in gone]
            kept[path] = block.depthwise.conv.weight[alive].clone()
    before = vectors(model, batches())
    config = PruneStructureConfig(channels={p: len(w) for p, w in kept.items()}, score=score, compensate=compensate)
    prune_structure_(model, config, batches())
    assert (vectors(model, batches()) - before).abs().max() < 1e-5
    for path, weight in kept.items():
        block = model.module.get_submodule(path)
        if score != "taylor":  # to first order others are dead too: those that ReLU6 silences on these samples
            assert torch.equal(block.depthwise.conv.weight, weight)
        assert block.depthwise.conv.groups == block.expand.conv.out_channels == len(weight)
        assert block.project.conv.weight.shape[1] == len(weight)


def test_twins_are_made_one_by_second_order_with_compensation(folder: Path) -> None:
    """Channels 3 and 20 give the same and are read differently; one can stand for both, if its column is solved anew."""
    model = fresh(folder)
    with torch.no_grad():
        block = model.module.get_submodule(f"{VISION}.2")
        for conv in (block.expand.conv, block.depthwise.conv):
            conv.weight[20], conv.bias[20] = conv.weight[3].clone(), conv.bias[3].clone()
        block.project.conv.weight[:, [3, 20]] *= 20
    before, found = vectors(model, batches()), {}
    for compensate in (True, False):
        pruned = copy.deepcopy(model)
        config = PruneStructureConfig(channels={f"{VISION}.2": 23}, damp=1e-8, compensate=compensate)
        prune_structure_(pruned, config, batches())
        found[compensate] = float((vectors(pruned, batches()) - before).abs().max())
    assert found[True] < 0.05 * found[False]


@pytest.mark.parametrize("score", SCORES)
def test_least_important_first_beats_most_and_compensation_beats_none(folder: Path, score: Any) -> None:
    model, given, held = fresh(folder), batches(6), batches(4, seed=9)
    before, found = vectors(model, held), {}
    keep = {f"{VISION}.1": 8, f"{VISION}.2": 12, f"{VISION}.3": 16}
    for order, compensate in (("least", True), ("most", True), ("least", False)):
        pruned = copy.deepcopy(model)
        config = PruneStructureConfig(channels=keep, score=score, order=order, compensate=compensate)  # type: ignore[arg-type]
        prune_structure_(pruned, config, given)
        found[order, compensate] = float((vectors(pruned, held) - before).square().sum(1).mean())
    assert found["least", True] < 0.5 * found["most", True]
    assert found["least", True] < 0.8 * found["least", False]


def test_filters_of_other_channels_would_be_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberate fault: the depthwise filters keep the first channels, whichever stay."""
    sliced = prune_structure._sliced

    def wrong(layer: Any, index: torch.Tensor) -> Any:
        return sliced(layer, torch.arange(len(index)) if getattr(layer, "groups", 1) > 1 else index)

    monkeypatch.setattr(prune_structure, "_sliced", wrong)
    with pytest.raises(AssertionError):
        test_dead_channels_go_first_and_nothing_changes(folder, "second_order", False)


def test_only_blocks_that_keep_the_shape_can_be_taken_out(folder: Path) -> None:
    model = fresh(folder)
    with pytest.raises(PlanError, match="no block that can be taken out"):
        prune_structure_(model, PruneStructureConfig(layers=(f"{VISION}.1",)), [])
    with torch.no_grad():
        project = model.module.get_submodule(f"{VISION}.2.project.conv")
        project.weight.zero_()
        project.bias.zero_()
    before = vectors(model, batches())
    prune_structure_(model, PruneStructureConfig(layers=(f"{VISION}.2",)), [])
    assert torch.equal(vectors(model, batches()), before)


def test_wrong_channels_are_refused(folder: Path) -> None:
    for channels, why in (({f"{VISION}.0": 4}, "has no channels that can be pruned"), ({f"{VISION}.1": 17}, "has 16")):
        with pytest.raises(PlanError, match=why):
            prune_structure_(fresh(folder), PruneStructureConfig(channels=channels), batches())
    with pytest.raises(PlanError, match="channels keeps"):
        PruneStructureConfig(channels={f"{VISION}.1": 0})


# One budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["operations", "parameters"])
def test_one_budget_covers_both_towers(folder: Path, tmp_path: Path, unit: Any) -> None:
    model, towers = fresh(folder), ("vision", "text")
    total = sum(tower_cost(model, t, unit) for t in model.family.towers)
    effects = measure_effects(model, batches(4), batches(2, seed=3), towers, tmp_path / "pruning.jsonl")
    assert {e.kind for e in effects} == {"heads", "hidden", "channels", "layers", "keys", "values"}
    assert [e.path for e in effects if e.kind == "layers" and "vision" in e.path] == [f"{VISION}.0", f"{VISION}.2"]
    step = prune_step(model, effects, towers, 0.15, unit)
    assert {"channels", "hidden"} & set(step.config)
    assert all(n % 8 == 0 or n == 36 for n in step.config.get("channels", {}).values())
    prune_structure_(model, PruneStructureConfig(**step.config), batches(4))
    pruned = model.family.bind(model.family, model.module, model.settings)
    model.family = pruned  # counts positions anew
    removed = 1 - sum(tower_cost(model, t, unit) for t in pruned.towers) / total
    assert 0.15 <= removed + 1e-9 < 0.3


def test_a_useless_block_of_convolutions_goes_first(folder: Path, tmp_path: Path) -> None:
    model = fresh(folder)
    with torch.no_grad():
        model.module.get_submodule(f"{VISION}.3.project.conv").weight[:, :28] = 0
    effects = measure_effects(model, batches(4), batches(2, seed=3), ("vision",), tmp_path / "pruning.jsonl")
    assert set(prune_step(model, effects, ("vision",), 0.03).config["channels"]) == {f"{VISION}.3"}


# The whole road -----------------------------------------------------------------------------------------------------


def test_replaying_the_edits_gives_the_same_skeleton(folder: Path) -> None:
    model = fresh(folder)
    original = copy.deepcopy(model.module)
    prune_structure_(model, PruneStructureConfig(channels={f"{VISION}.1": 8, f"{VISION}.3": 20}), batches())
    for edit in model.edits:
        replace_(original, edit)
    original.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        got = original.get_image_features(batches()[0]["pixel_values"])
        assert torch.equal(got, model.module.get_image_features(batches()[0]["pixel_values"]))


def test_a_pruned_bundle_is_smaller_runs_without_torch_and_loads_again(folder: Path, tmp_path: Path) -> None:
    sizes = {}
    text = {"heads": {"text_model.encoder.layer.0.attention.self": 1}, "hidden": {"text_model.encoder.layer.1": 32}}
    pruning = Step("prune_structure", {"channels": {f"{VISION}.2": 16, f"{VISION}.3": 16}, **text})
    for name, first in (("whole", []), ("pruned", [pruning])):
        model = fresh(folder)
        depthwise = tuple(p for p, layer in model.layers().items() if getattr(layer, "groups", 1) > 1)
        steps = (*first, Step("float16", {}, depthwise), Step("error_feedback", {"rate": 4.0}), Step("float16"))
        plan, given = Plan(steps, family="dual-encoder"), batches(4)
        records = compress_(model, plan, given, tmp_path / f"{name}.waves")
        deploy(model, plan, records, tmp_path / name, None, "")
        sizes[name] = (tmp_path / name / WEIGHTS).stat().st_size
        device = open_served(tmp_path / name, 1)
        assert parity(model, device, given[:2])["passed"]
    assert sizes["pruned"] < 0.95 * sizes["whole"]
    again = packlight.load(str(tmp_path / "pruned"))
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, given[0]), model.family.run(model.module, given[0]))
    twice = fresh(folder)  # a second call takes up what was pruned
    compress_(twice, plan, given, tmp_path / "pruned.waves")
    assert twice.edits == model.edits
    assert all(torch.equal(t, twice.module.state_dict()[n]) for n, t in model.module.state_dict().items())
