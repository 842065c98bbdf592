"""Folders, plans, bundles and recordings that can't be used get one sentence and status 2; nothing is lost."""

import errno
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from packlight import terminal
from packlight.bundle import open_bundle, verify
from packlight.errors import BundleError
from packlight.runtimes.onnx import read_graph

pytest.importorskip("torch")


from refusals import Said, Things, copy, write_json

# Output folders and plans -------------------------------------------------------------------------------------------


def test_folders_that_are_not_ours_are_left_alone(good: Things, refuse: Callable[..., None], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"steps": [{"technique": "float16"}]}')
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("dear reader")
    for verb in (("fit", good.model, "--data", good.data, "--max-size", "2MB"), ("apply", good.model, plan)):
        refuse("holds 'thesis.txt', which is not ours, so nothing was written", *verb, "-o", theirs)
        refuse("is a file. Name a folder", *verb, "-o", theirs / "thesis.txt")
        refuse("Not a directory", *verb, "-o", theirs / "thesis.txt" / "out")
    refuse("result.json can't be read", "report", theirs)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{oops", "is no readable JSON"),
        ("[]", "a plan is a JSON object"),
        ('{"steps": []}', "must be a list with at least one step"),
        ('{"steps": [{"technique": "magic"}]}', "technique 'magic'. Known: "),
        ('{"steps": [{"technique": "float16"}], "version": 9}', "newer than this packlight reads"),
        ('{"steps": [{"technique": "error_feedback"}]}', "needs calibration samples"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(
    good: Things, refuse: Callable[..., None], tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "plan.json").write_text(content)
    refuse(words, "apply", good.model, tmp_path / "plan.json", "-o", tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{", '{"version": 99}'])
def test_results_that_cannot_be_read_are_refused(refuse: Callable[..., None], tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    refuse("result", "report", tmp_path)


# Bundles ------------------------------------------------------------------------------------------------------------


def flipped_byte(bundle: Path) -> None:
    file = bundle / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def missing_graph(bundle: Path) -> None:
    (bundle / "decoder.onnx.gz").unlink()


def extra_file(bundle: Path) -> None:
    (bundle / "extra.txt").touch()


def leaves_the_folder(bundle: Path) -> None:
    files = open_bundle(bundle).manifest["files"]
    write_json(bundle / "manifest.json", files=files | {"../secret": {"bytes": 1, "sha256": "0" * 64}})


def newer(bundle: Path) -> None:
    write_json(bundle / "manifest.json", version=99)


def cut_manifest(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_bytes(file.read_bytes()[:-20])


def other_task(bundle: Path) -> None:
    write_json(bundle / "manifest.json", task="text-to-dance")


BAD_BUNDLES = [
    (flipped_byte, "weights.safetensors was changed: its sha256 is not the manifest's"),
    (missing_graph, "decoder.onnx.gz is missing"),
    (extra_file, "extra.txt is not in the manifest"),
    (leaves_the_folder, "names '../secret', which is not a plain file name in this folder"),
    (newer, "has format version 99; this packlight reads up to 3. Update packlight"),
    (cut_manifest, "manifest.json is no readable JSON"),
    (other_task, "is for the task 'text-to-dance'"),
]


@pytest.mark.parametrize(("damage", "words"), BAD_BUNDLES, ids=[d.__name__ for d, _ in BAD_BUNDLES])
def test_bundles_that_are_not_what_they_claim_are_refused(
    good: Things, refuse: Callable[..., None], tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    bundle = copy(good.bundle, tmp_path / "bundle")
    damage(bundle)
    refuse(words, "verify", bundle)
    refuse(words, "run", bundle, good.data / "0.wav")
    refuse(words, "bench", bundle)
    refuse(words, "eval", bundle, "--data", good.data)


def test_folders_that_are_no_bundles_are_refused(good: Things, refuse: Callable[..., None], tmp_path: Path) -> None:
    refuse("There is no folder", "verify", tmp_path / "nowhere")
    refuse("has no manifest.json, so it is no bundle", "verify", good.data)
    refuse("has no manifest.json", "run", good.model, good.data / "0.wav")


# Recordings ---------------------------------------------------------------------------------------------------------


def test_recordings_that_cannot_be_read_are_refused(good: Things, refuse: Callable[..., None], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "junk.ogg").write_bytes(b"no audio")
    for words, file in (
        ("is empty", tmp_path / "empty.wav"),
        ("can't be read as audio", tmp_path / "junk.ogg"),
        ("is a folder", tmp_path),
        ("There is no audio file", tmp_path / "none.wav"),
        ("can't be opened (File name too long)", "x" * 5000),
    ):
        refuse(words, "run", good.bundle, file)
    refuse("does not know the language 'zh'. Known: en", "run", good.bundle, good.data / "0.wav", "--language", "zh")
    refuse("does not know the task 'sing'", "run", good.bundle, good.data / "0.wav", "--task", "sing")


def test_one_bad_recording_does_not_lose_the_others(good: Things, say: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "junk.wav").write_bytes(b"no audio")
    said = say("run", good.bundle, "x" * 5000, tmp_path / "junk.wav", good.data / "0.wav", "--json")
    assert said.status == 2
    assert len(said.err.splitlines()) == 2
    assert [Path(row["file"]).name for row in json.loads(said.out)] == ["0.wav"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
def test_names_that_are_not_utf8_are_read_and_shown(good: Things, say: Callable[..., Said], tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    Path(name).write_bytes((good.data / "0.wav").read_bytes())
    said = say("run", good.bundle, name, good.data / "0.wav")
    assert said.status == 0
    assert "caf\\udce9.wav: " in said.out
    assert "caf\\udce9" in say("run", good.bundle, name + ".none").err


def test_silence_and_an_hour_of_audio_are_answered(good: Things, say: Callable[..., Said], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    noise = np.random.default_rng(0).normal(0, 0.1, 60 * 16000)
    with soundfile.SoundFile(tmp_path / "hour.wav", "w", 16000, 1) as file:
        for _ in range(60):
            file.write(noise)
    assert say("run", good.bundle, tmp_path / "silent.wav").status == 0
    said = say("run", good.bundle, tmp_path / "hour.wav", "--json")
    assert said.status == 0, said.err
    # The small model says no timestamps, so every window of 30 s is read whole, and each says something.
    assert len(json.loads(said.out)[0]["text"]) >= 120


# The machine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/disk/x"), "/disk/x: No space left on device. Make room"),
        (OSError(errno.EROFS, "Read-only file system", "/disk/x"), "/disk/x: Read-only file system."),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied. Check its permissions"),
        (ModuleNotFoundError("no", name="torch.nn"), "pip install 'packlight[fit]'"),
    ],
)
def test_troubles_of_the_machine_are_sentences(raised: Exception, words: str) -> None:
    assert words in terminal.sentence(raised)


def test_errors_of_our_own_making_keep_their_traceback() -> None:
    assert terminal.sentence(KeyError("x")) == ""
    assert terminal.sentence(ModuleNotFoundError("no", name="packlight.nowhere")) == ""


def test_the_bundle_of_these_tests_is_whole(good: Things) -> None:
    verify(open_bundle(good.bundle))


def test_a_graph_that_can_not_be_unpacked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "g.onnx.gz"
    for content in (b"no gzip", gzip.compress(b"x" * 1000)[:-9], gzip.compress(b"x" * 1000)[:20] + bytes(30)):
        file.write_bytes(content)
        with pytest.raises(BundleError, match="damaged"):
            read_graph(file)
    file.write_bytes(gzip.compress(bytes(1000)))
    assert read_graph(file) == bytes(1000)
    monkeypatch.setattr("packlight.runtimes.onnx._LARGEST", 999)
    with pytest.raises(BundleError, match="can't be right"):
        read_graph(file)
