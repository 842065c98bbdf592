"""Convolutions in integers throughout: 8-bit inputs and outputs with fixed ranges, codes as weights.

What `packlight.layers.StaticConv` computes, as ONNX's QuantizeLinear, QLinearConv and DequantizeLinear define it: the
same integers in PyTorch and in the runtime. Ranges are measured beforehand, so no activation is looked at before it is
rounded, and a chain of convolutions need not leave the integers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError

TOP = 255  # an activation is a byte
Numbers = list[float]


@dataclass(frozen=True)
class Range:
    """The values that a byte stands for: (byte - zero) * scale.

    Args:
        scale: positive.
        zero: the byte that stands for 0.
    """

    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0 and 0 <= self.zero <= TOP):
            raise PlanError(f"{self.scale!r} and {self.zero!r} are no scale and zero point of a range of bytes.")


def range_of(low: float, high: float) -> Range:
    """The range from low to high, widened to hold 0, so that 0 is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / TOP, 1e-9)
    scale = float(torch.tensor(scale))  # as float32 has it, here and in the runtime
    return Range(scale, min(TOP, max(0, round(-low / scale))))


def rounded(x: Tensor, scale: float, zero: int) -> Tensor:
    """An activation as it is after QuantizeLinear, less the zero point: whole numbers in float32."""
    return (torch.round(x / scale) + zero).clamp(0, TOP) - zero


def fake(x: Tensor, held: Range) -> Tensor:
    """An activation after rounding to a range of bytes, and back."""
    return rounded(x, held.scale, held.zero) * held.scale


# Convolutions as rows -----------------------------------------------------------------------------------------------


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that can be computed so: any groups, one or two dimensions, zeros around."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return False
    plain = max(layer.dilation) == 1 and layer.padding_mode == "zeros"
    return plain and (layer.padding != "same" or all(k % 2 for k in layer.kernel_size))


def is_depthwise(layer: Any) -> bool:
    """Whether each channel of a convolution has one filter and sees itself alone."""
    return bool(layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels)


def rows_of(layer: nn.Module) -> Tensor:
    """The weight of a convolution as [out, kernel * in / groups], the input channel last. Raises PlanError for others."""
    if not is_convolution(layer):
        raise PlanError(
            f"static_int8 takes convolutions without dilation, not a {type(layer).__name__}; name another technique for it."
        )
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def padding_of(layer: Any) -> list[int]:
    """Zeros on each side, one number for each dimension."""
    if isinstance(layer.padding, str):
        return [k // 2 if layer.padding == "same" else 0 for k in layer.kernel_size]
    return [int(p) for p in layer.padding]


def geometry_of(layer: Any) -> list[int]:
    """Groups, then kernel, stride and padding, each with a number for each dimension."""
    return [int(layer.groups), *map(int, (*layer.kernel_size, *layer.stride)), *padding_of(layer)]


def sides_of(geometry: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding of a `geometry_of`."""
    count = (len(geometry) - 1) // 3
    return geometry[1 : 1 + count], geometry[1 + count : 1 + 2 * count], geometry[1 + 2 * count :]


def taps_of(layer: Any, x: Tensor) -> Tensor:
    """What the rows of a convolution multiply: inputs [n, in, ...] to windows [groups, n * places, kernel * in / groups].

    The input channel is last among the columns, as in `rows_of`.
    """
    groups, kernel, stride, padding = layer.groups, layer.kernel_size, layer.stride, padding_of(layer)
    x = nn.functional.pad(x, [p for side in reversed(padding) for p in (side, side)])
    for i, (size, step) in enumerate(zip(kernel, stride, strict=True)):
        x = x.unfold(2 + i, size, step)
    places, count = x.shape[2 : 2 + len(kernel)].numel(), int(torch.Size(kernel).numel())
    x = x.reshape(len(x), groups, -1, places, count)
    return x.permute(1, 0, 3, 4, 2).reshape(groups, len(x) * places, -1)


def kernel_of(rows: Tensor, geometry: list[int]) -> Tensor:
    """The weight [out, in / groups, ...] of codes or values [kernel * in / groups, out]."""
    kernel = sides_of(geometry)[0]
    return rows.T.reshape(rows.shape[1], *kernel, -1).movedim(-1, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    """The convolution itself, of [n, in, ...]."""
    kernel, stride, padding = sides_of(geometry)
    run: Any = nn.functional.conv1d if len(kernel) == 1 else nn.functional.conv2d
    made: Tensor = run(x, weight, bias, stride, padding, 1, geometry[0])
    return made


# The seam to the runtimes -------------------------------------------------------------------------------------------


def static_conv(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, held: Numbers, geometry: list[int]
) -> Tensor:
    """Quantize, convolve in integers, quantize, dequantize.

    Sums of products below 2^24 are whole numbers in float32, so this gives the integers that the runtime gives.

    Args:
        x: [n, in, ...].
        codes: int8 [kernel * in / groups, out].
        scale: [out].
        bias: [out], rounded to whole steps of input scale * scale, as QLinearConv takes it; None for none.
        held: scale and zero point of the input, then of the output.
        geometry: see `geometry_of`.
    """
    step, zero, out_step, out_zero = held
    unit = scale * step
    sums = convolve(rounded(x, step, int(zero)), kernel_of(codes.float(), geometry), None, geometry)
    shape = (-1, *[1] * (sums.dim() - 2))
    if bias is not None:
        sums = sums + torch.round(bias / unit).reshape(shape)
    scaled = torch.round(sums * (unit / out_step).reshape(shape))
    return ((scaled + out_zero).clamp(0, TOP) - out_zero) * out_step


@torch.library.custom_op("packlight::static_conv", mutates_args=())
def _static_conv(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, held: list[float], geometry: list[int]
) -> Tensor:
    return static_conv(x, codes, scale, bias, held, geometry)


@_static_conv.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, held: list[float], geometry: list[int]) -> Tensor:
    sides = zip(x.shape[2:], *sides_of(geometry), strict=True)
    return x.new_empty((x.shape[0], codes.shape[1], *((s + 2 * p - k) // d + 1 for s, k, d, p in sides)))
