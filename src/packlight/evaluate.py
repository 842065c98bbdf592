"""Quality, time and memory, before and after, on the same samples, in the runtime that ships."""

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from packlight.audio import open_audio
from packlight.data import Dataset, Sample
from packlight.errors import DataError
from packlight.metrics import Paired, error_counts, metric_name, normalize, paired_bootstrap, token_agreement
from packlight.plan import append_line, read_lines

Progress = Callable[[str, int, int], None]
Answer = Callable[[Any], list[Any]]
Open = Callable[[Path, Sequence[str]], Any]
TIMED = 20  # samples whose latency is measured
_WARMUP = 1


@dataclass(frozen=True)
class Asked:
    """How a model or bundle is asked to answer.

    Args:
        language: code of a multilingual model; None lets it detect the language of each sample.
        task: 'transcribe' or 'translate'; None is the bundle's own task, and 'transcribe' for a model.
        threads: 0 for all cores.
        trust_remote_code: see `packlight.load`.
        templates: what labels are asked with, {} in place of the label; none for the default.
    """

    language: str | None = None
    task: str | None = None
    threads: int = 0
    trust_remote_code: bool = False
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quality(Paired):
    """The metric before and after on the same samples, and what else they share.

    Args:
        name: of the metric, whose errors are 0..1, lower is better.
        token_agreement: see `packlight.metrics.token_agreement`.
        identical: share of the samples whose normalised text is the same.
        languages: code -> number of samples scored in it.
        summary: what the two share, in words.
        details: further metrics: name -> [before, after, and the 95 % interval of after - before].
    """

    name: str
    token_agreement: float
    identical: float
    languages: dict[str, int]
    summary: str = ""
    details: dict[str, list[float]] = field(default_factory=dict)


def answers(
    dataset: Dataset,
    answer: Answer,
    kept: Path | None,
    what: str,
    progress: Progress | None = None,
    open_input: Open = open_audio,
) -> list[list[Any]]:
    """Token ids, or vectors, for every sample, in order; those in `kept` (JSON lines) are not made again."""

    def tokens(content: Any) -> list[Any]:
        return [t if isinstance(t, list) else int(t) for t in answer(content)]

    return _each(dataset, tokens, kept, "tokens", (what, progress), open_input)


def languages(
    dataset: Dataset,
    detect: Callable[[np.ndarray], str | None] | None,
    given: str | None,
    kept: Path | None,
    progress: Progress | None = None,
) -> list[str]:
    """The language each sample is scored in: the given one, else what the model hears in it.

    Args:
        dataset: the samples.
        detect: audio -> the model's own guess, None from a model of English only; None where there is no speech.
        given: the language of all samples, if it is known.
        kept: JSON lines of what is known already.
        progress: called with (what, done, total).
    """
    if given or detect is None:
        return [given or ""] * dataset.n
    found = _each(dataset, detect, kept, "language", ("detecting languages", progress), open_audio)
    return [code or "en" for code in found]


def _each(
    dataset: Dataset,
    make: Callable[[np.ndarray], Any],
    kept: Path | None,
    key: str,
    said: tuple[str, Progress | None],
    open_input: Open,
) -> list[Any]:
    what, progress = said
    # A picture under two names may have other texts, and their vectors are in its answer. An answer to speech does not
    # depend on what was said, so it is kept by the recording alone.
    done = {(v["sha256"], v.get("texts", "")): v[key] for v in read_lines(kept)} if kept else {}
    result = []
    for i, sample in enumerate(dataset.samples):
        asked = (sample.sha256, "" if open_input is open_audio else _digest(sample.texts))
        if asked not in done:
            done[asked] = make(open_input(sample.path, sample.texts))
            if kept:
                texts = {"texts": asked[1]} if asked[1] else {}
                append_line(kept, {"id": sample.id, "sha256": sample.sha256, **texts, key: done[asked]})
        result.append(done[asked])
        if progress:
            progress(what, i + 1, dataset.n)
    return result


def _digest(texts: Sequence[str]) -> str:
    """SHA-256 of a sample's texts; '' for none."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest() if texts else ""


def quality(
    dataset: Dataset,
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    decode: Callable[[Any], str],
    language: str | Sequence[str],
) -> tuple[Quality, list[dict[str, Any]]]:
    """Compare two sets of answers with what was said.

    Args:
        dataset: the samples, each with a transcript.
        before: token ids of the original, per sample.
        after: token ids of the bundle, per sample.
        decode: token ids -> text.
        language: of all samples, or of each.

    Returns:
        the quality, and one row per sample: id, language, reference, before, after, errors of both, words; most
        harmed first.

    Raises:
        DataError: a sample without a transcript, or no words at all.
    """
    spoken = [language] * dataset.n if isinstance(language, str) else list(language)
    rows: list[dict[str, Any]] = []
    for sample, code, old, new in zip(dataset.samples, spoken, before, after, strict=True):
        reference, (first, second) = _normalized(sample, code, [decode(old), decode(new)])
        (old_errors, length), (new_errors, _) = error_counts(reference, first), error_counts(reference, second)
        rows.append(
            {"id": sample.id, "language": code, "reference": reference, "before": first, "after": second,
             "before_errors": old_errors, "after_errors": new_errors, "words": length}
        )  # fmt: skip
    agreement = token_agreement(before, after)
    identical = sum(r["before"] == r["after"] for r in rows) / len(rows)
    before_errors, after_errors, words = ([r[k] for r in rows] for k in ("before_errors", "after_errors", "words"))
    paired = paired_bootstrap(before_errors, after_errors, words)
    found = Quality(
        **vars(paired),
        name=metric_name(*spoken),
        token_agreement=agreement,
        identical=identical,
        languages=dict(Counter(spoken)),
        summary=f"{agreement:.1%} of tokens as the original's, {identical:.0%} of transcripts the same",
    )
    return found, sorted(rows, key=lambda r: r["before_errors"] - r["after_errors"])


def rate(dataset: Dataset, said: Sequence[str], language: Sequence[str]) -> dict[str, Any]:
    """The metric of one set of answers, with the 95 % interval of a bootstrap over samples.

    Args:
        dataset: the samples, each with a transcript.
        said: text per sample.
        language: of each sample.

    Returns:
        'metric', 'value', 'low', 'high', 'n', 'languages'.

    Raises:
        DataError: a sample without a transcript, or no words at all.
    """
    counts = []
    for sample, text, code in zip(dataset.samples, said, language, strict=True):
        reference, (heard,) = _normalized(sample, code, [text])
        counts.append(error_counts(reference, heard))
    edits, words = zip(*counts, strict=True)
    found = paired_bootstrap([0] * len(edits), edits, words)  # against a system without errors
    return {
        "metric": metric_name(*language), "value": found.after, "low": found.low, "high": found.high, "n": found.n,
        "languages": dict(Counter(language)),
    }  # fmt: skip


def _normalized(sample: Sample, language: str, texts: Sequence[str]) -> tuple[str, list[str]]:
    if sample.text is None:
        raise DataError(f"{sample.path} has no transcript, so errors can't be counted. Give it one.")
    return normalize(sample.text, language), [normalize(text, language) for text in texts]


def spread(dataset: Dataset, count: int) -> tuple[Sample, ...]:
    """At most `count` samples, evenly spread over the dataset, so over its speakers."""
    step = max(1.0, dataset.n / count)
    return tuple(dataset.samples[int(i * step)] for i in range(min(count, dataset.n)))


def time_pair(
    samples: Sequence[Sample],
    first: Answer,
    second: Answer,
    progress: Progress | None = None,
    open_input: Open = open_audio,
) -> dict[str, Any]:
    """Time two answerers on the same samples in one process, in random order sample by sample.

    Returns:
        medians and means of both in seconds, the ratio of the sums first / second with a 95 % bootstrap interval.
    """
    audios = [open_input(s.path, s.texts) for s in samples]
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
