"""Open a bundle and answer inputs: numpy and the runtime, no torch. The same code serves, evaluates and times."""

import gzip
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.bundle import Bundle, open_bundle, verify
from packlight.codec import read_weights
from packlight.errors import BundleError
from packlight.runtimes.onnx import Opened, open_graphs
from packlight.serving.whisper import Settings, Transcript, transcribe

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json.gz"
_MAX_TOKENIZER = 256 * 2**20


@dataclass(frozen=True)
class Served:
    """A bundle that is loaded and ready.

    Args:
        bundle: where it came from.
        parts: the opened graphs.
        answer: (audio float32 [n] at 16 kHz, language or None, task or None) -> Transcript.
        decode: token ids -> text.
        load_seconds: what opening took.
    """

    bundle: Bundle
    parts: dict[str, Opened]
    answer: Callable[..., Transcript]
    decode: Callable[[Any], str]
    load_seconds: float


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
    manifest = bundle.manifest
    if manifest["task"] != "speech-to-text":
        raise BundleError(f"{path} is for the task {manifest['task']!r}, which this packlight does not serve yet.")
    if manifest["runtime"] != "onnxruntime":
        raise BundleError(f"{path} is for the runtime {manifest['runtime']!r}, which this packlight does not know.")
    settings = Settings.from_dict(manifest["serving"])
    decode = _decoder(path / TOKENIZER)
    files = {name: path / file for name, file in manifest["graphs"].items()}
    parts = open_graphs(files, lambda names: read_weights(path / WEIGHTS, names), threads)
    _check_parts(path, parts, settings)

    def answer(audio: np.ndarray, language: str | None = None, task: str | None = None) -> Transcript:
        return transcribe({n: p.run for n, p in parts.items()}, decode, settings, audio, language, task)

    return Served(bundle, parts, answer, decode, time.perf_counter() - start)


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


def _decoder(file: Path) -> Callable[[Any], str]:
    from tokenizers import Tokenizer

    try:
        with gzip.open(file, "rb") as opened:
            text = opened.read(_MAX_TOKENIZER).decode("utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower class
        raise BundleError(f"{file} holds no readable tokenizer ({error}).") from None
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))
