"""Arrays to bytes and back, without loss and as small as their entropy allows. No torch: this runs on the device.

Matrices of integer codes are coded together, see `packlight.chunks`. Other bytes get a Huffman code where it pays, by
zlib's Huffman-only mode, and floats are stored as float16 where that is exact. docs/measure.md has what other coders
need.

A weights file is a safetensors file: each array is one U8 tensor that holds its coded bytes, and the file's metadata
says dtype, shape and coding of each. docs/reference/bundle.md has the format.
"""

import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from packlight.chunks import MAX_BYTES, PIECE, Spread, decode_chunk, encode_chunk, inflate, read_spread, spread_of
from packlight.errors import BundleError
from packlight.sinusoids import near_sinusoids, sinusoids

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES = ("int8", "uint8", "int32", "int64", "float16", "float32", "bool")
_SMALL = 4096  # smaller matrices are not worth their levels
_CHUNK = 1 << 26  # codes decoded at once
_PREFIX = "ans/"  # of the names of chunks
_CODINGS = ("raw", "huffman", "float16", "planes", "sinusoids")  # of what is coded alone
_CODES = ("ans", "path")  # codings of matrices that lie in a chunk: code by code, and along a trellis
_MOST_COMPUTED = 1 << 26  # bytes of sinusoids: they come from none, so no length of data bounds them
_TABLE, _BLOCK = 1 << 20, 1 << 15  # bytes from which rows are coded in blocks; bytes of a block


def encode(array: Array) -> tuple[bytes, str]:
    """Code one array.

    Args:
        array: any shape; dtype int8, uint8, int32, int64, float16, float32 or bool.

    Returns:
        the bytes, and the coding: 'raw', 'huffman' (int8 and uint8), 'planes' or 'float16' (float32 that float16 holds
        exactly) or 'sinusoids' (a table of them, which takes no bytes).

    Raises:
        BundleError: a dtype that the format does not know.
    """
    pieces, coding = _encode(array)
    return b"".join(pieces), coding


def _encode(array: Array) -> tuple[list[bytes], str]:
    """As `encode`; Huffman-coded bytes in pieces of `block_rows` rows, of which each can be decoded alone."""
    if str(array.dtype) not in _DTYPES:
        raise BundleError(f"Can't store an array of {array.dtype}; the format knows {', '.join(_DTYPES)}.")
    raw = np.ascontiguousarray(array).tobytes()
    if array.dtype == np.float32:
        if near_sinusoids(array, 0):
            return [], "sinusoids"
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.array_equal(half.astype(np.float32), array):
            planes = _planes(half)
            return ([planes], "planes") if len(planes) < half.nbytes else ([half.tobytes()], "float16")
    if array.dtype in (np.int8, np.uint8) and array.size:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        step = block_rows(array.shape) * int(np.prod(array.shape[1:]))
        starts = range(0, len(raw), step)
        ends = [zlib.Z_FULL_FLUSH] * (len(starts) - 1) + [zlib.Z_FINISH]
        pieces = [coder.compress(raw[at : at + step]) + coder.flush(end) for at, end in zip(starts, ends, strict=True)]
        if sum(map(len, pieces)) < 0.98 * len(raw):
            return pieces, "huffman"
    return [raw], "raw"


def _planes(half: Array) -> bytes:
    """The upper bytes of float16 numbers, which are much alike, with a Huffman code of their own, then the lower ones."""
    pairs = np.frombuffer(half.astype("<f2").tobytes(), np.uint8).reshape(-1, 2)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    upper = coder.compress(pairs[:, 1].tobytes()) + coder.flush(zlib.Z_FULL_FLUSH)
    return upper + coder.compress(pairs[:, 0].tobytes()) + coder.flush()


def block_rows(shape: Sequence[int]) -> int:
    """Rows of an array that are Huffman-coded as one block: all but for tables, whose rows are read one by one."""
    size = int(np.prod(shape, dtype=object))
    if len(shape) < 2 or size < _TABLE:
        return int(shape[0]) if shape else 1
    return max(1, _BLOCK * int(shape[0]) // size)


def decode(data: bytes | memoryview, coding: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """Undo `encode`.

    Raises:
        BundleError: unknown coding or dtype, or bytes that do not give exactly that shape.
    """
    return _decode(iter([data]), len(data), {"coding": coding, "dtype": dtype, "shape": list(shape)})


def _decode(pieces: Iterator[bytes | memoryview], coded: int, entry: Mapping[str, Any]) -> Array:
    """The array of an entry of the index, from its coded bytes in pieces."""
    coding, dtype, shape = entry["coding"], str(entry.get("dtype")), tuple(entry["shape"])
    if dtype not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
        raise BundleError(f"The weights file names an array of {dtype} {list(shape)}, which the format does not know.")
    if (coding in ("float16", "planes") and dtype != "float32") or (
        coding == "huffman" and dtype not in ("int8", "uint8")
    ):
        raise BundleError(f"The weights file codes an array of {dtype} as {coding}, which the format does not allow.")
    stored = "float16" if coding in ("float16", "planes") else dtype
    size = int(np.dtype(stored).itemsize * np.prod(shape, dtype=object))
    if size > MAX_BYTES:
        raise BundleError(f"The weights file names an array of {size} bytes; that can't be right.")
    if coding == "huffman":
        return inflate(pieces, coded, size, -15).view(dtype).reshape(shape)
    if coding == "planes":
        upper, lower = inflate(pieces, coded, size, -15).reshape(2, -1)
        return np.stack([lower, upper], 1).view("<f2").reshape(shape).astype(np.float32)
    if coding not in ("raw", "float16", "sinusoids"):
        raise BundleError(f"The weights file uses the coding {coding!r}; this packlight knows {', '.join(_CODINGS)}.")
    if coding == "sinusoids":
        fits = len(shape) == 2 and shape[1] >= 4 and shape[1] % 2 == 0 and size <= _MOST_COMPUTED
        if dtype != "float32" or not fits or coded:
            raise BundleError(f"The weights file names sinusoids of {dtype} {list(shape)}; that can't be right.")
        return sinusoids(*shape)
    if coded != size:
        raise BundleError(f"Coded weights give {coded} bytes where {size} are due; the file is damaged.")
    array = np.frombuffer(b"".join(pieces), dtype=stored).reshape(shape)
    return array.astype(np.float32) if coding == "float16" else array


def coded_bytes(array: Array) -> int:
    """Bytes that `encode` gives: what the array adds to the bundle, but for a few bytes of header."""
    return len(encode(array)[0])


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
    spreads: dict[str, Spread] = {}
    for name in sorted(arrays):
        array = arrays[name]
        index[name] = {"dtype": str(array.dtype), "shape": list(array.shape)}
        if array.dtype == np.int8 and array.ndim == 2 and array.size >= _SMALL:
            chunk = _chunk(chunks, (groups or {}).get(name, "all"), arrays, array.size)
            chunks[chunk].append(name)
            spreads[name] = spread_of(array)
            blobs[name] = spreads[name].bytes()
            index[name].update(coding="path" if spreads[name].path else "ans", chunk=chunk)
        else:
            pieces, index[name]["coding"] = _encode(array)
            blobs[name] = b"".join(pieces)
            if len(pieces) > 1:
                index[name]["blocks"] = {"rows": block_rows(array.shape), "bytes": [len(piece) for piece in pieces]}
    for chunk, names in chunks.items():
        blobs[chunk] = encode_chunk([arrays[n] for n in names], [spreads[n] for n in names])
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


def read_weights(path: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Array]]:
    """Decode a weights file, one array at a time: no other array and no whole chunk is held meanwhile.

    Args:
        path: of the file.
        wanted: names to decode; None for all. Names that the file lacks are passed over.

    Raises:
        BundleError: no weights file, or a damaged one.
    """
    index, places = open_index(path)
    names = [n for n, e in sorted(index.items()) if e["coding"] != "chunk" and (wanted is None or n in wanted)]
    try:
        with path.open("rb") as file:
            for name in names:
                if index[name]["coding"] not in _CODES:
                    start, end = places[name]
                    yield name, _decode(_read(file, start, end), end - start, index[name])
            for chunk in sorted({str(index[n].get("chunk")) for n in names if index[n]["coding"] in _CODES}):
                if index.get(chunk, {}).get("coding") != "chunk":
                    raise BundleError(f"{path}: the chunk {chunk} is missing.")
                inside = [n for n, e in sorted(index.items()) if e["coding"] in _CODES and e.get("chunk") == chunk]
                whole = {n: b"".join(_read(file, *places[n])) for n in (chunk, *inside)}
                members = [(n, read_spread(index[n]["shape"], whole[n], index[n]["coding"] == "path")) for n in inside]
                yield from ((n, array) for n, array in decode_chunk(whole.pop(chunk), members) if n in names)
    except OSError as error:
        raise BundleError(f"{path} is no readable weights file ({error}).") from None


def _read(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from start to end in pieces: mapped into memory, what was read would count until it is closed."""
    file.seek(start)
    for at in range(start, end, PIECE):
        yield file.read(min(PIECE, end - at))


def open_index(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, int]]]:
    """What a weights file says of each array, and where in the file its bytes begin and end.

    Raises:
        BundleError: no weights file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:  # it checks the header: that all places lie in the file, none twice
            index = _index(path, file)
        with path.open("rb") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(begin - 8))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is no readable weights file ({error}).") from None
    places = {name: head[name]["data_offsets"] for name in index}
    return index, {name: (begin + start, begin + end) for name, (start, end) in places.items()}


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
