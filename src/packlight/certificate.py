"""The certificate: how far the layers of a file are above the theoretical limit. From records alone, no torch here.

For a layer whose inputs were observed, `packlight.quant.bound` gives the rate that no code goes below at the error that
was reached. The gap is what the file spends above it. Rates count codes, scales and factors of columns, as the file
holds them before its headers.
"""

from collections.abc import Sequence
from typing import Any

from packlight.plan import Plan

Record = dict[str, Any]


def with_gaps(records: Sequence[Record], plan: Plan) -> list[Record]:
    """The records of layers, each with its 'gap' (rate - bound, or None) and whether it is 'rated'.

    Args:
        records: dicts of `packlight.plan.StepRecord`.
        plan: the plan they came from; a layer is rated when its step asks for bits per weight.
    """
    found = []
    for r in records:
        step = next((s for s in plan.steps if s.technique == r["technique"] and s.takes(r["path"])), None)
        limit = r.get("bound")
        gap = None if limit is None else round(r["rate"] - limit, 4)
        found.append({**r, "gap": gap, "rated": step is not None and step.config.get("rate") is not None})
    return found


def certify(layers: Sequence[Record]) -> Record | None:
    """The certificate of a model.

    Args:
        layers: from `with_gaps`.

    Returns:
        the sums over the layers that have a bound, the same for each of their 'parts', and how much of the model that
        covers ('of_layers', 'of_parameters'); None when no layer has a bound. Rates are weighted by parameters,
        'gap_mean' counts every layer once.
    """
    own = [r for r in layers if r["parameters"]]  # a head that shares its table's weights has none
    covered = [r for r in own if r["gap"] is not None]
    if not covered:
        return None
    parts = dict.fromkeys(r["part"] for r in covered)
    return {
        **_sums(covered),
        "of_layers": len(own),
        "of_parameters": sum(r["parameters"] for r in own),
        "parts": [{"name": name, **_sums([r for r in covered if r["part"] == name])} for name in parts],
    }


def _sums(layers: Sequence[Record]) -> Record:
    count = sum(r["parameters"] for r in layers)

    def mean(key: str) -> float:
        return float(sum(r[key] * r["parameters"] for r in layers) / count)

    return {
        "layers": len(layers),
        "rated": sum(r["rated"] for r in layers),
        "parameters": count,
        "rate": mean("rate"),
        "distortion": mean("distortion"),
        "bound": mean("bound"),
        "gap": mean("gap"),
        "gap_mean": sum(r["gap"] for r in layers) / len(layers),
        "bytes": round(mean("rate") * count / 8),
        "bytes_at_bound": round(mean("bound") * count / 8),
    }
