"""Which floors a task has, and their predictions for its test records.

One door: `floors`. Decides what stands beside which task; how each floor works stands in the files beside this one, and
what its predictions are worth is measured as the model's are.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import derive, stream
from ratoon.evaluate.floor import labels, questions, tags, targets, tokens
from ratoon.evaluate.floor.features import few_enough
from ratoon.evaluate.floor.kinds import (
    Data,
    Floor,
    Labelled,
    LabelSets,
    Learned,
    Numbers,
    PairNumbers,
    Pairs,
    Questions,
    Sources,
    Tagged,
    n_records,
)

_Predict: TypeAlias = Callable[[Any, Any, str, int], list[Any]]
"""From training, test, language and a seed to predictions."""


@dataclass(frozen=True)
class _Way:
    name: str
    what: str
    predict: _Predict


_CLASSIFY = (
    _Way(
        "majority", "the commonest label", lambda train, test, language, seed: labels.majority(train, n_records(test))
    ),
    _Way(
        "tfidf-svm",
        "TF-IDF of n-grams, linear SVM",
        lambda train, test, language, seed: labels.classify(train, test.texts, language=language, seed=seed),
    ),
)
_SEVERAL = (
    _Way(
        "majority",
        "the commonest set of labels",
        lambda train, test, language, seed: labels.commonest_set(train, n_records(test)),
    ),
    _Way(
        "tfidf-svm",
        "TF-IDF of n-grams, a linear SVM for each label",
        lambda train, test, language, seed: labels.classify_several(train, test.texts, language=language, seed=seed),
    ),
)
_PAIRS = (
    _Way(
        "majority", "the commonest label", lambda train, test, language, seed: labels.majority(train, n_records(test))
    ),
    _Way(
        "overlap",
        "what the two texts share, logistic regression",
        lambda train, test, language, seed: labels.pair_by_overlap(train, test, language=language, seed=seed),
    ),
    _Way(
        "tfidf-svm",
        "TF-IDF of both texts and what they share, linear SVM",
        lambda train, test, language, seed: labels.pair_by_words(train, test, language=language, seed=seed),
    ),
)
_PAIR_NUMBERS = (
    _Way("mean", "the mean of training", lambda train, test, language, seed: labels.mean(train, test)),
    _Way(
        "tfidf-ridge",
        "TF-IDF of both texts and what they share, ridge regression",
        lambda train, test, language, seed: labels.regress_pairs(train, test, language=language),
    ),
)
_NUMBERS = (
    _Way("mean", "the mean of training, by group", lambda train, test, language, seed: labels.mean(train, test)),
    _Way(
        "tfidf-ridge",
        "TF-IDF of n-grams and length, ridge regression by group",
        lambda train, test, language, seed: labels.regress(train, test, language=language),
    ),
    _Way(
        "tfidf-ridge-spread",
        "the same, stretched to the spread of training",
        lambda train, test, language, seed: labels.regress(train, test, language=language, spread=True),
    ),
)
_TAGS = (
    _Way("majority", "the commonest tag", lambda train, test, language, seed: tags.commonest_tag(train, test)),
    _Way(
        "word", "each word's commonest tag, O if unseen", lambda train, test, language, seed: tags.by_word(train, test)
    ),
    _Way(
        "word-shape",
        "each word's commonest tag, that of its shape if unseen",
        lambda train, test, language, seed: tags.by_word_or_shape(train, test),
    ),
    _Way("name", "names of training found again", lambda train, test, language, seed: tags.by_name(train, test)),
)
_NEAREST = _Way(
    "nearest",
    "the target of the nearest training source by TF-IDF",
    lambda train, test, language, seed: targets.nearest(train, test.sources, language=language),
)
_COPY = _Way("copy", "the source itself", lambda train, test, language, seed: targets.copy(test.sources))
_LEADS = (
    _Way("lead-1", "the first sentence", lambda train, test, language, seed: targets.lead(test.sources, 1)),
    _Way("lead-3", "the first 3 sentences", lambda train, test, language, seed: targets.lead(test.sources, 3)),
)
_QUESTIONS = (
    _Way(
        "sentence",
        "the sentence that shares most with the question",
        lambda train, test, language, seed: questions.best_sentence(train, test),
    ),
    _Way(
        "span",
        "a span of that sentence, by nearness and the looks of training's answers",
        lambda train, test, language, seed: questions.best_span(train, test),
    ),
)

_LIKELIHOOD = (
    _Way(
        "unigram",
        "how often each token was learned",
        lambda train, test, language, seed: tokens.likelihood(train, test, 1),
    ),
    _Way(
        "trigram",
        "counts of three tokens, two and one, discounted",
        lambda train, test, language, seed: tokens.likelihood(train, test, 3),
    ),
)

FLOORS: dict[str, dict[type, tuple[_Way, ...]]] = {
    "classification": {Labelled: _CLASSIFY},
    "multi-label": {LabelSets: _SEVERAL},
    "pairs": {Pairs: _PAIRS},
    "pair-scoring": {PairNumbers: _PAIR_NUMBERS},
    "scoring": {Numbers: _NUMBERS},
    "tagging": {Tagged: _TAGS},
    "translation": {Sources: (_COPY, _NEAREST)},
    "summarization": {Sources: _LEADS},
    "extractive": {Questions: _QUESTIONS},
    "question-answering": {Questions: _QUESTIONS, Sources: (_NEAREST,)},
    "dialogue": {Learned: _LIKELIHOOD},
    "generation": {Learned: _LIKELIHOOD},
}
"""The floors of each task, by the shape of its records."""


def floors(task_name: str, train: Data, test: Data, *, language: str = "en", seed: int = 1) -> list[Floor]:
    """The predictions of every floor of a task for its test records, the dumbest floor first.

    `train` and `test` have the same shape (`kinds.py`); the answers of `test` are not looked at. `language`: "zh"
    counts characters, any other counts words and their parts. Training texts beyond some six million characters are
    left out by chance (`Floor.n_train`). Raises `ConfigError` for a task without floors and where scikit-learn is
    missing (extra `[eval]`), `DataError` for records of another shape and for none.
    """
    if task_name not in FLOORS:
        near = difflib.get_close_matches(task_name, FLOORS, n=1)
        raise ConfigError(
            f"the task '{task_name}' has no floor",
            expected=", ".join(FLOORS),
            fix=f"did you mean '{near[0]}'?" if near else None,
        )
    ways = FLOORS[task_name].get(type(train))
    if ways is None or type(test) is not type(train):
        raise DataError(
            f"training records {type(train).__name__} and test records {type(test).__name__} for {task_name}",
            expected=" or ".join(kind.__name__ for kind in FLOORS[task_name]) + ", the same for both",
        )
    if not n_records(train) or not n_records(test):
        raise DataError(
            f"{n_records(train)} training and {n_records(test)} test records", expected="at least one of each"
        )
    train = _few_enough(train, seed)
    found = []
    for way in ways:
        begun = time.perf_counter()
        predictions = way.predict(train, test, language, derive(seed, "floor", way.name) % 2**31)
        seconds = time.perf_counter() - begun
        assert len(predictions) == n_records(test), "a prediction for each test record"
        found.append(Floor(way.name, way.what, predictions, seconds, n_records(train)))
    return found


def _few_enough(train: Data, seed: int) -> Data:
    """The training records, or as many of them, drawn by chance, as a floor reads in seconds."""
    texts = _texts(train)
    if texts is None:
        return train
    rows = few_enough(texts, stream(seed, "floor training"))
    if len(rows) == len(texts):
        return train
    kept: dict[str, Any] = {
        name: value if value is None else [value[i] for i in rows] for name, value in vars(train).items()
    }
    return type(train)(**kept)


def _texts(data: Data) -> Sequence[str] | None:
    """What a floor reads of each record; None where look-ups are quick however many there are."""
    if isinstance(data, Labelled | LabelSets | Numbers):
        return data.texts
    if isinstance(data, Pairs | PairNumbers):
        return [first + second for first, second in zip(data.firsts, data.seconds, strict=True)]
    return data.sources if isinstance(data, Sources) else None
