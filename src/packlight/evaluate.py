"""Quality, time and memory, before and after, on the same samples, in the runtime that ships."""

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.audio import read_audio
from packlight.data import Dataset, Sample
from packlight.errors import DataError
from packlight.metrics import (
    error_counts,
    metric_name,
    normalize,
    paired_bootstrap,
    token_agreement,
    word_error_rate,
)
from packlight.plan import append_line, read_lines

Progress = Callable[[str, int, int], None]
Answer = Callable[[np.ndarray], list[int]]
TIMED = 20  # samples whose latency is measured
_WARMUP = 1


@dataclass(frozen=True)
class Quality:
    """The metric before and after on the same samples; errors are 0..1, lower is better."""

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    level: float
    resamples: int
    token_agreement: float
    identical: float


def answers(
    dataset: Dataset, answer: Answer, kept: Path | None, what: str, progress: Progress | None = None
) -> list[list[int]]:
    """Token ids for every sample, in order; those in `kept` (JSON lines) are not made again."""
    done = {v["sha256"]: v["tokens"] for v in read_lines(kept)} if kept else {}
    result = []
    for i, sample in enumerate(dataset.samples):
        if sample.sha256 not in done:
            done[sample.sha256] = [int(t) for t in answer(read_audio(sample.path))]
            if kept:
                append_line(kept, {"id": sample.id, "sha256": sample.sha256, "tokens": done[sample.sha256]})
        result.append(done[sample.sha256])
        if progress:
            progress(what, i + 1, dataset.n)
    return result


def quality(
    dataset: Dataset,
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    decode: Callable[[Any], str],
    language: str | None,
) -> tuple[Quality, list[dict[str, Any]]]:
    """Compare two sets of answers with what was said.

    Returns:
        the quality, and one row per sample: id, reference, before, after, errors of both, words; most harmed first.

    Raises:
        DataError: a sample without a transcript, or no words at all.
    """
    rows: list[dict[str, Any]] = []
    for sample, old, new in zip(dataset.samples, before, after, strict=True):
        if sample.text is None:
            raise DataError(f"{sample.path} has no transcript, so errors can't be counted.")
        reference = normalize(sample.text, language)
        texts = [normalize(decode(ids), language) for ids in (old, new)]
        counts = [error_counts(reference.split(), text.split()) for text in texts]
        rows.append(
            {"id": sample.id, "reference": reference, "before": texts[0], "after": texts[1],
             "before_errors": counts[0][0], "after_errors": counts[1][0], "words": counts[0][1]}
        )  # fmt: skip
    words = [r["words"] for r in rows]
    old_errors, new_errors = [r["before_errors"] for r in rows], [r["after_errors"] for r in rows]
    paired = paired_bootstrap(old_errors, new_errors, words)
    found = Quality(
        name=metric_name(language),
        before=word_error_rate(old_errors, words),
        after=word_error_rate(new_errors, words),
        difference=paired.difference,
        low=paired.low,
        high=paired.high,
        n=len(rows),
        level=paired.level,
        resamples=paired.resamples,
        token_agreement=token_agreement(before, after),
        identical=sum(r["before"] == r["after"] for r in rows) / len(rows),
    )
    return found, sorted(rows, key=lambda r: r["before_errors"] - r["after_errors"])


def spread(dataset: Dataset, count: int) -> tuple[Sample, ...]:
    """At most `count` samples, evenly spread over the dataset, so over its speakers."""
    step = max(1.0, dataset.n / count)
    return tuple(dataset.samples[int(i * step)] for i in range(min(count, dataset.n)))


def time_pair(
    samples: Sequence[Sample], first: Answer, second: Answer, progress: Progress | None = None
) -> dict[str, Any]:
    """Time two answerers on the same samples in one process, in random order sample by sample.

    Returns:
        medians and means of both in seconds, the ratio of the sums first / second with a 95 % bootstrap interval.
    """
    audios = [read_audio(s.path) for s in samples]
    order = random.Random(0)
    for answer in (first, second):
        for audio in audios[:_WARMUP]:
            answer(audio)
    times = np.zeros((len(audios), 2))
    for i, audio in enumerate(audios):
        for which in order.sample((0, 1), 2):
            start = time.perf_counter()
            (first, second)[which](audio)
            times[i, which] = time.perf_counter() - start
        if progress:
            progress("timing original and bundle in turn", i + 1, len(audios))
    picks = np.random.default_rng(0).integers(0, len(audios), (2000, len(audios)))
    ratios = times[:, 0][picks].sum(1) / times[:, 1][picks].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "before": float(np.median(times[:, 0])), "before_mean": float(times[:, 0].mean()),
        "after": float(np.median(times[:, 1])), "after_mean": float(times[:, 1].mean()),
        "ratio": float(times[:, 0].sum() / times[:, 1].sum()), "low": float(low), "high": float(high),
        "samples": len(audios),
    }  # fmt: skip


def threads_or_all(threads: int) -> int:
    """The number of threads asked for, or of all cores."""
    return threads or (os.cpu_count() or 1)
