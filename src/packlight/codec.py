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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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
_TABLE, _BLOCK = 1 << 20, 1 << 15  # bytes from which rows are coded in blocks; bytes of a block
_PIECE = 1 << 18  # bytes, or codes, handled at once
_EXPANDS = 1032  # bytes that zlib makes of one at most
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
    pieces, coding = _encode(array)
    return b"".join(pieces), coding


def _encode(array: Array) -> tuple[list[bytes], str]:
    """As `encode`; Huffman-coded bytes in pieces of `block_rows` rows, of which each can be decoded alone."""
    if str(array.dtype) not in _DTYPES:
        raise BundleError(f"Can't store an array of {array.dtype}; the format knows {', '.join(_DTYPES)}.")
    raw = np.ascontiguousarray(array).tobytes()
    if array.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.array_equal(half.astype(np.float32), array):
            return [half.tobytes()], "float16"
    if array.dtype in (np.int8, np.uint8) and array.size:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        step = block_rows(array.shape) * int(np.prod(array.shape[1:]))
        starts = range(0, len(raw), step)
        ends = [zlib.Z_FULL_FLUSH] * (len(starts) - 1) + [zlib.Z_FINISH]
        pieces = [coder.compress(raw[at : at + step]) + coder.flush(end) for at, end in zip(starts, ends, strict=True)]
        if sum(map(len, pieces)) < 0.98 * len(raw):
            return pieces, "huffman"
    return [raw], "raw"


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
    if (coding == "float16" and dtype != "float32") or (coding == "huffman" and dtype not in ("int8", "uint8")):
        raise BundleError(f"The weights file codes an array of {dtype} as {coding}, which the format does not allow.")
    stored = "float16" if coding == "float16" else dtype
    size = int(np.dtype(stored).itemsize * np.prod(shape, dtype=object))
    if size > _MAX_BYTES:
        raise BundleError(f"The weights file names an array of {size} bytes; that can't be right.")
    if coding == "huffman":
        return _inflate(pieces, coded, size, -15).view(dtype).reshape(shape)
    if coding not in ("raw", "float16"):
        raise BundleError(f"The weights file uses the coding {coding!r}; this packlight knows raw, huffman, float16.")
    if coded != size:
        raise BundleError(f"Coded weights give {coded} bytes where {size} are due; the file is damaged.")
    array = np.frombuffer(b"".join(pieces), dtype=stored).reshape(shape)
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
            pieces, index[name]["coding"] = _encode(array)
            blobs[name] = b"".join(pieces)
            if len(pieces) > 1:
                index[name]["blocks"] = {"rows": block_rows(array.shape), "bytes": [len(piece) for piece in pieces]}
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


def _decode_chunk(data: bytes, members: list[tuple[str, Array, Array, Array]]) -> Iterator[tuple[str, Array]]:
    """The arrays of a chunk one after the other: (name, centres, levels of rows and of columns) in the order of writing.

    Each gets memory of its own: what a runtime keeps of one array would else keep all of them.
    """
    size = int.from_bytes(data[:4], "little")
    freq = _inflate([data[4 : 4 + size]], size, 512 * _TABLES, 15).view("<u2").astype(np.int64)
    freq = freq.reshape(_TABLES, 256)
    if (freq.sum(1) != 1 << rans.BITS).any():
        raise BundleError("The tables of the coded weights are damaged.")
    tables = (piece for _, _, rows, columns in members for piece in _table_pieces(rows, columns))
    count = sum(len(rows) * len(columns) for _, _, rows, columns in members)
    pieces = rans.decoded(memoryview(data)[4 + size :], tables, count, freq)
    rest = np.empty(0, np.uint8)
    for name, centres, rows, columns in members:
        codes, at = np.empty(len(rows) * len(columns), np.int8), 0
        while at < len(codes):
            rest = rest if len(rest) else next(pieces)
            taken = rest[: len(codes) - at]
            codes[at : at + len(taken)] = taken.view(np.int8)
            at, rest = at + len(taken), rest[len(taken) :]
        array: Array = codes.reshape(len(rows), len(columns))
        array += centres[:, None]
        yield name, array
    for _ in pieces:  # none is left; that they end as they should is said at their end
        pass


def _table_pieces(rows: Array, columns: Array) -> Iterator[Array]:
    step = max(1, _PIECE // len(columns))
    return (tables_of(rows[at : at + step], columns).reshape(-1) for at in range(0, len(rows), step))


def _read_shape(shape: tuple[int, ...], coded: bytes) -> tuple[Array, Array, Array]:
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] > _MAX_BYTES:
        raise BundleError(f"The weights file names a coded matrix of shape {list(shape)}; that can't be right.")
    rows, columns = shape
    parts = _inflate([coded], len(coded), 2 * rows + columns, 15).view(np.int8)
    return parts[:rows], parts[rows : 2 * rows], parts[2 * rows :]


def _inflate(pieces: Iterable[bytes | memoryview], coded: int, size: int, window: int) -> Array:
    """Undo zlib on so many coded bytes, into exactly uint8 [size], with no second copy. Raises BundleError."""
    wrong = "Coded weights end too early or too late; the file is damaged."
    if size > _EXPANDS * (coded + 1):
        raise BundleError(wrong)
    coder, raw, at = zlib.decompressobj(window), np.empty(size, np.uint8), 0
    for piece in pieces:
        left: bytes | memoryview = piece
        while not coder.eof:
            try:
                made = coder.decompress(left, _PIECE)
            except zlib.error as error:
                raise BundleError(f"Coded weights are damaged ({error}).") from None
            if at + len(made) > size:
                raise BundleError(wrong)
            raw[at : at + len(made)] = np.frombuffer(made, np.uint8)
            at, left = at + len(made), coder.unconsumed_tail
            if not made and not left:
                break
    if at != size or not coder.eof or coder.unused_data or coder.unconsumed_tail:
        raise BundleError(wrong)
    return raw


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
                if index[name]["coding"] != "ans":
                    start, end = places[name]
                    yield name, _decode(_read(file, start, end), end - start, index[name])
            for chunk in sorted({str(index[n].get("chunk")) for n in names if index[n]["coding"] == "ans"}):
                if index.get(chunk, {}).get("coding") != "chunk":
                    raise BundleError(f"{path}: the chunk {chunk} is missing.")
                inside = [n for n, e in sorted(index.items()) if e["coding"] == "ans" and e.get("chunk") == chunk]
                whole = {n: b"".join(_read(file, *places[n])) for n in (chunk, *inside)}
                members = [(n, *_read_shape(tuple(index[n]["shape"]), whole[n])) for n in inside]
                yield from ((n, array) for n, array in _decode_chunk(whole.pop(chunk), members) if n in names)
    except OSError as error:
        raise BundleError(f"{path} is no readable weights file ({error}).") from None


def _read(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from start to end in pieces: mapped into memory, what was read would count until it is closed."""
    file.seek(start)
    for at in range(start, end, _PIECE):
        yield file.read(min(_PIECE, end - at))


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
