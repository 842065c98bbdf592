"""Making a model narrower or shallower: what belongs together, and the edits that log it.

Heads, hidden units and hidden channels are groups of rows and columns that go together: a head's rows of query, key and
value with its columns of the output; a number of all its heads' queries with that of their keys, or one of their values
with the columns that read it; a hidden unit's row and bias of the first layer with its column of the second; a
hidden channel's row of the convolution that widens an inverted residual block and its filter with its column of the one
that narrows it.

Edits of this kind, all with plain JSON in `args`:

- 'heads', path of the attention module: 'keep' heads of 'size' rows each stay. 'rows' names the layers that lose
  rows, 'columns' the one that loses columns; 'attributes' are set on the module at the path.
- 'keys', path of the attention module: 'keep' numbers stay of the queries and keys of each of its 'size' heads; 'rows'
  names both layers. 'attention' says where its layers are: it then runs `packlight.narrow_attention`.
- 'values', path of the attention module: as 'keys', of the values; 'columns' names the output layer.
- 'hidden', path of the block: 'keep' units stay; 'size' is 1, 'rows', 'columns' and 'attributes' as above.
- 'channels', path of the block: as 'hidden', of convolutions.
- 'drop_layer', path of the block in its nn.ModuleList: it goes, those after it move up. No arguments.
- 'tower', path of a tower of convolutions: another takes its place, built from 'config'; 'blocks' says which block of the
  old one each of its blocks comes from.
- 'low_rank', path of a linear layer: two take its place, path.0 and path.1, with 'rank' numbers between them.

Carried out in their order on the original architecture they give the same skeleton. An edit that narrows keeps the
first rows and columns: which ones stay is in the tensors, that are filled in after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from packlight.convolutions import INNER
from packlight.errors import PlanError
from packlight.families import Attention, Tower
from packlight.families.mobile_dual import EfficientNetLite
from packlight.narrow_attention import is_narrow, narrow_attention_


@dataclass(frozen=True)
class Coupled:
    """The groups of one attention, feed-forward or inverted residual block: `size` rows of some layers, columns of another.

    Args:
        path: of the attention module or, for hidden units and channels, of the block: as plans and edits name it.
        kind: one of `GROUPS`.
        block: path of the block.
        rows: paths of the layers whose rows go.
        columns: path of the layer whose columns go; '' for none.
        size: rows of a group: a head's width, or 1; the number of heads where each loses a number.
        count: groups that are there.
        names: (attribute for the number of groups, attribute for their rows together); '' for none.
        attention: of keys and values, where the layers of their attention are below its path: see `narrow_attention`.
    """

    path: str
    kind: str
    block: str
    rows: tuple[str, ...]
    columns: str
    size: int
    count: int
    names: tuple[str, str] = ("", "")
    attention: dict[str, str] = field(default_factory=dict)

    def edit_args(self, keep: int) -> dict[str, Any]:
        """The arguments of the edit that keeps so many groups."""
        values = zip(self.names, (keep, keep * self.size), strict=True)
        attributes = {name: value for name, value in values if name}
        more = {"attention": self.attention} if self.attention else {}
        return {
            "keep": keep, "size": self.size, "rows": list(self.rows), "columns": self.columns, "attributes": attributes,
            **more,
        }  # fmt: skip


def coupled(module: nn.Module, tower: Tower) -> list[Coupled]:
    """The groups of every block of a tower, in the order in which a block runs them; none where it knows none.

    Layers that are no plain nn.Linear any more, because they hold codes or factors, are left out.
    """
    found: list[Coupled] = []
    for i in range(blocks_of(module, tower)):
        block = f"{tower.blocks}.{i}"
        for a in tower.attentions:
            found += _of_attention(module, block, a, not tower.stepwise)
        if tower.feed_forward is not None:
            first, second = (f"{block}.{p}" for p in tower.feed_forward)
            weights = _weights(module, [first, second])
            if len(weights) == 2:
                found.append(Coupled(block, "hidden", block, (first,), second, 1, len(weights[0])))
        if tower.inverted is not None:
            found += _channels(module, block, [f"{block}.{p}" for p in tower.inverted])
    return found


def _of_attention(module: nn.Module, block: str, a: Attention, widths: bool) -> list[Coupled]:
    """An attention's heads, and with `widths` the numbers of their queries with keys and of their values.

    Keys that heads share can't go with one head. What keeps its past gives it to a cache, which knows one width.
    """
    rows, columns = tuple(f"{block}.{p}" for p in (a.query, a.key, a.value)), f"{block}.{a.out}"
    weights = _weights(module, rows)
    if len(weights) != len(rows) or not _weights(module, [columns]):
        return []
    query, key, value = map(len, weights)
    path, heads = f"{block}.{a.path}", int(getattr(module.get_submodule(f"{block}.{a.path}"), a.count))
    if query != key:
        return []
    found = []
    if query == value and not is_narrow(module.get_submodule(path)):
        found.append(Coupled(path, "heads", block, rows, columns, value // heads, heads, (a.count, a.width)))
    if widths:
        names = {"query": a.query, "key": a.key, "value": a.value, "out": a.out}
        own = {k: p.removeprefix(f"{a.path}.") if p.startswith(f"{a.path}.") else "" for k, p in names.items()}
        own["count"] = a.count
        found.append(Coupled(path, "keys", block, rows[:2], "", heads, query // heads, attention=own))
        found.append(Coupled(path, "values", block, rows[2:], columns, heads, value // heads, attention=own))
    return found


def _channels(module: nn.Module, block: str, paths: Sequence[str]) -> list[Coupled]:
    """The hidden channels of an inverted residual block; none where nothing widens it, so they are other blocks' too."""
    layers = {path: layer for path, layer in module.named_modules() if path in paths}
    if len(layers) < len(paths) or not all(isinstance(layer, nn.Conv2d) for layer in layers.values()):
        return []
    wide, alone, narrow = (layers[p] for p in paths)
    count = int(wide.out_channels)
    if wide.groups != 1 or narrow.groups != 1 or alone.groups != count or alone.out_channels != count:
        return []
    return [Coupled(block, "channels", block, (paths[0], paths[1]), paths[2], 1, count)]


def droppable(module: nn.Module, tower: Tower) -> list[str]:
    """Paths of the blocks that can be taken out: what leaves them has the shape of what enters.

    Of blocks of convolutions only our own say whether that is so.
    """
    paths = [f"{tower.blocks}.{i}" for i in range(blocks_of(module, tower))] if tower.chained else []
    blocks = {p: module.get_submodule(p) for p in paths}
    return [p for p, block in blocks.items() if getattr(block, "residual", not _convolves(block))]


def _convolves(block: nn.Module) -> bool:
    return any(isinstance(layer, nn.Conv2d) for layer in block.modules())


def blocks_of(module: nn.Module, tower: Tower) -> int:
    """Blocks of a tower; 0 for one without."""
    return len(list(module.get_submodule(tower.blocks).children())) if tower.blocks else 0


def _weights(module: nn.Module, paths: Sequence[str]) -> list[Tensor]:
    layers = [module.get_submodule(p) for p in paths]
    return [layer.weight for layer in layers if isinstance(layer, nn.Linear)]


class LowRank(nn.Sequential):
    """Two linear layers in the place of one; the first has no bias."""

    def __init__(self, like: nn.Linear, rank: int) -> None:
        super().__init__(
            nn.Linear(like.in_features, rank, bias=False),
            nn.Linear(rank, like.out_features, bias=like.bias is not None),
        )
        self.in_features, self.out_features = like.in_features, like.out_features

    @property
    def weight(self) -> Tensor:
        """[out, in], the product; models read its dtype or shape."""
        first, second = (layer.get_parameter("weight") for layer in self)
        return second @ first


def narrow_(root: nn.Module, path: str, args: dict[str, Any]) -> nn.Module:
    """Keep the first groups of an attention, a feed-forward or a block of convolutions. Returns the module at the path.

    Of keys and values only the shapes are right: each head keeps some, and they are filled in.
    """
    kept = int(args["keep"]) * int(args["size"])
    for name in args["rows"]:
        _resize_(_plain(root, name), slice(kept), slice(None))
    if args["columns"]:
        _resize_(_plain(root, str(args["columns"])), slice(None), slice(kept))
    module = root.get_submodule(path)
    for name, value in args["attributes"].items():
        setattr(module, name, value)
    if "attention" in args:
        narrow_attention_(module, args["attention"])
    return module


def _plain(root: nn.Module, path: str) -> nn.Linear | nn.Conv2d:
    layer = root.get_submodule(path)
    return layer if isinstance(layer, nn.Conv2d) else _linear(root, path)


def _linear(root: nn.Module, path: str) -> nn.Linear:
    layer = root.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise PlanError(f"{path} is no plain linear layer any more; structure is pruned before it is compressed.")
    return layer


def _resize_(layer: nn.Linear | nn.Conv2d, rows: slice, columns: slice) -> None:
    weight = layer.weight
    layer.weight = nn.Parameter(weight.detach()[rows, columns].clone(), requires_grad=weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[rows].clone(), requires_grad=layer.bias.requires_grad)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        return
    layer.out_channels = len(layer.weight)
    if layer.groups > 1:  # each channel alone: those that stay are as many groups
        layer.groups = layer.in_channels = layer.out_channels
    else:
        layer.in_channels = layer.weight.shape[1]


def drop_layer_(root: nn.Module, path: str, args: dict[str, Any]) -> nn.Module:
    """Take a block out of its list; caches are numbered by `layer_idx`, so the blocks after it are numbered anew."""
    parent, _, index = path.rpartition(".")
    blocks = root.get_submodule(parent)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise PlanError(f"{path}: only a block of a list, and not the last one of it, can be taken out.")
    del blocks[int(index)]
    for i, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # type: ignore[assignment]
    return blocks


def tower_(root: nn.Module, path: str, args: dict[str, Any]) -> nn.Module:
    """Put another tower of convolutions in the place of one; its weights are left to be filled. Returns it."""
    old, config = root.get_submodule(path), dict(args["config"])
    if not isinstance(old, EfficientNetLite):
        raise PlanError(f"{path} is no tower of convolutions that another can take the place of.")
    new = EfficientNetLite(**config).eval()
    if len(new.blocks) != len(args["blocks"]) or new.head.conv.out_channels != old.head.conv.out_channels:
        raise PlanError(f"{path}: the other tower does not fit in its place.")
    setattr(root, path, new)
    root.config.vision_config = config  # type: ignore[union-attr]
    return new


def factor_(root: nn.Module, path: str, args: dict[str, Any]) -> nn.Module:
    """Put two layers of a rank in the place of a linear one. Returns both, to be filled."""
    old = _linear(root, path)
    new = LowRank(old, int(args["rank"])).to(old.weight.dtype).requires_grad_(old.weight.requires_grad)
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
    return new


GROUPS = ("heads", "hidden", "channels", "keys", "values")
SHAPES: dict[str, Callable[[nn.Module, str, dict[str, Any]], nn.Module]] = {
    "heads": narrow_,
    "hidden": narrow_,
    "channels": narrow_,
    "keys": narrow_,
    "values": narrow_,
    "drop_layer": drop_layer_,
    "tower": tower_,
    "low_rank": factor_,
}


_INNER = {"low_rank": (".0", ".1"), **INNER}  # kind -> what is added to the path for the layers inside


def original_path(path: str, edits: Sequence[Any]) -> str:
    """The path that a layer had before these edits: blocks may have gone, or it is a factor of a layer."""
    for edit in reversed(edits):
        if edit.kind == "drop_layer":
            blocks, _, gone = edit.path.rpartition(".")
            if path.startswith(f"{blocks}."):
                index, _, rest = path.removeprefix(f"{blocks}.").partition(".")
                moved = int(index) + (int(index) >= int(gone))
                path = f"{blocks}.{moved}" + (f".{rest}" if rest else "")
        elif edit.kind == "tower":
            blocks = f"{edit.path}.blocks."
            if path.startswith(blocks):
                index, _, rest = path.removeprefix(blocks).partition(".")
                path = f"{blocks}{edit.args['blocks'][int(index)]}" + (f".{rest}" if rest else "")
        elif path in [edit.path + inner for inner in _INNER.get(edit.kind, ())]:
            path = edit.path
    return path


def update_config_(module: nn.Module, towers: Sequence[Tower]) -> bool:
    """Write the number of blocks, and of hidden units where all blocks have the same, into the module's config.

    Returns:
        whether the config describes the module: all heads are there and whole, and hidden units alike in all blocks. Then
        transformers builds it from the config alone.
    """
    fits = True
    for tower in towers:
        config = getattr(module.config, tower.config) if tower.config else module.config
        if tower.count_key:
            setattr(config, tower.count_key, blocks_of(module, tower))
        groups = coupled(module, tower)
        hidden = {c.count for c in groups if c.kind == "hidden"}
        if tower.hidden_key and len(hidden) == 1:
            setattr(config, tower.hidden_key, hidden.pop())
        fits &= len(hidden) <= 1
        full = {module.get_submodule(c.columns).out_features for c in groups if c.kind == "heads"}
        fits &= all(c.count * c.size in full for c in groups if c.kind == "heads")
        fits &= not any(is_narrow(module.get_submodule(c.path)) for c in groups)
    return fits


def fill_(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a layer these numbers, [out, in] or in the shape of its own, in place; its bias stays where none is given."""
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
