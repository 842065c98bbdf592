"""Ranks of pictures (or sounds) and texts by the cosine of their vectors, and what is counted from ranks.

Recall@k as in Karpathy and Fei-Fei 2015 (arXiv 1412.2306): the share of queries with a right answer among the first k.
Classes from prompts as in CLIP (Radford et al. 2021, arXiv 2103.00020): a class is the mean of its prompts' vectors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from packlight.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
KS = (1, 5, 10)


def first_right(scores: Array, right: Array) -> Array:
    """The rank of the best right answer of each query, 0 for the first place. Wrong answers win ties.

    Args:
        scores: [queries, answers], higher is better.
        right: [queries, answers] bool, at least one per query.

    Raises:
        DataError: a query without a right answer, or scores that are no numbers.
    """
    if not np.isfinite(scores).all():
        raise DataError("Some scores are no numbers: the model's vectors are NaN or infinite.")
    if not right.any(1).all():
        raise DataError("A query has no right answer, so it has no rank.")
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    return ((scores >= best) & ~right).sum(1)


def right_pairs(texts: Sequence[Sequence[str]]) -> tuple[Array, Array, Array]:
    """Which text is right for which picture: any that it carries, so the same words may be right for several.

    Words that several pictures carry are one text: asked again they would get the same answer, and a series of thirty
    drawings under one title would count thirty times.

    Args:
        texts: of each picture.

    Returns:
        ([pictures, distinct texts] bool, [distinct texts] where each first stands among all texts one after the other,
        [distinct texts] the picture that brought it).
    """
    flat = [text for own in texts for text in own]
    owner = np.array([i for i, own in enumerate(texts) for _ in own], dtype=np.int64)
    places = {text: i for i, text in reversed(list(enumerate(flat)))}
    first = np.array(sorted(places.values()), dtype=np.int64)
    kept = [set(own) for own in texts]
    return np.array([[flat[i] in own for i in first] for own in kept], dtype=bool), first, owner[first]


def recall(ranks: Array, k: int) -> float:
    """The share of ranks among the first k."""
    return float((ranks < k).mean())


def unit(vectors: Array) -> Array:
    """Rows at length 1; rows of zeros stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def class_vectors(prompts: Sequence[Array]) -> Array:
    """One vector per class [classes, d] from the vectors of its prompts [prompts, d]: their mean at length 1."""
    return unit(np.stack([unit(p).mean(0) for p in prompts]))


def retrieval_ranks(images: Array, texts: Array, right: Array) -> tuple[Array, Array]:
    """Ranks both ways: ([texts] of a right picture for each text, [pictures] of a right text for each picture).

    Args:
        images: [pictures, d].
        texts: [distinct texts, d].
        right: from `right_pairs`.
    """
    scores = unit(images) @ unit(texts).T
    return first_right(scores.T, right.T), first_right(scores, right)


def class_ranks(images: Array, classes: Array, truth: Array) -> Array:
    """The rank of each picture's own class.

    Args:
        images: [pictures, d].
        classes: [classes, d].
        truth: [pictures] numbers of classes.
    """
    right = np.zeros((len(images), len(classes)), dtype=bool)
    right[np.arange(len(images)), truth] = True
    return first_right(unit(images) @ unit(classes).T, right)
