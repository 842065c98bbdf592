"""Tune what is left in floats, with all integers frozen, so that the compressed model imitates the original.

Scales, factors of columns, norms and biases are some hundredth of the parameters, and they repair much of what the
rounding of the rest did. First the first tower learns to give the original's output (relative squared error), then
the others learn the original's distribution over the next token (KL divergence), on the original's own words. Every
tensor is moved relative to its own size, so one learning rate serves all.

When to use: below about four bits per weight. When not: without some dozens of calibration samples; the samples that
are held back stop it when it starts to learn them by heart.

Papers: EfficientQAT (Chen et al. 2024, arXiv 2407.11062), its end-to-end phase trains quantization parameters alone;
the loss is that of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from packlight.errors import PlanError
from packlight.families import Batch
from packlight.layers import CodeLinear
from packlight.model import Model
from packlight.plan import write_json
from packlight.techniques import Stage, Technique

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
    epochs: int = 8
    rate: float = 1e-3
    held: float = 0.2

    def __post_init__(self) -> None:
        if min(self.tower_epochs, self.epochs) < 0:
            raise PlanError("epochs and tower_epochs must not be below 0.")
        if not 0 < self.rate < 1 or not 0 < self.held < 1:
            raise PlanError("rate and held must lie between 0 and 1.")


@dataclass(frozen=True)
class _Phase:
    """One of the two trainings: which tensors, on what loss."""

    name: str
    tensors: dict[str, Tensor]
    loss: Callable[[int], Tensor]
    epochs: int


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
    every = max(2, round(1 / config.held))
    judged = [i for i in range(len(batches)) if i % every == every - 1] or [len(batches) - 1]
    codes = [m for m in model.module.modules() if isinstance(m, CodeLinear)]
    before = [m.activations for m in codes]
    for m in codes:  # rounding an activation has no gradient
        m.activations = "float"
    report: dict[str, float] = {}
    try:
        model.module.requires_grad_(False)
        with torch.inference_mode(False):
            for phase in _phases(model, teacher, batches, config):
                report.update(_train(phase, judged, len(batches), config, work, progress))
    finally:
        for m, activations in zip(codes, before, strict=True):
            m.activations = activations
    return report


def _phases(model: Model, teacher: nn.Module, batches: Sequence[Batch], config: TuneScalesConfig) -> Any:
    """The two phases; the second sees what the first made of the tower."""
    family, student = model.family, model.module
    root = family.towers[0].blocks.rpartition(".")[0] + "."
    tensors = tunable(student)
    with torch.no_grad():
        taught = [family.encode(teacher, b) for b in batches]

    def tower(i: int) -> Tensor:
        states, aim = family.encode(student, batches[i])["states"], taught[i]["states"]
        return (states - aim).square().sum() / aim.square().sum()

    yield _Phase("tower", {n: t for n, t in tensors.items() if n.startswith(root)}, tower, config.tower_epochs)
    with torch.no_grad():
        aims = [torch.log_softmax(family.run(teacher, b), -1).half() for b in taught]
        seen = [family.encode(student, b) for b in batches]

    def rest(i: int) -> Tensor:
        now, aim = torch.log_softmax(family.run(student, seen[i]), -1), aims[i].float()
        return (aim.exp() * (aim - now)).sum(-1).mean()

    yield _Phase("rest", {n: t for n, t in tensors.items() if not n.startswith(root)}, rest, config.epochs)


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
    phase: _Phase, judged: Sequence[int], count: int, config: TuneScalesConfig, work: Path, progress: Progress | None
) -> dict[str, float]:
    """Train; the tensors end as they were after the epoch that the held-back samples liked best."""
    learned = [i for i in range(count) if i not in judged]
    groups = [{"params": [t], "lr": config.rate * _size(t)} for t in phase.tensors.values()]
    optimizer = torch.optim.Adam(groups)
    steps = max(1, phase.epochs * len(learned))
    log = _resume(phase, optimizer, len(learned), work) or [_judge(phase, judged)]
    begun = (len(log) - 1) * len(learned)
    schedule = LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * min(1, (s + begun) / steps))))
    if len(log) == 1:
        _keep(phase, None, log, work, best=True)
    for tensor in phase.tensors.values():
        tensor.requires_grad_(True)
    for epoch in range(len(log) - 1, phase.epochs):
        order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(epoch)).tolist()
        for done, place in enumerate(order):
            with torch.enable_grad():
                phase.loss(learned[place]).backward()
            torch.nn.utils.clip_grad_norm_(phase.tensors.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if progress:
                progress(f"tuning scales, {phase.name}", epoch * len(learned) + done + 1, steps)
        log.append(_judge(phase, judged))
        _keep(phase, optimizer, log, work, best=log[-1] == min(log))
    for tensor in phase.tensors.values():
        tensor.requires_grad_(False)
    best = load_file(work / f"{phase.name}.best.safetensors")
    for name, tensor in phase.tensors.items():
        tensor.data.copy_(_storable(best[name]))
    return {f"{phase.name} before": log[0], f"{phase.name} after": min(log)}


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt().clamp(min=1e-8))


def _storable(tensor: Tensor) -> Tensor:
    """As float16 can hold it, where it can: half the bytes in the file."""
    half = tensor.half().float()
    return half if bool(torch.isfinite(half).all()) and bool(((half != 0) | (tensor == 0)).all()) else tensor


def _judge(phase: _Phase, judged: Sequence[int]) -> float:
    with torch.no_grad():
        return float(torch.stack([phase.loss(i) for i in judged]).mean())


def _keep(phase: _Phase, optimizer: Any, log: list[float], work: Path, best: bool) -> None:
    """Write what a later call needs: the tensors, the optimizer's moments, the judged losses; the log last."""
    values = {n: t.detach().contiguous() for n, t in phase.tensors.items()}
    if best:
        save_file(values, work / f"{phase.name}.best.safetensors")
    if optimizer is not None:
        for name, tensor in phase.tensors.items():
            state = optimizer.state[tensor]
            values |= {f"{name}#{key}": state[key].contiguous() for key in ("exp_avg", "exp_avg_sq") if key in state}
        save_file(values, work / f"{phase.name}.part")
        (work / f"{phase.name}.part").replace(work / f"{phase.name}.{len(log) - 1}.safetensors")
    write_json(work / f"{phase.name}.json", {"losses": log})


def _resume(phase: _Phase, optimizer: Any, per_epoch: int, work: Path) -> list[float]:
    """Take up the last epoch that was kept; an empty list when there is none."""
    file = work / f"{phase.name}.json"
    log: list[float] = json.loads(file.read_text())["losses"] if file.is_file() else []
    if len(log) < 2:
        return log
    values = load_file(work / f"{phase.name}.{len(log) - 1}.safetensors")
    for name, tensor in phase.tensors.items():
        tensor.data.copy_(values[name])
        if f"{name}#exp_avg" in values:
            optimizer.state[tensor] = {
                "step": torch.tensor(float((len(log) - 1) * per_epoch)),
                "exp_avg": values[f"{name}#exp_avg"],
                "exp_avg_sq": values[f"{name}#exp_avg_sq"],
            }
    return log


TUNE_SCALES = Technique(
    name=NAME,
    config=TuneScalesConfig,
    layer=None,
    stage=Stage.TUNE,
    needs=("gram",),
    paper="EfficientQAT, Chen et al. 2024, arXiv 2407.11062",
    summary="scales, biases and norms learn to imitate the original, with all integers frozen",
)
