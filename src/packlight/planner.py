"""Choose: plans along the Pareto front of size and predicted loss, from the measured sensitivities.

Between measured rates log(KL) is interpolated, since the error falls fourfold per bit (rate-distortion theory). The
front minimises total KL + lambda * bytes, one lambda after the other: losses of parts add up to first order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from packlight.families import Part
from packlight.fewer_tokens import Pruning
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.ranging import convolutions_of
from packlight.sensitivity import Level, Shortened, coded_paths, computed_paths, settings
from packlight.target import Target
from packlight.techniques.audio_context import AudioContextConfig
from packlight.techniques.audio_context import step as audio_context_step
from packlight.windows import is_matrix

# Rates a plan may use. An eighth of a bit of a vocabulary table would be 2 % of a small bundle, left empty or overrun.
_FINE = (*(1.75 + i / 32 for i in range(72)), *(4 + i / 8 for i in range(10)))
_GAP = 0.004  # plans on the front lie at least this far apart in bytes
# KL per token that a byte may cost; the first asks for the least KL, whatever its bytes.
_PRICES = (0.0, *(10 ** (-11 + 0.01 * i) for i in range(800)))
_WORTH = 0.1  # share of the finest weights' KL that a range per row must save to be worth its time
_PATH = 4**-0.15  # share of the KL of codes chosen one by one that is left along a trellis at the same rate
_MOST = 4.0  # bits per weight up to which plans go along a trellis: twice the codes leave little room beyond
_FAST = 0.25  # share of a plan's KL that fixed ranges may cost, since they make convolutions several times faster

Activations = Mapping[str, Mapping[str, float]]


def levels_between(levels: Sequence[Level]) -> list[Level]:
    """The levels of one part at all rates a plan may use.

    log(KL) and bytes are linear between measured rates. Above the highest one, where the finest grid is no larger and
    so says nothing, KL falls fourfold per bit.
    """
    others = [lv for lv in levels if lv.rate is None or lv.technique == "group_weights"]
    rated = [lv for lv in levels if lv.rate is not None and lv.technique != "group_weights"]
    if not rated:
        return others
    per_bit = max(lv.bytes / (lv.rate or 1) for lv in rated)
    points = sorted([(lv.rate or 0.0, lv) for lv in rated], key=lambda p: p[0])
    rate, top = points[-1]
    finest = next((lv for lv in others if lv.rate is None and lv.technique != "group_weights"), None)
    if finest is not None and finest.bytes > top.bytes and finest.kl < top.kl:
        points.append((finest.bytes / per_bit, finest))
    else:
        points.append((rate + 1, replace(top, bytes=int(top.bytes + per_bit), kl=top.kl / 4, flips=top.flips / 2)))
    return others + [_between(points, r) for r in _FINE if points[0][0] <= r < points[-1][0]]


def _along_trellis(level: Level) -> Level:
    """What is measured with codes chosen one by one, as it is along a trellis where plans take one."""
    return replace(level, kl=level.kl * _PATH) if _has_trellis(level) else level


def _has_trellis(level: Level) -> bool:
    return level.technique == "error_feedback" and level.rate is not None and level.rate <= _MOST


def _between(points: list[tuple[float, Level]], rate: float) -> Level:
    below = max((p for p in points if p[0] <= rate + 1e-9), key=lambda p: p[0])
    above = min((p for p in points if p[0] >= rate - 1e-9), key=lambda p: p[0])
    share = 0.0 if above[0] == below[0] else (rate - below[0]) / (above[0] - below[0])
    kl = math.exp((1 - share) * math.log(below[1].kl) + share * math.log(above[1].kl))
    size = int((1 - share) * below[1].bytes + share * above[1].bytes)
    flips = (1 - share) * below[1].flips + share * above[1].flips
    return Level(below[1].part, rate, size, kl, flips, share == 0.0, spread=below[1].spread)


@dataclass(frozen=True)
class _Choice:
    """A level for every part, with a vocabulary: a plan before its reasons are written."""

    vocabulary: Pruning
    levels: tuple[Level, ...]

    @property
    def bytes(self) -> int:
        return sum(lv.bytes for lv in self.levels)

    @property
    def kl(self) -> float:
        return self.vocabulary.kl + sum(lv.kl for lv in self.levels)


def front(
    model: Model,
    levels: Sequence[Level],
    rounding: Activations,
    vocabularies: Sequence[Pruning],
    shortened: Sequence[Shortened],
    origin: tuple[dict[str, Any], int],
    target: Target | None = None,
) -> list[Plan]:
    """Plans along the Pareto front of bytes and predicted KL, smallest first, then two with float activations.

    Where a shorter context was measured, each plan of the front appears a second time with it, named c instead of p.

    Args:
        model: the original.
        levels: from `sensitivity`.
        rounding: from `activations`, with 'static' from `packlight.ranging.with_static` where it was measured.
        vocabularies: from `prunings`.
        shortened: from `contexts`; empty where no latency was asked for.
        origin: what the plans say of the calibration samples, and the seed.
        target: where it asks for a latency, convolutions are computed in integers where they can be; where it asks for
            neither that nor memory, words that pictures or sounds are compared with keep float activations.
    """
    target = target or Target()
    by_part: dict[str, list[Level]] = {}
    for level in levels:
        by_part.setdefault(level.part, []).append(level)
    parts = {part: [_along_trellis(lv) for lv in levels_between(found)] for part, found in by_part.items()}
    tables = {p.name for table in model.family.token_tables if (p := model.family.part_of(table)) is not None}
    found: list[_Choice] = []
    for vocabulary in vocabularies:
        kept = {p: [_shrunk(lv, vocabulary.share) if p in tables else lv for lv in c] for p, c in parts.items()}
        for price in _PRICES:
            best = tuple(min(c, key=lambda lv: lv.kl + price * lv.bytes) for c in kept.values())
            found.append(_Choice(vocabulary, best))
    finest, fast = sum(min(lv.kl for lv in c) for c in parts.values()), target.latency is not None
    exact = _exact_words(model) if not fast and target.memory is None else {}
    chosen = _spaced(found)
    modes = [_modes(rounding, finest, math.inf if fast else c.kl) | exact for c in chosen]
    plans = [_plan(model, c, m, f"p{i + 1:02d}", origin) for i, (c, m) in enumerate(zip(chosen, modes, strict=True))]
    floats = _float_plans(model, chosen[-1], origin)
    if not shortened:
        return [*plans, *floats]
    step, kl = _shorter(model, shortened, plans[-1].expected["kl"])
    return [*plans, *[_with(step, kl, p) for p in plans], *floats]


def _shorter(model: Model, shortened: Sequence[Shortened], loss: float) -> tuple[Step, float]:
    """The shortest context that costs less than the largest plan does, else the one that costs least."""
    best = next((s for s in shortened if s.kl <= loss), min(shortened, key=lambda s: s.kl))
    kept = best.context
    than = "less than" if best.kl <= loss else "the least that was found, yet more than"
    reason = (
        f"for the latency: {best.share:.0%} of the positions stay, the speech and {kept.kept} of the silence after it; "
        f"KL {best.kl:.2g} per token, {than} the {loss:.2g} of the largest plan's weights and activations"
    )
    config = AudioContextConfig(kept.near, kept.middle, kept.far)
    return audio_context_step(config, model.family.towers[0].blocks, reason), best.kl


def _with(step: Step, kl: float, plan: Plan) -> Plan:
    expected = plan.expected | {"kl": plan.expected["kl"] + kl}
    return replace(plan, steps=(step, *plan.steps), name=f"c{plan.name[1:]}", expected=expected)


def _shrunk(level: Level, share: float) -> Level:
    return replace(level, bytes=int(level.bytes * share))


def _spaced(found: Sequence[_Choice]) -> list[_Choice]:
    """Those that no other beats in both bytes and KL, thinned to some distance; the largest always stays."""
    best: list[_Choice] = []
    for choice in sorted(found, key=lambda c: (c.bytes, c.kl)):
        if not best or choice.kl < best[-1].kl:
            best.append(choice)
    thin: list[_Choice] = []
    for choice in best:
        if not thin or choice.bytes >= (1 + _GAP) * thin[-1].bytes or choice is best[-1]:
            thin.append(choice)
    return thin


def _modes(rounding: Activations, weights: float, loss: float) -> dict[str, tuple[str, float, str]]:
    """By part: (how its activations are rounded, the KL of that, why).

    Args:
        rounding: what was measured.
        weights: KL of the finest weights; ranges per row must save a share of it.
        loss: KL of the plan's weights; fixed ranges, which make convolutions fast, may cost a share of it.
    """
    found = {}
    for part, kl in rounding.items():
        saved = kl["int8"] - kl["int8_rows"]
        rows = saved > _WORTH * weights
        why = f"8-bit activations with a range per {'row' if rows else 'sample'}: KL {kl['int8_rows' if rows else 'int8']:.2g}"
        other = (
            f"{kl['int8' if rows else 'int8_rows']:.2g} with one per {'sample' if rows else 'row, not worth its time'}"
        )
        found[part] = ("int8_rows" if rows else "int8", kl["int8_rows" if rows else "int8"], f"{why}, {other}")
        fixed = kl.get("static")
        if fixed is not None and fixed <= found[part][1] + _FAST * loss:
            why = f"fixed ranges and integers throughout: KL {fixed:.2g}, {found[part][1]:.2g} with {found[part][2]}"
            found[part] = ("static", fixed, why)
    return found


def _exact_words(model: Model) -> dict[str, tuple[str, float, str]]:
    """Modes for the towers of text that others are compared with: none where nothing is compared.

    An 8-bit range falls otherwise where the last bit of a float differs, as it does from one processor, or browser, to
    another; then a vector differs by 1e-3, and what is ranked by it changes places. A text is short enough for floats.
    """
    words = {t.name for t in model.family.towers if t.modality == "text" and model.family.sides is not None}
    parts = [p for p in model.family.parts if p.tower in words and not _only_lookups(model, p)]
    return {p.name: ("float", 0.0, "float activations, so that every processor ranks alike") for p in parts}


_STEPWISE = ("int8", 0.0, "8-bit activations, because integer kernels are the fast ones")
_LOOKED_UP = ("int8", 0.0, "looked up, never multiplied, so it has no activations")


def _only_lookups(model: Model, part: Part) -> bool:
    layers = [layer for path, layer in model.layers().items() if model.family.part_of(path) is part]
    return bool(layers) and all(isinstance(layer, nn.Embedding) for layer in layers)


def _plan(
    model: Model,
    choice: _Choice,
    modes: dict[str, tuple[str, float, str]],
    name: str,
    origin: tuple[dict[str, Any], int],
) -> Plan:
    steps = [] if choice.vocabulary.step is None else [choice.vocabulary.step]
    fixed = {
        p.name: convolutions_of(model, p) for p in model.family.parts if modes.get(p.name, _STEPWISE)[0] == "static"
    }
    taken = {path for paths in fixed.values() for path in paths}
    whole = tuple(path for path, layer in model.layers().items() if not is_matrix(layer) and path not in taken)
    if whole:
        steps.append(Step("float16", {}, whole, "depthwise and grouped convolutions: they are no matrix to code"))
    coded, computed = coded_paths(model), tuple(computed_paths(model))
    if computed:
        steps.append(Step("sinusoids", {}, computed, "positions are sines and cosines: computed at load, no bytes"))
    for level in choice.levels:
        part = next(p for p in model.family.parts if p.name == level.part)
        mode, _, why = modes.get(level.part, _LOOKED_UP if _only_lookups(model, part) else _STEPWISE)
        groups = level.technique == "group_weights"
        rate = f"{level.rate:g} bits per weight" if level.rate else "the finest 7-bit grid"
        codes = settings(model, level.part, level.rate) | {"activations": mode}
        codes |= {"trellis": True} if _has_trellis(level) else {}
        config = {"bits": 8, "group": 32} if groups else codes
        how = "measured" if level.measured else "interpolated between measured rates"
        reason = (
            f"{level.part}: {'8-bit groups of 32' if groups else rate}; KL {level.kl:.2g} per token, "
            f"{level.flips:.1%} of top tokens changed ({how}); {why}"
        )
        if level.part in fixed:
            static = {k: v for k, v in codes.items() if k in ("rate", "damp")}
            steps.append(Step("static_int8", static, fixed[level.part], reason))
            config["activations"] = "int8"
        left = [p for p in coded if model.family.part_of(p) is part and p not in taken]
        steps += _by_rate(level, config, reason)
        if any(path not in level.spread for path in left):
            steps.append(Step(level.technique, config, part.paths, reason))
    steps.append(Step("float16", {}, ("*",), "norms and biases: too few bytes to gain anything"))
    kl = choice.kl + sum(loss for _, loss, _ in modes.values())
    expected = {"bytes": float(choice.bytes), "kl": kl}
    return Plan(tuple(steps), model.family.name, origin[0], origin[1], name, expected)


def _by_rate(level: Level, config: dict[str, Any], reason: str) -> list[Step]:
    """A step for the layers of each rate, where layers of a part differ in what an error in them costs."""
    steps = []
    for rate in sorted({*level.rates.values()}, reverse=True):
        paths = tuple(p for p, own in level.rates.items() if own == rate)
        why = f"{reason}; on average, {rate:g} here by the Fisher information of what these layers give"
        steps.append(Step(level.technique, {**config, "rate": rate}, paths, why))
    return steps


def _float_plans(model: Model, best: _Choice, origin: tuple[dict[str, Any], int]) -> list[Plan]:
    """Slower plans that lose less, for when no plan with 8-bit activations keeps the drop."""
    why = "float activations: 8-bit ones lost too much"
    exact = _plan(model, best, {lv.part: ("float", 0.0, why) for lv in best.levels}, "f01", origin)
    halves = Step("float16", {}, ("*",), "integer weights lost too much")
    total = 2.0 * sum(p.numel() for p in model.module.parameters())
    return [exact, Plan((halves,), model.family.name, {}, origin[1], "f02", {"bytes": total, "kl": 1e-9})]
