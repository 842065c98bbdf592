"""The clip art student: its command runs from a folder to models that packlight reads, and goes on where it was."""

import copy
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import torch

import packlight
from small_dual import save_pictures
from test_mobile_dual import made, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "clipart"))
import lessons
import student

CUT, FROZEN = 2, 1
STILL = ("text_model.", "vision_model.stem.", *(f"vision_model.blocks.{i}." for i in range(CUT)))
SETTINGS = ["--batch", "4", "--epochs", "2", "--frozen", str(FROZEN), "--size", "64", "--share", "0.8"]
FOLDERS = (("train", 12), ("emoji", 7), ("validation", 6), ("held-out", 6))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A trained model, its drawings, and in place of the published towers some that differ behind the first blocks."""
    save(tmp_path / "model", side=64)
    for name, count in FOLDERS:
        folder = save_pictures(tmp_path / "drawings" / name, count)
        file = folder / "metadata.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [
            {"file_name": r["file_name"], "text": r["texts"][0], "title": "x", "keywords": r["texts"]} for r in rows
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, other, asked = packlight.load(str(tmp_path / "model")).module.state_dict(), made(seed=1), []
    other.load_state_dict({n: whole[n] if n.startswith(STILL) else t for n, t in other.state_dict().items()})

    def start(work, seed=0):
        asked.append(work)
        return copy.deepcopy(other), {}

    monkeypatch.setattr(student.views, "CUT", CUT)
    monkeypatch.setattr(student.towers, "start", start)
    return tmp_path, other, asked


def run(place, monkeypatch, *more, out="half"):
    command = ["student.py", str(place / "model"), str(place / "drawings"), "-o", str(place / out), *SETTINGS, *more]
    monkeypatch.setattr(sys, "argv", command)
    assert student.main() == 0
    return json.loads((place / out / "student.json").read_text())


def state(folder):
    return packlight.load(str(folder)).module.state_dict()


def test_the_command_trains_all_arms_and_writes_them(place, monkeypatch, capsys):
    tmp_path, _, asked = place
    found = [run(tmp_path, monkeypatch, "--arms", *student.ARMS) for _ in range(2)]
    first, again = capsys.readouterr().out.split("picture tower:")[1:]
    assert found[0] == found[1]  # the second run finds everything done
    assert "taught, epoch 2:" in first and "alone, epoch 2:" in first
    assert "epoch 1:" not in again and "epoch 2:" not in again
    assert {"teacher", "inherited", *student.ARMS} <= {*found[0]} and found[0]["share"] <= 0.8
    assert {*found[0]["error"]} == {"inherited", "taught", "started", "fresh"}
    assert asked == [tmp_path, tmp_path]  # the wheels lie beside the drawings
    original = state(tmp_path / "model")
    for name in student.ARMS:
        small = state(tmp_path / "half" / f"{name}-model")
        text = [k for k in original if k.startswith("text_model.")]
        assert text and all(original[k].equal(small[k]) for k in text)  # the text tower stays
        vision = [sum(v.numel() for k, v in m.items() if k.startswith("vision_model.")) for m in (small, original)]
        assert vision[0] < vision[1]


def test_the_default_arms_learn_from_the_emoji_too_where_they_are(place, monkeypatch):
    tmp_path, *_ = place
    assert {"taught", "alone"} == {*run(tmp_path, monkeypatch)["arms"]}
    files = {f.name.rpartition("-")[0] for f in (tmp_path / "half").glob("*.text.npy")}
    learned = [f"{n}-{c}-{v}" for n, c in FOLDERS[:2] for v in range(2)]
    assert files == {*learned, "validation-6-0", "held-out-6-0"}


def test_the_epoch_that_stays_is_the_nearest_to_the_teacher(place, monkeypatch):
    tmp_path, *_ = place
    courses, prepared = [], student.prepared

    def watched(*given):
        courses.append(prepared(*given))
        return courses[-1]

    monkeypatch.setattr(student, "prepared", watched)
    monkeypatch.setattr(student, "PAIRS", 3000.0)  # pulls away from the teacher, so that the last need not be nearest
    found = run(tmp_path, monkeypatch, "--arms", "taught", "started", "--epochs", "4", "--rate", "0.05")["arms"]
    _, course, _ = courses[0]
    for name, arm in found.items():
        module = packlight.load(str(tmp_path / "half" / f"{name}-model")).module
        judged = student.distance(module, course.checked), student.pairs_loss(module, course.checked, 4)
        assert len(arm["curve"]) == 5 and arm["epoch"] == int(np.argmin(arm["curve"]))
        assert float(judged[name != "taught"]) == pytest.approx(min(arm["curve"]), rel=1e-4)


def test_alone_starts_as_published_and_never_sees_the_trained_weights(place, monkeypatch):
    tmp_path, other, _ = place
    started, trained = {}, student.trained

    def watched(name, start, course):
        started[name] = copy.deepcopy(start.module.state_dict())
        return trained(name, start, course)

    monkeypatch.setattr(student, "trained", watched)
    run(tmp_path, monkeypatch)
    taught, alone = started["taught"], started["alone"]
    assert {n: t.shape for n, t in taught.items()} == {n: t.shape for n, t in alone.items()}
    assert all(alone[n].equal(t) for n, t in taught.items() if n.startswith(STILL))
    theirs = other.state_dict()
    whole = [n for n, t in alone.items() if t.shape == theirs[n].shape and not n.startswith(STILL)]
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} < {*whole}
    assert all(alone[n].equal(theirs[n]) for n in whole)
    behind = [n for n in alone if not n.startswith((*STILL, "logit_scale")) and not n.endswith("bias")]
    assert behind and not any(alone[n].equal(taught[n]) for n in behind)
    # Another teacher with the same first blocks: the same student comes of it.
    model, first = made(seed=2), state(tmp_path / "model")
    model.load_state_dict({n: first[n] if n.startswith(STILL) else t for n, t in model.state_dict().items()})
    student.write_module(tmp_path / "model", model, model.config.to_dict())
    before = state(tmp_path / "half" / "alone-model")
    run(tmp_path, monkeypatch, "--arms", "alone", out="other")
    after = state(tmp_path / "other" / "alone-model")
    assert all(after[n].equal(t) for n, t in before.items())
    assert not before["visual_projection.weight"].equal(theirs["visual_projection.weight"])


def test_a_model_whose_first_blocks_were_trained_is_refused(place, monkeypatch):
    tmp_path, other, _ = place
    other.vision_model.blocks[0].project.conv.bias.data.add_(1)
    with pytest.raises(SystemExit, match="not the published ones"):
        run(tmp_path, monkeypatch, "--arms", "alone")
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--arms", "taught", "--frozen", "3")


@pytest.mark.parametrize("name", ["taught", "alone"])
def test_interrupted_it_ends_with_the_same_weights(place, monkeypatch, capsys, name):
    tmp_path, *_ = place
    run(tmp_path, monkeypatch, "--arms", name)
    judge, last, calls = ("distance", 4, []) if name == "taught" else ("pairs_loss", 1, [])
    real = getattr(student, judge)

    def killed(*given):  # `taught` is measured twice before it learns; an epoch is kept once it is judged
        calls.append(given)
        if len(calls) == last:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(student, judge, killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, patch, "--arms", name, out="again")
    capsys.readouterr()
    monkeypatch.setattr(student.train, "project", None)  # what was kept holds the projections
    run(tmp_path, monkeypatch, "--arms", name, out="again")
    assert "epoch 1:" not in (again := capsys.readouterr().out) and f"{name}, epoch 2:" in again
    one, other = (state(tmp_path / out / f"{name}-model") for out in ("half", "again"))
    assert all(other[n].equal(t) for n, t in one.items())


def test_rows_on_disk_are_one_array(tmp_path):
    arrays = [np.arange(6).reshape(3, 2), np.zeros((0, 2), int), np.arange(6, 14).reshape(4, 2)]
    rows, whole = lessons.Rows(arrays), np.concatenate(arrays)
    assert len(rows) == 7
    for some in (slice(2, 5), slice(4, 99), np.array([6, 0, 3, 3]), np.array([], int)):
        assert np.array_equal(rows[some], whole[some])
    assert list(lessons.ahead(lambda i: i * i, 4)) == [0, 1, 4, 9]
    with pytest.raises(ZeroDivisionError):
        list(lessons.ahead(lambda i: 1 / (1 - i), 3))


def test_the_judged_loss_leaves_out_pairs_with_the_same_words():
    class Same:
        logit_scale = torch.tensor(3.0)

    vectors = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows = [{"text": t} for t in "aabbcc"]
    part = lessons.Lessons(lessons.train.Work(rows, [], [vectors]), [vectors])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "vectors_of", lambda module, part: vectors)
        patch.setattr(student, "said", lambda module, part, view, some: vectors[some])
        whole = float(student.pairs_loss(Same, part, 6))
        parts = float(student.pairs_loss(Same, part, 3))
    names = np.array(list("aabbcc"))
    same = torch.from_numpy(names[:, None] == names[None])
    assert whole == pytest.approx(float(student.train.contrastive(vectors, vectors, torch.tensor(3.0).exp(), same)))
    assert parts < whole  # fewer that are wrong
