"""Robustness curves and the greedy attack, with models whose answers can be told by hand."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ratoon.base.errors import ConfigError, DataError, NumericError
from ratoon.base.seeds import stream
from ratoon.evaluate.attack import (
    BUDGET_QUERIES,
    attack,
    attack_all,
    surface_candidates,
    table_candidates,
)
from ratoon.evaluate.interval import share_interval
from ratoon.evaluate.metrics.classification import classification
from ratoon.evaluate.metrics.value import Measured
from ratoon.evaluate.robust import robustness
from ratoon.text.perturb import PERTURBATIONS, Material

LABELS = ["good", "bad"]
TEXTS = [f"the food was {word} and number {i} came home" for i in range(30) for word in LABELS] + ["饭菜不错"] * 4
EXPECTED = [word for _ in range(30) for word in LABELS] + ["good"] * 4


def by_word(texts: list[str]) -> list[str]:
    """Says bad where the word bad stands in small letters, and good otherwise."""
    return ["bad" if "bad" in text.split() else "good" for text in texts]


def score(expected: Sequence[str], predicted: Sequence[str]) -> Measured:
    return classification(expected, predicted, LABELS, resamples=200)


def test_a_curve_is_what_is_counted_by_hand() -> None:
    report = robustness(by_word, TEXTS, EXPECTED, score, names=["typos"], strengths=[0.3, 0.1], seed=5)
    curve = report.curve("typos")
    assert report.clean.value == 1.0 and report.n == 64
    assert curve.n_eligible == 60, "no letter in the Chinese ones"
    assert [point.strength for point in curve.points] == report.strengths == [0.0, 0.1, 0.3]
    for point in curve.points[1:]:
        broken = changed = eligible = edits = 0
        for place, text in enumerate(TEXTS[:60]):
            random = stream(5, "robustness", "typos", place)
            edited = PERTURBATIONS["typos"].apply(text, point.strength, random)
            broken += by_word([edited.text])[0] != EXPECTED[place]
            changed += edited.text != text
            edits, eligible = edits + edited.changed, eligible + edited.eligible
        assert broken > 5 * (point.strength > 0.2)
        assert (point.n, point.n_flipped, point.n_changed) == (60, broken, changed)
        assert point.score.value == pytest.approx(1 - broken / 60) and point.touched == pytest.approx(edits / eligible)
        assert point.drop is not None and point.drop.difference == pytest.approx(broken / 60)
        assert point.drop.interval is not None and point.drop.interval[0] <= broken / 60 <= point.drop.interval[1]
        assert point.as_dict()["flipped_interval"] == list(share_interval(broken, 60))
    assert curve.points[1].n_flipped < curve.points[2].n_flipped
    assert curve.points[0].score.value == 1.0 and curve.points[0].n_flipped == 0
    assert 1 <= len(curve.examples) <= 5
    for one in curve.examples:
        assert one.before == "bad" and one.after == "good" and by_word([one.perturbed]) == ["good"]
    json.dumps(report.as_dict())


def test_every_perturbation_has_a_curve_and_none_changes_another() -> None:
    texts = ["We met John Smith in Paris and he is good", "Then Mary Jones of Rome was bad", "这个酒店不好", *TEXTS]
    expected = ["good", "bad", "good", *EXPECTED]
    every = robustness(by_word, texts, expected, score, strengths=[0.5, 1.0])
    assert [curve.name for curve in every.curves] == list(PERTURBATIONS)
    for curve in every.curves:
        assert curve.points[-1].touched == 1.0 and curve.points[-1].n_changed == curve.n_eligible > 0
        alone = robustness(by_word, texts, expected, score, names=[curve.name], strengths=[1.0, 0.5])
        assert alone.curves[0].as_dict() == curve.as_dict()
    assert every.curve("entities").n_eligible == 2 and not every.curve("entities").keeps_label
    assert every.curve("width").points[-1].n_flipped == 31, "every text that says bad"
    assert every.curve("homophones").n_eligible == 5 and every.curve("homophones").points[-1].n_flipped == 0


def test_only_what_changed_is_asked_again_and_once() -> None:
    asked: list[str] = []

    def predict(texts: list[str]) -> list[str]:
        asked.extend(texts)
        return by_word(texts)

    robustness(predict, ["bad", "bad", "12"], ["bad", "bad", "good"], score, names=["width", "negation"], strengths=[1])
    assert asked == ["bad", "bad", "12", "ｂａｄ", "１２"]


def test_what_applies_nowhere_says_so_and_protected_spans_hold() -> None:
    report = robustness(by_word, ["bad", "good"], ["bad", "good"], score, names=["negation"])
    assert report.curves[0].n_eligible == 0 and report.curves[0].points == []
    spans = [[(0, len(text))] if "bad" in text else [] for text in TEXTS]
    held = robustness(by_word, TEXTS, EXPECTED, score, names=["typos"], strengths=[0.5], protected=spans)
    assert held.curve("typos").n_eligible == 30 and held.curve("typos").points[-1].n_flipped == 0
    loose = robustness(
        lambda texts: [len(text) for text in texts],
        TEXTS,
        EXPECTED,
        lambda expected, found: score(expected, ["good"] * len(found)),
        names=["spacing"],
        strengths=[1.0],
        same=lambda before, after: abs(before - after) < 99,
    )
    assert loose.curve("spacing").points[-1].n_flipped == 0


def test_bad_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        robustness(by_word, TEXTS, EXPECTED, score, names=["typoes"])
    with pytest.raises(ConfigError, match="strength"):
        robustness(by_word, TEXTS, EXPECTED, score, strengths=[1.5])
    with pytest.raises(ConfigError, match="no names"):
        robustness(by_word, ["bad"], ["bad"], score, names=["entities"], material=Material())
    with pytest.raises(DataError, match="2 predictions for 64"):
        robustness(lambda texts: ["good"] * 2, TEXTS, EXPECTED, score)
    with pytest.raises(DataError, match="0 texts"):
        robustness(by_word, [], [], score)
    with pytest.raises(ConfigError, match="was not measured"):
        robustness(by_word, TEXTS, EXPECTED, score, names=["case"]).curve("typos")


WEIGHTS = {"great": 1.5, "nice": 1.0, "awful": -4.0, "dull": -0.5}


class Counting:
    """Two labels by the weights of words; counts the texts it was shown."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.batches: list[int] = []

    def __call__(self, texts: list[str]) -> npt.NDArray[np.float64]:
        self.asked += texts
        self.batches.append(len(texts))
        weights = np.array([sum(WEIGHTS.get(word, 0.0) for word in text.split()) + 0.2 for text in texts])
        positive = 1 / (1 + np.exp(-weights))
        return np.stack([1 - positive, positive], axis=1)


def test_the_greedy_search_takes_the_words_that_matter_in_their_order() -> None:
    model = Counting()
    table = table_candidates({"great": ["grand", "dull"], "film": ["picture"], "nice": ["awful", "fine"]})
    found = attack(model, "a great and nice film", 1, candidates=[table])
    # 1 for the text, 5 without a word each, 2 for great (kept: dull), 2 for nice (awful turns it).
    assert found.queries == len(model.asked) == 10
    assert model.asked[1:6] == [
        "a and nice film",
        "a great and film",
        "a great and nice",
        "a great nice film",
        "great and nice film",
    ]
    assert found.adversarial == "a dull and awful film"
    assert found.substitutions == (("great", "dull"), ("nice", "awful"))
    assert (found.before, found.after, found.n_words) == (1, 0, 5)
    assert found.probability_before == pytest.approx(1 / (1 + math.exp(-2.7)))
    assert found.probability_after == pytest.approx(1 / (1 + math.exp(4.3)))


def test_limits_of_the_search() -> None:
    table = table_candidates({"great": ["grand"], "nice": ["fine"]})
    text = "a great and nice film"
    both = attack(Counting(), f"{text} dull", 1, candidates=[table])
    assert both.adversarial is not None and len(both.substitutions) == 2
    one = attack(Counting(), f"{text} dull", 1, candidates=[table], most_changed=0.3)
    assert one.adversarial is None and one.substitutions == (("great", "grand"),) and one.after == 1
    kept = attack(Counting(), f"{text} dull", 1, candidates=[table], protected=[(2, 7)])
    assert kept.adversarial is None and kept.substitutions == (("nice", "fine"),)
    for budget in range(1, 12):
        model = Counting()
        found = attack(model, text, 1, budget=budget)
        assert found.queries == len(model.asked) <= budget
    wrong = Counting()
    found = attack(wrong, text, 0)
    assert not found.was_correct and found.queries == 1 and found.adversarial is None
    single = Counting()
    found = attack(single, "great", 1, candidates=[table_candidates({"great": ["dull"]})])
    assert found.adversarial == "dull" and "" not in single.asked
    assert attack(Counting(), "", 1).queries == 1


def test_side_by_side_is_one_after_another() -> None:
    texts = [
        f"{a} {b} film number {i}" for i, (a, b) in enumerate([("great", "nice"), ("nice", "x"), ("dull", "x")] * 9)
    ]
    labels = [1, 1, 0] * 9
    together, apart = Counting(), Counting()
    report = attack_all(together, texts, labels, budget=30, at_once=7)
    alone = [attack(apart, text, label, budget=30) for text, label in zip(texts, labels, strict=True)]
    assert report.attacks == alone and sorted(together.asked) == sorted(apart.asked)
    assert max(together.batches) > max(apart.batches)
    facts = report.as_dict()
    assert facts["n"] == 27 and facts["n_attacked"] == 27 and facts["accuracy_before"] == 1.0
    won = sum(one.adversarial is not None for one in alone)
    assert (
        0 < won < 27 and facts["success"] == won / 27 and facts["accuracy_under_attack"] == pytest.approx(1 - won / 27)
    )
    assert facts["success_interval"] == list(share_interval(won, 27))
    assert facts["mean_queries"] == pytest.approx(sum(one.queries for one in alone) / 27)
    assert sum(facts["survived"]) == 27 - won
    for example in facts["examples"]:
        answer = int(Counting()([example["adversarial"]])[0].argmax())
        assert answer != example["label"]
    json.dumps(facts)


def test_surface_candidates_are_mistakes_a_reader_sees_through() -> None:
    found = surface_candidates("the price rose", 4, 9)
    assert "prcie" in found and "prce" in found and "pr\u0456ce" in found and "price" not in found
    assert len(found) == len(set(found)) > 10
    assert all(abs(len(other) - 5) <= 1 for other in found)
    chinese = surface_candidates("银行加息", 2, 3)
    assert "家" in chinese and all(len(other) == 1 for other in chinese)
    assert table_candidates({"rise": ["climb"]})("Rise now", 0, 4) == ["Climb"]
    found_zh = attack(
        lambda texts: [[0.1, 0.9] if "涨" in text else [0.8, 0.2] for text in texts],
        "股价大涨三成",
        1,
        most_changed=0.2,
    )
    assert found_zh.adversarial is not None and "涨" not in found_zh.adversarial and len(found_zh.adversarial) == 6


def test_bad_attacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="budget 0"):
        attack(Counting(), "great", 1, budget=0)
    with pytest.raises(DataError, match="label 2"):
        attack(Counting(), "great", 2)
    with pytest.raises(DataError, match="shape"):
        attack(lambda texts: [0.5] * len(texts), "great", 0)
    with pytest.raises(NumericError):
        attack(lambda texts: [[float("nan"), 1.0]] * len(texts), "great", 0)
    with pytest.raises(DataError, match="0 texts"):
        attack_all(Counting(), [], [])


def test_a_real_model_falls(shared_data: Path) -> None:
    """Mistakes and attacks lower the accuracy of counted words on banking77; stronger ones lower it more."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    def rows(name: str) -> tuple[list[str], list[str]]:
        with gzip.open(shared_data / "banking77" / name, "rt", encoding="utf-8", newline="") as file:
            read = [row for row in csv.DictReader(file) if row["category"] < "c"]
        return [row["text"] for row in read], [row["category"] for row in read]

    texts, labels = rows("train.csv.gz")
    model = make_pipeline(TfidfVectorizer(), MultinomialNB(alpha=0.1)).fit(texts, labels)
    names = [str(one) for one in model.classes_]
    test_texts, test_labels = rows("test.csv.gz")
    report = robustness(
        lambda some: [str(one) for one in model.predict(some)],
        test_texts,
        test_labels,
        lambda expected, found: classification(expected, found, names, resamples=100),
        names=["typos", "case"],
        strengths=[0.1, 0.5],
    )
    typos = [point.score.value or 0.0 for point in report.curve("typos").points]
    assert typos[0] > 0.9 > typos[1] + 0.02 > typos[2] + 0.3
    assert report.curve("case").points[-1].n_flipped == 0, "this model reads small letters only"
    places = [names.index(label) for label in test_labels[::6]]
    facts = attack_all(model.predict_proba, test_texts[::6], places, budget=BUDGET_QUERIES).as_dict()
    assert facts["accuracy_before"] > 0.85 and facts["accuracy_under_attack"] < 0.5
    assert facts["mean_queries"] < BUDGET_QUERIES and facts["mean_changed_words"] < 0.4


def test_a_turned_answer_goes_before_a_lower_probability() -> None:
    table = {"a b": [0.6, 0.2, 0.2], "a c": [0.35, 0.4, 0.25], "a d": [0.34, 0.33, 0.33], "a": [0.5, 0.3, 0.2]}
    found = attack(
        lambda texts: [table.get(text, [0.6, 0.2, 0.2]) for text in texts],
        "a b",
        0,
        candidates=[table_candidates({"b": ["c", "d"]})],
    )
    assert found.adversarial == "a c" and found.after == 1
