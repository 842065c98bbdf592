"""What the machine does to a command: Ctrl-C, a full disk, no permission. Real processes, real limits."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import packlight
from packlight.bundle import open_bundle, verify
from packlight.terminal import sentence
from small_whisper import save_model, save_speech

pytest.importorskip("torch")
COMMAND = [sys.executable, "-c", "from packlight.cli import main; main()"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the tools of this test are Linux's")


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, samples, folder that holds bundle/)."""
    base = tmp_path_factory.mktemp("road")
    model, data = save_model(base / "model"), save_speech(base / "data")
    packlight.apply(str(model), packlight.Plan((packlight.Step("float16"),)), None, base / "out")
    return model, data, base / "out"


def say(*arguments: Any, prefix: tuple[str, ...] = (), before: Callable[[], None] | None = None) -> Any:
    return subprocess.run(
        [*prefix, *COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, preexec_fn=before
    )


def assert_sentence(done: Any, words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("packlight: ")
    assert words in last


def plan_file(folder: Path) -> Path:
    file = folder / "rounded.json"
    file.write_text('{"steps": [{"technique": "round_to_nearest"}, {"technique": "float16"}]}')
    return file


def at_most(size: int) -> Callable[[], None]:
    """Files may not grow beyond so many bytes: every write then fails as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_write_that_fails_is_a_sentence_and_the_earlier_bundle_survives(
    road: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, _, earlier = road
    out = tmp_path / "out"
    shutil.copytree(earlier, out)
    kept = open_bundle(out / "bundle").manifest
    plan = plan_file(tmp_path)
    for size in (5_000, 100_000):  # in a finished wave, which safetensors writes; in the bundle's weights
        done = say("apply", model, plan, "-o", out, before=at_most(size))
        assert_sentence(done, "File too large")
        assert "the same command goes on from here" in done.stderr
        verify(open_bundle(out / "bundle"))
        assert open_bundle(out / "bundle").manifest == kept
    assert say("apply", model, plan, "-o", out).returncode == 0
    verify(open_bundle(out / "bundle"))
    assert open_bundle(out / "bundle").manifest != kept


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@LINUX
def test_a_full_disk_is_a_sentence(road: tuple[Path, Path, Path], small_disk: Path, tmp_path: Path) -> None:
    model, data, _ = road
    assert_sentence(
        say("apply", model, plan_file(tmp_path), "-o", small_disk / "out"), "No space left on device. Make room"
    )
    assert_sentence(
        say("fit", model, "--data", data, "--max-size", "2MB", "-o", small_disk / "fit"), "MB free; this fit needs"
    )
    assert not (small_disk / "fit").exists()


def test_a_disk_that_is_full_while_a_folder_is_copied_is_a_sentence() -> None:
    why = "[Errno 28] No space left on device: 'work/bundle/weights.safetensors' -> 'bundle.part/weights.safetensors'"
    said = sentence(shutil.Error([("work/bundle/weights.safetensors", "bundle.part/weights.safetensors", why)]))
    assert "No space left on device. Make room" in said
    assert sentence(shutil.Error("of another kind")) == ""


def without_rights() -> tuple[str, ...]:
    """What makes root obey permissions: it loses the rights that let it pass over them."""
    if os.geteuid():
        return ()
    if not shutil.which("setpriv"):
        pytest.skip("root may do everything, and there is no setpriv to change that")
    rights = "-dac_override,-dac_read_search"
    return ("setpriv", "--bounding-set", rights, "--inh-caps", rights)


@LINUX
def test_missing_permission_is_a_sentence(road: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, data, earlier = road
    prefix = without_rights()
    locked = tmp_path / "locked"
    locked.mkdir()
    recording = tmp_path / "secret.wav"
    shutil.copy(data / "0.wav", recording)
    recording.chmod(0)
    locked.chmod(0o555)
    try:
        ask = ("fit", model, "--data", data, "--max-size", "2MB", "-o", locked / "out")
        assert_sentence(say(*ask, prefix=prefix), "Permission denied")
        assert_sentence(
            say("apply", model, plan_file(tmp_path), "-o", locked / "out", prefix=prefix),
            "Permission denied. Check its permissions, or name another",
        )
        assert_sentence(say("run", earlier / "bundle", recording, prefix=prefix), "secret.wav can't be read")
        assert list(locked.iterdir()) == []
    finally:
        locked.chmod(0o755)


def interrupted(arguments: list[Any], ready: Callable[[str], bool]) -> Any:
    """Start a command, press Ctrl-C once `ready` says so of a line of its stderr, and wait for its end."""

    def listen() -> None:  # a process started in the background may have been told to ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if ready(line):
            break
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, said + rest)


def test_ctrl_c_ends_a_run_with_one_line(road: tuple[Path, Path, Path], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 1800 * 16000)
    soundfile.write(tmp_path / "long.wav", noise, 16000)
    # The missing file is named at once, so its line says that the next one is being read.
    done = interrupted(["run", road[2] / "bundle", "none.wav", tmp_path / "long.wav"], lambda line: "none.wav" in line)
    assert done.returncode == 130
    assert done.stderr.strip().splitlines()[1:] == ["", "packlight: stopped."]
    assert done.stdout == ""


@pytest.mark.slow
def test_ctrl_c_ends_a_fit_that_then_goes_on(road: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, data, _ = road
    ask = [
        "fit",
        model,
        "--data",
        data,
        "--max-size",
        "2MB",
        "--max-drop",
        "90pp",
        "--threads",
        2,
        "-o",
        tmp_path / "o",
    ]
    for part in ("calibration samples", "measuring sensitivity", "compressing"):
        done = interrupted(ask, lambda line, part=part: part in line)
        assert done.returncode == 130, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last == "packlight: stopped. What is finished is kept: the same command goes on from here."
    assert say(*ask).returncode == 0
    whole = [*ask[:-1], tmp_path / "whole"]
    assert say(*whole).returncode == 0
    files = [open_bundle(tmp_path / name / "bundle").manifest["files"] for name in ("o", "whole")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_fit_on_a_full_disk_keeps_the_earlier_result_and_goes_on(
    road: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, data, _ = road
    ask = ["fit", model, "--data", data, "--max-drop", "90pp", "--threads", 2, "-o", tmp_path / "out", "--max-size"]
    assert say(*ask, "2MB").returncode == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    # Less than the smaller plan's finished waves, than its weights, and than its report.
    for size in (10_000, 60_000, 90_000):
        done = say(*ask, "300kB", before=at_most(size))
        assert_sentence(done, "File too large")
        assert (tmp_path / "out" / "result.json").read_bytes() == before
        verify(open_bundle(tmp_path / "out" / "bundle"))
    done = say(*ask, "300kB", "--json")
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["target"]["size"] == 300_000


def test_help_answers_within_half_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert say("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
