"""Floors for labels and numbers of whole texts: the commonest, the mean, and linear models on counted n-grams.

Decides the models: a linear support vector machine (hinge loss squared, C = 1) for labels, one against the rest, and
ridge regression for numbers. Both are scikit-learn's (extra `[eval]`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.evaluate.floor.features import Counted, beside, lengths, scaled, tokens
from ratoon.evaluate.floor.kinds import Labelled, LabelSets, Numbers, PairNumbers, Pairs
from ratoon.evaluate.metrics.libraries import library

RIDGE = 0.3
"""The penalty of the ridge regression; the features of a text have length 1 a kind."""
FOLDS = 4
"""Parts of training, each predicted from the others, that tell how far predictions are drawn to the mean."""
LENGTH_WEIGHT = 0.3
"""What the few features of length weigh against those of n-grams."""
_DENIALS = frozenset(("not", "no", "never", "nothing", "n't", "不", "没", "无", "非", "未", "别"))


def majority(train: Labelled | Pairs, n: int) -> list[str]:
    """The commonest label of training, the first in sorted order among equals, n times."""
    counts = Counter(train.labels)
    return [min(counts, key=lambda label: (-counts[label], label))] * n


def classify(train: Labelled, texts: Sequence[str], *, language: str, seed: int) -> list[str]:
    """A label for each text by TF-IDF and a linear SVM. Raises `ConfigError` where scikit-learn is missing."""
    counted = Counted(train.texts, language)
    if counted.is_empty:
        return majority(train, len(texts))
    return _svm(counted(train.texts), train.labels, counted(texts), seed)


def commonest_set(train: LabelSets, n: int) -> list[list[str]]:
    """The commonest set of labels, n times."""
    counts: Counter[tuple[str, ...]] = Counter(tuple(sorted(set(labels))) for labels in train.labels)
    commonest = min(counts, key=lambda one: (-counts[one], one))
    return [list(commonest) for _ in range(n)]


def classify_several(train: LabelSets, texts: Sequence[str], *, language: str, seed: int) -> list[list[str]]:
    """Labels for each text, each label against the rest. A text that no label takes gets the nearest one, unless
    training has texts without any."""
    counted = Counted(train.texts, language)
    labels = sorted({label for several in train.labels for label in several})
    if counted.is_empty or not labels:
        return commonest_set(train, len(texts))
    known, asked = counted(train.texts), counted(texts)
    margin_NK = np.empty((len(texts), len(labels)))
    for k, label in enumerate(labels):
        has = np.array([label in several for several in train.labels])
        if has.all():
            margin_NK[:, k] = 1.0
        else:
            model = library("sklearn.svm").LinearSVC(random_state=seed).fit(known, has)
            margin_NK[:, k] = model.decision_function(asked)
    never_empty = all(train.labels)
    found = []
    for margins_K in margin_NK:
        taken = [label for label, margin in zip(labels, margins_K, strict=True) if margin > 0]
        found.append(taken if taken or not never_empty else [labels[int(margins_K.argmax())]])
    return found


def pair_by_overlap(train: Pairs, test: Pairs, *, language: str, seed: int) -> list[str]:
    """A label for each pair from how much its two texts share, and nothing of what they say: logistic regression."""
    if len(set(train.labels)) < 2:
        return majority(train, len(test.labels))
    counted = Counted([*train.firsts, *train.seconds], language)
    known, asked = scaled(overlap(train, counted), overlap(test, counted))
    model = library("sklearn.linear_model").LogisticRegression(max_iter=1000, random_state=seed)
    return [str(label) for label in model.fit(known, list(train.labels)).predict(asked)]


def pair_by_words(train: Pairs, test: Pairs, *, language: str, seed: int) -> list[str]:
    """A label for each pair from its n-grams, those of the first and of the second text apart, and what they share."""
    counted = Counted([*train.firsts, *train.seconds], language)
    if counted.is_empty:
        return majority(train, len(test.labels))
    known, asked = _pair_features(train, test, counted)
    return _svm(known, train.labels, asked, seed)


def mean(train: Numbers | PairNumbers, test: Numbers | PairNumbers) -> list[float]:
    """The mean of training, of each group where there are groups; of all for a group that training does not have."""
    everywhere = float(np.mean(train.numbers))
    by_group = {group: float(np.mean([train.numbers[i] for i in rows])) for group, rows in _rows(train).items()}
    return [by_group.get(group, everywhere) for group in _groups(test)]


def regress(train: Numbers, test: Numbers, *, language: str, spread: bool = False) -> list[float]:
    """A number for each text by TF-IDF, its length, and ridge regression, each group alone; within the range that
    training has. A group that training does not have gets the mean.

    `spread`: predictions are stretched until they vary as the numbers of training do. A regression draws them to the
    mean, which is best for the squared error and bad for the agreement of graders (kappa).
    """
    found = mean(train, test)
    asked_rows = _rows(test)
    for group, rows in _rows(train).items():
        asked = asked_rows.get(group, [])
        numbers = np.array([train.numbers[i] for i in rows], dtype=np.float64)
        texts, asked_texts = [train.texts[i] for i in rows], [test.texts[i] for i in asked]
        counted = Counted(texts, language)
        if not asked or counted.is_empty:
            continue
        known_lengths, asked_lengths = scaled(lengths(texts), lengths(asked_texts))
        known = beside(counted(texts), known_lengths * LENGTH_WEIGHT)
        predicted = _ridge(known, numbers, beside(counted(asked_texts), asked_lengths * LENGTH_WEIGHT))
        if spread:
            predicted = _stretched(predicted, known, numbers)
        for i, number in zip(asked, predicted, strict=True):
            found[i] = float(number)
    return found


def regress_pairs(train: PairNumbers, test: PairNumbers, *, language: str) -> list[float]:
    """A number for each pair by ridge regression on what `pair_by_words` looks at."""
    counted = Counted([*train.firsts, *train.seconds], language)
    if counted.is_empty:
        return mean(train, test)
    known, asked = _pair_features(train, test, counted)
    return [float(n) for n in _ridge(known, np.array(train.numbers, dtype=np.float64), asked)]


def overlap(data: Pairs | PairNumbers, counted: Counted) -> npt.NDArray[np.float64]:
    """What the two texts of each pair share, (pairs, 8): tokens and pairs of tokens of both (Jaccard), the share of
    each that the other has, the cosine of their TF-IDF, their lengths, whether one denies and the other does not."""
    cosine = np.zeros(len(data.firsts))
    if not counted.is_empty:
        cosine = np.asarray(counted(data.firsts).multiply(counted(data.seconds)).sum(axis=1)).ravel()
    rows = []
    for first, second, alike in zip(data.firsts, data.seconds, cosine, strict=True):
        a, b = tokens(first), tokens(second)
        one, other = set(a), set(b)
        two, others = set(pairwise(a)), set(pairwise(b))
        both = len(one & other)
        rows.append(
            [
                both / max(1, len(one | other)),
                len(two & others) / max(1, len(two | others)),
                both / max(1, len(one)),
                both / max(1, len(other)),
                alike,
                np.log1p(len(a)) - np.log1p(len(b)),
                np.log1p(len(a) + len(b)),
                float(bool(one & _DENIALS) != bool(other & _DENIALS)),
            ]
        )
    return np.array(rows, dtype=np.float64)


def _pair_features(train: Pairs | PairNumbers, test: Pairs | PairNumbers, counted: Counted) -> tuple[Any, Any]:
    known_shared, asked_shared = scaled(overlap(train, counted), overlap(test, counted))
    known = beside(counted(train.firsts), counted(train.seconds), known_shared * LENGTH_WEIGHT)
    return known, beside(counted(test.firsts), counted(test.seconds), asked_shared * LENGTH_WEIGHT)


def _svm(known: Any, labels: Sequence[str], asked: Any, seed: int) -> list[str]:
    if len(set(labels)) < 2:
        return [labels[0]] * asked.shape[0]
    model = library("sklearn.svm").LinearSVC(random_state=seed).fit(known, list(labels))
    return [str(label) for label in model.predict(asked)]


def _ridge(known: Any, numbers: npt.NDArray[np.float64], asked: Any) -> npt.NDArray[np.float64]:
    model = library("sklearn.linear_model").Ridge(alpha=RIDGE, solver="sparse_cg").fit(known, numbers)
    predicted: npt.NDArray[np.float64] = np.asarray(model.predict(asked), dtype=np.float64)
    return _within(predicted, numbers)


def _stretched(
    predicted: npt.NDArray[np.float64], known: Any, numbers: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The predictions with the mean and spread of training's numbers, as far as predictions of numbers that were held
    out lack them."""
    fold = np.arange(len(numbers)) % FOLDS
    held_out = np.full(len(numbers), numbers.mean())
    for k in range(min(FOLDS, len(numbers))):
        if (fold != k).any():
            held_out[fold == k] = _ridge(known[fold != k], numbers[fold != k], known[fold == k])
    if held_out.std() == 0:
        return predicted
    stretched = (predicted - held_out.mean()) / held_out.std() * numbers.std() + numbers.mean()
    return _within(stretched, numbers)


def _within(predicted: npt.NDArray[np.float64], numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = float(numbers.min()), float(numbers.max())
    return np.array([min(max(float(one), low), high) for one in predicted])


def _groups(data: Numbers | PairNumbers) -> Sequence[str]:
    groups = data.groups if isinstance(data, Numbers) else None
    return [""] * len(data.numbers) if groups is None else groups


def _rows(data: Numbers | PairNumbers) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, group in enumerate(_groups(data)):
        found.setdefault(group, []).append(i)
    return found
