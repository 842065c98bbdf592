"""Reading a folder of transformers: its weights, refused where they are not those of its config, and its tokenizer."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from packlight.errors import ModelError

SIGLIP = "SiglipTokenizer"  # the class of SigLIP's first version, which needs SentencePiece


def from_transformers(kind: Any, folder: Path) -> nn.Module:
    """The model of that class of transformers, float32, in evaluation mode. Raises ModelError for damaged weights."""
    try:
        loaded: Any = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"transformers can't build the model in {folder}: {str(error).splitlines()[0]}") from None
    module, found = loaded
    # transformers fills such tensors with random numbers and goes on.
    wrong = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if wrong:
        raise ModelError(
            f"The weights in {folder} are not those of its config.json: {len(wrong)} tensors are missing or of another "
            f"shape, first {wrong[0]}. Download the model again."
        )
    return cast(nn.Module, module.eval())


def tokenizer_json(folder: Path, rebuilt: bool = False) -> str:
    """The text of the folder's tokenizer.json, made from other files where it has none. Raises ModelError.

    Args:
        folder: of the model.
        rebuilt: what transformers makes of that file instead, for tokenizers that it changes when it reads them.
    """
    file = folder / "tokenizer.json"
    if file.is_file() and not rebuilt:
        return file.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError, ImportError) as error:
        # transformers makes no tokenizer.json for SigLIP, with SentencePiece or without: only the file itself helps.
        missing = isinstance(error, ImportError) and tokenizer_config(folder).get("tokenizer_class") != SIGLIP
        or_made = ", or `pip install sentencepiece protobuf`, so that one can be made" if missing else ""
        raise ModelError(
            f"{folder} has no tokenizer.json and none can be made ({reason(error)}). Put the model's own "
            f"tokenizer.json there{or_made}."
        ) from None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json; {} where it has none that can be read."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def reason(error: Exception) -> str:
    """The first sentence of an error: those of transformers begin with empty lines and go on for paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__
