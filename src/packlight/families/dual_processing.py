"""What stands before the towers of a dual encoder: the original's processor and tokenizer, and settings that do the same.

The settings are tried on a picture and on texts when a model is read: one that the device would see otherwise is refused
then, not after hours of work.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packlight.errors import ModelError
from packlight.families import dual_patches, dual_sound
from packlight.families.pretrained import SIGLIP, reason, tokenizer_config
from packlight.images import ImageSettings, pixels
from packlight.texts import TextSettings, canonical_text, tokenizer_of

_PADDED = ("siglip", "siglip2")  # trained with every text filled up to one length, and no mask
_PROBES = ("a photo of a cat.", "Two dogs, one ball!", "", "图片 é 1234")
_TOLERANCE = 1e-4  # of a pixel; Pillow scales on both sides, so only rounding of floats may differ


def read_processing(folder: Path, module: nn.Module, tokenizer: str, side: int = 0) -> dict[str, Any]:
    """The settings of a dual encoder.

    Args:
        folder: with the files of processor and tokenizer.
        module: the model.
        tokenizer: text of its tokenizer.json.
        side: of the pictures that the model takes, where it is not the processor's own.

    Returns:
        'processor': picture uint8 [height, width, 3] -> {'pixel_values' [1, 3, h, w]}, or what else the tower takes;
        'tokenizer': texts -> 'input_ids', 'attention_mask' as the model takes them; 'image' (of CLAP 'audio'), 'text':
        plain settings for the device.

    Raises:
        ModelError: no processor or tokenizer in the folder, or one that the device can't repeat.
    """
    tokenize, text = _text(folder, module, tokenizer)
    kind, process, content = _content(folder, module, side)
    return {"processor": process, "tokenizer": tokenize, kind: content.to_dict(), "text": text.to_dict()}


def _content(
    folder: Path, module: nn.Module, side: int = 0
) -> tuple[str, Callable[[np.ndarray], dict[str, Tensor]], Any]:
    """('image' or 'audio', what prepares it for the tower, the settings that do the same on the device)."""
    if module.config.model_type == "clap":
        return "audio", *dual_sound.processing(folder, module)
    processor = _image_processor(folder)
    processor = _sided(processor, side) if side else processor
    if module.config.model_type == "siglip2":
        return "image", *dual_patches.processing(folder, module, processor.original)
    return "image", _for_tower(processor), image_settings(processor, folder)


# Pictures -----------------------------------------------------------------------------------------------------------


def _image_processor(folder: Path) -> Callable[[np.ndarray], Tensor]:
    from transformers import AutoImageProcessor

    try:
        # Where torchvision is installed transformers would take it, and its pixels are not quite Pillow's.
        made = AutoImageProcessor.from_pretrained(folder, local_files_only=True, **_by_pillow())
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"{folder} has no picture processor that transformers reads ({reason(error)}). Put the model's "
            "preprocessor_config.json there."
        ) from None
    return _process_by(made)


def _by_pillow() -> dict[str, Any]:
    """What asks transformers for a processor that works with Pillow: `backend` where it knows that, else `use_fast`."""
    from transformers.models.auto import image_processing_auto

    return {"backend": "pil"} if hasattr(image_processing_auto, "_resolve_backend") else {"use_fast": False}


def _process_by(made: Any) -> Callable[[np.ndarray], Tensor]:
    from PIL import Image

    def process(picture: np.ndarray) -> Tensor:
        return made(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"].float()

    process.original = made
    return process


def _for_tower(process: Any) -> Callable[[np.ndarray], dict[str, Tensor]]:
    def named(picture: np.ndarray) -> dict[str, Tensor]:
        return {"pixel_values": process(picture)}

    named.original = process.original
    return named


def with_side(process: Any, side: int) -> Callable[[np.ndarray], dict[str, Tensor]]:
    """A processor that makes square pictures of another side; a shorter side it scales to keeps its proportion to it."""
    return _for_tower(_sided(process, side))


def _sided(process: Any, side: int) -> Callable[[np.ndarray], Tensor]:
    made = copy.deepcopy(process.original)
    if getattr(made, "do_center_crop", False):
        before = int(made.crop_size["height"])
        made.crop_size = {"height": side, "width": side}
        made.size = {k: round(v * side / before) for k, v in dict(made.size).items() if v}
    else:
        made.size = {"height": side, "width": side}
    return _process_by(made)


def image_settings(process: Any, folder: Path) -> ImageSettings:
    """The settings that repeat a processor: scaling and cutting as it says, gain and offset by trying it.

    Raises:
        ModelError: a processor that does something else.
    """
    original = process.original
    size = dict(original.size) if getattr(original, "do_resize", True) else {}
    crop = bool(getattr(original, "do_center_crop", False))
    sides = {k: int(v) for k, v in size.items() if v}
    target = dict(original.crop_size) if crop else sides
    black, white = (process(np.full((40, 60, 3), level, np.uint8))[0] for level in (0, 255))
    offset = black.amin((1, 2))
    gain = (white.amax((1, 2)) - offset) / 255
    try:
        made = ImageSettings(
            height=int(target["height"]), width=int(target["width"]), shortest=sides.get("shortest_edge", 0),
            scaled=(sides.get("height", 1), sides.get("width", 1)), crop=crop, resample=int(original.resample), gain=_three(gain), offset=_three(offset),
        )  # fmt: skip
        draw = np.random.default_rng(0)
        for shape in ((90, 133, 3), (301, 77, 3)):
            picture = draw.integers(0, 256, shape, dtype=np.uint8)
            theirs, ours = process(picture).numpy(), pixels(picture, made)
            if theirs.shape != ours.shape or np.abs(theirs - ours).max() > _TOLERANCE:
                raise ValueError("its pixels differ from those that the device would make")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"The picture processor in {folder} ({type(original).__name__}) can't be served yet: {error}. Processors that "
            "scale, cut out the middle and normalise can."
        ) from None
    return made


def _three(values: Tensor) -> tuple[float, float, float]:
    first, second, third = (float(v) for v in values)
    return first, second, third


# Texts --------------------------------------------------------------------------------------------------------------


def _text(folder: Path, module: nn.Module, tokenizer: str) -> tuple[Callable[[Sequence[str]], dict[str, Tensor]], Any]:
    made, canonical = _tokenizer(folder)
    room = max_tokens(module, made.model_max_length)
    padded = module.config.model_type in _PADDED
    bare = canonical and not hasattr(made, "canonicalize_text")  # it leaves to us what the original's class does first
    settings = TextSettings(room, room if padded else 0, int(made.pad_token_id or 0), canonical)

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        how = {"padding": "max_length"} if padded else {"padding": True}
        given = [canonical_text(text) for text in texts] if bare else list(texts)
        found = made(given, truncation=True, max_length=room, return_tensors="pt", **how)
        return {k: found[k] for k in (("input_ids",) if padded else ("input_ids", "attention_mask"))}

    ours = tokenizer_of(tokenizer, settings)
    for probe in _PROBES:
        if tokenize([probe])["input_ids"][0].tolist() != ours(probe):
            raise ModelError(
                f"The tokenizer in {folder} ({type(made).__name__}) and its tokenizer.json give different ids for "
                f"{probe!r}, so the device would read other texts than the original. Get the model's own tokenizer.json."
            )
    return tokenize, settings


def _tokenizer(folder: Path) -> tuple[Any, bool]:
    """(the folder's tokenizer, whether its texts are first put in lower case and freed of punctuation)."""
    from transformers import AutoTokenizer

    settings = tokenizer_config(folder)
    enough = settings.get("tokenizer_class") == SIGLIP and (folder / "tokenizer.json").is_file()
    if enough and not (folder / "spiece.model").is_file():
        return _siglip(folder, settings)
    try:
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if enough:
            return _siglip(folder, settings)
        raise ModelError(f"{folder} has no tokenizer ({reason(error)}). Put the model's own there.") from None
    return made, hasattr(made, "canonicalize_text") and bool(getattr(made, "do_lower_case", True))


def _siglip(folder: Path, settings: dict[str, Any]) -> tuple[Any, bool]:
    """SigLIP's tokenizer from its tokenizer.json alone, where SentencePiece or its model is missing."""
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}  # as the class has them
    for key in names:
        given = settings.get(key)
        names[key] = str((given.get("content") if isinstance(given, dict) else given) or names[key])
    room = int(settings.get("model_max_length") or 64)
    made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=room, **names)
    if made("a")["input_ids"][-1:] != [made.eos_token_id]:
        raise ModelError(
            f"The tokenizer.json in {folder} does not end a text with {made.eos_token}, as SigLIP's tokenizer does. Get "
            "the model's own tokenizer.json."
        )
    return made, bool(settings.get("do_lower_case", True))


def max_tokens(module: nn.Module, wanted: int) -> int:
    """How many ids a text may have: what the tokenizer says, and no more than the tower has positions."""
    room = int(module.config.text_config.max_position_embeddings)
    for path, layer in module.named_modules():
        positions = "text" in path and path.endswith("position_embeddings") and isinstance(layer, nn.Embedding)
        if positions and layer.padding_idx is not None:  # as in RoBERTa: positions start after the padding's
            room -= layer.padding_idx + 1
    return min(room, int(wanted))


def rows_of(module: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """How many rows each layer multiplies in one run: its positions, words or patches."""
    rows: dict[str, int] = {}

    def watch(path: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            wide = layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features
            rows[path] = rows.get(path, 0) + out.numel() // wide

        return layer.register_forward_hook(hook)

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [watch(p, layer) for p, layer in module.named_modules() if isinstance(layer, kinds)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return rows
