"""One budget for structured pruning, spread over towers, blocks and kinds by what each measurably costs.

Each attention and each feed-forward is pruned alone, with compensation, at a few shares, and each block is left out
alone; the cost is the KL divergence to the original on samples that gave no moments. Losses add up to first order, so
the plan takes what costs least per operation saved until the budget is met: steps along the lower convex hull of each
curve, or a whole block where that is cheaper.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch, Tower
from packlight.model import Model
from packlight.observe import Moments, moments
from packlight.plan import Step, append_line, read_lines
from packlight.pruning import columns_of, removal_order
from packlight.structure import GROUPS, Coupled, coupled, droppable
from packlight.techniques.prune_structure import NAME, PruneStructureConfig, narrowed

Progress = Callable[[str, int, int], None]
Unit = Literal["operations", "parameters"]
_SHARES = (0.125, 0.25, 0.5, 0.75)  # of the groups of a block that are taken out to measure what that costs
_WIDTHS = {"heads": 1, "hidden": 16, "channels": 8}  # groups stay in multiples: what kernels take at once
_DAMP = PruneStructureConfig.damp


@dataclass(frozen=True)
class Effect:
    """What it costs to take something out of one block.

    Args:
        path: of the attention or of the block.
        kind: 'heads', 'hidden', 'channels', or 'layers' for the block as a whole.
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
    chosen = _towers(model, towers)
    groups = {t.name: coupled(module, t) for t in chosen}
    columns = {c.columns: module.get_submodule(c.columns) for found in groups.values() for c in found}
    jobs = [(t, c) for t in chosen for c in groups[t.name]]
    jobs += [(t, path) for t in chosen for path in droppable(module, t)]  # type: ignore[misc]
    done = [Effect(**v) for v in read_lines(kept)]
    with torch.no_grad():
        if {(e.kind, e.path) for e in done} >= {_key(job) for _, job in jobs}:
            return [e for e in done if (e.kind, e.path) in {_key(job) for _, job in jobs}]
        with moments(columns) as inputs:
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


def _towers(model: Model, names: Sequence[str]) -> list[Tower]:
    found = {t.name: t for t in model.family.towers if coupled(model.module, t)}
    for name in names:
        if name not in found:
            known = ", ".join(found) or "none in this model"
            raise PlanError(f"There is no tower {name!r} that can be pruned. Those that can: {known}.")
    return [found[name] for name in names]


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
    layer: Any = module.get_submodule(job.columns)
    before = {name: w.detach().clone() for name, w in layer.named_parameters()}
    amounts = sorted({_amount(job, share) for share in _SHARES} - {0})
    own = inputs[job.columns]
    second = own.second(layer.bias is not None)
    order = removal_order(layer.weight.detach().flatten(1), second, job.size, max(amounts, default=0), _DAMP)[0]
    effects = []
    for amount in amounts:
        gone = set(order[:amount])
        index = columns_of(torch.tensor([i for i in range(job.count) if i not in gone]), job.size)
        weight, bias = narrowed(module, job.columns, index, own, _DAMP)
        layer.weight.zero_()
        layer.weight[:, index] = weight.reshape(layer.weight[:, index].shape)
        if bias is not None:
            layer.bias.copy_(bias)
        effects.append(Effect(job.path, job.kind, amount, _divergence(model, pairs)))
        for name, tensor in before.items():
            layer.get_parameter(name).copy_(tensor)
    return effects


def _amount(groups: Coupled, share: float) -> int:
    """How many groups go for a share: one head stays, and others in multiples of `_WIDTHS`."""
    if groups.kind == "heads":
        return min(max(1, round(share * groups.count)), groups.count - 1)
    width = _WIDTHS[groups.kind]
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


# Choosing -----------------------------------------------------------------------------------------------------------


def group_cost(model: Model, groups: Coupled, unit: Unit) -> float:
    """Multiply-adds, products of attention included, or parameters of one group."""
    module, family = model.module, model.family
    layers: dict[str, Any] = {p: module.get_submodule(p) for p in (*groups.rows, groups.columns)}
    if unit == "parameters":
        biases = [layers[p].bias for p in groups.rows if layers[p].bias is not None]
        return (sum(x.weight.numel() for x in layers.values()) + sum(b.numel() for b in biases)) / groups.count
    made = {p: family.multiply_adds(module, p) for p in layers}
    cost = sum(made.values()) / groups.count
    if groups.kind == "heads":  # every query times every key, and the weights times every value
        queries, keys = (made[p] / layers[p].weight.numel() for p in (groups.rows[0], groups.rows[1]))
        cost += 2 * queries * keys * groups.size
    return cost


def tower_cost(model: Model, tower: Tower, unit: Unit, below: str = "") -> float:
    """Multiply-adds, products of attention included, or parameters of a tower, or of its layers below a path.

    Raises nothing; layers that share weights with others count where they lie.
    """
    groups = [c for c in coupled(model.module, tower) if c.path.startswith(below)]
    paths = [p for p in model.layers() if tower.has(p) and p.startswith(below)]
    if unit == "parameters":
        return float(sum(w.numel() for p in paths for w in model.module.get_submodule(p).parameters()))
    total = float(sum(model.family.multiply_adds(model.module, p) for p in paths))
    for c in (c for c in groups if c.kind == "heads"):
        own = sum(model.family.multiply_adds(model.module, p) for p in (*c.rows, c.columns))
        total += c.count * group_cost(model, c, unit) - own
    return total


@dataclass
class _Line:
    """What can still be taken out of one attention or feed-forward: steps of rising cost per operation."""

    groups: Coupled
    cost: float
    steps: list[tuple[int, float]]  # (groups that go, KL that adds)
    removed: int = 0
    kl: float = 0.0

    @property
    def price(self) -> float:
        return self.steps[0][1] / (self.steps[0][0] * self.cost)


@dataclass
class _State:
    lines: dict[tuple[str, str], _Line]
    blocks: dict[str, tuple[float, float]]  # path -> (cost of the whole block, KL without it)
    dropped: list[str] = field(default_factory=list)
    saved: float = 0.0
    kl: float = 0.0

    def rest_of(self, block: str) -> tuple[float, float]:
        """(what dropping a block saves beyond what is out of it, KL that adds)."""
        own = [line for line in self.lines.values() if line.groups.block == block]
        cost, kl = self.blocks[block]
        return cost - sum(x.removed * x.cost for x in own), max(kl - sum(x.kl for x in own), 0.0)


def prune_step(
    model: Model, effects: Sequence[Effect], towers: Sequence[str], share: float, unit: Unit = "operations"
) -> Step:
    """The step that takes a share out of the named towers at the least predicted loss.

    Args:
        model: the original.
        effects: from `measure_effects`.
        towers: names of the towers that have one budget together.
        share: of their multiply-adds or parameters that goes, 0 to 1.
        unit: which of both.

    Raises:
        PlanError: a share that can't be had.
    """
    if not 0 < share < 1:
        raise PlanError(f"The share to prune is {share}; it must lie between 0 and 1.")
    chosen = _towers(model, towers)
    total = sum(tower_cost(model, t, unit) for t in chosen)
    state = _start(model, chosen, effects, unit)
    while state.saved < share * total:
        if not _advance_(state, share * total - state.saved, _rooms(model, chosen, state)):
            raise PlanError(
                f"At most {state.saved / total:.0%} of the {unit} of {', '.join(towers)} can be pruned, {share:.0%} was "
                "asked for. Ask for less."
            )
    return _step(state, chosen, share, state.saved / total, unit)


def _start(model: Model, towers: Sequence[Tower], effects: Sequence[Effect], unit: Unit) -> _State:
    lines, blocks = {}, {}
    for tower in towers:
        for c in coupled(model.module, tower):
            points = [(e.removed, e.kl) for e in effects if (e.kind, e.path) == (c.kind, c.path)]
            lines[c.kind, c.path] = _Line(c, group_cost(model, c, unit), _steps(c, [(0, 0.0), *sorted(points)]))
        for e in (e for e in effects if e.kind == "layers" and e.path.startswith(f"{tower.blocks}.")):
            blocks[e.path] = (tower_cost(model, tower, unit, f"{e.path}."), e.kl)
    return _State(lines, blocks)


def _steps(groups: Coupled, points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """One head at a time, or what leaves a multiple of `_WIDTHS`, along the lower convex hull."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    stops = [x for x in range(1, hull[-1][0] + 1) if (groups.count - x) % _WIDTHS[groups.kind] == 0]
    values = [0.0, *(_on(hull, x) for x in stops)]
    return [
        (x - before, max(after_kl - kl, 0.0))
        for before, x, kl, after_kl in zip([0, *stops], stops, values, values[1:], strict=False)
    ]


def _on(hull: list[tuple[int, float]], x: int) -> float:
    (left, low), (right, high) = next((a, b) for a, b in pairwise(hull) if x <= b[0])
    return low + (high - low) * (x - left) / (right - left)


def _rooms(model: Model, towers: Sequence[Tower], state: _State) -> list[str]:
    """Blocks that may still go: one stays in each tower."""
    found: list[str] = []
    for tower in towers:
        own = [b for b in state.blocks if b.startswith(f"{tower.blocks}.") and b not in state.dropped]
        found += own if len(own) > 1 else []
    return found


def _advance_(state: _State, left: float, blocks: Sequence[str]) -> bool:
    """Take the cheapest step, or drop a block whose rest is cheaper per operation and within the budget."""
    open_lines = [x for x in state.lines.values() if x.steps and x.groups.block not in state.dropped]
    best = min(open_lines, key=lambda x: x.price, default=None)
    rests = {b: state.rest_of(b) for b in blocks}
    fitting = {b: r for b, r in rests.items() if r[0] <= left or best is None}
    block = min(fitting, key=lambda b: fitting[b][1] / fitting[b][0], default=None)
    if block is not None and (best is None or fitting[block][1] / fitting[block][0] <= best.price):
        state.dropped.append(block)
        state.saved += fitting[block][0]
        state.kl += fitting[block][1]
        return True
    if best is None:
        return False
    count, kl = best.steps.pop(0)
    best.removed += count
    best.kl += kl
    state.saved += count * best.cost
    state.kl += kl
    return True


def _step(state: _State, towers: Sequence[Tower], share: float, reached: float, unit: Unit) -> Step:
    lines = [x for x in state.lines.values() if x.removed and x.groups.block not in state.dropped]
    keep = {
        kind: {x.groups.path: x.groups.count - x.removed for x in lines if x.groups.kind == kind} for kind in GROUPS
    }
    config = {k: v for k, v in {**keep, "layers": sorted(state.dropped)}.items() if v}
    names = {"heads": "heads", "hidden": "hidden units", "channels": "hidden channels"}
    counts = {kind: sum(x.removed for x in lines if x.groups.kind == kind) for kind in GROUPS}
    words = [f"{counts[kind]} {names[kind]}" for kind in GROUPS if counts[kind]]
    words += [f"{len(state.dropped)} blocks"] if state.dropped else []
    what = "multiply-adds" if unit == "operations" else "parameters"
    reason = (
        f"{reached:.1%} of the {what} of {' and '.join(t.name for t in towers)} go ({share:.0%} asked for): "
        f"{', '.join(words)}, those that cost least KL per {'operation' if unit == 'operations' else 'parameter'} when "
        f"pruned alone; KL {state.kl:.2g} per token predicted, before any recovery"
    )
    return Step(NAME, config, tuple(f"{t.blocks}.*" for t in towers), reason)
