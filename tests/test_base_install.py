"""The base install, as a device has it: it runs, verifies, times and scores a bundle without PyTorch."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import packlight
from small_whisper import save_model, save_speech

ROOT = Path(__file__).resolve().parent.parent
FITTING = ("torch", "transformers", "onnx", "onnxscript", "jiwer", "psutil")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of a fresh environment with the base install."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run([folder / "bin" / "pip", "install", "-q", str(ROOT)], capture_output=True, text=True)
    if done.returncode:
        assert "No matching distribution" in done.stderr or "onnection" in done.stderr, done.stderr
        pytest.skip("no package index is reachable")
    return folder / "bin"


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, samples, bundle), made in the environment of these tests."""
    pytest.importorskip("torch")
    base = tmp_path_factory.mktemp("made")
    model, data = save_model(base / "model"), save_speech(base / "data")
    plan = packlight.Plan((packlight.Step("round_to_nearest"), packlight.Step("float16")))
    return model, data, packlight.apply(str(model), plan, None, base / "out")


def say(device: Path, *arguments: Any) -> Any:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [str(device / "packlight"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=device, env=environment)


def fitting_packages(device: Path) -> list[str]:
    code = f"import importlib.util as u, json; print(json.dumps([m for m in {FITTING!r} if u.find_spec(m)]))"
    done = subprocess.run([device / "python", "-Ic", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_that_fits_models_is_installed(device: Path) -> None:
    assert fitting_packages(device) == []


def test_a_bundle_is_run_verified_and_timed(device: Path, road: tuple[Path, Path, Path]) -> None:
    from packlight.audio import read_audio

    _, data, bundle = road
    served = packlight.open_served(bundle)
    done = say(device, "run", bundle, *sorted(data.glob("*.wav")), "--json")
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert row["text"] == served.answer(read_audio(Path(row["file"]))).text.strip()
    assert say(device, "verify", bundle).returncode == 0
    done = say(device, "bench", bundle, "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    assert 10e6 < json.loads(done.stdout)["bundle"]["memory"] < 300e6
    assert say(device, "bench", bundle).returncode == 0  # on noise


def test_what_needs_pytorch_says_how_to_have_it(device: Path, road: tuple[Path, Path, Path]) -> None:
    model, data, bundle = road
    for arguments in (
        ("fit", model, "--data", data, "--max-size", "2MB"),
        ("inspect", model),
        ("bench", bundle, "--against", model),
        ("eval", model, "--data", data),
    ):
        done = say(device, *arguments)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith("pip install 'packlight[fit]'"), done.stderr


def test_a_bundle_is_scored_once_the_packages_that_compare_text_are_there(
    device: Path, road: tuple[Path, Path, Path]
) -> None:
    _, data, bundle = road
    done = say(device, "eval", bundle, "--data", data)
    assert done.returncode == 2
    install = done.stderr.strip().rpartition("Install it: pip ")[2]
    assert install == "install 'packlight[eval]'"
    subprocess.run([device / "pip", "-q", *shlex.split(install)], check=True, capture_output=True)
    done = say(device, "eval", bundle, "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["metric"], found["n"], found["languages"]) == ("WER", 8, {"en": 8})
    assert fitting_packages(device) == ["jiwer"]
