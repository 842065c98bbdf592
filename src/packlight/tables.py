"""The whole inventory on one page. Adding a family, a technique or a runtime is one file and one line here."""

from packlight.families import Family, dual_encoder, whisper
from packlight.techniques import Technique
from packlight.techniques.audio_context import AUDIO_CONTEXT
from packlight.techniques.codes import ERROR_FEEDBACK, ROUND_TO_NEAREST
from packlight.techniques.distill import DISTILL
from packlight.techniques.float16 import FLOAT16
from packlight.techniques.groups import GROUP_WEIGHTS
from packlight.techniques.low_rank import LOW_RANK
from packlight.techniques.prune_structure import PRUNE_STRUCTURE
from packlight.techniques.prune_vocabulary import PRUNE_VOCABULARY
from packlight.techniques.prune_weights import PRUNE_WEIGHTS
from packlight.techniques.separable import GROUPED_CONVOLUTION, SEPARABLE_CONVOLUTION
from packlight.techniques.sinusoids import SINUSOIDS
from packlight.techniques.static_int8 import STATIC_INT8
from packlight.techniques.student_tower import STUDENT_TOWER
from packlight.techniques.tune_scales import TUNE_SCALES
from packlight.techniques.turn_heads import TURN_HEADS

FAMILIES: tuple[Family, ...] = (whisper.FAMILY, dual_encoder.FAMILY)

TECHNIQUES: dict[str, Technique] = {
    t.name: t
    for t in (
        AUDIO_CONTEXT,
        PRUNE_VOCABULARY,
        SEPARABLE_CONVOLUTION,
        GROUPED_CONVOLUTION,
        STUDENT_TOWER,
        PRUNE_STRUCTURE,
        LOW_RANK,
        DISTILL,
        TURN_HEADS,
        ROUND_TO_NEAREST,
        ERROR_FEEDBACK,
        GROUP_WEIGHTS,
        STATIC_INT8,
        PRUNE_WEIGHTS,
        FLOAT16,
        SINUSOIDS,
        TUNE_SCALES,
    )
}

# Runtimes and what serves a task on the device are named in the bundle's manifest; `packlight.serve` opens them.
RUNTIMES: tuple[str, ...] = ("onnxruntime",)


def family_of(architecture: str) -> Family | None:
    """The family that an architecture belongs to, or None."""
    return next((f for f in FAMILIES if architecture in f.architectures), None)
