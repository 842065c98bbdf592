"""Error rates, their paired intervals, agreement of tokens."""

import sys
from collections.abc import Callable

import numpy as np
import pytest

from packlight.errors import DataError, RuntimeMissing
from packlight.metrics import (
    Paired,
    chinese_digits,
    error_counts,
    metric_name,
    normalize,
    paired_bootstrap,
    token_agreement,
    word_error_rate,
)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("  Mr. Smith paid $20 million!", "en", "mister smith paid $20000000"),
        ("She's in the theatre, isn't she?", "english", "she is in the theater is not she"),
        ("twenty one colours", "en-US", "21 colors"),
        ("twenty one colours", "de", "twenty one colours"),
        ("twenty one colours", None, "twenty one colours"),
        ("Ça va, l'ÉTÉ ?", "fr", "ça va l été"),
        ("東京タワー。", "ja", "東 京 タ ワ ー"),
        ("東京タワー。", "de", "東京タワー"),
        ("你好 ABC", "zh", "你 好 a b c"),
        ("?!", "en", ""),
        ("", "zh", ""),
    ],
)
def test_normalize_gives_the_scored_form(text: str, language: str | None, expected: str) -> None:
    assert normalize(text, language) == expected


@pytest.mark.parametrize("language", ["zh", "zh-TW", "zh_CN", "chinese", "cmn_hans_cn", "ZH"])
def test_normalize_makes_chinese_simplified_whatever_the_language_is_called(language: str) -> None:
    assert normalize("今天，天氣很好！", language) == "今 天 天 气 很 好"
    assert metric_name(language) == "CER"


def test_normalize_leaves_cantonese_traditional() -> None:
    assert normalize("天氣", "yue") == "天 氣"


def test_normalize_agrees_with_the_whisper_normaliser_but_for_spaces() -> None:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    text = "Well -- [noise] I've 3,000 reasons (laughs); don't you?  Naïve!"
    assert normalize(text, "en").split() == EnglishTextNormalizer()(text).split()
    assert normalize(text, "sv").split() == BasicTextNormalizer()(text).split()


def test_normalize_builds_its_normaliser_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = normalize("colour", "en")
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    assert normalize("colour", "en") == first == "color"


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("en", "WER"),
        ("de", "WER"),
        ("ko", "WER"),
        (None, "WER"),
        ("zh", "CER"),
        ("ja", "CER"),
        ("th", "CER"),
        ("my", "CER"),
    ],
)
def test_metric_name_tells_characters_from_words(language: str | None, name: str) -> None:
    assert metric_name(language) == name


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", (0, 6)),
        ("the cat sat on the mat", "a cat sat the mat too", (3, 6)),  # one of each: S, D, I
        ("the cat", "", (2, 2)),
        ("", "the cat", (2, 0)),
        ("", "", (0, 0)),
        ("a b c d", "b c d a", (2, 4)),
        ("i", "I", (1, 1)),
        ("今 天 天 气", "今 天 天 汽", (1, 4)),
    ],
)
def test_error_counts_match_hand_counts(reference: str, hypothesis: str, expected: tuple[int, int]) -> None:
    assert error_counts(reference, hypothesis) == expected
    assert error_counts(reference.split(), hypothesis.split()) == expected


def test_error_counts_agree_with_jiwer() -> None:
    import jiwer

    generator = np.random.default_rng(1)
    vocabulary = np.array(["a", "b", "the", "cat", "sat", "mat"])
    for _ in range(50):
        reference, hypothesis = (" ".join(generator.choice(vocabulary, size=n)) for n in generator.integers(1, 15, 2))
        found = jiwer.process_words(reference, hypothesis)
        edits = found.substitutions + found.deletions + found.insertions
        assert error_counts(reference, hypothesis) == (edits, len(reference.split()))


def test_chinese_error_rate_counts_characters_after_simplifying() -> None:
    edits, characters = error_counts(normalize("设定温度", "zh"), normalize("設定，湿度。", "zh"))
    assert (edits, characters) == (1, 4)


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("二十九度", "29度"),
        ("设定二十九度", "設定29度。"),
        ("二零二三年", "2023年"),
        ("两千零二十三个", "2023個"),
        ("一万五", "15000"),
        ("三万五千", "3万5千"),
        ("三百零五", "305"),
        ("一千零一夜", "1001夜"),
        ("十五", "１５"),
        ("百分之三十", "30%"),
        ("三点一四", "3.14"),
        ("三点二十分", "3点20分"),
        ("一点五亿", "1.5亿"),
        ("一亿两千万", "120000000"),
        ("十万", "100000"),
        ("幺三八零零", "13800"),
    ],
)
def test_chinese_numerals_count_the_same_however_they_are_written(said: str, written: str) -> None:
    assert normalize(said, "zh") == normalize(written, "zh")
    assert normalize(said, "ja") != normalize(written, "ja")  # only Chinese is read so


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("百货千万", "百货千万"),
        ("三四百人", "34百人"),
        ("统一", "统1"),
        ("007", "007"),
        ("2万5", "25000"),
        ("三百五", "350"),
        ("abc 12.5", "abc 12.5"),
        ("万一", "万1"),
        ("1.23456万", "12345.6"),
    ],
)
def test_chinese_digits_keep_what_is_no_number(text: str, expected: str) -> None:
    assert chinese_digits(text) == expected


def test_metric_of_several_languages_says_both() -> None:
    assert metric_name("en", "de") == "WER"
    assert metric_name("zh", "ja") == "CER"
    assert metric_name("en", "zh") == "WER/CER"


def test_word_error_rate_is_that_of_the_corpus_not_the_mean_of_rates() -> None:
    assert word_error_rate([1, 0], [1, 9]) == pytest.approx(0.1)
    assert word_error_rate([3, 2, 0], [1, 0, 1]) == pytest.approx(2.5)


def test_word_error_rate_refuses_when_there_are_no_words() -> None:
    with pytest.raises(DataError, match=r"The 2 reference transcripts hold no words.*Evaluate on samples with"):
        word_error_rate([3, 0], [0, 0])
    with pytest.raises(DataError, match="hold no words"):
        word_error_rate([], [])


def test_word_error_rate_refuses_different_lengths() -> None:
    with pytest.raises(DataError, match="edits of 1 samples but words of 2"):
        word_error_rate([3], [1, 1])


ERRORS = np.array([3, 0, 1, 5, 2, 0, 4, 1])
WORDS = np.array([10, 4, 12, 9, 7, 3, 20, 6])


def test_paired_bootstrap_is_positive_when_the_second_system_is_worse() -> None:
    worse = paired_bootstrap(ERRORS, ERRORS + 1, WORDS, resamples=500)
    assert worse.before == pytest.approx(16 / 71)
    assert worse.after == pytest.approx(24 / 71)
    assert worse.difference == pytest.approx(8 / 71)
    assert 0 < worse.low <= worse.difference <= worse.high
    assert (worse.n, worse.level, worse.resamples) == (8, 0.95, 500)
    better = paired_bootstrap(ERRORS + 1, ERRORS, WORDS, resamples=500)
    assert (better.difference, better.low, better.high) == pytest.approx((-worse.difference, -worse.high, -worse.low))


def test_paired_bootstrap_collapses_to_zero_when_both_are_equal() -> None:
    same = paired_bootstrap(ERRORS, ERRORS, WORDS)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_paired_bootstrap_collapses_when_every_utterance_worsens_alike() -> None:
    # Proportional to the words: only an unpaired or unweighted bootstrap would still see spread.
    found = paired_bootstrap(ERRORS, ERRORS + 0.5 * WORDS, WORDS, resamples=300)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


def test_paired_bootstrap_is_deterministic_and_follows_its_seed() -> None:
    after = ERRORS[::-1].copy()
    first = paired_bootstrap(ERRORS, after, WORDS, resamples=200, seed=3)
    assert first == paired_bootstrap(ERRORS, after, WORDS, resamples=200, seed=3)
    assert first != paired_bootstrap(ERRORS, after, WORDS, resamples=200, seed=4)


def test_paired_bootstrap_does_not_depend_on_the_order_of_samples() -> None:
    after = np.array([2, 1, 1, 6, 0, 0, 5, 3])
    order = np.random.default_rng(0).permutation(8)
    shuffled = paired_bootstrap(ERRORS[order], after[order], WORDS[order], resamples=300)
    assert shuffled == paired_bootstrap(ERRORS, after, WORDS, resamples=300)


def test_paired_bootstrap_gives_a_degenerate_interval_when_there_is_one_sample() -> None:
    assert paired_bootstrap([2], [3], [10], resamples=50) == Paired(0.2, 0.3, 0.1, 0.1, 0.1, 1, 0.95, 50)


def test_paired_bootstrap_leaves_out_resamples_without_words() -> None:
    found = paired_bootstrap([0, 0], [1, 2], [0, 10], resamples=400)
    assert found.difference == pytest.approx(0.3)
    assert np.isfinite([found.low, found.high]).all()
    assert (found.low, found.high) == pytest.approx((0.2, 0.3))


def test_paired_bootstrap_draws_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paired_bootstrap(ERRORS, ERRORS[::-1], WORDS, resamples=101)
    monkeypatch.setattr("packlight.metrics._BLOCK", 80)
    assert paired_bootstrap(ERRORS, ERRORS[::-1], WORDS, resamples=101) == whole


def test_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    truth, covered, widths = 0.03, 0, []
    trials = 300
    for trial in range(trials):
        words = generator.integers(5, 40, 100)
        hard = generator.beta(1, 6, 100)  # what makes an utterance hard for both
        before = generator.binomial(words, hard)
        after = before + generator.binomial(words, truth)
        found = paired_bootstrap(before, after, words, resamples=500, seed=trial)
        covered += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert 0.90 <= covered / trials <= 0.98
    # From theory: the binomial noise of the added errors alone. An unpaired interval is far wider.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(truth * (1 - truth) / (100 * 22)), rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ([1], [1, 2], [3, 4]),
            "both systems on the same samples; got errors of 1 and 2 samples, words of 2",
        ),
        (([[1]], [[1]], [[3]]), "both systems on the same samples"),
        (([], [], []), "no sample to compare"),
        (([1, -1], [1, 1], [3, 3]), "one of them is negative"),
        (([1, 1], [1, float("nan")], [3, 3]), "not a finite number"),
        (([1, 1], [1, 1], [3, float("inf")]), "not a finite number"),
        (([1, 1], [1, 1], [0, 0]), "The 2 reference transcripts hold no words"),
        (([1], [1], [1], 0), "0 resamples give no interval"),
    ],
)
def test_paired_bootstrap_refuses_bad_input(arguments: tuple[list[int], ...], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        paired_bootstrap(*arguments)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], 1.0),
        ([[1, 2, 3, 4]], [[1, 9, 3, 4]], 0.75),
        ([[1, 2, 3, 4]], [[2, 3, 4]], 0.75),  # a shift is one edit, not four
        ([[1, 2], [5] * 8], [[3, 4], [5] * 8], 0.8),  # over the corpus: 1 - 2/10
        ([[1, 2]], [[]], 0.0),
        ([[]], [[]], 1.0),
        ([], [], 1.0),
        ([[-1, 50257]], [[-2, 50257]], 0.5),  # hash(-1) == hash(-2) in Python
    ],
)
def test_token_agreement_matches_hand_counts(before: list[list[int]], after: list[list[int]], expected: float) -> None:
    assert token_agreement(before, after) == pytest.approx(expected)
    assert token_agreement(after, before) == pytest.approx(expected)
    assert token_agreement([np.array(b, int) for b in before], [np.array(a, int) for a in after]) == pytest.approx(
        expected
    )


def test_token_agreement_refuses_different_numbers_of_samples() -> None:
    with pytest.raises(DataError, match="tokens of 1 samples before and of 2 after"):
        token_agreement([[1]], [[1], [2]])


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("rapidfuzz.distance", "jiwer", lambda: error_counts("a", "b")),
        ("rapidfuzz.distance", "jiwer", lambda: token_agreement([[1]], [[2]])),
        ("zhconv", "zhconv", lambda: normalize("天", "zh")),
        ("whisper_normalizer.english", "whisper-normalizer", lambda: normalize("a", "en")),
    ],
)
def test_missing_packages_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, call: Callable[[], object]
) -> None:
    from packlight import metrics

    metrics._normalizer.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeMissing, match=rf"needs the package {package}.*pip install 'packlight\[eval\]'"):
        call()
