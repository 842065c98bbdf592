"""Measure: the parts of a model, and how much each is hurt by fewer bits.

Sensitivity is the Kullback-Leibler divergence of the compressed model's next-token distribution from the original's,
per token, with one part compressed at a time, on calibration samples that gave no Gram matrix.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.context import AudioContext
from packlight.families import Batch, Part, ids_read
from packlight.information import bits_between, row_costs
from packlight.layers import ACTIVATIONS
from packlight.model import Model
from packlight.observe import grams, read_use, token_use
from packlight.plan import append_line, read_lines
from packlight.tables import TECHNIQUES
from packlight.techniques.sinusoids import is_sinusoids
from packlight.windows import is_matrix, matrix, unmatrix

Progress = Callable[[str, int, int], None]

_MOST = 6.5  # bits per weight beyond which 7-bit codes are hardly finer
_POSITIONS = 0.9  # how far positions count by what an error there costs; some of all of them keeps few from ruling
MEASURED: tuple[float | None, ...] = (None, 4.0, 3.0, 2.25, 1.75)  # bits per weight; None is the finest grid


@dataclass(frozen=True)
class Level:
    """What one part costs at one rate: measured, or interpolated between measured rates.

    `spread` has how many bits more or less than that single layers get, see `packlight.information.bits_between`.
    """

    part: str
    rate: float | None
    bytes: int
    kl: float
    flips: float
    measured: bool = True
    technique: str = "error_feedback"
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        """Bits per weight of each layer in `spread`, in steps of an eighth."""
        assert self.rate is not None or not self.spread
        return {p: min(_MOST, max(1.0, round(8 * ((self.rate or 0) + bits)) / 8)) for p, bits in self.spread.items()}


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
    """Gram matrices of every linear layer and convolution of the original, in one pass over the batches, and `row_costs`.

    Positions count in Gram matrices as `settings` has it.
    """
    costs = row_costs(model, batches, model.layers(), progress=progress, every=_writes(model))
    positions = {k: costs.pop(k) for k in [*costs] if k.endswith(".positions")}
    weights = {k.removesuffix(".positions"): 1 - _POSITIONS + _POSITIONS * v for k, v in positions.items()}
    layers = {p: layer for p, layer in model.layers().items() if not _is_lookup(layer) and is_matrix(layer)}

    def logits() -> Iterator[Tensor]:
        for i, batch in enumerate(batches):
            yield model.family.run(model.module, batch)
            if progress:
                progress("observing activations", i + 1, len(batches))

    family = model.family
    with torch.no_grad(), grams(layers, weights) as sums:
        if family.tied:
            use = token_use(logits(), [b[family.reads] for b in batches])
            uses = {f"{table}.use": use for table, _ in family.tied}
        else:
            for _ in logits():
                pass
            read = ids_read(batches, family.reads)
            uses = {f"{t}.use": read_use(read, model.layers()[t].num_embeddings) for t in family.tables}
    return {**sums, **costs, **uses}


def _writes(model: Model) -> bool:
    """Whether the model says one word after the other, rather than compare vectors."""
    return model.family.sides is None


def settings(model: Model, part: str, rate: float | None) -> dict[str, Any]:
    """Settings of error feedback that measuring and planning use for one part at one rate.

    Inputs of the first tower come in thousands of rows per sample, so their Gram matrices need little damping.
    """
    if rate is None:
        return {"rate": None}
    first = next(p for p in model.family.parts if p.name == part).tower == model.family.towers[0].name
    found = {"rate": rate, "columns": True, "damp": 0.002 if first else 0.01}
    tied = {p.name for table, _ in model.family.tied if (p := model.family.part_of(table)) is not None}
    found |= {"positions": _POSITIONS} if _writes(model) and part not in tied else {}
    return found | {"use": 0.25 if part in tied else 0.35}


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
    parts = [p for p in family.parts if any(p is family.part_of(path) for path in coded_paths(model))]
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


def activations(
    model: Model, batches: Sequence[Batch], kept: Path, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Measure what 8-bit activations alone cost, for each part of the towers whose inputs have many rows.

    Stepwise towers answer token by token: one row at a time, one range per sample and per row are the same.

    Returns:
        part -> {'int8': KL per token with one range per sample, 'int8_rows': with one per row}.
    """
    done = {v["part"]: v for v in read_lines(kept)}
    family, module = model.family, model.module
    many = [tower.name for tower in family.towers if not tower.stepwise]
    multiplied = [path for path in coded_paths(model) if not _is_lookup(model.module.get_submodule(path))]
    parts = [p for p in family.parts if p.tower in many and any(p is family.part_of(path) for path in multiplied)]
    reference: list[Tensor] = []
    for i, part in enumerate(parts):
        if part.name not in done:
            with torch.no_grad():
                reference = reference or [torch.log_softmax(family.run(module, b), -1) for b in batches]
                pairs = list(zip(batches, reference, strict=True))
                found = {mode: _activation_kl(model, part, mode, pairs) for mode in ("int8", "int8_rows")}
            done[part.name] = {"part": part.name, **found}
            append_line(kept, done[part.name])
        if progress:
            progress("measuring 8-bit activations", i + 1, len(parts))
    return {p.name: {k: v for k, v in done[p.name].items() if k != "part"} for p in parts}


CONTEXTS = (AudioContext(64, 16, 32), AudioContext(128, 32, 64), AudioContext(256, 64, 64))  # shortest first


@dataclass(frozen=True)
class Shortened:
    """What it costs to show the first tower little of the padding.

    Args:
        context: what is kept.
        kl: per token, of that alone.
        share: positions that are left, of all, on the judged samples.
    """

    context: AudioContext
    kl: float
    share: float


def contexts(model: Model, batches: Sequence[Batch], kept: Path, progress: Progress | None = None) -> list[Shortened]:
    """Measure each of `CONTEXTS` on the original, shortest first; none for a family that pads nothing."""
    family, module = model.family, model.module
    if family.shorten is None:
        return []
    done = {v["kept"]: v for v in read_lines(kept)}
    pairs: list[tuple[Batch, Tensor]] = []
    found = []
    for i, context in enumerate(CONTEXTS):
        if context.kept not in done:
            with torch.no_grad():
                pairs = pairs or [(b, torch.log_softmax(family.run(module, b), -1)) for b in batches]
                changed = replace(model, module=copy.copy(module))
                changed.module.config = copy.copy(module.config)
                family.shorten(changed.module, context)
                kl = divergence(changed, pairs)[0]
                lengths = [family.encode(m, b)["states"].shape[1] for m in (changed.module, module) for b in batches]
            share = sum(lengths[: len(batches)]) / sum(lengths[len(batches) :])
            done[context.kept] = {"kept": context.kept, "kl": kl, "share": share}
            append_line(kept, done[context.kept])
        found.append(Shortened(context, done[context.kept]["kl"], done[context.kept]["share"]))
        if progress:
            progress("measuring audio context", i + 1, len(CONTEXTS))
    return found


def _is_lookup(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _activation_kl(model: Model, part: Part, mode: str, pairs: list[tuple[Batch, Tensor]]) -> float:
    rounded = ACTIVATIONS[mode]
    layers = [x for p, x in model.layers().items() if model.family.part_of(p) is part and not _is_lookup(x)]
    layers = [layer for layer in layers if is_matrix(layer)]
    handles = [layer.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:])) for layer in layers]
    try:
        return divergence(model, pairs)[0]
    finally:
        for handle in handles:
            handle.remove()


def divergence(model: Model, pairs: list[tuple[Batch, Tensor]]) -> tuple[float, float]:
    """(KL per token to the original's log-probabilities, share of top tokens that changed)."""
    kl, flips, count = 0.0, 0.0, 0
    for batch, reference in pairs:
        now = torch.log_softmax(model.family.run(model.module, batch), -1)
        kl += float((reference.exp() * (reference - now)).sum())
        flips += float((now.argmax(-1) != reference.argmax(-1)).sum())
        count += len(now)
    return max(kl / count, 1e-9), flips / count


def coded_paths(model: Model) -> list[str]:
    """Paths of the layers that can hold codes, and are to: what a formula gives is left out."""
    computed = computed_paths(model)
    return [path for path, layer in model.layers().items() if is_matrix(layer) and path not in computed]


def computed_paths(model: Model) -> list[str]:
    """Paths of tables of positions that a formula gives."""
    tables = {path: layer for path, layer in model.layers().items() if isinstance(layer, nn.Embedding)}
    return [path for path, layer in tables.items() if is_sinusoids(layer.weight)]


def _measure_part(
    model: Model, part: str, rate: float | None, sums: dict[str, Tensor], pairs: list[tuple[Batch, Tensor]]
) -> Level:
    """Compress one part's weights, compare with the original, put the weights back."""
    name = "group_weights" if rate == 8.0 else "error_feedback"
    technique = TECHNIQUES[name]
    config = technique.config(**({"bits": 8} if name == "group_weights" else settings(model, part, rate)))
    heads = {head: table for table, head in model.family.tied}
    gram_of = {table: sums.get(head) for head, table in heads.items()}
    paths = [p for p in coded_paths(model) if (q := model.family.part_of(p)) and q.name == part and p not in heads]
    saved: dict[str, Tensor] = {}
    level = Level(part, rate, 0, 0.0, 0.0, technique=name)
    if name == "error_feedback" and rate is not None:
        linear = {p: matrix(layer) for p in paths if isinstance(layer := model.module.get_submodule(p), nn.Linear)}
        level = replace(level, spread=bits_between(linear, sums, config.damp, config.use))
    with torch.no_grad():
        for path in paths:
            layer = model.module.get_submodule(path)
            weight = layer.weight
            saved[path] = weight.detach().clone()
            use = {"use": sums.get(f"{path}.use")} if "use" in technique.needs else {}
            own = replace(config, rate=level.rates[path]) if path in level.spread else config
            assert technique.layer is not None
            made = technique.layer(matrix(layer), gram_of.get(path, sums.get(path)), own, **use)
            size = int(1.01 * made.rate * weight.numel() / 8) + 2 * sum(made.approximation.shape)
            level = replace(level, bytes=level.bytes + size)
            weight.copy_(unmatrix(made.approximation, weight.shape))
        kl, flips = divergence(model, pairs)
        for path, weight in saved.items():
            model.module.get_submodule(path).weight.copy_(weight)
    return replace(level, kl=kl, flips=flips)


def _is_table(model: Model, part: str) -> bool:
    """Whether a part is a table tied to a head: it runs one token at a time, where 8-bit groups are fast too."""
    return any((p := model.family.part_of(table)) is not None and p.name == part for table, _ in model.family.tied)
