"""Files -> documents.

Decides which files are read and how, what a document is in each, and what happens to a row that cannot be read.
Nothing is skipped in silence: what is left out reaches the ledger with file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ratoon.base.errors import ConfigError, DataError
from ratoon.data.ledger import Ledger

TEXT_FIELDS = ("text", "content", "document", "body", "review", "sentence")
PLAIN, ROWS, TABLES = {".txt", ".md"}, {".jsonl", ".json", ".ndjson"}, {".csv", ".tsv"}
KNOWN = PLAIN | ROWS | TABLES | {".parquet"}
PACKED = {".gz", ".zst"}


@dataclass(frozen=True)
class Document:
    """A text and where it came from. `line` counts from 1; `bytes` is the length of the text as UTF-8."""

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


def find_files(paths: Iterable[str | os.PathLike[str]], ledger: Ledger) -> list[Path]:
    """The readable files among `paths`, folders walked in sorted order. Others in a folder are named in the ledger.

    Raises `DataError` for a path that does not exist, is of an unknown kind, or when nothing readable is found.
    """
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            for path in sorted(p for p in given.rglob("*") if p.is_file() and not p.name.startswith(".")):
                if _suffix(path) in KNOWN:
                    found.append(path)
                else:
                    ledger.note(f"not read, kind unknown: {path}")
        elif not given.exists():
            raise DataError("there is no such file or folder", where=given)
        elif _suffix(given) not in KNOWN:
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


def read(files: Iterable[Path], reading: Reading, ledger: Ledger) -> Iterator[Document]:
    """The documents of `files`, in order. Rows left out under `on_bad_row: skip` are booked in `ledger`.

    Raises `DataError` with file and line for what cannot be read.
    """
    for path in files:
        suffix = _suffix(path)
        if suffix in PLAIN:
            yield from _plain(path, reading)
        elif suffix == ".parquet":
            yield from _parquet(path, reading, ledger)
        elif suffix in TABLES:
            yield from _table(path, reading, ledger, "\t" if suffix == ".tsv" else ",")
        else:
            yield from _rows(path, reading, ledger)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _document(text: str, path: Path, line: int) -> Document:
    return Document(text, str(path), line, len(text.encode("utf-8", "surrogatepass")))


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                "reading .zst needs the package zstandard", where=path, fix='pip install "ratoon[data]"'
            ) from None
        stream: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"))  # noqa: SIM115
        return stream
    return open(path, "rb")


def _decode(raw: bytes, path: Path, encoding: str, line: int | None = None) -> str:
    try:
        return raw.decode("utf-8-sig" if encoding == "utf-8" and line in (None, 1) else encoding)
    except UnicodeDecodeError as error:
        at = line if line is not None else raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"not {encoding}: byte 0x{raw[error.start]:02x} at byte {error.start}",
            where=f"{path}:{at}",
            expected=f"text encoded as {encoding}",
            fix="say --encoding NAME (for example gb18030 or latin-1), or save the file as UTF-8",
        ) from None
    except LookupError:
        raise ConfigError(f"there is no encoding '{encoding}'", where="encoding", expected="utf-8, gb18030 …") from None


def _plain(path: Path, reading: Reading) -> Iterator[Document]:
    try:
        with _open(path) as handle:
            raw = handle.read()
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"the file cannot be read: {error}", where=path) from None
    text = _decode(raw, path, reading.encoding)
    if reading.split == "file":
        yield _document(text, path, 1)
        return
    line = 1
    separator = {"lines": "\n", "blank-lines": "\n\n"}.get(reading.split, reading.split)
    for part in text.split(separator):
        inner = part.strip("\r\n")
        yield _document(inner, path, line + len(part) - len(part.lstrip("\n")))
        line += part.count("\n") + separator.count("\n")


def _buffered(handle: Any) -> Iterable[bytes]:
    """`handle` as lines: zstandard's reader has none of its own."""
    return handle if hasattr(handle, "readline") else io.BufferedReader(handle)


def _lines(path: Path, reading: Reading) -> Iterator[tuple[int, str]]:
    try:
        with _open(path) as handle:
            for number, raw in enumerate(_buffered(handle), start=1):
                yield number, _decode(raw, path, reading.encoding, number)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"the packed file is cut or damaged: {error}", where=path, fix="fetch it again") from None


def _bad(reading: Reading, ledger: Ledger, reason: str, where: str, size: int, error: DataError) -> None:
    if reading.on_bad_row == "refuse":
        raise error
    ledger.receive(1, size)
    ledger.book(reason, 1, size, where=where)


def _rows(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    if _suffix(path) == ".json":
        yield from _json(path, reading, ledger)
        return
    for number, line in _lines(path, reading):
        where, size = f"{path}:{number}", len(line.encode("utf-8", "surrogatepass"))
        if not line.strip():
            ledger.receive(1, size)
            ledger.book("empty", 1, size, where=where)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problem = DataError(
                f"not readable as JSON: {error}",
                where=where,
                expected="one JSON object a line",
                fix="mend the line, or say --on-bad-row skip to leave such rows out, counted",
            )
            _bad(reading, ledger, "broken row", where, size, problem)
            continue
        yield from _field(row, path, number, size, reading, ledger)


def _json(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    with _open(path) as handle:
        text = _decode(handle.read(), path, reading.encoding)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"not readable as JSON: {error}", where=path) from None
    if not isinstance(rows, list):
        raise DataError(f"the file holds a {type(rows).__name__}", where=path, expected="a list of objects")
    for number, row in enumerate(rows, start=1):
        yield from _field(row, path, number, len(json.dumps(row, ensure_ascii=False).encode()), reading, ledger)


def _field(row: Any, path: Path, number: int, size: int, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    where = f"{path}:{number}"
    if isinstance(row, str):
        yield _document(row, path, number)
        return
    keys = list(row) if isinstance(row, dict) else []
    name = reading.field or next((field for field in TEXT_FIELDS if field in keys), None)
    if name is None or name not in keys or not isinstance(row[name], str):
        problem = DataError(
            f"the row has no text under '{name}'" if name else "the row has no field that is known to hold the text",
            where=where,
            expected=f"one of: {', '.join(TEXT_FIELDS)}; the row has: {', '.join(keys) or type(row).__name__}",
            fix="name the field with --field, or say --on-bad-row skip to leave such rows out, counted",
        )
        _bad(reading, ledger, "missing field", where, size, problem)
        return
    if reading.field is None:
        ledger.note(f"text is taken from the field '{name}' of {path.name}")
    yield _document(row[name], path, number)


def _table(path: Path, reading: Reading, ledger: Ledger, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(1 << 30)
    with _open(path) as handle:
        text = _decode(handle.read(), path, reading.encoding)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                where = f"{path}:{rows.line_num}"
                problem = DataError(
                    f"the row has not the {len(rows.fieldnames or [])} columns of the head",
                    where=where,
                    fix="mend the row, or say --on-bad-row skip to leave such rows out, counted",
                )
                cells = [cell for value in row.values() for cell in (value if isinstance(value, list) else [value])]
                _bad(reading, ledger, "broken row", where, sum(len(c.encode()) for c in cells if c), problem)
                continue
            size = sum(len(value.encode("utf-8", "surrogatepass")) for value in row.values())
            yield from _field(row, path, rows.line_num, size, reading, ledger)
    except csv.Error as error:
        raise DataError(f"not readable as a table: {error}", where=f"{path}:{rows.line_num}") from None


def _parquet(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            "reading parquet needs the package pyarrow", where=path, fix='pip install "ratoon[data]"'
        ) from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        name = reading.field or next((field for field in TEXT_FIELDS if field in names), names[0])
        number = 0
        for batch in file.iter_batches(columns=[name] if name in names else names[:1]):
            for row in batch.to_pylist():
                number += 1
                size = len(json.dumps(row, ensure_ascii=False, default=str).encode())
                yield from _field(row, path, number, size, reading, ledger)
    except (OSError, ValueError) as error:
        raise DataError(f"not readable as parquet: {error}", where=path) from None
