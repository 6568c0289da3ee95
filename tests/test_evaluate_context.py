"""Sentences with their document around them, validation spread over its part, and what evaluation did not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import little_tasks
from ratoon.data.examples import joined
from ratoon.data.records import encode_records
from ratoon.data.task_ledger import TaskLedger
from ratoon.evaluate.task import evaluate_task, head_scores, predict
from ratoon.evaluate.validate import NEIGHBOURS, spread
from ratoon.generate.lm import LanguageModel, load
from ratoon.model.config import HeadConfig
from ratoon.model.init import add_head
from ratoon.tasks.example import Example
from ratoon.tasks.registry import task_of


def sentences(task: Any, places: list[tuple[str, int, int]]) -> list[Any]:
    """A sentence for each (file, document, number)."""
    return [
        task.record(
            {"words": ["red", "car", str(number)], "tags": ["O", "B-X", "O"], "document": doc, "sentence": number},
            f"{file}:{number}",
        )
        for file, doc, number in places
    ]


@pytest.fixture
def tagger(tmp_path: Path) -> LanguageModel:
    lm = load(little_tasks.base(tmp_path / "base"), device="cpu")
    lm.model.set_causal(False)
    add_head(lm.model, HeadConfig(kind="token", labels=("O", "B-X")), 1)
    return lm


def settled(**settings: Any) -> Any:
    task = task_of({"kind": "tagging", **settings})
    task.settle(sentences(task, [("a", 1, 1)]))
    return task


@pytest.mark.parametrize(
    ("second", "joins"),
    [
        (("a", 1, 2), True),
        (("a", 1, 3), False),  # one sentence stands between
        (("a", 2, 2), False),
        (("b", 1, 2), False),
    ],
)
def test_only_neighbours_of_a_document_are_read_together(second: tuple[str, int, int], joins: bool) -> None:
    task = settled(context="document")
    one, other = sentences(task, [("a", 1, 1), second])
    assert task.together(one, other) is joins
    assert not settled().together(one, other), "not unless it is asked for"


def test_training_joins_and_books_each_sentence(tagger: LanguageModel) -> None:
    task = settled(context="document")
    records = sentences(task, [("a", 1, n) for n in range(1, 6)] + [("a", 2, 6)])
    assert tagger.tokenizer is not None
    ledger = TaskLedger()
    found = encode_records(task, records, tagger.tokenizer, ledger, room_tokens=25, too_long="refuse")
    alone = [task.encode(one, tagger.tokenizer, room_tokens=25, too_long="refuse").examples[0] for one in records]
    assert [id for one in found for id in one.ids] == [id for one in alone for id in one.ids]
    assert [t for one in found for t in one.targets or ()] == [t for one in alone for t in one.targets or ()]
    assert len(found) < len(records) and all(one.places <= 25 for one in found)
    assert ledger.rows["trained"] == len(records) == ledger.rows_read


def test_answers_with_context_are_those_of_the_whole_document(tagger: LanguageModel) -> None:
    task = settled(context="document")
    records = sentences(task, [("a", 1, n) for n in range(1, 5)])
    assert tagger.tokenizer is not None and tagger.model.task_head is not None
    parts = [task.encode(one, tagger.tokenizer, room_tokens=99, too_long="refuse").examples[0] for one in records]
    ids = torch.tensor([[id for one in parts for id in one.ids]])
    at_BT = torch.tensor([[weight > 0 for one in parts for weight in one.weight]])
    with torch.no_grad():
        wanted = tagger.model.task_head(tagger.model(ids), at_BT).numpy()
    whole, groups = joined(parts, [False, True, True, True], 99)
    assert groups == [[0, 1, 2, 3]]
    np.testing.assert_allclose(head_scores(tagger, whole)[0], wanted, atol=1e-5)
    answers = [tag for one in predict(tagger, task, records) for tag in one.answer]
    assert answers == [("O", "B-X")[best] for best in wanted.argmax(-1)]
    apart = np.concatenate(head_scores(tagger, parts))
    assert np.abs(apart - wanted).max() > 1e-3, "the context is seen"


def test_a_row_holds_what_fits_and_no_more() -> None:
    examples = [Example([1] * n, [1.0] * n, str(n), targets=[0] * n) for n in (4, 5, 6, 3)]
    whole, groups = joined(examples, [False, True, True, True], 10)
    assert groups == [[0, 1], [2, 3]] and [len(one.ids) for one in whole] == [9, 9]


def test_validation_is_spread_over_its_part() -> None:
    items = list(range(1000))
    found = spread(items, 0.1)
    assert len(found) == 100 and found == sorted(found) and len(set(found)) == 100
    assert found[-1] > 800, "the end of a sorted file is seen as well as its beginning"
    assert found[:NEIGHBOURS] == items[:NEIGHBOURS], "neighbours stay together"
    assert spread(items, 1.0) == items and spread(items, 1e-9) == [0] and spread([7], 0.5) == [7]


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    lm = load(little_tasks.base(tmp_path / "base"), device="cpu")
    task = task_of({"kind": "classification"})
    records = [
        task.record({"text": "x" * n, "label": "ab"[n % 2]}, f"f:{n}") for n in (10, 127, 130, 149)
    ]  # and a begin token
    task.settle(records)
    add_head(lm.model, HeadConfig(kind="sequence", labels=task.labels), 1)
    report = evaluate_task(lm, task, records, too_long="cut-right")
    assert report.as_dict()["cut"] == {"records": 2, "tokens": 3 + 22}
    assert [one.cut_tokens for one in report.predictions] == [0, 0, 3, 22]
    assert report.cut is not None and "2 records were too long: 25 tokens were not read" in report.cut
    assert evaluate_task(lm, task, records[:2]).cut is None
