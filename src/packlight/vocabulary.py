"""Fewer tokens in a vocabulary: which ones may go, and the tokenizer.json without them. No torch, no model.

The smaller tokenizer is exact on covered text: where the old one gives only kept tokens, both give the same ones. For
BPE that holds because every kept token keeps the pieces it is merged from, down to single bytes. On such text each
merge that the old tokenizer makes is then still there, still in the same order, and no new one comes between. Any
other text falls back to smaller pieces, at worst to bytes, and decodes to the same string. WordPiece is exact likewise;
Unigram too, but where two segmentations have the very same score, either may be taken.

New ids are consecutive in the old order, so what relies on the order of ids (text before the end token, timestamps
last and consecutive) goes on to hold.

Papers: Abdaoui et al. 2020, Load What You Need, arXiv 2010.05609 (a table with the rows that a language needs);
Purason et al. 2025, arXiv 2512.03989 (taking leaves of the tree of merges). Different here: tokens that the model
itself wrote can be held fast, and the frequencies are smoothed, so that unseen tokens have an order too.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from packlight.errors import PlanError

Floats = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Vocabulary:
    """What pruning must know of a tokenizer.json.

    Args:
        tokens: token -> id, of the model inside the tokenizer.
        merged: id -> the pairs of ids that merge into it, first merge first; empty unless the model is a BPE.
        fixed: ids that never go: tokens that are not made of others (bytes, characters), added tokens, ids that the
            tokenizer does not name (Whisper's timestamps, where the tokenizer leaves them out), and their pieces.
        rows: rows of the model's table, at least as many as there are ids.
        sha256: of tokens and ids, the identity of the vocabulary.
    """

    tokens: Mapping[str, int]
    merged: Mapping[int, Sequence[tuple[int, int]]]
    fixed: frozenset[int]
    rows: int
    sha256: str

    def closure(self, ids: Iterable[int]) -> set[int]:
        """These ids and every piece they are merged from, down to what is not merged."""
        found: set[int] = set()
        stack = list(ids)
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                stack.extend(piece for pair in self.merged.get(i, ()) for piece in pair)
        return found


@dataclass(frozen=True)
class Usage:
    """How often each token is expected, and which ones were ever met.

    Args:
        weights: float64 [rows], sums to 1, above 0 everywhere.
        seen: bool [rows], whether a text, a language's word list or the model itself used the token.
    """

    weights: Floats
    seen: Flags


@dataclass(frozen=True)
class Kept:
    """The tokens that stay.

    Args:
        ids: old ids, ascending; a token's place here is its new id.
        rows: rows of the old table.
        weights: float64 [len(ids)], sums to 1: how often each kept token is expected once the others are gone.
        covered: share of expected tokens that are kept; the rest falls back to smaller pieces.
        sha256: of the vocabulary they were chosen from.
    """

    ids: tuple[int, ...]
    rows: int
    weights: Floats
    covered: float
    sha256: str


# Reading ------------------------------------------------------------------------------------------------------------


def read_vocabulary(tokenizer_json: str, rows: int = 0) -> Vocabulary:
    """Read a tokenizer.json for pruning.

    Args:
        tokenizer_json: the text of the file.
        rows: rows of the model's table; 0 for as many as the tokenizer names.

    Raises:
        PlanError: a kind that can't be pruned exactly, a damaged file, more ids than rows.
    """
    values = parsed(tokenizer_json)
    model = values["model"]
    kind = model.get("type", "BPE" if "merges" in model else "")
    if kind not in ("BPE", "WordPiece", "Unigram"):
        raise PlanError(
            f"This tokenizer is of the type {kind or 'unknown'}; a vocabulary is pruned for BPE, WordPiece and "
            "Unigram. Leave out the step that prunes it."
        )
    tokens = _tokens(model)
    merged = _merges(model, tokens) if kind == "BPE" else {}
    added = {entry["content"]: int(entry["id"]) for entry in values.get("added_tokens") or ()}
    fixed = set(tokens.values()) - set(merged) if kind == "BPE" else _characters(model, kind, tokens, added)
    named = set(tokens.values()) | set(added.values())
    least = max(named, default=-1) + 1
    if rows and rows < least:
        raise PlanError(f"The tokenizer has ids up to {least - 1}, the model's table {rows} rows: they don't belong.")
    rows = rows or least
    fixed |= set(added.values()) | (set(range(rows)) - named)
    identity = json.dumps(sorted({**tokens, **added}.items(), key=lambda entry: (entry[1], entry[0])))
    bare = Vocabulary(tokens, merged, frozenset(), rows, hashlib.sha256(identity.encode()).hexdigest())
    return Vocabulary(tokens, merged, frozenset(bare.closure(fixed)), rows, bare.sha256)


def parsed(tokenizer_json: str) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises PlanError when it is none."""
    try:
        values = json.loads(tokenizer_json)
    except json.JSONDecodeError as error:
        raise PlanError(f"The model's tokenizer.json is no readable JSON ({error}). Get the model again.") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict) or "vocab" not in values["model"]:
        raise PlanError("The model's tokenizer.json holds no 'model' with a 'vocab'. Get the model again.")
    return values


def _tokens(model: dict[str, Any]) -> dict[str, int]:
    if isinstance(model["vocab"], list):  # Unigram: [piece, score], the id is the place
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _merges(model: dict[str, Any], tokens: Mapping[str, int]) -> dict[int, list[tuple[int, int]]]:
    """Id -> the pairs that merge into it. A token may be reached by several merges."""
    found: dict[int, list[tuple[int, int]]] = {}
    for entry in model["merges"]:
        left, right, product = merge_of(entry, model)
        if not {left, right, product} <= tokens.keys():
            raise PlanError(f"The tokenizer merges {left!r} and {right!r}, but not all three tokens have an id.")
        found.setdefault(tokens[product], []).append((tokens[left], tokens[right]))
    return found


def merge_of(entry: str | Sequence[str], model: dict[str, Any]) -> tuple[str, str, str]:
    """(left, right, product) of an entry of a BPE's merges, in either way of writing it."""
    left, right = entry.split(" ") if isinstance(entry, str) else entry
    return left, right, left + right[len(model.get("continuing_subword_prefix") or "") :]


def _characters(model: dict[str, Any], kind: str, tokens: Mapping[str, int], added: Mapping[str, int]) -> set[int]:
    """Ids of what text falls back to: single characters, bytes, the unknown token, and what these can't spell."""
    prefix = str(model.get("continuing_subword_prefix") or "") if kind == "WordPiece" else ""
    unknown = model.get("unk_id") if kind == "Unigram" else tokens.get(str(model.get("unk_token")))
    fixed = set() if unknown is None else {int(unknown)}
    for token, i in tokens.items():
        if token in added or i in fixed:  # found as a whole, or never in a text
            continue
        inner = bool(prefix) and token.startswith(prefix) and token != prefix
        letters = token[len(prefix) :] if inner else token
        spelled = [prefix + c if n or inner else c for n, c in enumerate(letters)]
        if len(letters) == 1 or (kind == "Unigram" and token.startswith("<0x") and token.endswith(">")):
            fixed.add(i)
        elif not all(piece in tokens for piece in spelled):
            if kind == "WordPiece":  # which takes the longest match first, and might run into such a character
                lost = next(piece for piece in spelled if piece not in tokens)
                raise PlanError(
                    f"The tokenizer knows {token!r} but not {lost!r}, so words could become unknown. Leave out the "
                    "step that prunes the vocabulary."
                )
            fixed.add(i)
    return fixed


# Choosing -----------------------------------------------------------------------------------------------------------


def choose(
    vocabulary: Vocabulary,
    usage: Usage,
    *,
    size: int | None = None,
    coverage: float | None = None,
    always: Iterable[int] = (),
) -> Kept:
    """Choose the tokens that stay: the most useful ones up to a number, enough for a coverage, or all that were seen.

    One token goes after the other, the least used first, never one that a kept token is merged from.

    Args:
        vocabulary: of the model.
        usage: of its tokens.
        size: how many tokens stay, added tokens and bytes included.
        coverage: the least share of expected tokens that stay, above 0 and up to 1.
        always: ids that stay whatever their use, e.g. those in the model's own transcripts.

    Raises:
        PlanError: both limits, one out of range, a size below what must stay, an id that is none.
    """
    if size is not None and coverage is not None:
        raise PlanError("Give a size or a coverage of the vocabulary, not both.")
    if coverage is not None and not 0 < coverage <= 1:
        raise PlanError(f"The coverage of the vocabulary is {coverage}; it must lie above 0 and up to 1.")
    always = set(always)
    if wrong := sorted(i for i in always if not 0 <= i < vocabulary.rows):
        raise PlanError(f"The ids to keep hold {wrong[0]}; the vocabulary has {vocabulary.rows} rows.")
    pinned = vocabulary.closure(vocabulary.fixed | always)
    if size is not None and size < len(pinned):
        raise PlanError(
            f"A vocabulary of {size} tokens is too small: {len(pinned)} must stay, the bytes, the special tokens and "
            "those of the model's own words. Give a larger size."
        )
    if size is None and coverage is None:
        pinned = vocabulary.closure(pinned | {int(i) for i in np.flatnonzero(usage.seen)})
        size = len(pinned)
    allowed = np.inf if coverage is None else 1 - coverage
    weights, stay = _take_leaves(vocabulary, usage.weights, pinned, size or 0, allowed)
    ids = np.flatnonzero(stay)
    return Kept(
        ids=tuple(ids.tolist()),
        rows=vocabulary.rows,
        weights=weights[ids] / weights[ids].sum(),
        covered=float(usage.weights[ids].sum()),
        sha256=vocabulary.sha256,
    )


def _take_leaves(
    vocabulary: Vocabulary, expected: Floats, pinned: set[int], size: int, allowed: float
) -> tuple[Floats, Flags]:
    """Take the least used leaf of the tree of merges until `size` are left or more than `allowed` would be lost.

    A leaf is a token that no other is merged from. A tie takes the later merge. Leaves go by the weight they have
    themselves: counting in what their lost offspring leaves to them kept pieces of rare words in the place of words
    (measured on transcripts that had no part in choosing: 0.3 to 2 points more words fell back).

    Returns:
        (weights that the tokens end with, since a leaf that goes leaves its own to its two pieces; which ones stay).
    """
    weights = expected.astype(np.float64)
    stay = np.ones(vocabulary.rows, bool)
    children = np.zeros(vocabulary.rows, np.int64)
    pieces_of = {i: {piece for pair in pairs for piece in pair} for i, pairs in vocabulary.merged.items()}
    for pieces in pieces_of.values():
        for piece in pieces:
            children[piece] += 1
    heap = [(expected[i], -i) for i in range(vocabulary.rows) if i not in pinned and not children[i]]
    heapq.heapify(heap)
    left, lost = vocabulary.rows, 0.0
    while heap and left > size:
        _, minus = heapq.heappop(heap)
        leaf = -minus
        lost += expected[leaf]
        if lost > allowed + 1e-12:
            break
        stay[leaf] = False
        left -= 1
        for piece in vocabulary.merged.get(leaf, ((),))[0]:
            weights[piece] += weights[leaf]
        for piece in pieces_of.get(leaf, ()):
            children[piece] -= 1
            if not children[piece] and piece not in pinned:
                heapq.heappush(heap, (expected[piece], -piece))
    return weights, stay
