"""One budget for pruning: it is met, spent where it costs least, and a useless block goes first."""

from pathlib import Path
from typing import Any

import pytest
import torch

from packlight.errors import PlanError
from packlight.model import Model
from packlight.pruning_effects import Effect, measure_effects
from packlight.pruning_plan import prune_step, tower_cost
from packlight.structure import coupled
from packlight.techniques.prune_structure import PruneStructureConfig, prune_structure_
from small_pruning import DECODER, ENCODER, batches, fresh, kill_heads_, kill_units_, logits
from small_whisper import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("budget") / "model")


@pytest.fixture(scope="module")
def planted(folder: Path) -> Model:
    """Block 1 of the encoder does nothing; half of the units of block 0 of the decoder do nothing."""
    model = fresh(folder)
    with torch.no_grad():
        for path in (f"{ENCODER}.1.self_attn.out_proj", f"{ENCODER}.1.fc2"):
            layer = model.module.get_submodule(path)
            layer.weight.zero_()
            layer.bias.zero_()
    kill_units_(model.module, f"{DECODER}.0", range(64))
    return model


@pytest.fixture(scope="module")
def effects(planted: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Effect]:
    kept = tmp_path_factory.mktemp("effects") / "pruning.jsonl"
    before = logits(planted, batches())
    found = measure_effects(planted, batches(3), batches(2, seed=4), ("encoder", "decoder"), kept)
    assert torch.equal(logits(planted, batches()), before)  # the model is as it was
    again = measure_effects(planted, [], [], ("encoder", "decoder"), kept)  # an earlier run's are taken up
    assert sorted(map(str, again)) == sorted(map(str, found))
    return found


def counted(model: Model, tower: Any) -> float:
    """Multiply-adds by hand, on the pruned model: weights times rows, and both products of each attention."""
    frames, tokens = model.module.config.max_source_positions, 25
    total = 0.0
    for path, layer in model.layers().items():
        if tower.has(path) and not isinstance(layer, torch.nn.Embedding):
            audio = ".encoder." in path or path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
            rows = frames if audio else tokens
            total += layer.weight.numel() * (2 * rows if path.endswith("conv1") else rows)
    for path, m in model.module.named_modules():
        if hasattr(m, "num_heads") and tower.has(f"{path}.q_proj"):
            queries = frames if ".encoder." in path else tokens
            keys = tokens if ".decoder." in path and path.endswith("self_attn") else frames
            total += queries * keys * (len(m.q_proj.weight) + len(m.v_proj.weight))
    return total


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("towers", [("encoder",), ("encoder", "decoder")])
def test_the_budget_is_met_and_hardly_more(
    planted: Model, effects: list[Effect], folder: Path, towers: tuple[str, ...], share: float
) -> None:
    step = prune_step(planted, effects, towers, share)
    own = [t for t in planted.family.towers if t.name in towers]
    before = sum(counted(planted, t) for t in own)
    assert sum(tower_cost(planted, t, "operations") for t in own) == pytest.approx(before)
    pruned = fresh(folder)
    config = PruneStructureConfig(**step.config, score="magnitude", compensate=False)
    prune_structure_(pruned, config, batches())
    removed = 1 - sum(counted(pruned, t) for t in own) / before
    assert share <= removed + 1e-9 < share + 0.08
    assert all(n % 16 == 0 for n in config.hidden.values())
    assert all(n >= 1 for n in config.heads.values())
    assert f"{removed:.1%} of the multiply-adds" in step.reason


def test_a_useless_block_goes_first(planted: Model, effects: list[Effect]) -> None:
    encoder = planted.family.towers[0]
    whole = tower_cost(planted, encoder, "operations")
    block = tower_cost(planted, encoder, "operations", f"{ENCODER}.1.")
    less = prune_step(planted, effects, ("encoder",), 0.5 * block / whole).config
    assert {p for kind in less.values() for p in kind if p.startswith(ENCODER)} <= {
        f"{ENCODER}.1",
        f"{ENCODER}.1.self_attn",
    }
    assert prune_step(planted, effects, ("encoder",), block / whole).config == {"layers": [f"{ENCODER}.1"]}


def test_useless_units_go_before_useful_ones(planted: Model, effects: list[Effect]) -> None:
    step = prune_step(planted, effects, ("decoder",), 0.02, "parameters")
    assert step.config == {"hidden": {f"{DECODER}.0": step.config["hidden"][f"{DECODER}.0"]}}
    assert step.config["hidden"][f"{DECODER}.0"] >= 64


def test_the_cheaper_kind_is_taken_whatever_the_order(folder: Path) -> None:
    model = fresh(folder)
    groups = {(c.kind, c.path): c for c in coupled(model.module, model.family.towers[0])}
    for cheap in ("heads", "hidden"):
        made = []
        for (kind, path), c in groups.items():
            kl = 1e-6 if kind == cheap else 1.0
            made += [Effect(path, kind, c.count // 4, kl), Effect(path, kind, 3 * c.count // 4, 5 * kl)]
        assert set(prune_step(model, made, ("encoder",), 0.1).config) == {cheap}


def test_what_is_dead_costs_nothing_and_what_is_not_does(folder: Path, tmp_path: Path) -> None:
    model = fresh(folder)
    kill_heads_(model.module, f"{DECODER}.0.self_attn", (1, 3))
    judged = batches(2, seed=4)
    found = measure_effects(model, batches(3), judged, ("decoder",), tmp_path / "pruning.jsonl")
    free = [e for e in found if e.path == f"{DECODER}.0.self_attn" and e.removed <= 2]
    assert free and max(e.kl for e in free) < 1e-5  # they were dead
    dear = [e for e in found if e.path == f"{DECODER}.0.self_attn" and e.removed > 2]
    assert dear and min(e.kl for e in dear) > 100 * max(e.kl for e in free)


def test_wrong_requests_are_refused(planted: Model, effects: list[Effect]) -> None:
    with pytest.raises(PlanError, match="no tower 'vision'"):
        prune_step(planted, effects, ("vision",), 0.2)
    with pytest.raises(PlanError, match="between 0 and 1"):
        prune_step(planted, effects, ("encoder",), 1.5)
    with pytest.raises(PlanError, match="can be pruned"):
        prune_step(planted, effects, ("encoder",), 0.99)
