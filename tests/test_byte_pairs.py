"""Tokenizers without merges: what is left out comes back, and ids spell the same text."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from packlight.byte_pairs import byte_letters, merges_of, speller, with_merges, without_merges
from small_whisper import save_model

TEXTS = ["Grüße aus 北京, said the otter.", "low lower lowest newer wider 🦦🦦", "  two  spaces\n\tand a tab"] * 20


@pytest.fixture(scope="module")
def learned() -> str:
    """A byte-level tokenizer that was learned from texts, special tokens first added at its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<|0.20|>"])
    return tokenizer.to_str()


def test_merges_come_back(learned: str) -> None:
    short = without_merges(learned)
    assert len(short) < 0.8 * len(json.dumps(json.loads(learned), ensure_ascii=False))
    assert "merges" not in json.loads(short)["model"]
    back, first = json.loads(with_merges(short)), json.loads(learned)
    assert [tuple(m) for m in back["model"]["merges"]] == [tuple(m) for m in first["model"]["merges"]]
    assert back["model"]["vocab"] == first["model"]["vocab"]
    one, other = Tokenizer.from_str(learned), Tokenizer.from_str(with_merges(short))
    assert all(one.encode(text).ids == other.encode(text).ids for text in [*TEXTS, "slower than newest"])


def test_a_merge_is_of_the_parts_that_earlier_merges_leave() -> None:
    assert merges_of(["a", "b", "c", "ab", "bc", "abc"]) == [("a", "b"), ("b", "c"), ("ab", "c")]
    assert merges_of(["a", "b", "c", "bc", "ab", "abc"]) == [("b", "c"), ("a", "b"), ("a", "bc")]


def test_merges_in_another_order_stay() -> None:
    pieces = {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4}
    text = json.dumps({"model": {"type": "BPE", "vocab": pieces, "merges": [["a", "b"], ["ab", "c"]]}})
    assert without_merges(text) == text == with_merges(text)
    words = json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}})
    assert without_merges(words) == words == with_merges(words)


def test_ids_spell_what_the_library_spells(learned: str) -> None:
    spelled, library = speller(without_merges(learned)), Tokenizer.from_str(learned)
    assert spelled is not None
    count, drawn = library.get_vocab_size(), random.Random(0)
    for _ in range(300):  # most of these break characters in two
        ids = [drawn.randrange(count) for _ in range(drawn.randrange(12))]
        assert spelled(ids) == library.decode(ids, skip_special_tokens=True)
    assert spelled(library.encode(TEXTS[0]).ids) == TEXTS[0]
    assert spelled([count + 7]) == ""


def test_the_small_whispers_tokenizer_goes_both_ways(tmp_path: Path) -> None:
    text = (save_model(tmp_path / "model") / "tokenizer.json").read_text()
    assert without_merges(text) != text
    assert json.loads(with_merges(without_merges(text))) == json.loads(text)


def test_numbers_may_have_gaps() -> None:
    text = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 7}}, "decoder": {"type": "ByteLevel"}})
    spelled = speller(without_merges(text))
    assert spelled is not None
    assert spelled([7, 0, 1]) == "ba"


def test_letters_are_those_of_the_library() -> None:
    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_letters().values()) == list(range(256))


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": {"type": "BPE", "vocab": [1, 2]}}', '{"decoder": null}'])
def test_other_texts_are_no_spellers_or_said_to_be_damaged(text: str) -> None:
    if "vocab" in text:
        with pytest.raises(ValueError, match="no texts"):
            with_merges(text)
    else:
        assert speller(text) is None


def test_numbers_far_beyond_the_tokens_are_refused() -> None:
    known = {"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"a": 0, "b": 10**12}}}
    with pytest.raises(ValueError, match="far beyond"):
        speller(json.dumps(known))


def listed(tokens: list[object]) -> str:
    """A tokenizer.json as bundles have it, its tokens a list."""
    known = {"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": tokens}}
    return json.dumps(known, ensure_ascii=False, separators=(",", ":"))


def test_tokens_of_quotes_commas_and_strokes_are_read_one_by_one() -> None:
    tokens = [",", '"', '","', "\\", '\\"', "]", "[", '"vocab":[', "é"]
    spelled = speller(listed(tokens))
    assert spelled is not None
    assert [spelled([i]) for i in range(len(tokens) - 1)] == tokens[:-1]


@pytest.mark.parametrize("tokens", [["a", 1], [["a", 0.5]], ["a", None]])
def test_a_list_of_other_things_is_damaged(tokens: list[object]) -> None:
    with pytest.raises(ValueError, match="no texts"):
        speller(listed(tokens))


def test_a_list_that_breaks_off_is_damaged() -> None:
    text = listed(["a", "b", "c"])
    for end in range(text.index('"a"'), len(text)):
        with pytest.raises(ValueError, match="line 1 column"):
            speller(text[:end])


def test_few_tokens_are_in_memory_at_a_time() -> None:
    text = listed([f"token {i}" for i in range(50_000)])
    tracemalloc.start()
    try:
        speller(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000  # as a list of texts they take 4.3 million
