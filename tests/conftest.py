"""What every test may use: the real weights, the real data, and a folder of its own to stand in."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The same examples each time: what is found by chance belongs into a test of its own, not into somebody's red build.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

# Processes side by side (`pytest -n 2`) share the cores: what they start inherits this.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.pop("COLUMNS", None)  # theirs is said to be 80 wide
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# A shell starts what runs in its background with Ctrl-C ignored; the tests of Ctrl-C need it as it is for a person.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def made_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little model of random weights that reads bytes, as a folder; tests copy it."""
    import little_tasks

    return little_tasks.base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on tensors of a toy's size wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def with_base(own_folder: Path, made_base: Path, one_thread: None) -> Path:
    """The current folder, with a base in it: where a user fine-tunes."""
    shutil.copytree(made_base, own_folder / "base")
    return own_folder
