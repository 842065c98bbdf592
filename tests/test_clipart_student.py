"""The clip art student: its command runs from a folder to a model that packlight reads, and goes on where it was."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import packlight
from small_dual import save_pictures
from test_mobile_dual import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "clipart"))
import student


def test_the_command_trains_both_students_and_writes_them(tmp_path, monkeypatch, capsys):
    model = save(tmp_path / "model", side=64)
    for name, count in (("train", 12), ("validation", 6), ("held-out", 6)):
        save_pictures(tmp_path / "drawings" / name, count)
        file = tmp_path / "drawings" / name / "metadata.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "".join(
                json.dumps({"file_name": r["file_name"], "text": r["texts"][0], "title": "x", "keywords": ["y"]}) + "\n"
                for r in rows
            )
        )
    command = ["student.py", str(model), str(tmp_path / "drawings"), "-o", str(tmp_path / "half")]
    settings = ["--batch", "4", "--epochs", "2", "--frozen", "1", "--size", "64", "--share", "0.8"]
    for again in (False, True):  # the second run finds everything done
        monkeypatch.setattr(sys, "argv", [*command, *settings])
        assert student.main() == 0
        found = json.loads((tmp_path / "half" / "student.json").read_text())
        assert {"teacher", "inherited", "taught", "alone"} <= {*found} and found["share"] <= 0.8
        said = capsys.readouterr().out
        assert ("taught, epoch 2" in said) is not again
    original, *students = (
        packlight.load(str(f)).module.state_dict() for f in (model, *sorted((tmp_path / "half").glob("*-model")))
    )
    assert len(students) == 2
    for small in students:
        text = {k: v for k, v in original.items() if k.startswith("text_")}
        assert text and all(v.equal(small[k]) for k, v in text.items())  # the text tower stays
        vision = [sum(v.numel() for k, v in m.items() if k.startswith("vision_model.")) for m in (small, original)]
        assert vision[0] < vision[1]
