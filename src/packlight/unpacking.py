"""From a bundle to a folder that transformers loads unchanged, where its architecture's config can say what it is."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packlight.bundle import folder_bytes, open_bundle
from packlight.errors import BundleError
from packlight.layers import CodeLinear
from packlight.model import Model
from packlight.reloading import description, floats, reload, skeleton, write_inputs
from packlight.target import format_bytes

_CARD = """---
license: {licence}
base_model: {name}
---

# {name}, unpacked from a bundle of packlight

Plain float weights: the codes of the bundle times their scales. `transformers` loads this folder as it loads the original.{differs}
"""


@dataclass(frozen=True)
class Unpacked:
    """A folder that was written.

    Args:
        path: of the folder.
        bytes: of its files.
        differs: sentences on what the bundle does and transformers does not.
    """

    path: Path
    bytes: int
    differs: tuple[str, ...]


def unpack(bundle: Path, out: Path) -> Unpacked:
    """Write the model of a bundle as a folder of transformers, with float32 weights.

    Args:
        bundle: its folder.
        out: a folder that does not exist or is empty.

    Raises:
        BundleError: no bundle, one whose model the architecture's config can't express, or a folder that is in use.
    """
    opened = open_bundle(bundle)
    described = description(opened)
    if opened.manifest.get("reload") != "transformers":
        raise BundleError(
            f"{bundle} has layers that no config of {opened.manifest['source']['architecture']} can say, so only "
            "packlight.load reads it."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists and is not empty, so nothing was written. Choose another folder.")
    model = reload(bundle)
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    differs = _differs(model)
    try:
        plain = _plain(model)
        plain.save_pretrained(draft)
        config = (draft / "config.json").read_text(encoding="utf-8")
        write_inputs(draft, described, model.tokenizer)
        (draft / "config.json").write_text(config, encoding="utf-8")  # as transformers writes it
        note = "".join(f" {sentence}" for sentence in differs)
        card = _CARD.format(licence=model.source.licence, name=model.source.name, differs=note)
        (draft / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Unpacked(out, folder_bytes(out), differs)


def _plain(model: Model) -> Any:
    """The architecture's own module with the float weights."""
    config = model.module.config
    plain: Any = skeleton(model.source.architecture, config.to_dict())  # type: ignore[operator, union-attr]
    plain.load_state_dict(floats(model.module), assign=True)
    plain.tie_weights()
    made = getattr(model.module, "generation_config", None)
    if made is not None:
        plain.generation_config = made
    return plain


def _differs(model: Model) -> tuple[str, ...]:
    found = []
    if any(isinstance(m, CodeLinear) and m.activations != "float" for m in model.module.modules()):
        found.append("There the activations stay float; the bundle rounds them to 8 bits.")
    if getattr(model.module.config, "audio_context", None):
        found.append("There the encoder sees the whole window; the bundle's sees the speech and little of the padding.")
    return tuple(found)


def unpacked_text(found: Unpacked) -> str:
    """The same for people."""
    return "\n".join([f"{found.path}   {format_bytes(found.bytes)}", *found.differs])
