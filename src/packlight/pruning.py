"""Which columns of a weight can go, and what the others must become: the numerics of structured pruning.

A layer computes W x + b. Taking a set S of its inputs away and giving the others the weights that make up for it best
costs tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ), H the second moments of x: Optimal Brain Surgeon (Hassibi and Stork 1992), by groups as
in ZipLM (Kurtic et al. 2023, arXiv 2302.04089, eq. 3 and 4), one group after the other with W and H⁻¹ kept up to date
(Optimal Brain Compression, Frantar et al. 2022, arXiv 2208.11580). What differs: where the layer has a bias, H is the
covariance, so that the bias makes up for the mean of what goes; and the weights of what stays are solved for anew at
the end, so no error of the updates is left in them.

Inside a head no number stands alone: queries and keys matter by their products only, values by what the output layer
makes of them, so any rotation of them computes the same. `narrowed_products` and `narrowed_values` keep the directions
that carry most, by the singular values of the product of both weights over calibration inputs: as in ModeGPT (Lin et
al. 2024, arXiv 2408.09632, type III) and CLOVER (Meng et al. 2024, arXiv 2411.17426). What differs: queries carry their
bias, keys are centred, since what all scores of a query share leaves a softmax unchanged, and the output is solved for
anew over all heads together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def removal_order(
    weight: Tensor, second: Tensor, size: int, remove: int, damp: float, most: bool = False
) -> tuple[list[int], list[float]]:
    """The groups to take out, one after the other, each time the one whose loss costs least after compensation.

    Args:
        weight: [out, in].
        second: [in, in], of its inputs.
        size: columns of a group; they lie together.
        remove: how many groups go.
        damp: share of the mean diagonal that is added to the diagonal.
        most: take the one that costs most instead, which is only good for comparison.

    Returns:
        (the groups in that order; what each costs, E|Δy|² with y the layer's output).
    """
    work = weight.double().clone()
    groups = work.shape[1] // size
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(second, damp)))
    order: list[int] = []
    costs: list[float] = []
    for _ in range(remove):
        errors = _errors(work, inverse, size)
        errors[order] = -1.0 if most else float("inf")
        group = int(errors.argmax() if most else errors.argmin())
        order.append(group)
        costs.append(float(errors[group]))
        own = slice(group * size, (group + 1) * size)
        column = inverse[:, own].clone()
        ratio = torch.linalg.inv(inverse[own, own])
        work.addmm_(work[:, own] @ ratio, column.T, alpha=-1)
        inverse.addmm_(column @ ratio, column.T, alpha=-1)
        work[:, own] = 0
        inverse[own], inverse[:, own] = 0, 0
        inverse[own, own] = torch.eye(size, dtype=inverse.dtype)
    assert len(set(order)) == len(order) <= groups
    return order, costs


def _damped(second: Tensor, damp: float) -> Tensor:
    second = second.double().clone()
    mean = float(second.diagonal().mean())
    second.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return second


def _errors(work: Tensor, inverse: Tensor, size: int) -> Tensor:
    """What each group costs, [groups]."""
    if size == 1:
        return work.square().sum(0) / inverse.diagonal()
    groups = work.shape[1] // size
    own = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = work.view(len(work), groups, size).transpose(0, 1)
    return ((parts @ torch.linalg.inv(own)) * parts).sum((1, 2))


def compensated(weight: Tensor, second: Tensor, kept: Tensor, damp: float) -> Tensor:
    """The kept columns, changed so that the layer's output stays as near as it can: least squares, by the normal equations.

    Damping pulls them to what they were.

    Args:
        weight: [out, in].
        second: [in, in], of its inputs.
        kept: which columns stay, rising.
        damp: as in `removal_order`.

    Returns:
        [out, kept] in the dtype of the weight.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    if not bool(gone.any()):
        return weight.clone()
    factor = torch.linalg.cholesky(_damped(second, damp)[kept][:, kept])
    change = torch.cholesky_solve(second[kept][:, gone] @ weight.double()[:, gone].T, factor).T
    return (weight.double()[:, kept] + change).to(weight.dtype)


def shifted(bias: Tensor, before: Tensor, after: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """The bias that keeps the mean of the output where the columns went and the others changed.

    Args:
        bias: [out].
        before: [out, in].
        after: [out, kept].
        kept: which columns stay.
        mean: [in], of the inputs.
    """
    lost = before.double() @ mean.double() - after.double() @ mean.double()[kept]
    return (bias.double() + lost).to(bias.dtype)


def magnitudes(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Norm of the rows that make each group times the norm of the columns that read it, [groups]: dead is either at 0.

    Args:
        rows: [in, features], weight with bias of the layer before.
        columns: [out, in].
        size: of a group.
    """
    made = rows.double().square().sum(1).view(-1, size).sum(1)
    read = columns.double().square().sum(0).view(-1, size).sum(1)
    return (made * read).sqrt()


def columns_of(groups: Tensor, size: int) -> Tensor:
    """The columns of these groups, in their order."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def narrowed_products(
    query: Tensor, key: Tensor, second: Tensor, mean: Tensor, heads: int, keep: slice
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose heads have fewer numbers and give the scores that are nearest in the mean square.

    The error of the scores of two inputs drawn independently, less what all keys share: the bias of the keys has no part
    in that and goes.

    Args:
        query: [heads * size, in + 1], weights with bias.
        key: [heads * size, in], weights.
        second: [in, in], the inputs' covariance.
        mean: [in], of the inputs.
        heads: how many.
        keep: which of the directions of a head stay, the strongest first.

    Returns:
        (query [heads * kept, in + 1], key [heads * kept, in]), float64.
    """
    whole = torch.cat([second + torch.outer(mean, mean), mean[None]])
    whole = torch.cat([whole, torch.cat([mean, mean.new_ones(1)])[:, None]], 1)
    asking, asked = _root(whole), _root(second)
    queries, keys = [], []
    for wide, other in zip(query.double().chunk(heads), key.double().chunk(heads), strict=True):
        left, right = (torch.linalg.qr(x).R for x in (asking @ wide.T, asked @ other.T))
        u, values, v = torch.linalg.svd(left @ right.T)
        scale = values.clamp(min=_TINY * float(values[0]) + torch.finfo(values.dtype).tiny).rsqrt()[keep]
        queries.append((right.T @ v[keep].T * scale).T @ wide)
        keys.append((left.T @ u[:, keep] * scale).T @ other)
    return torch.cat(queries), torch.cat(keys)


def narrowed_values(out: Tensor, second: Tensor, heads: int, keep: slice) -> tuple[Tensor, Tensor]:
    """What to make of each head's values so that fewer numbers carry most of what the output layer reads of them.

    Args:
        out: [width, heads * size], weights of the output layer.
        second: [heads * size, heads * size], the covariance of its inputs.
        heads: how many.
        keep: which of the directions of a head stay, the strongest first.

    Returns:
        (mixing [heads * size, heads * kept], what the values are multiplied by; output weights [width, heads * kept] for
        what comes of it, each head for itself), float64.
    """
    size = out.shape[1] // heads
    made: list[tuple[Tensor, Tensor]] = []
    for own in _slices(heads, size):
        read = out[:, own].double()
        _, values, v = torch.linalg.svd(_root(second[own, own]) @ read.T, full_matrices=False)
        sizes = values.clamp(min=_TINY * float(values[0]) + torch.finfo(values.dtype).tiny)[keep]
        made.append((read.T @ v[keep].T / sizes, v[keep].T * sizes))
    return torch.block_diag(*(mixing for mixing, _ in made)), torch.cat([read for _, read in made], 1)


def remixed(weight: Tensor, second: Tensor, mixing: Tensor, damp: float) -> Tensor:
    """The weights that read x @ mixing in place of x with the least error, [out, mixed] in the dtype of `weight`."""
    inner = mixing.T @ second @ mixing
    factor = torch.linalg.cholesky(_damped(inner, damp))
    return torch.cholesky_solve(mixing.T @ second @ weight.double().T, factor).T.to(weight.dtype)


_TINY = 1e-9  # of the largest singular value: smaller ones are rounding


def _root(second: Tensor) -> Tensor:
    """F with FᵀF = `second`, whatever its rank."""
    values, vectors = torch.linalg.eigh(second.double())
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i * size, (i + 1) * size) for i in range(count))
