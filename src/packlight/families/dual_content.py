"""What the first tower of a dual encoder takes, and its vectors: pictures, rows of patches, or sounds."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from packlight.audio import read_audio
from packlight.families import Batch, Graph, dual_patches, dual_sound
from packlight.images import read_image

# What a batch holds for the first tower; the last is only there where pictures of different shapes are together.
_INPUTS = {
    "image": ("pixel_values",),
    "audio": ("input_features",),
    "patches": ("pixel_values", "positions", "patch_mask"),
}


class Pair(NamedTuple):
    """What one sample brings.

    Args:
        content: a picture uint8 [height, width, 3], or a sound float32 [samples].
        texts: its captions or prompts; may be empty.
    """

    content: np.ndarray
    texts: tuple[str, ...]


def open_pair(path: Path, texts: Sequence[str]) -> Pair:
    """A picture with its texts. Raises DataError."""
    return Pair(read_image(path), tuple(texts))


def open_sound(path: Path, texts: Sequence[str], rate: int) -> Pair:
    """A recording with its texts. Raises DataError."""
    return Pair(read_audio(path, rate), tuple(texts))


def embed_content(module: nn.Module, content: Tensor, *more: Tensor) -> Tensor:
    """Vectors [n, d] of length 1 of pictures [n, 3, height, width], or of what else the tower takes, see `_INPUTS`."""
    kind = kind_of(module)
    if kind == "audio":
        return unit(dual_sound.embed(module, content))
    if kind == "patches":
        return unit(dual_patches.embed(module, content, *more))
    return unit(module.get_image_features(pixel_values=content))


def kind_of(module: nn.Module) -> str:
    """Which of `_INPUTS` the first tower takes."""
    if hasattr(module, "audio_model"):
        return "audio"
    return "patches" if type(module).__name__ == dual_patches.ARCHITECTURE else "image"


def content_of(module: nn.Module, batch: Batch) -> Tensor:
    """The vectors of a batch's pictures or sounds."""
    return embed_content(module, *(batch[name] for name in _INPUTS[kind_of(module)] if name in batch))


def unit(found: Any) -> Tensor:
    """The vectors in what a tower gives, at length 1."""
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    return vectors / vectors.norm(dim=-1, keepdim=True)


def joined(module: nn.Module, contents: Sequence[dict[str, Tensor]]) -> Batch:
    """What the processor made of several pictures or sounds, as one batch."""
    if kind_of(module) == "patches":
        return dual_patches.joined(contents)
    return {name: torch.cat([c[name] for c in contents]) for name in contents[0]}


class _Content(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, content: Tensor) -> tuple[Tensor]:
        return (embed_content(self.inner, content),)


class _Patches(_Content):
    def forward(self, content: Tensor, *more: Tensor) -> tuple[Tensor]:
        return (embed_content(self.inner, content, *more),)


def graph(module: nn.Module, example: dict[str, Tensor]) -> Graph:
    """The first tower as a graph that takes one picture or sound, as its processor makes it."""
    kind = kind_of(module)
    name, wrap = ("audio", _Content) if kind == "audio" else ("image", _Patches if kind == "patches" else _Content)
    dynamic = {key: {1: "patches"} for key in example} if kind == "patches" else {}
    return Graph(name, wrap(module), tuple(example.values()), tuple(example), (f"{name}_vector",), dynamic)


def silence(settings: dict[str, Any]) -> np.ndarray:
    """A picture or sound without anything in it."""
    if "audio" in settings:
        return np.zeros(settings["audio"]["rate"], np.float32)
    return np.zeros((64, 64, 3), np.uint8)


def heard(settings: dict[str, Any]) -> dict[str, Any]:
    """What is otherwise in a family that hears."""
    return {
        "modalities": ("audio", "text"),
        "task": "audio-text",
        "usage": '--sounds DIR "words"',
        "open_input": partial(open_sound, rate=settings["audio"]["rate"]),
        "notes": (
            "The interval resamples sounds, each with all its texts; the set that they are searched in stays the same.",
        ),
    }
