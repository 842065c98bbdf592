"""Heads in another basis: what the model computes stays, planted directions are found, and the file is smaller for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packlight import turning
from packlight.applying import Options, apply
from packlight.compress import check, compress_
from packlight.errors import PlanError
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.quant import column_grid, error_feedback
from packlight.reloading import load
from packlight.serve import open_served
from packlight.techniques.turn_heads import turn_heads_, turnable
from packlight.turning import Rows, best_bases, bits, damped
from small_pruning import ENCODER, batches, fresh, logits
from small_whisper import save_model, save_speech

SELF = f"{ENCODER}.0.self_attn"
EVERY = ("*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("turn") / "model")


def spread_out(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a random basis, energies over two decades), float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=draw, dtype=torch.float64), 10 ** torch.linspace(0, -2, size).double()


def test_a_planted_basis_is_found() -> None:
    """Energies and costs that one basis makes diagonal: no basis has less, by Hadamard's inequality."""
    mixed, values = spread_out(8, 0)
    back = torch.linalg.inv(mixed)
    energy, cost = mixed @ values.diag() @ mixed.T, back.T @ values.diag() @ back
    rows = [Rows(energy[None], cost[None]), Rows(cost[None], energy[None], inverse=True)]
    planted = bits(rows, back[None])
    found = bits(rows, best_bases(rows))
    same = bits(rows, torch.eye(8, dtype=torch.float64)[None])
    for before, after, least in zip(same, found, planted, strict=True):
        assert after - least < 0.1 * (before - least)
        assert before - after > 1


def test_columns_are_counted_by_volume() -> None:
    """A basis times a number changes rows and the columns that read them by nothing in all."""
    mixed, values = spread_out(6, 1)
    energy = mixed @ values.diag() @ mixed.T
    rows = [Rows(energy[None], torch.eye(6, dtype=torch.float64)[None]), Rows(energy[None], None, inverse=True)]
    same = torch.eye(6, dtype=torch.float64)[None]
    assert bits(rows, 7 * same) == pytest.approx(bits(rows, same))


def test_where_no_basis_is_better_the_heads_stay() -> None:
    even = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    assert torch.equal(best_bases([Rows(even, even)]), even)
    dead = torch.zeros_like(even)
    found = best_bases([Rows(dead, damped(dead)), Rows(dead, damped(dead), inverse=True)])
    assert torch.isfinite(torch.linalg.inv(found)).all()


def test_no_row_takes_less_than_nothing_or_more_than_codes_hold() -> None:
    def rate(*rows: float) -> float:
        return float(turning._rate(torch.tensor([rows]).double()))

    assert rate(4.0, 4.0, 4.0) == pytest.approx(4, abs=0.01)
    assert rate(2.0, 4.0) == pytest.approx(3, abs=0.05)
    assert rate(-20.0, 4.0) == pytest.approx(2, abs=0.01)
    assert rate(0.0, 8.0) > rate(3.5, 4.5) > rate(4.0, 4.0) - 0.01


def moved(model: Model) -> list[str]:
    return turn_heads_(model, lambda path: True, batches(6))


def test_what_the_model_computes_stays(folder: Path) -> None:
    model = fresh(folder)
    for heads in turnable(model):  # biases of a new model are 0 and would hide that they have to turn, too
        for path in heads.layers:
            layer: Any = model.module.get_submodule(path)
            if layer.bias is not None:
                layer.bias.data.normal_(generator=torch.Generator().manual_seed(len(path)))
    before = logits(model, batches())
    weights = {
        p: model.module.get_submodule(p).get_parameter("weight").clone() for h in turnable(model) for p in h.layers
    }
    assert sorted(moved(model)) == sorted(weights)
    assert len(weights) == 4 * (2 + 2 * 2)  # self- and cross-attention of two blocks, each with four layers
    assert all(not torch.equal(model.module.get_submodule(p).get_parameter("weight"), w) for p, w in weights.items())
    assert (logits(model, batches()) - before).abs().max() < 1e-4 * before.abs().max()
    assert not model.edits
    with torch.no_grad():  # the deliberate fault: a basis without its inverse
        model.module.get_submodule(f"{SELF}.out_proj").weight.copy_(weights[f"{SELF}.out_proj"])
    assert (logits(model, batches()) - before).abs().max() > 1e-3 * before.abs().max()


def test_the_same_seed_gives_the_same_bases(folder: Path) -> None:
    states = []
    for _ in range(2):
        model = fresh(folder)
        moved(model)
        states.append(model.module.get_submodule(f"{SELF}.k_proj").get_parameter("weight").clone())
    assert torch.equal(*states)


def test_turned_keys_take_fewer_bits_for_the_same_loss() -> None:
    """Rows of energy and cost over two decades, mixed as training leaves them, against the basis that is found."""
    size, width = 16, 64
    mixed, values = spread_out(size, 2)
    back = torch.linalg.inv(mixed)
    plain = torch.randn(size, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = mixed @ values.sqrt().diag() @ plain
    cost = back.T @ values.diag() @ back
    basis = best_bases([Rows((weight @ weight.T)[None], cost[None])])[0]
    losses = []
    for turn in (torch.eye(size, dtype=torch.float64), basis):
        inverse = torch.linalg.inv(turn)
        own = (turn @ weight).float()
        counted = (inverse.T @ cost @ inverse).diagonal()
        grid = column_grid(own, torch.eye(width), 3.0, rows=(counted**-0.5).float())
        error = inverse @ (grid.values(error_feedback(own, torch.eye(width), grid)) - own).double()
        losses.append(float((error.T @ cost @ error).trace()))
    assert losses[1] < 0.5 * losses[0]


def test_what_a_step_may_name(folder: Path) -> None:
    model = fresh(folder)
    whole = Plan((Step("turn_heads", {}, EVERY),), "whisper")
    check(whole, model, "given")
    with pytest.raises(PlanError, match="turn_heads"):
        check(whole, model)  # it needs samples
    with pytest.raises(PlanError, match="name all four"):
        check(replace(whole, steps=(Step("turn_heads", {}, ("*.q_proj",)),)), model, "given")
    with pytest.raises(PlanError, match="names no attention"):
        check(replace(whole, steps=(Step("turn_heads", {}, ("*.fc1",)),)), model, "given")


def test_after_pruning_and_again_from_what_was_kept(folder: Path, tmp_path: Path) -> None:
    """It takes what is left of heads, and a later call takes up what an earlier one kept."""
    prune = Step(
        "prune_structure", {"keys": {SELF: 8}, "values": {SELF: 8}, "heads": {f"{ENCODER}.1.self_attn": 1}}, ("*",)
    )
    plan = Plan((prune, Step("turn_heads", {}, EVERY)), "whisper")
    found = []
    for steps in (plan.steps[:1], plan.steps, plan.steps):
        model = fresh(folder)
        compress_(model, replace(plan, steps=steps), batches(6), tmp_path / str(len(steps)))
        found.append(logits(model, batches()))
    assert (found[1] - found[0]).abs().max() < 1e-4 * found[0].abs().max()
    assert torch.equal(found[2], found[1])
    assert (tmp_path / "2" / "turned.safetensors").is_file()


def test_lessons_come_before(folder: Path, tmp_path: Path) -> None:
    """What is taught is turned: the other way round, the basis would be that of other weights."""
    lesson = Step("distill", {"epochs": 1, "rate": 1e-3, "filter": False}, ("model.encoder.*",))
    plan = Plan((lesson, Step("turn_heads", {}, EVERY)), "whisper")
    found, bases = [], []
    for steps in (plan.steps[:1], plan.steps):
        model = fresh(folder)
        compress_(model, replace(plan, steps=steps), batches(6), tmp_path / str(len(steps)))
        found.append(logits(model, batches()))
        bases.append(model.module.get_submodule(f"{SELF}.v_proj").get_parameter("weight").clone())
    assert (found[1] - found[0]).abs().max() < 1e-4 * found[0].abs().max()
    taught = fresh(folder)
    compress_(taught, replace(plan, steps=plan.steps[:1]), batches(6), tmp_path / "1")
    moved(taught)
    assert torch.equal(taught.module.get_submodule(f"{SELF}.v_proj").get_parameter("weight"), bases[1])


def test_a_bundle_answers_as_its_model(folder: Path, tmp_path: Path) -> None:
    """Also the layers that stay float: turned weights, biases with them, are what the bundle holds."""
    speech = save_speech(tmp_path / "speech")
    coded = Step("error_feedback", {"rate": 4.0, "columns": True, "activations": "float"}, ("*.k_proj", "*.v_proj"))
    plan = Plan((Step("turn_heads", {}, EVERY), coded, Step("float16", {}, ("*",))), "whisper")
    out = apply(str(folder), plan, speech, tmp_path / "out", Options())
    again, original = load(str(out)), load(str(folder))
    audio = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    heard = again.family.answer(again.module, audio, again.settings, None, "transcribe")
    assert open_served(out, 1).reply(audio, None, "transcribe") == heard
    query, before = (m.module.get_submodule(f"{SELF}.q_proj").weight for m in (again, original))
    assert (query - before).abs().max() > 0.1 * before.abs().max()
