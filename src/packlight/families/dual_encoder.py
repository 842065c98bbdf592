"""Dual encoders: a tower for pictures or sound and one for text, whose vectors meet in one space.

CLIP (Radford et al. 2021, arXiv 2103.00020), SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2, Chinese CLIP,
AltCLIP, ALIGN, MetaCLIP 2, any `VisionTextDualEncoder`, and CLAP for sound. transformers gives them all one face,
`get_image_features` and `get_text_features`; what exports by another road is in `dual_sound` and `dual_patches`.

The loss that planning minimises is the KL divergence of the softmax over the similarities within a batch, both ways, at
the original's own logit scale: what its contrastive training looks at.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import DataError
from packlight.families import (
    BESIDE,
    Attention,
    Batch,
    Family,
    Graph,
    Part,
    Tower,
    attention_at,
    dual_patches,
    dual_sound,
)
from packlight.families.dual_content import (
    Pair,
    content_of,
    embed_content,
    graph,
    heard,
    joined,
    kind_of,
    open_pair,
    silence,
    unit,
)
from packlight.families.dual_processing import read_processing, rows_of
from packlight.families.mobile_dual import ARCHITECTURE, InvertedResidual, read_module, scaled_to
from packlight.families.pretrained import from_transformers, tokenizer_json

_VISION, _AUDIO, _TEXT = "vision_model", "audio_model", "text_model"
_AT_ONCE = 16
_TABLES = ("token_embedding", "word_embeddings")


# Reading ------------------------------------------------------------------------------------------------------------


def read(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], str]:
    """Read a dual encoder of transformers with its tokenizer and processor.

    Returns:
        (module in float32, {'processor', 'tokenizer', 'image' or 'audio', 'text'}, text of tokenizer.json).

    Raises:
        ModelError: damaged weights, no tokenizer or processor, or one that can't be served as the original does.
    """
    import transformers

    if config["architectures"][0] == ARCHITECTURE:
        module: nn.Module = read_module(folder, config)
    else:
        module = from_transformers(getattr(transformers, config["architectures"][0]), folder)
    # SigLIP 2's class puts the lower case before what its tokenizer.json does.
    tokenizer = tokenizer_json(folder, rebuilt=kind_of(module) == "patches")
    return module, read_processing(folder, module, tokenizer), tokenizer


def equip(module: nn.Module, folder: Path, settings: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """Processor and tokenizer for a module that was built, from the files that the folder holds; pictures as `settings` say.

    A student may take smaller pictures than the original's processor makes.
    """
    made = read_processing(folder, module, tokenizer)
    side = settings.get("image", {}).get("height")
    if side is None or side == made["image"]["height"]:
        return made
    return read_processing(folder, module, tokenizer, side)


# Running ------------------------------------------------------------------------------------------------------------


def embed_text(module: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Vectors [n, d] of length 1 of texts [n, tokens]; the mask is for texts that were padded."""
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    return unit(module.get_text_features(input_ids=input_ids, **mask))


def scale_of(module: nn.Module) -> Tensor:
    """What multiplies the cosine before the softmax."""
    if hasattr(module, "temperature"):  # ALIGN divides by it
        return 1 / module.temperature
    return (module.logit_scale if hasattr(module, "logit_scale") else module.logit_scale_a).exp()


@torch.inference_mode()
def answer(
    module: nn.Module,
    pair: tuple[Any, Sequence[str]],
    settings: dict[str, Any],
    language: str | None = None,
    task: str = "",
) -> list[list[float]]:
    """The original's vectors of a picture or sound and its texts, one input at a time, with its own tokenizer."""
    content, texts = pair
    vectors = [content_of(module, settings["processor"](content))]
    vectors += [embed_text(module, settings["tokenizer"]([text])["input_ids"]) for text in texts]
    return [v[0].tolist() for v in vectors]


def prompt(settings: dict[str, Any], language: str | None, task: str) -> list[int]:
    """Nothing: texts are asked as they are. Raises DataError for a language."""
    if language is not None or task not in ("", "transcribe"):
        raise DataError("This model compares texts as they are: it takes no --language and no --task.")
    return []


def prepare(
    module: nn.Module, pairs: Sequence[Pair], words: Sequence[int], opening: Sequence[int], settings: dict[str, Any]
) -> Batch:
    """A batch of pictures or sounds with one text each, the first that each has.

    Returns:
        'pixel_values' [n, 3, height, width] (or see `_INPUTS`), 'input_ids' and 'attention_mask' [n, tokens]. Without the
        latter two where one has no text: then only the first tower can be run.
    """
    with torch.inference_mode(False), torch.no_grad():
        batch = joined(module, [settings["processor"](p.content) for p in pairs])
        if all(p.texts for p in pairs):
            batch.update(settings["tokenizer"]([p.texts[0] for p in pairs]))
    return batch


def encode(module: nn.Module, batch: Batch) -> Batch:
    """The batch with the pictures' vectors in it."""
    return {**batch, "states": _contents(module, batch)}


def _contents(module: nn.Module, batch: Batch) -> Tensor:
    """The vectors of many pictures, a few at a time where nothing learns: what is between the layers is large."""
    content = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", BESIDE)}
    count = len(next(iter(content.values())))
    if torch.is_grad_enabled() or count <= _AT_ONCE:
        return content_of(module, content)
    parts = [{k: v[i : i + _AT_ONCE] for k, v in content.items()} for i in range(0, count, _AT_ONCE)]
    return torch.cat([content_of(module, part) for part in parts])


def run(module: nn.Module, batch: Batch) -> Tensor:
    """Scaled similarities within the batch: [n pictures + n texts, n], each row over the other side."""
    states = batch.get("states")
    if states is None:
        states = _contents(module, batch)
    if "input_ids" not in batch:
        return states @ states.T * scale_of(module)
    texts = embed_text(module, batch["input_ids"], batch.get("attention_mask"))
    cosines = states @ texts.T
    scale = scale_of(module)
    other = dual_sound.text_scale(module) if kind_of(module) == "audio" else scale
    return torch.cat([cosines * scale, cosines.T * other])


def sides(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of the pictures and of the texts of a batch, and the scale of their cosines. Raises DataError."""
    if "input_ids" not in batch:
        raise DataError("Two towers are compared by pictures with texts; some of these pictures have none.")
    texts = embed_text(module, batch["input_ids"], batch.get("attention_mask"))
    states = batch.get("states")
    return content_of(module, batch) if states is None else states, texts, scale_of(module)


def inputs(module: nn.Module, batch: Batch) -> Batch:
    """The batch with pictures of the side that the module's graph takes."""
    side = getattr(module.get_submodule(_VISION), "size", 0) if hasattr(module, _VISION) else 0
    return {**batch, "pixel_values": scaled_to(batch["pixel_values"], side)} if side else batch


# Exporting ----------------------------------------------------------------------------------------------------------


class _Text(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (embed_text(self.inner, input_ids),)


def graphs(module: nn.Module, content: dict[str, Tensor], input_ids: Tensor, any_length: bool) -> tuple[Graph, ...]:
    """A graph per tower, one input at a time.

    Args:
        module: the model.
        content: an example picture or sound, as its tower takes it.
        input_ids: an example text [1, tokens].
        any_length: whether a text may have any number of ids, as where the original does not pad to a fixed one.
    """
    dynamic = {"input_ids": {1: "tokens"}} if any_length else {}
    return (
        graph(module, content),
        Graph("text", _Text(module), (input_ids,), ("input_ids",), ("text_vector",), dynamic),
    )


def serving(module: nn.Module, settings: dict[str, Any], language: str | None, task: str) -> dict[str, Any]:
    """What `packlight.serving.dual_encoder.Settings` reads, for the manifest."""
    kind = "audio" if kind_of(module) == "audio" else "image"
    scale = float(scale_of(module).detach())
    return {kind: settings[kind], "text": settings["text"], "scale": scale, "language": None, "task": ""}


# Structure ----------------------------------------------------------------------------------------------------------


def bind(family: Family, module: nn.Module, settings: dict[str, Any]) -> Family:
    """The family with the towers, parts and graphs of this module: its blocks are found by their place in it."""
    sound = kind_of(module) == "audio"
    content, modality, name = (_AUDIO, "audio", "audio") if sound else (_VISION, "image", "vision")
    towers = (
        Tower(name, modality, _blocks(module, content), (f"{content}.*", "visual_projection*", "audio_projection*")),
        Tower("text", "text", _blocks(module, _TEXT), (f"{_TEXT}.*", "text_projection*")),
    )
    towers = tuple(replace(t, chained=_chained(module, t), **_anatomy(module, t)) for t in towers)
    example = settings["processor"](silence(settings))
    ids = settings["tokenizer"]([" ".join("abcdefghijklmn")])["input_ids"]
    rows = rows_of(module, lambda: (embed_content(module, *example.values()), embed_text(module, ids)))
    return replace(
        family,
        towers=towers,
        parts=(*_parts(module, name, content), *_parts(module, "text", _TEXT)),
        tables=tuple(p for p, m in module.named_modules() if p.startswith(_TEXT) and p.endswith(_TABLES)),
        graphs=partial(graphs, content=example, input_ids=ids, any_length=not settings["text"]["pad_to"]),
        multiply_adds=partial(multiply_adds, rows=rows),
        unit=f"one {'sound' if sound else 'picture'} and a text of {ids.shape[1]} tokens",
        **(heard(settings) if sound else {}),
    )


def _parts(module: nn.Module, name: str, root: str) -> tuple[Part, ...]:
    attention = (f"{root}.*attn*", f"{root}.*attention*", f"{root}.*q_proj", f"{root}.*k_proj", f"{root}.*v_proj")
    has_attention = any("attn" in path or "attention" in path for path, _ in module.get_submodule(root).named_modules())
    projections = ("text_projection*",) if name == "text" else ("visual_projection*", "audio_projection*")
    return (
        Part(f"{name} token table", tuple(f"{root}.*{table}" for table in _TABLES), name),
        Part(f"{name} positions", (f"{root}.*position*embedding*", f"{root}.*token_type_embeddings"), name),
        Part(f"{name} patch embedding", (f"{root}.*patch_embed*", f"{root}.*embedder.*"), name),
        Part(f"{name} attention", attention, name),
        Part(f"{name} {'feed-forward' if has_attention else 'convolutions'}", (f"{root}.*",), name),
        Part(f"{name} projection", projections, name),
    )


def _blocks(module: nn.Module, root: str) -> str:
    """Path of the outermost nn.ModuleList with the most parameters, or ''."""
    lists = {p: m for p, m in module.get_submodule(root).named_modules() if isinstance(m, nn.ModuleList)}
    outer = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists)]
    if not outer:
        return ""
    return f"{root}.{max(outer, key=lambda p: sum(w.numel() for w in lists[p].parameters()))}"


def _chained(module: nn.Module, tower: Tower) -> bool:
    """Whether every block has the same class: stages of different sizes are also told the size of their input."""
    name = type(module.get_submodule(tower.blocks)[0]).__name__.lower() if tower.blocks else "stage"
    return "swin" not in name and "stage" not in name


_ATTENTIONS = (
    attention_at("self_attn"),
    attention_at("attention", out="o_proj", count="num_attention_heads"),
    Attention(
        "attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        out="attention.output.dense",
        count="num_attention_heads",
        width="all_head_size",
    ),
)
_FEED_FORWARDS = (("mlp.fc1", "mlp.fc2"), ("intermediate.dense", "output.dense"))


def _anatomy(module: nn.Module, tower: Tower) -> dict[str, Any]:
    """Where the heads and hidden units of a tower's blocks are, for `Tower`; nothing where they are none that we know."""
    if not tower.blocks:
        return {}
    block = next(iter(module.get_submodule(tower.blocks).children()))
    if isinstance(block, InvertedResidual):
        return {"inverted": ("expand.conv", "depthwise.conv", "project.conv")}
    linear = {path for path, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    heads = next((a for a in _ATTENTIONS if linear.issuperset((a.query, a.key, a.value, a.out))), None)
    hidden = next((f for f in _FEED_FORWARDS if linear.issuperset(f)), None)
    if heads is None or hidden is None or not hasattr(block.get_submodule(heads.path), heads.count):
        return {}
    own = "text_config" if tower.name == "text" else f"{tower.name}_config"
    keys = {"config": own, "count_key": "num_hidden_layers", "hidden_key": "intermediate_size"}
    return {"attentions": (heads,), "feed_forward": hidden, **(keys if hasattr(module.config, own) else {})}


def multiply_adds(module: nn.Module, path: str, rows: dict[str, int]) -> int:
    """Multiply-adds of one layer for one picture and one text, given its rows; attention products are not a layer's."""
    return int(module.get_submodule(path).weight.numel()) * rows.get(path, 0)


FAMILY = Family(
    name="dual-encoder",
    architectures=(
        "CLIPModel",
        "SiglipModel",
        "ChineseCLIPModel",
        "AltCLIPModel",
        "AlignModel",
        "MetaClip2Model",
        "VisionTextDualEncoderModel",
        dual_patches.ARCHITECTURE,
        dual_sound.ARCHITECTURE,
        ARCHITECTURE,
    ),
    modalities=("image", "text"),
    task="image-text",
    towers=(),
    parts=(),
    tied=(),
    read=read,
    prompt=prompt,
    detect_language=None,
    answer=answer,
    prepare=prepare,
    encode=encode,
    run=run,
    graphs=partial(graphs, content={}, input_ids=torch.zeros(0), any_length=True),
    serving=serving,
    multiply_adds=partial(multiply_adds, rows={}),
    unit="one picture and one text",
    reads="input_ids",
    window=0.0,
    usage='--images DIR "words"',
    open_input=open_pair,
    group=16,
    notes=(
        "The interval resamples pictures, each with all its texts; the set that they are searched in stays the same.",
    ),
    bind=bind,
    equip=equip,
    sides=sides,
    inputs=inputs,
)
