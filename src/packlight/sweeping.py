"""The curve instead of one target: points along the front, each built and measured in the runtime that ships."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import packlight
from packlight.applying import Options
from packlight.certificate import certify, with_gaps
from packlight.errors import PlanError, TargetError
from packlight.fitting import Run, build, circumstances, make_plans, observe, prepare
from packlight.plan import Plan, write_json
from packlight.report_sweep import write_sweep_report
from packlight.result import data_facts, model_facts, notes
from packlight.target import Target, format_bytes, format_seconds

Progress = Callable[[str, int, int], None]

POINTS = 6
_NO_TIMES = "A sweep measures size and quality; time and memory it does not. `packlight fit` or `bench` measures them."


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found. `result` is the content of sweep.json; docs/reference/sweep.md names its keys."""

    out: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep may be told besides `Options`.

    Args:
        points: how many plans of the front are measured, evenly spread in the logarithm of bytes.
        keep: names of plans that are measured too, and whose bundles stay in OUT/bundles.
    """

    points: int = POINTS
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.points < 1:
            raise TargetError(f"A sweep of {self.points} points is none; ask for at least one.")


def sweep(
    model: str,
    data: str | Path,
    target: Target | None = None,
    out: str | Path = "out",
    options: Options | None = None,
    asked: SweepOptions | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Measure the curve of size against quality.

    Args:
        model: a folder or a hub id.
        data: as for `packlight.fit`.
        target: its size is where the curve ends; its drop says which points are within it. None for neither.
        out: folder for sweep.json, report.html and plans/; a killed sweep goes on there.
        options: see `Options`.
        asked: see `SweepOptions`.
        progress: called with (what, done, total).

    Raises:
        TargetError: a limit on latency or memory, which a sweep does not measure, or a size below every plan.
        PlanError: a plan to keep that the front does not have.
        PacklightError: input that can't be used.
    """
    target, asked = target or Target(), asked or SweepOptions()
    if target.latency is not None or target.memory is not None:
        raise TargetError(f"{_NO_TIMES} Leave out the limit on latency or memory.")
    start = time.perf_counter()
    run = prepare(model, Path(data), target, Path(out), options or Options(), progress)
    observe(run)
    _, plans = make_plans(run)
    front = [p for p in plans if p.name.startswith("p")]
    chosen = choose_points(front, asked, target.size, run.overhead)
    found, begun = [], time.perf_counter()
    for i, plan in enumerate(chosen):
        found.append(_point(replace(run, progress=_told(run, i, len(chosen), begun)), plan, asked.keep))
    overhead = round(sum(o["size"] - p.expected["bytes"] for o, p in zip(found, chosen, strict=True)) / len(found))
    points = [_facts(run, plan, outcome, asked.keep) for plan, outcome in zip(chosen, found, strict=True)]
    lines = [
        {"plan": p.name, "bytes": p.expected["bytes"] + overhead, "kl": p.expected["kl"], "chosen": False,
         "measured": p in chosen} for p in front
    ]  # fmt: skip
    return _finish(run, chosen, points, lines, found[-1]["quality"], time.perf_counter() - start)


def choose_points(front: Sequence[Plan], asked: SweepOptions, limit: int | None, overhead: int) -> list[Plan]:
    """Plans evenly spread in the logarithm of their bytes, smallest first: both ends always, and those to be kept.

    Args:
        front: plans, smallest first.
        asked: how many, and which besides.
        limit: bytes that a bundle may have, or None.
        overhead: bytes of a bundle beside its weights.

    Raises:
        TargetError: no plan is that small.
        PlanError: a plan to keep that the front does not have.
    """
    sizes = {p.name: p.expected["bytes"] + overhead for p in front}
    fits = [p for p in front if limit is None or sizes[p.name] <= limit]
    if not fits:
        raise TargetError(
            f"No plan is as small as {format_bytes(limit or 0)}: the smallest is expected to take "
            f"{format_bytes(min(sizes.values()))}. Ask for at least that."
        )
    unknown = sorted(set(asked.keep) - set(sizes))
    if unknown:
        raise PlanError(
            f"There is no plan {unknown[0]} to keep on this front. It has {front[0].name} to {front[-1].name}."
        )
    low, high = (math.log(sizes[p.name]) for p in (fits[0], fits[-1]))
    count = min(asked.points, len(fits))
    picked: list[Plan] = []
    for i in reversed(range(count)):  # from the largest: one point alone is the one of most quality
        aim = high if count == 1 else low + i * (high - low) / (count - 1)
        left = [p for p in fits if p not in picked]
        picked.append(min(left, key=lambda p: abs(math.log(sizes[p.name]) - aim)))
    return [p for p in front if p in picked or p.name in asked.keep]


def _told(run: Run, index: int, count: int, start: float) -> Progress | None:
    """Progress of one point, which says how far the sweep is and how long the points that are left may take."""
    progress = run.progress
    if progress is None:
        return None
    spent = time.perf_counter() - start
    left = f", about {format_seconds(spent / index * (count - index))} left in all" if index else ""
    where = f"point {index + 1} of {count}{left}"
    return lambda what, i, n: progress(f"{where}: {what}", i, n)


def _point(run: Run, plan: Plan, keep: Sequence[str]) -> dict[str, Any]:
    """Build and measure one plan, or take what an earlier sweep or fit found. Only bundles asked for stay."""
    folder = run.work / plan.key[:12]
    fitted, swept = folder / "outcome.json", folder / "swept.json"
    done = next((f for f in (fitted, swept) if f.is_file()), None)
    if done is not None and plan.name not in keep:
        outcome = dict(json.loads(done.read_text()))
    else:
        built = build(run, plan)
        outcome = built.outcome
        if plan.name in keep:
            _keep(built.bundle, run.out / "bundles" / plan.name)
        write_json(swept, outcome)
    if not fitted.is_file():  # a fit in the same folder still needs its own
        shutil.rmtree(folder / "bundle", ignore_errors=True)
    return outcome | {"plan": plan.name}


def _keep(bundle: Path, place: Path) -> None:
    draft = place.with_name(place.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(bundle, draft)
    shutil.rmtree(place, ignore_errors=True)
    draft.rename(place)


def _facts(run: Run, plan: Plan, outcome: dict[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    """What sweep.json says of one point."""
    quality, sealed = outcome["quality"], certify(with_gaps(outcome["records"], plan)) or {}
    allowed = run.target.allowed_drop(quality["before"])
    drop = quality["high"] if run.target.strict else quality["difference"]
    return {
        "plan": plan.name,
        "file": f"plans/{plan.name}.json",
        "bundle": f"bundles/{plan.name}" if plan.name in keep else None,
        "size": outcome["size"],
        "ratio": run.model.source.bytes / outcome["size"],
        "kl": plan.expected["kl"],
        **{key: quality[key] for key in ("after", "difference", "low", "high", "token_agreement", "identical")},
        "within": None if allowed is None else drop <= allowed + 1e-12,
        **{key: sealed.get(key) for key in ("rate", "bound", "gap")},
    }


def _finish(
    run: Run,
    chosen: Sequence[Plan],
    points: list[dict[str, Any]],
    front: list[dict[str, Any]],
    quality: dict[str, Any],
    seconds: float,
) -> SweepResult:
    metric = {key: quality[key] for key in ("name", "before", "n", "level", "resamples", "languages")}
    result = {
        "version": 1,
        "packlight": packlight.__version__,
        "command": run.options.command,
        "model": model_facts(run.model),
        "target": run.target.to_dict(),
        "data": data_facts(run),
        "metric": metric,
        "before": {"size": run.model.source.bytes},
        "points": points,
        "front": front,
        "how": circumstances(run, seconds),
        "notes": [
            _NO_TIMES,
            "Every point was measured on the same evaluation samples: the best of several looks a little better than it is.",
            *notes(run, quality),
        ],
    }
    folder = run.out / "plans"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("p[0-9]*.json"):
        old.unlink()
    for plan in chosen:
        write_json(folder / f"{plan.name}.json", plan.to_dict())
    write_json(run.out / "sweep.json", result)
    write_sweep_report(result, run.out / "report.html")
    return SweepResult(run.out, result)


def sweep_text(result: dict[str, Any], out: Path) -> str:
    """The content of sweep.json for a terminal: one line per point, and where to look."""
    metric, target = result["metric"], result["target"]
    judged = target["drop"] is not None or target["drop_relative"] is not None
    kept = [p["bundle"] for p in result["points"] if p["bundle"]]
    lines = [
        f"original: {format_bytes(result['before']['size'])}, {metric['name']} {metric['before']:.2%}, n = {metric['n']}",
        f"{'plan':6}{'size':>10}{'smaller':>9}{'bits':>7}{'gap':>7}{metric['name']:>10}{'difference':>13}"
        f"{'95 % interval':>19}{'KL predicted':>14}",
    ]
    for p in result["points"]:
        rate, gap = (f"{p[key]:.2f}" if p[key] is not None else "-" for key in ("rate", "gap"))
        interval = f"[{100 * p['low']:+.2f}, {100 * p['high']:+.2f}]"
        within = "" if not judged else "   within the drop" if p["within"] else "   misses the drop"
        lines.append(
            f"{p['plan']:6}{format_bytes(p['size']):>10}{p['ratio']:>8.1f}x{rate:>7}{gap:>7}{p['after']:>10.2%}"
            f"{100 * p['difference']:>+10.2f} pp{interval:>19}{p['kl']:>14.2g}{within}"
        )
    lines += [
        "bits: per weight of the linear layers, gap: above the theoretical limit. " + _NO_TIMES,
        f"{'apply':9}packlight apply MODEL {out / result['points'][0]['file']} --data DIR -o OUT2",
        f"{'bundles':9}" + (", ".join(str(out / b) for b in kept) or "none kept; --keep PLAN keeps one"),
        f"{'report':9}{out / 'report.html'}",
    ]
    return "\n".join(lines)
