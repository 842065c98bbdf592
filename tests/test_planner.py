"""The front of plans, from planted sensitivities."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packlight.compress import check
from packlight.families import whisper
from packlight.fewer_tokens import Pruning
from packlight.model import Model, Source
from packlight.plan import Step
from packlight.planner import front, levels_between
from packlight.sensitivity import Level
from packlight.target import Target

TABLE = "vocabulary table and head"
ORIGIN: tuple[dict[str, Any], int] = ({}, 0)


def curve(part: str, kl: float, finest: int = 6000) -> list[Level]:
    """A part that loses `kl` at 3 bits and a quarter of it per bit more."""
    rated = [Level(part, r, int(1000 * r), kl * 4 ** (3 - r), 0.0) for r in (4.0, 3.0, 2.25)]
    return [Level(part, None, finest, kl * 4 ** (3 - finest / 1000), 0.0), *rated]


@pytest.fixture(scope="module")
def model() -> Any:
    nowhere = Source("", "", "", "", None, "", "", "", 0)
    return Model(whisper.tiny(), whisper.FAMILY, nowhere, "", {})


def rates(plan: Any) -> dict[str, float | None]:
    return {s.reason.partition(":")[0]: s.config.get("rate") for s in plan.steps if s.technique == "error_feedback"}


def test_levels_between_lie_on_the_curve() -> None:
    for level in levels_between(curve("x", 0.01)):
        if level.rate:
            assert level.kl == pytest.approx(0.01 * 4 ** (3 - level.rate), rel=1e-6)
            assert level.bytes == pytest.approx(1000 * level.rate, abs=2)


def test_a_finest_grid_that_is_coarse_bounds_nothing() -> None:
    levels = levels_between([Level("x", None, 3400, 0.02, 0.0), *curve("x", 0.01)[1:]])
    above = [lv for lv in levels if lv.rate and lv.rate > 4]
    assert above
    assert all(lv.kl < 0.0025 and lv.bytes > 4000 for lv in above)


def test_the_part_that_minds_more_gets_more_bits(model: Any) -> None:
    levels = [*curve("encoder attention", 0.001), *curve("decoder feed-forward", 0.064)]
    plans = [p for p in front(model, levels, {}, [Pruning()], [], ORIGIN) if p.name.startswith("p")]
    between = [r for p in plans if None not in (r := rates(p)).values() and 2.25 not in r.values()]
    assert between
    for found in between:  # 64 times the loss is three bits, as far as the rates reach
        assert found["decoder feed-forward"] > found["encoder attention"]
    sizes, losses = [p.expected["bytes"] for p in plans], [p.expected["kl"] for p in plans]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)


def test_layers_whose_errors_cost_more_get_more_bits_in_steps_of_their_own(model: Any) -> None:
    paths = [f"model.encoder.layers.0.self_attn.{name}_proj" for name in ("q", "v", "out")]
    spread = dict(zip(paths, (-0.7, 1.2, 0.0), strict=True))
    levels = [replace(lv, spread=spread if lv.rate else {}) for lv in curve("encoder attention", 0.01)]
    assert all(lv.spread == spread for lv in levels_between(levels) if lv.rate)
    plans = [p for p in front(model, levels, {}, [Pruning()], [], ORIGIN) if p.name.startswith("p")]
    assert plans
    for plan in plans:
        rate = {path: next(s for s in plan.steps if s.takes(path)).config.get("rate") for path in model.layers()}
        rest = rate["model.encoder.layers.1.self_attn.q_proj"]  # no spread: the part's own
        if rest is not None:
            wanted = {p: min(6.5, max(1.0, round(8 * (rest + bits)) / 8)) for p, bits in spread.items()}
            assert {p: rate[p] for p in paths} == wanted
        check(plan, model, "given")


def test_the_largest_plan_has_the_least_loss_however_little_its_bytes_buy(model: Any) -> None:
    grouped = Level(TABLE, 8.0, 10_000_000, 1e-9, 0.0, technique="group_weights")
    plans = front(model, [*curve(TABLE, 1e-6), grouped], {}, [Pruning()], [], ORIGIN)
    largest = max((p for p in plans if p.name.startswith("p")), key=lambda p: p.expected["bytes"])
    assert next(s for s in largest.steps if s.technique != "sinusoids").technique == "group_weights"
    slow = next(p for p in plans if p.name == "f01")
    assert "group_weights" in {s.technique for s in slow.steps[:2]}  # no less exact than the plan that it replaces


def best(plans: list[Any], size: float) -> float:
    """The least predicted loss among 8-bit plans of that many bytes."""
    return min((p.expected["kl"] for p in plans if p.name.startswith("p") and p.expected["bytes"] <= size), default=9.0)


def test_pruning_is_taken_only_where_it_costs_less_than_bits(model: Any) -> None:
    step = Step("prune_vocabulary", {}, ("*",), "planted")
    levels = [*curve(TABLE, 0.01), *curve("encoder attention", 0.01)]
    plain = front(model, levels, {}, [Pruning()], [], ORIGIN)
    both = front(model, levels, {}, [Pruning(), Pruning(0.5, 0.005, step)], [], ORIGIN)
    pruned = [p for p in both if p.steps[0].technique == "prune_vocabulary"]
    assert 0 < len(pruned) < len(both) - 2
    for plan in pruned:
        assert plan.expected["kl"] < best(plain, plan.expected["bytes"])
    dear = front(model, levels, {}, [Pruning(), Pruning(0.5, 5.0, step)], [], ORIGIN)
    least = min(p.expected["bytes"] for p in plain)
    assert all(p.expected["bytes"] < least for p in dear if p.steps[0].technique == "prune_vocabulary")


def test_rows_are_rounded_each_for_itself_where_that_is_worth_its_time(model: Any) -> None:
    levels = [*curve("encoder attention", 0.01), *curve("encoder feed-forward", 0.01)]
    rounding = {
        "encoder attention": {"int8": 2e-6, "int8_rows": 1e-6},
        "encoder feed-forward": {"int8": 1e-3, "int8_rows": 1e-5},
    }
    plan = front(model, levels, rounding, [Pruning()], [], ORIGIN)[0]
    modes = {s.reason.partition(":")[0]: s.config["activations"] for s in plan.steps if "activations" in s.config}
    assert modes == {"encoder attention": "int8", "encoder feed-forward": "int8_rows"}


def test_depthwise_convolutions_stay_float16_and_the_plan_says_so(tmp_path: Path) -> None:
    from packlight.compress import check
    from packlight.loading import load
    from small_dual import save_model

    dual = load(str(save_model(tmp_path / "align", "align")))
    whole = [p for p, layer in dual.layers().items() if getattr(layer, "groups", 1) > 1]
    levels = [lv for part in ("vision convolutions", "text attention") for lv in curve(part, 0.01)]
    for plan in front(dual, levels, {}, [Pruning()], [], ORIGIN)[:-1]:
        first = plan.steps[0]
        assert (first.technique, list(first.scope)) == ("float16", whole) and "depthwise" in first.reason
        found = check(plan, dual, "any")
        assert {found[p].technique.name for p in whole} == {"float16"}
        assert found["vision_model.embeddings.convolution"].technique.name == "error_feedback"


def test_convolutions_are_in_integers_where_that_loses_less_or_a_latency_asks_for_it(tmp_path: Path) -> None:
    from packlight.compress import check
    from packlight.loading import load
    from small_dual import save_model

    dual = load(str(save_model(tmp_path / "align", "align")))
    part = "vision convolutions"
    convs = {
        p for p, layer in dual.layers().items() if hasattr(layer, "groups") and dual.family.part_of(p).name == part
    }
    levels = [lv for name in (part, "text attention") for lv in curve(name, 0.01)]
    fast = Target(latency=0.1)
    for static, target, due in ((1e-3, None, True), (1e-1, None, False), (1e-1, fast, True)):
        rounding = {part: {"int8": 1e-2, "int8_rows": 1e-2, "static": static}}
        plan = front(dual, levels, rounding, [Pruning()], [], ORIGIN, target)[0]
        found = check(plan, dual, "any")
        assert {p for p, a in found.items() if a.technique.name == "static_int8"} == (convs if due else set())
        assert plan.expected["kl"] == pytest.approx(0.01 * 4 ** (0.75 - 0.15) * 2 + (static if due else 1e-2), rel=1e-6)
        step = next(s for s in plan.steps if part in s.reason)
        assert not due or (
            step.technique == "static_int8" and step.config["rate"] == 2.25 and "fixed ranges" in step.reason
        )


def test_words_keep_float_activations_unless_a_latency_or_memory_asks_for_integers(tmp_path: Path, model: Any) -> None:
    from packlight.loading import load
    from small_dual import save_model

    dual = load(str(save_model(tmp_path / "align", "align")))
    parts = ("vision convolutions", "text attention")
    levels = [lv for part in parts for lv in curve(part, 0.01)]
    rounding = {part: {"int8": 1e-2, "int8_rows": 1e-2} for part in parts}
    for target, words in ((None, "float"), (Target(latency=0.1), "int8"), (Target(memory=10**9), "int8")):
        plan = front(dual, levels, rounding, [Pruning()], [], ORIGIN, target)[0]
        modes = {s.reason.partition(":")[0]: s.config["activations"] for s in plan.steps if "activations" in s.config}
        assert modes == {"vision convolutions": "int8", "text attention": words}
        assert words != "float" or "ranks alike" in next(s.reason for s in plan.steps if "text attention" in s.reason)
    # What is heard is compared with nothing: its decoder keeps its integers.
    speech = front(model, curve("decoder feed-forward", 0.01), {}, [Pruning()], [], ORIGIN)[0]
    assert {s.config["activations"] for s in speech.steps if "activations" in s.config} == {"int8"}


def test_plans_go_along_a_trellis_where_there_is_room_and_the_finest_grid_stays_the_finest(model: Any) -> None:
    levels = [lv for part in {p.name for p in model.family.parts} for lv in curve(part, 1e-6)]
    plans = [p for p in front(model, levels, {}, [Pruning()], [], ORIGIN) if p.name.startswith("p")]
    seen = set()
    for plan in plans:
        for step in plan.steps:
            if step.technique == "error_feedback":
                assert bool(step.config.get("trellis")) == ((step.config["rate"] or 99) <= 4)
                seen.add(bool(step.config.get("trellis")))
    assert seen == {True, False}
    finest = max(plans, key=lambda p: p.expected["bytes"])
    assert finest is min(plans, key=lambda p: p.expected["kl"])
    assert not any(s.config.get("trellis") for s in finest.steps)
