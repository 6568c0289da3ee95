"""Evaluations of every kind of task, as `ratoon evaluate` leaves them: the real metrics on answers made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ratoon.base.seeds import stream
from ratoon.evaluate.metrics import tagging as tagging_metrics
from ratoon.evaluate.metrics.answers import answers
from ratoon.evaluate.metrics.classification import classification, multi_label
from ratoon.evaluate.metrics.likelihood import perplexity
from ratoon.evaluate.metrics.numbers import scores
from ratoon.evaluate.metrics.overlap import translation
from ratoon.evaluate.metrics.preference import preference
from ratoon.evaluate.metrics.value import Measured, compare

HOSTILE = "</script><script>alert('x')</script><!-- <img src=http://evil.example/a onerror=alert(1)> & \"q\" {{7*7}}"
FEW = {"resamples": 40}
Lines = list[dict[str, Any]]


def put(
    folder: Path, task: str, measure: str, measured: Measured, lines: Lines, *, told: bool = False, **more: Any
) -> Path:
    """A folder as `ratoon evaluate` leaves it; `told`: lines say what each record came to."""
    found = {"task": task, "measure": measure, "n": len(lines), **measured.as_dict(), "model": task, **more}
    each = found.pop("per_record")
    if told:
        lines = [{**one, "scores": {name: values[i] for name, values in each.items()}} for i, one in enumerate(lines)]
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(found), "utf-8")
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
    (folder / "predictions.jsonl").write_text(text, "utf-8")
    return folder


def guessed(expected: list[str], labels: list[str], lift: float, seed: int) -> tuple[list[str], np.ndarray]:
    """Answers to records and their probabilities; the right label is lifted."""
    random = stream(seed, "guessed")
    logits = random.normal(0, 1, (len(expected), len(labels)))
    logits[np.arange(len(expected)), [labels.index(one) for one in expected]] += lift
    wide = np.exp(1.5 * logits)
    believed = wide / wide.sum(axis=1, keepdims=True)
    return [labels[best] for best in believed.argmax(axis=1)], believed


def extras(measured: Measured, other: Measured, n: int) -> dict[str, Any]:
    """Every further part that an evaluation may hold."""
    main = measured.values[0]
    paired = compare(measured, other, main.name, **FEW).as_dict()
    points = [
        {"strength": s, "value": main.value - s, "interval": [main.value - s - 0.1, main.value - s + 0.1], "n": n,
         "flipped": s} for s in (0.0, 0.1, 0.4)
    ]  # fmt: skip
    scored = [{"strength": one["strength"], "score": one, "n": n, "flipped": 0.25} for one in points[:2]]
    turned = {"text": HOSTILE, "perturbed": HOSTILE, "before": "a", "after": "b"}
    spoken = {"name": "typos", "what": "neighbouring keys", "unit": "letter", "keeps_label": False}
    rows = {"read": 9, "trained": 4, "cut": 1, "split": 1, "dropped": 1, "duplicate": 1, "masked": 1}
    reasons = {HOSTILE: {"rows": 4, "tokens": 3, "places": [HOSTILE, "a:2", "a:3", "a:4"], "asked": False, "fates": {}}}
    account = {"rows": rows, "tokens": {**rows, "trained": 5}, "reasons": reasons, "notes": [HOSTILE]}
    return {
        "floors": [
            {"name": "[red]majority", "what": HOSTILE, "values": [one.as_dict() for one in other.values],
             "seconds": 0.25, "paired": paired},
        ],
        "against": [
            {"model": HOSTILE, "name": main.name, "value": main.value, "other": other.values[0].value, **paired}
        ],
        "robust": {"curves": [
            {**spoken, "points": scored, "examples": [turned]},
            {**spoken, "name": "case", "keeps_label": True, "points": points},
        ]},
        "attack": {"n": 9, "budget_queries": 40, "n_attacked": 7, "accuracy_before": 0.75, "accuracy_under_attack": 0.5,
                   "success": None, "mean_queries": 12.0,
                   "examples": [{"text": HOSTILE, "adversarial": HOSTILE, "substitutions": [["a", HOSTILE]]}]},
        "ledger": {"parts": {"train": account, "test": {**account, "rows": dict.fromkeys(rows, 0)}}},
        "base": {"name": HOSTILE, "what": HOSTILE, "values": [one.as_dict() for one in other.values], "seconds": 2.5,
                 "cut_tokens": 0, "paired": paired},
        "copies_of_training": 3,
        "without_copies": [one.as_dict() for one in other.values],
        "seconds": 61.0,
    }  # fmt: skip


def make_classification(folder: Path) -> Path:
    labels = [f"intent_{number:02d}" for number in range(75)] + ["[red]b", HOSTILE]
    expected = [labels[i % 77] for i in range(400)]
    answered, believed = guessed(expected, labels, 3.4, 1)
    measured = classification(expected, answered, labels, believed, **FEW)
    other = classification(expected, guessed(expected, labels, 2.0, 2)[0], labels, **FEW)
    lines = [
        {"id": f"r{i}", "place": f"test.csv:{i + 2}", "input": f"{HOSTILE if i < 3 else 'question'} number {i}",
         "expected": expected[i], "answer": answered[i], "probabilities": believed[i].tolist()} for i in range(400)
    ]  # fmt: skip
    return put(folder, "classification", "classification", measured, lines, **extras(measured, other, 400))


def make_tagging(folder: Path) -> Path:
    """English words and Chinese characters: entities of two types, some missed, some of the other type."""
    random = stream(3, "tags")
    lines: Lines = []
    for i in range(60):
        words = ["Kim", "met", "Ada", "Lovelace", "in", "Paris", "."] if i % 2 else list("王小明在北京见了李四")
        there = (
            ["B-PER", "O", "B-PER", "I-PER", "O", "B-LOC", "O"]
            if i % 2
            else ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O", "B-PER", "I-PER"]
        )
        found = [one if random.random() > 0.1 else random.choice(["O", "B-LOC", "I-PER"]) for one in there]
        lines.append(
            {
                "id": f"s{i}",
                "place": f"a.txt:{i}",
                "input": (" " if i % 2 else "").join(words),
                "expected": there,
                "answer": found,
            }
        )
    lines[1]["expected"][0] = "B-<b>"
    measured = tagging_metrics.tagging([one["expected"] for one in lines], [one["answer"] for one in lines], **FEW)
    return put(folder, "tagging", "tagging", measured, lines)


def make_answers(folder: Path) -> Path:
    lines = [
        {"id": f"q{i}", "place": f"dev.json:{i}", "input": f"第{i}个问题？\n\n{'长长的正文。' * 90}",
         "expected": ["北京", "北京", "北京市"],
         "answer": ["北京", "", HOSTILE, "北京西"][i % 4]} for i in range(32)
    ]  # fmt: skip
    measured = answers([one["expected"] for one in lines], [one["answer"] for one in lines], "zh", **FEW)
    return put(folder, "extractive", "answers", measured, lines, told=True)


def make_translation(folder: Path) -> Path:
    lines = [
        {"id": f"t{i}", "place": f"x.tsv:{i}", "input": "我爱北京" * (1 + i % 3),
         "expected": ["I love Beijing very much"],
         "answer": " ".join(["I", "love", "Beijing", "very", "much"][: 1 + i % 5])} for i in range(40)
    ]  # fmt: skip
    measured = translation([one["expected"] for one in lines], [one["answer"] for one in lines], "en", **FEW)
    return put(folder, "translation", "translation", measured, lines, told=True)


def make_numbers(folder: Path) -> Path:
    random = stream(4, "numbers")
    lines = [
        {"id": f"e{i}", "place": f"e.tsv:{i}", "input": "an essay " * 80, "expected": float(2 + i % 10),
         "answer": float(np.clip(2 + i % 10 + random.normal(0, 1), 2, 12))} for i in range(50)
    ]  # fmt: skip
    measured = scores([one["expected"] for one in lines], [one["answer"] for one in lines], 2, 12, 1, **FEW)
    return put(folder, "scoring", "numbers", measured, lines)


def make_multi(folder: Path) -> Path:
    labels = ["economy", "politics", "sport"]
    random = stream(5, "several")
    believed = random.random((80, 3))
    there = [[label for label, p, u in zip(labels, row, random.random(3), strict=True) if p > u] for row in believed]
    given = [[label for label, p in zip(labels, row, strict=True) if p > 0.5] for row in believed]
    measured = multi_label(there, given, labels, believed, **FEW)
    lines = [
        {"id": f"m{i}", "place": f"m.jsonl:{i}", "input": f"text {i}", "expected": there[i], "answer": given[i],
         "probabilities": believed[i].tolist()} for i in range(80)
    ]  # fmt: skip
    return put(folder, "multi-label", "multi_label", measured, lines)


def make_likelihood(folder: Path) -> Path:
    nats, tokens = [float(i + 1) for i in range(30)], [10] * 30
    lines: Lines = [
        {"id": f"d{i}", "place": f"d.jsonl:{i}", "input": f"talk {i}", "expected": ["hello"], "answer": None}
        for i in range(30)
    ]
    return put(folder, "dialogue", "perplexity", perplexity(nats, tokens), lines, told=True)


def make_preference(folder: Path) -> Path:
    given = ["chosen" if i % 3 else "rejected" for i in range(30)]
    margins = [(0.1 + i / 100) * (1 if answer == "chosen" else -1) for i, answer in enumerate(given)]
    measured = preference(margins, **FEW)
    lines = [
        {
            "id": f"p{i}",
            "place": f"p.jsonl:{i}",
            "input": f"ask {i}",
            "expected": "the better answer",
            "answer": given[i],
        }
        for i in range(30)
    ]
    base = preference([one / 2 for one in margins], **FEW)
    beside = {
        "name": "base",
        "what": "untrained, the same tokens",
        "values": [one.as_dict() for one in base.values],
        "seconds": 1.0,
        "cut_tokens": 0,
        "paired": compare(measured, base, "accuracy", **FEW).as_dict(),
        "moved": compare(measured, base, "margin", **FEW).as_dict(),
    }
    return put(folder, "preference", "preference", measured, lines, told=True, base=beside)


MAKERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "classification": (make_classification, 25),
    "tagging": (make_tagging, 25),
    "answers": (make_answers, 24),
    "translation": (make_translation, 25),
    "numbers": (make_numbers, 25),
    "multi": (make_multi, 25),
    "likelihood": (make_likelihood, 25),
    "preference": (make_preference, 10),
}
"""Makers of evaluations, and how many records the page shows at first."""
