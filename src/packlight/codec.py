"""Arrays to bytes and back, without loss and as small as their entropy allows. No torch: this runs on the device.

Matrices of integer codes have a spread that differs by row and by column, and little structure beside; rows of a table
of embeddings, turned so that a row is a dimension, also have a mean. Each row has a centre, which is taken off, and
each row and column a level, a quarter of an octave of what is left's root mean square; the sum of both levels says
which of some fifty tables of probabilities a code is coded with, by asymmetric numeral systems (`packlight.rans`). Other bytes get a Huffman code
where it pays, by zlib's Huffman-only mode, and floats are stored as float16 where that is exact. docs/measure.md has
what other coders need.

A weights file is a safetensors file: each array is one U8 tensor that holds its coded bytes, and the file's metadata
says dtype, shape and coding of each. docs/reference/bundle.md has the format.
"""

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from packlight import rans
from packlight.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES = ("int8", "uint8", "int32", "int64", "float16", "float32", "bool")
_TABLES, _OFFSET, _FLOOR = 56, 16, 0.01  # of probabilities; the table of level 0; keeps rows of zeros finite
_WIDEST = 1 << 14  # different codes that are told apart when a rate is estimated
_LEVEL_BITS = 2.5  # that a level takes in the file, about
_SMALL = 4096  # smaller matrices are not worth their levels
_CHUNK = 1 << 26  # codes decoded at once
_PREFIX = "ans/"  # of the names of chunks
_MAX_BYTES = 16 * 2**30  # a header that asks for more than this is damaged or hostile


def encode(array: Array) -> tuple[bytes, str]:
    """Code one array.

    Args:
        array: any shape; dtype int8, uint8, int32, int64, float16, float32 or bool.

    Returns:
        the bytes, and the coding: 'raw', 'huffman' (int8 and uint8) or 'float16' (float32 that float16 holds exactly).

    Raises:
        BundleError: a dtype that the format does not know.
    """
    if str(array.dtype) not in _DTYPES:
        raise BundleError(f"Can't store an array of {array.dtype}; the format knows {', '.join(_DTYPES)}.")
    raw = np.ascontiguousarray(array).tobytes()
    if array.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.array_equal(half.astype(np.float32), array):
            return half.tobytes(), "float16"
    if array.dtype in (np.int8, np.uint8) and array.size:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        coded = coder.compress(raw) + coder.flush()
        if len(coded) < 0.98 * len(raw):
            return coded, "huffman"
    return raw, "raw"


def decode(data: bytes | memoryview, coding: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """Undo `encode`.

    Raises:
        BundleError: unknown coding or dtype, or bytes that do not give exactly that shape.
    """
    if dtype not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
        raise BundleError(f"The weights file names an array of {dtype} {list(shape)}, which the format does not know.")
    if (coding == "float16" and dtype != "float32") or (coding == "huffman" and dtype not in ("int8", "uint8")):
        raise BundleError(f"The weights file codes an array of {dtype} as {coding}, which the format does not allow.")
    stored = "float16" if coding == "float16" else dtype
    size = int(np.dtype(stored).itemsize * np.prod(shape, dtype=object))
    if size > _MAX_BYTES:
        raise BundleError(f"The weights file names an array of {size} bytes; that can't be right.")
    if coding == "huffman":
        data = _inflate(data, size, -15)
    elif coding not in ("raw", "float16"):
        raise BundleError(f"The weights file uses the coding {coding!r}; this packlight knows raw, huffman, float16.")
    if len(data) != size:
        raise BundleError(f"Coded weights give {len(data)} bytes where {size} are due; the file is damaged.")
    array = np.frombuffer(data, dtype=stored).reshape(shape)
    return array.astype(np.float32) if coding == "float16" else array


def coded_bytes(array: Array) -> int:
    """Bytes that `encode` gives: what the array adds to the bundle, but for a few bytes of header."""
    return len(encode(array)[0])


def entropy(codes: Array) -> float:
    """Order-0 entropy of integer codes in bits per code: the rate that an ideal coder reaches."""
    if codes.size == 0:
        return 0.0
    counts = np.bincount(codes.reshape(-1).view(np.uint8)) if codes.dtype.itemsize == 1 else _counts(codes)
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum())


def _counts(codes: Array) -> Array:
    return np.unique(codes, return_counts=True)[1]


def shape_of(codes: Array) -> tuple[Array, Array, Array]:
    """Centres of the rows of a matrix of codes, int8 [rows], and levels of its rows and columns, int8 [rows], [columns].

    The sums of the levels name the tables.
    """
    centres = np.rint(codes.mean(1, dtype=np.float64)).clip(-128, 127).astype(np.int8)
    square = np.square(codes - centres[:, None].astype(np.float32), dtype=np.float32)
    rows, columns = square.mean(1) + _FLOOR, square.mean(0) + _FLOOR
    first = np.rint(2 * np.log2(rows)).clip(-64, 63)
    second = np.rint(2 * np.log2(columns / columns.mean())).clip(-64, 63)
    return centres, first.astype(np.int8), second.astype(np.int8)


def tables_of(rows: Array, columns: Array) -> Array:
    """The table of every code, uint8 [rows, columns]."""
    index = rows[:, None].astype(np.int16) + columns[None].astype(np.int16) + _OFFSET
    return index.clip(0, _TABLES - 1).astype(np.uint8)


def coded_rate(codes: Array) -> float:
    """Bits per code that a matrix of codes takes in a weights file of which it is a small part."""
    if codes.ndim != 2 or not codes.size:
        return entropy(codes)
    centres, rows, columns = shape_of(codes)
    left = (codes - centres[:, None]).reshape(-1).astype(np.int32)
    low = int(left.min())
    width = min(int(left.max()) - low + 1, _WIDEST)
    symbols = (left - low) % width
    tables = tables_of(rows, columns).reshape(-1).astype(np.int32)
    counts = np.bincount(tables * width + symbols, minlength=_TABLES * width)
    counts = counts.reshape(_TABLES, -1).astype(np.float64)
    used = counts > 0
    total = np.broadcast_to(counts.sum(1, keepdims=True), counts.shape)
    bits = float(-(counts[used] * np.log2(counts[used] / total[used])).sum())
    return (bits + _LEVEL_BITS * (2 * len(codes) + codes.shape[1])) / codes.size


def write_weights(path: Path, arrays: Mapping[str, Array], groups: Mapping[str, str] | None = None) -> None:
    """Write a weights file: the same arrays give the same bytes.

    Args:
        path: of the file.
        arrays: by name.
        groups: name -> label of what is decoded together; None for one group.
    """
    from safetensors.numpy import save

    blobs: dict[str, bytes] = {}
    index: dict[str, Any] = {}
    chunks: dict[str, list[str]] = {}
    for name in sorted(arrays):
        array = arrays[name]
        index[name] = {"dtype": str(array.dtype), "shape": list(array.shape)}
        if array.dtype == np.int8 and array.ndim == 2 and array.size >= _SMALL:
            chunk = _chunk(chunks, (groups or {}).get(name, "all"), arrays, array.size)
            chunks[chunk].append(name)
            blobs[name] = zlib.compress(b"".join(part.tobytes() for part in shape_of(array)), 9)
            index[name].update(coding="ans", chunk=chunk)
        else:
            blobs[name], index[name]["coding"] = encode(array)
    for chunk, names in chunks.items():
        blobs[chunk] = _encode_chunk([arrays[n] for n in names])
        index[chunk] = {"dtype": "uint8", "shape": [len(blobs[chunk])], "coding": "chunk"}
    stored = {name: np.frombuffer(data, np.uint8) for name, data in blobs.items()}
    path.write_bytes(save(stored, metadata={"packlight": json.dumps(index, sort_keys=True)}))


def _chunk(chunks: dict[str, list[str]], label: str, arrays: Mapping[str, Array], size: int) -> str:
    """The name of a chunk of that group that has room, made when there is none."""
    number = 0
    while (name := f"{_PREFIX}{label}/{number}") in chunks:
        if sum(arrays[n].size for n in chunks[name]) + size <= _CHUNK:
            return name
        number += 1
    chunks[name] = []
    return name


def _encode_chunk(arrays: list[Array]) -> bytes:
    shapes = [shape_of(a) for a in arrays]
    tables = np.concatenate([tables_of(rows, columns).reshape(-1) for _, rows, columns in shapes])
    centred = [a - c[:, None] for a, (c, _, _) in zip(arrays, shapes, strict=True)]  # modulo 256, and back likewise
    symbols = np.concatenate([a.reshape(-1) for a in centred]).view(np.uint8)
    counts = np.bincount(tables.astype(np.int32) * 256 + symbols, minlength=_TABLES * 256).reshape(_TABLES, 256)
    freq = rans.frequencies(counts)
    head = zlib.compress(freq.astype("<u2").tobytes(), 9)
    return len(head).to_bytes(4, "little") + head + rans.encode(symbols, tables, freq)


def _decode_chunk(data: memoryview, members: list[tuple[str, tuple[int, ...], memoryview]]) -> dict[str, Array]:
    """The arrays of a chunk: (name, shape, coded centres and levels) in the order in which they were written."""
    found, at = {}, 0
    shapes = [_read_shape(shape, coded) for _, shape, coded in members]
    tables = np.concatenate([tables_of(rows, columns).reshape(-1) for _, rows, columns in shapes])
    size = int.from_bytes(data[:4], "little")
    freq = np.frombuffer(_inflate(data[4 : 4 + size], 512 * _TABLES, 15), "<u2").astype(np.int64).reshape(_TABLES, 256)
    if (freq.sum(1) != 1 << rans.BITS).any():
        raise BundleError("The tables of the coded weights are damaged.")
    codes = rans.decode(data[4 + size :], tables, freq).view(np.int8)
    for (name, shape, _), (centres, _, _) in zip(members, shapes, strict=True):
        count = shape[0] * shape[1]
        found[name] = codes[at : at + count].reshape(shape)
        found[name] += centres[:, None]
        at += count
    return found


def _read_shape(shape: tuple[int, ...], coded: memoryview) -> tuple[Array, Array, Array]:
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] > _MAX_BYTES:
        raise BundleError(f"The weights file names a coded matrix of shape {list(shape)}; that can't be right.")
    rows, columns = shape
    parts = np.frombuffer(_inflate(coded, 2 * rows + columns, 15), np.int8)
    return parts[:rows], parts[rows : 2 * rows], parts[2 * rows :]


def _inflate(data: memoryview | bytes, size: int, window: int) -> bytes:
    """Undo zlib, into exactly that many bytes. Raises BundleError."""
    coder = zlib.decompressobj(window)
    try:
        raw = coder.decompress(data, size + 1)
    except zlib.error as error:
        raise BundleError(f"Coded weights are damaged ({error}).") from None
    if len(raw) != size or not coder.eof or coder.unused_data:
        raise BundleError("Coded weights end too early or too late; the file is damaged.")
    return raw


def read_weights(path: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Array]]:
    """Decode a weights file, a chunk or an array at a time.

    Args:
        path: of the file.
        wanted: names to decode; None for all. Names that the file lacks are passed over.

    Raises:
        BundleError: no weights file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            index = _index(path, file)
            names = [n for n, e in sorted(index.items()) if e["coding"] != "chunk" and (wanted is None or n in wanted)]
            for name in names:
                entry = index[name]
                if entry["coding"] != "ans":
                    data = file.get_tensor(name).data
                    yield name, decode(data, entry["coding"], str(entry.get("dtype")), tuple(entry["shape"]))
            for chunk in sorted({str(index[n].get("chunk")) for n in names if index[n]["coding"] == "ans"}):
                if index.get(chunk, {}).get("coding") != "chunk":
                    raise BundleError(f"{path}: the chunk {chunk} is missing.")
                inside = [n for n, e in sorted(index.items()) if e["coding"] == "ans" and e.get("chunk") == chunk]
                members = [(n, tuple(index[n]["shape"]), file.get_tensor(n).data) for n in inside]
                found = _decode_chunk(file.get_tensor(chunk).data, members)
                yield from ((n, found[n]) for n in inside if n in names)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is no readable weights file ({error}).") from None


def _index(path: Path, file: Any) -> dict[str, dict[str, Any]]:
    index = json.loads((file.metadata() or {}).get("packlight", "null"))
    names = list(file.keys())
    if not isinstance(index, dict) or sorted(index) != sorted(names):
        raise BundleError(f"{path} has no index of its arrays, or one that does not match them.")
    for name, entry in index.items():
        well = isinstance(entry, dict) and isinstance(entry.get("shape"), list) and isinstance(entry.get("coding"), str)
        if not well or not all(isinstance(n, int) for n in entry["shape"]) or file.get_slice(name).get_dtype() != "U8":
            raise BundleError(f"{path}: the array {name} is not stored as bytes.")
    return index
