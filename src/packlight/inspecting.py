"""What is in a model, before anything is done to it; also for architectures that packlight has no family for."""

from pathlib import Path
from typing import Any

from packlight.errors import ModelError
from packlight.loading import architecture_of, describe, load, model_bytes, stored_dtype
from packlight.model import find_source, licence_of
from packlight.sensitivity import profile
from packlight.tables import TECHNIQUES, family_of
from packlight.target import format_bytes


def describe_model(name: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Parts, modalities, parameters, bytes, multiply-adds, dtype, licence, and what can be done.

    Raises:
        ModelError: no model there, or a damaged one.
    """
    folder = find_source(name)
    config, files, kind = describe(folder)
    architecture = architecture_of(config)
    found: dict[str, Any] = {
        "source": name, "kind": kind, "architecture": architecture, "dtype": stored_dtype(files, kind),
        "licence": licence_of(folder), "bytes": model_bytes(folder),
    }  # fmt: skip
    if family_of(architecture) is None:
        return found | _tensors(files) | {"family": None, "can": [], "parts": [], "layers": []}
    model = load(name, trust_remote_code=trust_remote_code)
    layers = model.layers()
    return found | {
        "family": model.family.name,
        "modalities": list(model.family.modalities),
        "task": model.family.task,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "parts": profile(model),
        "unit": model.family.unit,
        "can": list(TECHNIQUES),
        "layers": [{"path": p, "kind": type(m).__name__, "shape": list(m.weight.shape)} for p, m in layers.items()],
    }


def _tensors(files: list[Path]) -> dict[str, Any]:
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise ModelError(f"{file} can't be read without a family.")
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                size = 1
                for n in opened.get_slice(key).get_shape():
                    size *= n
                top = ".".join(key.split(".")[:2])
                counts[top] = counts.get(top, 0) + size
    return {"parameters": sum(counts.values()), "groups": counts}


def describe_text(found: dict[str, Any], layers: bool) -> str:
    """The same for people."""
    lines = [
        f"{found['source']}   {found['architecture']}   {found['dtype']}   licence {found['licence']}",
        f"{found['parameters'] / 1e6:.1f} M parameters, {format_bytes(found['bytes'])} on disk",
    ]
    if found["family"] is None:
        lines.append("packlight has no family for it yet, so it can't fit it. Its largest groups of tensors:")
        top = sorted(found["groups"].items(), key=lambda item: -item[1])[:12]
        return "\n".join(lines + [f"  {name:40}{count / 1e6:10.2f} M" for name, count in top])
    lines.append(f"{' + '.join(found['modalities'])}, {found['task']}; multiply-adds for {found['unit']}")
    for part in found["parts"]:
        share = f"{part['multiply_adds'] / 1e9:8.2f} G {part['share_of_multiply_adds']:6.1%}"
        lines.append(f"  {part['name']:28}{part['parameters'] / 1e6:8.2f} M {format_bytes(part['before']):>10} {share}")
    lines.append(f"packlight can: {', '.join(found['can'])}")
    if layers:
        lines += [f"  {layer['path']:52}{layer['kind']:12}{layer['shape']}" for layer in found["layers"]]
    return "\n".join(lines)
