"""Audio files to samples: any format libsndfile reads, mixed down, resampled. Runs on the device.

Needs numpy, soundfile and soxr. Everything is done block by block, so an hour of audio costs the memory of
its result and little more.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import DataError

_BLOCK = 1 << 16  # frames read at once
_LOWEST_RATE = 1000  # Hz; below it a small hostile file would swell to gigabytes when resampled
_UNKNOWN_LENGTH = 2**62  # libsndfile reports 2**63 - 1 frames when the header doesn't say
_STREAMED = 0x7FFF0000  # a chunk this long was written before its length was known (ffmpeg or sox to a pipe)
_SLACK = 0.1  # seconds that may be missing: headers of MP3 files are often off by a frame or two

# libsndfile reads what is left of a cut WAV or AIFF file and only notes the difference in its log.
_CUT_CHUNK = re.compile(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)


RATE = 16000  # samples per second that every speech model here takes


def read_audio(path: Path, rate: int = RATE) -> np.ndarray:
    """Read an audio file as mono samples.

    Channels are averaged, and other sample rates are resampled with soxr (HQ). Silence is valid audio.

    Args:
        path: a file of any format libsndfile reads: FLAC, WAV, OGG, MP3, AIFF and others.
        rate: samples per second of the result.

    Returns:
        float32 [samples], within -1..1.

    Raises:
        DataError: the file is missing, a folder, unreadable, cut short, empty, or holds NaN or infinity.
    """
    path = Path(path)
    samples = bytearray()  # grows in place: a list of blocks to join would hold everything twice
    frames = 0
    with _opened(path) as sound:
        resample = _resampler(sound.samplerate, rate)
        while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                raise DataError(f"{path} holds NaN or infinite samples. Write it again from its source.")
            frames += len(block)
            samples += resample(block.mean(axis=1), False).tobytes()
        if frames < sound.frames - _SLACK * sound.samplerate:
            raise _cut_short(path, f"its header promises {sound.frames} samples, it holds {frames}")
        samples += resample(np.zeros(0, np.float32), True).tobytes()
    result = np.frombuffer(samples, dtype=np.float32)
    if not result.size:
        raise DataError(f"{path} is too short: nothing is left of its {frames} samples at {rate} Hz.")
    return np.clip(result, -1.0, 1.0, out=result)


def open_audio(path: Path, texts: Sequence[str]) -> np.ndarray:
    """The input that a sample is for a model of speech, whatever was said in it. Raises as `read_audio`."""
    return read_audio(path)


def audio_seconds(path: Path) -> float:
    """The length of an audio file in seconds, from its header alone.

    Raises:
        DataError: the file is missing, a folder, unreadable, cut short (where the header shows it), or empty.
    """
    with _opened(Path(path)) as sound:
        return float(sound.frames / sound.samplerate)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as a `soundfile.SoundFile` with a sane header; what libsndfile raises becomes DataError."""
    import soundfile

    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"There is no audio file {path}. Check the path.") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that no file can have
        raise DataError(f"{path} can't be opened ({getattr(error, 'strerror', error)}). Check the path.") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} is a folder, not an audio file. Name a file in it.")
    try:
        # Names are bytes to Linux, and need not be UTF-8; soundfile would refuse to encode those that are not.
        with soundfile.SoundFile(path if os.name == "nt" else os.fsencode(path)) as sound:
            _check_header(path, sound)
            yield sound
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(". ")
        if "not a regular file" in reason:  # what libsndfile says of an .mp3 that is none
            reason = "Format not recognised"
        raise DataError(
            f"{path} can't be read as audio ({reason}). If it plays elsewhere, convert it to WAV or FLAC; "
            f"else replace it."
        ) from None


def _check_header(path: Path, sound: Any) -> None:
    if sound.frames == 0:
        raise DataError(f"{path} is empty: it holds no samples. Leave it out, or record it again.")
    if sound.frames >= _UNKNOWN_LENGTH:
        raise DataError(f"{path} doesn't say how long it is. Write it again to a file, not to a pipe.")
    if sound.samplerate < _LOWEST_RATE:
        raise DataError(f"{path} has a sample rate of {sound.samplerate} Hz; speech needs {_LOWEST_RATE} or more.")
    for declared, present in _CUT_CHUNK.findall(sound.extra_info):
        if int(present) < int(declared) < _STREAMED:
            raise _cut_short(path, f"its header promises {declared} bytes of samples, it holds {present}")


def _cut_short(path: Path, how: str) -> DataError:
    return DataError(f"{path} is cut short: {how}. Copy it again from its source.")


def _resampler(source: int, target: int) -> Callable[[np.ndarray, bool], np.ndarray]:
    """A function (samples, is this the last call) -> samples at the target rate, fed block after block."""
    if source == target:
        return lambda samples, last: samples
    import soxr

    stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality="HQ")
    return lambda samples, last: stream.resample_chunk(samples, last=last)
