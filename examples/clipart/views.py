"""Pictures as the trained part of the vision tower sees them: features of the frozen blocks, kept on disk.

The first blocks run once per picture and view; then an epoch costs only the blocks that learn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from packlight.families.mobile_dual import MobileDual
from packlight.images import ImageSettings, pixels, read_image

CUT = 12  # blocks that stay as published
SETTINGS = ImageSettings(224, 224, 0, (224, 224), False, 3, (1 / 128,) * 3, (-127 / 128,) * 3)
_BATCH = 8  # what goes through the first blocks then stays in the cache


def changed(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The picture as another might have drawn it: moved, cut or with more margin, mirrored, in somewhat other colours."""
    high, wide = picture.shape[:2]
    scale, ratio = draw.uniform(0.7, 1.2), np.exp(draw.uniform(-0.25, 0.25))
    size = max(8, int(wide * scale * ratio)), max(8, int(high * scale / ratio))
    left, top = (int(draw.uniform(min(0, a - b), max(0, a - b) + 1)) for a, b in zip((wide, high), size, strict=True))
    paper = Image.new("RGB", size, (255, 255, 255))
    paper.paste(Image.fromarray(picture), (-left, -top))
    made = np.asarray(paper).astype(np.float32)
    if draw.random() < 0.5:
        made = made[:, ::-1]
    if draw.random() < 0.15:
        made = np.repeat(made.mean(2, keepdims=True), 3, 2)
    made = 255 - (255 - made) * draw.uniform(0.8, 1.1, 3)
    return made.clip(0, 255).astype(np.uint8)


@torch.inference_mode()
def features(model: MobileDual, files: Sequence[Path], view: int, target: Path) -> np.ndarray:
    """Features [pictures, channels, height, width] in float16 after the first blocks, read from `target` where it is.

    Args:
        model: with the frozen blocks as published.
        files: the pictures.
        view: 0 for the pictures as they are, another number for changed ones.
        target: .npy file.
    """
    if target.is_file():
        return np.load(target, mmap_mode="r")
    tower, made = model.vision_model, []
    for first in range(0, len(files), _BATCH):
        batch = []
        for i, file in enumerate(files[first : first + _BATCH], first):
            picture = read_image(file)
            if view:
                picture = changed(picture, np.random.default_rng((view, i)))
            batch.append(pixels(picture, SETTINGS))
        x = torch.from_numpy(np.concatenate(batch)).contiguous(memory_format=torch.channels_last)
        x = tower.stem(x)
        for block in tower.blocks[:CUT]:
            x = block(x)
        made.append(x.half().numpy())
    partial = target.with_suffix(".partial.npy")
    np.save(partial, np.concatenate(made))
    partial.rename(target)
    return np.load(target, mmap_mode="r")
