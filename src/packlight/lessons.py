"""What a teacher shows of each sample: its answers, and the states inside it that a student can be compared with.

A lesson is made once and kept on disk in half precision, so the teacher runs once per sample and not in every epoch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.families import Batch, Family, Tower

_VALUES = ("v_proj", "value")  # names of the layer that makes an attention's values
_OTHER = ("encoder_attn", "crossattention")  # attention to another tower


@dataclass(frozen=True)
class Point:
    """A place where a student is compared with its teacher.

    Args:
        name: 'hidden.TOWER.BLOCK' or 'values.TOWER'.
        student, teacher: paths of the layers whose outputs are compared.
        first: whether it lies in the first tower.
    """

    name: str
    student: str
    teacher: str
    first: bool


def points(family: Family, student: nn.Module, teacher: nn.Module, hidden: bool, relations: bool) -> list[Point]:
    """The places of comparison: every block of the student with the one as deep in the teacher, and last values.

    Args:
        family: of both.
        student: of the same architecture as its teacher, maybe with fewer blocks.
        teacher: its teacher.
        hidden: whether to compare outputs of blocks.
        relations: whether to compare values of the last self-attention of each tower.
    """
    found: list[Point] = []
    for number, tower in enumerate(family.towers):
        if not tower.blocks:
            continue
        own, others = (len(m.get_submodule(tower.blocks)) for m in (student, teacher))  # type: ignore[arg-type]
        if hidden:
            deep = [round((k + 1) * others / own) - 1 for k in range(own)]
            pairs = [(f"{tower.blocks}.{k}", f"{tower.blocks}.{d}") for k, d in enumerate(deep)]
            found += [Point(f"hidden.{tower.name}.{k}", *pair, number == 0) for k, pair in enumerate(pairs)]
        values = [_values(m, tower) for m in (student, teacher)]
        if relations and all(values):
            found.append(Point(f"values.{tower.name}", values[0], values[1], number == 0))
    return found


def _values(module: nn.Module, tower: Tower) -> str:
    """Path of the layer that makes the values of the tower's last self-attention, or ''."""
    last = len(module.get_submodule(tower.blocks)) - 1  # type: ignore[arg-type]
    root = f"{tower.blocks}.{last}"
    for path, layer in module.get_submodule(root).named_modules():
        own = not any(name in path for name in _OTHER)
        if own and path.rpartition(".")[2] in _VALUES and isinstance(layer, nn.Linear):
            return f"{root}.{path}"
    return ""


def see(family: Family, module: nn.Module, batch: Batch, watched: Mapping[str, str]) -> dict[str, Tensor]:
    """Run a model and keep what a lesson is about.

    Args:
        family: of the model.
        module: the model.
        batch: one that `Family.prepare` made.
        watched: name -> path of a layer whose output is kept.

    Returns:
        'logits' [rows, choices]; of families that compare two sides 'first' and 'second' [n, d] and 'scale'; of others
        'hidden.states', the first tower's output; and the outputs of the watched layers by name.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.get_submodule(path).register_forward_hook(watch(name)) for name, path in watched.items()]
    try:
        if family.sides is not None:
            first, second, scale = family.sides(module, batch)
            logits = scale * first @ second.T
            return found | {"first": first, "second": second, "scale": scale, "logits": torch.cat([logits, logits.T])}
        batch = family.encode(module, batch)
        return found | {"hidden.states": batch["states"], "logits": family.run(module, batch)}
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class School:
    """All that lessons are made of.

    Args:
        family: of student and teacher.
        student, teacher: both on the same device.
        settings: generation settings, for answers to augmented samples.
        batches: the samples.
        points: where they are compared.
        work: folder that keeps the lessons.
    """

    family: Family
    student: nn.Module
    teacher: nn.Module
    settings: dict[str, Any]
    batches: Sequence[Batch]
    points: Sequence[Point]
    work: Path

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.student.parameters()).device

    def studied(self, batch: Batch) -> dict[str, Tensor]:
        """What the student does with a batch, gradients included."""
        return see(self.family, self.student, batch, {p.name: p.student for p in self.points})


def lesson(school: School, sample: int, variant: int = 0) -> tuple[Batch, dict[str, Tensor]]:
    """The batch of a sample and what the teacher does with it, on the models' device; from disk after the first time.

    Args:
        school: see there.
        sample: which batch.
        variant: 0 for the sample itself; others are augmented, each in its own way, and the teacher answers them anew.
    """
    from safetensors.torch import load_file, save_file

    file = school.work / f"{sample:05d}_{variant}.safetensors"
    if not file.is_file():
        with torch.no_grad():
            kept = _teach(school, sample, variant)
        school.work.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({n: t.cpu().contiguous() for n, t in kept.items()}, part)
        part.replace(file)
    values = {n: t.to(school.device) for n, t in load_file(file).items()}
    made = {n.removeprefix("batch."): values.pop(n) for n in [*values] if n.startswith("batch.")}
    batch = made or {n: t.to(school.device) for n, t in school.batches[sample].items() if n != "audio"}
    return batch, {n: t.float() for n, t in values.items()}


def _teach(school: School, sample: int, variant: int) -> dict[str, Tensor]:
    """What is kept of a lesson: outputs in half precision, logits as log-probabilities, and a batch that is new."""
    family, batch, new = school.family, school.batches[sample], {}
    if variant:
        assert family.augment is not None  # check_distill() has seen to it
        batch = family.augment(school.teacher, school.batches, sample, variant, school.settings)
        new = {f"batch.{n}": t for n, t in batch.items() if n != "audio"}
    batch = {n: t.to(school.device) for n, t in batch.items() if n != "audio"}
    seen = see(family, school.teacher, batch, {p.name: p.teacher for p in school.points})
    seen["logits"] = torch.log_softmax(seen["logits"], -1)
    places = family.inputs(school.student, batch).get("positions")
    inside = {p.name for p in school.points if p.first} | {"hidden.states"}
    if places is not None and not places.is_floating_point():  # the student sees fewer positions than its teacher
        seen |= {name: seen[name][:, places] for name in inside if name in seen}
    limit = torch.finfo(torch.float16).max
    return {n: t.clamp(-limit, limit).half() for n, t in seen.items()} | new
