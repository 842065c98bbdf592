"""Replace convolutions as a plan says, before anything is quantized, and keep that for a later call."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packlight.families import Batch
from packlight.layers import Edit
from packlight.model import Model
from packlight.plan import Plan, write_json
from packlight.techniques.separable import (
    GROUPED_CONVOLUTION,
    SEPARABLE_CONVOLUTION,
    check_convolutions,
    replace_convolutions_,
)

_TECHNIQUES = {t.name: t for t in (SEPARABLE_CONVOLUTION, GROUPED_CONVOLUTION)}


def _steps(plan: Plan) -> list[tuple[Any, Any]]:
    """(step, its settings) of the steps that replace convolutions."""
    found = [s for s in plan.steps if s.technique in _TECHNIQUES]
    return [(s, _TECHNIQUES[s.technique].config(**s.config)) for s in found]


def check_reconvolving(plan: Plan, model: Model) -> None:
    """Check the steps that replace convolutions. Raises PlanError."""
    for step, config in _steps(plan):
        check_convolutions(model, config, step.takes)


def reconvolve_(model: Model, plan: Plan, batches: Sequence[Batch], work: Path) -> None:
    """Replace convolutions where the plan says so, in place.

    Args:
        model: not yet quantized.
        plan: checked.
        batches: calibration batches.
        work: folder that keeps the result, which a later call with the same plan takes up.
    """
    steps = _steps(plan)
    if not steps:
        return
    from safetensors.torch import load_file, save_file

    kept = work / "convolutions.json"
    if kept.is_file():
        values = json.loads(kept.read_text())
        for entry in values["edits"]:
            model.edit_(Edit(**entry))
        state = load_file(kept.with_suffix(".safetensors"))
        model.module.load_state_dict(state, strict=False)
        return
    before = len(model.edits)
    notes = [n for step, config in steps for n in replace_convolutions_(model, config, step.takes, batches)]
    edits = model.edits[before:]
    state = {
        f"{e.path}.{name}": tensor.detach().contiguous()
        for e in edits
        for name, tensor in model.module.get_submodule(e.path).state_dict().items()
    }
    save_file(state, kept.with_suffix(".safetensors"))
    write_json(kept, {"edits": [asdict(e) for e in edits], "notes": notes})
