"""Asymmetric numeral systems: without loss, at the entropy, and refused when damaged."""

import numpy as np
import pytest

from packlight import rans
from packlight.errors import BundleError


def skewed(n: int, tables: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes whose spread doubles from table to table, with the tables and their frequencies."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, tables, n).astype(np.uint8)
    symbols = np.rint(rng.normal(0, 1, n) * 2.0**index).clip(-127, 127).astype(np.int8).view(np.uint8)
    counts = np.zeros((tables, 256), np.int64)
    np.add.at(counts, (index, symbols), 1)
    return symbols, index, rans.frequencies(counts)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 4097, 300_000])
def test_decode_undoes_encode(n: int) -> None:
    symbols, tables, freq = skewed(n, 4)
    assert np.array_equal(rans.decode(rans.encode(symbols, tables, freq), tables, freq), symbols)


def test_the_size_is_the_entropy_given_the_table() -> None:
    symbols, tables, freq = skewed(400_000, 4)
    ideal = 0.0
    for table in range(4):
        counts = np.bincount(symbols[tables == table], minlength=256)
        share = counts[counts > 0] / counts.sum()
        ideal -= float((counts[counts > 0] * np.log2(share)).sum()) / 8
    size = len(rans.encode(symbols, tables, freq))
    assert ideal <= size <= 1.004 * ideal + 4 * rans.lanes_for(len(symbols))
    one = rans.frequencies(np.bincount(symbols, minlength=256)[None])
    assert len(rans.encode(symbols, np.zeros_like(tables), one)) > 1.1 * size  # one table for all costs what it should


def test_frequencies_sum_to_the_whole_and_forget_no_symbol() -> None:
    counts = np.zeros((3, 256), np.int64)
    counts[0, :200] = 1
    counts[0, 7] = 10_000_000
    counts[1, 3] = 5
    freq = rans.frequencies(counts)
    assert (freq.sum(1) == 4096).all() and (freq[0, :200] >= 1).all() and (freq < 4096).all()
    assert freq[0, 200:].sum() == 0 and freq[0, 7] == 4096 - 199


@pytest.mark.parametrize("change", ["cut", "longer", "flip", "states"])
def test_damage_is_refused(change: str) -> None:
    symbols, tables, freq = skewed(50_000, 3)
    data = bytearray(rans.encode(symbols, tables, freq))
    if change == "cut":
        data = data[:-2]
    elif change == "longer":
        data += b"\0\0"
    elif change == "states":
        data = data[:100]
    else:
        data[len(data) // 2] ^= 16
    with pytest.raises(BundleError, match="damaged"):
        rans.decode(bytes(data), tables, freq)


def test_tables_that_do_not_sum_up_are_refused() -> None:
    symbols, tables, freq = skewed(1000, 2)
    data = rans.encode(symbols, tables, freq)
    freq[1, 0] += 1
    with pytest.raises(BundleError, match="tables"):
        rans.decode(data, tables, freq)
