"""Open a bundle and answer inputs: numpy and the runtime, no torch. The same code serves, evaluates and times."""

import gzip
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from packlight.audio import read_audio
from packlight.bundle import Bundle, open_bundle, verify
from packlight.byte_pairs import speller, with_merges
from packlight.codec import read_weights
from packlight.errors import BundleError, DataError
from packlight.heap import give_back
from packlight.images import read_image
from packlight.rows import rows_of
from packlight.runtimes.onnx import Opened, open_graphs
from packlight.serving import dual_encoder
from packlight.serving.dual_encoder import Encoder
from packlight.serving.whisper import Settings, Transcript, transcribe
from packlight.sounds import SoundSettings
from packlight.texts import tokenizer_decoder, tokenizer_of

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json.gz"
PROTOTYPES = "classes"  # prefix of the arrays that hold the vectors of frozen classes
_MAX_TOKENIZER = 256 * 2**20


@dataclass(frozen=True)
class Served:
    """A bundle that is loaded and ready.

    Args:
        bundle: where it came from.
        parts: the opened graphs.
        answer: (input, language or None, task or None) -> what the task gives: a Transcript for audio float32 [n] at
            16 kHz; for (picture or sound, texts) their vectors, see `packlight.serving.dual_encoder.embed`.
        reply: the same as plain numbers: token ids, or vectors.
        decode: token ids -> text.
        load_seconds: what opening took.
        open_input: (path, texts) -> input.
        example: an input that every bundle of the task answers.
        encoder: the two towers, for a dual encoder.
    """

    bundle: Bundle
    parts: dict[str, Opened]
    answer: Callable[..., Any]
    reply: Callable[..., list[Any]]
    decode: Callable[[Any], str]
    load_seconds: float
    open_input: Callable[[Path, Sequence[str]], Any]
    example: Any
    encoder: Encoder | None = None


def open_served(path: Path, threads: int = 0, *, check: bool = True) -> Served:
    """Load a bundle.

    Args:
        path: the bundle's folder.
        threads: 0 for all cores.
        check: compare every file with the manifest first.

    Raises:
        BundleError: no bundle, a changed one, one for a task or runtime that is not known here.
    """
    start = time.perf_counter()
    bundle = open_bundle(path)
    if check:
        verify(bundle)
    served = serve_parts(bundle, open_parts(bundle, threads))
    give_back()  # reading the tokenizer took 12 MB more than it keeps
    return replace(served, load_seconds=time.perf_counter() - start)


def open_parts(bundle: Bundle, threads: int, trace: Path | None = None) -> dict[str, Opened]:
    """The graphs of a bundle, loaded; with a folder for `trace`, each writes what it does there.

    Raises:
        BundleError: a bundle for a task or runtime that is not known here, or a graph that does not load.
    """
    path, manifest = bundle.path, bundle.manifest
    if manifest["task"] not in _TASKS:
        raise BundleError(f"{path} is for the task {manifest['task']!r}, which this packlight does not serve yet.")
    if manifest["runtime"] != "onnxruntime":
        raise BundleError(f"{path} is for the runtime {manifest['runtime']!r}, which this packlight does not know.")
    files = {name: path / file for name, file in manifest["graphs"].items()}
    weights = path / WEIGHTS
    return open_graphs(
        files, lambda names: read_weights(weights, names), threads, trace, lambda names: rows_of(weights, names)
    )


def serve_parts(bundle: Bundle, parts: dict[str, Opened]) -> Served:
    """A bundle that answers with these graphs. Raises BundleError where they are not those of its task."""
    kind, serve = _TASKS[bundle.manifest["task"]]
    return serve(bundle, parts, kind.from_dict(bundle.manifest["serving"]))


def _speech(bundle: Bundle, parts: dict[str, Opened], settings: Settings) -> Served:
    _check_parts(bundle.path, parts, settings)
    decode = _decoder(bundle.path / TOKENIZER)

    def answer(audio: np.ndarray, language: str | None = None, task: str | None = None) -> Transcript:
        return transcribe({n: p.run for n, p in parts.items()}, decode, settings, audio, language, task)

    def reply(audio: np.ndarray, language: str | None = None, task: str | None = None) -> list[int]:
        return list(answer(audio, language, task).tokens)

    example = np.zeros(16000, np.float32)
    return Served(bundle, parts, answer, reply, decode, 0.0, lambda path, texts: read_audio(path), example)


def _dual(bundle: Bundle, parts: dict[str, Opened], settings: dual_encoder.Settings) -> Served:
    if _named(parts) != {settings.kind: _content_names(settings), "text": (("input_ids",), ("text_vector",))}:
        raise BundleError(f"{bundle.path} has other graphs than the two towers. Get it again from its source.")
    try:
        assert settings.text is not None
        ids = tokenizer_of(read_tokenizer(bundle.path / TOKENIZER), settings.text)
    except ValueError as error:
        raise BundleError(f"{bundle.path / TOKENIZER} holds no readable tokenizer ({error}).") from None
    encoder = Encoder(parts[settings.kind].run, settings, parts["text"].run, ids)
    return _pairs(bundle, parts, encoder, partial(dual_encoder.embed, encoder))


def _frozen(bundle: Bundle, parts: dict[str, Opened], settings: dual_encoder.Settings) -> Served:
    if _named(parts) != {settings.kind: _content_names(settings)}:
        raise BundleError(
            f"{bundle.path} has other graphs than its {settings.kind} tower. Get it again from its source."
        )
    found = dict(read_weights(bundle.path / WEIGHTS, [f"{PROTOTYPES}/codes", f"{PROTOTYPES}/scale"]))
    codes, scale = found.get(f"{PROTOTYPES}/codes"), found.get(f"{PROTOTYPES}/scale")
    if codes is None or scale is None or codes.ndim != 2 or not len(codes) == len(scale) == len(settings.labels):
        raise BundleError(f"{bundle.path} lacks the vectors of its classes. Get it again from its source.")
    encoder = Encoder(parts[settings.kind].run, settings, classes=codes.astype(np.float32) * scale[:, None])
    return _pairs(bundle, parts, encoder, lambda content, texts: [encoder.scores(content).tolist()])


_Names = tuple[tuple[str, ...], tuple[str, ...]]


def _named(parts: dict[str, Opened]) -> dict[str, _Names]:
    return {name: (part.inputs, part.outputs) for name, part in parts.items()}


def _content_names(settings: dual_encoder.Settings) -> _Names:
    return settings.inputs, (f"{settings.kind}_vector",)


def _pairs(bundle: Bundle, parts: dict[str, Opened], encoder: Encoder, reply: Callable[..., Any]) -> Served:
    """What takes a picture or sound and its texts."""
    sound = encoder.settings.content if isinstance(encoder.settings.content, SoundSettings) else None

    def answer(pair: Any, language: str | None = None, task: str | None = None) -> list[list[float]]:
        if language is not None or task:
            content = "pictures" if sound is None else "sounds"
            raise DataError(f"This bundle compares {content} and texts: it takes no language and no task.")
        content, texts = pair
        return list(reply(content, texts))

    def pair(path: Path, texts: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
        return (read_image(path) if sound is None else read_audio(path, sound.rate)), tuple(texts)

    made_up = np.full((64, 48, 3), 128, np.uint8) if sound is None else np.zeros(sound.rate, np.float32)
    example = (made_up, ("a photo",))
    return Served(bundle, parts, answer, answer, lambda i: encoder.settings.labels[i], 0.0, pair, example, encoder)


# task of the manifest -> (its settings, what opens it)
_TASKS: dict[str, tuple[Any, Callable[..., Served]]] = {
    "speech-to-text": (Settings, _speech),
    "image-text": (dual_encoder.Settings, _dual),
    "image-classes": (dual_encoder.Settings, _frozen),
    "audio-text": (dual_encoder.Settings, _dual),
    "audio-classes": (dual_encoder.Settings, _frozen),
}


def _check_parts(path: Path, parts: dict[str, Opened], settings: Settings) -> None:
    """Refuse graphs that are not the two that `transcribe` runs."""
    pairs = [f"{kind}_{i}" for i in range(settings.layers) for kind in ("key", "value")]
    cross = {f"cross_{name}" for name in pairs}
    past, present = {f"past_{name}" for name in pairs}, {f"present_{name}" for name in pairs}
    due = {
        "encoder": ({"input_features"} | ({"positions", "sizes"} if settings.context else set()), cross),
        "decoder": ({"input_ids"} | past | cross, {"logits"} | present),
    }
    for name, (inputs, outputs) in due.items():
        part = parts.get(name)
        if part is None or set(part.inputs) != inputs or set(part.outputs) != outputs:
            raise BundleError(
                f"{path} has no graph {name!r} as its settings describe it. Get it again from its source."
            )


def read_tokenizer(file: Path) -> str:
    """The text of a bundle's tokenizer.json, merges included. Raises BundleError."""
    try:
        return with_merges(_unzipped(file))
    except ValueError as error:
        raise BundleError(f"{file} holds no readable tokenizer ({error}).") from None


def _unzipped(file: Path) -> str:
    try:
        with gzip.open(file, "rb") as opened:
            return opened.read(_MAX_TOKENIZER).decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BundleError(f"{file} holds no readable tokenizer ({error}).") from None


def _decoder(file: Path) -> Callable[[Any], str]:
    try:
        spelled = speller(_unzipped(file))
        return tokenizer_decoder(read_tokenizer(file)) if spelled is None else spelled
    except ValueError as error:
        raise BundleError(f"{file} holds no readable tokenizer ({error}).") from None
