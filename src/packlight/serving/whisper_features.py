"""Whisper's input: the log-mel spectrogram of one window of audio.

Paper: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, arXiv 2212.04356, §2.2.
Equal to the reference feature extractor, but frames that lie wholly in the padding are never transformed:
their power is zero and their value is known, so a short clip costs what its length costs.
"""

from functools import lru_cache

import numpy as np

RATE = 16000  # samples per second
HOP = 160  # samples from one frame to the next: 10 ms
_WINDOW = 400  # samples in a frame: 25 ms
_HALF = _WINDOW // 2  # a frame is centred on its sample, so it reaches this far to both sides
_FLOOR = 1e-10  # least power, before the logarithm
_RANGE = 8.0  # powers of ten kept below the loudest
_BLOCK, _ROWS = 128, 16  # frames transformed, and multiplied, at once: the working set stays in the cache

# Slaney's mel scale: linear up to 1000 Hz, which is 15 mel; above, 27 mel to each factor of 6.4.
_BREAK = 15.0
_LOG_STEP = np.log(6.4) / 27.0


def log_mel(audio: np.ndarray, mel_bins: int, frames: int = 3000) -> np.ndarray:
    """The log-mel spectrogram of audio padded with silence, or cut, to `frames` frames of 10 ms.

    Args:
        audio: float [samples] at 16 kHz; may be empty.
        mel_bins: 80, or 128 for the third large model.
        frames: length of the result; 3000 is Whisper's 30 s.

    Returns:
        float32 [1, mel_bins, frames], scaled as Whisper expects it: all values within 2 of the largest.
    """
    audio = audio[: frames * HOP]
    spoken = min(frames, -(-(len(audio) + _HALF) // HOP))  # frames that touch audio
    logs = np.full((mel_bins, frames), np.log10(_FLOOR), np.float32)
    power = np.zeros((_BLOCK, _HALF + 1), np.float32)
    for start in range(0, spoken, _BLOCK):
        count = min(_BLOCK, spoken - start)
        # numpy before 2 transforms in double precision: the assignment goes back to single precision there.
        spectrum = np.fft.rfft(_frames(audio, start, count, frames) * _hann())
        power[:count] = spectrum.real**2 + spectrum.imag**2
        # Few rows at a time stay below what numpy's library shares out: on busy cores, threads that wait for each other
        # cost dearly each time.
        mel = (power.reshape(-1, _ROWS, _HALF + 1) @ mel_filters(mel_bins)).reshape(_BLOCK, mel_bins)[:count]
        logs[:, start : start + count] = np.log10(np.maximum(mel, _FLOOR, out=mel)).T
    # Single-precision logarithms of the floor differ in their last bit between processors.
    np.maximum(logs, max(logs.max() - _RANGE, np.float32(np.log10(_FLOOR))), out=logs)
    logs += 4.0
    logs /= 4.0
    return logs[None]


def _frames(audio: np.ndarray, first: int, count: int, frames: int) -> np.ndarray:
    """Frames [count, 400] of the audio from the first on: mirrored before its start, silent after its end.

    The padded audio is mirrored at its end as well, which shows only where the last frame is reached.
    """
    low = first * HOP - _HALF
    high, total = low + (count - 1) * HOP + _WINDOW, frames * HOP
    ahead, beyond = max(0, -low), max(0, high - total)
    signal = np.zeros(high - low - ahead - beyond, np.float32)
    inside = audio[low + ahead : high - beyond]
    signal[: len(inside)] = inside
    if ahead or beyond:
        signal = np.pad(signal, (ahead, beyond), mode="reflect")
    return np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::HOP]


@lru_cache(maxsize=1)
def _hann() -> np.ndarray:
    """The periodic Hann window, float32 [400]."""
    return np.hanning(_WINDOW + 1)[:-1].astype(np.float32)


@lru_cache(maxsize=4)
def mel_filters(mel_bins: int) -> np.ndarray:
    """Triangles on Slaney's mel scale from 0 to 8000 Hz, each of the same area: float32 [201, mel_bins]."""
    mel = np.linspace(0.0, _BREAK + np.log(RATE / 2 / 1000.0) / _LOG_STEP, mel_bins + 2)
    corners = np.where(mel < _BREAK, mel * 1000.0 / _BREAK, 1000.0 * np.exp((mel - _BREAK) * _LOG_STEP))
    bins = np.linspace(0.0, RATE / 2, _WINDOW // 2 + 1)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - low) / (centre - low)
    falling = (high - bins[:, None]) / (high - centre)
    filters: np.ndarray = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)
    return filters.astype(np.float32)
