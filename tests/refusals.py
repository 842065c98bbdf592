"""Good input, and a way to say a command and to see it refused; the tests of bad input share them."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import packlight
from packlight import cli
from small_whisper import save_model, save_speech

pytest.importorskip("torch")


@dataclass(frozen=True)
class Things:
    """Good input: a model's folder, samples, a bundle."""

    model: Path
    data: Path
    bundle: Path


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Things:
    base = tmp_path_factory.mktemp("good")
    model, data = save_model(base / "model"), save_speech(base / "data")
    plan = packlight.Plan((packlight.Step("float16"),))
    return Things(model, data, packlight.apply(str(model), plan, None, base / "out"))


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command as the shell would, in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    handler = signal.getsignal(signal.SIGINT)

    def run(*arguments: Any) -> Said:
        monkeypatch.setattr(sys, "argv", ["packlight", *map(str, arguments)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as left:
                cli.main()
        finally:
            signal.signal(signal.SIGINT, handler)
        return Said(int(left.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def refuse(tmp_path: Path, say: Callable[..., Said]) -> Callable[..., None]:
    """Assert that a command is refused with one sentence that holds these words, and that no file has changed."""

    def check(words: str, *arguments: Any) -> None:
        before = contents(tmp_path)
        said = say(*arguments)
        assert said.status == 2, said
        assert said.err.startswith("packlight: "), said
        assert len(said.err.splitlines()) == 1, said
        assert words in said.err
        assert said.err.rstrip().endswith("."), said
        assert said.out == ""
        assert contents(tmp_path) == before

    return check


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() if f.is_file() else b"" for f in folder.rglob("*")}


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def write_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
