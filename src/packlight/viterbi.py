"""The path through the trellis that is nearest to given values: which codes to take, see `packlight.trellis`.

Viterbi's algorithm (1967): of all paths that end in a state only the nearest can be the beginning of the best one. It
goes three codes at a time: in a trellis of eight states there is one way from each state to each other in three steps.
"""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from packlight.trellis import FOLLOWING, SEGMENT, STATES

_STRIDE = STATES.bit_length() - 1


@lru_cache(maxsize=1)
def _ways() -> Tensor:
    """[3, states, states]: the codes' remainders by 4 on the way from one state to another."""
    found = torch.empty(_STRIDE, STATES, STATES, dtype=torch.long)
    for begin, *bits in product(range(STATES), *[(0, 1)] * _STRIDE):
        state, remainders = begin, []
        for bit in bits:
            remainders.append(2 * bit + (state & 1))
            state = int(FOLLOWING[state, bit])
        found[:, begin, state] = torch.tensor(remainders)
    return found


def nearest_path(values: Tensor, limit: int) -> Tensor:
    """Codes along the trellis with the least sum of squared errors.

    Args:
        values: [n], in half steps: what the codes are to be near to.
        limit: largest absolute code.

    Returns:
        codes [n], float32, whole numbers.
    """
    count = len(values)
    segments, strides = -(-count // SEGMENT), SEGMENT // _STRIDE
    padded = torch.nn.functional.pad(values, (0, segments * SEGMENT - count))
    codes, errors = _candidates(padded.view(segments, SEGMENT).T.contiguous(), limit)
    errors[SEGMENT + count - segments * SEGMENT :, :, -1] = 0  # after the last value any path is as good
    ways = _ways()
    errors = errors.view(strides, _STRIDE, 4, segments)
    each = [errors[:, i].index_select(1, ways[i].view(-1)) for i in range(_STRIDE)]
    way_errors = torch.stack(each).sum(0).view(strides, STATES, STATES, segments)  # from, to
    best = way_errors[0, 0]  # every segment begins in state 0
    origins = []
    for stride in range(1, strides):
        best, origin = (best[:, None] + way_errors[stride]).min(0)
        origins.append(origin)
    path = [best.argmin(0)]
    for origin in reversed(origins):
        path.append(origin.gather(0, path[-1][None])[0])
    path.append(torch.zeros_like(path[0]))
    states = torch.stack(path[::-1])  # [strides + 1, segments]
    remainders = ways[:, states[:-1], states[1:]].transpose(0, 1).reshape(SEGMENT, 1, segments)
    return codes.gather(1, remainders)[:, 0].T.reshape(-1)[:count]


def _candidates(target: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The nearest code of each remainder by 4 within the limit, and its squared error: [step, 4, segment] each."""
    remainder = torch.arange(4.0)[None, :, None]
    low = torch.ceil((-limit - remainder) / 4)
    high = torch.floor((limit - remainder) / 4)
    quarters = torch.round((target[:, None] - remainder) / 4)
    codes = torch.minimum(torch.maximum(quarters, low), high) * 4 + remainder
    return codes, (codes - target[:, None]).square()
