"""The sweep: which points, what they say, and that a finished one is not made again. A small random model."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import packlight
from packlight import sweeping
from packlight.bundle import open_bundle
from packlight.errors import PlanError, TargetError
from packlight.plan import Plan, Step, read_plan
from packlight.report_sweep import sweep_chart, write_sweep_report
from packlight.report_text import words
from packlight.sweeping import SweepOptions, choose_points, sweep_text
from small_dual import save_model as save_dual
from small_dual import save_pictures
from small_whisper import save_model, save_speech
from test_report import ATTACK, Page, places, planted, put

FIXTURE = Path(__file__).parent / "fixtures" / "sweep.json"


def front(sizes: list[float]) -> list[Plan]:
    return [
        Plan((Step("float16"),), name=f"p{i + 1:02d}", expected={"bytes": s, "kl": 1 / s}) for i, s in enumerate(sizes)
    ]


def names(plans: list[Plan]) -> list[str]:
    return [p.name for p in plans]


# --- which points ---


def test_points_are_evenly_spread_in_the_logarithm_of_bytes() -> None:
    plans = front([float(1000 * 2**i) for i in range(9)])
    assert names(choose_points(plans, SweepOptions(3), None, 0)) == ["p01", "p05", "p09"]
    assert names(choose_points(plans, SweepOptions(5), None, 0)) == ["p01", "p03", "p05", "p07", "p09"]
    assert names(choose_points(plans, SweepOptions(1), None, 0)) == ["p09"]
    assert len(choose_points(plans, SweepOptions(99), None, 0)) == 9


def test_points_are_different_ones_where_the_front_has_a_gap() -> None:
    plans = front([1000, 1010, 1020, 90_000, 91_000])
    found = choose_points(plans, SweepOptions(4), None, 0)
    assert len(found) == len(set(names(found))) == 4
    assert (found[0].name, found[-1].name) == ("p01", "p05")


def test_points_end_at_the_size_that_is_asked_for() -> None:
    plans = front([float(1000 * 2**i) for i in range(9)])
    found = choose_points(plans, SweepOptions(3), 16_500, 500)
    assert names(found) == ["p01", "p03", "p05"]
    assert names(choose_points(plans, SweepOptions(3), 16_400, 500))[-1] == "p04"  # the overhead counts
    with pytest.raises(TargetError, match=r"smallest is expected to take 1\.5 kB"):
        choose_points(plans, SweepOptions(3), 1400, 500)


def test_plans_to_keep_are_points_too() -> None:
    plans = front([float(1000 * 2**i) for i in range(9)])
    assert names(choose_points(plans, SweepOptions(2, ("p04",)), None, 0)) == ["p01", "p04", "p09"]
    with pytest.raises(PlanError, match="p77"):
        choose_points(plans, SweepOptions(2, ("p77",)), None, 0)
    with pytest.raises(TargetError):
        SweepOptions(0)


@pytest.mark.parametrize("limit", [{"latency": 0.3}, {"memory": 10**9}])
def test_limits_that_a_sweep_does_not_measure_are_refused(limit: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="measures size and quality"):
        packlight.sweep("m", "d", packlight.Target(**limit), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what it says ---


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def rendered(result: dict[str, Any], folder: Path) -> str:
    write_sweep_report(result, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_text_has_a_line_per_point_and_says_what_was_not_measured(result: dict[str, Any]) -> None:
    text = sweep_text(result, Path("out"))
    for point in result["points"]:
        line = next(line for line in text.splitlines() if line.startswith(point["plan"]))
        assert f"{100 * point['difference']:+.2f} pp" in line
    assert "time and memory it does not" in text
    assert text.count("within the drop") + text.count("misses the drop") == len(result["points"])
    assert "out/bundles/p52" in text
    for point in result["points"]:
        point["bundle"] = None
    assert "none kept" in sweep_text(result, Path("out"))


def test_the_report_shows_points_and_front_in_both_languages(result: dict[str, Any], tmp_path: Path) -> None:
    page = rendered(result, tmp_path)
    said = Page(page)
    assert said.open == []
    count, measured = len(result["front"]), len(result["points"])
    assert len(re.findall(r'<circle[^>]*class="measured"', page)) == 2 * 2 * measured
    assert len(re.findall(r'<circle[^>]*class="predicted"', page)) == 2 * (count - measured)
    assert len(re.findall(r'<line[^>]*class="span"', page)) == 2 * measured
    for code, language in (("en", "en"), ("zh", "zh-Hans")):
        w = words(code)
        for key in ("sweep", "sweep.curve", "sweep.points", "how", "notes"):
            assert w[key] in said.said[language]
    assert "The smallest point within the allowed drop is p61, 21.0 MB." in said.text()
    assert "最小的方案是 p61（21.0 MB）" in said.text("zh-Hans")


def test_lower_differences_stand_lower_and_smaller_ones_further_left(result: dict[str, Any]) -> None:
    chart = sweep_chart(result["points"], [], "WER", words("en"))
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)"', chart)]
    by_size = sorted(zip([p["size"] for p in result["points"]], dots, strict=True))
    assert [d[0] for _, d in by_size] == sorted(d[0] for d in dots)
    by_loss = sorted(zip([p["difference"] for p in result["points"]], dots, strict=True))
    assert [d[1] for _, d in by_loss] == sorted((d[1] for d in dots), reverse=True)
    first, second = by_size[0], by_size[1]
    share = math.log(second[0] / first[0]) / math.log(by_size[-1][0] / first[0])
    assert second[1][0] - first[1][0] == pytest.approx(share * (by_size[-1][1][0] - first[1][0]), abs=0.05)


def test_the_report_survives_wrong_fields_and_lets_no_stranger_in(result: dict[str, Any], tmp_path: Path) -> None:
    short = {k: v[:2] if isinstance(v, list) else v for k, v in result.items()}
    for wrong in (None, "words", -1, [], {}, True, float("nan")):
        for path in places(short):
            if path != ("version",):
                assert "</html>" in rendered(put(short, path, wrong), tmp_path)
    page = rendered(planted(result), tmp_path)
    assert ATTACK not in page
    assert page.lower().count("<script") == 1


# --- the whole road ---


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Any]]:
    """(model folder, data folder, output folder, result) of a sweep of two points."""
    base = tmp_path_factory.mktemp("curve")
    model, data = save_model(base / "model"), save_speech(base / "data", 6)
    options = packlight.Options(threads=1)
    found = packlight.sweep(str(model), data, None, base / "out", options, SweepOptions(2))
    return model, data, base / "out", found.result


def test_a_sweep_writes_points_that_can_be_applied_and_keeps_no_bundle(
    road: tuple[Path, Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, data, out, result = road
    assert {p.name for p in out.iterdir()} == {"work", "plans", "sweep.json", "report.html"}
    assert json.loads((out / "sweep.json").read_text()) == result
    small, large = result["points"]
    assert small["size"] < large["size"]
    assert small["kl"] > large["kl"]
    assert [r["plan"] for r in result["front"] if r["measured"]] == [small["plan"], large["plan"]]
    assert list(out.rglob("weights.safetensors")) == []
    plan = read_plan(out / small["file"])
    bundle = packlight.apply(str(model), plan, data, tmp_path / "again", packlight.Options(threads=1))
    assert open_bundle(bundle).size == small["size"]


def test_a_finished_point_is_not_made_again_and_a_kept_one_is_the_same(
    road: tuple[Path, Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, out, first = road
    shutil.copytree(out, tmp_path / "out")
    built = []
    real = sweeping.build
    monkeypatch.setattr(sweeping, "build", lambda run, plan: built.append(plan.name) or real(run, plan))
    kept = first["points"][0]["plan"]
    asked = SweepOptions(2, (kept,))
    found = packlight.sweep(str(model), data, None, tmp_path / "out", packlight.Options(threads=1), asked).result
    assert built == [kept]
    assert open_bundle(tmp_path / "out" / found["points"][0]["bundle"]).size == first["points"][0]["size"]
    same = [{**p, "bundle": None} for p in found["points"]]
    assert same == first["points"]


def test_each_point_says_how_far_the_sweep_is() -> None:
    said = []
    run = replace(object_run(), progress=lambda what, i, n: said.append((what, i, n)))
    told = sweeping._told(run, 2, 4, 0.0)
    told("compressing", 1, 7)
    assert re.fullmatch(r"point 3 of 4, about .+ left in all: compressing", said[0][0])
    assert said[0][1:] == (1, 7)


def object_run() -> Any:
    from packlight.fitting import Run

    return Run(*[None] * 8)  # type: ignore[arg-type]


def test_a_sweep_of_a_dual_encoder_has_its_own_metric(tmp_path: Path) -> None:
    model, data = save_dual(tmp_path / "my-clip"), save_pictures(tmp_path / "photos")
    found = packlight.sweep(
        str(model), data, None, tmp_path / "out", packlight.Options(threads=1), SweepOptions(1)
    ).result
    assert found["metric"]["name"] == "1 - R@10"
    assert [p["plan"] for p in found["points"]] == [r["plan"] for r in found["front"] if r["measured"]]
    assert "1 - R@10" in sweep_text(found, tmp_path)
    assert "1 - R@10" in (tmp_path / "out" / "report.html").read_text()
