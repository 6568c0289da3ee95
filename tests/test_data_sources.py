"""Files -> documents: every kind of file, and one clear error or a counted skip for every bad one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratoon.base.errors import ConfigError, DataError
from ratoon.data.ledger import Ledger
from ratoon.data.loader import Loader
from ratoon.data.prepare import prepare
from ratoon.data.sources import Document, Reading, find_files, read
from ratoon.text.tokenizer import Tokenizer

TEXTS = [
    "One line.\n",
    "Zwei Zeilen,\nmit Umbruch",
    "第三篇：中文。",
    'quo"tes, commas\tand tabs',
    "  spaces  ",
    "🙂\u200d",
]


def documents(*paths: Path, ledger: Ledger | None = None, **reading: Any) -> list[Document]:
    ledger = Ledger() if ledger is None else ledger
    return list(read(find_files(paths, ledger), Reading(**reading), ledger))


def texts(*paths: Path, **reading: Any) -> list[str]:
    return [document.text for document in documents(*paths, **reading)]


def refused(*paths: Path, **reading: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        documents(*paths, **reading)
    assert caught.value.where is not None
    return caught.value


def skipped(*paths: Path, **reading: Any) -> tuple[list[str], Ledger]:
    """What is left when bad rows are skipped, and the ledger that counted them."""
    ledger = Ledger()
    found = [document.text for document in documents(*paths, ledger=ledger, on_bad_row="skip", **reading)]
    ledger.check()
    return found, ledger


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: Sequence[Sequence[str]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode()


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def parquet(path: Path, columns: dict[str, list[Any]], rows_a_group: int = 2) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group)
    return path


# -- what can be read --------------------------------------------------------------------------------------------------

ROW_FILES: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: put(folder / "a.jsonl", jsonl([{"id": 1, "text": text} for text in TEXTS])),
    "jsonl.gz": lambda folder: put(folder / "a.jsonl.gz", gzip.compress(jsonl([{"text": text} for text in TEXTS]))),
    "jsonl.zst": lambda folder: put(folder / "a.jsonl.zst", zstd(jsonl([{"text": text} for text in TEXTS]))),
    "ndjson of strings": lambda folder: put(folder / "a.ndjson", jsonl(TEXTS)),
    "json": lambda folder: put(folder / "a.json", json.dumps([{"text": text} for text in TEXTS])),
    "json of lines": lambda folder: put(folder / "a.json", jsonl([{"id": 1, "text": text} for text in TEXTS])),
    "csv": lambda folder: put(folder / "a.csv", table([["id", "text"], *(["1", text] for text in TEXTS)])),
    "csv.gz": lambda folder: put(folder / "a.csv.gz", gzip.compress(table([["text"], *([text] for text in TEXTS)]))),
    "tsv": lambda folder: put(folder / "a.tsv", table([["text", "x"], *([text, ""] for text in TEXTS)], "\t")),
    "parquet": lambda folder: parquet(folder / "a.parquet", {"n": list(range(len(TEXTS))), "text": TEXTS}),
}


@pytest.mark.parametrize("kind", ROW_FILES)
def test_rows_of_every_kind(kind: str, tmp_path: Path) -> None:
    path = ROW_FILES[kind](tmp_path)
    ledger = Ledger()
    found = documents(path, ledger=ledger)
    assert [document.text for document in found] == TEXTS
    assert [document.bytes for document in found] == [len(text.encode()) for text in TEXTS]
    assert found[0].source == str(path)
    if kind != "ndjson of strings":
        assert ledger.notes == [f"text is taken from the field 'text' of {path.name}"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.zst", "A.TXT"])
def test_a_plain_file_is_one_document(name: str, tmp_path: Path) -> None:
    text = "Erste Zeile\r\n\r\n  第二行\n"
    packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, lambda data: data)(text.encode())
    assert documents(put(tmp_path / name, packed)) == [Document(text, str(tmp_path / name), 1, len(text.encode()))]


def test_plain_files_split_into_documents(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "\none\ntwo\n\n\n  \nthree\nfour\n")
    assert [(d.text, d.line) for d in documents(path, split="lines")] == [
        ("", 1),
        ("one", 2),
        ("two", 3),
        ("", 4),
        ("", 5),
        ("  ", 6),
        ("three", 7),
        ("four", 8),
    ]
    assert [(d.text, d.line) for d in documents(path, split="blank-lines")] == [("one\ntwo", 2), ("three\nfour", 7)]
    windows = put(tmp_path / "b.txt", "one\r\ntwo\r\n\r\nthree\r\n")
    assert [(d.text, d.line) for d in documents(windows, split="blank-lines")] == [("one\r\ntwo", 1), ("three", 4)]
    assert texts(windows, split="lines") == ["one", "two", "", "three"]
    own = put(tmp_path / "c.txt", "one\n<|end|>\ntwo [x]\n<|end|>\n")
    assert [(d.text, d.line) for d in documents(own, split="<|end|>")] == [("one", 1), ("two [x]", 3)]
    with pytest.raises(ConfigError, match="separator of documents is empty"):
        documents(own, split="")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20), max_size=8))
def test_lines_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = put(tmp_path_factory.mktemp("lines") / "a.txt", "".join(line + "\n" for line in lines))
    found = documents(path, split="lines")
    if lines:
        first = lines[0].removeprefix("\ufeff")  # at the begin of a file it is a mark, not text
        assert [(d.text, d.line) for d in found] == list(
            zip([first, *lines[1:]], range(1, len(lines) + 1), strict=True)
        )


def test_frames_of_zst_one_after_the_other(tmp_path: Path) -> None:
    big = [{"text": f"{number} " * 2000} for number in range(200)]
    path = put(tmp_path / "a.jsonl.zst", zstd(jsonl(big[:50])) + zstd(b"") + zstd(jsonl(big[50:])))
    assert texts(path) == [row["text"] for row in big]
    gz = put(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(big[:50])) + gzip.compress(jsonl(big[50:])))
    assert texts(gz) == [row["text"] for row in big]


def test_rows_over_several_lines_are_placed_where_they_begin(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", 'text,n\n"one\ntwo",1\nthree,2\n')
    assert [(d.text, d.place) for d in documents(path)] == [("one\ntwo", f"{path}:2"), ("three", f"{path}:4")]


def test_a_folder_of_mixed_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    put(folder / "b" / "one.txt", "one")
    put(folder / "a.jsonl", jsonl([{"text": "two"}]))
    put(folder / "c.md", "three")
    put(folder / "d.csv", "text\nfour\n")
    put(folder / "picture.png", b"\x89PNG")
    put(folder / "second.png", b"\x89PNG")
    put(folder / "notes.docx", b"PK")
    put(folder / ".hidden.txt", "no")
    put(folder / ".git" / "x.txt", "no")
    prepare([put(tmp_path / "x.txt", "some text of its own")], folder / "prepared", tokenizer=Tokenizer.bytes_only())
    ledger = Ledger()
    assert [d.text for d in documents(folder, ledger=ledger)] == ["two", "one", "three", "four"]
    notes = "\n".join(ledger.notes)
    assert f"not read, kind unknown: {folder / 'notes.docx'}" in notes
    assert f"not read, kind unknown: {folder / 'picture.png'} and 1 more of its kind" in notes
    assert f"not read, written by Ratoon: {folder / 'prepared'}" in notes and ".git" not in notes
    with pytest.raises(DataError, match="was written by Ratoon"):
        find_files([folder / "prepared"], Ledger())


def test_the_order_of_a_folder_is_that_of_names(tmp_path: Path) -> None:
    for name in ("z.txt", "a.txt", "m/b.txt", "m/a.txt", "B.txt"):
        put(tmp_path / name, name)
    assert texts(tmp_path) == ["B.txt", "a.txt", "m/a.txt", "m/b.txt", "z.txt"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_field_named_by_the_user(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        path = parquet(tmp_path / "a.parquet", {"text": ["no"], "answer": ["yes"]})
    else:
        data = jsonl([{"text": "no", "answer": "yes"}]) if kind == "jsonl" else b"text,answer\nno,yes\n"
        path = put(tmp_path / f"a.{kind}", data)
    assert texts(path, field="answer") == ["yes"]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-8-sig", "big5", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_other_encodings(encoding: str, name: str, tmp_path: Path) -> None:
    text = "第一行\n第二行"
    data = {"a.txt": text, "a.jsonl": jsonl([{"text": text}]).decode(), "a.csv": f'text\n"{text}"\n'}[name]
    assert texts(put(tmp_path / name, data.encode(encoding)), encoding=encoding) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_the_mark_of_utf8_is_no_text(name: str, tmp_path: Path) -> None:
    data = {"a.txt": b"x", "a.jsonl": b'{"text": "x"}', "a.csv": b"text\nx\n"}[name]
    assert texts(put(tmp_path / name, b"\xef\xbb\xbf" + data), encoding="UTF8") == ["x"]


# -- what cannot -------------------------------------------------------------------------------------------------------


def test_files_that_are_not_there(tmp_path: Path) -> None:
    error = refused(tmp_path / "absent.txt")
    assert error.found == "there is no such file or folder" and error.where == str(tmp_path / "absent.txt")
    assert "'.docx' cannot be read" in refused(put(tmp_path / "x.docx", "")).found
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").found == "no readable file was found"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt.gz", "a.jsonl.zst"])
def test_an_empty_file_is_counted_or_noted_and_alone_refused(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / "in" / name, gzip.compress(b"") if name.endswith(".gz") else b"")
    other = put(tmp_path / "in" / "z.txt", "a text that is there, with some words in it")
    done = prepare([path, other], tmp_path / "out", tokenizer=Tokenizer.bytes_only())
    if ".txt" in name or ".md" in name:
        account = done.ledger["accounts"]["empty"]
        assert account["documents"] == 1 and account["bytes"] == 0 and account["places"] == [f"{path}:1"]
    else:
        assert f"nothing stands in the file: {path}" in done.ledger["notes"]
    with pytest.raises(DataError, match="nothing is left of") as caught:
        prepare([path], tmp_path / "alone", tokenizer=Tokenizer.bytes_only())
    assert not (tmp_path / "alone").exists()
    if ".txt" not in name and ".md" not in name:
        assert str(path) in str(caught.value.where)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_wrong_encoding_names_file_line_and_what_to_say(name: str, tmp_path: Path) -> None:
    lines = {"a.txt": "ok\n中文\n", "a.jsonl": '{"text": "ok"}\n{"text": "中文"}\n', "a.csv": "text\n中文\n"}
    data = lines.get(name, '["ok",\n"中文"]').encode("gb18030")
    path = put(tmp_path / name, data)
    error = refused(path)
    assert error.where == f"{path}:2" and "not utf-8: byte 0xd6" in error.found
    assert "--encoding" in str(error.fix) and "gb18030" in str(error.fix)
    assert "中文" in "".join(texts(path, encoding="gb18030"))


def test_an_encoding_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no encoding 'klingon'"):
        documents(put(tmp_path / "a.txt", "x"), encoding="klingon")


BAD_ROWS: dict[str, tuple[str, bytes, int, str, str]] = {
    # name: (file, contents, bad line, words of the error, reason in the ledger)
    "broken json": ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', 2, "not readable as JSON", "broken row"),
    "cut json": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "c', 3, "not readable as JSON", "broken row"),
    "deep json": ("a.jsonl", b'"a"\n' + b"[" * 100_000 + b'\n"b"\n', 2, "not readable as JSON", "broken row"),
    "two objects": ("a.jsonl", b'"a"\n{"text": "x"}{"text": "y"}\n"b"\n', 2, "not readable as JSON", "broken row"),
    "missing field": ("a.jsonl", b'{"text": "a"}\n{"txt": "x"}\n{"text": "b"}\n', 2, "no field", "missing field"),
    "null": ("a.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n', 2, "'text' but null", "missing field"),
    "nan": ("a.jsonl", b'{"text": "a"}\n{"text": NaN}\n{"text": "b"}\n', 2, "'text' but NaN", "missing field"),
    "number": ("a.jsonl", b'{"text": "a"}\n17\n{"text": "b"}\n', 2, "no field that is known", "missing field"),
    "list": ("a.jsonl", b'{"text": "a"}\n{"text": ["x"]}\n"b"\n', 2, 'but ["x"]', "missing field"),
    "surrogate": ("a.jsonl", b'"a"\n{"text": "x\\ud800"}\n"b"\n', 2, "lone surrogate (U+D800)", "wrong encoding"),
    "encoding": ("a.jsonl", b'"a"\n{"text": "\xff"}\n"b"\n', 2, "not utf-8: byte 0xff", "wrong encoding"),
    "json row": ("a.json", b'["a", {"x": 1}, "b"]', 2, "no field that is known", "missing field"),
    "few columns": ("a.csv", b"n,text\n1,a\n2\n3,b\n", 3, "has 1 columns", "broken row"),
    "many columns": ("a.csv", b"n,text\n1,a\n2,x,y\n3,b\n", 3, "has 3 columns", "broken row"),
    "quotes": ("a.csv", b'n,text\n1,a\n2,"x"y\n3,b\n', 3, "not readable as a table", "broken row"),
    "open quote": ("a.csv", b'n,text\n1,a\n3,b\n2,"x\ny\n', 4, "not readable as a table", "broken row"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_file_and_line_or_skipped_and_counted(name: str, tmp_path: Path) -> None:
    file, data, line, words, reason = BAD_ROWS[name]
    path = put(tmp_path / file, data)
    error = refused(path)
    assert words in error.found and error.where == f"{path}:{line}"
    assert "--on-bad-row skip" in str(error.fix) or name == "encoding"
    found, ledger = skipped(path)
    assert found == ["a", "b"]
    account = ledger.accounts[reason]
    assert (account.documents, account.places) == (1, [f"{path}:{line}"]) and account.bytes > 0
    assert list(ledger.accounts) == [reason]


def test_blank_lines_in_rows_are_counted(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b'"a"\n\n  \n"b"\n'), ("a.csv", b"text\na\n\n\nb\n")):
        path = put(tmp_path / name, data)
        ledger = Ledger()
        assert [d.text for d in documents(path, ledger=ledger)] == ["a", "b"]
        first = 2 if name == "a.jsonl" else 3
        assert ledger.accounts["empty"].places == [f"{path}:{first}", f"{path}:{first + 1}"]
        ledger.check()


def test_parquet_with_nulls_nan_and_another_name(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["a", None, "b"]})
    error = refused(path)
    assert error.where == f"{path}:2" and "'text' but null" in error.found
    found, ledger = skipped(path)
    assert found == ["a", "b"] and ledger.accounts["missing field"].places == [f"{path}:2"]
    numbers = refused(parquet(tmp_path / "b.parquet", {"text": [0.5, float("nan")]}))
    assert "'text' but 0.5" in numbers.found
    other = refused(parquet(tmp_path / "c.parquet", {"question": ["x"], "answer": ["y"]}))
    assert "question, answer" in str(other.expected)
    assert "no field 'absent'" in refused(path, field="absent").found


def test_a_table_with_a_torn_head(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "text,text\na,b\n")
    error = refused(path)
    assert "two columns have the same name" in error.found and error.where == f"{path}:1"
    assert "id, txt" in str(refused(put(tmp_path / "b.csv", "id,txt\n1,a\n")).expected)


@pytest.mark.parametrize("data", ['{"text": "a"}', "3", '["a",\n"b"', ""])
def test_a_json_file_that_is_no_list(data: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", data)
    if not data:
        ledger = Ledger()
        assert documents(path, ledger=ledger) == [] and ledger.notes == [f"nothing stands in the file: {path}"]
        return
    assert refused(path).expected == "a list of objects"


def damaged(data: bytes, way: str) -> bytes:
    if way == "cut":
        return data[: len(data) - 20]
    if way == "another kind":
        return b"this is no packed file"
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 8]) + data[middle + 8 :]


@pytest.mark.parametrize("way", ["cut", "another kind", "changed"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz", "a.txt.zst", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_or_damaged(name: str, way: str, tmp_path: Path) -> None:
    rows = [{"text": os.urandom(60).hex()} for _ in range(300)]
    plain = {"a.txt": b"x" * 9 + os.urandom(9000).hex().encode(), "a.json": json.dumps(rows).encode()}
    data = plain.get(
        name.rpartition(".")[0], jsonl(rows) if "jsonl" in name else table([["text"], *([row["text"]] for row in rows)])
    )
    packed = zstd_checked(data) if name.endswith(".zst") else gzip.compress(data)
    path = put(tmp_path / name, damaged(packed, way))
    error = refused(path)
    assert error.where.startswith(str(path)) if error.where else False


def zstd_checked(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all" * 10])
def test_a_parquet_file_that_is_none(data: bytes, tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", data)
    assert "not readable as parquet" in refused(path).found


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["abc" * 100] * 50})
    path.write_bytes(path.read_bytes()[:-30])
    assert "not readable as parquet" in refused(path).found


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    try:
        path = put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.txt")), "some text in a file of an odd name")
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    done = prepare([path], tmp_path / "out", tokenizer=Tokenizer.bytes_only())
    assert r"\xff" in done.train.names[0] and done.train.n_documents == len(done.train.names) == 1


# -- too little --------------------------------------------------------------------------------------------------------


def test_a_corpus_smaller_than_one_block(tmp_path: Path) -> None:
    done = prepare([put(tmp_path / "a.txt", "short text")], tmp_path / "out", tokenizer=Tokenizer.bytes_only())
    with pytest.raises(DataError, match=r"the text has \d+ tokens, which is not one row of 64") as caught:
        Loader(done.train, rows=2, context_tokens=64, seed=1)
    assert "shorten context_tokens" in str(caught.value.fix) and caught.value.expected == "at least 65 tokens"


@pytest.mark.parametrize("text", ["x", "ab", "\n\na"])
def test_the_smallest_texts(text: str, tmp_path: Path) -> None:
    done = prepare([put(tmp_path / "a.txt", text)], tmp_path / "out", tokenizer=Tokenizer.bytes_only())
    assert done.ledger["read"] == {"documents": 1, "bytes": len(text), "tokens": len(text)}
