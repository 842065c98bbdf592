"""Tune what is left in floats, with all integers frozen, so that the compressed model imitates the original.

Scales, factors of columns, norms and biases are some hundredth of the parameters, and they repair much of what the
rounding of the rest did. First the first tower learns to give the original's output (relative squared error), then
the others learn the original's distribution over the next token (KL divergence), on the original's own words, or, where
two towers are compared, the original's vectors (relative squared error): few choices say little of a vector. Every
tensor is moved relative to its own size, so one learning rate serves all.

When to use: below about four bits per weight. When not: without some dozens of calibration samples; the samples that
are held back stop it when it starts to learn them by heart.

Papers: EfficientQAT (Chen et al. 2024, arXiv 2407.11062), its end-to-end phase trains quantization parameters alone;
the loss is that of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import CodeLinear
from packlight.model import Model
from packlight.techniques import Stage, Technique
from packlight.training import Task, Training, every, train

NAME = "tune_scales"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TuneScalesConfig:
    """Settings.

    Args:
        tower_epochs: passes over the calibration samples for the first tower.
        epochs: passes for the others.
        rate: learning rate, relative to the size of each tensor; falls to 0 along a cosine.
        held: share of the samples that only judge.
    """

    tower_epochs: int = 2
    epochs: int = 4
    rate: float = 1e-4
    held: float = 0.2

    def __post_init__(self) -> None:
        if min(self.tower_epochs, self.epochs) < 0:
            raise PlanError("epochs and tower_epochs must not be below 0.")
        if not 0 < self.rate < 1 or not 0 < self.held < 1:
            raise PlanError("rate and held must lie between 0 and 1.")


def tune_(
    model: Model,
    teacher: nn.Module,
    batches: Sequence[Batch],
    config: TuneScalesConfig,
    work: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Tune a compressed model, in place.

    Args:
        model: after its weights were compressed.
        teacher: the original's module, with the same vocabulary.
        batches: calibration batches; every 1/held-th only judges.
        config: see there.
        work: folder that keeps the state after each epoch; a later call goes on after it.
        progress: called with (what, done, total).

    Returns:
        the judged losses before and after each phase, by name.

    Raises:
        PlanError: fewer than two batches.
    """
    if len(batches) < 2:
        raise PlanError("tune_scales needs at least two calibration samples, one of which judges. Give it more.")
    work.mkdir(parents=True, exist_ok=True)
    codes = [m for m in model.module.modules() if isinstance(m, CodeLinear)]
    before = [m.activations for m in codes]
    for m in codes:  # rounding an activation has no gradient
        m.activations = "float"
    report: dict[str, float] = {}
    try:
        model.module.requires_grad_(False)
        with torch.inference_mode(False):
            for task, epochs in _phases(model, teacher, batches, config):
                report.update(_train(task, epochs, config, work, progress))
    finally:
        for m, activations in zip(codes, before, strict=True):
            m.activations = activations
    return report


def _phases(model: Model, teacher: nn.Module, batches: Sequence[Batch], config: TuneScalesConfig) -> Any:
    """The two phases; the second sees what the first made of the tower."""
    family, student = model.family, model.module
    root = family.towers[0].blocks.rpartition(".")[0] + "."
    tensors = tunable(student)
    judged = every(len(batches), config.held)
    samples = [i for i in range(len(batches)) if i not in judged], judged
    with torch.no_grad():
        taught = [family.encode(teacher, b) for b in batches]

    def tower(i: int) -> Tensor:
        states, aim = family.encode(student, batches[i])["states"], taught[i]["states"]
        return (states - aim).square().sum() / aim.square().sum()

    first = {n: t for n, t in tensors.items() if n.startswith(root)}
    title = "tuning scales, {}"
    yield Task("tower", title.format("tower"), first, lambda i, _: tower(i), tower, *samples), config.tower_epochs
    with torch.no_grad():
        seen = [family.encode(student, b) for b in batches]
        aims = [_said(model, teacher, b) for b in taught]
        aims = aims if family.sides is not None else [a.half() for a in aims]  # there are many tokens

    def rest(i: int) -> Tensor:
        now, aim = _said(model, student, seen[i]), aims[i].float()
        if family.sides is not None:
            return (now - aim).square().sum() / aim.square().sum()
        return (aim.exp() * (aim - now)).sum(-1).mean()

    others = {n: t for n, t in tensors.items() if n not in first}
    yield Task("rest", title.format("rest"), others, lambda i, _: rest(i), rest, *samples), config.epochs


def _said(model: Model, module: nn.Module, batch: Batch) -> Tensor:
    """What the towers after the first say: log-probabilities, or the second one's vectors."""
    if model.family.sides is not None:
        return model.family.sides(module, batch)[1]
    return torch.log_softmax(model.family.run(module, batch), -1)


def tunable(module: nn.Module) -> dict[str, Tensor]:
    """Floats of a compressed model that are few: scales, factors, biases, norms. Shared ones appear once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        last = name.rpartition(".")[2]
        few = last in ("scale", "columns", "bias") or (last == "weight" and tensor.dim() == 1)
        if few and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _train(
    task: Task, epochs: int, config: TuneScalesConfig, work: Path, progress: Progress | None
) -> dict[str, float]:
    """Train; the tensors end as they were after the epoch that the held-back samples liked best."""
    curve = train(task, Training(epochs=epochs, rate=config.rate), work, progress)
    for tensor in task.tensors.values():
        tensor.data.copy_(_storable(tensor))
    return {f"{task.name} before": curve.judged[0], f"{task.name} after": curve.best}


def _storable(tensor: Tensor) -> Tensor:
    """As float16 can hold it, where it can: half the bytes in the file."""
    half = tensor.half().float()
    return half if bool(torch.isfinite(half).all()) and bool(((half != 0) | (tensor == 0)).all()) else tensor


TUNE_SCALES = Technique(
    name=NAME,
    config=TuneScalesConfig,
    layer=None,
    stage=Stage.TUNE,
    needs=("gram",),
    paper="EfficientQAT, Chen et al. 2024, arXiv 2407.11062",
    summary="scales, biases and norms learn to imitate the original, with all integers frozen",
)
