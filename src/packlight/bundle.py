"""The deployed folder: write it, read it, refuse it when it is not what it claims to be. No torch.

A bundle is a flat folder: `manifest.json` and the files that it names, nothing else. The manifest is written last,
so a folder without one was never finished. What answering has no use for, as the plan, is packed beside it.
docs/reference/bundle.md has the format in MUST and MAY words.
"""

import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packlight.errors import BundleError
from packlight.plan import write_json

VERSION = 3  # 2: a tokenizer without merges; 3: codes along a trellis, positions by their formula
MANIFEST = "manifest.json"
_KEYS = ("version", "packlight", "family", "task", "source", "runtime", "graphs", "serving", "files")
_MAX_MANIFEST = 64 * 2**20
HISTORY = "history.json.gz"
_PACKED = ("plan", "records", "model")  # 68 kB for Whisper tiny.en at 12 MB, 10 kB packed


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read and whose file names are safe. `verify` checks the bytes too."""

    path: Path
    manifest: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the whole folder, read from the files."""
        return folder_bytes(self.path)


def sha256_file(path: Path) -> str:
    """Sha256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def is_bundle(path: Path) -> bool:
    """Whether the folder has a manifest."""
    return (path / MANIFEST).is_file()


def write_bundle(path: Path, manifest: dict[str, Any], fill: Callable[[Path], None]) -> Bundle:
    """Write a bundle so that it is there whole or not at all.

    Args:
        path: where it goes. An older bundle there is replaced; any other folder is refused.
        manifest: everything but 'version' and 'files', which are added here.
        fill: writes the files into the folder that it is given.

    Raises:
        BundleError: the folder exists and is no bundle.
    """
    if path.exists() and not path.is_dir():
        raise BundleError(f"{path} is a file, so nothing was written. Name a folder for the bundle.")
    if path.exists() and not (is_bundle(path) or not any(path.iterdir())):
        raise BundleError(f"{path} exists and is no bundle of ours, so nothing was written. Choose another folder.")
    draft = path.with_name(path.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        fill(draft)
        history = json.dumps({k: manifest[k] for k in _PACKED if k in manifest}, ensure_ascii=False)
        (draft / HISTORY).write_bytes(gzip.compress(history.encode("utf-8"), 9, mtime=0))
        manifest = {k: v for k, v in manifest.items() if k not in _PACKED}
        files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in sorted(draft.iterdir())}
        write_json(draft / MANIFEST, {"version": VERSION, **manifest, "files": files})
        if path.exists():
            shutil.rmtree(path)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return open_bundle(path)


def open_bundle(path: Path) -> Bundle:
    """Read the manifest, with what is packed beside it, and check that it names only files inside this folder.

    Raises:
        BundleError: no folder, no manifest, a newer version, a missing key, an unsafe name, a history that can't be read.
    """
    if not path.is_dir():
        raise BundleError(f"There is no folder {path}.")
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise BundleError(f"{path} has no {MANIFEST}, so it is no bundle, or one whose writing never finished.")
    if file.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{file} has {file.stat().st_size} bytes; no manifest of ours is that large.")
    manifest = _json(file, file.read_bytes)
    if not isinstance(manifest.get("version"), int):
        raise BundleError(f"{file} does not say which version of the format it has.")
    if manifest["version"] > VERSION:
        raise BundleError(
            f"{path} has format version {manifest['version']}; this packlight reads up to {VERSION}. Update packlight."
        )
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise BundleError(f"{file} lacks {', '.join(missing)}.")
    _check_names(path, manifest)
    if HISTORY in manifest["files"]:  # not in bundles of earlier versions
        history = _json(path / HISTORY, lambda: _unpacked(path / HISTORY))
        manifest |= {key: history[key] for key in _PACKED if key in history}
    if "plan" not in manifest:
        raise BundleError(f"{path} has no plan, neither in {MANIFEST} nor in {HISTORY}.")
    return Bundle(path, manifest)


def _json(file: Path, read: Callable[[], bytes]) -> dict[str, Any]:
    try:
        found = json.loads(read().decode("utf-8"))
    except (OSError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{file} is no readable JSON ({error}). Get the bundle again from its source.") from None
    if not isinstance(found, dict):
        raise BundleError(f"{file} is no JSON object.")
    return found


def _unpacked(file: Path) -> bytes:
    """The content of a gzip file from a stranger, however much it claims to be."""
    if file.is_symlink() or file.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{file} is a link or larger than any of ours.")
    found = zlib.decompressobj(31).decompress(file.read_bytes(), _MAX_MANIFEST)
    if len(found) == _MAX_MANIFEST:
        raise BundleError(f"{file} unpacks to more than {_MAX_MANIFEST} bytes; none of ours does.")
    return found


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    files = manifest["files"]
    if not isinstance(files, dict) or not files:
        raise BundleError(f"{path}: the manifest lists no files.")
    for name, entry in files.items():
        if not name or name != Path(name).name or name in (".", "..", MANIFEST) or "\\" in name or ":" in name:
            raise BundleError(f"{path}: the manifest names {name!r}, which is not a plain file name in this folder.")
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
            raise BundleError(f"{path}: the manifest has no length and sha256 for {name}.")
    graphs = manifest["graphs"]
    if not isinstance(graphs, dict) or not all(isinstance(g, str) and g in files for g in graphs.values()):
        raise BundleError(f"{path}: the manifest names a graph that is not among its files.")


def verify(bundle: Bundle) -> None:
    """Check every byte against the manifest.

    Raises:
        BundleError: a missing or extra file, a link, another length, another sha256. The message names them all.
    """
    files = bundle.manifest["files"]
    present = {f.name: f for f in bundle.path.iterdir()}
    problems = [f"{name} is missing" for name in files if name not in present]
    for name, file in sorted(present.items()):
        if name == MANIFEST:
            continue
        if name not in files:
            problems.append(f"{name} is not in the manifest")
        elif file.is_symlink() or not file.is_file():
            problems.append(f"{name} is a link or a folder, not a file")
        elif file.stat().st_size != files[name]["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {files[name]['bytes']}")
        elif sha256_file(file) != files[name]["sha256"]:
            problems.append(f"{name} was changed: its sha256 is not the manifest's")
    if problems:
        raise BundleError(
            f"{bundle.path} is not as it was written: {'; '.join(problems)}. Get it again from its source."
        )
