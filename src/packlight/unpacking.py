"""From a bundle to a folder with plain float weights, where its architecture's config can say what it is.

transformers loads such a folder unchanged; one of our own architecture is for `packlight.load`, as its original is.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packlight.bundle import folder_bytes, open_bundle
from packlight.errors import BundleError
from packlight.families.mobile_dual import ARCHITECTURE, write_module
from packlight.layers import CodeLinear
from packlight.model import Model
from packlight.reloading import description, expressible, floats, reload, skeleton, write_inputs
from packlight.target import format_bytes

_CARD = """---
license: {licence}
base_model: {name}
---

# {name}, unpacked from a bundle of packlight

Plain float weights: the codes of the bundle times their scales. `{reader}` loads this folder as it loads the original.{differs}
"""


@dataclass(frozen=True)
class Unpacked:
    """A folder that was written.

    Args:
        path: of the folder.
        bytes: of its files.
        differs: sentences on what the bundle does and the folder's model does not.
    """

    path: Path
    bytes: int
    differs: tuple[str, ...]


def unpack(bundle: Path, out: Path) -> Unpacked:
    """Write the model of a bundle as the folder that its original would be, with float32 weights.

    Args:
        bundle: its folder.
        out: a folder that does not exist or is empty.

    Raises:
        BundleError: no bundle, one whose model the architecture's config can't express, or a folder that is in use.
    """
    opened = open_bundle(bundle)
    described = description(opened)
    own = opened.manifest["source"].get("architecture") == ARCHITECTURE
    if not own and opened.manifest.get("reload") != "transformers":
        raise _unsaid(bundle, opened.manifest)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists and is not empty, so nothing was written. Choose another folder.")
    model = reload(bundle)
    if own and not expressible(model):
        raise _unsaid(bundle, opened.manifest)
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    differs = _differs(model)
    try:
        (_write_own if own else _write)(draft, model, described)
        note = "".join(f" {sentence}" for sentence in differs)
        names = {"licence": model.source.licence, "name": model.source.name}
        card = _CARD.format(**names, reader="packlight.load" if own else "transformers", differs=note)
        (draft / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Unpacked(out, folder_bytes(out), differs)


def _unsaid(bundle: Path, manifest: dict[str, Any]) -> BundleError:
    return BundleError(
        f"{bundle} has layers that no config of {manifest['source']['architecture']} can say, so only "
        "packlight.load reads it."
    )


def _write(folder: Path, model: Model, described: dict[str, Any]) -> None:
    """Write model and inputs as transformers reads them."""
    _plain(model).save_pretrained(folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    write_inputs(folder, described, model.tokenizer)
    (folder / "config.json").write_text(config, encoding="utf-8")  # as transformers writes it


def _write_own(folder: Path, model: Model, described: dict[str, Any]) -> None:
    """Write a model of our own architecture; a smaller vision tower may take other pictures than its original's."""
    write_inputs(folder, described, model.tokenizer)
    plain = _plain(model)
    write_module(folder, plain, plain.config.to_dict())
    (folder / "processor_config.json").unlink(missing_ok=True)  # it would go before the file that follows
    model.settings["processor"].original.save_pretrained(folder)


def _plain(model: Model) -> Any:
    """The architecture's own module with the float weights."""
    config = model.module.config
    plain: Any = skeleton(model.source.architecture, config.to_dict())  # type: ignore[operator, union-attr]
    plain.load_state_dict(floats(model.module), assign=True)
    if hasattr(plain, "tie_weights"):
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
