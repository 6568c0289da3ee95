"""Examples -> rows -> batches: packed once, shuffled anew in each epoch.

Decides the order in which a step sees rows of whole examples; a pure function of seed and step, as `loader.py` is for
streams. Which examples share a row is `pack.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.data.pack import pack_whole, whole_rows
from ratoon.tasks.example import Example


class ExampleLoader:
    """Batches of `rows` rows of `context_tokens` places, filled with whole examples.

    Rows are made once, from the examples in an order drawn from the seed; each epoch shuffles them. The last step of an
    epoch goes on with the next epoch's rows, so that every step has the same number of rows. Process `rank` of `world`
    gets its share of each step. `leading`: slots before each example that are a method's own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        rows: int,
        context_tokens: int,
        seed: int,
        leading: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not examples:
            raise DataError("there is no example to train on", where="data.train", fix="look at the ledger")
        if rows % world:
            raise ConfigError(f"{rows} rows cannot be shared evenly by {world} processes", where="train.rows")
        order = stream(seed, "examples").permutation(len(examples))
        self.examples = [examples[int(number)] for number in order]
        self.rows, self.context_tokens, self.seed, self.leading = rows, context_tokens, seed, leading
        self.rank, self.world = rank, world
        self.packed = pack_whole(self.examples, context_tokens, leading=leading)
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._hash = digest(self.examples)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.packed)

    def steps(self, epochs: float) -> int:
        """Steps that see every row so often, the last one whole."""
        return max(1, int(np.ceil(epochs * len(self.packed) / self.rows - 1e-9)))

    def passes(self, step: int) -> float:
        """How often the rows have been seen when `step` begins."""
        return step * self.rows / len(self.packed)

    def batch(self, step: int) -> Batch:
        """The rows of `step` (from 0) that belong to this process."""
        share = self.rows // self.world
        first = step * self.rows + self.rank * share
        numbers = [
            int(self._order(at // len(self.packed))[at % len(self.packed)]) for at in range(first, first + share)
        ]
        return self.numbered(numbers)

    def numbered(self, numbers: Sequence[int]) -> Batch:
        """The rows of those numbers; they stand in `extra["number_B"]`."""
        batch = whole_rows(
            self.examples, [self.packed[number] for number in numbers], self.context_tokens, leading=self.leading
        )
        batch.extra["number_B"] = np.asarray(numbers, dtype=np.int64)
        return batch

    def state(self) -> dict[str, Any]:
        """What decides every batch; equal states, equal batches."""
        return {
            "examples": self._hash,
            "rows": self.rows,
            "context_tokens": self.context_tokens,
            "seed": self.seed,
            "leading": self.leading,
        }

    @property
    def filled(self) -> float:
        """The share of the rows' places that examples take."""
        places = sum(example.places for example in self.examples)
        return places / (len(self.packed) * self.context_tokens)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {key: value for key, value in self._orders.items() if key >= epoch - 1}
            self._orders[epoch] = stream(self.seed, "rows", epoch).permutation(len(self.packed))
        return self._orders[epoch]


def joined(
    examples: Sequence[Example], behind: Sequence[bool], room_tokens: int
) -> tuple[list[Example], list[list[int]]]:
    """Labelled examples with their neighbours in one document, as far as a row has room, and the numbers of those that
    each holds. `behind[i]`: example i stands right behind example i - 1 and is read with it."""
    groups: list[list[int]] = []
    room = 0
    for number, example in enumerate(examples):
        fits = example.places <= room and example.targets is not None and example.beside is None
        if groups and behind[number] and fits:
            groups[-1].append(number)
            room -= example.places
        else:
            groups.append([number])
            room = room_tokens - example.places
    return [_one([examples[number] for number in group]) for group in groups], groups


def _one(members: Sequence[Example]) -> Example:
    if len(members) == 1:
        return members[0]
    return Example(
        [id for one in members for id in one.ids],
        [weight for one in members for weight in one.weight],
        f"{members[0].name} to {members[-1].name}",
        targets=[target for one in members for target in one.targets or ()],
    )


def in_order(
    examples: Sequence[Example], *, context_tokens: int, rows: int, leading: int = 0
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Every example once, packed, with the numbers of the examples of each row: for measuring."""
    packed = pack_whole(examples, context_tokens, leading=leading)
    for start in range(0, len(packed), rows):
        part = packed[start : start + rows]
        yield whole_rows(examples, part, context_tokens, leading=leading), part


def digest(examples: Sequence[Example]) -> str:
    """A hash of everything that is learned of the examples, in their order."""
    found = hashlib.sha256()
    for example in examples:
        one: Example | None = example
        while one is not None:
            for part, kind in ((one.ids, np.int64), (one.targets, np.int64), (one.source, np.int64)):
                found.update(np.asarray(part if part is not None else [-1], dtype=kind).tobytes())
            for numbers in (one.weight, one.vector):
                found.update(np.asarray(numbers if numbers is not None else [-1.0], dtype=np.float64).tobytes())
            one = one.beside
    return found.hexdigest()
