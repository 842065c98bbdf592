"""The numbers of attention heads in the basis in which their weights take fewest bits; the model computes the same.

Queries with keys, and values with the output layer, may be multiplied by any matrix and its inverse. In the basis that a
model was trained to, each number of a head is as strong as any other. In the best one few are strong and the others take
hardly any bits, at no cost when it runs.

When to use: before `error_feedback` at 3 bits or less, in towers that write word by word, with many calibration samples.
When not: with the finest grid, whose error grows by it; in encoders, where nothing was gained. `fit` doesn't take it.

Which basis: see `packlight.turning`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch, Tower
from packlight.information import output_products
from packlight.model import Model
from packlight.observe import grams
from packlight.quant import column_steps
from packlight.structure import blocks_of, fill_
from packlight.techniques import Stage, Technique
from packlight.turning import Rows, best_bases, damped, diagonals

NAME = "turn_heads"
_DAMP = 0.01  # of Gram matrices, as error feedback has it by default
Takes = Callable[[str], bool]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TurnHeadsConfig:
    """No settings."""


@dataclass(frozen=True)
class Heads:
    """An attention.

    Args:
        layers: paths of query, key, value and output.
        count: how many heads it has.
    """

    layers: tuple[str, ...]
    count: int


def turnable(model: Model) -> list[Heads]:
    """The attentions of all towers whose layers are plain linear ones and whose heads share nothing."""
    return [heads for tower in model.family.towers for heads in _of_tower(model.module, tower)]


def _of_tower(module: nn.Module, tower: Tower) -> Iterator[Heads]:
    for i in range(blocks_of(module, tower)):
        block = f"{tower.blocks}.{i}"
        for a in tower.attentions:
            paths = [f"{block}.{p}" for p in (a.query, a.key, a.value, a.out)]
            layers: list[Any] = [module.get_submodule(p) for p in paths]
            if not all(type(layer) is nn.Linear for layer in layers):
                continue
            query, key, value, out = layers
            if query.out_features == key.out_features and value.out_features == out.in_features:
                yield Heads((*paths,), int(getattr(module.get_submodule(f"{block}.{a.path}"), a.count)))


def check_turn(model: Model, takes: Takes) -> None:
    """Raises PlanError where the step names no attention, or only some layers of one."""
    named = [[takes(p) for p in heads.layers] for heads in turnable(model)]
    if not any(any(each) for each in named):
        raise PlanError("turn_heads names no attention of a tower. `packlight inspect --layers` lists the paths.")
    if any(any(each) and not all(each) for each in named):
        raise PlanError("turn_heads takes query, key, value and output of an attention together; name all four.")


def turn_heads_(
    model: Model, takes: Takes, batches: Sequence[Batch], seed: int = 0, progress: Progress | None = None
) -> list[str]:
    """Change the basis of the heads of attentions, in place.

    Args:
        model: not yet quantized.
        takes: whether the step takes a layer, given its path in the original.
        batches: calibration batches.
        seed: of what is drawn for the Fisher information.
        progress: called with (what, done, total).

    Returns:
        paths of the layers that changed. What the batches don't reach stays as it is.
    """
    wanted = [heads for heads in turnable(model) if takes(model.origin(heads.layers[0]))]
    layers = {path: model.module.get_submodule(path) for heads in wanted for path in heads.layers}
    with grams(layers) as inputs:
        costs = output_products(model, batches, [p for h in wanted for p in h.layers[:3]], seed, progress)
    changed: list[str] = []
    with torch.no_grad():
        for heads in wanted:
            if all(p in inputs for p in heads.layers) and all(p in costs for p in heads.layers[:3]):
                _turn_(model.module, heads, inputs, costs)
                changed += heads.layers
    return changed


def _turn_(module: nn.Module, heads: Heads, inputs: Mapping[str, Tensor], costs: Mapping[str, Tensor]) -> None:
    query, key, value = (
        Rows(_energy(module, p, inputs[p], heads.count), damped(_blocks(costs[p], heads.count)), p == heads.layers[0])
        for p in heads.layers[:3]
    )
    out: Any = module.get_submodule(heads.layers[3])
    read = Rows(_by_head(out.weight.detach().double().T, heads.count), None, inverse=True)
    scores, values = best_bases([key, query]), best_bases([value, read])
    back = torch.linalg.inv(scores).mT
    even = diagonals(back @ query.energy @ back.mT) / diagonals(scores @ key.energy @ scores.mT).clamp(min=1e-300)
    scores = even.clamp(1e-12, 1e12).pow(0.25)[:, :, None] * scores  # queries as large as keys
    entering = _blocks(inputs[heads.layers[3]], heads.count)
    even = diagonals(entering).mean(1, keepdim=True) / diagonals(values @ entering @ values.mT).clamp(min=1e-300)
    # One range has to hold all that enters the output layer.
    values = even.clamp(1e-12, 1e12).sqrt()[:, :, None] * values
    for path, basis in zip(heads.layers, (torch.linalg.inv(scores).mT, scores, values), strict=False):
        _rows_(module, path, basis)
    whole = torch.block_diag(*torch.linalg.inv(values))
    fill_(out, (out.weight.detach().double() @ whole).float(), None if out.bias is None else out.bias.detach())


def _rows_(module: nn.Module, path: str, basis: Tensor) -> None:
    """Give the rows of each head another basis, [heads, size, size]."""
    layer: Any = module.get_submodule(path)
    whole = torch.block_diag(*basis)
    bias = None if layer.bias is None else (whole @ layer.bias.detach().double()).float()
    fill_(layer, (whole @ layer.weight.detach().double()).float(), bias)


def _energy(module: nn.Module, path: str, gram: Tensor, count: int) -> Tensor:
    """W D Wᵀ of each head, [heads, size, size]."""
    weight = module.get_submodule(path).get_parameter("weight").detach().double()
    return _by_head(weight / column_steps(gram, _DAMP).double(), count)


def _by_head(weight: Tensor, count: int) -> Tensor:
    own = weight.view(count, -1, weight.shape[1])
    return own @ own.mT


def _blocks(matrix: Tensor, count: int) -> Tensor:
    """The part of each head on the diagonal, [heads, size, size]."""
    size = len(matrix) // count
    return matrix.double().view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


TURN_HEADS = Technique(
    name=NAME,
    config=TurnHeadsConfig,
    layer=None,
    stage=Stage.SMOOTH,
    needs=("gram",),
    summary="heads in the basis in which their weights take fewest bits; what the model computes stays",
)
