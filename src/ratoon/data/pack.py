"""The one packer: how documents and examples become rows.

Two policies. A *stream* cuts the shards into rows of equal length, and a document goes on over a row's border. *Whole*
examples (`tasks/example.py`) are laid side by side in rows, and none is cut. In both, attention never crosses
documents, no token is lost and none is learned twice. Whether a long example is cut or left out is decided before,
by its task.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import DataError
from ratoon.data.batch import IGNORED, Batch
from ratoon.data.shards import Shards
from ratoon.tasks.example import Example as Example


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


def pack_whole(
    examples: Sequence[Example], row_tokens: int, *, leading: int = 0, source_tokens: int | None = None
) -> list[list[int]]:
    """Which examples share a row: best fit, longest first; returns lists of example numbers.

    A next-token example of n ids takes n - 1 places, since its last id is only a target; a labelled one takes n; what
    stands beside it shares its row. `leading` virtual slots are added to each document. Where examples have sources,
    the row beside has room for `source_tokens` of them (absent: as many as `row_tokens`), and both sides must fit.
    Raises `DataError` for an example that is longer than a row (whether to cut, split or leave it out is the task's
    decision, made before), for an empty one, for numbers that are not finite, and where only some have a source or
    vectors differ in length.
    """
    source_row = row_tokens if source_tokens is None else source_tokens
    _check(examples)
    needs = [example.places + leading * len(_documents(example)) for example in examples]
    sources = [sum(len(document.source or ()) for document in _documents(example)) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (-max(needs[i], sources[i]), i))
    rows: list[list[int]] = []
    opened = _OpenRows()
    for number in order:
        need, source_need = needs[number], sources[number]
        if need > row_tokens or source_need > source_row:
            _refuse_long(examples[number], number, need - row_tokens, source_need - source_row)
        found = opened.take(need, source_need)
        if found is None:
            rows.append([number])
            found = len(rows) - 1, row_tokens, source_row
        else:
            rows[found[0]].append(number)
        row, room, source_room = found
        opened.put(row, room - need, source_room - source_need)
    return rows


class _OpenRows:
    """Rows that have room left, by the room in them and then by the room in their row of sources."""

    def __init__(self) -> None:
        self._by_room: dict[int, dict[int, list[int]]] = {}
        self._rooms: list[int] = []  # the keys in order: the least room that suffices is found without looking at all

    def put(self, row: int, room: int, source_room: int) -> None:
        if not room:
            return
        if room not in self._by_room:
            bisect.insort(self._rooms, room)
            self._by_room[room] = {}
        self._by_room[room].setdefault(source_room, []).append(row)

    def take(self, need: int, source_need: int) -> tuple[int, int, int] | None:
        """A row with the least room that both sides fit into, and the two rooms it had; it is open no more."""
        for place in range(bisect.bisect_left(self._rooms, need), len(self._rooms)):
            room = self._rooms[place]
            by_source = self._by_room[room]
            source_room = min((one for one in by_source if one >= source_need), default=None)
            if source_room is None:
                continue
            row = by_source[source_room].pop()
            if not by_source[source_room]:
                del by_source[source_room]
            if not by_source:
                del self._by_room[room], self._rooms[place]
            return row, room, source_room
        return None


def _documents(example: Example) -> list[Example]:
    """The example and what stands beside it, in the row's order."""
    found, one = [], example
    while True:
        found.append(one)
        if one.beside is None:
            return found
        one = one.beside


def _check(examples: Sequence[Example]) -> None:
    """Raises `DataError` for an example that no row can hold."""
    whole = [(number, document) for number, example in enumerate(examples) for document in _documents(example)]
    with_source = any(document.source is not None for _, document in whole)
    width = next((len(document.vector) for _, document in whole if document.vector is not None), 0)
    for number, document in whole:
        wrong = None
        if not len(document.ids):
            wrong = "an example has no tokens"
        elif not np.isfinite(np.asarray(document.weight, np.float64)).all():
            wrong = "an example has a weight that is no number"
        elif document.vector is not None and not np.isfinite(np.asarray(document.vector, np.float64)).all():
            wrong = "what is asked of an example is no number"
        elif with_source and not len(document.source or ()):
            wrong = "an example has no source, and others have one"
        elif document.vector is not None and len(document.vector) != width:
            wrong = f"an example is asked for {len(document.vector)} numbers, those before it for {width}"
        if wrong is not None:
            raise DataError(
                wrong,
                where=document.name or examples[number].name or f"example {number}",
                expected="at least one token, finite weights, and what the other examples have",
                fix="leave the example out, or mend what made it",
            )


def _refuse_long(example: Example, number: int, too_many: int, source_too_many: int) -> NoReturn:
    """Raises `DataError` saying how many tokens this example may have, given what stands beside it."""
    own = too_many > 0
    tokens = len(example.ids) if own else len(example.source or ())
    raise DataError(
        f"an example has {tokens:,} tokens" if own else f"an example's source has {tokens:,} tokens",
        where=example.name or f"example {number}",
        expected=f"at most {max(0, tokens - (too_many if own else source_too_many)):,}",
        fix="state a policy for long rows, or lengthen context_tokens",
    )


def whole_rows(
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    row_tokens: int,
    *,
    leading: int = 0,
    source_tokens: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Batch:
    """Rows of whole examples, as `pack_whole` shared them out, as a Batch; free places are padding.

    Each document begins with `leading` virtual slots (id 0, nothing learned), which its positions count. `extra` holds
    `number_B`, the rows' numbers among all that were packed (`numbers`; absent: 0, 1, …); `vector_BMK` where examples
    have vectors, by document number (M: most documents of a row; a document without one has zeros); `source_BS` and
    `source_document_BS` where they have sources: the same document numbers as in the row, padding -1.
    """
    shape = (len(rows), row_tokens)
    ids, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weight, position = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    document_of = np.full(shape, IGNORED, np.int32)
    laid = [[document for number in members for document in _documents(examples[number])] for members in rows]
    for r, documents in enumerate(laid):
        at = 0
        for d, one in enumerate(documents):
            begin = at + leading
            at = begin + _own_places(one)
            document_of[r, begin - leading : at] = d
            position[r, begin - leading : at] = np.arange(at - begin + leading)
            ids[r, begin:at] = one.ids[: at - begin]
            asked = one.ids[1:] if one.targets is None else one.targets
            targets[r, begin : begin + len(asked)] = asked
            weight[r, begin : begin + len(asked)] = one.weight[: len(asked)]
    extra: dict[str, Any] = {"number_B": np.asarray(range(len(rows)) if numbers is None else numbers, np.int64)}
    extra |= _vectors(laid) | _sources(laid, row_tokens if source_tokens is None else source_tokens)
    names = tuple(", ".join(examples[number].name for number in members) for members in rows)
    return Batch(ids, targets, weight, document_of, position, names, extra)


def _own_places(document: Example) -> int:
    """Slots of a document alone, without what stands beside it."""
    return document.places - (0 if document.beside is None else document.beside.places)


def _vectors(laid: Sequence[Sequence[Example]]) -> dict[str, Any]:
    width = next((len(one.vector) for row in laid for one in row if one.vector is not None), None)
    if width is None:
        return {}
    vector = np.zeros((len(laid), max(len(row) for row in laid), width), np.float32)
    for r, row in enumerate(laid):
        for d, one in enumerate(row):
            if one.vector is not None:
                vector[r, d] = one.vector
    return {"vector_BMK": vector}


def _sources(laid: Sequence[Sequence[Example]], source_tokens: int) -> dict[str, Any]:
    if not any(one.source is not None for row in laid for one in row):
        return {}
    source = np.zeros((len(laid), source_tokens), np.int64)
    document_of = np.full(source.shape, IGNORED, np.int32)
    for r, row in enumerate(laid):
        at = 0
        for d, one in enumerate(row):
            read = one.source or ()
            source[r, at : at + len(read)] = read
            document_of[r, at : at + len(read)] = d
            at += len(read)
    return {"source_BS": source, "source_document_BS": document_of}
