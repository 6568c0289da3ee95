"""Packing of every kind of example: labelled, with a vector, with a source, with one beside it, behind virtual slots.

What is read off a Batch is compared with the examples themselves; plain next-token examples and streams are
`test_data_shards_pack_loader.py`'s.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.base.errors import DataError
from ratoon.data.batch import IGNORED, Batch
from ratoon.data.pack import pack_whole, whole_rows
from ratoon.tasks.example import Example

ROW, SOURCE_ROW = 24, 15


@st.composite
def documents(draw: Any, *, labelled: bool, vector: bool, source: bool, depth: int = 1) -> Example:
    length = draw(st.integers(1, 6))
    numbers = st.integers(1, 99)
    ids = draw(st.lists(numbers, min_size=length, max_size=length))
    weight = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=length, max_size=length))
    beside = None
    if depth and draw(st.booleans()):
        beside = draw(documents(labelled=labelled, vector=vector, source=source, depth=depth - 1))
    return Example(
        ids,
        weight,
        targets=draw(st.lists(numbers, min_size=length, max_size=length)) if labelled else None,
        vector=draw(st.lists(st.sampled_from([0.0, 1.0, -2.5]), min_size=3, max_size=3)) if vector else None,
        source=draw(st.lists(numbers, min_size=1, max_size=7)) if source else None,
        beside=beside,
    )


@st.composite
def kinds(draw: Any) -> list[Example]:
    kind = {name: draw(st.booleans()) for name in ("labelled", "vector", "source")}
    return list(draw(st.lists(documents(**kind), min_size=1, max_size=12)))


def told(document: Example, leading: int) -> tuple[Any, ...]:
    """What a row should say of one document."""
    n = len(document.ids)
    places = n if document.targets is not None else max(1, n - 1)
    asked = list(document.targets) if document.targets is not None else [*list(document.ids)[1:], *([0] * (n == 1))]
    learned = len(asked) if n > 1 or document.targets is not None else 0
    return (
        (*[0] * leading, *list(document.ids)[:places]),
        (*[0] * leading, *asked),
        (*[0.0] * leading, *list(document.weight)[:learned], *([0.0] * (places - learned))),
        tuple(range(leading + places)),
        None if document.vector is None else tuple(document.vector),
        None if document.source is None else tuple(document.source),
    )


def read(batch: Batch, row: int) -> list[tuple[Any, ...]]:
    """What a row of a Batch says of its documents, in their order."""
    found = []
    for number in sorted(set(batch.document_BT[row].tolist()) - {IGNORED}):
        at = np.flatnonzero(batch.document_BT[row] == number)
        assert (np.diff(at) == 1).all()
        vector = batch.extra.get("vector_BMK")
        source = batch.extra.get("source_BS")
        if source is not None:
            source_at = np.flatnonzero(batch.extra["source_document_BS"][row] == number)
            assert (np.diff(source_at) == 1).all()
        found.append(
            (
                *(tuple(values[row, at].tolist()) for values in (batch.ids_BT, batch.targets_BT)),
                *(tuple(values[row, at].tolist()) for values in (batch.weight_BT, batch.position_BT)),
                None if vector is None else tuple(vector[row, number].tolist()),
                None if source is None else tuple(source[row, source_at].tolist()),
            )
        )
    return found


@given(many=kinds(), leading=st.integers(0, 5))
def test_every_example_stands_in_a_row_exactly_once_as_it_is(many: list[Example], leading: int) -> None:
    rows = pack_whole(many, ROW, leading=leading, source_tokens=SOURCE_ROW)
    assert Counter(number for members in rows for number in members) == Counter(range(len(many)))
    batch = whole_rows(many, rows, ROW, leading=leading, source_tokens=SOURCE_ROW)
    assert batch.ids_BT.shape == (len(rows), ROW)
    for row, members in enumerate(rows):
        expected = []
        for number in members:
            expected.append(told(many[number], leading))
            beside = many[number].beside
            if beside is not None:
                expected.append(told(beside, leading))
        assert read(batch, row) == expected
    free = batch.document_BT == IGNORED
    assert not (batch.weight_BT[free].any() or batch.ids_BT[free].any() or batch.position_BT[free].any())
    if "source_BS" in batch.extra:
        assert batch.extra["source_BS"].shape == (len(rows), SOURCE_ROW)
        assert not batch.extra["source_BS"][batch.extra["source_document_BS"] == IGNORED].any()
    if "vector_BMK" in batch.extra:
        most = max(len(read(batch, row)) for row in range(len(rows)))
        assert batch.extra["vector_BMK"].shape == (len(rows), most, 3)
        assert batch.extra["vector_BMK"].dtype == np.float32


def test_a_row_ends_where_either_side_is_full() -> None:
    many = [Example([1, 2, 3], [1, 1, 1], source=[7] * 5) for _ in range(4)]
    assert sorted(len(members) for members in pack_whole(many, 8)) == [1, 1, 1, 1]
    assert sorted(len(members) for members in pack_whole(many, 8, source_tokens=10)) == [2, 2]
    assert sorted(len(members) for members in pack_whole(many, 4, source_tokens=20)) == [2, 2]
    assert [len(members) for members in pack_whole(many, 8, source_tokens=20)] == [4]
    # A row whose sources are full is passed over, not given up with all that come after it.
    many = [
        Example([1] * 9, [1] * 9, source=[7] * 9),
        Example([1] * 5, [1] * 5, source=[7] * 2),
        Example([1], [1], source=[7]),
    ]
    assert pack_whole(many, 12, source_tokens=10) == [[0, 2], [1]]


def test_batches_of_some_rows_keep_their_numbers() -> None:
    many = [Example([n, n + 1], [1, 1], vector=[n]) for n in range(1, 7)]
    rows = pack_whole(many, 2)
    assert len(rows) == 3
    whole = whole_rows(many, rows, 2)
    assert whole.extra["number_B"].tolist() == [0, 1, 2]
    some = whole_rows(many, [rows[2], rows[0]], 2, numbers=[2, 0])
    assert some.extra["number_B"].tolist() == [2, 0]
    assert (some.ids_BT == whole.ids_BT[[2, 0]]).all()
    first, second = whole_rows(many, rows, 2).split(2)
    assert first.extra["number_B"].tolist() == [0, 1] and second.extra["number_B"].tolist() == [2]
    assert second.extra["vector_BMK"].shape == (1, 2, 1)


def test_how_long_an_example_may_be_is_said_with_what_it_shares_its_row() -> None:
    beside = Example([1] * 5, [1] * 5)
    for kept, leading in (({}, 0), ({}, 2), ({"beside": beside}, 0), ({"beside": beside}, 2)):
        with pytest.raises(DataError, match="has 30 tokens") as caught:
            pack_whole([Example([1] * 30, [1] * 30, "a", **kept)], 16, leading=leading)
        most = int((caught.value.expected or "").removeprefix("at most "))
        assert most == 17 - leading - (4 + leading if kept else 0)
        pack_whole([Example([1] * most, [1] * most, **kept)], 16, leading=leading)
        with pytest.raises(DataError):
            pack_whole([Example([1] * (most + 1), [1] * (most + 1), **kept)], 16, leading=leading)
    with pytest.raises(DataError, match="source has 11 tokens") as caught:
        pack_whole([Example([1, 2], [1, 1], source=[1] * 11)], 16, source_tokens=10)
    assert caught.value.expected == "at most 10"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Example([1], [1.0], "bad", vector=[float("nan")]), "asked of an example is no number"),
        (Example([1], [1.0], "bad", source=[2], vector=[1.0, 2.0]), "asked for 2 numbers, those before it for 1"),
        (Example([1], [1.0], "bad", source=[], vector=[1.0]), "no source, and others have one"),
        (
            Example([1], [1.0], vector=[1.0], source=[2], beside=Example([1], [1.0], "bad", source=[3], vector=[])),
            "asked for 0",
        ),
        (Example([1], [1.0], source=[2], beside=Example([], [], "bad", source=[3])), "has no tokens"),
    ],
)
def test_an_example_that_no_row_can_hold_is_refused_with_its_place(bad: Example, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        pack_whole([Example([1], [1.0], "good", vector=[1.0], source=[4]), bad], 16)
    assert caught.value.where == "bad"
