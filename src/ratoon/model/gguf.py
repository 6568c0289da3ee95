"""GGUF files, as llama.cpp writes them -> settings, weights under our names, metadata.

Decides how the file is laid out and what its names mean; the block formats are in `quants.py`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.model.config import ModelConfig
from ratoon.model.folder import empty_model, put_state
from ratoon.model.quants import FORMATS
from ratoon.model.rotary import frequencies
from ratoon.model.transformer import Transformer

LLAMA3_CONTEXT_TOKENS = 8192
"""The context that Llama 3 was trained with before its positions were stretched."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its shape (rows first), type number, and place in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class _Cursor:
    """Reads the head of a file, and says where it ends too early."""

    def __init__(self, raw: np.memmap[Any, np.dtype[np.uint8]], path: Path) -> None:
        self.raw, self.path, self.at = raw, path, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.raw):
            raise ArtifactError(
                f"the file ends at byte {len(self.raw):,}, inside its head", where=self.path, fix="fetch it again"
            )
        self.at += size
        return self.raw[self.at - size : self.at].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner == _ARRAY:
                raise ArtifactError(f"a list of lists at byte {self.at}", where=self.path, expected="a list of values")
            if inner in _SCALARS:
                code = np.dtype("<" + _SCALARS[inner])
                return np.frombuffer(self.take(count * code.itemsize), dtype=code).tolist()
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ArtifactError(f"a value of the unknown type {kind} at byte {self.at}", where=self.path)
        return self.scalar(_SCALARS[kind])


def read_head(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Entry], Any]:
    """Metadata, the table of tensors, and the mapped bytes of a GGUF file.

    Raises `ArtifactError` for a file that is none, is cut, or holds a tensor type that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError("there is no such file", where=path, expected="a GGUF file")
    if path.stat().st_size < 24:
        raise ArtifactError(f"the file has {path.stat().st_size} bytes", where=path, expected="a GGUF file")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    cursor = _Cursor(raw, path)
    if cursor.take(4) != b"GGUF":
        raise ArtifactError("the file does not begin with GGUF", where=path, expected="a GGUF file")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ArtifactError(f"GGUF version {version}", where=path, expected="version 2 or 3, little-endian")
    tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(keys)}
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = cursor.text()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        found[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ArtifactError(f"'general.alignment' is {align!r}", where=path, expected="a number of bytes")
    base = (cursor.at + align - 1) // align * align
    entries: dict[str, Entry] = {}
    for name, (shape, kind, offset) in found.items():
        if kind not in FORMATS:
            raise ArtifactError(
                f"the tensor '{name}' is of type {kind}", where=path, expected=", ".join(f[0] for f in FORMATS.values())
            )
        _, numbers, size, _ = FORMATS[kind]
        count = math.prod(shape)
        if not 0 < count <= len(raw) * numbers:
            raise ArtifactError(f"'{name}' has the shape {shape}", where=path, expected="what fits the file")
        if count % numbers:
            raise ArtifactError(f"'{name}' has {count} numbers, not a multiple of {numbers}", where=path)
        entries[name] = Entry(shape, kind, base + offset, count // numbers * size)
    end = max((entry.start + entry.size for entry in entries.values()), default=0)
    if end > len(raw):
        raise ArtifactError(
            f"the file is cut: it has {len(raw):,} bytes",
            where=path,
            expected=f"at least {end:,}",
            fix="fetch it again",
        )
    return metadata, entries, raw


def dequantize(raw: Any, entry: Entry) -> Tensor:
    """A tensor of the file as float32."""
    _, _, size, decode = FORMATS[entry.kind]
    blocks = np.asarray(raw[entry.start : entry.start + entry.size]).reshape(-1, size)
    out = np.empty(entry.shape, dtype=np.float32)
    flat = out.reshape(-1)
    step, at = max(1, (1 << 22) // size), 0
    for start in range(0, len(blocks), step):  # in pieces that stay in the processor's cache
        values = decode(blocks[start : start + step]).reshape(-1)
        flat[at : at + len(values)] = values
        at += len(values)
    return torch.from_numpy(out)


def read_gguf(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Settings, weights under our names in `dtype`, and metadata (the tokenizer's among it).

    Raises `ArtifactError` for an architecture or tensor that is not known, and for a cut file.
    """
    path = Path(path)
    metadata, entries, raw = read_head(path)
    cfg = _config(metadata, _architecture(metadata, path), entries, path)
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        ours = _our_name(name)
        if ours is None:
            if name == "rope_freqs.weight":
                continue  # read with the settings
            raise ArtifactError(f"the tensor '{name}' is not known", where=path)
        value = dequantize(raw, entry)
        state |= {
            n: v.to(dtype).contiguous() for n, v in _place(ours, value, cfg, metadata["general.architecture"]).items()
        }
    if cfg.tied_embeddings:
        state.pop("head.weight", None)
    return cfg, state, metadata


def read_gguf_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The settings in a GGUF file, without its weights. Raises as `read_gguf`."""
    path = Path(path)
    metadata, entries, _ = read_head(path)
    return _config(metadata, _architecture(metadata, path), entries, path)


def _architecture(metadata: dict[str, Any], path: Path) -> str:
    architecture = metadata.get("general.architecture", "")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ArtifactError(
            f"the architecture '{architecture}' is not supported", where=path, expected=", ".join(sorted(ARCHITECTURES))
        )
    return architecture


def read_gguf_model(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> tuple[Transformer, dict[str, Any]]:
    """The model in a GGUF file, in evaluation mode, and the file's metadata."""
    cfg, state, metadata = read_gguf(path, dtype)
    model = empty_model(cfg)
    put_state(model, state, path)
    return model, metadata


_TOP = {
    "token_embd.weight": "embed.weight",
    "position_embd.weight": "place.weight",
    "output_norm.weight": "final_norm.weight",
    "output_norm.bias": "final_norm.bias",
    "output.weight": "head.weight",
}
_IN_BLOCK = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_qkv": "attention.qkv",
    "attn_output": "attention.o",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.gate",
    "ffn_up_exps": "mlp.up",
    "ffn_down_exps": "mlp.down",
}


def _our_name(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _IN_BLOCK:
        return None
    stacked = parts[2].endswith("_exps")  # the experts' weights are parameters themselves, not layers
    return f"layers.{parts[1]}.{_IN_BLOCK[parts[2]]}" + ("" if stacked else f".{parts[3]}")


def _place(name: str, value: Tensor, cfg: ModelConfig, architecture: str) -> dict[str, Tensor]:
    """A tensor of the file as ours: fused ones split, turned heads turned back, Gemma's gains without their 1."""
    if ".qkv." in name:
        sizes = [cfg.heads * cfg.channels, cfg.kv * cfg.channels, cfg.kv * cfg.channels]
        if value.shape[0] != sum(sizes):
            return {name: value}  # told, with its name, by put_state
        parts = torch.split(value, sizes)
        return {name.replace(".qkv.", f".{letter}."): part for letter, part in zip("qkv", parts, strict=True)}
    if architecture == "llama" and (".attention.q." in name or ".attention.k." in name):
        heads = cfg.heads if ".attention.q." in name else cfg.kv
        if value.shape[0] != heads * cfg.channels:
            return {name: value}  # told, with its name, by put_state
        pairs = value.view(heads, cfg.channels // 2, 2, *value.shape[1:])
        return {name: pairs.transpose(1, 2).reshape(value.shape)}
    if cfg.norm_weight == "plus_one" and "norm.weight" in name:
        return {name: value - 1}
    return {name: value}


class _Keys:
    """The keys of an architecture; remembers which were asked for, so that none is passed over."""

    def __init__(self, metadata: dict[str, Any], architecture: str, path: Path) -> None:
        self.metadata, self.architecture, self.path = metadata, architecture, path
        self.asked: set[str] = set()

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`. Raises `ArtifactError` when it is absent and has no default."""
        self.asked.add(f"{self.architecture}.{key}")
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ArtifactError(f"the key '{self.architecture}.{key}' is missing", where=self.path)
        return value

    def expect(self, key: str, wanted: Any) -> None:
        """Raise `ArtifactError` unless the key is absent or has that value."""
        found = self(key, wanted)
        if found != wanted:
            raise ArtifactError(
                f"'{self.architecture}.{key}' is {found!r}",
                where=self.path,
                expected=repr(wanted),
                fix="use the model's Hugging Face folder",
            )

    def refuse_rest(self) -> None:
        """Raise `ArtifactError` for keys of the architecture that nobody asked for."""
        rest = sorted(
            key
            for key in self.metadata
            if key.startswith(f"{self.architecture}.") and key not in self.asked | self._silent
        )
        if rest:
            raise ArtifactError(
                f"the keys {', '.join(rest)} are not known, and may change what the model computes",
                where=self.path,
                fix="use the model's Hugging Face folder",
            )

    @property
    def _silent(self) -> set[str]:
        """What says nothing beyond the tensors' own shapes, or how the file came to be."""
        return {f"{self.architecture}.{key}" for key in ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")}


def _config(metadata: dict[str, Any], architecture: str, entries: dict[str, Entry], path: Path) -> ModelConfig:
    get = _Keys(metadata, architecture, path)
    if metadata.get("split.count", 1) != 1:
        raise ArtifactError(
            f"the file is one part of {metadata['split.count']}",
            where=path,
            fix="join them with llama-gguf-split --merge",
        )
    width, heads = get("embedding_length"), get("attention.head_count")
    if not all(isinstance(value, int) and value > 0 for value in (width, heads)):
        raise ArtifactError(f"{width!r} channels in {heads!r} heads", where=path, expected="two numbers")
    channels = get("attention.key_length", width // heads)
    get.expect("attention.value_length", channels)
    get.expect("expert_count", 0) if architecture != "qwen3moe" else None
    get.expect("expert_used_count", 0) if architecture != "qwen3moe" else None
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    table: dict[str, Any] = {
        "vocab_size": entries["token_embd.weight"].shape[0] if "token_embd.weight" in entries else get("vocab_size"),
        "width": width,
        "layers": get("block_count"),
        "heads": heads,
        "kv_heads": get("attention.head_count_kv", heads),
        "head_dim": channels,
        "mlp_width": get("feed_forward_length"),
        "context_tokens": get("context_length"),
        "tied_embeddings": "output.weight" not in entries,
        "bos_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_ids": () if eos is None else (eos,),
        "pad_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "zero_init_outputs": False,
        **ARCHITECTURES[architecture](get),
    }
    layer_norm = table.get("norm") == "layer"
    table["norm_eps"] = get(f"attention.layer_norm_{'epsilon' if layer_norm else 'rms_epsilon'}", 1e-5)
    if table.get("positions") != "learned":
        table.setdefault("rope_theta", get("rope.freq_base", 10_000.0))
        if "rope_fraction" not in table:
            get.expect("rope.dimension_count", channels)
        scaling = _rope_scaling(get, table["context_tokens"], entries, channels, path)
        if scaling is not None:
            table["rope_scaling"] = scaling
    get.refuse_rest()
    try:
        return build(ModelConfig, table, where=path)
    except ConfigError as error:
        raise ArtifactError(f"the settings cannot be: {error.found}", where=path) from None


def _rope_scaling(
    get: _Keys, context_tokens: int, entries: dict[str, Entry], channels: int, path: Path
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in entries:
        return _llama3_factors(get, entries["rope_freqs.weight"], channels, path)
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ArtifactError(f"rotary positions are scaled as '{kind}'", where=path, expected="none, linear or yarn")
    scaling: dict[str, Any] = {"kind": kind, "factor": get("rope.scaling.factor")}
    original = get("rope.scaling.original_context_length", context_tokens)
    if kind == "yarn":
        scaling["original_context_tokens"] = original
    return scaling


def _llama3_factors(get: _Keys, entry: Entry, channels: int, path: Path) -> dict[str, Any]:
    """Llama 3's scaling out of the table of factors that its converter writes in place of the settings.

    The slowest channel's factor is `factor` itself; the other numbers are those of every Llama 3 that was published,
    and the table they give must be the table in the file.
    """
    factors = dequantize(np.memmap(path, dtype=np.uint8, mode="r"), entry)
    factor = float(factors.max())
    scaling = {"kind": "llama3", "factor": factor, "original_context_tokens": LLAMA3_CONTEXT_TOKENS}
    table = {"vocab_size": 1, "width": channels, "layers": 1, "heads": 1, "mlp_width": 1, "context_tokens": 1}
    table["rope_theta"] = get("rope.freq_base", 10_000.0)
    given, _ = frequencies(build(ModelConfig, table, where=path))
    wanted, _ = frequencies(build(ModelConfig, {**table, "rope_scaling": scaling}, where=path))
    if factors.shape != given.shape or not torch.allclose(given / factors, wanted, rtol=1e-5, atol=0.0):
        raise ArtifactError(
            "the file scales rotary positions with a table of factors (rope_freqs) that is not Llama 3's",
            where=path,
            fix="use the model's Hugging Face folder",
        )
    return scaling


def _experts(get: _Keys) -> dict[str, Any]:
    get.expect("expert_shared_count", 0)
    get.expect("expert_weights_norm", True)
    return {
        "family": "qwen3_moe",
        "qk_norm": "before_rope",
        "moe": {
            "experts": get("expert_count"),
            "experts_per_token": get("expert_used_count"),
            "expert_width": get("expert_feed_forward_length"),
            "normalize_weights": True,
        },
    }


def _gemma3(get: _Keys) -> dict[str, Any]:
    layers, window = get("block_count"), get("attention.sliding_window")
    get.expect("attention.sliding_window_pattern", 6)
    # The 27B model (62 layers) is the one whose scores are scaled by its width, not by its heads' channels.
    share = get("embedding_length") // get("attention.head_count")
    scale = {"query_scale": share**-0.5} if layers == 62 else {}
    return {
        "family": "gemma3_text",
        "mlp": "geglu_tanh",
        "qk_norm": "before_rope",
        "norm_weight": "plus_one",
        "norm_layout": "sandwich",
        "windows": tuple(None if (i + 1) % 6 == 0 else window for i in range(layers)),
        "rope_theta": get("rope.freq_base", 1_000_000.0),
        "rope_local_theta": get("rope.freq_base_swa", 10_000.0),
        **scale,
        "embedding_scale": get("embedding_length") ** 0.5,
    }


_GPT: dict[str, Any] = {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True}

ARCHITECTURES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": lambda get: {"family": "llama"},
    "qwen2": lambda get: {"family": "qwen2", "qkv_bias": True},
    "qwen3": lambda get: {"family": "qwen3", "qk_norm": "before_rope"},
    "qwen3moe": _experts,
    "gemma3": _gemma3,
    "gpt2": lambda get: {**_GPT, "family": "gpt2", "positions": "learned", "mlp": "gelu_tanh"},
    "gptneox": lambda get: {
        **_GPT,
        "family": "gpt_neox",
        "mlp": "gelu",
        "norm_layout": "parallel" if get("use_parallel_residual", True) else "pre",
        "rope_fraction": get("rope.dimension_count") / (get("embedding_length") // get("attention.head_count")),
        "rope_theta": get("rope.freq_base", 10_000.0),
    },
}
"""GGUF's architectures -> our settings beyond those that all have."""
