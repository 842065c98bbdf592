"""Numerics of quantization on tensors: grids, codes, error feedback, distortion, rate. Pure functions.

A compressed weight is integer codes with a scale: Ŵ[o, i] = scale[o, g(i)] * (codes[o, i] - zero[o, g(i)]). With one
group per row this is the form that int8 kernels take; the file holds the codes at their entropy, so a coarser step
makes the file smaller without another layout. A factor per column, which the layer's input is multiplied with, lets
inputs of little variance have coarser steps. With several groups it is the W4A16 form of 4-bit kernels.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from packlight.chunks import coded_rate
from packlight.trellis import SEGMENT
from packlight.viterbi import nearest_path

# Pairs of u8 x s8 products saturate the 16-bit sums of AVX2 without VNNI unless |code| <= 64: 255 * 64 * 2 < 2^15.
# Codes within +-63 are exact on every processor and cost half a bit of resolution.
LIMIT = 63
_SAMPLE = 400_000  # weights looked at when a step is searched
_TALL, _BOUND_ROWS = 8, 1024  # rows per column from which a bound uses the covariance; rows that it looks at
_ROWS, _BLOCK = 4096, 64  # rows at a time, columns between two full updates: 1 MB of float32
_PATH_SAVES = 0.15  # bits per weight that paths save at equal error
_SEGMENTS = 85 * SEGMENT  # rows at a time along a trellis


@dataclass(frozen=True)
class Grid:
    """The values a weight may take.

    Args:
        scale: [out, groups], positive.
        zero: [out, groups], the code that stands for 0.
        low, high: smallest and largest code.
        group: columns that share a scale; groups * group >= columns.
        columns: [in], a further factor of each column's scale; None for 1.
        path: whether each column's codes are a path through the trellis, see `packlight.trellis`; scales are half
            steps then.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    group: int
    columns: Tensor | None = None
    path: bool = False

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of a weight [out, in], as int16."""
        scale, zero = self._wide(weight.shape[1])
        scale = scale if self.columns is None else scale * self.columns
        return (torch.round(weight / scale) + zero).clamp_(self.low, self.high).to(torch.int16)

    def values(self, codes: Tensor) -> Tensor:
        """The weight [out, in] that the codes stand for, float32."""
        scale, zero = self._wide(codes.shape[1])
        values = (codes.float() - zero) * scale
        return values if self.columns is None else values * self.columns

    def _wide(self, columns: int) -> tuple[Tensor, Tensor]:
        if self.scale.shape[1] == 1:
            return self.scale, self.zero
        wide = [t.repeat_interleave(self.group, 1)[:, :columns] for t in (self.scale, self.zero)]
        return wide[0], wide[1]


def _storable(scale: Tensor) -> Tensor:
    """Scales as float16 can hold them, where that loses no more than its 11 bits: half the bytes in the file."""
    half = scale.half().float()
    return half if bool(((half > 6.2e-5) & torch.isfinite(half)).all()) else scale


def channel_grid(weight: Tensor, rate: float | None = None, limit: int = LIMIT, path: bool = False) -> Grid:
    """One scale per output channel.

    Args:
        weight: [out, in].
        rate: bits per weight after entropy coding; None for the finest grid that `limit` allows. At a given rate one
            step for all rows is optimal for the squared error (literature: reverse water-filling); rows whose
            largest weight would pass the limit get a larger one.
        limit: largest absolute code.
        path: whether codes will be a path through the trellis: at equal rates their scales are half of the others.

    Returns:
        the grid; a row of zeros gets the scale 1.
    """
    peak = weight.abs().amax(1)
    step = 0.0 if rate is None else find_step(weight, rate, limit) * (0.5 if path else 1.0)
    scale = (peak / limit).clamp(min=step)
    scale = _storable(torch.where(peak > 0, scale, torch.ones_like(scale)))
    return Grid(scale[:, None], torch.zeros_like(scale)[:, None], -limit, limit, weight.shape[1], path=path)


def column_grid(
    weight: Tensor, gram: Tensor, rate: float, damp: float = 0.01, rows: Tensor | None = None, path: bool = False
) -> Grid:
    """One scale for all rows and a factor per column: WaterSIC's steps, inversely as what is left of an input's energy.

    WaterSIC (Successive cancellation with water-filling, ICML 2026): the step of column i is c / L_ii, where L_ii² is
    the part of input i that the columns rounded after it can't make up for. All columns then add the same error, as
    reverse water-filling asks.

    Args:
        weight: [out, in].
        gram: [in, in], the sum of x xᵀ.
        rate: bits per weight after entropy coding.
        damp: as in `error_feedback`, which must round in the order that this grid was made for.
        rows: [out], relative steps of the rows; None for equal ones.
        path: whether codes are to be a path through the trellis. Half steps need twice the codes, and the grid is one
            without paths where the larger steps of rows and columns that pass `LIMIT` would cost more than paths save.

    Returns:
        the grid; a row or column whose codes would pass `LIMIT` has a larger step.
    """
    factor = column_steps(gram, damp)
    factor = factor / factor.log().mean().exp()
    relative = torch.ones(len(weight), 1) if rows is None else (rows / rows.log().mean().exp())[:, None]
    step = find_step(weight / (factor * relative), rate, 1 << 30)
    plain, lost = _within_limit(weight, step * relative, factor, rows is None)
    if not path:
        return plain
    halved, more = _within_limit(weight, step / 2 * relative, factor, rows is None)
    return replace(halved, path=True) if more - lost < _PATH_SAVES else plain


def _within_limit(weight: Tensor, steps: Tensor, factor: Tensor, both: bool) -> tuple[Grid, float]:
    """The grid with these steps of rows and factors of columns, larger where codes would pass `LIMIT`: rows, or both.

    Also how many bits per weight that costs: a larger step saves its logarithm and costs its square.
    """
    columns = factor
    if both:
        columns = torch.maximum(factor, weight.abs().amax(0) / (LIMIT * float(steps[0])))
    columns = _storable(columns.clamp(min=1e-6))
    scale = torch.maximum(steps, (weight / columns).abs().amax(1, keepdim=True) / LIMIT)
    scale = _storable(torch.where(scale > 0, scale, torch.ones_like(scale)))
    lost = sum(float(r.square().mean().log2() / 2 - r.log2().mean()) for r in (scale / steps, columns / factor))
    return Grid(scale, torch.zeros_like(scale), -LIMIT, LIMIT, weight.shape[1], columns), lost


def column_steps(gram: Tensor, damp: float) -> Tensor:
    """[in]: 1 / L_ii for each column, see `column_grid`."""
    order = feedback_order(gram)
    factor = torch.empty(len(gram))
    factor[order] = _inverse_factor(gram, damp).diagonal()
    return factor


def rescaled(grid: Grid, weight: Tensor, codes: Tensor, gram: Tensor) -> Grid:
    """The grid with the factors that are best for these codes: least squares over columns, then over rows.

    With Z the values and S the Gram matrix, the column factors solve (ZᵀZ * S) f = sum over rows of Z * (W S); the
    product with * is by element. Rows are independent of each other.
    """
    gram = gram.float()
    target = weight @ gram
    if grid.columns is not None:
        value = grid.values(codes)
        system = (value.T @ value * gram).double()
        system.diagonal().add_(1e-3 * system.diagonal().mean() + 1e-30)
        aim = (value * target).sum(0).double() + 1e-3 * system.diagonal().mean()  # pulled to 1, not to 0
        fit = torch.linalg.solve(system, aim).float()
        columns = _storable(grid.columns * fit.clamp(0.5, 1.5))
        grid = replace(grid, columns=columns)
    value = grid.values(codes)
    below = (value @ gram * value).sum(1)
    fit = torch.where(below > 0, (value * target).sum(1) / below.clamp(min=1e-30), torch.ones_like(below))
    scale = _storable(grid.scale * fit.clamp(0.5, 1.5)[:, None])
    return replace(grid, scale=scale)


def find_step(weight: Tensor, rate: float, limit: int = LIMIT) -> float:
    """The step for which rounding to nearest gives that rate, by bisection to 0.002 bits on a sample of the rows.

    Returns 0 when even the finest grid of `limit` has a lower rate.
    """
    rows = max(1, -(-weight.numel() // _SAMPLE))
    sample = weight[::rows]
    peak = sample.abs().amax(1, keepdim=True) / limit
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))

    def bits(step: float) -> float:
        return rate_of(torch.round(sample / peak.clamp(min=step)))

    if limit <= 127 and bits(0.0) <= rate:
        return 0.0
    high = float(sample.abs().max())
    low = 0.0 if limit <= 127 else high / 2000
    for _ in range(24):
        middle = (low + high) / 2
        measured = bits(middle)
        if abs(measured - rate) < 0.002:
            return middle
        low, high = (middle, high) if measured > rate else (low, middle)
    return (low + high) / 2


def group_grid(weight: Tensor, bits: int, group: int) -> Grid:
    """One scale and zero point per `group` columns, the range shrunk where that lowers the squared error.

    Args:
        weight: [out, in].
        bits: 4 or 8.
        group: columns per group; the last group may be shorter.

    Returns:
        an asymmetric grid with codes 0 .. 2^bits - 1 that always represents 0 exactly.
    """
    out, columns = weight.shape
    groups = -(-columns // group)
    blocks = torch.nn.functional.pad(weight, (0, groups * group - columns)).view(out, groups, group)
    high, low = blocks.amax(2).clamp(min=0), blocks.amin(2).clamp(max=0)
    top = 2**bits - 1
    best_error = torch.full_like(high, float("inf"))
    best = (torch.ones_like(high), torch.zeros_like(high))
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7) if bits < 8 else (1.0,):
        scale = ((high - low) * shrink / top).clamp(min=1e-8)
        zero = torch.round(-low * shrink / scale).clamp(0, top)
        codes = (torch.round(blocks / scale[..., None]) + zero[..., None]).clamp(0, top)
        error = ((codes - zero[..., None]) * scale[..., None] - blocks).square().sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
    return Grid(_storable(best[0]), best[1], 0, top, group)


def error_feedback(weight: Tensor, gram: Tensor, grid: Grid, damp: float = 0.01) -> Tensor:
    """Codes that minimise the error of the layer's output, not of its weights.

    Columns are rounded one after the other; the error of each is made good by the columns not yet rounded. This is
    GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1) with its lazy blocks. Columns go in the order of falling
    energy, so that the important ones are rounded while there is most to correct them with. On a grid with paths a
    column's codes are the nearest path through the trellis, which runs along the rows.

    Args:
        weight: [out, in].
        gram: [in, in], the sum of x xᵀ over calibration inputs.
        grid: where to round to.
        damp: share of the mean diagonal that is added to the diagonal.

    Returns:
        codes [out, in], int16.
    """
    order = feedback_order(gram)
    upper = _inverse_factor(gram, damp)
    codes = torch.empty(weight.shape, dtype=torch.int16)
    # Rows are independent: a few thousand at a time, turned so that a column is contiguous, stay in the cache.
    for rows in torch.arange(len(weight)).split(_SEGMENTS if grid.path else _ROWS):
        part = replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        turned = _feedback_rows(weight[rows][:, order].T.float().contiguous(), upper, part, order)
        codes[rows[:, None], order] = turned.T
    return codes


def feedback_order(gram: Tensor) -> Tensor:
    """The order in which columns are rounded: falling energy of their inputs."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def _feedback_rows(work: Tensor, upper: Tensor, grid: Grid, order: Tensor) -> Tensor:
    """The loop of `error_feedback` on a weight that is turned, [in, rows], and is used up. Returns codes likewise."""
    columns = len(work)
    codes = torch.empty(work.shape, dtype=torch.int16)
    scales, zeros = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    groups = (order // grid.group).tolist()
    factors = [1.0] * columns if grid.columns is None else grid.columns[order].tolist()
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, work.shape[1])
        for i in range(start, end):
            scale, zero = scales[groups[i]] * factors[i], zeros[groups[i]]
            if grid.path:
                code = nearest_path(work[i] / scale, grid.high)
            else:
                code = torch.round(work[i] / scale).add_(zero).clamp_(grid.low, grid.high)
            codes[i] = code
            error = (work[i] - (code - zero) * scale) / upper[i, i]
            work[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes


@lru_cache(maxsize=1)  # a grid and the feedback on it ask for the same, and query, key and value share their inputs
def _inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse Gram matrix in the order of feedback, in float64 inside.

    Inputs never seen get the mean energy.
    """
    order = feedback_order(gram)
    gram = gram[order][:, order].double().clone()
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(gram.shape[0])
    dead = diagonal <= 1e-9 * mean
    diagonal += damp * mean
    diagonal[dead] = mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()


def distortion(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """E|(W - Ŵ)x|² / E|Wx|² with a Gram matrix, |W - Ŵ|² / |W|² without one."""
    error = weight - approximation
    if gram is None:
        below, above = weight.square().sum(), error.square().sum()
    else:
        gram = gram.float()
        below, above = ((weight @ gram) * weight).sum(), ((error @ gram) * error).sum()
    return float(above / below) if float(below) > 0 else 0.0


def rate_of(codes: Tensor) -> float:
    """Bits per weight that the weights file spends on codes [out, in], given the spread of their rows and columns."""
    turned = codes.T if codes.dim() == 2 else codes  # as the file has them: a row is an input
    return coded_rate(turned.numpy())


def bound(weight: Tensor, gram: Tensor, loss: float) -> float:
    """The rate below which no code, however slow, brings Gaussian weights like these to a relative output error `loss`.

    Reverse water-filling (Cover and Thomas, theorem 10.3.3): a direction with energy v gets max(0, log2(v / theta) / 2)
    bits, and theta is such that the errors min(v, theta) sum to the loss. The weights are taken as Gaussian, every row
    with a scale of its own, as the file has it too. Directions are the eigenvectors of the Gram matrix S, with energy
    lambda_i * mean over rows of (W u_i)². Where a weight has many more rows than columns, its columns' covariance K is
    known as well at no cost, and the directions are those of S^1/2 K S^1/2; in a square one K would be as many numbers
    as the weights.

    Args:
        weight: [out, in].
        gram: [in, in].
        loss: `distortion` reached, above 0.

    Returns:
        bits per weight.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    basis = vectors * values.clamp(min=0).sqrt()
    second = basis.T @ (weight.double().T @ weight.double() / len(weight)) @ basis
    if len(weight) >= _TALL * weight.shape[1]:
        basis = basis @ torch.linalg.eigh(second)[1]
        second = basis.T @ (weight.double().T @ weight.double() / len(weight)) @ basis
    energy = second.diagonal().clamp(min=0)
    some = weight[:: -(-len(weight) // _BOUND_ROWS)].double() @ basis
    rows = (some.square() / energy.clamp(min=1e-300)).mean(1, keepdim=True)
    return _water_filled(energy * rows / rows.mean().clamp(min=1e-300), loss)


def _water_filled(energy: Tensor, loss: float) -> float:
    """Mean bits for directions of these energies when their errors are that share of the sum of the energies."""
    energy = energy.flatten().sort().values
    count = len(energy)
    below = energy.cumsum(0)  # the errors of the k + 1 weakest; the others have theta each
    above = torch.arange(count - 1, -1, -1, dtype=energy.dtype)
    aim = loss * float(below[-1])
    k = int(torch.searchsorted(below + above * energy, aim))  # the weakest direction that gets bits
    if k >= count or aim <= 0:
        return 0.0
    theta = (aim - (float(below[k - 1]) if k else 0.0)) / (count - k)
    return float((0.5 * torch.log2(energy[k:] / theta)).sum() / count)
