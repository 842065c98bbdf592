"""What ONNX Runtime's own profiler wrote, by kind of operation and by layer. No torch.

The runtime names its nodes as the exporter did, which says little; the layer is read from the graph: a node belongs to
the layer whose weights it takes, and one without weights to the layers that its inputs come from.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packlight.errors import BundleError
from packlight.runtimes.onnx_wire import fields

_KERNEL = "_kernel_time"
_CONSTANT_PARTS = ("codes", "scale", "columns", "packed", "zeros", "weight")  # of a layer; equal biases share a name
_SELF = ("MultiHeadAttention", "Softmax")  # work of a whole attention, not of the projection that it follows


@dataclass(frozen=True)
class Spent:
    """What one node of a graph took.

    Args:
        node: its name in the graph.
        op: kind of operation, as the runtime fused it.
        layer: path of the layer that it computes; '' where the graph does not say.
        seconds: of its kernel, all calls together.
        calls: how often it ran.
    """

    node: str
    op: str
    layer: str
    seconds: float
    calls: int


def read_trace(file: Path, graph: bytes) -> list[Spent]:
    """What each node took, dearest first, without the calls of the first run, which warms up.

    Args:
        file: that the runtime's profiler wrote.
        graph: the ONNX file that it ran.

    Raises:
        BundleError: no such profile.
    """
    try:
        events = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"ONNX Runtime left no profile that can be read ({error}). Run it again.") from None
    layers = layers_of(graph)
    first = min((e["ts"] + e["dur"] for e in events if e.get("name") == "model_run"), default=0)
    sums: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL) and event["ts"] >= first:
            entry = sums.setdefault((event["name"].removesuffix(_KERNEL), event["args"]["op_name"]), [0.0, 0])
            entry[0] += event["dur"] / 1e6
            entry[1] += 1
    found = [
        Spent(
            node, op, layers.get(node.partition("/")[0], ""), time, int(n)
        )  # a fused node: its first one's name, /, how
        for (node, op), (time, n) in sums.items()
    ]
    return sorted(found, key=lambda s: -s.seconds)


def layers_of(graph: bytes) -> dict[str, str]:
    """Node -> path of the layer that it computes, read from the ONNX file itself.

    ModelProto.graph (7), GraphProto.node (1) and .initializer (5), NodeProto.input (1), .output (2), .name (3) and
    .op_type (4), TensorProto.name (8).
    """
    nodes, weights = [], set()
    for number, value in fields(memoryview(graph)):
        if number != 7 or not isinstance(value, memoryview):
            continue
        for inner, item in fields(value):
            if inner == 1 and isinstance(item, memoryview):
                nodes.append(_node(item))
            elif inner == 5 and isinstance(item, memoryview):
                weights.add(bytes(dict(fields(item)).get(8, b"")).decode())
    paths = {name: layer for name in weights if (layer := _layer(name))}
    constants = {*weights, ""}
    origin: dict[str, str] = {}
    found = {}
    for name, op, inputs, outputs in nodes:
        own = [paths[i] for i in inputs if i in paths]
        layer = own[0] if own else _common(origin[i] for i in inputs if origin.get(i))
        if op in _SELF and not own and layer.endswith("_proj"):
            layer = layer.rpartition(".")[0]
        found[name] = layer
        origin.update(dict.fromkeys(outputs, layer))
        if own and all(i in constants for i in inputs):  # a weight turned or made a float
            constants.update(outputs)
            paths.update(dict.fromkeys(outputs, layer))
    return found


def _node(item: memoryview) -> tuple[str, str, list[str], list[str]]:
    name = op = ""
    inputs: list[str] = []
    outputs: list[str] = []
    for number, value in fields(item):
        if not isinstance(value, memoryview):
            continue
        if number in (1, 2):
            (inputs if number == 1 else outputs).append(bytes(value).decode())
        elif number == 3:
            name = bytes(value).decode()
        elif number == 4:
            op = bytes(value).decode()
    return name, op, inputs, outputs


def _layer(weight: str) -> str:
    """The path of the layer that a weight belongs to: its name without the last part, where that is one of ours."""
    path, _, last = weight.removesuffix(".T").rpartition(".")
    return path if last in _CONSTANT_PARTS else ""


def _common(paths: Iterable[str]) -> str:
    """What several paths begin with, in whole parts."""
    shared: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
