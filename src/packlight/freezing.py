"""Frozen classes: of a dual encoder only the tower for pictures or sounds ships, with a vector per class in 8 bits.

For a fixed list of labels the text tower has said all that it will ever say. Its vectors are rounded to int8 with one
scale per class, symmetric and to nearest, so that a score moves by at most half a step times the norms.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packlight.bundle import Bundle, is_bundle, write_bundle
from packlight.codec import read_weights, write_weights
from packlight.data import Dataset
from packlight.errors import BundleError, DataError
from packlight.runtimes.onnx import read_graph
from packlight.runtimes.onnx_wire import external_names
from packlight.serve import PROTOTYPES, WEIGHTS, Served, open_served
from packlight.texts import checked_templates


def freeze(served: Served, labels: Sequence[str], out: Path, templates: Sequence[str] = ()) -> Bundle:
    """Write a bundle that sorts pictures, or sounds, into these classes and nothing else. No torch.

    Args:
        served: an open bundle with both towers.
        labels: two or more, all different.
        out: the new bundle's folder.
        templates: what labels are asked with, {} in place of the label; none for the default of `packlight.texts`.

    Raises:
        BundleError: a bundle without towers.
        DataError: too few labels, one twice, or a template without {}.
    """
    if served.encoder is None or served.encoder.text is None:
        raise BundleError(f"{served.bundle.path} has no text tower to take class vectors from. Name another bundle.")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(f"Classes are frozen for two or more different labels; got {', '.join(labels) or 'none'}.")
    kind = served.encoder.settings.kind
    templates = checked_templates(templates, kind)
    source = served.bundle
    file = source.manifest["graphs"][kind]
    graph = read_graph(source.path / file)
    weights = dict(read_weights(source.path / WEIGHTS, external_names(graph)))
    codes, scale = rounded(served.encoder.embed_classes(labels, templates))
    weights.update({f"{PROTOTYPES}/codes": codes, f"{PROTOTYPES}/scale": scale})
    serving = {k: source.manifest["serving"][k] for k in (kind, "scale", "language", "task")}
    manifest = {k: v for k, v in source.manifest.items() if k not in ("version", "files", "records", "reload", "model")}
    manifest.update(
        task=f"{kind}-classes",
        graphs={kind: file},
        serving={**serving, "labels": list(labels), "templates": list(templates)},
    )

    def fill(folder: Path) -> None:
        shutil.copyfile(source.path / file, folder / file)
        write_weights(folder / WEIGHTS, weights)
        card = (source.path / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(f"{card}\n## Classes\n\n{', '.join(labels)}\n", encoding="utf-8")

    return write_bundle(out, manifest, fill)


def check_classes(dataset: Dataset, wanted: bool) -> None:
    """Refuse samples that no classes can be taken from, where these are wanted. Raises DataError."""
    if wanted and not dataset.by_label:
        raise DataError(f"{dataset.source}: classes are frozen from labels, and not every sample has a 'label' alone.")


def left_out(model: Any) -> set[str]:
    """Names of the parts that do not ship with frozen classes; `model` is a `packlight.model.Model`."""
    return {part.name for part in model.family.parts if part.tower == "text"}


def frozen_reply(
    whole: Served, out: Path, datasets: Sequence[Dataset], templates: Sequence[str], threads: int
) -> Callable[..., list[list[float]]]:
    """Freeze the classes of labelled samples, where that is not done yet, and answer with the bundle that ships.

    Args:
        whole: an open bundle with both towers.
        out: the frozen bundle's folder.
        datasets: samples with their labels' prompts as texts; those that have captions alone bring no class.
        templates: what the labels are asked with.
        threads: of the runtime, 0 for all cores.

    Returns:
        (picture, prompts of a label) -> the vectors of the picture and of that class, as dual encoders answer.
    """
    prompts = prompts_of(datasets)
    labels = sorted(set(prompts.values()))
    if not is_bundle(out):
        freeze(whole, labels, out, templates)
    encoder = open_served(out, threads).encoder
    assert encoder is not None
    classes = encoder.classes
    assert classes is not None
    number = {label: i for i, label in enumerate(encoder.settings.labels)}

    def reply(pair: Any, language: str | None = None, task: str | None = None) -> list[list[float]]:
        content, texts = pair
        own = classes[number[prompts[tuple(texts)]]]
        return [encoder.embed_content(content).tolist(), own.tolist()]

    return reply


def prompts_of(datasets: Sequence[Dataset]) -> dict[tuple[str, ...], str]:
    """The label that each set of prompts asks for, of all samples that are known by their label alone."""
    return {s.texts: s.label for dataset in datasets for s in dataset.samples if s.label is not None and s.text is None}


def rounded(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes int8 [classes, d], scale float32 [classes]) with vectors ~ codes * scale, nearest, symmetric."""
    peak = np.abs(vectors).max(1)
    scale = (np.where(peak > 0, peak, 1) / 127).astype(np.float32)
    return np.rint(vectors / scale[:, None]).clip(-127, 127).astype(np.int8), scale
