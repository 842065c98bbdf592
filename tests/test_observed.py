"""What a plan's integers come from: all calibration recordings, once for a plan and for the same plan tuned."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import packlight.applying as applying
import packlight.compress as compress
from packlight.applying import Options, plan_batches
from packlight.compress import compress_
from packlight.data import read_dataset
from packlight.fitting import rounding
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.recovering import taught
from small_whisper import save_model, save_speech

RECORDINGS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("observed")
    return save_model(root / "model"), save_speech(root / "speech", RECORDINGS)


def _plan() -> Plan:
    codes = Step("error_feedback", {"rate": 3.0, "columns": True, "positions": 0.9, "use": 0.35}, ("*",))
    return Plan((codes, Step("float16")), "whisper", name="p1")


def test_a_plan_observes_every_recording(folders, tmp_path, monkeypatch) -> None:
    model, data = load(str(folders[0])), read_dataset(folders[1])
    monkeypatch.setattr(applying, "OBSERVED", 4)  # what sensitivities are measured with
    monkeypatch.setattr(applying, "JUDGED", 1)
    found = plan_batches(model, _plan(), data, Options(), tmp_path, None)
    assert len(found) == RECORDINGS
    assert len({float(b["input_features"].sum()) for b in found}) == RECORDINGS


def test_a_tuned_plan_takes_up_the_integers_of_the_untuned(folders, tmp_path, monkeypatch) -> None:
    plan = _plan()
    model = load(str(folders[0]))
    (tuned,) = taught(model, plan, RECORDINGS)
    assert tuned.key != plan.key and rounding(model, tuned).key == plan.key == rounding(model, plan).key
    assert rounding(model, replace(tuned, steps=tuned.steps[1:])).key != plan.key

    several = replace(model, family=replace(model.family, group=16))  # their plain plans observe fewer samples
    assert rounding(several, tuned).key == tuned.key

    batches = plan_batches(model, plan, read_dataset(folders[1]), Options(), tmp_path, None)
    plain, after, alone = (load(str(folders[0])) for _ in range(3))
    compress_(plain, plan, batches, tmp_path / "shared")
    compress_(alone, tuned, batches, tmp_path / "own")

    def refuse(*_: object) -> None:
        raise AssertionError("what a finished wave needs was measured again")

    monkeypatch.setattr(compress, "row_costs", refuse)
    compress_(after, tuned, batches, tmp_path / "shared")
    path = "model.encoder.layers.0.fc1"
    got, own, first = (m.module.get_submodule(path) for m in (after, alone, plain))
    assert got.codes.equal(own.codes) and got.scale.equal(own.scale)  # the same bytes as without the other's help
    assert got.codes.equal(first.codes) and not got.scale.equal(first.scale)
    with pytest.raises(AssertionError, match="measured again"):
        compress_(load(str(folders[0])), tuned, batches, tmp_path / "third")
