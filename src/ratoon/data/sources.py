"""Files -> documents.

Decides which files are read and how, what a document is in each, and what happens to a row that cannot be read.
Nothing is skipped in silence: what is left out reaches the ledger with file and line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ratoon.base.errors import ConfigError, DataError
from ratoon.data.ledger import Ledger
from ratoon.store.artifact import MANIFEST

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TEXT_FIELDS = ("text", "content", "document", "body", "review", "sentence")
PLAIN, ROWS, TABLES = {".txt", ".md"}, {".jsonl", ".json", ".ndjson"}, {".csv", ".tsv"}
KNOWN = PLAIN | ROWS | TABLES | {".parquet"}
PACKED = {".gz", ".zst"}
EMPTY, BROKEN, MISSING, ENCODING = "empty", "broken row", "missing field", "wrong encoding"
"""Reasons under which rows are booked here."""

_SKIP = "or say --on-bad-row skip to leave such rows out, counted"
_SEPARATORS = {"lines": r"\r?\n", "blank-lines": r"\r?\n(?:[ \t]*\r?\n)+"}
_WIDE = ("utf-16", "utf-32")  # a line end is not the byte 10 alone


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


def find_files(paths: Iterable[str | os.PathLike[str]], ledger: Ledger) -> list[Path]:
    """The readable files among `paths`, folders walked in sorted order, without what is hidden and what Ratoon wrote.

    Other files in a folder are named in the ledger. Raises `DataError` for a path that does not exist, is of an
    unknown kind, or when nothing readable is found.
    """
    paths = list(paths)
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            found += _walk(given, ledger)
        elif not given.exists():
            raise DataError("there is no such file or folder", where=given, fix="check the name and the folder")
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


def _walk(folder: Path, ledger: Ledger) -> list[Path]:
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
            ledger.note(f"not read, written by Ratoon: {_shown(here / inner)}")
            folders.remove(inner)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for path in (here / file for file in files if not file.startswith(".")):
            if _suffix(path) in KNOWN and path.is_file():
                found.append(path)
            else:
                others.setdefault(path.suffix.lower(), []).append(path)
    for alike in others.values():
        more = f" and {len(alike) - 1:,} more of its kind" if len(alike) > 1 else ""
        ledger.note(f"not read, kind unknown: {_shown(min(alike))}{more}")
    return sorted(found)


def read(files: Iterable[Path], reading: Reading, ledger: Ledger) -> Iterator[Document]:
    """The documents of `files`, in order. Rows left out under `on_bad_row: skip` are booked in `ledger`.

    Raises `DataError` with file and line for what cannot be read, `ConfigError` for an unknown encoding.
    """
    try:
        codecs.lookup(reading.encoding)
    except LookupError:
        raise ConfigError(
            f"there is no encoding '{reading.encoding}'", where="encoding", expected="utf-8, gb18030, latin-1 …"
        ) from None
    if not reading.split:
        raise ConfigError("the separator of documents is empty", where="split", expected="file, lines, blank-lines, …")
    for path in files:
        booked, given = ledger.read.documents, 0
        try:
            for document in _read_one(path, reading, ledger):
                given += 1
                yield document
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"the packed file is cut or damaged: {error}", where=_shown(path), fix="fetch it again"
            ) from None
        except OSError as error:
            raise DataError(f"the file cannot be read: {error.strerror or error}", where=_shown(path)) from None
        if not given and ledger.read.documents == booked:
            ledger.note(f"nothing stands in the file: {_shown(path)}")


def _read_one(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    suffix = _suffix(path)
    if suffix in PLAIN:
        return _plain(path, reading)
    if suffix == ".parquet":
        return _parquet(path, reading, ledger)
    if suffix in TABLES:
        return _table(path, reading, ledger, "\t" if suffix == ".tsv" else ",")
    return _json(path, reading, ledger) if suffix == ".json" else _rows(path, reading, ledger)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _shown(path: Path) -> str:
    """A path as text that can be written down: bytes that are no UTF-8 are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _place(path: Path, line: int) -> str:
    return f"{_shown(path)}:{line}"


def _document(text: str, path: Path, line: int) -> Document:
    return Document(text, _shown(path), line, len(text.encode()))


# -- bytes and characters ----------------------------------------------------------------------------------------------


class _Frames(io.RawIOBase):
    """The contents of a .zst file, all its frames, and an error where the last one is cut: zstandard's own reader
    takes a cut file for a short one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                "reading .zst needs the package zstandard", where=_shown(path), fix='pip install "ratoon[data]"'
            ) from None
        self._maker, self._damaged = zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._file = open(path, "rb")  # noqa: SIM115 - closed in `close`
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._file.read(1 << 18)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("its last frame has no end")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._maker.decompressobj()
            try:
                self._ready = self._frame.decompress(packed)
            except self._damaged as error:
                raise EOFError(str(error)) from None
        count = min(len(view), len(self._ready))
        view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_Frames(path), 1 << 18)
    return open(path, "rb")


def _decode(raw: bytes, path: Path, encoding: str, line: int | None = None) -> str:
    """`raw` as text: a whole file, or its line `line`. A mark of UTF-8 at the begin of a file is no text."""
    try:
        first = line in (None, 1) and codecs.lookup(encoding).name == "utf-8"
        return raw.decode("utf-8-sig" if first else encoding)
    except UnicodeDecodeError as error:
        at = line if line is not None else raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"not {encoding}: byte 0x{raw[error.start]:02x} at byte {error.start}"
            + ("" if line is None else " of the line"),
            where=_place(path, at),
            expected=f"text encoded as {encoding}",
            fix=f"say --encoding NAME (for example {_likely(raw)}), or save the file as UTF-8",
        ) from None


def _likely(raw: bytes) -> str:
    """An encoding in which `raw` can be read."""
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return "latin-1"
    return "gb18030"


def _lines(path: Path, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, as UTF-8 where the encoding is one of wide characters."""
    with _open(path) as handle:
        if codecs.lookup(reading.encoding).name.startswith(_WIDE):
            text = _decode(handle.read(), path, reading.encoding)
            yield from enumerate(io.BytesIO(text.encode("utf-8", "surrogatepass")), start=1)
        else:
            yield from enumerate(handle, start=1)


def _line_encoding(reading: Reading) -> str:
    """The encoding of what `_lines` gives."""
    return "utf-8" if codecs.lookup(reading.encoding).name.startswith(_WIDE) else reading.encoding


# -- one reader for each kind of file ----------------------------------------------------------------------------------


def _plain(path: Path, reading: Reading) -> Iterator[Document]:
    with _open(path) as handle:
        text = _decode(handle.read(), path, reading.encoding)
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


def _bad(reading: Reading, ledger: Ledger, reason: str, size: int, error: DataError) -> None:
    """A row that cannot be used: refused, or left out and booked, as the user decided."""
    if reading.on_bad_row == "refuse":
        raise error
    ledger.receive(1, size)
    ledger.book(reason, 1, size, where=error.where)


def _blank(ledger: Ledger, size: int, where: str) -> None:
    ledger.receive(1, size)
    ledger.book(EMPTY, 1, size, where=where)


def _rows(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    encoding = _line_encoding(reading)
    for number, raw in _lines(path, reading):
        try:
            line = _decode(raw, path, encoding, number)
        except DataError as error:
            _bad(reading, ledger, ENCODING, len(raw), error)
            continue
        if not line.strip():
            _blank(ledger, len(raw), _place(path, number))
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = DataError(
                f"not readable as JSON: {error}",
                where=_place(path, number),
                expected="one JSON object a line",
                fix=f"mend the line, {_SKIP}",
            )
            _bad(reading, ledger, BROKEN, len(raw), problem)
            continue
        yield from _field(row, path, number, len(raw), reading, ledger)


def _json(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    with _open(path) as handle:
        text = _decode(handle.read(), path, reading.encoding)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = _place(path, error.lineno) if isinstance(error, json.JSONDecodeError) else _shown(path)
        raise DataError(
            f"not readable as JSON: {error}", where=where, expected="a list of objects", fix="mend the file"
        ) from None
    if not isinstance(rows, list):
        raise DataError(
            f"the file holds a {type(rows).__name__}",
            where=_shown(path),
            expected="a list of objects",
            fix="write one object a line, as .jsonl",
        )
    for number, row in enumerate(rows, start=1):
        yield from _field(row, path, number, len(json.dumps(row).encode()), reading, ledger)


def _field(row: Any, path: Path, number: int, size: int, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    """The text of a row. `size` is what the row has in bytes, for the ledger if it is left out."""
    where = _place(path, number)
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
            fix=f"name the field with --field, {_SKIP}",
        )
        _bad(reading, ledger, MISSING, size, problem)
        return
    if reading.field is None and name is not None and not isinstance(row, str):
        ledger.note(f"text is taken from the field '{name}' of {_shown(Path(path.name))}")
    try:
        yield _document(text, path, number)
    except UnicodeEncodeError as error:
        problem = DataError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}",
            where=where,
            expected="text that can be written as UTF-8",
            fix=f"mend the row, {_SKIP}",
        )
        _bad(reading, ledger, ENCODING, size, problem)


class _Counted:
    """The decoded lines of a table, counting the bytes since `taken` was last set to 0."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self._lines = _lines(path, reading)
        self._path, self._encoding = path, _line_encoding(reading)
        self.taken = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        number, raw = next(self._lines)
        self.taken += len(raw)
        return _decode(raw, self._path, self._encoding, number)


def _table(path: Path, reading: Reading, ledger: Ledger, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(1 << 30)
    lines = _Counted(path, reading)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    head: list[str] | None = None
    while True:
        lines.taken, line = 0, rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            problem = DataError(
                f"not readable as a table: {error}", where=_place(path, line), fix=f"mend the row, {_SKIP}"
            )
            _bad(reading, ledger, BROKEN, lines.taken, problem)
            continue
        if row is None:
            return
        if not row:
            _blank(ledger, lines.taken, _place(path, line))
        elif head is None:
            head = row
            if len(set(head)) < len(head):
                raise DataError(
                    f"two columns have the same name: {', '.join(head)}", where=_place(path, line), fix="rename one"
                )
        elif len(row) != len(head):
            problem = DataError(
                f"the row has {len(row)} columns",
                where=_place(path, line),
                expected=f"{len(head)}, as the head has",
                fix=f"mend the row, {_SKIP}",
            )
            _bad(reading, ledger, BROKEN, lines.taken, problem)
        else:
            yield from _field(dict(zip(head, row, strict=True)), path, line, lines.taken, reading, ledger)


def _parquet(path: Path, reading: Reading, ledger: Ledger) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            "reading parquet needs the package pyarrow", where=_shown(path), fix='pip install "ratoon[data]"'
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            name = reading.field or next((field for field in TEXT_FIELDS if field in names), None)
            number = 0
            for batch in file.iter_batches(columns=[name] if name in names else names):
                for row in batch.to_pylist():
                    number += 1
                    size = len(json.dumps(row, default=str).encode())
                    yield from _field(row, path, number, size, reading, ledger)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"not readable as parquet: {error}", where=_shown(path), fix="fetch the file again") from None
