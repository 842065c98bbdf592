"""Structured pruning on small random models: planted answers, compensation, edits, and bundles that run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from packlight.layers import replace_
from packlight.model import Model
from packlight.pruning import compensated, removal_order, shifted
from packlight.structure import coupled
from packlight.techniques.prune_structure import PruneStructureConfig, prune_structure_
from small_pruning import DECODER, ENCODER, batches, divergence, fresh, kill_heads_, kill_units_, logits
from small_whisper import save_model

SCORES = ("second_order", "taylor", "magnitude")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("prune") / "model")


# Planted answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("compensate", [True, False])
def test_dead_heads_and_units_go_first_and_nothing_changes(folder: Path, score: Any, compensate: bool) -> None:
    model = fresh(folder)
    paths = (f"{ENCODER}.0.self_attn", f"{DECODER}.1.self_attn", f"{DECODER}.0.encoder_attn")
    for path, dead in zip(paths, [(1,), (0, 2), (3,)], strict=True):
        kill_heads_(model.module, path, dead)
    for path in (f"{ENCODER}.1", f"{DECODER}.0"):
        kill_units_(model.module, path, range(20, 52))
    before = logits(model, batches())
    keep = dict(zip(paths, (3, 2, 3), strict=True))
    hidden = {f"{ENCODER}.1": 96, f"{DECODER}.0": 96}
    size = sum(p.numel() for p in model.module.parameters())
    prune_structure_(model, PruneStructureConfig(keep, hidden, score=score, compensate=compensate), batches())
    assert sum(p.numel() for p in model.module.parameters()) < 0.9 * size
    assert (logits(model, batches()) - before).abs().max() < 2e-4
    assert model.module.get_submodule(paths[1]).num_heads == 2
    assert model.module.get_submodule(paths[1]).q_proj.weight.shape == (32, 64)
    assert model.module.get_submodule(f"{ENCODER}.1.fc1").bias.shape == (96,)


def test_twins_are_made_one_by_second_order_with_compensation(folder: Path) -> None:
    model = fresh(folder)
    attention, block = f"{ENCODER}.0.self_attn", model.module.get_submodule(f"{ENCODER}.1")
    module = model.module.get_submodule(attention)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):  # head 2 sees what head 0 sees, and is read differently
            layer = getattr(module, name)
            layer.weight[32:48] = layer.weight[0:16]
            if layer.bias is not None:
                layer.bias[32:48] = layer.bias[0:16]
        block.fc1.weight[64:96], block.fc1.bias[64:96] = block.fc1.weight[0:32].clone(), block.fc1.bias[0:32].clone()
    before = logits(model, batches())
    config = PruneStructureConfig({attention: 3}, {f"{ENCODER}.1": 96}, damp=1e-7)
    bare = PruneStructureConfig({attention: 3}, {f"{ENCODER}.1": 96}, damp=1e-7, compensate=False)
    other = copy.deepcopy(model)
    prune_structure_(model, config, batches())
    assert (logits(model, batches()) - before).abs().max() < 1e-3
    prune_structure_(other, bare, batches())
    assert (logits(other, batches()) - before).abs().max() > 1e-1  # what went was read, so it must be made up for


def test_units_that_always_say_the_same_move_into_the_bias(folder: Path) -> None:
    model = fresh(folder)
    layer = model.module.get_submodule(f"{DECODER}.1.fc1")
    with torch.no_grad():
        layer.weight[32:64], layer.bias[32:64] = 0, 2.0
    before = logits(model, batches())
    prune_structure_(model, PruneStructureConfig(hidden={f"{DECODER}.1": 96}), batches())
    assert (logits(model, batches()) - before).abs().max() < 1e-3


def test_a_block_that_does_nothing_can_be_dropped(folder: Path) -> None:
    model = fresh(folder)
    given = batches()
    with torch.no_grad():
        for path in (f"{DECODER}.0.self_attn.out_proj", f"{DECODER}.0.encoder_attn.out_proj", f"{DECODER}.0.fc2"):
            layer = model.module.get_submodule(path)
            layer.weight.zero_()
            layer.bias.zero_()
    before = logits(model, given)
    config = PruneStructureConfig(hidden={f"{DECODER}.1": 112}, layers=(f"{DECODER}.0",))
    pruned, plain = copy.deepcopy(model), model
    prune_structure_(plain, PruneStructureConfig(layers=(f"{DECODER}.0",)), [])
    assert torch.equal(logits(plain, given), before)
    assert plain.module.config.decoder_layers == len(plain.module.model.decoder.layers) == 1
    assert plain.module.model.decoder.layers[0].self_attn.layer_idx == 0
    assert plain.origin(f"{DECODER}.0.fc1") == f"{DECODER}.1.fc1"
    prune_structure_(pruned, config, given)  # paths are those of the original, so this prunes what is now block 0
    assert pruned.module.get_submodule(f"{DECODER}.0.fc1").out_features == 112


# Numerics -----------------------------------------------------------------------------------------------------------


def test_compensation_is_the_least_squares_solution_with_the_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=draw, dtype=torch.float64) @ torch.randn(12, 12, generator=draw).double() + 3
    weight, bias = torch.randn(5, 12, generator=draw), torch.randn(5, generator=draw)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 11])
    second = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    made = compensated(weight, second, kept, 1e-12)
    offset = shifted(bias, weight, made, kept, x.mean(0))
    target = x @ weight.double().T + bias
    ones = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(ones, target).solution
    error = (x[:, kept] @ made.double().T + offset - target).square().sum(1).mean()
    least = (ones @ best - target).square().sum(1).mean()
    assert error == pytest.approx(float(least), rel=1e-4)
    assert (x[:, kept] @ made.double().T + bias - target).square().sum(1).mean() > 2 * least  # the bias matters


@pytest.mark.parametrize("size", [1, 3])
def test_what_a_removal_costs_is_what_least_squares_leaves(size: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(400, 12, generator=draw).double() @ torch.randn(12, 12, generator=draw).double()
    weight, second = torch.randn(4, 12, generator=draw), x.T @ x / len(x)
    for most in (False, True):
        order, costs = removal_order(weight, second, size, 2, 1e-12, most)
        gone = set()
        for step, (group, cost) in enumerate(zip(order, costs, strict=True)):
            left: dict[int, float] = {}
            for g in set(range(12 // size)) - gone:
                out = {c for h in {*gone, g} for c in range(h * size, (h + 1) * size)}
                kept = torch.tensor([c for c in range(12) if c not in out])
                change = x[:, kept] @ compensated(weight, second, kept, 1e-12).double().T - x @ weight.double().T
                left[g] = float(change.square().sum(1).mean())
            if step == 0:
                assert group == (max if most else min)(left, key=lambda g: left[g])
                assert cost == pytest.approx(left[group], rel=1e-4)
            gone.add(group)
        assert sum(costs) == pytest.approx(left[order[-1]], rel=1e-4)  # each is what comes on top


def test_wrong_columns_are_not_what_second_order_takes() -> None:
    """The cheapest set by exhaustion is found, and the rows of the layer before go with the same indices."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(300, 6, generator=draw).double()
    x[:, 4] = x[:, 1] * 2
    weight = torch.randn(3, 6, generator=draw)
    order, costs = removal_order(weight, x.T @ x / 300, 1, 1, 1e-9)
    assert order[0] in (1, 4)
    assert costs[0] < 1e-6


# Quality ------------------------------------------------------------------------------------------------------------


def half(**how: Any) -> PruneStructureConfig:
    heads = {f"{ENCODER}.{i}.self_attn": 2 for i in range(2)} | {f"{DECODER}.{i}.self_attn": 2 for i in range(2)}
    hidden = {f"{b}.{i}": 64 for b in (ENCODER, DECODER) for i in range(2)}
    return PruneStructureConfig(heads, hidden, **how)


@pytest.fixture(scope="module")
def uneven(folder: Path) -> Model:
    """Heads and units of very different importance, as trained models have them."""
    model = fresh(folder)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tower in model.family.towers:
            for c in [c for c in coupled(model.module, tower) if not c.attention]:
                scale = torch.logspace(0, -1.5, c.count)[torch.randperm(c.count, generator=draw)]
                model.module.get_submodule(c.columns).weight.mul_(scale.repeat_interleave(c.size))
    return model


@pytest.mark.parametrize("score", SCORES)
def test_least_important_first_beats_most_important_first(uneven: Model, score: Any) -> None:
    given, held = batches(4), batches(3, seed=9)
    before, found = logits(uneven, held), {}
    for order in ("least", "most"):
        model = copy.deepcopy(uneven)
        prune_structure_(model, half(score=score, order=order), given)
        found[order] = divergence(model, before, held)
    assert found["least"] < 0.5 * found["most"]


def test_compensation_beats_none(uneven: Model) -> None:
    given, held = batches(4), batches(3, seed=9)
    before, found = logits(uneven, held), {}
    for compensate in (True, False):
        model = copy.deepcopy(uneven)
        prune_structure_(model, half(compensate=compensate), given)
        found[compensate] = divergence(model, before, held)
    assert found[True] < 0.8 * found[False]


def test_pruning_is_the_same_every_time(folder: Path) -> None:
    first, second = fresh(folder), fresh(folder)
    for model in (first, second):
        prune_structure_(model, half(), batches())
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


# Reload -------------------------------------------------------------------------------------------------------------


def test_replaying_the_edits_gives_the_same_skeleton(folder: Path) -> None:
    model = fresh(folder)
    original = copy.deepcopy(model.module)
    config = PruneStructureConfig(
        {f"{ENCODER}.1.self_attn": 3, f"{DECODER}.1.encoder_attn": 1}, {f"{DECODER}.1": 48}, (f"{DECODER}.0",)
    )
    prune_structure_(model, config, batches())
    assert [e.kind for e in model.edits] == ["drop_layer", "heads", "heads", "hidden"]
    for edit in model.edits:
        replace_(original, edit)
    tensors = {name: t.shape for name, t in original.state_dict().items()}
    assert tensors == {name: t.shape for name, t in model.module.state_dict().items()}
    original.load_state_dict(model.module.state_dict())
    other = copy.copy(model)
    other.module = original
    assert torch.equal(logits(other, batches()), logits(model, batches()))


def test_the_config_follows_where_it_can_say_it(folder: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model = fresh(folder)
    hidden = {f"{ENCODER}.0": 64, f"{ENCODER}.1": 64}
    prune_structure_(model, PruneStructureConfig(hidden=hidden, layers=(f"{DECODER}.1",)), batches())
    config = model.module.config
    assert (config.encoder_ffn_dim, config.decoder_layers) == (64, 1)
    again = WhisperForConditionalGeneration(config)
    again.load_state_dict(model.module.state_dict())
