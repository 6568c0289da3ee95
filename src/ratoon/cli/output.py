"""How verbs speak: the answer on stdout, talk and progress on stderr, `--json` for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

import click


def answer(text: str) -> None:
    """What was asked for, on stdout."""
    click.echo(text)


def answer_json(value: Any) -> None:
    """What was asked for, as one JSON object on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


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
