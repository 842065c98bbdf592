"""From a bundle back to PyTorch: what `deploy` keeps for it in the manifest, and the model built again from that.

A compressed model is its architecture's skeleton with the config that it has now, the log of its edits, and tensors.
The tensors are those of the graphs, under the same names or others; what no graph holds is stored beside them. The
skeleton is built without memory of its own (PyTorch's meta device), so a manifest that names absurd sizes costs nothing:
every tensor comes from the weights file and must have the shape that the skeleton expects.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packlight import loading
from packlight.bundle import Bundle, is_bundle, open_bundle, verify
from packlight.codec import read_weights
from packlight.errors import BundleError, PlanError
from packlight.families.mobile_dual import ARCHITECTURE, MobileDual
from packlight.layers import KINDS, Edit, dense, is_compressed, replace_
from packlight.model import Model, Source
from packlight.plan import write_json
from packlight.serve import TOKENIZER, WEIGHTS, read_tokenizer
from packlight.tables import FAMILIES

Array = np.ndarray[Any, np.dtype[Any]]
FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "special_tokens_map.json")
_PATH = re.compile(r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")
_LARGEST_FILE = 2**20
_MOST_LAYERS = 1024  # of a tower; no model has as many, and a skeleton of a million would never be built
_IDLE = ("_name_or_path", "auto_map", "transformers_version")  # of a config: nothing that a model is built from
_KEYS = ("config", "base", "edits", "settings", "files", "tensors")
_BROKEN = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, ZeroDivisionError)


def load(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """Load a model, or a bundle as the PyTorch model that it was made from.

    Args:
        name: a bundle, a model's folder or a hub id.
        revision: commit, branch or tag of the hub.
        trust_remote_code: accept a model whose folder brings its own Python code. Never without this flag.

    Returns:
        the model in float32, in evaluation mode; its `module` is the PyTorch module.

    Raises:
        BundleError: a bundle that is damaged, or was written without what this needs.
        ModelError: see `packlight.loading.load`.
    """
    if is_bundle(Path(name).expanduser()):
        return reload(Path(name).expanduser())
    return loading.load(name, revision=revision, trust_remote_code=trust_remote_code)


# Writing ------------------------------------------------------------------------------------------------------------


def keep(model: Model, weights: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a bundle must hold to become this model again.

    Args:
        model: compressed.
        weights: the arrays that the graphs brought, by name.

    Returns:
        (keys 'reload' and 'model' of the manifest, arrays that must be stored beside `weights`).
    """
    config = {k: v for k, v in _config(model).items() if k not in _IDLE}
    base = {k: v for k, v in (model.base or {}).items() if k not in _IDLE and config.get(k) != v}
    named = {_digest(a): n for n, a in sorted(weights.items(), reverse=True)}
    more: dict[str, Array] = {}
    elsewhere: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors(model.module):
        array = tensor.detach().numpy()
        if name in weights and _digest(weights[name]) == _digest(array):
            continue
        if _digest(array) in named:
            elsewhere[name] = {"array": named[_digest(array)]}
        elif array.ndim == 2 and _digest(array.T) in named:
            elsewhere[name] = {"array": named[_digest(array.T)], "turned": True}
        else:
            more[f"model/{name}"] = np.array(array, order="C")
            elsewhere[name] = {"array": f"model/{name}"}
    described = {
        "config": config,
        "base": base,
        "edits": [_plain(asdict(e)) for e in model.edits],
        "settings": {k: _plain(v) for k, v in model.settings.items() if not callable(v)},
        "files": _files(model),
        "tensors": elsewhere,
    }
    theirs = model.source.architecture != ARCHITECTURE
    return {"reload": "transformers" if theirs and expressible(model) else "packlight", "model": described}, more


def expressible(model: Model) -> bool:
    """Whether its architecture, with the config that the model has now, has exactly the model's weights."""
    try:
        fresh = skeleton(model.source.architecture, _config(model))
    except BundleError:
        return False
    due = {name: tuple(t.shape) for name, t in fresh.state_dict().items()}
    return due == {name: tuple(t.shape) for name, t in floats(model.module).items()}


def floats(module: nn.Module) -> dict[str, Tensor]:
    """The module's state with plain float weights: codes times their scales, under the original layers' names."""
    state: dict[str, Tensor] = {}
    inside = [path for path, layer in module.named_modules() if is_compressed(layer)]
    for name, tensor in module.state_dict().items():
        path, _, last = name.rpartition(".")
        if path in inside:
            state[f"{path}.weight"] = dense(module.get_submodule(path)).detach().contiguous()
            if last != "bias":
                continue
        state[name] = tensor
    return state


def tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer once, those among them that no state dict holds too."""
    return [*module.named_parameters(), *module.named_buffers()]


def described(model: Model) -> dict[str, Any]:
    """Its config, and the files that say how inputs are made, for `write_inputs`."""
    return {"config": _config(model), "files": _files(model)}


def _files(model: Model) -> dict[str, Any]:
    """Small JSON files of the original that say how inputs are made."""
    found = {}
    for name, fallback in {**dict.fromkeys(FILES), **model.family.processing(model.module)}.items():
        file = Path(model.source.path) / name
        if file.is_file() and file.stat().st_size <= _LARGEST_FILE:
            found[name] = json.loads(file.read_text(encoding="utf-8"))
        elif fallback is not None:
            found[name] = _plain(fallback)
    for values in found.values():
        for key in ("added_tokens_decoder", "auto_map", "name_or_path"):  # the tokenizer's own file has its tokens
            values.pop(key, None)
    return found


def _config(model: Model) -> dict[str, Any]:
    values = _plain(model.module.config.to_dict())  # type: ignore[operator, union-attr]
    return dict(values)


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values, default=str))


def _digest(array: Array) -> str:
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


# Reading ------------------------------------------------------------------------------------------------------------


def reload(path: Path) -> Model:
    """The PyTorch model that a bundle was made from. Raises BundleError."""
    bundle = open_bundle(path)
    verify(bundle)
    described = description(bundle)
    source = bundle.manifest["source"]
    edits = [_edit(e, path) for e in described["edits"]]
    module = skeleton(str(source.get("architecture")), {**described["config"], **described["base"]})
    family = next(f for f in FAMILIES if source["architecture"] in f.architectures)
    tokenizer = read_tokenizer(path / TOKENIZER)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), described, tokenizer)
        try:
            settings = family.equip(module, Path(folder), described["settings"], tokenizer)
        except _BROKEN as error:
            raise BundleError(f"{path}: its settings can't be used ({error}). Get it again from its source.") from None
    _replay_(module, edits, path)
    _fill_(module, described["tensors"], path)
    _configure_(module.config, {k: described["config"].get(k) for k in described["base"]})
    module.eval()
    if family.bind is not None:
        family = family.bind(family, module, settings)
    keys = ("name", "architecture", "revision", "licence", "dtype", "sha256")
    origin = Source(path=str(path.resolve()), kind="bundle", bytes=bundle.size, **{k: source.get(k) for k in keys})
    return Model(module, family, origin, tokenizer, settings, edits)


def description(bundle: Bundle) -> dict[str, Any]:
    """The manifest's 'model', checked key by key. Raises BundleError."""
    found = bundle.manifest.get("model")
    if found is None:
        frozen = str(bundle.manifest.get("task")).endswith("-classes")
        lacks = "has frozen classes and no text tower, so" if frozen else "was written by an older packlight:"
        raise BundleError(
            f"{bundle.path} {lacks} it holds no description of its PyTorch model. `packlight apply` of its plan to the "
            "original gives a bundle that does."
        )
    if isinstance(found, dict):
        found = {"base": {}, **found}
    kinds = {"config": dict, "base": dict, "edits": list, "settings": dict, "files": dict, "tensors": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(k), kind) for k, kind in kinds.items()):
        raise BundleError(f"{bundle.path}: the manifest's 'model' must be an object with {', '.join(_KEYS)}.")
    strange = set(found["files"]) - set(FILES)
    if strange or not all(isinstance(v, dict) for v in found["files"].values()):
        raise BundleError(f"{bundle.path}: the manifest's 'model' names files that are not ours: {sorted(strange)}.")
    for name, entry in found["tensors"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("array"), str):
            raise BundleError(f"{bundle.path}: the manifest says no array for the tensor {name}.")
    return found


def skeleton(architecture: str, config: dict[str, Any]) -> nn.Module:
    """The architecture with that config, on the meta device: shapes without memory. Raises BundleError."""
    import transformers

    if not any(architecture in f.architectures for f in FAMILIES):
        raise BundleError(f"No family of packlight has the architecture {architecture!r}. Update packlight.")
    deep = [key for key, value in _numbers(config) if "layer" in key and value > _MOST_LAYERS]
    if deep:
        raise BundleError(
            f"The manifest's config has more than {_MOST_LAYERS} layers ({deep[0]}); that can't be right."
        )
    try:
        with torch.device("meta"):
            if architecture == ARCHITECTURE:  # ours, which transformers does not know
                return MobileDual(config).eval()
            kind = getattr(transformers, architecture)
            module: nn.Module = kind(kind.config_class.from_dict({k: v for k, v in config.items() if k != "auto_map"}))
    except _BROKEN as error:
        raise BundleError(f"The manifest's config gives no {architecture}: {str(error).splitlines()[0]}.") from None
    return module.eval()


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, str(name))
    elif isinstance(config, int):
        yield key, config


def write_inputs(folder: Path, described: dict[str, Any], tokenizer: str) -> None:
    """Write config, tokenizer and the files that say how inputs are made."""
    write_json(folder / "config.json", {k: v for k, v in described["config"].items() if k != "auto_map"})
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for name, values in described["files"].items():
        write_json(folder / name, {k: v for k, v in values.items() if k != "auto_map"})


def _edit(values: Any, path: Path) -> Edit:
    well = isinstance(values, dict) and set(values) == {"path", "kind", "args"} and isinstance(values["args"], dict)
    if not well or not isinstance(values["path"], str) or not _PATH.match(values["path"]):
        raise BundleError(f"{path}: the manifest's 'model' has an edit that is none: {str(values)[:80]}.")
    if values["kind"] not in KINDS:
        raise BundleError(
            f"{path}: an edit has the kind {values['kind']!r}; this packlight knows {', '.join(KINDS)}. Update packlight."
        )
    return Edit(**values)


def _replay_(module: nn.Module, edits: list[Edit], path: Path) -> None:
    for edit in edits:
        try:
            with torch.device("meta"), torch.no_grad():
                replace_(module, edit)
        except (PlanError, *_BROKEN) as error:
            raise BundleError(f"{path}: the edit of {edit.path} does not fit the model ({error}).") from None


def _configure_(config: Any, values: dict[str, Any]) -> None:
    """Write values into a config, also into the configs of its towers."""
    for key, value in values.items():
        inner = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            _configure_(inner, {k: v for k, v in value.items() if k not in ("model_type", *_IDLE)})
        else:
            setattr(config, key, value)


def _fill_(module: nn.Module, elsewhere: dict[str, Any], path: Path) -> None:
    """Give every tensor its values; what was one tensor under two names stays one."""
    due = tensors(module)
    where = {name: elsewhere.get(name, {"array": name}) for name, _ in due}
    arrays = dict(read_weights(path / WEIGHTS, {entry["array"] for entry in where.values()}))
    made: dict[int, Tensor] = {}
    for name, tensor in due:
        array = arrays.get(where[name]["array"])
        if array is None:
            raise BundleError(f"{path}: the weights lack {where[name]['array']}, which the model's {name} needs.")
        array = array.T if where[name].get("turned") else array
        values = torch.from_numpy(np.array(array, order="C"))
        if values.shape != tensor.shape or values.dtype != tensor.dtype:
            raise BundleError(
                f"{path}: {name} is {array.dtype} {list(array.shape)} in the weights; the model wants {tensor.dtype} "
                f"{list(tensor.shape)}."
            )
        made[id(tensor)] = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
    for layer in module.modules():
        for held in (layer._parameters, layer._buffers):
            for name, old in held.items():
                if old is not None:
                    held[name] = made[id(old)]  # type: ignore[assignment]
