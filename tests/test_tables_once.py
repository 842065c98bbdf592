"""A table that is looked up and multiplied is in memory once: the same numbers, from a graph with one copy of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, load_from_string
from onnx.helper import make_node, make_tensor, make_tensor_value_info

from packlight.codec import block_rows, read_weights, write_weights
from packlight.errors import BundleError
from packlight.rows import rows_of
from packlight.runtimes import onnx as runtime
from packlight.runtimes.onnx import open_graphs
from packlight.runtimes.onnx_tables import fed, unpacked
from packlight.runtimes.onnx_wire import changed, external_names, parts_of

WIDTH, TOKENS, GROUP = 64, 50, 32
RNG = np.random.default_rng(5)
CODES = RNG.integers(-63, 64, (WIDTH, TOKENS)).astype(np.int8)
PACKED = RNG.integers(0, 256, (TOKENS, WIDTH // GROUP, GROUP)).astype(np.uint8)
SCALE = RNG.random(TOKENS * WIDTH // GROUP).astype(np.float32)


def graph_of(nodes: list[Any], arrays: dict[str, np.ndarray]) -> bytes:
    """From `input_ids` [1, T] and `x` [1, WIDTH] to `rows` and `y`; the first of the arrays lies outside the file."""
    tensors = []
    for name, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensors.append(make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
    table = tensors[0]
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("offset", "0"), ("length", str(next(iter(arrays.values())).nbytes))):
        table.external_data.add(key=key, value=value)
    inputs = [
        make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
        make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH]),
    ]
    outputs = [make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("rows", "y")]
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())


def of_codes() -> bytes:
    return graph_of(
        [
            make_node("Gather", ["table", "input_ids"], ["picked"], axis=1),
            make_node("Cast", ["picked"], ["rows"], to=TensorProto.FLOAT),
            make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
            make_node("MatMulInteger", ["q", "table", "zero"], ["product"]),
            make_node("Cast", ["product"], ["float"], to=TensorProto.FLOAT),
            make_node("Mul", ["float", "step"], ["y"]),
        ],
        {"table": CODES},
    )


def of_groups() -> bytes:
    sizes = {"K": WIDTH, "N": TOKENS, "bits": 8, "block_size": GROUP, "accuracy_level": 4}
    return graph_of(
        [
            make_node("Reshape", ["input_ids", "flat"], ["ids"]),
            make_node("Gather", ["table", "ids"], ["picked"]),
            make_node("Cast", ["picked"], ["rows"], to=TensorProto.FLOAT),
            make_node("MatMulNBits", ["x", "table", "scale"], ["y"], domain="com.microsoft", **sizes),
        ],
        {"table": PACKED, "flat": np.array([-1], np.int64), "scale": SCALE},
    )


def answers(tmp_path: Path, graph: bytes, table: np.ndarray, rows: Callable[[list[str]], Any]) -> list[np.ndarray]:
    file = tmp_path / "g.onnx"
    file.write_bytes(graph)
    opened = open_graphs({"g": file}, lambda names: [(n, table) for n in names], 1, rows=rows)["g"]
    assert sorted(opened.inputs) == ["input_ids", "x"]
    found = []
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float32)
        out = opened.run({"input_ids": np.array([[3, TOKENS - 1, 3]]), "x": x})
        found += [out["rows"].numpy().copy(), out["y"].numpy().copy()]
    return found


def test_codes_that_are_looked_up_are_multiplied_as_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, names = unpacked(of_codes(), {"table": CODES})
    assert names == ["table"] and external_names(graph) == []
    product = next(n for n in parts_of(graph)[0] if n.operator == "MatMulInteger")
    assert product.inputs == ("q", "table")  # no zero point, and no initializer: what a kernel would pack
    found = []
    for once in (False, True):
        monkeypatch.setattr(runtime, "row_kernel", lambda once=once: once)
        found.append(answers(tmp_path, of_codes(), CODES, lambda names: {}))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_codes_that_are_only_multiplied_stay_packed() -> None:
    graph = changed(of_codes(), lambda node: () if node.operator == "Gather" else None)
    assert unpacked(graph, {"table": CODES}) == (graph, [])


def test_rows_of_groups_are_an_input(tmp_path: Path) -> None:
    graph, rows = fed(of_groups(), {"table"}.__contains__)
    assert rows == {"picked": "table"}
    assert "picked" in [i.name for i in load_from_string(graph).graph.input]
    assert "Gather" not in [n.operator for n in parts_of(graph)[0]]
    assert fed(of_groups(), set[str]().__contains__) == (of_groups(), {})
    asked: list[int] = []

    def read(ids: np.ndarray) -> np.ndarray:
        asked.extend(ids.tolist())
        return PACKED[ids]

    whole = answers(tmp_path, of_groups(), PACKED, lambda names: {})
    one_by_one = answers(tmp_path, of_groups(), PACKED, lambda names: {"table": read})
    assert all(np.array_equal(a, b) for a, b in zip(whole, one_by_one, strict=True))
    assert asked == [3, TOKENS - 1, 3] * 5


def test_no_buffer_is_kept_for_the_next_tensor_of_its_size() -> None:
    options = runtime._options(1)
    assert not options.enable_mem_reuse
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.use_env_allocators") == "1"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A weights file with a table of two blocks and more, and the table."""
    table = np.random.default_rng(6).normal(128, 9, (9001, 6, 32)).clip(0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("rows") / "w"
    write_weights(path, {"table": table, "small": table[:50], "floats": np.arange(9, dtype=np.float32)})
    return path, table


def test_rows_are_those_of_the_table(tables: tuple[Path, np.ndarray]) -> None:
    path, table = tables
    readers = rows_of(path, ["table", "small", "floats", "nothing"])
    assert list(readers) == ["table"]  # the others are had whole
    step = block_rows(table.shape)
    ids = np.array([0, step - 1, step, 9000, 17, -1, 0])
    assert np.array_equal(readers["table"](ids), table[ids])
    assert readers["table"](ids[:0]).shape == (0, 6, 32)
    with pytest.raises(BundleError, match="has 9001 rows; row 9001"):
        readers["table"](np.array([9001]))
    assert np.array_equal(dict(read_weights(path, ["table"]))["table"], table)


def test_blocks_cost_next_to_nothing(tables: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    path, table = tables
    monkeypatch.setattr("packlight.codec._TABLE", table.size + 1)
    write_weights(path.with_name("whole"), {"table": table, "small": table[:50], "floats": np.arange(9, dtype="f4")})
    assert path.stat().st_size < 1.005 * path.with_name("whole").stat().st_size
    assert rows_of(path.with_name("whole"), ["table"]) == {}


def test_damaged_rows_are_refused(tables: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    data = bytearray(tables[0].read_bytes())
    data[-20_000:] = bytes(20_000)  # of the last block of the table, the last of the file
    (tmp_path / "w").write_bytes(data)
    reader = rows_of(tmp_path / "w", ["table"])["table"]
    with pytest.raises(BundleError, match="table is damaged"):
        reader(np.array([9000]))
    step = str(block_rows(tables[1].shape)).encode()
    (tmp_path / "w").write_bytes(
        tables[0].read_bytes().replace(b'rows\\": ' + step, b'rows\\": ' + b"9" * len(step), 1)
    )
    with pytest.raises(BundleError, match="do not lie where they should"):
        rows_of(tmp_path / "w", ["table"])
