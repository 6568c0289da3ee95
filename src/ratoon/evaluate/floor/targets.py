"""Floors for texts that are made of texts: the source itself, its first sentences, and the answer of the nearest
training source.

Decides what near means: the cosine of TF-IDF features (`features.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ratoon.evaluate.floor.features import Counted
from ratoon.evaluate.floor.kinds import Sources
from ratoon.evaluate.floor.sentences import sentences

BLOCK_SOURCES = 512
"""Sources compared with all of training at once."""


def copy(sources: Sequence[str]) -> list[str]:
    """The sources themselves: names and numbers of a translation are right already."""
    return list(sources)


def lead(sources: Sequence[str], n_sentences: int) -> list[str]:
    """The first sentences of each source, with what stands between them; all of one that has no more."""
    found = []
    for source in sources:
        spans = sentences(source)[:n_sentences]
        found.append(source[spans[0][0] : spans[-1][1]] if spans else "")
    return found


def nearest(train: Sources, sources: Sequence[str], *, language: str) -> list[str]:
    """The target of the training source that is nearest to each source; of equals, the first. Raises `ConfigError`
    where scikit-learn is missing."""
    counted = Counted(train.sources, language)
    if counted.is_empty:
        return [train.targets[0]] * len(sources)
    known = counted(train.sources).T.tocsc()
    found: list[str] = []
    for start in range(0, len(sources), BLOCK_SOURCES):
        alike = (counted(sources[start : start + BLOCK_SOURCES]) @ known).toarray()
        found += [train.targets[int(row)] for row in np.argmax(alike, axis=1)]
    return found
