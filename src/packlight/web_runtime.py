"""The runtime that runs in a browser: two files of onnxruntime-web, from a folder, the user's cache, or npm's registry."""

import io
import os
import sys
import tarfile
from pathlib import Path

from packlight.errors import RuntimeMissing
from packlight.npm import archive_name, download, is_archive

VERSION = "1.30.0"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
LICENCE = f"""onnxruntime-web {VERSION}, https://github.com/microsoft/onnxruntime

MIT License. Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
_PACKAGE = "onnxruntime-web"
# The integrity that npm publishes for this archive.
_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
_ADVICE = f"Fetch it elsewhere with `npm pack {_PACKAGE}@{VERSION}`, unpack it and name the folder with --runtime DIR."


def runtime_files(folder: Path | None = None) -> tuple[bytes, bytes]:
    """The script and the WebAssembly of onnxruntime-web.

    Args:
        folder: where they lie: onnxruntime-web's folder or its `dist`. None for the pinned version out of the user's
            cache, or else from npm's registry, or the one that `npm_config_registry` names.

    Raises:
        RuntimeMissing: they are in none of these places, or what came is not what npm publishes.
    """
    if folder is not None:
        return _from_folder(folder)
    cached = cache_folder() / archive_name(_PACKAGE, VERSION)
    archive = cached.read_bytes() if cached.is_file() else b""
    if not is_archive(archive, _SHA512):
        archive = download(_PACKAGE, VERSION, _SHA512, _ADVICE)
        _keep(cached, archive)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as packed:
        script, wasm = (packed.extractfile(f"package/dist/{name}") for name in (SCRIPT, WASM))
        assert script is not None  # the archive is the one that was pinned
        assert wasm is not None
        return script.read(), wasm.read()


def cache_folder() -> Path:
    """Where packlight keeps what it downloads: the user's cache folder, as the system names it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "packlight"


def _from_folder(folder: Path) -> tuple[bytes, bytes]:
    for place in (folder, folder / "dist", folder / "package" / "dist"):
        if (place / SCRIPT).is_file() and (place / WASM).is_file():
            return (place / SCRIPT).read_bytes(), (place / WASM).read_bytes()
    raise RuntimeMissing(
        f"{folder} holds no {SCRIPT} and {WASM}. Name the dist folder of onnxruntime-web {VERSION}, as npm installs it."
    )


def _keep(path: Path, archive: bytes) -> None:
    """Remember a download. A cache that can't be written is no reason to stop: the next call downloads again."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(archive)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
