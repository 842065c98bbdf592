"""`make demo-images`: train a picture and text model on Open Clip Art, fit it to a tenth, search it in the browser.

The model is the short version of `examples/clipart/train.py`; `make model-images` makes the full one, which is taken
where it lies there.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path("demo/clipart")
MODEL, DRAWINGS, OUT, SITE = ROOT / "model", ROOT / "drawings", ROOT / "out", ROOT / "site"
TARGET = ("--language", "en", "--max-size", "10.5MB", "--max-drop", "1pp")  # a tenth of the original's 105.5 MB
BIN = Path(sys.executable).parent


def main() -> int:
    """Run the demo; returns the exit status."""
    if not (MODEL / "model.safetensors").is_file() or not (DRAWINGS / "train" / "metadata.jsonl").is_file():
        command = [sys.executable, "examples/clipart/train.py", "--quick", "-o", str(MODEL), "--work", str(ROOT)]
        if subprocess.run(command, check=False).returncode:
            return 1
    held_out = DRAWINGS / "held-out"
    status = packlight("fit", MODEL, "--data", held_out, "--calibration", DRAWINGS / "train", *TARGET, "-o", OUT)
    if status not in (0, 3):
        return status
    if status == 3:
        print("\nExit status 3: these drawings say that the target is not met. The nearest bundle was kept.")
    if packlight("run", OUT / "bundle", "a red apple", "--images", held_out / "images", "--top", "3"):
        return 1
    words = ("--example", "a bird", "--example", "christmas tree", "--example", "traffic sign")
    if packlight("web", OUT / "bundle", "--images", held_out, "-o", SITE, "--title", "Open Clip Art", *words):
        return 1
    print(f"\nSearch in the browser:   {sys.executable} -m http.server 8000 --directory {SITE}")
    print(f"Open the report:         {(OUT / 'report.html').resolve()}")
    return status


def packlight(*arguments: object) -> int:
    """Run the command as a user would; returns its exit status."""
    command = [str(a) for a in arguments]
    print(f"\n$ packlight {' '.join(command)}\n", flush=True)
    return subprocess.run([str(BIN / "packlight"), *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
