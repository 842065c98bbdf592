"""Folders that the package `datasets` saved."""

import sys
import types
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from data_files import audio, refusal
from packlight.data import read_dataset
from test_data_images import image


def saved(folder: Path, *parts: str) -> Path:
    folder.mkdir()
    if parts:
        (folder / "dataset_dict.json").write_text("{}")
    else:
        (folder / "state.json").write_text("{}")
        (folder / "dataset_info.json").write_text("{}")
    return folder


class Table(list[dict[str, Any]]):
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        super().__init__(rows)
        self.features = features

    def cast_column(self, column: str, feature: Any) -> "Table":
        assert feature.decode is False
        return self


def stand_in(monkeypatch: pytest.MonkeyPatch, load: Callable[[type], Any], kind: str = "Audio") -> None:
    module: Any = types.ModuleType("datasets")
    for name in ("Audio", "Image"):
        made = type(name, (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
        setattr(module, name, made)
    module.load_from_disk = lambda folder: load(getattr(module, kind))
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_datasets_folder_is_refused_with_the_line_that_installs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for folder in (saved(tmp_path / "one"), saved(tmp_path / "two", "train")):
        assert "Install it: pip install datasets" in refusal(folder)


def test_datasets_folder_is_read_with_its_audio_written_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [audio(tmp_path / f"{i}.flac", i).read_bytes() for i in range(3)]
    rows = [{"audio": {"bytes": c, "path": "x.flac"}, "sentence": f"t{i}"} for i, c in enumerate(contents)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stand_in(
        monkeypatch,
        lambda kind: {
            "train": Table(rows[:2], {"sentence": None, "audio": kind()}),
            "test": Table(rows[2:] + rows[2:], {"audio": kind()}),
        },
    )
    data = read_dataset(saved(tmp_path / "d", "train", "test"))
    assert [(s.id, s.text) for s in data.samples] == [
        ("test/00000000", "t2"),
        ("test/00000001", "t2"),
        ("train/00000000", "t0"),
        ("train/00000001", "t1"),
    ]
    assert data.samples[2].path.read_bytes() == contents[0]
    assert data.samples[2].path.is_relative_to(tmp_path / "cache" / "packlight" / "audio")
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 3


def test_pictures_of_a_datasets_folder_are_read_with_captions_or_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [{"bytes": image(tmp_path / f"{i}.png", i).read_bytes(), "path": None} for i in range(3)]
    kept = {"bytes": None, "path": str(image(tmp_path / "kept.jpg", 9))}
    classes = types.SimpleNamespace(names=["cat", "dog"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tables: dict[str, Callable[[type], Table]] = {
        "captions": lambda kind: Table(
            [{"picture": cells[0], "text": "a dot"}, {"picture": cells[1], "captions": ["two", "three"]}],
            {"picture": kind(), "text": None, "captions": None},
        ),
        "classes": lambda kind: Table(
            [{"image": c, "label": n} for c, n in zip([*cells, kept], [1, 0, -1, 1], strict=True)],
            {"image": kind(), "label": classes},
        ),
    }
    stand_in(monkeypatch, lambda kind: {"train": tables["captions"](kind)}, "Image")
    captions = read_dataset(saved(tmp_path / "one", "train"), need_text=True).samples
    assert [(s.id, s.texts, s.modality) for s in captions] == [
        ("train/00000000", ("a dot",), "image"),
        ("train/00000001", ("two", "three"), "image"),
    ]
    assert captions[0].path.read_bytes() == cells[0]["bytes"]
    assert captions[0].path.is_relative_to(tmp_path / "cache" / "packlight" / "images")
    stand_in(monkeypatch, tables["classes"], "Image")
    assert [s.label for s in read_dataset(saved(tmp_path / "two")).samples] == ["dog", "cat", None, "dog"]


@pytest.mark.parametrize(
    ("cell", "features", "sentence"),
    [
        ({"audio": None}, ("audio",), "Wrong entries (1): row 0 holds no audio in 'audio'"),
        ({"audio": {"bytes": b"noise", "path": None}}, ("audio",), "Unusable files (1)"),
        (
            {"audio": {"bytes": b"noise", "path": None}, "text": 4},
            ("audio",),
            "row 0: 'text' must be a string, it is 4",
        ),
        ({"image": 1}, (), "the table has no column of type Audio or Image, its columns are: image"),
    ],
)
def test_datasets_folder_is_refused_when_its_rows_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: dict[str, Any], features: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stand_in(monkeypatch, lambda kind: Table([cell], {k: kind() if k in features else None for k in cell}))
    assert sentence in refusal(saved(tmp_path / "d"))


def test_datasets_folder_is_refused_when_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: type) -> None:
        raise FileNotFoundError("data-00000.arrow")

    stand_in(monkeypatch, fail)
    assert "can't be read as a datasets folder (data-00000.arrow)" in refusal(saved(tmp_path / "d"))


def test_datasets_folder_of_the_real_package_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [str(audio(tmp_path / f"{i}.wav", i)) for i in range(2)]
    table = datasets.Dataset.from_dict({"audio": paths, "text": ["a", "b"]}).cast_column("audio", datasets.Audio())
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "many"))
    one, many = read_dataset(tmp_path / "one"), read_dataset(tmp_path / "many")
    assert [(s.id, s.text, s.seconds) for s in one.samples] == [("00000000", "a", 0.5), ("00000001", "b", 0.5)]
    assert [s.sha256 for s in many.samples] == [sha256(Path(p).read_bytes()).hexdigest() for p in paths]


def test_pictures_that_the_real_package_saved_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [str(image(tmp_path / f"{i}.png", i)) for i in range(2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({"image": paths, "label": [1, 0]}, features=features).save_to_disk(str(tmp_path / "one"))
    found = read_dataset(tmp_path / "one").samples
    assert [(s.id, s.label, s.modality) for s in found] == [("00000000", "dog", "image"), ("00000001", "cat", "image")]
