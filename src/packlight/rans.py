"""Asymmetric numeral systems: integer codes to as few bits as their probabilities allow. No torch: runs on the device.

Duda 2013, arXiv 1311.2540, in the range variant (rANS), with many interleaved lanes so that numpy decodes a step of
all lanes at once. States are 32 bits and grow or shrink by 16-bit words; probabilities have 12 bits. Every symbol
names its table, so codes of different spread do not share one: the tables are the model, and whoever decodes must
know which symbol uses which.
"""

from typing import Any

import numpy as np

from packlight.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]

BITS = 12  # of a probability
LANES = 4096
_LOW = 1 << 16  # states stay in _LOW .. 2^32
_MASK = (1 << BITS) - 1


def frequencies(counts: Array) -> Array:
    """Counts [tables, 256] to frequencies that sum to 4096 per table, at least 1 where a symbol occurs.

    Rounds to nearest, then takes what is too much, or gives what is missing, where it costs fewest bits. No frequency
    reaches 4096: a table of one symbol lends the last one to its neighbour.
    """
    result = np.zeros(counts.shape, np.int64)
    for table, row in enumerate(counts.astype(np.float64)):
        if row.sum() == 0:
            row = np.eye(1, 256)[0]
        if np.count_nonzero(row) == 1:
            only = int(row.argmax())
            result[table, only], result[table, (only + 1) % 256] = _MASK, 1
            continue
        found = np.where(row > 0, np.maximum(1, np.rint(row / row.sum() * (1 << BITS))), 0).astype(np.int64)
        while (excess := int(found.sum()) - (1 << BITS)) != 0:
            step = -1 if excess > 0 else 1
            movable = found > 1 if step < 0 else found > 0
            cost = -step * row * np.log2(np.maximum(found + step, 1) / np.maximum(found, 1))
            found[int(np.where(movable, cost, np.inf).argmin())] += step
        result[table] = found
    return result


def bits_per_symbol(counts: Array, freq: Array) -> float:
    """Bits that the tables spend per symbol: the cross entropy of counts [tables, 256] under frequencies."""
    used = counts > 0
    return float(-(counts[used] * np.log2(freq[used] / (1 << BITS))).sum() / max(1, counts.sum()))


def encode(symbols: Array, tables: Array, freq: Array) -> bytes:
    """Code symbols.

    Args:
        symbols: uint8 [n].
        tables: uint8 [n], the table of each symbol.
        freq: from `frequencies`, [tables, 256].

    Returns:
        the states of the lanes (uint32, little-endian), then 16-bit words in the order in which they are read.
    """
    count = len(symbols)
    lanes = lanes_for(count)
    start = np.cumsum(freq, 1) - freq
    state = np.full(lanes, _LOW, np.uint64)
    written: list[Array] = []
    for at in range((count - 1) // lanes * lanes, -1, -lanes) if count else ():
        table, symbol = tables[at : at + lanes], symbols[at : at + lanes]
        f, s = freq[table, symbol].astype(np.uint64), start[table, symbol].astype(np.uint64)
        active = state[: len(symbol)]
        full = active >= (f << np.uint64(32 - BITS))
        written.append((active[full] & np.uint64(0xFFFF)).astype("<u2"))
        active[full] >>= np.uint64(16)
        active[:] = (active // f << np.uint64(BITS)) + active % f + s
    words = np.concatenate(written[::-1]) if written else np.zeros(0, "<u2")
    return bytes(state.astype("<u4").tobytes() + words.tobytes())


def decode(data: bytes | memoryview, tables: Array, freq: Array) -> Array:
    """Undo `encode`: uint8 [n], n the length of `tables`.

    Raises:
        BundleError: the data is damaged: too short, too long, or not ending where it began.
    """
    decoder = Decoder(data, len(tables), freq)
    symbols = decoder.take(tables)
    decoder.end()
    return symbols


class Decoder:
    """Undoes `encode` piece by piece, so that tables may depend on what came before and not all is in memory at once.

    Args:
        data: what `encode` gave.
        count: how many symbols there are.
        freq: as `encode` had it.

    Raises:
        BundleError: the data is too short.
    """

    def __init__(self, data: bytes | memoryview, count: int, freq: Array) -> None:
        lanes = lanes_for(count)
        if len(data) < 4 * lanes or len(data) % 2:
            raise BundleError("Coded weights are damaged: they are too short.")
        self._state = np.frombuffer(data, "<u4", lanes).copy()
        self._words = np.frombuffer(data, "<u2", offset=4 * lanes)
        self._lookup = _lookup(freq)
        self._left, self._lane, self._position = count, 0, 0

    def take(self, tables: Array) -> Array:
        """The next symbols, uint8 [n]: one for each of `tables`, uint8 [n].

        Raises:
            BundleError: the data ends before that.
        """
        lanes, low = len(self._state), np.uint32(_MASK)
        result = np.empty(len(tables), np.uint8)
        self._left -= len(tables)
        at = 0
        while at < len(tables):
            active = self._state[self._lane : self._lane + len(tables) - at]
            part = slice(at, at + len(active))
            entry = self._lookup[(tables[part].astype(np.uint32) << np.uint32(BITS)) | (active & low)]
            result[part] = entry >> np.uint32(24)
            active[:] = ((entry >> np.uint32(BITS)) & low) * (active >> np.uint32(BITS)) + (entry & low)
            hungry = np.flatnonzero(active < _LOW)
            end = self._position + len(hungry)
            if end > len(self._words):
                raise BundleError("Coded weights are damaged: they end too early.")
            active[hungry] = (active[hungry] << np.uint32(16)) | self._words[self._position : end]
            self._position = end
            at += len(active)
            self._lane = (self._lane + len(active)) % lanes
        return result

    def end(self) -> None:
        """Check that all is read and that the data ends as it should.

        Raises:
            BundleError: it does not.
        """
        if self._left or self._position != len(self._words) or (self._state != _LOW).any():
            raise BundleError("Coded weights are damaged: they do not end where they should.")


def lanes_for(count: int) -> int:
    """Lanes for that many symbols: each costs 4 bytes, and fewer make short data slow to decode."""
    return int(max(1, min(LANES, count // 64)))


def _lookup(freq: Array) -> Array:
    """For every table and slot: symbol << 24 | frequency << 12 | distance from the symbol's first slot, uint32."""
    tables = freq.shape[0]
    symbol = np.repeat(np.tile(np.arange(256), tables), freq.reshape(-1)).astype(np.uint32)
    if len(symbol) != tables << BITS:
        raise BundleError("The tables of the coded weights are damaged.")
    table = np.repeat(np.arange(tables), 1 << BITS)
    start = np.cumsum(freq, 1) - freq
    own = freq[table, symbol].astype(np.uint32)
    distance = (np.arange(tables << BITS) & _MASK) - start[table, symbol]
    return (symbol << np.uint32(24)) | (own << np.uint32(BITS)) | distance.astype(np.uint32)
