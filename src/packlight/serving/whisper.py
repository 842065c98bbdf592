"""Whisper on the device: audio to text with two parts, an encoder and a decoder that keeps its past.

Paper: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, arXiv 2212.04356: §2.3 for
the tokens, §3.8 for audio of any length.

Up to 30 s the decoding is greedy and yields the tokens of transformers' `generate`. Longer audio is decoded
window by window with timestamps, each window starting where the last one was sure to have ended. Different
from the paper: no beam, no second try at a higher temperature, no text of the window before in the prompt,
and features are scaled by the loudest sound of their window, not of the whole recording. In place of the
second try, a window that loops is stopped and its loop cut to one round.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from packlight.context import places, spoken_positions
from packlight.errors import DataError
from packlight.heap import give_back
from packlight.serving.whisper_features import HOP, RATE, log_mel
from packlight.serving.whisper_settings import Settings

__all__ = ["Part", "Settings", "Transcript", "log_mel", "timestamp_rules_", "transcribe"]

Part = Callable[[dict[str, Any]], dict[str, Any]]
"""A graph in a runtime: from numpy arrays, or values another call returned, by name, to the runtime's own
values by name, which pass back unconverted and have a method `numpy()`."""

_STAMP = RATE // 50  # samples from one timestamp token to the next: 20 ms
_TAIL = RATE // 10  # samples: a rest shorter than this holds no word
_STRIDE = RATE  # samples: the least a window of long audio moves on, so an hour takes at most 3600 windows
_LOOP_ROUNDS, _LOOP_TOKENS, _LOOP_LONGEST = 4, 24, 32


@dataclass(frozen=True)
class Transcript:
    """What was heard.

    Args:
        text: without space at its ends.
        tokens: the generated text tokens, without prompt, timestamps and end.
        language: the code that was given or detected; None when there was neither.
        windows: how many windows were decoded.
        seconds: wall-clock time spent in 'features', 'encoder' and 'decoder'.
    """

    text: str
    tokens: tuple[int, ...]
    language: str | None
    windows: int
    seconds: dict[str, float]


def transcribe(
    parts: Mapping[str, Part],
    decode: Callable[[Sequence[int]], str],
    settings: Settings,
    audio: np.ndarray,
    language: str | None = None,
    task: str | None = None,
) -> Transcript:
    """Transcribe, or translate to English, audio of any length.

    With H heads of size D, a number for each layer, P past positions (none at first), and i for every layer, the
    parts are
    'encoder': `input_features` float32 [1, mel_bins, frames] to `cross_key_i`, `cross_value_i`
    [1, H, frames / 2, D], and
    'decoder': `input_ids` int64 [1, T], `past_key_i`, `past_value_i` [1, H, P, D] and the encoder's outputs
    to `logits` [1, vocabulary] after the last token, `present_key_i`, `present_value_i` [1, H, P + T, D].

    Args:
        parts: the two parts by name.
        decode: token ids to text.
        settings: of the model.
        audio: float32 [samples], mono, 16 kHz, within -1..1.
        language: a code such as 'en'; None takes the settings' language, or detects it in the first window.
        task: 'transcribe' or 'translate'; None takes the settings' task.

    Raises:
        DataError: the audio is empty or not mono, or the model does not know the language or task.
    """
    if audio.ndim != 1 or not audio.size:
        raise DataError(f"Whisper needs mono audio of one sample or more; got shape {list(audio.shape)}.")
    language, task = _known_language(settings, language), _known_task(settings, task)
    window_size = settings.frames * HOP
    many = audio.size > window_size
    stamped = many and settings.timestamp_begin is not None
    pick = _picker(settings, stamped)
    seconds = dict.fromkeys(("features", "encoder", "decoder"), 0.0)
    tokens: list[int] = []
    position = windows = 0
    while not windows or audio.size - position >= _TAIL:
        window = audio[position : position + window_size]
        cross = _encode(parts["encoder"], settings, window, seconds)
        with _timed(seconds, "decoder"):
            if language is None and settings.language_ids:
                language = _detect_language(parts["decoder"], settings, cross)
            prompt = _prompt(settings, language, task, stamped)
            heard, period = _generate(parts["decoder"], settings, cross, prompt, pick, stop_loops=many)
        step = window.size
        if stamped:
            heard, step = _closed(heard, step, settings)
        tokens += _cut_loop(_text_tokens(heard, settings), period)
        position += step
        windows += 1
    return Transcript(decode(tokens).strip(), tuple(tokens), language, windows, seconds)


def _known_language(settings: Settings, language: str | None) -> str | None:
    language = language or settings.language
    known = settings.language_ids or {"en": 0}
    if language is not None and language not in known:
        raise DataError(f"The model does not know the language {language!r}. Known: {', '.join(sorted(known))}.")
    return language


def _known_task(settings: Settings, task: str | None) -> str:
    task = task or settings.task
    known = settings.task_ids or {"transcribe": 0}
    if task not in known:
        raise DataError(f"The model does not know the task {task!r}. Known: {', '.join(sorted(known))}.")
    return task


def _prompt(settings: Settings, language: str | None, task: str, stamped: bool) -> list[int]:
    """The tokens the text is generated after."""
    prompt = [settings.start]
    if settings.language_ids and language is not None:
        prompt.append(settings.language_ids[language])
    if settings.task_ids:
        prompt.append(settings.task_ids[task])
    if settings.no_timestamps is not None and not stamped:
        prompt.append(settings.no_timestamps)
    return prompt


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = perf_counter()
    yield
    seconds[name] += perf_counter() - begin


def _encode(encoder: Part, settings: Settings, window: np.ndarray, seconds: dict[str, float]) -> dict[str, Any]:
    """The keys and values of the window that the decoder attends to, as the runtime returned them."""
    with _timed(seconds, "features"):
        inputs = encoder_inputs(settings, window)
        give_back()  # else what they were made with counts together with the encoder's states
    with _timed(seconds, "encoder"):
        return encoder(inputs)


def encoder_inputs(settings: Settings, window: np.ndarray) -> dict[str, np.ndarray]:
    """What the encoder takes for one window of audio, float32 [samples] at 16 kHz, by the names of its inputs."""
    if settings.context is None:
        return {"input_features": log_mel(window, settings.mel_bins, settings.frames)}
    total = settings.frames // 2
    positions, sizes = places(spoken_positions(window.size, total), total, settings.context)
    features = log_mel(window, settings.mel_bins, 2 * len(positions))
    return {"input_features": features, "positions": positions, "sizes": sizes}


def _no_past(settings: Settings) -> dict[str, Any]:
    layers = range(settings.layers)
    empty = [np.zeros((1, settings.heads_of(i), 0, settings.head_size), np.float32) for i in layers]
    return {f"past_{kind}_{i}": empty[i] for kind in ("key", "value") for i in layers}


def _next_logits(
    decoder: Part, ids: list[int], past: dict[str, Any], cross: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Feed tokens: a copy of the logits after the last, float32 [vocabulary], and the longer past."""
    outputs = decoder({"input_ids": np.array([ids], np.int64), **past, **cross})
    logits = np.array(outputs["logits"].numpy(), np.float32).reshape(-1)
    return logits, {name: outputs[name.replace("past", "present", 1)] for name in past}


def _detect_language(decoder: Part, settings: Settings, cross: dict[str, Any]) -> str:
    """The language whose token the model finds likeliest right after the start."""
    logits, _ = _next_logits(decoder, [settings.start], _no_past(settings), cross)
    return max(settings.language_ids, key=lambda code: float(logits[settings.language_ids[code]]))


def _generate(
    decoder: Part,
    settings: Settings,
    cross: dict[str, Any],
    prompt: list[int],
    pick: Callable[[np.ndarray, list[int]], int],
    stop_loops: bool,
) -> tuple[list[int], int]:
    """Generate until the end token, the last position, or a loop.

    Returns the tokens after the prompt, without the end token, and the loop's period in text tokens, or 0.
    """
    tokens: list[int] = []
    ids, past = prompt, _no_past(settings)
    while len(prompt) + len(tokens) < settings.max_tokens:
        logits, past = _next_logits(decoder, ids, past, cross)
        token = pick(logits, tokens)
        if token == settings.eos:
            break
        tokens.append(token)
        ids = [token]
        if stop_loops and (period := _loop_period(_text_tokens(tokens, settings))):
            return tokens, period
    return tokens, 0


def _picker(settings: Settings, stamped: bool) -> Callable[[np.ndarray, list[int]], int]:
    """The greedy choice as a function (logits, which it overwrites; tokens generated so far) -> token."""
    suppress = np.array(settings.suppress, np.intp)
    begin_suppress = np.array(settings.begin_suppress, np.intp)

    def pick(logits: np.ndarray, tokens: list[int]) -> int:
        logits[suppress] = -np.inf
        if not tokens:
            logits[begin_suppress] = -np.inf
        if stamped:
            timestamp_rules_(logits, tokens, settings)
        return int(logits.argmax())

    return pick


def timestamp_rules_(logits: np.ndarray, tokens: Sequence[int], settings: Settings) -> None:
    """Forbid, in place, what would break the pattern of timestamps.

    The first token is a timestamp, and an early one. Timestamps then come in pairs, the end of a segment and
    the start of the next, except directly before the end token. They never decrease, and no segment has zero
    length. Where the timestamps together are likelier than any other token, it must be a timestamp.

    Args:
        logits: float32 [vocabulary], suppressed tokens at minus infinity already.
        tokens: generated so far, without the prompt.
        settings: of a model that has timestamps.
    """
    begin = settings.timestamp_begin
    if begin is None:
        return
    text, stamps = logits[:begin], logits[begin:]
    if settings.no_timestamps is not None:
        logits[settings.no_timestamps] = -np.inf
    if not tokens:
        text[:] = -np.inf
        stamps[settings.max_initial_timestamp_index + 1 :] = -np.inf
        return
    after_stamp = tokens[-1] >= begin
    segment_open = len(tokens) < 2 or tokens[-2] >= begin
    if after_stamp and segment_open:
        stamps[:] = -np.inf
    elif after_stamp:
        text[: settings.eos] = -np.inf
    latest = next((token for token in reversed(tokens) if token >= begin), None)
    if latest is not None:
        closing = after_stamp and not segment_open  # the next segment may start where this one ended
        stamps[: latest - begin + (0 if closing else 1)] = -np.inf
    peak = stamps.max(initial=-np.inf)
    if peak > -np.inf and peak + np.log(np.exp(stamps - peak).sum()) > text.max():
        text[:] = -np.inf


def _text_tokens(tokens: list[int], settings: Settings) -> list[int]:
    return [token for token in tokens if token < settings.eos]


def _closed(tokens: list[int], window_size: int, settings: Settings) -> tuple[list[int], int]:
    """What to keep of a window's tokens, and how many samples to move on.

    A pair of timestamps closes a segment and opens the next. What follows the last pair was not finished: it
    is left to the next window, which starts at that pair. A window that ends with a single timestamp has no
    speech after it, and one without any pair gives no hint: both are kept whole and passed over whole. So is
    one whose last pair comes within a second, for the audio would hardly move on.
    """
    begin = settings.timestamp_begin
    if begin is None or (len(tokens) > 1 and tokens[-2] < begin <= tokens[-1]):
        return tokens, window_size
    for i in range(len(tokens) - 1, 0, -1):
        if tokens[i - 1] >= begin and tokens[i] >= begin:
            step = (tokens[i - 1] - begin) * _STAMP
            return (tokens[:i], step) if step >= _STRIDE else (tokens, window_size)
    return tokens, window_size


def _loop_period(tokens: list[int]) -> int:
    """The shortest period the text ends in a loop of, or 0.

    A loop is the same 1 to 32 tokens at least four times in a row, 24 tokens or more in all: people do say
    "no, no, no, no", and lists repeat a phrase three times.
    """
    for period in range(1, min(_LOOP_LONGEST, len(tokens) // _LOOP_ROUNDS) + 1):
        rounds = max(_LOOP_ROUNDS, -(-_LOOP_TOKENS // period))
        end = tokens[-period * rounds :]
        if len(end) == period * rounds and end[period:] == end[:-period]:
            return period
    return 0


def _cut_loop(tokens: list[int], period: int) -> list[int]:
    """Leave one round of a loop of that period at the end of the tokens; period 0 leaves them as they are."""
    while period and len(tokens) >= 2 * period and tokens[-period:] == tokens[-2 * period : -period]:
        tokens = tokens[:-period]
    return tokens
