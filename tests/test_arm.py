"""A bundle ranks pictures under ARM emulation as it does here; without the emulator this is skipped."""

import sys
from pathlib import Path

import numpy as np
import pytest

from small_dual import WORDS, save_model, save_pictures

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import arm


def test_rankings_are_compared_by_order_and_scores():
    here = np.array([[0.9, 0.5, 0.1], [0.2, 0.21, 0.1]])
    same = arm.compared(here, here + 1e-6)
    assert (same["same"], same["same_first"], same["closest"]) == (2, 2, 0.0)
    turned = arm.compared(here, np.array([[0.9, 0.5, 0.1], [0.22, 0.2, 0.1]]))
    assert (turned["same"], turned["same_first"]) == (1, 1)
    assert turned["closest"] == pytest.approx(0.01) and turned["difference"] == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
def test_fifty_queries_are_ranked_on_arm_as_here(tmp_path, codes):
    if not arm.ready():
        pytest.skip(f"no emulated ARM in {arm.CACHE}; `python benchmarks/arm.py` sets it up")
    import packlight

    model, data = save_model(tmp_path / "model", "siglip"), save_pictures(tmp_path / "photos", 20)
    steps = [packlight.Step("round_to_nearest")] if codes else []
    plan = packlight.Plan((*steps, packlight.Step("float16")), family="dual-encoder")
    bundle = packlight.apply(str(model), plan, data, tmp_path / "out", packlight.Options(threads=1))
    draw = np.random.default_rng(0)
    queries = [" ".join(draw.choice(WORDS, 1 + i % 6)) for i in range(50)]
    found = arm.compare(bundle, sorted(data.glob("*.png")), queries, arm.CACHE, tmp_path)
    assert found["queries"] == 50
    # Two pictures may only change places where their scores are the same but for the last digits, or with codes but for
    # 8-bit activations, where a difference in the last digit tips some values to the next step.
    assert found["same"] == 50 or found["closest"] < (1e-3 if codes else 1e-5)
