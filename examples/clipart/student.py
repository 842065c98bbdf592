"""Distil a picture tower of half the multiply-adds, and train the same one without a teacher to compare.

python examples/clipart/student.py MODEL DRAWINGS -o OUT

MODEL is the folder that `train.py` made, DRAWINGS its folder with train/, validation/ and held-out/. The
teacher sees each view of a picture once, texts keep the teacher's vectors, and the student's first blocks stay as
inherited, so what they give is kept, too: an epoch costs the blocks that learn. Both students have the same shape, start
from the same inherited channels and see the same views in the same order for as many steps; validation drawings say which
epoch is kept. With `--arms fresh` a third one starts at random behind the first blocks. One learns from the pairs of pictures and
words alone, by the contrastive loss of CLIP; the other also from its teacher: normalised features and similarities
(CLIP-KD, Yang et al. 2024, arXiv 2307.12732; TinyCLIP, Wu et al. 2023, arXiv 2309.12314). Interrupted, the command goes
on where it was.
"""

import argparse
import copy
import json
import random
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
import views
from train import contrastive, words

import packlight
from packlight.designing import cost
from packlight.distilling import affinity_error, feature_error
from packlight.families.mobile_dual import write_module
from packlight.images import ImageSettings, pixels, read_image
from packlight.inheriting import student
from packlight.model import Model
from packlight.retrieval import recall, retrieval_ranks, right_pairs
from packlight.training import Task, Training, train

FEATURES, AFFINITY, PAIRS = 1000.0, 1.0, 0.3  # weights of the losses with a teacher
_CHOSEN = 64  # pictures that designs are compared on
ARMS = ("taught", "alone", "fresh")  # with the teacher; without; without, and what learns starts at random
_FREE = ("vision_model.", "visual_projection.")  # what learns; the text tower stays


@dataclass(frozen=True)
class Recipe:
    """How both students are trained.

    Args:
        share: of the teacher's multiply-adds in the picture tower.
        size: side of the student's pictures; 0 lets the design choose.
        views: of each picture that are seen, the first as it is.
        epochs: passes, each over one view.
        batch: pairs that are told apart.
        rate: learning rate relative to the size of each tensor.
        frozen: first blocks of the student that stay as inherited.
        drawings: the first so many train; 0 for all.
    """

    share: float = 0.5
    size: int = 0
    views: int = 2
    epochs: int = 8
    batch: int = 128
    rate: float = 4e-3
    frozen: int = 5
    drawings: int = 0


@dataclass(frozen=True)
class Part:
    """Drawings as students see them.

    Args:
        rows: their words.
        features: per view, float16 [drawings, channels, height, width] after the student's frozen blocks.
        first: per view, the teacher's vectors of them.
        second: per set of words, the teacher's vectors of these.
    """

    rows: list[dict[str, Any]]
    features: list[np.ndarray]
    first: list[Tensor]
    second: list[Tensor]


# What is made once --------------------------------------------------------------------------------------------------


@torch.no_grad()
def view_of(both: tuple[Model, Model], files: list[Path], view: int, frozen: int, kept: Path) -> tuple[Any, Tensor]:
    """What the student's frozen blocks make of one view of the pictures, and the teacher's vectors; kept on disk."""
    teacher, small = both
    if not kept.with_suffix(".npy").is_file():
        whole, own = (ImageSettings.from_dict(m.settings["image"]) for m in both)
        tower, features, vectors = small.module.vision_model, [], []
        for start in range(0, len(files), 32):
            some = [read_image(f) for f in files[start : start + 32]]
            if view:
                some = [views.changed(p, np.random.default_rng((view, start + i))) for i, p in enumerate(some)]
            x, y = (torch.from_numpy(np.concatenate([pixels(p, s) for p in some])) for s in (whole, own))
            vectors.append(nn.functional.normalize(teacher.module.get_image_features(x), dim=-1))
            y = tower.stem(y.contiguous(memory_format=torch.channels_last))
            for block in tower.blocks[:frozen]:
                y = block(y)
            features.append(y.half().numpy())
        np.save(kept.with_suffix(".vectors.npy"), torch.cat(vectors).numpy())
        np.save(kept.with_suffix(".part.npy"), np.concatenate(features))
        kept.with_suffix(".part.npy").rename(kept.with_suffix(".npy"))
    return np.load(kept.with_suffix(".npy")), torch.from_numpy(np.load(kept.with_suffix(".vectors.npy")))


@torch.no_grad()
def text_vectors(teacher: Model, said: list[str], kept: Path) -> Tensor:
    """The teacher's vectors of texts; kept on disk."""
    if not kept.is_file():
        found = torch.empty(len(said), teacher.module.text_projection.out_features)
        order = sorted(range(len(said)), key=lambda i: len(said[i]))  # texts of one length need no padding
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            batch = teacher.settings["tokenizer"]([said[i] for i in some])
            found[some] = nn.functional.normalize(teacher.module.get_text_features(**batch), dim=-1)
        np.save(kept, found.numpy())
    return torch.from_numpy(np.load(kept))


def part_of(both: tuple[Model, Model], folder: Path, work: Path, recipe: Recipe) -> Part:
    """A part of the drawings; those that train in all views and sets of words, others as they are."""
    learned = folder.name == "train"
    rows = data.rows_of(folder)[: (recipe.drawings or None) if learned else None]
    files, count = [folder / r["file_name"] for r in rows], recipe.views if learned else 1
    draw, made, texts = random.Random(0), [], []
    for view in range(count):
        began = time.perf_counter()
        made.append(view_of(both, files, view, recipe.frozen, work / f"{folder.name}-{len(rows)}-{view}"))
        said = [r["text"] if view == 0 else words(r, draw) for r in rows]
        texts.append(text_vectors(both[0], said, work / f"{folder.name}-{len(rows)}-{view}.text.npy"))
        print(f"{folder.name}, view {view}: {len(rows)} drawings, {time.perf_counter() - began:.0f} s", flush=True)
    return Part(rows, [m[0] for m in made], [m[1] for m in made], texts)


# Training -----------------------------------------------------------------------------------------------------------


def seen(small: Model, part: Part, view: int, some: Any, frozen: int) -> Tensor:
    """The student's vectors [n, d], of length 1, of some pictures."""
    x = torch.from_numpy(np.ascontiguousarray(part.features[view][some])).float()
    x, tower = x.contiguous(memory_format=torch.channels_last), small.module.vision_model
    for block in tower.blocks[frozen:]:
        x = block(x)
    return nn.functional.normalize(small.module.visual_projection(tower.pool(x)), dim=-1)


@torch.no_grad()
def recall_at_10(vectors: Tensor, part: Part) -> float:
    """Text to image among a part's drawings, all words of each as the query."""
    right, first, _ = right_pairs([[r["text"]] for r in part.rows])
    return recall(retrieval_ranks(vectors.numpy(), part.second[0].numpy()[first], right)[0], 10)


@torch.no_grad()
def all_seen(small: Model, part: Part, frozen: int) -> Tensor:
    """The student's vectors of a part's pictures."""
    count = len(part.rows)
    return torch.cat([seen(small, part, 0, slice(i, min(i + 64, count)), frozen) for i in range(0, count, 64)])


def loss_of(small: Model, part: Part, recipe: Recipe, taught: bool) -> Callable[[int, int], Tensor]:
    """What a batch of an epoch is learned by."""
    names, scale = np.array([r["text"] for r in part.rows]), float(small.module.logit_scale.detach().exp())

    def loss(number: int, epoch: int) -> Tensor:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(epoch))
        some, view = order[number * recipe.batch : (number + 1) * recipe.batch].numpy(), epoch % len(part.features)
        made, second = seen(small, part, view, some, recipe.frozen), part.second[view][some]
        same = torch.from_numpy(names[some][:, None] == names[some][None])
        pairs = contrastive(made, second, torch.tensor(scale), same)
        if not taught:
            return pairs
        both, aim = (made, second), (part.first[view][some], second)
        return FEATURES * feature_error(both, aim) + AFFINITY * affinity_error(both, aim) + PAIRS * pairs

    return loss


def trained(small: Model, parts: tuple[Part, Part], recipe: Recipe, name: str, work: Path) -> list[float]:
    """Train one of `ARMS`, in place. Returns the recall@10 of the validation drawings before and after each epoch."""
    learn, check = parts
    small.module.vision_model.to(memory_format=torch.channels_last)
    still = ("vision_model.stem.", *(f"vision_model.blocks.{i}." for i in range(recipe.frozen)))
    named = {n: p for n, p in small.module.named_parameters() if n.startswith(_FREE)}
    tensors = {n: p for n, p in named.items() if not n.startswith(still)}
    if name == "fresh":
        draw = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            fan = tensor[0].numel() if tensor.dim() > 1 else 0
            tensor.data.normal_(std=(2 / fan) ** 0.5, generator=draw) if fan else tensor.data.zero_()
    began, per_epoch = time.perf_counter(), len(learn.rows) // recipe.batch

    def progress(what: str, done: int, total: int) -> None:
        if done % per_epoch == 0:
            print(f"{name}, epoch {done // per_epoch}: {time.perf_counter() - began:.0f} s", flush=True)

    task = Task(name, name, tensors, loss_of(small, learn, recipe, name == "taught"),
                lambda _: torch.tensor(1 - recall_at_10(all_seen(small, check, recipe.frozen), check)),
                range(per_epoch), (0,), json.dumps(vars(recipe)))  # fmt: skip
    settings = Training(epochs=recipe.epochs, rate=recipe.rate, least=0.01, warmup=0.1, seed=0)
    return [1 - v for v in train(task, settings, work / name, progress).judged]


# The command --------------------------------------------------------------------------------------------------------


def design(teacher: Model, files: list[Path], recipe: Recipe) -> Model:
    """The student before training: as its budget says, chosen on a few pictures."""
    seen = [teacher.settings["processor"](read_image(f))["pixel_values"] for f in files[:_CHOSEN]]
    wanted = {"share": recipe.share, **({"size": recipe.size} if recipe.size else {})}
    return student(teacher, {"vision": wanted}, [{"pixel_values": torch.cat(seen)}])


def save(small: Model, teacher: Model, folder: Path) -> None:
    """Write a folder that `packlight` reads."""
    write_module(folder, small.module, small.module.config.to_dict())
    for file in Path(teacher.source.path).glob("*.*"):
        if file.suffix in (".json", ".txt") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    small.settings["processor"].original.save_pretrained(folder)


def main() -> int:
    """Read the command line, train both, print their recall."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["taught", "alone"], help="what is trained")
    for name in ("share", "size", "views", "epochs", "batch", "rate", "frozen", "drawings"):
        parser.add_argument(f"--{name}", type=type(getattr(Recipe, name)), default=getattr(Recipe, name))
    given = vars(parser.parse_args())
    model, drawings, out, arms = (given.pop(k) for k in ("model", "drawings", "out", "arms"))
    recipe = Recipe(**given)
    out.mkdir(parents=True, exist_ok=True)
    teacher = packlight.load(str(model))
    files = [drawings / "train" / r["file_name"] for r in data.rows_of(drawings / "train")]
    start = design(teacher, files, recipe)
    config, side = start.module.config.vision_config, start.module.vision_model.size
    before = cost(teacher.module.config.vision_config, teacher.settings["image"]["height"], "operations")
    after = cost(config, side, "operations")
    print(json.dumps(config))
    print(
        f"picture tower: {before / 1e6:.0f} M multiply-adds -> {after / 1e6:.0f} M ({after / before:.1%})", flush=True
    )
    start.module.vision_model.to(memory_format=torch.channels_last)
    learn, check, held = (
        part_of((teacher, start), drawings / name, out, recipe) for name in ("train", "validation", "held-out")
    )
    found = {"teacher": recall_at_10(held.first[0], held)}
    found["inherited"] = recall_at_10(all_seen(start, held, recipe.frozen), held)
    for name in arms:
        small = replace(start, module=copy.deepcopy(start.module))
        curve = trained(small, (learn, check), recipe, name, out)
        print(f"{name}: recall@10 of validation by epoch {', '.join(f'{v:.1%}' for v in curve)}", flush=True)
        found[name] = recall_at_10(all_seen(small, held, recipe.frozen), held)
        save(small, teacher, out / f"{name}-model")
    for name, value in found.items():
        print(f"{name:10} recall@10 of {len(held.rows)} held-out drawings {value:6.1%}")
    (out / "student.json").write_text(json.dumps({**found, "config": config, "share": after / before}, indent=1) + "\n")
    print(f"Measure them: packlight eval {out / 'taught-model'} --data {drawings / 'held-out'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
