"""What the tests of the page share: a small CLIP as a bundle, pictures of coloured shapes, and a browser."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import packlight
from packlight.web_runtime import SCRIPT, WASM
from small_dual import TEXT, VISION, WORDS, tokenizer_file

COLOURS = {"red": "#d22", "green": "#2a2", "blue": "#24e", "yellow": "#ec2", "black": "#111", "pink": "#f8b"}
SHAPES = ("square", "circle", "triangle", "stripe")


def draw_shapes(folder: Path, copies: int = 3) -> Path:
    """Pictures of one coloured shape each, all different in place and size: 'red-square-0.png'."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for copy in range(copies):
        for colour, value in COLOURS.items():
            for shape in SHAPES:
                image = Image.new("RGB", (int(random.integers(60, 120)), 80), "#f4f1ea")
                left, top, size = (int(n) for n in random.integers((2, 2, 30), (24, 24, 52)))
                box = (left, top, left + size, top + size)
                pen = ImageDraw.Draw(image)
                if shape == "square":
                    pen.rectangle(box, value)
                elif shape == "circle":
                    pen.ellipse(box, value)
                elif shape == "triangle":
                    pen.polygon(((left, top + size), (left + size, top + size), (left + size // 2, top)), value)
                else:
                    pen.rectangle((0, top, image.width, top + size // 3), value)
                image.save(folder / f"{colour}-{shape}-{copy}.png")
    return folder


def save_bundle(folder: Path) -> Path:
    """A random CLIP, large enough that its matrices are coded in chunks, rounded to 6 bits."""
    import transformers as t

    torch.manual_seed(0)
    text = {**TEXT, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 200}
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=48)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "token_embedding" in name:
                tensor *= 40  # so that words differ, as they do in a trained model
    model.save_pretrained(folder / "model")
    tokenizer_file(folder / "model")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    t.CLIPImageProcessorPil(**size).save_pretrained(folder / "model")
    plan = packlight.Plan((packlight.Step("round_to_nearest", {"rate": 6.0}),), family="dual-encoder")
    return packlight.apply(str(folder / "model"), plan, None, folder / "out", packlight.Options(threads=1))


def queries(count: int = 50) -> list[str]:
    """Different lines of the words that the small tokenizer knows."""
    random = np.random.default_rng(1)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(random.choice(WORDS, int(random.integers(1, 7))))] = None
    return list(found)


def fake_runtime(folder: Path) -> Path:
    """Two files named as onnxruntime-web's, for tests that open no browser."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCRIPT).write_bytes(b"export {};")
    (folder / WASM).write_bytes(b"\0asm")
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a plain web server for a folder, as `python3 -m http.server` is one."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium of the system, driven by playwright; a skip that says what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # The sandbox needs rights that containers and root lack; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
