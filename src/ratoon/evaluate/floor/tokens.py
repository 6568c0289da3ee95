"""Floors for texts whose likelihood is measured: counts of one, two and three tokens, learned from what a model learns.

Decides how counts become probabilities: interpolated absolute discounting (Ney, Essen & Kneser 1994), with all tokens
of the vocabulary equally likely at its end, so that no token has probability 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from ratoon.evaluate.floor.kinds import Learned

DISCOUNT = 0.75
"""Taken off every count of tokens in a row and given to what was never seen there."""


class Counts:
    """How often a token was learned behind the `order` - 1 tokens before it, and behind fewer."""

    def __init__(self, train: Learned, order: int) -> None:
        self.vocabulary = train.vocabulary
        self.behind: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
        for record in train.pieces:
            for ids, weight in record:
                for at in _learned(ids, weight):
                    for length, behind in enumerate(self.behind):
                        if length <= at + 1:
                            behind[_before(ids, at, length)][ids[at + 1]] += 1
        self.totals = [{before: found.total() for before, found in behind.items()} for behind in self.behind]

    def probability(self, before: tuple[int, ...], token: int) -> float:
        """p(token | before), `before` the tokens in front of it, no more than `order` - 1."""
        found = 1.0 / self.vocabulary
        for length in range(len(before) + 1):
            known = before[len(before) - length :]
            followed = self.behind[length].get(known)
            if not followed:
                break  # what was never seen has never been seen behind more
            total = self.totals[length][known]
            found = (max(followed[token] - DISCOUNT, 0.0) + DISCOUNT * len(followed) * found) / total
        return found


def likelihood(train: Learned, test: Learned, order: int) -> list[tuple[float, int]]:
    """Nats and tokens of each test record under the counts of training; what is learned is what counts."""
    counts = Counts(train, order)
    found = []
    for record in test.pieces:
        nats, n = 0.0, 0
        for ids, weight in record:
            for at in _learned(ids, weight):
                before = _before(ids, at, min(order - 1, at + 1))
                nats -= math.log(counts.probability(before, ids[at + 1]))
                n += 1
        found.append((nats, n))
    return found


def _learned(ids: tuple[int, ...], weight: tuple[float, ...]) -> list[int]:
    return [at for at in range(len(ids) - 1) if weight[at] > 0]


def _before(ids: tuple[int, ...], at: int, length: int) -> tuple[int, ...]:
    """The `length` tokens in front of ids[at + 1]."""
    return ids[at + 1 - length : at + 1]
