"""Who may import whom, what importing costs, and that every file says what it decides."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ratoon"
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "store": {"base"},
    "text": {"base"},
    "tasks": {"base", "text"},
    "data": {"base", "store", "text", "tasks"},
    "model": {"base", "store"},
    "adapt": {"base", "store", "model"},
    "generate": {"base", "store", "text", "model", "adapt"},
    "train": {"base", "store", "data", "model", "adapt"},
    "evaluate": {"base", "store", "text", "tasks", "data", "model", "generate"},
    "report": {"base", "store"},
}
"""Floors from the ground up; `cli`, `recipe` and the package itself may import all of them. docs/contracts.md says the
same in words."""
WITHOUT_TORCH = {"base", "store", "text", "tasks", "data", "report", "recipe"}
STANDS_ON = {"base": {"pydantic", "pydantic_core", "yaml", "numpy"}}
TORCH = {"torch", "safetensors", "transformers"}


def floor_of(path: Path) -> str:
    """The floor a file belongs to: its folder's name, or its own."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every import of a file, those inside functions too; those for types only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, one.name) for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its floor"
            names = [f"{node.module}.{one.name}" for one in node.names] if node.module == "ratoon" else [node.module]
            found += [(node.lineno, str(name)) for name in names if id(node) not in typing_only]
    return found


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_floor_is_in_the_table() -> None:
    floors = {path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert floors - {"cli", "recipes", "recipe"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    floor = floor_of(path)
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if top == "ratoon" and floor in MAY_IMPORT:
            other = rest.partition(".")[0]
            assert other in {floor, "__version__"} | MAY_IMPORT[floor], f"{where}: {floor} may not import {other}"
        if floor in WITHOUT_TORCH:
            assert top not in TORCH, f"{where}: {floor} may not import {top}"
        if floor in STANDS_ON and top != "ratoon":
            assert top in STANDS_ON[floor] | sys.stdlib_module_names, f"{where}: {floor} may not import {top}"
        assert top not in {"peft", "datasets"}, f"{where}: peers are for tests and benchmarks"
        assert top != "transformers" or floor in {"evaluate", "cli"}, (
            f"{where}: only `verify` compares with Transformers"
        )


def test_the_table_is_that_of_the_contracts() -> None:
    words = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")
    table: dict[str, set[str]] = {}
    for floors, may in re.findall(r"^\| ([a-z, ]+) \| (.+?) \|$", words, re.MULTILINE):
        for floor in floors.split(", "):
            table[floor] = set(re.findall(r"[a-z]+", re.sub(r"\(.*?\)|standard library", "", may)))
    for floor, may in MAY_IMPORT.items():
        assert may <= table[floor], f"{floor}: {sorted(may - table[floor])} is not in docs/contracts.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_says_what_it_decides(path: Path) -> None:
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert words or not path.read_text(encoding="utf-8").strip(), f"{path} begins without a word on what it is for"


@pytest.mark.parametrize("arguments", [["-c", "import ratoon"], ["-m", "ratoon", "--help"]], ids=["import", "help"])
def test_the_door_is_light(arguments: list[str]) -> None:
    """Neither brings torch, nor anything else that takes long. (How long is measured in benchmarks/.)"""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "ratoon" in loaded
    heavy = {"torch", "numpy", "pydantic", "matplotlib", "rich", "tokenizers", "transformers", "psutil", "yaml"}
    assert not loaded & heavy


@pytest.mark.parametrize("floor", sorted(WITHOUT_TORCH))
def test_floors_without_torch_load_without_torch(floor: str) -> None:
    names = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in FILES if floor_of(path) == floor
    ]
    load = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)"
    code = f"{load}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ruff_and_mypy_are_clean() -> None:
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_repository_speaks_of_itself_alone() -> None:
    """No path of somebody's machine stands in a file."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".png", ""} or not path.is_file():
            continue
        found = re.search(r"/(?:home|Users|root)/\w+", path.read_text(encoding="utf-8", errors="replace"))
        assert found is None or name == "tests/test_house.py", f"{name}: {found}"
