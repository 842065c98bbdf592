"""The whole road of a dual encoder on a small random model: every part is real, only the weights mean nothing."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import packlight
from packlight.benching import bench_bundle, evaluate_one
from packlight.bundle import open_bundle
from packlight.data import read_dataset
from packlight.errors import BundleError, DataError
from packlight.evaluate import Asked
from packlight.freezing import freeze
from packlight.plan import read_plan
from small_dual import picture, save_model, save_pictures

COMMAND = [sys.executable, "-c", "from packlight.cli import main; main()"]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """(model folder, data folder, output folder, result) of one fit."""
    base = tmp_path_factory.mktemp("road")
    model, data = save_model(base / "my-clip"), save_pictures(base / "photos")
    target = packlight.Target(size=2_000_000, drop=0.9)
    found = packlight.fit(str(model), data, target, base / "out", packlight.Options(threads=1))
    return model, data, base / "out", found


def test_fit_meets_a_generous_target_and_says_what_it_measured(road):
    _, _, out, found = road
    assert found.met
    result = json.loads((out / "result.json").read_text())
    metric = result["metric"]
    assert metric["name"] == "1 - R@10"
    assert metric["n"] == result["data"]["evaluation"]["n"] == 24
    details = metric["details"]
    assert set(details) == {f"{way} recall@{k}" for way in ("text to image", "image to text") for k in (1, 5, 10)}
    assert metric["before"] == pytest.approx(1 - details["text to image recall@10"][0])
    assert metric["after"] == pytest.approx(1 - details["text to image recall@10"][1])
    assert {p["name"] for p in result["parts"]} >= {"vision attention", "text attention", "text token table"}
    assert all(p["share_of_multiply_adds"] > 0 for p in result["parts"] if p["name"].endswith("attention"))
    assert all(rung["passed"] for rung in result["ladder"])
    assert "1 - R@10" in (out / "report.html").read_text()


def test_apply_gives_the_bytes_of_the_fit_that_wrote_the_plan(road, tmp_path):
    model, data, out, _ = road
    bundle = packlight.apply(
        str(model), read_plan(out / "plan.json"), data, tmp_path / "again", packlight.Options(threads=1)
    )
    assert (bundle / "manifest.json").read_bytes() == (out / "bundle" / "manifest.json").read_bytes()


def test_eval_of_the_bundle_gives_the_metric_of_the_fit(road):
    model, data, out, _found = road
    whole = evaluate_one(str(out / "bundle"), data, Asked())
    assert whole["metric"] == "1 - R@10" and whole["n"] == 40
    assert whole["value"] == pytest.approx(1 - whole["details"]["text to image recall@10"])
    original = evaluate_one(str(model), data, Asked())
    assert original["details"].keys() == whole["details"].keys()


def test_run_ranks_pictures_as_the_products_of_the_original_do_when_weights_stay_float(road, tmp_path):
    model, data, _, _ = road
    plan = packlight.Plan((packlight.Step("float16"),), family="dual-encoder")
    bundle = packlight.apply(str(model), plan, None, tmp_path / "floats")
    said = run("run", bundle, "--images", data, "a red square", "--top", 40, "--json")
    original = packlight.load(str(model))
    family, samples = original.family, read_dataset(data).samples
    scores = []
    for s in samples:
        pair = family.open_input(s.path, ("a red square",))
        image, text = (np.array(v) for v in family.answer(original.module, pair, original.settings))
        scores.append(image @ text)
    rows = json.loads(said.stdout)[0]["found"]
    assert [Path(r["file"]).stem for r in rows[:5]] == [samples[i].path.stem for i in np.argsort(scores)[::-1][:5]]
    assert rows[0]["score"] == pytest.approx(max(scores), abs=1e-3)


def run(*arguments, code=0):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_run_sorts_pictures_into_labels_and_names_those_it_cannot_read(road, tmp_path):
    _, data, out, _ = road
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "good.png").write_bytes((data / "00.png").read_bytes())
    (folder / "cut.png").write_bytes((data / "00.png").read_bytes()[:200])
    done = run("run", out / "bundle", "--images", folder, "--labels", "red,green,blue", "--json", code=2)
    (row,) = json.loads(done.stdout)
    assert Path(row["file"]).name == "good.png"
    assert sum(x["share"] for x in row["labels"]) == pytest.approx(1, abs=1e-3)
    assert "cut.png" in done.stderr and "Traceback" not in done.stderr


def test_verify_bench_and_wrong_questions(road):
    model, data, out, _ = road
    run("verify", out / "bundle")
    found = bench_bundle(out / "bundle", data, str(model), Asked(threads=1))
    assert found["bundle"]["latency"] > 0 and found["pair"]["samples"] == 20
    assert "--images" in run("run", out / "bundle", "words", code=2).stderr
    assert "no --language" in run("run", out / "bundle", "w", "--images", data, "--language", "en", code=2).stderr
    # In a fit the language is that of the words to come, and says which tokens may go.
    asked = ("--max-size", "1MB", "--language", "xx", "-o", out.parent / "x")
    assert "no word frequencies for the language 'xx'" in run("fit", model, "--data", data, *asked, code=2).stderr


def test_labels_are_scored_by_zero_shot_classification(road, tmp_path):
    _, _, out, _ = road
    labelled = save_pictures(tmp_path / "labels", 12, labels=True)
    found = evaluate_one(str(out / "bundle"), labelled, Asked(templates=("a photo of {}", "the {} dot")))
    assert found["metric"] == "top-1 error"
    assert found["details"]["top-5"] == 1.0  # of three classes
    with pytest.raises(DataError, match="have it once|must have"):
        evaluate_one(str(out / "bundle"), labelled, Asked(templates=("a photo",)))


def test_every_command_of_the_page_runs(road):
    model, _, _, _ = road
    page = (Path(__file__).parent.parent / "docs" / "howto" / "image-text.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("packlight ") and "stamps" not in line]
    assert len(lines) == 10
    for line in lines:
        done = subprocess.run(
            [*COMMAND, *shlex.split(line)[1:]], capture_output=True, text=True, check=False, cwd=model.parent
        )
        # The drop that the page allows is more than a random model may keep: 3 says that it was measured and missed.
        assert done.returncode in ((0, 3) if "packlight fit" in line else (0,)), (line, done.stderr)
        assert done.stdout.strip()


def test_frozen_classes_rank_as_the_bundle_that_they_were_taken_from(road, tmp_path):
    model, _, out, _ = road
    labels = ("red", "green", "blue", "dark square")
    whole = packlight.open_served(out / "bundle")
    made = freeze(whole, labels, tmp_path / "frozen", ("a photo of the {}", "{}"))
    assert {f.name for f in made.path.iterdir()} == {
        "manifest.json",
        "history.json.gz",
        "image.onnx.gz",
        "weights.safetensors",
        "README.md",
    }
    assert made.size < 0.7 * whole.bundle.size
    frozen = packlight.open_served(made.path)
    classes = whole.encoder.embed_classes(labels, ("a photo of the {}", "{}"))
    # Rounding to nearest moves a score by at most half a step in each of its dimensions.
    step = np.abs(classes).max(1) / 127
    for i in range(5):
        exact = classes @ whole.encoder.embed_content(picture(i))
        (scores,) = frozen.reply((picture(i), ()))
        assert (np.abs(np.array(scores) - exact) <= step / 2 * np.sqrt(classes.shape[1]) + 1e-6).all()
    with pytest.raises(DataError, match="no text tower"):
        frozen.encoder.embed_text("red")
    labelled = save_pictures(tmp_path / "labels", 9, labels=True)
    found = evaluate_one(str(made.path), labelled, Asked())
    assert found["metric"] == "top-1 error" and 0 <= found["value"] <= 1
    timed = bench_bundle(
        made.path, labelled, str(model), Asked(threads=1)
    )  # one tower against the same of the original
    assert timed["pair"]["samples"] == 9 and timed["against"]["latency"] > 0
    with pytest.raises(DataError, match="different labels"):
        freeze(whole, ("red", "red"), tmp_path / "twice")
    with pytest.raises(BundleError, match="no text tower"):
        freeze(frozen, ("red", "blue"), tmp_path / "again")


def test_fit_refuses_pictures_without_words_and_sound(road, tmp_path):
    from small_whisper import save_speech

    model, data, _, _ = road
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(4):
        (bare / f"{i}.png").write_bytes((data / f"{i:02d}.png").read_bytes())
    target = packlight.Target(size=1_000_000)
    with pytest.raises(DataError, match="text or label"):
        packlight.fit(
            str(model), data, target, tmp_path / "a", packlight.Options(calibration=bare_without(data, tmp_path))
        )
    with pytest.raises(DataError, match="no transcript"):
        packlight.fit(str(model), bare, target, tmp_path / "a")
    with pytest.raises(DataError, match="audio files"):
        packlight.fit(str(model), save_speech(tmp_path / "speech"), target, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def bare_without(data, tmp_path):
    """Pictures that are in no other folder, without words."""
    folder = tmp_path / "others"
    save_pictures(folder, 44)
    for i in range(40):
        (folder / f"{i:02d}.png").unlink()
    (folder / "metadata.jsonl").unlink()
    return folder


def test_a_plan_can_be_applied_with_pictures_alone_and_says_that_one_tower_was_not_exercised(road, tmp_path, caplog):
    model, data, out, _ = road
    plan = read_plan(out / "plan.json")
    plan = packlight.Plan(plan.steps, plan.family)
    options = packlight.Options(calibration=bare_without(data, tmp_path), threads=1)
    bundle = packlight.apply(str(model), plan, None, tmp_path / "x", options)
    assert "text" in caplog.text and "not exercised" in caplog.text
    assert open_bundle(bundle).size > 0
