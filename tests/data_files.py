"""Samples made up for the tests of data."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from packlight.data import Dataset, Sample, read_dataset
from packlight.errors import DataError


def audio(path: Path, seed: int = 0, seconds: float = 0.5) -> Path:
    """Noise of its own for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, round(16000 * seconds)), 16000)
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(source: Path, **how: bool) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(source, **how)
    return str(caught.value)


def planted(*contents: str) -> Dataset:
    """A dataset without files: one sample per content."""
    made = (
        Sample(f"s{i}", Path(f"/d/s{i}.wav"), c, 1.0, sha256(c.encode()).hexdigest()) for i, c in enumerate(contents)
    )
    return Dataset("planted", tuple(made))
