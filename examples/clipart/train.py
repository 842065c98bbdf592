"""Train a picture and text model on Open Clip Art: `python examples/clipart/train.py -o MODEL`, about forty minutes.

EfficientNet-Lite0 and MiniLM-L6 meet in a common space by the symmetric contrastive loss of CLIP (Radford et al. 2021,
arXiv 2103.00020). The text tower stays as published (locked tuning turned round: Zhai et al. 2022, arXiv 2111.07991).
First the projections learn alone, then the last blocks of the picture tower with them. Interrupted, the command keeps
the features it has.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
import towers
import views

from packlight.families.mobile_dual import MobileDual, mean_of, write_module
from packlight.retrieval import recall, retrieval_ranks, right_pairs


@dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    Args:
        views: changed versions of each picture.
        texts: sets of words per picture, the first of them all of its words.
        batch: pairs that are told apart.
        first, then: epochs of the projections alone, and of the last blocks with them.
        rate, tune: learning rates of the projections and of the blocks.
        decay: of the weights.
        dropout: share of the picture's features that a projection does not see.
        average: share of the weights as they are that each step adds to their running mean, which is what is kept.
        seed: of everything that is drawn.
        drawings: the first so many train; 0 for all.
    """

    views: int = 4
    texts: int = 4
    batch: int = 256
    first: int = 20
    then: int = 8
    rate: float = 1e-3
    tune: float = 2e-4
    decay: float = 0.1
    dropout: float = 0.4
    average: float = 0.01
    seed: int = 0
    drawings: int = 0


QUICK = Recipe(views=0, then=0)  # the towers stay as published


# Words --------------------------------------------------------------------------------------------------------------


def words(row: dict[str, Any], draw: random.Random) -> str:
    """What someone might call a drawing: half of the time all its words, else some of them in any order."""
    title, keywords = row["title"], row["keywords"]
    if draw.random() < 0.5 or not keywords:
        return data.text_of(title, keywords)
    some = draw.sample(keywords, draw.randint(1, len(keywords)))
    return data.text_of(title if draw.random() < 0.6 else "", some)


def tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Padded 'input_ids' and 'attention_mask' [texts, tokens]."""
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=towers.TOKENS, return_tensors="pt")
    return {k: found[k] for k in ("input_ids", "attention_mask")}


# The loss -----------------------------------------------------------------------------------------------------------


def contrastive(pictures: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """The symmetric cross entropy of the similarities, where pairs that carry the same words do not count as wrong.

    Args:
        pictures, texts: [n, d] of length 1, row by row a pair.
        scale: what multiplies the cosine.
        same: [n, n] bool, whether two pairs carry the same words.
    """
    logits = scale * pictures @ texts.T
    logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -torch.inf)
    right = torch.arange(len(logits))
    cross = nn.functional.cross_entropy
    return (cross(logits, right) + cross(logits.T, right)) / 2


# Training -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What training reads.

    Args:
        rows: of the drawings that train.
        cached: per view, features [drawings, channels, height, width] in float16: an array, or what is indexed like one.
        texts: per set of words, what the text tower says of them [drawings, width].
        cut: blocks that the features have gone through, which stay as they are.
    """

    rows: list[dict[str, Any]]
    cached: Sequence[Any]
    texts: list[Tensor]
    cut: int = field(default_factory=lambda: views.CUT)


@dataclass(frozen=True)
class Part:
    """One of the two parts of training.

    Args:
        epochs: passes over all drawings.
        groups: what learns, and at which rate, as optimizers take it.
        seen: (view, drawings) -> what the picture tower says of them [n, head].
        seed: of the order, the views and the words.
        kept: file that keeps the state after each epoch, to go on from; None for none.
    """

    epochs: int
    groups: list[dict[str, Any]]
    seen: Callable[[int, Tensor], Tensor]
    seed: int
    kept: Path | None = None


def learn(
    model: MobileDual, work: Work, recipe: Recipe, part: Part, report: Callable[[int, float], None]
) -> list[float]:
    """Train what a part says, in place; its running mean is what stays. Returns the mean loss of each epoch."""
    draw, names = torch.Generator().manual_seed(part.seed), np.array([r["text"] for r in work.rows])
    size = min(recipe.batch, len(names))
    optimizer = torch.optim.AdamW(part.groups, weight_decay=recipe.decay)
    rates = [group["lr"] for group in part.groups]
    steps = max(part.epochs * (len(names) // size), 1)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
    tensors = [tensor for group in part.groups for tensor in group["params"]]
    mean = [t.detach().clone() for t in tensors]
    torch.manual_seed(part.seed)  # of dropout
    state = (optimizer, curve, draw, tensors, mean)
    losses = _resume(part.kept, *state) if part.kept and part.kept.is_file() else []
    for number in range(len(losses), part.epochs):
        order, total = torch.randperm(len(names), generator=draw), []
        for first in range(0, len(order) - size + 1, size):
            some = order[first : first + size]
            view, said = (int(torch.randint(len(v), (1,), generator=draw)) for v in (work.cached, work.texts))
            same = torch.from_numpy(names[some][:, None] == names[some][None])
            x = nn.functional.dropout(part.seen(view, some), recipe.dropout)
            x, y = model.visual_projection(x), model.text_projection(work.texts[said][some])
            unit = (nn.functional.normalize(v, dim=-1) for v in (x, y))
            loss = contrastive(*unit, model.logit_scale.exp(), same)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            curve.step()
            torch._foreach_lerp_(mean, [t.data for t in tensors], recipe.average)
            total.append(float(loss.detach()))
        losses.append(sum(total) / len(total))
        if part.kept:
            _keep(part.kept, losses, *state)
        report(number, losses[-1])
    for tensor, kept in zip(tensors, mean, strict=True):
        tensor.data.copy_(kept)
    return losses


def _keep(
    file: Path, losses: list[float], optimizer: Any, curve: Any, draw: torch.Generator, *tensors: list[Tensor]
) -> None:
    """Write all that training goes on from, so that no later run sees half of it."""
    state = {"losses": losses, "optimizer": optimizer.state_dict(), "curve": curve.state_dict(), "tensors": tensors}
    part = file.with_suffix(".part")
    torch.save({**state, "draw": draw.get_state(), "dropout": torch.get_rng_state()}, part)
    part.replace(file)


def _resume(file: Path, optimizer: Any, curve: Any, draw: torch.Generator, *tensors: list[Tensor]) -> list[float]:
    """Take up what was kept, in place. Returns the losses so far."""
    state = torch.load(file, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    curve.load_state_dict(state["curve"])
    draw.set_state(state["draw"])
    torch.set_rng_state(state["dropout"])
    for ours, kept in zip(tensors, state["tensors"], strict=True):
        for tensor, value in zip(ours, kept, strict=True):
            tensor.data.copy_(value)
    return list(state["losses"])


def groups(model: MobileDual, recipe: Recipe, cut: int | None) -> list[dict[str, Any]]:
    """What learns, and at which rate: the projections and the scale; in the second part the blocks from `cut` on, too."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    rate = recipe.rate * (1 if cut is None else 0.3)
    chosen = [
        {"params": [model.visual_projection.weight, model.text_projection.weight], "lr": rate},
        {"params": [model.logit_scale], "lr": rate, "weight_decay": 0.0},
    ]
    if cut is not None:
        tower = model.vision_model
        last = [*tower.blocks[cut:].parameters(), *tower.head.parameters()]
        chosen.append({"params": last, "lr": recipe.tune})
    for group in chosen:
        for weight in group["params"]:
            weight.requires_grad_(True)
    return chosen


def last_blocks(model: MobileDual, cached: np.ndarray, cut: int) -> Tensor:
    """What the picture tower makes of the features of its first `cut` blocks: [n, head]."""
    x = torch.from_numpy(cached.astype(np.float32)).contiguous(memory_format=torch.channels_last)
    for block in model.vision_model.blocks[cut:]:
        x = block(x)
    return model.vision_model.pool(x)


@torch.inference_mode()
def pooled(model: MobileDual, cached: Any, cut: int) -> Tensor:
    """The same of all drawings, without training."""
    return torch.cat([last_blocks(model, cached[i : i + 32], cut) for i in range(0, len(cached), 32)])


@torch.inference_mode()
def text_vectors(model: MobileDual, tokenizer: Any, said: Sequence[str]) -> Tensor:
    """What the text tower says of texts: [n, width]."""
    order = sorted(range(len(said)), key=lambda i: len(said[i]))  # texts of one length need no padding
    found = torch.empty(len(said), model.text_projection.in_features)
    for first in range(0, len(order), 64):
        some = order[first : first + 64]
        batch = tokens(tokenizer, [said[i] for i in some])
        found[some] = mean_of(model.text_model(**batch).last_hidden_state, batch["attention_mask"])
    return found


def _quiet(number: int, loss: float) -> None:
    """Say nothing of an epoch."""


def project(model: MobileDual, work: Work, recipe: Recipe) -> list[float]:
    """Train the projections and the scale alone. Returns the mean loss of each epoch."""
    made = [pooled(model, cached, work.cut).clone() for cached in work.cached]
    part = Part(recipe.first, groups(model, recipe, None), lambda view, some: made[view][some], recipe.seed)
    return learn(model, work, recipe, part, _quiet)


def tune(
    model: MobileDual,
    work: Work,
    recipe: Recipe,
    report: Callable[[int, float], None] = _quiet,
    kept: Path | None = None,
) -> list[float]:
    """Train the last blocks of the picture tower with the projections. Returns the mean loss of each epoch.

    Args:
        model: trained in place.
        work: what it reads.
        recipe: how.
        report: called after each epoch, with its number and mean loss.
        kept: file that keeps the state, to go on from.
    """

    def seen(view: int, some: Tensor) -> Tensor:
        return last_blocks(model, work.cached[view][some.numpy()], work.cut)

    part = Part(recipe.then, groups(model, recipe, work.cut), seen, recipe.seed + 1, kept)
    return learn(model, work, recipe, part, report)


# Measuring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def recall_at_10(model: MobileDual, work: Work) -> float:
    """Text to image among these drawings, the words of each as the query."""
    pictures = model.visual_projection(pooled(model, work.cached[0], work.cut)).numpy()
    right, first, _ = right_pairs([[r["text"]] for r in work.rows])
    return recall(retrieval_ranks(pictures, model.text_projection(work.texts[0][first]).numpy(), right)[0], 10)


# The command --------------------------------------------------------------------------------------------------------


def prepared(root: Path, work: Path, model: MobileDual, recipe: Recipe, folder: Path) -> tuple[Work, Work]:
    """(what trains, what validates), each picture's features made or read."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    parts = {}
    for name in ("train", "emoji", "validation"):
        learned, draw, began = name != "validation", random.Random(recipe.seed), time.perf_counter()
        rows = data.rows_of(root / name)[: recipe.drawings or None if learned else None]
        files, cached, texts = [root / name / r["file_name"] for r in rows], [], []
        for view in range(recipe.views + 1 if learned else 1):
            cached.append(views.features(model, files, view, work / f"{name}-{len(rows)}-{view}.npy"))
            print(f"{name}, view {view}: {len(files)} pictures, {time.perf_counter() - began:.0f} s", flush=True)
        for number in range(recipe.texts if learned else 1):
            said = [words(r, draw) if number else r["text"] for r in rows]
            texts.append(text_vectors(model, tokenizer, said).clone())
        parts[name] = Work(rows, cached, texts)
    return joined(parts["train"], parts["emoji"]), parts["validation"]


def joined(one: Work, other: Work) -> Work:
    """Two sets of drawings as one."""
    cached = [np.concatenate(both) for both in zip(one.cached, other.cached, strict=True)]
    texts = [torch.cat(both) for both in zip(one.texts, other.texts, strict=True)]
    return Work([*one.rows, *other.rows], cached, texts)


def train(root: Path, work: Path, folder: Path, recipe: Recipe) -> None:
    """Make the model's folder from the drawings under `root`; features are kept in `work`."""
    model, config = towers.start(work, recipe.seed)
    model.vision_model.to(memory_format=torch.channels_last)
    towers.write_processing(folder, work)
    learned, check = prepared(root, work, model, recipe, folder)
    began = time.perf_counter()

    def report(i: int, loss: float, name: str = "last blocks") -> None:
        print(f"{name}, epoch {i + 1}: loss {loss:.3f}, recall@10 of {len(check.rows)} drawings "
              f"{recall_at_10(model, check):.1%}, {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip

    report(recipe.first - 1, project(model, learned, recipe)[-1], "projections")
    if recipe.then:
        report(recipe.then - 1, tune(model, learned, recipe, report)[-1], "their running mean")
    write_module(folder, model, config)


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, help="folder with train/, emoji/ and validation/; made when absent")
    parser.add_argument("--work", type=Path, default=Path("demo/clipart"), help="folder for what can be used again")
    parser.add_argument("--quick", action="store_true", help="projections alone; the towers stay as published")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    root = given.data or given.work / "drawings"
    if not (root / "train" / "metadata.jsonl").is_file():
        print("Getting Debian's package of Open Clip Art and sets of emoji, and rendering them.", flush=True)
        data.make(root, given.work, os.cpu_count() or 1)
    train(root, given.work, given.out, QUICK if given.quick else Recipe())
    print(f"Wrote {given.out}. Measure it: packlight eval {given.out} --data {root / 'held-out'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
