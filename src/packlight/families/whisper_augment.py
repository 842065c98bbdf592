"""More recordings out of few: the same speech louder, in noise, faster, later, or with another after it.

Ko et al. 2015, "Audio augmentation for speech recognition" (speed); Park et al. 2019, arXiv 1904.08779, for why little
data needs it. Everything drawn comes from one seed, so a recording has the same variants wherever they are made.
"""

import numpy as np

from packlight.audio import RATE

_GAIN = (-9.0, 6.0)  # decibels
_NOISE = (12.0, 35.0)  # decibels of speech over noise
_SPEED = (0.9, 1.1)
_LATER = 0.5  # seconds of silence before the speech, at most
_JOINED = 1 / 3  # share of variants that join two recordings


def vary(audio: np.ndarray, other: np.ndarray, seed: int, longest: float = 30.0) -> np.ndarray:
    """A variant of a recording.

    Args:
        audio: float32 [n] at 16 kHz.
        other: another recording, which some variants go on with.
        seed: of everything that is drawn.
        longest: seconds; two recordings are joined only where both fit.

    Returns:
        float32 [m] within -1..1.
    """
    draw = np.random.default_rng(seed)
    gain, noise, speed, later = (float(draw.uniform(*span)) for span in (_GAIN, _NOISE, _SPEED, (0, _LATER)))
    places = np.arange(0, len(audio) - 1, speed)
    made = np.interp(places, np.arange(len(audio)), audio) if len(places) else audio
    gap = np.zeros(round(later * RATE))
    joined = np.concatenate([gap, made, gap, other])
    fits = draw.random() < _JOINED and len(joined) <= longest * RATE
    made = joined if fits else np.concatenate([gap, made])[: round(longest * RATE)]
    power = float(np.sqrt(np.mean(np.square(made)))) if len(made) else 0.0
    made = made + draw.normal(0, 1, len(made)) * power * 10 ** (-noise / 20)
    return np.clip(made * 10 ** (gain / 20), -1, 1).astype(np.float32)
