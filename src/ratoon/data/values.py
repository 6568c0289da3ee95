"""Files -> values: what one row of a jsonl, json, csv, tsv or parquet file holds, with its line and its size.

Decides how files are opened (.gz, .zst, encodings), how their rows are cut apart, and how a row that cannot be read is
told from one that can. What a row is for, is its callers' business: `sources.py` takes texts from rows, `rows.py` the
fields of a task. Nothing is skipped in silence: what is left out goes to `left_out` with its place.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ratoon.base.errors import ConfigError, DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PLAIN, ROWS, TABLES = {".txt", ".md"}, {".jsonl", ".json", ".ndjson"}, {".csv", ".tsv"}
KNOWN = PLAIN | ROWS | TABLES | {".parquet"}
PACKED = {".gz", ".zst"}
EMPTY, BROKEN, MISSING, ENCODING = "empty", "broken row", "missing field", "wrong encoding"
"""Reasons under which rows are booked."""
SKIP = "or say --on-bad-row skip to leave such rows out, counted"

_WIDE = ("utf-16", "utf-32")  # a line end is not the byte 10 alone


class Opening(Protocol):
    """What every way of reading says: the encoding, and what becomes of rows that cannot be read."""

    @property
    def encoding(self) -> str: ...
    @property
    def on_bad_row(self) -> Literal["refuse", "skip"]: ...


class Notes(Protocol):
    """A ledger, as far as it takes sentences for people."""

    def note(self, sentence: str) -> None: ...


class Book(Notes, Protocol):
    """A ledger, as far as readers of rows need one."""

    def leave_out(self, reason: str, bytes: int, where: str) -> None: ...


class Value(NamedTuple):
    """What a row holds, its line (from 1; in .json and parquet the row) and its size in bytes in the file."""

    value: Any
    line: int
    bytes: int


LeftOut = Callable[[str, int, str], None]
"""Called with reason, bytes and place of a row that is left out."""


def suffix_of(path: Path) -> str:
    """The suffix that tells the kind of a file, `.gz` and `.zst` taken off."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def shown(path: Path) -> str:
    """A path as text that can be written down: bytes that are no UTF-8 are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def place(path: Path, line: int) -> str:
    """File and line."""
    return f"{shown(path)}:{line}"


def check_encoding(encoding: str) -> None:
    """Raise `ConfigError` for an encoding that does not exist."""
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ConfigError(
            f"there is no encoding '{encoding}'", where="encoding", expected="utf-8, gb18030, latin-1 …"
        ) from None


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn the error of a packed file that is cut, or of a disk that refuses, into a `DataError` naming `path`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"the packed file is cut or damaged: {error}", where=shown(path), fix="fetch it again"
        ) from None
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=shown(path)) from None


def refuse_or_leave(opening: Opening, left_out: LeftOut, reason: str, size: int, error: DataError) -> None:
    """A row that cannot be used: refused, or left out and counted, as the user decided."""
    if opening.on_bad_row == "refuse":
        raise error
    left_out(reason, size, error.where or "")


# -- bytes and characters ----------------------------------------------------------------------------------------------


class _Frames(io.RawIOBase):
    """The contents of a .zst file, all its frames, and an error where the last one is cut: zstandard's own reader
    takes a cut file for a short one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                "reading .zst needs the package zstandard", where=shown(path), fix='pip install "ratoon[data]"'
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


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_Frames(path), 1 << 18)
    return open(path, "rb")


def decode(raw: bytes, path: Path, encoding: str, line: int | None = None) -> str:
    """`raw` as text: a whole file, or its line `line`. A mark of UTF-8 at the begin of a file is no text."""
    try:
        first = line in (None, 1) and codecs.lookup(encoding).name == "utf-8"
        return raw.decode("utf-8-sig" if first else encoding)
    except UnicodeDecodeError as error:
        at = line if line is not None else raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"not {encoding}: byte 0x{raw[error.start]:02x} at byte {error.start}"
            + ("" if line is None else " of the line"),
            where=place(path, at),
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


def lines(path: Path, opening: Opening) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, as UTF-8 where the encoding is one of wide characters."""
    with open_file(path) as handle:
        if codecs.lookup(opening.encoding).name.startswith(_WIDE):
            text = decode(handle.read(), path, opening.encoding)
            yield from enumerate(io.BytesIO(text.encode("utf-8", "surrogatepass")), start=1)
        else:
            yield from enumerate(handle, start=1)


def line_encoding(opening: Opening) -> str:
    """The encoding of what `lines` gives."""
    return "utf-8" if codecs.lookup(opening.encoding).name.startswith(_WIDE) else opening.encoding


# -- rows of each kind of file -----------------------------------------------------------------------------------------


def lines_of_text(path: Path, opening: Opening, left_out: LeftOut) -> Iterator[Value]:
    """The lines of a file as text, with their ends. Lines in another encoding are refused or left out."""
    encoding = line_encoding(opening)
    for number, raw in lines(path, opening):
        try:
            text = decode(raw, path, encoding, number)
        except DataError as error:
            refuse_or_leave(opening, left_out, ENCODING, len(raw), error)
            continue
        yield Value(text, number, len(raw))


def json_lines(path: Path, opening: Opening, left_out: LeftOut) -> Iterator[Value]:
    """What stands in a file of one JSON value a line."""
    for line, number, size in lines_of_text(path, opening, left_out):
        if not line.strip():
            left_out(EMPTY, size, place(path, number))
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = DataError(
                f"not readable as JSON: {error}",
                where=place(path, number),
                expected="one JSON object a line",
                fix=f"mend the line, {SKIP}",
            )
            refuse_or_leave(opening, left_out, BROKEN, size, problem)
            continue
        yield Value(row, number, size)


def json_file(path: Path, opening: Opening) -> Any:
    """What a .json file holds; None where nothing stands in it. Raises `DataError` with the line that is no JSON."""
    with open_file(path) as handle:
        text = decode(handle.read(), path, opening.encoding)
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = place(path, error.lineno) if isinstance(error, json.JSONDecodeError) else shown(path)
        raise DataError(
            f"not readable as JSON: {error}", where=where, expected="a list of objects", fix="mend the file"
        ) from None


def first_lines(path: Path, reading: Opening, count: int) -> list[str]:
    """The first lines of a file that are not blank; what is no text in them is of no matter here."""
    with open_file(path) as handle:
        if line_encoding(reading) == reading.encoding:
            raw = [line.decode(reading.encoding, "replace") for line in itertools.islice(handle, count)]
        else:
            raw = handle.read().decode(reading.encoding, "replace").splitlines()[:count]
    return [line.lstrip("\ufeff").rstrip("\r\n") for line in raw if line.strip()]


def is_one_a_line(path: Path, reading: Opening) -> bool:
    """Whether a .json file holds one object a line, as CLUE's do."""
    head = first_lines(path, reading, 2)
    try:
        return len(head) == 2 and isinstance(json.loads(head[0]), dict)
    except (ValueError, RecursionError):
        return False


def numbered(rows: list[Any]) -> Iterator[Value]:
    """The entries of a list out of a .json file, with their numbers as lines."""
    for number, row in enumerate(rows, start=1):
        yield Value(row, number, len(json.dumps(row).encode()))


class _Counted:
    """The decoded lines of a table, counting the bytes since `taken` was last set to 0."""

    def __init__(self, path: Path, opening: Opening) -> None:
        self._lines = lines(path, opening)
        self._path, self._encoding = path, line_encoding(opening)
        self.taken = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        number, raw = next(self._lines)
        self.taken += len(raw)
        return decode(raw, self._path, self._encoding, number)


def table(
    path: Path, opening: Opening, left_out: LeftOut, delimiter: str, columns: tuple[str, ...] = (), hint: str = SKIP
) -> Iterator[Value]:
    """The rows of a table as `{column: text}`. The first row is the head, unless `columns` are given; `hint` is what
    the user may do with a row that is no table, besides mending it."""
    csv.field_size_limit(1 << 30)
    rows_of_file = _Counted(path, opening)
    rows = csv.reader(rows_of_file, delimiter=delimiter, strict=True)
    head: list[str] | None = list(columns) or None
    while True:
        rows_of_file.taken, line = 0, rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            problem = DataError(
                f"not readable as a table: {error}", where=place(path, line), fix=f"mend the row, {hint}"
            )
            refuse_or_leave(opening, left_out, BROKEN, rows_of_file.taken, problem)
            continue
        if row is None:
            return
        if not row:
            left_out(EMPTY, rows_of_file.taken, place(path, line))
        elif head is None:
            head = row
            if len(set(head)) < len(head):
                raise DataError(
                    f"two columns have the same name: {', '.join(head)}", where=place(path, line), fix="rename one"
                )
        elif len(row) != len(head):
            problem = DataError(
                f"the row has {len(row)} columns",
                where=place(path, line),
                expected=f"{len(head)}, as " + ("were named" if columns else "the head has"),
                fix=f"mend the row, {SKIP}",
            )
            refuse_or_leave(opening, left_out, BROKEN, rows_of_file.taken, problem)
        else:
            yield Value(dict(zip(head, row, strict=True)), line, rows_of_file.taken)


def parquet(path: Path, wanted: Callable[[list[str]], list[str]] = list) -> Iterator[Value]:
    """The rows of a parquet file as `{column: value}`; `wanted` chooses among its columns."""
    try:
        import pyarrow
        import pyarrow.parquet as arrow
    except ImportError:
        raise ConfigError(
            "reading parquet needs the package pyarrow", where=shown(path), fix='pip install "ratoon[data]"'
        ) from None
    try:
        with arrow.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(columns=wanted(file.schema_arrow.names)):
                for row in batch.to_pylist():
                    number += 1
                    yield Value(row, number, len(json.dumps(row, default=str).encode()))
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"not readable as parquet: {error}", where=shown(path), fix="fetch the file again") from None
