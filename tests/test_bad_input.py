"""Input that can't be used gets one sentence and status 2 from the real command line; nothing is written or lost."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import packlight
from packlight import cli
from packlight.bundle import open_bundle, verify
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


# Models -------------------------------------------------------------------------------------------------------------


def no_config(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def no_safetensors(model: Path) -> None:
    (model / "model.safetensors").unlink()


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def unknown_architecture(model: Path) -> None:
    write_json(model / "config.json", architectures=["LlavaForConditionalGeneration"])


def own_code(model: Path) -> None:
    write_json(model / "config.json", auto_map={"AutoModel": "theirs.Model"})


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def nothing_left(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def not_a_number(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.encoder.conv1.weight"] = np.full_like(tensors["model.encoder.conv1.weight"], np.nan)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def no_json(model: Path) -> None:
    (model / "config.json").write_text("{oops")


BAD_MODELS = [
    (no_config, "has no config.json"),
    (no_safetensors, "holds no *.safetensors"),
    (only_a_pickle, "only as pytorch_model.bin, a pickle, which could run code when opened. Convert it"),
    (unknown_architecture, "no family for LlavaForConditionalGeneration"),
    (own_code, "--trust-remote-code"),
    (cut_short, "model.safetensors is damaged or cut short"),
    (nothing_left, "model.safetensors is damaged or cut short"),
    (not_a_number, "hold NaN or infinity, first model.encoder.conv1.weight"),
    (no_json, "config.json is no readable JSON"),
]


@pytest.mark.parametrize(("damage", "words"), BAD_MODELS, ids=[d.__name__ for d, _ in BAD_MODELS])
def test_models_that_cannot_be_used_are_refused(
    good: Things, refuse: Callable[..., None], tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    model = copy(good.model, tmp_path / "model")
    damage(model)
    refuse(words, "fit", model, "--data", good.data, "--max-size", "2MB", "-o", tmp_path / "out")
    refuse(words, "eval", model, "--data", good.data)
    if damage is not unknown_architecture:
        refuse(words, "inspect", model)


def test_missing_models_are_refused(good: Things, refuse: Callable[..., None], tmp_path: Path) -> None:
    refuse("is a file. Name the folder", "inspect", good.data / "0.wav")
    refuse("There is no folder", "inspect", tmp_path / "no" / "model")
    refuse("the hub did not give a model of that name", "inspect", "nobody/nothing")
    refuse("the hub did not give a model of that name", "bench", good.bundle, "--against", "nobody/nothing")


def test_what_can_still_be_done_with_an_unknown_architecture_is_shown(
    good: Things, say: Callable[..., Said], tmp_path: Path
) -> None:
    model = copy(good.model, tmp_path / "model")
    unknown_architecture(model)
    said = say("inspect", model)
    assert said.status == 0
    assert "LlavaForConditionalGeneration" in said.out
    assert "no family for it yet, so it can't fit it. Its largest groups of tensors:" in said.out
    assert "model.encoder" in said.out
    found = json.loads(say("inspect", model, "--json").out)
    assert found["family"] is None
    assert found["parameters"] > 100_000


# Samples ------------------------------------------------------------------------------------------------------------


def lines(data: Path, *rows: dict[str, Any]) -> None:
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def no_samples(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def missing_file(data: Path) -> None:
    lines(data, {"file_name": "0.wav", "text": "x"}, {"file_name": "gone.wav", "text": "x"})


def wrong_keys(data: Path) -> None:
    lines(data, {"wav": "0.wav", "words": "x"})


def no_transcripts(data: Path) -> None:
    lines(data, {"file_name": "0.wav"}, {"file_name": "1.wav", "text": "x"})


def silence_only(data: Path) -> None:
    lines(data, *({"file_name": f"{i}.wav", "text": ""} for i in range(8)))


def unreadable(data: Path) -> None:
    (data / "0.wav").write_bytes(b"no audio" * 100)


def empty_audio(data: Path) -> None:
    soundfile.write(data / "0.wav", np.zeros(0), 16000)


def cut_audio(data: Path) -> None:
    (data / "0.wav").write_bytes((data / "0.wav").read_bytes()[:-2000])


def one_sample(data: Path) -> None:
    lines(data, {"file_name": "0.wav", "text": "x"})


BAD_DATA = [
    (no_samples, "There is no audio in"),
    (missing_file, "Missing files (1): gone.wav (metadata.jsonl line 2)"),
    (wrong_keys, "metadata.jsonl line 1 names no file: it needs one of file_name"),
    (no_transcripts, "1 of 2 samples have no transcript"),
    (silence_only, "all transcripts are empty"),
    (unreadable, "0.wav can't be read as audio"),
    (empty_audio, "0.wav is empty"),
    (cut_audio, "0.wav is cut short"),
    (one_sample, "too few distinct recordings"),
]


@pytest.mark.parametrize(("damage", "words"), BAD_DATA, ids=[d.__name__ for d, _ in BAD_DATA])
def test_samples_that_cannot_be_used_are_refused(
    good: Things, refuse: Callable[..., None], tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    data = copy(good.data, tmp_path / "data")
    damage(data)
    refuse(words, "fit", good.model, "--data", data, "--max-size", "2MB", "-o", tmp_path / "out")
    if damage is not one_sample:
        refuse(words, "eval", good.bundle, "--data", data)


def test_data_that_is_not_there_or_was_calibrated_with_is_refused(
    good: Things, refuse: Callable[..., None], tmp_path: Path
) -> None:
    asked = ("fit", good.model, "--max-size", "2MB", "--data")
    refuse("There is no data at", *asked, tmp_path / "nowhere")
    refuse("There is no data at", *asked, good.data, "--calibration", tmp_path / "nowhere")
    refuse("8 of 8 samples to evaluate on are also calibrated with", *asked, good.data, "--calibration", good.data)


# Targets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("The size '12' has no unit. Write it like 12MB or 12MiB", "--max-size 12"),
        ("unknown unit 'XB'", "--max-size 12XB"),
        ("Can't read the size '-5MB'", "--max-size -5MB"),
        ("target size is 0; it must be above zero", "--max-size 0MB"),
        ("The drop '1' has no unit. Write it like 0.5pp", "--max-drop 1"),
        ("must be from 0 to below 1", "--max-drop 100pp"),
        ("The latency '300' has no unit", "--max-latency 300"),
        ("The memory '250' has no unit", "--max-memory 250"),
        ("Unknown device 'toaster'. Known: local", "--max-size 2MB --device toaster"),
        ("above what the device phone has", "--max-memory 20GB --device phone"),
        ("The target asks for nothing", ""),
        ("only transcribes English", "--max-size 2MB --language zh"),
        ("only transcribes English", "--max-size 2MB --task translate"),
    ],
)
def test_targets_that_mean_nothing_are_refused(
    good: Things, refuse: Callable[..., None], words: str, asked: str
) -> None:
    refuse(words, "fit", good.model, "--data", good.data, *asked.split())


def test_options_that_do_not_exist_are_named(good: Things, say: Callable[..., Said]) -> None:
    for arguments in (("fit", "m", "--data", "d", "--max-sise", "2MB"), ("fit", "m"), ("shrink", "m")):
        said = say(*arguments)
        assert said.status == 2
        assert "Traceback" not in said.err
        assert any(w in said.err for w in ("--max-sise", "--data", "shrink"))


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
    (bundle / "decoder.onnx").unlink()


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
    (missing_graph, "decoder.onnx is missing"),
    (extra_file, "extra.txt is not in the manifest"),
    (leaves_the_folder, "names '../secret', which is not a plain file name in this folder"),
    (newer, "has format version 99; this packlight reads up to 1. Update packlight"),
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
    assert words in cli._sentence(raised)


def test_errors_of_our_own_making_keep_their_traceback() -> None:
    assert cli._sentence(KeyError("x")) == ""
    assert cli._sentence(ModuleNotFoundError("no", name="packlight.nowhere")) == ""


def test_the_bundle_of_these_tests_is_whole(good: Things) -> None:
    verify(open_bundle(good.bundle))
