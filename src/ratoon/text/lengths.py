"""How many bytes of text a token stands for: what makes losses of different tokenizers comparable."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ratoon.text.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """UTF-8 bytes of text that each id stands for (V,), 0 for special tokens.

    Exact for byte-level tokenizers, where a token is a run of bytes, and for SentencePiece-like ones that fall back on
    bytes, but for what these put before a text (`added_bytes`); both of the text as the tokenizer normalises it. None
    for other kinds, whose tokens have no length of their own (one unknown token stands for any character).
    """
    table = json.loads(tokenizer.core.to_str(pretty=False))
    kinds = set(_kinds(table["decoder"]))
    if not kinds & {"ByteLevel", "ByteFallback"}:
        return None
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for piece, number in tokenizer.core.get_vocab(with_added_tokens=False).items():
        if "ByteLevel" in kinds:
            lengths[number] = len(piece)  # one character of the alphabet for each byte
        else:
            lengths[number] = 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())
    for number, token in tokenizer.core.get_added_tokens_decoder().items():
        lengths[number] = 0 if token.special else len(token.content.encode())
    return lengths


def added_bytes(tokenizer: Tokenizer, lengths: npt.NDArray[np.int64]) -> int:
    """Bytes that the first token of a text stands for beyond the text: the space that some tokenizers put before it."""
    return int(lengths[tokenizer.encode("a")].sum()) - 1


def _kinds(part: Any) -> list[str]:
    """The types of a decoder and of those inside it."""
    if not isinstance(part, dict):
        return []
    return [part["type"], *(kind for inner in part.get("decoders", []) for kind in _kinds(inner))]
