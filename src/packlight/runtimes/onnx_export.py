"""From a PyTorch graph to an ONNX file without weights, and the weights beside it. Integers stay integers.

Exporters fold the dequantization of constants into floats. Compressed layers therefore call opaque operators while
they are exported (`packlight.layers`), and this file says what each becomes:

- codes with 8-bit activations: DynamicQuantizeLinear and MatMulInteger, the integer kernels that are fast on every CPU;
- codes with float activations: a cast, a product with the scale, a float MatMul;
- groups: MatMulNBits with integer arithmetic inside (accuracy_level 4; level 0 is 20 to 50 times slower at 8 bits);
- tables: a Gather of codes.
"""

import contextlib
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
from onnxscript.values import Op, Opset

from packlight.families import Graph

OPSET = 18
_EXTERNAL = 256  # bytes: smaller constants stay in the graph
_MATMUL_NBITS = Op(
    Opset("com.microsoft", 1),
    "MatMulNBits",
    OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(name, kind) for name, kind in zip("ABsz", ("T", "B", "T", "B"), strict=True)],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("B", ["tensor(uint8)"], "")],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, "")
            for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    ),
)
_INT8, _FLOAT, _INT64 = ir.DataType.INT8.value, ir.DataType.FLOAT.value, ir.DataType.INT64.value

Array = np.ndarray[Any, np.dtype[Any]]


def _code_linear(x: Any, codes: Any, scale: Any, int8_activations: bool) -> Any:
    if not int8_activations:
        return op.MatMul(x, op.Mul(op.Cast(codes, to=_FLOAT), scale))
    quantized, step, zero = op.DynamicQuantizeLinear(x)
    product = op.Cast(op.MatMulInteger(quantized, codes, zero), to=_FLOAT)
    return op.Mul(product, op.Mul(step, scale))


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


_TRANSLATIONS = {
    torch.ops.packlight.code_linear.default: _code_linear,
    torch.ops.packlight.code_embedding.default: _code_embedding,
    torch.ops.packlight.group_linear.default: _group_linear,
    torch.ops.packlight.group_embedding.default: _group_embedding,
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
    with _quiet(), torch.no_grad():
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
        )
    assert program is not None
    model = program.model
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
    weights: dict[str, Array] = {}
    for key in list(model.graph.initializers):
        value = model.graph.initializers[key]
        constant = value.const_value
        if constant is None or constant.nbytes < _EXTERNAL:
            continue
        value.name = own.get(key, f"{graph.name}/{key}")
        weights[value.name] = np.ascontiguousarray(constant.numpy())
        value.const_value = ir.ExternalTensor(
            location="weights",
            offset=0,
            length=constant.nbytes,
            dtype=constant.dtype,
            shape=constant.shape,
            name=value.name,
        )
    return weights


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
