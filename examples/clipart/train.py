"""Train a picture and text model on Open Clip Art: `python examples/clipart/train.py -o MODEL`, about half an hour.

EfficientNet-Lite0 and MiniLM-L6 meet in a common space by the symmetric contrastive loss of CLIP (Radford et al. 2021,
arXiv 2103.00020). First the projections learn alone on frozen towers, then the last blocks of both towers with them
(locked-image tuning turned both ways: Zhai et al. 2022, arXiv 2111.07991). Interrupted, the command
keeps the features it has.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
import towers
import views

from packlight.families.dual_encoder import embed_text
from packlight.families.mobile_dual import MobileDual, mean_of, write_module
from packlight.retrieval import recall, retrieval_ranks, right_pairs


@dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    Args:
        views: changed versions of each picture.
        batch: pairs that are told apart.
        first, then: epochs of the projections alone, and of the last blocks with them.
        rate, tune: learning rates of the projections and of the blocks.
        layers: last layers of the text tower that learn.
        seed: of everything that is drawn.
        drawings: the first so many train; 0 for all.
    """

    views: int = 4
    batch: int = 256
    first: int = 15
    then: int = 8
    rate: float = 1e-3
    tune: float = 1e-4
    layers: int = 2
    seed: int = 0
    drawings: int = 0


QUICK = Recipe(views=0, first=40, then=0)  # seven minutes of computing on two cores; the towers stay as published
_VARIANTS = 2  # sets of words per drawing while the towers are frozen


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


def text_states(model: MobileDual, batch: dict[str, Tensor], frozen: int) -> Tensor:
    """Vectors [n, d] of length 1; the first `frozen` layers take no gradient."""
    tower = model.text_model
    with torch.no_grad():
        x = tower.embeddings(input_ids=batch["input_ids"])
        mask = (1 - batch["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
        for layer in tower.encoder.layer[:frozen]:
            x = layer(x, mask)
    for layer in tower.encoder.layer[frozen:]:
        x = layer(x, mask)
    return nn.functional.normalize(model.text_projection(mean_of(x, batch["attention_mask"])), dim=-1)


def picture_states(model: MobileDual, x: Tensor) -> Tensor:
    """Vectors [n, d] of length 1 from what the frozen blocks gave."""
    for block in model.vision_model.blocks[views.CUT :]:
        x = block(x)
    return nn.functional.normalize(model.visual_projection(model.vision_model.pool(x)), dim=-1)


# Training -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What training reads.

    Args:
        rows: of the drawings that train.
        cached: per view, features [drawings, channels, height, width].
        tokenizer: of the text tower.
    """

    rows: list[dict[str, Any]]
    cached: list[np.ndarray]
    tokenizer: Any


def epoch(model: MobileDual, work: Work, recipe: Recipe, number: int, step: Callable[[Tensor], None]) -> float:
    """One pass over all drawings, each in one view and with some of its words. Returns the mean loss."""
    draw, total, count = random.Random(recipe.seed * 1000 + number), 0.0, 0
    order = list(range(len(work.rows)))
    draw.shuffle(order)
    frozen = len(model.text_model.encoder.layer) - recipe.layers
    for first in range(0, len(order) - recipe.batch + 1, recipe.batch):
        chosen = order[first : first + recipe.batch]
        x = np.stack([work.cached[draw.randrange(len(work.cached))][i] for i in chosen])
        texts = [work.rows[i]["text"] for i in chosen]
        same = torch.from_numpy(np.array(texts)[:, None] == np.array(texts)[None])
        batch = tokens(work.tokenizer, [words(work.rows[i], draw) for i in chosen])
        pictures = picture_states(model, torch.from_numpy(x).float())
        loss = contrastive(pictures, text_states(model, batch, frozen), model.logit_scale.exp(), same)
        step(loss)
        total, count = total + float(loss.detach()), count + 1
    return total / count


def groups(model: MobileDual, recipe: Recipe, tuned: bool) -> list[dict[str, Any]]:
    """What learns, and at which rate: the projections and the scale, and in the second part the last blocks."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    heads = [model.visual_projection.weight, model.text_projection.weight, model.logit_scale]
    chosen = [{"params": heads, "lr": recipe.rate * (0.3 if tuned else 1)}]
    if tuned:
        last = [*model.vision_model.blocks[views.CUT :].parameters(), *model.vision_model.head.parameters()]
        frozen = len(model.text_model.encoder.layer) - recipe.layers
        last += model.text_model.encoder.layer[frozen:].parameters()
        chosen.append({"params": last, "lr": recipe.tune})
    for group in chosen:
        for weight in group["params"]:
            weight.requires_grad_(True)
    return chosen


def tune(model: MobileDual, work: Work, recipe: Recipe, report: Callable[[int, float], None]) -> None:
    """Train the last blocks of both towers with the projections, the rate falling along a cosine after a short rise."""
    optimizer = torch.optim.AdamW(groups(model, recipe, True), weight_decay=0.05)
    steps = recipe.then * (len(work.rows) // recipe.batch)
    curve = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], steps, pct_start=0.1
    )

    def step(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        curve.step()

    for i in range(recipe.then):
        report(i, epoch(model, work, recipe, i, step))


@torch.inference_mode()
def frozen_vectors(model: MobileDual, work: Work, recipe: Recipe) -> tuple[list[Tensor], list[Tensor]]:
    """What the towers say before they learn: ([drawings, head] per view, [drawings, width] per set of words)."""
    pictures = []
    for cached in work.cached:
        made = []
        for first in range(0, len(cached), 64):
            x = torch.from_numpy(cached[first : first + 64].astype(np.float32))
            for block in model.vision_model.blocks[views.CUT :]:
                x = block(x)
            made.append(model.vision_model.pool(x))
        pictures.append(torch.cat(made))
    draw, texts = random.Random(recipe.seed), []
    for variant in range(_VARIANTS):
        said = [r["text"] if variant == 0 else words(r, draw) for r in work.rows]
        order = sorted(range(len(said)), key=lambda i: len(said[i]))  # texts of one length need no padding
        found = torch.empty(len(said), model.text_projection.in_features)
        for first in range(0, len(order), 64):
            some = order[first : first + 64]
            batch = tokens(work.tokenizer, [said[i] for i in some])
            found[some] = mean_of(model.text_model(**batch).last_hidden_state, batch["attention_mask"])
        texts.append(found)
    return pictures, texts


def project(model: MobileDual, work: Work, recipe: Recipe) -> list[float]:
    """Train the projections and the scale alone. Returns the mean loss of each epoch."""
    pictures, texts = (([t.clone() for t in found]) for found in frozen_vectors(model, work, recipe))
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = groups(model, recipe, False)
    optimizer = torch.optim.AdamW(chosen, weight_decay=0.05)
    size = min(recipe.batch, len(work.rows))
    steps = recipe.first * (len(work.rows) // size)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps, pct_start=0.1)
    names = np.array([r["text"] for r in work.rows])
    losses = []
    for i in range(recipe.first):
        order, total = torch.randperm(len(names), generator=generator), []
        for first in range(0, len(order) - size + 1, size):
            some = order[first : first + size]
            same = torch.from_numpy(names[some][:, None] == names[some][None])
            x = nn.functional.normalize(model.visual_projection(pictures[i % len(pictures)][some]), dim=-1)
            y = nn.functional.normalize(model.text_projection(texts[i % len(texts)][some]), dim=-1)
            loss = contrastive(x, y, model.logit_scale.exp(), same)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            curve.step()
            total.append(float(loss.detach()))
        losses.append(sum(total) / len(total))
    return losses


# Measuring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def recall_at_10(model: MobileDual, rows: Sequence[dict[str, Any]], cached: np.ndarray, tokenizer: Any) -> float:
    """Text to image among these drawings, the words of each as the query."""
    pictures = torch.cat([picture_states(model, torch.from_numpy(x[None].astype(np.float32))) for x in cached]).numpy()
    texts = [embed_text(model, tokens(tokenizer, [r["text"]])["input_ids"]).numpy() for r in rows]
    right, first, _ = right_pairs([[r["text"]] for r in rows])
    return recall(retrieval_ranks(pictures, np.concatenate(texts)[first], right)[0], 10)


# The command --------------------------------------------------------------------------------------------------------


def prepared(root: Path, work: Path, model: MobileDual, recipe: Recipe, folder: Path) -> tuple[Work, Work]:
    """(what trains, what validates), each picture's features made or read."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    parts = []
    for name, numbers in (("train", range(recipe.views + 1)), ("validation", range(1))):
        rows = data.rows_of(root / name)[: recipe.drawings or None if name == "train" else None]
        files = [root / name / r["file_name"] for r in rows]
        cached = []
        for view in numbers:
            began = time.perf_counter()
            cached.append(views.features(model, files, view, work / f"{name}-{len(rows)}-{view}.npy"))
            print(f"{name}, view {view}: {len(files)} pictures, {time.perf_counter() - began:.0f} s", flush=True)
        parts.append(Work(rows, cached, tokenizer))
    return parts[0], parts[1]


def train(root: Path, work: Path, folder: Path, recipe: Recipe) -> None:
    """Make the model's folder from the drawings under `root`; features are kept in `work`."""
    model, config = towers.start(work, recipe.seed)
    towers.write_processing(folder, work)
    learn, check = prepared(root, work, model, recipe, folder)
    began = time.perf_counter()

    def report(i: int, loss: float, name: str = "last blocks") -> None:
        found = recall_at_10(model, check.rows, check.cached[0], check.tokenizer)
        print(f"{name}, epoch {i + 1}: loss {loss:.3f}, recall@10 of {len(check.rows)} drawings {found:.1%}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip

    losses = project(model, learn, recipe)
    report(recipe.first - 1, losses[-1], "projections")
    write_module(folder, model, config)
    if recipe.then:
        tune(model, learn, recipe, report)
    write_module(folder, model, config)


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, help="folder with train/ and validation/; made when absent")
    parser.add_argument("--work", type=Path, default=Path("demo/clipart"), help="folder for what can be used again")
    parser.add_argument("--quick", action="store_true", help="projections alone; the towers stay as published")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    root = given.data or given.work / "drawings"
    if not (root / "train" / "metadata.jsonl").is_file():
        print("Getting Debian's package of Open Clip Art and rendering it.", flush=True)
        data.make(root, given.work, os.cpu_count() or 1)
    train(root, given.work, given.out, QUICK if given.quick else Recipe())
    print(f"Wrote {given.out}. Measure it: packlight eval {given.out} --data {root / 'held-out'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
