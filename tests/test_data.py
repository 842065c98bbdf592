"""Samples, splits, and everything that can be wrong with the files people have."""

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from packlight.data import Dataset, Sample, check_disjoint, read_dataset, split
from packlight.errors import DataError


def audio(path: Path, seed: int = 0, seconds: float = 0.5) -> Path:
    """Noise of its own for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, round(16000 * seconds)), 16000)
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(source: Path, **how: bool) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(source, **how)
    return str(caught.value)


def planted(*contents: str) -> Dataset:
    """A dataset without files: one sample per content."""
    made = (
        Sample(f"s{i}", Path(f"/d/s{i}.wav"), c, 1.0, sha256(c.encode()).hexdigest()) for i, c in enumerate(contents)
    )
    return Dataset("planted", tuple(made))


# ---- reading ----------------------------------------------------------------------------------------------------


def test_read_dataset_reads_an_audiofolder(tmp_path: Path) -> None:
    b = audio(tmp_path / "audio" / "b.wav", 1, seconds=0.5)
    audio(tmp_path / "audio" / "a.flac", 2, seconds=0.25)
    audio(tmp_path / "audio" / "unlisted.wav", 3)
    jsonl(
        tmp_path / "metadata.jsonl",
        {"file_name": "audio/b.wav", "text": "zwei", "speaker": "x", "seconds": 99},
        "",
        {"file_name": "audio/a.flac", "text": "eins\u2028zwei"},
    )
    data = read_dataset(tmp_path, need_text=True)
    assert [s.id for s in data.samples] == ["audio/a", "audio/b"]
    assert [s.text for s in data.samples] == ["eins\u2028zwei", "zwei"]
    assert [s.seconds for s in data.samples] == [0.25, 0.5]
    assert data.samples[1].path == b
    assert data.samples[1].sha256 == sha256(b.read_bytes()).hexdigest()
    assert (data.n, data.seconds, data.has_text, data.source) == (2, 0.75, True, str(tmp_path))


@pytest.mark.parametrize("key", ["text", "transcription", "sentence"])
def test_read_dataset_reads_a_csv_with_each_text_key(tmp_path: Path, key: str) -> None:
    audio(tmp_path / "a.wav", 1)
    audio(tmp_path / "b.wav", 2)
    (tmp_path / "metadata.csv").write_text(
        f'\ufefffile_name,{key},age\na.wav,"hello, you",\nb.wav,,7\n', encoding="utf-8"
    )
    assert [s.text for s in read_dataset(tmp_path).samples] == ["hello, you", None]


def test_read_dataset_reads_metadata_of_sub_folders(tmp_path: Path) -> None:
    for part, seed in (("train", 1), ("test", 2)):
        audio(tmp_path / part / "a.wav", seed)
        jsonl(tmp_path / part / "metadata.jsonl", {"file_name": "a.wav", "text": part})
    data = read_dataset(tmp_path)
    assert [(s.id, s.text) for s in data.samples] == [("test/a", "test"), ("train/a", "train")]


@pytest.mark.parametrize("key", ["file_name", "audio", "path", "audio_filepath"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_read_dataset_reads_a_manifest_with_each_file_key(tmp_path: Path, key: str, suffix: str) -> None:
    audio(tmp_path / "wav" / "a.wav")
    manifest = jsonl(tmp_path / f"train{suffix}", {key: "wav/a.wav", "text": "hi", "duration": 3, "offset": None})
    data = read_dataset(manifest)
    assert [(s.id, s.text) for s in data.samples] == [("wav/a", "hi")]


def test_read_dataset_passes_over_keys_that_are_null(tmp_path: Path) -> None:
    audio(tmp_path / "a.wav")
    manifest = jsonl(tmp_path / "m.jsonl", {"file_name": None, "audio": "a.wav", "text": None, "sentence": "hi"})
    assert [(s.id, s.text) for s in read_dataset(manifest).samples] == [("a", "hi")]


def test_read_dataset_follows_a_manifest_to_absolute_and_parent_paths(tmp_path: Path) -> None:
    one, two = audio(tmp_path / "corpus" / "x" / "1.wav", 1), audio(tmp_path / "corpus" / "y" / "2.wav", 2)
    manifest = jsonl(
        tmp_path / "lists" / "m.jsonl",
        {"audio_filepath": str(two), "text": "b"},
        {"audio_filepath": "../corpus/x/1.wav", "text": "a"},
    )
    data = read_dataset(manifest)
    assert [(s.id, s.path) for s in data.samples] == [("x/1", one), ("y/2", two)]


def test_read_dataset_reads_bare_audio_with_transcripts_beside_it(tmp_path: Path) -> None:
    audio(tmp_path / "84" / "84-1-0000.flac", 1)
    audio(tmp_path / "84" / "84-1-0001.flac", 2)
    audio(tmp_path / "84" / "84-1.trans.wav", 3)
    (tmp_path / "84" / "84-1.trans.txt").write_text("84-1-0000 GO DO YOU HEAR\n84-1-0001\nother X\n")
    audio(tmp_path / "z.WAV", 4)
    (tmp_path / "z.txt").write_text(" ein Satz \n")
    (tmp_path / "README.txt").write_bytes(b"\xff\xfe no transcript")
    audio(tmp_path / ".hidden" / "h.wav", 5)
    audio(tmp_path / "._z.wav", 6)
    data = read_dataset(tmp_path)
    spoken = {s.id: s.text for s in data.samples}
    assert spoken.pop("84/84-1.trans") is not None
    assert spoken == {"84/84-1-0000": "GO DO YOU HEAR", "84/84-1-0001": "", "z": " ein Satz ".strip()}


def test_read_dataset_gives_no_text_when_there_is_none(tmp_path: Path) -> None:
    audio(tmp_path / "a.wav")
    data = read_dataset(tmp_path)
    assert data.samples[0].text is None
    assert not data.has_text


def test_read_dataset_counts_an_empty_transcript_as_one(tmp_path: Path) -> None:
    audio(tmp_path / "a.wav")
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.wav", "text": ""})
    assert read_dataset(tmp_path, need_text=True).samples[0].text == ""


def test_ids_keep_the_suffix_when_files_differ_in_nothing_else(tmp_path: Path) -> None:
    audio(tmp_path / "a.wav", 1)
    audio(tmp_path / "a.flac", 2)
    assert [s.id for s in read_dataset(tmp_path).samples] == ["a.flac", "a.wav"]


def test_read_dataset_is_the_same_from_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio(tmp_path / "d" / "a.wav")
    monkeypatch.chdir(tmp_path / "d")
    assert read_dataset(Path()).samples == read_dataset(tmp_path / "d").samples
    assert read_dataset(Path("../d")).samples[0].path.is_absolute()


def test_hash_follows_content_and_not_names_order_or_place(tmp_path: Path) -> None:
    for folder, names in (("one", ("a.wav", "b.wav")), ("two", ("y.wav", "x.wav"))):
        for seed, name in enumerate(names):
            audio(tmp_path / folder / name, seed)
        jsonl(tmp_path / folder / "metadata.jsonl", *({"file_name": n, "text": f"t{i}"} for i, n in enumerate(names)))
    one, two = read_dataset(tmp_path / "one"), read_dataset(tmp_path / "two")
    assert [s.sha256 for s in one.samples] != [s.sha256 for s in two.samples]
    assert one.sha256 == two.sha256
    first, second = one.samples
    assert replace(one, samples=(first, replace(second, text="other"))).sha256 != one.sha256
    assert replace(one, samples=(replace(first, text="t1"), replace(second, text="t0"))).sha256 != one.sha256
    assert replace(one, samples=(first,)).sha256 != one.sha256


def test_has_text_is_false_when_one_sample_lacks_it() -> None:
    data = planted("a", "b")
    assert data.has_text
    assert not replace(data, samples=(data.samples[0], replace(data.samples[1], text=None))).has_text


@pytest.mark.parametrize(
    ("name", "minutes", "has_text"),
    [("librispeech_test_other_100", 12.8, True), ("librispeech_train_clean_calib", 20.4, False)],
)
def test_real_speech_is_read_whole(data_dir: Path, name: str, minutes: float, has_text: bool) -> None:
    data = read_dataset(data_dir / name, need_text=has_text)
    rows = [json.loads(line) for line in (data_dir / name / "metadata.jsonl").read_text().splitlines()]
    assert data.n == len(rows) == 100
    assert data.seconds / 60 == pytest.approx(minutes, abs=0.05)
    assert data.has_text is has_text
    by_name = {f"{s.id}.flac": s for s in data.samples}
    for row in rows:
        assert by_name[row["file_name"]].text == row.get("text")
        assert by_name[row["file_name"]].seconds == pytest.approx(row["seconds"], abs=0.002)


def test_real_calibration_and_evaluation_speech_are_disjoint(data_dir: Path) -> None:
    check_disjoint(
        read_dataset(data_dir / "librispeech_train_clean_calib"), read_dataset(data_dir / "librispeech_test_other_100")
    )


# ---- what is refused --------------------------------------------------------------------------------------------


def test_read_dataset_refuses_what_is_not_there(tmp_path: Path) -> None:
    said = refusal(tmp_path / "no")
    assert said.startswith(f"There is no data at {tmp_path / 'no'}. Give a folder with audio files")
    assert "There is no data at" in refusal(Path("x" * 5000))


def test_read_dataset_refuses_folders_without_audio(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert refusal(tmp_path).startswith(f"There is no audio in {tmp_path}. Give")
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    assert refusal(tmp_path).startswith(f"There is no audio in {tmp_path}. Give")


def test_read_dataset_refuses_a_single_recording(tmp_path: Path) -> None:
    assert "a.wav is a file, but no .jsonl manifest" in refusal(audio(tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{oops", "m.jsonl line 2 is no JSON (Expecting property name"),
        ("[1]", "m.jsonl line 2 is no JSON object"),
        ("[" * 100_000, "m.jsonl line 2 is no JSON"),
        ('{"n": ' + "1" * 5000 + "}", "m.jsonl line 2 is no JSON"),
        (
            {"text": "x", "lang": "en"},
            "m.jsonl line 2 names no file: it needs one of file_name, audio, path, audio_filepath, "
            "its keys are: lang, text",
        ),
        ({}, "its keys are: none"),
        ({"file_name": 7}, "m.jsonl line 2: 'file_name' must be the path of a file, it is 7"),
        ({"audio": {"bytes": 1}}, "m.jsonl line 2: 'audio' must be the path of a file, it is {\"bytes\": 1}"),
        ({"file_name": " "}, "must be the path of a file"),
        ({"file_name": "a\0.wav"}, "must be the path of a file"),
        ({"file_name": "a.wav", "text": ["x"]}, "m.jsonl line 2: 'text' must be a string, it is [\"x\"]"),
        ({"file_name": "a.wav", "sentence": 3}, "m.jsonl line 2: 'sentence' must be a string, it is 3"),
        ('{"file_name": "a.wav", "text": "\\ud800"}', "m.jsonl line 2: 'text' holds half a character"),
        ('{"file_name": "\\ud800.wav"}', "Names that are not UTF-8 (1): \\ud800.wav (m.jsonl line 2)."),
        ({"file_name": "gone.wav"}, "Missing files (1): gone.wav (m.jsonl line 2)."),
        ({"file_name": "wav"}, "Missing files (1): wav (m.jsonl line 2)."),
        ({"file_name": "."}, "Missing files (1): "),
        ({"file_name": "x" * 5000}, "Missing files (1): xxx"),
        ({"file_name": "./wav/../ok.wav"}, "Files listed twice (1): ok.wav (m.jsonl line 1 and m.jsonl line 2)."),
    ],
)
def test_read_dataset_refuses_bad_lines_with_their_place(tmp_path: Path, line: Any, sentence: str) -> None:
    audio(tmp_path / "ok.wav", 1)
    audio(tmp_path / "a.wav", 2)
    (tmp_path / "wav").mkdir()
    manifest = jsonl(tmp_path / "m.jsonl", {"file_name": "ok.wav", "text": "x"}, line)
    said = refusal(manifest)
    assert said.startswith(f"{manifest} can't be used. ")
    assert sentence in said
    assert said.encode()
    assert len(said) < 6000


def test_read_dataset_names_three_cases_of_each_problem_and_their_number(tmp_path: Path) -> None:
    audio(tmp_path / "ok.wav")
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    rows = [{"file_name": f"gone{i}.wav"} for i in range(5)]
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "ok.wav"}, "{", *rows, {"file_name": "noise.wav"})
    said = refusal(tmp_path)
    assert "Wrong entries (1): metadata.jsonl line 2 is no JSON" in said
    assert "Missing files (5): gone0.wav (metadata.jsonl line 3); gone1.wav (metadata.jsonl line 4); gone2.wav" in said
    assert "gone3" not in said
    assert "; and 2 more." in said
    assert f"Unusable files (1): {tmp_path / 'noise.wav'}" in said


def test_read_dataset_finds_unreadable_and_empty_audio_before_work_starts(tmp_path: Path) -> None:
    audio(tmp_path / "ok.wav")
    audio(tmp_path / "empty.wav", seconds=0)
    for i in range(4):
        (tmp_path / f"bad{i}.flac").write_bytes(b"\0" * 64)
    said = refusal(tmp_path)
    assert "Unusable files (5)" in said
    assert all(f"bad{i}.flac" in said for i in range(3))
    (tmp_path / "sub").mkdir()
    audio(tmp_path / "sub" / "empty.wav", seconds=0)
    assert "empty.wav" in refusal(tmp_path / "sub")


def test_read_dataset_refuses_missing_transcripts_when_they_are_needed(tmp_path: Path) -> None:
    for i in range(5):
        audio(tmp_path / f"{i}.wav", i)
    rows = [{"file_name": f"{i}.wav", "text": "x" if i == 2 else None} for i in range(5)]
    jsonl(tmp_path / "metadata.jsonl", *rows)
    assert read_dataset(tmp_path).n == 5
    said = refusal(tmp_path, need_text=True)
    assert "4 of 5 samples have no transcript (0; 1; 3; and 1 more)" in said
    assert "Give each its 'text' in metadata.jsonl" in said


def test_read_dataset_refuses_files_listed_by_two_metadata_files(tmp_path: Path) -> None:
    audio(tmp_path / "train" / "a.wav")
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "train/a.wav"})
    jsonl(tmp_path / "train" / "metadata.jsonl", {"file_name": "a.wav"})
    assert "train/a.wav (metadata.jsonl line 1 and train/metadata.jsonl line 1)" in refusal(tmp_path)


@pytest.mark.parametrize("absolute", [True, False])
def test_read_dataset_refuses_a_folder_whose_metadata_leaves_it(tmp_path: Path, absolute: bool) -> None:
    outside = audio(tmp_path / "outside.wav")
    metadata = jsonl(tmp_path / "in" / "metadata.jsonl", {"file_name": str(outside) if absolute else "../outside.wav"})
    assert "metadata.jsonl line 1: " in (said := refusal(tmp_path / "in"))
    assert "lies outside" in said
    assert read_dataset(metadata).n == 1


def test_read_dataset_accepts_parent_paths_within_the_folder(tmp_path: Path) -> None:
    audio(tmp_path / "audio" / "a.wav")
    jsonl(tmp_path / "train" / "metadata.jsonl", {"file_name": "../audio/a.wav"})
    assert read_dataset(tmp_path).samples[0].id == "audio/a"


def test_read_dataset_survives_links(tmp_path: Path) -> None:
    real = audio(tmp_path / "elsewhere" / "real.wav", 1)
    folder = tmp_path / "d"
    audio(folder / "a.wav", 2)
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "b.wav").symlink_to(real)
    assert [s.id for s in read_dataset(folder).samples] == ["a", "b"]
    (tmp_path / "to_d").symlink_to(folder)
    assert [s.id for s in read_dataset(tmp_path / "to_d").samples] == ["a", "b"]
    (folder / "c.wav").symlink_to(folder / "c.wav")
    (folder / "dangling.wav").symlink_to(folder / "nothing")
    assert "Missing files (2): c.wav (c.wav); dangling.wav" in refusal(folder)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert "There is no data at" in refusal(tmp_path / "self")


def test_read_dataset_refuses_text_that_is_not_utf8_with_its_line(tmp_path: Path) -> None:
    audio(tmp_path / "a.wav")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.wav"}\n{"text": "caf\xe9"}\n')
    assert refusal(tmp_path) == f"{tmp_path / 'metadata.jsonl'}: line 2 is not UTF-8. Save the file as UTF-8."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name,text\na.wav,x\n", "line 1 must name the columns, with file_name among them; it has: name, text."),
        ("", "it has: none."),
        ("file_name,text\n,x\n", "metadata.csv line 2 names no file"),
        ("file_name,text\na.wav,one\na.wav,two,three\n", "a.wav (metadata.csv line 2 and metadata.csv line 3)"),
        ("file_name,text\na.wav," + "x" * 200_000 + "\n", "is no CSV (field larger than"),
    ],
)
def test_read_dataset_refuses_bad_csv_with_its_place(tmp_path: Path, content: str, sentence: str) -> None:
    audio(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_text(content)
    assert sentence in refusal(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
def test_read_dataset_refuses_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    good = audio(tmp_path / "a.wav")
    good.rename(Path(str(tmp_path / "caf") + "\udce9.wav"))
    said = refusal(tmp_path)
    assert "Names that are not UTF-8 (1): caf\\udce9.wav" in said
    assert said.encode("utf-8")


# ---- datasets folders -------------------------------------------------------------------------------------------


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


def stand_in(monkeypatch: pytest.MonkeyPatch, load: Callable[[type], Any]) -> None:
    module: Any = types.ModuleType("datasets")
    module.Audio = type("Audio", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    module.load_from_disk = lambda folder: load(module.Audio)
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
        ({"image": 1}, (), "the table has no column of type Audio, its columns are: image"),
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


# ---- splitting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "calibration"), [(2, 1), (3, 1), (5, 2), (100, 40), (319, 127), (320, 128), (1000, 128)])
def test_split_gives_calibration_its_share(n: int, calibration: int) -> None:
    first, second = split(planted(*map(str, range(n))))
    assert (first.n, second.n) == (calibration, n - calibration)
    assert {s.id for s in first.samples} | {s.id for s in second.samples} == {f"s{i}" for i in range(n)}


def test_split_does_not_depend_on_names_or_order() -> None:
    data = planted(*map(str, range(50)))
    renamed = tuple(replace(s, id=f"r{i}", path=Path(f"/r/{i}.wav")) for i, s in enumerate(reversed(data.samples)))
    for one, two in zip(split(data), split(Dataset("other", renamed)), strict=True):
        assert [s.sha256 for s in one.samples] == [s.sha256 for s in two.samples]


def test_split_follows_its_seed() -> None:
    data = planted(*map(str, range(50)))
    assert split(data, 1) == split(data, 1)
    assert split(data, 1)[0].sha256 != split(data, 2)[0].sha256


def test_split_is_the_same_in_every_release() -> None:
    # A resumed fit and a plan name their calibration by hash: this planted answer must never change.
    assert [s.text for s in split(planted("a", "b", "c", "d", "e"))[0].samples] == ["e", "a"]


def test_split_never_parts_copies_of_a_recording() -> None:
    data = planted(*(str(i // 3) for i in range(60)))  # 20 recordings, each three times
    for seed in range(20):
        first, second = split(data, seed)
        check_disjoint(first, second)
        assert (first.n, second.n) == (24, 36)


@pytest.mark.parametrize("contents", [(), ("a",), ("a", "a", "a")])
def test_split_refuses_fewer_than_two_distinct_recordings(contents: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=rf"planted holds too few distinct recordings \({len(set(contents))}\)"):
        split(planted(*contents))


def test_check_disjoint_names_the_shared_files() -> None:
    check_disjoint(planted("a", "b"), planted("c", "d"))
    with pytest.raises(DataError) as caught:
        check_disjoint(planted("a", "b", "c", "d", "e"), planted("x", "e", "d", "c", "b"))
    said = str(caught.value)
    assert "4 of 5 samples to evaluate on are also calibrated with" in said
    assert f"{Path('/d/s1.wav')} = {Path('/d/s4.wav')}" in said
    assert "and 1 more" in said
