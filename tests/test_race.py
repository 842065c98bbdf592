"""The race against other runtimes: the others say what the model says, and the arithmetic of its table."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from small_whisper import save_model, save_speech

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import race

from packlight.audio import open_audio
from packlight.data import read_dataset
from packlight.errors import DataError
from packlight.loading import load
from packlight.serving.whisper import Settings
from small_dual import save_model as save_dual


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("race") / "model")


def test_the_others_say_what_the_model_says(model: Path, tmp_path: Path) -> None:
    original = load(str(model))
    how = Settings.from_dict(original.family.serving(original.module, original.settings, None, "transcribe"))
    graphs = {g.name: race.export(g, tmp_path) for g in original.family.graphs(original.module)}
    plain = race.by_graphs(partial(race.onnx_runtime, quantized=False), graphs, how, 1)
    small = race.by_graphs(race.onnx_runtime, graphs, how, 1)
    weights = {
        name: sum(f.stat().st_size for f in tmp_path.glob(f"*{name}.onnx")) for name in ("decoder", "decoder-int8")
    }
    assert weights["decoder-int8"] < 0.6 * (weights["decoder"])
    dataset = read_dataset(save_speech(tmp_path / "speech", 3))
    audios = [open_audio(s.path, s.texts) for s in dataset.samples]
    asked = {
        race.REFERENCE: lambda audio: original.family.answer(
            original.module, audio, original.settings, None, "transcribe"
        ),
        "ONNX Runtime float32": plain,
        "ONNX Runtime dynamic int8": small,
    }
    times, said = race.race(asked, audios)
    assert times.shape == (3, 3) and (times > 0).all()
    assert said["ONNX Runtime float32"] == said[race.REFERENCE]
    assert all(map(len, said["ONNX Runtime dynamic int8"]))
    text = race.markdown(times, said, dataset, original.decoder())
    assert "times ONNX Runtime dynamic int8" in text and text.count("\n") == 5
    assert "+0.00 pp [+0.00, +0.00]" in text


def test_how_many_times_faster() -> None:
    slow, fast = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])
    assert race.ratio(slow, fast) == "2.00 [2.00, 2.00]"
    assert race.ratio(fast, slow).startswith("0.50")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = save_dual(tmp_path / "model", "clip")
    with pytest.raises(DataError, match="no Whisper model"):
        race.runners(load(str(folder)), str(folder), tmp_path, tmp_path, 1)
