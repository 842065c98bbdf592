"""What packlight knows about a family of models: data and plain functions, no base class.

A new family is one file with a `Family` and a line in `packlight.tables`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from packlight.context import AudioContext

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Tower:
    """A stack of blocks that run one after the other.

    Args:
        name: e.g. 'encoder'.
        modality: 'audio', 'image' or 'text'.
        blocks: path of the nn.ModuleList.
    """

    name: str
    modality: str
    blocks: str


@dataclass(frozen=True)
class Part:
    """Layers that are judged, and given their bits, together.

    Args:
        name: e.g. 'decoder feed-forward'.
        paths: Unix wildcards over paths of layers.
        tower: the tower whose modality it serves.
    """

    name: str
    paths: tuple[str, ...]
    tower: str

    def has(self, path: str) -> bool:
        """Whether a layer belongs to this part."""
        return any(fnmatchcase(path, pattern) for pattern in self.paths)


@dataclass(frozen=True)
class Graph:
    """One exportable part of a model.

    Args:
        name: 'encoder', 'decoder', ...
        module: takes and returns tensors only.
        args: example inputs, in the order of `inputs`.
        inputs, outputs: names of the tensors.
        dynamic: input name -> {dimension: its name}.
    """

    name: str
    module: nn.Module
    args: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Family:
    """Everything the rest of packlight asks about a family.

    Args:
        name: of the family.
        architectures: class names in `config.json` that belong to it.
        modalities: what goes in and out.
        task: 'speech-to-text', ...
        towers: in the order in which a forward pass runs them.
        parts: every layer that holds weights belongs to the first part that has it.
        tied: (path of the table, path of the layer that shares its weights).
        read: (folder, config) -> (module, generation settings, text of tokenizer.json).
        prompt: (settings, language, task) -> the token ids that open an answer.
        detect_language: (module, sample, settings) -> code or None.
        answer: (module, sample, settings, language, task) -> the model's own answer as token ids.
        prepare: (module, sample, answer, prompt, settings) -> a batch for teacher-forced passes.
        encode: (module, batch) -> the batch with the first tower's output in it.
        run: (module, batch) -> logits [tokens that count, vocabulary].
        graphs: module -> what is exported.
        serving: (module, settings, language, task) -> what serving needs, for the manifest.
        multiply_adds: (module, path) -> multiply-adds of that layer for `unit`.
        unit: the amount of work that multiply-adds are given for, in words.
        reads: key of the batches' token ids, which the tied table is looked up by.
        window: seconds of a sample that a batch holds.
        inputs: (module, batch) -> the batch with what the exported graphs take of it, where that differs.
        shorten: (module, how much padding to keep) lets the first tower see little of it, in place; None where a
            sample is never padded.
    """

    name: str
    architectures: tuple[str, ...]
    modalities: tuple[str, ...]
    task: str
    towers: tuple[Tower, ...]
    parts: tuple[Part, ...]
    tied: tuple[tuple[str, str], ...]
    read: Callable[[Path, dict[str, Any]], tuple[nn.Module, dict[str, Any], str]]
    prompt: Callable[[dict[str, Any], str | None, str], list[int]]
    detect_language: Callable[[nn.Module, Any, dict[str, Any]], str | None]
    answer: Callable[[nn.Module, Any, dict[str, Any], str | None, str], list[int]]
    prepare: Callable[[nn.Module, Any, Sequence[int], Sequence[int], dict[str, Any]], Batch]
    encode: Callable[[nn.Module, Batch], Batch]
    run: Callable[[nn.Module, Batch], Tensor]
    graphs: Callable[[nn.Module], Sequence[Graph]]
    serving: Callable[[nn.Module, dict[str, Any], str | None, str], dict[str, Any]]
    multiply_adds: Callable[[nn.Module, str], int]
    unit: str
    reads: str
    window: float
    inputs: Callable[[nn.Module, Batch], Batch] = lambda module, batch: batch
    shorten: Callable[[nn.Module, AudioContext], None] | None = None

    def part_of(self, path: str) -> Part | None:
        """The part that a layer belongs to, or None."""
        return next((part for part in self.parts if part.has(path)), None)
