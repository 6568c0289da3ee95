"""Token ids as they come -> text that can be shown as it comes: only whole characters, each once."""

from __future__ import annotations

from ratoon.text.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
KEPT_TOKENS = 5
"""A character has at most four bytes, so at most three tokens wait for its end; one more is the left border that
decides how the next token is spelled."""


class StreamDecoder:
    """Decodes one token after the other; what is given out, joined, is what the whole would decode to.

    A token may hold part of a character, and may be spelled differently at the start of a text than inside it. So a
    short tail of ids is kept and decoded again with each new one; the cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._tail: list[int] = []
        self._given = 0  # characters of the tail's text that were given out

    def push(self, token: int) -> str:
        """The characters that `token` completes; may be empty."""
        if self.skip_special and token in self.tokenizer.special_ids:
            return ""
        self._tail.append(token)
        text = self.tokenizer.decode(self._tail, self.skip_special)
        # A character whose bytes have not all come is one U+FFFD at the end; those before it are stray bytes for good.
        ready = len(text) - text.endswith(UNFINISHED)
        new = text[self._given : ready]
        self._given = max(self._given, ready)
        if len(self._tail) > 2 * KEPT_TOKENS:
            waiting = len(text) - self._given
            self._tail = self._tail[-KEPT_TOKENS:]
            self._given = len(self.tokenizer.decode(self._tail, self.skip_special)) - waiting
        return new

    def flush(self) -> str:
        """What is left, unfinished characters as U+FFFD; the decoder is then as new."""
        text = self.tokenizer.decode(self._tail, self.skip_special)
        new = text[self._given :]
        self._tail, self._given = [], 0
        return new
