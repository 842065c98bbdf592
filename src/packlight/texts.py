"""Texts as a text tower takes them: token ids of a length that it can hold. No torch."""

import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from packlight.errors import BundleError, DataError

# What a label is asked with where nobody says otherwise, as the papers of CLIP and CLAP do.
TEMPLATES = {"image": ("a photo of a {}.",), "audio": ("This is a sound of {}.",)}

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextSettings:
    """How a text becomes token ids.

    Args:
        max_tokens: longer texts are cut, with the special tokens in place.
        pad_to: every text has this many ids; 0 for as many as it needs.
        pad: id that fills it up.
        canonical: whether the text is first put in lower case and freed of ASCII punctuation, as SigLIP does.
    """

    max_tokens: int
    pad_to: int = 0
    pad: int = 0
    canonical: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "TextSettings":
        """Read what `to_dict` wrote. Raises BundleError for other keys or values."""
        try:
            made = cls(**values)
            right = 0 < made.max_tokens <= 2**20 and 0 <= made.pad_to <= 2**20 and made.pad >= 0
        except TypeError as error:
            raise BundleError(f"The bundle's text settings can't be read ({error}). Write it again.") from None
        if not right or not isinstance(made.canonical, bool):
            raise BundleError("The bundle's text settings hold values out of range. Write the bundle again.")
        return made


def canonical_text(words: str) -> str:
    """A text as SigLIP reads it: in lower case, without ASCII punctuation, with single spaces."""
    return " ".join(words.lower().translate(_NO_PUNCTUATION).split())


def tokenizer_of(text: str, settings: TextSettings) -> Callable[[str], list[int]]:
    """From a text to its token ids.

    Args:
        text: of a tokenizer.json.
        settings: see there.

    Raises:
        ValueError: no tokenizer.
    """
    tokenizer = _opened(text)
    tokenizer.no_padding()
    tokenizer.enable_truncation(settings.max_tokens)

    def ids(words: str) -> list[int]:
        if settings.canonical:
            words = canonical_text(words)
        found = list(tokenizer.encode(words).ids)
        return found + [settings.pad] * (settings.pad_to - len(found))

    return ids


def tokenizer_decoder(text: str) -> Callable[[Sequence[int]], str]:
    """From token ids to text, without special tokens, by the `tokenizers` library.

    Args:
        text: of a tokenizer.json.

    Raises:
        ValueError: no tokenizer.
    """
    tokenizer = _opened(text)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _opened(text: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower class
        raise ValueError(str(error)) from None


def checked_templates(templates: Sequence[str] = (), kind: str = "image") -> tuple[str, ...]:
    """What labels of pictures ('image') or sounds ('audio') are asked with. Raises DataError for one without {}."""
    wrong = [t for t in templates if t.count("{}") != 1]
    if wrong:
        raise DataError(f"The template {wrong[0]!r} must have {{}} once, where the label goes.")
    return tuple(templates) or TEMPLATES[kind]
