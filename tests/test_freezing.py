"""A fit that ships the classes of its data in place of the text tower, for the mobile dual encoder."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import packlight
from packlight.benching import evaluate_one
from packlight.data import prompted, read_dataset, split
from packlight.errors import DataError
from packlight.evaluate import Asked
from packlight.freezing import prompts_of
from packlight.scoring import frozen_rate
from small_dual import save_pictures
from test_mobile_dual import save


def test_a_fit_of_frozen_classes_measures_the_bundle_that_ships(tmp_path):
    model, data = save(tmp_path / "model"), save_pictures(tmp_path / "labels", 40, labels=True)
    size = 1_000_000
    found = packlight.fit(
        str(model),
        data,
        packlight.Target(size=size, drop=0.9),
        tmp_path / "out",
        packlight.Options(threads=1, freeze=True),
    )
    assert found.met
    served = packlight.open_served(tmp_path / "out" / "bundle", 1)
    manifest = served.bundle.manifest
    assert manifest["task"] == "image-classes" and manifest["serving"]["labels"] == ["blue", "green", "red"]
    assert {f.name for f in served.bundle.path.iterdir()} >= {"image.onnx.gz", "weights.safetensors"}
    assert not (served.bundle.path / "text.onnx.gz").exists() and served.bundle.size <= size
    evaluation = split(prompted(read_dataset(data)))[1]
    answers = [served.reply(served.open_input(s.path, ())) for s in evaluation.samples]
    rated = frozen_rate(evaluation, answers, served.decode)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metric"]["name"] == "top-1 error"
    assert result["metric"]["after"] == pytest.approx(rated["value"])
    assert result["metric"]["details"]["top-5"][:2] == [1.0, 1.0]
    assert all(p["rate"] is None for p in result["parts"] if p["name"].startswith("text"))
    assert result["model"]["usage"] == "--images DIR"
    assert evaluate_one(str(tmp_path / "out" / "bundle"), data, Asked())["n"] == 40


def test_classes_are_frozen_from_labels_alone(tmp_path):
    model, data = save(tmp_path / "model"), save_pictures(tmp_path / "captions", 8)
    command = ["fit", model, "--data", data, "--freeze", "--max-size", "1MB", "-o", tmp_path / "out"]
    call = [sys.executable, "-c", "from packlight.cli import main; main()", *map(str, command)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "label" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(DataError, match="label"):
        packlight.fit(str(model), data, packlight.Target(size=10**6), tmp_path / "x", packlight.Options(freeze=True))


def test_pictures_with_captions_calibrate_and_bring_no_class(tmp_path):
    captions = prompted(read_dataset(save_pictures(tmp_path / "captions", 8)), ("a {} dot.",), needed=False)
    labelled = prompted(read_dataset(save_pictures(tmp_path / "labels", 9, labels=True)), ("a {} dot.",))
    asked = {(f"a {colour} dot.",): colour for colour in ("blue", "green", "red")}
    assert prompts_of((captions, labelled)) == asked


def encoder_of(classes):
    """As much of an open bundle as a question is checked against."""
    encoder = SimpleNamespace(settings=SimpleNamespace(kind="image"), classes=classes)
    manifest = {"task": "image-text" if classes is None else "image-classes"}
    return SimpleNamespace(encoder=encoder, bundle=SimpleNamespace(manifest=manifest, path="B"))


@pytest.mark.parametrize("command", ["eval", "bench", "bench --profile", "run"])
def test_a_template_that_would_be_ignored_is_refused(tmp_path, monkeypatch, capsys, command):
    from packlight import benching, bundle, cli, serve

    data = save_pictures(tmp_path / "labels", 2, labels=True)
    frozen = command != "run"
    for module in (benching, serve):
        monkeypatch.setattr(module, "open_served", lambda *a: encoder_of([[1.0]] if frozen else None))
    for module in (benching, bundle):
        monkeypatch.setattr(module, "is_bundle", lambda path: True)
    asked = ["--data", data] if frozen else ["words", "--images", data]
    monkeypatch.setattr(sys, "argv", ["packlight", *command.split(), "B", *map(str, asked), "--template", "a {} dot."])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "eave" in said and ("frozen with the texts" if frozen else "--template is for --labels") in said
