"""Reading lists of samples: folders, JSON lines, CSV and LibriSpeech's transcripts, with what is wrong in them."""

import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from packlight.errors import DataError

FILE_KEYS = ("file_name", "audio", "image", "path", "audio_filepath")


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones. Links to folders are not followed, so a loop of them ends."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be listed ({error.strerror}). Check its permissions.")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(parent, n) for n in names if not n.startswith("."))


def librispeech(files: Iterable[Path]) -> dict[Path, str]:
    """Audio file without suffix -> transcript, from files with lines '84-121123-0000 GO DO YOU HEAR'."""
    spoken = {}
    for file in files:
        for line in read_text(file).split("\n"):
            name, *words = line.split(maxsplit=1)[:2] or [""]
            if name:
                spoken[file.parent / name] = words[0].strip() if words else ""
    return spoken


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, object, or what is wrong with the line)."""
    lines = read_text(path).split("\n")  # not splitlines(): U+2028 may stand in a string
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
            yield number, f"is no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else "is no JSON object; each line is one {...}"


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, the row's filled cells)."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        if not set(reader.fieldnames or ()) & set(FILE_KEYS):
            raise DataError(
                f"{path}: line 1 must name the columns, with file_name among them; it has: "
                f"{', '.join(reader.fieldnames or ()) or 'none'}."
            )
        for row in reader:
            yield reader.line_num, {k: v for k, v in row.items() if k is not None and v}
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is no CSV ({error}). Correct it.") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line} is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}). Check its permissions.") from None


def is_file(path: Path, kind: int = stat.S_IFREG) -> bool:
    """Whether there is a file, or a thing of another kind, at the end of all links."""
    try:
        return stat.S_IFMT(path.stat().st_mode) == kind
    except (OSError, ValueError):  # missing, a loop of links, a name longer than the file system allows
        return False


def some(cases: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    rest = [f"and {len(cases) - 3} more"] if len(cases) > 3 else []
    return "; ".join([*(c.rstrip(". ") for c in cases[:3]), *rest])


def printable(text: str) -> str:
    """The text with escapes for what UTF-8 can't hold: stray bytes of file names, halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
