"""Attention whose heads have queries and keys of one width and values of another. It runs any attention of transformers.

transformers divides queries, keys and values by one width. The attentions of all families here have the same form,
though, so one function takes the place of their `forward`: the layers under their own names, then the kernel that the
config names, with the scale that the heads had when they were whole.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn

_LAYERS = "packlight_attention"


def narrow_attention_(module: nn.Module, layers: dict[str, str]) -> None:
    """Let an attention run on heads of any widths, in place.

    Args:
        module: an attention of transformers, without a past.
        layers: 'query', 'key', 'value' and 'out': paths of its layers below it, 'out' being '' where another module
            holds it; 'count': its attribute for the number of heads.
    """
    setattr(module, _LAYERS, dict(layers))
    module.forward = MethodType(_forward, module)


def is_narrow(module: nn.Module) -> bool:
    """Whether `narrow_attention_` was here."""
    return hasattr(module, _LAYERS)


def _forward(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """As in transformers: states [batch, positions, width] to the same, and weights where the kernel gives them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = getattr(module, _LAYERS)
    shape, heads = hidden_states.shape[:-1], getattr(module, names["count"])
    query, key, value = (
        module.get_submodule(names[name])(hidden_states).view(*shape, heads, -1).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    scale = module.scaling if hasattr(module, "scaling") else module.scale
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, sdpa_attention_forward)
    made, weights = attend(module, query, key, value, attention_mask, dropout=0.0, scaling=scale, **rest)
    made = made.reshape(*shape, -1).contiguous()
    return module.get_submodule(names["out"])(made) if names["out"] else made, weights
