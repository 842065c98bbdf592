"""Emoji as further drawings with words to train on: three sets from npm's registry, named by emojilib.

The same notion drawn in three hands is what Open Clip Art lacks: its series are one hand each. Nothing of these is held
out, and no picture of Open Clip Art is among them.
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packlight.errors import RuntimeMissing
from packlight.npm import archive_name, download, is_archive

# Package, version, and the sha512 that npm publishes for it. Pictures: Apache-2.0, MIT, CC BY 4.0; words: MIT.
SETS = (
    ("@iconify-json/noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    ("@iconify-json/fluent-emoji-flat", "1.2.6", "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    ("@iconify-json/twemoji", "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
)  # fmt: skip
WORDS = (
    "emojilib",
    "4.0.3",
    "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
)
_JOINERS = ("fe0f",)  # a sign that a character is to be shown in colour; lists of names differ in whether they write it


def archive(package: tuple[str, str, str], folder: Path) -> tarfile.TarFile:
    """A package of npm's registry, downloaded where it is not in `folder` yet. Ends the command where it can't be had."""
    name, version, digest = package
    file = folder / archive_name(name, version)
    if not file.is_file():
        try:
            file.write_bytes(download(*package, f"Put it at {file} yourself: npm pack {name}@{version}"))
        except (OSError, RuntimeMissing) as error:
            sys.exit(str(error))
    content = file.read_bytes()
    if not is_archive(content, digest):
        sys.exit(f"{file} is not the archive that npm publishes. Delete it and start again.")
    return tarfile.open(fileobj=io.BytesIO(content), mode="r:gz")


def read(packed: tarfile.TarFile, name: str) -> Any:
    """A JSON file of a package."""
    opened = packed.extractfile(f"package/{name}")
    assert opened is not None  # the archive is the one that was pinned
    return json.load(opened)


def names(folder: Path) -> dict[str, dict[str, Any]]:
    """'title' and 'keywords' of each emoji by its code points."""
    with archive(WORDS, folder) as packed:
        listed = read(packed, "dist/emoji-en-US.json")
    return {key_of(char): {"title": words[0].replace("_", " "),
                           "keywords": list(dict.fromkeys(w.replace("_", " ") for w in words[1:]))}
            for char, words in listed.items()}  # fmt: skip


def key_of(char: str) -> str:
    """Code points of an emoji in hexadecimal, without what only asks for colour."""
    return "-".join(c for c in (f"{ord(c):x}" for c in char) if c not in _JOINERS)


def emojis(folder: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """(source, SVG, title and keywords) of every emoji of every set that has a name; variants of skin colour have none."""
    named = names(folder)
    for package in SETS:
        with archive(package, folder) as packed:
            icons, chars = read(packed, "icons.json"), read(packed, "chars.json")
        side = icons.get("width", 16), icons.get("height", icons.get("width", 16))
        for code, icon in sorted(chars.items()):
            words = named.get("-".join(c for c in code.split("-") if c not in _JOINERS))
            drawn = icons["icons"].get(icon)
            if words and drawn:
                wide, high = drawn.get("width", side[0]), drawn.get("height", side[1])
                box = f"{drawn.get('left', 0)} {drawn.get('top', 0)} {wide} {high}"
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{wide}" height="{high}" viewBox="{box}">{drawn["body"]}</svg>'
                yield f"{package[0].rpartition('/')[2]}/{icon}.svg", svg.encode(), words
