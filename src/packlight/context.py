"""Which positions of a padded window an encoder needs to see: the spoken ones, and few of the silence after them.

Whisper pads every clip to 30 s, and an encoder that is simply cut short goes wrong, since it has learned to lean on
the padding (FUTO's ACFT trains that away). It leans on the silence right after the speech and on the very end of the
window, as on registers (Darcet et al. 2023, arXiv 2309.16588). So both are kept, and the silence between them is
represented by a few of its positions, each with the weight in attention of those it stands for: proportional
attention (Bolya et al. 2022, arXiv 2210.09461, eq. 1), where merged tokens keep the pull that they had.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AudioContext:
    """How much of the padding is kept, in positions of the encoder.

    Args:
        near: right after the speech.
        middle: that stand for all between.
        far: at the end of the window.
    """

    near: int = 64
    middle: int = 16
    far: int = 32

    @property
    def kept(self) -> int:
        """Positions beside the spoken ones."""
        return self.near + self.middle + self.far


def places(spoken: int, total: int, context: AudioContext) -> tuple[np.ndarray, np.ndarray]:
    """The positions to keep, and how many positions each stands for.

    Args:
        spoken: positions that hold speech, from the first on.
        total: positions of the whole window.
        context: how much of the rest is kept.

    Returns:
        (positions, int64 and rising; sizes, the logarithm of the count, float32). All of them, with sizes of 0, where
        nothing would be saved.
    """
    if total - spoken <= context.kept:
        return np.arange(total), np.zeros(total, np.float32)
    low, high = spoken + context.near, total - context.far
    edges = np.linspace(low, high, context.middle + 1)
    middle = ((edges[:-1] + edges[1:]) / 2).astype(np.int64)
    positions = np.concatenate([np.arange(low), middle, np.arange(high, total)])
    sizes = np.zeros(len(positions), np.float32)
    sizes[low : low + context.middle] = np.log(np.diff(edges))
    return positions, sizes


def spoken_positions(samples: int, total: int) -> int:
    """Positions of 20 ms, 320 samples at 16 kHz, that hold some of the audio; at most `total`."""
    return min(total, -(-samples // 320))
