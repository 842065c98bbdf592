"""Audio files to samples."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from packlight.audio import audio_seconds, read_audio
from packlight.errors import DataError


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    times = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * math.pi * hertz * times)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = 16000, **how: str) -> Path:
    soundfile.write(path, samples, rate, **how)
    return path


@pytest.mark.parametrize("name", ["a.flac", "a.wav"])
def test_read_audio_returns_the_samples_written_when_lossless(tmp_path: Path, name: str) -> None:
    samples = tone(16000)
    read = read_audio(write(tmp_path / name, samples))
    assert read.dtype == np.float32
    assert read.shape == samples.shape
    assert np.abs(read - samples).max() <= 1 / 32768


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
def test_read_audio_returns_the_tone_when_lossy(tmp_path: Path, name: str) -> None:
    read = read_audio(write(tmp_path / name, tone(16000, 2.0)))
    assert np.abs(np.fft.rfft(read[:16000])).argmax() == 440


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_read_audio_equals_resampling_at_once(tmp_path: Path, rate: int) -> None:
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, rate * 4 + 17).astype(np.float32)
    read = read_audio(write(tmp_path / "a.wav", samples, rate, subtype="FLOAT"))
    np.testing.assert_allclose(read, soxr.resample(samples, rate, 16000, "HQ"), atol=1e-6)


def test_read_audio_averages_channels(tmp_path: Path) -> None:
    left, right = tone(16000, hertz=200.0), tone(16000, hertz=900.0)
    read = read_audio(write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT"))
    np.testing.assert_allclose(read, (left + right) / 2, atol=1e-7)


def test_read_audio_returns_zeros_when_silent(tmp_path: Path) -> None:
    read = read_audio(write(tmp_path / "a.wav", np.zeros(44100, np.float32), 44100))
    assert read.shape == (16000,)
    assert not read.any()


def test_read_audio_stays_within_one_when_the_file_is_louder(tmp_path: Path) -> None:
    read = read_audio(write(tmp_path / "a.wav", 6 * tone(16000), subtype="FLOAT"))
    assert np.abs(read).max() == 1.0


def test_read_audio_agrees_with_soundfile_on_speech(data_dir: Path) -> None:
    path = next(iter(sorted((data_dir / "librispeech_train_clean_calib" / "audio").glob("*.flac"))))
    expected, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(read_audio(path), expected)


def test_read_audio_holds_a_long_file_about_once(tmp_path: Path) -> None:
    import tracemalloc

    path = write(tmp_path / "a.wav", np.zeros((20 * 60 * 16000, 2), np.int16))
    tracemalloc.start()
    read = read_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.size == 20 * 60 * 16000
    assert peak < 1.5 * read.nbytes


@pytest.mark.parametrize("of", [read_audio, audio_seconds])
def test_missing_file_folder_and_junk_are_data_errors(tmp_path: Path, of) -> None:
    (tmp_path / "junk.wav").write_bytes(b"no audio at all")
    (tmp_path / "nothing.flac").write_bytes(b"")
    for name, words in [
        ("no.wav", "no audio file"),
        ("", "folder"),
        ("junk.wav", "can't be read"),
        ("nothing.flac", "can't be read"),
    ]:
        with pytest.raises(DataError, match=words):
            of(tmp_path / name)


@pytest.mark.parametrize("of", [read_audio, audio_seconds])
def test_file_without_samples_is_a_data_error(tmp_path: Path, of) -> None:
    with pytest.raises(DataError, match="empty"):
        of(write(tmp_path / "a.wav", np.zeros(0, np.float32)))


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.flac", "a.mp3"])
def test_read_audio_refuses_a_file_cut_in_half(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, tone(16000, 20.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut short|can't be read"):
        read_audio(path)


def test_read_audio_refuses_a_file_corrupt_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 160000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(DataError, match="can't be read"):
        read_audio(path)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF024])
def test_read_audio_takes_a_streamed_wav_whose_header_has_no_length(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.wav", tone(16000))
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", length)
    path.write_bytes(content)
    assert read_audio(path).size == 16000


def test_read_audio_refuses_a_flac_of_unknown_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(16000))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(DataError, match="how long"):
        read_audio(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_read_audio_refuses_samples_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    samples = tone(16000, 10.0)
    samples[-5] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        read_audio(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_read_audio_refuses_an_absurd_sample_rate(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample rate of 1 Hz"):
        read_audio(write(tmp_path / "a.wav", np.zeros(100, np.float32), 1))


@pytest.mark.parametrize("rate", [8000, 44100])
def test_audio_seconds_is_the_length_whatever_the_rate(tmp_path: Path, rate: int) -> None:
    assert audio_seconds(write(tmp_path / "a.flac", tone(rate, 2.5), rate)) == pytest.approx(2.5)
