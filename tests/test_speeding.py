"""A latency that quantization misses is met by fewer operations: how many, the measured times say."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

import packlight
from packlight.plan import Plan, read_plan
from packlight.speeding import Slow, share_to_prune
from small_whisper import save_model, save_speech


def slow(seconds: float, latency: float) -> Slow:
    return Slow(Plan(()), Path(), seconds, latency)


def test_the_share_is_what_the_times_ask_for() -> None:
    assert share_to_prune(slow(1.0, 0.9), 1.0) == pytest.approx(0.15)  # 0.1 with what is spare, in steps of 0.05
    assert share_to_prune(slow(1.0, 0.9), 0.5) == pytest.approx(0.25)  # only half of the time is the towers'
    assert share_to_prune(slow(1.0, 1e-6), 1.0) == pytest.approx(0.6)  # never more
    assert share_to_prune(slow(1.0, 0.99), 0.0) == pytest.approx(0.6)


@pytest.mark.slow
def test_a_latency_that_is_missed_is_tried_with_a_shorter_context_and_then_with_fewer_operations(
    tmp_path: Path,
) -> None:
    folder, data = save_model(tmp_path / "model"), save_speech(tmp_path / "data")
    target = packlight.Target(size=2_000_000, drop=0.9, latency=1e-6)
    found = packlight.fit(str(folder), data, target, tmp_path / "out", packlight.Options(threads=2))
    tried = found.result["tries"]
    assert [t["plan"][0] for t in tried] == ["p", "c", "s"]
    assert tried[2]["size"] < tried[1]["size"]
    # Which of them is nearest is for the clock to say, and this model is too small to be timed; each left its plan.
    plans = {plan.name: plan for plan in map(read_plan, (tmp_path / "out" / "work").glob("*/*/plan.json"))}
    plan = plans[tried[2]["plan"]]
    steps = {step.technique: step for step in plan.steps}
    assert {"audio_context", "prune_structure", "distill"} <= {*steps}
    assert "positions stay" in steps["audio_context"].reason
    pruning = steps["prune_structure"].reason
    assert "for the latency" in pruning and "60% asked for" in pruning
    # The bundle is whole, and repeats: its plan is applied to the same bytes.
    again = packlight.apply(str(folder), plan, data, tmp_path / "again", packlight.Options(threads=2))
    tried_bundle = next((tmp_path / "out" / "work").glob(f"*/{plan.key[:12]}")) / "bundle"
    assert _content(tried_bundle) == _content(again)


def _content(bundle: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in bundle.iterdir() if f.suffix in (".onnx", ".safetensors")}
