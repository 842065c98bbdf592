"""Attention heads and numbers of heads, hidden units, hidden channels and whole blocks out of towers.

The model is smaller on disk and does fewer operations. What belongs together goes together: a head's rows of query, key
and value with its columns of the output, a hidden unit's row and bias with its column, a hidden channel's row of the
widening convolution of an inverted residual block and its own filter with its column of the narrowing one. Inside a head,
queries with keys and values with the output are turned so that few numbers carry most, and those stay. The plan says how
many stay in each block; which ones, the calibration samples decide. Blocks are pruned in the order in which they run, each on the inputs that the pruned blocks before it give, and
what stays in a block makes up for what went by least squares.

When to use: for a latency, in encoders above all, before quantization. When not: for size alone, where fewer bits per
weight cost less.

Papers: second order: Optimal Brain Surgeon by groups, as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089); see
`packlight.pruning` for what differs. First order: Molchanov et al. 2019, arXiv 1906.10771, with |w g| summed over the
group as in LLM-Pruner (Ma et al. 2023, arXiv 2305.11627). Numbers of heads: ModeGPT (Lin et al. 2024, arXiv 2408.09632).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import Edit
from packlight.model import Model
from packlight.observe import Moments, moments
from packlight.pruning import (
    columns_of,
    compensated,
    magnitudes,
    narrowed_products,
    narrowed_values,
    remixed,
    removal_order,
    shifted,
)
from packlight.structure import GROUPS, Coupled, blocks_of, coupled, droppable, fill_, update_config_
from packlight.techniques import Stage, Technique
from packlight.waves import Measure, waves

NAME = "prune_structure"


@dataclass(frozen=True)
class PruneStructureConfig:
    """Settings.

    Args:
        heads: path of an attention -> how many of its heads stay.
        hidden: path of a block -> how many hidden units of its feed-forward stay; multiples of 16 run fastest.
        layers: paths of blocks that go. All paths are those of the original.
        score: 'second_order' takes what costs least after least squares; 'taylor' what the loss depends on least, to
            first order; 'magnitude' what has the smallest weights and needs no samples.
        compensate: let what stays make up for what goes, by least squares.
        order: 'least' important first; 'most' is for comparison only.
        damp: share of the mean diagonal added to the second moments.
        channels: path of an inverted residual block -> how many of its hidden channels stay; multiples of 8 run fastest.
        keys: path of an attention -> how many numbers of each head's queries and keys stay. The score has no part in it.
        values: path of an attention -> how many numbers of each head's values stay; likewise.
    """

    heads: Mapping[str, int] = field(default_factory=dict)
    hidden: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    score: Literal["second_order", "taylor", "magnitude"] = "second_order"
    compensate: bool = True
    order: Literal["least", "most"] = "least"
    damp: float = 1e-4
    channels: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in GROUPS:
            given, what = getattr(self, name), "of a block" if name in ("hidden", "channels") else "of an attention"
            if not isinstance(given, Mapping):
                raise PlanError(f"{name} is {given!r}; it must be an object: path {what} -> how many stay.")
            for path, count in given.items():
                if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                    raise PlanError(f"{name} keeps {count!r} in {path}; it must be a whole number, 1 or more.")
        if isinstance(self.layers, str) or not all(isinstance(p, str) for p in self.layers):
            raise PlanError(f"layers is {self.layers!r}; it must be a list of paths of blocks.")
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists only
        if self.score not in ("second_order", "taylor", "magnitude"):
            raise PlanError(f"score is {self.score!r}; it must be 'second_order', 'taylor' or 'magnitude'.")
        if self.order not in ("least", "most"):
            raise PlanError(f"order is {self.order!r}; it must be 'least' or 'most'.")
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp is {self.damp}; it must lie above 0 and up to 1.")
        if not (self.wanted or self.layers):
            raise PlanError(f"it names no {', '.join(GROUPS)} or layers, so there is nothing to prune.")

    @property
    def wanted(self) -> dict[tuple[str, str], int]:
        """(kind, path) -> how many groups stay."""
        return {(kind, path): keep for kind in GROUPS for path, keep in getattr(self, kind).items()}

    @property
    def watches(self) -> bool:
        """Whether it looks at the inputs of layers."""
        turned = bool(self.keys or self.values)
        return turned or (bool(self.wanted) and (self.compensate or self.score == "second_order"))

    @property
    def feedback(self) -> bool:
        """Whether it needs calibration samples."""
        return self.watches or (bool(self.wanted) and self.score == "taylor")


def check_structure(model: Model, config: PruneStructureConfig) -> None:
    """Check the settings against a model, not yet edited.

    Raises:
        PlanError: a path that is no attention or block of a tower that can be pruned, more heads or units than there
            are, a tower that would lose all its blocks.
    """
    found = {(c.kind, c.path): c for tower in model.family.towers for c in coupled(model.module, tower)}
    for (kind, path), keep in config.wanted.items():
        if (kind, path) not in found:
            known = ", ".join(p for k, p in found if k == kind) or "none in this model"
            raise PlanError(f"prune_structure: {path} has no {kind} that can be pruned. Those that have: {known}.")
        if keep > found[kind, path].count:
            raise PlanError(f"prune_structure keeps {keep} {kind} of {path}, which has {found[kind, path].count}.")
        block = found[kind, path].block
        if block in config.layers:
            raise PlanError(f"prune_structure names {block} in layers and in {kind}; a block that goes has neither.")
    for tower in model.family.towers:
        blocks = [f"{tower.blocks}.{i}" for i in range(blocks_of(model.module, tower))]
        if blocks and set(blocks) <= set(config.layers):
            raise PlanError(f"prune_structure takes out every block of the {tower.name} tower; leave it one.")
    blocks = [path for tower in model.family.towers for path in droppable(model.module, tower)]
    strangers = [p for p in config.layers if p not in blocks]
    if strangers:
        raise PlanError(
            f"prune_structure: {strangers[0]} is no block that can be taken out. Those that can: {', '.join(blocks)}."
        )


def prune_structure_(model: Model, config: PruneStructureConfig, batches: Sequence[Batch]) -> list[str]:
    """Prune a model, in place. Every change is logged in its edits; its config follows where it can say the result.

    Args:
        model: not yet quantized.
        config: the step's settings.
        batches: calibration batches; may be empty where `config.feedback` is false.

    Returns:
        paths of the layers that changed, as the pruned model names them.
    """
    check_structure(model, config)
    if config.feedback and not batches:
        why = "of keys or values" if config.keys or config.values else f"with the score {config.score!r}"
        raise PlanError(f"prune_structure {why} needs calibration samples.")
    wanted = config.wanted
    scores = taylor(model, batches) if config.score == "taylor" else {}
    for path in sorted(config.layers, key=lambda p: (p.rpartition(".")[0], -int(p.rpartition(".")[2]))):
        model.edit_(Edit(path, "drop_layer"))
    changed: list[str] = []
    with torch.no_grad():
        groups = [c for tower in model.family.towers for c in coupled(model.module, tower)]
        left = [c for c in groups if wanted.get((c.kind, model.origin(c.path)), c.count) < c.count]
        for paths, measure in waves(model, batches if config.watches else [], watch=False):
            for c in [c for c in left if c.rows[-1] in paths]:
                key = (c.kind, model.origin(c.path))
                if c.attention:
                    _narrow_(model, c, wanted[key], config, measure)
                    changed += [*c.rows, *([c.columns] if c.columns else [])]
                    left.remove(c)
                    continue
                inputs = observe(model.module, c.columns, measure) if config.watches else None
                kept = choose(model.module, c, wanted[key], config, inputs, scores.get(key))
                take_(model, c, kept, inputs if config.compensate else None, config.damp)
                changed += [*c.rows, c.columns]
                left.remove(c)
            if not left:  # the waves after it would only be run
                break
    update_config_(model.module, model.family.towers)
    return changed


def observe(module: nn.Module, path: str, measure: Measure) -> Moments:
    """Watch the inputs of a layer while its block runs. Raises PlanError where the samples don't reach it."""
    with moments({path: module.get_submodule(path)}) as found:
        measure()
    if path not in found:
        raise PlanError(f"The calibration samples don't reach {path}. Give samples for every tower that is pruned.")
    return found[path]


def choose(
    module: nn.Module,
    groups: Coupled,
    keep: int,
    config: PruneStructureConfig,
    inputs: Moments | None,
    scores: Tensor | None,
) -> Tensor:
    """The groups that stay, rising; among equal scores the first ones go."""
    remove = groups.count - keep
    reader: Any = module.get_submodule(groups.columns)
    weight = reader.weight.detach().flatten(1)
    if config.score == "second_order":
        assert inputs is not None
        second = inputs.second(reader.bias is not None)
        gone = removal_order(weight, second, groups.size, remove, config.damp, config.order == "most")[0]
    else:
        if config.score == "magnitude":
            scores = magnitudes(_rows(module.get_submodule(groups.rows[-1])), weight, groups.size)
        assert scores is not None
        gone = torch.argsort(scores, descending=config.order == "most", stable=True)[:remove].tolist()
    return torch.tensor([i for i in range(groups.count) if i not in set(gone)])


def _rows(layer: Any) -> Tensor:
    """The rows of a layer with its bias, of the last that makes the groups: [out, in + 1] or [out, in]."""
    weight: Tensor = layer.weight.detach().flatten(1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach()[:, None]], 1)


def narrowed(module: nn.Module, path: str, kept: Tensor, inputs: Moments | None, damp: float) -> tuple[Tensor, Any]:
    """(weight [out, in], bias) of a layer that has these columns left: as they were, or with `inputs` by least squares."""
    layer: Any = module.get_submodule(path)
    weight = layer.weight.detach().flatten(1)
    bias = None if layer.bias is None else layer.bias.detach()
    if inputs is None:
        return weight[:, kept], bias
    made = compensated(weight, inputs.second(bias is not None), kept, damp)
    return made, None if bias is None else shifted(bias, weight, made, kept, inputs.mean)


def take_(model: Model, groups: Coupled, kept: Tensor, inputs: Moments | None, damp: float) -> None:
    """Leave these groups of an attention, a feed-forward or a block of convolutions, in place, and log it."""
    module = model.module
    index = columns_of(kept, groups.size)
    weight, bias = narrowed(module, groups.columns, index, inputs, damp)
    rows = {p: _sliced(module.get_submodule(p), index) for p in groups.rows}
    model.edit_(Edit(groups.path, groups.kind, groups.edit_args(len(kept))))
    fill_(module.get_submodule(groups.columns), weight, bias)
    for path, values in rows.items():
        fill_(module.get_submodule(path), *values)


def _narrow_(model: Model, stale: Coupled, keep: int, config: PruneStructureConfig, measure: Measure) -> None:
    """Leave so many numbers of each head's queries and keys or values, in place, and log it."""
    module = model.module
    tower = next(t for t in model.family.towers if stale.path.startswith(f"{t.blocks}."))
    # Heads may have gone since the groups were listed.
    groups = next(c for c in coupled(module, tower) if (c.kind, c.path) == (stale.kind, stale.path))
    inputs = observe(module, groups.columns or groups.rows[0], measure)
    made = turned(module, groups, keep, inputs, config)
    model.edit_(Edit(groups.path, groups.kind, groups.edit_args(keep)))
    for path, values in made.items():
        fill_(module.get_submodule(path), *values)


def turned(
    module: nn.Module, groups: Coupled, keep: int, inputs: Moments, config: PruneStructureConfig
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """An attention's layers with so many numbers left in each head: path -> (weight, bias).

    Args:
        module: the model.
        groups: the keys or values of an attention.
        keep: numbers that stay.
        inputs: of the query layer for keys, of the output layer for values.
        config: its `order`, `compensate` and `damp`.
    """
    heads = groups.size
    kept = slice(keep) if config.order == "least" else slice(groups.count - keep, groups.count)
    layers: list[Any] = [module.get_submodule(p) for p in (*groups.rows, groups.columns) if p]
    first, last = layers
    bias = first.weight.new_zeros(len(first.weight)) if first.bias is None else first.bias.detach()
    if groups.kind == "keys":
        wide = torch.cat([first.weight.detach(), bias[:, None]], 1)
        query, key = narrowed_products(wide, last.weight.detach(), inputs.second(True), inputs.mean, heads, kept)
        gone = None if last.bias is None else last.bias.new_zeros(len(key))  # all keys shared it
        moved = None if first.bias is None else query[:, -1].float()
        return {groups.rows[0]: (query[:, :-1].float(), moved), groups.rows[1]: (key.float(), gone)}
    second, weight = inputs.second(last.bias is not None), last.weight.detach()
    mixing, read = narrowed_values(weight, second, heads, kept)
    made = remixed(weight, second, mixing, config.damp) if config.compensate else read.to(weight.dtype)
    value = mixing.T @ first.weight.detach().double()
    moved = None if first.bias is None else (mixing.T @ bias.double()).float()
    shift = None
    if last.bias is not None:
        lost = weight.double() @ inputs.mean - made.double() @ (mixing.T @ inputs.mean)
        shift = (last.bias.detach().double() + lost).float()
    return {groups.rows[0]: (value.float(), moved), groups.columns: (made, shift)}


def _sliced(layer: Any, index: Tensor) -> tuple[Tensor, Tensor | None]:
    return layer.weight.detach()[index], None if layer.bias is None else layer.bias.detach()[index]


def taylor(model: Model, batches: Sequence[Batch]) -> dict[tuple[str, str], Tensor]:
    """How much the loss depends on each group, to first order: |w g| summed over its weights and the batches.

    The loss is the cross-entropy of the original's own first choices: its divergence from itself has no gradient.

    Returns:
        (kind, path) -> [groups] float64.
    """
    module, family = model.module, model.family
    groups = [c for tower in family.towers for c in coupled(module, tower) if not c.attention]
    layers: dict[str, Any] = {p: module.get_submodule(p) for c in groups for p in (*c.rows, c.columns)}
    weights = [w for layer in layers.values() for w in (layer.weight, layer.bias) if w is not None]
    wanted = [w.requires_grad for w in weights]
    found: dict[tuple[str, str], Tensor] = {}
    try:
        for w in weights:
            w.requires_grad_(True)
        for batch in batches:
            with torch.inference_mode(False), torch.enable_grad():
                logits = family.run(module, batch)
                loss = nn.functional.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")
                grads = torch.autograd.grad(loss, weights, allow_unused=True)
            effects = {
                id(w): (w.detach() * g).abs().double() for w, g in zip(weights, grads, strict=True) if g is not None
            }
            for c in groups:
                key = (c.kind, c.path)
                found[key] = found.get(key, 0) + _effect(c, layers, effects)
    finally:
        for w, was in zip(weights, wanted, strict=True):
            w.requires_grad_(was)
    return found


def _effect(groups: Coupled, layers: Mapping[str, Any], effects: Mapping[int, Tensor]) -> Tensor:
    """The effects of the weights of each group, summed."""
    total = torch.zeros(groups.count * groups.size, dtype=torch.float64)
    for path in groups.rows:
        weight, bias = effects.get(id(layers[path].weight)), effects.get(id(layers[path].bias))
        total += 0 if weight is None else weight.flatten(1).sum(1)
        total += 0 if bias is None else bias
    read = effects.get(id(layers[groups.columns].weight))
    total += 0 if read is None else read.flatten(1).sum(0)
    return total.view(groups.count, groups.size).sum(1)


PRUNE_STRUCTURE = Technique(
    name=NAME,
    config=PruneStructureConfig,
    layer=None,
    stage=Stage.PRUNE,
    needs=("gram",),
    paper="ZipLM, Kurtic et al. 2023, arXiv 2302.04089",
    summary="heads and their widths, hidden units, channels, blocks out, made up by least squares: smaller and faster",
)
