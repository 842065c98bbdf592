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
BESIDE = "texts_beside"  # key of a batch: ids [n, tokens] of further calibration texts, which no tower is run on


def ids_read(batches: Sequence[Batch], key: str) -> list[Tensor]:
    """The token ids under `key` that batches read, where they have words, and those of the texts beside them."""
    return [b[name] for name in (key, BESIDE) for b in batches if name in b]


@dataclass(frozen=True)
class Attention:
    """Where the heads of a block are. Paths are below the block; all heads have the same size.

    Args:
        path: of the module that knows how many heads there are.
        query, key, value, out: paths of its linear layers.
        count: the module's attribute for the number of heads.
        width: its attribute for the width of all heads together, '' where it has none.
    """

    path: str
    query: str
    key: str
    value: str
    out: str
    count: str = "num_heads"
    width: str = ""


def attention_at(path: str, out: str = "out_proj", count: str = "num_heads") -> Attention:
    """An attention whose layers lie in it under the names that most of transformers uses."""
    query, key, value = (f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    return Attention(path, query, key, value, f"{path}.{out}", count)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks that run one after the other.

    Args:
        name: e.g. 'encoder'.
        modality: 'audio', 'image' or 'text'.
        blocks: path of the nn.ModuleList; '' for a tower without one.
        paths: Unix wildcards over paths of its layers; none is for all that lie beside the blocks.
        chained: whether a block's output is all that the next block is given anew.
        stepwise: whether it runs row by row on the device, so that its activations have one range per row anyway.
        attentions: of each block; none where heads can't be taken out.
        feed_forward: paths below the block of the layers before and after the hidden units; None likewise.
        inverted: paths below an inverted residual block of the convolutions that widen it, see each hidden channel
            alone, and narrow it; None for other blocks.
        config: attribute of the module's config that holds this tower's own, '' where they are one.
        count_key, hidden_key: names there of the number of blocks and of hidden units; '' where there are none.
    """

    name: str
    modality: str
    blocks: str
    paths: tuple[str, ...] = ()
    chained: bool = True
    stepwise: bool = False
    attentions: tuple[Attention, ...] = ()
    feed_forward: tuple[str, str] | None = None
    inverted: tuple[str, str, str] | None = None
    config: str = ""
    count_key: str = ""
    hidden_key: str = ""

    def has(self, path: str) -> bool:
        """Whether a layer belongs to this tower."""
        return any(fnmatchcase(path, pattern) for pattern in self.patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Wildcards over the paths of its layers."""
        return self.paths or (self.blocks.rpartition(".")[0] + ".*",)


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
        tables: paths of tables of token ids that no layer shares.
        read: (folder, config) -> (module, generation settings, text of tokenizer.json).
        prompt: (settings, language, task) -> the token ids that open an answer.
        detect_language: (module, input, settings) -> code or None; None for a family that knows no languages.
        answer: (module, input, settings, language, task) -> the model's own answer as JSON can hold it: token ids, or
            vectors.
        prepare: (module, input, answer, prompt, settings) -> a batch for teacher-forced passes; with a `group` above 1
            it takes a list of inputs and no answer.
        encode: (module, batch) -> the batch with the first tower's output in it, as 'states'.
        run: (module, batch) -> logits [rows that count, choices]: of tokens, or of the batch's other side.
        graphs: module -> what is exported.
        serving: (module, settings, language, task) -> what serving needs, for the manifest.
        multiply_adds: (module, path) -> multiply-adds of that layer for `unit`.
        unit: the amount of work that multiply-adds are given for, in words.
        reads: key of the batches' token ids, which the tied table is looked up by.
        window: seconds of a sample that a batch holds.
        notes: sentences that a reader of its metric should know.
        usage: what follows `packlight run BUNDLE` in a bundle's card.
        open_input: (path, texts) -> what `answer` and `prepare` take.
        group: samples in a batch.
        bind: (family, module, settings) -> the family with the towers, parts and graphs that this module has; None
            where all have the same.
        inputs: (module, batch) -> the batch with what the exported graphs take of it, where that differs.
        equip: (module, folder, plain settings, tokenizer) -> settings as `read` gives them, and the module told of them: for
            a module that was not read but built; the folder holds config, tokenizer and `processing`.
        processing: module -> JSON files that say how inputs are made, by name, where the original brings none.
        shorten: (module, how much padding to keep) lets the first tower see little of it, in place; None where a
            sample is never padded.
        words: (module, batch, settings) -> ids [rows] that the logits should predict, -100 where that is unknown; None
            for a family without words.
        sides: (module, batch) -> (vectors [n, d] of the first and of the second tower, scale of their cosines); None for
            a family that compares nothing.
        augment: (module, batches, which, seed, settings) -> another batch out of that one, with the module's own words
            for it; None where that can't be done.
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
    detect_language: Callable[[nn.Module, Any, dict[str, Any]], str | None] | None
    answer: Callable[[nn.Module, Any, dict[str, Any], str | None, str], list[Any]]
    prepare: Callable[[nn.Module, Any, Sequence[int], Sequence[int], dict[str, Any]], Batch]
    encode: Callable[[nn.Module, Batch], Batch]
    run: Callable[[nn.Module, Batch], Tensor]
    graphs: Callable[[nn.Module], Sequence[Graph]]
    serving: Callable[[nn.Module, dict[str, Any], str | None, str], dict[str, Any]]
    multiply_adds: Callable[[nn.Module, str], int]
    unit: str
    reads: str
    window: float
    usage: str
    open_input: Callable[[Path, Sequence[str]], Any]
    tables: tuple[str, ...] = ()
    group: int = 1
    notes: tuple[str, ...] = ()
    bind: "Callable[[Family, nn.Module, dict[str, Any]], Family] | None" = None
    inputs: Callable[[nn.Module, Batch], Batch] = lambda module, batch: batch
    shorten: Callable[[nn.Module, AudioContext], None] | None = None
    equip: Callable[[nn.Module, Path, dict[str, Any], str], dict[str, Any]] = lambda module, folder, kept, tokenizer: (
        kept
    )
    processing: Callable[[nn.Module], dict[str, dict[str, Any]]] = lambda module: {}
    words: Callable[[nn.Module, Batch, dict[str, Any]], Tensor] | None = None
    sides: Callable[[nn.Module, Batch], tuple[Tensor, Tensor, Tensor]] | None = None
    augment: Callable[[nn.Module, Sequence[Batch], int, int, dict[str, Any]], Batch] | None = None

    @property
    def token_tables(self) -> tuple[str, ...]:
        """Paths of all tables of token ids."""
        return (*(table for table, _ in self.tied), *self.tables)

    def part_of(self, path: str) -> Part | None:
        """The part that a layer belongs to, or None."""
        return next((part for part in self.parts if part.has(path)), None)
