"""A layer as one matrix: linear layers and tables as they are, convolutions as the matrix that multiplies their windows."""

from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError


def is_matrix(layer: nn.Module) -> bool:
    """Whether `matrix` takes the layer. Convolutions in groups, depthwise ones among them, are no single matrix."""
    if isinstance(layer, nn.Conv1d):
        return layer.groups == 1 and layer.dilation == (1,) and layer.padding_mode == "zeros"
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and (layer.padding != "same" or all(k % 2 for k in layer.kernel_size))
    return isinstance(layer, nn.Linear | nn.Embedding)


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a layer as a matrix [out, in].

    A convolution [out, in, k] becomes [out, k * in], the matrix that multiplies its windows, [out, in, h, w] likewise
    [out, h * w * in]; an embedding is its table [tokens, width], whose rows are the outputs of the head that it may be
    tied to.

    Raises:
        PlanError: a kind of layer that can't be seen so.
    """
    if not is_matrix(layer):
        if isinstance(layer, nn.modules.conv._ConvNd):
            raise PlanError("Only plain convolutions (no groups, no dilation) can be compressed yet; name float16.")
        raise PlanError(f"A layer of kind {type(layer).__name__} can't be compressed.")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return weight.movedim(1, -1).reshape(layer.out_channels, -1)
    return weight


def unmatrix(weight: Tensor, shape: torch.Size) -> Tensor:
    """Undo `matrix`: a matrix [out, in] in the shape that the layer's weight has."""
    if len(shape) < 3:
        return weight
    return weight.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def windows(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The windows that a convolution sees: [batch, channels, time] to [batch, steps, kernel * channels]."""
    x = nn.functional.pad(x, (padding, padding))
    steps = (x.shape[2] - kernel) // stride + 1
    taps = [x[:, :, j : j + (steps - 1) * stride + 1 : stride] for j in range(kernel)]
    return torch.cat(taps, 1).transpose(1, 2)


def windows_of(conv: Any, x: Tensor) -> Tensor:
    """The windows that this convolution sees."""
    return windows(x, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))


def windows2d_of(conv: Any, x: Tensor) -> Tensor:
    """The windows of a two-dimensional convolution: [batch, channels, y, x] to [batch, rows, columns, h * w * channels].

    Windows that do not overlap, as those of patches, are cut out by one reshape.
    """
    (high, wide), (down, right), (top, side) = conv.kernel_size, conv.stride, padding2d(conv)
    if top or side:
        x = nn.functional.pad(x, (side, side, top, top))
    rows, columns = (x.shape[2] - high) // down + 1, (x.shape[3] - wide) // right + 1
    if (high, wide) == (down, right):
        x = x[:, :, : rows * high, : columns * wide]
        x = x.reshape(x.shape[0], x.shape[1], rows, high, columns, wide)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(x.shape[0], rows, columns, -1)
    y_end, x_end = (rows - 1) * down + 1, (columns - 1) * right + 1
    taps = [x[:, :, i : i + y_end : down, j : j + x_end : right] for i in range(high) for j in range(wide)]
    return torch.cat(taps, 1).permute(0, 2, 3, 1)


def padding2d(conv: Any) -> tuple[int, int]:
    """Rows and columns of zeros that a convolution puts on each side."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        return conv.kernel_size[0] // 2, conv.kernel_size[1] // 2
    return int(conv.padding[0]), int(conv.padding[1])


def matrix_inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """What the matrix of a layer multiplies, as rows [n, in], given the layer's input."""
    if isinstance(layer, nn.Conv1d):
        x = windows_of(layer, x)
    elif isinstance(layer, nn.Conv2d):
        x = windows2d_of(layer, x)
    return x.reshape(-1, x.shape[-1]).float()
