"""What helps a plan that loses too much, in the same bytes: to be taught by the original, then float activations.

Where a plan shortens the context or takes operations out, the towers concerned learn to give the original's states
before they are quantized; where it rounds weights to few bits, scales, norms and biases are tuned afterwards.
"""

from dataclasses import replace

from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.tables import TECHNIQUES
from packlight.techniques import Stage
from packlight.techniques.distill import NAME as DISTILL
from packlight.techniques.prune_vocabulary import NAME as PRUNE_VOCABULARY
from packlight.techniques.tune_scales import NAME as TUNE_SCALES

_LEAST = 20  # calibration samples from which teaching is worth its time
_FEW_BITS = 4.5  # bits per weight from which on rounding loses nothing that tuning could bring back
_EPOCHS, _RATE = 8, 5e-4


def lesson(model: Model, towers: tuple[str, ...], reason: str) -> Step:
    """The step that teaches towers, before quantization.

    What follows these towers is left as it is: few samples teach states well, and words by heart. Words that the
    original was unsure of are left in: it is its answers that are imitated, not the words.
    """
    scope = tuple(p for tower in model.family.towers if tower.name in towers for p in tower.patterns)
    return Step(DISTILL, {"epochs": _EPOCHS, "rate": _RATE, "filter": False}, scope, reason)


def taught(model: Model, plan: Plan, samples: int) -> list[Plan]:
    """The plan with lessons, named t; none where it has nothing to be taught, or too few samples to teach it with.

    Args:
        model: the original.
        plan: one that loses too much.
        samples: calibration samples.
    """
    stages = {s.technique: TECHNIQUES[s.technique].stage for s in plan.steps}
    if samples < _LEAST or {Stage.DISTILL, Stage.TUNE} & {*stages.values()}:
        return []
    steps = list(plan.steps)
    if any(stage <= Stage.PRUNE for name, stage in stages.items() if name != PRUNE_VOCABULARY):
        first = model.family.towers[0].name
        steps.append(lesson(model, (first,), f"the drop was missed: the original teaches the {first}"))
    rates = [rate for s in plan.steps if isinstance(rate := s.config.get("rate"), float | int)]
    if rates and min(rates) < _FEW_BITS:
        steps.append(Step(TUNE_SCALES, {}, ("*",), "the drop was missed: scales, norms and biases are tuned"))
    return [replace(plan, steps=tuple(steps), name=f"t{plan.name[1:]}")] if len(steps) > len(plan.steps) else []


def unrounded(plan: Plan) -> list[Plan]:
    """The plan with float activations, named e for exact: slower, in the same bytes; none where it rounds no activations.

    Nor is there one where convolutions have fixed ranges: those are there for a latency, which floats would miss.
    """
    rounded = [s for s in plan.steps if s.config.get("activations") in ("int8", "int8_rows")]
    if not rounded or any(s.technique == "static_int8" for s in plan.steps):
        return []
    floats = {"activations": "float"}
    why = "the drop was missed: float activations instead"
    steps = (
        replace(s, config=s.config | floats, reason=f"{s.reason}; {why}") if s in rounded else s for s in plan.steps
    )
    return [replace(plan, steps=tuple(steps), name=f"e{plan.name[1:]}")]
