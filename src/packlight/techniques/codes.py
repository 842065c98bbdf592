"""Integer codes with one scale per output channel: rounding to nearest, and error feedback.

The same codes serve size and speed. In the file they take their entropy, any real number of bits per weight; in
memory they feed the integer kernels exactly.

When to use: always first; it is the only form that makes a CPU encoder faster. When not: where the activations of a
layer have outliers that 8 bits can't hold, take `activations="float"` or groups.

Papers: GPTQ (Frantar et al. 2023, arXiv 2210.17323) for the feedback; one step for all rows under entropy coding as in
WaterSIC; entropy-coded trellis-coded quantization (Joshi, Crump and Fischer 1995) where `trellis` asks for it. What differs from GPTQ: codes are not clipped to a width of 3 or 4 bits but entropy-coded, so rare large
codes cost bits instead of error; the grid is symmetric and per channel, within +-63 (see `quant.LIMIT`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from packlight.errors import PlanError
from packlight.quant import Grid, channel_grid, column_grid, error_feedback, rate_of, rescaled
from packlight.techniques import Compressed, Stage, Technique


@dataclass(frozen=True)
class CodesConfig:
    """Settings of both techniques.

    Args:
        rate: bits per weight after entropy coding, 1 to 8; None for the finest grid of 7-bit codes.
        activations: 'int8' quantizes the layer's input on the fly, with one range per sample, which integer kernels
            need; 'int8_rows' takes a range per row, a little slower and exact where a few rows are huge; 'float' does
            not quantize.
        damp: share of the mean diagonal added to the Gram matrix (error feedback only).
        columns: a factor per input channel, steps that fit each input's energy (error feedback at a rate only).
        use: how far the steps of rows follow what an error in them costs, how often a table's row is used or the Fisher
            information of a linear layer's output: step ~ cost^-use. 0 for equal steps (error feedback with columns
            only).
        positions: how far a position's part of the Gram matrix follows what an error there costs, the Fisher information
            of the layer's output: 0 for all alike, 1 for nothing but that (error feedback of linear layers with at least
            eight positions per input, in models that write text).
        trellis: whether the codes of each input are a path through a trellis, which costs nothing at run time and
            0.15 bits per weight less for the same error (error feedback at a rate only).
    """

    rate: float | None = None
    activations: Literal["int8", "int8_rows", "float"] = "int8"
    damp: float = 0.01
    columns: bool = False
    use: float = 0.0
    positions: float = 0.0
    trellis: bool = False

    def __post_init__(self) -> None:
        if self.rate is not None and not 1 <= self.rate <= 8:
            raise PlanError(f"rate is {self.rate}; it must lie from 1 to 8 bits per weight, or be null for the finest.")
        if self.activations not in ("int8", "int8_rows", "float"):
            raise PlanError(f"activations is {self.activations!r}; it must be 'int8', 'int8_rows' or 'float'.")
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp is {self.damp}; it must lie above 0 and up to 1.")
        if not 0 <= self.use <= 0.5:
            raise PlanError(f"use is {self.use}; it must lie from 0 to 0.5.")
        if not 0 <= self.positions <= 1:
            raise PlanError(f"positions is {self.positions}; it must lie from 0 to 1.")
        if self.trellis and self.rate is None:
            raise PlanError("trellis needs a rate: the finest grid has no use for it.")


def round_to_nearest(weight: Tensor, gram: Tensor | None, config: CodesConfig) -> Compressed:
    """Each weight to its nearest code; needs no data."""
    grid = channel_grid(weight, config.rate)
    return _compressed(grid, grid.codes(weight), config)


def feedback(weight: Tensor, gram: Tensor | None, config: CodesConfig, use: Tensor | None = None) -> Compressed:
    """Codes in GPTQ order: the error of each column is made good by those not yet rounded.

    A layer without a Gram matrix is a table that is only looked up: its inputs are one-hot, so their Gram matrix is
    diagonal, and feedback is the same as rounding to nearest; rows may still have steps by how often they are used. Where
    the gradients at its outputs are known, their Gram matrix says which columns an error can be moved to.
    """
    if gram is None and use is not None and config.use and config.columns and config.rate is not None:
        gram = torch.eye(weight.shape[1])
    if gram is None:
        grid = channel_grid(weight, config.rate)
        return _compressed(grid, grid.codes(weight), config)
    if config.columns and config.rate is not None:
        rows = None if use is None or not config.use else use.float() ** -config.use
        grid = column_grid(weight, gram, config.rate, config.damp, rows, config.trellis)
    else:
        grid = channel_grid(weight, config.rate, path=config.trellis)
    codes = error_feedback(weight, gram, grid, config.damp)
    return _compressed(grid if config.rate is None else rescaled(grid, weight, codes, gram), codes, config)


def _compressed(grid: Grid, codes: Tensor, config: CodesConfig) -> Compressed:
    return Compressed(
        kind="codes",
        args={"activations": config.activations} | ({"columns": True} if grid.columns is not None else {}),
        tensors={"codes": codes.T.to(torch.int8).contiguous(), "scale": grid.scale[:, 0].contiguous()}
        | ({"columns": grid.columns.contiguous()} if grid.columns is not None else {}),
        approximation=grid.values(codes),
        rate=rate_of(codes),
    )


ROUND_TO_NEAREST = Technique(
    name="round_to_nearest",
    config=CodesConfig,
    layer=round_to_nearest,
    stage=Stage.QUANTIZE,
    summary="integer codes, one scale per channel, each weight to its nearest code; needs no data",
)

ERROR_FEEDBACK = Technique(
    name="error_feedback",
    config=CodesConfig,
    layer=feedback,
    stage=Stage.QUANTIZE,
    needs=("gram", "use"),
    paper="GPTQ, Frantar et al. 2023, arXiv 2210.17323, algorithm 1",
    summary="integer codes, one scale per channel, rounding errors made good by the columns not yet rounded",
)
