"""Both READMEs say the same, and what they tell people to type works as it stands; so do the worked examples."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
BLOCK = re.compile(r"^```(\w+)(?: ([\w-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def words(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str, str]]:
    """Language, mark and text of each fenced block."""
    return BLOCK.findall(words(name))


def test_both_say_the_same() -> None:
    english, chinese = READMES
    assert blocks(english) == blocks(chinese)
    assert blocks(english)
    sections = [re.findall(r"^(#+) ", words(name), re.MULTILINE) for name in READMES]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", words(name)):
        if "://" not in link:
            assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"


def test_make_knows_its_targets() -> None:
    made = [text for _, mark, text in blocks("README.md") if mark == "make"]
    assert made == ["make quickstart\nmake test\n"]
    # What a make around this test was told is not for this one; -B: as if nothing were installed yet.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "VENV"}
    for line in made[0].splitlines():
        done = subprocess.run([*line.split(), "-n", "-B"], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        assert "torch==" in done.stdout and "requirements.txt" in done.stdout


@pytest.mark.slow
def test_every_command_works(tmp_path: Path) -> None:
    """In order, in one fresh folder, as a user types them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = 0
    for language, mark, text in blocks("README.md"):
        if mark:
            continue
        command = ["bash", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
        assert ran.returncode == 0, f"{text}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
        done += 1
    assert done >= 4
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "first-hf" / "model.safetensors").is_file()


def test_contributing_shows_the_examples_that_run() -> None:
    for name in ("examples/task.py", "examples/method.py"):
        assert name in words("CONTRIBUTING.md")


def test_the_task_learns() -> None:
    assert runpy.run_path(str(ROOT / "examples" / "task.py"))["main"]() > 0.8


def test_the_method_trains_what_it_says() -> None:
    count, changed = runpy.run_path(str(ROOT / "examples" / "method.py"))["main"]()
    assert count == 5 * 32
    assert {name for name, moved in changed.items() if moved} == {name for name in changed if "norm" in name}
