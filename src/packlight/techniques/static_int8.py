"""Convolutions in 8-bit integers from end to end: codes as weights, activations with ranges fixed by calibration.

When to use: towers of convolutions, depthwise ones among them; nothing else makes them faster. When not: where what
goes through a convolution differs in size from input to input, as in recordings of any loudness, or where its channels
differ too much for one range; keep those in float16.

Papers: Jacob et al. 2018, arXiv 1712.05877 (integer inference, ranges, 32-bit biases); error feedback is
GPTQ (Frantar et al. 2023, arXiv 2210.17323), for convolutions in groups with the Gram matrix of each. What differs:
codes are entropy-coded, so a rate may be asked for, and the range is the one of least squared error among those inside
what was seen. Of Nagel et al. 2019, arXiv 1906.04721, two were tried on EfficientNet-Lite0 and left out: equalized
channels, which under ReLU6 clip what calibration did not see, and corrected biases, which did not help after feedback.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.quant import LIMIT, Grid, channel_grid, error_feedback, rate_of, rescaled
from packlight.static import Range, fake, is_depthwise, range_of, rows_of
from packlight.techniques import Compressed, Stage, Technique

# Kernels for depthwise convolutions multiply in 16 bits and add in 32, so their codes can't saturate as others' can.
_DEPTHWISE = 127
_LOOKED_AT = 100_000  # values that a range is chosen by
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True)
class StaticConfig:
    """Settings.

    Args:
        rate: bits per weight after entropy coding, 1 to 8; None for the finest grid.
        range: 'error' takes the range of least squared error, 'all' everything that calibration saw.
        damp: share of the mean diagonal added to the Gram matrix.
    """

    rate: float | None = None
    range: Literal["error", "all"] = "error"
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.rate is not None and not 1 <= self.rate <= 8:
            raise PlanError(f"rate is {self.rate}; it must lie from 1 to 8 bits per weight, or be null for the finest.")
        if self.range not in ("error", "all"):
            raise PlanError(f"range is {self.range!r}; it must be 'error' or 'all'.")
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp is {self.damp}; it must lie above 0 and up to 1.")


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a convolution.

    Args:
        inputs, outputs: of `packlight.observe.ranges`.
        taps: likewise, None for a convolution without groups.
        limit: largest absolute code.
    """

    inputs: Tensor
    outputs: Tensor
    taps: Tensor | None = None
    limit: int = LIMIT


def seen(path: str, layer: nn.Module, sums: dict[str, Tensor]) -> dict[str, Any]:
    """What `static_int8` takes beside a weight. Raises PlanError for a convolution that calibration did not run."""
    if f"{path}.input" not in sums:
        raise PlanError(
            f"static_int8 has no ranges for {path}: no calibration sample went through it. Give samples that do, or "
            "name float16 for it."
        )
    limit = _DEPTHWISE if is_depthwise(layer) else LIMIT
    return {"seen": Seen(sums[f"{path}.input"], sums[f"{path}.output"], sums.get(f"{path}.taps"), limit)}


def choose_range(values: Tensor, how: str) -> Range:
    """The range of bytes for an activation, given values of it [n]: of least squared error, or of 'all'."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    best = range_of(low, high)
    if how == "all":
        return best
    some = values[:: -(-len(values) // _LOOKED_AT)]
    least = float("inf")
    for below in _SHRINKS if low < 0 else (1.0,):
        for above in _SHRINKS if high > 0 else (1.0,):
            tried = range_of(below * low, above * high)
            error = float((fake(some, tried) - some).square().sum())
            if error < least:
                least, best = error, tried
    return best


def static_int8(weight: Tensor, gram: Tensor | None, config: StaticConfig, seen: Seen) -> Compressed:
    """Codes of one convolution with the ranges of its input and output; feedback where there is a Gram matrix."""
    held, out = choose_range(seen.inputs, config.range), choose_range(seen.outputs, config.range)
    grid = channel_grid(weight, config.rate, seen.limit)
    # A channel of nothing but its bias, which so fine a step would take beyond 32 bits: its codes become 0.
    idle = grid.scale < 2.0**-18 * out.scale / held.scale
    grid = replace(grid, scale=torch.where(idle, torch.ones_like(grid.scale), grid.scale))
    if seen.taps is not None:
        codes = grouped_feedback(weight, seen.taps, grid, config.damp)
    elif gram is not None:
        codes = error_feedback(weight, gram, grid, config.damp)
        grid = grid if config.rate is None else rescaled(grid, weight, codes, gram)
    else:
        codes = grid.codes(weight)
    return Compressed(
        kind="static",
        args={"input": [held.scale, held.zero], "output": [out.scale, out.zero]},
        tensors={"codes": codes.T.to(torch.int8).contiguous(), "scale": grid.scale[:, 0].contiguous()},
        approximation=grid.values(codes),
        rate=rate_of(codes),
    )


def grouped_feedback(weight: Tensor, grams: Tensor, grid: Grid, damp: float) -> Tensor:
    """`packlight.quant.error_feedback` for the groups of a convolution, all at once.

    Args:
        weight: [out, columns], rows in the order of their groups.
        grams: [groups, columns, columns].
        grid: one scale per row.
        damp: share of the mean diagonal that is added to the diagonal.

    Returns:
        codes [out, columns], int16.
    """
    columns = weight.shape[1]
    mean = grams.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # a group that saw nothing
    grams = grams.double() + torch.diag_embed((damp * mean)[:, None].expand(-1, columns))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(grams))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    work = weight.reshape(len(grams), -1, columns).float().clone()
    scale = grid.scale.reshape(len(grams), -1)
    codes = torch.empty(work.shape, dtype=torch.int16)
    for i in range(columns):
        code = torch.round(work[..., i] / scale).clamp_(grid.low, grid.high)
        codes[..., i] = code
        error = (work[..., i] - code * scale) / upper[:, i, i, None]
        work[..., i + 1 :] -= error[..., None] * upper[:, None, i, i + 1 :]
    return codes.reshape(weight.shape)


STATIC_INT8 = Technique(
    name="static_int8",
    config=StaticConfig,
    layer=static_int8,
    stage=Stage.QUANTIZE,
    needs=("gram", "ranges"),
    paper="Jacob et al. 2018, arXiv 1712.05877",
    summary="convolutions in 8-bit integers, depthwise too, with ranges fixed by calibration",
    matrix=rows_of,
)
