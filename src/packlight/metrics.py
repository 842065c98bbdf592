"""The numbers that say how good a model is: error rates, their paired intervals, agreement of tokens.

Text is compared after Whisper's own normalisation, as published word error rates are. Rates belong to a whole
corpus (all errors over all reference words), never to the mean of the samples' rates. Everything is a ratio:
0.145 is 14.5 %, and a rate above 1 is possible, since a model may say more than was said.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from packlight.errors import DataError, RuntimeMissing

LEVEL = 0.95

# Written without spaces between words, so their error rate counts characters (Whisper's paper, appendix C).
_BY_CHARACTER = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
_CODES = {
    "english": "en",
    "eng": "en",
    "chinese": "zh",
    "mandarin": "zh",
    "cmn": "zh",
    "zho": "zh",
    "cantonese": "yue",
    "japanese": "ja",
    "jpn": "ja",
    "thai": "th",
    "tha": "th",
    "lao": "lo",
    "burmese": "my",
    "myanmar": "my",
    "mya": "my",
}
_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "幺": 1, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_DIGIT, _UNIT = "".join(_DIGITS) + "0-9", "".join(_UNITS)
# A whole number, then perhaps decimals, and what they are in: 二十九, 3万5千, 一点五亿.
_NUMERAL = re.compile(rf"([{_DIGIT}{_UNIT}]+)(?:[点.]([{_DIGIT}]+)(?![十百千])([万亿]?))?")
_BLOCK = 1 << 20  # numbers drawn at once by the bootstrap: 8 MB, whatever the number of samples


@dataclass(frozen=True)
class Paired:
    """Two systems on the same samples: `after` against `before`.

    Args:
        before: the first system's corpus rate.
        after: the second system's corpus rate.
        difference: after - before; above zero means that the second makes more errors.
        low: lower end of the difference's interval.
        high: upper end of the difference's interval.
        n: samples.
        level: how often such an interval holds the true difference.
        resamples: bootstrap resamples behind the interval.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    level: float
    resamples: int


def metric_name(*languages: str | None) -> str:
    """'CER' for the languages that are scored by character, 'WER' for the others, 'WER/CER' for a mixture."""
    names = {"CER" if _code(language) in _BY_CHARACTER else "WER" for language in languages}
    return names.pop() if len(names) == 1 else "WER/CER"


def normalize(text: str, language: str | None) -> str:
    """Text as it is scored: lower case, no punctuation, one space between words, nothing at the ends.

    English goes through Whisper's English normaliser (numbers, spelling, contractions); every other language,
    and None, through its basic one. Languages without spaces get one between all characters, which makes a
    word error rate their character error rate. Chinese becomes simplified, with the mainland's words, and its
    numerals become digits: 二十九 and 29 are the same. As in Whisper, combining marks are dropped: the vowel signs
    of Thai or Hindi do not count.

    Args:
        text: a transcript or a hypothesis.
        language: a code or English name, with or without a region: 'en', 'english', 'zh-TW', 'cmn_hans_cn'.

    Raises:
        RuntimeMissing: whisper-normalizer, or zhconv for Chinese, is not installed.
    """
    code = _code(language)
    if code == "zh":
        text = chinese_digits(_simplified(unicodedata.normalize("NFKC", text)))
    kind = "en" if code == "en" else "characters" if code in _BY_CHARACTER else "words"
    return " ".join(_normalizer(kind)(text).split())


def chinese_digits(text: str) -> str:
    """Simplified Chinese with its numerals as digits: 二十九 to 29, 二零二三 to 2023, 一万五 to 15000, 百分之三 to 3.

    What it does to a word such as 统一 it does to reference and hypothesis alike, so it adds no error. Units
    without a number, 百 or 千万, stay.
    """
    text = re.sub(rf"百分之(?=[{_DIGIT}十])", "", text)
    text = _NUMERAL.sub(_as_digits, text)
    return re.sub(r"(?<=\d)点(?=\d)", ".", text)  # 三点二十, as 3.20 and 3:20: the normaliser drops the sign


def _as_digits(match: re.Match[str]) -> str:
    whole, fraction, unit = _whole(match[1]), _whole(match[2] or ""), match[3]
    if not fraction or not whole.isdigit():
        return whole + match[0][len(match[1]) :]
    if not unit:
        return f"{whole}.{fraction}"
    scaled = int(whole + fraction) * _UNITS[unit]
    above, below = divmod(scaled, 10 ** len(fraction))
    return f"{above}.{below:0{len(fraction)}}".rstrip("0") if below else str(above)


def _whole(numeral: str) -> str:
    """The digits of a numeral without decimals; as it is, but for its single digits, where it is none."""
    spelt = "".join(str(_DIGITS.get(c, c)) for c in numeral)
    units = [c for c in numeral if c in _UNITS]
    if not units or (len(units) == len(numeral) and numeral[0] != "十"):
        return spelt
    total = section = 0  # what 万 and 亿 closed, and what came after it
    number: int | None = None
    last = 1  # the unit before `number`; 1 after a zero
    for token in re.findall(r"[0-9]+|.", numeral):
        if token not in _UNITS:
            if number:
                return spelt  # 三四百: three or four hundred, no number
            number = int(_DIGITS.get(token, token))
            last = last if number else 1
            continue
        unit = _UNITS[token]
        if unit >= 10**4 and (section or number or total):
            section += number or 0
            total = total + section * unit if section else total * unit
            section = 0
        elif number or unit == 10:
            section += (number or 1) * unit
        else:
            return spelt
        number, last = None, unit
    return str(total + section + (number or 0) * max(1, last // 10))


def error_counts(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> tuple[int, int]:
    """Edits that turn the reference into the hypothesis, and the words of the reference.

    Args:
        reference: normalised text, or its list of words. May be empty: then every word heard is an error.
        hypothesis: the same of what the model said.

    Returns:
        (substitutions + deletions + insertions, reference words).

    Raises:
        RuntimeMissing: jiwer, which brings rapidfuzz, is not installed.
    """
    said = reference.split() if isinstance(reference, str) else list(reference)
    heard = hypothesis.split() if isinstance(hypothesis, str) else list(hypothesis)
    numbers = {word: number for number, word in enumerate(dict.fromkeys((*said, *heard)))}
    return _edit_distance([numbers[w] for w in said], [numbers[w] for w in heard]), len(said)


def word_error_rate(edits: Sequence[int], words: Sequence[int]) -> float:
    """The corpus rate: all edits over all reference words.

    Args:
        edits: per sample, the first number of `error_counts`.
        words: per sample, the second.

    Raises:
        DataError: the lengths differ, or there is no reference word at all.
    """
    if len(edits) != len(words):
        raise DataError(
            f"There are edits of {len(edits)} samples but words of {len(words)}; they must be the same ones."
        )
    total = sum(words)
    if total <= 0:
        raise DataError(
            f"The {len(words)} reference transcripts hold no words, so there is no error rate. Evaluate on "
            f"samples with transcripts."
        )
    return float(sum(edits) / total)


def paired_bootstrap(
    errors_before: Sequence[int] | np.ndarray,
    errors_after: Sequence[int] | np.ndarray,
    weights: Sequence[int] | np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """The difference of two corpus rates, with the percentile interval of a paired bootstrap.

    Both systems are resampled with the same utterances (Bisani and Ney, "Bootstrap estimates for confidence
    intervals in ASR performance evaluation", ICASSP 2004), so what makes an utterance hard for both cancels.
    The utterance is the unit: where one speaker says many of them, the true interval is somewhat wider. A
    resample that draws no reference words has no rate and is left out. One sample gives an interval of no
    width, which says nothing. The result does not depend on the order of the samples.

    Args:
        errors_before: [n] edits of the first system per sample.
        errors_after: [n] edits of the second system on the same samples.
        weights: [n] reference words per sample.
        resamples: how many times n samples are drawn with replacement.
        seed: of the draws.

    Raises:
        DataError: the lengths differ, nothing is given, a number is negative or not finite, no sample has
            words, or `resamples` is below 1.
    """
    before, after, words = _columns(errors_before, errors_after, weights)
    if resamples < 1:
        raise DataError(f"{resamples} resamples give no interval; use 1 or more, 10000 for a report.")
    order = np.lexsort((before, after, words))
    delta, words = (after - before)[order], words[order]
    generator = np.random.default_rng(seed)
    n = len(words)
    rows = max(1, _BLOCK // n)
    differences = []
    for start in range(0, resamples, rows):
        picks = generator.integers(n, size=(min(rows, resamples - start), n))
        total = words[picks].sum(axis=1)
        known = total > 0
        differences.append(delta[picks].sum(axis=1)[known] / total[known])
    rate_before, rate_after = before.sum() / words.sum(), after.sum() / words.sum()
    # Taken from the summed differences, as the resamples are: equal systems give exactly 0 everywhere.
    difference = float(delta.sum() / words.sum())
    drawn = np.concatenate(differences)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if drawn.size else (difference, difference)
    return Paired(
        before=float(rate_before),
        after=float(rate_after),
        difference=difference,
        low=float(low),
        high=float(high),
        n=n,
        level=LEVEL,
        resamples=resamples,
    )


def token_agreement(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> float:
    """How far two systems emit the same tokens: 1 - edit distances / lengths of the longer sequences.

    Both are summed over all samples before they are divided.

    Args:
        before: per sample, the token ids of the first system.
        after: per sample, the token ids of the second.

    Returns:
        0..1; 1.0 when all are the same, also when all are empty.

    Raises:
        DataError: the numbers of samples differ.
        RuntimeMissing: jiwer, which brings rapidfuzz, is not installed.
    """
    if len(before) != len(after):
        raise DataError(
            f"There are tokens of {len(before)} samples before and of {len(after)} after; "
            f"they must be the same samples."
        )
    edits = longest = 0
    for first, second in zip(before, after, strict=True):
        # int(): elements of a tensor are hashed by identity, so equal ids would count as different.
        edits += _edit_distance([int(t) for t in first], [int(t) for t in second])
        longest += max(len(first), len(second))
    return 1.0 - edits / longest if longest else 1.0


def _columns(*values: Iterable[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    before, after, words = (np.asarray(v, dtype=np.float64) for v in values)
    if not before.shape == after.shape == words.shape or before.ndim != 1:
        raise DataError(
            f"A paired comparison needs both systems on the same samples; got errors of {before.size} and "
            f"{after.size} samples, words of {words.size}."
        )
    if not words.size:
        raise DataError("There is no sample to compare. Evaluate on at least one.")
    if not all(np.isfinite(v).all() and (v >= 0).all() for v in (before, after, words)):
        raise DataError("Errors and words are counts; one of them is negative or not a finite number.")
    if not words.sum() > 0:
        raise DataError(
            f"The {words.size} reference transcripts hold no words, so there is no error rate. Evaluate on "
            f"samples with transcripts."
        )
    return before, after, words


def _edit_distance(first: list[int], second: list[int]) -> int:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise _missing("jiwer") from None
    return int(Levenshtein.distance(first, second))


def _code(language: str | None) -> str:
    primary = (language or "").strip().lower().replace("_", "-").split("-")[0]
    return _CODES.get(primary, primary)


def _simplified(text: str) -> str:
    try:
        import zhconv
    except ImportError:
        raise _missing("zhconv") from None
    return str(zhconv.convert(text, "zh-cn"))


@lru_cache(maxsize=3)
def _normalizer(kind: str) -> Callable[[str], str]:
    """Whisper's normaliser for 'en', 'characters' or 'words'; the English one reads a table of spellings."""
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise _missing("whisper-normalizer") from None
    result: Callable[[str], str]
    result = EnglishTextNormalizer() if kind == "en" else BasicTextNormalizer(split_letters=kind == "characters")
    return result


def _missing(package: str) -> RuntimeMissing:
    # All that scoring needs, and nothing of what fitting does: a device has no room for PyTorch.
    return RuntimeMissing(f"Scoring text needs the package {package}. Install it: pip install 'packlight[eval]'")
