"""What a compression technique is: pure functions on tensors, one file each, and a row in `packlight.tables`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor, nn

from packlight.windows import matrix


class Stage(IntEnum):
    """The order in which techniques run, whatever the order of the plan. A number does what lists of pairs would."""

    ARCHITECTURE = 0
    PRUNE = 1
    DISTILL = 2
    SMOOTH = 3
    QUANTIZE = 4
    TUNE = 5


@dataclass(frozen=True)
class Compressed:
    """What a technique makes of one weight.

    Args:
        kind, args: of the `Edit` that puts it into the model; kind 'float' leaves the layer as it is.
        tensors: buffers of the new layer, or {'weight': ...} for kind 'float'.
        approximation: the weight [out, in] that it stands for.
        rate: bits per weight.
    """

    kind: str
    args: dict[str, Any]
    tensors: dict[str, Tensor]
    approximation: Tensor
    rate: float


@dataclass(frozen=True)
class Technique:
    """A row of the inventory.

    Args:
        name: as plans write it.
        config: a frozen dataclass, whose fields are the settings; it checks its own values.
        layer: None for a technique of whole models, which `compress_` knows by its stage; else (weight [out, in], Gram matrix [in, in] or None, config) -> Compressed; one that needs 'use' also takes
            how much each row of a table is used, [out], or None.
        stage: when it runs.
        needs: 'gram' when it can't work without calibration data; 'use' when it takes the use of tokens; 'ranges' when
            it takes what went in and out of a convolution, see `packlight.observe.ranges`.
        paper: where it comes from.
        summary: one line for `docs` and `--help`.
        matrix: the weight [out, in] of a layer as this technique sees it; raises PlanError for a layer that it can't take.
    """

    name: str
    config: type[Any]
    layer: Callable[..., Compressed] | None
    stage: Stage
    needs: tuple[str, ...] = field(default=())
    paper: str = ""
    summary: str = ""
    matrix: Callable[[nn.Module], Tensor] = matrix
