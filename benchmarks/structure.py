"""What it costs to take heads, hidden units and blocks out of a tower, and what it saves, before any recovery.

python benchmarks/structure.py MODEL RECORDINGS
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packlight.applying import Options, calibration_batches, divide
from packlight.data import read_dataset
from packlight.deploy import deploy
from packlight.loading import load
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.pruning_effects import measure_effects
from packlight.pruning_plan import group_cost, prune_step, tower_cost
from packlight.serve import open_served
from packlight.structure import GROUPS, coupled
from packlight.techniques.prune_structure import PruneStructureConfig, prune_structure_

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("second order, compensated (the default)", {}),
    ("second order, not compensated", {"compensate": False}),
    ("second order, most important first, compensated", {"order": "most"}),
    ("most important first, not compensated", {"order": "most", "compensate": False}),
    ("first order, compensated", {"score": "taylor"}),
)


def uniform(model: Model, names: Sequence[str], share: float) -> dict[str, Any]:
    """The same share of every attention, feed-forward and block of convolutions, to compare with."""
    towers = [t for t in model.family.towers if t.name in names]
    groups = [c for t in towers for c in coupled(model.module, t) if not c.attention]
    goal = share * sum(tower_cost(model, t, "operations") for t in towers)
    for percent in range(1, 100):
        keep = {(c.kind, c.path): max(1, round(c.count * (100 - percent) / 100)) for c in groups}
        saved = sum((c.count - keep[c.kind, c.path]) * group_cost(model, c, "operations") for c in groups)
        if saved >= goal:
            break
    return {kind: {p: n for (k, p), n in keep.items() if k == kind} for kind in GROUPS}


def encoder_seconds(models: dict[str, Model], work: Path, rounds: int = 15) -> dict[str, float]:
    """Median seconds of each model's first graph in the runtime, one after the other in every round."""
    parts, feeds, seconds = {}, {}, {name: [] for name in models}
    for name, model in models.items():
        deploy(model, Plan((Step("float16"),), model.family.name), [], work / name, None, "transcribe")
        graph = model.family.graphs(model.module)[0]
        parts[name] = open_served(work / name, 0).parts[graph.name]
        feeds[name] = {n: a.numpy() for n, a in zip(graph.inputs, graph.args, strict=True)}
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.perf_counter()
            part.run(feeds[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s[2:])) for name, s in seconds.items()}


def main() -> None:
    """Print the plan, the table, and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--tower", nargs="+", default=["encoder"], help="one budget for all that are named")
    parser.add_argument("--share", type=float, default=0.25, help="of its multiply-adds that goes")
    parser.add_argument("--work", type=Path, default=Path("work"), help="keeps what was measured")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    original = load(options.model)
    family = original.family
    given = calibration_batches(original, read_dataset(options.recordings), Options(), options.work, None)
    observed, judged = divide(given)
    start = time.perf_counter()
    effects = measure_effects(original, observed, judged, options.tower, options.work / "pruning.jsonl")
    print(f"measuring {len(effects)} effects: {time.perf_counter() - start:.0f} s", flush=True)
    step = prune_step(original, effects, options.tower, options.share)
    print(json.dumps(step.config, indent=1), step.reason, sep="\n", flush=True)
    with torch.no_grad():
        whole = [torch.log_softmax(family.run(original.module, b), -1) for b in judged]
    print("| taken out | KL per token | top tokens changed | seconds to prune |\n|---|---:|---:|---:|")
    pruned: dict[str, Model] = {}
    alike = ("the same share everywhere, compensated", uniform(original, options.tower, options.share))
    for name, config in (*((n, step.config | how) for n, how in ROWS), alike):
        model = copy.deepcopy(original)
        start = time.perf_counter()
        prune_structure_(model, PruneStructureConfig(**config), observed)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            now = [torch.log_softmax(family.run(model.module, b), -1) for b in judged]
        pairs, count = list(zip(whole, now, strict=True)), sum(map(len, whole))
        kl = sum(float((w.exp() * (w - n)).sum()) for w, n in pairs) / count
        flips = sum(int((w.argmax(-1) != n.argmax(-1)).sum()) for w, n in pairs) / count
        print(f"| {name} | {kl:.4f} | {flips:.1%} | {seconds:.0f} |", flush=True)
        pruned.setdefault("pruned", model)
    times = encoder_seconds({"whole": original, **pruned}, options.work)
    sizes = {n: sum(f.stat().st_size for f in (options.work / n).iterdir()) for n in times}
    for name, seconds in times.items():
        print(f"{name}: first graph {1000 * seconds:.0f} ms, bundle {sizes[name] / 1e6:.2f} MB in float16")


if __name__ == "__main__":
    main()
