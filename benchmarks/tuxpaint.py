"""Zero-shot data out of the Tux Paint stamps: pictures with the name of their folder as label, as a manifest.

    python benchmarks/tuxpaint.py $PACKLIGHT_DATA/tuxpaint_stamps stamps.jsonl
    packlight eval MODEL --data stamps.jsonl --template "a picture of {}."

The stamps are those of Debian's package tuxpaint-stamps-default (GPL-2), listed in metadata.jsonl with 'file_name' and
'category'; the manifest names the files where they lie and copies nothing. A class is a folder with enough pictures,
under its last name: animals/mammals is "mammals".
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path


def label_of(category: str) -> str:
    """The class of a folder."""
    return category.rpartition("/")[2].replace("_", " ")


def manifest(folder: Path, least: int) -> list[dict[str, str]]:
    """Rows with 'file_name' (absolute) and 'label', of classes with `least` pictures or more."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    counts = Counter(label_of(row["category"]) for row in rows)
    return [
        {"file_name": str((folder / row["file_name"]).resolve()), "label": label_of(row["category"])}
        for row in rows
        if counts[label_of(row["category"])] >= least
    ]


def main() -> None:
    """Write the manifest and say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stamps", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--least", type=int, default=10, help="pictures that a class must have")
    asked = parser.parse_args()
    if not (asked.stamps / "metadata.jsonl").is_file():
        sys.exit(f"There is no metadata.jsonl in {asked.stamps}. Name the folder of the stamps.")
    rows = manifest(asked.stamps, asked.least)
    if not rows:
        sys.exit(f"No class in {asked.stamps} has {asked.least} pictures. Ask for fewer with --least.")
    asked.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    counts = Counter(row["label"] for row in rows)
    print(f"{asked.out}: {len(rows)} pictures of {len(counts)} classes, from {counts.most_common()[-1][1]} to "
          f"{counts.most_common(1)[0][1]} each")  # fmt: skip


if __name__ == "__main__":
    main()
