"""Whisper on the device: features, settings, and audio of up to 30 s, against planted parts."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packlight.audio import read_audio
from packlight.errors import BundleError, DataError
from packlight.serving.whisper import Settings, log_mel, transcribe
from planted_whisper import (
    EN,
    ENGLISH,
    EOS,
    MULTILINGUAL,
    NO_STAMPS,
    RATE,
    START,
    TRANSCRIBE,
    TRANSLATE,
    ZH,
    Planted,
    at,
    peaks,
    quiet,
    script,
    spell,
)

# Features


@pytest.fixture(scope="module")
def speech(data_dir: Path) -> np.ndarray:
    paths = sorted((data_dir / "librispeech_train_clean_calib" / "audio").glob("*.flac"))[:3]
    return np.concatenate([read_audio(path) for path in paths])


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("samples", [1, 150, 3 * RATE + 7, 479_700, 479_970, 480_000, 600_000])
def test_log_mel_equals_the_reference_on_speech(speech: np.ndarray, mel_bins: int, samples: int) -> None:
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=mel_bins)
    audio = speech[:samples]
    expected = extractor(audio, sampling_rate=RATE, return_tensors="np").input_features
    features = log_mel(audio, mel_bins)
    assert features.dtype == np.float32
    assert features.flags.c_contiguous
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_log_mel_equals_the_reference_on_noise_and_silence(mel_bins: int) -> None:
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=mel_bins)
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * RATE).astype(np.float32)
    for audio in (noise, quiet(2)):
        expected = extractor(audio, sampling_rate=RATE, return_tensors="np").input_features
        np.testing.assert_allclose(log_mel(audio, mel_bins), expected, rtol=0, atol=1e-4)


def test_log_mel_of_silence_is_the_known_constant() -> None:
    assert (log_mel(quiet(1), 80) == np.float32(-1.5)).all()
    assert (log_mel(quiet(0), 80) == np.float32(-1.5)).all()


def test_log_mel_of_fewer_frames_starts_as_the_full_one_does() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    np.testing.assert_allclose(log_mel(noise, 80, 500), log_mel(noise, 80)[:, :, :500], atol=1e-5)


@pytest.mark.parametrize(("seconds", "frames"), [(0, 2), (3, 302), (29.99, 3000), (40, 3000)])
def test_log_mel_transforms_only_frames_that_touch_audio(
    monkeypatch: pytest.MonkeyPatch, seconds: float, frames: int
) -> None:
    transformed = []
    rfft = np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda block: transformed.append(len(block)) or rfft(block))
    log_mel(quiet(seconds), 80)
    assert sum(transformed) == frames


# Settings


def test_settings_survive_json() -> None:
    for settings in (ENGLISH, MULTILINGUAL, replace(ENGLISH, timestamp_begin=None, language="en")):
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("name", sorted(set(ENGLISH.to_dict()) - {"context"}))
def test_settings_refuse_a_missing_key(name: str) -> None:
    values = ENGLISH.to_dict()
    del values[name]
    with pytest.raises(BundleError, match=f"missing keys: {name}"):
        Settings.from_dict(values)


def test_settings_refuse_an_unknown_key_and_what_is_no_object() -> None:
    with pytest.raises(BundleError, match="unknown keys: beam"):
        Settings.from_dict(ENGLISH.to_dict() | {"beam": 5})
    with pytest.raises(BundleError, match="no JSON object"):
        Settings.from_dict([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 0), ("heads", "2"), ("max_tokens", True), ("eos", -1), ("timestamp_begin", 1.5),
     ("suppress", [-1]),
     ("suppress", "ab"), ("language_ids", {"en": "x"}), ("task_ids", []), ("language", 3), ("task", None)],
)  # fmt: skip
def test_settings_refuse_a_wrong_value(name: str, value: Any) -> None:
    with pytest.raises(BundleError, match=f"'{name}' must be"):
        Settings.from_dict(ENGLISH.to_dict() | {name: value})


# Up to 30 s


def test_transcribe_returns_the_planted_text_and_feeds_each_token_once() -> None:
    planted = Planted(script([5, 6, 7]))
    heard = transcribe(planted.parts(), spell, ENGLISH, quiet(4))
    assert (heard.tokens, heard.text, heard.windows, heard.language) == ((5, 6, 7), "5 6 7", 1, None)
    assert planted.fed == [[START, NO_STAMPS], [5], [6], [7]]
    assert set(heard.seconds) == {"features", "encoder", "decoder"}
    assert all(value > 0 for value in heard.seconds.values())


def test_transcribe_never_says_a_suppressed_token() -> None:
    said = Planted(lambda window, heard: peaks({97: 9.0, START: 8.0, 5: 7.0, EOS: 6.0 + (len(heard) > 4) * 2}))
    assert transcribe(said.parts(), spell, ENGLISH, quiet(1)).tokens == (5, 5, 5)


def test_transcribe_leaves_unasked_timestamps_out_of_the_text() -> None:
    said = Planted(script([at(0), 5, at(2), 6]))
    assert transcribe(said.parts(), spell, ENGLISH, quiet(4)).tokens == (5, 6)


def test_transcribe_suppresses_begin_tokens_at_the_beginning_only() -> None:
    said = Planted(lambda window, heard: peaks({[96, 96, EOS][min(len(heard) - 2, 2)]: 9.0, 5: 8.0}))
    assert transcribe(said.parts(), spell, ENGLISH, quiet(1)).tokens == (5, 96)


def test_transcribe_ends_at_the_last_position_and_cuts_no_loop_in_short_audio() -> None:
    planted = Planted(lambda window, heard: 5)
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(30)).tokens == (5,) * (ENGLISH.max_tokens - 2)
    assert len(planted.fed) == ENGLISH.max_tokens - 2


def test_transcribe_returns_no_text_when_the_model_says_nothing() -> None:
    settings = replace(ENGLISH, begin_suppress=())
    heard = transcribe(Planted(script([])).parts(), spell, settings, quiet(2))
    assert (heard.tokens, heard.text) == ((), "")


def test_transcribe_detects_the_language_among_language_tokens() -> None:
    def speak(window: np.ndarray, heard: list[int]) -> np.ndarray | int:
        return peaks({5: 9.0, EN: 1.0, ZH: 2.0}) if heard == [START] else script([5], prompt=4)(window, heard)

    planted = Planted(speak)
    heard = transcribe(planted.parts(), spell, MULTILINGUAL, quiet(2))
    assert (heard.language, heard.tokens) == ("zh", (5,))
    assert planted.fed == [[START], [START, ZH, TRANSCRIBE, NO_STAMPS], [5]]


@pytest.mark.parametrize(
    ("settings", "language", "task", "prompt"),
    [
        (MULTILINGUAL, "en", "translate", [START, EN, TRANSLATE, NO_STAMPS]),
        (replace(MULTILINGUAL, language="zh"), None, None, [START, ZH, TRANSCRIBE, NO_STAMPS]),
        (replace(MULTILINGUAL, language="zh"), "en", None, [START, EN, TRANSCRIBE, NO_STAMPS]),
        (ENGLISH, "en", "transcribe", [START, NO_STAMPS]),
        (replace(ENGLISH, no_timestamps=None, timestamp_begin=None), None, None, [START]),
    ],
)
def test_transcribe_prompts_as_asked(
    settings: Settings, language: str | None, task: str | None, prompt: list[int]
) -> None:
    planted = Planted(script([5], prompt=len(prompt)))
    assert transcribe(planted.parts(), spell, settings, quiet(2), language, task).tokens == (5,)
    assert planted.fed[0] == prompt


@pytest.mark.parametrize(
    ("settings", "language", "task", "words"),
    [
        (MULTILINGUAL, "xx", None, "'xx'. Known: en, zh"),
        (MULTILINGUAL, "en", "sing", "'sing'. Known: transcribe, translate"),
        (ENGLISH, "zh", None, "'zh'. Known: en"),
        (ENGLISH, None, "translate", "'translate'. Known: transcribe"),
    ],
)
def test_transcribe_names_the_known_when_the_asked_is_unknown(
    settings: Settings, language: str | None, task: str | None, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        transcribe(Planted(script([5])).parts(), spell, settings, quiet(1), language, task)


@pytest.mark.parametrize("audio", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32)])
def test_transcribe_refuses_what_is_no_mono_audio(audio: np.ndarray) -> None:
    with pytest.raises(DataError, match="mono"):
        transcribe(Planted(script([5])).parts(), spell, ENGLISH, audio)


def test_serving_whisper_imports_neither_torch_nor_transformers_nor_audio_libraries() -> None:
    code = (
        "import sys, packlight.serving.whisper, packlight.audio; "
        "print([m for m in ('torch', 'transformers', 'scipy', 'soundfile', 'soxr') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
