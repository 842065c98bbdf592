"""Arrays to bytes and back: without loss, near the entropy, and refused when damaged or hostile."""

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from packlight.chunks import coded_rate, entropy
from packlight.codec import coded_bytes, decode, encode, read_weights, write_weights
from packlight.errors import BundleError

DTYPES = ("int8", "uint8", "int32", "int64", "float16", "float32", "bool")


def peaked_codes(n: int = 100_000, width: float = 4.0) -> np.ndarray:
    return np.round(np.random.default_rng(0).normal(0, width, n)).clip(-63, 63).astype(np.int8)


def halves(n: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).lognormal(0, 0.3, n).astype(np.float16).astype(np.float32)


def test_the_upper_bytes_of_halves_get_a_code_of_their_own() -> None:
    data, coding = encode(halves())
    assert coding == "planes" and len(data) < 1450  # of 2000; all bytes together would take 1800
    assert np.array_equal(decode(data, coding, "float32", (1000,)), halves())


def write_raw(path: Path, blobs: dict[str, np.ndarray], index: object) -> None:
    from safetensors.numpy import save_file

    save_file(blobs, path, metadata={"packlight": json.dumps(index)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (7,), (31, 5, 40)])
def test_decode_gives_the_array_back(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(1).normal(0, 9, shape)).astype(dtype)
    data, coding = encode(array)
    back = decode(data, coding, dtype, shape)
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_decode_gives_the_array_back_when_it_is_not_contiguous() -> None:
    array = peaked_codes(600).reshape(20, 30).T
    data, coding = encode(array)
    assert np.array_equal(decode(data, coding, "int8", (30, 20)), array)


def test_encode_halves_floats_only_when_float16_holds_them() -> None:
    exact = np.array([0.5, -0.0, 65504.0, np.inf], dtype=np.float32)
    assert encode(exact)[1] == "float16" and coded_bytes(exact) == 8
    for value in (0.1, 1e6, 1e-9, np.nan):
        array = np.array([value], dtype=np.float32)
        data, coding = encode(array)
        assert coding == "raw"
        assert decode(data, coding, "float32", (1,)).tobytes() == array.tobytes()


def test_entropy_is_exact_for_known_histograms() -> None:
    assert entropy(np.array([], dtype=np.int8)) == 0
    assert entropy(np.full(9, -3, dtype=np.int8)) == 0
    assert entropy(np.arange(-128, 128).astype(np.int8)) == pytest.approx(8)
    assert entropy(np.array([1, 1, 2, 900], dtype=np.int32)) == pytest.approx(1.5)


@pytest.mark.parametrize("width", [1.5, 4.0, 15.0])
def test_coded_size_is_close_to_the_entropy(width: float) -> None:
    codes = peaked_codes(200_000, width)
    ideal = entropy(codes) * codes.size / 8
    assert 0.999 * ideal <= coded_bytes(codes) <= 1.05 * ideal


def test_encode_stores_raw_when_coding_gains_nothing() -> None:
    noise = np.random.default_rng(2).integers(0, 256, 10_000).astype(np.uint8)
    assert encode(noise) == (noise.tobytes(), "raw")


def test_encode_refuses_a_dtype_outside_the_format() -> None:
    with pytest.raises(BundleError, match="float64"):
        encode(np.zeros(3))


def test_decode_refuses_a_decompression_bomb() -> None:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(50_000_000)) + coder.flush()
    assert len(bomb) < 100_000
    with pytest.raises(BundleError, match="damaged"):
        decode(bomb, "huffman", "int8", (1000,))


def test_decode_refuses_a_header_that_asks_for_too_much() -> None:
    with pytest.raises(BundleError, match="can't be right"):
        decode(b"", "raw", "float32", (2**31, 2**31))


@pytest.mark.parametrize("coding", ["raw", "huffman", "float16", "planes"])
def test_decode_refuses_truncated_bytes(coding: str) -> None:
    array = {
        "raw": np.arange(100), "huffman": peaked_codes(1000), "float16": np.ones(9, dtype=np.float32),
        "planes": halves(),
    }[coding]  # fmt: skip
    data, found = encode(array)
    assert found == coding
    with pytest.raises(BundleError):
        decode(data[: len(data) // 2], coding, str(array.dtype), array.shape)


def test_decode_refuses_longer_bytes() -> None:
    with pytest.raises(BundleError, match="where 4 are due"):
        decode(bytes(5), "raw", "int8", (4,))


def test_decode_refuses_garbage_in_place_of_a_code() -> None:
    with pytest.raises(BundleError, match="damaged"):
        decode(b"\xff" * 40, "huffman", "int8", (40,))


@pytest.mark.parametrize(
    ("coding", "dtype", "shape"),
    [("lzma", "int8", (4,)), ("raw", "object", (4,)), ("raw", "float64", (4,)), ("raw", "int8", (-4,))],
)
def test_decode_refuses_what_the_format_does_not_know(coding: str, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError):
        decode(bytes(4), coding, dtype, shape)


def test_weights_file_gives_the_arrays_back(tmp_path: Path) -> None:
    arrays = {f"a.{d}": np.asarray(np.random.default_rng(3).normal(0, 5, (4, 9))).astype(d) for d in DTYPES}
    arrays["empty"] = np.zeros((0, 3), dtype=np.float32)
    arrays["codes"] = peaked_codes(5000)
    write_weights(tmp_path / "w", arrays)
    back = dict(read_weights(tmp_path / "w"))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array), name


def test_weights_file_has_the_same_bytes_for_the_same_arrays_in_any_order(tmp_path: Path) -> None:
    arrays = {"b": peaked_codes(500), "a": np.ones((2, 2), dtype=np.float32), "c": np.arange(4)}
    write_weights(tmp_path / "one", arrays)
    write_weights(tmp_path / "two", dict(reversed(arrays.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_weights_file_is_refused_when_cut_short_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "w"
    with pytest.raises(BundleError):
        list(read_weights(path))
    write_weights(path, {"codes": peaked_codes(5000)})
    whole = path.read_bytes()
    for keep in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(BundleError):
            list(read_weights(path))


def test_weights_file_is_refused_when_its_index_does_not_match(tmp_path: Path) -> None:
    entry = {"dtype": "int8", "shape": [4], "coding": "raw"}
    blob = np.zeros(4, dtype=np.uint8)
    for index in (None, [], {}, {"other": entry}, {"a": entry, "b": entry}, {"a": 3}, {"a": {}}):
        write_raw(tmp_path / "w", {"a": blob}, index)
        with pytest.raises(BundleError):
            list(read_weights(tmp_path / "w"))
    write_raw(tmp_path / "w", {"a": blob.astype(np.float32)}, {"a": entry})
    with pytest.raises(BundleError, match="not stored as bytes"):
        list(read_weights(tmp_path / "w"))
    write_raw(tmp_path / "w", {"a": blob}, {"a": entry})
    assert [name for name, _ in read_weights(tmp_path / "w")] == ["a"]


def matrix(rows: int = 1200, columns: int = 1500, seed: int = 3) -> np.ndarray:
    """Codes whose spread differs by row and by column, a factor of about 2 each way."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.uniform(-1, 1, (rows, 1))) * np.exp2(rng.uniform(-1, 1, (1, columns)))
    return np.rint(rng.normal(0, 3, (rows, columns)) * spread).clip(-63, 63).astype(np.int8)


def bits_of(tmp_path: Path, codes: np.ndarray) -> float:
    write_weights(tmp_path / "w", {"w": codes})
    assert np.array_equal(dict(read_weights(tmp_path / "w"))["w"], codes)
    return 8 * (tmp_path / "w").stat().st_size / codes.size


def test_matrices_are_coded_below_their_plain_entropy(tmp_path: Path) -> None:
    codes = matrix()
    assert bits_of(tmp_path, codes) < entropy(codes) - 0.1
    assert bits_of(tmp_path, codes) == pytest.approx(coded_rate(codes), abs=0.15)  # states and tables of a small file


def test_a_mean_of_each_row_costs_nothing(tmp_path: Path) -> None:
    codes = matrix().clip(-30, 30)
    moved = codes + np.random.default_rng(4).integers(-90, 90, (len(codes), 1)).astype(np.int8)
    assert moved.dtype == np.int8
    assert bits_of(tmp_path, moved) < bits_of(tmp_path, codes) + 0.03
    assert coded_rate(moved) < coded_rate(codes) + 0.03
    assert entropy(moved) > entropy(codes) + 1


def test_groups_are_decoded_each_for_itself(tmp_path: Path) -> None:
    arrays = {"a": matrix(seed=1), "b": matrix(seed=2), "c": matrix(seed=3), "d": np.arange(9, dtype=np.float32)}
    write_weights(tmp_path / "w", arrays, {"a": "encoder", "b": "decoder", "c": "encoder"})
    with safe_open(tmp_path / "w", "numpy") as file:
        chunks = [n for n in file.keys() if n.startswith("ans/")]  # noqa: SIM118 - no mapping
    assert sorted(chunks) == ["ans/decoder/0", "ans/encoder/0"]
    for wanted in (["a"], ["b", "d"], ["c", "a", "nothing"]):
        found = dict(read_weights(tmp_path / "w", wanted))
        assert sorted(found) == sorted(set(wanted) & set(arrays))
        assert all(np.array_equal(found[n], arrays[n]) for n in found)


def test_an_array_keeps_no_other_in_memory(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", {"a": matrix(seed=1), "b": matrix(seed=2)})
    for _, array in read_weights(tmp_path / "w"):
        owner = array if array.base is None else array.base
        assert owner.nbytes == array.nbytes  # not a view of the chunk that both were coded in


def test_a_chunk_is_decoded_without_its_tables(tmp_path: Path) -> None:
    codes = matrix(3000, 2000)
    write_weights(tmp_path / "w", {"w": codes})
    tracemalloc.start()
    back = dict(read_weights(tmp_path / "w"))["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(back, codes)
    # The codes, the coded bytes twice while they are joined, tables of probabilities and pieces of the stream.
    assert peak < codes.nbytes + 2 * (tmp_path / "w").stat().st_size + 8_000_000


def test_a_damaged_chunk_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", {"w": matrix()})
    data = bytearray((tmp_path / "w").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        dict(read_weights(tmp_path / "w"))
