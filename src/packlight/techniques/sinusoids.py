"""Positions that are sines and cosines are computed when the bundle is loaded; the file has nothing of them.

When to use: for tables of positions that were never trained, as in Whisper's encoder, where they would be the worst of
all weights to round: 3 % of a 12 MB file. When not: any other table is refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.sinusoids import TOLERANCE, near_sinusoids, sinusoids
from packlight.techniques import Compressed, Stage, Technique


@dataclass(frozen=True)
class SinusoidsConfig:
    """No settings."""


def compute(weight: Tensor, gram: Tensor | None, config: SinusoidsConfig) -> Compressed:
    """The table by its formula. Raises PlanError where the weight is not that table."""
    if not is_sinusoids(weight):
        raise PlanError("sinusoids takes tables of sines and cosines only, and this one is another. Leave it out.")
    table = torch.from_numpy(sinusoids(*weight.shape))
    return Compressed("float", {}, {"weight": table}, table, 0.0)


def is_sinusoids(weight: Tensor) -> bool:
    """Whether a weight [positions, width] is the table of sines and cosines."""
    return near_sinusoids(weight.detach().float().cpu().numpy(), TOLERANCE)


def _table(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach()
    if not isinstance(layer, nn.Embedding):
        raise PlanError("sinusoids takes tables of positions; another kind of layer is in its scope.")
    return weight


SINUSOIDS = Technique(
    name="sinusoids",
    config=SinusoidsConfig,
    layer=compute,
    stage=Stage.QUANTIZE,
    summary="tables of sines and cosines are computed, not stored",
    matrix=_table,
)
