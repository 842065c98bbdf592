"""Low-rank factors: planted ranks, the best plane of the outputs, and bundles that run."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from packlight.compress import check, compress_
from packlight.deploy import deploy
from packlight.errors import PlanError
from packlight.layers import replace_
from packlight.loading import load
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.serve import open_served
from packlight.structure import LowRank
from packlight.techniques.low_rank import LowRankConfig, directions, factors, low_rank_
from small_pruning import DECODER, ENCODER, batches, fresh, logits, long_batches
from small_whisper import save_model

FIRST = f"{ENCODER}.0.fc1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("rank") / "model")


def thin_(layer: nn.Linear, rank: int) -> None:
    """Give a layer's weight that rank."""
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(u[:, :rank] * s[:rank] @ v[:rank])


def planted(folder: Path) -> Model:
    model = fresh(folder)
    for path in (FIRST, f"{DECODER}.1.self_attn.k_proj", f"{DECODER}.1.encoder_attn.v_proj"):
        thin_(model.module.get_submodule(path), 10)
    return model


def test_a_layer_of_low_rank_is_found_and_nothing_changes(folder: Path) -> None:
    model = planted(folder)
    before, size = logits(model, batches()), sum(p.numel() for p in model.module.parameters())
    notes = low_rank_(model, LowRankConfig(energy=0.99999), lambda p: p.endswith(("fc1", "_proj")), batches(6))
    taken = {n["path"]: n["rank"] for n in notes if not n["skipped"]}
    assert taken[FIRST] == 16  # 10, as a multiple of 16
    assert taken[f"{DECODER}.1.self_attn.k_proj"] == 16  # has no bias, and gets none
    assert model.module.get_submodule(f"{DECODER}.1.self_attn.k_proj.1").bias is None
    assert (logits(model, batches()) - before).abs().max() < 0.05 * before.abs().max()
    assert sum(p.numel() for p in model.module.parameters()) < size
    assert all(e.kind == "low_rank" for e in model.edits)


def test_only_what_is_exact_changes_nothing(folder: Path) -> None:
    model = planted(folder)
    before = logits(model, batches())
    low_rank_(model, LowRankConfig(rank=16), lambda p: p == FIRST, batches())
    assert isinstance(model.module.get_submodule(FIRST), LowRank)
    assert (logits(model, batches()) - before).abs().max() < 1e-4


def test_factors_are_the_best_of_their_rank_for_the_outputs() -> None:
    draw = torch.Generator().manual_seed(0)
    mix = torch.diag(torch.logspace(1, -2, 32)) @ torch.linalg.qr(torch.randn(32, 32, generator=draw))[0]
    x = torch.randn(2000, 32, generator=draw) @ mix + 2.0
    layer = nn.Linear(32, 24)
    y = (x @ layer.weight.T + layer.bias).detach()
    centred = (x - x.mean(0)).double()
    second = centred.T @ centred / len(x)
    rank, kept, basis = directions(layer.weight.detach(), second, LowRankConfig(rank=6))
    first, wide, bias = factors(layer, basis, x.mean(0).double())
    assert bias is not None
    error = (x @ first.T @ wide.T + bias - y).square().sum(1).mean()
    singular = torch.linalg.svdvals((y - y.mean(0)).double()).square() / len(x)
    assert rank == 6
    assert error == pytest.approx(float(singular[6:].sum()), rel=1e-3)  # no plane of six dimensions is nearer
    assert kept == pytest.approx(float(singular[:6].sum() / singular.sum()), rel=1e-6)
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    blind = (x @ (u[:, :6] * s[:6] @ v[:6]).T + layer.bias - y).square().sum(1).mean()
    assert error < 0.5 * blind  # than the weight's own singular vectors
    assert ((x @ first.T @ wide.T + bias).mean(0) - y.mean(0)).abs().max() < 1e-3
    assert (x @ first.T @ wide.T + layer.bias - y).square().sum(1).mean() > 1.2 * error  # the bias matters


def test_more_energy_never_loses_more(folder: Path) -> None:
    ranks, errors = [], []
    for energy in (0.5, 0.9, 0.99):
        model = fresh(folder)
        before = logits(model, batches())
        notes = low_rank_(model, LowRankConfig(energy=energy), lambda p: p.endswith("fc1"), batches())
        ranks.append(sum(n["rank"] for n in notes))
        errors.append(
            float((logits(model, batches()) - before).norm()) if not any(n["skipped"] for n in notes) else 0.0
        )
    assert ranks == sorted(ranks)
    assert errors == sorted(errors, reverse=True)


def plan_of(**config: Any) -> Plan:
    return Plan(
        (
            Step("low_rank", config, (f"{ENCODER}.*.fc1", f"{DECODER}.0.self_attn.*")),
            Step("round_to_nearest", {"activations": "float"}, (f"{ENCODER}.*.fc?", f"{DECODER}.*")),
            Step("float16"),
        )
    )


def test_the_bundle_is_smaller_and_says_what_torch_says(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given, sizes = long_batches(), {}
    for name, plan in (("whole", Plan(plan_of().steps[1:])), ("thin", plan_of(rank=16))):
        model = load(str(folder))
        records = compress_(model, plan, given, tmp_path / name)
        deploy(model, plan, records, tmp_path / f"{name}.bundle", None, "transcribe")
        sizes[name] = (tmp_path / f"{name}.bundle" / "weights.safetensors").stat().st_size
    assert sizes["thin"] < sizes["whole"]
    by_path = {r.path: r for r in records}
    assert by_path[f"{FIRST}.0"].technique == by_path[f"{FIRST}.1"].technique == "round_to_nearest"
    assert by_path[f"{FIRST}.0"].part == "encoder feed-forward"
    assert by_path[f"{FIRST}.0"].parameters == 16 * 64
    served = open_served(tmp_path / "thin.bundle", threads=2)
    encoder = model.family.graphs(model.module)[0]
    with torch.no_grad():
        theirs = encoder.module(given[0]["input_features"])
    ours = served.parts["encoder"].run({"input_features": given[0]["input_features"].numpy()})
    for name, tensor in zip(encoder.outputs, theirs, strict=True):
        assert np.abs(ours[name].numpy() - tensor.numpy()).max() < 1e-4
    assert served.answer(np.zeros(16000, np.float32)).windows == 1


def test_pruning_and_factors_go_together_and_a_second_call_takes_them_up(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = long_batches()
    config = {"hidden": {f"{ENCODER}.1": 64}, "layers": [f"{ENCODER}.0"]}
    plan = Plan((Step("prune_structure", config), *plan_of(rank=16).steps))
    first, second = load(str(folder)), load(str(folder))
    compress_(first, plan, given, tmp_path)
    assert first.origin(f"{ENCODER}.0.fc1.1") == f"{ENCODER}.1.fc1"
    compress_(second, plan, [torch.nan for _ in given], tmp_path)  # type: ignore[misc] - never looked at
    assert first.edits == second.edits
    for (name, a), (_, b) in zip(first.module.state_dict().items(), second.module.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    skeleton = load(str(folder)).module
    for edit in first.edits:
        replace_(skeleton, edit)
    skeleton.load_state_dict(first.module.state_dict())


def test_a_layer_that_would_not_shrink_is_left_alone_and_the_reason_is_kept(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load(str(folder))
    compress_(model, plan_of(rank=48), long_batches(), tmp_path)
    notes = json.loads((tmp_path / "structure.json").read_text())["low_rank"]
    assert {n["path"] for n in notes if n["path"].endswith("fc1")} == {f"{ENCODER}.0.fc1", f"{ENCODER}.1.fc1"}
    assert all("rank 48 needs as many numbers" in n["skipped"] for n in notes)
    assert not [e for e in model.edits if e.kind == "low_rank"]


def test_the_planes_are_those_of_the_samples(folder: Path) -> None:
    """A deliberate fault, the planes of other samples, loses more on the samples at hand."""
    model, other = fresh(folder), fresh(folder)
    given = batches(4)
    strange = [{**b, "input_features": 0.01 * b["input_features"].flip(-1) - 3} for b in batches(4, seed=8)]
    before = logits(model, given)
    takes = lambda p: p.startswith(ENCODER) and p.endswith("fc1")  # noqa: E731
    low_rank_(model, LowRankConfig(rank=16), takes, given)
    low_rank_(other, LowRankConfig(rank=16), takes, strange)
    own, wrong = ((logits(m, given) - before).norm() for m in (model, other))
    assert own < 0.8 * wrong


@pytest.mark.parametrize(
    ("config", "scope", "sentence"),
    [
        ({"energy": 1.0}, "*", "between 0 and 1"),
        ({"rank": 0}, "*", "1 or more"),
        ({"rank": 2.5}, "*", "1 or more"),
        ({}, "model.encoder.conv1", "names no linear layer"),
    ],
)
def test_wrong_settings_are_refused_before_work(folder: Path, config: Any, scope: str, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        check(Plan((Step("low_rank", config, (scope,)), Step("float16"))), load(str(folder)), "given")


def test_samples_are_asked_for(folder: Path) -> None:
    with pytest.raises(PlanError, match="low_rank, which needs calibration"):
        check(plan_of(), copy.copy(load(str(folder))))
