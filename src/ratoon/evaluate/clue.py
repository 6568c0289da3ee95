"""CLUE: which parts the suite has, and their predictions as its site takes them.

Decides the parts' names, recipes and submission formats (Xu et al., arXiv:2004.05986; the formats are those of the
CLUE benchmark's baselines). What is measured is the tasks' own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ratoon.evaluate.metrics.tagging import spans
from ratoon.evaluate.task import Prediction

TNEWS_CODES = {
    "news_story": "100", "news_culture": "101", "news_entertainment": "102", "news_sports": "103",
    "news_finance": "104", "news_house": "106", "news_car": "107", "news_edu": "108", "news_tech": "109",
    "news_military": "110", "news_travel": "112", "news_world": "113", "news_stock": "114",
    "news_agriculture": "115", "news_game": "116",
}  # fmt: skip
"""The numbers of TNEWS's labels in its files."""


@dataclass(frozen=True)
class Part:
    """A part of the suite: the recipe that ships for it (a run of that name is looked for), and its file."""

    name: str
    recipe: str
    file: str
    what: str


PARTS = (
    Part("TNEWS", "clue-tnews", "tnews_predict.json", "topics of news titles"),
    Part("AFQMC", "clue-afqmc", "afqmc_predict.json", "whether two questions ask the same"),
    Part("CSL", "clue-csl", "csl_predict.json", "whether keywords belong to an abstract"),
    Part("WSC", "clue-wsc", "cluewsc_predict.json", "what a pronoun stands for"),
    Part("OCNLI", "clue-ocnli", "ocnli_50k_predict.json", "what follows from a sentence"),
    Part("CMNLI", "clue-cmnli", "cmnli_predict.json", "the same, translated"),
    Part("CMRC2018", "cmrc-zh", "cmrc2018_predict.json", "questions whose answer stands in a text"),
    Part("CLUENER", "clue-cluener", "cluener_predict.json", "entities of ten kinds"),
)


def submission(part: Part, predictions: Sequence[Prediction]) -> str:
    """The predictions as the site takes them: a JSON object a line, or for CMRC one object of answers by id.

    A row without an id of its own has its number in the file, from 0.
    """
    ids = [_id(one.record, number) for number, one in enumerate(predictions)]
    if part.name == "CMRC2018":
        return json.dumps({str(key): one.answer for key, one in zip(ids, predictions, strict=True)}, ensure_ascii=False)
    rows = []
    for key, one in zip(ids, predictions, strict=True):
        if part.name == "CLUENER":
            rows.append({"id": key, "label": entities(one.record.words, one.answer)})
        elif part.name == "TNEWS":
            rows.append({"id": key, "label": TNEWS_CODES.get(one.answer, one.answer), "label_desc": one.answer})
        else:
            rows.append({"id": key, "label": one.answer})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _id(record: Any, number: int) -> Any:
    if record.id == record.place:
        return number
    return int(record.id) if str(record.id).isdigit() else record.id


def entities(characters: Sequence[str], tags: Sequence[str]) -> dict[str, dict[str, list[list[int]]]]:
    """Tags of characters as CLUENER's {kind: {surface: [[begin, end], …]}}, ends included."""
    found: dict[str, dict[str, list[list[int]]]] = {}
    for kind, begin, stop in spans(tags):
        surface = "".join(characters[begin:stop])
        found.setdefault(kind, {}).setdefault(surface, []).append([begin, stop - 1])
    return found
