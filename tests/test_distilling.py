"""Losses of distillation: planted values, and invariants that each must keep."""

import math

import pytest
import torch

from packlight import distilling as d

DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def test_kl_is_that_of_two_planted_coins() -> None:
    half, quarter = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    assert float(d.logit_kl(quarter, half)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert float(d.logit_kl(half, half)) == 0


def test_kl_falls_along_its_gradient_and_the_gradient_is_student_minus_teacher() -> None:
    now, aim = draw(1, 5).requires_grad_(True), draw(1, 5)
    d.logit_kl(now, aim).backward()
    assert torch.allclose(now.grad, now.detach().softmax(-1) - aim.softmax(-1), atol=1e-6)


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """For a high temperature the gradient is that of half the squared error of centred logits over the choices."""
    now, aim = draw(1, 4).requires_grad_(True), draw(1, 4)
    d.logit_kl(now, aim, 500.0).backward()
    gap = now.detach() - aim
    assert torch.allclose(now.grad, (gap - gap.mean()) / 4, atol=1e-2)


def test_hidden_error_is_a_share_of_the_energy() -> None:
    aim = draw(2, 7, 4)
    assert float(d.hidden_error(aim, aim)) == 0
    assert float(d.hidden_error(torch.zeros_like(aim), aim)) == pytest.approx(1)
    assert float(d.hidden_error(1.1 * aim, aim)) == pytest.approx(0.01, rel=1e-4)


def test_the_map_between_widths_is_the_planted_one() -> None:
    planted, states = draw(3, 5), [draw(1, 20, 3) for _ in range(2)]
    found = d.least_squares((s, s @ planted) for s in states)
    assert torch.allclose(found, planted, atol=1e-4)
    assert float(d.hidden_error(states[0], states[0] @ planted, found)) < 1e-8


def test_relations_do_not_see_a_rotation_of_each_head_and_take_other_widths() -> None:
    values = draw(1, 6, 8)
    turn = torch.linalg.qr(draw(2, 2))[0]
    turned = (values.unflatten(-1, (4, 2)) @ turn).flatten(-2)
    assert float(d.relation_kl(turned, values)) == pytest.approx(0, abs=1e-6)
    assert float(d.relation_kl(draw(1, 6, 8), values)) > 0.01
    assert float(d.relation_kl(draw(1, 6, 4), values)) > 0


def test_words_that_are_unknown_count_for_nothing() -> None:
    logits = torch.zeros(3, 4)
    assert float(d.words_error(logits, torch.tensor([1, 2, -100]))) == pytest.approx(math.log(4))


def test_bad_words_are_told_from_good_ones() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    assert d.bad_words(range(9), text, -0.3) == ""
    assert "unsure" in d.bad_words(range(9), text, -1.2)
    assert "unsure" in d.bad_words(range(9), text, float("nan"))
    assert "repeats itself" in d.bad_words(range(40), "thank you. " * 20, -0.1)
    assert "words repeat" in d.bad_words([1, 2, 3] * 8, "short", -0.1)
    assert d.bad_words([1, 2, 3] * 2, "short", -0.1) == ""
    assert d.bad_words([], "", -0.1) == ""


def sides(seed: int, width: int = 6) -> d.Sides:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, width, generator=generator), torch.randn(5, width, generator=generator)


def test_affinity_is_least_where_the_student_is_the_teacher() -> None:
    aim = sides(1)
    least = d.affinity_error(aim, aim)
    cosines = torch.nn.functional.normalize(aim[0], dim=-1) @ torch.nn.functional.normalize(aim[1], dim=-1).T
    entropy = [torch.distributions.Categorical(logits=50 * c).entropy().mean() for c in (cosines, cosines.T)]
    assert float(least) == pytest.approx(float(sum(entropy) / 2), rel=1e-4)
    assert float(d.affinity_error(sides(2), aim)) > float(least)
    assert torch.allclose(d.affinity_error((3 * aim[0], aim[1]), aim), least)
    assert torch.isfinite(d.affinity_error(sides(2, width=4), aim))


def test_features_are_compared_as_directions() -> None:
    aim = sides(1)
    assert float(d.feature_error((3 * aim[0], 0.1 * aim[1]), aim)) == pytest.approx(0, abs=1e-12)
    assert float(d.feature_error((-aim[0], aim[1]), aim)) == pytest.approx(4 / 6, rel=1e-5)  # (2 x)² of unit vectors
    planted = draw(4, 6)
    small = sides(3, width=4)
    assert float(d.feature_error(small, (small[0] @ planted, small[1] @ planted), (planted, planted))) < 1e-12


def test_the_interactive_loss_joins_the_student_to_the_other_tower_of_the_teacher() -> None:
    one = torch.eye(5)
    assert float(d.interactive_error((one, one), (one, one), 50.0)) < 1e-6
    swapped = one.roll(1, 0)
    assert float(d.interactive_error((swapped, one), (one, one), 50.0)) == pytest.approx(50, rel=1e-3)
    same = d.interactive_error(sides(1), sides(1), 7.0)
    assert float(same) == pytest.approx(2 * float(d.contrastive_error(sides(1), 7.0)), rel=1e-5)


def test_pairs_with_the_same_words_are_no_wrong_answers() -> None:
    same = d.same_words(torch.tensor([[1, 5, 2], [1, 5, 2], [1, 6, 2]]))
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    one = torch.eye(3)[[0, 0, 2]]
    assert float(d.contrastive_error((one, one), 50.0, same)) < 1e-6
    assert float(d.interactive_error((one, one), (one, one), 50.0, same)) < 1e-6
    assert float(d.contrastive_error((one, one), 50.0)) == pytest.approx(math.log(2) * 2 / 3, rel=1e-5)
