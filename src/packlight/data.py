"""Samples: which recordings or pictures, the words that go with them, and which calibrate and which evaluate.

Reads the layouts people have: a Hugging Face audiofolder or imagefolder, a manifest of JSON lines, a `datasets` folder, or
bare files. What can be wrong with them is found here, before hours of work start, and told all at once.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from packlight.audio import audio_seconds
from packlight.errors import DataError
from packlight.images import SUFFIXES as _IMAGE_SUFFIXES
from packlight.images import read_image
from packlight.listing import (
    FILE_KEYS,
    csv_rows,
    files_below,
    is_file,
    json_rows,
    librispeech,
    printable,
    read_text,
    some,
)
from packlight.saved_tables import saved_rows
from packlight.texts import checked_templates

CALIBRATION_LIMIT = 128  # more samples no longer change a Gram matrix by much

AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".m4a", ".aac", ".wma")
)
_METADATA = ("metadata.jsonl", "metadata.csv")
_TABLE_FILES = ("state.json", "dataset_info.json")
_TEXT_KEYS = ("text", "transcription", "sentence")
_TEXTS_KEYS = ("texts", "captions")
_LAYOUTS = (
    "a folder with audio files and metadata.jsonl, a .jsonl manifest, a datasets folder, or a folder of audio files "
    "(pictures alike)"
)


@dataclass(frozen=True)
class Sample:
    """One recording or picture.

    Args:
        id: its path within the dataset, without suffix (with it, where two files differ in nothing else).
        path: the audio or image file.
        text: what is said in it, or its first caption; None when unknown, "" when nothing is said.
        seconds: its length, from its header; 0 for pictures.
        sha256: of the file's bytes.
        texts: all its captions; of a sample with a label alone, the label's prompts.
        label: the class that it belongs to, or None.
        modality: 'audio' or 'image'.
    """

    id: str
    path: Path
    text: str | None
    seconds: float
    sha256: str
    texts: tuple[str, ...] = ()
    label: str | None = None
    modality: str = "audio"


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

        def more(s: Sample) -> list[Any]:
            return [] if s.label is None and s.texts in ((), (s.text,)) else [list(s.texts), s.label]

        contents = sorted(json.dumps([s.sha256, s.text, *more(s)]) for s in self.samples)
        return hashlib.sha256("\n".join(contents).encode()).hexdigest()

    @property
    def has_text(self) -> bool:
        """Whether every sample has a transcript."""
        return bool(self.samples) and all(s.text is not None for s in self.samples)

    @property
    def by_label(self) -> bool:
        """Whether every sample is known by its label alone."""
        return bool(self.samples) and all(s.label is not None and s.text is None for s in self.samples)

    @property
    def modality(self) -> str:
        """'audio' or 'image'."""
        return self.samples[0].modality


@dataclass(frozen=True)
class _Entry:
    path: Path
    text: str | None
    where: str  # the file and line that list it
    texts: tuple[str, ...] = ()
    label: str | None = None
    name: str | None = None  # within the dataset, where the file's own path says nothing


_Problems = dict[str, list[str]]  # kind -> cases


def read_dataset(source: Path, *, need_text: bool = False) -> Dataset:
    """Read samples and check every one of them: listed once, there, readable, not empty.

    Layouts, tried in this order:
      - a file of JSON lines (.jsonl, .json): 'file_name', 'audio', 'path' or 'audio_filepath' (NeMo),
        absolute or relative to the file, and 'text', 'transcription' or 'sentence';
      - a folder saved by `save_to_disk` of the package `datasets`. What its column of audio or of images holds is
        written to ~/.cache/packlight/audio or images (or under XDG_CACHE_HOME), once, under its hash;
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
    if is_file(root):
        if root.suffix.lower() not in (".jsonl", ".json"):
            raise DataError(f"{source} is a file, but no .jsonl manifest. Give {_LAYOUTS}.")
        entries = list(_listed(root, root.name, None, problems))
    elif is_file(root, stat.S_IFDIR):
        entries = _from_folder(root, problems)
    else:
        raise DataError(f"There is no data at {source}. Give {_LAYOUTS}.")
    samples = _checked(root.parent if is_file(root) else root, entries, problems)
    if problems:
        kinds = " ".join(f"{kind} ({len(cases)}): {some(cases)}." for kind, cases in problems.items())
        raise DataError(printable(f"{source} can't be used. {kinds} Correct these, or take them out."))
    if not samples:
        raise DataError(f"There is no audio in {source}. Give {_LAYOUTS}.")
    if need_text:
        _check_texts(source, samples)
    return Dataset(str(source), samples)


def _check_texts(source: Path, samples: Sequence[Sample]) -> None:
    lacking = [s.id for s in samples if s.text is None and s.label is None]
    if lacking:
        raise DataError(
            f"{source}: {len(lacking)} of {len(samples)} samples have no transcript ({some(lacking)}), and quality is "
            f"measured against transcripts. Give each its 'text' in metadata.jsonl, or use other samples."
        )
    if not any((s.text or s.label or "").strip() for s in samples):
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
            f"({some(shared)}), so the measured quality would be too good. Take them out of one of the two."
        )


def _from_folder(folder: Path, problems: _Problems) -> list[_Entry]:
    if is_file(folder / "dataset_dict.json") or all(is_file(folder / f) for f in _TABLE_FILES):
        return _from_tables(folder, problems)
    files = sorted(files_below(folder))
    listings = [f for f in files if f.name in _METADATA]
    if listings:
        return [e for f in listings for e in _listed(f, f.relative_to(folder).as_posix(), folder, problems)]
    kinds = ([f for f in files if f.suffix.lower() in s] for s in (AUDIO_SUFFIXES, _IMAGE_SUFFIXES))
    found = next(filter(None, kinds), [])  # pictures beside recordings are covers
    stems = {f.with_suffix("") for f in found}
    beside = [f for f in files if f.suffix == ".txt" and f.with_suffix("") in stems]
    spoken = librispeech(f for f in files if f.name.endswith(".trans.txt"))
    spoken |= {f.with_suffix(""): read_text(f).strip() for f in beside}
    entries = []
    for file in found:
        text, name = spoken.get(file.with_suffix("")), file.relative_to(folder).as_posix()
        classed = text is None and file.suffix.lower() in _IMAGE_SUFFIXES and file.parent != folder
        texts = () if text is None else (text,)
        entries.append(_Entry(file, text, name, texts, file.parent.name if classed else None))
    return entries


def _listed(listing: Path, name: str, inside: Path | None, problems: _Problems) -> Iterator[_Entry]:
    """The entries of one metadata file or manifest; files must lie `inside` that folder, if given."""
    for number, row in csv_rows(listing) if listing.suffix.lower() == ".csv" else json_rows(listing):
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
    file_key = next((k for k in FILE_KEYS if row.get(k) is not None), None)
    if file_key is None:
        found = ", ".join(sorted(row)) or "none"
        return f"{where} names no file: it needs one of {', '.join(FILE_KEYS)}, its keys are: {found}"
    file = row[file_key]
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        return f"{where}: '{file_key}' must be the path of a file, it is {json.dumps(file)[:60]}"
    text_key = next((k for k in _TEXT_KEYS if row.get(k) is not None), None)
    text = row[text_key] if text_key else None
    if text is not None and not isinstance(text, str):
        return f"{where}: '{text_key}' must be a string, it is {json.dumps(text)[:60]}"
    if text is not None and printable(text) != text:
        return f"{where}: '{text_key}' holds half a character (a lone surrogate), which can't be written as UTF-8"
    texts = next((row[k] for k in _TEXTS_KEYS if row.get(k)), [] if text is None else [text])
    if not isinstance(texts, list) or not all(isinstance(t, str) and printable(t) == t for t in texts):
        return f"{where}: 'texts' must be a list of strings, it is {json.dumps(texts)[:60]}"
    label = row.get("label")
    if label is not None and (not isinstance(label, str | int) or isinstance(label, bool) or not str(label).strip()):
        return f"{where}: 'label' must be the name of a class, it is {json.dumps(label)[:60]}"
    text = texts[0] if text is None and texts else text
    # Lexically: resolving links would lose the names of files in Hugging Face's cache.
    path = Path(os.path.normpath(folder / file))
    return _Entry(path, text, where, tuple(texts), None if label is None else str(label))


def _from_tables(folder: Path, problems: _Problems) -> list[_Entry]:
    """A folder that `datasets` saved."""
    entries = []
    for name, where, row in saved_rows(folder, (*_TEXT_KEYS, *_TEXTS_KEYS, "label")):
        entry = _entry(folder, row, where) if isinstance(row, dict) else f"{where} {row}"
        if isinstance(entry, _Entry):
            entries.append(replace(entry, name=name))
        else:
            problems.setdefault("Wrong entries", []).append(entry)
    return entries


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
        if printable(str(entry.path)) != str(entry.path):
            problems.setdefault("Names that are not UTF-8", []).append(f"{name} ({entry.where})")
            continue
        if not is_file(entry.path):
            problems.setdefault("Missing files", []).append(f"{name} ({entry.where})")
            continue
        try:
            image = entry.path.suffix.lower() in _IMAGE_SUFFIXES
            seconds = 0.0 if image and read_image(entry.path) is not None else audio_seconds(entry.path)
            with entry.path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except (DataError, OSError) as error:
            problems.setdefault("Unusable files", []).append(str(error))
            continue
        more = (entry.texts, entry.label, "image" if image else "audio")
        samples.append(Sample(ids[name], entry.path, entry.text, seconds, sha256, *more))
    if len({s.modality for s in samples}) > 1:
        first = [next(s.id for s in samples if s.modality == m) for m in ("image", "audio")]
        problems.setdefault("Both pictures and sound", []).append(" and ".join(first))
    return tuple(samples)


def prompted(dataset: Dataset, templates: Sequence[str] = (), needed: bool = True) -> Dataset:
    """The dataset with its labels as texts: every template with the label in place of {}.

    Samples with texts of their own keep them, unless templates are named: these ask for the labels. Where they are not
    `needed`, as for samples that only calibrate, samples without labels keep their texts.

    Raises:
        DataError: a template without {}, or templates for samples without labels.
    """
    asked = checked_templates(templates, dataset.modality)
    if not all(s.label is not None for s in dataset.samples):
        if templates and needed:
            raise DataError(f"{dataset.source}: templates need labels, and not every sample has a 'label'.")
        return dataset
    if not templates and dataset.has_text:
        return dataset
    prompts = {s.label: tuple(t.replace("{}", s.label or "") for t in asked) for s in dataset.samples}
    return replace(dataset, samples=tuple(replace(s, text=None, texts=prompts[s.label]) for s in dataset.samples))
