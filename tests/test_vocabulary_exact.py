"""Pruned vocabularies: exact where they must be, whole where they fall back, refused where something is missing."""

import json
import math
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from packlight.errors import PlanError
from packlight.vocabulary import choose, read_vocabulary
from packlight.vocabulary_rewrite import rewrite
from packlight.vocabulary_usage import measure_usage
from vocabularies import SPECIALS, STAMPS, check_exact, pruned, rows_of, sentences

# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 400, 600])
def test_covered_text_keeps_its_tokens_and_other_text_its_letters(small: str, size: int | None) -> None:
    old, new, made = pruned(small, sentences(40, 2), size)
    texts = sentences(400, 3)
    covered = check_exact(old, new, made, texts)
    assert 0 < covered < 2 * len(texts)  # both cases were met


def test_the_texts_that_chose_the_tokens_are_covered(small: str) -> None:
    texts = sentences(30, 4)
    old, new, made = pruned(small, texts)
    assert len(made.ids) < rows_of(small)
    assert check_exact(old, new, made, texts) == 2 * len(texts)


def test_whisper_is_exact_on_covered_text(real: str) -> None:
    texts = [
        " He hoped there would be stew for dinner, turnips and carrots and bruised potatoes.",
        " It's 12:30 on the 4th of July, 1776; we'll meet at Victoria Station!",
        ' NASA said: "No comment." -- Naïve café, 100% übercool?',
    ]
    old, new, made = pruned(real, texts)
    assert len(made.ids) < 2600
    assert check_exact(old, new, made, texts) == 2 * len(texts)
    others = [" Kangaroos hop over the Nürburgring.", " 你好,世界", "\x00\x07\t", " 🦘🇦🇺", " don't" * 5, ""]
    check_exact(old, new, made, others)


def test_random_choices_of_whisper_tokens_are_exact(real: str) -> None:
    vocabulary, draw = read_vocabulary(real, 51864), random.Random(0)
    old = Tokenizer.from_str(real)
    words = [t.replace("Ġ", " ") for t in vocabulary.tokens if t.isascii() or t.startswith("Ġ")]
    kept = vocabulary.closure(vocabulary.fixed | set(draw.sample(range(50256), 6000)))
    made = rewrite(real, sorted(kept), 51864)
    new = Tokenizer.from_str(made.tokenizer_json)
    texts = ["".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(1500)]
    covered = 0
    for text in texts:
        before, after = old.encode(text).ids, new.encode(text).ids
        back = [made.ids[i] for i in after]
        assert old.decode(back) == old.decode(before) == new.decode(after)
        if set(before) <= kept:
            assert back == before
            covered += 1
    assert 20 < covered < 1480


def test_every_string_of_bytes_still_encodes(small: str) -> None:
    vocabulary = read_vocabulary(small)
    made = rewrite(small, sorted(vocabulary.fixed))
    new, alphabet = Tokenizer.from_str(made.tokenizer_json), set(pre_tokenizers.ByteLevel.alphabet())
    assert len(made.ids) == 256 + len(SPECIALS)
    assert {new.id_to_token(i) for i in range(256)} == alphabet
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(
            chr(draw.choice([draw.randrange(0x80), draw.randrange(0xD800), draw.randrange(0x10000, 0x10FFFF)]))
            for _ in range(9)
        )
        ids = new.encode(text, add_special_tokens=False).ids
        assert len(ids) == len(text.encode()) and new.decode(ids) == text


def test_one_token_fewer_among_the_pieces_is_refused(small: str) -> None:
    vocabulary = read_vocabulary(small)
    kept = vocabulary.closure(vocabulary.fixed | {800, 801})
    pieces = kept - vocabulary.fixed - {800, 801}
    assert pieces
    for piece in pieces:
        with pytest.raises(PlanError, match=f"pieces of kept tokens.* first {piece}"):
            rewrite(small, sorted(kept - {piece}))
    with pytest.raises(PlanError, match="must stay"):
        rewrite(small, sorted(kept - {vocabulary.tokens["a"]}))
    with pytest.raises(PlanError, match="ascend"):
        rewrite(small, sorted(kept, reverse=True))


def test_a_lost_merge_would_be_noticed(small: str) -> None:
    """The checks above have teeth: a tokenizer without the merge of a kept token fails them."""
    texts = sentences(30, 4)
    old, _, made = pruned(small, texts)
    values = json.loads(made.tokenizer_json)
    used = {i for text in texts for i in Tokenizer.from_str(made.tokenizer_json).encode(text).ids}
    words = {i: t for t, i in values["model"]["vocab"].items()}
    lost = next(m for m in values["model"]["merges"] if "".join(m) in {words.get(i) for i in used})
    values["model"]["merges"].remove(lost)
    with pytest.raises(AssertionError):
        check_exact(old, Tokenizer.from_str(json.dumps(values)), made, texts)


def test_a_token_reached_by_two_merges_keeps_the_pieces_of_both() -> None:
    vocab = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc", "d"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]))
    assert read_vocabulary(tokenizer.to_str()).closure({5}) == {0, 1, 2, 3, 4, 5}


def test_merges_written_as_strings_are_read_too(real: str) -> None:
    assert isinstance(json.loads(real)["model"]["merges"][0], str)
    made = rewrite(
        real, sorted(read_vocabulary(real, 51864).closure(range(900)) | read_vocabulary(real, 51864).fixed), 51864
    )
    assert len(json.loads(made.tokenizer_json)["model"]["merges"]) == 900 - 256


# Special tokens -----------------------------------------------------------------------------------------------------


def test_special_tokens_keep_their_meaning_and_order(real: str) -> None:
    old, new, made = pruned(real, [" hello world"], 4000)
    names = [entry["content"] for entry in json.loads(real)["added_tokens"]]
    for name in names:
        assert made.ids[new.token_to_id(name)] == old.token_to_id(name)
    assert new.encode(" hello").tokens == old.encode(" hello").tokens
    assert new.decode(new.encode(" hello world").ids, skip_special_tokens=True) == " hello world"
    # Timestamps, which this tokenizer does not name, follow no_timestamps without a gap, as serving relies on.
    stamps = [made.old_to_new[i] for i in range(50363, 51864)]
    assert stamps == list(range(made.old_to_new[50362] + 1, len(made.ids)))
    assert made.old_to_new[50256] == min(made.old_to_new[old.token_to_id(n)] for n in names)


def test_a_multilingual_layout_keeps_its_empty_token_and_named_timestamps(small: str) -> None:
    values = json.loads(small)
    text = len(values["model"]["vocab"])
    # As openai/whisper-tiny: an empty token after the text, the end token in the vocabulary, timestamps named.
    values["model"]["vocab"] |= {"": text, "<|endoftext|>": text + 1}
    stamps = [f"<|{i * 0.02:.2f}|>" for i in range(30)]
    values["added_tokens"] = [
        {**values["added_tokens"][0], "id": text + 1 + i, "content": name, "special": name in SPECIALS}
        for i, name in enumerate([*SPECIALS, *stamps])
    ]
    for entry in values["post_processor"]["special_tokens"].values():
        entry["ids"] = [next(a["id"] for a in values["added_tokens"] if a["content"] == entry["id"])]
    old, new, made = pruned(json.dumps(values), sentences(20, 2), 450)
    check_exact(old, new, made, sentences(100, 5))
    marked = "<|0.00|> the lotering<|0.24|>"
    assert [made.ids[i] for i in new.encode(marked).ids if i >= new.token_to_id("<|endoftext|>")] == [
        i for i in old.encode(marked).ids if i >= text + 1
    ]
    assert [new.token_to_id(s) for s in stamps] == list(range(450 - 30 - STAMPS, 450 - STAMPS))


# Other kinds of tokenizers ------------------------------------------------------------------------------------------


def clip() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        special_tokens=special,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(3000, 1), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0))
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(sentences(3000, 1), trainer)
    vocabulary = tokenizer.get_vocab()
    letters = sorted({t.removeprefix("##") for t in vocabulary if len(t.removeprefix("##")) == 1})
    for missing in (t for c in letters for t in (c, f"##{c}") if t not in vocabulary):
        vocabulary[missing] = len(vocabulary)
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences(2000, 1), trainer)
    return tokenizer


def score(text: str, ids: list[int]) -> float:
    """Log-probability of a Unigram segmentation, summed exactly so that the order does not matter."""
    return math.fsum(json.loads(text)["model"]["vocab"][i][1] for i in ids)


@pytest.mark.parametrize("make", [clip, bert, unigram])
def test_other_kinds_are_exact_and_never_unknown(make) -> None:
    old = make()
    text, unknown = (
        old.to_str(),
        next(old.token_to_id(t) for t in ("<|endoftext|>", "[UNK]", "<unk>") if old.token_to_id(t) is not None),
    )
    vocabulary = read_vocabulary(text)
    size = (len(vocabulary.fixed) + 2 * vocabulary.rows) // 3
    kept = choose(vocabulary, measure_usage(text, texts=sentences(40, 2)), size=size)
    assert len(kept.ids) == size < vocabulary.rows
    made = rewrite(text, kept.ids)
    new, covered = Tokenizer.from_str(made.tokenizer_json), 0
    for sentence in sentences(300, 3):
        before, after = old.encode(sentence).ids, new.encode(sentence).ids
        back = [made.ids[i] for i in after]
        assert back.count(unknown) == before.count(unknown)
        assert old.decode(back) == old.decode(before) == new.decode(after)
        if set(before) <= set(made.ids):
            # Of two Unigram segmentations with the very same score either may be taken ('. ..' and '.. .').
            assert back == before or (make is unigram and score(text, back) == score(text, before))
            covered += 1
    assert 0 < covered < 300


def test_wordpiece_without_a_piece_for_a_character_is_refused() -> None:
    vocabulary = {t: i for i, t in enumerate(["[UNK]", "a", "b", "ab", "abx", "##b"])}
    text = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).to_str()
    with pytest.raises(PlanError, match="'abx' but not '##x'"):
        read_vocabulary(text)


def test_a_vocabulary_of_whole_words_is_refused() -> None:
    text = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str()
    with pytest.raises(PlanError, match="WordLevel"):
        read_vocabulary(text)
    with pytest.raises(PlanError, match="no readable JSON"):
        read_vocabulary("{")
