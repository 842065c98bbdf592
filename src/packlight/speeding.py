"""A plan that does less, where one misses its latency: measured times say how many operations have to go.

Layers that run row after row on the device, one token at a time, are bound by what they read, so quantization speeds
them up already; the operations of all other towers turn into time in proportion. Those are pruned, spread by what each
block measurably costs, and the original then teaches what is left.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packlight.errors import PlanError
from packlight.evaluate import Asked
from packlight.families import Batch
from packlight.model import Model
from packlight.plan import Plan
from packlight.profiling import profile
from packlight.pruning_effects import measure_effects
from packlight.pruning_plan import prune_step
from packlight.recovering import lesson
from packlight.structure import coupled

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

_SPARE = 1.15  # of the share that times ask for: what is left runs a little less well
_MOST, _STEP = 0.6, 0.05  # share that may go; shares are multiples of a step


@dataclass(frozen=True)
class Slow:
    """A bundle that misses its latency.

    Args:
        plan: what made it.
        bundle: its folder.
        seconds: median of an answer.
        latency: what was asked for.
    """

    plan: Plan
    bundle: Path
    seconds: float
    latency: float


def share_to_prune(slow: Slow, towers: float) -> float:
    """The share of the towers' operations that has to go, when they take that share of an answer's time."""
    wanted = _SPARE * (1 - slow.latency / slow.seconds) / max(towers, 1e-9)
    return min(_MOST, math.ceil(wanted / _STEP - 1e-9) * _STEP)


def lighter(
    model: Model,
    slow: Slow,
    contents: Sequence[Any],
    asked: Asked,
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    kept: Path,
    progress: Progress | None = None,
) -> Plan | None:
    """The plan of a slow bundle with pruning and distillation before its other steps, named s.

    Args:
        model: the original.
        slow: the bundle.
        contents: inputs to time it on, as `Served.open_input` gives them.
        asked: language, task and threads.
        batches: calibration batches to observe, and others to judge by.
        kept: JSON-lines file of what pruning costs; a later call goes on with it.
        progress: called with (what, done, total).

    Returns:
        the plan; None for a model whose towers can't be pruned, or not by as much as the latency asks for.
    """
    found = [t for t in model.family.towers if not t.stepwise and coupled(model.module, t)]
    if not found:
        return None
    stages = {row["stage"]: row["share"] for row in profile(slow.bundle, contents, asked, progress)["stages"]}
    taken = sum(stages.get(name, 0.0) for t in found for name in {t.name, f"{t.modality} tower"})
    if taken <= 1 - slow.latency / slow.seconds:  # even without these towers it would be missed
        return None
    share = share_to_prune(slow, taken)
    towers = [t.name for t in found]
    effects = measure_effects(model, *batches, towers, kept, progress)
    try:
        pruning = prune_step(model, effects, towers, share)
    except PlanError as error:
        log.info("No plan with fewer operations: %s", error)
        return None
    why = (
        f"for the latency: {slow.plan.name} took {slow.seconds * 1000:.0f} ms where {slow.latency * 1000:.0f} were asked for, "
        f"{taken:.0%} of it in these towers; {pruning.reason}"
    )
    teaching = [lesson(model, tuple(towers), "the original teaches what pruning left")]
    teaching = teaching if len(batches[0]) > 1 else []  # one sample can't teach and judge
    steps = (replace(pruning, reason=why), *teaching, *slow.plan.steps)
    return replace(slow.plan, steps=steps, name=f"s{slow.plan.name[1:]}")
