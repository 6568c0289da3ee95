"""Little tokenizers of every kind that is met in the wild, made on the spot, and texts that are hard for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core

CHINESE = (
    "人工智能正在改变我们的生活。今天天气很好，我们去公园散步吧！这本书的质量不错，价格也便宜。"
    "请问您需要什么帮助？谢谢，再见。《红楼梦》是中国古典小说的代表作。二〇二四年，北京。"
)
HARD = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\t\r\n",
    "don't we'll IT'S",
    "1234567890 3.14 1e-3",
    "a\r\n0 \n\n7  1",
    "人工智能，今天天气很好！",
    "これは日本語です。한국어도 있습니다.",
    "été naïve Ångström e\u0301",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 🇩🇪",
    "مرحبا बहुत ไทย",
    "\x00\x01\x7f\x85\u200b\u2028\ufeff",
    "\U0010ffff\ufffd\ue000",
    "<|endoftext|> <|im_start|>user<|im_end|> </s><s> <unk>",
    "<0x41> ▁▁ Ġ Ċ",
    "a" * 70,
    "  \u3000全角　空格",
]
SMALL = [text for name, text in sorted(topics.items())][:12]

characters = st.characters(exclude_categories=["Cs"])
any_text = st.one_of(
    st.text(characters, max_size=30),
    st.lists(st.one_of(st.sampled_from(HARD), st.text(characters, max_size=4)), max_size=5).map("".join),
)
"""Any Unicode text: control characters, emoji, joiners, spellings of special tokens."""


def corpus() -> list[str]:
    """English and a little Chinese that is on every machine."""
    return [*SMALL, *([CHINESE] * 5)]


def write(folder: Path, core: Core, config: dict[str, Any] | None = None) -> Path:
    """`core` as a folder that Transformers reads too."""
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


@cache
def _gpt2() -> str:
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return str(core.to_str())


def gpt2(folder: Path) -> Path:
    """Byte-level BPE as GPT-2's."""
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return write(folder, Core.from_str(_gpt2()), config)


@cache
def _llama() -> str:
    core = Core(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*|[^▁]+"), "isolated")  # for the training alone
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=["▁"],
        limit_alphabet=150,
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    table = json.loads(core.to_str())
    vocab, taken = table["model"]["vocab"], [token["content"] for token in table["added_tokens"]]
    names = [*taken, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in sorted(vocab, key=vocab.__getitem__) if token not in taken]
    table["model"]["vocab"] = {token: number for number, token in enumerate(names)}
    table["pre_tokenizer"] = None
    core = Core.from_str(json.dumps(table))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return str(core.to_str())


def llama(folder: Path) -> Path:
    """BPE over spaces written as ▁, with bytes for what it does not know: Llama 2's way."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, Core.from_str(_llama()), config)


@cache
def _metaspace() -> str:
    core = Core(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(corpus(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    return str(core.to_str())


def metaspace(folder: Path) -> Path:
    """Unigram over Metaspace, as T5's."""
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return write(folder, Core.from_str(_metaspace()), config)


@cache
def _llama3() -> str:
    core = Core(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(corpus(), trainer)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                special_tokens=[("<|begin_of_text|>", core.token_to_id("<|begin_of_text|>"))],
            ),
        ]
    )
    return str(core.to_str())


def llama3(folder: Path) -> Path:
    """Byte-level BPE with Llama 3's words and special tokens."""
    return write(folder, Core.from_str(_llama3()), {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})


FOLDERS: dict[str, Callable[[Path], Path]] = {"gpt2": gpt2, "llama": llama, "metaspace": metaspace, "llama3": llama3}


@cache
def sentencepiece_model(kind: str, **options: Any) -> bytes:
    """A SentencePiece model of that type (unigram, bpe), trained on the spot."""
    import io

    import sentencepiece

    lines = [line for text in SMALL for line in text.splitlines() if line.strip()] + [CHINESE] * 5
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type=kind,
        minloglevel=5,
        **{"vocab_size": 900, "character_coverage": 0.995, **options},
    )
    return out.getvalue()
