"""From a name to a model: a Hugging Face folder, a hub id, or a CTranslate2 folder."""

from pathlib import Path
from typing import Any

from packlight.errors import ModelError
from packlight.families.ctranslate2 import is_ctranslate2
from packlight.model import (
    Model,
    Source,
    check_finite,
    check_weights,
    find_source,
    licence_of,
    read_config,
    revision_of,
    weights_sha256,
)
from packlight.tables import FAMILIES, family_of

_PARTS_OF_MODEL = ("*.safetensors", "*.json", "*.txt", "model.bin", "*.model")


def load(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """Load a model for fitting.

    Args:
        name: a folder or a hub id.
        revision: commit, branch or tag of the hub.
        trust_remote_code: accept a model whose folder brings its own Python code. Never without this flag.

    Returns:
        the model in float32, in evaluation mode.

    Raises:
        ModelError: nothing there, no safetensors, damaged weights, NaN, an architecture we have no family for.
    """
    folder = find_source(name, revision)
    config, files, kind = describe(folder)
    architecture = architecture_of(config)
    if config.get("auto_map") and not trust_remote_code:
        raise ModelError(
            f"{folder} brings Python code of its own ({', '.join(config['auto_map'])}). If you trust its author, "
            "say --trust-remote-code."
        )
    family = family_of(architecture)
    if family is None:
        known = ", ".join(a for f in FAMILIES for a in f.architectures)
        raise ModelError(
            f"packlight has no family for {architecture or 'a model without architecture'} in {folder}. It fits: {known}. "
            "`packlight inspect` still shows this model's tensors, bytes and licence."
        )
    module, settings, tokenizer = family.read(folder, config)
    check_finite(module, str(folder))
    if family.bind is not None:
        family = family.bind(family, module, settings)
    source = Source(
        name=name if not Path(name).expanduser().is_dir() else Path(name).expanduser().resolve().name,
        path=str(folder.resolve()),
        kind=kind,
        architecture=architecture,
        revision=revision_of(folder) or revision,
        licence=licence_of(folder),
        dtype=stored_dtype(files, kind),
        sha256=weights_sha256(files),
        bytes=model_bytes(folder),
    )
    return Model(module, family, source, tokenizer, settings)


def describe(folder: Path) -> tuple[dict[str, Any], list[Path], str]:
    """(config, weight files, kind) of a model folder. Raises ModelError when it is none."""
    if is_ctranslate2(folder):
        return {"architectures": ["WhisperForConditionalGeneration"]}, [folder / "model.bin"], "ctranslate2"
    config = read_config(folder)
    return config, check_weights(folder), "huggingface"


def architecture_of(config: dict[str, Any]) -> str:
    """The first architecture that a config names, or ''."""
    named = config.get("architectures") or [""]
    return str(named[0]) if isinstance(named, list) else str(named)


def stored_dtype(files: list[Path], kind: str) -> str:
    """The dtype that most bytes of the weights have."""
    if kind == "ctranslate2":
        from packlight.families.ctranslate2 import read_variables

        sizes: dict[str, int] = {}
        for array in read_variables(files[0]).values():
            sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.nbytes
        return max(sizes, key=lambda name: sizes[name])
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                piece = opened.get_slice(name)
                size = 1
                for n in piece.get_shape():
                    size *= n
                counts[piece.get_dtype()] = counts.get(piece.get_dtype(), 0) + size
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    top = max(counts, key=lambda name: counts[name]) if counts else "unknown"
    return names.get(top, top)


def model_bytes(folder: Path) -> int:
    """Bytes of the files that a user of the original needs: weights, configuration, tokenizer."""
    files = {f for pattern in _PARTS_OF_MODEL for f in folder.glob(pattern) if f.is_file()}
    return sum(f.stat().st_size for f in files)
