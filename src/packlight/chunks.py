"""Matrices of integer codes to bytes and back, many in one chunk. No torch: this runs on the device.

Codes have a spread that differs by row and by column, and little structure beside; rows of a table of embeddings,
turned so that a row is a dimension, also have a mean. Each row has a centre, which is taken off, and each row and
column a level, a quarter of an octave of what is left's root mean square; the sum of both levels says which of some
fifty tables of probabilities a code is coded with, by asymmetric numeral systems (`packlight.rans`). Where the codes
are a path through a trellis (`packlight.trellis`), what came before says whether the next one is even or odd, and each
parity has a table of its own.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from packlight import rans, trellis
from packlight.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]

_LEVELS, _OFFSET, _FLOOR = 56, 16, 0.01  # tables of a set; the table of level 0; keeps rows of zeros finite
_WIDEST = 1 << 14  # different codes that are told apart when a rate is estimated
_LEVEL_BITS = 2.5  # that a level takes in the file, about
PIECE = 1 << 18  # bytes, or codes, handled at once
_EXPANDS = 1032  # bytes that zlib makes of one at most
MAX_BYTES = 16 * 2**30  # a header that asks for more than this is damaged or hostile


@dataclass(frozen=True)
class Spread:
    """What is known of a matrix of codes before its codes.

    Args:
        centres: int8 [rows]; even where the codes are a path.
        rows, columns: levels, int8 [rows], [columns].
        path: whether the codes are a path through the trellis.
    """

    centres: Array
    rows: Array
    columns: Array
    path: bool

    @property
    def size(self) -> int:
        """How many codes there are."""
        return len(self.rows) * len(self.columns)

    def bytes(self) -> bytes:
        """Centres and levels as the file has them."""
        return zlib.compress(b"".join(part.tobytes() for part in (self.centres, self.rows, self.columns)), 9)

    def tables(self, rows: slice, columns: slice) -> Array:
        """The table of every code in these rows and columns, uint8; of the first set, that of codes that are no path."""
        sums = self.rows[rows, None].astype(np.int16) + self.columns[None, columns]
        return (sums + _OFFSET).clip(0, _LEVELS - 1).astype(np.uint8)


def spread_of(codes: Array) -> Spread:
    """Centres and levels of a matrix of codes [rows, columns], and whether it is a path."""
    path = trellis.follows(codes)
    means = codes.mean(1, dtype=np.float64)
    centres = (2 * np.rint(means / 2).clip(-64, 63) if path else np.rint(means).clip(-128, 127)).astype(np.int8)
    square = np.square(codes - centres[:, None].astype(np.float32), dtype=np.float32)
    rows, columns = square.mean(1) + _FLOOR, square.mean(0) + _FLOOR
    first = np.rint(2 * np.log2(rows)).clip(-64, 63)
    second = np.rint(2 * np.log2(columns / columns.mean())).clip(-64, 63)
    return Spread(centres, first.astype(np.int8), second.astype(np.int8), path)


def _in_order(codes: Array, spread: Spread) -> Iterator[tuple[Array, Array]]:
    """What is left of the codes without their centres, and their tables, in the order of coding; codes of any width."""
    if not spread.path:
        yield (codes - spread.centres[:, None]).reshape(-1), spread.tables(slice(None), slice(None)).reshape(-1)
        return
    states = trellis.start(*codes.shape)
    for place in trellis.steps(codes.shape[1]):
        part = codes[:, place]
        tables = _by_parity(spread.tables(slice(None), place), states)
        yield (part - spread.centres[:, None]).reshape(-1), tables.reshape(-1)
        trellis.advance_(states, part)


def _by_parity(tables: Array, states: Array) -> Array:
    """The same tables of the second set where the states say that a code is even, of the third where it is odd."""
    return tables + _LEVELS * (1 + (states[:, : tables.shape[1]] & 1))


def entropy(codes: Array) -> float:
    """Order-0 entropy of integer codes in bits per code: the rate that an ideal coder reaches."""
    if codes.size == 0:
        return 0.0
    counts = np.bincount(codes.reshape(-1).view(np.uint8)) if codes.dtype.itemsize == 1 else _counts(codes)
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum())


def _counts(codes: Array) -> Array:
    return np.unique(codes, return_counts=True)[1]


def coded_rate(codes: Array) -> float:
    """Bits per code that a matrix of codes takes in a weights file of which it is a small part."""
    if codes.ndim != 2 or not codes.size:
        return entropy(codes)
    codes = codes.astype(np.int32)
    spread = spread_of(codes)
    pieces = list(_in_order(codes, spread))
    left = np.concatenate([piece for piece, _ in pieces])
    tables = np.concatenate([table for _, table in pieces]).astype(np.int32)
    low = int(left.min())
    width = min(int(left.max()) - low + 1, _WIDEST)
    counts = np.bincount(tables * width + (left - low) % width, minlength=3 * _LEVELS * width)
    counts = counts.reshape(3 * _LEVELS, -1).astype(np.float64)
    used = counts > 0
    total = np.broadcast_to(counts.sum(1, keepdims=True), counts.shape)
    bits = float(-(counts[used] * np.log2(counts[used] / total[used])).sum())
    return (bits + _LEVEL_BITS * (2 * len(codes) + codes.shape[1])) / codes.size


def encode_chunk(arrays: Sequence[Array], spreads: Sequence[Spread]) -> bytes:
    """Code matrices of int8 together."""
    pieces = [piece for a, s in zip(arrays, spreads, strict=True) for piece in _in_order(a, s)]
    symbols = np.concatenate([piece for piece, _ in pieces]).view(np.uint8)  # modulo 256, and back likewise
    tables = np.concatenate([table for _, table in pieces])
    count = _count(spreads)
    counts = np.bincount(tables.astype(np.int32) * 256 + symbols, minlength=count * 256).reshape(count, 256)
    freq = rans.frequencies(counts)
    head = zlib.compress(freq.astype("<u2").tobytes(), 9)
    return len(head).to_bytes(4, "little") + head + rans.encode(symbols, tables, freq)


def _count(spreads: Iterable[Spread]) -> int:
    return _LEVELS * (3 if any(s.path for s in spreads) else 1)


def decode_chunk(data: bytes, members: Sequence[tuple[str, Spread]]) -> Iterator[tuple[str, Array]]:
    """The matrices of a chunk one after the other, named, in the order of coding.

    Each gets memory of its own: what a runtime keeps of one array would else keep all of them.

    Raises:
        BundleError: the chunk is damaged.
    """
    size = int.from_bytes(data[:4], "little")
    count = _count(spread for _, spread in members)
    freq = inflate([data[4 : 4 + size]], size, 512 * count, 15).view("<u2").astype(np.int64)
    freq = freq.reshape(count, 256)
    if (freq.sum(1) != 1 << rans.BITS).any():
        raise BundleError("The tables of the coded weights are damaged.")
    decoder = rans.Decoder(memoryview(data)[4 + size :], sum(spread.size for _, spread in members), freq)
    for name, spread in members:
        yield name, (_decode_path if spread.path else _decode_plain)(decoder, spread)
    decoder.end()


def _decode_plain(decoder: rans.Decoder, spread: Spread) -> Array:
    codes: Array = np.empty((len(spread.rows), len(spread.columns)), np.int8)
    step = max(1, PIECE // len(spread.columns))
    for at in range(0, len(codes), step):
        part = slice(at, at + step)
        codes[part] = (
            decoder.take(spread.tables(part, slice(None)).reshape(-1)).view(np.int8).reshape(codes[part].shape)
        )
    codes += spread.centres[:, None]
    return codes


def _decode_path(decoder: rans.Decoder, spread: Spread) -> Array:
    codes: Array = np.empty((len(spread.rows), len(spread.columns)), np.int8)
    states = trellis.start(*codes.shape)
    for place in trellis.steps(codes.shape[1]):
        tables = _by_parity(spread.tables(slice(None), place), states)
        part = decoder.take(tables.reshape(-1)).view(np.int8).reshape(tables.shape)
        part += spread.centres[:, None]
        codes[:, place] = part
        trellis.advance_(states, part)
    return codes


def read_spread(shape: Sequence[int], coded: bytes, path: bool) -> Spread:
    """Undo `Spread.bytes` for a matrix of that shape.

    Raises:
        BundleError: an impossible shape, or damaged bytes.
    """
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] > MAX_BYTES:
        raise BundleError(f"The weights file names a coded matrix of shape {list(shape)}; that can't be right.")
    rows, columns = shape
    parts = inflate([coded], len(coded), 2 * rows + columns, 15).view(np.int8)
    return Spread(parts[:rows], parts[rows : 2 * rows], parts[2 * rows :], path)


def inflate(pieces: Iterable[bytes | memoryview], coded: int, size: int, window: int) -> Array:
    """Undo zlib on so many coded bytes, into exactly uint8 [size], with no second copy. Raises BundleError."""
    wrong = "Coded weights end too early or too late; the file is damaged."
    if size > _EXPANDS * (coded + 1):
        raise BundleError(wrong)
    coder, raw, at = zlib.decompressobj(window), np.empty(size, np.uint8), 0
    for piece in pieces:
        left: bytes | memoryview = piece
        while not coder.eof:
            try:
                made = coder.decompress(left, PIECE)
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
