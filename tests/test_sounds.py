"""Spectrograms in numpy are those of ClapFeatureExtractor, with the cuts that it draws by chance drawn in the middle."""

import os
from pathlib import Path

import numpy as np
import pytest
from transformers import ClapFeatureExtractor

from packlight.audio import read_audio
from packlight.errors import BundleError
from packlight.sounds import SoundSettings, features, starts
from small_sound import EXTRACTOR, RATE, sound

PUBLISHED = {"sampling_rate": 48000, "feature_size": 64, "frequency_min": 50, "frequency_max": 14000}


def pair(truncation="rand_trunc", padding="repeatpad", **more):
    """(transformers' extractor, our settings)."""
    theirs = ClapFeatureExtractor(**{**EXTRACTOR, **more}, truncation=truncation, padding=padding)
    return theirs, SoundSettings(
        rate=theirs.sampling_rate, window=theirs.fft_window_size, hop=theirs.hop_length, longest=theirs.nb_max_samples,
        mels=theirs.feature_size, low=float(theirs.frequency_min), high=float(theirs.frequency_max),
        fused=truncation == "fusion", padding=padding,
    )  # fmt: skip


def difference(theirs, settings, audio):
    """The largest difference in decibels from the original, whose chance is taken away: it draws what lies in the middle."""
    found = theirs(audio, sampling_rate=settings.rate, return_tensors="np")["input_features"]
    ours = features(audio, settings)
    assert ours.shape == found.shape and ours.dtype == np.float32
    return np.abs(found - ours).max()


@pytest.fixture
def middle(monkeypatch):
    monkeypatch.setattr(np.random, "randint", lambda low, high: (high - 1) // 2)
    monkeypatch.setattr(np.random, "choice", lambda values: values[len(values) // 2])


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("seconds", [0.05, 0.37, 0.5, 1.0])
def test_short_sounds_are_as_the_original_makes_them(truncation, padding, seconds):
    theirs, settings = pair(truncation, padding)
    assert difference(theirs, settings, sound(3, seconds)) < 1e-3


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("count", [RATE + 1, RATE + 159, RATE + 160, RATE + 161, RATE + 480, 5 * RATE + 77])
def test_long_sounds_are_as_the_original_makes_them_where_it_draws_the_middle(middle, truncation, count):
    theirs, settings = pair(truncation, fft_window_size=1024)
    audio = sound(5, 6.0)[:count]
    assert difference(theirs, settings, audio) < 1e-3
    if truncation == "rand_trunc" and count > 2 * RATE:
        at_start = features(audio[:RATE], settings)
        assert np.abs(at_start - features(audio, settings)).max() > 1  # the middle is not the start


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_the_published_settings_silence_and_a_click(middle, truncation):
    theirs, settings = pair(truncation, **PUBLISHED, max_length_s=10, hop_length=480, fft_window_size=1024)
    click = np.zeros(48000 * 11, np.float32)
    assert difference(theirs, settings, click) < 1e-3
    click[48000 * 5] = 1
    assert difference(theirs, settings, click) < 1e-3
    assert features(click[:1], settings).shape == (1, 4 if settings.fused else 1, 1001, 64)


def test_real_speech(middle):
    folder = Path(os.environ.get("PACKLIGHT_DATA", "../shared/data")) / "librispeech_test_other_100"
    files = sorted([*folder.rglob("*.flac"), *folder.rglob("*.wav")])[:3]
    if not files:
        pytest.skip("PACKLIGHT_DATA has no speech")
    for truncation in ("rand_trunc", "fusion"):
        theirs, settings = pair(truncation, **PUBLISHED, max_length_s=4, hop_length=480, fft_window_size=1024)
        for file in files:
            assert difference(theirs, settings, read_audio(file, settings.rate)) < 1e-3


def test_cuts_start_in_the_middle_of_each_third():
    assert starts(1001 + 8, 1001) == (1, 4, 7)
    assert starts(1002, 1001) == (0, 1, 0)  # two places for three cuts


def test_settings_out_of_range_are_refused():
    _, settings = pair()
    assert SoundSettings.from_dict(settings.to_dict()) == settings
    for wrong in ({"rate": 0}, {"padding": "mirror"}, {"window": 2**20}, {"high": 9000.0}, {"mels": 0}, {"more": 1}):
        with pytest.raises(BundleError):
            SoundSettings.from_dict({**settings.to_dict(), **wrong})
