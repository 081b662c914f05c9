"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data: EDGEC_SHARED, or `../shared` beside the repository."""
    folder = Path(os.environ.get("EDGEC_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "data" / "models").is_dir():
        pytest.skip(f"no models and data at {folder}; set EDGEC_SHARED")
    return folder
