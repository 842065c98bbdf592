"""Choosing what stays of a vocabulary: budgets, coverage, expected use, and what falls back."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from packlight.errors import DataError, PlanError
from packlight.vocabulary import Usage, choose, read_vocabulary
from packlight.vocabulary_rewrite import decode_ids, encode_ids, remap_ids, remap_settings, rewrite
from packlight.vocabulary_usage import _smooth, fallback, measure_usage, read_texts, texts_sha256
from vocabularies import STAMPS, pruned, rows_of, sentences

# Choosing -----------------------------------------------------------------------------------------------------------


def usage_of(vocabulary, counts: dict[int, float]) -> Usage:
    weights = np.full(vocabulary.rows, 1e-9)
    for i, count in counts.items():
        weights[i] = count
    return Usage(weights / weights.sum(), weights > 1e-9)


def test_a_budget_keeps_the_most_used_and_their_pieces(small: str) -> None:
    vocabulary = read_vocabulary(small, rows_of(small))
    leaves = [
        i for i in vocabulary.merged if not any(i in pair for pairs in vocabulary.merged.values() for pair in pairs)
    ]
    wanted = leaves[::7][:12]
    usage = usage_of(vocabulary, {i: 100.0 + n for n, i in enumerate(wanted)})
    need = vocabulary.closure(vocabulary.fixed | set(wanted))
    kept = choose(vocabulary, usage, size=len(need))
    assert set(kept.ids) == need == set(choose(vocabulary, usage).ids)
    fewer = choose(vocabulary, usage, size=len(need) - 1)  # one must go: the least used
    assert set(fewer.ids) == need - {wanted[0]}
    assert list(fewer.ids) == sorted(fewer.ids)
    assert fewer.covered == pytest.approx(1 - 100.0 / sum(range(100, 112)), abs=1e-6)


@pytest.mark.parametrize("size", [350, 500, 800])
def test_choices_are_closed_hold_what_must_stay_and_grow_with_the_budget(small: str, size: int) -> None:
    rows = rows_of(small)
    vocabulary = read_vocabulary(small, rows)
    usage = measure_usage(small, rows, texts=sentences(200, 2))
    always = [880, 890]
    kept = choose(vocabulary, usage, size=size, always=always)
    ids = set(kept.ids)
    assert len(ids) == size and vocabulary.closure(ids) == ids >= vocabulary.fixed | set(always)
    assert set(range(rows - STAMPS, rows)) <= ids
    assert kept.weights.sum() == pytest.approx(1) and len(kept.weights) == size
    assert ids <= set(choose(vocabulary, usage, size=size + 50, always=always).ids)
    assert kept.covered == pytest.approx(sum(usage.weights[i] for i in ids))


@pytest.mark.parametrize("coverage", [0.8, 0.95, 0.99])
def test_a_coverage_is_met_with_no_token_too_many(small: str, coverage: float) -> None:
    vocabulary, usage = read_vocabulary(small), measure_usage(small, texts=sentences(200, 2))
    kept = choose(vocabulary, usage, coverage=coverage)
    fewer = choose(vocabulary, usage, size=len(kept.ids) - 1)
    assert fewer.covered < coverage <= kept.covered


def test_choosing_more_useful_tokens_makes_fewer_words_fall_back(small: str) -> None:
    texts = sentences(300, 6)
    shares = []
    for size in (300, 500, 700):
        old, _, made = pruned(small, sentences(200, 2), size)
        shares.append(fallback(old.to_str(), made.tokenizer_json, made.old_to_new, texts).word_share)
    assert shares[0] > shares[1] > shares[2]


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"size": 100}, "too small"),
        ({"size": 400, "coverage": 0.9}, "not both"),
        ({"coverage": 0.0}, "above 0"),
        ({"coverage": 1.5}, "up to 1"),
        ({"always": [10_000]}, "10000"),
    ],
)
def test_impossible_choices_are_refused(small: str, limits: dict, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        choose(read_vocabulary(small), measure_usage(small), **limits)


def test_a_table_with_fewer_rows_than_ids_is_refused(small: str) -> None:
    with pytest.raises(PlanError, match="rows"):
        read_vocabulary(small, 300)


# Usage --------------------------------------------------------------------------------------------------------------


def test_smoothing_gives_the_unseen_the_share_of_what_was_seen_once() -> None:
    counts = np.array([50.0, 30, 1, 1, 1, 17, 0, 0, 0])
    base = np.array([1, 1, 1, 1, 1, 1, 1, 2, 3]) / 12
    found = _smooth(counts, base)
    assert found.sum() == pytest.approx(1) and (found > 0).all()
    assert found[6:].sum() == pytest.approx((3 + 1) / (100 + 2))
    assert found[8] == pytest.approx(3 * found[6])
    assert found[0] / found[1] == pytest.approx(5 / 3)


def test_smoothing_predicts_the_share_of_new_words() -> None:
    """On draws from a known law, the probability given to unseen outcomes is about what they really have."""
    rng = np.random.default_rng(0)
    law = 1 / np.arange(1, 3001)
    law /= law.sum()
    errors = []
    for _ in range(20):
        counts = np.bincount(rng.choice(3000, 2000, p=law), minlength=3000).astype(float)
        unseen = counts == 0
        errors.append(_smooth(counts, np.full(3000, 1 / 3000))[unseen].sum() / law[unseen].sum() - 1)
    assert abs(np.mean(errors)) < 0.05


def test_usage_counts_texts_and_own_words(small: str) -> None:
    rows = rows_of(small)
    for sources in ({}, {"texts": sentences(50, 2)}, {"words": [[300, 301], [301]]}, {"texts": [" a"], "words": [[5]]}):
        usage = measure_usage(small, rows, **sources)
        assert usage.weights.sum() == pytest.approx(1) and (usage.weights > 0).all() and len(usage.weights) == rows
    assert not measure_usage(small, rows).seen.any()
    usage = measure_usage(small, rows, words=[[300, 301], [301]])
    assert set(np.flatnonzero(usage.seen)) == {300, 301}
    assert usage.weights[301] == pytest.approx(2 * usage.weights[300])
    with pytest.raises(PlanError, match="beyond"):
        measure_usage(small, rows, words=[[rows]])


def test_usage_follows_the_frequency_of_a_text(small: str) -> None:
    texts = sentences(500, 2)
    true = Counter(i for text in texts for i in Tokenizer.from_str(small).encode(text, add_special_tokens=False).ids)
    usage = measure_usage(small, texts=texts)
    frequent = [i for i, n in true.items() if n > 30]
    shares = np.array([true[i] for i in frequent]) / true.total()
    assert len(frequent) > 20
    np.testing.assert_allclose(usage.weights[frequent], shares, rtol=0.25)


def test_a_language_orders_the_tokens_as_it_is_spoken(real: str) -> None:
    pytest.importorskip("wordfreq")
    old = Tokenizer.from_str(real)
    usage = measure_usage(real, 51864, languages=["en"])

    def weight(text: str) -> float:
        (i,) = old.encode(text, add_special_tokens=False).ids
        return float(usage.weights[i])

    assert weight(" the") > weight(" people") > weight(" kangaroo") if len(old.encode(" kangaroo").ids) == 1 else True
    assert weight(" the") > weight(" The") > weight("The")
    assert weight(" London") > 10 * weight("London")
    assert usage.weights.sum() == pytest.approx(1)
    with pytest.raises(DataError, match="'xx'"):
        measure_usage(real, 51864, languages=["xx"])


def test_a_missing_package_says_what_to_install(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from packlight.errors import RuntimeMissing

    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(RuntimeMissing, match="pip install"):
        measure_usage(small, languages=["en"])


def test_texts_are_read_from_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    (tmp_path / "b" / "c.txt").write_text("drei", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    assert read_texts(tmp_path) == ["one", "two", "drei"]
    assert texts_sha256(["ab", "c"]) != texts_sha256(["a", "bc"])
    (tmp_path / "b" / "c.txt").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError):
            read_texts(path)


# Falling back -------------------------------------------------------------------------------------------------------


def test_fallback_counts_words_and_tokens() -> None:
    """Planted: of three words one lost its token, which falls back to two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*alphabet, "ab", "cd"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    old = tokenizer.to_str()
    made = rewrite(old, [*range(256), 257])
    found = fallback(old, made.tokenizer_json, made.old_to_new, ["ab-cd!", "cd"])
    assert (found.words, found.broken, found.tokens, found.lost, found.after) == (3, 1, 5, 1, 6)
    assert found.word_share == pytest.approx(1 / 3) and found.more_tokens == pytest.approx(1 / 5)


# Ids elsewhere ------------------------------------------------------------------------------------------------------


def test_settings_get_new_ids() -> None:
    settings = {
        "suppress_tokens": [1, 2, 7], "begin_suppress_tokens": [2], "no_timestamps_token_id": 9, "is_multilingual": True,
        "decoder_start_token_id": 8, "eos_token_id": 7, "lang_to_id": {"en": 10}, "task_to_id": {"transcribe": 11},
        "max_initial_timestamp_index": 50, "pad_token_id": None, "forced_decoder_ids": [[1, 10], [2, None]],
    }  # fmt: skip
    new = {old: n for n, old in enumerate([1, 7, 8, 9, 10, 11])}
    assert remap_settings(settings, new) == {
        "suppress_tokens": [0, 1], "begin_suppress_tokens": [], "no_timestamps_token_id": 3, "is_multilingual": True,
        "decoder_start_token_id": 2, "eos_token_id": 1, "lang_to_id": {"en": 4}, "task_to_id": {"transcribe": 5},
        "max_initial_timestamp_index": 50, "pad_token_id": None, "forced_decoder_ids": [[1, 4], [2, None]],
    }  # fmt: skip
    for gone in (7, 10):
        with pytest.raises(PlanError, match=r"'(eos_token_id|lang_to_id)'.*pruned"):
            remap_settings(settings, {old: n for old, n in new.items() if old != gone})
    assert remap_ids([7, 1], new) == [1, 0]
    with pytest.raises(PlanError, match="first 2"):
        remap_ids([1, 2], new)


@pytest.mark.parametrize("rows", [1, 8, 9, 51864])
def test_ids_survive_a_plan(rows: int) -> None:
    ids = tuple(sorted(random.Random(rows).sample(range(rows), max(1, rows // 3))))
    text = encode_ids(ids, rows)
    assert decode_ids(json.loads(json.dumps(text))) == (ids, rows)
    assert len(text) <= 1.25 * rows / 8 + 12


@pytest.mark.parametrize("text", ["", "12", "x:oB", "-1:", "20:oB", "12:o B", "3:oB", "12:00", "0:", "12:\n"])
def test_damaged_ids_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="damaged"):
        decode_ids(text)
