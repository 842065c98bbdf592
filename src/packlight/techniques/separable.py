"""Full convolutions as separable or grouped ones, started from the original's weights and taught by its outputs.

A separable convolution of rank r has r filters per input channel and mixes what they give. The best one in squared error
of the weights comes from the singular vectors of each channel's [out, taps] slice. On real inputs, whose taps and
channels go together, another is better: given the filters the best mixture is a least-squares problem in the Gram matrix
of the inputs, given the mixture so are the filters, and the two are solved in turn.

A grouped convolution keeps the blocks of the weight that lie within groups. Which channels share a group is chosen so
that they hold most of its energy; then each block is solved by least squares to make up for what the others did.

When to use: for a latency, where convolutions are a large part. When not: for a stem that is a few per cent of the time,
as Whisper's is; `packlight bench --profile` says.

Papers: separable convolutions from SVD, Jaderberg et al. 2014, arXiv 1405.3866, and Guo et al. 2018, arXiv 1812.08374;
MobileNets, Howard et al. 2017, arXiv 1704.04861. What differs: the error is that of the outputs on calibration samples,
in closed form, without gradient steps.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packlight.convolutions import Grouped, Separable, is_full
from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import Edit
from packlight.model import Model
from packlight.techniques import Stage, Technique
from packlight.waves import waves

log = logging.getLogger(__name__)
_ROUNDS = 4  # of solving mixture and filters in turn
_MOST = 4096  # unknowns of the filters' least-squares problem; beyond it only the mixture is solved
_DAMP = 1e-5  # share of the mean diagonal that is added to a matrix before it is inverted
_STARTS = 4  # of the search for groups


@dataclass(frozen=True)
class SeparableConfig:
    """Settings.

    Args:
        rank: filters per input channel. As many as the kernel has places, and the result is the original.
        feedback: least squares on calibration samples; else on the weights alone.
    """

    rank: int = 1
    feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise PlanError(f"rank is {self.rank!r}; it must be a whole number, 1 or more.")


@dataclass(frozen=True)
class GroupedConfig:
    """Settings.

    Args:
        groups: that the channels are divided into; must divide both numbers of channels.
        feedback: least squares on calibration samples; else the original's weights.
    """

    groups: int = 2
    feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or self.groups < 2:
            raise PlanError(f"groups is {self.groups!r}; it must be a whole number, 2 or more.")


Takes = Callable[[str], bool]


def convolutions_of(model: Model, takes: Takes) -> list[str]:
    """Paths of the full convolutions that a scope names."""
    return [path for path, layer in model.layers().items() if is_full(layer) and takes(path)]


def check_convolutions(model: Model, config: SeparableConfig | GroupedConfig, takes: Takes) -> None:
    """Raises PlanError where the scope names no full convolution, or one whose channels the groups don't divide."""
    paths = convolutions_of(model, takes)
    if not paths:
        raise PlanError("The step names no full convolution. `packlight inspect --layers` lists the paths.")
    if isinstance(config, GroupedConfig):
        for path in paths:
            layer: Any = model.module.get_submodule(path)
            if layer.in_channels % config.groups or layer.out_channels % config.groups:
                raise PlanError(
                    f"{path} has {layer.in_channels} and {layer.out_channels} channels, which {config.groups} groups "
                    "don't divide. Choose another number, or a scope without it."
                )


def replace_convolutions_(
    model: Model, config: SeparableConfig | GroupedConfig, takes: Takes, batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """Replace a model's full convolutions, in place, each taught behind those before it; logged in its edits.

    Args:
        model: not yet quantized.
        config: settings of the step, which say what comes in their place.
        takes: whether the step takes a path.
        batches: calibration batches; none are needed without `feedback`.

    Returns:
        for each {'path', 'error': squared error of the outputs relative to them (of the weights without feedback),
        'start': the same before least squares, 'skipped': why it was left alone, or ''}.
    """
    wanted = convolutions_of(model, takes)
    notes = []
    with torch.no_grad():
        for paths, measure in waves(model, batches if config.feedback else []):
            for path in [p for p in paths if p in wanted]:
                sums = measure() if config.feedback else {}
                notes.append(_one_(model, path, config, sums.get(path)))
    for note in notes:
        log.info("%s", note)
    return notes


def _one_(model: Model, path: str, config: SeparableConfig | GroupedConfig, gram: Tensor | None) -> dict[str, Any]:
    layer: Any = model.module.get_submodule(path)
    note = {"path": path, "error": 0.0, "start": 0.0, "skipped": ""}
    weight = layer.weight.detach().double().flatten(2)  # [out, in, taps]
    out, channels, taps = weight.shape
    gram = None if gram is None else _by_channel(gram.double(), channels, taps)
    bias = layer.bias
    if isinstance(config, SeparableConfig):
        if config.rank * (channels * taps + channels * out) >= weight.numel():
            return note | {"skipped": f"rank {config.rank} needs as many numbers as the full convolution"}
        start, made = separated(weight, config.rank, None), separated(weight, config.rank, gram)
        new: Any = model.edit_(Edit(path, "separable", {"rank": config.rank}))
        assert isinstance(new, Separable)
        new[0].weight.copy_(made[1].reshape(new[0].weight.shape))
        new[1].weight.copy_(made[0].reshape(new[1].weight.shape))
        target = new[1]
        whole = [torch.einsum("ocr,crk->ock", *pair) for pair in (start, made)]
    else:
        order, place = grouping(_energy(weight, gram), config.groups)
        whole = [blocks(weight, order, place, config.groups, g) for g in (None, gram)]
        new = model.edit_(Edit(path, "grouped", {"groups": config.groups}))
        assert isinstance(new, Grouped)
        inner = whole[1][place][:, order].reshape(config.groups, out // config.groups, config.groups, -1, taps)
        own = torch.stack([inner[g, :, g] for g in range(config.groups)])
        new.conv.weight.copy_(own.reshape(new.conv.weight.shape))
        new.order.copy_(order)
        new.place.copy_(torch.argsort(place))
        target = new.conv
    if bias is not None:
        target.bias.copy_(bias)
    errors = [float(f"{error(weight, w, gram):.4g}") for w in whole]
    return note | {"start": errors[0], "error": errors[1]}


def _by_channel(gram: Tensor, channels: int, taps: int) -> Tensor:
    """A Gram matrix of windows, taps outermost as `matrix` has them, with channels outermost."""
    index = torch.arange(channels * taps).reshape(taps, channels).T.reshape(-1)
    return gram[index][:, index]


def error(weight: Tensor, other: Tensor, gram: Tensor | None) -> float:
    """|(W - V) x|² / |W x|² over the inputs, or over the weights without a Gram matrix; both [out, in, taps]."""
    return _energy_of(weight - other, gram) / max(_energy_of(weight, gram), 1e-300)


def _energy_of(weight: Tensor, gram: Tensor | None) -> float:
    flat = weight.flatten(1)
    return float((flat * (flat if gram is None else flat @ gram)).sum())


# Separable ----------------------------------------------------------------------------------------------------------


def separated(weight: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mixture [out, in, rank] and the filters [in, rank, taps] of a separable convolution.

    Args:
        weight: [out, in, taps] float64.
        rank: filters per channel.
        gram: [in * taps, in * taps] of the inputs; None for the best in squared error of the weights.
    """
    out, channels, taps = weight.shape
    left, values, right = torch.linalg.svd(weight.movedim(1, 0), full_matrices=False)  # per channel [out, taps]
    kept = min(rank, values.shape[1])
    mixture, filters = left[..., :kept] * values[:, None, :kept], right[:, :kept]
    if kept < rank:  # more filters than the kernel has places: the rest are zero
        mixture = torch.nn.functional.pad(mixture, (0, rank - kept))
        filters = torch.nn.functional.pad(filters, (0, 0, 0, rank - kept))
    mixture = mixture.movedim(0, 1)
    if gram is None:
        return mixture, filters
    product = (weight.flatten(1) @ gram).reshape(out, channels, taps)  # W G
    square = gram.reshape(channels, taps, channels, taps)
    for _ in range(_ROUNDS):
        inner = torch.einsum("crk,ckdl,dsl->crds", filters, square, filters).reshape(channels * rank, -1)
        right_side = torch.einsum("ock,crk->ocr", product, filters).reshape(out, -1)
        mixture = _solve(inner, right_side.T).T.reshape(out, channels, rank)
        if channels * rank * taps > _MOST:
            break
        both = torch.einsum("ocr,ods->crds", mixture, mixture)
        normal = torch.einsum("crds,ckdl->crkdsl", both, square).reshape(channels * rank * taps, -1)
        due = torch.einsum("ocr,ock->crk", mixture, product).reshape(-1, 1)
        filters = _solve(normal, due).reshape(channels, rank, taps)
    return mixture, filters


def _solve(square: Tensor, right: Tensor) -> Tensor:
    """The x of square x = right, a little damped."""
    damp = _DAMP * square.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(square + damp * torch.eye(len(square), dtype=square.dtype), right)


# Grouped ------------------------------------------------------------------------------------------------------------


def _energy(weight: Tensor, gram: Tensor | None) -> Tensor:
    """What each input channel brings to each output [out, in], as if channels were independent."""
    if gram is None:
        return weight.square().sum(2)
    taps = weight.shape[2]
    own = torch.stack([gram[c * taps : (c + 1) * taps, c * taps : (c + 1) * taps] for c in range(weight.shape[1])])
    return torch.einsum("ock,ckl,ocl->oc", weight, own, weight)


def grouping(energy: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(order of the inputs, order of the outputs), group after group, with much of the energy within groups.

    Args:
        energy: [out, in].
        groups: of equal size.
    """
    draw = torch.Generator().manual_seed(0)
    best: tuple[float, Tensor, Tensor] | None = None
    for start in range(_STARTS):
        size = energy.shape[1]
        inputs = torch.arange(size) if start == 0 else torch.randperm(size, generator=draw)
        inputs = inputs * groups // size  # the group of each
        for _ in range(20):
            onehot = torch.nn.functional.one_hot(inputs, groups).to(energy)
            outputs = _balanced(energy @ onehot)
            turned = torch.nn.functional.one_hot(outputs, groups).to(energy)
            following = _balanced(energy.T @ turned)
            if bool((following == inputs).all()):
                break
            inputs = following
        kept = float(energy[outputs[:, None] == inputs[None]].sum())
        if best is None or kept > best[0] * (1 + 1e-9):
            best = kept, inputs, outputs
    assert best is not None
    return torch.argsort(best[1], stable=True), torch.argsort(best[2], stable=True)


def _balanced(gain: Tensor) -> Tensor:
    """A group for each row of a matrix of gains [rows, groups], all of one size; who loses most elsewhere chooses first."""
    rows, groups = gain.shape
    top = gain.topk(min(2, groups), dim=1).values
    left = [rows // groups] * groups
    chosen = torch.zeros(rows, dtype=torch.long)
    for row in torch.argsort(top[:, 0] - top[:, -1], descending=True, stable=True).tolist():
        for group in torch.argsort(gain[row], descending=True, stable=True).tolist():
            if left[group]:
                left[group] -= 1
                chosen[row] = group
                break
    return chosen


def blocks(weight: Tensor, order: Tensor, place: Tensor, groups: int, gram: Tensor | None) -> Tensor:
    """The weight [out, in, taps] with zeros outside its groups; with a Gram matrix the rest makes up for what is gone."""
    taps = weight.shape[2]
    made = torch.zeros_like(weight)
    for rows, columns in zip(place.chunk(groups), order.chunk(groups), strict=True):
        if gram is None:
            made[rows[:, None], columns] = weight[rows[:, None], columns]
            continue
        index = (columns[:, None] * taps + torch.arange(taps)).reshape(-1)
        right = weight[rows].flatten(1) @ gram[:, index]
        found = _solve(gram[index][:, index], right.T).T
        made[rows[:, None], columns] = found.reshape(len(rows), len(columns), taps)
    return made


SEPARABLE_CONVOLUTION = Technique(
    name="separable_convolution",
    config=SeparableConfig,
    layer=None,
    stage=Stage.ARCHITECTURE,
    needs=("gram",),
    paper="Jaderberg et al. 2014, arXiv 1405.3866; MobileNets, Howard et al. 2017, arXiv 1704.04861",
    summary="full convolutions as filters per channel and a mixture of channels: fewer operations and numbers",
)

GROUPED_CONVOLUTION = Technique(
    name="grouped_convolution",
    config=GroupedConfig,
    layer=None,
    stage=Stage.ARCHITECTURE,
    needs=("gram",),
    paper="ShuffleNet, Zhang et al. 2017, arXiv 1707.01083",
    summary="full convolutions in groups of channels that hold most of their energy: fewer operations and numbers",
)
