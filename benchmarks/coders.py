"""What the codes of a bundle take with several coders, and how long they take to decode: one table.

    python benchmarks/coders.py out/bundle

Every coder gets the same int8 matrices. Ours is what the bundle ships: asymmetric numeral systems with a table for
each level of row and column. The others see the bytes of one matrix after the other.
"""

import bz2
import lzma
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from packlight.chunks import entropy
from packlight.codec import read_weights, write_weights

RUNS = 5


def huffman(data: bytes) -> bytes:
    """Only Huffman codes, no matches."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


CODERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "zlib, Huffman only": (huffman, lambda data: zlib.decompress(data, -15)),
    "zlib -9": (lambda data: zlib.compress(data, 9), zlib.decompress),
    "bz2": (bz2.compress, bz2.decompress),
    "lzma": (lzma.compress, lzma.decompress),
}


def seconds(work: Callable[[], Any]) -> float:
    """Median of several runs, after one to warm up."""
    work()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main(bundle: Path) -> None:
    """Print the table for one bundle."""
    codes = {n: a for n, a in read_weights(bundle / "weights.safetensors") if a.dtype == np.int8 and a.ndim == 2}
    count = sum(a.size for a in codes.values())
    draft = bundle.with_name(bundle.name + ".coders.part")
    try:
        write_weights(draft, codes)
        rows = [("ours", draft.stat().st_size, seconds(lambda: dict(read_weights(draft))))]
    finally:
        draft.unlink(missing_ok=True)
    for name, (encode, decode) in CODERS.items():
        coded = [encode(a.tobytes()) for a in codes.values()]
        rows.append(
            (name, sum(map(len, coded)), seconds(lambda coded=coded, decode=decode: [decode(c) for c in coded]))
        )
    ideal = sum(entropy(a) * a.size for a in codes.values()) / count
    print(
        f"{count / 1e6:.1f} M codes in {len(codes)} matrices; entropy of each matrix by itself {ideal:.3f} bits a code"
    )
    print("| coder | bits a code | MB | decode |\n|---|---:|---:|---:|")
    for name, size, took in rows:
        print(f"| {name} | {8 * size / count:.3f} | {size / 1e6:.2f} | {took:.2f} s |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
