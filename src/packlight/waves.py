"""The order of compression: the layers before a tower's blocks, each block, the layers after them; last the head."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from packlight.families import Batch, Tower, ids_read
from packlight.model import Model
from packlight.observe import grams, ranges, read_use, token_use
from packlight.windows import is_matrix

Measure = Callable[[], dict[str, Tensor]]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def wave_names(model: Model) -> Iterator[str]:
    """A name for each wave that `waves` yields."""
    for tower in model.family.towers:
        yield tower.name
        yield from (f"{tower.name} {i}" for i in range(_blocks(model.module, tower)))
        yield from [f"{tower.name} end"] if _sides(model, tower)[1] else []
    yield "head"


def _sides(model: Model, tower: Tower) -> tuple[list[str], list[str]]:
    """Paths of a tower's layers (before its first block, after its last one), in the order of the module."""
    last = [path for pair in model.family.tied for path in pair]
    own = [p for p in model.layers() if tower.has(p) and p not in last]
    inner = [i for i, p in enumerate(own) if tower.blocks and p.startswith(f"{tower.blocks}.")]
    front = own[: inner[0]] if inner else []
    return front, [p for p in own[inner[-1] + 1 if inner else 0 :] if p not in front]


def waves(
    model: Model,
    batches: Sequence[Batch],
    watch: bool = True,
    ranged: Collection[str] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[list[str], Measure]]:
    """(paths of a wave's layers, function that measures their Gram matrices), each after the waves before it.

    The measurement is a function because a wave that an earlier run finished does not need it. Without `watch` it only
    runs the layers before the head, for those who watch them themselves, and gives nothing. Of the layers in `ranged` it
    also gives what `packlight.observe.ranges` sees. `weights` says what positions count, as in `packlight.observe.grams`.
    """
    module, family = model.module, model.family
    layers = model.layers()
    watched = partial(_Watched, ranged=ranged, weights=weights)
    last = [path for pair in family.tied for path in pair]
    for index, tower in enumerate(family.towers):
        blocks = f"{tower.blocks}."
        front, rear = _sides(model, tower)
        yield front, partial(_measure_front, model, batches, tower, watched(front if watch else []))
        carried: list[Call] = []  # the calls of the next block; empty when they must be found afresh
        for i in range(_blocks(module, tower)):
            paths = [p for p in layers if p.startswith(f"{blocks}{i}.")]
            yield (
                paths,
                partial(_measure_block, model, batches, (tower, i), carried, watched(paths if watch else [])),
            )
            if carried:
                following = _run_block(module.get_submodule(f"{blocks}{i}"), carried) if tower.chained else []
                carried[:] = following
        if rear:
            yield rear, partial(_measure_rear, model, batches, watched(rear if watch else []))
        if index == 0 and batches:
            batches = [family.encode(module, batch) for batch in batches]
    yield [p for p in last if p in layers], partial(_measure_head, model, batches)


def silent(model: Model, batches: Sequence[Batch]) -> list[str]:
    """Names of the towers that no layer of was run by these batches."""
    if not batches:
        return []
    paths = [p for tower in model.family.towers for p in model.layers() if tower.has(p)]
    with grams(_watched(model.module, paths)) as sums:
        for batch in batches:
            model.family.run(model.module, batch)
    return [t.name for t in model.family.towers if not any(t.has(p) for p in sums)]


def _blocks(module: nn.Module, tower: Tower) -> int:
    return len(list(module.get_submodule(tower.blocks).children())) if tower.blocks else 0


@dataclass(frozen=True)
class _Watched:
    """Paths of the layers of a wave that are watched, of all whose ranges are wanted, and what positions count."""

    paths: Sequence[str]
    ranged: Collection[str]
    weights: Mapping[str, Tensor] | None

    @contextlib.contextmanager
    def open(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Gram matrices of what is a matrix among the layers, and what goes in and out of convolutions."""
        wanted = [p for p in self.paths if p in self.ranged]
        with grams(_watched(module, self.paths), self.weights) as sums, ranges(module, wanted, sums):
            yield sums


def _measure_front(model: Model, batches: Sequence[Batch], tower: Tower, watched: _Watched) -> dict[str, Tensor]:
    with watched.open(model.module) as sums:
        _calls_of_block(model, batches, tower, 0)
    return {**sums, **_looked_up(model, batches, watched.paths)}


def _looked_up(model: Model, batches: Sequence[Batch], paths: Sequence[str]) -> dict[str, Tensor]:
    """What `read_use` says of the token tables among the layers that no head is tied to."""
    ids = ids_read(batches, model.family.reads)
    tables = [p for p in model.family.tables if p in paths and ids]
    return {f"{path}.use": read_use(ids, model.layers()[path].num_embeddings) for path in tables}  # type: ignore[arg-type]


def _measure_rear(model: Model, batches: Sequence[Batch], watched: _Watched) -> dict[str, Tensor]:
    with watched.open(model.module) as sums:
        for batch in batches:
            model.family.run(model.module, batch)
    return sums


def _measure_block(
    model: Model, batches: Sequence[Batch], which: tuple[Tower, int], carried: list[Call], watched: _Watched
) -> dict[str, Tensor]:
    tower, index = which
    if not carried:
        carried.extend(_calls_of_block(model, batches, tower, index))
    with watched.open(model.module) as sums:
        _run_block(model.module.get_submodule(f"{tower.blocks}.{index}"), carried)
    return sums


def _measure_head(model: Model, batches: Sequence[Batch]) -> dict[str, Tensor]:
    family, module = model.family, model.module
    with grams(_watched(module, [head for _, head in family.tied])) as sums:
        use = token_use((family.run(module, b) for b in batches), [b[family.reads] for b in batches])
    return {**sums, **{f"{table}.use": use for table, _ in family.tied}}


def _watched(module: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    found = {p: module.get_submodule(p) for p in paths}
    return {p: layer for p, layer in found.items() if not isinstance(layer, nn.Embedding) and is_matrix(layer)}


class _Reached(Exception):  # noqa: N818 - not an error: the pass has gone as far as it was wanted
    pass


def _calls_of_block(model: Model, batches: Sequence[Batch], tower: Tower, index: int) -> list[Call]:
    """The arguments with which a block is called, for each batch. The pass stops there."""
    caught: list[Call] = []

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    block = model.module.get_submodule(f"{tower.blocks}.{index}")
    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            with contextlib.suppress(_Reached):
                model.family.run(model.module, batch)
    finally:
        handle.remove()
    return caught


def _run_block(block: nn.Module, inputs: Sequence[Call]) -> list[Call]:
    """Run a block on what was caught; its output takes the place of its first argument."""
    result: list[Call] = []
    for args, kwargs in inputs:
        out = block(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        result.append(((out, *args[1:]), kwargs))
    return result
