"""The stamps become a manifest that `packlight eval` scores by zero-shot classes."""

import json
import sys
from pathlib import Path

from PIL import Image

from packlight.data import prompted, read_dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tuxpaint


def test_classes_are_folders_with_enough_pictures(tmp_path, monkeypatch, capsys):
    stamps = tmp_path / "stamps"
    (stamps / "images").mkdir(parents=True)
    categories = ["animals/birds"] * 3 + ["people/body_parts"] * 2 + ["space/moon"]
    rows = []
    for i, category in enumerate(categories):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(stamps / "images" / f"{i}.png")
        rows.append({"file_name": f"images/{i}.png", "text": "A thing.", "category": category})
    (stamps / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["tuxpaint.py", str(stamps), str(tmp_path / "stamps.jsonl"), "--least", "2"])
    tuxpaint.main()
    assert "5 pictures of 2 classes, from 2 to 3 each" in capsys.readouterr().out
    found = prompted(read_dataset(tmp_path / "stamps.jsonl"), ("a picture of {}.",))
    assert found.by_label and sorted(s.label for s in found.samples) == ["birds"] * 3 + ["body parts"] * 2
    assert found.samples[0].texts == (f"a picture of {found.samples[0].label}.",)
