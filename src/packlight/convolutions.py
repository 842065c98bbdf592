"""Convolutions of fewer operations in the place of full ones, and the edits that log them.

Edits of this kind, path of the convolution:

- 'separable', with 'rank': each input channel has `rank` filters of its own, path.0, and a convolution of kernel 1,
  path.1, mixes what they give.
- 'grouped', with 'groups': channels in groups that don't see each other, path.conv, after one permutation of the inputs
  and before one of the outputs, both among the tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError


def _part(like: Any, channels: tuple[int, int], **changes: Any) -> Any:
    """A convolution as `like`, with other channels."""
    how = {"kernel_size": like.kernel_size, "stride": like.stride, "padding": like.padding, **changes}
    return type(like)(*channels, **how)


def _face_(new: Any, like: Any) -> None:
    """What models read of a convolution: Whisper its stride, others its sizes."""
    for name in ("kernel_size", "stride", "padding", "in_channels", "out_channels"):
        setattr(new, name, getattr(like, name))


class Separable(nn.Sequential):
    """Filters of each channel, then a mixture of channels."""

    def __init__(self, like: Any, rank: int) -> None:
        wide = like.in_channels * rank
        apart = _part(like, (like.in_channels, wide), groups=like.in_channels, bias=False)
        mixed = _part(like, (wide, like.out_channels), kernel_size=1, stride=1, padding=0, bias=like.bias is not None)
        super().__init__(apart, mixed)
        self.channels = int(like.in_channels)
        _face_(self, like)

    @property
    def weight(self) -> Tensor:
        """[out, in, ...] of the full convolution that it equals; models read its dtype."""
        apart, mixed = (layer.get_parameter("weight") for layer in self)
        filters = apart.reshape(self.channels, -1, *apart.shape[2:])
        mixture = mixed.reshape(len(mixed), self.channels, -1)
        return torch.einsum("ocr,cr...->oc...", mixture, filters)


class Grouped(nn.Module):
    """A convolution in groups, with its channels in another order."""

    order: Tensor
    place: Tensor

    def __init__(self, like: Any, groups: int) -> None:
        super().__init__()
        self.conv = _part(like, (like.in_channels, like.out_channels), groups=groups, bias=like.bias is not None)
        self.register_buffer("order", torch.arange(like.in_channels))  # the inputs as the groups take them
        self.register_buffer("place", torch.arange(like.out_channels))  # where the groups' outputs go
        _face_(self, like)

    @property
    def weight(self) -> Tensor:
        """Of the groups; models read its dtype."""
        weight: Tensor = self.conv.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        made: Tensor = self.conv(x[:, self.order])
        return made[:, self.place]


def separable_(root: nn.Module, path: str, args: dict[str, Any]) -> nn.Module:
    """Put a separable convolution in the place of a full one; its weights are left to be filled. Returns it."""
    return _replace_(root, path, Separable(_plain(root, path), _count(args["rank"])))


def grouped_(root: nn.Module, path: str, args: dict[str, Any]) -> nn.Module:
    """Put a convolution in groups in the place of a full one; its weights are left to be filled. Returns it."""
    like, groups = _plain(root, path), _count(args["groups"])
    if like.in_channels % groups or like.out_channels % groups:
        raise PlanError(
            f"{path} has {like.in_channels} and {like.out_channels} channels, which {groups} does not divide."
        )
    return _replace_(root, path, Grouped(like, groups))


def is_full(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that sees all channels through a kernel of more than one place."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return False
    plain = layer.groups == 1 and max(layer.dilation) == 1 and layer.padding_mode == "zeros"
    return plain and max(layer.kernel_size) > 1 and not isinstance(layer.padding, str)


def _plain(root: nn.Module, path: str) -> Any:
    layer = root.get_submodule(path)
    if not is_full(layer):
        raise PlanError(f"{path} is no full convolution, so none of fewer operations can replace it.")
    return layer


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
        raise PlanError(f"{value!r} is no number of filters or groups; it must be a whole number, 1 or more.")
    return value


def _replace_(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
    return new


CONVOLUTIONS: dict[str, Callable[[nn.Module, str, dict[str, Any]], nn.Module]] = {
    "separable": separable_,
    "grouped": grouped_,
}
INNER = {"separable": (".0", ".1"), "grouped": (".conv",)}  # kind -> what is added to the path of its convolutions
