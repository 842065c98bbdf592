"""Which plans can be taught, and how: by what their steps took away."""

from dataclasses import replace

import pytest

from packlight.compress import check
from packlight.loading import load
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.recovering import lesson, taught, unrounded
from small_whisper import save_model

FLOATS = Step("float16", {}, ("*",))
SHORT = Step("audio_context", {}, ("model.encoder.layers.*",))
FINE, COARSE = (Step("error_feedback", {"rate": rate}, ("*fc?",)) for rate in (None, 3.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(str(save_model(tmp_path_factory.mktemp("model") / "small")))


def steps(model: Model, *given: Step, samples: int = 50) -> list[str]:
    found = taught(model, Plan((*given, FLOATS), name="c07"), samples)
    assert all(p.name == "t07" for p in found)
    for p in found:
        check(p, model, "given")
    return [s.technique for p in found for s in p.steps[len(given) + 1 :]]


def test_a_short_context_is_taught_to_the_first_tower(model: Model) -> None:
    assert steps(model, SHORT, FINE) == ["distill"]
    plan = taught(model, Plan((SHORT, FLOATS), name="c07"), 50)[0]
    assert plan.steps[-1].scope == ("model.encoder.*",)


def test_few_bits_are_tuned_afterwards(model: Model) -> None:
    assert steps(model, COARSE) == ["tune_scales"]
    assert steps(model, SHORT, COARSE) == ["distill", "tune_scales"]


def test_a_plan_that_took_nothing_away_or_is_taught_already_has_nothing_to_learn(model: Model) -> None:
    assert steps(model, FINE) == []
    assert steps(model, SHORT, lesson(model, ("encoder",), "before")) == []
    assert steps(model, SHORT, samples=10) == []


def test_float_activations_change_nothing_else(model: Model) -> None:
    steps = [replace(s, config={**s.config, "activations": a}) for s, a in ((FINE, "int8"), (COARSE, "int8_rows"))]
    plan = Plan((*steps, FLOATS), name="t07", expected={"bytes": 5.0})
    (found,) = unrounded(plan)
    check(found, model, "given")
    assert found.name == "e07" and found.expected == plan.expected
    assert [s.config.get("activations") for s in found.steps] == ["float", "float", None]
    assert [{**s.config, "activations": 0} for s in found.steps] == [{**s.config, "activations": 0} for s in plan.steps]
    assert all("the drop was missed: float activations" in s.reason for s in found.steps[:2])
    assert unrounded(found) == []  # nothing is left to give
    assert unrounded(Plan((*steps, Step("static_int8", {}, ("*conv?",)), FLOATS), name="t07")) == []
