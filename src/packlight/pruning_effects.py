"""What it costs to take something out of a block: the KL divergence to the original, measured one block at a time.

Each attention and each feed-forward is pruned alone, with compensation, at a few shares, and each block is left out
alone; the samples that judge gave no moments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch, Tower
from packlight.model import Model
from packlight.observe import Moments, moments
from packlight.plan import append_line, read_lines
from packlight.pruning import columns_of, removal_order
from packlight.structure import Coupled, coupled, droppable
from packlight.techniques.prune_structure import PruneStructureConfig, narrowed, turned

Progress = Callable[[str, int, int], None]
_SHARES = (0.125, 0.25, 0.5, 0.75)  # of the groups of a block that are taken out to measure what that costs
_SHARES_OF_KEYS = (0.25, 0.5, 0.625, 0.75)  # the first directions to go cost next to nothing
WIDTHS = {
    "heads": 1,
    "hidden": 16,
    "channels": 8,
    "keys": 8,
    "values": 8,
}  # groups stay in multiples that kernels like
_DAMP = PruneStructureConfig.damp


@dataclass(frozen=True)
class Effect:
    """What it costs to take something out of one block.

    Args:
        path: of the attention or of the block.
        kind: one of `packlight.structure.GROUPS`, or 'layers' for the block as a whole.
        removed: groups that go; 1 for a block.
        kl: per token.
    """

    path: str
    kind: str
    removed: int
    kl: float


def measure_effects(
    model: Model,
    observed: Sequence[Batch],
    judged: Sequence[Batch],
    towers: Sequence[str],
    kept: Path,
    progress: Progress | None = None,
) -> list[Effect]:
    """Measure each block of the named towers at a few shares; the model is unchanged afterwards.

    Args:
        model: the original.
        observed: calibration batches for the moments.
        judged: others, that say what it costs.
        towers: names.
        kept: JSON-lines file of what earlier runs measured; appended to.
        progress: called with (what, done, total).

    Raises:
        PlanError: a tower that there is none of, or that can't be pruned.
    """
    module, family = model.module, model.family
    chosen = pruned_towers(model, towers)
    groups = {t.name: coupled(module, t) for t in chosen}
    entered = {_entry(c): module.get_submodule(_entry(c)) for found in groups.values() for c in found}
    jobs = [(t, c) for t in chosen for c in groups[t.name]]
    jobs += [(t, path) for t in chosen for path in droppable(module, t)]  # type: ignore[misc]
    done = [Effect(**v) for v in read_lines(kept)]
    with torch.no_grad():
        if {(e.kind, e.path) for e in done} >= {_key(job) for _, job in jobs}:
            return [e for e in done if (e.kind, e.path) in {_key(job) for _, job in jobs}]
        with moments(entered) as inputs:
            for batch in observed:
                family.run(module, batch)
        judged = [family.encode(module, b) for b in judged]
        reference = [torch.log_softmax(family.run(module, b), -1) for b in judged]
        for i, (tower, job) in enumerate(jobs):
            if _key(job) not in {(e.kind, e.path) for e in done}:
                first = tower.name == family.towers[0].name
                given = [{k: v for k, v in b.items() if k != "states"} if first else b for b in judged]
                fresh = _measure(model, job, inputs, list(zip(given, reference, strict=True)))
                for effect in fresh:
                    append_line(kept, asdict(effect))
                done += fresh
            if progress:
                progress("measuring what pruning costs", i + 1, len(jobs))
    return [e for e in done if (e.kind, e.path) in {_key(job) for _, job in jobs}]


def pruned_towers(model: Model, names: Sequence[str]) -> list[Tower]:
    """The towers of these names. Raises PlanError for one that there is none of, or that can't be pruned."""
    found = {t.name: t for t in model.family.towers if coupled(model.module, t)}
    for name in names:
        if name not in found:
            known = ", ".join(found) or "none in this model"
            raise PlanError(f"There is no tower {name!r} that can be pruned. Those that can: {known}.")
    return [found[name] for name in names]


def _entry(groups: Coupled) -> str:
    """The layer whose inputs say what groups are worth."""
    return groups.columns or groups.rows[0]


def _key(job: Coupled | str) -> tuple[str, str]:
    return ("layers", job) if isinstance(job, str) else (job.kind, job.path)


def _measure(
    model: Model, job: Coupled | str, inputs: dict[str, Moments], pairs: list[tuple[Batch, Tensor]]
) -> list[Effect]:
    """What one block's attention or feed-forward costs at each share, or the block as a whole."""
    module = model.module
    if isinstance(job, str):
        with _left_out(module.get_submodule(job)):
            return [Effect(job, "layers", 1, _divergence(model, pairs))]
    paths = [*job.rows, job.columns] if job.attention else [job.columns]
    layers: dict[str, Any] = {p: module.get_submodule(p) for p in paths if p}
    before = {p: {n: w.detach().clone() for n, w in layer.named_parameters()} for p, layer in layers.items()}
    shares = _SHARES_OF_KEYS if job.kind == "keys" else _SHARES
    amounts = sorted({_amount(job, share) for share in shares} - {0})
    own = inputs[_entry(job)]
    order: list[int] = []
    if not job.attention:
        layer = layers[job.columns]
        second = own.second(layer.bias is not None)
        weight = layer.weight.detach().flatten(1)
        order = removal_order(weight, second, job.size, max(amounts, default=0), _DAMP)[0]
    effects = []
    for amount in amounts:
        if job.attention:
            _turn_(module, job, job.count - amount, own)
        else:
            _take_(module, job, set(order[:amount]), own)
        effects.append(Effect(job.path, job.kind, amount, _divergence(model, pairs)))
        for path, tensors in before.items():
            for name, tensor in tensors.items():
                layers[path].get_parameter(name).copy_(tensor)
    return effects


def _take_(module: nn.Module, job: Coupled, gone: set[int], own: Moments) -> None:
    """Let a layer do without the columns of some groups, its shape unchanged."""
    layer: Any = module.get_submodule(job.columns)
    index = columns_of(torch.tensor([i for i in range(job.count) if i not in gone]), job.size)
    weight, bias = narrowed(module, job.columns, index, own, _DAMP)
    layer.weight.zero_()
    layer.weight[:, index] = weight.reshape(layer.weight[:, index].shape)
    if bias is not None:
        layer.bias.copy_(bias)


def _turn_(module: nn.Module, job: Coupled, keep: int, own: Moments) -> None:
    """Let each head do with so many numbers, the others at zero, its layers' shapes unchanged."""
    index = columns_of(torch.arange(job.size), job.count).view(job.size, job.count)[:, :keep].flatten()
    for path, (weight, bias) in turned(module, job, keep, own, PruneStructureConfig(keys={job.path: keep})).items():
        layer: Any = module.get_submodule(path)
        side = (slice(None), index) if path == job.columns else (index, slice(None))
        layer.weight.zero_()
        layer.weight[side] = weight
        if bias is not None and path != job.columns:
            layer.bias.zero_()
            layer.bias[index] = bias
        elif bias is not None:
            layer.bias.copy_(bias)


def _amount(groups: Coupled, share: float) -> int:
    """How many groups go for a share: one head stays, and others in multiples of `WIDTHS`."""
    if groups.kind == "heads":
        return min(max(1, round(share * groups.count)), groups.count - 1)
    width = WIDTHS[groups.kind]
    stay = max(width, round((1 - share) * groups.count / width) * width)
    return max(0, groups.count - stay)


@contextmanager
def _left_out(block: nn.Module) -> Iterator[None]:
    """Let a block give back what it is given."""

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    handle = block.register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _divergence(model: Model, pairs: list[tuple[Batch, Tensor]]) -> float:
    """KL per token to the original's log-probabilities."""
    kl, count = 0.0, 0
    for batch, reference in pairs:
        now = torch.log_softmax(model.family.run(model.module, batch), -1)
        kl += float((reference.exp() * (reference - now)).sum())
        count += len(now)
    return max(kl / count, 0.0)
