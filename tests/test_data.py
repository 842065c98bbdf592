"""Samples: the layouts that are read, and how one dataset is parted into two."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from data_files import audio, jsonl, planted
from packlight.data import Dataset, check_disjoint, read_dataset, split
from packlight.errors import DataError

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
    audio(tmp_path / "a.wav", 1)
    audio(tmp_path / "b.wav", 2)
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.wav", "text": ""}, {"file_name": "b.wav", "text": "x"})
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
