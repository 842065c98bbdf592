"""Models, samples and targets that can't be used get one sentence and status 2; nothing is written or lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch")


from refusals import Said, Things, copy, write_json

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
