"""The vision tower of SigLIP 2 NaFlex (Tschannen et al. 2025, arXiv 2502.14786): a row of patches per picture.

The original resizes its table of positions inside the tower, by a loop over the pictures that no graph can hold. Here the
processor gives the resizing as a matrix, and the tower multiplies the table by it; see `packlight.patches`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packlight.errors import ModelError
from packlight.patches import PatchSettings, patches

ARCHITECTURE = "Siglip2Model"
_TOLERANCE = 1e-4  # of a pixel
_SHAPES = ((90, 133, 3), (301, 77, 3), (40, 40, 3))


def embed(module: nn.Module, pixel_values: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """What get_image_features gives: [n, d].

    Args:
        module: the model.
        pixel_values: [n, patches, patch * patch * 3].
        positions: [n, patches, rows of the table of positions].
        mask: [n, patches], 1 for a patch and 0 for padding; None where nothing is.
    """
    tower: Any = module.vision_model
    table = tower.embeddings.position_embedding(torch.arange(positions.shape[-1]))
    states = tower.embeddings.patch_embedding(pixel_values) + positions @ table
    if mask is None:
        wide = None
    else:
        wide = torch.zeros(mask.shape, dtype=states.dtype).masked_fill(mask == 0, torch.finfo(states.dtype).min)
        wide = wide[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    states = tower.encoder(inputs_embeds=states, attention_mask=wide).last_hidden_state
    found: Tensor = tower.head(tower.post_layernorm(states), mask)
    return found


def joined(contents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pictures of different shapes as one batch: filled up to the longest, with 'patch_mask' that tells."""
    most = max(c["pixel_values"].shape[1] for c in contents)

    def filled(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, 0, 0, most - values.shape[1]))

    batch = {key: torch.cat([filled(c[key]) for c in contents]) for key in ("pixel_values", "positions")}
    counts = torch.tensor([c["pixel_values"].shape[1] for c in contents])
    return {**batch, "patch_mask": (torch.arange(most) < counts[:, None]).long()}


def processing(
    folder: Path, module: nn.Module, original: Any
) -> tuple[Callable[..., dict[str, Tensor]], PatchSettings]:
    """How pictures become rows of patches, as the folder's processor says, tried against it.

    Args:
        folder: of the model.
        module: the model.
        original: its picture processor.

    Returns:
        (picture uint8 [height, width, 3] -> {'pixel_values', 'positions'}, the settings).

    Raises:
        ModelError: a processor that does something else.
    """
    from PIL import Image

    def theirs(picture: np.ndarray) -> np.ndarray:
        found = original(images=Image.fromarray(picture), return_tensors="np")
        return np.asarray(found["pixel_values"][0][: int(found["pixel_attention_mask"][0].sum())], np.float32)

    try:
        black, white = (theirs(np.full((40, 60, 3), level, np.uint8))[0, :3].astype(np.float64) for level in (0, 255))
        first, second, third = (float(v) for v in (white - black) / 255)
        low, middle, high = (float(v) for v in black)
        settings = PatchSettings(
            patch=int(original.patch_size), most=int(original.max_num_patches),
            side=int(module.config.vision_config.num_patches**0.5), resample=int(original.resample),
            gain=(first, second, third), offset=(low, middle, high),
        )  # fmt: skip
        PatchSettings.from_dict(settings.to_dict())
        draw = np.random.default_rng(0)
        for shape in _SHAPES:
            picture = draw.integers(0, 256, shape, dtype=np.uint8)
            due, ours = theirs(picture), patches(picture, settings)["pixel_values"][0]
            if due.shape != ours.shape or np.abs(due - ours).max() > _TOLERANCE:
                raise ValueError("its patches differ from those that the device would make")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"The picture processor in {folder} ({type(original).__name__}) can't be served yet: {error}. That of "
            "SigLIP 2 NaFlex can."
        ) from None

    def process(picture: np.ndarray) -> dict[str, Tensor]:
        return {key: torch.from_numpy(values) for key, values in patches(picture, settings).items()}

    return process, settings
