"""What a site of `packlight web` does in Chromium: its rankings beside the bundle's own, bytes fetched, seconds per search.

    python benchmarks/browser.py SITE --bundle BUNDLE --images DIR [--count 50]

The queries are the first texts of DIR/metadata.jsonl. The exit status is 0 where the first ten pictures are the same, in
the same order, for each of them. Needs Chromium and playwright (`pip install playwright`).
"""

import argparse
import functools
import http.server
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packlight.answering import Question, ask
from packlight.answering import pictures as listed
from packlight.serve import open_served

_READY = "body[data-state=ready]"
_SHOWN = "[...document.querySelectorAll('#found li')].map((e) => Number(e.dataset.picture))"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """(address of a plain web server for a folder, bytes of each answer that it gave)."""
    sent: list[int] = []

    class Counting(http.server.SimpleHTTPRequestHandler):
        def send_header(self, keyword: str, value: str) -> None:
            if keyword.lower() == "content-length":
                sent.append(int(value))
            super().send_header(keyword, value)

        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Counting, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", sent
        finally:
            server.shutdown()


def searched(page: Any, queries: Sequence[str]) -> tuple[list[list[int]], list[float]]:
    """(numbers of the pictures shown, seconds until they were) of each query."""
    shown, seconds = [], []
    for words in queries:
        start = time.perf_counter()
        page.fill("#words", words)
        page.wait_for_function("words => document.body.dataset.answered === words", arg=words)
        seconds.append(time.perf_counter() - start)
        shown.append(page.evaluate(_SHOWN)[:10])
    return shown, seconds


def measured(site: Path, bundle: Path, images: Path, queries: Sequence[str]) -> dict[str, Any]:
    """What `main` prints; 'different' are the queries whose first ten pictures are others, or in another order."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("This needs Chromium: apt-get install chromium")
    files = [str(f) for f in listed(images)]  # in this order the site has them, where all could be read
    count = len(json.loads((site / "site.json").read_text(encoding="utf-8"))["pictures"])
    if count != len(files):
        sys.exit(f"The site shows {count} pictures, {images} has {len(files)}. Name the folder that it was made of.")
    with serving(site) as (address, sent), sync_playwright() as playwright:
        # The sandbox needs rights that containers and root lack; the page is our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        start = time.perf_counter()
        page.goto(address)
        page.wait_for_selector(_READY, timeout=120_000)
        ready, fetched = time.perf_counter() - start, sum(sent)
        shown, seconds = searched(page, queries)
        version = browser.version
        browser.close()
    served = open_served(bundle)
    question = Question(tuple(queries), images, top=10)
    native = [[r["file"] for r in row["found"]] for row, _ in ask(served, question) if row is not None]
    pictures = sum(f.stat().st_size for f in (site / "pictures").rglob("*") if f.is_file())
    whole = sum(f.stat().st_size for f in site.rglob("*") if f.is_file())
    return {
        "chromium": version, "queries": len(queries), "pictures": count,
        "different": [q for q, a, b in zip(queries, shown, native, strict=True) if [files[i] for i in a] != b],
        "ready_s": round(ready, 2), "fetched_bytes": fetched, "first_s": round(seconds[0], 3),
        "next_median_s": round(statistics.median(seconds[1:]), 3), "next_most_s": round(max(seconds[1:]), 3),
        "site_bytes_without_pictures": whole - pictures, "bundle_bytes": served.bundle.size,
        "runtime_bytes": sum(f.stat().st_size for f in (site / "runtime").iterdir()),
        "elsewhere": [url for url in asked if not url.startswith((address, "data:", "blob:"))],
    }  # fmt: skip


def main() -> None:
    """Measure and print; exit status 1 where a ranking differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder with metadata.jsonl")
    parser.add_argument("--count", type=int, default=50)
    given = parser.parse_args()
    rows = [json.loads(line) for line in (given.images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    queries = list(dict.fromkeys(r["text"] for r in rows if r.get("text", "").strip()))[: given.count]
    found = measured(given.site, given.bundle, given.images, queries)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    sys.exit(0 if not found["different"] and not found["elsewhere"] else 1)


if __name__ == "__main__":
    main()
