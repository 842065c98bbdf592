"""Whether a dual encoder's bundle ranks pictures on ARM as it does here: the same queries under emulation and not.

qemu's user mode runs ONNX Runtime's own aarch64 wheel on a Debian root folder, which is set up once in a cache folder.
Emulated times say nothing about a board's speed, so none are given. The processor is a Cortex-A76, that of a Raspberry
Pi 5.

    apt-get install -y --no-install-recommends qemu-user-static debootstrap
    python benchmarks/arm.py BUNDLE --images DIR [--queries FILE] [--count 50] [--cache DIR]

The cache folder is ~/.cache/packlight/arm, or what PACKLIGHT_ARM names. Queries are lines of FILE, else the texts in DIR/metadata.jsonl. The exit status is 0 where every ranking is the same.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).resolve().parent.parent / "src"
CACHE = Path(os.environ.get("PACKLIGHT_ARM") or Path.home() / ".cache" / "packlight" / "arm")
CPU = "cortex-a76"
TOOLS = ("qemu-aarch64-static", "debootstrap", "dpkg-deb")
PACKAGES = ("onnxruntime", "numpy", "tokenizers", "safetensors", "pillow")
# ONNX Runtime reads /proc/cpuinfo, and crashes where that is the host's. The features are those of CPU.
_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_CPUINFO = (
    f"processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: {_FEATURES}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
)
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


def ready(cache: Path = CACHE) -> bool:
    """Whether the emulator and its root folder are there."""
    return shutil.which(TOOLS[0]) is not None and (cache / "ready").is_file()


def set_up(cache: Path) -> None:
    """Make the root folder and unpack the wheels, once. Exits with a sentence where a tool is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        sys.exit(
            f"This needs {', '.join(missing)}: apt-get install -y --no-install-recommends qemu-user-static debootstrap"
        )
    if ready(cache):
        return
    cache.mkdir(parents=True, exist_ok=True)
    root, wheels = cache / "rootfs", cache / "wheels"
    if not list((root / "var/cache/apt/archives").glob("libc6_*.deb")):
        include = "--include=python3,libstdc++6,libgomp1"
        # The second stage would run inside the root folder; unpacking the packages is all that is needed.
        _call(["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", include, "bookworm", str(root)])
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        _call(["dpkg-deb", "-x", str(package), str(root)])
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(_CPUINFO)
    named = [f"{name}=={version(name)}" for name in PACKAGES]
    how = [flag for name in _PLATFORMS for flag in ("--platform", f"{name}_aarch64")]
    how += [
        "--only-binary=:all:",
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
        "--abi",
        "cp311",
        "--abi",
        "abi3",
    ]
    _call([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *how, "-d", str(wheels), *named])
    for wheel in sorted(wheels.glob("*.whl")):
        _call([sys.executable, "-m", "zipfile", "-e", str(wheel), str(cache / "site")])
    (cache / "ready").write_text("\n".join(named))


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        sys.exit(f"{command[0]} ended with status {done.returncode}: {last[-1]}")


def embed(bundle: Path, images: Sequence[Path], queries: Sequence[str], out: Path) -> None:
    """Write the vectors of pictures and queries as .npz: what both processors run."""
    from packlight.images import read_image
    from packlight.serve import open_served

    encoder = open_served(bundle, 1).encoder
    assert encoder is not None
    pictures = np.stack([encoder.embed_content(read_image(file)) for file in images])
    np.savez(out, pictures=pictures, queries=np.stack([encoder.embed_text(words) for words in queries]))


def compare(bundle: Path, images: Sequence[Path], queries: Sequence[str], cache: Path, work: Path) -> dict[str, Any]:
    """Embed here and under emulation and compare the rankings.

    Returns:
        'queries', 'pictures'; 'same': queries whose whole ranking is the same; 'same_first': whose first picture is;
        'difference': the largest of a score; 'closest': of the pairs in another order, the largest difference of scores
        here, 0 where none is.
    """
    asked = work / "asked.json"
    asked.write_text(json.dumps({"bundle": str(bundle.resolve()), "images": [str(f.resolve()) for f in images],
                                 "queries": list(queries)}))  # fmt: skip
    scores = []
    for name, start in (("here", [sys.executable]), ("arm", emulated(cache))):
        out = work / f"{name}.npz"
        _call([*start, str(Path(__file__).resolve()), "--embed", str(asked), str(out)])
        with np.load(out) as found:
            scores.append(found["queries"] @ found["pictures"].T)
    return compared(*scores)


def emulated(cache: Path) -> list[str]:
    """The command that starts Python on the emulated processor."""
    path = f"PYTHONPATH={cache / 'site'}:{SOURCE}"
    python = cache / "rootfs/usr/bin/python3.11"
    return [TOOLS[0], "-L", str(cache / "rootfs"), "-E", path, "-cpu", CPU, str(python)]


def compared(here: np.ndarray, arm: np.ndarray) -> dict[str, Any]:
    """What two tables of scores [queries, pictures] say of the rankings; see `compare`."""
    orders = [np.argsort(-scores, axis=1, kind="stable") for scores in (here, arm)]
    same = (orders[0] == orders[1]).all(1)
    # In ARM's order the scores of here should fall; where they rise, two pictures have changed places.
    rises = np.diff(np.take_along_axis(here, orders[1], 1), axis=1).clip(min=0)
    return {
        "queries": len(here), "pictures": here.shape[1], "same": int(same.sum()),
        "same_first": int((orders[0][:, 0] == orders[1][:, 0]).sum()),
        "difference": float(np.abs(here - arm).max()), "closest": float(rises.max(initial=0)),
    }  # fmt: skip


def _queries(folder: Path, file: Path | None, count: int) -> list[str]:
    if file is not None:
        found = file.read_text(encoding="utf-8").splitlines()
    else:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        found = [r.get("text") or (r.get("texts") or [""])[0] for r in rows]
    return list(dict.fromkeys(t for t in found if t.strip()))[:count]


def main() -> None:
    """Set up, compare, print; exit status 1 where a ranking differs."""
    import tempfile

    from packlight.answering import pictures

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--count", type=int, default=50, help="pictures and queries at most")
    parser.add_argument("--cache", type=Path, default=CACHE)
    asked = parser.parse_args()
    set_up(asked.cache)
    queries = _queries(asked.images, asked.queries, asked.count)
    files = pictures(asked.images)
    files = files[:: max(1, len(files) // asked.count)][: asked.count]
    with tempfile.TemporaryDirectory() as work:
        found = compare(asked.bundle, files, queries, asked.cache, Path(work))
    print(json.dumps(found))
    sys.exit(0 if found["same"] == found["queries"] else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--embed"]:
        given = json.loads(Path(sys.argv[2]).read_text())
        embed(Path(given["bundle"]), [Path(f) for f in given["images"]], given["queries"], Path(sys.argv[3]))
    else:
        main()
