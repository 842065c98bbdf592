"""Measure what an error in each row of a layer costs: the Fisher information of what the layer gives.

To second order, an error e in the outputs of a layer costs eᵀ F e, F the mean of g gᵀ over positions, where g is the
gradient of what the whole model says. Its diagonal says which rows of a linear layer deserve smaller steps, and which of
several layers more bits: values more than queries, as it turns out. By position, the sum of g² says how much an error
there matters at all: of thirty seconds most may be silence. A table that is only looked up has no inputs whose
Gram matrix could be taken; F itself, over its columns, takes that place.

Papers: the Fisher information as curvature, sampled from the model's own answers, Martens 2020, arXiv 1412.1193, and
Kunstner et al. 2019, arXiv 1905.12558; of vectors, random projections (Hutchinson 1990).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packlight.families import Batch, Family
from packlight.model import Model
from packlight.quant import column_steps, find_step

_BATCHES = 16  # of calibration that gradients are taken of, spread over all
_MORE = 48  # of calibration whose gradients give products of all outputs of a layer, which need more of them
_PROJECTIONS = 4  # of each batch's vectors
_AT = 3.5  # bits per weight at which steps of layers are compared: far from where a rate is no longer the log of a step
_FEW = 8  # positions per input below which their costs, each a single draw, would make Gram matrices of too few
_LEAST = 0.01  # share of the mean that every row counts at least: sums over few batches are no more exact

Progress = Callable[[str, int, int], None]


def row_costs(
    model: Model,
    batches: Sequence[Batch],
    paths: Collection[str],
    seed: int = 0,
    progress: Progress | None = None,
    every: bool = False,
) -> dict[str, Tensor]:
    """What errors in the rows of layers cost, for layers that any of the batches runs.

    Args:
        model: unchanged afterwards.
        batches: calibration batches; some of them are taken.
        paths: of linear layers, and of tables of `model.family.tables`; others are passed over.
        seed: of what is drawn.
        progress: called with (what, done, total).
        every: whether to take all batches, and to give what each position of them costs, for layers with at least
            eight positions per input.

    Returns:
        path.use -> [out] float64, costs of a linear layer's rows, the mean of g² over positions, above 0; path -> of a
        table [width, width] float64, the sum of g gᵀ over what was read; with `every`, path.positions -> of a linear
        layer [positions] float32, the sum of g² over its outputs as a share of the mean, for all batches in order.
    """
    family = model.family
    watched = {p: layer for p, layer in model.layers().items() if p in paths and _is_counted(p, layer, family)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    calls: dict[str, list[Tensor]] = {}
    whole = [b for b in batches if family.sides is None or family.reads in b]  # two towers are compared by both
    some = whole if every else whole[:: max(1, -(-len(whole) // _BATCHES))]
    some = some if watched else []
    with _gradients(model, watched, sums, counts, calls, family.tables):
        _backward(model, some, seed, "observing gradients", progress)
    means = {k: v / counts[k] if k.endswith(".use") else v for k, v in sums.items()}
    found = {k: v + _LEAST * v.mean() + 1e-30 if k.endswith(".use") else v for k, v in means.items()}
    joined = {path: torch.cat(each) for path, each in calls.items() if every}
    joined = {path: v for path, v in joined.items() if len(v) >= _FEW * int(watched[path].in_features)}  # type: ignore[arg-type]
    return found | {f"{path}.positions": (v / v.mean().clamp(min=1e-30)).float() for path, v in joined.items()}


def output_products(
    model: Model, batches: Sequence[Batch], paths: Collection[str], seed: int = 0, progress: Progress | None = None
) -> dict[str, Tensor]:
    """The whole Fisher information of what linear layers give, not only of each output alone.

    Args:
        model: unchanged afterwards.
        batches: calibration batches; some of them are taken.
        paths: of linear layers.
        seed: of what is drawn.
        progress: called with (what, done, total).

    Returns:
        path -> [out, out] float64, the mean of g gᵀ over positions, for layers that any of the batches runs.
    """
    family = model.family
    watched = {path: model.module.get_submodule(path) for path in paths}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    whole = [b for b in batches if family.sides is None or family.reads in b]
    some = whole[:: max(1, -(-len(whole) // _MORE))]
    with _gradients(model, watched, sums, counts, {}, watched):
        _backward(model, some, seed, "observing gradients of heads", progress)
    return {path: v / counts[path] for path, v in sums.items()}


def _backward(model: Model, batches: Sequence[Batch], seed: int, what: str, progress: Progress | None) -> None:
    """A gradient of a sample of what the model says, for each batch."""
    draw = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        for i, batch in enumerate(batches):
            for scalar, last in _said(model.family, model.module, batch, draw):
                if scalar.requires_grad:
                    scalar.backward(retain_graph=not last)
            if progress:
                progress(what, i + 1, len(batches))


def bits_between(
    weights: Mapping[str, Tensor], sums: Mapping[str, Tensor], damp: float, use: float
) -> dict[str, float]:
    """How many bits per weight more or less than their mean each of several layers deserves.

    Reverse water-filling over all of them: where the step of row r and column i is c / (sqrt(F_rr) L_ii) with one c for
    all layers, every weight adds the same to the loss (see `packlight.quant.column_grid`). A bit halves a step.

    Args:
        weights: path -> [out, in].
        sums: path -> Gram matrix of the inputs, all over the same samples; path.use -> `row_costs`.
        damp: as error feedback will have it.
        use: likewise.

    Returns:
        path -> bits, with the mean 0 over all weights; none for layers of which a sum is missing, or for a single one.
    """
    wanted = {}
    for path, weight in weights.items():
        gram, cost = sums.get(path), sums.get(f"{path}.use")
        if gram is None or cost is None:
            continue
        factor, relative = column_steps(gram, damp), cost.float() ** -use
        level = factor.log().mean() - 0.5 * cost.log().mean()
        step = find_step(
            weight / (factor * relative[:, None]) * (factor.log().mean() + relative.log().mean()).exp(), _AT, 1 << 30
        )
        wanted[path] = math.log2(step) - float(level) / math.log(2)
    if len(wanted) < 2:
        return {}
    total = sum(weights[p].numel() for p in wanted)
    mean = sum(bits * weights[p].numel() for p, bits in wanted.items()) / total
    return {path: bits - mean for path, bits in wanted.items()}


def _is_counted(path: str, layer: nn.Module, family: Family) -> bool:
    heads = {head for _, head in family.tied}
    return path in family.tables or (isinstance(layer, nn.Linear) and path not in heads)


def _said(family: Family, module: nn.Module, batch: Batch, draw: torch.Generator) -> Iterator[tuple[Tensor, bool]]:
    """(a scalar whose gradient is a sample of what the model says, whether it is the batch's last)."""
    if family.sides is None:
        logits = torch.log_softmax(family.run(module, batch), -1)
        drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=draw).to(logits.device)
        yield logits.gather(1, drawn).sum(), True
        return
    vectors = [v / v.norm(dim=-1, keepdim=True) for v in family.sides(module, batch)[:2]]
    for i in range(_PROJECTIONS):
        drawn_for = [torch.randn(v.shape, generator=draw).to(v.device) for v in vectors]
        scalar = sum(((v * d).sum() for v, d in zip(vectors, drawn_for, strict=True)), torch.zeros(()))
        yield scalar, i == _PROJECTIONS - 1


@contextmanager
def _gradients(
    model: Model,
    watched: dict[str, nn.Module],
    sums: dict[str, Tensor],
    counts: dict[str, int],
    calls: dict[str, list[Tensor]],
    whole: Collection[str],
) -> Iterator[None]:
    """Sum up the gradients at the outputs of layers while the context is open; no parameter gets one.

    Of layers in `whole` the sum of g gᵀ, of others that of g²; `calls` gets, for each of these and each time that it is
    called, the sums of g² by position.
    """

    def watch(path: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        name = path if path in whole else f"{path}.use"

        def keep(call: int, grad: Tensor) -> None:
            rows = grad.detach().reshape(-1, grad.shape[-1])
            if path not in whole:
                calls[path][call] += rows.double().square().sum(1)
            found = (rows.T @ rows).double() if path in whole else rows.double().square().sum(0)
            sums[name] = sums[name] + found if name in sums else found
            counts[name] = counts.get(name, 0) + len(rows)

        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_(True)
            made = calls.setdefault(path, [])  # gradients come in another order, or not at all
            out.register_hook(partial(keep, len(made)))
            made.append(torch.zeros(out.numel() // out.shape[-1], dtype=torch.float64, device=out.device))
            return out.clone()  # what follows may write into it

        return layer.register_forward_hook(hook)

    handles = [watch(path, layer) for path, layer in watched.items()]
    kept = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for p, _ in kept:
            p.requires_grad_(False)
        yield
    finally:
        for p, before in kept:
            p.requires_grad_(before)
        for handle in handles:
            handle.remove()
