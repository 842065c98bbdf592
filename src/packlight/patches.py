"""Pictures of any shape as a row of patches, as the NaFlex models of SigLIP 2 take them. Pillow and numpy.

SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786) keeps a picture's proportions: it is scaled so that its patches are as
many as fit into a given number. The table of positions, learnt for a square, is resized to the picture's shape. That is a
linear map, so its matrix is an input of the tower: one exported graph serves every shape, and no patch is padding.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from packlight.images import read_settings

Array = np.ndarray[Any, np.dtype[Any]]
_LARGEST, _SMALLEST, _STEP = 100.0, 1e-6, 1e-5  # of the search for the scale


@dataclass(frozen=True)
class PatchSettings:
    """How a picture becomes a row of patches.

    Args:
        patch: pixels of a patch's side.
        most: patches that a picture is scaled to have at most.
        side: the table of positions has side by side rows.
        resample: number of Pillow's filter.
        gain, offset: per channel: value = gain * byte + offset.
    """

    patch: int
    most: int
    side: int
    resample: int
    gain: tuple[float, float, float]
    offset: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> "PatchSettings":
        """Read what `to_dict` wrote. Raises BundleError for other keys or values."""

        def right(made: PatchSettings) -> bool:
            counts = zip((made.patch, made.most, made.side), (256, 2**14, 256), strict=True)
            return all(isinstance(v, int) and 0 < v <= limit for v, limit in counts)

        return read_settings(cls, values, right)


def patches(image: Array, settings: PatchSettings) -> dict[str, Array]:
    """The inputs of a tower for a picture uint8 [height, width, 3].

    Returns:
        'pixel_values' float32 [1, patches, patch * patch * 3], the patches row by row, within 1e-4 of what the processor
        of transformers gives; 'positions' float32 [1, patches, side * side]: what each row of the table of positions
        counts for each patch.
    """
    from PIL import Image

    high, wide = grid(image.shape[0], image.shape[1], settings)
    size = (wide * settings.patch, high * settings.patch)
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling(settings.resample)))
    values = scaled.astype(np.float32) * np.array(settings.gain, np.float32) + np.array(settings.offset, np.float32)
    cut = values.reshape(high, settings.patch, wide, settings.patch, 3).transpose(0, 2, 1, 3, 4)
    rows, columns = resizing(settings.side, high), resizing(settings.side, wide)
    positions = rows[:, None, :, None] * columns[None, :, None, :]
    return {
        "pixel_values": np.ascontiguousarray(cut.reshape(1, high * wide, -1)),
        "positions": np.ascontiguousarray(positions.reshape(1, high * wide, -1)),
    }


def grid(high: int, wide: int, settings: PatchSettings) -> tuple[int, int]:
    """Rows and columns of patches for a picture: the largest of its proportions that has no more than `most`."""

    def sides(scale: float) -> tuple[int, int]:
        first, second = (max(1, math.ceil(side * scale / settings.patch)) for side in (high, wide))
        return first, second

    low, top = _SMALLEST, _LARGEST
    while top - low >= _STEP:
        middle = (low + top) / 2
        rows, columns = sides(middle)
        low, top = (middle, top) if rows * columns <= settings.most else (low, middle)
    return sides(low)


def resizing(before: int, after: int) -> Array:
    """The matrix [after, before] that resizes a row linearly, averaging over all that a step covers when it shrinks.

    Each place weighs its neighbours by a triangle as wide as a step, at least one, and the weights sum to 1: what
    `torch.nn.functional.interpolate` does with antialias, but for a result one place wide, which it fills with the values
    of the first row (PyTorch 2.13): pictures one patch wide get other vectors here than from transformers.
    """
    scale = before / after
    reach = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(before) + 0.5 - centres[:, None]) / reach)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
