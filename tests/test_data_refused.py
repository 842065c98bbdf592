"""Everything that can be wrong with the samples people have: each is named with its place."""

import sys
from pathlib import Path
from typing import Any

import pytest

from data_files import audio, jsonl, refusal
from packlight.data import read_dataset


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
            "m.jsonl line 2 names no file: it needs one of file_name, audio, image, path, audio_filepath, "
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


def test_read_dataset_refuses_transcripts_that_are_all_empty(tmp_path: Path) -> None:
    for i in range(2):
        audio(tmp_path / f"{i}.wav", i)
    jsonl(tmp_path / "metadata.jsonl", *({"file_name": f"{i}.wav", "text": " " * i} for i in range(2)))
    assert read_dataset(tmp_path).n == 2
    assert "all transcripts are empty, so there are no words to score" in refusal(tmp_path, need_text=True)
