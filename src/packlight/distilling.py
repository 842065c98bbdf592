"""What a student is taught by: losses on tensors, all of them 0 where it does as its teacher does, or least there.

Answers: Hinton et al. 2015, arXiv 1503.02531. Hidden states: FitNets, Romero et al. 2015, arXiv 1412.6550, with the
linear map of TinyBERT, Jiao et al. 2020, arXiv 1909.10351. Relations: MiniLM, Wang et al. 2020, arXiv 2002.10957, and
its second version, 2021, arXiv 2012.15828. The teacher's own words and the filter on bad ones: Kim and Rush 2016,
arXiv 1606.07947; Distil-Whisper, Gandhi et al. 2023, arXiv 2311.00430; the thresholds are Whisper's own, Radford et al.
2022, arXiv 2212.04356, section 4.5. Dual encoders: TinyCLIP, Wu et al. 2023, arXiv 2309.12314, and CLIP-KD, Yang et al.
2024, arXiv 2307.12732.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

AFFINITY_SCALE = 50.0  # TinyCLIP's fixed scale of cosines
LEAST_LOG_PROBABILITY = -1.0  # Whisper's thresholds for an answer that failed
MOST_COMPRESSION = 2.4
_GRAM, _MOST_REPEATED = 3, 0.5


# Any model ----------------------------------------------------------------------------------------------------------


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's distribution from the teacher's, both softened, times temperature².

    Args:
        student: logits or log-probabilities [rows, choices].
        teacher: the same of the teacher.
        temperature: that both are divided by; the factor keeps the gradient's size, as Hinton et al. advise.

    Returns:
        a mean over rows, in nats.
    """
    now, aim = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    return (aim.exp() * (aim - now)).sum(-1).mean() * temperature**2


def hidden_error(student: Tensor, teacher: Tensor, projection: Tensor | None = None) -> Tensor:
    """Squared error of hidden states [..., width], as a share of the teacher's energy.

    Args:
        student: states.
        teacher: states of the same positions.
        projection: [student's width, teacher's width] where the widths differ.
    """
    seen = student if projection is None else student @ projection
    return (seen - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)


def least_squares(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The linear map [student's width, teacher's width] from the student's states to the teacher's, over all pairs.

    Solved through the normal equations in double precision, with a ridge of a millionth of the mean energy.
    """
    gram = cross = torch.zeros(())
    for student, teacher in pairs:
        x, y = student.reshape(-1, student.shape[-1]).double(), teacher.reshape(-1, teacher.shape[-1]).double()
        gram, cross = gram + x.T @ x, cross + x.T @ y
    ridge = 1e-6 * gram.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross).float()


def relation_kl(student: Tensor, teacher: Tensor, heads: int = 4) -> Tensor:
    """KL divergence between how positions relate to each other: softmax(V Vᵀ / sqrt(d)), as MiniLM's value relations.

    As in MiniLMv2 the vectors are divided anew into `heads` relation heads, so widths and heads need not agree.

    Args:
        student: [..., positions, width] values, or any hidden states, of a width divisible by `heads`.
        teacher: the same of the teacher; its width may be another.
        heads: relation heads.

    Returns:
        a mean over heads and positions, in nats.
    """
    return logit_kl(_relations(student, heads), _relations(teacher, heads))


def _relations(states: Tensor, heads: int) -> Tensor:
    parts = states.unflatten(-1, (heads, -1)).transpose(-2, -3)
    return parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5


# Words --------------------------------------------------------------------------------------------------------------


def words_error(student: Tensor, words: Tensor) -> Tensor:
    """Cross-entropy of logits [rows, vocabulary] with the teacher's own words [rows]: sequence-level distillation."""
    return cross_entropy(student, words)


def bad_words(words: Sequence[int], text: str, log_probability: float) -> str:
    """Why a teacher's answer is not to be learned; '' for a good one.

    Args:
        words: its token ids.
        text: what they spell.
        log_probability: the mean that the teacher gave them, in nats.
    """
    if not log_probability >= LEAST_LOG_PROBABILITY:
        return "the teacher is unsure"
    raw = text.encode()
    if raw and len(raw) / len(zlib.compress(raw)) > MOST_COMPRESSION:
        return "the text repeats itself"
    grams = Counter(tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1))
    again = sum(n - 1 for n in grams.values())
    return "words repeat" if grams and again > _MOST_REPEATED * sum(grams.values()) else ""


# Two towers ---------------------------------------------------------------------------------------------------------

Sides = tuple[Tensor, Tensor]  # vectors [n, d] of the first and the second tower; row i of both belongs together


def affinity_error(student: Sides, teacher: Sides, scale: float = AFFINITY_SCALE) -> Tensor:
    """TinyCLIP's affinity mimicking: cross-entropy of the student's similarities with the teacher's, both ways.

    Its least value is the entropy of the teacher's affinities, not 0.
    """
    now, aim = (scale * normalize(a, dim=-1) @ normalize(b, dim=-1).T for a, b in (student, teacher))
    return 0.5 * (cross_entropy(now, aim.softmax(-1)) + cross_entropy(now.T, aim.T.softmax(-1)))


def feature_error(student: Sides, teacher: Sides, maps: Sequence[Tensor | None] = (None, None)) -> Tensor:
    """CLIP-KD's feature distillation: mean squared error of normalised vectors, summed over the towers.

    Args:
        student: vectors of both towers.
        teacher: vectors of both towers.
        maps: for each tower [student's width, teacher's width], or None where the widths agree.
    """
    pairs = zip(student, teacher, maps, strict=True)
    return sum(
        ((normalize(s if m is None else s @ m, dim=-1) - normalize(t, dim=-1)).square().mean() for s, t, m in pairs),
        torch.zeros((), device=student[0].device),
    )


def same_words(ids: Tensor) -> Tensor:
    """Which texts of a batch are equal: [n, n] bool, from their token ids [n, tokens]."""
    return (ids[:, None] == ids[None]).all(-1)


def interactive_error(student: Sides, teacher: Sides, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """CLIP-KD's interactive contrastive loss: the student's side of one tower against the teacher's of the other.

    Args:
        student: vectors of both towers.
        teacher: vectors of both towers.
        scale: of the cosines.
        same: [n, n] bool, pairs with the same words, which are no wrong answers for each other; None for none.
    """
    first, second = (normalize(t, dim=-1) for t in student)
    taught, partner = (normalize(t, dim=-1) for t in teacher)
    return _own_error(scale * first @ partner.T, same) + _own_error(scale * second @ taught.T, same)


def contrastive_error(student: Sides, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """CLIP's own loss, which needs no teacher: each row of one side must find its partner on the other.

    Args:
        student: vectors of both towers.
        scale: of the cosines.
        same: as for `interactive_error`.
    """
    first, second = (normalize(t, dim=-1) for t in student)
    logits = scale * first @ second.T
    return 0.5 * (_own_error(logits, same) + _own_error(logits.T, same))


def _own_error(logits: Tensor, same: Tensor | None) -> Tensor:
    """Cross-entropy of similarities [n, n] with the diagonal; what has the same words is left out."""
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -torch.inf)
    return cross_entropy(logits, torch.arange(len(logits), device=logits.device))
