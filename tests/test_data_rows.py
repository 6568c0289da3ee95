"""Files -> rows and their layouts: every form a task's file may have, and one clear error or a counted skip for a bad
one."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ratoon.base.errors import ConfigError, DataError
from ratoon.data.layouts import LOOKED_AT_ROWS, announced, recognise
from ratoon.data.ledger import Ledger
from ratoon.data.rows import Row, RowReading, read_rows
from ratoon.data.sources import find_files
from ratoon.data.task_ledger import TaskLedger


def put(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows(*paths: Path, ledger: Any = None, **reading: Any) -> list[Row]:
    return list(read_rows(paths, RowReading(**reading), Ledger() if ledger is None else ledger))


def fields(*paths: Path, **reading: Any) -> list[dict[str, Any]]:
    return [row.fields for row in rows(*paths, **reading)]


def jsonl(*values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# -- every form --------------------------------------------------------------------------------------------------------

TWO: list[dict[str, Any]] = [{"text": "a, b", "label": "1"}, {"text": "第二\t行", "label": "0"}]
FORMS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[int]]] = {
    # name: (file, how it is read, lines)
    "jsonl": (lambda at: put(at / "a.jsonl", jsonl(*TWO)), {}, [1, 2]),
    "jsonl.gz": (lambda at: put(at / "a.jsonl.gz", gzip.compress(jsonl(*TWO).encode())), {}, [1, 2]),
    "json of one a line": (lambda at: put(at / "a.json", jsonl(*TWO)), {}, [1, 2]),
    "json list": (lambda at: put(at / "a.json", json.dumps(TWO, indent=1)), {}, [1, 2]),
    "json under data": (lambda at: put(at / "a.json", json.dumps({"version": 1, "data": TWO})), {}, [1, 2]),
    "json part": (lambda at: put(at / "a.json", json.dumps({"train": TWO, "test": []})), {"part": "train"}, [1, 2]),
    "json lists": (
        lambda at: put(at / "a.json", json.dumps([["a, b", "1"], ["第二\t行", "0"]])),
        {"columns": ("text", "label")},
        [1, 2],
    ),
    "csv": (lambda at: put(at / "a.csv", 'text,label\n"a, b",1\n第二\t行,0\n'), {}, [2, 3]),
    "csv without a head": (
        lambda at: put(at / "a.csv", '"a, b",1,x\n第二\t行,0,y\n'),
        {"columns": ("text", "label", "_")},
        [1, 2],
    ),
    "tsv": (lambda at: put(at / "a.tsv", 'text\tlabel\na, b\t1\n"第二\t行"\t0\n'), {}, [2, 3]),
    "lines": (
        lambda at: put(at / "a.txt", "a, b@1\r\n第二\t行@0"),
        {"columns": ("text", "label"), "separator": "@"},
        [1, 2],
    ),
    "unknown suffix": (
        lambda at: put(at / "a.part1", "a, b@1\n\n第二\t行@0\n"),
        {"columns": ("text", "label"), "separator": "@", "kind": "lines"},
        [1, 3],
    ),
    "parquet": (lambda at: parquet(at / "a.parquet", {k: [row[k] for row in TWO] for k in TWO[0]}), {}, [1, 2]),
    "gb18030": (lambda at: put(at / "a.jsonl", jsonl(*TWO).encode("gb18030")), {"encoding": "gb18030"}, [1, 2]),
    "utf-16": (lambda at: put(at / "a.csv", 'text,label\n"a, b",1\n第二\t行,0\n'.encode("utf-16")),
               {"encoding": "utf-16"}, [2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form(form: str, tmp_path: Path) -> None:
    make, reading, lines = FORMS[form]
    path = make(tmp_path)
    found = rows(path, **reading)
    assert [row.fields for row in found] == TWO
    assert [row.place for row in found] == [f"{path}:{line}" for line in lines]


def test_lines_without_columns_are_texts(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "\ufeffone\ttwo\n \nthree\n")
    ledger = Ledger()
    assert [row.fields for row in rows(path, ledger=ledger)] == [{"text": "one\ttwo"}, {"text": "three"}]
    assert ledger.accounts["empty"].places == [f"{path}:2"]


def test_values_stay_what_they_are(tmp_path: Path) -> None:
    value = {"n": 0, "none": None, "list": [1, [2]], "table": {"x": {"y": [[0, 1]]}}, "yes": True}
    assert fields(put(tmp_path / "a.jsonl", jsonl(value))) == [value]
    assert fields(put(tmp_path / "b.json", json.dumps(value))) == [value]  # a file of one row
    columns = {"n": [1, 2], "tags": [["a"], []], "x": [0.5, None]}
    assert fields(parquet(tmp_path / "c.parquet", columns)) == [
        {"n": 1, "tags": ["a"], "x": 0.5},
        {"n": 2, "tags": [], "x": None},
    ]


def test_a_table_of_tables_has_its_keys_as_ids(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", json.dumps({"17": {"q": "a"}, "18": {"q": "b", "id": "own"}}))
    ledger = Ledger()
    assert [row.fields for row in rows(path, ledger=ledger)] == [{"id": "17", "q": "a"}, {"id": "own", "q": "b"}]
    assert ledger.notes == [f"the keys of {path} are taken as the rows' `id`"]


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "At noon it rained.",
                    "qas": [
                        {"id": "q1", "question": "When?", "answers": [{"text": "noon", "answer_start": 3}]},
                        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Nothing.", "qas": [{"id": "q3", "question": "What?"}]},
            ],
        }
    ],
}


def test_squad_is_one_row_a_question(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", json.dumps(SQUAD))
    found = rows(path)
    assert [(row.fields["id"], row.line) for row in found] == [("q1", 1), ("q2", 2), ("q3", 3)]
    assert found[0].fields == {
        "title": "T", "context": "At noon it rained.", "id": "q1", "question": "When?",
        "answers": [{"text": "noon", "answer_start": 3}],
    }  # fmt: skip
    assert found[1].fields["is_impossible"] is True and "answers" not in found[2].fields
    with pytest.raises(DataError, match="does not have SQuAD's form"):
        rows(put(tmp_path / "b.json", json.dumps(TWO)), kind="squad")


CONLL = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP B-PER
-DOCSTART- -X- O O

BRUSSELS NNP I-NP I-LOC"""


@pytest.mark.parametrize("name", ["eng.train", "a.txt", "a.conll", "a.tsv"])
def test_conll_columns(name: str, tmp_path: Path) -> None:
    path, ledger = put(tmp_path / name, CONLL.replace(" ", "\t") if name == "a.tsv" else CONLL), Ledger()
    found = rows(path, ledger=ledger)
    assert [(row.fields["words"], row.fields["tags"], row.line) for row in found] == [
        (["EU", "rejects"], ["I-ORG", "O"], 3),
        (["Peter", "Blackburn"], ["I-PER", "B-PER"], 6),
        (["BRUSSELS"], ["I-LOC"], 10),
    ]
    assert [(row.fields["sentence"], row.fields["document"]) for row in found] == [(1, 1), (2, 1), (3, 2)]
    assert f"2 -DOCSTART- lines of {path} part documents and are no sentences" in ledger.notes
    assert (f"{path} is read as CoNLL columns" in ledger.notes) == (name != "a.conll")


def test_conll_columns_that_are_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.conll", CONLL)
    row = rows(path, columns=("word", "pos", "_", "tag"))[0]
    assert row.fields["pos"] == ["NNP", "VBZ"] and "_" not in row.fields
    assert rows(path, columns=("tag", "word", "x", "y"))[0].fields["words"] == ["NNP", "VBZ"]
    with pytest.raises(ConfigError, match="CoNLL columns named word, pos"):
        rows(path, columns=("word", "pos"))


def test_conll_without_documents_is_told_by_its_tags(tmp_path: Path) -> None:
    """A word may be a blank where tabs part the columns; lines that end in O alone are no tags."""
    path = put(tmp_path / "a.txt", "海\tB-LOC\n \tO\n钓\tO\n\n鱼\tO\n")
    assert [row.fields["words"] for row in rows(path)] == [["海", " ", "钓"], ["鱼"]]
    assert fields(put(tmp_path / "b.txt", "plan O\nplan O\n")) == [{"text": "plan O"}, {"text": "plan O"}]


# -- bad rows ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, str | bytes, dict[str, Any], int, str, str]] = {
    # name: (file, contents, how it is read, bad line, words of the error, reason)
    "json": ("a.jsonl", '{"t": 1}\n{"t": \n{"t": 2}\n', {}, 2, "not readable as JSON", "broken row"),
    "number": ("a.jsonl", '{"t": 1}\n17\n{"t": 2}\n', {}, 2, "the row is no object but 17", "broken row"),
    "list": ("a.json", '[{"t": 1}, ["x", "y"], {"t": 2}]', {}, 2, "no object but a list of 2", "broken row"),
    "surrogate": ("a.jsonl", '{"t": 1}\n{"t": {"x": ["\\ud800"]}}\n{"t": 2}\n', {}, 2, "U+D800", "wrong encoding"),
    "surrogate key": ("a.jsonl", '{"t": 1}\n{"\\udfff": 1}\n{"t": 2}\n', {}, 2, "U+DFFF", "wrong encoding"),
    "encoding": ("a.jsonl", b'{"t": 1}\n{"t": "\xff"}\n{"t": 2}\n', {}, 2, "not utf-8", "wrong encoding"),
    "few columns": ("a.txt", "1\tx\n3\n2\tx\n", {"columns": ("t", "_")}, 2, "the line has 1 columns", "broken row"),
    "many columns": ("a.txt", "1@x\n3@4@x\n2@x\n", {"columns": ("t", "_"), "separator": "@"}, 2, "3 columns",
                     "broken row"),
    "short row": ("a.csv", "t,u\n1,x\n3\n2,x\n", {}, 3, "the row has 1 columns", "broken row"),
    "quotes": ("a.tsv", 't\tu\n1\tx\n"3"4\tx\n2\tx\n', {}, 3, "not readable as a table", "broken row"),
    "conll width": ("a.conll", "1 O\n\na O\nb\nc O\n\n2 O\n", {}, 4, "the line has 1 columns", "broken row"),
    "conll tag": ("a.conll", "1\tO\n\na\t\n\n2\tO\n", {}, 3, "an empty word or tag", "broken row"),
    "conll encoding": ("a.conll", b"1 O\n\na O\n\xff O\nc O\n\n2 O\n", {}, 4, "not utf-8", "wrong encoding"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_with_file_and_line_or_skipped_and_counted(name: str, tmp_path: Path) -> None:
    file, data, reading, line, words, reason = BAD[name]
    path = put(tmp_path / file, data)
    with pytest.raises(DataError) as caught:
        rows(path, **reading)
    assert words in caught.value.found and caught.value.where == f"{path}:{line}"
    ledger, tasks = Ledger(), TaskLedger()
    for book in (ledger, tasks):
        found = rows(path, ledger=book, on_bad_row="skip", **reading)
        kept = [(row.fields.get("t") or row.fields["words"][0]) for row in found]
        assert list(map(str, kept)) == ["1", "2"]
        book.check()
    assert ledger.accounts[reason].places == [f"{path}:{line}"] and list(ledger.accounts) == [reason]
    assert ledger.read.bytes > 0 and ledger.read.bytes == tasks.unread_bytes
    assert tasks.rows == {**dict.fromkeys(tasks.rows, 0), "dropped": 1} and tasks.reasons[reason].rows == 1


SQUAD_PROBLEMS = {
    "a paragraph without a context": lambda p: p.pop("context"),
    "a paragraph without questions": lambda p: p.update(qas=None),
    "no question": lambda p: p["qas"][0].pop("question"),
    "an answer without a text": lambda p: p["qas"][0]["answers"][0].pop("text"),
    "an answer without the place where it starts": lambda p: p["qas"][0]["answers"][0].update(answer_start="3"),
}


@pytest.mark.parametrize("problem", SQUAD_PROBLEMS)
def test_a_question_that_is_none(problem: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(SQUAD))
    SQUAD_PROBLEMS[problem](data["data"][0]["paragraphs"][0])
    path, ledger = put(tmp_path / "a.json", json.dumps(data)), Ledger()
    with pytest.raises(DataError, match=problem) as caught:
        rows(path)
    assert caught.value.where == f"{path}:1"
    left = rows(path, ledger=ledger, on_bad_row="skip")
    assert left[-1].fields["id"] == "q3" and len(left) + ledger.accounts["broken row"].documents in (2, 3)


def test_settings_that_do_not_fit_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", jsonl(*TWO))
    for wrong in ({"separator": "@"}, {"part": "train"}):
        with pytest.raises(ConfigError, match="has no effect on one JSON object a line"):
            rows(path, **wrong)
    for wrong, words in (
        ({"kind": "xml"}, "no kind of file 'xml'"),
        ({"columns": ("a", "a")}, "two columns have the same name"),
        ({"separator": ""}, "separator of columns is empty"),
        ({"encoding": "klingon"}, "no encoding 'klingon'"),
    ):
        with pytest.raises(ConfigError, match=words):
            rows(path, **wrong)
    ledger = Ledger()
    rows(path, ledger=ledger, columns=("x", "y"))
    assert ledger.notes == [f"columns have no effect: the rows of {path} name their fields themselves"]


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", json.dumps({"train": TWO, "test": TWO}))
    with pytest.raises(DataError, match="no part 'dev'") as caught:
        rows(path, part="dev")
    assert caught.value.expected == "one of: train, test"
    with pytest.raises(DataError, match="an object of parts") as caught:
        rows(path)
    assert "train, test" in str(caught.value.expected)
    with pytest.raises(DataError, match="the file holds int"):
        rows(put(tmp_path / "b.json", "3"))
    with pytest.raises(DataError, match="not readable as JSON") as caught:
        rows(put(tmp_path / "c.json", '[{"a": 1},\n{"a": 2'))
    assert caught.value.where == f"{tmp_path / 'c.json'}:2"


def test_quotes_that_run_over_lines_are_said(tmp_path: Path) -> None:
    path, ledger = put(tmp_path / "a.tsv", 'text\tn\n"He said\t1\nand" left\t2\n'), Ledger()
    with pytest.raises(DataError, match="not readable as a table") as caught:
        rows(path)
    assert "kind: lines" in str(caught.value.fix)
    assert len(rows(path, kind="lines", columns=("text", "n"))) == 3
    rows(put(tmp_path / "b.tsv", 'text\tn\n"one\ntwo"\t1\n'), ledger=ledger)
    assert "go on over line ends" in ledger.notes[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.conll"])
def test_an_empty_file_is_said(name: str, tmp_path: Path) -> None:
    path, ledger = put(tmp_path / name, ""), Ledger()
    assert rows(path, ledger=ledger) == [] and ledger.notes == [f"nothing stands in the file: {path}"]


def test_files_that_are_not_there_or_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        rows(tmp_path / "absent.jsonl")
    whole = gzip.compress(jsonl(*TWO * 50).encode())
    with pytest.raises(DataError, match="cut or damaged"):
        rows(put(tmp_path / "a.jsonl.gz", whole[:-9]))
    odd = put(tmp_path / "eng.testa", CONLL)
    with pytest.raises(DataError, match=r"'\.testa' cannot be read"):
        find_files([odd], Ledger())
    assert find_files([odd], Ledger(), any_kind=True) == [odd]


# -- layouts -----------------------------------------------------------------------------------------------------------


def made(*found: dict[str, Any]) -> list[Row]:
    return [Row(one, "a.jsonl", line) for line, one in enumerate(found, start=1)]


TURN, SAID = {"role": "user", "content": "x"}, {"from": "human", "value": "x"}
LAYOUTS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "alpaca",
               {"prompt": "instruction", "answer": "output", "input": "input"}),
    "sharegpt": ({"conversations": [SAID], "tools": "[]"}, "sharegpt", {"turns": "conversations", "tools": "tools"}),
    "messages": ({"messages": [TURN]}, "messages", {"turns": "messages"}),
    "calls": ({"messages": [TURN, {"role": "assistant", "tool_calls": []}]}, "messages", {"turns": "messages"}),
    "preference of turns": ({"conversations": [SAID], "chosen": SAID, "rejected": SAID}, "preference_sharegpt",
                            {"turns": "conversations", "chosen": "chosen", "rejected": "rejected"}),
    "preference of messages": ({"chosen": [TURN], "rejected": [TURN], "prompt": [TURN]}, "preference_messages",
                               {"chosen": "chosen", "rejected": "rejected", "turns": "prompt"}),
    "hh": ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
           "preference_transcript", {"chosen": "chosen", "rejected": "rejected"}),
    "preference of texts": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference_text",
                            {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
    "squad": ({"context": "c", "question": "q", "answers": []}, "squad",
              {"context": "context", "question": "question", "answers": "answers"}),
    "conll": ({"words": ["a"], "tags": ["O"]}, "conll", {"words": "words", "tags": "tags"}),
    "cluener": ({"text": "a", "label": {"name": {"a": [[0, 0]]}}}, "cluener", {"text": "text", "label": "label"}),
    "pairs": ({"premise": "a", "hypothesis": "b", "label": 1}, "pairs",
              {"first": "premise", "second": "hypothesis", "label": "label"}),
    "prompt": ({"question": "a", "answer": "b"}, "prompt_completion", {"prompt": "question", "answer": "answer"}),
    "translation": ({"en": "a", "zh": "b"}, "translation", {"source": "en", "target": "zh"}),
    "summary": ({"document": "a", "summaries": ["b"]}, "summary", {"document": "document", "summary": "summaries"}),
    "dailydialog": ({"text": "Hi . __eou__ Hello . __eou__"}, "dialogue_lines", {"text": "text"}),
    "label": ({"sentence": "a", "label": 3}, "text_label", {"text": "sentence", "label": "label"}),
    "labels": ({"text": "a", "labels": ["x", "y"]}, "text_labels", {"text": "text", "labels": "labels"}),
    "title alone": ({"title": "a", "label": "x"}, "text_label", {"text": "title", "label": "label"}),
    "text": ({"text": "a"}, "text", {"text": "text"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_told_apart(name: str) -> None:
    row, layout, under = LAYOUTS[name]
    found = recognise(made(row, {**row, "source": "x"}))
    assert (found.name, dict(found.fields), found.others) == (layout, under, ("source",))
    assert "other fields: 'source'" in found.sentence


def test_the_layout_of_most_rows_is_taken_and_the_others_are_told() -> None:
    alpaca = LAYOUTS["alpaca"][0]
    found = recognise(made({"text": "odd"}, alpaca, alpaca, {"instruction": "no output"}))
    assert found.name == "alpaca" and "2 of 4 rows look different, the first at a.jsonl:1" in found.sentence
    assert recognise(made({"text": "odd"}, alpaca)).name == "alpaca"  # as many: the more telling one


def test_what_no_layout_knows_is_refused_or_announced() -> None:
    strange = [{f"x{number}": 1 for number in range(30)}]
    with pytest.raises(DataError, match="no known layout") as caught:
        recognise(made(*strange))
    assert caught.value.where == "a.jsonl:1" and "and 10 more" in caught.value.found
    assert "Alpaca" in str(caught.value.expected)
    ledger = Ledger()
    assert list(announced(made(*strange), ledger)) == made(*strange)
    assert ledger.notes[0].startswith("a.jsonl: rows of no usual layout, with the fields 'x0', 'x1'")


def test_each_file_is_announced_and_every_row_passes() -> None:
    first = [Row({"text": str(number), "label": 1}, "a.csv", number) for number in range(LOOKED_AT_ROWS + 5)]
    second = [Row({"messages": [TURN]}, "b.jsonl", 1)]
    ledger = Ledger()
    assert list(announced(iter([*first, *second]), ledger)) == [*first, *second]
    assert ledger.notes == [
        "a.csv: texts with a label {text, label} (text, label)",
        "b.jsonl: OpenAI's messages {messages: [{role, content}]} (turns = 'messages')",
    ]
    assert list(announced([], ledger)) == []


# -- real data ---------------------------------------------------------------------------------------------------------

REAL: dict[str, tuple[str, dict[str, Any], int, str]] = {
    # name: (file, how it is read, rows, layout)
    "alpaca": ("alpaca_en/alpaca_5k.json.gz", {}, 5000, "alpaca"),
    "sharegpt": ("sharegpt_style/sharegpt_zh_400.jsonl.gz", {}, 400, "sharegpt"),
    "tools": ("sharegpt_style/glaive_toolcall_en_demo.json.gz", {}, 300, "sharegpt"),
    "dpo": ("preference/dpo_zh_demo.json.gz", {}, 300, "preference_sharegpt"),
    "hh": ("preference/hh_harmless_base_test.jsonl.gz", {}, 2312, "preference_transcript"),
    "dailydialog": ("dailydialog/test.txt.gz", {}, 1000, "dialogue_lines"),
    "thucnews": ("thucnews_titles/test.txt.gz", {"columns": ("text", "label")}, 10000, "text_label"),
    "phrasebank": ("financial_phrasebank/Sentences_AllAgree.txt.gz", {"columns": ("text", "label"), "separator": "@"},
                   2264, "text_label"),
    "clinc150": ("clinc150/data_full.json.gz", {"columns": ("text", "intent"), "part": "val"}, 3000, "text_label"),
    "tatoeba": ("en_zh_tatoeba/cmn.txt.gz", {"columns": ("en", "zh", "_")}, 26388, "translation"),
    "ag_news": ("ag_news/test.csv.gz", {"columns": ("label", "title", "text")}, 2000, "text_label"),
    "cmrc": ("clue/cmrc2018/cmrc2018_dev.json.gz", {}, 3219, "squad"),
    "squad": ("squad_v11/dev_part.json.gz", {}, 1000, "squad"),
    "cluener": ("clue/cluener2020/dev.json.gz", {}, 1343, "cluener"),
    "csl": ("clue/csl/dev.json.gz", {}, 800, "clue_csl"),
    "wsc": ("clue/cluewsc2020/dev.json.gz", {}, 304, "clue_wsc"),
    "ocnli": ("clue/ocnli/dev.json.gz", {}, 3000, "pairs"),
    "scitldr": ("summ_en_scitldr/test.jsonl.gz", {}, 618, "summary"),
    "beetle": ("semeval2013_task7/beetle_test.jsonl.gz", {}, 1258, "graded_answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, shared_data: Path) -> None:
    file, reading, count, layout = REAL[name]
    found = rows(shared_data / file, **reading)
    assert len(found) == count and recognise(found).name == layout


def test_conll_2003_as_it_is(shared_data: Path) -> None:
    """The official counts: sentences, tokens, entities of testb by their IOB1 tags."""
    found = rows(shared_data / "conll2003_en" / "eng.testb.gz")
    assert len(found) == 3453 and sum(len(row.fields["words"]) for row in found) == 46435
    assert found[-1].fields["document"] == 231 and found[-1].fields["sentence"] == 3453
    entities: Counter[str] = Counter()
    for row in found:
        before = "O"
        for tag in row.fields["tags"]:
            if tag != "O" and (tag[0] == "B" or before[1:] != tag[1:]):
                entities[tag[2:]] += 1
            before = tag
    assert entities == {"LOC": 1668, "MISC": 702, "ORG": 1661, "PER": 1617}
