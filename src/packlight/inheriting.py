"""A smaller model of the same architecture, cut out of a larger one by a short description.

Which blocks of each tower, how many hidden units in the feed-forward layers, how many attention heads (and with them
the width, since a head's size stays). What stays is copied, the first ones or the most important by magnitude: the
squared weights that a unit, head or channel takes part in. Manual weight inheritance of TinyCLIP (Wu et al. 2023, arXiv
2309.12314); blocks spread evenly, the first and the last among them, as in Distil-Whisper (Gandhi et al. 2023, arXiv
2311.00430). The result has an ordinary config, so transformers loads it. A vision tower of convolutions is designed from a
budget instead: see `packlight.designing`.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from packlight.designing import TOWER, design_of, settled, tower_of
from packlight.errors import PlanError
from packlight.families import Batch, Family, Tower
from packlight.model import Model

CHOICES = ("importance", "first")
# What the axes of a tensor are, by the name it has within its tower; the first pattern that fits counts.
_AXES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("*encoder_attn.k_proj.weight", "*encoder_attn.v_proj.weight"), ("heads", "heard")),
    (("*.[qkv]_proj.weight", "*.query.weight", "*.key.weight", "*.value.weight"), ("heads", "stream")),
    (("*.[qkv]_proj.bias", "*.query.bias", "*.key.bias", "*.value.bias"), ("heads",)),
    (("*attn.out_proj.weight", "*.o_proj.weight", "*attention.output.dense.weight"), ("stream", "heads")),
    (("*.fc1.weight", "*.intermediate.dense.weight"), ("units", "stream")),
    (("*.fc1.bias", "*.intermediate.dense.bias"), ("units",)),
    (("*.fc2.weight", "*.output.dense.weight"), ("stream", "units")),
    (("conv1.weight",), ("stem", "-", "-")),
    (("conv1.bias",), ("stem",)),
    (("conv2.weight",), ("stream", "stem", "-")),
    (("pooler.dense.weight",), ("stream", "stream")),
    (("*patch_embedding.weight", "*patch_embeddings.projection.weight"), ("stream", "-", "-", "-")),
    (("embeddings.cls_token", "embeddings.position_embeddings"), ("-", "-", "stream")),
    (("*_projection.weight", "*embed*.weight"), ("-", "stream")),
    (("*",), ("stream",)),
)
# Up to where a name says which feed-forward layer, or which attention, it belongs to.
_OWNER = {
    "units": re.compile(r"\.(fc\d|intermediate|output)\."),
    "heads": re.compile(r"\.(\w+_proj|self|query|key|value|output)\."),
}
_AFTER = {"vision": "visual_projection.", "text": "text_projection.", "decoder": "proj_out."}


@dataclass(frozen=True)
class _Sizes:
    """Names in a tower's config: blocks, hidden units, heads, width; and where the config is, '' for the model's own."""

    config: str
    blocks: str
    units: str
    heads: str
    width: str


_WHISPER = {
    name: _Sizes("", f"{name}_layers", f"{name}_ffn_dim", f"{name}_attention_heads", "d_model")
    for name in ("encoder", "decoder")
}
_SIDES = {
    name: _Sizes(f"{name}_config", "num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_size")
    for name in ("vision", "text")
}


@dataclass(frozen=True)
class _Cut:
    """What becomes of one tower: the blocks that stay, its hidden units and heads, and a head's channels."""

    tower: Tower
    names: _Sizes
    root: str
    blocks: tuple[int, ...]
    units: int
    heads: int
    size: int


def student(model: Model, description: Mapping[str, Any], batches: Sequence[Batch] = ()) -> Model:
    """A smaller model with a part of another's blocks and channels.

    Args:
        model: the original; it stays as it is.
        description: 'TOWER_layers', indices of blocks or how many; 'TOWER_ffn', hidden units; 'TOWER_heads', attention
            heads; TOWER is one of the model's towers (encoder, decoder; vision, text), and 'ffn' and 'heads' are for
            all. 'choose': 'importance' or 'first'. 'vision': a `packlight.designing.Design`, where that tower is made
            of convolutions.
        batches: calibration batches, to choose by among several designs.

    Returns:
        the student, of the same family, tokenizer and settings.

    Raises:
        PlanError: an unknown key, a block that isn't there, more than the original has, or an architecture whose
            towers are no transformers.
    """
    designing = _designed(model, description)
    found = _cuts(model, {k: v for k, v in description.items() if k != "vision"} if designing else description)
    config: Any = copy.deepcopy(model.module.config)
    for cut in found:
        own: Any = getattr(config, cut.names.config) if cut.names.config else config
        if getattr(own, "pooler_output_size", None) == getattr(own, cut.names.width):
            own.pooler_output_size = cut.size * cut.heads
        setattr(own, cut.names.width, cut.size * cut.heads)
        setattr(own, cut.names.blocks, len(cut.blocks))
        setattr(own, cut.names.units, cut.units)
        setattr(own, cut.names.heads, cut.heads)
    made = None
    if designing:
        design = design_of(description.get("vision", {}))
        made, config.vision_config, _ = tower_of(model.module, model.settings["image"]["height"], design, batches)
    module = type(model.module)(config.to_dict() if designing else config).eval()
    _inherit_(module, model.module, found, str(description.get("choose", CHOICES[0])), made)
    if getattr(model.module, "generation_config", None) is not None:
        module.generation_config = copy.deepcopy(model.module.generation_config)
    family, settings = model.family, model.settings
    if designing:
        family, settings = settled(family, module, settings)
    elif family.bind is not None:
        family = family.bind(family, module, settings)
    return replace(model, module=module, family=family, settings=settings, edits=[])


# The description ----------------------------------------------------------------------------------------------------


def _designed(model: Model, description: Any) -> bool:
    """Whether the vision tower is made of convolutions. Raises PlanError for a design where it is not."""
    found = any(t.inverted is not None for t in model.family.towers)
    if not found and isinstance(description, Mapping) and "vision" in description:
        raise PlanError(f"{model.source.architecture} has no vision tower of convolutions that 'vision' could design.")
    return found and isinstance(description, Mapping)


def _names(family: Family) -> dict[str, _Sizes]:
    return _SIDES if family.sides is not None else _WHISPER


def _cuts(model: Model, description: Mapping[str, Any]) -> list[_Cut]:
    """What becomes of each tower. Raises PlanError."""
    towers, names = [t for t in model.family.towers if t.inverted is None], _names(model.family)
    keys = ["choose", "ffn", "heads", *(f"{t.name}_{k}" for t in towers for k in ("layers", "ffn", "heads"))]
    if not isinstance(description, Mapping) or (unknown := sorted(set(description) - set(keys))):
        wrong = "is no JSON object" if not isinstance(description, Mapping) else f"names {', '.join(unknown)}"
        raise PlanError(f"The student's description {wrong}. It may have: {', '.join(keys)}.")
    if description.get("choose", CHOICES[0]) not in CHOICES:
        raise PlanError(f"'choose' must be one of {', '.join(CHOICES)}.")
    cuts = []
    for tower in towers:
        own = names.get(tower.name)
        config = model.module.config if own is None or not own.config else getattr(model.module.config, own.config)
        if own is None or not tower.blocks or not all(hasattr(config, n) for n in (own.blocks, own.units, own.heads)):
            raise PlanError(f"The {tower.name} tower of {model.source.architecture} is no transformer: no student.")
        blocks = _blocks(description.get(f"{tower.name}_layers"), getattr(config, own.blocks), tower.name)
        units, heads = (
            _count(description, f"{tower.name}_{key}", key, getattr(config, name))
            for key, name in (("ffn", own.units), ("heads", own.heads))
        )
        root = tower.blocks.partition(".")[0] if own.config else tower.blocks.rpartition(".")[0]
        size = getattr(config, own.width) // getattr(config, own.heads)
        cuts.append(_Cut(tower, own, root, blocks, units, heads, size))
    if names is _WHISPER and len({cut.heads for cut in cuts}) > 1:
        raise PlanError("Whisper's towers share one width, so one number of heads: write 'heads', for both.")
    return cuts


def _blocks(value: Any, count: int, tower: str) -> tuple[int, ...]:
    if value is None:
        return tuple(range(count))
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= count:  # spread evenly, ends included
        return (count - 1,) if value == 1 else tuple(round(i * (count - 1) / (value - 1)) for i in range(value))
    if not isinstance(value, list) or not value or not all(isinstance(i, int) and 0 <= i < count for i in value):
        raise PlanError(
            f"{tower}_layers must be a number from 1 to {count} or a list of blocks from 0 to {count - 1}, "
            f"not {value!r}."
        )
    return tuple(value)


def _count(description: Mapping[str, Any], own: str, general: str, most: int) -> int:
    value = description.get(own, description.get(general, most))
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise PlanError(f"{own if own in description else general} must be a number from 1 to {most}, not {value!r}.")
    return value


# Copying ------------------------------------------------------------------------------------------------------------


def _inherit_(
    module: nn.Module, original: nn.Module, cuts: list[_Cut], choose: str, designed: nn.Module | None
) -> None:
    """Fill a student with what it inherits, in place; a vision tower that was designed is already filled."""
    source = dict(original.state_dict())
    pick = _picker(source, cuts, choose)
    made = {}
    ready = {} if designed is None else {f"{TOWER}.{n}": t for n, t in designed.state_dict().items()}
    for name, tensor in module.state_dict().items():
        own = next((c for c in cuts if _within(name, c) is not None), None)
        old = name if own is None else _old_name(name, own)
        value = ready[name] if name in ready else source[old]
        if own is not None:
            for axis, (have, want) in enumerate(zip(value.shape, tensor.shape, strict=True)):
                if have != want:
                    value = value.index_select(axis, pick(own, old, axis, have, want))
        if value.shape != tensor.shape:
            raise PlanError(f"{name} can't be cut to {list(tensor.shape)}: this kind of tower is not known.")
        made[name] = value
    module.load_state_dict(made)


def _within(name: str, cut: _Cut) -> str | None:
    """The name of a tensor within its tower, or None; a projection or head after a tower belongs to it."""
    if name.startswith(cut.root + "."):
        return name.removeprefix(cut.root + ".")
    return name if name.startswith(_AFTER.get(cut.tower.name, " ")) else None


def _old_name(name: str, cut: _Cut) -> str:
    head = cut.tower.blocks + "."
    if not name.startswith(head):
        return name
    number, _, rest = name.removeprefix(head).partition(".")
    return f"{head}{cut.blocks[int(number)]}.{rest}"


def _axes(inner: str, dims: int) -> tuple[str, ...]:
    found = next(axes for patterns, axes in _AXES if any(fnmatchcase(inner, p) for p in patterns))
    return found if len(found) == dims else ("-",) * (dims - 1) + ("stream",)


Pick = Callable[[_Cut, str, int, int, int], Tensor]


def _picker(source: dict[str, Tensor], cuts: list[_Cut], choose: str) -> Pick:
    """A function that says which indices of an axis stay; the same for all axes that belong together."""
    known: dict[tuple[str, str], Tensor] = {}

    def pick(cut: _Cut, name: str, axis: int, have: int, want: int) -> Tensor:
        role = _axes(_within(name, cut) or "", source[name].dim())[axis]
        if role == "-":
            raise PlanError(f"{name} can't be cut from {have} to {want}: this kind of tower is not known.")
        if choose == "first":
            return torch.arange(want)
        if role == "heard":  # cross-attention hears the first tower
            cut, role = cuts[0], "stream"
        group = _OWNER[role].split(name)[0] + "." if role in _OWNER else ""
        if (found := known.get((cut.root + group, role))) is None:
            size = cut.size if role == "heads" else 1  # the channels of a head stay together
            energy = _energy(source, cut, role, group, have).view(-1, size).sum(1)
            best = energy.topk(want // size).indices.sort().values
            found = known[cut.root + group, role] = (best[:, None] * size + torch.arange(size)).reshape(-1)
        return found

    return pick


def _energy(source: dict[str, Tensor], cut: _Cut, role: str, group: str, have: int) -> Tensor:
    """Squared weights that each index of an axis takes part in, over all tensors of its group."""
    total = torch.zeros(have)
    for name, tensor in source.items():
        inner = _within(name, cut)
        if inner is None or not name.startswith(group) or not tensor.is_floating_point():
            continue
        for axis, found in enumerate(_axes(inner, tensor.dim())):
            if found == role and tensor.shape[axis] == have:
                others = [d for d in range(tensor.dim()) if d != axis]
                total += tensor.square().sum(others) if others else tensor.square()
    return total
