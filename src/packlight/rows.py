"""Single rows of a table, read from a weights file when they are asked for: the table is never held. No torch.

Tables lie in the file in blocks of rows (`packlight.codec`), 32 KiB each. A token of Whisper takes a tenth of a
millisecond so, or nothing when it was asked for before.
"""

import os
import weakref
import zlib
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from packlight.codec import open_index
from packlight.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]

_KEPT = 2048  # rows that were asked for last


def rows_of(path: Path, names: list[str]) -> dict[str, Callable[[Array], Array]]:
    """What reads rows, for those arrays of a weights file that lie in it in blocks.

    Args:
        path: of the file. It is kept open.
        names: of arrays; others than uint8 are left out.

    Returns:
        by name: ids int64 [n] to rows [n, ...], a negative id counted from the end. It raises BundleError where the
        file is damaged, or an id has no row. Empty where the system can't read a file at a place of its own.

    Raises:
        BundleError: no weights file, or a damaged one.
    """
    if not hasattr(os, "pread"):  # Windows, where an open file could not be deleted either
        return {}
    index, places = open_index(path)
    tables = {n: index[n] for n in names if index.get(n, {}).get("blocks") and index[n].get("dtype") == "uint8"}
    if not tables:
        return {}
    read = _file(path)
    return {name: _reader(read, places[name], entry, f"{path}: {name}") for name, entry in tables.items()}


def _file(path: Path) -> Callable[[int, int], bytes]:
    """What reads a file's bytes from one place to another, as long as it is there itself."""
    number = os.open(path, os.O_RDONLY)

    def read(start: int, end: int) -> bytes:
        return os.pread(number, end - start, start)

    weakref.finalize(read, os.close, number)
    return read


def _reader(
    read: Callable[[int, int], bytes], place: tuple[int, int], entry: dict[str, Any], name: str
) -> Callable[[Array], Array]:
    """What reads rows of one table. Raises BundleError where its blocks do not make up its bytes."""
    shape, damaged = tuple(entry["shape"]), f"{name} is damaged: its rows do not lie where they should."
    try:
        step, ends = int(entry["blocks"]["rows"]), [place[0], *map(int, entry["blocks"]["bytes"])]
    except (KeyError, TypeError, ValueError):
        raise BundleError(damaged) from None
    bounds = list(accumulate(ends))
    whole = len(shape) > 1 and step > 0 and len(bounds) - 1 == -(-shape[0] // step) and bounds[-1] == place[1]
    if not whole or min(ends[1:]) < 1:
        raise BundleError(damaged)
    blocks, size = list(pairwise(bounds)), int(np.prod(shape[1:]))

    @lru_cache(maxsize=_KEPT)
    def row(number: int) -> bytes:
        block, inside = divmod(number, step)
        due = min(step, shape[0] - block * step) * size
        try:
            made = zlib.decompressobj(-15).decompress(read(*blocks[block]), due + 1)
        except zlib.error as error:
            raise BundleError(f"{name} is damaged ({error}).") from None
        if len(made) != due:
            raise BundleError(damaged)
        return made[inside * size : (inside + 1) * size]

    def rows(ids: Array) -> Array:
        wanted = [i + shape[0] if i < 0 else i for i in map(int, ids)]
        if any(not 0 <= i < shape[0] for i in wanted):
            raise BundleError(f"{name} has {shape[0]} rows; row {max(wanted, key=abs)} was asked for.")
        found = np.frombuffer(b"".join(map(row, wanted)), np.uint8)
        return found.reshape(len(wanted), *shape[1:]).copy()

    return rows
