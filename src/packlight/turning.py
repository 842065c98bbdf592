"""In which basis the numbers of an attention head take fewest bits.

Queries and keys matter by their products only, values by what the output layer makes of them, so any invertible matrix
may stand between them: q·k = (A⁻ᵀq)·(A k), and W v = (W A⁻¹)(A v). The model computes the same and the bits differ. With
steps that fit what errors cost (see `packlight.quant.column_grid`), row i of a weight W takes the logarithm of
sqrt([W D Wᵀ]_ii C_ii) bits, D = diag(L_jj²) what is left of its inputs' energy and C the Fisher information of its
outputs. Where W D Wᵀ and C are both diagonal the sum of that is least (Hadamard's inequality); one A can't make all of
four so, for keys and queries at once, and the best one is searched by descent.

Rotations of heads for pruning: CLOVER (Meng et al. 2024, arXiv 2411.17426); of whole models against outliers: QuaRot
(Ashkboos et al. 2024, arXiv 2404.00456). Here any basis is allowed, and what it is chosen for is the rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_AT = 3.5  # bits per weight, on average, that bases are chosen for: rows far below that gain nothing more
_MOST = 4.75  # bits at which codes of a row come near to the largest there are, so that its steps must grow
_STEPS, _PACE = 150, 0.02  # of the descent
_DAMP = 0.2  # share of the mean that is added to costs: of a few hundred words, products of 64 numbers are not exact
_TINY = 1e-8  # share of the largest below which an energy is taken as rounding


@dataclass(frozen=True)
class Rows:
    """A weight whose rows, of each head, get another basis.

    Args:
        energy: [heads, size, size], W D Wᵀ.
        cost: [heads, size, size], Fisher information of the outputs; None for columns of the layer that reads them,
            whose errors are made good by each other, so that their costs have a product that no basis changes.
        inverse: whether the basis acts on it as A⁻ᵀ.
    """

    energy: Tensor
    cost: Tensor | None
    inverse: bool = False


def damped(cost: Tensor) -> Tensor:
    """Costs [heads, size, size] with some of their mean added to the diagonal, so that none is 0."""
    mean = diagonals(cost).mean(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return cost + _DAMP * mean[:, None, None] * torch.eye(cost.shape[-1], dtype=cost.dtype)


def best_bases(weights: Sequence[Rows]) -> Tensor:
    """The basis of each head that makes the rows of all these weights take fewest bits.

    Args:
        weights: at least one that the basis acts on directly, float64.

    Returns:
        A [heads, size, size], invertible; identities where none was found that are better.
    """
    weights = [Rows(_invertible(w.energy), w.cost, w.inverse) for w in weights]
    heads, size = weights[0].energy.shape[:2]
    same = torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
    levels = [_AT - float(_bits(w, same, same).mean()) for w in weights]

    def rate(basis: Tensor) -> Tensor:
        inverse = torch.linalg.inv(basis)
        each = [_rate(_bits(w, basis, inverse) + n) for w, n in zip(weights, levels, strict=True)]
        return torch.stack(each).sum()

    start = _start(weights)
    with torch.inference_mode(False), torch.enable_grad():
        move = same.clone().requires_grad_(True)
        descent = torch.optim.Adam([move], lr=_PACE)
        for _ in range(_STEPS):
            descent.zero_grad()
            rate(move @ start).backward()
            descent.step()
    found = (move @ start).detach()
    return found if bool(rate(found) < rate(same)) else same


def bits(weights: Sequence[Rows], basis: Tensor) -> list[float]:
    """Mean of log2 sqrt(energy cost) over the rows of each weight: a difference of two bases is one of bits per weight."""
    inverse = torch.linalg.inv(basis)
    return [float(_bits(w, basis, inverse).mean()) for w in weights]


def _bits(weight: Rows, basis: Tensor, inverse: Tensor) -> Tensor:
    """[heads, size]."""
    own, back = (inverse.mT, basis.mT) if weight.inverse else (basis, inverse)
    energy = diagonals(own @ weight.energy @ own.mT)
    if weight.cost is None:
        volume = torch.linalg.slogdet(back)[1] / back.shape[-1]
        return 0.5 * energy.log2() + volume[:, None] / torch.log(torch.tensor(2.0, dtype=energy.dtype))
    return 0.5 * (energy * diagonals(back.mT @ weight.cost @ back)).log2()


def _rate(bits: Tensor) -> Tensor:
    """Bits per weight for the same loss, of rows [heads, size] that would take so many each at high rates without limits.

    No row takes less than none. One that would take more than `_MOST` has larger steps, so the others need finer ones.
    """
    loss = (4 ** (bits - _MOST)).clamp(min=1)
    return 0.5 * torch.log2(1 + 4 ** bits.clamp(max=_MOST)).mean() + 0.5 * torch.log2(loss.mean())


def _start(weights: Sequence[Rows]) -> Tensor:
    """The basis that makes diagonal the sum of what it acts on, and at once the sum of what its inverse acts on."""
    direct = [w.energy if not w.inverse else w.cost for w in weights]
    turned = [w.energy if w.inverse else w.cost for w in weights]
    if any(w.cost is None for w in weights):  # columns have no costs of their own: rows decide
        direct, turned = [w.energy for w in weights if w.cost is not None], [w.cost for w in weights]
    first, second = (sum(_even(m) for m in each if m is not None) for each in (direct, turned))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=_TINY * float(values.max())).sqrt()[:, None]
    values, vectors = torch.linalg.eigh(root.mT @ second @ root)
    values = (values / values.amax(1, keepdim=True)).clamp(min=_TINY)
    return values.pow(0.25)[:, :, None] * (vectors.mT @ torch.linalg.inv(root))


def _even(matrix: Tensor) -> Tensor:
    """With the mean 1 on its diagonal."""
    return matrix / diagonals(matrix).mean(1).clamp(min=1e-300)[:, None, None]


def _invertible(energy: Tensor) -> Tensor:
    mean = diagonals(energy).mean(1).clamp(min=1e-30)
    return energy + _TINY * mean[:, None, None] * torch.eye(energy.shape[-1], dtype=energy.dtype)


def diagonals(matrix: Tensor) -> Tensor:
    """[heads, size] of [heads, size, size]."""
    return matrix.diagonal(dim1=1, dim2=2)
