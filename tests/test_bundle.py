"""A bundle is there whole or not at all, and is refused when it is not what it claims to be."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packlight.bundle import HISTORY, MANIFEST, VERSION, Bundle, is_bundle, open_bundle, verify, write_bundle
from packlight.errors import BundleError

VALUES: dict[str, Any] = {
    "packlight": "0.1.0", "family": "whisper", "task": "speech-to-text", "source": {"name": "x"},
    "runtime": "onnxruntime", "graphs": {"encoder": "encoder.onnx"}, "serving": {}, "plan": {},
}  # fmt: skip


def fill(folder: Path) -> None:
    (folder / "encoder.onnx").write_bytes(b"graph" * 20)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "out", VALUES, fill)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((path / MANIFEST).read_text())
    change(values)
    (path / MANIFEST).write_text(json.dumps(values))


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_written_bundle_verifies_and_counts_all_its_bytes(bundle: Bundle) -> None:
    verify(open_bundle(bundle.path))
    assert bundle.manifest["version"] == VERSION
    assert sorted(bundle.manifest["files"]) == ["encoder.onnx", HISTORY, "weights.safetensors"]
    assert bundle.size == 100 + 256 + sum((bundle.path / name).stat().st_size for name in (MANIFEST, HISTORY))


def test_the_same_content_gives_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    again = write_bundle(tmp_path / "elsewhere", VALUES, fill)
    assert content(again.path) == content(bundle.path)


@pytest.mark.parametrize("name", ["encoder.onnx", "weights.safetensors"])
def test_verify_refuses_a_flipped_byte(bundle: Bundle, name: str) -> None:
    data = bytearray((bundle.path / name).read_bytes())
    data[50] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        verify(open_bundle(bundle.path))


def test_verify_names_every_problem_at_once(bundle: Bundle) -> None:
    (bundle.path / "encoder.onnx").unlink()
    (bundle.path / "weights.safetensors").write_bytes(b"short")
    (bundle.path / "extra.py").write_text("x")
    with pytest.raises(BundleError) as caught:
        verify(open_bundle(bundle.path))
    message = str(caught.value)
    assert "encoder.onnx is missing" in message
    assert "weights.safetensors has 5 bytes, not 256" in message
    assert "extra.py is not in the manifest" in message


def test_verify_refuses_a_link_to_the_right_bytes(bundle: Bundle, tmp_path: Path) -> None:
    file = bundle.path / "encoder.onnx"
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="is a link"):
        verify(open_bundle(bundle.path))


def test_open_refuses_a_manifest_that_is_a_link(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / MANIFEST).rename(tmp_path / "moved.json")
    (bundle.path / MANIFEST).symlink_to(tmp_path / "moved.json")
    with pytest.raises(BundleError, match="no manifest"):
        open_bundle(bundle.path)


def test_verify_refuses_a_folder_inside(bundle: Bundle) -> None:
    (bundle.path / "sub").mkdir()
    with pytest.raises(BundleError, match="sub is not in the manifest"):
        verify(open_bundle(bundle.path))


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "sub/file", "..", ".", "", "a\\b", "c:evil", "manifest.json"]
)
def test_open_refuses_a_name_that_leaves_the_folder(bundle: Bundle, name: str) -> None:
    change_manifest(bundle.path, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("graph", ["../evil.onnx", "/etc/passwd", "absent.onnx", 3, None])
def test_open_refuses_a_graph_that_is_not_among_the_files(bundle: Bundle, graph: Any) -> None:
    change_manifest(bundle.path, lambda m: m["graphs"].update(encoder=graph))
    with pytest.raises(BundleError, match="graph"):
        open_bundle(bundle.path)


def test_open_refuses_a_newer_version_and_says_what_to_do(bundle: Bundle) -> None:
    change_manifest(bundle.path, lambda m: m.update(version=VERSION + 1))
    with pytest.raises(BundleError, match="Update packlight"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("key", ["version", "family", "task", "runtime", "graphs", "serving", "files"])
def test_open_refuses_a_manifest_without_a_key(bundle: Bundle, key: str) -> None:
    change_manifest(bundle.path, lambda m: m.pop(key))
    with pytest.raises(BundleError, match=key):
        open_bundle(bundle.path)


def test_what_answering_has_no_use_for_is_packed_and_comes_back(tmp_path: Path) -> None:
    told = {
        "plan": {"steps": [{"reason": "because " * 40}] * 60},
        "records": [{"path": f"layer {i}"} for i in range(9)],
    }
    made = write_bundle(tmp_path / "out", VALUES | told, fill)
    assert {k: made.manifest[k] for k in told} == told
    inside = json.loads((made.path / MANIFEST).read_text())
    assert not {"plan", "records", "model"} & inside.keys() and inside["serving"] == {}
    assert (made.path / HISTORY).stat().st_size < 600
    change_manifest(made.path, lambda m: (m.update(told), m["files"].pop(HISTORY)))  # as bundles were before
    (made.path / HISTORY).unlink()
    verify(open_bundle(made.path))
    assert open_bundle(made.path).manifest["plan"] == told["plan"]


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (gzip.compress(b" " * 2**26 + b"{}"), "unpacks to more than"),
        (gzip.compress(b"{}"), "has no plan"),
        (gzip.compress(b"[]"), "is no JSON object"),
        (gzip.compress(b'{"plan": {}}')[:9], "no readable JSON"),
        (b"no gzip", "no readable JSON"),
        (None, "no readable JSON"),
    ],
)
def test_open_refuses_a_history_that_is_none(bundle: Bundle, packed: bytes | None, words: str) -> None:
    (bundle.path / HISTORY).unlink() if packed is None else (bundle.path / HISTORY).write_bytes(packed)
    with pytest.raises(BundleError, match=words):
        open_bundle(bundle.path)


def test_open_refuses_a_history_that_is_a_link(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / HISTORY).rename(tmp_path / "elsewhere")
    (bundle.path / HISTORY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("files", [{}, [], None, {"encoder.onnx": 3}, {"encoder.onnx": {"bytes": "9", "sha256": ""}}])
def test_open_refuses_a_list_of_files_that_is_none(bundle: Bundle, files: Any) -> None:
    change_manifest(bundle.path, lambda m: m.update(files=files))
    with pytest.raises(BundleError):
        open_bundle(bundle.path)


def test_open_refuses_truncated_deep_or_foreign_json(bundle: Bundle) -> None:
    file = bundle.path / MANIFEST
    whole = file.read_text()
    for text in (whole[: len(whole) // 2], "", "[1]", "[" * 100_000, '"x"', "null"):
        file.write_text(text)
        with pytest.raises(BundleError):
            open_bundle(bundle.path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError):
        open_bundle(bundle.path)


def test_open_refuses_a_folder_without_manifest_and_no_folder(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / MANIFEST).unlink()
    assert not is_bundle(bundle.path)
    with pytest.raises(BundleError, match="never finished"):
        open_bundle(bundle.path)
    with pytest.raises(BundleError, match="no folder"):
        open_bundle(tmp_path / "nowhere")


def test_write_refuses_a_foreign_folder_and_leaves_it_untouched(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    (home / "deep" / "thesis.txt").write_text("years of work")
    before = content(home)
    with pytest.raises(BundleError, match="nothing was written"):
        write_bundle(home, VALUES, fill)
    assert content(home) == before
    assert [f.name for f in tmp_path.iterdir()] == ["home"]


def test_write_replaces_an_older_bundle_whole(bundle: Bundle) -> None:
    def other(folder: Path) -> None:
        (folder / "encoder.onnx").write_bytes(b"new")

    verify(write_bundle(bundle.path, VALUES, other))
    assert sorted(content(bundle.path)) == ["encoder.onnx", HISTORY, MANIFEST]


def test_write_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    verify(write_bundle(tmp_path / "out", VALUES, fill))


def failing(folder: Path) -> None:
    fill(folder)
    raise OSError("no space left on device")


def test_a_failing_fill_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space"):
        write_bundle(tmp_path / "out", VALUES, failing)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_fill_leaves_the_older_bundle_as_it_was(bundle: Bundle, tmp_path: Path) -> None:
    before = content(bundle.path)
    with pytest.raises(OSError, match="no space"):
        write_bundle(bundle.path, VALUES, failing)
    assert content(bundle.path) == before
    verify(open_bundle(bundle.path))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
