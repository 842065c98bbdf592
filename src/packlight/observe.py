"""Watching what goes through a model: Gram matrices of its layers' inputs, their ranges, and which tokens it uses."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packlight.static import is_convolution, taps_of
from packlight.windows import matrix_inputs


@contextmanager
def grams(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Sum x xᵀ over everything that enters each layer while the context is open.

    Args:
        layers: path -> an nn.Linear, nn.Conv1d or nn.Conv2d; layers that are given the same tensor, as query, key and value
            are, each get their own sum.
        weights: path -> [positions], what each x xᵀ counts, of all that is to enter the layer in order; 1 for others.

    Yields:
        path -> [in, in] float64, filled while the context is open.
    """
    sums: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, Tensor]] = []  # the last input and its Gram matrix: query, key and value share theirs

    def watch(path: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        left = None if weights is None else weights.get(path)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal left
            if left is not None:
                rows = matrix_inputs(module, args[0].detach())
                if len(left) < len(rows):
                    raise ValueError(f"{path} is entered by more positions than there are weights for.")
                now, left = left[: len(rows)], left[len(rows) :]
                gram = (rows.T * now @ rows).double()
            else:
                if not (seen and seen[0][0] is args[0] and isinstance(module, nn.Linear)):
                    rows = matrix_inputs(module, args[0].detach())
                    seen[:] = [(args[0], (rows.T @ rows).double())]
                gram = seen[0][1]
            sums[path] = sums[path] + gram if path in sums else gram

        return layer.register_forward_pre_hook(hook)

    handles = [watch(path, layer) for path, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


_SAMPLES = 1 << 16  # values of an activation that are kept of each batch
_WINDOWED = 4  # inputs of each batch whose windows are summed: a group has few columns


@contextmanager
def ranges(module: nn.Module, paths: Iterable[str], into: dict[str, Tensor]) -> Iterator[None]:
    """Sample what enters and leaves convolutions while the context is open.

    Zeros are left out: every range holds them, and so a padded activation gives the range of the one inside it. Where
    what holds a convolution has `limits`, its output is seen as they clip it.

    Args:
        module: the model.
        paths: of layers in it; those that are no convolutions are passed over.
        into: path.input and path.output -> the values [n], appended to; the smallest and largest are always among them.
            path.taps -> of a convolution in groups, the Gram matrices [groups, columns, columns] of their windows.
    """

    def keep(name: str, x: Tensor) -> None:
        values = x.detach().flatten()
        values = values[values != 0]
        if not len(values):
            values = values.new_zeros(1)
        some = values[:: -(-len(values) // _SAMPLES)]
        some = torch.cat([some, values.min()[None], values.max()[None]])
        into[name] = torch.cat([into[name], some]) if name in into else some

    def watch(path: str, layer: Any) -> torch.utils.hooks.RemovableHandle:
        limits = getattr(module.get_submodule(path.rpartition(".")[0]), "limits", None)

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            for one in args[0][:_WINDOWED].detach().split(1) if layer.groups > 1 else ():
                taps = taps_of(layer, one)
                gram = taps.transpose(1, 2) @ taps
                into[f"{path}.taps"] = into[f"{path}.taps"] + gram if f"{path}.taps" in into else gram
            keep(f"{path}.input", args[0])
            keep(f"{path}.output", out if limits is None else out.clamp(*limits))

        return layer.register_forward_hook(hook)

    layers = {path: module.get_submodule(path) for path in paths}
    handles = [watch(path, layer) for path, layer in layers.items() if is_convolution(layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Moments:
    """Means and second moments of what enters a layer.

    Sums are about a point near the mean: of inputs that hardly vary, sums about zero would leave nothing but rounding.

    Args:
        near: [in] float64, that point.
        total: [in] float64, the sum of x - near.
        gram: [in, in] float64, the sum of (x - near)(x - near)ᵀ.
        count: of rows.
    """

    near: Tensor
    total: Tensor
    gram: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        """[in] float64."""
        return self.near + self.total / self.count

    def second(self, centred: bool) -> Tensor:
        """[in, in] float64: the covariance, or the second moments about zero."""
        off = self.total / self.count
        covariance = self.gram / self.count - torch.outer(off, off)
        return covariance if centred else covariance + torch.outer(self.mean, self.mean)


@contextmanager
def moments(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Moments]]:
    """Watch what enters each layer while the context is open.

    Args:
        layers: path -> an nn.Linear.

    Yields:
        path -> `Moments`, filled while the context is open; none of a layer that nothing entered.
    """
    found: dict[str, Moments] = {}

    def watch(path: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = matrix_inputs(module, args[0].detach())
            if path not in found:
                near = rows.mean(0).double()
                found[path] = Moments(near, torch.zeros_like(near), near.new_zeros(len(near), len(near)))
            own = found[path]
            rows = rows - own.near.float()
            own.total += rows.double().sum(0)
            own.gram += (rows.T @ rows).double()
            own.count += len(rows)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(path, layer) for path, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


_UNSEEN = 1e-6  # of a token that calibration never met: about the share of a rare word in a long text
_READ = 0.03  # weight of reading a token against writing it: an error in one input is one of many that are attended to


def token_use(logits: Iterable[Tensor], read: Iterable[Tensor]) -> Tensor:
    """How much an error in each row of a tied table costs, per position.

    To second order an error e in the logit of token r adds p (1 - p) e² / 2 to the KL divergence, p its probability:
    the mean of p (1 - p) over positions is the Fisher information of that row. Rows are also read as inputs.

    Args:
        logits: of each batch, [positions, tokens].
        read: the ids that each batch read, of any shape.

    Returns:
        [tokens] float64, never below the use of a rare word.
    """
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for written, ids in zip(logits, read, strict=True):
        p = torch.softmax(written, -1).double()
        total = total + (p * (1 - p)).sum(0) + _READ * torch.bincount(ids.flatten(), minlength=p.shape[-1])
        count += len(p)
    return total / max(count, 1) + _UNSEEN


_ONCE_MORE = 0.3  # readings that every token is given beside those seen: calibration meets few of them


def read_use(read: Iterable[Tensor], rows: int) -> Tensor:
    """How often each row of a table is looked up, of one that no head is tied to: Lidstone's estimate.

    An error in a row counts each time that its token is read, so the mean over a text weighs it by that.

    Args:
        read: the ids that each batch read, of any shape.
        rows: of the table.

    Returns:
        [rows] float64, above 0, with the sum 1.
    """
    count = torch.full((rows,), _ONCE_MORE, dtype=torch.float64)
    for ids in read:
        count += torch.bincount(ids.flatten(), minlength=rows)
    return count / count.sum()
