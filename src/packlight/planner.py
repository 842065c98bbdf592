"""Choose: profile the parts, measure how much each is hurt, and propose plans along the Pareto front.

Sensitivity is the Kullback-Leibler divergence of the compressed model's next-token distribution from the original's,
per token, with one part compressed at a time, on calibration samples that gave no Gram matrix. It is measured at a few
rates; between them log(KL) is interpolated, since the error falls fourfold per bit (rate-distortion theory). The front
minimises total KL + lambda * bytes, one lambda after the other: losses of parts add up to first order.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.families import Batch
from packlight.layers import matrix
from packlight.model import Model
from packlight.observe import grams
from packlight.plan import Plan, Step
from packlight.tables import TECHNIQUES

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

MEASURED: tuple[float | None, ...] = (None, 4.0, 3.0, 2.25)  # bits per weight; None is the finest grid
_FINE = tuple(2.25 + 0.25 * i for i in range(12))  # rates a plan may use
_GAP = 0.04  # plans on the front lie at least this far apart in bytes


@dataclass(frozen=True)
class Level:
    """What one part costs at one rate: measured, or interpolated between measured rates."""

    part: str
    rate: float | None
    bytes: int
    kl: float
    flips: float
    measured: bool = True
    technique: str = "error_feedback"


def profile(model: Model) -> list[dict[str, Any]]:
    """Parameters, float32 bytes and share of multiply-adds of each part of a model, not yet edited."""
    rows: dict[str, dict[str, Any]] = {}
    heads = {head for _, head in model.family.tied}
    for path, layer in model.layers().items():
        part = model.family.part_of(path)
        name = part.name if part else "other"
        row = rows.setdefault(name, {"name": name, "parameters": 0, "before": 0, "multiply_adds": 0})
        row["multiply_adds"] += model.family.multiply_adds(model.module, path)
        if path not in heads:
            count = layer.weight.numel()
            row["parameters"] += count
            row["before"] += 4 * count
    total = sum(r["multiply_adds"] for r in rows.values()) or 1
    return [{**r, "share_of_multiply_adds": r["multiply_adds"] / total} for r in rows.values()]


def measure_grams(model: Model, batches: Sequence[Batch], progress: Progress | None = None) -> dict[str, Tensor]:
    """Gram matrices of every linear layer and convolution of the original, in one pass over the batches."""
    kinds = (nn.Linear, nn.Conv1d)
    layers = {p: layer for p, layer in model.layers().items() if isinstance(layer, kinds)}
    with torch.no_grad(), grams(layers) as sums:
        for i, batch in enumerate(batches):
            model.family.run(model.module, batch)
            if progress:
                progress("observing activations", i + 1, len(batches))
    return sums


def sensitivity(
    model: Model,
    sums: dict[str, Tensor],
    batches: Sequence[Batch],
    kept: Path,
    progress: Progress | None = None,
) -> list[Level]:
    """Measure each part at each rate of `MEASURED`.

    Args:
        model: the original; unchanged afterwards.
        sums: from `measure_grams`.
        batches: other samples than those of the Gram matrices.
        kept: JSON-lines file of what earlier runs measured; appended to.
        progress: called with (what, done, total).
    """
    done = {(v["part"], v["rate"]): Level(**v) for v in read_lines(kept)}
    family, module = model.family, model.module
    with torch.no_grad():
        batches = [family.encode(module, b) for b in batches]
        reference = [torch.log_softmax(family.run(module, b), -1) for b in batches]
    first = family.towers[0].name
    parts = [p for p in family.parts if any(p is family.part_of(path) for path in model.layers())]
    levels = []
    for i, part in enumerate(parts):
        rates = (*MEASURED, 8.0) if _is_table(model, part.name) else MEASURED
        for j, rate in enumerate(rates):
            if (part.name, rate) not in done:
                inputs = (
                    [{k: v for k, v in b.items() if k != "states"} for b in batches] if part.tower == first else batches
                )
                level = _measure_part(model, part.name, rate, sums, list(zip(inputs, reference, strict=True)))
                append_line(kept, asdict(level))
                done[(part.name, rate)] = level
            levels.append(done[(part.name, rate)])
            if progress:
                progress("measuring sensitivity", i * len(MEASURED) + j + 1, len(parts) * len(MEASURED))
    return levels


def _measure_part(
    model: Model, part: str, rate: float | None, sums: dict[str, Tensor], pairs: list[tuple[Batch, Tensor]]
) -> Level:
    """Compress one part's weights, compare with the original, put the weights back."""
    name = "group_weights" if rate == 8.0 else "error_feedback"
    technique = TECHNIQUES[name]
    config = technique.config(bits=8) if name == "group_weights" else technique.config(rate=rate)
    heads = {head: table for table, head in model.family.tied}
    gram_of = {table: sums.get(head) for head, table in heads.items()}
    paths = [p for p in model.layers() if (q := model.family.part_of(p)) and q.name == part and p not in heads]
    saved: dict[str, Tensor] = {}
    size = 0
    with torch.no_grad():
        for path in paths:
            layer = model.module.get_submodule(path)
            weight = layer.weight
            saved[path] = weight.detach().clone()
            made = technique.layer(matrix(layer), gram_of.get(path, sums.get(path)), config)
            size += int(1.01 * made.rate * weight.numel() / 8) + 2 * len(made.approximation)
            weight.copy_(_like(made.approximation, layer))
        kl, flips, count = 0.0, 0.0, 0
        for batch, reference in pairs:
            now = torch.log_softmax(model.family.run(model.module, batch), -1)
            kl += float((reference.exp() * (reference - now)).sum())
            flips += float((now.argmax(-1) != reference.argmax(-1)).sum())
            count += len(now)
        for path, weight in saved.items():
            model.module.get_submodule(path).weight.copy_(weight)
    return Level(part, rate, size, max(kl / count, 1e-9), flips / count, technique=name)


def _is_table(model: Model, part: str) -> bool:
    """Whether a part is a table tied to a head: it runs one token at a time, where 8-bit groups are fast too."""
    return any((p := model.family.part_of(table)) is not None and p.name == part for table, _ in model.family.tied)


def _like(weight: Tensor, layer: nn.Module) -> Tensor:
    """A matrix back in the shape of the layer's weight."""
    if isinstance(layer, nn.Conv1d):
        out, channels, taps = layer.weight.shape
        return weight.view(out, taps, channels).permute(0, 2, 1)
    return weight


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


def front(model: Model, levels: Sequence[Level], calibration: dict[str, Any], seed: int) -> list[Plan]:
    """Plans along the Pareto front of bytes and predicted KL, smallest first, then two with float activations."""
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
    plans = [_plan(model, p, f"p{i + 1:02d}", calibration, seed) for i, p in enumerate(spaced)]
    finest = [c[0] for c in choices.values()]
    return [*plans, *_float_plans(model, finest, calibration, seed)]


def _plan(model: Model, picked: Sequence[Level], name: str, calibration: dict[str, Any], seed: int) -> Plan:
    steps = []
    for level in picked:
        part = next(p for p in model.family.parts if p.name == level.part)
        groups = level.technique == "group_weights"
        rate = (
            "8-bit groups of 32"
            if groups
            else "the finest 7-bit grid"
            if level.rate is None
            else f"{level.rate:g} bits per weight"
        )
        how = "measured" if level.measured else "interpolated between measured rates"
        reason = (
            f"{level.part}: {rate}; KL {level.kl:.2g} per token, {level.flips:.1%} of top tokens changed ({how}); "
            "8-bit activations, because integer kernels are the fast ones"
        )
        config = {"bits": 8, "group": 32} if groups else {"rate": level.rate, "activations": "int8"}
        steps.append(Step(level.technique, config, part.paths, reason))
    steps.append(Step("float16", {}, ("*",), "norms and biases: too few bytes to gain anything"))
    expected = {"bytes": float(sum(lv.bytes for lv in picked)), "kl": sum(lv.kl for lv in picked)}
    return Plan(tuple(steps), model.family.name, calibration, seed, name, expected)


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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that a kill cut short is dropped."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return values


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one value to a JSON-lines file, mending a line that a kill cut short."""
    whole = read_lines(path)
    text = "".join(json.dumps(v) + "\n" for v in [*whole, value])
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
