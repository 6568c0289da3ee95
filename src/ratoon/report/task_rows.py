"""The records of a measured task as the page's browser of errors wants them: small, and what can be filtered named.

Decides what counts as an error for the eye, what the records can be sorted by, and which are held where there are more
than a page bears. How right an answer is was measured in `evaluate/`; where it said so of each record, that is shown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ratoon.report.task_records import Evaluation, number

MOST_ROWS = 4000
MOST_CHARACTERS = 4_000_000
"""What a page holds of the records: about as much as a telephone searches without a wait."""
SHOWN_LABELS = 3
"""Probabilities shown of a record: the likeliest, and that of the expected label."""
KINDS = {
    "classification": "label",
    "multi_label": "labels",
    "tagging": "tags",
    "numbers": "number",
    "answers": "texts",
    "translation": "texts",
    "summaries": "texts",
    "preference": "choice",
    "perplexity": "likelihood",
}
Entity = tuple[int, int, str]
"""First word, the one behind the last, type."""


@dataclass(frozen=True)
class Browser:
    """What the browser of errors is given. `kind` says how a record is shown; `rows` are those held of `total`;
    `expected` and `answered`: what can be filtered by, with how often it occurs; `orders`: names of phrases, the first
    is taken; `judged`: whether records are right or wrong."""

    kind: str
    rows: list[dict[str, Any]]
    total: int
    expected: list[tuple[str, int]]
    answered: list[tuple[str, int]]
    orders: list[str]
    judged: bool
    types: list[str]

    @property
    def errors(self) -> int:
        """Records held that are wrong."""
        return sum(bool(row.get("wrong")) for row in self.rows)


def browser(evaluation: Evaluation) -> Browser | None:
    """The records of an evaluation; None where there are none to show."""
    kind = KINDS.get(evaluation.measure, "texts")
    labels = [one["label"] for one in evaluation.tables.get("per_class") or []]
    rows = [_row(kind, evaluation, one, labels) for one in evaluation.predictions]
    if kind == "likelihood":
        rows = [row for row in rows if "score" in row]
    if not rows:
        return None
    orders = _orders(kind, rows, evaluation)
    judged = any(row.get("wrong") is not None for row in rows)
    held = _held(rows, orders[0], judged)
    filtered = ("expected_of", "answered_of")
    counts = [Counter(label for row in rows for label in row.get(key, ())) for key in filtered]
    types = sorted({entity[2] for row in rows for key in ("there", "found") for entity in row.get(key, ())})
    listed = [sorted(found.items()) for found in counts]
    return Browser(kind, held, len(rows), listed[0], listed[1], orders, judged, types)


def spans(tags: list[str]) -> list[Entity]:
    """The entities of IOB tags: one begins at B-, and at an I- behind O or behind another type."""
    found: list[Entity] = []
    began, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        letter, _, this = tag.partition("-")
        if kind and (letter != "I" or this != kind):
            found.append((began, place, kind))
            kind = ""
        if this and not kind:
            began, kind = place, this
    return found


def _row(kind: str, evaluation: Evaluation, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """A record: id, place, input, and by kind what was expected, answered, and how wrong that is."""
    expected, answer = line.get("expected"), line.get("answer")
    row: dict[str, Any] = {
        "id": str(line.get("id", "")),
        "place": str(line.get("place", "")),
        "input": str(line.get("input", "")),
    }
    if row["id"] == row["place"]:
        row["id"] = ""
    make = {"label": _label, "labels": _labels, "tags": _tags, "number": _number, "choice": _choice}
    row |= make.get(kind, _texts)(expected, answer, line, labels)
    scores = line.get("scores")
    if isinstance(scores, dict) and kind in ("texts", "likelihood"):
        names = [one.name for one in evaluation.values if number(scores.get(one.name)) is not None]
        row["scores"] = {name: round(float(scores[name]), 4) for name in names}
        if names:
            row["score"] = row["scores"][names[0]]
        if "exact_match" in scores:
            row["wrong"] = scores["exact_match"] < 1
    return row


def _label(expected: Any, answer: Any, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"answer": answer, "answered_of": [str(answer)]}
    if expected is not None:
        row |= {"expected": expected, "wrong": expected != answer, "expected_of": [str(expected)]}
    given = line.get("probabilities")
    if given and len(given) == len(labels):
        believed = dict(zip(labels, given, strict=True))
        row["sure"] = believed.get(answer, 0.0)
        likeliest = sorted(believed, key=lambda label: -believed[label])[:SHOWN_LABELS]
        shown = [*likeliest, *([expected] if expected in believed and expected not in likeliest else [])]
        row["top"] = [[label, round(believed[label], 4)] for label in shown]
    return row


def _labels(expected: Any, answer: Any, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    answered = [str(one) for one in answer or []]
    row: dict[str, Any] = {"answer": answered, "answered_of": answered or [""]}
    if expected is not None:
        there = [str(one) for one in expected]
        row |= {"expected": there, "wrong": set(there) != set(answered), "expected_of": there or [""]}
    given = line.get("probabilities")
    if given and len(given) == len(labels):
        believed = dict(zip(labels, given, strict=True))
        row["sure"] = round(min(max(one, 1 - one) for one in given), 4)
        shown = sorted(believed, key=lambda label: -believed[label])
        likeliest = shown[:SHOWN_LABELS]
        also = [one for one in shown[SHOWN_LABELS:] if one in answered or one in (expected or [])]
        row["top"] = [[label, round(believed[label], 4)] for label in (*likeliest, *also)]
    return row


def _tags(expected: Any, answer: Any, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    tags = [str(one) for one in answer or []]
    words, joined = _words(line, len(tags))
    found = spans(tags)
    row: dict[str, Any] = {"words": words, "join": joined, "found": found}
    row["answered_of"] = sorted({one[2] for one in found}) or [""]
    if expected is not None:
        there = spans([str(one) for one in expected])
        row |= {"there": there, "wrong": there != found, "off": len(set(there) ^ set(found))}
        row["expected_of"] = sorted({one[2] for one in there}) or [""]
    return row


def _words(line: dict[str, Any], n: int) -> tuple[list[str], str]:
    """The words that the tags stand on, and what joins them: those of the record where it names them, else those that
    the text's spaces part, else its characters; none where neither has a tag each."""
    text = str(line.get("input", ""))
    told = line.get("words")
    for words, joined in (([str(one) for one in told or []], ""), (text.split(" "), " "), (list(text), "")):
        if len(words) == n:
            return words, " " if " ".join(words) == text else joined
    return [], ""


def _number(expected: Any, answer: Any, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"answer": number(answer)}
    there, given = number(expected), number(answer)
    if there is not None:
        row["expected"] = there
        if given is not None:
            row["off"] = given - there
    if line.get("group"):
        row["group"] = str(line["group"])
    return row


def _choice(expected: Any, answer: Any, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """A pair of answers: the model finds the one that people chose likelier, or the other."""
    return {"answer": answer, "expected": [str(expected)], "wrong": answer != "chosen", "answered_of": [str(answer)]}


def _texts(expected: Any, answer: Any, line: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"answer": None if answer is None else str(answer)}
    if expected is not None:
        given = expected if isinstance(expected, list | tuple) else [expected]
        row["expected"] = list(dict.fromkeys(str(one) for one in given))
    return row


def _orders(kind: str, rows: list[dict[str, Any]], evaluation: Evaluation) -> list[str]:
    """What the records can be sorted by: names of phrases."""
    if kind == "likelihood":
        return ["sort_surprise", "sort_file"]
    if kind in ("label", "labels") and any("sure" in row for row in rows):
        return ["sort_sure", "sort_unsure", "sort_file"]
    if kind == "tags" and any("off" in row for row in rows):
        return ["sort_wrong", "sort_file"]
    if kind == "number" and any("off" in row for row in rows):
        return ["sort_far", "sort_file"]
    if any("score" in row for row in rows):
        return ["sort_worst", "sort_best", "sort_file"]
    return ["sort_file"]


SORTED_BY = {
    "sort_sure": ("sure", -1),
    "sort_unsure": ("sure", 1),
    "sort_wrong": ("off", -1),
    "sort_far": ("off", -1),
    "sort_worst": ("score", 1),
    "sort_best": ("score", -1),
    "sort_surprise": ("score", -1),
}
"""The key of a record that an order goes by (its size), and 1 for ascending."""


def _held(rows: list[dict[str, Any]], order: str, judged: bool) -> list[dict[str, Any]]:
    """As many records as a page bears, in the order of the file: errors first where records are right or wrong."""
    key, sign = SORTED_BY.get(order, ("", 1))

    def rank(place: int) -> tuple[bool, float, int]:
        row = rows[place]
        value = row.get(key)
        return judged and not row.get("wrong"), sign * abs(value) if value is not None else 0.0, place

    kept: list[int] = []
    room = MOST_CHARACTERS
    for place in sorted(range(len(rows)), key=rank)[:MOST_ROWS]:
        room -= len(rows[place]["input"]) + 200
        if room < 0 and kept:
            break
        kept.append(place)
    return [rows[place] for place in sorted(kept)]
