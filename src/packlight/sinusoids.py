"""The table of sines and cosines that tells a model where it is, computed instead of stored. No torch: runs on the device."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 1e-3  # of a value up to 1: what two roundings to float16 and the float32 angles of others come to


def sinusoids(positions: int, width: int) -> Array:
    """Positions as Whisper's encoder has them: sines in the first half of a row, cosines in the second.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5, with both halves apart and wavelengths from 2 pi to 10000 * 2 pi.

    Args:
        positions: rows.
        width: columns, even and at least 4.

    Returns:
        float32 [positions, width], every number rounded to float16, so that the last bit of a processor's sine and
        cosine makes no difference.
    """
    half = width // 2
    angles = np.arange(positions)[:, None] * np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float16).astype(np.float32)


def near_sinusoids(table: Array, tolerance: float) -> bool:
    """Whether a table is that of `sinusoids`, each number to a tolerance."""
    if table.ndim != 2 or table.shape[1] % 2 or table.shape[1] < 4 or not len(table):
        return False
    if np.abs(table[:2] - sinusoids(min(2, len(table)), table.shape[1])).max() > tolerance:  # most tables end here
        return False
    return bool(np.abs(table - sinusoids(*table.shape)).max() <= tolerance)
