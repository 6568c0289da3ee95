"""The CLUE suite: submissions in the forms of its site, and the verb over the runs that are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from little_tasks import rows_of, table, write
from ratoon.cli.main import run as ratoon
from ratoon.evaluate.clue import PARTS, TNEWS_CODES, entities, submission
from ratoon.evaluate.task import Prediction
from ratoon.recipe import shipped
from ratoon.tasks.registry import task_of

BY_NAME = {part.name: part for part in PARTS}


def predictions(
    task: dict[str, Any], rows: list[dict[str, Any]], answers: list[Any], first_line: int = 1
) -> list[Prediction]:
    made = task_of(task)
    records = [made.record(row, f"dev.json:{number}") for number, row in enumerate(rows, start=first_line)]
    return [Prediction(record, answer) for record, answer in zip(records, answers, strict=True)]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_part_has_a_recipe() -> None:
    assert {part.recipe for part in PARTS} <= shipped().keys()
    for part in PARTS:
        assert yaml.safe_load(shipped()[part.recipe].read_text(encoding="utf-8"))["name"] == part.recipe


def test_topics_get_their_numbers() -> None:
    row = {"label": "104", "label_desc": "news_finance", "sentence": "股市", "keywords": ""}
    task = {"kind": "classification", "fields": {"label": "label_desc"}}
    found = lines(
        submission(BY_NAME["TNEWS"], predictions(task, [row, {**row, "id": 7}], ["news_finance", "news_car"], 5))
    )
    assert found == [
        {"id": 4, "label": "104", "label_desc": "news_finance"},
        {"id": 7, "label": "107", "label_desc": "news_car"},
    ]
    assert len(set(TNEWS_CODES.values())) == 15


def test_the_numbers_are_those_of_the_files(shared_data: Path) -> None:
    import gzip

    with gzip.open(shared_data / "clue" / "tnews" / "dev.json.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            assert TNEWS_CODES[row["label_desc"]] == row["label"]


def test_pairs_and_answers() -> None:
    rows = [{"sentence1": "甲", "sentence2": "乙", "label": "0"}, {"sentence1": "丙", "sentence2": "丁", "label": "1"}]
    assert lines(submission(BY_NAME["AFQMC"], predictions({"kind": "pairs"}, rows, ["1", "0"]))) == [
        {"id": 0, "label": "1"},
        {"id": 1, "label": "0"},
    ]
    row = {
        "id": "DEV_0_QUERY_0",
        "question": "谁？",
        "context": "是他。",
        "answers": [{"text": "他", "answer_start": 1}],
    }
    found = submission(BY_NAME["CMRC2018"], predictions({"kind": "extractive"}, [row], ["他"]))
    assert json.loads(found) == {"DEV_0_QUERY_0": "他"}


def test_entities_go_back_into_their_form(shared_data: Path) -> None:
    import gzip

    assert entities("ab c", ["B-x", "I-x", "O", "B-y"]) == {"x": {"ab": [[0, 1]]}, "y": {"c": [[3, 3]]}}
    made = task_of({"kind": "tagging", "join": ""})
    with gzip.open(shared_data / "clue" / "cluener2020" / "dev.json.gz", "rt", encoding="utf-8") as file:
        for number, row in enumerate(map(json.loads, file)):
            record = made.record(row, str(number))
            back = entities(record.words, record.tags)
            wanted = {kind: {s: sorted(at) for s, at in found.items()} for kind, found in row["label"].items()}
            assert {kind: {s: sorted(at) for s, at in found.items()} for kind, found in back.items()} == wanted


@pytest.fixture
def place(with_base: Path) -> Path:
    return with_base


def test_the_suite_measures_the_runs_that_are_here(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of("pairs"))
    Path("recipe.yaml").write_text(yaml.safe_dump(table("pairs", name="clue-afqmc")), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0
    capsys.readouterr()
    assert ratoon(["evaluate", "--suite", "clue", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [one["part"] for one in found["parts"]] == ["AFQMC"]
    written = lines(Path("runs/clue/afqmc_predict.json").read_text(encoding="utf-8"))
    assert len(written) == found["parts"][0]["n"] and written[0].keys() == {"id", "label"}
    assert "`ratoon finetune clue-tnews` makes it" in said.err
    assert ratoon(["evaluate", "--suite", "clue"]) == 0
    assert "AFQMC" in capsys.readouterr().out


@pytest.fixture
def official(place: Path) -> Path:
    """A folder as CLUE's, with answers hidden from test rows, and a run on it under a name of its own."""
    folder = place / "clue"
    (folder / "afqmc_public").mkdir(parents=True)
    for name in ("cmrc2018_public", "cluener"):
        (folder / name).mkdir()
    write(folder / "cluener" / "test.json", [{"id": 0, "text": "在北京"}])
    rows = [
        {"sentence1": row["first"], "sentence2": row["second"], "label": row["label"]} for row in rows_of("pairs", 40)
    ]
    write(folder / "afqmc_public" / "train.json", rows[:30])
    write(folder / "afqmc_public" / "dev.json", rows[30:])
    hidden = [
        {"id": number + 50, **{k: v for k, v in row.items() if k != "label"}} for number, row in enumerate(rows[30:])
    ]
    write(folder / "afqmc_public" / "test.json", hidden)
    recipe = table("pairs", name="mine")
    recipe["data"] = {"folder": "clue/afqmc_public", "train": ["train.json"], "validation_fraction": 0.2}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0
    return folder


def test_official_files_are_measured_and_answered(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert ratoon(["evaluate", "--suite", "clue", "--data", "clue", "--models", "afqmc=mine", "--json"]) == 0
    said = capsys.readouterr()
    (part,) = json.loads(said.out)["parts"]
    assert part["part"] == "AFQMC" and part["n"] == 10 and part["tests"] == [{"n": 10, "file": "afqmc_predict.json"}]
    written = lines(Path("runs/clue/afqmc_predict.json").read_text(encoding="utf-8"))
    assert [one["id"] for one in written] == list(range(50, 60))
    dev = lines(Path("runs/clue/dev_afqmc_predict.json").read_text(encoding="utf-8"))
    assert [one["id"] for one in dev] == list(range(10))
    assert [one["label"] for one in dev] == [one["label"] for one in written], "the same rows, with answers and without"
    assert "TNEWS: clue holds neither" in said.err and "CMRC2018: clue holds neither" in said.err
    assert "CLUENER: there is no run 'clue-cluener'; `ratoon finetune clue-cluener` makes it" in said.err
    assert ratoon(["evaluate", "afqmc", "--suite", "clue", "--data", "clue"]) == 2
    err = capsys.readouterr().err
    assert (
        "`ratoon finetune clue-afqmc data.folder=clue/afqmc_public data.train=[train.json] data.test=[dev.json]`" in err
    )
    (official / "afqmc_public" / "dev.json").unlink()
    assert ratoon(["evaluate", "--suite", "clue", "--data", "clue", "--models", "AFQMC=mine"]) == 0
    assert "answers not told" in capsys.readouterr().out, "test rows alone are answered"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--models", "afqmc"], "names no run for a part"),
        (["--models", "glue=mine"], "names no run for a part"),
        (["--data", "nowhere"], "no such folder"),
        (["--floor"], "--floor has no effect with --suite"),
        (["--stride", "3"], "--stride has no effect with --suite"),
        (["afqmc", "rows.jsonl"], "FILE has no effect with --suite"),
        (["glue"], "no part is called 'glue'"),
    ],
)
def test_what_the_suite_refuses(
    words: list[str], told: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ratoon(["evaluate", "--suite", "clue", *words]) == 2
    assert told in capsys.readouterr().err


def test_two_test_files_have_two_submissions(tmp_path: Path) -> None:
    """TNEWS and WSC have the tests of both versions of the suite; the others one."""
    for name in ("tnews_public/test.json", "tnews_public/test1.0.json.gz", "cluewsc2020/test1.0.json", "csl/test.json",
                 "cmrc2018/cmrc2018_test_2k.json"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("", encoding="utf-8")
    names = {part.name: {file: path.name for file, path in part.tests(tmp_path).items()} for part in PARTS}
    assert names["TNEWS"] == {"tnews10_predict.json": "test1.0.json.gz", "tnews11_predict.json": "test.json"}
    assert names["WSC"] == {"cluewsc10_predict.json": "test1.0.json"}
    assert names["CSL"] == {"csl_predict.json": "test.json"} and names["AFQMC"] == {}
    assert names["CMRC2018"] == {"cmrc2018_predict.json": "cmrc2018_test_2k.json"}


def test_the_files_of_the_shared_layout_are_found(shared_data: Path) -> None:
    for part in PARTS:
        found = part.files(shared_data / "clue")
        assert found.keys() == ({"train", "dev"} if part.name != "CMNLI" else set()), part.name


def test_no_run_of_the_suite(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ratoon(["evaluate", "--suite", "clue"]) == 2
    assert "no run of the suite is here" in capsys.readouterr().err
    assert ratoon(["evaluate"]) == 2
