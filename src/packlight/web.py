"""A bundle and a folder of pictures as a static site: type words, see the pictures ranked, all computed in the page.

The pictures are embedded here, by the bundle itself; the page holds the text tower alone, its weights coded as in the
bundle, and decodes and runs it with onnxruntime-web. docs/howto/web.md tells how the site is used.
"""

import gzip
import json
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from packlight.answering import pictures
from packlight.bundle import folder_bytes
from packlight.codec import read_weights, write_weights
from packlight.errors import BundleError, DataError
from packlight.images import read_image
from packlight.listing import FILE_KEYS, json_rows
from packlight.plan import write_json
from packlight.runtimes.onnx import read_graph
from packlight.runtimes.onnx_wire import external_names
from packlight.serve import TOKENIZER, WEIGHTS, Served
from packlight.target import format_bytes
from packlight.web_runtime import LICENCE, SCRIPT, WASM, runtime_files
from packlight.web_text import check_tokenizer, relocated

VERSION = 1
SITE = "site.json"
_SIDE = 512  # pixels of a picture's longer side in the page
_EXAMPLES, _CAPTION = 8, 200  # that a page has room for; characters of a caption

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Page:
    """What the page shows beside the pictures.

    Args:
        title: its heading; empty for the page's own, which is translated.
        examples: words that a visitor can try with one click, at most eight.
        runtime: folder of onnxruntime-web; None to get it, see `packlight.web_runtime.runtime_files`.
    """

    title: str = ""
    examples: tuple[str, ...] = ()
    runtime: Path | None = None


@dataclass(frozen=True)
class Written:
    """A site.

    Args:
        path: its folder.
        pictures: how many it shows.
        bytes: of the whole folder.
        bytes_without_pictures: what a browser fetches before the first search, and the page itself.
        wrong: a sentence for each picture that was left out.
    """

    path: Path
    pictures: int
    bytes: int
    bytes_without_pictures: int
    wrong: tuple[str, ...]


def write_site(
    served: Served, images: Path, out: Path, page: Page | None = None, progress: Progress = lambda *_: None
) -> Written:
    """Write a site so that it is there whole or not at all.

    Args:
        served: an open bundle for pictures and text, with both towers.
        images: a folder of pictures, or one picture.
        out: the site's folder. An older site of ours there is replaced; any other folder is refused.
        page: see there.
        progress: called with (what, done, total).

    Raises:
        BundleError: a bundle without towers, or whose tokenizer the page does not know.
        DataError: no picture that can be read, a folder that is not ours, too many examples.
        RuntimeMissing: onnxruntime-web is not to be had.
    """
    page = page or Page()
    if served.encoder is not None and served.encoder.settings.kind == "audio":
        raise BundleError(f"{served.bundle.path} is for sounds; a page shows pictures. Name another bundle.")
    if served.encoder is None or served.encoder.text is None:
        raise BundleError(
            f"{served.bundle.path} has no text tower, so a page can't search with it. Name another bundle."
        )
    if len(page.examples) > _EXAMPLES:
        raise DataError(f"The page has room for {_EXAMPLES} examples; {len(page.examples)} are named.")
    tokenizer = gzip.decompress((served.bundle.path / TOKENIZER).read_bytes())
    check_tokenizer(tokenizer.decode("utf-8"))
    _check_place(out, images, served.bundle.path)
    named = pictures(images)
    runtime = runtime_files(page.runtime)
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        shown, vectors, wrong = _show(served, named, images, draft, progress)
        _write_page(draft)
        listed = [*_write_runtime(draft, runtime), *_write_tower(draft, served, tokenizer, vectors)]
        write_json(draft / SITE, _site(served, page, listed, shown, vectors.shape[1]))
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    whole = folder_bytes(out)
    return Written(out, len(shown), whole, whole - folder_bytes(out / "pictures"), tuple(wrong))


def site_text(made: Written) -> str:
    """What was written, and how to look at it, in three lines."""
    without = format_bytes(made.bytes_without_pictures)
    return (
        f"{made.path}   {made.pictures} picture{'s' * (made.pictures != 1)}, {format_bytes(made.bytes)}; without the pictures {without}\n"
        f"Look at it: python3 -m http.server 8000 --directory {shlex.quote(str(made.path))}\n"
        "and open http://localhost:8000/"
    )


def _check_place(out: Path, images: Path, bundle: Path) -> None:
    """Refuse to write where something else would be lost, or where the site would become a part of its own input."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} is a file or a link, so nothing was written. Name a folder for the site.")
    for source in (images, bundle):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{out} lies in {source}, so nothing was written. Name a folder outside it.")
    if out.exists() and any(out.iterdir()) and not _is_site(out):
        raise DataError(f"{out} exists and is no site of ours, so nothing was written. Choose another folder.")


def _is_site(folder: Path) -> bool:
    try:
        found = json.loads((folder / SITE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("packlight_site"), int)


def _site(
    served: Served, page: Page, listed: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], width: int
) -> dict[str, Any]:
    """Everything that the page must know; site.json, written last."""
    source = served.bundle.manifest["source"]
    text = served.bundle.manifest["serving"]["text"]
    return {
        "packlight_site": VERSION,
        "title": page.title,
        "examples": list(page.examples),
        "model": {"name": str(source.get("name", "")), "licence": str(source.get("licence", ""))},
        "runtime": f"runtime/{SCRIPT}",
        "text": {"max_tokens": text["max_tokens"], **{k: text.get(k, 0) for k in ("pad_to", "pad", "canonical")}},
        "dimensions": width,
        "weights": [[name, place] for name, place in _places(_graph(served)).items()],
        "files": list(listed),
        "pictures": list(shown),
    }


# Pictures -----------------------------------------------------------------------------------------------------------


def _show(
    served: Served, named: Sequence[Path], images: Path, draft: Path, progress: Progress
) -> tuple[list[dict[str, Any]], Array, list[str]]:
    """Write small copies of the pictures, under numbers for names: (what the page lists, vectors [n, d], what was wrong)."""
    from PIL import Image

    assert served.encoder is not None
    (draft / "pictures").mkdir()
    base = images if images.is_dir() else images.parent
    captions = _captions(base / "metadata.jsonl")
    shown: list[dict[str, Any]] = []
    vectors: list[Array] = []
    wrong: list[str] = []
    for number, file in enumerate(named, start=1):
        try:
            picture = read_image(file)
            vectors.append(served.encoder.embed_content(picture))
        except DataError as error:
            wrong.append(str(error))
            continue
        small = Image.fromarray(picture)
        small.thumbnail((_SIDE, _SIDE))
        place = f"pictures/{len(shown):06d}.webp"
        small.save(draft / place, quality=82, method=4)
        name = captions.get(file) or file.relative_to(base).with_suffix("").as_posix()
        legible = name.encode("utf-8", "replace").decode("utf-8")  # names of files need not be UTF-8
        shown.append({"file": place, "name": legible, "width": small.width, "height": small.height})
        progress("pictures", number, len(named))
    if not shown:
        raise DataError(f"No picture in {images} can be read, so there is nothing to show. First: {wrong[0]}")
    return shown, np.stack(vectors).astype(np.float32), wrong


def _captions(listing: Path) -> dict[Path, str]:
    """What metadata.jsonl says of pictures: its first text, or its label. Lines that say nothing are passed over."""
    found: dict[Path, str] = {}
    for _, row in json_rows(listing) if listing.is_file() else ():
        if not isinstance(row, dict):
            continue
        file = next((row[k] for k in FILE_KEYS if isinstance(row.get(k), str)), "")
        texts = row.get("texts")
        first = texts[0] if isinstance(texts, list) and texts else None
        said = next((t for t in (row.get("text"), first, row.get("label")) if isinstance(t, str) and t.strip()), "")
        if file and said:
            found[listing.parent / file] = said.strip()[:_CAPTION]
    return found


def packed_vectors(vectors: Array) -> bytes:
    """Vectors [n, d] as one float32 step each and int16 codes, nearest and symmetric.

    A score moves by 1e-5 at most where vectors have length 1 and few dimensions are large, 3e-6 as a rule: less than two
    runtimes differ by.
    """
    peak = np.abs(vectors).max(1)
    step = (np.where(peak > 0, peak, 1) / 32767).astype("<f4")
    codes = np.rint(vectors / step[:, None]).clip(-32767, 32767).astype("<i2")
    return bytes(step.tobytes() + codes.tobytes())


# Files --------------------------------------------------------------------------------------------------------------


def _write_page(draft: Path) -> None:
    for source in sorted(files("packlight").joinpath("web_page").iterdir(), key=lambda s: s.name):
        if source.is_file():
            (draft / source.name).write_bytes(source.read_bytes())


def _write_runtime(draft: Path, runtime: tuple[bytes, bytes]) -> Iterator[dict[str, Any]]:
    script, wasm = runtime
    (draft / "runtime").mkdir()
    (draft / "runtime" / SCRIPT).write_bytes(script)
    (draft / "runtime" / "LICENSE.txt").write_text(LICENCE, encoding="utf-8")
    yield _fetched(draft, "wasm", f"runtime/{WASM}.gz", wasm)


def _write_tower(draft: Path, served: Served, tokenizer: bytes, vectors: Array) -> Iterator[dict[str, Any]]:
    (draft / "model").mkdir()
    graph = _graph(served)
    places = _places(graph)
    weights = draft / "model" / WEIGHTS
    write_weights(weights, dict(read_weights(served.bundle.path / WEIGHTS, list(places))))
    yield _fetched(draft, "weights", f"model/{WEIGHTS}", weights.read_bytes())
    yield _fetched(draft, "graph", "model/text.onnx.gz", relocated(graph, places))
    yield _fetched(draft, "tokenizer", "model/tokenizer.json.gz", tokenizer)
    yield _fetched(draft, "pictures", "model/pictures.bin", packed_vectors(vectors))


def _graph(served: Served) -> bytes:
    return read_graph(served.bundle.path / served.bundle.manifest["graphs"]["text"])


def _places(graph: bytes) -> dict[str, str]:
    """Name of each external weight -> the name under which the page hands it to the runtime."""
    return {name: f"w{number}" for number, name in enumerate(external_names(graph))}


def _fetched(draft: Path, role: str, place: str, content: bytes) -> dict[str, Any]:
    """Write a file that the page fetches, and say how it is told from a damaged one."""
    stored = gzip.compress(content, 9, mtime=0) if place.endswith(".gz") else content
    (draft / place).write_bytes(stored)
    return {"role": role, "path": place, "bytes": len(stored), "content": len(content), "crc32": zlib.crc32(content)}
