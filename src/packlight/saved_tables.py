"""Folders that the package `datasets` saved: their rows, with the audio or the pictures as files.

All else here works on files, so what lies inside the tables is written to the user's cache, once, under its hash.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packlight.errors import DataError
from packlight.images import SUFFIXES
from packlight.listing import is_file

Row = tuple[str, str, dict[str, Any] | str]  # (name within the dataset, where it stands, its keys or what is wrong)


def saved_rows(folder: Path, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of every part: 'file_name' of the audio or picture, and those of `keys` that the table has.

    A class that is stored as a number is given by its name; where the number says that it is unknown, there is none.

    Raises:
        DataError: a damaged folder, no column of audio or pictures, or the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{folder} needs the package that saved it. Install it: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} can't be read as a datasets folder ({error}). Save it again.") from None
    for part, table in sorted(loaded.items()) if isinstance(loaded, dict) else [("", loaded)]:
        found = next(((c, k) for k in (datasets.Audio, datasets.Image) for c, f in table.features.items()
                      if isinstance(f, k)), None)  # fmt: skip
        if found is None:
            raise DataError(
                f"{folder}: {part or 'the table'} has no column of type Audio or Image, its columns are: "
                f"{', '.join(table.features)}. Cast one: cast_column('audio', datasets.Audio())."
            )
        column, kind = found
        folder_of, what = ("audio", "audio") if kind is datasets.Audio else ("images", "picture")
        classes = getattr(table.features.get("label"), "names", None)
        for number, row in enumerate(table.cast_column(column, kind(decode=False))):
            name, where = f"{part}/{number:08d}".lstrip("/"), f"{part} row {number}".strip()
            path = _stored(row[column] or {}, folder_of)
            values = {k: row.get(k) for k in keys}
            if classes and isinstance(values.get("label"), int):
                values["label"] = classes[values["label"]] if values["label"] >= 0 else None
            yield name, where, {"file_name": str(path), **values} if path else f"holds no {what} in {column!r}"


def _stored(cell: dict[str, Any], kind: str) -> Path | None:
    """The file of an undecoded cell {'bytes', 'path'} of `datasets`; None when there is neither."""
    content, name = cell.get("bytes"), cell.get("path")
    if not content:
        return Path(name) if name else None
    suffix = Path(name or "").suffix
    if kind == "images" and suffix.lower() not in SUFFIXES:
        suffix = ".png"  # pictures are read by their content, but told from audio by their names
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "packlight" / kind
    path = cache / (hashlib.sha256(content).hexdigest() + suffix)
    if not is_file(path):
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            raise DataError(f"{path} can't be written ({error.strerror}). Set XDG_CACHE_HOME elsewhere.") from None
    return path
