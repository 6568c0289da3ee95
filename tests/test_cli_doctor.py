"""`ratoon doctor`: says what is here, advises where something is wrong, and really trains."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ratoon.cli import doctor
from ratoon.cli.main import run as ratoon

LOOKED_AT = {
    "machine", "versions", "threads", "load", "allocator", "memory", "disk", "matrix products", "bf16", "GPU",
    "torch.compile", "C step", "C training", "cache folder", "toy",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> Iterator[None]:
    """One thread, short measurements, no real compilation; a folder of one's own as the cache."""
    from ratoon.train import compiled

    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(compiled, "missing_compiler", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def findings() -> tuple[dict[str, doctor.Finding], dict[str, Any]]:
    facts: dict[str, Any] = {}
    return {finding.name: finding for finding in doctor.examine(facts)}, facts


def test_everything_is_looked_at_and_the_toy_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert ratoon(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in said["findings"]}
    assert found.keys() >= LOOKED_AT
    toy = said["toy"]
    assert toy["works"] and toy["last_loss"] < 0.7 * toy["first_loss"] and toy["tokens_per_second"] > 0
    assert toy["first_loss"] == pytest.approx(5.5, abs=0.3)  # about the logarithm of 256 bytes
    assert f"{toy['tokens_per_second']:,.0f} tokens/s" in found["toy"]["found"]
    assert all(rate > 0 for rate in said["matmul_gflops"].values())
    assert said["allocator"]["before_seconds"] > 0 and said["allocator"]["after_seconds"] > 0
    assert said["versions"]["torch"] == torch.__version__
    assert {*said["optional"]["installed"], *(m["package"] for m in said["optional"]["missing"])} == {*doctor.OPTIONAL}


def test_as_text_with_advice_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 1.0, 1.0))
    assert ratoon(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("toy") and "tokens/s" in line for line in lines)
    assert any(line.startswith("advice: load: ") for line in lines)
    assert not any(line.startswith("PROBLEM") for line in lines)


def test_the_rate_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n³ operations in the time that was measured."""
    monkeypatch.setattr(doctor, "_best_seconds", lambda action, seconds: 0.5)
    assert doctor._product_rate(torch.ones(100, 100)) == pytest.approx(2 * 100**3 / 0.5 / 1e9)


def one(name: str) -> doctor.Finding:
    """One finding without the measurements of the others."""
    facts: dict[str, Any] = {}
    if name in ("torch.compile", "C step"):
        return {finding.name: finding for finding in doctor._compilers(facts)}[name]
    list(doctor._machine(facts))
    looks = {"threads": doctor._threads, "memory": doctor._memory, "disk": doctor._disk, "cache folder": doctor._cache}
    return {**looks, "GPU": doctor._gpu, "toy": doctor._toy, "allocator": doctor._allocator}[name](facts)


def test_threads_that_leave_cores_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratoon.cli import machine

    whole = machine.machine
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "machine", lambda: {**whole(), "cores": 4, "threads": 1})
    found = one("threads")
    assert not found.ok and "unset OMP_NUM_THREADS" in str(found.advice) and "idle" in str(found.advice)
    monkeypatch.setattr(machine, "machine", lambda: {**whole(), "cores": 4, "threads": 4})
    assert one("threads").ok


def test_no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratoon.generate import native
    from ratoon.train import compiled

    def none() -> Any:
        raise native.Unavailable("there is no C compiler (cc, gcc or clang)")

    monkeypatch.setattr(compiled, "missing_compiler", lambda: "no g++ here")
    monkeypatch.setattr(native, "kernel", none)
    both = [one("torch.compile"), one("C step")]
    assert [finding.found for finding in both] == ["no g++ here", "there is no C compiler (cc, gcc or clang)"]
    assert all(not finding.ok and not finding.fatal and "apt install" in str(finding.advice) for finding in both)


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        total, available = 4 * 10**9, 10**9

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    found = one("memory")
    assert not found.ok and found.found == "1.0 GB of 4.0 GB available" and "tiny" in str(found.advice)
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    found = one("disk")
    assert not found.ok and found.found.startswith("1.0 GB free") and "keep_checkpoints" in str(found.advice)


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees one here")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    found = one("GPU")
    assert not found.ok and "sees no GPU" in found.found and "install a torch" in str(found.advice)


def test_a_cache_that_cannot_be_written(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("RATOON_HOME", str(own_folder / "file"))
    found = one("cache folder")
    assert not found.ok and "RATOON_HOME" in str(found.advice)
    monkeypatch.setenv("RATOON_HOME", str(own_folder / "cache"))
    assert one("cache folder").ok
    assert list((own_folder / "cache").iterdir()) == []  # the probe is gone


def test_an_allocator_that_cannot_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratoon.model import allocator

    monkeypatch.setattr(allocator, "_done", "allocator partly tuned: glibc refused a setting")
    found = one("allocator")
    assert not found.ok and "jemalloc" in str(found.advice)


def test_a_missing_package_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("flying", "ratoon[wings]")})
    facts: dict[str, Any] = {}
    (found,) = doctor._packages(facts)
    assert found.name == "without no-such-package" and found.found == 'no flying; pip install "ratoon[wings]" brings it'
    assert found.ok  # nothing is wrong until it is wanted


def test_a_toy_that_does_not_learn_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer does nothing: the loss stays, the verb says so and fails."""
    from ratoon.train.optim import Optimizer

    monkeypatch.setattr(Optimizer, "step", lambda self, *given: None)
    with pytest.raises(SystemExit) as caught:
        ratoon(["doctor"])
    assert caught.value.code == 1
    assert "PROBLEM: toy: its loss should have fallen" in capsys.readouterr().out


def test_a_training_that_stops_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratoon.train import loop

    def broken(*arguments: Any, **more: Any) -> Any:
        from ratoon.base.errors import NumericError

        raise NumericError("the loss became nan at step 0", fix="look at these rows")

    monkeypatch.setattr(loop, "train", broken)
    found = one("toy")
    assert found.fatal and not found.ok and "became nan" in found.found
