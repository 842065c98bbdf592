"""Watching what goes through a model, inside a `with`: Gram matrices of the inputs of its layers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from packlight.layers import matrix_inputs


@contextmanager
def grams(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Sum x xᵀ over everything that enters each layer while the context is open.

    Args:
        layers: path -> an nn.Linear or nn.Conv1d; layers that are given the same tensor, as query, key and value
            are, each get their own sum.

    Yields:
        path -> [in, in] float64, filled while the context is open.
    """
    sums: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, Tensor]] = []  # the last input and its Gram matrix: query, key and value share theirs

    def watch(path: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
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
