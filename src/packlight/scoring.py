"""Which metric a task has: before and after on the same samples, and alone.

Speech is scored by `packlight.evaluate`. Dual encoders here: pictures or sounds with labels by zero-shot top-1 error, those
with texts by the share of texts whose picture is not among the first ten, 1 - recall@10.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from packlight.data import Dataset
from packlight.errors import DataError
from packlight.evaluate import Quality, quality, rate
from packlight.metrics import paired_bootstrap
from packlight.retrieval import KS, class_ranks, class_vectors, first_right, recall, retrieval_ranks, right_pairs

Vectors = Sequence[Sequence[Sequence[float]]]
MAIN = 10  # the k of the metric that targets are about
_RESAMPLES = 2000  # of the intervals of further metrics


def images_and_texts(found: Vectors) -> tuple[np.ndarray, list[np.ndarray]]:
    """([samples, d] pictures, per sample [its texts, d]) from answers, each a picture's vector and its texts'."""
    return np.array([a[0] for a in found]), [np.array(a[1:]).reshape(len(a) - 1, -1) for a in found]


def _labels(dataset: Dataset, texts: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(names of classes, their vectors, [samples] the number of each sample's class)."""
    first = {s.label or "": i for i, s in reversed(list(enumerate(dataset.samples)))}
    names = sorted(first)
    vectors = class_vectors([texts[first[name]] for name in names])
    return names, vectors, np.array([names.index(s.label or "") for s in dataset.samples])


def _noun(dataset: Dataset) -> str:
    return "sound" if dataset.modality == "audio" else "image"


def _check(dataset: Dataset) -> None:
    bare = [s.id for s in dataset.samples if not s.texts]
    if bare:
        raise DataError(
            f"{dataset.source}: {len(bare)} {_noun(dataset)}s have neither texts nor a label, first {bare[0]}."
        )
    if dataset.n < 2:
        raise DataError(f"{dataset.source} has one {_noun(dataset)}; ranking needs two or more.")


def _ranks(dataset: Dataset, found: Vectors) -> dict[str, Any]:
    """'texts' ranks of pictures per text, 'images' ranks of texts per picture; for labels 'images' alone, of classes."""
    images, texts = images_and_texts(found)
    if dataset.by_label:
        names, classes, truth = _labels(dataset, texts)
        scores = images @ classes.T
        return {"images": class_ranks(images, classes, truth), "top": [names[i] for i in scores.argmax(1)]}
    right, first, owner = right_pairs([s.texts for s in dataset.samples])
    asked = np.concatenate(texts)[first]
    to_image, to_text = retrieval_ranks(images, asked, right)
    top = [(dataset.samples[i].text or "") for i in (asked @ images.T).argmax(1)]
    flat = [text for s in dataset.samples for text in s.texts]
    return {"texts": to_image, "images": to_text, "top": top, "flat": [flat[i] for i in first], "owner": owner}


def _kinds(dataset: Dataset, ranks: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Name of a further metric -> (which ranks it counts, how many first places are right)."""
    if "texts" not in ranks:
        return {f"top-{k}": ("images", k) for k in (1, 5)}
    noun = _noun(dataset)
    ways = ((f"text to {noun}", "texts"), (f"{noun} to text", "images"))
    return {f"{way} recall@{k}": (key, k) for way, key in ways for k in KS}


def _details(dataset: Dataset, ranks: dict[str, Any]) -> dict[str, float]:
    return {name: recall(ranks[key], k) for name, (key, k) in _kinds(dataset, ranks).items()}


def _paired_details(dataset: Dataset, old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[float]]:
    """Name -> [before, after, lower and upper end of the 95 % interval of after - before], paired by picture."""
    found = {}
    for name, (key, k) in _kinds(dataset, old).items():
        (first, count), (second, _) = (_missed(dataset, ranks, key, k) for ranks in (old, new))
        paired = paired_bootstrap(first, second, count, resamples=_RESAMPLES)
        found[name] = [recall(old[key], k), recall(new[key], k), 0.0 - paired.high, 0.0 - paired.low]
    return found


def _missed(dataset: Dataset, ranks: dict[str, Any], key: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """([samples] queries not answered within the first k, [samples] queries): captions are resampled with their picture."""
    if key == "images":
        return (ranks["images"] >= k).astype(int), np.ones(dataset.n, dtype=int)
    missed = np.bincount(ranks["owner"], ranks["texts"] >= k, dataset.n).astype(int)
    return missed, np.bincount(ranks["owner"], minlength=dataset.n)


def _misses(dataset: Dataset, ranks: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The same for the metric that targets are about."""
    return _missed(dataset, ranks, "texts", MAIN) if "texts" in ranks else _missed(dataset, ranks, "images", 1)


def _name(dataset: Dataset) -> str:
    return "top-1 error" if dataset.by_label else f"1 - R@{MAIN}"


def dual_quality(
    dataset: Dataset, before: Vectors, after: Vectors, decode: Any = None, language: Any = None
) -> tuple[Quality, list[dict[str, Any]]]:
    """Compare two sets of vectors of the same pictures and texts.

    Returns:
        the quality, and one row per query: id, reference, what ranked first before and after, errors of both; most harmed
        first.

    Raises:
        DataError: a picture without text or label, or only one picture.
    """
    _check(dataset)
    old, new = _ranks(dataset, before), _ranks(dataset, after)
    (first, count), (second, _) = _misses(dataset, old), _misses(dataset, new)
    same = float(np.mean([a == b for a, b in zip(old["top"], new["top"], strict=True)]))
    rows = _rows(dataset, old, new)
    identical = float(np.mean([r["ranks"][0] == r["ranks"][1] for r in rows]))
    found = Quality(
        **vars(paired_bootstrap(first, second, count)),
        name=_name(dataset),
        token_agreement=same,
        identical=identical,
        languages={},
        summary=f"{same:.1%} of queries have the same first answer, {identical:.0%} the same rank",
        details=_paired_details(dataset, old, new),
    )
    return found, rows


def _rows(dataset: Dataset, old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    labelled, key = "texts" not in old, "images" if "texts" not in old else "texts"
    limit = 1 if labelled else MAIN
    rows = []
    for i, (a, b) in enumerate(zip(old[key], new[key], strict=True)):
        sample = dataset.samples[i if labelled else old["owner"][i]]
        rows.append(
            {"id": sample.id, "language": "", "reference": sample.label if labelled else old["flat"][i],
             "before": old["top"][i], "after": new["top"][i], "before_errors": int(a >= limit),
             "after_errors": int(b >= limit), "words": 1, "ranks": [int(a), int(b)]}
        )  # fmt: skip
    return sorted(rows, key=lambda r: (r["before_errors"] - r["after_errors"], r["ranks"][0] - r["ranks"][1]))


def dual_rate(dataset: Dataset, found: Vectors, decode: Any = None, language: Any = None) -> dict[str, Any]:
    """The metric of one set of vectors, with the 95 % interval of a bootstrap over pictures.

    Returns:
        'metric', 'value', 'low', 'high', 'n', 'languages', 'details'.
    """
    _check(dataset)
    ranks = _ranks(dataset, found)
    missed, count = _misses(dataset, ranks)
    paired = paired_bootstrap([0] * dataset.n, missed, count)
    return {
        "metric": _name(dataset), "value": paired.after, "low": paired.low, "high": paired.high, "n": paired.n,
        "languages": {}, "details": _details(dataset, ranks),
    }  # fmt: skip


def frozen_rate(dataset: Dataset, found: Vectors, decode: Callable[[int], str], language: Any = None) -> dict[str, Any]:
    """Top-1 error of frozen classes: answers are one row of scores each, `decode` names a class by its number.

    Raises:
        DataError: a picture without a label, or with one that is none of the classes.
    """
    scores = np.array([row for (row,) in found])
    number = {decode(i): i for i in range(scores.shape[1])}
    strange = [s.id for s in dataset.samples if s.label not in number]
    if strange:
        raise DataError(
            f"{dataset.source}: {len(strange)} {_noun(dataset)}s have no label that the bundle knows, first {strange[0]}. Its "
            f"classes: {', '.join(number)}."
        )
    right = np.arange(scores.shape[1]) == np.array([number[s.label or ""] for s in dataset.samples])[:, None]
    ranks = first_right(scores, right)
    paired = paired_bootstrap([0] * dataset.n, (ranks >= 1).astype(int), [1] * dataset.n)
    return {
        "metric": "top-1 error", "value": paired.after, "low": paired.low, "high": paired.high, "n": paired.n,
        "languages": {}, "details": _details(dataset, {"images": ranks}),
    }  # fmt: skip


def _speech_rate(dataset: Dataset, found: Sequence[Sequence[int]], decode: Any, language: Sequence[str]) -> Any:
    return rate(dataset, [decode(ids) for ids in found], language)


# task -> (compare two sets of answers, rate one)
SCORES: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "speech-to-text": (quality, _speech_rate),
    "image-text": (dual_quality, dual_rate),
    "image-classes": (dual_quality, frozen_rate),
    "audio-text": (dual_quality, dual_rate),
    "audio-classes": (dual_quality, frozen_rate),
}
