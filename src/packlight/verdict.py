"""From what was tried to a verdict: which bundle, whether it meets the target, what binds when none does. No torch."""

from collections.abc import Sequence
from typing import Any

from packlight.target import Target, format_bytes, format_seconds

_NAMES = {"size": "size", "latency": "latency", "memory": "memory", "drop": "allowed drop"}


def conclude(tried: Sequence[dict[str, Any]], target: Target) -> dict[str, Any]:
    """Choose among measured outcomes.

    Args:
        tried: outcomes, each with 'missed', the constraints that it does not meet.
        target: what was asked for.

    Returns:
        'outcome' the chosen one, 'met', 'binding' the constraint that binds or None, 'nearest' None or a dict with
        'plan', 'relax' and 'sentence'.
    """
    good = [t for t in tried if not t["missed"]]
    if good:
        best = min(good, key=lambda t: (t["quality"]["difference"], t["timing"]["after"], t["size"]))
        return {"outcome": best, "met": True, "binding": None, "nearest": None}
    # Nearest: everything but one constraint is met, and that one is missed by the least share; else the least miss.
    ranked = sorted(tried, key=lambda t: (len(t["missed"]), "drop" in t["missed"], excess(t, target)))
    best = ranked[0]
    binding = max(best["missed"], key=lambda name: _share(best, target, name))
    relax = {name: _value(best, name) for name in best["missed"]}
    words = ", ".join(f"{_NAMES[name]} to {_written(name, value)}" for name, value in relax.items())
    sentence = f"Plan {best['plan']} comes nearest: it is met if you relax the {words}."
    return {
        "outcome": best,
        "met": False,
        "binding": binding,
        "nearest": {"plan": best["plan"], "relax": relax, "sentence": sentence},
    }


def excess(outcome: dict[str, Any], target: Target) -> float:
    """How far an outcome is beyond its worst missed limit, as a ratio."""
    return max((_share(outcome, target, name) for name in outcome["missed"]), default=0.0)


def _value(outcome: dict[str, Any], name: str) -> float:
    quality = outcome["quality"]
    values = {
        "size": outcome["size"], "latency": outcome["timing"]["after"], "memory": outcome["process"]["memory"],
        "drop": quality["difference"],
    }  # fmt: skip
    return float(values[name])


def _share(outcome: dict[str, Any], target: Target, name: str) -> float:
    limits = {
        "size": target.size, "latency": target.latency, "memory": target.memory_limit,
        "drop": target.allowed_drop(outcome["quality"]["before"]),
    }  # fmt: skip
    return _value(outcome, name) / max(limits[name] or 0.0, 1e-3)


def _written(name: str, value: float) -> str:
    if name in ("size", "memory"):
        return format_bytes(value)
    return format_seconds(value) if name == "latency" else f"{100 * value:.1f} pp"
