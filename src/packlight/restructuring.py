"""Change the structure of a model as its plan says, before anything is quantized, and keep that for a later call."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import Edit
from packlight.model import Model
from packlight.plan import Plan, Step, write_json
from packlight.structure import update_config_
from packlight.tables import TECHNIQUES
from packlight.techniques.low_rank import LOW_RANK, check_low_rank, low_rank_
from packlight.techniques.prune_structure import PRUNE_STRUCTURE, check_structure, prune_structure_
from packlight.techniques.separable import (
    GROUPED_CONVOLUTION,
    SEPARABLE_CONVOLUTION,
    check_convolutions,
    replace_convolutions_,
)
from packlight.techniques.student_tower import STUDENT_TOWER, check_student_tower, settle_, student_tower_
from packlight.techniques.turn_heads import TURN_HEADS, check_turn, turn_heads_

Progress = Callable[[str, int, int], None]
_CONVOLUTIONS = (SEPARABLE_CONVOLUTION.name, GROUPED_CONVOLUTION.name)


def check_restructuring(plan: Plan, model: Model) -> None:
    """Check the steps that change the structure. Raises PlanError."""
    pruning, factoring = _step(plan, PRUNE_STRUCTURE.name), _step(plan, LOW_RANK.name)
    designing = _step(plan, STUDENT_TOWER.name)
    if designing is not None:
        _check_designing(plan, model, designing)
    for step in _convolving(plan):
        check_convolutions(model, _config(step), step.takes)
    if pruning is not None:
        check_structure(model, _config(pruning))
    if factoring is not None:
        check_low_rank(model, factoring.takes)
    turning = _step(plan, TURN_HEADS.name)
    if turning is not None:
        check_turn(model, turning.takes)


def needing_samples(plan: Plan) -> set[str]:
    """Names of its steps of whole models that need calibration samples."""
    whole = [s for s in plan.steps if TECHNIQUES[s.technique].layer is None and "gram" in TECHNIQUES[s.technique].needs]
    return {s.technique for s in whole if getattr(_config(s), "feedback", True)}


def restructure_(model: Model, plan: Plan, batches: Sequence[Batch], work: Path) -> None:
    """Design the vision tower anew, replace convolutions, prune the structure and factor layers where the plan says so, in place.

    Args:
        model: not yet quantized.
        plan: checked.
        batches: calibration batches.
        work: folder that keeps the result, which a later call with the same plan takes up.
    """
    convolving, pruning, factoring = _convolving(plan), _step(plan, PRUNE_STRUCTURE.name), _step(plan, LOW_RANK.name)
    designing = _step(plan, STUDENT_TOWER.name)
    if not convolving and pruning is None and factoring is None and designing is None:
        return
    from safetensors.torch import load_file, save_file

    done = work / "structure.json"
    if done.is_file():
        for entry in json.loads(done.read_text())["edits"]:
            model.edit_(Edit(**entry))
        model.module.load_state_dict(load_file(work / "structure.safetensors"), strict=False)
        if pruning is not None:
            update_config_(model.module, model.family.towers)
        if designing is not None:
            settle_(model)
        return
    before = len(model.edits)
    designed = [] if designing is None else student_tower_(model, _config(designing), batches)
    replaced = [n for s in convolving for n in replace_convolutions_(model, _config(s), s.takes, batches)]
    changed = list(dict.fromkeys([*designed, *(e.path for e in model.edits[before:])]))
    changed += [] if pruning is None else prune_structure_(model, _config(pruning), batches)
    notes: list[Any] = []
    if factoring is not None:
        notes = low_rank_(model, _config(factoring), factoring.takes, batches)
        taken = [note["path"] for note in notes if not note["skipped"]]
        changed = [p for p in changed if p not in taken] + [f"{p}.{i}" for p in taken for i in (0, 1)]
    save_file(_state_of(model, changed), work / "structure.safetensors")
    edits = [asdict(e) for e in model.edits[before:]]
    write_json(done, {"edits": edits, "convolutions": replaced, "low_rank": notes})


def turn_(model: Model, plan: Plan, batches: Sequence[Batch], work: Path, progress: Progress | None = None) -> None:
    """Turn heads where the plan says so, in place: after lessons, which change what is to be turned.

    Args:
        model: not yet quantized.
        plan: checked.
        batches: calibration batches.
        work: folder that keeps the result, which a later call with the same plan takes up.
        progress: called with (what, done, total).
    """
    step = _step(plan, TURN_HEADS.name)
    if step is None:
        return
    from safetensors.torch import load_file, save_file

    kept = work / "turned.safetensors"
    if kept.is_file():
        model.module.load_state_dict(load_file(kept), strict=False)
        return
    changed = turn_heads_(model, step.takes, batches, plan.seed, progress)
    draft = kept.with_suffix(".part")
    save_file(_state_of(model, changed), draft)
    draft.rename(kept)


def _state_of(model: Model, paths: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of these layers, by name."""
    states = {path: model.module.get_submodule(path).state_dict() for path in paths}
    return {f"{path}.{name}": w.detach().contiguous() for path, state in states.items() for name, w in state.items()}


def _check_designing(plan: Plan, model: Model, step: Step) -> None:
    """Check a student's tower, and that no step changes the structure of what it replaces. Raises PlanError."""
    check_student_tower(model, _config(step))
    pruning = _step(plan, PRUNE_STRUCTURE.name)
    config = None if pruning is None else _config(pruning)
    paths = [] if config is None else [*config.layers, *(path for _, path in config.wanted)]
    paths += [path for s in _convolving(plan) for path in model.layers() if s.takes(path)]
    if any(path.startswith("vision_model.") for path in paths):
        raise PlanError(
            "student_tower builds the vision tower anew, so no other step may change its structure; leave one out."
        )


def _convolving(plan: Plan) -> list[Step]:
    return [s for s in plan.steps if s.technique in _CONVOLUTIONS]


def _step(plan: Plan, name: str) -> Step | None:
    return next((s for s in plan.steps if s.technique == name), None)


def _config(step: Step) -> Any:
    return TECHNIQUES[step.technique].config(**step.config)
