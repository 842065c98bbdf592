"""Samples of speech: which files, what was said in them, and which of them calibrate and which evaluate.

Reads the layouts people have: a Hugging Face audiofolder, a manifest of JSON lines, a `datasets` folder, or
bare audio files. What can be wrong with them is found here, before hours of work start, and told all at once.
"""

import csv
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from packlight.audio import audio_seconds
from packlight.errors import DataError

CALIBRATION_LIMIT = 128  # more samples no longer change a Gram matrix by much

_AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".m4a", ".aac", ".wma")
)
_METADATA = ("metadata.jsonl", "metadata.csv")
_TABLE_FILES = ("state.json", "dataset_info.json")
_FILE_KEYS = ("file_name", "audio", "path", "audio_filepath")
_TEXT_KEYS = ("text", "transcription", "sentence")
_LAYOUTS = (
    "a folder with audio files and metadata.jsonl, a .jsonl manifest, a datasets folder, or a folder of audio files"
)


@dataclass(frozen=True)
class Sample:
    """One recording.

    Args:
        id: its path within the dataset, without suffix (with it, where two files differ in nothing else).
        path: the audio file.
        text: what is said in it; None when unknown, "" when nothing is said.
        seconds: its length, from its header.
        sha256: of the file's bytes.
    """

    id: str
    path: Path
    text: str | None
    seconds: float
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order, and where they were read."""

    source: str
    samples: tuple[Sample, ...]

    @property
    def n(self) -> int:
        """How many samples."""
        return len(self.samples)

    @property
    def seconds(self) -> float:
        """Seconds of audio in all samples."""
        return math.fsum(s.seconds for s in self.samples)

    @property
    def sha256(self) -> str:
        """Hash of the audio and transcripts; the same wherever the files lie, and in whatever order."""
        contents = sorted(json.dumps([s.sha256, s.text]) for s in self.samples)
        return hashlib.sha256("\n".join(contents).encode()).hexdigest()

    @property
    def has_text(self) -> bool:
        """Whether every sample has a transcript."""
        return bool(self.samples) and all(s.text is not None for s in self.samples)


@dataclass(frozen=True)
class _Entry:
    path: Path
    text: str | None
    where: str  # the file and line that list it
    name: str | None = None  # within the dataset, where the file's own path says nothing


_Problems = dict[str, list[str]]  # kind -> cases


def read_dataset(source: Path, *, need_text: bool = False) -> Dataset:
    """Read samples and check every one of them: listed once, there, readable, not empty.

    Layouts, tried in this order:
      - a file of JSON lines (.jsonl, .json): 'file_name', 'audio', 'path' or 'audio_filepath' (NeMo),
        absolute or relative to the file, and 'text', 'transcription' or 'sentence';
      - a folder saved by `save_to_disk` of the package `datasets`. Audio inside its tables is written to
        ~/.cache/packlight/audio (or under XDG_CACHE_HOME), once, under its hash;
      - a folder with metadata.jsonl or metadata.csv, in it or in sub folders: the same keys, relative to that
        file and inside the folder. The samples are those that are listed;
      - a folder of audio files, searched with its sub folders (links to folders are not followed). The
        transcript of a/b.flac is a/b.txt, or its line in a *.trans.txt of that folder, as in LibriSpeech.

    Args:
        source: the folder or file.
        need_text: refuse samples without a transcript.

    Returns:
        The samples, sorted by their path within the dataset.

    Raises:
        DataError: anything of this is wrong. Per kind of problem it names three cases and their number.
    """
    root = Path(os.path.normpath(Path(source).absolute()))
    problems: _Problems = {}
    if _is_file(root):
        if root.suffix.lower() not in (".jsonl", ".json"):
            raise DataError(f"{source} is a file, but no .jsonl manifest. Give {_LAYOUTS}.")
        entries = list(_listed(root, root.name, None, problems))
    elif _is_file(root, stat.S_IFDIR):
        entries = _from_folder(root, problems)
    else:
        raise DataError(f"There is no data at {source}. Give {_LAYOUTS}.")
    samples = _checked(root.parent if _is_file(root) else root, entries, problems)
    if problems:
        kinds = " ".join(f"{kind} ({len(cases)}): {_some(cases)}." for kind, cases in problems.items())
        raise DataError(_printable(f"{source} can't be used. {kinds} Correct these, or take them out."))
    if not samples:
        raise DataError(f"There is no audio in {source}. Give {_LAYOUTS}.")
    if need_text:
        _check_texts(source, samples)
    return Dataset(str(source), samples)


def _check_texts(source: Path, samples: Sequence[Sample]) -> None:
    lacking = [s.id for s in samples if s.text is None]
    if lacking:
        raise DataError(
            f"{source}: {len(lacking)} of {len(samples)} samples have no transcript ({_some(lacking)}), and quality is "
            f"measured against transcripts. Give each its 'text' in metadata.jsonl, or use other samples."
        )
    if not any((s.text or "").strip() for s in samples):
        raise DataError(f"{source}: all transcripts are empty, so there are no words to score. Add some speech.")


def split(dataset: Dataset, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Part one dataset into samples to calibrate with and samples to evaluate on.

    Ordered by a hash of the seed and the audio itself, so neither names nor order of the files matter. Of the
    distinct recordings 40 %, at least 1 and at most 128, calibrate; copies of a recording stay on one side.

    Returns:
        (calibration, evaluation), each in the order of the hashes.

    Raises:
        DataError: there are fewer than two distinct recordings.
    """

    def rank(sha256: str) -> str:
        return hashlib.sha256(f"{seed}:{sha256}".encode()).hexdigest()

    distinct = sorted({s.sha256 for s in dataset.samples}, key=rank)
    if len(distinct) < 2:
        raise DataError(
            f"{dataset.source} holds too few distinct recordings ({len(distinct)}): calibration and "
            f"evaluation need at least one each. Add recordings."
        )
    first = set(distinct[: min(CALIBRATION_LIMIT, max(1, len(distinct) * 2 // 5))])
    ordered = sorted(dataset.samples, key=lambda s: (rank(s.sha256), s.text or "", s.id))
    return (
        Dataset(dataset.source, tuple(s for s in ordered if s.sha256 in first)),
        Dataset(dataset.source, tuple(s for s in ordered if s.sha256 not in first)),
    )


def check_disjoint(calibration: Dataset, evaluation: Dataset) -> None:
    """Refuse to evaluate on audio that was calibrated with, whatever its files are called.

    Raises:
        DataError: naming the shared files.
    """
    known = {s.sha256: s for s in calibration.samples}
    shared = [f"{s.path} = {known[s.sha256].path}" for s in evaluation.samples if s.sha256 in known]
    if shared:
        raise DataError(
            f"{len(shared)} of {evaluation.n} samples to evaluate on are also calibrated with "
            f"({_some(shared)}), so the measured quality would be too good. Take them out of one of the two."
        )


def _from_folder(folder: Path, problems: _Problems) -> list[_Entry]:
    if _is_file(folder / "dataset_dict.json") or all(_is_file(folder / f) for f in _TABLE_FILES):
        return _from_tables(folder, problems)
    files = sorted(_files(folder))
    listings = [f for f in files if f.name in _METADATA]
    if listings:
        return [e for f in listings for e in _listed(f, f.relative_to(folder).as_posix(), folder, problems)]
    audio = [f for f in files if f.suffix.lower() in _AUDIO_SUFFIXES]
    stems = {f.with_suffix("") for f in audio}
    beside = [f for f in files if f.suffix == ".txt" and f.with_suffix("") in stems]
    spoken = _librispeech(f for f in files if f.name.endswith(".trans.txt"))
    spoken |= {f.with_suffix(""): _text(f).strip() for f in beside}
    return [_Entry(f, spoken.get(f.with_suffix("")), f.relative_to(folder).as_posix()) for f in audio]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones. Links to folders are not followed, so a loop of them ends."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be listed ({error.strerror}). Check its permissions.")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(parent, n) for n in names if not n.startswith("."))


def _librispeech(files: Iterable[Path]) -> dict[Path, str]:
    """Audio file without suffix -> transcript, from files with lines '84-121123-0000 GO DO YOU HEAR'."""
    spoken = {}
    for file in files:
        for line in _text(file).split("\n"):
            name, *words = line.split(maxsplit=1)[:2] or [""]
            if name:
                spoken[file.parent / name] = words[0].strip() if words else ""
    return spoken


def _listed(listing: Path, name: str, inside: Path | None, problems: _Problems) -> Iterator[_Entry]:
    """The entries of one metadata file or manifest; files must lie `inside` that folder, if given."""
    for number, row in _csv_rows(listing) if listing.suffix.lower() == ".csv" else _json_rows(listing):
        where = f"{name} line {number}"
        entry = _entry(listing.parent, row, where) if isinstance(row, dict) else f"{where} {row}"
        if isinstance(entry, _Entry) and inside and not entry.path.is_relative_to(inside):
            entry = f"{where}: {entry.path} lies outside {inside}, which only a .jsonl manifest may name"
        if isinstance(entry, _Entry):
            yield entry
        else:
            problems.setdefault("Wrong entries", []).append(entry)


def _entry(folder: Path, row: dict[str, Any], where: str) -> _Entry | str:
    """The entry that a row describes, or what is wrong with it."""
    file_key = next((k for k in _FILE_KEYS if row.get(k) is not None), None)
    if file_key is None:
        found = ", ".join(sorted(row)) or "none"
        return f"{where} names no file: it needs one of {', '.join(_FILE_KEYS)}, its keys are: {found}"
    file = row[file_key]
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        return f"{where}: '{file_key}' must be the path of a file, it is {json.dumps(file)[:60]}"
    text_key = next((k for k in _TEXT_KEYS if row.get(k) is not None), None)
    text = row[text_key] if text_key else None
    if text is not None and not isinstance(text, str):
        return f"{where}: '{text_key}' must be a string, it is {json.dumps(text)[:60]}"
    if text is not None and _printable(text) != text:
        return f"{where}: '{text_key}' holds half a character (a lone surrogate), which can't be written as UTF-8"
    # Lexically: resolving links would lose the names of files in Hugging Face's cache.
    return _Entry(Path(os.path.normpath(folder / file)), text, where)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, object, or what is wrong with the line)."""
    lines = _text(path).split("\n")  # not splitlines(): U+2028 may stand in a string
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
            yield number, f"is no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else "is no JSON object; each line is one {...}"


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, the row's filled cells)."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        if not set(reader.fieldnames or ()) & set(_FILE_KEYS):
            raise DataError(
                f"{path}: line 1 must name the columns, with file_name among them; it has: "
                f"{', '.join(reader.fieldnames or ()) or 'none'}."
            )
        for row in reader:
            yield reader.line_num, {k: v for k, v in row.items() if k is not None and v}
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is no CSV ({error}). Correct it.") from None


def _from_tables(folder: Path, problems: _Problems) -> list[_Entry]:
    """A folder that `datasets` saved. Its audio is written to files, since all else here works on files."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{folder} needs the package that saved it. Install it: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} can't be read as a datasets folder ({error}). Save it again.") from None
    entries = []
    for part, table in sorted(loaded.items()) if isinstance(loaded, dict) else [("", loaded)]:
        column = next((c for c, f in table.features.items() if isinstance(f, datasets.Audio)), None)
        if column is None:
            raise DataError(
                f"{folder}: {part or 'the table'} has no column of type Audio, its columns are: "
                f"{', '.join(table.features)}. Cast one: cast_column('audio', datasets.Audio())."
            )
        for number, row in enumerate(table.cast_column(column, datasets.Audio(decode=False))):
            where = f"{part} row {number}".strip()
            path = _stored(row[column] or {})
            found = {"file_name": path and str(path), **{k: row.get(k) for k in _TEXT_KEYS}}
            entry = _entry(folder, found, where) if path else f"{where} holds no audio in '{column}'"
            if isinstance(entry, _Entry):
                entries.append(replace(entry, name=f"{part}/{number:08d}".lstrip("/")))
            else:
                problems.setdefault("Wrong entries", []).append(entry)
    return entries


def _stored(audio: dict[str, Any]) -> Path | None:
    """The file of an undecoded `datasets` audio cell {'bytes', 'path'}; None when there is neither."""
    content, name = audio.get("bytes"), audio.get("path")
    if not content:
        return Path(name) if name else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "packlight" / "audio"
    path = cache / (hashlib.sha256(content).hexdigest() + Path(name or "").suffix)
    if not _is_file(path):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            raise DataError(f"{path} can't be written ({error.strerror}). Set XDG_CACHE_HOME elsewhere.") from None
    return path


def _checked(folder: Path, entries: list[_Entry], problems: _Problems) -> tuple[Sample, ...]:
    """The samples behind the entries, sorted; what is wrong with any of them is added to `problems`."""
    listed: dict[str, _Entry] = {}
    if not all(e.path.is_relative_to(folder) for e in entries):
        folder = Path(os.path.commonpath([e.path.parent for e in entries]))
    for entry in entries:
        name = entry.name or entry.path.relative_to(folder).as_posix()
        if name in listed:
            case = f"{name} ({listed[name].where} and {entry.where})"
            problems.setdefault("Files listed twice", []).append(case)
        listed[name] = entry
    ids = {name: str(PurePosixPath(name).parent / PurePosixPath(name).stem) for name in listed}
    if len(set(ids.values())) < len(ids):
        ids = {name: name for name in listed}
    samples = []
    for name, entry in sorted(listed.items()):
        if _printable(str(entry.path)) != str(entry.path):
            problems.setdefault("Names that are not UTF-8", []).append(f"{name} ({entry.where})")
            continue
        if not _is_file(entry.path):
            problems.setdefault("Missing files", []).append(f"{name} ({entry.where})")
            continue
        try:
            seconds = audio_seconds(entry.path)
            with entry.path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except (DataError, OSError) as error:
            problems.setdefault("Unusable files", []).append(str(error))
            continue
        samples.append(Sample(ids[name], entry.path, entry.text, seconds, sha256))
    return tuple(samples)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line} is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}). Check its permissions.") from None


def _is_file(path: Path, kind: int = stat.S_IFREG) -> bool:
    try:
        return stat.S_IFMT(path.stat().st_mode) == kind
    except (OSError, ValueError):  # missing, a loop of links, a name longer than the file system allows
        return False


def _some(cases: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    rest = [f"and {len(cases) - 3} more"] if len(cases) > 3 else []
    return "; ".join([*(c.rstrip(". ") for c in cases[:3]), *rest])


def _printable(text: str) -> str:
    """The text with escapes for what UTF-8 can't hold: stray bytes of file names, halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
