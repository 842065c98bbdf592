"""A plan is data: it survives JSON, and a file that a person got wrong is refused with the key that is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packlight.errors import PlanError
from packlight.plan import VERSION, Plan, Step, plan_from_dict, read_plan, write_json

PLAN = Plan(
    steps=(
        Step("error_feedback", {"rate": 5.5}, ("model.encoder.*", "proj_out"), "most bytes"),
        Step("float16", scope=("*norm*",)),
    ),
    calibration={"sha256": "ab", "n": 3, "seconds": 20.5},
    seed=7,
    name="p07",
    expected={"bytes": 5e6, "kl": 0.01},
)


def test_a_plan_survives_json(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", PLAN.to_dict())
    assert read_plan(tmp_path / "plan.json") == PLAN
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_written_by_hand_gets_the_defaults() -> None:
    plan = plan_from_dict({"steps": [{"technique": "float16"}]})
    assert plan == Plan((Step("float16", {}, ("*",), ""),), family="whisper", seed=0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"steps": [{"technique": "float16"}], "stpes": 1}, "stpes"),
        ({"steps": [{"technique": "float16"}, {"technique": "x", "skope": ["*"]}]}, "step 2.*skope"),
        ({"steps": []}, "at least one step"),
        ({}, "steps"),
        ({"steps": {"technique": "float16"}}, "must be a list"),
        ({"steps": ["float16"]}, "step 1.*technique"),
        ({"steps": [{"technique": 3}]}, "step 1.*technique"),
        ({"steps": [{"technique": "x", "scope": "model.*"}]}, "scope"),
        ({"steps": [{"technique": "x", "scope": []}]}, "scope"),
        ({"steps": [{"technique": "x", "scope": [1]}]}, "scope"),
        ({"steps": [{"technique": "x", "config": [1]}]}, "config"),
        ({"steps": [{"technique": "x"}], "version": VERSION + 1}, "Update packlight"),
        ({"steps": [{"technique": "x"}], "version": "1"}, "version"),
        ([], "JSON object"),
        (None, "JSON object"),
    ],
)
def test_a_plan_is_refused_with_what_is_wrong(values: Any, named: str) -> None:
    with pytest.raises(PlanError, match=f"mine.json.*{named}"):
        plan_from_dict(values, "mine.json")


def test_read_plan_refuses_what_is_no_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="no plan file"):
        read_plan(file)
    for data in (b'{"steps": [', b"\xff\xfe", b""):
        file.write_bytes(data)
        with pytest.raises(PlanError, match="no readable JSON"):
            read_plan(file)


@pytest.mark.parametrize(
    ("scope", "path", "taken"),
    [
        (("*",), "proj_out", True),
        (("model.encoder.*",), "model.encoder.layers.0.fc1", True),
        (("model.encoder.*",), "model.decoder.layers.0.fc1", False),
        (("model.encoder.layers.*.fc?",), "model.encoder.layers.11.fc2", True),
        (("model.encoder.layers.*.fc?",), "model.encoder.layers.11.fc", False),
        (("a", "proj_out"), "proj_out", True),
        (("Proj_out",), "proj_out", False),
        (("modelxencoder",), "model.encoder", False),
        (("model.encoder",), "modelxencoder", False),
        ((".*out",), "proj_out", False),
    ],
)
def test_a_scope_is_wildcards_and_no_regular_expression(scope: tuple[str, ...], path: str, taken: bool) -> None:
    assert Step("float16", scope=scope).takes(path) is taken


def test_key_ignores_reasons_names_and_expectations() -> None:
    steps = tuple(replace(s, reason="another") for s in PLAN.steps)
    assert replace(PLAN, steps=steps, name="p99", expected={}).key == PLAN.key
    assert plan_from_dict(json.loads(json.dumps(PLAN.to_dict()))).key == PLAN.key


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"family": "other"},
        {"calibration": {}},
        {"steps": PLAN.steps[::-1]},
        {"steps": (replace(PLAN.steps[0], config={"rate": 5.4}), PLAN.steps[1])},
        {"steps": (replace(PLAN.steps[0], scope=("*",)), PLAN.steps[1])},
        {"steps": (replace(PLAN.steps[0], technique="round_to_nearest"), PLAN.steps[1])},
    ],
)
def test_key_changes_with_everything_that_applying_depends_on(change: dict[str, Any]) -> None:
    assert replace(PLAN, **change).key != PLAN.key
