"""Audio context to length: the encoder sees the speech and few positions of the silence that pads it.

When to use: for a latency. A clip of 8 s costs a third of what 30 s do, and attention a seventh; bytes stay the same.
When not: for recordings that always fill the window, where nothing is saved.

What differs from FUTO's ACFT (whisper-acft, 2024), which cuts the padding off and trains the model to do without: the
encoder keeps the positions that it leans on (`packlight.context`), so it works without training.
"""

from dataclasses import dataclass

from packlight.context import AudioContext
from packlight.errors import PlanError
from packlight.model import Model
from packlight.plan import Step
from packlight.techniques import Stage, Technique

NAME = "audio_context"


@dataclass(frozen=True)
class AudioContextConfig:
    """Settings, in positions of 20 ms.

    Args:
        near: silence kept right after the speech.
        middle: positions that stand for all silence between.
        far: kept at the end of the window.
    """

    near: int = 64
    middle: int = 16
    far: int = 32

    def __post_init__(self) -> None:
        if min(self.near, self.middle, self.far) < 1:
            raise PlanError("near, middle and far must be 1 or more: the encoder leans on each of them.")


def step(config: AudioContextConfig, tower: str, reason: str) -> Step:
    """The step of a plan; `tower` is the path of the encoder's blocks."""
    values = {"near": config.near, "middle": config.middle, "far": config.far}
    return Step(NAME, values, (f"{tower}.*",), reason)


def check_context(model: Model, config: AudioContextConfig) -> None:
    """Raises PlanError for a family that pads nothing, or a context as long as the window."""
    if model.family.shorten is None:
        raise PlanError(f"The family {model.family.name} pads no samples, so audio_context has nothing to shorten.")
    window = model.module.config.max_source_positions
    if config.near + config.middle + config.far >= window:
        raise PlanError(f"audio_context keeps all {window} positions; lower near, middle or far.")


def shorten_(model: Model, config: AudioContextConfig) -> None:
    """Let a model's encoder see little of the padding, in place. Raises PlanError where it can't."""
    check_context(model, config)
    assert model.family.shorten is not None
    model.family.shorten(model.module, AudioContext(config.near, config.middle, config.far))


AUDIO_CONTEXT = Technique(
    name=NAME,
    config=AudioContextConfig,
    layer=None,
    stage=Stage.ARCHITECTURE,
    paper="proportional attention: Token Merging, Bolya et al. 2022, arXiv 2210.09461",
    summary="the encoder sees the speech and few positions of the padding: faster on clips shorter than its window",
)
