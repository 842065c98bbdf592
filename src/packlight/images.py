"""Pictures as a vision tower takes them: read, scaled, cut and normalised with Pillow and numpy, as transformers does."""

import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import BundleError, DataError, RuntimeMissing

Array = np.ndarray[Any, np.dtype[Any]]

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_MOST_PIXELS = 178_956_970  # more than twice its own limit Pillow does not open
_STRIP = 256  # rows turned into numbers at once
# What Pillow raises for damaged files, depending on the format and the place of the damage.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes the input of a tower.

    Args:
        height, width: pixels of the input.
        shortest: pixels that its shorter side is scaled to, the other in proportion; 0 for `scaled`.
        scaled: height and width that it is scaled to.
        crop: whether height by width pixels are then cut out of the middle.
        resample: number of Pillow's filter: 0 nearest, 2 bilinear, 3 bicubic, 1 Lanczos.
        gain, offset: per channel: value = gain * byte + offset.
    """

    height: int
    width: int
    shortest: int
    scaled: tuple[int, int]
    crop: bool
    resample: int
    gain: tuple[float, float, float]
    offset: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> "ImageSettings":
        """Read what `to_dict` wrote. Raises BundleError for other keys or values."""

        def right(made: ImageSettings) -> bool:
            sides = [made.height, made.width, *made.scaled, made.shortest]
            whole = all(isinstance(v, int) and 0 <= v <= 8192 for v in sides) and min(sides[:4]) > 0
            return whole and len(made.scaled) == 2 and isinstance(made.crop, bool)

        return read_settings(cls, values, right)


def read_settings(kind: type[Any], values: Any, right: Callable[[Any], bool]) -> Any:
    """Picture settings of a kind, with a filter, gain and offset, from what its `to_dict` wrote.

    Args:
        kind: the dataclass.
        values: of the bundle's manifest.
        right: whether all else is in range.

    Raises:
        BundleError: other keys or values.
    """
    try:
        made = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        fine = right(made) and made.resample in range(6)
        for numbers in (made.gain, made.offset):
            fine = fine and len(numbers) == 3 and all(math.isfinite(v) for v in numbers)
    except (TypeError, AttributeError) as error:
        raise BundleError(f"The bundle's picture settings can't be read ({error}). Write it again.") from None
    if not fine:
        raise BundleError("The bundle's picture settings hold values out of range. Write the bundle again.")
    return made


def read_image(path: Path) -> Array:
    """A picture as uint8 [height, width, 3]: turned as its EXIF says, transparency on white, the first frame of several.

    16-bit greys are scaled to 8 bits.

    Raises:
        DataError: no picture there, a damaged one, or one of more than 178 million pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeMissing("This needs Pillow: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures and odd EXIF blocks, which do no harm
            with Image.open(path) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise DataError(f"{path} has {image.width} x {image.height} pixels; make it smaller.")
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _bytes(image)
    except FileNotFoundError:
        raise DataError(f"There is no picture {path}.") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} has more than {_MOST_PIXELS:,} pixels; make it smaller.") from None
    except MemoryError:
        raise DataError(f"{path} needs more memory than there is; make it smaller.") from None
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is no picture that can be read ({reason}). Take it out or save it again.") from None


def _bytes(image: Any) -> Array:
    """A picture of Pillow as uint8 [height, width, 3], strip by strip: a large one is in memory twice, not five times."""
    wide, high = image.size
    # A file of 32-bit greys says nothing of their range.
    deep = image.mode.startswith("I") and (image.mode != "I" or image.getextrema()[1] > 255)
    made = np.empty((high, wide, 3), np.uint8)
    for top in range(0, high, _STRIP):
        made[top : top + _STRIP] = _strip(image.crop((0, top, wide, min(high, top + _STRIP))), deep)
    return made


def _strip(image: Any, deep: bool) -> Array:
    """The same of a few rows; `deep` greys have 16 bits."""
    from PIL import Image

    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / (257 if deep else 1)
        return grey.clip(0, 255).round().astype(np.uint8)[..., None]
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def pixels(image: Array, settings: ImageSettings) -> Array:
    """The input of a vision tower: uint8 [height, width, 3] to float32 [1, 3, settings.height, settings.width].

    Within 1e-4 of what the processor of transformers gives; `tests/test_images.py` compares them.
    """
    from PIL import Image

    high, wide = image.shape[:2]
    if settings.shortest:
        short, long = min(high, wide), max(high, wide)
        other = int(settings.shortest * long / short)
        size = (settings.shortest, other) if wide <= high else (other, settings.shortest)
    else:
        size = (settings.scaled[1], settings.scaled[0])
    # A strip of 1 by 10,000 pixels would be scaled to gigabytes of which the middle is kept: scale that alone.
    image = _middle(image, size, settings)
    if settings.shortest and max(size) > 64 * settings.shortest:
        size = (min(size[0], 64 * settings.shortest), min(size[1], 64 * settings.shortest))
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling(settings.resample)))
    if settings.crop:
        scaled = _cut(scaled, settings.height, settings.width)
    gain, offset = np.array(settings.gain, np.float32), np.array(settings.offset, np.float32)
    return np.ascontiguousarray((scaled.astype(np.float32) * gain + offset).transpose(2, 0, 1)[None])


def _middle(image: Array, size: tuple[int, int], settings: ImageSettings) -> Array:
    """The middle of a picture so long that scaling all of it would need gigabytes."""
    most = 64 * settings.shortest
    if not settings.shortest or max(size) <= most:
        return image
    high, wide = image.shape[:2]
    keep = 64 * min(high, wide)
    top, left = max(0, (high - keep) // 2), max(0, (wide - keep) // 2)
    return np.ascontiguousarray(image[top : top + keep, left : left + keep])


def _cut(image: Array, height: int, width: int) -> Array:
    """The middle [height, width] of a picture, with black around one that is smaller."""
    high, wide = image.shape[:2]
    more = max(0, height - high), max(0, width - wide)
    if any(more):
        before = [math.ceil(m / 2) for m in more]
        pad = [(before[0], more[0] - before[0]), (before[1], more[1] - before[1]), (0, 0)]
        # What transformers cuts out starts where the unpadded middle would, moved by the padding.
        top, left = (high - height) // 2 + before[0], (wide - width) // 2 + before[1]
        image = np.pad(image, pad)
    else:
        top, left = (high - height) // 2, (wide - width) // 2
    return image[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
