"""Random dual encoders of 0.1 M parameters as folders, and made-up pictures with words: the whole road, real parts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["red", "green", "blue", "dark", "light", "square", "stripe", "dot", "a", "photo", "of", "the", "on", "."]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "light": (240, 240, 230)}


def tokenizer_file(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, eos_token="[SEP]", **names).save_pretrained(
        folder
    )


KINDS = ("clip", "siglip", "chinese_clip", "altclip", "align", "metaclip_2", "vit_bert")
TEXT = {
    "vocab_size": len(SPECIALS) + len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
ALIGN = {
    "image_size": 32, "in_channels": [32, 64], "out_channels": [64, 64], "kernel_sizes": [3, 5], "strides": [1, 2],
    "expand_ratios": [1, 2], "num_block_repeats": [1, 1], "depthwise_padding": [], "hidden_dim": 320,
    "width_coefficient": 0.25, "depth_coefficient": 1.0, "depth_divisor": 4,
}  # fmt: skip


def build(kind: str) -> Any:
    """A random dual encoder: 'clip', 'siglip', 'chinese_clip', 'altclip', 'align', 'metaclip_2', 'vit_bert'."""
    import transformers as t

    torch.manual_seed(0)
    bert = t.BertConfig(**TEXT)
    if kind == "vit_bert":
        both = t.VisionTextDualEncoderConfig.from_vision_text_configs(t.ViTConfig(**VISION), bert, projection_dim=24)
        return t.VisionTextDualEncoderModel(both).eval()
    names = {"clip": "CLIP", "siglip": "Siglip", "chinese_clip": "ChineseCLIP", "altclip": "AltCLIP", "align": "Align",
             "metaclip_2": "MetaClip2"}  # fmt: skip
    name = names[kind]
    text = {"project_dim": 24, **TEXT} if kind == "altclip" else {"projection_size": 32, **TEXT}
    vision = ALIGN if kind == "align" else VISION
    more = {} if kind == "siglip" else {"projection_dim": 16 if kind == "align" else 24}
    return getattr(t, f"{name}Model")(
        getattr(t, f"{name}Config")(text_config=text, vision_config=vision, **more)
    ).eval()


def save_model(folder: Path, kind: str = "vit_bert") -> Path:
    """Write a model as transformers would, with tokenizer and processor."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    folder.mkdir(parents=True)
    build(kind).save_pretrained(folder)
    tokenizer_file(folder)
    if kind == "siglip":
        SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def picture(i: int) -> np.ndarray:
    """A picture of its own for every number: two colours, a stripe and noise."""
    draw = np.random.default_rng(i)
    high, wide = (int(n) for n in draw.integers(36, 60, 2))
    image = np.empty((high, wide, 3), np.float64)
    first, second = draw.choice(list(COLOURS), 2, replace=False)
    image[:] = COLOURS[first]
    image[int(draw.integers(0, high // 2)) :][: high // 3] = COLOURS[second]
    return (image + draw.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)


def save_pictures(folder: Path, count: int = 40, labels: bool = False) -> Path:
    """Write `count` pictures with two captions each, or with a label."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        Image.fromarray(picture(i)).save(folder / f"{i:02d}.png")
        draw = np.random.default_rng(i)
        words = [" ".join(draw.choice(WORDS, 5)) for _ in range(2)]
        row = {"label": WORDS[i % 3]} if labels else {"texts": words}
        lines.append(json.dumps({"file_name": f"{i:02d}.png", **row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
