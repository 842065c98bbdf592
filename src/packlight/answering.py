"""What `packlight run` does with a bundle: transcribe recordings, rank pictures for words, or sort them into classes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packlight.errors import DataError
from packlight.images import SUFFIXES, read_image
from packlight.listing import files_below
from packlight.serve import Served
from packlight.serving.dual_encoder import Encoder
from packlight.texts import checked_templates

Found = tuple[dict[str, Any] | None, str]  # (a row for JSON or None, a line for people or what is wrong)


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        inputs: recordings; or words, where pictures are searched.
        images: folder of pictures, or one picture.
        labels: classes to sort the pictures into.
        templates: what labels are asked with, {} in place of the label.
        top: answers to name.
        language, task: of a model of speech.
    """

    inputs: tuple[str, ...] = ()
    images: Path | None = None
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
    if served.encoder is None:
        if question.images or question.labels or question.templates:
            raise DataError("This bundle transcribes speech: it takes recordings, no --images, --labels or --template.")
        if not question.inputs:
            raise DataError("Name a recording to transcribe.")
        return _transcribe(served, question)
    if question.language or question.task:
        raise DataError("This bundle compares pictures and texts: it takes no --language and no --task.")
    if served.encoder.classes is not None:
        if question.images is None or question.inputs or question.labels or question.templates:
            raise DataError("This bundle sorts pictures into its own classes: name --images DIR and nothing else.")
        return _sorted(question, served.encoder, served.encoder.settings.labels, served.encoder.classes)
    if question.images is None or bool(question.inputs) == bool(question.labels):
        raise DataError(
            'This bundle compares pictures and texts: name --images DIR, and either words to look for ("a red car") or '
            "--labels cat,dog to sort them."
        )
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
    if source.is_file():
        return [source]
    found = sorted(f for f in files_below(source) if f.suffix.lower() in SUFFIXES) if source.is_dir() else []
    if not found:
        raise DataError(f"There is no picture in {source}. Name a folder with {', '.join(sorted(SUFFIXES)[:4])} files.")
    return found


def _embedded(served: Served, source: Path) -> tuple[list[Path], Any, list[str]]:
    """(pictures that could be read, their vectors, what was wrong with the others)."""
    assert served.encoder is not None
    files, vectors, wrong = [], [], []
    for file in pictures(source):
        try:
            vectors.append(served.encoder.embed_image(read_image(file)))
            files.append(file)
        except DataError as error:
            wrong.append(str(error))
    return files, np.array(vectors), wrong


def _search(served: Served, question: Question) -> Iterator[Found]:
    assert served.encoder is not None
    assert question.images is not None
    files, vectors, wrong = _embedded(served, question.images)
    yield from ((None, sentence) for sentence in wrong)
    for words in question.inputs if files else ():
        scores = vectors @ served.encoder.embed_text(words)
        best = np.argsort(-scores, kind="stable")[: question.top]
        rows = [{"file": str(files[i]), "score": round(float(scores[i]), 4)} for i in best]
        lines = [f"{r['score']:7.4f}  {r['file']}" for r in rows]
        yield {"words": words, "found": rows}, "\n".join([words, *lines])


def _classify(served: Served, question: Question) -> Iterator[Found]:
    assert served.encoder is not None
    classes = served.encoder.embed_classes(question.labels, checked_templates(question.templates))
    return _sorted(question, served.encoder, question.labels, classes)


def _sorted(question: Question, encoder: Encoder, labels: tuple[str, ...], classes: Any) -> Iterator[Found]:
    assert question.images is not None
    for file in pictures(question.images):
        try:
            scores = classes @ encoder.embed_image(read_image(file)) * encoder.settings.scale
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
