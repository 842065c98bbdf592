"""One budget for structured pruning, spread over towers, blocks and kinds by what each measurably costs.

Losses add up to first order, so the plan takes what costs least per operation saved until the budget is met: steps along
the lower convex hull of each curve that `packlight.pruning_effects` measured, or a whole block where that is cheaper.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from packlight.errors import PlanError
from packlight.families import Tower
from packlight.model import Model
from packlight.plan import Step
from packlight.pruning_effects import WIDTHS, Effect, pruned_towers
from packlight.structure import GROUPS, Coupled, coupled
from packlight.techniques.prune_structure import NAME

Unit = Literal["operations", "parameters"]


def group_cost(model: Model, groups: Coupled, unit: Unit) -> float:
    """Multiply-adds, products of attention included, or parameters of one group."""
    module, family = model.module, model.family
    layers: dict[str, Any] = {p: module.get_submodule(p) for p in (*groups.rows, groups.columns) if p}
    if unit == "parameters":
        biases = [layers[p].bias for p in groups.rows if layers[p].bias is not None]
        return (sum(x.weight.numel() for x in layers.values()) + sum(b.numel() for b in biases)) / groups.count
    made = {p: family.multiply_adds(module, p) for p in layers}
    cost = sum(made.values()) / groups.count
    if groups.kind == "heads":  # every query times every key, and the weights times every value
        queries, keys = (made[p] / layers[p].weight.numel() for p in (groups.rows[0], groups.rows[1]))
        cost += 2 * queries * keys * groups.size
    if groups.attention:  # one of both products; every query has a key here
        rows = made[groups.rows[0]] / layers[groups.rows[0]].weight.numel()
        cost += rows * rows * groups.size
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
    whole = {c.path for c in groups if c.kind == "heads"}
    for c in (c for c in groups if c.kind == "heads" or (c.attention and c.path not in whole)):  # the products
        own = sum(model.family.multiply_adds(model.module, p) for p in (*c.rows, c.columns) if p)
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
    saved: float = 0.0

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
        return cost - sum(x.saved for x in own), max(kl - sum(x.kl for x in own), 0.0)

    def take_(self, line: _Line) -> None:
        """Take the next step of a line. Heads and their numbers multiply: what is left of one makes the others cheaper."""
        count, kl = line.steps.pop(0)
        gain = count * line.cost
        left = line.groups.count - line.removed
        line.removed += count
        line.kl += kl
        line.saved += gain
        self.saved += gain
        self.kl += kl
        for other in self.lines.values():
            if other.groups.path != line.groups.path or other is line:
                continue
            if line.groups.kind == "heads":
                other.cost *= (left - count) / left
            elif other.groups.kind == "heads":
                other.cost -= gain / (other.groups.count - other.removed)


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
    chosen = pruned_towers(model, towers)
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
    """One head at a time, or what leaves a multiple of `WIDTHS`, along the lower convex hull."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    stops = [x for x in range(1, hull[-1][0] + 1) if (groups.count - x) % WIDTHS[groups.kind] == 0]
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
    state.take_(best)
    return True


def _step(state: _State, towers: Sequence[Tower], share: float, reached: float, unit: Unit) -> Step:
    lines = [x for x in state.lines.values() if x.removed and x.groups.block not in state.dropped]
    keep = {
        kind: {x.groups.path: x.groups.count - x.removed for x in lines if x.groups.kind == kind} for kind in GROUPS
    }
    config = {k: v for k, v in {**keep, "layers": sorted(state.dropped)}.items() if v}
    names = {
        "heads": "heads",
        "hidden": "hidden units",
        "channels": "hidden channels",
        "keys": "numbers of each head's queries and keys",
        "values": "of its values",
    }
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
