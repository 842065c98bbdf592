"""A smaller vision tower of convolutions, designed from a budget and cut out of a larger one.

A design says how many of the blocks, of the channels between them and of the hidden channels within them stay, how large
the pictures are, and whether the convolutions of kernel 1 work in groups: multipliers over the stages of the tower, as
in MobileNet (Howard et al. 2017, arXiv 1704.04861) and EfficientNet (Tan and Le 2019, arXiv 1905.11946). A budget in
multiply-adds or parameters is met by the hidden channels; where several sides or depths may be, each is cut, and the one
whose vectors are nearest to the teacher's before any training is taken. TinyNets (Han et al. 2020, arXiv 2010.14819)
found likewise that below a budget the resolution and the depth matter more than the width.

What stays is the teacher's, the most important channels by magnitude: weight inheritance of TinyCLIP (Wu et al. 2023,
arXiv 2309.12314). A channel counts by the weights that make it times those that read it, so one that is dead on either
side goes first.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch, Family
from packlight.families.dual_processing import rows_of, with_side
from packlight.families.mobile_dual import EfficientNetLite

TOWER = "vision_model"
Config = dict[str, Any]
_STRIDE = 32  # a side is a multiple of what the tower divides it by
_LEAST = 1.5  # expansion that a budget leaves
_STEPS = 200  # in which a budget takes hidden channels out
_USED = 0.8  # of the budget, by a side that nobody named
_NEAR = 4  # batches that designs are compared on


@dataclass(frozen=True)
class Design:
    """What a student's vision tower may be, relative to its teacher's.

    Args:
        share: of the teacher's multiply-adds or parameters that it has at most; 0 for no budget.
        unit: which of both.
        size: side of its pictures in pixels, or several to try; none for the teacher's, with a budget in multiply-adds
            also the smaller ones down to half whose towers use most of it.
        depth: share of the blocks of each stage, or several to try; each stage keeps its first.
        width: share of the channels between blocks.
        expansion: share of the hidden channels; None for as many as the budget has room for. 0 leaves none: depthwise
            separable convolutions.
        groups: of the convolutions of kernel 1.
        choose: 'importance' or 'first' channels.
    """

    share: float = 0.0
    unit: Literal["operations", "parameters"] = "operations"
    size: tuple[int, ...] = ()
    depth: tuple[float, ...] = (1.0,)
    width: float = 1.0
    expansion: float | None = None
    groups: int = 1
    choose: Literal["importance", "first"] = "importance"

    def __post_init__(self) -> None:
        for name in ("size", "depth"):  # JSON has numbers and lists
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else (value,))
        if not 0 <= self.share < 1:
            raise PlanError(f"share is {self.share}; it must lie from 0, for no budget, to below 1.")
        if self.unit not in ("operations", "parameters") or self.choose not in ("importance", "first"):
            raise PlanError("unit must be 'operations' or 'parameters', choose 'importance' or 'first'.")
        if not all(isinstance(s, int) and s > 0 and s % _STRIDE == 0 for s in self.size):
            raise PlanError(f"size is {list(self.size)}; sides must be multiples of {_STRIDE}.")
        if not self.depth or not all(0 < d <= 1 for d in (*self.depth, self.width)):
            raise PlanError("depth and width must lie above 0 and up to 1.")
        if self.expansion is not None and not 0 <= self.expansion <= 1:
            raise PlanError(f"expansion is {self.expansion}; it must lie from 0 to 1.")
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or not 1 <= self.groups <= 64:
            raise PlanError(f"groups is {self.groups!r}; it must be a whole number from 1 to 64.")


def design_of(values: Any) -> Design:
    """The design that a description says. Raises PlanError."""
    known = [f.name for f in fields(Design)]
    if not isinstance(values, Mapping) or (unknown := sorted(set(values) - set(known))):
        wrong = f"names {', '.join(unknown)}" if isinstance(values, Mapping) else "is no JSON object"
        raise PlanError(f"The design of the vision tower {wrong}. It may have: {', '.join(known)}.")
    try:
        return Design(**values)
    except TypeError as error:
        raise PlanError(f"The design of the vision tower has a value of the wrong type ({error}).") from None


# Shapes -------------------------------------------------------------------------------------------------------------


def cost(config: Config, side: int, unit: str) -> float:
    """Multiply-adds for a picture, or parameters, of a tower with this config."""
    with torch.device("meta"):
        tower = EfficientNetLite(**{**config, "size": 0})
        layers = {p: m for p, m in tower.named_modules() if isinstance(m, nn.Conv2d)}
        if unit == "parameters":
            return float(sum(p.numel() for p in tower.parameters()))
        rows = rows_of(tower, lambda: tower(torch.empty(1, 3, side, side)))
    return float(sum(layers[p].weight.numel() * n for p, n in rows.items()))


def shape(config: Config, design: Design, size: int, depth: float, expansion: float) -> Config:
    """The config of a tower with a share of another's blocks, channels and hidden channels."""
    groups = design.groups
    multiple = 8 * groups // 2 if groups > 1 else 8

    def wide(channels: int) -> int:
        if design.width == 1 and channels % groups == 0:
            return channels
        return max(multiple, round(channels * design.width / multiple) * multiple)

    def hidden(before: float) -> float:
        if before <= 1 or expansion == 1:
            return before
        return max(1.0, round(before * expansion, 4))

    stages = [
        [hidden(e), kernel, stride, wide(channels), max(1, round(count * depth))]
        for e, kernel, stride, channels, count in config["stages"]
    ]
    more = {"groups": groups} if groups > 1 else {}
    return {"stem": wide(config["stem"]), "head": config["head"], "stages": stages, **more, "size": size}


def _fitted(config: Config, design: Design, size: int, depth: float, most: float) -> Config | None:
    """The config with as many hidden channels as the budget has room for, or None where it has not even for few."""
    if design.expansion is not None or not most:
        made = shape(config, design, size, depth, 1.0 if design.expansion is None else design.expansion)
        used = cost(made, size, design.unit)  # also builds it
        return made if not most or used <= most else None
    least = min(1.0, _LEAST / max(stage[0] for stage in config["stages"]))
    tried = [shape(config, design, size, depth, 1 - (1 - least) * step / _STEPS) for step in range(_STEPS + 1)]
    place = bisect_left(tried, -most, key=lambda made: -cost(made, size, design.unit))  # costs fall along the list
    return tried[place] if place < len(tried) else None


def designs(config: Config, side: int, design: Design) -> list[Config]:
    """The configs that a design leaves to choose from, each within its budget.

    Args:
        config: of the teacher's tower.
        side: of its pictures.
        design: what is wanted.

    Raises:
        PlanError: no tower is small enough, or has its channels in so many groups.
    """
    smaller = design.share and design.unit == "operations"
    sizes = design.size or tuple(range(side, side // 2 - 1 if smaller else side - 1, -_STRIDE))
    if max(sizes) > side:
        raise PlanError(f"The student's pictures would have {max(sizes)} pixels a side; its teacher's have {side}.")
    most = design.share * cost(config, side, design.unit)
    try:
        made = [_fitted(config, design, size, depth, most) for size in sizes for depth in design.depth]
        found = [c for i, c in enumerate(made) if c is not None and c not in made[:i]]
    except ValueError:
        raise PlanError(
            f"{design.groups} groups do not divide the channels of every block. Choose another number of groups."
        ) from None
    if not found:
        raise PlanError(
            f"No vision tower of this design has {design.share:.0%} of its teacher's {design.unit}. Give it a larger share, "
            "or a smaller size, depth or width."
        )
    return found if design.size or not most else _using(found, most, design.unit)


def _using(found: list[Config], most: float, unit: str) -> list[Config]:
    """Those with a side at which a tower uses most of the budget, where there is one.

    Before training a tower that lost no channel looks better than a larger one that did, whatever both can learn.
    """
    used: dict[int, float] = {}
    for config in found:
        used[config["size"]] = max(used.get(config["size"], 0.0), cost(config, config["size"], unit))
    return [c for c in found if used[c["size"]] >= _USED * most] or found


# Inheriting ---------------------------------------------------------------------------------------------------------


def blocks_from(config: Config, other: Config) -> list[int]:
    """Which block of a tower with `config` each block of one with `other` comes from: a stage's first, others spread."""
    found: list[int] = []
    start = 0
    for (*_, count), (*_, keep) in zip(config["stages"], other["stages"], strict=True):
        ends = [0] if keep == 1 else [round(i * (count - 1) / (keep - 1)) for i in range(keep)]
        found += [start + i for i in ends]
        start += count
    return found


def inherit_(new: EfficientNetLite, old: EfficientNetLite, taken: Sequence[int], choose: str) -> None:
    """Fill a tower with the most important channels of another, in place.

    Args:
        new: with as many channels or fewer everywhere.
        old: the teacher's.
        taken: which block of it each block of the new one comes from.
        choose: 'importance' or 'first'.
    """
    with torch.no_grad():
        stream = _kept(_stream(old, -1), new.stem.conv.out_channels, choose)  # channels that stay between blocks
        _copy(new.stem.conv, old.stem.conv, stream, torch.arange(3))
        for block, index in zip(new.blocks, taken, strict=True):
            ours, theirs = cast(Any, block), cast(Any, old.blocks[index])
            following = _kept(_stream(old, index), ours.project.conv.out_channels, choose)
            _inherit_block_(ours, theirs, (stream, following), choose)
            stream = following
        _copy(new.head.conv, old.head.conv, torch.arange(new.head.conv.out_channels), stream)


def _inherit_block_(ours: Any, theirs: Any, streams: tuple[Tensor, Tensor], choose: str) -> None:
    stream, following = streams
    made = theirs.depthwise.conv.weight.flatten(1).square().sum(1)
    read = theirs.project.conv.weight.flatten(1)[following]
    drive = theirs.expand.conv.weight.flatten(1)[:, stream] if hasattr(theirs.expand, "conv") else None
    if drive is None:  # hidden channels are those that enter
        _copy(ours.depthwise.conv, theirs.depthwise.conv, stream, torch.arange(1))
        _copy(ours.project.conv, theirs.project.conv, following, _shuffled(stream, ours.groups))
        return
    worth = made * read.square().sum(0)
    if not hasattr(ours.expand, "conv"):  # each channel that enters takes the filter that it drives most
        best = (drive.square() * worth[:, None]).argmax(0)
        gain = drive[best, torch.arange(len(stream))]
        _copy(ours.depthwise.conv, theirs.depthwise.conv, best, torch.arange(1))
        ours.depthwise.conv.weight.mul_(gain[:, None, None, None])
        _copy(ours.project.conv, theirs.project.conv, following, _shuffled(best, ours.groups))
        return
    bias = theirs.expand.conv.bias
    hidden = _kept((drive.square().sum(1) + bias.square()) * worth, ours.depthwise.conv.out_channels, choose)
    if ours.groups > 1:
        hidden = _dealt(hidden, drive[hidden].square(), read[:, hidden].square(), ours.groups)
    _copy(ours.expand.conv, theirs.expand.conv, hidden, stream)
    _copy(ours.depthwise.conv, theirs.depthwise.conv, hidden, torch.arange(1))
    _copy(ours.project.conv, theirs.project.conv, following, _shuffled(hidden, ours.groups))


def _shuffled(hidden: Tensor, groups: int) -> Tensor:
    """Hidden channels in the order in which a block with groups deals them out to its last convolution."""
    return hidden.view(groups, -1).T.flatten()


def _stream(old: EfficientNetLite, index: int) -> Tensor:
    """How much each channel that leaves a block counts: squared weights that make it times those that read it.

    Blocks with a residual before and after it share its channels, so they choose the same ones.
    """
    blocks = cast(list[Any], list(old.blocks))
    first = last = index
    while first >= 0 and blocks[first].residual:
        first -= 1
    while last + 1 < len(blocks) and blocks[last + 1].residual:
        last += 1
    makers = [old.stem.conv if first < 0 else blocks[first].project.conv]
    makers += [b.project.conv for b in blocks[first + 1 : last + 1]]
    readers = [b.expand.conv if hasattr(b.expand, "conv") else b.depthwise.conv for b in blocks[first + 1 : last + 2]]
    readers += [old.head.conv] if last + 1 == len(blocks) else []
    made = [c.weight.flatten(1).square().sum(1) + cast(Tensor, c.bias).square() for c in makers]
    read = [c.weight.flatten(1).square().sum(1 if c.groups > 1 else 0) for c in readers]
    return torch.stack(made).sum(0) * torch.stack(read).sum(0)


def _kept(worth: Tensor, count: int, choose: str) -> Tensor:
    """The indices of so many channels, rising."""
    return torch.arange(count) if choose == "first" else worth.topk(count).indices.sort().values


def _dealt(hidden: Tensor, drive: Tensor, read: Tensor, groups: int) -> Tensor:
    """Hidden channels in an order that keeps much of their weights within groups: [group that drives][group that reads].

    Args:
        hidden: indices.
        drive: [hidden, in] squared weights.
        read: [out, hidden] squared weights.
        groups: equal parts of the inputs and of the outputs, in their order.
    """
    by_input = drive.unflatten(1, (groups, -1)).sum(2) / drive.sum(1, keepdim=True).clamp(min=1e-30)
    by_output = read.T.unflatten(1, (groups, -1)).sum(2) / read.sum(0)[:, None].clamp(min=1e-30)
    gain = (by_input[:, :, None] + by_output[:, None, :]).flatten(1)  # [hidden, groups * groups]
    left = [len(hidden) // groups**2] * groups**2
    cells: list[list[int]] = [[] for _ in left]
    spread = gain.max(1).values - gain.mean(1)
    for row in torch.argsort(spread, descending=True, stable=True).tolist():  # who would lose most chooses first
        cell = next(c for c in torch.argsort(gain[row], descending=True, stable=True).tolist() if left[c])
        left[cell] -= 1
        cells[cell].append(row)
    return hidden[torch.tensor([row for cell in cells for row in sorted(cell)])]


def _copy(new: nn.Conv2d, old: nn.Conv2d, rows: Tensor, columns: Tensor) -> None:
    """Rows and columns of a convolution into one that may work in groups of columns."""
    weight = old.weight[rows][:, columns]
    if new.groups > 1 and new.groups < new.in_channels:
        parts, wide = len(rows) // new.groups, len(columns) // new.groups
        weight = torch.cat([weight[g * parts : (g + 1) * parts, g * wide : (g + 1) * wide] for g in range(new.groups)])
    new.weight.copy_(weight)
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias[rows])


# Choosing -----------------------------------------------------------------------------------------------------------


def tower_of(
    module: nn.Module, side: int, design: Design, batches: Sequence[Batch] = ()
) -> tuple[EfficientNetLite, Config, list[int]]:
    """The tower of a design, filled with what it inherits.

    Args:
        module: the teacher, a dual encoder whose vision tower is made of convolutions.
        side: of its pictures.
        design: what is wanted.
        batches: with 'pixel_values', to choose by among several; without them the first is taken.

    Returns:
        (the tower, its config, which block of the teacher's each of its blocks comes from).

    Raises:
        PlanError: another kind of tower, or none that meets the design.
    """
    old = getattr(module, TOWER, None)
    if not isinstance(old, EfficientNetLite):
        raise PlanError(f"{type(module).__name__} has no vision tower of convolutions that can be designed anew.")
    config = dict(cast(Any, module).config.vision_config)
    found = []
    for other in designs(config, side, design):
        new, taken = EfficientNetLite(**other).eval(), blocks_from(config, other)
        inherit_(new, old, taken, design.choose)
        found.append((new, other, taken))
    if len(found) == 1 or not batches:
        return found[0]
    errors = [_error(module, old, new, batches[:_NEAR]) for new, _, _ in found]
    return found[errors.index(min(errors))]


@torch.no_grad()
def _error(module: Any, old: nn.Module, new: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean squared error between the directions of the vectors of two towers."""
    total = 0.0
    for batch in batches:
        one, other = (
            nn.functional.normalize(module.visual_projection(t(batch["pixel_values"])), dim=-1) for t in (old, new)
        )
        total += float((one - other).square().sum(1).mean())
    return total / len(batches)


def settled(family: Family, module: nn.Module, settings: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Family and settings of a module whose pictures have the side that its vision tower says."""
    side = int(getattr(module, TOWER).size)
    if side and side != settings["image"]["height"]:
        processor = with_side(settings["processor"], side)
        image = {**settings["image"], "height": side, "width": side, **_scaled(settings["image"], side)}
        settings = {**settings, "processor": processor, "image": image}
    return (family if family.bind is None else family.bind(family, module, settings)), settings


def _scaled(image: dict[str, Any], side: int) -> dict[str, Any]:
    if image["crop"]:
        return {k: round(image[k] * side / image["height"]) for k in ("shortest",)}
    return {"scaled": [side, side]}
