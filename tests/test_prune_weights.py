"""Single-weight pruning: exact counts, planted choices, and a rate that falls."""

from typing import Any

import pytest
import torch

from packlight.errors import PlanError
from packlight.quant import distortion
from packlight.techniques.codes import CodesConfig, round_to_nearest
from packlight.techniques.prune_weights import PruneWeightsConfig, prune


def skewed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a Gram matrix whose inputs differ a hundredfold in energy and are correlated."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, 64, generator=draw) @ torch.linalg.qr(torch.randn(64, 64, generator=draw))[0]
    x = (x + 0.5 * x.roll(1, 1)) * torch.logspace(-1, 1, 64)[torch.randperm(64, generator=draw)]
    return torch.randn(48, 64, generator=draw), (x.T @ x).double()


@pytest.mark.parametrize("score", ["wanda", "obs", "magnitude"])
def test_each_row_loses_the_share_and_each_group_keeps_its_count(score: Any) -> None:
    weight, gram = skewed()
    made = prune(weight, gram, PruneWeightsConfig(ratio=0.75, score=score)).tensors["codes"].T
    assert ((made != 0).sum(1) <= 16).all()
    assert (made != 0).sum() > 0.95 * 16 * 48
    groups = prune(weight, gram, PruneWeightsConfig(keep=2, of=4, score=score)).tensors["codes"].T.reshape(48, 16, 4)
    assert ((groups != 0).sum(2) <= 2).all()


def test_zeros_shrink_the_file() -> None:
    weight, gram = skewed()
    whole = round_to_nearest(weight, None, CodesConfig()).rate
    half, most = (prune(weight, gram, PruneWeightsConfig(ratio=r)).rate for r in (0.5, 0.9))
    assert most < half < 0.8 * whole


def test_loud_inputs_keep_their_weights() -> None:
    weight, gram = torch.full((1, 4), 0.1), torch.diag(torch.tensor([1.0, 1.0, 1000.0, 1000.0])).double()
    weight[0, :2] = 0.5
    kept = {
        s: (prune(weight, gram, PruneWeightsConfig(score=s)).approximation != 0)[0].tolist()
        for s in ("wanda", "magnitude")
    }
    assert kept == {"wanda": [False, False, True, True], "magnitude": [True, True, False, False]}


def test_scores_that_know_the_inputs_lose_less() -> None:
    weight, gram = skewed()
    loss = {
        s: distortion(weight, prune(weight, gram, PruneWeightsConfig(score=s)).approximation, gram)
        for s in ("wanda", "obs", "magnitude")
    }
    assert loss["wanda"] < 0.5 * loss["magnitude"]
    assert loss["obs"] < 0.5 * loss["magnitude"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [({"ratio": 1.0}, "ratio"), ({"keep": 4, "of": 4}, "fewer than all"), ({"score": "best"}, "score"),
     ({"rate": 9}, "rate"), ({"activations": "int4"}, "activations"), ({"damp": 0}, "damp")],
)  # fmt: skip
def test_wrong_settings_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        PruneWeightsConfig(**config)
