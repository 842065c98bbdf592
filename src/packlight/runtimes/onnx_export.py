"""From a PyTorch graph to an ONNX file without weights, and the weights beside it. Integers stay integers.

Exporters fold the dequantization of constants into floats. Compressed layers therefore call opaque operators while
they are exported (`packlight.layers`), and this file says what each becomes:

- codes with 8-bit activations: DynamicQuantizeLinear and MatMulInteger, the integer kernels that are fast on every CPU;
  with a range per row: the rows divided by their peaks, a fixed QuantizeLinear, MatMulIntegerToFloat;
- GELU: one operator, where the exporter would write five passes;
- codes with float activations: a cast, a product with the scale, a float MatMul;
- convolutions with fixed ranges: QLinearConv (`packlight.runtimes.onnx_static`);
- groups: MatMulNBits with integer arithmetic inside (accuracy_level 4; level 0 is 20 to 50 times slower at 8 bits);
- tables: a Gather of codes;
- attention without a mask: MultiHeadAttention, which never holds all scores at once; with a bias, or a mask that all
  samples and heads share, it does hold them. The decoder's own attention is such a one: fused, a token of Whisper tiny.en
  takes 0.87 of the time on one thread, 0.81 on two.
"""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op
from onnxscript.optimizer import optimize
from onnxscript.values import Op, Opset

import packlight.layers  # noqa: F401 - it registers the operators that are translated here
from packlight.families import Graph
from packlight.runtimes.onnx_static import join, static_conv

OPSET = 18
_EXTERNAL = 256  # bytes: smaller constants stay in the graph
_KINDS = {"T": "float", "B": "uint8", "C": "int8"}


def _contrib(name: str, inputs: dict[str, str], attributes: dict[str, Any]) -> Op:
    """An operator of ONNX Runtime's own domain: inputs by name with their kind, a key of `_KINDS`; one float output."""
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(i, kind) for i, kind in inputs.items()],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[(k, [f"tensor({t})"], "") for k, t in _KINDS.items() if k == "T" or k in inputs.values()],
        attributes=[OpSchema.Attribute(a, kind, "") for a, kind in attributes.items()],
    )
    return Op(Opset("com.microsoft", 1), name, schema)


_NUMBER = OpSchema.AttrType.INT
_GELU = {"none": _contrib("Gelu", {"X": "T"}, {}), "tanh": _contrib("FastGelu", {"X": "T"}, {})}
_MATMUL_TO_FLOAT = _contrib(
    "MatMulIntegerToFloat",
    {"A": "B", "codes": "C", "a_scale": "T", "b_scale": "T", "a_zero_point": "B"},
    {},
)
_MATMUL_NBITS = _contrib(
    "MatMulNBits",
    {"A": "T", "B": "B", "scales": "T", "zero_points": "B"},
    dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level"), _NUMBER),
)
_ATTENTION = _contrib(
    "MultiHeadAttention",
    {"query": "T", "key": "T", "value": "T"},
    {"num_heads": _NUMBER, "scale": OpSchema.AttrType.FLOAT},
)
_BIASED_ATTENTION = _contrib(
    "MultiHeadAttention",
    dict.fromkeys(("query", "key", "value", "bias", "key_padding_mask", "attention_bias"), "T"),
    {"num_heads": _NUMBER, "scale": OpSchema.AttrType.FLOAT},
)
_INT8, _FLOAT, _INT64 = ir.DataType.INT8.value, ir.DataType.FLOAT.value, ir.DataType.INT64.value

Array = np.ndarray[Any, np.dtype[Any]]


def _code_linear(x: Any, codes: Any, scale: Any, activations: str) -> Any:
    if activations == "float":
        return op.MatMul(x, op.Mul(op.Cast(codes, to=_FLOAT), scale))
    if activations == "int8_rows":
        last = op.Constant(value_ints=[-1])
        peak = op.Max(op.ReduceMax(x, last), op.Neg(op.ReduceMin(x, last)), op.Constant(value_float=1e-12))
        half = op.Constant(value=ir.tensor(np.array(128, dtype=np.uint8)))
        step = op.Constant(value_float=1 / 127)
        rounded = op.QuantizeLinear(op.Div(x, peak), step, half)
        if len(x.shape) == 2:  # one row, maybe times a table, which `onnx_tables` looks for
            return op.Mul(op.Mul(op.Cast(op.MatMulInteger(rounded, codes, half), to=_FLOAT), op.Mul(scale, step)), peak)
        return op.Mul(_MATMUL_TO_FLOAT(rounded, codes, step, scale, half), peak)
    quantized, step, zero = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(quantized, codes, zero), to=_FLOAT)
    return op.Mul(product, op.Mul(step, scale))


def _gelu(x: Any, approximate: str = "none") -> Any:
    return _GELU[approximate](x)


def _code_embedding(ids: Any, codes: Any, scale: Any) -> Any:
    # The table lies [width, tokens], as the head needs it: columns are gathered, then turned.
    rows = op.Cast(op.Gather(codes, op.Reshape(ids, op.Constant(value_ints=[-1])), axis=1), to=_FLOAT)
    wide = op.Reshape(op.Transpose(rows, perm=[1, 0]), op.Concat(op.Shape(ids), op.Constant(value_ints=[-1]), axis=0))
    return op.Mul(wide, op.Unsqueeze(op.Gather(scale, ids), op.Constant(value_ints=[-1])))


def _group_linear(x: Any, packed: Any, scale: Any, zeros: Any, bits: int, group: int) -> Any:
    rows = packed.shape[0]
    columns = x.shape[-1]
    return _MATMUL_NBITS(
        x, packed, scale, zeros, K=int(columns), N=int(rows), bits=bits, block_size=group, accuracy_level=4
    )


def _group_embedding(ids: Any, packed: Any, scale: Any, zeros: Any, bits: int, group: int, width: int) -> Any:
    rows, groups = int(packed.shape[0]), int(packed.shape[1])
    shape = op.Constant(value_ints=[-1, groups, group])
    flat = op.Reshape(ids, op.Constant(value_ints=[-1]))
    codes = _unpack(op.Gather(packed, flat), bits, shape)
    zero = _unpack(op.Gather(zeros, flat), bits, op.Constant(value_ints=[-1, int(zeros.shape[1]) * 8 // bits, 1]))
    zero = op.Slice(zero, op.Constant(value_ints=[0]), op.Constant(value_ints=[groups]), op.Constant(value_ints=[1]))
    scales = op.Gather(op.Reshape(scale, op.Constant(value_ints=[rows, groups, 1])), flat)
    values = op.Reshape(op.Mul(op.Sub(codes, zero), scales), op.Constant(value_ints=[-1, groups * group]))
    if width != groups * group:
        values = op.Slice(
            values, op.Constant(value_ints=[0]), op.Constant(value_ints=[width]), op.Constant(value_ints=[1])
        )
    return op.Reshape(values, op.Concat(op.Shape(ids), op.Constant(value_ints=[width]), axis=0))


def _unpack(packed: Any, bits: int, shape: Any) -> Any:
    """Bytes of packed codes to float codes in the given shape, low bits first."""
    if bits == 4:
        low = op.Mod(packed, op.Constant(value=ir.tensor(np.array(16, dtype=np.uint8))))
        high = op.Div(packed, op.Constant(value=ir.tensor(np.array(16, dtype=np.uint8))))
        last = op.Constant(value_ints=[-1])
        packed = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    return op.Reshape(op.Cast(packed, to=_FLOAT), shape)


def _attention(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
    heads, length, size = (query.shape[i] for i in (1, 2, 3))
    wide, given, whole = int(size), int(value.shape[3]), length == key.shape[2]
    if bias is not None and whole and bias.shape[2] == 1 and length != 1:
        query, key, bias, wide = *_with_bias(query, key, bias, scale), None, wide + 1

    def rows(x: Any, width: int) -> Any:  # [batch, heads, time, width] to [batch, time, heads * width]
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, -1, int(heads) * width]))

    # Queries of a step read their keys as the cache holds them; many take the kernel that goes block by block, which
    # wants rows.
    many = (isinstance(length, int) and length > 1) or wide > size or (bias is not None and whole)
    inputs = (rows(query, wide), rows(key, wide), rows(value, given)) if many else (rows(query, wide), key, value)
    if bias is None:
        made = _ATTENTION(*inputs, num_heads=int(heads), scale=scale)
    else:
        made = _BIASED_ATTENTION(*inputs, None, None, bias, num_heads=int(heads), scale=scale)
    return op.Transpose(op.Reshape(made, op.Constant(value_ints=[0, -1, int(heads), given])), perm=[0, 2, 1, 3])


def _with_bias(query: Any, key: Any, bias: Any, scale: float) -> tuple[Any, Any]:
    """Queries and keys with one more dimension, 1 and bias / scale: a number per key then needs no matrix of scores.

    The kernel that takes a bias holds the scores of all heads: 29 MB for 20 s of audio in each block of Whisper tiny.
    """
    last = op.Constant(value_ints=[0, 0, 0, 0, 0, 0, 0, 1])
    ones = op.Pad(query, last, op.Constant(value_float=1.0))
    per_key = op.Mul(op.Transpose(bias, perm=[0, 1, 3, 2]), op.Constant(value_float=1 / scale))
    shape = op.Concat(op.Shape(key, end=3), op.Constant(value_ints=[1]), axis=0)
    return ones, op.Concat(key, op.Expand(per_key, shape), axis=3)


_TRANSLATIONS = {
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.packlight.attention.default: _attention,
    torch.ops.packlight.code_linear.default: _code_linear,
    torch.ops.packlight.code_embedding.default: _code_embedding,
    torch.ops.packlight.group_linear.default: _group_linear,
    torch.ops.packlight.group_embedding.default: _group_embedding,
    torch.ops.packlight.static_conv.default: static_conv,
}


def export(graph: Graph, root: torch.nn.Module) -> tuple[bytes, dict[str, Array]]:
    """Export one graph.

    Args:
        graph: what to export; its module holds compressed layers, float layers, or both.
        root: the model that the graph is a part of; weights are named by their paths in it.

    Returns:
        the ONNX file without weights, and name -> array of the weights that it expects. What several graphs
        share has the same name in each.
    """
    dynamic = [dict.fromkeys(graph.dynamic.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in graph.inputs]
    shapes: Any = tuple(dynamic)
    if len(graph.args) > 1:  # the modules take their first tensor by name and the rest as *args
        shapes = (dynamic[0], tuple(dynamic[1:]))
    with _quiet(), _fused_attention(root), torch.no_grad():
        program = torch.onnx.export(
            graph.module,
            graph.args,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            custom_translation_table=_TRANSLATIONS,
            external_data=False,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        model = program.model
        # Constants are folded only while small: the default limits would turn small codes into floats.
        optimize(model, input_size_limit=_EXTERNAL, output_size_limit=4 * _EXTERNAL)
        join(model)
    _name_dimensions(model, graph)
    weights = _take_weights(model, graph, root)
    _forget_traces(model)
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True), weights


def _name_dimensions(model: ir.Model, graph: Graph) -> None:
    for value, name in zip(model.graph.inputs, graph.inputs, strict=True):
        if value.shape is not None:
            value.shape = ir.Shape(
                [graph.dynamic.get(name, {}).get(axis, dim) for axis, dim in enumerate(value.shape.dims)]
            )


def _take_weights(model: ir.Model, graph: Graph, root: torch.nn.Module) -> dict[str, Array]:
    """Turn large initializers into references, named by their path in the root, and return their arrays."""
    paths: dict[int, str] = {}
    for name, tensor in _tensors(root):
        paths.setdefault(tensor.data_ptr(), name)
    own = {name: paths[tensor.data_ptr()] for name, tensor in _tensors(graph.module) if tensor.data_ptr() in paths}
    turned: dict[bytes, str] = {}  # the exporter turns the matrices of float layers and drops their names
    for name, tensor in _tensors(root):
        if tensor.dim() == 2 and tensor.is_floating_point():
            turned.setdefault(_digest(tensor.detach().T.numpy()), f"{name}.T")
    weights: dict[str, Array] = {}
    for key in list(model.graph.initializers):
        value = model.graph.initializers[key]
        constant = value.const_value
        if constant is None or constant.nbytes < _EXTERNAL:
            continue
        array = np.ascontiguousarray(constant.numpy())
        name = own.get(key) or turned.get(_digest(array), "")
        value.name = name if name and name not in weights else f"{graph.name}/{key}"
        weights[value.name] = array
        value.const_value = ir.ExternalTensor(
            location="weights",
            offset=0,
            length=constant.nbytes,
            dtype=constant.dtype,
            shape=constant.shape,
            name=value.name,
        )
    return weights


def _digest(array: Array) -> bytes:
    return hashlib.sha256(str((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes()).digest()


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _forget_traces(model: ir.Model) -> None:
    """Drop what the exporter notes of source files and paths: it differs between machines and says nothing here."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None


def _is_bias(mask: torch.Tensor) -> bool:
    """Whether a mask is a sum that all samples and heads share, as MultiHeadAttention takes it."""
    return mask.is_floating_point() and _is_shared(mask)


def _is_shared(mask: torch.Tensor) -> bool:
    return mask.dim() == 4 and tuple(mask.shape[:2]) == (1, 1)


@contextlib.contextmanager
def _fused_attention(root: torch.nn.Module) -> Iterator[None]:
    """Let the attention of a transformers model call our operator where its mask is a sum, or none and not causal."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any
    ) -> tuple[Any, None]:
        causal = rest.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and _is_shared(mask):
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -1e9)  # the same sum for all layers
        elif causal or not (mask is None or _is_bias(mask)):
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
        return torch.ops.packlight.attention(query, key, value, mask, scaling).transpose(1, 2), None

    AttentionInterface.register("packlight", attend)
    AttentionMaskInterface.register("packlight", sdpa_mask)
    # Each tower of a model with several has a config of its own, which its attention reads.
    configs = {id(c): c for m in root.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    chosen = {key: name for key, name in before.items() if name is not None}
    try:
        for key in chosen:
            configs[key]._attn_implementation = "packlight"
        yield
    finally:
        for key, name in chosen.items():
            configs[key]._attn_implementation = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own internals; a user can do nothing about either."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
