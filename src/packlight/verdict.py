"""From what was tried to a verdict: which bundle, whether it meets the target, what binds when none does. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packlight.target import Target, format_bytes, format_seconds

_NAMES = {"size": "size", "latency": "latency", "memory": "memory", "drop": "allowed drop"}


def conclude(tried: Sequence[dict[str, Any]], target: Target) -> dict[str, Any]:
    """Choose among measured outcomes.

    Args:
        tried: outcomes, each with 'missed', the constraints that it does not meet.
        target: what was asked for.

    Returns:
        'outcome' the chosen one, 'met', 'binding' the constraint that binds or None, 'nearest' None or a dict with
        'plan', 'relax' and 'sentence'.
    """
    good = [t for t in tried if not t["missed"]]
    if good:
        best = min(good, key=lambda t: (t["quality"]["difference"], t["timing"]["after"], t["size"]))
        return {"outcome": best, "met": True, "binding": None, "nearest": None}
    # Nearest: everything but one constraint is met, and that one is missed by the least share; else the least miss.
    ranked = sorted(tried, key=lambda t: (len(t["missed"]), "drop" in t["missed"], excess(t, target)))
    best = ranked[0]
    binding = max(best["missed"], key=lambda name: _share(best, target, name))
    relax = {name: _value(best, name) for name in best["missed"]}
    words = ", ".join(f"{_NAMES[name]} to {_written(name, value)}" for name, value in relax.items())
    sentence = f"Plan {best['plan']} comes nearest: it is met if you relax the {words}."
    return {
        "outcome": best,
        "met": False,
        "binding": binding,
        "nearest": {"plan": best["plan"], "relax": relax, "sentence": sentence},
    }


def missed(target: Target, outcome: dict[str, Any]) -> list[str]:
    """Names of the constraints that a measured bundle does not meet."""
    found = outcome["quality"]
    allowed = target.allowed_drop(found["before"])
    drop = found["high"] if target.strict else found["difference"]
    checks = {
        "size": target.size is not None and outcome["size"] > target.size,
        "drop": allowed is not None and drop > allowed + 1e-12,
        "latency": target.latency is not None and outcome["timing"]["after"] > target.latency,
        "memory": target.memory_limit is not None and outcome["process"]["memory"] > target.memory_limit,
    }
    return [name for name, over in checks.items() if over]


def excess(outcome: dict[str, Any], target: Target) -> float:
    """How far an outcome is beyond its worst missed limit, as a ratio."""
    return max((_share(outcome, target, name) for name in outcome["missed"]), default=0.0)


def _value(outcome: dict[str, Any], name: str) -> float:
    quality = outcome["quality"]
    values = {
        "size": outcome["size"], "latency": outcome["timing"]["after"], "memory": outcome["process"]["memory"],
        "drop": quality["difference"],
    }  # fmt: skip
    return float(values[name])


def _share(outcome: dict[str, Any], target: Target, name: str) -> float:
    limits = {
        "size": target.size, "latency": target.latency, "memory": target.memory_limit,
        "drop": target.allowed_drop(outcome["quality"]["before"]),
    }  # fmt: skip
    return _value(outcome, name) / max(limits[name] or 0.0, 1e-3)


def _written(name: str, value: float) -> str:
    if name in ("size", "memory"):
        return format_bytes(value)
    return format_seconds(value) if name == "latency" else f"{100 * value:.1f} pp"


def verdict_text(result: dict[str, Any], out: Path) -> str:
    """The content of result.json for a terminal: the verdict, the table, and where to look."""
    before, after, ratios = result["before"], result["after"], result["ratios"]
    metric, target = result["metric"], result["target"]
    how = result["timing"]
    limit = {k: f"<= {f(target[k])}" if target[k] else "" for k, f in
             (("size", format_bytes), ("latency", format_seconds), ("memory", format_bytes))}  # fmt: skip
    drop = f"<= +{100 * target['drop']:g} pp" if target["drop"] is not None else (
        f"<= {100 * target['drop_relative']:g} %" if target["drop_relative"] is not None else "")  # fmt: skip
    lines = [
        result["verdict"]["headline"],
        f"{'':13}{'original':>12}{'bundle':>12}{'ratio':>10}   target",
        f"{'size':13}{format_bytes(before['size']):>12}{format_bytes(after['size']):>12}{ratios['size']:>9.1f}x   {limit['size']}",
        f"{metric['name']:13}{metric['before']:>11.1%} {metric['after']:>11.1%}{100 * metric['difference']:>+7.2f} pp   {drop}"
        f"   95 % interval [{100 * metric['low']:+.2f}, {100 * metric['high']:+.2f}], n = {metric['n']}, paired",
        f"{'latency':13}{format_seconds(before['latency']):>12}{format_seconds(after['latency']):>12}{ratios['latency']:>9.2f}x   "
        f"{limit['latency']}   ratio of sums [{ratios['latency_low']:.2f}, {ratios['latency_high']:.2f}], median of "
        f"{how['samples']}, {how['threads']} threads, {after['runtime']}",
        f"{'memory':13}{format_bytes(before['memory']):>12}{format_bytes(after['memory']):>12}{ratios['memory']:>9.1f}x   {limit['memory']}",
        f"{'load':13}{format_seconds(before['load']):>12}{format_seconds(after['load']):>12}{ratios['load']:>9.1f}x",
        f"{'energy':13}" + (f"{before['energy']:>10.1f} J{after['energy']:>10.1f} J" if after["energy"] and before["energy"] else
                            "not measured: this machine reports none"),
        f"{'agreement':13}{metric['summary']}",
        f"{'plan':13}{result['plan']['name']}: " + "; ".join(_steps(result)),
    ]  # fmt: skip
    lines[4:4] = _detail_lines(metric.get("details") or {})
    lines += _limit_line(result.get("certificate"))
    lines += [f"{'':13}{result['verdict']['sentence']}"]
    if result["verdict"]["interval_crosses"]:
        lines += [f"{'':13}The 95 % interval crosses the allowed drop; --strict would ask for its upper end."]
    if result["verdict"]["nearest"]:
        lines += [
            f"{'binds':13}{result['verdict']['binding']}",
            f"{'apply':13}packlight apply MODEL {out / 'plan.json'} --data DIR -o OUT2",
        ]
    lines += [
        f"{'bundle':13}{out / 'bundle'}   packlight run {out / 'bundle'} {result['model'].get('usage', 'speech.wav')}",
        f"{'report':13}{out / 'report.html'}",
    ]
    return "\n".join(lines)


_WHOLE = {
    "audio_context": "audio context to length",
    "separable_convolution": "separable convolutions",
    "grouped_convolution": "grouped convolutions",
    "prune_structure": "heads, units and blocks pruned",
    "low_rank": "low rank",
    "turn_heads": "heads turned",
    "distill": "taught by the original",
    "prune_vocabulary": "vocabulary pruned",
    "tune_scales": "scales tuned",
}  # techniques of whole models, in words


def _steps(result: dict[str, Any]) -> list[str]:
    """What the plan does, in a few words: techniques of the whole model, then bits per weight by part."""
    names = [step["technique"] for step in result["plan"]["steps"]]
    rates = [f"{p['name']} {p['rate']:.2f} b" for p in result["parts"] if p["rate"] is not None]
    return [words for name, words in _WHOLE.items() if name in names] + rates


def _detail_lines(details: dict[str, list[float]]) -> list[str]:
    """The shares of classes among the first one and five; recalls of both directions are in the report's numbers alone."""
    return [
        f"{name:13}{row[0]:>11.1%} {row[1]:>11.1%}{100 * (row[1] - row[0]):>+7.2f} pp   "
        f"   95 % interval [{100 * row[2]:+.2f}, {100 * row[3]:+.2f}], paired"
        for name, row in details.items()
        if name.startswith("top-") and len(row) == 4
    ]


def _limit_line(found: dict[str, Any] | None) -> list[str]:
    """How far above the theoretical limit the file is; nothing where most layers take the finest grid, not a rate."""
    if found is None or 2 * found["rated"] < found["layers"]:
        return []
    side = "above" if found["gap"] >= 0 else "below"
    return [
        f"{'limit':13}{found['rate']:.2f} bits per weight, {abs(found['gap']):.2f} {side} the theoretical limit "
        f"({found['layers']} of {found['of_layers']} layers; mean of layers {found['gap_mean']:+.2f})"
    ]
