"""Integer weights in groups along the input, each with a scale and a zero point; activations stay float (W4A16, W8A16).

When to use: where memory at run time is the limit: 4-bit weights stay 4 bits in memory, and one token at a time runs
fast. When not: for an encoder's large products (slower than float on CPUs without VNNI), or for the smallest file
(fixed width: entropy-coded codes are smaller at equal error).

The layout is that of ONNX Runtime's MatMulNBits. Papers: GPTQ for the feedback; the range of each group is shrunk
where that lowers the squared error, as in OCTAV-like clip searches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.packing import pack
from packlight.quant import error_feedback, group_grid
from packlight.techniques import Compressed, Stage, Technique


@dataclass(frozen=True)
class GroupsConfig:
    """Settings.

    Args:
        bits: 4 or 8.
        group: columns that share a scale: 16, 32, 64 or 128. A last group that is shorter is padded.
        feedback: error feedback where there is calibration data.
        damp: share of the mean diagonal added to the Gram matrix.
    """

    bits: int = 4
    group: int = 32
    feedback: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise PlanError(f"bits is {self.bits}; groups come in 4 or 8 bits.")
        if self.group not in (16, 32, 64, 128):
            raise PlanError(f"group is {self.group}; it must be 16, 32, 64 or 128.")
        if not 0 < self.damp <= 1:
            raise PlanError(f"damp is {self.damp}; it must lie above 0 and up to 1.")


def group_weights(weight: Tensor, gram: Tensor | None, config: GroupsConfig) -> Compressed:
    """Grouped codes of one weight."""
    grid = group_grid(weight, config.bits, config.group)
    use = config.feedback and gram is not None
    codes = error_feedback(weight, gram, grid, config.damp) if use else grid.codes(weight)
    groups = grid.scale.shape[1]
    padding = groups * config.group - weight.shape[1]
    # Padding columns hold the zero point, so that they stand for 0 whatever the kernel multiplies them with.
    wide = torch.cat([codes, grid.zero[:, -1:].expand(-1, padding).to(codes.dtype)], 1) if padding else codes
    return Compressed(
        kind="groups",
        args={"bits": config.bits, "group": config.group},
        tensors={
            "packed": pack(wide.view(len(weight), groups, config.group), config.bits),
            "scale": grid.scale.reshape(-1).contiguous(),
            "zeros": pack(nn.functional.pad(grid.zero, (0, groups % 2 if config.bits == 4 else 0)), config.bits),
        },
        approximation=grid.values(codes),
        rate=config.bits + (16 + config.bits) / config.group,
    )


GROUP_WEIGHTS = Technique(
    name="group_weights",
    config=GroupsConfig,
    layer=group_weights,
    stage=Stage.QUANTIZE,
    needs=("gram",),
    paper="GPTQ, Frantar et al. 2023, arXiv 2210.17323",
    summary="4- or 8-bit weights in groups with scale and zero point, float activations (W4A16, W8A16)",
)
