"""Distil: the model so far learns to do what the original does, before its weights are quantized.

The student is what pruning, low rank or a short audio context left of the model; the teacher is the original on its
whole window, with the same vocabulary. Samples are the calibration samples with the original's own words, without
those that it was unsure of or looped in. One in five only judges, by the KL divergence of the answers: the epoch that
it likes best is kept, and it stops when they no longer gain. `packlight.distilling` holds the losses and their papers.

When to use: after steps that remove operations. When not: before plain quantization at four bits or more, where
nothing is lost that training could bring back.

Papers: Hinton et al. 2015, arXiv 1503.02531; for speech Distil-Whisper, Gandhi et al. 2023, arXiv 2311.00430; for two
towers CLIP-KD, Yang et al. 2024, arXiv 2307.12732, whose weights are the defaults there.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from packlight import distilling as losses
from packlight.errors import PlanError
from packlight.families import Batch, Family
from packlight.lessons import School, lesson, points
from packlight.model import Model
from packlight.plan import Step
from packlight.sinusoids import TOLERANCE, near_sinusoids
from packlight.techniques import Stage, Technique
from packlight.training import Task, Training, accelerator, every, train

log = logging.getLogger(__name__)
NAME = "distill"
Progress = Callable[[str, int, int], None]
Check = Callable[[Batch, dict[str, Tensor]], str]
ANY, WORDS, SIDES = ("kl", "hidden", "relations"), ("words",), ("affinity", "features", "interactive", "contrastive")
OF_WORDS = {"kl": 1.0, "hidden": 1.0}
OF_SIDES = {"kl": 1.0, "features": 2000.0, "interactive": 1.0, "contrastive": 1.0}
_FITTED = 8  # samples that a linear map between widths is fitted on
_RELATION_HEADS = 4
_LEAST_SIZE = 0.01


@dataclass(frozen=True)
class DistillConfig:
    """Settings.

    Args:
        epochs: passes over the calibration samples.
        max_steps: stop after so many steps; 0 for no limit.
        rate: learning rate, relative to the size of each tensor.
        warmup: share of the steps in which the rate rises; then it falls to 0 along a cosine.
        accumulate: samples in a step.
        patience: epochs without gain before it stops; 0 for never.
        held: share of the samples that only judge.
        temperature: of the KL divergence.
        losses: name -> weight; None for those of the task, `OF_WORDS` or `OF_SIDES`.
        filter: leave out samples whose words the teacher was unsure of or looped in.
        augment: augmented versions of each sample, taken in turn, an epoch each.
        precision: see `packlight.training.Training`.
    """

    epochs: int = 5
    max_steps: int = 0
    rate: float = 3e-4
    warmup: float = 0.1
    accumulate: int = 4
    patience: int = 2
    held: float = 0.2
    temperature: float = 2.0
    losses: dict[str, float] | None = None
    filter: bool = True
    augment: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.held < 1 or self.temperature <= 0 or self.augment < 0:
            raise PlanError("held must lie between 0 and 1, temperature above 0, and augment must not be below 0.")
        given = self.losses
        if given is not None:
            known = (*ANY, *WORDS, *SIDES)
            if not isinstance(given, dict) or not given or set(given) - set(known):
                raise PlanError(f"losses must be an object of weights with keys among {', '.join(known)}.")
            if min(given.values()) < 0 or max(given.values()) <= 0:
                raise PlanError("The weights in losses must not be below 0, and one must be above it.")
        self.training(0)

    def training(self, seed: int) -> Training:
        """What the loop is told. Raises PlanError."""
        return Training(
            epochs=self.epochs, max_steps=self.max_steps, rate=self.rate, least=_LEAST_SIZE, warmup=self.warmup,
            accumulate=self.accumulate, patience=self.patience, seed=seed, precision=self.precision,
        )  # fmt: skip


def weights(family: Family, config: DistillConfig) -> dict[str, float]:
    """The losses with a weight above 0."""
    given = config.losses or (OF_SIDES if family.sides is not None else OF_WORDS)
    return {name: float(weight) for name, weight in given.items() if weight}


def check_distill(model: Model, config: DistillConfig, scope: Sequence[str]) -> None:
    """Refuse what can't be done with this model. Raises PlanError."""
    family = model.family
    wrong = WORDS if family.words is None else SIDES if family.sides is None else ()
    asked = sorted(set(weights(family, config)) & set(wrong))
    if asked:
        raise PlanError(f"distill: the family {family.name} has no loss {', '.join(asked)}. Leave it out.")
    folded = [t.name for t in family.towers if t.inverted is not None]
    if "hidden" in weights(family, config) and folded:
        raise PlanError(
            f"distill: hidden compares outputs of blocks, and those of a tower of convolutions ({', '.join(folded)}) have "
            "another shape in every stage and for every side of the pictures. Leave it out; features compares vectors."
        )
    if "relations" in weights(family, config):
        found = points(family, model.module, model.module, False, True)
        widths = [model.module.get_submodule(p.student).out_features for p in found]
        if not widths or any(w % _RELATION_HEADS for w in widths):
            raise PlanError(
                f"distill: relations need self-attention of a width divisible by {_RELATION_HEADS}; "
                f"{model.source.architecture} has {widths or 'none'}. Leave them out."
            )
    if config.augment and family.augment is None:
        raise PlanError(f"distill: samples of the family {family.name} can't be augmented. Leave augment at 0.")
    if not trained(model.module, scope):
        raise PlanError(f"distill: {', '.join(scope)} names no parameter. `packlight inspect --layers` lists paths.")


def trained(module: nn.Module, scope: Sequence[str]) -> dict[str, Tensor]:
    """Name -> parameter, of those that a scope names, by their own name or their layer's path; shared ones once.

    Positions that are sines and cosines stay what they are: as a formula they take no bytes.
    """
    step = Step(NAME, {}, tuple(scope))
    named = dict(module.named_parameters())
    taken = {n: p for n, p in named.items() if step.takes(n) or step.takes(n.rpartition(".")[0])}
    return {n: p for n, p in taken.items() if not near_sinusoids(p.detach().float().cpu().numpy(), TOLERANCE)}


def distill_(
    model: Model,
    teacher: nn.Module,
    batches: Sequence[Batch],
    step: tuple[DistillConfig, Sequence[str], int],
    work: Path,
    progress: Progress | None = None,
    key: str = "",
) -> dict[str, Any]:
    """Teach a model, in place.

    Args:
        model: the student, not yet quantized.
        teacher: the original's module, with the same vocabulary.
        batches: calibration batches with the teacher's own words; every 1/held-th only judges.
        step: settings, wildcards over the parameters that are trained, and the seed.
        work: folder that keeps lessons and the state; a later call with the same arguments goes on after it.
        progress: called with (what, done, total).
        key: whatever else the state in `work` belongs to.

    Returns:
        'before' and 'after': KL on held-back samples; 'judged': the same by epoch; 'losses': by step; 'left_out':
        reason -> how many samples had bad words.

    Raises:
        PlanError: fewer than two usable samples, or what `check_distill` refuses.
    """
    config, scope, seed = step
    check_distill(model, config, scope)
    weighed, student = weights(model.family, config), model.module
    places = points(model.family, student, teacher, "hidden" in weighed, "relations" in weighed)
    school = School(model.family, student, teacher, model.settings, batches, places, work / "lessons")
    home, processes = school.device, accelerator()
    for module in (student, teacher):
        module.requires_grad_(False)
        module.to(processes.device)
    try:
        with torch.inference_mode(False):
            kept, left_out = _attended(school, _checker(school, model, config), processes, progress)
            judged = [kept[i] for i in every(len(kept), config.held)]
            learned = [i for i in kept if i not in judged]
            maps = _maps(school, learned)
            tensors = trained(student, scope) | {f"map.{name}": m for name, m in maps.items()}
            loss, judge = _closures(school, _checker(school, model, config), config, maps)
            task = Task(NAME, "distilling", tensors, loss, judge, learned, judged, key)
            curve = train(task, config.training(seed), work, progress)
    finally:
        for module in (student, teacher):
            module.to(home)
    return {"before": curve.judged[0], "after": curve.best, **vars(curve), "left_out": left_out}


def _attended(
    school: School, why_bad: Check, processes: Any, progress: Progress | None
) -> tuple[list[int], dict[str, int]]:
    """The samples whose lessons are worth taking, and why others are not. Lessons are made here, shared out."""
    count = len(school.batches)
    for i in range(processes.process_index, count, processes.num_processes):
        lesson(school, i)
        if progress and processes.is_main_process:
            progress("the original's lessons", min(count, i + processes.num_processes), count)
    processes.wait_for_everyone()
    kept: list[int] = []
    left_out: dict[str, int] = {}
    for i in range(count):
        why = why_bad(*lesson(school, i))
        if why:
            left_out[why] = left_out.get(why, 0) + 1
        else:
            kept.append(i)
    if left_out:
        log.info("distill leaves out %s", ", ".join(f"{n} samples: {why}" for why, n in left_out.items()))
    if len(kept) < 2:
        raise PlanError(
            f"distill needs at least two calibration samples with good words, one of which judges; of {count} there "
            f"are {len(kept)}" + "".join(f"; {n}: {why}" for why, n in left_out.items()) + ". Give it more."
        )
    return kept, left_out


def _checker(school: School, model: Model, config: DistillConfig) -> Check:
    """What says why a lesson is not worth taking: '' for a good one."""
    words_of, spell = school.family.words, model.decoder()

    def why_bad(batch: Batch, aim: dict[str, Tensor]) -> str:
        if words_of is None or not config.filter:
            return ""
        words = words_of(school.teacher, batch, school.settings)
        sure = -float(cross_entropy(aim["logits"], words))
        spoken = [i for i in words.tolist() if 0 <= i != school.settings["eos_token_id"]]
        return losses.bad_words(spoken, spell(spoken), sure)

    return why_bad


def _maps(school: School, learned: Sequence[int]) -> dict[str, Tensor]:
    """Least-squares maps from the student's states to the teacher's, for the places where their widths differ."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for i in learned[:_FITTED]:
        batch, aim = lesson(school, i)
        with torch.no_grad():
            now = school.studied(batch)
        for name in now.keys() & aim.keys():
            if name.startswith("hidden.") and now[name].shape[-1] != aim[name].shape[-1]:
                seen.setdefault(name, []).append((now[name], aim[name]))
    return {name: losses.least_squares(pairs) for name, pairs in sorted(seen.items())}


def _closures(
    school: School, why_bad: Check, config: DistillConfig, maps: dict[str, Tensor]
) -> tuple[Callable[[int, int], Tensor], Callable[[int], Tensor]]:
    """(what is learned from a sample in an epoch, what judges)."""
    weighed = weights(school.family, config)

    def loss(sample: int, epoch: int) -> Tensor:
        variant = epoch % (config.augment + 1)
        batch, aim = lesson(school, sample, variant)
        if variant and why_bad(batch, aim):  # spoiled by augmentation: the sample itself, then
            batch, aim = lesson(school, sample)
        now = school.studied(batch)
        found = _losses(school, batch, now, aim, (config.temperature, maps))
        return torch.stack([weight * found[name]() for name, weight in weighed.items()]).sum()

    def judge(sample: int) -> Tensor:
        batch, aim = lesson(school, sample)
        return losses.logit_kl(school.studied(batch)["logits"], aim["logits"])

    return loss, judge


def _losses(
    school: School,
    batch: Batch,
    now: dict[str, Tensor],
    aim: dict[str, Tensor],
    how: tuple[float, dict[str, Tensor]],
) -> dict[str, Callable[[], Tensor]]:
    """Every loss by name, not yet computed."""
    temperature, maps = how

    def mean(prefix: str, one: Callable[[str], Tensor]) -> Tensor:
        return torch.stack([one(name) for name in sorted(aim) if name.startswith(prefix)]).mean()

    def words() -> Tensor:
        assert school.family.words is not None  # check_distill() has seen to it
        return losses.words_error(now["logits"], school.family.words(school.teacher, batch, school.settings))

    def sides(found: dict[str, Tensor]) -> losses.Sides:
        return found["first"], found["second"]

    def same() -> Tensor:
        return losses.same_words(batch[school.family.reads])

    return {
        "kl": lambda: losses.logit_kl(now["logits"], aim["logits"], temperature),
        "hidden": lambda: mean("hidden.", lambda n: losses.hidden_error(now[n], aim[n], maps.get(n))),
        "relations": lambda: mean("values.", lambda n: losses.relation_kl(now[n], aim[n], _RELATION_HEADS)),
        "words": words,
        "affinity": lambda: losses.affinity_error(sides(now), sides(aim)),
        "features": lambda: losses.feature_error(sides(now), sides(aim)),
        "interactive": lambda: losses.interactive_error(sides(now), sides(aim), now["scale"], same()),
        "contrastive": lambda: losses.contrastive_error(sides(now), now["scale"], same()),
    }


DISTILL = Technique(
    name=NAME,
    config=DistillConfig,
    layer=None,
    stage=Stage.DISTILL,
    needs=("gram",),
    paper="Hinton et al. 2015, arXiv 1503.02531; Distil-Whisper, arXiv 2311.00430; CLIP-KD, arXiv 2307.12732",
    summary="the model so far learns from the original on calibration samples, before quantization",
)
