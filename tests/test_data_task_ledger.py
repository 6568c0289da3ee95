"""The ledger of tasks: trained + cut + split + dropped + duplicate + masked = read, and runs that must not start."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.base.errors import DataError
from ratoon.data.task_ledger import FATES, SHOWN_PLACES, TaskLedger


@dataclass(frozen=True)
class At:
    place: str


def booked(*rows: dict[str, object], ledger: TaskLedger | None = None) -> TaskLedger:
    """A ledger that received and booked these rows; `tokens` are what they have together."""
    ledger = TaskLedger() if ledger is None else ledger
    for number, row in enumerate(rows, start=1):
        place = f"a.jsonl:{number}"
        kinds = ("learned", "masked", "cut", "dropped", "duplicate")
        ledger.receive(At(place), sum(int(row.get(kind, 0)) for kind in kinds))  # type: ignore[call-overload]
        ledger.book(place, **row)  # type: ignore[arg-type]
    return ledger


# -- the identity ------------------------------------------------------------------------------------------------------

counts = st.integers(0, 50)
laid_out = st.fixed_dictionaries(
    {"learned": counts, "masked": counts, "cut": counts, "pieces": st.integers(1, 4), "repeated": counts}
)
left_out = st.sampled_from(["dropped", "duplicate"]).flatmap(
    lambda kind: st.fixed_dictionaries({kind: st.integers(1, 50)})
)
row_of_any_fate = st.tuples(laid_out | left_out, st.sampled_from(["too long", "no answer"]), st.booleans())
unread = st.tuples(st.sampled_from(["broken row", "beyond the limit"]), st.booleans(), st.booleans())


@given(st.lists(row_of_any_fate | unread, max_size=30))
def test_every_row_and_every_token_is_booked_once(found: list[tuple[object, ...]]) -> None:
    """The identity in rows and in tokens, against plain sums; losses against their definition."""
    told: list[tuple[str, str, str, int]] = []
    ledger = TaskLedger(left_out=lambda *one: told.append(one))
    tokens = dict.fromkeys(FATES, 0)
    fates: list[str] = []
    lost_rows = lost_tokens = 0
    for number, row in enumerate(found):
        place = f"a:{number}"
        if isinstance(row[0], str):
            reason, asked, duplicate = row
            ledger.drop_unread(str(reason), place, asked=bool(asked), duplicate=bool(duplicate))
            fates.append("duplicate" if duplicate else "dropped")
            lost_rows += not asked and not duplicate
            continue
        kinds, reason, asked = dict(row[0]), str(row[1]), bool(row[2])  # type: ignore[call-overload]
        size = sum(kinds.get(kind, 0) for kind in ("learned", "masked", "cut", "dropped", "duplicate"))
        ledger.receive(At(place), size)
        ledger.book(place, **kinds, reason=reason, asked=asked)
        for fate, kind in (
            ("trained", "learned"),
            *((kind, kind) for kind in ("masked", "cut", "dropped", "duplicate")),
        ):
            tokens[fate] += kinds.get(kind, 0)
        fate = next((kind for kind in ("dropped", "duplicate") if kind in kinds), None) or (
            "masked"
            if not kinds["learned"]
            else "split"
            if kinds["pieces"] > 1
            else "cut"
            if kinds["cut"]
            else "trained"
        )
        fates.append(fate)
        if not asked and fate != "duplicate":
            lost_rows += fate in ("dropped", "masked")
            lost_tokens += size if fate in ("dropped", "masked") else kinds["cut"]
    ledger.check()
    assert ledger.rows == {fate: fates.count(fate) for fate in FATES} and ledger.rows_read == len(found)
    assert ledger.tokens == tokens and ledger.tokens_read == sum(tokens.values())
    assert (ledger.lost_rows, ledger.lost_tokens) == (lost_rows, lost_tokens)
    rows_in, tokens_in = len(found) - fates.count("duplicate"), sum(tokens.values()) - tokens["duplicate"]
    shares = [lost_rows / rows_in if rows_in else 0.0, lost_tokens / tokens_in if tokens_in else 0.0]
    assert ledger.lost_fraction == max(shares)
    plain = json.loads(json.dumps(ledger.as_dict()))
    for what in ("rows", "tokens"):
        assert plain[what].pop("read") == sum(plain[what].values())
    assert sum(reason["rows"] for reason in plain["reasons"].values()) == len(told)
    assert [place for _, _, place, _ in told] == [f"a:{number}" for number in range(len(found))]


@pytest.mark.parametrize(
    "wrong", [{"learned": 4}, {"learned": 5, "masked": 1}, {"dropped": 4}, {"learned": 3, "cut": 1}]
)
def test_tokens_that_do_not_add_up_are_an_error(wrong: dict[str, int]) -> None:
    ledger = TaskLedger()
    ledger.receive(At("a.jsonl:1"), 5)
    with pytest.raises(DataError, match="the ledger is off: the row has 5 tokens") as caught:
        ledger.book("a.jsonl:1", **wrong, reason="too long")
    assert caught.value.where == "a.jsonl:1"


def test_rows_that_are_never_booked_or_never_came() -> None:
    ledger = booked({"learned": 3})
    with pytest.raises(DataError, match="was not received"):
        ledger.book("a.jsonl:1", learned=3)
    ledger.receive(At("a.jsonl:2"), 1)
    with pytest.raises(DataError, match="received a row twice"):
        ledger.receive(At("a.jsonl:2"), 1)
    with pytest.raises(DataError, match="1 rows were received and never booked") as caught:
        ledger.check()
    assert caught.value.where == "a.jsonl:2"


@pytest.mark.parametrize("what", ["rows", "tokens"])
def test_sums_that_disagree_are_found(what: str) -> None:
    ledger = booked({"learned": 3, "masked": 2})
    getattr(ledger, what)["trained"] += 1
    with pytest.raises(DataError, match=f"the ledger is off: .* {what} were read"):
        ledger.check()


@pytest.mark.parametrize(
    "row",
    [{"dropped": 3}, {"duplicate": 3}, {"masked": 3}, {"learned": 2, "cut": 1}, {"learned": 1, "cut": 1, "pieces": 2}],
)
def test_what_is_not_learned_whole_needs_a_reason(row: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match="needs a reason"):
        booked(row)


def test_what_pieces_repeat_is_counted_apart() -> None:
    ledger = booked({"learned": 6, "masked": 4, "pieces": 3, "repeated": 8}, {"learned": 2})
    assert ledger.rows["split"] == 1 and ledger.tokens["split"] == 0
    assert (ledger.extra_pieces, ledger.repeated_tokens, ledger.tokens_read) == (2, 8, 12)
    ledger.check()


# -- places and reasons ------------------------------------------------------------------------------------------------


def test_reasons_are_told_by_weight_with_their_first_places() -> None:
    ledger = booked({"dropped": 3, "reason": "rare"}, *[{"learned": 2, "cut": 1, "reason": "too long"}] * 25)
    reasons = ledger.as_dict()["reasons"]
    assert list(reasons) == ["too long", "rare"]
    assert reasons["too long"]["tokens"] == 25 and reasons["too long"]["fates"] == {"cut": 25}
    assert reasons["too long"]["places"] == [f"a.jsonl:{number}" for number in range(2, 2 + SHOWN_PLACES)]
    assert reasons["rare"] == {"rows": 1, "tokens": 3, "asked": False, "fates": {"dropped": 1}, "places": ["a.jsonl:1"]}


def test_notes_stand_once() -> None:
    ledger = TaskLedger()
    ledger.note("a")
    ledger.note("a")
    assert ledger.as_dict()["notes"] == ["a"]


# -- runs that must not start ------------------------------------------------------------------------------------------


def test_a_run_that_loses_too_much_is_refused_with_the_commonest_reasons() -> None:
    whole: dict[str, object] = {"learned": 8, "masked": 2}
    ledger = booked(
        *[whole] * 7, {"learned": 5, "cut": 5, "reason": "cut at the right"}, *[{"dropped": 10, "reason": "long"}] * 2
    )
    assert ledger.lost_fraction == 25 / 100  # tokens; of rows it is 2 of 10
    ledger.refuse_if_lost(0.25)
    with pytest.raises(DataError, match=r"25.0% of the data would be lost: 2 of 10 rows, 25 of 100 tokens") as caught:
        ledger.refuse_if_lost(0.24)
    assert caught.value.where == "long (2 rows: a.jsonl:9, a.jsonl:10); cut at the right (1 rows: a.jsonl:8)"
    assert caught.value.expected == "at most 24.0%"


def test_rows_without_tokens_are_lost_all_the_same() -> None:
    ledger = booked({"learned": 9})
    ledger.leave_out("broken row", 120, "a.jsonl:2")
    assert ledger.lost_fraction == 0.5 and ledger.unread_bytes == 120
    with pytest.raises(DataError, match="1 of 2 rows, 0 of 9 tokens"):
        ledger.refuse_if_lost(0.4)


def test_what_was_asked_for_and_what_stands_twice_is_no_loss() -> None:
    ledger = booked(
        {"learned": 9},
        *[{"duplicate": 9, "reason": "duplicate"}] * 3,
        {"dropped": 9, "reason": "beyond the limit", "asked": True},
        {"learned": 1, "cut": 8, "reason": "a short context was asked for", "asked": True},
    )
    ledger.drop_unread("not wanted", "a.jsonl:9", asked=True)
    ledger.drop_unread("twice", "a.jsonl:10", duplicate=True)
    assert ledger.lost_fraction == 0.0 and ledger.rows_read == 8
    ledger.refuse_if_lost(0.0)
    ledger.leave_out("broken row", 5, "a.jsonl:11")
    with pytest.raises(DataError) as caught:
        ledger.refuse_if_lost(0.0)
    assert caught.value.where == "broken row (1 rows: a.jsonl:11)"


def test_a_run_that_learns_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="there is no row to learn from"):
        TaskLedger().refuse_if_all_masked()
    ledger = booked(*[{"masked": 5, "cut": 2, "reason": "the answer does not fit"}] * 4, {"dropped": 1, "reason": "x"})
    with pytest.raises(DataError, match="of 5 rows 1 are dropped, 4 are masked") as caught:
        ledger.refuse_if_all_masked()
    first = "the answer does not fit (4 rows: a.jsonl:1, a.jsonl:2, a.jsonl:3 …)"
    assert str(caught.value.where).startswith(first)
    booked({"masked": 5, "reason": "x"}, {"learned": 1}).refuse_if_all_masked()
