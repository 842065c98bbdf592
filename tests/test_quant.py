"""Grids, codes and error feedback, against planted answers."""

import math

import pytest
import torch
from torch import Tensor

from packlight.chunks import entropy
from packlight.quant import (
    LIMIT,
    Grid,
    bound,
    channel_grid,
    column_grid,
    distortion,
    error_feedback,
    find_step,
    group_grid,
    rate_of,
    rescaled,
)


def gaussian(rows: int = 96, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = 64, rank: int = 6, seed: int = 1) -> Tensor:
    """The Gram matrix of inputs that lie near a space of few dimensions, so that columns can make good for others."""
    x = gaussian(2000, rank, seed) @ gaussian(rank, columns, seed + 1) + 0.1 * gaussian(2000, columns, seed + 2)
    return (x.T @ x).double()


def pairs(columns: int, correlation: float) -> Tensor:
    """A Gram matrix in which each even column is correlated with the next one, and with no other."""
    block = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    return torch.block_diag(*[block] * (columns // 2))


def relative(weight: Tensor, grid: Grid, codes: Tensor, gram: Tensor) -> float:
    return distortion(weight, grid.values(codes), gram)


@pytest.mark.parametrize("rate", [1.5, 2.5, 4.0, 5.3])
def test_find_step_reaches_the_rate(rate: float) -> None:
    weight = gaussian(500, 200)
    codes = torch.round(weight / find_step(weight, rate)).to(torch.int8)
    assert entropy(codes.numpy()) == pytest.approx(rate, abs=0.05)
    grid = channel_grid(weight, rate)
    assert rate_of(grid.codes(weight)) == pytest.approx(rate, abs=0.05)


def test_find_step_is_zero_when_the_finest_grid_needs_fewer_bits() -> None:
    assert find_step(gaussian(), 8.0) == 0.0
    assert find_step(torch.zeros(4, 4), 2.0) == 0.0


def test_channel_grid_gives_one_step_to_rows_of_different_size_at_a_rate() -> None:
    weight = gaussian() * torch.linspace(0.5, 1, 96)[:, None]
    assert len(channel_grid(weight, 3.0).scale.unique()) == 1
    assert len(channel_grid(weight).scale.unique()) > 90


@pytest.mark.parametrize("rate", [None, 2.0, 5.0, 7.9])
def test_codes_lie_within_the_limit(rate: float | None) -> None:
    weight = gaussian()
    weight[3] *= 1e3
    weight[5, 7] = 40.0
    grid = channel_grid(weight, rate)
    assert int(grid.codes(weight).abs().max()) <= LIMIT
    fed = error_feedback(weight, correlated(), grid)
    assert int(fed.abs().max()) <= LIMIT


def test_rounding_errs_by_half_a_step_at_most() -> None:
    weight = gaussian()
    grid = channel_grid(weight)
    error = (grid.values(grid.codes(weight)) - weight).abs()
    # The scale is rounded to float16, so the largest code of a row may be clipped by up to 63 / 2^11 steps more.
    assert bool((error <= (0.5 + LIMIT / 2**11) * grid.scale).all())


def test_a_row_of_zeros_stays_zero() -> None:
    weight = gaussian(4, 8)
    weight[2] = 0
    for grid in (channel_grid(weight), channel_grid(weight, 3.0), group_grid(weight, 4, 16)):
        assert bool(torch.isfinite(grid.scale).all()) and bool((grid.scale > 0).all())
        assert torch.equal(grid.values(grid.codes(weight))[2], torch.zeros(8))


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**5])
def test_codes_do_not_change_when_the_weight_is_scaled(factor: float) -> None:
    weight, gram = gaussian(), correlated()
    for rate in (None, 3.0):
        grid, scaled = channel_grid(weight, rate), channel_grid(weight * factor, rate)
        assert torch.equal(grid.codes(weight), scaled.codes(weight * factor))
        assert torch.equal(error_feedback(weight, gram, grid), error_feedback(weight * factor, gram * 4, scaled))
        assert torch.equal(grid.scale * factor, scaled.scale)


def test_scales_are_stored_in_float16_when_that_is_exact_enough() -> None:
    scale = channel_grid(gaussian()).scale
    assert torch.equal(scale, scale.half().float())
    tiny = channel_grid(gaussian() * 1e-8)
    assert distortion(gaussian() * 1e-8, tiny.values(tiny.codes(gaussian() * 1e-8))) < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 50])
def test_group_grid_represents_zero_exactly(bits: int, columns: int) -> None:
    weight = gaussian(columns=columns) + 0.8  # groups that hardly reach below zero
    weight[0] = weight[0].abs() + 1  # one that does not
    weight[1] = -weight[1].abs() - 1
    grid = group_grid(weight, bits, 16)
    assert torch.equal(grid.zero, grid.zero.round())
    assert float(grid.zero.min()) >= 0 and float(grid.zero.max()) <= 2**bits - 1
    assert torch.equal(grid.values(grid.codes(torch.zeros_like(weight))), torch.zeros_like(weight))
    codes = grid.codes(weight)
    assert int(codes.min()) >= 0 and int(codes.max()) <= 2**bits - 1


def test_group_grid_holds_a_weight_that_is_on_a_grid_already() -> None:
    codes = torch.arange(16.0).repeat(8, 2)[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    weight = (codes - 5) * 0.25
    grid = group_grid(weight, 4, 32)
    assert torch.allclose(grid.values(grid.codes(weight)), weight, atol=1e-6)


def test_smaller_groups_and_more_bits_err_less() -> None:
    weight = gaussian(64, 128) * torch.linspace(0.1, 3, 128)

    def error(bits: int, group: int) -> float:
        grid = group_grid(weight, bits, group)
        return distortion(weight, grid.values(grid.codes(weight)))

    assert error(8, 32) < error(4, 16) / 50
    assert error(4, 16) < error(4, 128)


@pytest.mark.parametrize("make", [lambda w: channel_grid(w, 2.5), lambda w: group_grid(w, 4, 16)])
def test_feedback_beats_rounding_when_inputs_are_correlated(make) -> None:  # type: ignore[no-untyped-def]
    weight, gram = gaussian(), correlated()
    grid = make(weight)
    rounded = relative(weight, grid, grid.codes(weight), gram)
    fed = relative(weight, grid, error_feedback(weight, gram, grid), gram)
    assert fed < 0.5 * rounded
    # It is bought with the error of the weights themselves.
    assert distortion(weight, grid.values(error_feedback(weight, gram, grid))) > distortion(
        weight, grid.values(grid.codes(weight))
    )


def test_feedback_finds_the_planted_answer_of_two_columns() -> None:
    # Both columns see the same input: only the sum 0.4 + 0.4 counts. Rounding gives 0 + 0, feedback 0 + 1.
    weight = torch.tensor([[0.4, 0.4]])
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), -LIMIT, LIMIT, 2)
    gram = torch.ones(2, 2, dtype=torch.float64)
    assert grid.codes(weight).tolist() == [[0, 0]]
    assert error_feedback(weight, gram, grid).tolist() == [[0, 1]]


def test_feedback_is_rounding_when_inputs_are_uncorrelated() -> None:
    weight = gaussian()
    gram = torch.diag(torch.linspace(0.1, 9, 64, dtype=torch.float64))
    for grid in (channel_grid(weight, 3.0), group_grid(weight, 4, 16)):
        assert torch.equal(error_feedback(weight, gram, grid), grid.codes(weight))


def test_feedback_with_the_sign_of_its_correction_flipped_is_worse_than_rounding() -> None:
    # With correlated pairs, negating what is off the diagonal negates each correction and changes nothing else.
    weight, gram = gaussian(400, 64), pairs(64, 0.9)
    grid = channel_grid(weight, 2.0)
    rounded = relative(weight, grid, grid.codes(weight), gram)
    right = relative(weight, grid, error_feedback(weight, gram, grid), gram)
    wrong = relative(weight, grid, error_feedback(weight, pairs(64, -0.9), grid), gram)
    assert right < 0.9 * rounded
    assert wrong > 1.2 * rounded


def test_feedback_does_not_depend_on_blocks_or_on_the_other_rows() -> None:
    weight, gram = gaussian(40, 200), correlated(200)
    grid = channel_grid(weight, 3.0)
    codes = error_feedback(weight, gram, grid)
    part = Grid(grid.scale[7:9], grid.zero[7:9], grid.low, grid.high, grid.group)
    assert (error_feedback(weight[7:9], gram, part) != codes[7:9]).float().mean() < 0.01
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    mixed = error_feedback(weight[:, shuffle], gram[shuffle][:, shuffle], grid)
    assert (mixed != codes[:, shuffle]).float().mean() < 0.05


def test_feedback_stays_finite_when_inputs_were_never_seen() -> None:
    weight, gram = gaussian(), correlated()
    gram[10:20] = 0
    gram[:, 10:20] = 0
    grid = channel_grid(weight, 3.0)
    codes = error_feedback(weight, gram, grid)
    assert torch.equal(codes[:, 10:20], grid.codes(weight)[:, 10:20])
    assert relative(weight, grid, codes, gram) < relative(weight, grid, grid.codes(weight), gram)
    assert torch.equal(error_feedback(weight, torch.zeros_like(gram), grid), grid.codes(weight))


def test_distortion_is_what_its_definition_says() -> None:
    weight, other, x = gaussian(), gaussian(seed=5), gaussian(300, 64, seed=6)
    gram = (x.T @ x).double()
    assert distortion(weight, weight) == 0 and distortion(weight, weight.clone(), gram) == 0
    assert distortion(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert distortion(weight, torch.zeros_like(weight)) == pytest.approx(1)
    direct = ((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert distortion(weight, other, gram) == pytest.approx(direct, rel=1e-4)


def test_rate_of_counts_signed_and_unsigned_codes_alike() -> None:
    signed = torch.tensor([-63, 63, 0, 1], dtype=torch.int16)
    assert rate_of(signed) == pytest.approx(2)
    assert rate_of(torch.tensor([255, 255, 0, 0], dtype=torch.int16)) == pytest.approx(1)


def spread(columns: int = 64) -> Tensor:
    """A Gram matrix of independent inputs whose energies span five decades: what a step per column is for."""
    return torch.diag(torch.logspace(0, -5, columns, dtype=torch.float64)) * 1000


def test_a_step_per_column_loses_less_at_the_same_rate() -> None:
    weight, gram = gaussian(400), spread()
    losses, rates = [], []
    for grid in (channel_grid(weight, 3.0), column_grid(weight, gram, 3.0, 1e-6)):
        codes = error_feedback(weight, gram, grid, 1e-6)
        losses.append(relative(weight, rescaled(grid, weight, codes, gram), codes, gram))
        rates.append(rate_of(codes))
    assert rates == pytest.approx([3.0, 3.0], abs=0.15)
    assert losses[1] < 0.25 * losses[0]


def test_steps_follow_the_energy_that_others_cannot_make_up_for() -> None:
    columns = column_grid(gaussian(400), spread(), 3.0, 1e-6).columns
    assert columns is not None
    assert float(columns[40] / columns[20]) == pytest.approx(10 ** (5 * 20 / 63 / 2), rel=0.01)  # energy^-1/2


def test_rows_that_are_used_more_get_finer_steps_and_smaller_errors() -> None:
    weight, gram = gaussian(300), correlated()
    rows = torch.where(torch.arange(300) < 150, 1.0, 4.0)
    grid = column_grid(weight, gram, 3.0, rows=rows)
    error = (grid.values(error_feedback(weight, gram, grid)) - weight).square().mean(1)
    assert float(error[:150].mean()) < 0.2 * float(error[150:].mean())


def test_no_code_passes_the_limit_whatever_the_rows() -> None:
    weight = gaussian(100)
    weight[3, 5] = 80.0
    grid = column_grid(weight, correlated(), 3.0, rows=torch.logspace(-3, 0, 100))
    assert int(grid.codes(weight).abs().max()) == LIMIT
    assert float(grid.values(grid.codes(weight))[3, 5]) == pytest.approx(80, rel=0.01)


def test_rescaling_is_least_squares() -> None:
    weight, gram = gaussian(40), correlated()
    grid = column_grid(weight, gram, 2.0)
    codes = error_feedback(weight, gram, grid)
    better = rescaled(grid, weight, codes, gram)
    before, after = relative(weight, grid, codes, gram), relative(weight, better, codes, gram)
    assert after < before
    for factor in (0.98, 1.02):  # no scale of a row can be moved for the better, but for its float16
        moved = Grid(better.scale * factor, better.zero, better.low, better.high, better.group, better.columns)
        assert relative(weight, moved, codes, gram) > after


@pytest.mark.parametrize("loss", [2.0**-2, 2.0**-6, 2.0**-9])
def test_the_bound_is_that_of_white_gaussians(loss: float) -> None:
    gram = torch.eye(64, dtype=torch.float64) * 500
    assert bound(gaussian(3000), gram, loss) == pytest.approx(0.5 * math.log2(1 / loss), abs=0.02)  # D = 2^-2R


def test_the_bound_gives_weak_directions_no_bits() -> None:
    # Of energies 1 and 1/64, half each, an error of 1/8 on the mean needs theta = (1/8 * 65/64 - 1/64) a strong one.
    gram = torch.diag(torch.tensor([1.0, 1 / 64]).repeat(32))
    theta = 65 / 64 / 8 - 1 / 64
    assert bound(gaussian(3000), gram, 1 / 8) == pytest.approx(0.25 * math.log2(1 / theta), abs=0.02)


def test_the_bound_knows_that_rows_differ() -> None:
    scale = torch.logspace(-1, 0, 500, 10.0)[:, None]
    gain = 0.5 * float(scale.square().mean().log2() - scale.square().log2().mean())  # arithmetic over geometric mean
    plain = bound(gaussian(500), torch.eye(64), 2.0**-10)
    assert bound(gaussian(500) * scale, torch.eye(64), 2.0**-10) == pytest.approx(plain - gain, abs=0.05)


def test_the_bound_knows_the_covariance_of_a_table() -> None:
    shape = torch.linalg.cholesky(correlated().float() / correlated().diagonal().mean().float())
    gain = -float(shape.diagonal().log2().mean())
    assert gain > 0.3
    plain = bound(gaussian(4000), torch.eye(64), 2.0**-12)
    assert bound(gaussian(4000) @ shape.T, torch.eye(64), 2.0**-12) == pytest.approx(plain - gain, abs=0.1)


def test_the_bound_is_below_every_code() -> None:
    weight, gram = gaussian(600), correlated()
    grid = column_grid(weight, gram, 3.0, 1e-4)
    codes = error_feedback(weight, gram, grid, 1e-4)
    gap = rate_of(codes) - bound(weight, gram, relative(weight, grid, codes, gram))
    assert 0.1 < gap < 0.4  # a scalar code with entropy coding: 0.255 bit at high rate
