"""The whole road on a small random model: every part is real, only the weights mean nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import packlight
from packlight.bundle import open_bundle
from packlight.errors import DataError, TargetError
from packlight.evaluate import spread
from packlight.plan import read_plan
from small_whisper import save_model, save_speech

COMMAND = [sys.executable, "-c", "from packlight.cli import main; main()"]


def files_of(bundle: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in open_bundle(bundle).manifest["files"].items()}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """(model folder, data folder, output folder, result) of one fit."""
    base = tmp_path_factory.mktemp("road")
    model, data = save_model(base / "model"), save_speech(base / "data")
    target = packlight.Target(size=2_000_000, drop=0.9)
    found = packlight.fit(str(model), data, target, base / "out", packlight.Options(threads=2))
    return model, data, base / "out", found


def test_fit_meets_a_generous_target_and_writes_everything(road):
    _, _, out, found = road
    assert found.met
    assert {p.name for p in out.iterdir()} == {"work", "bundle", "plan.json", "result.json", "report.html", "log.jsonl"}
    result = json.loads((out / "result.json").read_text())
    assert result["verdict"]["headline"] == "MEETS TARGET"
    assert result["after"]["size"] == sum(f.stat().st_size for f in (out / "bundle").iterdir())
    assert result["after"]["memory"] > 10_000_000
    assert result["metric"]["n"] == result["data"]["evaluation"]["n"] >= 1


def test_apply_gives_the_bytes_of_the_fit_that_wrote_the_plan(road, tmp_path):
    model, data, out, _ = road
    options = packlight.Options(threads=2)
    bundle = packlight.apply(str(model), read_plan(out / "plan.json"), data, tmp_path / "again", options)
    assert files_of(bundle) == files_of(out / "bundle")
    assert (bundle / "manifest.json").read_bytes() == (out / "bundle" / "manifest.json").read_bytes()


@pytest.mark.slow
def test_bundle_answers_as_the_original_does_when_weights_stay_float(road, tmp_path):
    model, data, _, _ = road
    plan = packlight.Plan((packlight.Step("float16"),))
    bundle = packlight.apply(str(model), plan, None, tmp_path / "floats")
    served, original = packlight.open_served(bundle), packlight.load(str(model))
    from packlight.audio import read_audio
    from packlight.data import read_dataset

    for sample in spread(read_dataset(data), 3):
        audio = read_audio(sample.path)
        said = original.family.answer(original.module, audio, original.settings, None, "transcribe")
        assert list(served.answer(audio).tokens) == said


@pytest.mark.slow
def test_impossible_target_gives_the_nearest_point_and_status_3(road):
    model, data, _, _ = road
    out = data.parent / "impossible"
    arguments = ["fit", str(model), "--data", str(data), "--max-size", "10kB", "--max-drop", "90pp", "-o", str(out)]
    done = subprocess.run([*COMMAND, *arguments, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    verdict = json.loads(done.stdout)["verdict"]
    assert verdict["binding"] == "size"
    assert verdict["nearest"]["relax"]["size"] > 10_000
    assert read_plan(out / "plan.json").steps


def test_fit_refuses_a_folder_that_is_not_ours(road, tmp_path):
    model, data, _, _ = road
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="not ours"):
        packlight.fit(str(model), data, packlight.Target(size=1_000_000), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_fit_refuses_an_empty_target(road, tmp_path):
    model, data, _, _ = road
    with pytest.raises(TargetError, match="asks for nothing"):
        packlight.fit(str(model), data, packlight.Target(), tmp_path / "x")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "no/such/folder"], "no/such/folder"),
        (["verify", "no-bundle"], "no folder"),
        (["fit", "m", "--data", "d", "--max-size", "12"], "no unit"),
        (["fit", "m", "--data", "nowhere", "--max-size", "12MB"], "nowhere"),
        (["apply", "m", "nowhere.json", "-o", "x"], "nowhere.json"),
        (["report", "nowhere"], "result.json"),
    ],
)
def test_wrong_input_gives_one_sentence_and_status_2(arguments, sentence, tmp_path):
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_fit_killed_at_five_moments_ends_with_the_same_bytes(road, tmp_path):
    model, data, out, _ = road
    again = tmp_path / "killed"
    arguments = ["fit", str(model), "--data", str(data), "--max-size", "2MB", "--max-drop", "90pp", "--threads", "2"]
    for seconds in (9, 12, 15, 19, 24):
        process = subprocess.Popen([*COMMAND, *arguments, "-o", str(again)], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*COMMAND, *arguments, "-o", str(again)], check=True, capture_output=True)
    assert files_of(again / "bundle") == files_of(out / "bundle")


def test_flipped_byte_is_refused(road, tmp_path):
    _, _, out, _ = road
    copy = tmp_path / "bundle"
    shutil.copytree(out / "bundle", copy)
    file = copy / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = subprocess.run([*COMMAND, "verify", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sha256" in done.stderr
