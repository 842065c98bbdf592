"""The ablation's table: rows against each other, by a paired bootstrap over recordings."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def times(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float, float]:
    """KL of the first over that of the second, with the 95 % interval of a paired bootstrap over recordings."""
    kl = np.array([[a[0], b[0]] for a, b in zip(first["utterances"], second["utterances"], strict=True)])
    picks = np.random.default_rng(0).integers(0, len(kl), (10_000, len(kl)))
    sums = kl[picks].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(kl[:, 0].sum() / kl[:, 1].sum()), float(low), float(high)


def markdown(found: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]], full: dict[str, Any]) -> str:
    """The table: each step against the row before it, then each row that lacks one against the one that has all."""
    lines = ["| | bits/weight | KL per token | top tokens changed | KL, times less than the row before |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for before, row in zip([None, *found], found, strict=False):
        gain = "" if before is None else "{:.2f} [{:.2f}, {:.2f}]".format(*times(before, row))
        lines.append(f"| {row['name']} | {row['bits']:.2f} | {row['kl']:.5f} | {row['flips']:.2%} | {gain} |")
    if alone:
        lines += ["", "| | bits/weight | KL per token | top tokens changed | KL, times that of all steps |",
                  "|---|---:|---:|---:|---:|"]  # fmt: skip
    for row in alone:
        loss = "{:.2f} [{:.2f}, {:.2f}]".format(*times(row, full))
        lines.append(f"| {row['name']} | {row['bits']:.2f} | {row['kl']:.5f} | {row['flips']:.2%} | {loss} |")
    return "\n".join(lines) + "\n"
