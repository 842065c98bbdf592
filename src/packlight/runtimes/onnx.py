"""Opening a bundle's graphs in ONNX Runtime. No torch: this runs on the device."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import BundleError, RuntimeMissing

Array = np.ndarray[Any, np.dtype[Any]]
Values = dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """A graph that can be run.

    Args:
        run: inputs by name, numpy arrays or values that another run returned, to outputs by name. An output has
            `.numpy()`; handed on as an input it is not copied.
        inputs, outputs: their names.
    """

    run: Callable[[Mapping[str, Any]], Values]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def open_graphs(files: Mapping[str, Path], weights: Iterable[tuple[str, Array]], threads: int) -> dict[str, Opened]:
    """Load graphs that share weights.

    Args:
        files: name -> ONNX file without its weights.
        weights: (name, array), decoded one by one; each goes to every graph that names it.
        threads: 0 for all cores.

    Raises:
        BundleError: a graph that does not load, or weights that it lacks.
        RuntimeMissing: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise RuntimeMissing("This needs ONNX Runtime: pip install onnxruntime") from None

    ort.set_default_logger_severity(3)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights}
    opened = {}
    for name, file in files.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        graph = file.read_bytes()
        wanted = external_names(graph)
        missing = [w for w in wanted if w not in values]
        if missing:
            raise BundleError(f"{file} expects {len(missing)} weights that the bundle lacks, first {missing[0]}.")
        options.add_external_initializers(wanted, [values[w] for w in wanted])
        try:
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - the runtime raises plain exceptions of its own module
            raise BundleError(
                f"ONNX Runtime {ort.__version__} can't load {file}: {str(error).splitlines()[0]}"
            ) from None
        opened[name] = _opened(session)
    return opened


def _opened(session: Any) -> Opened:
    import onnxruntime as ort

    inputs = tuple(i.name for i in session.get_inputs())
    outputs = tuple(o.name for o in session.get_outputs())

    def run(feed: Mapping[str, Any]) -> Values:
        values = {n: ort.OrtValue.ortvalue_from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in feed.items()}
        return dict(zip(outputs, session.run_with_ort_values(outputs, values), strict=True))

    return Opened(run, inputs, outputs)


def external_names(graph: bytes) -> list[str]:
    """Names of the initializers that an ONNX file marks as external, read from the protobuf wire format itself.

    The base install has no onnx package, and these few fields are all that is needed: ModelProto.graph (7),
    GraphProto.initializer (5), TensorProto.name (8) and .data_location (14, 1 = external).
    """
    names = []
    for field, value in _fields(memoryview(graph)):
        if field != 7 or not isinstance(value, memoryview):
            continue
        for inner, tensor in _fields(value):
            if inner != 5 or not isinstance(tensor, memoryview):
                continue
            parts = dict(_fields(tensor))
            if parts.get(14) == 1:
                names.append(bytes(parts[8]).decode())
    return names


def _fields(data: memoryview) -> Iterable[tuple[int, memoryview | int]]:
    """(number, value) of a protobuf message's fields: bytes for lengths, integers for varints. Raises BundleError."""
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
