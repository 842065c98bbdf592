"""What students of the clip art model learn from: their first blocks' features and the teacher's vectors, kept on disk.

The student's first blocks stay as inherited, and the texts keep the teacher's text tower, so what these give is made once.
The teacher sees each view of a picture once, too. Features are read from disk as they are asked for: a view of ten
thousand drawings in 160 pixels is 320 MB.
"""

import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data
import train
import views

from packlight.families.mobile_dual import mean_of
from packlight.images import ImageSettings, pixels, read_image
from packlight.model import Model

_BATCH = 8  # what goes through the first blocks then stays in the cache


@dataclass(frozen=True)
class Recipe:
    """How students are trained.

    Args:
        share: of the teacher's multiply-adds in the picture tower.
        size: side of the student's pictures; 0 lets the design choose.
        views: of each picture that are seen, the first as it is.
        epochs: passes, each over one view.
        batch: pairs that are told apart.
        rate: learning rate relative to the size of each tensor.
        frozen: first blocks of the student that stay as they are.
        drawings: the first so many of each folder train; 0 for all.
    """

    share: float = 0.5
    size: int = 0
    views: int = 2
    epochs: int = 6
    batch: int = 128
    rate: float = 4e-3
    frozen: int = 5
    drawings: int = 0


@dataclass(frozen=True)
class Lessons:
    """Drawings as students see them.

    Args:
        work: their words, features after the student's frozen blocks, and what the text tower says of the words.
        aims: per view, the teacher's vectors [drawings, d] of the pictures, of length 1.
    """

    work: train.Work
    aims: list[Tensor]


class Rows:
    """Arrays on disk as one along their first axis; only what is asked for is read."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays, self.starts = list(arrays), np.cumsum([0, *(len(a) for a in arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, some: Any) -> np.ndarray:
        """Those that a slice or an array of indices names, in its order."""
        index, first = np.arange(len(self))[some], self.arrays[0]
        owner = np.searchsorted(self.starts, index, "right") - 1
        made = np.empty((len(index), *first.shape[1:]), first.dtype)
        for number, array in enumerate(self.arrays):
            own = owner == number
            made[own] = array[index[own] - self.starts[number]]
        return made


def mark(both: tuple[Model, Model], frozen: int) -> str:
    """A few characters that differ for another teacher, another student or other blocks that stay."""
    found = hashlib.sha256(f"{both[1].module.vision_model.size} {frozen}".encode())
    for model in both:
        for tensor in model.module.state_dict().values():
            found.update(tensor.contiguous().numpy())
    return found.hexdigest()[:8]


# Pictures -----------------------------------------------------------------------------------------------------------


def ahead(make: Callable[[int], Any], count: int) -> Iterator[Any]:
    """make(0), make(1) and so on, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, 0)
        for number in range(1, count + 1):
            made = following.result()
            if number < count:
                following = pool.submit(make, number)
            yield made


def reader(files: Sequence[Path], view: int, sides: Sequence[ImageSettings]) -> Callable[[int], list[Tensor]]:
    """number -> the pixels of that batch of pictures in one view, once for each of the settings."""

    def read(number: int) -> list[Tensor]:
        some = []
        for i, file in enumerate(files[number * _BATCH : (number + 1) * _BATCH], number * _BATCH):
            picture = read_image(file)
            some.append(views.changed(picture, np.random.default_rng((view, i))) if view else picture)
        made = (torch.from_numpy(np.concatenate([pixels(p, side) for p in some])) for side in sides)
        return [x.contiguous(memory_format=torch.channels_last) for x in made]

    return read


@torch.no_grad()
def view_of(
    both: tuple[Model, Model], files: Sequence[Path], view: int, frozen: int, kept: Path
) -> tuple[np.ndarray, Tensor]:
    """What the student's frozen blocks make of one view of the pictures, and the teacher's vectors; kept on disk.

    Args:
        both: teacher and student.
        files: the pictures.
        view: 0 for the pictures as they are, another number for changed ones.
        frozen: how many blocks.
        kept: name of the files without an ending.
    """
    done, aims, part = (kept.with_suffix(s) for s in (".npy", ".vectors.npy", ".part.npy"))
    if not done.is_file():
        teacher, tower, vectors, features = both[0], both[1].module.vision_model, [], None
        sides = [ImageSettings.from_dict(m.settings["image"]) for m in both]
        for x, y in ahead(reader(files, view, sides), -(-len(files) // _BATCH)):
            y = tower.stem(y)
            for block in tower.blocks[:frozen]:
                y = block(y)
            if features is None:
                features = np.lib.format.open_memmap(part, "w+", np.float16, (len(files), *y.shape[1:]))
            first = len(vectors) * _BATCH
            features[first : first + len(y)] = y.half().numpy()
            vectors.append(nn.functional.normalize(teacher.module.get_image_features(x), dim=-1))
        np.save(aims, torch.cat(vectors).numpy())
        if features is not None:
            features.flush()
        part.rename(done)
    return np.load(done, mmap_mode="r"), torch.from_numpy(np.load(aims))


# Words --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def text_states(teacher: Model, said: Sequence[str], kept: Path) -> Tensor:
    """What the text tower says of texts, before its projection: [n, width]; kept on disk."""
    if not kept.is_file():
        found = torch.empty(len(said), teacher.module.text_projection.in_features)
        order = sorted(range(len(said)), key=lambda i: len(said[i]))  # texts of one length need no padding
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            batch = teacher.settings["tokenizer"]([said[i] for i in some])
            states = teacher.module.text_model(**batch).last_hidden_state
            found[some] = mean_of(states, batch.get("attention_mask"))
        np.save(kept, found.numpy())
    return torch.from_numpy(np.load(kept))


# Both ---------------------------------------------------------------------------------------------------------------


def lessons_of(both: tuple[Model, Model], folders: Sequence[Path], out: Path, recipe: Recipe, learned: bool) -> Lessons:
    """The drawings of some folders as one.

    Args:
        both: teacher and student.
        folders: each with metadata.jsonl.
        out: folder that keeps what is made.
        recipe: which views, and how many drawings.
        learned: all views and sets of words, for those that train; otherwise the pictures and words as they are.
    """
    rows: list[dict[str, Any]] = []
    count, own = recipe.views if learned else 1, mark(both, recipe.frozen)
    made: list[list[tuple[np.ndarray, Tensor, Tensor]]] = [[] for _ in range(count)]
    for folder in folders:
        some = data.rows_of(folder)[: (recipe.drawings or None) if learned else None]
        files, draw = [folder / r["file_name"] for r in some], random.Random(0)
        for view in range(count):
            began, kept = time.perf_counter(), out / f"{folder.name}-{len(some)}-{view}-{own}"
            said = [train.words(r, draw) if view else r["text"] for r in some]
            seen = view_of(both, files, view, recipe.frozen, kept)
            made[view].append((*seen, text_states(both[0], said, kept.with_suffix(".text.npy"))))
            print(f"{folder.name}, view {view}: {len(some)} drawings, {time.perf_counter() - began:.0f} s", flush=True)
        rows += some
    cached = [Rows([m[0] for m in view]) for view in made]
    texts = [torch.cat([m[2] for m in view]) for view in made]
    return Lessons(train.Work(rows, cached, texts, recipe.frozen), [torch.cat([m[1] for m in view]) for view in made])
