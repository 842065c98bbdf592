"""CLAP goes the whole road: float weights give the original's vectors on the device, and every command takes sounds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import packlight
from packlight.benching import bench_bundle, evaluate_one
from packlight.compress import compress_
from packlight.data import read_dataset
from packlight.deploy import deploy, parity
from packlight.errors import DataError, ModelError
from packlight.evaluate import Asked
from packlight.families.dual_encoder import Pair, content_of, embed_text, run
from packlight.freezing import freeze
from packlight.plan import Plan, Step
from packlight.serve import open_served
from small_sound import save_model, save_sounds, sound

TEXTS = ("a red square on the light dot", "Blue.", "", "green " * 10_000, "图片")
PAIRS = [Pair(sound(i), (TEXTS[i % 2],)) for i in range(8)]
COMMAND = [sys.executable, "-c", "from packlight.cli import main; main()"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("clap")
    return {fused: save_model(base / f"clap-{fused}", fused) for fused in (False, True)}


@pytest.mark.parametrize("fused", [False, True])
def test_vectors_and_logits_are_those_of_the_models_own_forward(folders, fused):
    model = packlight.load(str(folders[fused]))
    batch = model.family.prepare(model.module, PAIRS, [], [], model.settings)
    texts = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = model.module(
            **texts, input_features=batch["input_features"], is_longer=torch.ones(8, 1, dtype=torch.bool)
        )
        sounds, words = content_of(model.module, batch), embed_text(model.module, **texts)
        logits = run(model.module, batch)
    assert torch.allclose(sounds, own.audio_embeds, atol=1e-5) and torch.allclose(words, own.text_embeds, atol=1e-5)
    assert torch.allclose(logits, torch.cat([own.logits_per_audio, own.logits_per_text]), atol=1e-4)
    assert (sounds @ sounds.T).min() < 0.999  # the sounds differ to it


@pytest.mark.parametrize("fused", [False, True])
def test_float_weights_give_the_originals_vectors_without_torch_and_the_same_ranking(folders, tmp_path, fused):
    model = packlight.load(str(folders[fused]))
    plan = Plan((Step("float16"),), family="dual-encoder")
    records = compress_(model, plan, [], tmp_path / "waves")
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    device, original = open_served(tmp_path / "bundle", 1), packlight.load(str(folders[fused]))
    assert device.bundle.manifest["task"] == "audio-text" and device.parts.keys() == {"audio", "text"}
    found = []
    for i in range(6):
        pair = (sound(i, 0.3 + 0.5 * i), TEXTS)
        theirs = np.array(original.family.answer(original.module, pair, original.settings))
        ours = np.array(device.reply(pair))
        assert np.abs(theirs - ours).max() < 3e-3  # float16 weights
        found.append((theirs[0], ours[0], theirs[0] @ theirs[1], ours[0] @ theirs[1]))
    ranking = [np.argsort([row[which] for row in found]).tolist() for which in (2, 3)]
    assert ranking[0] == ranking[1]
    again = packlight.load(str(tmp_path / "bundle"))  # the bundle as a PyTorch model
    batch = again.family.prepare(again.module, PAIRS, [], [], again.settings)
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, batch), model.family.run(model.module, batch))


@pytest.mark.parametrize("fused", [False, True])
def test_codes_give_in_the_runtime_what_they_give_in_torch(folders, tmp_path, fused):
    model = packlight.load(str(folders[fused]))
    batch = model.family.prepare(model.module, PAIRS, [], [], model.settings)
    for path in model.layers():
        part = model.family.part_of(path)
        assert part is not None and [t.name for t in model.family.towers if t.has(path)] == [part.tower]
    plan = Plan((Step("error_feedback", {"rate": None}), Step("float16")), family="dual-encoder")
    records = compress_(model, plan, [batch], tmp_path / "waves")
    assert model.layers() == {}
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    assert parity(model, open_served(tmp_path / "bundle", 1), [batch])["passed"]


def test_an_extractor_that_the_device_cannot_repeat_is_refused(folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders[False], tmp_path / "copy")
    file = next(f for f in folder.glob("*.json") if "fft_window_size" in f.read_text())
    values = json.loads(file.read_text())
    kept = values.get("feature_extractor") or values
    for change, said in (({"truncation": "fusion"}, "fusion"), ({"padding": "mirror"}, "out of range")):
        file.write_text(json.dumps({**values, **{**kept, **change}}))
        with pytest.raises((ModelError, packlight.errors.BundleError), match=said):
            packlight.load(str(folder))


# The whole road -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road(folders, tmp_path_factory):
    """(model folder, data folder, output folder, result) of one fit."""
    base = tmp_path_factory.mktemp("road")
    data = save_sounds(base / "sounds")
    target = packlight.Target(size=2_000_000, drop=0.9)
    found = packlight.fit(str(folders[False]), data, target, base / "out", packlight.Options(threads=1))
    return folders[False], data, base / "out", found


def test_fit_meets_a_generous_target_and_eval_gives_the_same_metric(road):
    model, data, out, found = road
    assert found.met
    metric = json.loads((out / "result.json").read_text())["metric"]
    ways = ("text to sound", "sound to text")
    assert set(metric["details"]) == {f"{way} recall@{k}" for way in ways for k in (1, 5, 10)}
    whole = evaluate_one(str(out / "bundle"), data, Asked())
    assert whole["metric"] == "1 - R@10" and whole["n"] == 40
    assert whole["value"] == pytest.approx(1 - whole["details"]["text to sound recall@10"])
    assert evaluate_one(str(model), data, Asked())["details"].keys() == whole["details"].keys()
    assert bench_bundle(out / "bundle", None, str(model), Asked(threads=1))["pair"]["samples"] == 1


def command(*arguments, code=0):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_run_searches_and_sorts_sounds_and_names_those_it_cannot_read(road, tmp_path):
    _, data, out, _ = road
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("00.wav", "01.flac", "02.wav"):
        (folder / name).write_bytes((data / name).read_bytes())
    found = json.loads(command("run", out / "bundle", "--sounds", folder, "a red dot", "--json").stdout)[0]["found"]
    served = open_served(out / "bundle", 1)
    files = [s.path for s in read_dataset(folder).samples]
    vectors = np.array([served.encoder.embed_content(served.open_input(f, ())[0]) for f in files])
    scores = vectors @ served.encoder.embed_text("a red dot")
    assert [Path(r["file"]).name for r in found] == [files[i].name for i in np.argsort(-scores)]
    (folder / "cut.wav").write_bytes((data / "00.wav").read_bytes()[:100])
    done = command("run", out / "bundle", "--sounds", folder, "--labels", "red,green", "--json", code=2)
    rows = json.loads(done.stdout)
    assert len(rows) == 3 and sum(x["share"] for x in rows[0]["labels"]) == pytest.approx(1, abs=1e-3)
    assert "cut.wav" in done.stderr
    assert "--sounds" in command("run", out / "bundle", "--images", folder, "words", code=2).stderr
    command("verify", out / "bundle")
    assert "audio tower" in command("bench", out / "bundle", "--profile").stdout
    assert "audio attention" in command("inspect", road[0]).stdout


def test_labels_of_sounds_are_asked_as_sounds_and_frozen(road, tmp_path):
    _, _, out, _ = road
    labelled = save_sounds(tmp_path / "labels", 9, labels=True)
    found = evaluate_one(str(out / "bundle"), labelled, Asked())
    assert found["metric"] == "top-1 error" and found["details"]["top-5"] == 1.0  # of three classes
    whole = open_served(out / "bundle", 1)
    made = freeze(whole, ("red", "green", "blue"), tmp_path / "frozen")
    assert made.manifest["serving"]["templates"] == ["This is a sound of {}."]
    assert {f.name for f in made.path.iterdir()} == {
        "manifest.json",
        "history.json.gz",
        "audio.onnx.gz",
        "weights.safetensors",
        "README.md",
    }
    classes = whole.encoder.embed_classes(("red", "green", "blue"), ("This is a sound of {}.",))
    (scores,) = open_served(made.path, 1).reply((sound(1), ()))
    assert np.allclose(scores, classes @ whole.encoder.embed_content(sound(1)), atol=0.02)
    assert evaluate_one(str(made.path), labelled, Asked())["metric"] == "top-1 error"


def test_pictures_are_refused(road, tmp_path):
    from small_dual import save_pictures

    model, _, out, _ = road
    with pytest.raises(DataError, match="image files"):
        evaluate_one(str(out / "bundle"), save_pictures(tmp_path / "photos", 4), Asked())
    with pytest.raises(DataError, match="image files"):
        packlight.fit(str(model), tmp_path / "photos", packlight.Target(size=1_000_000), tmp_path / "x")
