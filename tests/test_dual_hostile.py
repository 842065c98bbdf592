"""Odd pictures and texts through run, eval and fit: the right result, or one clear sentence."""

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import packlight
from packlight.answering import Question, ask
from packlight.applying import calibration_batches
from packlight.benching import evaluate_one
from packlight.data import read_dataset
from packlight.errors import DataError
from packlight.evaluate import Asked
from packlight.images import read_image
from packlight.serve import open_served
from small_dual import picture, save_model

SCRIPTS = ("红色方块", "червоний квадрат", "مربع أحمر", "赤い四角", "🟥", "é\u0301 \u202e", "red\0square", "\n\t ")
TEXTS = ("a red square", "", "red " * 10_000, *SCRIPTS)


def odd_pictures(folder):
    """name -> the same red picture as another kind of file; the answer to each must be that to the plain one."""
    folder.mkdir(parents=True)
    red = np.full((24, 40, 3), (200, 30, 30), np.uint8)
    red[:, :20] = (30, 60, 200)
    plain = Image.fromarray(red)
    plain.save(folder / "plain.png")
    plain.quantize(8).save(folder / "palette.png")
    clear = plain.convert("RGBA")
    clear.save(folder / "alpha.png")
    plain.quantize(8).save(folder / "clear.gif", transparency=200)
    plain.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 24))] * 2)
    plain.save(folder / "moving.webp", save_all=True, append_images=[Image.new("RGB", (40, 24))], lossless=True)
    plain.save(folder / "moving.png", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    exif = plain.getexif()
    exif[0x0112] = 8  # to be turned by a quarter to the left when shown
    plain.transpose(Image.Transpose.ROTATE_270).save(folder / "turned.png", exif=exif)
    plain.save(folder / "lossless.tif")
    deep = np.repeat(red.astype(">u2") * 257, 1, axis=0).tobytes()  # 16 bits for each colour
    rows = b"".join(b"\0" + deep[i : i + 240] for i in range(0, len(deep), 240))
    (folder / "deep.png").write_bytes(png(40, 24, 16, 2, rows))
    return folder


def png(wide, high, bits, kind, rows):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", wide, high, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_every_kind_of_file_holds_the_same_picture(tmp_path):
    folder = odd_pictures(tmp_path / "odd")
    due = read_image(folder / "plain.png")
    for file in sorted(folder.iterdir()):
        found = read_image(file)
        assert found.shape == due.shape and np.abs(found.astype(int) - due).max() <= 2, file.name


def test_a_damaged_picture_is_read_or_refused_in_one_sentence(tmp_path):
    draw, image = np.random.default_rng(0), Image.fromarray(picture(0))
    exif = image.getexif()
    exif[0x0112] = 6
    said = []
    for suffix in ("jpg", "gif", "tif", "webp", "bmp", "png"):
        image.save(tmp_path / f"whole.{suffix}", **({} if suffix in ("gif", "bmp") else {"exif": exif}))
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for number in range(40):
            data = bytearray(whole)
            for _ in range(int(draw.integers(1, 8))):
                data[int(draw.integers(0, min(len(data), 400 if number % 2 else len(data))))] = int(
                    draw.integers(0, 256)
                )
            (tmp_path / f"x.{suffix}").write_bytes(data)
            try:
                assert read_image(tmp_path / f"x.{suffix}").dtype == np.uint8
            except DataError as error:
                said.append(str(error))
    assert len(said) > 40 and not any("\n" in sentence for sentence in said)


def test_a_picture_of_a_hundred_megapixels_is_in_memory_twice_at_most(tmp_path):
    code = (
        "import sys; from pathlib import Path; from packlight.images import read_image; from packlight.measure import "
        "peak_memory; before = peak_memory(); size = read_image(Path(sys.argv[1])).nbytes; "
        "print(size, peak_memory() - before)"
    )
    Image.new("RGB", (12_500, 8_000), (200, 30, 30)).save(tmp_path / "vast.png", compress_level=1)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "vast.png")], capture_output=True, text=True)
    size, peak = map(int, done.stdout.split())
    assert size == 300_000_000 and peak < 2.7 * size  # Pillow itself has four bytes for three


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """(model folder, bundle with float weights, folder of odd pictures with their texts)."""
    base = tmp_path_factory.mktemp("hostile")
    model, data = save_model(base / "model", "clip"), odd_pictures(base / "odd")
    Image.new("RGB", (1, 1), (9, 9, 9)).save(data / "pixel.png")
    Image.new("CMYK", (30, 20), (0, 200, 200, 0)).save(data / "inks.jpg")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54).save(data / "grey16.png")
    Image.new("1", (10_000, 10_000)).save(data / "vast.png")  # 100 megapixels
    files = sorted(f.name for f in data.iterdir())
    rows = [{"file_name": name, "texts": [TEXTS[i % len(TEXTS)], "a dot"]} for i, name in enumerate(files)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plan = packlight.Plan((packlight.Step("float16"),), family="dual-encoder")
    return model, packlight.apply(str(model), plan, None, base / "out"), data


def test_run_ranks_odd_pictures_for_odd_texts(road):
    _, bundle, data = road
    served = open_served(bundle, 1)
    rows = list(ask(served, Question(inputs=TEXTS, images=data, top=50)))
    assert len(rows) == len(TEXTS) and all(row is not None for row, _ in rows)
    for row, _ in rows:
        scores = {r["file"].rpartition("/")[2]: r["score"] for r in row["found"]}
        assert len(scores) == 14 and np.isfinite(list(scores.values())).all()
        same = [
            scores[name] for name in ("plain.png", "alpha.png", "moving.gif", "turned.png", "deep.png", "lossless.tif")
        ]
        assert max(same) - min(same) < 0.02
    (data.parent / "broken").mkdir()
    (data.parent / "broken" / "cut.png").write_bytes((data / "plain.png").read_bytes()[:60])
    ((row, said),) = ask(served, Question(inputs=("red",), images=data.parent / "broken"))
    assert row is None and "cut.png" in said and "\n" not in said
    with pytest.raises(DataError, match="UTF-8"):
        list(ask(served, Question(inputs=("caf\udce9",), images=data / "plain.png")))


def test_eval_of_bundle_and_model_and_calibration_take_them(road):
    model, bundle, data = road
    found = [evaluate_one(str(name), data, Asked(threads=1)) for name in (bundle, model)]
    assert found[0]["n"] == found[1]["n"] == 14
    loaded = packlight.load(str(model))
    batches = calibration_batches(loaded, read_dataset(data), packlight.Options(), data, None)
    assert sum(len(b["pixel_values"]) for b in batches) in (13, 14)


def test_data_with_a_damaged_picture_are_refused_by_name(road, tmp_path):
    _, bundle, data = road
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cut.png").write_bytes((data / "plain.png").read_bytes()[:60])
    (folder / "good.png").write_bytes((data / "plain.png").read_bytes())
    lines = [json.dumps({"file_name": name, "text": "red"}) for name in ("cut.png", "good.png")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for name in (bundle, road[0]):
        with pytest.raises(DataError, match=r"cut\.png"):
            evaluate_one(str(name), folder, Asked())
    with pytest.raises(DataError, match=r"cut\.png"):
        packlight.fit(str(road[0]), folder, packlight.Target(size=1_000_000), tmp_path / "out")
