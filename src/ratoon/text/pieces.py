"""SentencePiece models -> the JSON of a tokenizer of the `tokenizers` library.

Decides how a `tokenizer.model` is read (with a reader of our own for the few fields that matter, so that neither
sentencepiece nor protobuf is needed) and which normalizer, model and decoder give the same ids as the original. Two
differences are known, both of the `tokenizers` library and so of Transformers too: rules of the normalizer for several
characters are not found inside a longer group of marks on one letter, and of two equally likely ways to cut a text
another may be taken.
The format: the `sentencepiece_model.proto` of the SentencePiece project; Kudo & Richardson, arXiv:1808.06226.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from ratoon.base.errors import ArtifactError
from ratoon.text.core import frame, read_core

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, MERGES = 1, 2


@dataclass(frozen=True)
class Pieces:
    """What a SentencePiece model says. `kinds` are the proto's piece types, `model` its model type."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    model: int = UNIGRAM
    byte_fallback: bool = False
    dummy_prefix: bool = True
    squeeze_spaces: bool = True
    charsmap: bytes = b""
    roles: dict[str, int] = field(default_factory=dict)


def load_pieces(path: Path, config: Mapping[str, Any]) -> tuple[Core, dict[str, Any]]:
    """The tokenizer in a SentencePiece file and the roles it gives to its tokens.

    `config` is the `tokenizer_config.json` beside it: whether texts begin with bos and end with eos stands there.
    Raises `ArtifactError` for a file that is none, or whose kind has no equal here.
    """
    try:
        pieces = read_pieces(path.read_bytes())
    except (ValueError, TypeError, AttributeError, LookupError, struct.error) as error:
        raise ArtifactError(
            f"not readable as a SentencePiece model: {error}",
            where=path,
            expected="a SentencePiece model of type unigram or bpe",
            fix="fetch the file again, or convert the tokenizer to tokenizer.json",
        ) from None
    roles = {role: pieces.texts[number] for role, number in pieces.roles.items() if 0 <= number < len(pieces.texts)}
    llama = str(config.get("tokenizer_class", "")).startswith(("Llama", "Gemma"))
    table = to_table(
        pieces, add_bos=bool(config.get("add_bos_token", llama)), add_eos=bool(config.get("add_eos_token"))
    )
    return read_core(json.dumps(table, ensure_ascii=False), set()), roles


def read_pieces(data: bytes) -> Pieces:
    """The pieces of a serialized model. Raises `ValueError` when it is none or of a kind that cannot be translated."""
    texts: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            texts.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            kinds.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            rules = dict(_fields(value))
    if not texts:
        raise ValueError("it holds no pieces")
    model = trainer.get(3, UNIGRAM)
    if model not in (UNIGRAM, MERGES):
        raise ValueError("its model type is word or char, which cannot be translated")
    if trainer.get(24, 0):
        raise ValueError("it writes spaces as suffixes, which cannot be translated")
    if not rules.get(5, 1):
        raise ValueError("it does not mark spaces, which cannot be translated")
    roles = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
    roles["pad_token"] = trainer.get(43, (1 << 64) - 1)
    return Pieces(
        texts,
        scores,
        kinds,
        model=model,
        byte_fallback=bool(trainer.get(35, 0)),
        dummy_prefix=bool(rules.get(3, 1)),
        squeeze_spaces=bool(rules.get(4, 1)),
        charsmap=rules.get(2, b""),
        roles={role: number for role, number in roles.items() if number < len(texts)},
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number with an int (varint) or bytes (everything else)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} is no field of a protobuf message")
        if at + size > len(data):
            raise ValueError(f"the file is cut: {at + size - len(data):,} bytes are missing")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"byte {at} is no number of a protobuf message")


def to_table(pieces: Pieces, *, add_bos: bool = False, add_eos: bool = False) -> dict[str, Any]:
    """The `tokenizer.json` that gives the ids of `pieces`."""
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, (text, kind) in enumerate(zip(pieces.texts, pieces.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(pieces)},
        "pre_tokenizer": _cuts(pieces),
        "post_processor": _frame(pieces, add_bos, add_eos),
        "decoder": _decoder(pieces),
        "model": _unigram(pieces) if pieces.model == UNIGRAM else _merges(pieces),
    }


def _symbols(pieces: Pieces) -> list[str]:
    return [text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind == USER]


def _cuts(pieces: Pieces) -> dict[str, Any] | None:
    """Where no token may span the normalized text: around a user's symbols, which stand alone, longest first; and
    inside what is spelled like a byte's piece, which a unigram model would take for the byte."""
    steps: list[dict[str, Any]] = []
    if symbols := sorted(_symbols(pieces), key=len, reverse=True):
        steps.append(_split("|".join(map(re.escape, symbols))))
    if pieces.model == UNIGRAM and BYTE in pieces.kinds:
        steps.append(_split("(?<=<0x[0-9A-F]{2})(?=>)"))
    if len(steps) > 1:
        return {"type": "Sequence", "pretokenizers": steps}
    return steps[0] if steps else None


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _normalizers(pieces: Pieces) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if pieces.charsmap:
        charsmap = base64.b64encode(pieces.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if pieces.squeeze_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if pieces.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _decoder(pieces: Pieces) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if pieces.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if pieces.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(pieces: Pieces) -> dict[str, Any]:
    usable = [score for score, kind in zip(pieces.scores, pieces.kinds, strict=True) if kind in (NORMAL, USER)]
    low = min(usable, default=0.0)
    vocab = []
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        # Bytes and unused pieces are never spelled by text: worse than anything that is (unknown is lowest - 10).
        vocab.append([text, low if kind in (BYTE, UNUSED) else score])
    return {
        "type": "Unigram",
        "unk_id": pieces.roles.get("unk_token"),
        "vocab": vocab,
        "byte_fallback": pieces.byte_fallback,
    }


def _merges(pieces: Pieces) -> dict[str, Any]:
    """The BPE model: SentencePiece joins the two neighbours whose joined piece has the best score, so each way to cut
    a piece in two is a merge, and merges stand in the order of scores."""
    vocab = {text: number for number, text in enumerate(pieces.texts)}
    mergeable = {text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind in (NORMAL, UNUSED)}
    found: list[tuple[float, int, int, int, str, str]] = []
    for number, (text, score) in enumerate(zip(pieces.texts, pieces.scores, strict=True)):
        if text not in mergeable:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                found.append((-score, number, vocab[left], vocab[right], left, right))
    found.sort(key=lambda merge: merge[:4])
    unknown = pieces.roles.get("unk_token")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else pieces.texts[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": pieces.byte_fallback,
        "ignore_merges": bool(_symbols(pieces)),
        "vocab": vocab,
        "merges": [[left, right] for *_, left, right in found],
    }


def _frame(pieces: Pieces, add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    roles = {role: pieces.texts[number] for role, number in pieces.roles.items()}
    begin = [roles["bos_token"]] if add_bos and "bos_token" in roles else []
    end = [roles["eos_token"]] if add_eos and "eos_token" in roles else []
    return frame(begin, end, {text: pieces.texts.index(text) for text in (*begin, *end)})
