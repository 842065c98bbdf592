"""The certificate: its sums, what it leaves out, and what users are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from packlight.certificate import certify, with_gaps
from packlight.plan import Plan, Step
from packlight.report import render
from packlight.verdict import verdict_text
from test_report import FIXTURE, Page

PLAN = Plan((
    Step("error_feedback", {"rate": 3.0}, ("a.*",)), Step("error_feedback", {"rate": None}, ("b.*",)),
    Step("float16"),
))  # fmt: skip


def record(path: str, parameters: int, rate: float, bound: float | None, technique: str = "error_feedback") -> dict:
    return {"path": path, "part": path[0], "technique": technique, "parameters": parameters, "rate": rate,
            "distortion": 0.01, "bound": bound}  # fmt: skip


LAYERS = [
    record("a.0", 3000, 3.0, 2.5),
    record("a.1", 1000, 3.4, 2.9),
    record("b.0", 4000, 7.0, 5.0),
    record("c.0", 500, 16.0, None, "float16"),
    record("a.head", 0, 0.0, None),
]


def test_gaps_and_sums_are_those_of_the_layers_with_a_bound() -> None:
    layers = with_gaps(LAYERS, PLAN)
    assert [r["gap"] for r in layers] == [0.5, 0.5, 2.0, None, None]
    assert [r["rated"] for r in layers] == [True, True, False, False, True]
    found = certify(layers)
    assert found is not None
    assert (found["layers"], found["of_layers"], found["rated"]) == (3, 4, 2)
    assert (found["parameters"], found["of_parameters"]) == (8000, 8500)
    assert found["rate"] == pytest.approx((3 * 3 + 3.4 + 7 * 4) / 8)
    assert found["gap"] == pytest.approx((3 * 0.5 + 0.5 + 4 * 2) / 8) == pytest.approx(found["rate"] - found["bound"])
    assert found["gap_mean"] == pytest.approx(1.0)
    assert found["bytes"] == round((3 * 3 + 3.4 + 7 * 4) / 8 * 1000)
    assert found["bytes_at_bound"] == round((3 * 2.5 + 2.9 + 5 * 4) / 8 * 1000)
    assert {p["name"]: (p["layers"], round(p["gap"], 3)) for p in found["parts"]} == {"a": (2, 0.5), "b": (1, 2.0)}


def test_no_bound_no_certificate() -> None:
    assert certify(with_gaps(LAYERS[3:], PLAN)) is None


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def test_report_says_how_far_and_what_it_covers(result: dict[str, Any]) -> None:
    layers = with_gaps(LAYERS, PLAN)
    page = render({**result, "layers": layers, "certificate": certify(layers)})
    said = Page(page)
    assert "take 5.05 bits per weight, 1.25 above the theoretical limit of 3.80" in said.text()
    assert "比理论极限 3.80 位高 1.25 位" in said.text("zh-Hans")
    assert "the 3 of 4 layers" in said.text()
    assert "94.1 % of the weights" in said.text()
    assert "1 of them" in said.text()  # on the finest grid
    start = page.index('<section class="certificate">')
    section = page[start : page.index("</section>", start)]
    assert section.count("<rect") == 2 * 3
    rated = [r for r in layers if r["rated"] or r["gap"] is None]
    said = Page(render({**result, "layers": rated, "certificate": certify(rated)}))
    assert "exactness rather than size" not in said.text()


def test_report_says_below_when_weights_are_easier_than_gaussian(result: dict[str, Any]) -> None:
    layers = with_gaps([record("a.0", 10, 2.0, 2.25)], PLAN)
    said = Page(render({**result, "layers": layers, "certificate": certify(layers)})).text()
    assert "0.25 below the 2.25 that Gaussian weights would need" in said


def test_verdict_has_the_line_only_when_a_rate_was_asked_for(result: dict[str, Any]) -> None:
    result["target"] = {"size": None, "drop": None, "drop_relative": None, "latency": None, "memory": None}
    text = verdict_text({**result, "certificate": certify(with_gaps(LAYERS, PLAN))}, Path("out"))
    assert "5.05 bits per weight, 1.25 above the theoretical limit (3 of 4 layers" in text
    finest = certify(with_gaps(LAYERS[2:], PLAN))
    assert "theoretical limit" not in verdict_text({**result, "certificate": finest}, Path("out"))
    mostly = {**result["certificate"], "rated": 1, "layers": 3}
    assert "theoretical limit" not in verdict_text({**result, "certificate": mostly}, Path("out"))
