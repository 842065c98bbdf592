"""Single weights set to zero, anywhere or n of every m, as integer codes whose zeros the file packs.

It shrinks the file: a zero costs the entropy coder little. It does not speed anything up: the runtime multiplies by
zero as by any other number. For speed take `prune_structure`; for bytes, fewer bits per weight mostly cost less.

Papers: Wanda (Sun et al. 2023, arXiv 2306.11695) weighs a weight by the energy of its input, |w| E[x²]^1/2, within a
row; Optimal Brain Surgeon by what is left once others make up for it, w² / [H⁻¹]_jj, as SparseGPT does (Frantar and
Alistarh 2023, arXiv 2301.00774). What differs: only the choice is theirs here, the weights that stay are not changed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from packlight.errors import PlanError
from packlight.quant import channel_grid, rate_of
from packlight.techniques import Compressed, Stage, Technique


@dataclass(frozen=True)
class PruneWeightsConfig:
    """Settings.

    Args:
        ratio: share of each row that goes; not used where `of` is given.
        keep: weights that stay in every `of` neighbours of a row.
        of: how many neighbours; 0 for any place.
        score: 'wanda', 'obs', or 'magnitude', which needs no samples.
        rate: bits per weight of the grid before anything is pruned; None for the finest.
        activations: as for `round_to_nearest`.
        damp: share of the mean diagonal added to the Gram matrix ('obs' only).
    """

    ratio: float = 0.5
    keep: int = 2
    of: int = 0
    score: Literal["wanda", "obs", "magnitude"] = "wanda"
    rate: float | None = None
    activations: Literal["int8", "int8_rows", "float"] = "int8"
    damp: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise PlanError(f"ratio is {self.ratio}; it must lie between 0 and 1.")
        if self.of and not 0 < self.keep < self.of:
            raise PlanError(f"keep is {self.keep} of {self.of}; it must be 1 or more and fewer than all.")
        if self.score not in ("wanda", "obs", "magnitude"):
            raise PlanError(f"score is {self.score!r}; it must be 'wanda', 'obs' or 'magnitude'.")
        if self.rate is not None and not 1 <= self.rate <= 8:
            raise PlanError(f"rate is {self.rate}; it must lie from 1 to 8 bits per weight, or be null for the finest.")
        if self.activations not in ("int8", "int8_rows", "float"):
            raise PlanError(f"activations is {self.activations!r}; it must be 'int8', 'int8_rows' or 'float'.")
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp is {self.damp}; it must lie above 0 and up to 1.")

    @property
    def feedback(self) -> bool:
        """Whether it needs calibration samples."""
        return self.score != "magnitude"


def prune(weight: Tensor, gram: Tensor | None, config: PruneWeightsConfig) -> Compressed:
    """Choose what stays, then round it. Without a Gram matrix all inputs count alike, as in a table's look-up."""
    sparse = weight * mask(importance(weight, gram, config), config)
    grid = channel_grid(sparse, None) if config.rate is None else channel_grid(weight, config.rate)
    codes = grid.codes(sparse)
    return Compressed(
        kind="codes",
        args={"activations": config.activations},
        tensors={"codes": codes.T.to(torch.int8).contiguous(), "scale": grid.scale[:, 0].contiguous()},
        approximation=grid.values(codes),
        rate=rate_of(codes),
    )


def importance(weight: Tensor, gram: Tensor | None, config: PruneWeightsConfig) -> Tensor:
    """What each weight counts within its row, [out, in]."""
    if gram is None or config.score == "magnitude":
        return weight.abs()
    if config.score == "wanda":
        return weight.abs() * gram.diagonal().clamp(min=0).sqrt().to(weight.dtype)
    damped = gram.double().clone()
    damped.diagonal().add_(config.damp * damped.diagonal().mean() + 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()
    return weight.abs() / inverse.sqrt().to(weight.dtype)


def mask(scores: Tensor, config: PruneWeightsConfig) -> Tensor:
    """True where a weight stays: the highest scores of each row, or of each `of` neighbours; a rest keeps as many."""
    if not config.of:
        return _highest(scores, scores.shape[1] - round(config.ratio * scores.shape[1]))
    parts = scores.split(config.of, dim=1)
    return torch.cat([_highest(part, min(config.keep, part.shape[1])) for part in parts], 1)


def _highest(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


PRUNE_WEIGHTS = Technique(
    name="prune_weights",
    config=PruneWeightsConfig,
    layer=prune,
    stage=Stage.QUANTIZE,
    needs=("gram",),
    paper="Wanda, Sun et al. 2023, arXiv 2306.11695",
    summary="single weights to zero, any or n of m: a smaller file, not a faster one",
)
