"""The vocabulary in a GGUF file's metadata -> the JSON of a tokenizer of the `tokenizers` library.

Decides which of GGUF's tokenizer kinds are known: `gpt2` (byte-level BPE, cut into words by the rule named in
`tokenizer.ggml.pre`), `llama` (SentencePiece BPE) and `t5` (SentencePiece unigram).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ratoon.base.errors import ArtifactError
from ratoon.text.core import frame
from ratoon.text.pieces import BYTE, CONTROL, MERGES, UNIGRAM, UNKNOWN, USER, Pieces, to_table

ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}

# How each family cuts text into words before BPE. The patterns are part of the formats: another cut, other ids.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

WORDS: dict[str, list[str]] = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_QWEN2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
SAME = {
    "gpt-2": ("mpt", "olmo", "phi-2", "jina-es", "jina-de", "gigachat"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell"),
    "llama-bpe": ("llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"),
}
NAMES = {**{name: name for name in WORDS}, **{other: name for name, others in SAME.items() for other in others}}


def translate(meta: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `tokenizer.json` and the settings beside it. Raises `ArtifactError` for what is missing or unknown."""
    kind = meta.get("tokenizer.ggml.model")
    tokens = meta.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama", "t5") or not tokens:
        raise ArtifactError(
            f"the GGUF file's tokenizer is of the kind '{kind}'" if tokens else "the GGUF file holds no tokenizer",
            where="tokenizer.ggml.model" if tokens else "tokenizer.ggml.tokens",
            expected="gpt2, llama or t5",
        )
    tokens = [str(token) for token in tokens]
    config: dict[str, Any] = {}
    for role, name in ROLES.items():
        number = meta.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= int(number) < len(tokens):
            config[role] = tokens[int(number)]
    if meta.get("tokenizer.chat_template"):
        config["chat_template"] = str(meta["tokenizer.chat_template"])
    if kind == "gpt2":
        return _byte_level(meta, tokens, config), config
    types = meta.get("tokenizer.ggml.token_type")
    scores = meta.get("tokenizer.ggml.scores")
    if types is None or scores is None or not len(types) == len(scores) == len(tokens):
        raise ArtifactError(
            "the GGUF file's tokenizer has not one score and one type for each token", where="tokenizer.ggml.scores"
        )
    kinds = [int(number) for number in types]
    charsmap = meta.get("tokenizer.ggml.precompiled_charsmap")
    pieces = Pieces(
        tokens,
        [float(score) for score in scores],
        kinds,
        model=UNIGRAM if kind == "t5" else MERGES,
        byte_fallback=BYTE in kinds,
        dummy_prefix=bool(meta.get("tokenizer.ggml.add_space_prefix", True)),
        squeeze_spaces=bool(meta.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        charsmap=bytes(int(byte) & 255 for byte in charsmap) if charsmap is not None else b"",
        roles={role: tokens.index(token) for role, token in config.items() if role in ROLES},
    )
    bos = bool(meta.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    return to_table(pieces, add_bos=bos, add_eos=bool(meta.get("tokenizer.ggml.add_eos_token", kind == "t5"))), config


def _byte_level(meta: Mapping[str, Any], tokens: list[str], config: dict[str, Any]) -> dict[str, Any]:
    pre = str(meta.get("tokenizer.ggml.pre", "default"))
    name = NAMES.get(pre)
    if name is None:
        raise ArtifactError(
            f"the GGUF file's tokenizer cuts words by the rule '{pre}', which is not known here",
            where="tokenizer.ggml.pre",
            expected=", ".join(sorted(NAMES)),
            fix="use the model's Hugging Face folder: its tokenizer.json says the rule itself",
        )
    types = meta.get("tokenizer.ggml.token_type")
    kinds = [int(number) for number in types] if types is not None else [1] * len(tokens)
    added = [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER,
        }
        for number, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in WORDS[name]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = {token: number for number, token in enumerate(tokens)}
    begin = [config["bos_token"]] if meta.get("tokenizer.ggml.add_bos_token") and "bos_token" in config else []
    end = [config["eos_token"]] if meta.get("tokenizer.ggml.add_eos_token") and "eos_token" in config else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "post_processor": frame(begin, end, vocab),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name == "llama-bpe",
            "vocab": vocab,
            "merges": [str(merge).split(" ", 1) for merge in meta.get("tokenizer.ggml.merges") or []],
        },
    }
