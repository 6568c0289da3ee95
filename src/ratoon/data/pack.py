"""The one packer: how documents and examples become rows.

Two policies. A *stream* cuts the shards into rows of equal length, and a document goes on over a row's border. *Whole*
examples are laid side by side in rows, and none is cut. In both, attention never crosses documents, no token is lost
and none is learned twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import DataError
from ratoon.data.batch import IGNORED, Batch
from ratoon.data.shards import Shards


@dataclass(frozen=True)
class Grid:
    """Where the rows of one pass over a stream begin.

    Row i holds tokens starts[i] … starts[i] + T, and learns targets from[i] … to[i] - 1 of it: together the rows learn
    every token but the stream's first, exactly once.
    """

    starts: npt.NDArray[np.int64]
    learned_from: npt.NDArray[np.int64]
    learned_to: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)


def stream_grid(tokens: int, row_tokens: int, offset: int = 0) -> Grid:
    """Rows of `row_tokens` over a stream, cut at `offset`, `offset` + T, …

    The head before `offset` and the tail are rows of their own that learn only what no other row does. Raises
    `DataError` when the stream is shorter than one row and its target.
    """
    if tokens < row_tokens + 1:
        raise DataError(
            f"the text has {tokens:,} tokens, which is not one row of {row_tokens}",
            where="context_tokens",
            expected=f"at least {row_tokens + 1:,} tokens",
            fix="give more text, or shorten context_tokens",
        )
    last = tokens - 1 - row_tokens
    body = np.arange(offset, last + 1, row_tokens, dtype=np.int64)
    starts, begin, end = [body], [np.zeros_like(body)], [np.full_like(body, row_tokens)]
    if offset:
        starts.insert(0, np.zeros(1, np.int64))
        begin.insert(0, np.zeros(1, np.int64))
        end.insert(0, np.full(1, min(offset, row_tokens), np.int64))
    covered = int(body[-1]) + row_tokens if len(body) else offset
    if covered < tokens - 1:
        starts.append(np.full(1, last, np.int64))
        begin.append(np.full(1, covered - last, np.int64))
        end.append(np.full(1, row_tokens, np.int64))
    return Grid(np.concatenate(starts), np.concatenate(begin), np.concatenate(end))


def strided_grid(tokens: int, row_tokens: int, stride_tokens: int) -> Grid:
    """Rows over a stream that begin every `stride_tokens` and learn only what no earlier row did.

    The smaller the stride, the more text a token has before it (at least `row_tokens` - `stride_tokens`, after the
    first row), and the more rows there are. Raises `DataError` when the stream is shorter than one row and its target.
    """
    assert 1 <= stride_tokens <= row_tokens
    if stride_tokens == row_tokens:
        return stream_grid(tokens, row_tokens)
    last = stream_grid(tokens, row_tokens).starts[-1]
    starts = np.append(np.arange(0, last, stride_tokens, dtype=np.int64), last)
    begin = np.append(np.zeros(1, np.int64), row_tokens - np.diff(starts))
    return Grid(starts, begin, np.full(len(starts), row_tokens, np.int64))


def stream_rows(shards: Shards, grid: Grid, rows: npt.NDArray[np.int64], row_tokens: int) -> Batch:
    """The rows of a grid with the given numbers as a Batch.

    Each target is the next token of the stream: a document begins with the separator, so a document's last token
    learns that it ends. Without a separator in the stream that target is not learned.
    """
    starts = grid.starts[rows]
    window = np.stack([shards.tokens(int(start), int(start) + row_tokens + 1) for start in starts])
    index_BT = starts[:, None] + np.arange(row_tokens, dtype=np.int64)
    inside = np.arange(row_tokens, dtype=np.int64)[None]
    weight_BT = ((inside >= grid.learned_from[rows, None]) & (inside < grid.learned_to[rows, None])).astype(np.float32)
    if shards.n_documents == 1:
        document_BT = np.zeros(index_BT.shape, np.int32)
        position_BT = np.broadcast_to(inside, index_BT.shape).copy()
    else:
        absolute = np.searchsorted(shards.document_starts[1:-1], index_BT.ravel(), side="right").reshape(index_BT.shape)
        document_BT = (absolute - absolute[:, :1]).astype(np.int32)
        position_BT = index_BT - np.maximum(shards.document_starts[absolute], starts[:, None])
        if shards.separator_id is None:
            weight_BT[index_BT + 1 == shards.document_starts[absolute + 1]] = 0.0
    return Batch(
        ids_BT=window[:, :-1],
        targets_BT=window[:, 1:],
        weight_BT=weight_BT,
        document_BT=document_BT,
        position_BT=position_BT,
        rows=tuple(shards.name_of(int(start)) for start in starts),
    )


@dataclass(frozen=True)
class Example:
    """Tokens that stay together in one row. `weight[i]` is how much predicting ids[i + 1] from ids[: i + 1] counts."""

    ids: Sequence[int]
    weight: Sequence[float]
    name: str = ""

    def __post_init__(self) -> None:
        assert len(self.weight) >= len(self.ids) - 1, "a weight for each prediction"


def pack_whole(examples: Sequence[Example], row_tokens: int) -> list[list[int]]:
    """Which examples share a row: best fit, longest first; returns lists of example numbers.

    An example of n ids takes n - 1 places, since its last id is only a target. Raises `DataError` for one that is
    longer than a row (whether to cut, split or leave it out is the task's decision, made before), for an empty one
    and for a weight that is not finite.
    """
    for number, example in enumerate(examples):
        if not len(example.ids) or not np.isfinite(np.asarray(example.weight, np.float64)).all():
            raise DataError(
                "an example has a weight that is no number" if len(example.ids) else "an example has no tokens",
                where=example.name or f"example {number}",
                expected="at least one token, and finite weights",
                fix="leave the example out, or mend what made it",
            )
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for number in order:
        need = max(1, len(examples[number].ids) - 1)
        if need > row_tokens:
            raise DataError(
                f"an example has {len(examples[number].ids):,} tokens",
                where=examples[number].name or f"example {number}",
                expected=f"at most {row_tokens + 1}",
                fix="state a policy for long rows, or lengthen context_tokens",
            )
        room = min((r for r, waiting in by_room.items() if r >= need and waiting), default=None)
        if room is None:
            rows.append([number])
            row, left = len(rows) - 1, row_tokens - need
        else:
            row = by_room[room].pop()
            rows[row].append(number)
            left = room - need
        by_room.setdefault(left, []).append(row)
    return rows


def whole_rows(examples: Sequence[Example], rows: Sequence[Sequence[int]], row_tokens: int) -> Batch:
    """Rows of whole examples, as `pack_whole` shared them out, as a Batch; free places are padding."""
    shape = (len(rows), row_tokens)
    ids, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weight, position = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    document = np.full(shape, IGNORED, np.int32)
    for r, members in enumerate(rows):
        at = 0
        for d, number in enumerate(members):
            example = examples[number]
            n = max(1, len(example.ids) - 1)
            ids[r, at : at + n] = example.ids[:n]
            learned = len(example.ids) - 1
            targets[r, at : at + learned] = example.ids[1:]
            weight[r, at : at + learned] = example.weight[:learned]
            document[r, at : at + n] = d
            position[r, at : at + n] = np.arange(n)
            at += n
    names = tuple(", ".join(examples[number].name for number in members) for members in rows)
    return Batch(ids, targets, weight, document, position, names)
