"""Layouts of pictures: captions, several of them, labels, class folders; and how they are told apart and divided."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_files import audio, jsonl, refusal
from packlight.data import prompted, read_dataset, split
from packlight.texts import TEMPLATES


def image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    return path


def test_captions_several_captions_and_labels_are_read(tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.png", i)
    rows = [
        {"file_name": "0.png", "text": "a dot"},
        {"image": "1.png", "texts": ["two", "three"]},
        {"file_name": "2.png", "label": "cat", "text": "a cat"},
        {"file_name": "3.png", "label": 7},
    ]
    jsonl(tmp_path / "metadata.jsonl", *rows)
    samples = read_dataset(tmp_path, need_text=True).samples
    assert [s.texts for s in samples] == [("a dot",), ("two", "three"), ("a cat",), ()]
    assert [s.label for s in samples] == [None, None, "cat", "7"]
    assert {s.modality for s in samples} == {"image"} and samples[1].text == "two"


def test_a_folder_per_class_gives_labels_and_a_text_beside_wins(tmp_path):
    image(tmp_path / "cat" / "0.png", 0)
    image(tmp_path / "dog" / "1.jpg", 1)
    found = read_dataset(tmp_path)
    assert [s.label for s in found.samples] == ["cat", "dog"] and found.by_label
    asked = prompted(found)
    assert asked.samples[0].texts == (TEMPLATES["image"][0].replace("{}", "cat"),)
    (tmp_path / "cat" / "0.txt").write_text("my cat")
    first = read_dataset(tmp_path).samples[0]
    assert first.text == "my cat" and first.label is None


def test_the_hash_knows_every_caption_and_label(tmp_path):
    image(tmp_path / "0.png", 0)
    hashes = set()
    for row in (
        {"text": "a"},
        {"texts": ["a", "b"]},
        {"texts": ["a", "c"]},
        {"text": "a", "label": "x"},
        {"label": "x"},
    ):
        jsonl(tmp_path / "metadata.jsonl", {"file_name": "0.png", **row})
        hashes.add(read_dataset(tmp_path).sha256)
    assert len(hashes) == 5


def test_covers_beside_recordings_are_no_samples_but_a_list_must_be_of_one_kind(tmp_path):
    audio(tmp_path / "a.wav")
    image(tmp_path / "cover.png", 0)
    assert [s.id for s in read_dataset(tmp_path).samples] == ["a"]
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.wav", "text": "x"}, {"file_name": "cover.png", "text": "y"})
    assert "Both pictures and sound" in refusal(tmp_path)


@pytest.mark.parametrize(("row", "sentence"), [
    ({"texts": "a"}, "list of strings"), ({"texts": [1]}, "list of strings"), ({"label": True}, "name of a class"),
    ({"label": " "}, "name of a class"),
])  # fmt: skip
def test_wrong_rows_are_named(tmp_path, row, sentence):
    image(tmp_path / "0.png", 0)
    jsonl(tmp_path / "metadata.jsonl", json.dumps({"file_name": "0.png", **row}))
    assert sentence in refusal(tmp_path)


def test_the_split_does_not_depend_on_names_or_order(tmp_path):
    for i in range(10):
        image(tmp_path / "a" / f"{i}.png", i)
        image(tmp_path / "b" / f"x{9 - i}.png", i)
    first, second = (split(read_dataset(tmp_path / name), 3) for name in "ab")
    assert [s.sha256 for s in first[0].samples] == [s.sha256 for s in second[0].samples]
    assert len(first[0].samples) == 4
    assert not {s.sha256 for s in first[0].samples} & {s.sha256 for s in first[1].samples}
