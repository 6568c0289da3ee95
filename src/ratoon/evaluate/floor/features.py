"""Texts as counted n-grams, for the linear models among the floors.

Decides what is counted: words and pairs of words, and 2 to 5 characters inside words; in Chinese 1 to 3 characters. The
counts are weighted by TF-IDF with dampened term frequency, as scikit-learn does it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.evaluate.metrics.libraries import library
from ratoon.text.homophones import HAN

MOST_CHARACTERS = 6_000_000
"""Characters of training texts read by a floor: some ten seconds."""

STEADY = 1e-9
"""A feature that varies less in training is taken as constant; rounding makes such spreads."""

_TOKEN = re.compile(f"[{HAN}]|(?:(?![{HAN}])\\w)+")
_SENTENCE_END = re.compile("[.!?。！？…]+")


def tokens(text: str) -> list[str]:
    """Words of scripts that spell, single Chinese characters, numbers; small letters."""
    return _TOKEN.findall(text.lower())


class Counted:
    """TF-IDF features of texts, fitted on training texts."""

    def __init__(self, texts: Sequence[str], language: str) -> None:
        """Raises `ConfigError` where scikit-learn is missing."""
        vectorizer = library("sklearn.feature_extraction.text").TfidfVectorizer
        if language == "zh":
            kinds = [{"analyzer": "char", "ngram_range": (1, 3)}]
        else:
            words = {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
            kinds = [words, {"analyzer": "char_wb", "ngram_range": (2, 5)}]
        self._fitted: list[Any] = []
        for kind in kinds:
            try:
                self._fitted.append(vectorizer(sublinear_tf=True, dtype=np.float64, **kind).fit(texts))
            except ValueError:  # no text holds anything that this kind counts
                continue

    @property
    def is_empty(self) -> bool:
        """Whether the training texts hold nothing to count."""
        return not self._fitted

    def __call__(self, texts: Sequence[str]) -> Any:
        """The features of `texts`, a sparse matrix (texts, n-grams); each kind of n-gram has length 1 a text."""
        return library("scipy.sparse").hstack([one.transform(texts) for one in self._fitted]).tocsr()


def lengths(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """How long and how varied each text is, (texts, 6): what graders of essays follow more than they would say."""
    rows = []
    for text in texts:
        words = tokens(text)
        n, distinct = len(words), len(set(words))
        sentences = len(_SENTENCE_END.findall(text))
        rows.append(
            [
                np.log1p(len(text)),
                np.log1p(n),
                n**0.5,
                distinct**0.5,
                distinct / max(1.0, n**0.5),
                np.log1p(sentences),
            ]
        )
    return np.array(rows, dtype=np.float64)


def scaled(train: npt.NDArray[np.float64], test: npt.NDArray[np.float64]) -> tuple[Any, Any]:
    """Dense features with mean 0 and spread 1 in training, as sparse matrices beside those of n-grams."""
    sparse = library("scipy.sparse")
    middle, spread = train.mean(axis=0), train.std(axis=0)
    spread = np.where(spread > STEADY, spread, 1.0)
    return sparse.csr_matrix((train - middle) / spread), sparse.csr_matrix((test - middle) / spread)


def beside(*parts: Any) -> Any:
    """Feature matrices of the same texts, side by side."""
    return library("scipy.sparse").hstack(parts).tocsr()


def few_enough(texts: Sequence[str], random: np.random.Generator) -> list[int]:
    """Records that a floor reads: all in their order, or as many drawn ones as hold `MOST_CHARACTERS`."""
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    if sizes.sum() <= MOST_CHARACTERS:
        return list(range(len(texts)))
    order = random.permutation(len(texts))
    kept = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), MOST_CHARACTERS)))]
    return sorted(int(i) for i in kept)
