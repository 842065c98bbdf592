"""Opening a bundle's graphs in ONNX Runtime. No torch: this runs on the device."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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
        trace: ends the runtime's own profiling and gives the file that it wrote; None where it was not asked for.
    """

    run: Callable[[Mapping[str, Any]], Values]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trace: Callable[[], str] | None = None


Weights = Callable[[list[str]], Iterable[tuple[str, Array]]]


def open_graphs(
    files: Mapping[str, Path], weights: Weights, threads: int, trace: Path | None = None
) -> dict[str, Opened]:
    """Load graphs that share weights, one after the other: no weight is in memory before its first graph is loaded.

    Args:
        files: name -> ONNX file without its weights.
        weights: names -> (name, array) of those it has, decoded one by one.
        threads: 0 for all cores.
        trace: a folder that the runtime's profile of each graph goes to; None for none.

    Raises:
        BundleError: a graph that does not load, or weights that it lacks.
        RuntimeMissing: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise RuntimeMissing("This needs ONNX Runtime: pip install onnxruntime") from None

    ort.set_default_logger_severity(3)
    graphs = {name: file.read_bytes() for name, file in files.items()}
    needs = {name: external_names(graph) for name, graph in graphs.items()}
    values: dict[str, Any] = {}
    opened = {}
    for number, (name, graph) in enumerate(graphs.items()):
        wanted = [w for w in needs[name] if w not in values]
        values.update((w, ort.OrtValue.ortvalue_from_numpy(array)) for w, array in weights(wanted))
        missing = [w for w in wanted if w not in values]
        if missing:
            raise BundleError(
                f"{files[name]} expects {len(missing)} weights that the bundle lacks, first {missing[0]}."
            )
        options = _options(threads)
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace / name)
        options.add_external_initializers(needs[name], [values[w] for w in needs[name]])
        try:
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except _failures() as error:
            raise BundleError(
                f"ONNX Runtime {ort.__version__} can't load {files[name]}: {str(error).splitlines()[0]}"
            ) from None
        opened[name] = _opened(session) if trace is None else replace(_opened(session), trace=session.end_profiling)
        later = {w for other in list(needs)[number + 1 :] for w in needs[other]}
        values = {w: value for w, value in values.items() if w in later}
        del options
        _give_back()
    return opened


def _options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Each graph has its own threads, and one that spins takes a core from the graph that runs: 164 ms an answer without,
    # 202 ms with it (Whisper tiny.en, two threads on two cores that others used a little), 299 and 685 ms on busy ones.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Planned memory is one block per run, as large as the sum of what lives together; freed pieces are used again.
    options.enable_mem_pattern = False
    return options


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph that it can't load: exceptions of its own module, all plain subclasses."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


def _give_back() -> None:
    """Return freed memory to the system: the packed copies that the kernels use have replaced what was decoded."""
    with contextlib.suppress(OSError, AttributeError):  # only the GNU C library has it, and only it needs it
        ctypes.CDLL(None).malloc_trim(0)


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
    for field, value in fields(memoryview(graph)):
        if field != 7 or not isinstance(value, memoryview):
            continue
        for inner, tensor in fields(value):
            if inner != 5 or not isinstance(tensor, memoryview):
                continue
            parts = dict(fields(tensor))
            if parts.get(14) == 1:
                names.append(bytes(parts[8]).decode())
    return names


def fields(data: memoryview) -> Iterable[tuple[int, memoryview | int]]:
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
