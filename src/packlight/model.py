"""A model with where it came from and what was done to it; loading from a folder, a hub id, or a CTranslate2 folder.

Only safetensors are read: a pickle can run code when it is opened, and the checkpoints that people fit have
safetensors beside it.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from packlight.errors import ModelError
from packlight.families import Family
from packlight.layers import Edit, replace_
from packlight.structure import original_path
from packlight.texts import tokenizer_decoder

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_FILES = ("*.json", "*.txt", "*.safetensors", "README.md", "LICENSE*", "*.model")


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Args:
        name: what the user wrote, or the last part of the folder's path.
        path: the folder on this disk.
        kind: 'huggingface' or 'ctranslate2'.
        architecture: class name.
        revision: commit of the hub, if known.
        licence: as the model card says, else 'unknown'.
        dtype: of the stored weights.
        sha256: of the weight files, the identity of the model.
        bytes: of the folder's weights, configuration and tokenizer.
    """

    name: str
    path: str
    kind: str
    architecture: str
    revision: str | None
    licence: str
    dtype: str
    sha256: str
    bytes: int


@dataclass
class Model:
    """A model in memory.

    Args:
        module: the PyTorch module, float32, in evaluation mode.
        family: what packlight knows about its kind.
        source: where it came from.
        tokenizer: the text of its tokenizer.json.
        settings: its generation settings (suppressed ids and the like).
        edits: every structural change so far.
        base: the config that the edits start from, as plain values; None as long as there are none.
    """

    module: nn.Module
    family: Family
    source: Source
    tokenizer: str
    settings: dict[str, Any]
    edits: list[Edit] = field(default_factory=list)
    base: dict[str, Any] | None = None

    def layers(self) -> dict[str, nn.Module]:
        """Path -> layer, for every linear layer, convolution and embedding, in the order of the module."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
        return {path: layer for path, layer in self.module.named_modules() if isinstance(layer, kinds)}

    def origin(self, path: str) -> str:
        """The path that a layer of this model has in the original: as plans and parts name it."""
        return original_path(path, self.edits)

    def decoder(self) -> Callable[[Any], str]:
        """A function from token ids to text, without special tokens."""
        return tokenizer_decoder(self.tokenizer)

    def edit_(self, edit: Edit) -> nn.Module:
        """Carry out an edit and log it. Returns the new layer, to be filled."""
        config = getattr(self.module, "config", None)
        if self.base is None and config is not None:
            self.base = json.loads(json.dumps(config.to_dict(), default=str))
        layer = replace_(self.module, edit)
        self.edits.append(edit)
        return layer


def find_source(name: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or a snapshot of the hub.

    Raises:
        ModelError: neither a folder nor something the hub has.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(
            f"{name} is a file. Name the folder that holds the model, or a hub id such as openai/whisper-tiny.en."
        )
    if not _HUB_ID.match(name):
        raise ModelError(f"There is no folder {name}, and it is no hub id such as openai/whisper-tiny.en.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"There is no folder {name}, and the hub did not give a model of that name ({reason}). "
            "Check the name and the network, or download the model and name its folder."
        ) from None


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder, whole and free of NaN headers.

    Raises:
        ModelError: none there (and whether there is a pickle), or a truncated one.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(_weight_map(index).values())
        missing = sorted(listed - {f.name for f in files})
        if missing:
            raise ModelError(
                f"{folder} lacks {', '.join(missing)}, which {index.name} lists. Download the model again."
            )
    if not files:
        pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} has its weights only as {pickles[0]}, a pickle, which could run code when opened. Convert it "
                "where you trust it: AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)."
            )
        raise ModelError(f"{folder} holds no *.safetensors. Name the folder that holds the model's weights.")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or cut short ({error}). Download the model again.") from None
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. Raises ModelError."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no readable index of weights ({error!r}). Download the model again.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json, so it is no model folder that packlight reads.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is no readable JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object.")
    return config


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse weights that are NaN or infinite. Raises ModelError naming the first ones."""
    bad = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ModelError(
            f"{where}: {len(bad)} weight tensors hold NaN or infinity, first {bad[0]}. No compression can mend that; "
            "get the model again."
        )


def licence_of(folder: Path) -> str:
    """The licence that the model card's front matter names, else 'unknown'."""
    card = folder / "README.md"
    if card.is_file():
        match = re.search(r"^license:\s*(\S+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if match:
            return match[1]
    return "unknown"


def weights_sha256(files: list[Path]) -> str:
    """One sha256 over all weight files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def revision_of(folder: Path) -> str | None:
    """The hub's commit when the folder is a snapshot of the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
