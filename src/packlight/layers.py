"""The kinds of layers a compressed model may hold, and the one door for surgery.

Every structural change is an `Edit`: a path, a kind and its arguments. A compressed model is its original, the log of
its edits, and tensors; reading one never needs the technique that made it. A new kind costs a class here and a
lowering in every runtime.

While a model is exported each layer calls an opaque operator (`torch.ops.packlight.*`), which a runtime translates
into its own integer kernels. At any other time it computes the same in plain PyTorch, so gradients flow.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from packlight.convolutions import CONVOLUTIONS
from packlight.errors import PlanError
from packlight.packing import unpack_groups
from packlight.static import Range, convolve, geometry_of, kernel_of, rows_of, static_conv
from packlight.structure import SHAPES
from packlight.windows import matrix, unmatrix, windows2d_of, windows_of


def fake_int8(x: Tensor) -> Tensor:
    """An activation after dynamic 8-bit quantization with one range per sample: ONNX's DynamicQuantizeLinear and back."""
    dims = tuple(range(1, x.dim()))
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    zero = torch.round(-low / scale).clamp(0, 255)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


def fake_int8_rows(x: Tensor) -> Tensor:
    """An activation after dynamic 8-bit quantization with one symmetric range per row, the last dimension."""
    peak = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return torch.round(x / peak * 127) * (peak / 127)


ACTIVATIONS = {"float": lambda x: x, "int8": fake_int8, "int8_rows": fake_int8_rows}


# The seam to the runtimes -------------------------------------------------------------------------------------------


@torch.library.custom_op("packlight::code_linear", mutates_args=())
def _code_linear(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
    return ACTIVATIONS[activations](x) @ (codes.float() * scale)


@_code_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, activations: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


@torch.library.custom_op("packlight::code_embedding", mutates_args=())
def _code_embedding(ids: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return codes[:, ids.reshape(-1)].T.float().reshape(*ids.shape, -1) * scale[ids][..., None]


@_code_embedding.register_fake
def _(ids: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*ids.shape, codes.shape[0]))


@torch.library.custom_op("packlight::group_linear", mutates_args=())
def _group_linear(x: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    return x @ unpack_groups(packed, scale, zeros, bits, group)[:, : x.shape[-1]].T


@_group_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("packlight::group_embedding", mutates_args=())
def _group_embedding(
    ids: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int, width: int
) -> Tensor:
    return _group_rows(ids, packed, scale, zeros, bits, group)[..., :width].clone()


def _group_rows(ids: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    flat = ids.reshape(-1)
    scales = scale.view(packed.shape[0], -1)[flat].reshape(-1)
    return unpack_groups(packed[flat], scales, zeros[flat], bits, group).reshape(*ids.shape, -1)


@_group_embedding.register_fake
def _(ids: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int, width: int) -> Tensor:
    return scale.new_empty((*ids.shape, width))


@torch.library.custom_op("packlight::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# Layers -------------------------------------------------------------------------------------------------------------


def is_compressed(layer: nn.Module) -> bool:
    """Whether a layer holds codes."""
    return isinstance(layer, CodeLinear | CodeEmbedding | GroupLinear | GroupEmbedding)


def dense(layer: Any) -> Tensor:
    """The float32 weight of a compressed layer, in the shape of the original's. Models read its shape or dtype."""
    if isinstance(layer, GroupLinear | GroupEmbedding):
        width = layer.width
        weight = unpack_groups(layer.packed, layer.scale, layer.zeros, layer.bits, layer.group)[:, :width]
    else:
        weight = (layer.codes.float() * layer.scale).T
        weight = weight if layer.columns is None else weight * layer.columns
    return unmatrix(weight, layer.shape) if hasattr(layer, "shape") else weight


class CodeLinear(nn.Module):
    """y = x Wᵀ + b with W = scale * codes * columns. Codes int8 [in, out], scale float32 [out], columns float32 [in].

    The columns' factors, where a layer has them, multiply its input; they are 1 in others. The input is quantized on the fly as `activations` says, a key of `ACTIVATIONS`: integer kernels need that.
    """

    def __init__(self, columns: int, rows: int, bias: bool, activations: str, factors: bool = False) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(columns, rows, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(rows))
        self.register_buffer("columns", torch.ones(columns) if factors else None)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.activations = activations

    weight = property(dense)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.columns is not None:
            x = x * self.columns
        if torch.compiler.is_exporting():
            y = torch.ops.packlight.code_linear(x, self.codes, self.scale, self.activations)
        else:
            y = ACTIVATIONS[self.activations](x) @ (self.codes.float() * self.scale)
        return y if self.bias is None else y + self.bias


class CodeConv1d(CodeLinear):
    """A one-dimensional convolution as its windows times a matrix of codes [kernel * in, out]."""

    def __init__(self, like: nn.Conv1d, activations: str, factors: bool = False) -> None:
        rows, columns = matrix(like).shape
        super().__init__(columns, rows, like.bias is not None, activations, factors)
        # Named as in nn.Conv1d: models read them, Whisper to check the length of its input.
        self.kernel_size, self.stride, self.padding = like.kernel_size, like.stride, like.padding
        self.shape = like.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, time] to [batch, out, steps]."""
        return super().forward(windows_of(self, x)).transpose(1, 2)


class CodeConv2d(CodeLinear):
    """A two-dimensional convolution as its windows times a matrix of codes [h * w * in, out]."""

    def __init__(self, like: nn.Conv2d, activations: str, factors: bool = False) -> None:
        rows, columns = matrix(like).shape
        super().__init__(columns, rows, like.bias is not None, activations, factors)
        _like_conv2d(self, like)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, y, x] to [batch, out, rows, columns]."""
        return super().forward(windows2d_of(self, x)).permute(0, 3, 1, 2)


def _like_conv2d(layer: Any, like: Any) -> None:
    layer.kernel_size, layer.stride, layer.padding = like.kernel_size, like.stride, like.padding
    layer.shape = like.weight.shape


class StaticConv(CodeLinear):
    """A convolution in integers with fixed ranges of its input and output; codes int8 [kernel * in / groups, out].

    With `activations` 'float' it computes in floats with the weights that the codes stand for.
    """

    def __init__(self, like: nn.Module, held: Range, out: Range) -> None:
        rows, columns = rows_of(like).shape
        super().__init__(columns, rows, like.bias is not None, "static")
        _like_conv2d(self, like)
        self.held, self.geometry = [held.scale, float(held.zero), out.scale, float(out.zero)], geometry_of(like)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, ...] to [n, out, ...]."""
        how = (x, self.codes, self.scale, self.bias, self.held, self.geometry)
        if torch.compiler.is_exporting():
            return torch.ops.packlight.static_conv(*how)
        if self.activations == "static":
            return static_conv(*how)
        return convolve(x, kernel_of(self.codes.float() * self.scale, self.geometry), self.bias, self.geometry)


class CodeEmbedding(nn.Module):
    """A table of codes int8 [width, tokens] with a scale per token. Stored so that a tied head can share it."""

    def __init__(self, tokens: int, width: int, factors: bool = False) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(width, tokens, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(tokens))
        self.register_buffer("columns", torch.ones(width) if factors else None)
        self.num_embeddings = tokens

    weight = property(dense)

    def forward(self, ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        """Ids [...] to [..., width]. A table of positions is looked up by `position_ids`, as transformers calls it."""
        ids = ids if position_ids is None else position_ids
        if torch.compiler.is_exporting():
            rows = torch.ops.packlight.code_embedding(ids, self.codes, self.scale)
        else:
            rows = self.codes[:, ids.reshape(-1)].T.float().reshape(*ids.shape, -1) * self.scale[ids][..., None]
        return rows if self.columns is None else rows * self.columns


class GroupLinear(nn.Module):
    """y = x Wᵀ + b, float activations; W as 4- or 8-bit codes in groups along the input with scale and zero point.

    packed uint8 [out, groups, group * bits / 8], low bits first; scale float32 [out * groups]; zeros uint8
    [out, ceil(groups * bits / 8)], packed likewise. This is the layout of ONNX Runtime's MatMulNBits.
    """

    def __init__(self, columns: int, rows: int, bias: bool, bits: int, group: int) -> None:
        super().__init__()
        _group_buffers(self, columns, rows, bits, group)
        self.width = columns
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    weight = property(dense)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if torch.compiler.is_exporting():
            y = torch.ops.packlight.group_linear(x, self.packed, self.scale, self.zeros, self.bits, self.group)
        else:
            weight = unpack_groups(self.packed, self.scale, self.zeros, self.bits, self.group)
            y = x @ weight[:, : x.shape[-1]].T
        return y if self.bias is None else y + self.bias


class GroupConv1d(GroupLinear):
    """A one-dimensional convolution as its windows times a matrix of grouped codes."""

    def __init__(self, like: nn.Conv1d, bits: int, group: int) -> None:
        rows, columns = matrix(like).shape
        super().__init__(columns, rows, like.bias is not None, bits, group)
        # Named as in nn.Conv1d: models read them, Whisper to check the length of its input.
        self.kernel_size, self.stride, self.padding = like.kernel_size, like.stride, like.padding
        self.shape = like.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, time] to [batch, out, steps]."""
        return super().forward(windows_of(self, x)).transpose(1, 2)


class GroupConv2d(GroupLinear):
    """A two-dimensional convolution as its windows times a matrix of grouped codes."""

    def __init__(self, like: nn.Conv2d, bits: int, group: int) -> None:
        rows, columns = matrix(like).shape
        super().__init__(columns, rows, like.bias is not None, bits, group)
        _like_conv2d(self, like)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, y, x] to [batch, out, rows, columns]."""
        return super().forward(windows2d_of(self, x)).permute(0, 3, 1, 2)


class GroupEmbedding(nn.Module):
    """A table with 4- or 8-bit codes in groups along the width; buffers as in `GroupLinear`, so a head can share."""

    def __init__(self, tokens: int, width: int, bits: int, group: int) -> None:
        super().__init__()
        _group_buffers(self, width, tokens, bits, group)
        self.width, self.num_embeddings = width, tokens

    weight = property(dense)

    def forward(self, ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        """Ids [...] to [..., width]; `position_ids` as in `CodeEmbedding`."""
        ids = ids if position_ids is None else position_ids
        args = (self.packed, self.scale, self.zeros, self.bits, self.group)
        if torch.compiler.is_exporting():
            return torch.ops.packlight.group_embedding(ids, *args, self.width)
        return _group_rows(ids, *args)[..., : self.width]


def _group_buffers(layer: nn.Module, columns: int, rows: int, bits: int, group: int) -> None:
    groups = -(-columns // group)
    layer.register_buffer("packed", torch.zeros(rows, groups, group * bits // 8, dtype=torch.uint8))
    layer.register_buffer("scale", torch.ones(rows * groups))
    layer.register_buffer("zeros", torch.zeros(rows, -(-groups * bits // 8), dtype=torch.uint8))
    layer.bits, layer.group = bits, group


# Surgery ------------------------------------------------------------------------------------------------------------


RESHAPES = {**SHAPES, **CONVOLUTIONS}
KINDS = ("codes", "groups", "static", *RESHAPES)


@dataclass(frozen=True)
class Edit:
    """One structural change.

    Args:
        path: of the layer that is replaced.
        kind: 'codes', 'groups' or 'static'; or one of `packlight.structure` or `packlight.convolutions`, which say what its
            args are.
        args: 'activations' and 'columns' for codes; 'bits' and 'group' for groups; 'input' and 'output', each a scale and
            a zero point, for static; 'tied' names the path of a layer that was
            replaced before and whose buffers are shared.
    """

    path: str
    kind: str
    args: dict[str, Any] = field(default_factory=dict)


def build(layer: nn.Module, edit: Edit) -> nn.Module:
    """The empty layer that an edit puts in the place of `layer`. Raises PlanError for a pair that does not exist."""
    if edit.kind == "codes":
        activations, factors = str(edit.args.get("activations", "int8")), bool(edit.args.get("columns"))
        if isinstance(layer, nn.Conv1d):
            return CodeConv1d(layer, activations, factors)
        if isinstance(layer, nn.Conv2d):
            return CodeConv2d(layer, activations, factors)
        if isinstance(layer, nn.Linear):
            return CodeLinear(layer.in_features, layer.out_features, layer.bias is not None, activations, factors)
        if isinstance(layer, nn.Embedding):
            return CodeEmbedding(layer.num_embeddings, layer.embedding_dim, factors)
    if edit.kind == "groups":
        bits, group = int(edit.args["bits"]), int(edit.args["group"])
        if isinstance(layer, nn.Conv1d):
            return GroupConv1d(layer, bits, group)
        if isinstance(layer, nn.Conv2d):
            return GroupConv2d(layer, bits, group)
        if isinstance(layer, nn.Linear):
            return GroupLinear(layer.in_features, layer.out_features, layer.bias is not None, bits, group)
        if isinstance(layer, nn.Embedding):
            return GroupEmbedding(layer.num_embeddings, layer.embedding_dim, bits, group)
    if edit.kind == "static":
        return StaticConv(layer, Range(*edit.args["input"]), Range(*edit.args["output"]))
    raise PlanError(f"{edit.path}: no layer of kind {edit.kind!r} can replace a {type(layer).__name__}.")


def replace_(root: nn.Module, edit: Edit) -> nn.Module:
    """Carry out an edit on a model; the bias moves over, codes and scales are left to be filled. Returns the layer."""
    if edit.kind in RESHAPES:
        return RESHAPES[edit.kind](root, edit.path, edit.args)
    old = root.get_submodule(edit.path)
    new = build(old, edit)
    bias = getattr(old, "bias", None)
    if bias is not None:
        with torch.no_grad():
            new.bias.copy_(bias)
    tied = edit.args.get("tied")
    if tied is not None:
        source = root.get_submodule(tied)
        for name, _ in list(new.named_buffers()):
            new.register_buffer(name, source.get_buffer(name))
    parent, _, name = edit.path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
    return new
