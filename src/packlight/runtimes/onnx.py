"""Opening a bundle's graphs in ONNX Runtime. No torch: this runs on the device."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import BundleError, RuntimeMissing
from packlight.heap import give_back
from packlight.runtimes.onnx_tables import IDS, fed, row_kernel, unpacked
from packlight.runtimes.onnx_wire import external_names

Array = np.ndarray[Any, np.dtype[Any]]
Values = dict[str, Any]

_ARENA = 64 * 2**20  # bytes that the arena begins with
_LARGEST = 2**28  # bytes of a graph without its weights


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
Rows = Callable[[Array], Array]
"""Ids int64 [n] to the rows of a table, [n, ...]."""


def open_graphs(
    files: Mapping[str, Path],
    weights: Weights,
    threads: int,
    trace: Path | None = None,
    rows: Callable[[list[str]], Mapping[str, Rows]] = lambda names: {},
) -> dict[str, Opened]:
    """Load graphs that share weights, one after the other: no weight is in memory before its first graph is loaded.

    Args:
        files: name -> ONNX file without its weights, see `read_graph`.
        weights: names -> (name, array) of those it has, decoded one by one.
        threads: 0 for all cores.
        trace: a folder that the runtime's profile of each graph goes to; None for none.
        rows: names -> name and what reads single rows, of those whose rows can be read one by one.

    Raises:
        BundleError: a graph that does not load, or weights that it lacks.
        RuntimeMissing: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise RuntimeMissing("This needs ONNX Runtime: pip install onnxruntime") from None

    ort.set_default_logger_severity(3)
    graphs = {name: read_graph(file) for name, file in files.items()}
    needs = {name: external_names(graph) for name, graph in graphs.items()}
    values: dict[str, Any] = {}
    opened = {}
    for number, (name, graph) in enumerate(graphs.items()):
        wanted = [w for w in needs[name] if w not in values]
        values.update(weights(wanted))
        missing = [w for w in wanted if w not in values]
        if missing:
            raise BundleError(
                f"{files[name]} expects {len(missing)} weights that the bundle lacks, first {missing[0]}."
            )
        readers = rows(needs[name])
        graph, tables = fed(graph, readers.__contains__)
        graph, lying = unpacked(graph, values) if row_kernel() else (graph, [])
        options = _options(threads)
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace / name)
        held = {w: ort.OrtValue.ortvalue_from_numpy(values[w]) for w in needs[name]}
        fixed = {w: held.pop(w) for w in lying}
        options.add_external_initializers(list(held), list(held.values()))
        session = _session(graph, options, files[name])
        found = _opened(session, {made: readers[table] for made, table in tables.items()}, fixed)
        opened[name] = found if trace is None else replace(found, trace=session.end_profiling)
        later = {w for other in list(needs)[number + 1 :] for w in needs[other]}
        values = {w: value for w, value in values.items() if w in later}
        del options, held
        give_back()  # the packed copies that the kernels use have replaced what was decoded
    return opened


def read_graph(file: Path) -> bytes:
    """An ONNX graph, packed by gzip where its name ends in .gz. Raises BundleError where that is damaged."""
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        with gzip.open(file, "rb") as opened:
            graph = opened.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BundleError(f"{file} can't be unpacked ({error}); the file is damaged.") from None
    if len(graph) > _LARGEST:
        raise BundleError(f"{file} unpacks to more than {_LARGEST} bytes; that can't be right.")
    return graph


def _session(graph: bytes, options: Any, file: Path) -> Any:
    import onnxruntime as ort

    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except _failures() as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"ONNX Runtime {ort.__version__} can't load {file}: {reason}") from None


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
    # Memory that is kept for the next tensor of its size is kept through all that comes between, so that it counts
    # together with what attention needs: 42 MB for 20 s of audio, 22 without (Whisper tiny.en).
    options.enable_mem_reuse = False
    # Weights stay for good. Among what comes and goes they would leave gaps.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # What lies between integers is computed as the graph says, in floats that every processor rounds alike. Fused, a sum
    # of two ranges takes a multiply-add where there is one, and a value at the border of two bytes falls either way.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if _shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@lru_cache(maxsize=1)
def _shared_arena() -> bool:
    """One arena for all graphs of this process, which run in turn: what one leaves free serves the next.

    It begins as one piece, which costs nothing before it is used: in pieces that grow with what is asked for, a large
    tensor never fits where small ones were. False where the process has registered an arena of its own or can't.
    """
    import onnxruntime as ort

    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    settings = {"arena_extend_strategy": 0, "initial_chunk_size_bytes": _ARENA, "max_dead_bytes_per_chunk": 1 << 16}
    try:
        ort.create_and_register_allocator(kind, ort.OrtArenaCfg(settings))
    except _failures():
        return False
    return True


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph that it can't load: exceptions of its own module, all plain subclasses."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


def _opened(session: Any, rows: Mapping[str, Rows], fixed: Mapping[str, Any]) -> Opened:
    """A session that can be run; `rows` by the name of the input that takes what they read, inputs that are `fixed`."""
    import onnxruntime as ort

    inputs = tuple(i.name for i in session.get_inputs() if i.name not in {**rows, **fixed})
    outputs = tuple(o.name for o in session.get_outputs())

    def run(feed: Mapping[str, Any]) -> Values:
        if rows:
            ids = feed[IDS] if isinstance(feed[IDS], np.ndarray) else feed[IDS].numpy()
            feed = {**feed, **{name: read(ids.reshape(-1)) for name, read in rows.items()}}
        values = {n: ort.OrtValue.ortvalue_from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in feed.items()}
        values.update(fixed)
        return dict(zip(outputs, session.run_with_ort_values(outputs, values), strict=True))

    return Opened(run, inputs, outputs)
