"""A linear layer as two thinner ones, along the directions that its outputs have on calibration samples.

y = W x + b lies close to a plane of few dimensions: the leading eigenvectors V of the covariance of y, which is
W C Wᵀ with C that of x. Then y ≈ V (Vᵀ W) x + bias, the best in squared error of all that have this rank.

When to use: for a latency, in encoders whose layers have outputs of low rank; large models more than small ones. When
not: for size alone: codes of fewer bits cost less.

Paper: LiteASR (Kamahori et al. 2025, arXiv 2502.20583). What differs: the covariance comes from the Gram matrix of the
inputs, measured block by block behind the factors before it; a layer without bias gets none, its second moments are
then taken about zero.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import Edit
from packlight.model import Model
from packlight.observe import Moments, moments
from packlight.structure import fill_
from packlight.techniques import Stage, Technique
from packlight.waves import waves

log = logging.getLogger(__name__)
NAME = "low_rank"
_STEP = 16  # ranks are multiples of it: what kernels take at once


@dataclass(frozen=True)
class LowRankConfig:
    """Settings.

    Args:
        energy: share of the variance of a layer's outputs that must stay; decides the rank where none is given.
        rank: of every layer, or None. A multiple of 16 runs fastest.
    """

    energy: float = 0.99
    rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.energy < 1:
            raise PlanError(f"energy is {self.energy}; it must lie between 0 and 1.")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise PlanError(f"rank is {self.rank!r}; it must be a whole number, 1 or more, or null.")


Takes = Callable[[str], bool]


def check_low_rank(model: Model, takes: Takes) -> None:
    """Raises PlanError where the scope names no linear layer that can be factored."""
    if not any(takes(path) for path in _factorable(model)):
        raise PlanError("low_rank names no linear layer of a tower. `packlight inspect --layers` lists the paths.")


def _factorable(model: Model) -> list[str]:
    tied = {path for pair in model.family.tied for path in pair}
    towers = model.family.towers
    layers = [p for p, layer in model.layers().items() if isinstance(layer, nn.Linear) and p not in tied]
    return [p for p in layers if any(t.has(p) for t in towers)]


def low_rank_(model: Model, config: LowRankConfig, takes: Takes, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Factor a model's linear layers, in place; each change is logged in its edits.

    Args:
        model: not yet quantized.
        config: the step's settings.
        takes: whether the step takes a layer, given its path in the original.
        batches: calibration batches.

    Returns:
        for each layer in scope {'path', 'rank', 'energy': what stayed, 'skipped': why it was left alone, or ''}.
    """
    wanted = [p for p in _factorable(model) if takes(model.origin(p))]
    notes: list[dict[str, Any]] = []
    with torch.no_grad():
        for paths, measure in waves(model, batches):
            own: dict[str, Any] = {p: model.module.get_submodule(p) for p in paths if p in wanted}
            if not own:
                continue
            with moments(own) as found:
                measure()
            notes += [_factor_(model, path, layer, config, found.get(path)) for path, layer in own.items()]
    for note in (n for n in notes if n["skipped"]):
        log.info("%s is left alone: %s", note["path"], note["skipped"])
    return notes


def _factor_(
    model: Model, path: str, layer: nn.Linear, config: LowRankConfig, inputs: Moments | None
) -> dict[str, Any]:
    note: dict[str, Any] = {"path": path, "rank": None, "energy": None, "skipped": ""}
    if inputs is None:
        return note | {"skipped": "the calibration samples don't reach it"}
    rank, kept, basis = directions(layer.weight.detach(), inputs.second(layer.bias is not None), config)
    note |= {"rank": rank, "energy": round(kept, 6)}
    whole = layer.in_features * layer.out_features
    if rank * (layer.in_features + layer.out_features) >= whole:
        return note | {"skipped": f"rank {rank} needs as many numbers as the layer has, {whole}"}
    first, second, bias = factors(layer, basis, inputs.mean)
    new: Any = model.edit_(Edit(path, "low_rank", {"rank": rank}))
    fill_(new[0], first)
    fill_(new[1], second, bias)
    return note


def directions(weight: Tensor, second: Tensor, config: LowRankConfig) -> tuple[int, float, Tensor]:
    """(rank, share of the outputs' energy that it keeps, basis [out, rank] float64) for a layer.

    Args:
        weight: [out, in].
        second: [in, in], second moments of its inputs.
        config: an explicit rank, or the energy that must stay.
    """
    wide = weight.double()
    values, vectors = torch.linalg.eigh(wide @ second @ wide.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum().clamp(min=1e-300)
    rank = config.rank
    if rank is None:
        needed = int((shares < config.energy).sum()) + 1
        rank = -(-needed // _STEP) * _STEP
    rank = min(rank, len(values))
    return rank, float(shares[rank - 1]), vectors[:, :rank]


def factors(layer: nn.Linear, basis: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The two weights and the second's bias: the mean of the output is kept exactly.

    Args:
        layer: y = W x + b.
        basis: [out, rank], orthonormal.
        mean: [in], of x.
    """
    weight = layer.weight.detach().double()
    first = basis.T @ weight
    bias = None
    if layer.bias is not None:
        centre = weight @ mean.double()
        bias = layer.bias.detach().double() + centre - basis @ (basis.T @ centre)
    return first.float(), basis.float(), None if bias is None else bias.float()


LOW_RANK = Technique(
    name=NAME,
    config=LowRankConfig,
    layer=None,
    stage=Stage.PRUNE,
    needs=("gram",),
    paper="LiteASR, Kamahori et al. 2025, arXiv 2502.20583",
    summary="linear layers as two thinner ones, along the directions of their outputs: smaller and faster",
)
