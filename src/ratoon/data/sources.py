"""Files -> documents.

Decides which files are read and how, what a document is in each, and what happens to a row that cannot be read.
Nothing is skipped in silence: what is left out reaches the ledger with file and line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ratoon.base.errors import ConfigError, DataError
from ratoon.data.ledger import Ledger
from ratoon.data.values import (
    ENCODING,
    KNOWN,
    MISSING,
    PLAIN,
    SKIP,
    TABLES,
    Notes,
    Value,
    check_encoding,
    decode,
    is_one_a_line,
    json_file,
    json_lines,
    numbered,
    open_file,
    parquet,
    place,
    reading_errors,
    refuse_or_leave,
    shown,
    suffix_of,
    table,
)
from ratoon.store.artifact import MANIFEST

TEXT_FIELDS = ("text", "content", "document", "body", "review", "sentence")
_SEPARATORS = {"lines": r"\r?\n", "blank-lines": r"\r?\n(?:[ \t]*\r?\n)+"}


@dataclass(frozen=True)
class Document:
    """A text and where it came from. `line` counts from 1 (in parquet and .json it is the row); `bytes` is the length
    of the text as UTF-8."""

    text: str
    source: str
    line: int
    bytes: int

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Reading:
    """How files are read. `split`: what one document is in a plain text file."""

    field: str | None = None
    split: str = "file"
    encoding: str = "utf-8"
    on_bad_row: Literal["refuse", "skip"] = "refuse"


def find_files(paths: Iterable[str | os.PathLike[str]], ledger: Notes, *, any_kind: bool = False) -> list[Path]:
    """The readable files among `paths`, folders walked in sorted order, without what is hidden and what Ratoon wrote.

    Other files in a folder are named in the ledger; with `any_kind` a file that is named itself may have any suffix,
    since the user says what it is. Raises `DataError` for a path that does not exist, is of an
    unknown kind, or when nothing readable is found.
    """
    paths = list(paths)
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            found += _walk(given, ledger)
        elif not given.exists():
            raise DataError("there is no such file or folder", where=given, fix="check the name and the folder")
        elif suffix_of(given) not in KNOWN and not any_kind:
            raise DataError(
                f"files of the kind '{given.suffix}' cannot be read",
                where=given,
                expected=", ".join(sorted(KNOWN)) + ", also with .gz or .zst",
            )
        else:
            found.append(given)
    if not found:
        raise DataError(
            "no readable file was found", where=", ".join(map(str, paths)), expected=", ".join(sorted(KNOWN))
        )
    return found


def _walk(folder: Path, ledger: Notes) -> list[Path]:
    if (folder / MANIFEST).is_file():
        raise DataError(
            "the folder was written by Ratoon: it is no source of text",
            where=folder,
            expected="a folder of files with text",
            fix="give a prepared folder as data.prepared",
        )
    found: list[Path] = []
    others: dict[str, list[Path]] = {}
    for name, folders, files in os.walk(folder, followlinks=False):
        here = Path(name)
        for inner in [inner for inner in folders if (here / inner / MANIFEST).is_file()]:
            ledger.note(f"not read, written by Ratoon: {shown(here / inner)}")
            folders.remove(inner)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for path in (here / file for file in files if not file.startswith(".")):
            if suffix_of(path) in KNOWN and path.is_file():
                found.append(path)
            else:
                others.setdefault(path.suffix.lower(), []).append(path)
    for alike in others.values():
        more = f" and {len(alike) - 1:,} more of its kind" if len(alike) > 1 else ""
        ledger.note(f"not read, kind unknown: {shown(min(alike))}{more}")
    return sorted(found)


def read(files: Iterable[Path], reading: Reading, ledger: Ledger) -> Iterator[Document]:
    """The documents of `files`, in order. Rows left out under `on_bad_row: skip` are booked in `ledger`.

    Raises `DataError` with file and line for what cannot be read, `ConfigError` for an unknown encoding.
    """
    check_encoding(reading.encoding)
    if not reading.split:
        raise ConfigError("the separator of documents is empty", where="split", expected="file, lines, blank-lines, …")
    for path in files:
        booked, given = ledger.read.documents, 0
        with reading_errors(path):
            for document in _read_one(path, reading, ledger):
                given += 1
                yield document
        if not given and ledger.read.documents == booked:
            ledger.note(f"nothing stands in the file: {shown(path)}")


def _read_one(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    suffix = suffix_of(path)
    if suffix in PLAIN:
        yield from _plain(path, reading)
        return
    if suffix == ".parquet":
        rows = parquet(path, lambda names: _columns(names, reading))
    elif suffix in TABLES:
        rows = table(path, reading, ledger.leave_out, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json" and not is_one_a_line(path, reading):
        rows = _list(path, reading)
    else:
        rows = json_lines(path, reading, ledger.leave_out)
    for found in rows:
        yield from _field(found, path, reading, ledger)


def _columns(names: list[str], reading: Reading) -> list[str]:
    """The column of a parquet file that holds the text; all of them where there is none, for the error to name."""
    name = reading.field or next((field for field in TEXT_FIELDS if field in names), None)
    return [name] if name in names else names


def _list(path: Path, reading: Reading) -> Iterator[Value]:
    rows = json_file(path, reading)
    if rows is None:
        return
    if not isinstance(rows, list):
        raise DataError(
            f"the file holds a {type(rows).__name__}",
            where=shown(path),
            expected="a list of objects",
            fix="write one object a line, as .jsonl",
        )
    yield from numbered(rows)


def _document(text: str, path: Path, line: int) -> Document:
    return Document(text, shown(path), line, len(text.encode()))


# -- one reader for each kind of file ----------------------------------------------------------------------------------


def _plain(path: Path, reading: Reading) -> Iterator[Document]:
    with open_file(path) as handle:
        text = decode(handle.read(), path, reading.encoding)
    if reading.split == "file":
        yield _document(text, path, 1)
        return
    separator = re.compile(_SEPARATORS.get(reading.split) or re.escape(reading.split))
    at, line = 0, 1
    for found in [*separator.finditer(text), None]:
        part = text[at : len(text) if found is None else found.start()]
        inner = part.strip("\r\n")
        # What stands before the first separator or after the last may be nothing at all: that is no document.
        border = found is None or (at == 0 and reading.split == "blank-lines")
        if inner or not border or not text:
            yield _document(inner, path, line + part[: len(part) - len(part.lstrip("\r\n"))].count("\n"))
        if found is not None:
            line += text.count("\n", at, found.end())
            at = found.end()


def _field(value: Value, path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    """The text of a row."""
    row, number, size = value
    where = place(path, number)
    keys = list(row) if isinstance(row, dict) else []
    name = reading.field or next((field for field in TEXT_FIELDS if field in keys), None)
    text = row if isinstance(row, str) else row[name] if name in keys else None
    if not isinstance(text, str):
        if name is None:
            found = "the row has no field that is known to hold the text"
        elif name in keys:
            found = f"the row has no text under '{name}' but {json.dumps(text, default=str)[:40]}"
        else:
            found = f"the row has no field '{name}'"
        problem = DataError(
            found,
            where=where,
            expected=f"text under {name or ' or '.join(TEXT_FIELDS)}; the row has: "
            + (", ".join(map(str, keys)) or type(row).__name__),
            fix=f"name the field with --field, {SKIP}",
        )
        refuse_or_leave(reading, ledger.leave_out, MISSING, size, problem)
        return
    if reading.field is None and name is not None and not isinstance(row, str):
        ledger.note(f"text is taken from the field '{name}' of {shown(Path(path.name))}")
    try:
        yield _document(text, path, number)
    except UnicodeEncodeError as error:
        problem = DataError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}",
            where=where,
            expected="text that can be written as UTF-8",
            fix=f"mend the row, {SKIP}",
        )
        refuse_or_leave(reading, ledger.leave_out, ENCODING, size, problem)
