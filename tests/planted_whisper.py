"""A planted Whisper: a small vocabulary, settings, and parts whose decoder says what a test wants."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from packlight.serving.whisper import Settings

# A small vocabulary in Whisper's order: text 0..99, then these, then 1501 timestamps.
EOS, START, EN, ZH, TRANSCRIBE, TRANSLATE, NO_STAMPS, STAMP = range(100, 108)
VOCABULARY = STAMP + 1501
RATE = 16000

ENGLISH = Settings(
    mel_bins=80, layers=2, heads=2, head_size=4, start=START, eos=EOS, no_timestamps=NO_STAMPS,
    timestamp_begin=STAMP, language_ids={}, task_ids={}, suppress=(97, 98, START), begin_suppress=(96, EOS),
    max_tokens=40,
)  # fmt: skip
MULTILINGUAL = replace(
    ENGLISH, language_ids={"en": EN, "zh": ZH}, task_ids={"transcribe": TRANSCRIBE, "translate": TRANSLATE}
)


def at(seconds: float) -> int:
    """The timestamp token of that time."""
    return STAMP + round(seconds * 50)


def spell(tokens: Any) -> str:
    return "".join(f" {token}" for token in tokens)


@dataclass(frozen=True)
class Opaque:
    """A runtime's own value: only `numpy()` is known of it."""

    array: np.ndarray

    def numpy(self) -> np.ndarray:
        return self.array


@dataclass
class Planted:
    """Parts whose decoder says what `speak(window, tokens so far, prompt first)` returns: logits or a token.

    The window is what the encoder was given. The past carries the tokens, so a wrong past is a wrong answer.
    """

    speak: Callable[[np.ndarray, list[int]], np.ndarray | int]
    settings: Settings = ENGLISH
    fed: list[list[int]] = field(default_factory=list)

    def parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def encoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        features = inputs["input_features"]
        assert features.dtype == np.float32
        return {f"cross_{kind}_{i}": Opaque(features) for kind in ("key", "value") for i in range(2)}

    def decoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        assert ids.dtype == np.int64
        names = [f"{kind}_{i}" for kind in ("key", "value") for i in range(2)]
        assert set(inputs) == {"input_ids", *(f"past_{n}" for n in names), *(f"cross_{n}" for n in names)}
        past = [inputs[f"past_{name}"] for name in names]
        first = isinstance(past[0], np.ndarray)
        past = [value if first else value.numpy() for value in past]
        assert not first or past[0].shape == (1, self.settings.heads, 0, self.settings.head_size)
        new = np.broadcast_to(ids[0, None, :, None], (1, 2, ids.shape[1], 4)).astype(np.float32)
        present = [np.concatenate([value, new], 2) for value in past]
        heard = [int(token) for token in present[0][0, 0, :, 0]]
        self.fed.append([int(token) for token in ids[0]])
        said = self.speak(inputs["cross_key_0"].numpy(), heard)
        logits = said if isinstance(said, np.ndarray) else peaks({said: 9.0})
        logits.flags.writeable = False
        return {
            "logits": Opaque(logits[None]),
            **{f"present_{n}": Opaque(v) for n, v in zip(names, present, strict=True)},
        }


def peaks(values: dict[int, float]) -> np.ndarray:
    logits = np.full(VOCABULARY, -9.0, np.float32)
    logits[list(values)] = list(values.values())
    return logits


def script(tokens: list[int], prompt: int = 2) -> Callable[[np.ndarray, list[int]], int]:
    """Say these tokens in every window, then end."""
    return lambda window, heard: [*tokens, EOS][min(len(heard) - prompt, len(tokens))]


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)
