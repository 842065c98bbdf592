"""A dual encoder for small devices: an EfficientNet-Lite tower for pictures and a BERT tower for texts.

EfficientNet-Lite is EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, made
for int8; transformers has no such tower. Its batch norms are folded into the convolutions, which changes nothing in
exact arithmetic, so all that follows sees plain convolutions. The text's vector is the mean over its tokens, as MiniLM
sentence encoders take it (Reimers and Gurevych 2019, arXiv 1908.10084).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from packlight.errors import ModelError

ARCHITECTURE = "PacklightDualEncoder"
# (expansion, kernel, stride, channels, blocks) of each stage of EfficientNet-Lite0.
LITE0 = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip
_LARGEST_SIDE = 8192
_MOST_BLOCKS = 1024
_EPSILON = 1e-3  # of the batch norms in the published weights


# The towers ---------------------------------------------------------------------------------------------------------


class _Conv(nn.Module):
    """A convolution padded as TensorFlow's 'same' pads pictures of an even size: with stride 2 more at the far end."""

    def __init__(self, wide: int, out: int, kernel: int, stride: int, groups: int, active: bool) -> None:
        super().__init__()
        near, far = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self.pad = (near, far, near, far) if near != far else None
        self.conv = nn.Conv2d(wide, out, kernel, stride, 0 if self.pad else near, groups=groups)
        self.active = active
        self.limits = (0.0, 6.0) if active else None  # what the convolution's output is clipped to; observers read it

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(nn.functional.pad(x, self.pad) if self.pad else x)
        return nn.functional.relu6(made) if self.active else made


class InvertedResidual(nn.Module):
    """An inverted residual block: widen, depthwise convolution, narrow (Sandler et al. 2018, arXiv 1801.04381).

    With `groups` the first and the last are convolutions in groups, and hidden channels are dealt out anew between them,
    so that each group of the last sees all groups of the first (ShuffleNet, Zhang et al. 2017, arXiv 1707.01083).
    """

    def __init__(self, channels: tuple[int, int], expansion: float, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        wide, out = channels
        inner = hidden_of(wide, expansion)
        if groups > 1 and inner % groups**2:
            raise ValueError(f"{inner} hidden channels can't be dealt out from {groups} groups to {groups} others")
        self.expand = _Conv(wide, inner, 1, 1, groups, True) if expansion > 1 else nn.Identity()
        self.depthwise = _Conv(inner, inner, kernel, stride, inner, True)
        self.project = _Conv(inner, out, 1, 1, groups, False)
        self.residual = stride == 1 and wide == out
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, channels, height, width] to the same, narrower or at half the resolution."""
        hidden: Tensor = self.depthwise(self.expand(x))
        if self.groups > 1:
            hidden = hidden.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        made: Tensor = self.project(hidden)
        return x + made if self.residual else made


def hidden_of(wide: int, expansion: float) -> int:
    """Hidden channels of a block: the product, where the expansion is no whole number the nearest multiple of 8."""
    return wide * int(expansion) if expansion == int(expansion) else max(8, round(wide * expansion / 8) * 8)


def scaled_to(pictures: Tensor, side: int) -> Tensor:
    """Pictures [n, 3, height, width] with another side; as they are where they have it, or where it is 0."""
    if not side or pictures.shape[-2:] == (side, side):
        return pictures
    return nn.functional.interpolate(pictures, (side, side), mode="bicubic", antialias=True)


class EfficientNetLite(nn.Module):
    """Pictures [n, 3, height, width] with even sides to vectors [n, head].

    Args:
        stem: channels of the first convolution.
        head: channels of the last.
        stages: (expansion, kernel, stride, channels, blocks) of each.
        groups: of the convolutions of kernel 1 in the blocks.
        size: sides that pictures of another size are scaled to first; 0 takes them as they are.
    """

    def __init__(self, stem: int, head: int, stages: Any, groups: int = 1, size: int = 0) -> None:
        super().__init__()
        if not 0 <= size <= _LARGEST_SIDE:
            raise ValueError(f"size is {size}; it must lie from 0 to {_LARGEST_SIDE}")
        if sum(count for *_, count in stages) > _MOST_BLOCKS:
            raise ValueError(f"more than {_MOST_BLOCKS} blocks can't be right")
        self.size = size
        self.stem = _Conv(3, stem, 3, 2, 1, True)
        blocks, wide = [], stem
        for expansion, kernel, stride, channels, count in stages:
            for i in range(count):
                step = stride if i == 0 else 1
                blocks.append(InvertedResidual((wide, channels), expansion, kernel, step, groups))
                wide = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(wide, head, 1, 1, 1, True)

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the last features."""
        x = self.stem(scaled_to(x, self.size))
        for block in self.blocks:
            x = block(x)
        return self.pool(x)

    def pool(self, x: Tensor) -> Tensor:
        """What follows the blocks: [n, channels, height, width] to [n, head]."""
        return cast(Tensor, self.head(x)).mean((2, 3))


@dataclass
class MobileDualConfig:
    """The config of a `MobileDual`, with the face of one of transformers.

    Args:
        text_config: of the BERT.
        vision_config: arguments of the EfficientNet-Lite: 'stem', 'head', 'stages'; 'groups' and 'size' where it has them.
        projection_dim: width of the common space.
    """

    text_config: Any
    vision_config: dict[str, Any]
    projection_dim: int
    model_type: str = "packlight-dual-encoder"

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": self.model_type,
            "text_config": self.text_config.to_dict(),
            "vision_config": self.vision_config,
            "projection_dim": self.projection_dim,
        }


class MobileDual(nn.Module):
    """Both towers and their projections, with the face of a dual encoder of transformers.

    Args:
        config: of `config.json`: 'vision_config' of an `EfficientNetLite`, 'text_config' of a BERT, 'projection_dim'.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        text = BertConfig(**config["text_config"])
        vision, wide = config["vision_config"], int(config["projection_dim"])
        self.vision_model = EfficientNetLite(**vision)
        self.text_model = BertModel(text, add_pooling_layer=False)
        self.visual_projection = nn.Linear(vision["head"], wide, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, wide, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.05)))
        self.config = MobileDualConfig(text, dict(vision), wide)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Vectors [n, projection_dim] of pictures [n, 3, height, width]."""
        return cast(Tensor, self.visual_projection(self.vision_model(pixel_values)))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors [n, projection_dim] of texts [n, tokens]; the mask is for texts that were padded."""
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return cast(Tensor, self.text_projection(mean_of(states, attention_mask)))


def mean_of(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [n, width] over the tokens of [n, tokens, width] that the mask [n, tokens] keeps."""
    if mask is None:
        return states.mean(1)
    kept = mask[..., None].to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1)


# Reading and writing ------------------------------------------------------------------------------------------------


def read_module(folder: Path, config: Mapping[str, Any]) -> MobileDual:
    """The model of a folder, float32, in evaluation mode.

    Raises:
        ModelError: a config without what the towers need, or other weights than it says.
    """
    from safetensors.torch import load_file

    try:
        made = MobileDual(config)
        state = load_file(folder / "model.safetensors")
        made.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder} is no {ARCHITECTURE} that can be built: {reason[-1].strip()}") from None
    return made.float().eval()


def write_module(folder: Path, module: MobileDual, config: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors in float32."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"architectures": [ARCHITECTURE], **config}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    state = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights of an EfficientNet-Lite as those of `EfficientNetLite`, batch norms folded in; no classifier.

    With y = gain * (conv(x) - mean) / sqrt(variance + epsilon) + bias, the convolution's rows are multiplied by
    gain / sqrt(variance + epsilon) and what remains is its bias (Jacob et al. 2018, arXiv 1712.05877, section 3.2).

    Args:
        state: with the names of the `efficientnet-lite-pytorch` package, `_conv_stem.weight`, `_bn0.weight` and so on.

    Raises:
        ModelError: a convolution without its batch norm.
    """
    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1",
             "_project_conv": "_bn2"}  # fmt: skip
    names = {"_conv_stem": "stem", "_conv_head": "head", "_expand_conv": "expand", "_depthwise_conv": "depthwise",
             "_project_conv": "project"}  # fmt: skip
    found = {}
    for key, weight in state.items():
        root, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind not in norms:
            continue
        base = f"{root}." if root else ""
        try:
            gain, bias, mean, variance = (
                state[f"{base}{norms[kind]}.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ModelError(f"The convolution {key} has no batch norm {error}; these are other weights.") from None
        factor = gain / (variance + _EPSILON).sqrt()
        target = f"{base.replace('_blocks', 'blocks')}{names[kind]}.conv"
        found[f"{target}.weight"] = (weight.double() * factor[:, None, None, None]).float()
        found[f"{target}.bias"] = (bias - mean * factor).float()
    return found
