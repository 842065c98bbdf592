"""Sounds as an audio tower takes them: log-mel spectrograms as ClapFeatureExtractor of transformers makes them, in numpy.

CLAP (Wu et al. 2023, arXiv 2211.06687) hears ten seconds. Of a longer sound it was trained on a random cut
('rand_trunc'), or on the whole scaled down beside three random cuts ('fusion'). An answer must not depend on chance, so
here the cut is the middle one of those that could be drawn, of each third in 'fusion'.
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from packlight.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]

_FLOOR = 1e-10  # least power, before the logarithm
_BLOCK = 256  # frames transformed at once: the working set stays in the cache
_SLANEY_BREAK, _SLANEY_STEP = 15.0, math.log(6.4) / 27.0  # linear up to 1000 Hz, which is 15 mel; logarithmic above


@dataclass(frozen=True)
class SoundSettings:
    """How a sound becomes the input of a tower.

    Args:
        rate: samples per second.
        window: samples in a frame.
        hop: samples from one frame to the next.
        longest: samples that the tower hears.
        mels: bands of the spectrogram.
        low, high: Hz that the bands reach from and to.
        fused: whether a sound is given as four spectrograms, the whole and three cuts, and the bands are HTK's; else
            as one, in Slaney's bands.
        padding: 'repeatpad' repeats a short sound as often as it fits whole, 'repeat' until it is long enough; then, as
            with 'pad', silence follows.
    """

    rate: int
    window: int
    hop: int
    longest: int
    mels: int
    low: float
    high: float
    fused: bool
    padding: str

    @property
    def frames(self) -> int:
        """Frames that the tower takes."""
        return self.longest // self.hop + 1

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "SoundSettings":
        """Read what `to_dict` wrote. Raises BundleError for other keys or values."""
        try:
            made = cls(**values)
            counts = (made.rate, made.window, made.hop, made.longest, made.mels)
            right = all(isinstance(v, int) and 0 < v <= 2**24 for v in counts) and made.mels <= 1024
            right = right and made.window % 2 == 0 and made.window <= min(made.longest, 2**16)
            right = right and 0 <= made.low < made.high <= made.rate / 2 and made.longest <= 120 * made.rate
            right = right and isinstance(made.fused, bool) and made.padding in ("repeatpad", "repeat", "pad")
        except TypeError as error:
            raise BundleError(f"The bundle's sound settings can't be read ({error}). Write it again.") from None
        if not right:
            raise BundleError("The bundle's sound settings hold values out of range. Write the bundle again.")
        return made


def features(audio: Array, settings: SoundSettings) -> Array:
    """The input of an audio tower: float [samples] to float32 [1, 1 or 4, frames, mels], in decibels.

    Within 1e-3 dB of what ClapFeatureExtractor gives where it draws the same cuts; `tests/test_sounds.py` compares them.
    """
    if len(audio) <= settings.longest:
        whole = _spectrogram(_filled(audio, settings), np.arange(settings.frames), settings)
        return np.repeat(whole[None, None], 4 if settings.fused else 1, axis=1)
    if not settings.fused:
        start = (len(audio) - settings.longest) // 2
        return _spectrogram(audio[start : start + settings.longest], np.arange(settings.frames), settings)[None, None]
    total = len(audio) // settings.hop + 1
    if total == settings.frames:
        whole = _spectrogram(audio, np.arange(total), settings)
        return np.repeat(whole[None, None], 4, axis=1)
    cuts = [_spectrogram(audio, np.arange(s, s + settings.frames), settings) for s in starts(total, settings.frames)]
    return np.stack([_shrunk(audio, total, settings), *cuts])[None]


def starts(total: int, frames: int) -> tuple[int, int, int]:
    """The first frames of the three cuts: the middle of each third of the places that a cut can start at."""
    thirds = np.array_split(np.arange(total - frames + 1), 3)
    first, second, third = (int(t[len(t) // 2]) if len(t) else 0 for t in thirds)
    return first, second, third


def _filled(audio: Array, settings: SoundSettings) -> Array:
    """A short sound, repeated as the settings say and followed by silence."""
    times = settings.longest // len(audio)
    if settings.padding == "repeat":
        return np.tile(audio, times + 1)[: settings.longest]
    if settings.padding == "repeatpad":
        audio = np.tile(audio, times)
    return np.pad(audio, (0, settings.longest - len(audio)))


def _shrunk(audio: Array, total: int, settings: SoundSettings) -> Array:
    """The whole spectrogram scaled down to as many frames as the tower takes, linear between the two nearest."""
    scale = np.float32(total / settings.frames)
    place = np.maximum((np.arange(settings.frames, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    before = place.astype(np.int64)
    share = (place - before)[:, None].astype(np.float32)
    first = _spectrogram(audio, before, settings)
    second = _spectrogram(audio, np.minimum(before + 1, total - 1), settings)
    return first * (1 - share) + second * share


def _spectrogram(audio: Array, frames: Array, settings: SoundSettings) -> Array:
    """Decibels [frames, mels] of these frames, float32. A frame is centred on its sample; the ends are mirrored."""
    half = settings.window // 2
    filters = _filters(settings)
    made = np.empty((len(frames), settings.mels), np.float32)
    reach = np.arange(-half, half)
    last = len(audio) - 1
    for start in range(0, len(frames), _BLOCK):
        at = np.abs(frames[start : start + _BLOCK, None] * settings.hop + reach)
        windows = audio[last - np.abs(last - at)].astype(np.float64) * _hann(settings.window)
        spectrum = np.fft.rfft(windows)
        power = spectrum.real**2 + spectrum.imag**2
        made[start : start + _BLOCK] = 10 * np.log10(np.maximum(power @ filters, _FLOOR))
    return made


@lru_cache(maxsize=2)
def _hann(window: int) -> Array:
    """The periodic Hann window [window]."""
    return np.hanning(window + 1)[:-1]


@lru_cache(maxsize=2)
def _filters(settings: SoundSettings) -> Array:
    """Triangles [window / 2 + 1, mels]: on HTK's mel scale with a peak of 1, or on Slaney's with an area of 1."""
    to_mel, to_hertz = (_htk, _from_htk) if settings.fused else (_slaney, _from_slaney)
    ends = [float(to_mel(np.array([edge]))[0]) for edge in (settings.low, settings.high)]
    corners = to_hertz(np.linspace(ends[0], ends[1], settings.mels + 2))
    bins = np.linspace(0, settings.rate // 2, settings.window // 2 + 1)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - low) / (centre - low)
    falling = (high - bins[:, None]) / (high - centre)
    filters: Array = np.maximum(0.0, np.minimum(rising, falling))
    return filters if settings.fused else filters * 2.0 / (high - low)


def _htk(hertz: Array) -> Array:
    return 2595.0 * np.log10(1.0 + hertz / 700.0)


def _from_htk(mel: Array) -> Array:
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


def _slaney(hertz: Array) -> Array:
    above = _SLANEY_BREAK + np.log(np.maximum(hertz, 1e-9) / 1000.0) / _SLANEY_STEP
    return np.where(hertz < 1000.0, hertz * _SLANEY_BREAK / 1000.0, above)


def _from_slaney(mel: Array) -> Array:
    above = 1000.0 * np.exp((mel - _SLANEY_BREAK) * _SLANEY_STEP)
    return np.where(mel < _SLANEY_BREAK, mel * 1000.0 / _SLANEY_BREAK, above)
