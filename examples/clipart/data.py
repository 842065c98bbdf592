"""Open Clip Art as pictures with words: get Debian's package of 7,458 public-domain drawings, render it, divide it.

Emoji of three sets join those that train (`emojis`).

Needs resvg-py (`pip install resvg-py`), which brings its renderer with it.
"""

import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import emojis

PACKAGE = "openclipart-svg"
DEB = "openclipart-svg_0.18+dfsg-19_all.deb"
SHA256 = "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
URLS = (
    f"https://deb.debian.org/debian/pool/main/o/openclipart/{DEB}",
    f"https://snapshot.debian.org/archive/debian/20230610T031622Z/pool/main/o/openclipart/{DEB}",
)
Row = tuple[str, bytes, dict[str, Any]]  # source, JPEG, title and keywords
SIDE = 256  # pixels of the longer side
HELD_OUT, VALIDATION = 500, 250
_SVG = "./usr/share/openclipart/svg/"
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


# Getting the drawings -----------------------------------------------------------------------------------------------


def package(folder: Path) -> Path:
    """Debian's package, from apt where there is one, else from Debian's servers. Ends the command where neither works."""
    file = folder / DEB
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        content = _from_apt(folder) or _from_servers()
        if content is None:
            sys.exit(f"{DEB} can be had neither with apt-get nor from Debian's servers. Put it at {file} yourself.")
        file.write_bytes(content)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{file} is not the file this was made with (sha256 {SHA256}). Delete it and start again.")
    return file


def _from_apt(folder: Path) -> bytes | None:
    try:
        done = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, check=False)
    except OSError:
        return None
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    content = found[0].read_bytes() if done.returncode == 0 and found else None
    for file in found:
        file.unlink()
    return content


def _from_servers() -> bytes | None:
    for url in URLS:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return bytes(answer.read())
        except (OSError, ValueError):
            continue
    return None


def drawings(deb: Path) -> Iterator[tuple[str, bytes, None]]:
    """(path below the package's folder of drawings, SVG, words yet to be read) of every file in it. Links are left out."""
    content = deb.read_bytes()
    place = 8  # an ar archive: a magic of 8 bytes, then headers of 60 with the size at 48
    while place < len(content):
        name = content[place : place + 16].decode().strip().rstrip("/")
        size = int(content[place + 48 : place + 58])
        if name == "data.tar.xz":
            break
        place += 60 + size + size % 2
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(content[place + 60 : place + 60 + size]))) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(_SVG) and member.name.endswith(".svg"):
                opened = tar.extractfile(member)
                assert opened is not None
                yield member.name.removeprefix(_SVG), opened.read(), None


# Rendering ----------------------------------------------------------------------------------------------------------


def render(item: tuple[str, bytes, dict[str, Any] | None]) -> Row | None:
    """(source, JPEG, title and keywords) of a drawing on white; None for one that is empty or has no words.

    Args:
        item: source, SVG, and its words; None for those in the SVG's own metadata.
    """
    import resvg_py
    from PIL import Image

    source, svg, given = item
    words = describe(svg) if given is None else given
    if words is None:
        return None
    try:
        image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg.decode("utf-8", "replace"), background="#ffffff",
                                                            skip_system_fonts=True, width=2 * SIDE, dpi=96.0)))  # fmt: skip
        image = image.convert("RGB")
    except (ValueError, OSError):
        return None
    if image.getextrema() == ((255, 255),) * 3 or max(image.size) > 16 * min(image.size):
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return source, buffer.getvalue(), words


def describe(svg: bytes) -> dict[str, Any] | None:
    """'title' and 'keywords' from the drawing's own metadata; None where it has neither."""
    try:
        root = ET.fromstring(svg)
    except ET.ParseError:
        return None
    work = next((e for e in root.iter() if e.tag.endswith("}Work")), None)
    if work is None:
        return None
    title = " ".join((work.findtext(f"{_DC}title") or "").replace("_", " ").split())
    found = [" ".join((e.text or "").replace("_", " ").split()) for e in work.iterfind(f"{_DC}subject//{_RDF}li")]
    keywords = list(dict.fromkeys(k for k in found if k and k != "hash"))  # 'hash' is a fault of the library's own
    return {"title": title, "keywords": keywords} if title or keywords else None


def text_of(title: str, keywords: Sequence[str]) -> str:
    """The words of a drawing as one text: its title, then its keywords."""
    return ", ".join([*([title] if title else []), *keywords])


# The folders --------------------------------------------------------------------------------------------------------


def order(text: str) -> str:
    """What drawings are divided by: the SHA-256 of their words, so that a series with the same words stays together."""
    return hashlib.sha256(text.casefold().encode()).hexdigest()


def divide(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """'held-out', 'validation' and 'train': by the smallest hashes of the words, no words in two parts, no pixels twice."""
    left = sorted(rows, key=lambda row: (order(words_of(row)), row[0]))
    parts: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for name, count in (("held-out", HELD_OUT), ("validation", VALIDATION), ("train", len(left))):
        part: list[Row] = []
        while left and len(part) < count:
            row = left.pop(0)
            pixels = hashlib.sha256(row[1]).hexdigest()
            if pixels not in seen:
                seen.add(pixels)
                part.append(row)
        taken = {words_of(row).casefold() for row in part}
        left = [row for row in left if words_of(row).casefold() not in taken]
        parts[name] = part
    return parts


def words_of(row: Row) -> str:
    """All words of a rendered drawing."""
    return text_of(row[2]["title"], row[2]["keywords"])


def make(folder: Path, work: Path, workers: int) -> None:
    """Write `folder/held-out`, `/validation` and `/train`, as `divide` makes them, and `/emoji`, in the imagefolder layout."""
    with ProcessPoolExecutor(workers) as pool:
        further = [row for row in pool.map(render, emojis.emojis(work), chunksize=32) if row is not None]
        done = pool.map(render, drawings(package(work)), chunksize=32)
        parts = divide([row for row in done if row is not None])
    for name, part in ({"emoji": further} | parts).items():
        save(folder / name, part)


def save(folder: Path, rows: Sequence[Row]) -> None:
    """Write one part; its metadata last, so that a folder that has it is whole."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for source, jpeg, words in rows:
        name = f"images/{PurePosixPath(source).stem[:40]}-{order(source)[:8]}.jpg"
        (folder / name).write_bytes(jpeg)
        row = {"file_name": name, "text": text_of(words["title"], words["keywords"]), **words, "source": source}
        lines.append(json.dumps(row, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a part's metadata. Ends the command where there are none."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        sys.exit(f"There is no {file}.")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), os.cpu_count() or 1)
