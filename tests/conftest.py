"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["refusals", "vocabularies"]  # fixtures that several files share

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The development data, or a skip that says how to have it."""
    folder = Path(os.environ.get("PACKLIGHT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set PACKLIGHT_DATA")
    return folder
