"""From token ids to text while they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Decoder(Protocol):
    """What `text.stream.StreamDecoder` offers."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class Watch:
    """The text of one answer. `push` returns what may be shown; what could begin a stop text is held back.

    `text` is the whole text so far, without the stop text and what follows it; `stopped` whether one was found.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._shown = 0
        self.text = ""
        self.stopped = False

    def push(self, id: int) -> str:
        """Add a token; returns the new text that may be shown."""
        return self._add(self._decoder.push(id), ended=False)

    def finish(self) -> str:
        """No token follows: returns what was held back."""
        return self._add("" if self.stopped else self._decoder.flush(), ended=True)

    def _add(self, new: str, *, ended: bool) -> str:
        if not self.stopped and new:
            before = len(self.text)
            self.text += new
            found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
            found = [place for place in found if place >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        safe = len(self.text) if ended or self.stopped else len(self.text) - self._held()
        shown, self._shown = self.text[self._shown : safe], max(self._shown, safe)
        return shown

    def _held(self) -> int:
        """Characters at the end of the text that a stop text could begin with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def text_of(decoder: Decoder, ids: Iterable[int], stops: Sequence[str] = ()) -> str:
    """The text of complete `ids`, up to the first stop text."""
    watch = Watch(decoder, stops)
    for id in ids:
        watch.push(id)
    watch.finish()
    return watch.text
