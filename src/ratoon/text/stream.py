"""Token ids as they come -> text that can be shown as it comes: only whole characters, each once."""

from __future__ import annotations

from ratoon.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes one token after the other; what is given out, joined, is what the whole would decode to.

    A token may hold part of a character, and may be spelled differently at the start of a text than inside it. So a
    short tail of ids is kept and decoded again with each new one; the cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._tail: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """The characters that `token` completes; may be empty."""
        self._tail.append(token)
        text = self.tokenizer.decode(self._tail, self.skip_special)
        if text.endswith("�"):  # an unfinished character, or one that never will be: seen by what follows
            if len(self._tail) < 32:
                return ""
            return self._give(text)
        return self._give(text)

    def flush(self) -> str:
        """What is left, unfinished characters as U+FFFD."""
        text = self.tokenizer.decode(self._tail, self.skip_special)
        new = text[len(self._given) :]
        self._tail, self._given = [], ""
        return new

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        if len(self._tail) > 8 and new:
            # Keep the last token as the left border for the next one's spelling.
            self._tail = self._tail[-1:]
            self._given = self.tokenizer.decode(self._tail, self.skip_special)
        else:
            self._given = text
        return new
