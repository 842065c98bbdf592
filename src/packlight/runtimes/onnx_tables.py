"""Tables that a graph both looks up and multiplies with, in memory once. No torch: this runs on the device.

A kernel that multiplies packs its weights anew and forgets them, but what the same graph looks up stays as it was: the
vocabulary table of a decoder, which is its head as well, is then held twice. When the graph is loaded, either of two
changes to it avoids that; no number changes.

- Integer codes: a product of one row is as fast on them as they are, where its zero point is 0 and the processor has
  the kernel. So the zero point's share, zero times the sum of each column, is taken off afterwards, in integers.
- Groups, which must be packed: the rows become an input of the graph, and are read from the weights file.
"""

import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from packlight.runtimes.onnx_wire import INT8, INT32, UINT8, Node, changed, initializer_of, input_of, parts_of

Array = np.ndarray[Any, np.dtype[Any]]
IDS = "input_ids"  # the input that rows are looked up by
_CPUINFO = Path("/proc/cpuinfo")


def row_kernel() -> bool:
    """Whether ONNX Runtime multiplies one row of bytes with codes that are not packed as fast as with packed ones here.

    It does on x86 from AVX2 on; processors with AMX take other kernels. Where this can't be known, no.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not _CPUINFO.is_file():
        return False
    line = next((x for x in _CPUINFO.read_text(errors="replace").splitlines() if x.startswith("flags")), "")
    return "avx2" in line.split() and "amx_int8" not in line.split()


def unpacked(graph: bytes, arrays: Mapping[str, Array]) -> tuple[bytes, list[str]]:
    """The graph with products on the codes of its lookups, not on a packed copy of them.

    Args:
        graph: an ONNX file.
        arrays: its external weights by name, codes int8 [in, out] among them.

    Returns:
        the graph, and names of the weights that are inputs of it now: what may change from run to run is not packed.
    """
    nodes, tensors, _ = parts_of(graph)
    looked_up = {node.inputs[0] for node in nodes if node.operator == "Gather" and node.inputs}

    def is_shared(node: Node) -> bool:
        if node.operator != "MatMulInteger" or len(node.inputs) != 3:
            return False
        tensor, array = tensors.get(node.inputs[1]), arrays.get(node.inputs[1])
        whole = tensor is not None and tensor.external and tensor.dtype == INT8 and array is not None
        return whole and node.inputs[1] in looked_up and array is not None and array.ndim == 2

    def split(node: Node) -> Iterable[Node] | None:
        if not is_shared(node):
            return None
        (rows, codes, zero), (made,) = node.inputs, node.outputs
        whole, shift = f"{made}/whole", f"{made}/shift"
        return (
            Node("MatMulInteger", (rows, codes), (whole,)),
            Node("Cast", (zero,), (f"{made}/zero",), {"to": INT32}),
            Node("Mul", (f"{made}/zero", f"{codes}/sums"), (shift,)),
            Node("Sub", (whole, shift), (made,)),
        )

    names, added = sorted({node.inputs[1] for node in nodes if is_shared(node)}), []
    for name in names:
        sums = arrays[name].sum(0, dtype=np.int32)
        added.append(input_of(name, INT8, arrays[name].shape))
        added.append(initializer_of(f"{name}/sums", INT32, sums.shape, sums.tobytes()))
    return (changed(graph, split, added, names) if names else graph), names


def fed(graph: bytes, has_rows: Callable[[str], bool]) -> tuple[bytes, dict[str, str]]:
    """The graph with rows as inputs where it looked them up by `input_ids` in a table that it also multiplies with.

    Args:
        graph: an ONNX file.
        has_rows: whether the rows of the external weight of that name can be had one by one.

    Returns:
        the graph; and name of the new input -> name of the table whose rows it takes, [ids, ...].
    """
    nodes, tensors, inputs = parts_of(graph)
    flat = {node.outputs[0] for node in nodes if node.operator == "Reshape" and node.inputs[0] == IDS in inputs}
    multiplied = {name for node in nodes if node.operator == "MatMulNBits" for name in node.inputs}

    def is_lookup(node: Node) -> bool:
        if node.operator != "Gather" or node.integers.get("axis", 0) or node.inputs[1] not in flat:
            return False
        tensor = tensors.get(node.inputs[0])
        outside = tensor is not None and tensor.external and tensor.dtype == UINT8
        return outside and node.inputs[0] in multiplied and has_rows(node.inputs[0])

    rows = {node.outputs[0]: node.inputs[0] for node in nodes if is_lookup(node)}
    added = [input_of(made, UINT8, ("rows", *tensors[table].shape[1:])) for made, table in rows.items()]
    return (changed(graph, lambda node: () if is_lookup(node) else None, added) if rows else graph), rows
