"""Files -> rows: the records of a task as their files hold them, each with its place.

Decides what a row is in jsonl, json, csv, tsv, parquet, plain lines, CoNLL columns and SQuAD's nesting, and which of
these a file is. What the fields mean is the task's; how files are opened is `values.py`'s. A row that cannot be read is
refused, or left out and booked, with file and line.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ratoon.base.errors import ConfigError, DataError
from ratoon.data.values import (
    BROKEN,
    EMPTY,
    ENCODING,
    SKIP,
    Book,
    Value,
    check_encoding,
    decode,
    first_lines,
    is_one_a_line,
    json_file,
    json_lines,
    line_encoding,
    lines,
    lines_of_text,
    numbered,
    parquet,
    place,
    reading_errors,
    refuse_or_leave,
    shown,
    suffix_of,
    table,
)

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "lines", "conll", "squad"]
BY_SUFFIX: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".conll": "conll", ".bio": "conll", ".iob": "conll", ".bmes": "conll", ".bioes": "conll",
}  # fmt: skip
LOOKED_AT_LINES = 64
"""Lines of a file whose suffix does not say enough, read to tell CoNLL columns from other lines."""

_TAG = re.compile(r"[BIESLUMO]-\S+|O")
_NO_QUOTES = f"say kind: lines if quotes are characters there, {SKIP}"


@dataclass(frozen=True)
class Row:
    """A record as its file holds it. `line` counts from 1; in .json and parquet it is the number of the row, in
    SQuAD's files that of the question."""

    fields: dict[str, Any]
    source: str
    line: int

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class RowReading:
    """How files are read.

    `kind` is told by the suffix (and the first lines) where it is not given. `columns` name what stands in a table
    without a head, in lines (separated by `separator`, a tab if not given), in lists, and in CoNLL columns, where
    `word` and `tag` must be among them; `_` means: not wanted. `part` is the key of a .json file that holds the rows.
    """

    kind: Kind | None = None
    columns: tuple[str, ...] = ()
    separator: str | None = None
    part: str | None = None
    encoding: str = "utf-8"
    on_bad_row: Literal["refuse", "skip"] = "refuse"


def read_rows(files: Iterable[Path], reading: RowReading, ledger: Book) -> Iterator[Row]:
    """The rows of `files`, in order. Rows left out under `on_bad_row: skip` and empty ones are booked in `ledger`.

    Raises `DataError` with file and line for what cannot be read, `ConfigError` for settings that do not fit the file.
    """
    check_encoding(reading.encoding)
    _check(reading)
    for path in files:
        left = _Counting(ledger)
        given = 0
        with reading_errors(path):
            kind = kind_of(path, reading)
            if kind != BY_SUFFIX.get(suffix_of(path), "lines"):
                ledger.note(f"{shown(path)} is read as {_IN_WORDS[kind]}")
            for row in _read_one(path, kind, reading, left):
                given += 1
                yield row
        if not given and not left.count:
            ledger.note(f"nothing stands in the file: {shown(path)}")


_IN_WORDS: dict[Kind, str] = {
    "jsonl": "one JSON object a line",
    "json": "one JSON value",
    "csv": "a table with commas",
    "tsv": "a table with tabs",
    "parquet": "parquet",
    "lines": "plain lines",
    "conll": "CoNLL columns",
    "squad": "SQuAD's nested JSON",
}


class _Counting:
    """A ledger that knows how many rows of one file were left out."""

    def __init__(self, ledger: Book) -> None:
        self.note, self._ledger, self.count = ledger.note, ledger, 0

    def leave_out(self, reason: str, bytes: int, where: str) -> None:
        self.count += 1
        self._ledger.leave_out(reason, bytes, where)


def _check(reading: RowReading) -> None:
    if reading.kind is not None and reading.kind not in get_args(Kind):
        raise ConfigError(
            f"there is no kind of file '{reading.kind}'", where="kind", expected=", ".join(get_args(Kind))
        )
    named = [name for name in reading.columns if name != "_"]
    if len(set(named)) < len(named):
        raise ConfigError(f"two columns have the same name: {', '.join(named)}", where="columns", fix="rename one")
    if reading.separator == "":
        raise ConfigError("the separator of columns is empty", where="separator", expected="a tab, '@', …")


def kind_of(path: Path, reading: RowReading) -> Kind:
    """What kind of file `path` is: as the user said, as its suffix says, or as its first lines look.

    Raises `ConfigError` where `separator` or `part` is given for a file that has no use for it.
    """
    kind = reading.kind
    if kind is None:
        kind = BY_SUFFIX.get(suffix_of(path), "lines")
        if kind in ("lines", "tsv") and _looks_like_conll(path, reading):
            kind = "conll"
        elif kind == "json" and is_one_a_line(path, reading):
            kind = "jsonl"
    for name, kinds in (("separator", ("lines",)), ("part", ("json", "squad"))):
        if getattr(reading, name) is not None and kind not in kinds:
            raise ConfigError(
                f"{name} has no effect on {_IN_WORDS[kind]}",
                where=shown(path),
                expected=f"{name} for files of the kind {' or '.join(kinds)}",
                fix=f"leave {name} away, or say which kind the file is",
            )
    return kind


def _looks_like_conll(path: Path, reading: RowReading) -> bool:
    if reading.columns and not {"word", "tag"} <= set(reading.columns):
        return False
    head = first_lines(path, reading, LOOKED_AT_LINES)
    if any(line.startswith("-DOCSTART-") for line in head):
        return True
    cells = [_cells(line) for line in head]
    return (
        len({len(row) for row in cells}) == 1
        and len(cells[0]) > 1
        and all(_TAG.fullmatch(row[-1]) for row in cells)
        and any(row[-1] != "O" for row in cells)
    )


# -- one reader for each kind of file ----------------------------------------------------------------------------------


def _read_one(path: Path, kind: Kind, reading: RowReading, ledger: Book) -> Iterator[Row]:
    if kind == "conll":
        yield from _conll(path, reading, ledger)
        return
    if kind in ("json", "squad"):
        values, kind = _json(path, kind, reading, ledger)
        if kind == "squad":
            yield from _squad(values, path, reading, ledger)
            return
    elif kind == "jsonl":
        values = json_lines(path, reading, ledger.leave_out)
    elif kind == "parquet":
        values = parquet(path)
    elif kind == "lines":
        values = _lines(path, reading, ledger)
    else:
        delimiter = "\t" if kind == "tsv" else ","
        values = table(path, reading, ledger.leave_out, delimiter, reading.columns, _NO_QUOTES)
    for value in values:
        row = _row(value, path, reading, ledger)
        if row is None:
            continue
        if kind == "tsv" and any("\n" in text for text in row.fields.values()):
            ledger.note(f"quotes let rows of {shown(path)} go on over line ends; if that is wrong, say kind: lines")
        yield row


def _row(found: Value, path: Path, reading: RowReading, ledger: Book) -> Row | None:
    """A value as a row, or None when it was left out."""
    value, line, size = found
    columns, where = reading.columns, place(path, line)
    if isinstance(value, str):
        fields = {"text": value}
    elif isinstance(value, list) and len(value) == len(columns):
        fields = {name: cell for name, cell in zip(columns, value, strict=True) if name != "_"}
    elif isinstance(value, dict):
        fields = {name: cell for name, cell in value.items() if name != "_" or not columns}
        if columns and not set(columns) <= value.keys():
            ledger.note(f"columns have no effect: the rows of {shown(path)} name their fields themselves")
    else:
        what = f"a list of {len(value)}" if isinstance(value, list) else json.dumps(value, default=str)[:40]
        problem = DataError(
            f"the row is no object but {what}",
            where=where,
            expected="an object with named fields"
            + (f", or a list of {len(columns)}" if columns else ", or a list and `columns` that name its entries"),
            fix=f"mend the row, {SKIP}",
        )
        refuse_or_leave(reading, ledger.leave_out, BROKEN, size, problem)
        return None
    broken = _surrogate(fields)
    if broken is not None:
        problem = DataError(
            f"the row holds a lone surrogate (U+{ord(broken):04X})",
            where=where,
            expected="text that can be written as UTF-8",
            fix=f"mend the row, {SKIP}",
        )
        refuse_or_leave(reading, ledger.leave_out, ENCODING, size, problem)
        return None
    return Row(fields, shown(path), line)


def _surrogate(value: Any) -> str | None:
    """The first character in `value`, however deep, that no encoding can write."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return value[error.start]
        return None
    inner = itertools.chain(value, value.values()) if isinstance(value, dict) else value
    if isinstance(inner, list | tuple | itertools.chain):
        return next((found for found in map(_surrogate, inner) if found is not None), None)
    return None


def _lines(path: Path, reading: RowReading, ledger: Book) -> Iterator[Value]:
    """Plain lines, or what stands between separators in them. Quotes are characters."""
    separator, columns = reading.separator or "\t", reading.columns
    for text, number, size in lines_of_text(path, reading, ledger.leave_out):
        line = text.rstrip("\r\n")
        if not line.strip():
            ledger.leave_out(EMPTY, size, place(path, number))
            continue
        cells = line.split(separator) if columns else [line]
        if columns and len(cells) != len(columns):
            problem = DataError(
                f"the line has {len(cells)} columns",
                where=place(path, number),
                expected=f"{len(columns)} ({', '.join(columns)}), with {separator!r} between them",
                fix=f"mend the line, {SKIP}",
            )
            refuse_or_leave(reading, ledger.leave_out, BROKEN, size, problem)
            continue
        yield Value(cells if columns else line, number, size)


def _json(path: Path, kind: Kind, reading: RowReading, ledger: Book) -> tuple[Iterator[Value], Kind]:
    """The entries of a .json file, and whether they are SQuAD's articles."""
    content = json_file(path, reading)
    if content is None:
        return iter(()), kind
    rows = _part(content, path, reading, ledger)
    articles = bool(rows) and all(isinstance(row, dict) and isinstance(row.get("paragraphs"), list) for row in rows)
    if kind == "squad" and not articles:
        raise DataError(
            "the file does not have SQuAD's form", where=shown(path), expected='{"data": [{"paragraphs": [ … ]}]}'
        )
    return numbered(rows), "squad" if articles else "json"


def _part(content: Any, path: Path, reading: RowReading, ledger: Book) -> list[Any]:
    """The list of rows in what a .json file holds."""
    if reading.part is not None:
        parts = list(content) if isinstance(content, dict) else []
        if reading.part not in parts:
            raise DataError(
                f"the file has no part '{reading.part}'",
                where=shown(path),
                expected=f"one of: {', '.join(parts[:20])}" if parts else "an object whose keys are its parts",
            )
        content = content[reading.part]
    elif isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        ledger.note(f"the keys of {shown(path)} are taken as the rows' `id`")
        content = [{"id": key, **value} for key, value in content.items()]
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and any(isinstance(value, str | int | float) for value in content.values()):
        return [content]  # a file of one row
    parts = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    raise DataError(
        f"the file holds {'an object of parts' if parts else type(content).__name__}",
        where=shown(path),
        expected="a list of objects" + (f", or one of its parts: {', '.join(parts)}" if parts else ""),
        fix="say which with `part`" if parts else "write one object a line, as .jsonl",
    )


def _squad(articles: Iterable[Value], path: Path, reading: RowReading, ledger: Book) -> Iterator[Row]:
    """One row a question: id, title, context, question, answers [{text, answer_start}] (SQuAD 1.1 and 2.0, CMRC)."""
    number = 0
    for article, _, _ in articles:
        for paragraph in article["paragraphs"]:
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            for question in questions if isinstance(questions, list) else [None]:
                number += 1
                problem = _squad_problem(paragraph, question)
                if problem is not None:
                    error = DataError(
                        f"not in SQuAD's form: {problem}",
                        where=place(path, number),
                        expected="{context, qas: [{id, question, answers: [{text, answer_start}]}]}",
                        fix=f"mend the question, {SKIP}",
                    )
                    size = len(json.dumps(question).encode())
                    refuse_or_leave(reading, ledger.leave_out, BROKEN, size, error)
                    continue
                title = {"title": article["title"]} if article.get("title") else {}
                value = {**title, "context": paragraph["context"], **(question or {})}
                row = _row(Value(value, number, len(json.dumps(question).encode())), path, reading, ledger)
                if row is not None:
                    yield row


def _squad_problem(paragraph: Any, question: Any) -> str | None:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("context"), str):
        return "a paragraph without a context"
    if not isinstance(question, dict):
        return "a paragraph without questions"
    if not isinstance(question.get("question"), str):
        return "no question"
    for answer in question.get("answers", ()):
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            return "an answer without a text"
        if not isinstance(answer.get("answer_start"), int):
            return "an answer without the place where it starts"
    return None


def _cells(line: str) -> list[str]:
    """The columns of a CoNLL line: between tabs where it has one (a word may be a space), else between spaces."""
    line = line.rstrip("\r\n")
    return line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))


def _conll(path: Path, reading: RowReading, ledger: Book) -> Iterator[Row]:
    """One row a sentence: words, tags (as they stand: IOB1 stays IOB1), every other named column, and the numbers of
    the sentence and its document in the file. A sentence with a line that cannot be read is bad as a whole."""
    names = reading.columns
    if names and not {"word", "tag"} <= set(names):
        raise ConfigError(
            f"CoNLL columns named {', '.join(names)}", where="columns", expected="`word` and `tag` among them"
        )
    width, starts, sentences = len(names), 0, 0
    cells: list[list[str]] = []
    first, size = 0, 0
    problem: tuple[str, DataError] | None = None
    for number, raw in itertools.chain(lines(path, reading), [(0, b"")]):
        try:
            text = decode(raw, path, line_encoding(reading), number)
        except DataError as error:
            text, problem = "\ufffd", problem or (ENCODING, error)
        found = _cells(text)
        start = found[0] == "-DOCSTART-"
        if text.strip() and not start:
            first, size, width = first or number, size + len(raw), width or len(found)
            problem = problem or _line_problem(found, width, path, number)
            cells.append(found)
            continue
        if cells:
            sentences += 1
            if problem is not None:
                refuse_or_leave(reading, ledger.leave_out, problem[0], size, problem[1])
            else:
                yield Row(_sentence(cells, names, sentences, starts), shown(path), first)
        cells, first, size, problem = [], 0, 0, None
        starts += start
    if starts:
        ledger.note(f"{starts:,} -DOCSTART- lines of {shown(path)} part documents and are no sentences")


def _line_problem(found: list[str], width: int, path: Path, number: int) -> tuple[str, DataError] | None:
    if len(found) == width and width > 1 and found[0] and found[-1]:
        return None
    what = "has an empty word or tag" if len(found) == width > 1 else f"has {len(found)} columns"
    error = DataError(
        f"the line {what}",
        where=place(path, number),
        expected=f"{max(width, 2)} columns, as the lines before have or `columns` say",
        fix=f"mend the line, {SKIP} (the whole sentence is left out)",
    )
    return BROKEN, error


def _sentence(cells: list[list[str]], names: tuple[str, ...], number: int, document: int) -> dict[str, Any]:
    """The fields of a sentence. Without names the first column is the word, the last the tag."""
    columns = [list(column) for column in zip(*cells, strict=True)]
    named = dict(zip(names, columns, strict=True)) if names else {"word": columns[0], "tag": columns[-1]}
    others = {name: column for name, column in named.items() if name not in ("word", "tag", "_")}
    return {"words": named["word"], "tags": named["tag"], **others, "sentence": number, "document": document}
