"""A latency that quantization misses is met by fewer operations: how many, the measured times say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import packlight
from packlight import speeding
from packlight.errors import PlanError
from packlight.evaluate import Asked
from packlight.families import Tower
from packlight.plan import Plan, Step, read_plan
from packlight.speeding import Slow, share_to_prune
from small_whisper import save_model, save_speech


def slow(seconds: float, latency: float) -> Slow:
    return Slow(Plan(()), Path(), seconds, latency)


def test_the_share_is_what_the_times_ask_for() -> None:
    assert share_to_prune(slow(1.0, 0.9), 1.0) == pytest.approx(0.15)  # 0.1 with what is spare, in steps of 0.05
    assert share_to_prune(slow(1.0, 0.9), 0.5) == pytest.approx(0.25)  # only half of the time is the towers'
    assert share_to_prune(slow(1.0, 1e-6), 1.0) == pytest.approx(0.6)  # never more
    assert share_to_prune(slow(1.0, 0.99), 0.0) == pytest.approx(0.6)


STAGES = {"image tower": 0.5, "text tower": 0.4, "other": 0.1}


def pruned(monkeypatch: pytest.MonkeyPatch, latency: float, prunable: tuple[str, ...], refuse: bool = False) -> Any:
    """(the plan for planted times of an answer of one second, the share that was asked for)."""
    asked: list[float] = []

    def step(model: Any, effects: Any, towers: Any, share: float) -> Step:
        asked.append(share)
        if refuse:
            raise PlanError("At most 5% can be pruned.")
        return Step("prune_structure", {}, tuple(towers))

    rows = [{"stage": name, "share": share} for name, share in STAGES.items()]
    planted = {
        "profile": lambda *a: {"stages": rows}, "coupled": lambda module, tower: tower.name in prunable,
        "measure_effects": lambda *a: [], "prune_step": step, "lesson": lambda *a: Step("distill"),
    }  # fmt: skip
    for name, made in planted.items():
        monkeypatch.setattr(speeding, name, made)
    towers = (Tower("vision", "image", "v"), Tower("text", "text", "t"))
    model: Any = SimpleNamespace(module=None, family=SimpleNamespace(towers=towers))
    plan = speeding.lighter(model, slow(1.0, latency), [], Asked(), ([], []), Path())
    return plan, asked


def test_only_the_time_of_towers_that_can_be_pruned_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = pruned(monkeypatch, 0.9, ("vision",))
    assert asked == [pytest.approx(0.25)]  # 0.1 of a second, and what is spare, out of the 0.5 of the picture tower
    assert "50% of it in these towers" in plan.steps[0].reason
    assert pruned(monkeypatch, 0.9, ("vision", "text"))[1] == [pytest.approx(0.15)]


def test_there_is_no_plan_where_the_towers_cannot_give_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pruned(monkeypatch, 0.4, ("vision",)) == (None, [])  # half of the time is not theirs
    assert pruned(monkeypatch, 0.4, ("vision", "text"))[0] is not None
    assert pruned(monkeypatch, 0.9, ("vision",), refuse=True)[0] is None
    assert pruned(monkeypatch, 0.9, ()) == (None, [])


@pytest.mark.slow
def test_a_latency_that_is_missed_is_tried_with_a_shorter_context_and_then_with_fewer_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A target that no model meets, and times as if the encoder took all of them: then there is always something to try.
    monkeypatch.setattr(speeding, "profile", lambda *a: {"stages": [{"stage": "encoder", "share": 1.0}]})
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
    return {f.name: f.read_bytes() for f in bundle.iterdir() if f.suffix in (".gz", ".safetensors")}
