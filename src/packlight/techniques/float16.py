"""Weights kept as floats, stored in 16 bits: for what must not be touched, and for what is too small to matter.

When to use: norms and biases always; whole layers where even 8 bits cost too much. When not: for speed; the runtime
computes in 32 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packlight.techniques import Compressed, Stage, Technique


@dataclass(frozen=True)
class Float16Config:
    """No settings."""


def keep(weight: Tensor, gram: Tensor | None, config: Float16Config) -> Compressed:
    """The weight rounded to what float16 holds; values beyond its range are clipped to its largest."""
    limit = torch.finfo(torch.float16).max
    rounded = weight.clamp(-limit, limit).half().float()
    return Compressed("float", {}, {"weight": rounded}, rounded, 16.0)


def _any(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach()
    return weight.reshape(weight.shape[0], -1)


FLOAT16 = Technique(
    name="float16",
    config=Float16Config,
    layer=keep,
    stage=Stage.QUANTIZE,
    summary="floats stored in 16 bits, computed in 32",
    matrix=_any,
)
