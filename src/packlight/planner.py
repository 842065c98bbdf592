"""Choose: plans along the Pareto front of size and predicted loss, from the measured sensitivities.

Between measured rates log(KL) is interpolated, since the error falls fourfold per bit (rate-distortion theory). The
front minimises total KL + lambda * bytes, one lambda after the other: losses of parts add up to first order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.sensitivity import Level

_FINE = tuple(2.25 + 0.25 * i for i in range(12))  # rates a plan may use
_GAP = 0.04  # plans on the front lie at least this far apart in bytes
_WORTH = 0.1  # share of the finest weights' KL that a range per row must save to be worth its time

Activations = Mapping[str, Mapping[str, float]]


def levels_between(levels: Sequence[Level]) -> list[Level]:
    """The levels of one part at all rates a plan may use; log(KL) and bytes linear between measured rates."""
    grouped = [lv for lv in levels if lv.technique == "group_weights"]
    levels = [lv for lv in levels if lv.technique != "group_weights"]
    finest = levels[0]
    top = next((lv.rate for lv in levels if lv.rate), 4.0) or 4.0
    codes = max(lv.bytes / (lv.rate or 1) for lv in levels if lv.rate)  # bytes per bit of rate
    points = sorted((lv.rate or finest.bytes / codes, lv) for lv in levels)
    result = [finest, *grouped]
    for rate in _FINE:
        if rate >= max(points[-1][0], top):
            continue
        low = max((p for p in points if p[0] <= rate + 1e-9), key=lambda p: p[0])
        high = min((p for p in points if p[0] >= rate - 1e-9), key=lambda p: p[0])
        share = 0.0 if high[0] == low[0] else (rate - low[0]) / (high[0] - low[0])
        kl = math.exp((1 - share) * math.log(low[1].kl) + share * math.log(high[1].kl))
        size = int((1 - share) * low[1].bytes + share * high[1].bytes)
        flips = (1 - share) * low[1].flips + share * high[1].flips
        result.append(Level(finest.part, rate, size, kl, flips, share in (0.0, 1.0)))
    return result


def front(
    model: Model, levels: Sequence[Level], rounding: Activations, calibration: dict[str, Any], seed: int
) -> list[Plan]:
    """Plans along the Pareto front of bytes and predicted KL, smallest first, then two with float activations.

    Args:
        model: the original.
        levels: from `sensitivity`.
        rounding: from `activations`.
        calibration: what the plans say of the samples.
        seed: what the plans say of randomness.
    """
    by_part: dict[str, list[Level]] = {}
    for level in levels:
        by_part.setdefault(level.part, []).append(level)
    choices = {part: levels_between(found) for part, found in by_part.items()}
    found: dict[tuple[Any, ...], list[Level]] = {}
    for step in range(400):
        price = 10 ** (-11 + step * 0.02)
        picked = [min(c, key=lambda lv: lv.kl + price * lv.bytes) for c in choices.values()]
        found[tuple(lv.rate for lv in picked)] = picked
    ranked = sorted(found.values(), key=lambda picked: sum(lv.bytes for lv in picked))
    spaced: list[list[Level]] = []
    for picked in ranked:
        size = sum(lv.bytes for lv in picked)
        if spaced and size < (1 + _GAP) * sum(lv.bytes for lv in spaced[-1]) and picked is not ranked[-1]:
            continue
        spaced.append(picked)
    finest = [c[0] for c in choices.values()]
    modes = _modes(rounding, sum(min(lv.kl for lv in c) for c in choices.values()))
    plans = [_plan(model, p, modes, f"p{i + 1:02d}", (calibration, seed)) for i, p in enumerate(spaced)]
    return [*plans, *_float_plans(model, finest, calibration, seed)]


def _modes(rounding: Activations, weights: float) -> dict[str, tuple[str, float, str]]:
    """By part: (how its activations are rounded, the KL of that, why)."""
    found = {}
    for part, kl in rounding.items():
        saved = kl["int8"] - kl["int8_rows"]
        rows = saved > _WORTH * weights
        why = f"8-bit activations with a range per {'row' if rows else 'sample'}: KL {kl['int8_rows' if rows else 'int8']:.2g}"
        other = (
            f"{kl['int8' if rows else 'int8_rows']:.2g} with one per {'sample' if rows else 'row, not worth its time'}"
        )
        found[part] = ("int8_rows" if rows else "int8", kl["int8_rows" if rows else "int8"], f"{why}, {other}")
    return found


_STEPWISE = ("int8", 0.0, "8-bit activations, because integer kernels are the fast ones")


def _plan(
    model: Model,
    picked: Sequence[Level],
    modes: dict[str, tuple[str, float, str]],
    name: str,
    origin: tuple[dict[str, Any], int],
) -> Plan:
    steps = []
    for level in picked:
        part = next(p for p in model.family.parts if p.name == level.part)
        mode, _, why = modes.get(level.part, _STEPWISE)
        groups = level.technique == "group_weights"
        rate = f"{level.rate:g} bits per weight" if level.rate else "the finest 7-bit grid"
        config = {"bits": 8, "group": 32} if groups else {"rate": level.rate, "activations": mode}
        how = "measured" if level.measured else "interpolated between measured rates"
        reason = (
            f"{level.part}: {'8-bit groups of 32' if groups else rate}; KL {level.kl:.2g} per token, "
            f"{level.flips:.1%} of top tokens changed ({how}); {why}"
        )
        steps.append(Step(level.technique, config, part.paths, reason))
    steps.append(Step("float16", {}, ("*",), "norms and biases: too few bytes to gain anything"))
    kl = sum(lv.kl for lv in picked) + sum(loss for _, loss, _ in modes.values())
    expected = {"bytes": float(sum(lv.bytes for lv in picked)), "kl": kl}
    return Plan(tuple(steps), model.family.name, origin[0], origin[1], name, expected)


def _float_plans(model: Model, finest: Sequence[Level], calibration: dict[str, Any], seed: int) -> list[Plan]:
    """Slower plans that lose less, for when no plan with 8-bit activations keeps the drop."""
    paths = tuple(p for part in model.family.parts for p in part.paths)
    rest = Step("float16", {}, ("*",), "norms and biases: too few bytes to gain anything")
    size = float(sum(lv.bytes for lv in finest))
    weights = Step("error_feedback", {"rate": None, "activations": "float"}, paths, "8-bit activations lost too much")
    halves = Step("float16", {}, ("*",), "integer weights lost too much")
    total = 2.0 * sum(p.numel() for p in model.module.parameters())
    kl = sum(lv.kl for lv in finest)
    return [
        Plan((weights, rest), model.family.name, calibration, seed, "f01", {"bytes": size, "kl": kl / 2}),
        Plan((halves,), model.family.name, {}, seed, "f02", {"bytes": total, "kl": 1e-9}),
    ]
