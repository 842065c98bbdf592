"""The text tower as a page runs it: a tokenizer that the page knows, and a graph that takes its weights one by one."""

import json
import re
from collections.abc import Iterator
from typing import Any

from packlight.errors import BundleError
from packlight.runtimes.onnx_wire import fields, message

# What web_page/tokenizer.js and web_page/models.js can do, with the same ids.
_NORMALIZERS = (
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend", "Replace", "Precompiled",
    "BertNormalizer",
)  # fmt: skip
_PRE_TOKENIZERS = (
    "Sequence", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Split", "ByteLevel",
    "Metaspace",
)  # fmt: skip
_PROCESSORS = ("Sequence", "ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing")
_MODELS = ("WordLevel", "WordPiece", "BPE", "Unigram")
# Patterns that mean the same in the library and in a browser: characters, their classes, repetition, alternatives.
_CHARACTER = r"(?:[\w '<>,:;!@#%&=\"~`/-]|\\[sS|.]|\\p\{[LN]\})"
_PLAIN = re.compile(rf"(?:{_CHARACTER}|\[\^?{_CHARACTER}+\]|[|+*?)]|\((?:\?[:!=])?|\{{\d+(?:,\d*)?\}})*", re.ASCII)


def check_tokenizer(text: str) -> None:
    """Refuse a tokenizer of which the page would make other ids, before any work.

    Args:
        text: of a tokenizer.json.

    Raises:
        BundleError: it has a part that the page does not know. The message names it.
    """
    try:
        file = json.loads(text)
        unknown = sorted(set(_unknown(file)))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise BundleError(f"The bundle's tokenizer can't be read ({error}). Get it again from its source.") from None
    if unknown:
        raise BundleError(
            f"The page can't do what this bundle's tokenizer does: {', '.join(unknown)}. It knows the tokenizers of CLIP, "
            "BERT and SigLIP; `packlight run` answers with this bundle."
        )


def _unknown(file: dict[str, Any]) -> Iterator[str]:
    places = {"normalizer": _NORMALIZERS, "pre_tokenizer": _PRE_TOKENIZERS, "post_processor": _PROCESSORS}
    for place, known in places.items():
        for part in _parts(file.get(place)):
            if part.get("type") not in known:
                yield f"the {place.replace('_', '-')} {part.get('type')}"
            regex = part.get("pattern", {}).get("Regex", "")
            if not _PLAIN.fullmatch(regex):
                yield f"the pattern {regex}"
    model = file["model"]
    if model.get("type", "BPE" if "merges" in model else "WordPiece") not in _MODELS:
        yield f"the model {model.get('type')}"
    if model.get("dropout"):
        yield "a model with dropout"


def _parts(settings: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer and, where it is a sequence, the parts in it."""
    if settings is None:
        return
    yield settings
    for inner in ("normalizers", "pretokenizers", "processors"):
        for part in settings.get(inner, ()):
            yield from _parts(part)


def relocated(graph: bytes, places: dict[str, str]) -> bytes:
    """An ONNX file whose external weights lie each in a file of its own.

    onnxruntime-web takes external data by file name, and packlight's graphs name one for all. Only the messages on the
    way to these names are written anew: ModelProto.graph (7), GraphProto.initializer (5), TensorProto.external_data (13).

    Args:
        graph: the file.
        places: name of an external initializer -> name of its file.

    Raises:
        BundleError: a file that is no ONNX graph of ours.
    """

    def tensor(data: memoryview) -> bytes:
        parts = list(fields(data))
        named = dict(parts)
        if named.get(14) != 1:
            return bytes(data)
        size = {bytes(e[1]): bytes(e[2]) for n, v in parts if n == 13 for e in [dict(fields(_bytes(v)))]}[b"length"]
        entries = (
            (b"location", places[bytes(_bytes(named[8])).decode()].encode()),
            (b"offset", b"0"),
            (b"length", size),
        )
        written = [(13, message([(1, key), (2, value)])) for key, value in entries]
        return message([*((n, v) for n, v in parts if n != 13), *written])

    def inside(data: memoryview) -> bytes:
        return message((n, tensor(_bytes(v)) if n == 5 else v) for n, v in fields(data))

    whole = list(fields(memoryview(graph)))
    if message(whole) != graph:
        raise BundleError(
            "The text tower's graph can't be rewritten for the page. Get the bundle again from its source."
        )
    try:
        return message((n, inside(_bytes(v)) if n == 7 else v) for n, v in whole)
    except KeyError as error:
        raise BundleError(f"The text tower's graph names the weights {error}, which the bundle lacks.") from None


def _bytes(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise BundleError("A graph file is damaged: a number stands where a message is due.")
    return value
