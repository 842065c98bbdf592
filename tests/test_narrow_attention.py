"""Heads of fewer numbers: exact where the rest is redundant, the least telling first, the same in the runtime."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packlight.deploy import deploy
from packlight.errors import PlanError
from packlight.loading import load
from packlight.model import Model
from packlight.narrow_attention import is_narrow
from packlight.plan import Plan, Step, read_plan
from packlight.pruning import narrowed_products
from packlight.pruning_effects import measure_effects
from packlight.pruning_plan import group_cost, prune_step
from packlight.serve import open_served
from packlight.structure import coupled
from packlight.techniques.prune_structure import PruneStructureConfig, prune_structure_
from small_dual import save_model as save_dual
from small_pruning import ENCODER, batches, divergence, fresh, largest_difference, logits
from small_whisper import save_model

FIRST = f"{ENCODER}.0.self_attn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("narrow") / "model")


def sizes(model: Model, path: str = FIRST) -> list[int]:
    return [len(model.module.get_submodule(f"{path}.{n}_proj").weight) for n in "qkv"]


def redundant_(module: torch.nn.Module, path: str, kind: str, rank: int, heads: int = 4) -> None:
    """Leave each head `rank` directions of queries with keys or of values, hidden by a rotation; biases stay."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in {"keys": ("k_proj",), "values": ("v_proj",)}[kind]:
            layer = module.get_submodule(f"{path}.{name}")
            size = len(layer.weight) // heads
            for h in range(heads):
                q = torch.linalg.qr(torch.randn(size, rank, generator=draw)).Q
                own = slice(h * size, (h + 1) * size)
                layer.weight[own] = q @ (q.T @ layer.weight[own])


@pytest.mark.parametrize(("kind", "left"), [("keys", [28, 28, 64]), ("values", [64, 64, 28])])
def test_what_is_redundant_goes_without_a_trace(folder: Path, kind: str, left: list[int]) -> None:
    model = fresh(folder)
    redundant_(model.module, FIRST, kind, 7)
    given = batches()
    before = logits(model, given)
    prune_structure_(model, PruneStructureConfig(**{kind: {FIRST: 7}}), batches(4, seed=3))
    assert sizes(model) == left  # smaller, not zeros
    exact = float((logits(model, given) - before).abs().max())
    assert exact < 1e-3 * float(before.abs().max())
    one_less = fresh(folder)
    redundant_(one_less.module, FIRST, kind, 7)
    prune_structure_(one_less, PruneStructureConfig(**{kind: {FIRST: 6}}), batches(4, seed=3))
    assert float((logits(one_less, given) - before).abs().max()) > 5 * exact


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_the_least_telling_go_first(folder: Path, kind: str) -> None:
    found, held = {}, batches(3, seed=9)
    before = logits(fresh(folder), held)
    for order in ("least", "most"):
        model = fresh(folder)
        prune_structure_(model, PruneStructureConfig(**{kind: {FIRST: 12}}, order=order), batches(4))
        found[order] = divergence(model, before, held)
    assert found["least"] < 0.5 * found["most"]


def test_one_solution_over_all_heads_beats_each_for_itself(folder: Path) -> None:
    found, held = {}, batches(3, seed=9)
    before = logits(fresh(folder), held)
    for compensate in (True, False):
        model = fresh(folder)
        prune_structure_(model, PruneStructureConfig(values={FIRST: 8}, compensate=compensate), batches(4))
        found[compensate] = divergence(model, before, held)
    assert found[True] < found[False]


def scores_lost(
    query: torch.Tensor, key: torch.Tensor, made: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor
) -> float:
    """Mean square of what changed in the scores of one head, less what all keys of a query share."""
    wide = torch.cat([x, x.new_ones(len(x), 1)], 1)
    change = (wide @ query.T) @ (x @ key.T).T - (wide @ made[0].T) @ (x @ made[1].T).T
    return float((change - change.mean(1, keepdim=True)).square().mean())


def test_no_other_directions_give_nearer_scores() -> None:
    """By Eckart and Young: worse with directions taken elsewhere, with keys not centred, or with the bias left out."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 12, generator=draw, dtype=torch.float64) @ torch.randn(12, 12, generator=draw).double() + 3
    query, key = torch.randn(8, 13, generator=draw).double(), torch.randn(8, 12, generator=draw).double()
    mean, covariance = x.mean(0), torch.cov(x.T, correction=0)
    best = scores_lost(query, key, narrowed_products(query, key, covariance, mean, 1, slice(4)), x)
    whole = scores_lost(query, key, narrowed_products(query, key, covariance, mean, 1, slice(8)), x)
    assert whole < 1e-6 * best
    for start in range(1, 5):
        other = narrowed_products(query, key, covariance, mean, 1, slice(start, start + 4))
        assert scores_lost(query, key, other, x) > best
    second = covariance + torch.outer(mean, mean)
    assert scores_lost(query, key, narrowed_products(query, key, second, mean, 1, slice(4)), x) > 1.01 * best
    plain = query.clone()
    plain[:, -1] = 0
    unbiased = narrowed_products(plain, key, covariance, mean, 1, slice(4))
    assert scores_lost(query, key, unbiased, x) > 1.01 * best


def test_heads_go_before_their_numbers(folder: Path) -> None:
    model = fresh(folder)
    config = PruneStructureConfig(heads={FIRST: 3}, keys={FIRST: 8}, values={FIRST: 12})
    changed = prune_structure_(model, config, batches())
    assert sizes(model) == [24, 24, 36]
    assert {f"{FIRST}.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")} == set(changed)
    assert torch.isfinite(logits(model, batches())).all()
    assert is_narrow(copy.deepcopy(model).module.get_submodule(FIRST))
    assert [c.kind for c in coupled(model.module, model.family.towers[0]) if c.path == FIRST] == ["keys", "values"]


@pytest.mark.parametrize("context", [False, True])
def test_the_bundle_says_what_torch_says(folder: Path, tmp_path: Path, context: bool) -> None:
    model = load(str(folder))
    paths = [f"{ENCODER}.{i}.self_attn" for i in range(2)]
    count = next(c.count for c in coupled(model.module, model.family.towers[0]) if c.kind == "keys")
    keys, values = {paths[0]: count // 2, paths[1]: count - 1}, {paths[1]: count // 4}
    given = [_given(model)]
    prune_structure_(model, PruneStructureConfig(keys=keys, values=values), given)
    if context:
        from packlight.context import AudioContext
        from packlight.families.whisper import shorten_

        shorten_(model.module, AudioContext())
    deploy(model, Plan((Step("float16"),), family="whisper"), [], tmp_path / "bundle", None, "transcribe")
    part = open_served(tmp_path / "bundle", threads=1).parts["encoder"]
    graph = model.family.graphs(model.module)[0]
    args = [torch.randn(graph.args[0].shape, generator=torch.Generator().manual_seed(0)), *graph.args[1:]]
    with torch.no_grad():
        theirs = graph.module(*args)
    ours = part.run({n: a.numpy() for n, a in zip(graph.inputs, args, strict=True)})
    for name, wanted in zip(graph.outputs, theirs, strict=True):
        assert np.abs(ours[name].numpy() - wanted.numpy()).max() < 1e-3 * float(wanted.abs().max())


def _given(model: Model) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    frames = 2 * model.module.config.max_source_positions
    start = model.module.config.decoder_start_token_id
    return {
        "input_features": torch.randn(1, model.module.config.num_mel_bins, frames, generator=draw),
        "decoder_input_ids": torch.tensor([[start, start]]),
        "first": torch.tensor(0),
        "spoken": torch.tensor(frames // 4),
    }


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip", "altclip", "metaclip_2", "vit_bert"])
def test_both_towers_of_dual_encoders_take_it(kind: str, tmp_path: Path) -> None:
    model = load(str(save_dual(tmp_path / "model", kind)))
    groups = [c for tower in model.family.towers for c in coupled(model.module, tower) if c.attention]
    for c in groups:
        if c.kind == "keys":
            redundant = model.module.get_submodule(c.rows[1])
            with torch.no_grad():
                redundant.weight.view(c.size, c.count, -1)[:, c.count // 2 :] = 0
    draw = torch.Generator().manual_seed(0)
    given = {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw), "input_ids": torch.randint(3, 18, (4, 12))}
    given["input_ids"][:, -1] = 2
    with torch.no_grad():
        before = model.family.run(model.module, given)
        keep = {c.path: c.count // 2 for c in groups if c.kind == "keys"}
        prune_structure_(model, PruneStructureConfig(keys=keep), [given])
        assert (model.family.run(model.module, given) - before).abs().max() < 1e-3
        prune_structure_(model, PruneStructureConfig(values=keep), [given])
        assert model.family.run(model.module, given).isfinite().all()
    deploy(model, Plan((Step("float16"),), family="dual-encoder"), [], tmp_path / "bundle", None, "")
    assert largest_difference(model, open_served(tmp_path / "bundle", threads=1)) < 1e-3


# The budget ---------------------------------------------------------------------------------------------------------


def test_the_budget_takes_what_is_redundant_and_counts_what_heads_share(folder: Path, tmp_path: Path) -> None:
    model = fresh(folder)
    with torch.no_grad():  # attention that counts, or leaving some of it out costs as little as rounding does
        for p in model.module.model.encoder.layers.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
        for layer in model.module.model.decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(8)
    redundant_(model.module, FIRST, "keys", 8)
    effects = measure_effects(model, batches(3), batches(2, seed=4), ("encoder",), tmp_path / "effects.jsonl")
    free = [e for e in effects if (e.path, e.kind) == (FIRST, "keys")]
    assert [e.removed for e in free] == [8] and free[0].kl < 1e-5
    telling = [e for e in effects if e.kind != "hidden"]  # of random feed-forwards, an eighth is free, too
    step = prune_step(model, telling, ("encoder",), 0.02)
    assert step.config == {"keys": {FIRST: 8}} and "numbers of each head's queries and keys" in step.reason
    costs = {c.kind: group_cost(model, c, "operations") for c in coupled(model.module, model.family.towers[0])[:3]}
    assert costs["heads"] * 4 == pytest.approx(16 * (costs["keys"] + costs["values"]))


def test_the_example_names_a_quarter_of_whisper_tiny() -> None:
    plan = read_plan(Path(__file__).resolve().parent.parent / "examples" / "quarter.json")
    config = plan.steps[0].config
    positions, width = 1500, 384

    def block(inside: int, hidden: int) -> int:  # projections and units of every position, products of every pair
        return positions * 2 * width * (inside + hidden) + positions**2 * inside

    stem = positions * (2 * 80 + width) * width * 3
    whole, left = stem + 4 * block(6 * 128, 1536), stem
    for i in range(4):
        attention = f"{ENCODER}.{i}.self_attn"
        numbers = config["keys"].get(attention, 64) + config["values"].get(attention, 64)
        hidden = config["hidden"].get(f"{ENCODER}.{i}", 1536)
        left += block(config["heads"].get(attention, 6) * numbers, hidden)
    assert 0.25 < 1 - left / whole < 0.26


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"keys": {FIRST: 17}}, "keeps 17 keys of"),
        ({"values": {"model.decoder.layers.0.self_attn": 8}}, "has no values that can be pruned"),
        ({"keys": {FIRST: 0}}, "it must be a whole number, 1 or more"),
        ({"values": [FIRST]}, "path of an attention -> how many stay"),
    ],
)
def test_what_can_t_be_is_refused(folder: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        prune_structure_(fresh(folder), PruneStructureConfig(**config), batches())


def test_it_needs_samples(folder: Path) -> None:
    with pytest.raises(PlanError, match="of keys or values needs calibration samples"):
        prune_structure_(fresh(folder), PruneStructureConfig(keys={FIRST: 8}, score="magnitude"), [])
