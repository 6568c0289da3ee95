"""How verbs speak: the answer on stdout, talk and progress on stderr, `--json` for programs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click


def answer(text: str) -> None:
    """What was asked for, on stdout."""
    click.echo(text)


def answer_json(value: Any) -> None:
    """What was asked for, as one JSON object on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def terminal_columns() -> int | None:
    """How many columns stdout's terminal has (or COLUMNS says); None where it is none."""
    return shutil.get_terminal_size((0, 0)).columns or None


def talk(sentence: str) -> None:
    """A sentence for people, on stderr."""
    click.echo(sentence, err=True)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table for people, on stderr."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        view.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        view.add_row(*row)
    Console(file=sys.stderr).print(view)


def aligned(rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Rows of cells as lines of columns: the first `left` columns and the last are left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell if at == last else cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size_words(size: int) -> str:
    """Bytes for people: 98.4 MB."""
    for unit, bytes_of_unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= bytes_of_unit:
            return f"{size / bytes_of_unit:,.1f} {unit}"
    return f"{size} bytes"


def expect_new(folder: Path, *, replace: bool) -> None:
    """Refuse, before any work is done, a folder that stands already.

    With `replace` an empty folder is taken, and one with a manifest; never one that something else made. Raises
    `ConfigError`.
    """
    from ratoon.base.errors import ConfigError
    from ratoon.store.artifact import MANIFEST

    if not folder.exists():
        return
    if not replace:
        raise ConfigError(
            "the folder exists already" if folder.is_dir() else "there is a file of that name already",
            where=folder,
            expected="a new name",
            fix="choose another name, or add --replace to put the new one in its place",
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file()):
        raise ConfigError(
            "--replace would remove what Ratoon did not make",
            where=folder,
            expected=f"an empty folder, or one with {MANIFEST}",
            fix="choose another name, or remove it yourself",
        )
