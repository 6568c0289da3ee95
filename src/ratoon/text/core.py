"""What of a `tokenizer.json` decides ids, and what keeps a user's text from becoming a control token.

Works on the JSON form of a tokenizer of the `tokenizers` library; the object around it is `tokenizer.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Core

DECIDES = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""The parts that decide ids; the decoder, the post-processor, padding and truncation do not."""


def ids_hash(core: Core) -> str:
    """SHA-256 of what decides the ids of a text, whichever version of the library wrote it.

    Settings that are absent, null or false count as one: a newer library writes fields that an older one did not know.
    """
    table = json.loads(core.to_str(pretty=False))
    kept = {part: _said(table.get(part)) for part in DECIDES}
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _said(inner) for key, inner in value.items() if inner is not None and inner is not False}
    if isinstance(value, list):
        # Merges stand as pairs or as "left right", by version.
        if value and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) for pair in value):
            return [" ".join(pair) for pair in value]
        return [_said(inner) for inner in value]
    return value


def read_core(text: str, special: set[str]) -> Core:
    """A tokenizer from its JSON, in which every spelling in `special` counts as a special token and none can be
    spelled by ordinary text. Raises whatever the library raises for JSON that is no tokenizer."""
    table = json.loads(text)
    changed = False
    for token in table.get("added_tokens") or []:
        if token["content"] in special and not token.get("special"):
            token["special"] = changed = True
    spellable = _spellable(table)
    if spellable:
        table["pre_tokenizer"] = _with_breaks(table.get("pre_tokenizer"), spellable)
        changed = True
    return Core.from_str(json.dumps(table, ensure_ascii=False) if changed else text)


def _spellable(table: dict[str, Any]) -> list[str]:
    """Special tokens that the model itself could make of ordinary characters: a Unigram model holds them among its
    pieces, and in a BPE model a merge may end in one."""
    special = {token["content"] for token in table.get("added_tokens") or [] if token.get("special")}
    model = table.get("model") or {}
    if model.get("type") == "Unigram":
        made = {piece for piece, _ in model["vocab"]}
    elif model.get("type") == "BPE":
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or [])
        made = {left + right for left, right in pairs}
    else:
        return []
    return sorted(token for token in special & made if len(token) > 1)


def _with_breaks(pre_tokenizer: dict[str, Any] | None, spellings: list[str]) -> dict[str, Any]:
    """`pre_tokenizer` followed by a cut after the first character of each of `spellings`: no piece can span the cut.
    Where special tokens are wanted they are found before any of this runs."""
    patterns = [f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in spellings]
    cut = {"type": "Split", "pattern": {"Regex": "|".join(patterns)}, "behavior": "Isolated", "invert": False}
    if pre_tokenizer is None:
        return cut
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return {"type": "Sequence", "pretokenizers": [*(part for part in parts if part != cut), cut]}


def frame(begin: Sequence[str], end: Sequence[str], ids: Mapping[str, int]) -> dict[str, Any] | None:
    """The post-processor that puts special tokens around a text; None where there are none."""
    if not begin and not end:
        return None

    def around(*texts: str) -> list[dict[str, Any]]:
        inner = [{"Sequence": {"id": text, "type_id": 0}} for text in texts]
        return [*map(_mark, begin), *inner, *map(_mark, end)]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A", "B"),
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*begin, *end)},
    }


def _mark(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def whole_runs(tokens: list[str]) -> list[str]:
    """Byte tokens (`<0xE4>`) of a byte-fallback model with those that form no character replaced by U+FFFD.

    The library turns a whole run of byte tokens into U+FFFD when one of them is stray; here its neighbours survive,
    and what was decoded before a stray byte never changes because of it.
    """
    out: list[str] = []
    run: list[str] = []

    def close() -> None:
        data = bytes(int(token[3:5], 16) for token in run)
        for character in data.decode("utf-8", "replace"):
            encoded = character.encode()
            out.extend(["\ufffd"] if character == "\ufffd" else [f"<0x{byte:02X}>" for byte in encoded])
        run.clear()

    for token in tokens:
        if _BYTE.match(token):
            run.append(token)
        else:
            close()
            out.append(token)
    close()
    return out


_BYTE = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")
