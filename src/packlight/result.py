"""Everything a fit found, as the one dict that result.json and the report are made of. Its keys: docs/reference/result.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import packlight
from packlight.certificate import certify, with_gaps
from packlight.plan import Plan


def assemble(
    run: Any,
    levels: Sequence[Any],
    plans: Sequence[Plan],
    tried: Sequence[dict[str, Any]],
    chosen: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Put the parts together; `run` is `packlight.fitting.Run`, `extra` holds 'original', 'ladder', 'how', 'profile'."""
    outcome = chosen["outcome"]
    found, timing, process = (outcome[key] for key in ("quality", "timing", "process"))
    original = extra["original"]
    before_bytes = run.model.source.bytes
    plan = next(p for p in plans if p.name == outcome["plan"])
    version = extra["how"]["versions"]
    layers = with_gaps(outcome["records"], plan)
    before = {"size": before_bytes, "latency": timing["before"], "latency_mean": timing["before_mean"],
              "load": original["load"], "memory": original["memory"], "energy": original["energy"],
              "runtime": f"transformers {version['transformers']} (PyTorch float32)"}  # fmt: skip
    after = {"size": outcome["size"], "latency": timing["after"], "latency_mean": timing["after_mean"],
             "load": process["load"], "memory": process["memory"], "energy": process["energy"],
             "runtime": f"onnxruntime {version['onnxruntime']}"}  # fmt: skip
    return {
        "version": 1,
        "packlight": packlight.__version__,
        "command": run.options.command,
        "verdict": _verdict(run, chosen, extra["ladder"]),
        "model": model_facts(run.model),
        "target": run.target.to_dict(),
        "data": data_facts(run),
        "metric": found,
        "before": before,
        "after": after,
        "ratios": {"size": before_bytes / outcome["size"], "latency": timing["ratio"], "latency_low": timing["low"],
                   "latency_high": timing["high"], "memory": before["memory"] / after["memory"],
                   "load": before["load"] / after["load"]},
        "timing": {"samples": timing["samples"], "threads": extra["how"]["threads"], "machine": extra["how"]["machine"],
                   "interleaved": True},
        "parts": _parts(extra["profile"], outcome["records"]),
        "files": [{"name": f.name, "bytes": f.stat().st_size} for f in sorted((run.out / "bundle").iterdir())],
        "sensitivity": [{"part": lv.part, "level": "8-bit groups" if lv.technique == "group_weights" else "finest" if lv.rate is None else f"{lv.rate:g} bits", "bytes": lv.bytes,
                         "kl": lv.kl, "flips": lv.flips} for lv in levels],
        "layers": layers,
        "certificate": certify(layers),
        "front": [{"plan": p.name, "bytes": p.expected["bytes"] + run.overhead, "kl": p.expected["kl"],
                   "chosen": p.name == plan.name, "measured": _measured(p, tried)} for p in plans
                  if p.name[0] in _front_of(plan, plans)],
        "tries": [{"plan": t["plan"], "size": t["size"], "difference": t["quality"]["difference"], "low": t["quality"]["low"],
                   "high": t["quality"]["high"], "latency": t["timing"]["after"], "met": not t["missed"],
                   "missed": t["missed"]} for t in tried],
        "plan": plan.to_dict(),
        "worst": outcome["rows"],
        "ladder": extra["ladder"],
        "how": extra["how"],
        "notes": notes(run, found),
    }  # fmt: skip


def _verdict(run: Any, chosen: dict[str, Any], rungs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = chosen["outcome"]["quality"]
    allowed = run.target.allowed_drop(found["before"])
    crosses = allowed is not None and found["difference"] <= allowed < found["high"]
    met = chosen["met"]
    sentence = "Every constraint is met, measured on the bundle." if met else chosen["nearest"]["sentence"]
    return {
        "met": met,
        "headline": "MEETS TARGET" if met else "DOES NOT MEET TARGET",
        "sentence": sentence,
        "binding": chosen["binding"],
        "interval_crosses": crosses,
        "rung": next((r["rung"] for r in reversed(rungs) if r["passed"]), ""),
        "nearest": chosen["nearest"],
    }


def model_facts(model: Any) -> dict[str, Any]:
    """What a result says of the original; `model` is a `packlight.model.Model`."""
    source = model.source
    return {
        "source": source.name, "family": model.family.name, "architecture": source.architecture,
        "parameters": sum(p.numel() for p in model.module.parameters()), "licence": source.licence,
        "revision": source.revision, "usage": model.family.usage, "dtype": source.dtype, "sha256": source.sha256,
    }  # fmt: skip


def data_facts(run: Any) -> dict[str, Any]:
    """What a result says of the samples of a `packlight.fitting.Run`."""
    calibration, evaluation = _data(run.calibration), _data(run.evaluation)
    words = "original model" if run.model.family.group == 1 else "captions"
    return {"calibration": calibration | {"words_from": words}, "evaluation": evaluation}


def _data(dataset: Any) -> dict[str, Any]:
    return {
        "source": Path(dataset.source).name,
        "n": dataset.n,
        "seconds": dataset.seconds,
        "sha256": dataset.sha256,
    }


def _parts(profile: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for part in profile:
        own = [r for r in records if r["part"] == part["name"]]
        bits = sum(r["rate"] * r["parameters"] for r in own)
        count = sum(r["parameters"] for r in own)
        rows.append({"name": part["name"], "parameters": part["parameters"], "before": part["before"],
                     "after": int(bits / 8), "rate": bits / count if count else None,
                     "share_of_multiply_adds": part["share_of_multiply_adds"]})  # fmt: skip
    return rows


def _front_of(plan: Plan, plans: Sequence[Plan]) -> str:
    """First letters of the names of the plans that are shown with one: a plan with fewer operations has no front of its own."""
    base = ("c" if any(p.name[0] == "c" for p in plans) else "p") if plan.name[0] in "st" else ""
    return f"{plan.name[0]}{base}f"


def _measured(plan: Plan, tried: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next(
        ({"size": t["size"], "difference": t["quality"]["difference"]} for t in tried if t["plan"] == plan.name),
        None,
    )


def notes(run: Any, found: dict[str, Any]) -> list[str]:
    """Sentences that a reader of the numbers should know; `found` is the quality of one bundle."""
    said = list(run.model.family.notes)
    if found["n"] < 100:
        said.append(f"Only {found['n']} evaluation samples: the interval is wide. More samples make it narrower.")
    spoken = found.get("languages", {})
    if run.options.language is None and set(spoken) - {"en"}:
        counts = ", ".join(f"{code} {n}" for code, n in spoken.items())
        said.append(f"Each sample was scored in the language that the original heard in it: {counts}.")
    return said
