"""Measure what fixed ranges cost: convolutions in integers throughout, for the parts whose convolutions lie in groups.

Convolutions in groups are no matrix, so beside `static_int8` they stay floats, and a tower of them gets no faster. Only
towers of pictures are considered: sound of any loudness does not keep to a range.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.families import Batch, Part
from packlight.model import Model
from packlight.observe import ranges
from packlight.plan import append_line, read_lines
from packlight.sensitivity import Progress, divergence
from packlight.static import fake, is_convolution, rows_of
from packlight.techniques.static_int8 import StaticConfig, choose_range, seen, static_int8
from packlight.windows import unmatrix


def convolutions_of(model: Model, part: Part) -> tuple[str, ...]:
    """Paths of the convolutions of a part that `static_int8` takes."""
    found = [path for path, layer in model.layers().items() if is_convolution(layer)]
    return tuple(path for path in found if model.family.part_of(path) is part)


def with_static(
    rounding: Mapping[str, Mapping[str, float]],
    model: Model,
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    kept: Path,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """What 8-bit activations cost each part, with 'static' added where fixed ranges are an alternative.

    That is the KL with fixed ranges, and with codes for convolutions in groups; weights of others stay as they are.

    Args:
        rounding: from `packlight.sensitivity.activations`.
        model: the original; unchanged afterwards.
        batches: those that give the ranges, and others that the loss is measured on.
        kept: JSON-lines file of what earlier runs measured; appended to.
        progress: called with (what, done, total).
    """
    towers = {t.name for t in model.family.towers if t.modality == "image"}
    parts = {p: convolutions_of(model, p) for p in model.family.parts if p.tower in towers}
    parts = {p: paths for p, paths in parts.items() if any(_in_groups(model, path) for path in paths)}
    done = {v["part"]: float(v["static"]) for v in read_lines(kept)}
    for i, (part, paths) in enumerate(parts.items()):
        if part.name not in done:
            done[part.name] = _loss(model, paths, *batches)
            append_line(kept, {"part": part.name, "static": done[part.name]})
        if progress:
            progress("measuring fixed ranges", i + 1, len(parts))
    names = [part.name for part in parts]
    return {name: {**kl, **({"static": done[name]} if name in names else {})} for name, kl in rounding.items()}


def _in_groups(model: Model, path: str) -> bool:
    return bool(getattr(model.module.get_submodule(path), "groups", 1) > 1)


def _loss(model: Model, paths: Sequence[str], observed: Sequence[Batch], judged: Sequence[Batch]) -> float:
    family, module = model.family, model.module
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        pairs = [(b, torch.log_softmax(family.run(module, b), -1)) for b in judged]
        with ranges(module, paths, sums):
            for batch in observed:
                family.encode(module, batch)
        handles: list[Any] = []
        saved: dict[str, Tensor] = {}
        try:
            for path in paths:
                layer = module.get_submodule(path)
                handles += _rounding(layer, sums, path)
                if _in_groups(model, path):
                    weight = layer.get_parameter("weight")
                    saved[path] = weight.detach().clone()
                    made = static_int8(rows_of(layer), None, StaticConfig(), **seen(path, layer, sums))
                    weight.copy_(unmatrix(made.approximation, weight.shape))
            return divergence(model, pairs)[0]
        finally:
            for handle in handles:
                handle.remove()
            for path, before in saved.items():
                module.get_submodule(path).get_parameter("weight").data.copy_(before)


def _rounding(layer: nn.Module, sums: dict[str, Tensor], path: str) -> list[Any]:
    """Hooks that round what goes in and out of a convolution to its ranges."""
    held, out = (choose_range(sums[f"{path}.{name}"], "error") for name in ("input", "output"))
    return [
        layer.register_forward_pre_hook(lambda _, args: (fake(args[0], held), *args[1:])),
        layer.register_forward_hook(lambda _, args, made: fake(made, out)),
    ]
