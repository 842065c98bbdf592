"""What `packlight run` does with a bundle: transcribe recordings, rank pictures or sounds for words, or sort them."""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.data import AUDIO_SUFFIXES
from packlight.errors import DataError
from packlight.images import SUFFIXES
from packlight.listing import files_below
from packlight.serve import Served
from packlight.texts import checked_templates

Found = tuple[dict[str, Any] | None, str]  # (a row for JSON or None, a line for people or what is wrong)


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        inputs: recordings; or words, where pictures or sounds are searched.
        images: folder of pictures, or one picture.
        sounds: folder of recordings, or one, for a model that compares them with texts.
        labels: classes to sort the pictures or sounds into.
        templates: what labels are asked with, {} in place of the label.
        top: answers to name.
        language, task: of a model of speech.
    """

    inputs: tuple[str, ...] = ()
    images: Path | None = None
    sounds: Path | None = None
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    top: int = 5
    language: str | None = None
    task: str | None = None


def ask(served: Served, question: Question) -> Iterator[Found]:
    """Answer one by one. A row of None says why an input gave no answer; the others still do.

    Raises:
        DataError: the question does not fit the bundle.
    """
    encoder = served.encoder
    if encoder is None:
        if question.images or question.sounds or question.labels or question.templates:
            raise DataError(
                "This bundle transcribes speech: it takes recordings, no --images, --sounds, --labels or --template."
            )
        if not question.inputs:
            raise DataError("Name a recording to transcribe.")
        return _transcribe(served, question)
    heard = encoder.settings.kind == "audio"
    kind, option = ("sounds", "--sounds") if heard else ("pictures", "--images")
    source, other = (question.sounds, question.images) if heard else (question.images, question.sounds)
    if question.language or question.task:
        raise DataError(f"This bundle compares {kind} and texts: it takes no --language and no --task.")
    if encoder.classes is not None:
        if source is None or other or question.inputs or question.labels or question.templates:
            raise DataError(f"This bundle sorts {kind} into its own classes: name {option} DIR and nothing else.")
        return _sorted(served, question, encoder.settings.labels, encoder.classes)
    if source is None or other or bool(question.inputs) == bool(question.labels):
        raise DataError(
            f'This bundle compares {kind} and texts: name {option} DIR, and either words to look for ("a red car") or '
            "--labels cat,dog to sort them."
        )
    if question.templates and not question.labels:
        raise DataError("--template is for --labels; words to look for are asked as they are. Leave --template out.")
    return _classify(served, question) if question.labels else _search(served, question)


def _transcribe(served: Served, question: Question) -> Iterator[Found]:
    several = len(question.inputs) > 1
    for file in question.inputs:
        try:
            start = time.perf_counter()
            found = served.answer(served.open_input(Path(file), ()), question.language, question.task)
        except DataError as error:
            yield None, str(error)
            continue
        text = found.text.strip()
        row = {"file": file, "text": text, "language": found.language, "seconds": time.perf_counter() - start}
        yield row, f"{file}: {text}" if several else text


def pictures(source: Path) -> list[Path]:
    """The pictures of a folder and its sub folders in the order of their names, or the one picture. Raises DataError."""
    return _found(source, SUFFIXES, "picture", ", ".join(sorted(SUFFIXES)[:4]))


def recordings(source: Path) -> list[Path]:
    """The same for recordings."""
    return _found(source, AUDIO_SUFFIXES, "recording", ".wav, .flac, .ogg or .mp3")


def _found(source: Path, suffixes: Collection[str], kind: str, some: str) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(f for f in files_below(source) if f.suffix.lower() in suffixes) if source.is_dir() else []
    if not found:
        raise DataError(f"There is no {kind} in {source}. Name a folder with {some} files.")
    return found


def _files(served: Served, question: Question) -> list[Path]:
    assert served.encoder is not None
    named, find = (
        (question.sounds, recordings) if served.encoder.settings.kind == "audio" else (question.images, pictures)
    )
    assert named is not None
    return find(named)


def _embed(served: Served, file: Path) -> Any:
    """The vector of a picture or recording. Raises DataError."""
    assert served.encoder is not None
    content, _ = served.open_input(file, ())
    return served.encoder.embed_content(content)


def _search(served: Served, question: Question) -> Iterator[Found]:
    assert served.encoder is not None
    files, found = [], []
    for file in _files(served, question):
        try:
            found.append(_embed(served, file))
            files.append(file)
        except DataError as error:
            yield None, str(error)
    vectors = np.array(found)
    for words in question.inputs if files else ():
        scores = vectors @ served.encoder.embed_text(words)
        best = np.argsort(-scores, kind="stable")[: question.top]
        rows = [{"file": str(files[i]), "score": round(float(scores[i]), 4)} for i in best]
        lines = [f"{r['score']:7.4f}  {r['file']}" for r in rows]
        yield {"words": words, "found": rows}, "\n".join([words, *lines])


def _classify(served: Served, question: Question) -> Iterator[Found]:
    assert served.encoder is not None
    templates = checked_templates(question.templates, served.encoder.settings.kind)
    return _sorted(served, question, question.labels, served.encoder.embed_classes(question.labels, templates))


def _sorted(served: Served, question: Question, labels: tuple[str, ...], classes: Any) -> Iterator[Found]:
    assert served.encoder is not None
    for file in _files(served, question):
        try:
            scores = classes @ _embed(served, file) * served.encoder.settings.scale
        except DataError as error:
            yield None, str(error)
            continue
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[: question.top]
        rows = [{"label": labels[i], "share": round(float(shares[i]), 4)} for i in best]
        yield (
            {"file": str(file), "labels": rows},
            f"{file}: " + ", ".join(f"{r['label']} {r['share']:.1%}" for r in rows),
        )


def labels_of(named: str) -> tuple[str, ...]:
    """Labels from a file with one per line, or from text with commas between them. Raises DataError."""
    file = Path(named)
    try:
        text = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else named.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{named} can't be read as labels ({error}). Write one per line, in UTF-8.") from None
    found = tuple(dict.fromkeys(t.strip() for t in text if t.strip()))
    if len(found) < 2:
        raise DataError(f"--labels names {len(found)} classes; give two or more: cat,dog or a file with one per line.")
    return found
