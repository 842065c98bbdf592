"""The ablation: its rows differ by one step each, share one budget, and judge on recordings nothing else has seen."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from small_whisper import save_model, save_speech

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation
from ablation import ALONE, STEPS, Bench, Row, allocate, fixed_width, steps
from ablation_report import markdown, times

from packlight.data import read_dataset
from packlight.errors import DataError
from packlight.sensitivity import Level
from packlight.techniques.codes import CodesConfig


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("ablation")
    model, speech = save_model(root / "model"), save_speech(root / "speech", 9)
    return Bench(str(model), read_dataset(speech), 4.0, root / "out")


def switches(row: Row) -> dict[str, bool]:
    return {k: v for k, v in vars(row).items() if k != "name"}


def test_each_row_has_one_step_more_than_the_row_before() -> None:
    assert not any(switches(STEPS[0]).values())
    for before, after in itertools.pairwise(STEPS):
        changed = {k for k, v in switches(after).items() if v != switches(before)[k]}
        assert len(changed) == 1
        assert all(switches(after)[k] for k in changed)
    full = switches(STEPS[-1])
    for row in ALONE:
        assert any(full[k] and not v for k, v in switches(row).items())


def test_a_part_gets_bits_by_what_it_costs() -> None:
    # KL falls fourfold per bit; the second part minds sixteen times as much, so it gets two bits more.
    def levels(part: str, minds: float) -> list[Level]:
        return [Level(part, r, int(1000 * r), minds * 4.0**-r, 0.0) for r in (1, 2, 3, 4, 5, 6)]

    parts = {"calm": levels("calm", 1.0), "touchy": levels("touchy", 16.0)}
    found = allocate(parts, 8000)
    best = min(
        (p for p in itertools.product(*parts.values()) if sum(lv.bytes for lv in p) <= 8000),
        key=lambda p: sum(lv.kl for lv in p),
    )
    assert [lv.rate for lv in found.values()] == [lv.rate for lv in best] == [3, 5]
    assert [lv.rate for lv in allocate(parts, 10).values()] == [1, 1]  # nothing fits: the smallest


def test_fixed_width_codes_fit_their_bits() -> None:
    made = fixed_width(torch.randn(64, 32), None, CodesConfig(rate=3.0))
    assert made.rate == 3
    assert int(made.tensors["codes"].abs().max()) == 3


def test_ratio_and_interval_are_those_of_paired_recordings() -> None:
    first = {"utterances": [(2.0 * i, 0, 9) for i in range(1, 30)]}
    second = {"utterances": [(1.0 * i, 0, 9) for i in range(1, 30)]}
    assert times(first, second) == pytest.approx((2.0, 2.0, 2.0))
    noisy = {"utterances": [(float(i % 3), 0, 9) for i in range(1, 30)]}
    ratio, low, high = times(noisy, second)
    assert low < ratio < high


def test_no_recording_is_in_two_sets(bench: Bench) -> None:
    sets = [{float(b["input_features"].sum()) for b in part} for part in bench.batches]
    assert [len(s) for s in sets] == [4, 1, 4]
    assert len(set().union(*sets)) == 9
    few = replace(bench, calibration=replace(bench.calibration, samples=bench.calibration.samples[:7]))
    with pytest.raises(DataError, match="at least 8"):
        assert few.batches


def test_rows_use_the_steps_that_they_name(bench: Bench) -> None:
    made = {row.name: steps(bench, row, 0.0) for row in STEPS[:4]}
    names = [next(iter(s.technique for s in found)) for found in made.values()]
    assert names == ["fixed_width", "round_to_nearest", "feedback_alone", "error_feedback"]
    assert all("use" not in s.config for found in made.values() for s in found)
    plain = steps(bench, Row("all alike", allocated=False), 0.0)
    assert {s.config["rate"] for s in plain if "rate" in s.config} == {4.0}
    assert any("use" in s.config for s in plain)  # the table's rows


def test_rows_come_to_the_budget_and_feedback_loses_less(bench: Bench) -> None:
    found = [ablation.measure(bench, row) for row in (STEPS[1], STEPS[2])]
    assert [row["bits"] for row in found] == pytest.approx([4.0, 4.0], abs=0.05)
    assert found[0]["kl"] > found[1]["kl"] > 0
    text = markdown(found, [found[0]], found[1])
    assert text.count("entropy-aware step") == 2
    gain = found[0]["kl"] / found[1]["kl"]
    assert f"| {gain:.2f} [" in text
