"""How often each token of a vocabulary is expected: from a language, from texts, from what the model itself wrote.

Each source is smoothed on to the one before it (Good 1953, Katz 1987): tokens it never used share the probability that
Good and Turing give to the unseen, which is the share of tokens used once, in the proportions of the source before.
The order is: all tokens alike, then the languages and the words of the texts in their usual spellings, then the texts
as they are, then the model's own words.

Word frequencies are those of `wordfreq` (Speer 2022, doi 10.5281/zenodo.7199437), whose words are in lower case and
alone. A model writes them in a sentence: after a space, with a capital, now and then in capitals.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import DataError, PlanError, RuntimeMissing
from packlight.vocabulary import Floats, Usage, read_vocabulary

# Shares of the spellings of a word, assumed: only the order of tokens depends on them. _OPENING counts twice, once in
# lower case and once with a capital.
_USUAL, _OTHER, _OPENING, _CAPITALS = 0.928, 0.05, 0.01, 0.002
_RARE = 1e-7  # share of all words below which a word is left to the smoothing; in English these make up 0.7 %
_FREQUENT = 1e-5  # share of all words from which on a word is expected in capitals too
_UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo")  # languages written without spaces between words
_TRADITIONAL = 0.3  # share of Chinese expected in traditional characters; wordfreq has simplified ones only
_NUMBERS, _SIGNS = 0.02, 0.01  # numbers, and signs of more than one character, per word
_SIGN_WORDS = (
    "...",
    ' "',
    '."',
    ',"',
    '?"',
    '!"',
    " (",
    ").",
    "),",
    " -",
    " --",
    "--",
    "?!",
    " $",
    " £",
    " &",
    " …",
    " '",
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_BATCH = 20_000


def measure_usage(
    tokenizer_json: str,
    rows: int = 0,
    *,
    languages: Sequence[str] = (),
    texts: Iterable[str] = (),
    words: Iterable[Sequence[int]] = (),
) -> Usage:
    """Estimate how often each token occurs in what the model is to write.

    Args:
        tokenizer_json: text of the model's tokenizer.json.
        rows: rows of the model's table; 0 for as many as the tokenizer names.
        languages: codes such as 'en', which count alike.
        texts: what the model should be able to write well, e.g. transcripts; see `read_texts`.
        words: lists of token ids that the model itself wrote; with the prompt and the end token in them, where those
            are to have their true weight.

    Returns:
        weights that sum to 1, all above 0, and the tokens that a source used.

    Raises:
        DataError: a language we have no word list for.
        PlanError: a tokenizer that can't be pruned, ids that are none.
        RuntimeMissing: `wordfreq` is not installed and a language was asked for.
    """
    from tokenizers import Tokenizer

    rows = read_vocabulary(tokenizer_json, rows).rows
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [text.strip() for text in texts]
    weights: Floats = np.full(rows, 1 / rows)
    spelled = []
    for language in dict.fromkeys(languages):
        spelled.append(_count(tokenizer, _language(tokenizer, language), rows))
    said = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    if said:
        spelled.append(_count(tokenizer, _spellings(tokenizer, said, spaced=True), rows))
    if spelled:
        weights = np.mean([_smooth(counts, weights) for counts in spelled], axis=0)
    # A text opens a transcript, after a space, as often as it follows something else.
    exact = _count(tokenizer, Counter(form for text in texts for form in (text, f" {text}")), rows) / 2
    written = [i for ids in words for i in ids]
    if written and not 0 <= min(written) <= max(written) < rows:
        raise PlanError(f"The model's words hold ids beyond the {rows} rows of its vocabulary.")
    own = np.bincount(np.array(written, np.int64), minlength=rows).astype(np.float64)
    weights = _smooth(own, _smooth(exact, weights))
    seen = np.any([counts > 0 for counts in (*spelled, exact, own)], axis=0)
    return Usage(weights / weights.sum(), seen)


def _smooth(counts: Floats, base: Floats) -> Floats:
    """Good-Turing: the seen by their counts, the unseen together by the share of what was seen once, as `base` says.

    The share is the mean of the posterior after leaving out each token in turn, (once + 1) / (all + 2), so that it is
    never 0 or 1.

    Args:
        counts: how often each token was used; not all are whole numbers.
        base: expected shares before, all above 0.

    Returns:
        shares that sum to 1, all above 0.
    """
    total, unseen = float(counts.sum()), counts == 0
    if not total:
        shares = base / base.sum()
    elif not unseen.any():
        shares = counts / total
    else:
        share = (float(counts[counts < 1.5].sum()) + 1) / (total + 2)
        shares = (1 - share) * counts / total + np.where(unseen, share * base / base[unseen].sum(), 0)
    return np.asarray(shares, np.float64)


def _count(tokenizer: Any, forms: Mapping[str, float], rows: int) -> Floats:
    """Expected uses of each token, given those of strings."""
    counts = np.zeros(rows)
    texts, uses = list(forms), np.array(list(forms.values()), np.float64)
    for start in range(0, len(texts), _BATCH):
        found = [e.ids for e in tokenizer.encode_batch_fast(texts[start : start + _BATCH], add_special_tokens=False)]
        lengths = [len(ids) for ids in found]
        flat = np.fromiter((i for ids in found for i in ids), np.int64, sum(lengths))
        counts += np.bincount(flat, np.repeat(uses[start : start + _BATCH], lengths), minlength=rows)
    return counts


def _language(tokenizer: Any, language: str) -> defaultdict[str, float]:
    """The strings of a language with their expected uses; the rarest words of its list count as used once."""
    words = _word_list(language)
    least = min(words.values())
    forms = _spellings(tokenizer, {word: f / least for word, f in words.items()}, language not in _UNSPACED)
    total = sum(words.values()) / least
    numbers = {str(n): 1 / (n + 10) for n in range(1000)} | {str(n): 1 / 300 for n in range(1900, 2040)}
    for strings, share in ((numbers, _NUMBERS), (dict.fromkeys(_SIGN_WORDS, 1.0), _SIGNS)):
        part = share * total / sum(strings.values())
        for text, use in strings.items():
            forms[text] += part * use / 2
            forms[f" {text.strip()}"] += part * use / 2
    return forms


def has_word_list(language: str) -> bool:
    """Whether words of a language have known frequencies. Raises RuntimeMissing without `wordfreq`."""
    return language in _wordfreq().available_languages("best")


def _wordfreq() -> Any:
    try:
        import wordfreq
    except ImportError:
        raise RuntimeMissing(
            "Choosing a vocabulary by language needs the package wordfreq: pip install 'packlight[fit]'."
        ) from None
    return wordfreq


def check_language(language: str) -> None:
    """Raises DataError for a language whose words have no known frequencies."""
    if not has_word_list(language):
        known = sorted(_wordfreq().available_languages("best"))
        raise DataError(
            f"There are no word frequencies for the language {language!r}. Known: {', '.join(known)}. Choose the "
            "vocabulary by texts instead."
        )


def _word_list(language: str) -> dict[str, float]:
    """The words of a language in lower case with their shares, without those that hold digits."""
    check_language(language)
    wordfreq = _wordfreq()
    found = wordfreq.get_frequency_dict(language, "best")
    words = defaultdict(float, {w: f for w, f in found.items() if f >= _RARE and not any(c.isdigit() for c in w)})
    if language == "zh":
        from zhconv import convert

        for word, share in list(words.items()):
            words[word] = share * (1 - _TRADITIONAL)
            words[convert(word, "zh-hant")] += share * _TRADITIONAL
    return dict(words)


def _spellings(tokenizer: Any, words: Mapping[str, float], spaced: bool) -> defaultdict[str, float]:
    """How words appear in a text: after a space or without, in lower case, with a capital, in capitals.

    The usual spelling is the one that the tokenizer writes with fewer tokens: it was trained on text in which 'London'
    is written so, and so it has a token for ' London' and none for ' london'.
    """
    forms: defaultdict[str, float] = defaultdict(float)
    small = list(words)
    large = [word[:1].upper() + word[1:] for word in small]
    total = sum(words.values())
    gap, tight = (" ", "") if spaced else ("", " ")
    for word, other, short, long in zip(
        small, large, _lengths(tokenizer, small, gap), _lengths(tokenizer, large, gap), strict=True
    ):
        use = words[word]
        usual, other = (other, word) if long < short else (word, other)
        forms[gap + usual] += _USUAL * use
        forms[gap + other] += _OTHER * use
        forms[tight + word] += _OPENING * use
        forms[tight + word[:1].upper() + word[1:]] += _OPENING * use
        if use > _FREQUENT * total:
            forms[gap + word.upper()] += _CAPITALS * use
    return forms


def _lengths(tokenizer: Any, words: Sequence[str], before: str) -> list[int]:
    """Tokens of each word."""
    texts = [before + word for word in words]
    parts = (texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH))
    return [len(e.ids) for part in parts for e in tokenizer.encode_batch_fast(part, add_special_tokens=False)]


# Texts --------------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, or of all *.txt files in a folder and those below it; empty lines are left out.

    Raises:
        DataError: nothing there, no text in it, or not in UTF-8.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    lines = []
    for file in files:
        try:
            lines += [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} can't be read as text in UTF-8 ({error}). Name a text file or a folder.") from None
    texts = [line for line in lines if line]
    if not texts:
        raise DataError(f"{path} holds no text. Name a text file, or a folder with *.txt files.")
    return texts


def texts_sha256(texts: Iterable[str]) -> str:
    """The identity of some texts, for a plan."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return digest.hexdigest()


# Falling back -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fallback:
    """What a smaller vocabulary changes in some texts.

    Args:
        words: words with a letter or a digit, as the tokenizer splits them.
        broken: those that are written with other, smaller tokens now.
        tokens: of the old tokenizer.
        lost: those of them that are gone.
        after: tokens of the new tokenizer.
    """

    words: int
    broken: int
    tokens: int
    lost: int
    after: int

    @property
    def word_share(self) -> float:
        """Share of words that fall back to smaller pieces."""
        return self.broken / self.words if self.words else 0.0

    @property
    def more_tokens(self) -> float:
        """Tokens that come on top, as a share of those before."""
        return self.after / self.tokens - 1 if self.tokens else 0.0


def fallback(old: str, new: str, old_to_new: Mapping[int, int], texts: Iterable[str]) -> Fallback:
    """Count what falls back to smaller pieces.

    Args:
        old: text of the tokenizer.json before.
        new: text of the tokenizer.json after.
        old_to_new: of `Pruned`.
        texts: in the form in which the model writes them; Whisper's begin with a space.
    """
    from tokenizers import Tokenizer

    before, after = Tokenizer.from_str(old), Tokenizer.from_str(new)
    words = broken = tokens = lost = more = 0
    for text in texts:
        encoded = before.encode(text, add_special_tokens=False)
        spans: dict[Any, list[tuple[int, int, bool]]] = {}
        for i, word, (start, end) in zip(encoded.ids, encoded.word_ids, encoded.offsets, strict=True):
            spans.setdefault(word, []).append((start, end, i not in old_to_new))
        for pieces in spans.values():
            if any(c.isalnum() for c in text[min(p[0] for p in pieces) : max(p[1] for p in pieces)]):
                words += 1
                broken += any(gone for _, _, gone in pieces)
        tokens += len(encoded.ids)
        lost += sum(i not in old_to_new for i in encoded.ids)
        more += len(after.encode(text, add_special_tokens=False).ids)
    return Fallback(words, broken, tokens, lost, more)
