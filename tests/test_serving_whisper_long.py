"""Whisper on the device: audio beyond 30 s, window by window, against planted parts."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from packlight.serving import whisper
from packlight.serving.whisper import transcribe
from planted_whisper import (
    EN,
    ENGLISH,
    MULTILINGUAL,
    NO_STAMPS,
    RATE,
    START,
    TRANSCRIBE,
    ZH,
    Planted,
    at,
    peaks,
    quiet,
    script,
    spell,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], np.ndarray]:
    """Audio whose every sample is its time in seconds, and an encoder input that still shows it."""
    monkeypatch.setattr(whisper, "log_mel", lambda audio, mel_bins, frames: audio[None, None])
    return lambda seconds: (np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def speaker(words: list[tuple[float, float]], unfinished: int) -> Callable[[np.ndarray, list[int]], int]:
    """Says, as Whisper does, the words inside the window with their times, and a wrong one for a cut word."""

    def speak(window: np.ndarray, heard: list[int]) -> int:
        begin, end = float(window.flat[0]), float(window.flat[-1])
        tokens: list[int] = []
        for word, (start, stop) in enumerate(words):
            if start < begin - 0.01 or start > end:
                continue
            if stop <= end:
                tokens += [at(start - begin), word, at(stop - begin)]
            else:
                tokens += [at(start - begin), unfinished]
        return script(tokens, prompt=1)(window, heard)

    return speak


def test_transcribe_puts_long_audio_together_in_order_and_without_loss(
    clock: Callable[[float], np.ndarray],
) -> None:
    words = [(3.0 * i + 0.5, 3.0 * i + 3.2) for i in range(24)]
    planted = Planted(speaker(words, unfinished=95))
    heard = transcribe(planted.parts(), spell, replace(ENGLISH, suppress=()), clock(75))
    assert heard.tokens == tuple(range(24))
    assert heard.windows == 3
    assert planted.fed[0] == [START]


def test_transcribe_goes_on_where_the_last_closed_segment_ended(clock: Callable[[float], np.ndarray]) -> None:
    starts: list[float] = []

    def speak(window: np.ndarray, heard: list[int]) -> int:
        if len(heard) == 1:
            starts.append(float(window.flat[0]))
        return script([at(0), 5, at(12.34), at(12.34)], prompt=1)(window, heard)

    transcribe(Planted(speak).parts(), spell, ENGLISH, clock(40))
    np.testing.assert_allclose(starts, [0, 12.34, 24.68, 37.02], atol=1e-3)


def test_transcribe_passes_over_the_whole_window_when_nothing_is_said_after_its_last_segment() -> None:
    planted = Planted(script([at(0), 5, at(4)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(61)).windows == 3


@pytest.mark.parametrize(("rest", "windows"), [(0.05, 1), (0.2, 2)])
def test_transcribe_decodes_a_rest_only_when_it_can_hold_a_word(rest: float, windows: int) -> None:
    planted = Planted(script([at(0), 5, at(4)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(30 + rest)).windows == windows


def test_transcribe_always_moves_on_when_segments_are_tiny() -> None:
    planted = Planted(script([at(0), 5, at(0.02), at(0.02)], prompt=1))
    heard = transcribe(planted.parts(), spell, ENGLISH, quiet(300))
    assert heard.windows == 10
    assert heard.tokens == (5,) * 10


def test_transcribe_takes_at_most_one_window_per_second() -> None:
    planted = Planted(script([at(0), 5, at(1), at(1)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(60)).windows == 60


def test_transcribe_detects_the_language_in_the_first_window_only() -> None:
    def speak(window: np.ndarray, heard: list[int]) -> np.ndarray | int:
        said = script([at(0), 5, at(4)], prompt=3)
        return peaks({EN: 1.0, ZH: 2.0}) if heard == [START] else said(window, heard)

    planted = Planted(speak)
    heard = transcribe(planted.parts(), spell, MULTILINGUAL, quiet(61))
    assert (heard.language, heard.tokens) == ("zh", (5, 5, 5))
    assert planted.fed.count([START]) == 1
    assert planted.fed.count([START, ZH, TRANSCRIBE]) == 3


def test_transcribe_uses_fixed_windows_when_the_model_has_no_timestamps(
    clock: Callable[[float], np.ndarray],
) -> None:
    settings = replace(ENGLISH, timestamp_begin=None, suppress=())
    planted = Planted(lambda window, heard: script([int(window.flat[0])])(window, heard))
    heard = transcribe(planted.parts(), spell, settings, clock(75))
    assert heard.tokens == (0, 30, 60)
    assert planted.fed[0] == [START, NO_STAMPS]


@pytest.mark.parametrize("phrase", [[5], [5, 6, 7], [5, 6, 5, 7, 8, 9, 10]])
def test_transcribe_cuts_a_loop_to_one_round_and_stops_early(phrase: list[int]) -> None:
    settings = replace(ENGLISH, max_tokens=448)
    planted = Planted(script([at(0), 1, 2, *phrase * 60], prompt=1))
    heard = transcribe(planted.parts(), spell, settings, quiet(31))
    assert heard.tokens == (1, 2, *phrase) * 2
    assert len(planted.fed) < 2 * 40


def test_transcribe_cuts_a_loop_with_timestamps_and_goes_on_after_it() -> None:
    said = [token for i in range(30) for token in (at(i), 5, 6, 7, 8, at(i + 1))]
    planted = Planted(script(said, prompt=1))
    heard = transcribe(planted.parts(), spell, replace(ENGLISH, max_tokens=448), quiet(31))
    assert heard.tokens == (5, 6, 7, 8) * heard.windows
    assert heard.windows < 8


def test_transcribe_keeps_what_people_do_repeat() -> None:
    said = [1, *[2] * 8, *[3, 4, 5, 6] * 3, *[7, 8] * 5]
    planted = Planted(script([at(0), *said, at(9)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(30.05)).tokens == tuple(said)
