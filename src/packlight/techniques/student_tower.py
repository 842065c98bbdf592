"""A smaller vision tower of convolutions in the place of the original's: designed from a budget, cut out of it.

`packlight.designing` says how it is designed and what it inherits. Alone it does worse than its teacher; a `distill` step
after it brings that back.

When to use: for a latency of pictures, before quantization, with drawings or photographs to distil on. When not: for size
alone, or without samples; and where a quarter of the operations or less has to go, pruning its channels loses less before
training.

Papers: EfficientNet, Tan and Le 2019, arXiv 1905.11946; weight inheritance, TinyCLIP, Wu et al. 2023, arXiv 2309.12314.
What differs: the side, depth and width are chosen by comparing vectors with the teacher's before training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from packlight.designing import TOWER, Design, settled, tower_of
from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import Edit
from packlight.model import Model
from packlight.techniques import Stage, Technique

NAME = "student_tower"


@dataclass(frozen=True)
class StudentTowerConfig(Design):
    """Settings: those of a `packlight.designing.Design`."""

    @property
    def feedback(self) -> bool:
        """Whether it needs calibration samples, to choose by."""
        return len(self.depth) > 1 or (len(self.size) != 1 and bool(self.share) and self.unit == "operations")


def check_student_tower(model: Model, config: StudentTowerConfig) -> None:
    """Check the settings against a model. Raises PlanError."""
    if not hasattr(model.module, TOWER) or "image" not in model.settings:
        raise PlanError(f"student_tower: {model.source.architecture} has no vision tower of convolutions.")
    tower_of(model.module, model.settings["image"]["height"], config)


def student_tower_(model: Model, config: StudentTowerConfig, batches: Sequence[Batch]) -> list[str]:
    """Put a student's vision tower in the place of a model's, in place; logged in its edits.

    Args:
        model: not yet edited.
        config: the step's settings.
        batches: calibration batches; may be empty where `config.feedback` is false.

    Returns:
        path of the tower.
    """
    tower, shape, taken = tower_of(model.module, model.settings["image"]["height"], config, batches)
    made = model.edit_(Edit(TOWER, "tower", {"config": shape, "blocks": taken}))
    made.load_state_dict(tower.state_dict())
    settle_(model)
    return [TOWER]


def settle_(model: Model) -> None:
    """Let family and settings follow a tower that takes pictures of another side."""
    model.family, model.settings = settled(model.family, model.module, model.settings)


STUDENT_TOWER = Technique(
    name=NAME,
    config=StudentTowerConfig,
    layer=None,
    stage=Stage.ARCHITECTURE,
    needs=("gram",),
    paper="EfficientNet, Tan and Le 2019, arXiv 1905.11946; TinyCLIP, Wu et al. 2023, arXiv 2309.12314",
    summary="a smaller vision tower of convolutions, designed from a budget, that inherits the most important channels",
)
