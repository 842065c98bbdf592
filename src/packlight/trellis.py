"""The trellis that says which codes may follow each other. No torch: this runs on the device.

Trellis-coded quantization with entropy coding (Fischer and Wang 1992; Joshi, Crump and Fischer 1995): codes are
multiples of half a step, and the path so far says whether the next one is even or odd. Whoever chooses the codes,
`packlight.viterbi`, looks for the best path, so each weight has a code within a whole step and most within half of
one; whoever reads them knows the parity beforehand, so it costs no bits. For Gaussian weights this is 0.10 bit per
weight above the theoretical limit where codes chosen one by one are 0.255 bit above it.

The trellis has eight states (Ungerboeck 1982, table 1: parity check polynomials 13 and 04) and runs along the outputs
of a layer, for each input anew and again after every `SEGMENT` outputs, so that all of these are read at once.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

STATES, SEGMENT = 8, 48
_CHECK, _INPUT = 0o13, 0o4  # h0 and h1


def _following() -> Array:
    """[states, 2]: the state after a state and the second lowest bit of a code."""
    memory = STATES.bit_length() - 1
    found = np.zeros((STATES, 2), np.uint8)
    for state in range(STATES):
        for bit in (0, 1):
            fed = (state & 1) * _CHECK ^ bit * _INPUT  # the lowest bit of a state is the parity of the next code
            found[state, bit] = ((state >> 1) ^ (fed >> 1)) & ((1 << memory) - 1)
    return found


FOLLOWING = _following()


def steps(columns: int) -> Iterator[slice]:
    """The columns of a matrix of codes in the order in which they are coded: the first of every segment, then the second ..."""
    return (slice(t, None, SEGMENT) for t in range(min(SEGMENT, columns)))


def start(rows: int, columns: int) -> Array:
    """States before the first code of each segment, uint8 [rows, segments]."""
    return np.zeros((rows, -(-columns // SEGMENT)), np.uint8)


def advance_(states: Array, codes: Array) -> None:
    """The states after these codes, int8 [rows, n]: of the first n segments, in place."""
    states[:, : codes.shape[1]] = FOLLOWING[states[:, : codes.shape[1]], (codes >> 1) & 1]


def follows(codes: Array) -> bool:
    """Whether a matrix of codes, a row per input, is a path through the trellis everywhere."""
    states = start(*codes.shape)
    for place in steps(codes.shape[1]):
        part = codes[:, place]
        if ((part ^ states[:, : part.shape[1]]) & 1).any():
            return False
        advance_(states, part)
    return True
