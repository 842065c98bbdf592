"""What a bundle's encoder takes against another's: both in turn on the same recordings, in one process.

    python benchmarks/encoders.py BUNDLE OTHER --data DIR [--clips 20] [--threads 2]

Prints the mean over recordings of the median of seven runs of each, and how much less time the first takes, with the
95 % interval of a bootstrap over recordings. Both are Whisper bundles; each gets the inputs that its own context asks for.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np

from packlight.data import read_dataset
from packlight.evaluate import spread
from packlight.measure import machine
from packlight.serve import open_served
from packlight.serving.whisper import Settings, encoder_inputs

ROUNDS = 7


def main() -> None:
    """Print both times and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs=2, type=Path, metavar="BUNDLE")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    both = [open_served(path, options.threads) for path in options.bundles]
    samples = spread(read_dataset(options.data), options.clips)
    audios = [both[0].open_input(s.path, s.texts) for s in samples]
    settings = [Settings.from_dict(one.bundle.manifest["serving"]) for one in both]
    feeds = [[encoder_inputs(how, audio) for audio in audios] for how in settings]
    seconds, order = np.zeros((ROUNDS, len(audios), 2)), random.Random(0)
    for one, feed in zip(both, feeds, strict=True):
        one.parts["encoder"].run(feed[0])
    for times in seconds:
        for i in range(len(audios)):
            for which in order.sample((0, 1), 2):
                start = time.perf_counter()
                both[which].parts["encoder"].run(feeds[which][i])
                times[i, which] = time.perf_counter() - start
    median = np.median(seconds, 0)
    picks = np.random.default_rng(0).integers(0, len(audios), (10_000, len(audios)))
    low, high = np.percentile(1 - median[picks, 0].sum(1) / median[picks, 1].sum(1), [2.5, 97.5])
    first, second = 1000 * median.mean(0)
    print(
        f"{first:.1f} ms against {second:.1f}: {1 - first / second:.1%} less [{low:.1%}, {high:.1%}], n = {len(audios)}"
    )
    print(f"{options.threads} threads, {machine()}")


if __name__ == "__main__":
    main()
