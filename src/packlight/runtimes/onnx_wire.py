"""ONNX files read and changed as protobuf's wire format has them: the base install has no onnx package. No torch.

These few fields are all that is needed. ModelProto: graph 7. GraphProto: node 1, initializer 5, input 11.
NodeProto: input 1, output 2, name 3, op_type 4, attribute 5. AttributeProto: name 1, i 3. TensorProto: dims 1,
data_type 2, name 8, raw_data 9, data_location 14 (1 = external).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from packlight.errors import BundleError

UINT8, INT8, INT32 = 2, 3, 6  # of TensorProto.DataType
_NODE, _INITIALIZER, _INPUT, _GRAPH = 1, 5, 11, 7

Value = memoryview | int


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """(number, value) of a message's fields: bytes for lengths, integers for varints, none for others. Raises BundleError."""
    at = 0

    def varint() -> int:
        nonlocal at
        result = shift = 0
        while True:
            byte = data[at]
            at += 1
            result |= (byte & 127) << shift
            if byte < 128:
                return result
            shift += 7

    try:
        while at < len(data):
            tag = varint()
            wire = tag & 7
            if wire == 0:
                yield tag >> 3, varint()
            elif wire == 2:
                size = varint()
                if at + size > len(data):
                    raise IndexError
                at += size
                yield tag >> 3, data[at - size : at]
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            else:
                raise IndexError
    except IndexError:
        raise BundleError("A graph file is damaged: its protobuf ends too early.") from None


def message(parts: Iterable[tuple[int, Value | bytes | str]]) -> bytes:
    """A message of integers, texts and bytes."""
    found = []
    for number, value in parts:
        if isinstance(value, int):
            found += [_varint(8 * number), _varint(value)]
        else:
            data = value.encode() if isinstance(value, str) else bytes(value)
            found += [_varint(8 * number + 2), _varint(len(data)), data]
    return b"".join(found)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found + bytes([value]))


@dataclass(frozen=True)
class Node:
    """A node of a graph: its operator, names of its inputs and outputs, and those attributes that are integers."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensor:
    """An initializer: its shape, the number of its dtype, and whether its values lie outside the file."""

    shape: tuple[int, ...]
    dtype: int
    external: bool


def _text(value: Value) -> str:
    return "" if isinstance(value, int) else bytes(value).decode("utf-8", "replace")


def _inside(value: Value) -> Iterator[tuple[int, Value]]:
    return fields(memoryview(b"") if isinstance(value, int) else value)


def _node(data: Value) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    integers = {}
    for number, value in _inside(data):
        if number in texts:
            texts[number].append(_text(value))
        elif number == 5:
            parts = dict(_inside(value))
            if isinstance(whole := parts.get(3), int):
                integers[_text(parts.get(1, 0))] = whole
    return Node("".join(texts[4]), tuple(texts[1]), tuple(texts[2]), integers)


def _tensor(data: Value) -> tuple[str, Tensor]:
    shape: list[int] = []
    found: dict[int, Value] = {}
    for number, value in _inside(data):
        if number == 1:  # one by one, or all packed in one field
            shape += [value] if isinstance(value, int) else _packed(value)
        else:
            found[number] = value
    dtype, where = found.get(2, 0), found.get(14, 0)
    return _text(found.get(8, 0)), Tensor(tuple(shape), dtype if isinstance(dtype, int) else 0, where == 1)


def _packed(data: memoryview) -> list[int]:
    numbers, part, shift = [], 0, 0
    for byte in data:
        part |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(part)
            part = shift = 0
    return numbers


def parts_of(model: bytes) -> tuple[list[Node], dict[str, Tensor], list[str]]:
    """Nodes, initializers by name, and names of the inputs of an ONNX file. Raises BundleError."""
    nodes, tensors, inputs = [], {}, []
    for number, graph in fields(memoryview(model)):
        for inner, value in _inside(graph) if number == _GRAPH else ():
            if inner == _NODE:
                nodes.append(_node(value))
            elif inner == _INITIALIZER:
                name, tensor = _tensor(value)
                tensors[name] = tensor
            elif inner == _INPUT:
                inputs.append(_text(next((v for n, v in _inside(value) if n == 1), 0)))
    return nodes, tensors, inputs


def external_names(model: bytes) -> list[str]:
    """Names of the initializers that an ONNX file marks as external. Raises BundleError."""
    return [name for name, tensor in parts_of(model)[1].items() if tensor.external]


def changed(
    model: bytes,
    node: Callable[[Node], Iterable[Node] | None],
    added: Sequence[tuple[int, bytes]] = (),
    dropped: Collection[str] = (),
) -> bytes:
    """The file with other nodes; what is not changed keeps its bytes.

    Args:
        model: an ONNX file.
        node: what each node becomes; None for itself.
        added: further fields of its graph, from `input_of` and `initializer_of`.
        dropped: names of initializers that are left out.
    """

    def inside(graph: Value) -> Iterator[tuple[int, Value | bytes]]:
        for number, value in _inside(graph):
            others = node(_node(value)) if number == _NODE else None
            if others is not None:
                yield from ((_NODE, _bytes_of(other)) for other in others)
            elif number != _INITIALIZER or _tensor(value)[0] not in dropped:
                yield number, value
        yield from added

    whole = fields(memoryview(model))
    return message((n, message(inside(value)) if n == _GRAPH else value) for n, value in whole)


def _bytes_of(node: Node) -> bytes:
    integers = [(5, message([(1, name), (3, value), (20, 2)])) for name, value in node.integers.items()]
    named = [*((1, name) for name in node.inputs), *((2, name) for name in node.outputs), (4, node.operator)]
    return message([*named, *integers])


def input_of(name: str, dtype: int, shape: Sequence[int | str]) -> tuple[int, bytes]:
    """A graph's input as a field of its graph: each dimension a number, or a name where it varies."""
    sizes = message((1, message([(2 if isinstance(n, str) else 1, n)])) for n in shape)
    kind = message([(1, message([(1, dtype), (2, sizes)]))])
    return _INPUT, message([(1, name), (2, kind)])


def initializer_of(name: str, dtype: int, shape: Sequence[int], raw: bytes) -> tuple[int, bytes]:
    """An initializer with its values, little-endian, as a field of its graph."""
    return _INITIALIZER, message([*((1, n) for n in shape), (2, dtype), (8, name), (9, raw)])
