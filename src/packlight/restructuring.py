"""Change the structure of a model as its plan says, before anything is quantized, and keep that for a later call."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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

_CONVOLUTIONS = (SEPARABLE_CONVOLUTION.name, GROUPED_CONVOLUTION.name)


def check_restructuring(plan: Plan, model: Model) -> None:
    """Check the steps that change the structure. Raises PlanError."""
    pruning, factoring = _step(plan, PRUNE_STRUCTURE.name), _step(plan, LOW_RANK.name)
    for step in _convolving(plan):
        check_convolutions(model, _config(step), step.takes)
    if pruning is not None:
        check_structure(model, _config(pruning))
    if factoring is not None:
        check_low_rank(model, factoring.takes)


def needing_samples(plan: Plan) -> set[str]:
    """Names of its steps of whole models that need calibration samples."""
    whole = [s for s in plan.steps if TECHNIQUES[s.technique].layer is None and "gram" in TECHNIQUES[s.technique].needs]
    return {s.technique for s in whole if getattr(_config(s), "feedback", True)}


def restructure_(model: Model, plan: Plan, batches: Sequence[Batch], work: Path) -> None:
    """Replace convolutions, prune the structure and factor layers where the plan says so, in place.

    Args:
        model: not yet quantized.
        plan: checked.
        batches: calibration batches.
        work: folder that keeps the result, which a later call with the same plan takes up.
    """
    convolving, pruning, factoring = _convolving(plan), _step(plan, PRUNE_STRUCTURE.name), _step(plan, LOW_RANK.name)
    if not convolving and pruning is None and factoring is None:
        return
    from safetensors.torch import load_file, save_file

    done = work / "structure.json"
    if done.is_file():
        for entry in json.loads(done.read_text())["edits"]:
            model.edit_(Edit(**entry))
        model.module.load_state_dict(load_file(work / "structure.safetensors"), strict=False)
        if pruning is not None:
            update_config_(model.module, model.family.towers)
        return
    before = len(model.edits)
    replaced = [n for s in convolving for n in replace_convolutions_(model, _config(s), s.takes, batches)]
    changed = [e.path for e in model.edits[before:]]
    changed += [] if pruning is None else prune_structure_(model, _config(pruning), batches)
    notes: list[Any] = []
    if factoring is not None:
        notes = low_rank_(model, _config(factoring), factoring.takes, batches)
        taken = [note["path"] for note in notes if not note["skipped"]]
        changed = [p for p in changed if p not in taken] + [f"{p}.{i}" for p in taken for i in (0, 1)]
    states = {p: model.module.get_submodule(p).state_dict() for p in changed}
    tensors = {f"{p}.{n}": w.detach().contiguous() for p, state in states.items() for n, w in state.items()}
    save_file(tensors, work / "structure.safetensors")
    edits = [asdict(e) for e in model.edits[before:]]
    write_json(done, {"edits": edits, "convolutions": replaced, "low_rank": notes})


def _convolving(plan: Plan) -> list[Step]:
    return [s for s in plan.steps if s.technique in _CONVOLUTIONS]


def _step(plan: Plan, name: str) -> Step | None:
    return next((s for s in plan.steps if s.technique == name), None)


def _config(step: Step) -> Any:
    return TECHNIQUES[step.technique].config(**step.config)
