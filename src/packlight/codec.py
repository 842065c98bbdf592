"""Arrays to bytes and back, without loss and as small as their entropy allows. No torch: this runs on the device.

Integer codes have a skewed histogram, so a Huffman code stores them in far fewer bits than their width: 7-bit codes
of a Whisper layer take about 5.6 bits. zlib's Huffman-only mode is in every Python and every browser, decodes at
some 280 MB/s a core, and stays within 1 to 4 % of the entropy; the match finder of a general compressor only hurts
on such data. Floats are stored as float16 where that is exact.

A weights file is a safetensors file: each array is one U8 tensor that holds its coded bytes, and the file's metadata
says dtype, shape and coding of each. docs/reference/bundle.md has the format.
"""

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES = ("int8", "uint8", "int32", "int64", "float16", "float32", "bool")
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
        coder = zlib.decompressobj(-15)
        try:
            data = coder.decompress(data, size + 1)
            if not coder.eof or coder.unused_data:
                raise BundleError("Coded weights end too early or too late; the file is damaged.")
        except zlib.error as error:
            raise BundleError(f"Coded weights are damaged ({error}).") from None
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


def write_weights(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a weights file: the same arrays give the same bytes."""
    from safetensors.numpy import save

    blobs: dict[str, Array] = {}
    index: dict[str, Any] = {}
    for name in sorted(arrays):
        data, coding = encode(arrays[name])
        blobs[name] = np.frombuffer(data, dtype=np.uint8)
        index[name] = {"dtype": str(arrays[name].dtype), "shape": list(arrays[name].shape), "coding": coding}
    path.write_bytes(save(blobs, metadata={"packlight": json.dumps(index, sort_keys=True)}))


def read_weights(path: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Array]]:
    """Decode a weights file, one array at a time so that memory holds the coded form of one only.

    Args:
        path: of the file.
        wanted: names to decode; None for all. Names that the file lacks are passed over.

    Raises:
        BundleError: no weights file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            index = json.loads((file.metadata() or {}).get("packlight", "null"))
            names = list(file.keys())
            if not isinstance(index, dict) or sorted(index) != sorted(names):
                raise BundleError(f"{path} has no index of its arrays, or one that does not match them.")
            for name in names if wanted is None else sorted(set(names) & set(wanted)):
                entry = index[name]
                data = file.get_tensor(name)
                if data.dtype != np.uint8 or not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
                    raise BundleError(f"{path}: the array {name} is not stored as bytes.")
                coding, dtype, shape = entry.get("coding"), entry.get("dtype"), tuple(entry["shape"])
                yield name, decode(data.data, str(coding), str(dtype), shape)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is no readable weights file ({error}).") from None
