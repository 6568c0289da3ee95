"""CLUE: which parts the suite has, and their predictions as its site takes them.

Decides the parts' names, recipes, files and submission formats (Xu et al., arXiv:2004.05986; layout, names and formats
as in the CLUE benchmark's public baselines). What is measured is the tasks' own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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


ROLES = {
    "train": ("train.json", "train.50k.json", "train.10k.json", "cmrc2018_train.json", "trial.json",
              "cmrc2018_trial.json"),
    "dev": ("dev.json", "cmrc2018_dev.json"),
}  # fmt: skip
"""How a part's files with answers are called, the first that is there is taken; each may also end in .gz."""


@dataclass(frozen=True)
class Part:
    """A part of the suite: the recipe that ships for it (a run of that name is looked for), the file of its
    submission, how its folder is called, and its test files with what the site calls their answers, where these are not
    `test.json` and `file`."""

    name: str
    recipe: str
    file: str
    what: str
    folders: tuple[str, ...]
    named_tests: tuple[tuple[str, str], ...] = ()

    def files(self, folder: Path) -> dict[str, Path]:
        """The files with answers below the suite's `folder` by role (train, dev), as far as they are there."""
        found = {role: self._first(folder, names) for role, names in ROLES.items()}
        return {role: path for role, path in found.items() if path is not None}

    def tests(self, folder: Path) -> dict[str, Path]:
        """The test files below the suite's `folder` by the name of their submission, as far as they are there."""
        found: dict[str, Path] = {}
        for name, file in self.named_tests or (("test.json", self.file),):
            path = self._first(folder, [name])
            if path is not None:
                found.setdefault(file, path)
        return found

    def _first(self, folder: Path, names: Sequence[str]) -> Path | None:
        places = (folder / own / (name + end) for own in self.folders for name in names for end in ("", ".gz"))
        return next(filter(Path.is_file, places), None)


PARTS = (
    Part("TNEWS", "clue-tnews", "tnews_predict.json", "topics of news titles", ("tnews_public", "tnews"),
         (("test1.0.json", "tnews10_predict.json"), ("test.json", "tnews11_predict.json"))),
    Part("AFQMC", "clue-afqmc", "afqmc_predict.json", "whether two questions ask the same", ("afqmc_public", "afqmc")),
    Part("CSL", "clue-csl", "csl_predict.json", "whether keywords belong to an abstract", ("csl_public", "csl")),
    Part("WSC", "clue-wsc", "cluewsc_predict.json", "what a pronoun stands for",
         ("cluewsc2020_public", "cluewsc2020", "wsc_public"),
         (("test1.0.json", "cluewsc10_predict.json"), ("test.json", "cluewsc11_predict.json"))),
    Part("OCNLI", "clue-ocnli", "ocnli_50k_predict.json", "what follows from a sentence", ("ocnli_public", "ocnli")),
    Part("CMNLI", "clue-cmnli", "cmnli_predict.json", "the same, translated", ("cmnli_public", "cmnli")),
    Part("CMRC2018", "cmrc-zh", "cmrc2018_predict.json", "questions whose answer stands in a text",
         ("cmrc2018_public", "cmrc2018"),
         (("test.json", "cmrc2018_predict.json"), ("cmrc2018_test_2k.json", "cmrc2018_predict.json"))),
    Part("CLUENER", "clue-cluener", "cluener_predict.json", "entities of ten kinds",
         ("cluener_public", "cluener2020", "cluener")),
)  # fmt: skip


def submission(part: Part, predictions: Sequence[Prediction]) -> str:
    """The predictions as the site takes them: a JSON object a line, or for CMRC one object of answers by id.

    A row without an id of its own has its number in the file, from 0.
    """
    ids = [_id(one.record) for one in predictions]
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


def _id(record: Any) -> Any:
    if record.id == record.place:
        return int(record.place.rpartition(":")[2]) - 1
    return int(record.id) if str(record.id).isdigit() else record.id


def entities(characters: Sequence[str], tags: Sequence[str]) -> dict[str, dict[str, list[list[int]]]]:
    """Tags of characters as CLUENER's {kind: {surface: [[begin, end], …]}}, ends included."""
    found: dict[str, dict[str, list[list[int]]]] = {}
    for kind, begin, stop in spans(tags):
        surface = "".join(characters[begin:stop])
        found.setdefault(kind, {}).setdefault(surface, []).append([begin, stop - 1])
    return found
