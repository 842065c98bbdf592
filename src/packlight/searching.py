"""Which plan comes next: the best that should fit, then what mends that which the last one missed. No plan is run here."""

from collections.abc import Callable
from typing import Any

from packlight.plan import Plan
from packlight.target import Target

Outcome = dict[str, Any]
TRIES = 6
_MENDED = ("s", "t", "e")  # made from a plan that missed: its bytes beside the weights say nothing of the others


def search(
    plans: list[Plan],
    attempt: Callable[[Plan], Outcome],
    derive: Callable[[str, Plan, Outcome], list[Plan]],
    target: Target,
    overhead: int,
) -> tuple[list[Outcome], int]:
    """Try plans until one meets the target, or until none is left that could.

    Args:
        plans: those of the front: p, c with a shorter context, f with all in floats; what is derived joins them.
        attempt: carries a plan out and measures it: 'size' in bytes and 'missed', the names of what it missed.
        derive: (kind, a plan, the outcome of one that missed) -> plans that may mend that: 's' has fewer operations,
            for a missed latency; 't' is taught by the original, 'e' too, with exact activations, for a missed drop.
        target: its size bounds what is tried.
        overhead: bytes of a bundle beside its weights, as far as known.

    Returns:
        the outcomes, in the order in which plans were tried, and the overhead as measured last.
    """
    tried: dict[str, Outcome] = {}

    def run(plan: Plan) -> Outcome:
        nonlocal overhead
        if plan.name not in tried:
            tried[plan.name] = found = attempt(plan)
            if plan.name[0] not in _MENDED:
                overhead = int(found["size"] - plan.expected["bytes"])
        return tried[plan.name]

    def fitting(kind: str) -> list[Plan]:
        """Plans not tried that should fit, the largest first; each attempt tells better what lies beside the weights."""
        left = [p for p in plans if p.name not in tried and p.name.startswith(kind)]
        fits = [p for p in left if target.size is None or p.expected["bytes"] + overhead <= target.size]
        return sorted(fits, key=lambda p: -p.expected["bytes"])

    # The best quality that fits, a larger one where there was room. Too slow: with a shorter context, then with fewer
    # operations. Only the drop missed: taught, then exact activations, then floats. Else the next smaller.
    kinds = ["p", "c", "s", "t", "e", "f", "f", "p"]
    missed, last = ["latency"], plans[0]
    while kinds and len(tried) < TRIES:
        kind = kinds[0]
        again = kind == last.name[0] == "e" and "size" in missed  # other integers take other bytes
        due = again or _due(kind, missed, len(kinds) == 1)
        if due and tried and kind in _MENDED:
            base = _smaller(plans, last, tried[last.name]["size"] - (target.size or 0)) if again else last
            plans += [p for p in derive(kind, base, tried[last.name]) if p.name not in {q.name for q in plans}]
        left = fitting(kind) if due else []
        if left:
            last = left[0]
            if not (missed := run(last)["missed"]):
                return list(tried.values()), overhead
        if tried and _slower_left(kind, bool(left), missed):
            break
        roomy = missed == ["drop"] and kind not in _MENDED and _larger(fitting(kind), last)
        if not left or not ("size" in missed or roomy):  # what turned out too large gives way to the next smaller
            kinds.pop(0)
    if not tried or not set(missed) <= {"latency", "memory"}:
        _least(plans, run, lambda: len(tried) < TRIES)
    return list(tried.values()), overhead


def _due(kind: str, missed: list[str], end: bool) -> bool:
    """Whether plans of this kind may mend what was missed."""
    slow, lossy = "latency" in missed, missed == ["drop"]
    return {"c": slow, "s": slow, "t": lossy, "e": lossy}.get(kind, not (end and lossy))


def _slower_left(kind: str, ran: bool, missed: list[str]) -> bool:
    """Whether every plan that is left is larger or slower than one of this kind, which loses little enough."""
    return "drop" not in missed and ((kind == "t" and not ran) or (kind == "e" and ran and "size" not in missed))


def _smaller(plans: list[Plan], than: Plan, excess: int) -> Plan:
    """The largest plan of the front that should take so many bytes less, or the smallest that there is."""
    front = sorted((p for p in plans if p.name[0] == "p"), key=lambda p: p.expected["bytes"])
    return next((p for p in reversed(front) if p.expected["bytes"] <= than.expected["bytes"] - excess), front[0])


def _larger(plans: list[Plan], than: Plan) -> bool:
    return any(p.expected["bytes"] > than.expected["bytes"] for p in plans)


def _least(plans: list[Plan], run: Callable[[Plan], Outcome], more: Callable[[], bool]) -> None:
    """None does: the smallest plan that keeps the drop, whatever its size, by bisection."""
    rest = [p for p in plans if p.name.startswith("c")] or [p for p in plans if p.name.startswith("p")]
    low, high = 0, len(rest) - 1
    while low <= high and more():
        middle = (low + high) // 2
        if "drop" in run(rest[middle])["missed"]:
            low = middle + 1
        else:
            high = middle - 1
