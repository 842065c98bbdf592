"""The site that `packlight web` writes: what is in it, that it is whole or not there, and what is refused."""

import gzip
import json
import re
import subprocess
import sys
import zlib
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from packlight import web_runtime
from packlight.codec import read_weights
from packlight.errors import BundleError, DataError, RuntimeMissing
from packlight.freezing import freeze
from packlight.runtimes.onnx import read_graph
from packlight.runtimes.onnx_wire import external_names
from packlight.serve import open_served
from packlight.web import Page, packed_vectors, write_site
from packlight.web_runtime import SCRIPT, WASM, runtime_files
from packlight.web_text import check_tokenizer, relocated
from small_web import draw_shapes, fake_runtime, save_bundle, serving

COMMAND = [sys.executable, "-c", "from packlight.cli import main; main()"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(bundle opened, folder of pictures, folder of a runtime)."""
    base = tmp_path_factory.mktemp("web")
    served = open_served(save_bundle(base), 1)
    return served, draw_shapes(base / "shapes", 1), fake_runtime(base / "runtime")


def write(made, out, **page):
    served, images, runtime = made
    return write_site(served, images, out, Page(runtime=runtime, **page))


def test_a_site_holds_the_text_tower_the_vectors_and_the_pictures_and_says_how_to_check_them(made, tmp_path):
    served, images, _ = made
    found = write(made, tmp_path / "site", title="Shapes", examples=("a red square",))
    site = json.loads((found.path / "site.json").read_text())
    assert found.pictures == len(site["pictures"]) == 24 and not found.wrong
    assert site["title"] == "Shapes" and site["examples"] == ["a red square"]
    for file in site["files"]:
        stored = (found.path / file["path"]).read_bytes()
        content = gzip.decompress(stored) if file["path"].endswith(".gz") else stored
        assert (len(stored), len(content), zlib.crc32(content)) == (file["bytes"], file["content"], file["crc32"])
    graph = read_graph(served.bundle.path / "text.onnx.gz")
    whole = dict(read_weights(served.bundle.path / "weights.safetensors", external_names(graph)))
    tower = dict(read_weights(found.path / "model" / "weights.safetensors"))
    assert tower.keys() == whole.keys() and all(np.array_equal(tower[n], whole[n]) for n in whole)
    assert [name for name, _ in site["weights"]] == external_names(graph)
    assert not any("vision" in name for name in tower)
    for picture in site["pictures"]:
        with Image.open(found.path / picture["file"]) as image:
            assert image.size == (picture["width"], picture["height"])
    assert [p["name"] for p in site["pictures"]] == sorted(f.stem for f in images.glob("*.png"))
    assert found.bytes == sum(f.stat().st_size for f in found.path.rglob("*") if f.is_file())
    assert 0 < found.bytes_without_pictures < found.bytes
    assert not (tmp_path / "site.part").exists()


def test_vectors_of_16_bits_keep_every_score_within_what_two_runtimes_differ_by():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 256)).astype(np.float32)
    vectors[7] = 0
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    raw = packed_vectors(vectors)
    step = np.frombuffer(raw, "<f4", 300)
    back = np.frombuffer(raw, "<i2", offset=1200).reshape(300, 256) * step[:, None]
    query = random.normal(size=256)
    query /= np.linalg.norm(query)
    assert np.abs((back - vectors) @ query).max() < 2e-5
    assert len(raw) == 300 * (4 + 512)


def test_the_graph_of_the_page_is_the_bundles_but_for_where_its_weights_lie(made):
    onnx = pytest.importorskip("onnx")
    graph = read_graph(made[0].bundle.path / "text.onnx.gz")
    names = external_names(graph)
    moved = onnx.load_from_string(relocated(graph, {name: f"w{i}" for i, name in enumerate(names)}))
    original = onnx.load_from_string(graph)
    places = {}
    for ours, theirs in zip(moved.graph.initializer, original.graph.initializer, strict=True):
        if ours.data_location == onnx.TensorProto.EXTERNAL:
            said = {e.key: e.value for e in ours.external_data}
            assert said["offset"] == "0"
            assert said["length"] == {e.key: e.value for e in theirs.external_data}["length"]
            places[ours.name] = said["location"]
            ours.external_data[0].value = "weights"
    assert places == {name: f"w{i}" for i, name in enumerate(names)}
    assert moved == original
    with pytest.raises(BundleError, match="lacks"):
        relocated(graph, {})


def test_an_older_site_is_replaced_and_any_other_folder_is_left_alone(made, tmp_path):
    _, images, _ = made
    first = write(made, tmp_path / "site")
    (first.path / "old").write_text("")
    write(made, first.path)
    assert not (first.path / "old").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "site.json").write_text('{"mine": 1}')
    with pytest.raises(DataError, match="no site of ours"):
        write(made, other)
    assert (other / "site.json").read_text() == '{"mine": 1}'
    with pytest.raises(DataError, match="lies in"):
        write(made, images / "site")
    (tmp_path / "link").symlink_to(first.path)
    with pytest.raises(DataError, match="file or a link"):
        write(made, tmp_path / "link")
    with pytest.raises(DataError, match="room for 8"):
        write(made, tmp_path / "many", examples=tuple("abcdefghi"))
    assert not (tmp_path / "many").exists()


def test_names_of_pictures_are_shown_but_never_used_as_paths(made, tmp_path):
    served, images, runtime = made
    folder = tmp_path / "hostile"
    folder.mkdir()
    source = (images / "red-square-0.png").read_bytes()
    for name in ("up%2f..%2fup.png", "<img src=x onerror=alert(1)>.png", "a?b#c.png", "空 白.png"):
        (folder / name).write_bytes(source)
    (folder / "cut.png").write_bytes(source[:60])
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "空 白.png", "text": "a white space"}\n{"file_name": 3}\nno\n'
    )
    found = write_site(served, folder, tmp_path / "site", Page(runtime=runtime))
    site = json.loads((found.path / "site.json").read_text())
    names = {p["name"] for p in site["pictures"]}
    assert names == {"up%2f..%2fup", "<img src=x onerror=alert(1)>", "a?b#c", "a white space"}
    assert {p["file"] for p in site["pictures"]} == {f"pictures/{i:06d}.webp" for i in range(4)}
    assert len(list((found.path / "pictures").iterdir())) == 4
    assert len(found.wrong) == 1 and "cut.png" in found.wrong[0]


def test_a_page_names_no_address_but_its_own():
    for file in files("packlight").joinpath("web_page").iterdir():
        text = file.read_text(encoding="utf-8")
        for line in text.splitlines():
            line = line.replace("http://www.w3.org/2000/svg", "").replace("http://localhost:8000/", "")
            assert "http://" not in line and "https://" not in line, (file.name, line)
            assert "innerHTML" not in line and "eval(" not in line, (file.name, line)
    html = files("packlight").joinpath("web_page/index.html").read_text(encoding="utf-8")
    assert "default-src 'self'" in html and "unsafe-inline" not in html


def test_the_page_says_everything_in_both_languages():
    words = files("packlight").joinpath("web_page/words.js").read_text(encoding="utf-8")
    english, chinese = re.split(r"\n  zh: \{", words)
    entry = re.compile(r"^    (\w+):\s+\"(.*)\",$", re.MULTILINE)
    one, two = dict(entry.findall(english)), dict(entry.findall(chinese))
    assert one.keys() == two.keys() and len(one) > 15
    for key in one:
        assert sorted(re.findall(r"\{\w+\}", one[key])) == sorted(re.findall(r"\{\w+\}", two[key])), key


def test_bundles_without_a_text_tower_and_unknown_tokenizers_are_refused_before_any_work(made, tmp_path):
    served, images, runtime = made
    frozen = freeze(served, ("red", "blue"), tmp_path / "frozen")
    with pytest.raises(BundleError, match="no text tower"):
        write_site(open_served(frozen.path, 1), images, tmp_path / "site", Page(runtime=runtime))
    known = json.loads(gzip.decompress((served.bundle.path / "tokenizer.json.gz").read_bytes()))
    check_tokenizer(json.dumps(known))
    other = {**known, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "UnicodeScripts"}]}}
    with pytest.raises(BundleError, match="UnicodeScripts"):
        check_tokenizer(json.dumps(other))
    split = {"type": "Split", "pattern": {"Regex": r"(?i:'s)|\h+"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(BundleError, match="the pattern"):
        check_tokenizer(json.dumps({**known, "pre_tokenizer": split}))
    with pytest.raises(BundleError, match="dropout"):
        check_tokenizer(json.dumps({**known, "model": {**known["model"], "dropout": 0.1}}))
    with pytest.raises(BundleError, match="can't be read"):
        check_tokenizer("[1]")


def test_the_runtime_comes_from_a_folder_or_a_registry_and_must_be_the_one_that_npm_publishes(tmp_path, monkeypatch):
    fake_runtime(tmp_path / "node_modules" / "dist")
    assert runtime_files(tmp_path / "node_modules") == (b"export {};", b"\0asm")
    with pytest.raises(RuntimeMissing, match=f"{SCRIPT} and {WASM}"):
        runtime_files(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    place = tmp_path / "registry" / "onnxruntime-web" / "-"
    place.mkdir(parents=True)
    (place / f"onnxruntime-web-{web_runtime.VERSION}.tgz").write_bytes(b"not the archive")
    with serving(tmp_path / "registry") as address:
        monkeypatch.setenv("npm_config_registry", address)
        with pytest.raises(RuntimeMissing, match=r"is not the archive.*--runtime DIR"):
            runtime_files()
        monkeypatch.setenv("npm_config_registry", f"{address}/nothing/")
        with pytest.raises(RuntimeMissing, match=r"could not be downloaded.*--runtime DIR"):
            runtime_files()
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    with pytest.raises(RuntimeMissing, match="no web address"):
        runtime_files()
    assert not (tmp_path / "cache").exists()


def test_the_command_writes_a_site_and_names_what_it_leaves_out(made, tmp_path):
    served, images, runtime = made
    arguments = ["web", served.bundle.path, "--images", images, "--runtime", runtime, "-o", tmp_path / "site", "--json"]
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pictures"] == 24
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "good.png").write_bytes((images / "red-square-0.png").read_bytes())
    (tmp_path / "some" / "cut.png").write_bytes(b"no picture")
    arguments[3] = tmp_path / "some"
    done = subprocess.run([*COMMAND, *map(str, arguments[:-1])], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cut.png" in done.stderr and "Traceback" not in done.stderr
    assert "1 picture," in done.stdout and "http.server" in done.stdout
