"""Convolutions with fixed ranges in ONNX: QLinearConv, and chains of them that never leave the integers.

Each layer brings its own QuantizeLinear and DequantizeLinear. Where one convolution's output is the next one's input,
with nothing between but a clip that the bytes already keep and zeros around, `join` takes away what lies between: the
runtime's own optimizer does not see that.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from packlight.static import TOP, sides_of

_INT32 = ir.DataType.INT32.value


def _constant(value: float, kind: Any) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=kind)))


def static_conv(x: Any, codes: Any, scale: Any, bias: Any, held: Any, geometry: Any) -> Any:
    """What `packlight.static.static_conv` becomes."""
    geometry = [int(n) for n in geometry]
    kernel, stride, padding = sides_of(geometry)
    step, out_step = (_constant(held[i], np.float32) for i in (0, 2))
    zero, out_zero = (_constant(int(held[i]), np.uint8) for i in (1, 3))
    count = len(kernel)
    wide = op.Reshape(codes, op.Constant(value_ints=[*kernel, -1, int(codes.shape[1])]))
    weight = op.Transpose(wide, perm=[count + 1, count, *range(count)])
    inputs = [op.QuantizeLinear(x, step, zero), step, zero, weight, scale, _constant(0, np.int8), out_step, out_zero]
    if bias is not None:
        inputs.append(op.Cast(op.Round(op.Div(bias, op.Mul(scale, step))), to=_INT32))
    made = op.QLinearConv(
        *inputs,
        group=geometry[0],
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *padding],
        dilations=[1] * count,
    )
    return op.DequantizeLinear(made, out_step, out_zero)


# Joining ------------------------------------------------------------------------------------------------------------


def join(model: ir.Model) -> None:
    """Let convolutions hand over their integers, in place."""
    joined = [_join(node) for node in list(model.graph) if node.op_type == "QuantizeLinear"]
    if any(joined):
        _drop_unused(model)


def _join(node: ir.Node) -> bool:
    """Pass over what lies between this QuantizeLinear and a DequantizeLinear of the same range before it, if it can."""
    byte = node.outputs[0]
    users = [user for user, _ in byte.uses()]
    pads: list[int] = []
    value = node.inputs[0]
    while (before := None if value is None else value.producer()) is not None:
        if before.op_type == "Clip" and _keeps(before, node):
            value = before.inputs[0]
        elif before.op_type == "Pad" and not pads and _zeros(before) is not None:
            pads, value = _zeros(before) or [], before.inputs[0]
        else:
            break
    if before is None or before.op_type != "DequantizeLinear" or not _same(before, node):
        return False
    if pads and not all(user.op_type == "QLinearConv" for user in users):
        return False
    for user in users:
        for i, taken in enumerate(user.inputs):
            if taken is byte:
                user.replace_input_with(i, before.inputs[0])
        if pads:
            own = list(user.attributes["pads"].as_ints())
            user.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, pads, strict=True)])
    return True


def _array(value: ir.Value | None) -> Any:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else constant.numpy()


def _range(node: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
    scale, zero = (_array(v) for v in node.inputs[1:3])
    return None if scale is None or zero is None or scale.size != 1 else (float(scale), int(zero))


def _same(one: ir.Node, other: ir.Node) -> bool:
    """Whether bytes of one range are the same bytes in the other: scales may differ by less than half a byte in all."""
    first, second = _range(one), _range(other)
    if first is None or second is None or first[1] != second[1]:
        return False
    return abs(first[0] / second[0] - 1) * TOP < 0.1


def _keeps(clip: ir.Node, quantize: ir.Node) -> bool:
    """Whether bytes of a range are all inside what a clip leaves."""
    held = _range(quantize)
    low, high = (_array(v) if v is not None else None for v in (*clip.inputs[1:], None, None)[:2])
    if held is None:
        return False
    scale, zero = held
    above = high is None or float(high) >= (TOP - zero) * scale * (1 - 1e-6)
    return above and (low is None or float(low) <= -zero * scale * (1 - 1e-6))


def _zeros(pad: ir.Node) -> list[int] | None:
    """Zeros before and after each dimension but the first two; None where it pads otherwise."""
    mode = pad.attributes.get("mode")
    pads, value = (_array(v) for v in (*pad.inputs[1:], None, None)[:2])
    fills = value is None or float(value) == 0
    if pads is None or not fills or (mode is not None and mode.as_string() != "constant") or len(pad.inputs) > 3:
        return None
    half = len(pads) // 2
    around = [int(n) for n in pads]
    if any(around[:2]) or any(around[half : half + 2]) or min(around) < 0:
        return None
    return around[2:half] + around[half + 2 :]


def _drop_unused(model: ir.Model) -> None:
    """Remove nodes that nothing reads any more."""
    for node in reversed(list(model.graph)):
        unused = not any(out.uses() or out.is_graph_output() for out in node.outputs)
        if unused:
            model.graph.remove(node, safe=True)
