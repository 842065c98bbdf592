"""How far bundles of a speech model are from the original, word by word, on recordings of your choice.

    python benchmarks/divergence.py MODEL BUNDLE [BUNDLE ...] --data DIR -o OUT

The KL divergence of the next-token distribution from the original's, in nats per token, teacher-forced with the
original's own words; and for each bundle after the first, its divergence against the first's, with the 95 % interval of
a paired bootstrap over recordings. A word error rate of a hundred utterances resolves about one point; this resolves a
tenth of itself. Recordings with words that one of the bundles can't write as the original does are left out of all.
OUT keeps the original's words, so a second call is quick. With words that were calibrated on, it says less than it seems.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bakeoff import divergence, log_probabilities, say

from packlight.applying import Options, calibration_batches
from packlight.bundle import open_bundle
from packlight.data import read_dataset
from packlight.errors import PacklightError
from packlight.evaluate import threads_or_all
from packlight.families import Batch
from packlight.loading import load
from packlight.model import Model
from packlight.plan import plan_from_dict
from packlight.reloading import reload
from packlight.token_pruning import old_ids

UNSURE = 0.5  # entropy in nats from which the original counts as unsure of a word


def vocabulary(bundle: Path, rows: int) -> tuple[int, ...]:
    """The original's ids of the tokens that a bundle has."""
    ids = old_ids(plan_from_dict(open_bundle(bundle).manifest["plan"]))
    return tuple(range(rows)) if ids is None else ids


def covered(batches: Sequence[Batch], key: str, tokens: Sequence[tuple[int, ...]]) -> list[Batch]:
    """The batches all of whose words every bundle has."""
    stay = set.intersection(*({*kept} for kept in tokens))
    return [b for b in batches if stay.issuperset(b[key][0].tolist())]


def measure(
    model: Model, kept: tuple[int, ...], batches: Sequence[Batch], aims: Sequence[torch.Tensor]
) -> list[tuple[float, int, int]]:
    """For each recording: (summed KL among the tokens that a bundle has, top tokens that changed, tokens)."""
    key, new = model.family.reads, {old: i for i, old in enumerate(kept)}
    for path, layer in model.module.named_modules():
        stepwise = any(t.stepwise and t.has(path) for t in model.family.towers)
        if stepwise and getattr(layer, "activations", "") == "int8":
            layer.activations = "int8_rows"  # as when words come one by one
    renamed = [{**b, key: torch.tensor([[new[t] for t in b[key][0].tolist()]])} for b in batches]
    stay = torch.tensor(kept)
    return divergence(model, renamed, [torch.log_softmax(aim[:, stay], -1) for aim in aims])


def against(first: Sequence[Any], second: Sequence[Any]) -> tuple[float, float, float]:
    """How much more divergence the second has than the first, as a share, with its 95 % interval."""
    kl = np.array([[a[0], b[0]] for a, b in zip(first, second, strict=True)])
    sums = kl[np.random.default_rng(0).integers(0, len(kl), (10_000, len(kl)))].sum(1)
    low, high = np.percentile(sums[:, 1] / sums[:, 0], [2.5, 97.5])
    return float(kl[:, 1].sum() / kl[:, 0].sum()) - 1, float(low) - 1, float(high) - 1


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="divergence of bundles from the original; see the top of this file")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of recordings")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(threads_or_all(0))
    try:
        original, data = load(args.model), read_dataset(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        rows = int(original.module.get_submodule(original.family.token_tables[0]).weight.shape[0])  # type: ignore[index, union-attr]
        tokens = [vocabulary(b, rows) for b in args.bundles]
        batches = calibration_batches(original, data, Options(), args.out, say, data.n)
        left = covered(batches, original.family.reads, tokens)
        aims = log_probabilities(original, left)
        found = []
        for bundle, kept in zip(args.bundles, tokens, strict=True):
            found.append(measure(reload(bundle), kept, left, aims))
    except PacklightError as error:
        print(error, file=sys.stderr)
        return 2
    entropy = torch.cat([-(aim.exp() * aim).nan_to_num().sum(-1) for aim in aims])
    print(
        f"{len(left)} of {data.n} recordings, {len(entropy)} tokens; the original is unsure of "
        f"{float((entropy > UNSURE).float().mean()):.0%} (entropy above {UNSURE})"
    )
    for bundle, one in zip(args.bundles, found, strict=True):
        kl, flips, count = (sum(v[i] for v in one) for i in range(3))
        more = "" if one is found[0] else "  {:+.0%} [{:+.0%}, {:+.0%}]".format(*against(found[0], one))
        print(f"{bundle}: KL {kl / count:.3g} per token, {flips / count:.1%} of top tokens changed{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
