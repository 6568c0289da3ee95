"""The ledger of a preparation: everything that was read is booked once, under a reason, and the sums agree.

Documents count as they came from the files; bytes are those of their texts as UTF-8, or of the whole row where no text
could be taken from it; tokens are those of the texts, without the separators that shards put between documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ratoon.base.errors import DataError

KEPT = ("train", "held_out")
SHOWN_PLACES = 20
"""Places kept in the ledger itself for each reason; `left_out.jsonl` has them all."""


@dataclass
class Account:
    """What is booked under one reason."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    places: list[str] = field(default_factory=list)


class Ledger:
    """read = train + held_out + every reason for leaving out, in documents, bytes and tokens.

    `left_out` is called with reason, place and bytes of everything that is booked under another reason than kept.
    """

    def __init__(self, left_out: Callable[[str, str, int], None] | None = None) -> None:
        self._left_out = left_out
        self.read = Account()
        self.accounts: dict[str, Account] = {}
        self.notes: list[str] = []

    def receive(self, documents: int = 1, bytes: int = 0, tokens: int = 0) -> None:
        """Book what came in."""
        self.read.documents += documents
        self.read.bytes += bytes
        self.read.tokens += tokens

    def book(self, reason: str, documents: int = 1, bytes: int = 0, tokens: int = 0, where: str | None = None) -> None:
        """Book where it went; `where` is file and line of what was left out."""
        account = self.accounts.setdefault(reason, Account())
        account.documents += documents
        account.bytes += bytes
        account.tokens += tokens
        if where is None or reason in KEPT:
            return
        if len(account.places) < SHOWN_PLACES:
            account.places.append(where)
        if self._left_out is not None:
            self._left_out(reason, where, bytes)

    def leave_out(self, reason: str, bytes: int, where: str) -> None:
        """Book a row from which nothing could be taken: it came in and went no further."""
        self.receive(1, bytes)
        self.book(reason, 1, bytes, where=where)

    def note(self, sentence: str) -> None:
        """Something a person should know, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def check(self) -> None:
        """Raise `DataError` when the sums disagree: something was lost or booked twice."""
        for what in ("documents", "bytes", "tokens"):
            booked = sum(getattr(account, what) for account in self.accounts.values())
            read = getattr(self.read, what)
            if booked != read:
                raise DataError(
                    f"the ledger is off: {read:,} {what} were read, {booked:,} are booked",
                    where="preparation",
                    fix="please report this: nothing was written",
                )

    def as_dict(self) -> dict[str, Any]:
        """The ledger as plain values: `read`, `accounts` by reason, `notes`."""

        def plain(account: Account) -> dict[str, Any]:
            return {"documents": account.documents, "bytes": account.bytes, "tokens": account.tokens}

        order = [*KEPT, *sorted(self.accounts.keys() - set(KEPT))]
        return {
            "read": plain(self.read),
            "accounts": {
                reason: {**plain(self.accounts[reason]), "places": self.accounts[reason].places}
                for reason in order
                if reason in self.accounts
            },
            "notes": self.notes,
        }
