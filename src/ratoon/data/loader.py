"""Which rows a step sees: a pure function of seed and step, so that the position in the data is the step itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.data.pack import Grid, stream_grid, stream_rows, strided_grid
from ratoon.data.shards import Shards


class Loader:
    """Batches of `rows` rows from shards, in an order drawn anew for each pass.

    Each pass cuts the stream at another offset and shuffles the rows. Process `rank` of `world` gets its share of
    each step's rows; the shares, joined in the order of ranks, are the batch that one process alone would see.
    """

    def __init__(
        self, shards: Shards, *, rows: int, context_tokens: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if rows % world:
            raise ConfigError(f"{rows} rows cannot be shared evenly by {world} processes", where="train.rows")
        self.shards, self.rows, self.context_tokens, self.seed = shards, rows, context_tokens, seed
        self.rank, self.world = rank, world
        stream_grid(shards.n_tokens, context_tokens)  # refuses a text that is too short
        self._starts = [0]  # first row of each pass, over all passes
        self._passes: dict[int, tuple[Grid, npt.NDArray[np.int64]]] = {}

    def batch(self, step: int) -> Batch:
        """The rows of `step` (from 0) that belong to this process."""
        share = self.rows // self.world
        first = step * self.rows + self.rank * share
        pieces: list[Batch] = []
        wanted = np.arange(first, first + share, dtype=np.int64)
        while len(wanted):
            number = self._pass_of(int(wanted[0]))
            inside = wanted[wanted < self._starts[number + 1]]
            grid, order = self._pass(number)
            pieces.append(stream_rows(self.shards, grid, order[inside - self._starts[number]], self.context_tokens))
            wanted = wanted[len(inside) :]
        return pieces[0] if len(pieces) == 1 else _join(pieces)

    def passes(self, step: int) -> float:
        """How often the text has been seen when `step` begins."""
        row = step * self.rows
        number = self._pass_of(row)
        return number + (row - self._starts[number]) / (self._starts[number + 1] - self._starts[number])

    def state(self) -> dict[str, Any]:
        """What decides every batch; equal states, equal batches."""
        return {
            "shards": self.shards.manifest.hash,
            "rows": self.rows,
            "context_tokens": self.context_tokens,
            "seed": self.seed,
        }

    def _pass_of(self, row: int) -> int:
        while self._starts[-1] <= row:
            self._starts.append(self._starts[-1] + len(self._pass(len(self._starts) - 1)[0]))
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _pass(self, number: int) -> tuple[Grid, npt.NDArray[np.int64]]:
        found = self._passes.get(number)
        if found is None:
            random = stream(self.seed, "rows", number)
            spare = self.shards.n_tokens - self.context_tokens
            grid = stream_grid(
                self.shards.n_tokens, self.context_tokens, int(random.integers(0, min(self.context_tokens, spare)))
            )
            found = (grid, random.permutation(len(grid)))
            self._passes = {key: value for key, value in self._passes.items() if key >= number - 1}
            self._passes[number] = found
        return found


def _join(pieces: list[Batch]) -> Batch:
    def joined(name: str) -> Any:
        return np.concatenate([getattr(piece, name) for piece in pieces])

    return Batch(
        ids_BT=joined("ids_BT"),
        targets_BT=joined("targets_BT"),
        weight_BT=joined("weight_BT"),
        document_BT=joined("document_BT"),
        position_BT=joined("position_BT"),
        rows=tuple(name for piece in pieces for name in piece.rows),
    )


def held_out_grid(
    shards: Shards, *, context_tokens: int, limit_tokens: int | None = None, stride_tokens: int | None = None
) -> tuple[Grid, int]:
    """The rows that go once over the shards, and how many tokens a row has (fewer than `context_tokens` in a short
    text). With `limit_tokens`, rows spread evenly over the text that learn at most so many (one row at least). Raises
    `DataError` when the shards hold no token to predict."""
    if shards.n_tokens < 2:
        raise DataError(
            f"the shards hold {shards.n_tokens} tokens: there is nothing to measure on",
            where=shards.folder,
            expected="at least 2 tokens",
            fix="prepare the data with a greater held_out_fraction, or more text",
        )
    row_tokens = min(context_tokens, shards.n_tokens - 1)
    grid = strided_grid(shards.n_tokens, row_tokens, min(stride_tokens or row_tokens, row_tokens))
    learned = grid.learned_to - grid.learned_from
    if limit_tokens is not None and limit_tokens < int(learned.sum()):
        count = max(1, limit_tokens // row_tokens)
        if stride_tokens is not None:  # all rows but the first learn no more than the stride
            count = max(1, 1 + (limit_tokens - row_tokens) // min(stride_tokens, row_tokens))
        numbers = np.unique(np.linspace(0, len(grid) - 1, count).round().astype(np.int64))
        grid = Grid(grid.starts[numbers], grid.learned_from[numbers], grid.learned_to[numbers])
    return grid, row_tokens


def held_out_batches(
    shards: Shards, *, rows: int, context_tokens: int, limit_tokens: int | None = None
) -> Iterator[Batch]:
    """Every target of the shards exactly once, in order; with `limit_tokens`, the rows spread evenly over the text
    that hold at most so many (one row at least)."""
    grid, row_tokens = held_out_grid(shards, context_tokens=context_tokens, limit_tokens=limit_tokens)
    for start in range(0, len(grid), rows):
        yield stream_rows(shards, grid, np.arange(start, min(start + rows, len(grid))), row_tokens)
