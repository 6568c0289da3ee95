"""What every test may use: the real weights, the real data, and a folder of its own to stand in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched once into the cache folder of this machine."""
    from ratoon.store.fetch import obtain

    folder = obtain("smollm2-135m-instruct", talk=print)
    return next(folder.glob("*.gguf"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; `RATOON_TEST_DATA` names another place."""
    folder = Path(os.environ.get("RATOON_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder} (RATOON_TEST_DATA names another place)")
    return folder


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one: where a user types."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
