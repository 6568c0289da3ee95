"""The ledger of a fine-tuning run: every row and every token that was read is booked once, and the sums agree.

Decides what is counted and when a run must not start. What is cut, masked or left out, and why, is decided by the task
and the packing; preparing plain text has a ledger of its own, `ledger.py`.

The identity, in rows and in tokens alike:

    trained + cut + split + dropped + duplicate + masked = read

Rows: each has one fate. *dropped* and *duplicate* rows are left out; of the others one that teaches nothing is
*masked*, else one laid out in several pieces is *split*, else one that lost tokens is *cut*, else it is *trained*.

Tokens are those of a row as rendered without cutting, each counted once: *trained* if it is learned (weight > 0),
*masked* if it is only read, *cut* if it is in no piece, *dropped* and *duplicate* with its row. Splitting loses no
token, so *split* is 0 in tokens; tokens that a further piece repeats, and the pieces beyond the first, are counted
apart. A row that was left out before it was rendered has no tokens; such rows are counted apart as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ratoon.base.errors import DataError

FATES = ("trained", "cut", "split", "dropped", "duplicate", "masked")
SHOWN_PLACES = 20
"""Places kept in the ledger for each reason; the callback `left_out` is told all of them."""
NAMED_REASONS, NAMED_PLACES = 3, 3
"""Reasons, and places of each, that a refusal names."""


class Placed(Protocol):
    """A row or record: what stands at a place."""

    @property
    def place(self) -> str: ...


@dataclass
class Reason:
    """What was booked under one reason. `asked`: the user wanted it so; it is no loss."""

    rows: int = 0
    tokens: int = 0
    asked: bool = True
    fates: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)


class TaskLedger:
    """The identity above, kept. `left_out` is called with fate, reason, place and tokens of everything not learned
    whole (what is dropped, a duplicate, cut, or masked in all its tokens)."""

    def __init__(self, left_out: Callable[[str, str, str, int], None] | None = None) -> None:
        self._left_out = left_out
        self._open: dict[str, int] = {}
        self.rows_read = self.tokens_read = 0
        self.rows = dict.fromkeys(FATES, 0)
        self.tokens = dict.fromkeys(FATES, 0)
        self.unread_rows = self.unread_bytes = 0
        self.extra_pieces = self.repeated_tokens = 0
        self.lost_rows = self.lost_tokens = 0
        self.reasons: dict[str, Reason] = {}
        self.notes: list[str] = []

    def receive(self, row: Placed, tokens: int) -> None:
        """A row came in, with `tokens` as rendered without cutting. `book` says where it went.

        Raises `DataError` for a row whose place is still open: it was received twice.
        """
        if row.place in self._open:
            raise DataError("the ledger received a row twice", where=row.place, fix="is the file named twice?")
        self._open[row.place] = tokens
        self.rows_read += 1
        self.tokens_read += tokens

    def book(
        self,
        place: str,
        *,
        learned: int = 0,
        masked: int = 0,
        cut: int = 0,
        dropped: int = 0,
        duplicate: int = 0,
        pieces: int = 1,
        repeated: int = 0,
        asked: bool = False,
        reason: str | None = None,
    ) -> None:
        """Where the tokens of a received row went, all at once.

        A row is left out whole: `dropped` or `duplicate` are then all its tokens. `pieces` and `repeated`: how many
        pieces it was laid out in, and how many tokens the further ones repeat. A `reason` is needed for all but rows
        that are learned whole or split; `asked` says that the user wanted it so. Raises `DataError` when the tokens do
        not add up to those received.
        """
        tokens = self._open.pop(place, None)
        if tokens is None or learned + masked + cut + dropped + duplicate != tokens:
            said = "was not received" if tokens is None else f"has {tokens:,} tokens"
            raise DataError(
                f"the ledger is off: the row {said}, booked are {learned:,} learned + {masked:,} masked + "
                f"{cut:,} cut + {dropped:,} dropped + {duplicate:,} duplicate",
                where=place,
                fix="please report this: nothing was trained",
            )
        left_out = "dropped" if dropped else "duplicate" if duplicate else None
        assert left_out is None or tokens == max(dropped, duplicate), "a row is left out whole"
        fate = left_out or _fate(learned, cut, pieces)
        assert reason or (fate in ("trained", "split") and not cut), f"{fate} needs a reason"
        for kind, count in (("trained", learned), ("masked", masked), ("cut", cut), (left_out, dropped + duplicate)):
            if kind is not None:
                self.tokens[kind] += count
        self.rows[fate] += 1
        self.extra_pieces += pieces - 1
        self.repeated_tokens += repeated
        if reason:
            gone = tokens if fate in ("dropped", "duplicate", "masked") else cut
            self._note_reason(reason, fate, place, gone, lost=fate != "duplicate" and not asked)

    def drop_unread(
        self, reason: str, where: str, *, bytes: int = 0, asked: bool = False, duplicate: bool = False
    ) -> None:
        """A row left out before it was rendered: it could not be read, or nobody wanted it (`asked`), or it stands
        there already (`duplicate`)."""
        fate = "duplicate" if duplicate else "dropped"
        self.rows_read += 1
        self.rows[fate] += 1
        self.unread_rows += 1
        self.unread_bytes += bytes
        self._note_reason(reason, fate, where, 0, lost=not duplicate and not asked)

    def leave_out(self, reason: str, bytes: int, where: str) -> None:
        """What readers of files call for a row that they cannot read."""
        self.drop_unread(reason, where, bytes=bytes)

    def _note_reason(self, name: str, fate: str, place: str, tokens: int, *, lost: bool) -> None:
        reason = self.reasons.setdefault(name, Reason())
        reason.rows += 1
        reason.tokens += tokens
        reason.asked &= not lost
        reason.fates[fate] = reason.fates.get(fate, 0) + 1
        if len(reason.places) < SHOWN_PLACES:
            reason.places.append(place)
        if lost:
            self.lost_rows += fate in ("dropped", "masked")
            self.lost_tokens += tokens
        if self._left_out is not None:
            self._left_out(fate, name, place, tokens)

    def note(self, sentence: str) -> None:
        """Something a person should know, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def check(self) -> None:
        """Raise `DataError` when the identity does not hold, or a received row was never booked."""
        open_row = next(iter(self._open), None)
        if open_row is not None:
            raise DataError(
                f"the ledger is off: {len(self._open):,} rows were received and never booked",
                where=open_row,
                fix="please report this: nothing was trained",
            )
        for what, booked, read in (
            ("rows", sum(self.rows.values()), self.rows_read),
            ("tokens", sum(self.tokens.values()), self.tokens_read),
        ):
            if booked != read:
                raise DataError(
                    f"the ledger is off: {read:,} {what} were read, {booked:,} are booked",
                    where="fine-tuning",
                    fix="please report this: nothing was trained",
                )

    @property
    def lost_fraction(self) -> float:
        """The larger share of what is lost, in rows (dropped, or nothing learned of them) and in tokens (cut, dropped,
        and all of rows that teach nothing). Duplicates count for nothing, what was asked for is no loss."""
        rows = self.rows_read - self.rows["duplicate"]
        tokens = self.tokens_read - self.tokens["duplicate"]
        return max(self.lost_rows / rows if rows else 0.0, self.lost_tokens / tokens if tokens else 0.0)

    def refuse_if_lost(self, most_lost_fraction: float) -> None:
        """Raise `DataError` when more than this share of rows or tokens is lost, with the commonest reasons."""
        if self.lost_fraction > most_lost_fraction:
            raise DataError(
                f"{self.lost_fraction:.1%} of the data would be lost: "
                f"{self.lost_rows:,} of {self.rows_read - self.rows['duplicate']:,} rows, "
                f"{self.lost_tokens:,} of {self.tokens_read - self.tokens['duplicate']:,} tokens",
                where=self._first_places(lost=True),
                expected=f"at most {most_lost_fraction:.1%}",
                fix="see to the reasons, or raise most_lost_fraction if the loss is meant",
            )

    def refuse_if_all_masked(self) -> None:
        """Raise `DataError` when no token of any row would be learned, with the commonest reasons."""
        if self.tokens["trained"]:
            return
        if not self.rows_read:
            raise DataError("there is no row to learn from", where="fine-tuning", expected="at least one row")
        raise DataError(
            f"nothing would be learned: of {self.rows_read:,} rows "
            + ", ".join(f"{count:,} are {fate}" for fate, count in self.rows.items() if count),
            where=self._first_places(lost=False),
            expected="at least one token with a weight above 0",
            fix="see to the reasons: is the answer where the task looks for it, and does it fit the context?",
        )

    def _ordered(self) -> list[tuple[str, Reason]]:
        """The reasons, those of most rows first."""
        return sorted(self.reasons.items(), key=lambda named: (-named[1].rows, named[0]))

    def _first_places(self, *, lost: bool) -> str:
        named = [(name, reason) for name, reason in self._ordered() if not (lost and reason.asked)]
        return "; ".join(
            f"{name} ({reason.rows:,} rows: {', '.join(reason.places[:NAMED_PLACES])}"
            + (" …)" if reason.rows > NAMED_PLACES else ")")
            for name, reason in named[:NAMED_REASONS]
        )

    def as_dict(self) -> dict[str, Any]:
        """The ledger as plain values; the sums of `rows` and of `tokens`, `read` left aside, are their `read`."""
        return {
            "rows": {"read": self.rows_read, **self.rows},
            "tokens": {"read": self.tokens_read, **self.tokens},
            "extra_pieces": self.extra_pieces,
            "repeated_tokens": self.repeated_tokens,
            "unread_rows": self.unread_rows,
            "unread_bytes": self.unread_bytes,
            "lost_fraction": self.lost_fraction,
            "reasons": {
                name: {"rows": r.rows, "tokens": r.tokens, "asked": r.asked, "fates": r.fates, "places": r.places}
                for name, r in self._ordered()
            },
            "notes": self.notes,
        }


def _fate(learned: int, cut: int, pieces: int) -> str:
    """What became of a row that was not left out."""
    if not learned:
        return "masked"
    return "split" if pieces > 1 else "cut" if cut else "trained"
