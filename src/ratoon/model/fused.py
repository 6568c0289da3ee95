"""Attention, tanh-GELU, the embedding's gradient and the cross entropy in C, as operations of torch.

Decides when `fused.c` may stand for the plain product of `attention.py`: bfloat16 on a CPU that multiplies it
(AVX512-BF16), no cache, no soft-cap, and sizes that fill its registers. Everything else, and every machine without a C
compiler, goes the plain way; a test holds the two equal.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ratoon.model.config import ModelConfig
from ratoon.model.native import Unavailable, library, processor_flags

_NEEDS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}
_COUNTS = ("threads", "rows", "tokens", "heads", "kv_heads", "channels", "window", "rotating", "causal")
_POINTERS = ("qkv", "cos", "sin", "position", "first", "last", "out", "lse", "d_out", "d_qkv")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@functools.cache
def _code() -> ctypes.CDLL:
    return library(Path(__file__).with_name("fused.c"), "-fopenmp")


def missing() -> str | None:
    """Why the C code cannot be used on this machine; None if it can."""
    lacks = _NEEDS - processor_flags()
    if lacks:
        return f"the processor lacks {', '.join(sorted(lacks))}"
    try:
        _code()
    except Unavailable as error:
        return str(error)
    return None


_usable: bool | None = None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def usable() -> bool:
    """Whether the C code runs on this machine; found out once."""
    global _usable
    if _usable is None:
        _usable = missing() is None
    return _usable


def runs_on(x: Tensor) -> bool:
    """Whether the C code computes with such numbers on this machine."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and usable()


def fits(cfg: ModelConfig, x_BTD: Tensor) -> bool:
    """Whether the C code expresses the attention of such a model on such a stream."""
    fitting = cfg.attention_softcap is None and cfg.channels % 16 == 0 and cfg.channels <= 256
    return fitting and x_BTD.shape[1] > 1 and runs_on(x_BTD)


def turns_inside(cfg: ModelConfig) -> bool:
    """Whether queries and keys come to the C code as they were projected: it rotates and norms them itself."""
    if cfg.positions == "rotary" and round(cfg.channels * cfg.rope_fraction) % 32:
        return False
    return cfg.qk_norm == "none" or (cfg.qk_norm == "after_rope" and cfg.norm_weight == "none" and cfg.norm == "rms")


def run_starts(document_BT: Tensor) -> Tensor:
    """The slot (B, T) at which each token's run of one document begins."""
    T = document_BT.shape[1]
    begins = torch.ones_like(document_BT, dtype=torch.bool)
    begins[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    slots = torch.arange(T, device=document_BT.device).expand_as(document_BT)
    return torch.where(begins, slots, 0).cummax(dim=1).values


def run_ends(document_BT: Tensor) -> Tensor:
    """The slot (B, T) at which each token's run of one document ends."""
    T = document_BT.shape[1]
    return T - 1 - run_starts(document_BT.flip(1)).flip(1)


def attend(
    qkv_BTX: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    position_BT: Tensor | None,
    first_BT: Tensor | None,
    last_BT: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    norm_eps: float | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    """Queries, keys and values of one projection, side by side (B, T, (H + 2 K) C) -> (B, T, H C).

    `rope`: float32 tables of cos and sin (positions, r); `position_BT` absent: 0, 1, …; `first_BT`,
    `last_BT`: see `run_starts` and `run_ends`, absent: each row is one document; `last_BT` is not read where `causal`.
    `norm_eps`: queries and keys are RMS-normed after the rotation. `window`: keys at that distance are not seen, before
    the query or after it. Documents must be runs of neighbouring slots.
    """
    cos, sin = rope if rope is not None else (None, None)
    eps = -1.0 if norm_eps is None else norm_eps
    out: Tensor = torch.ops.ratoon.attention(
        qkv_BTX, cos, sin, position_BT, first_BT, last_BT, heads, kv_heads, scale, eps, window or 0, causal
    )[0]
    return out


def embed(ids_BT: Tensor, table_VD: Tensor) -> Tensor:
    """The vectors of tokens (B, T, D). Its gradient is summed in float32, in the order of the tokens."""
    found: Tensor = _Embedding.apply(ids_BT, table_VD)  # type: ignore[no-untyped-call]
    return found


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab = table.shape[0]
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[None, Tensor]:
        return None, torch.ops.ratoon.embedding_backward(d_out[0], ctx.saved_tensors[0], ctx.vocab)


def gelu_tanh(x_BTF: Tensor, bias_F: Tensor | None) -> Tensor:
    """tanh-GELU of x + bias (…, F), F a multiple of 16."""
    found: Tensor = torch.ops.ratoon.gelu_tanh(x_BTF, bias_F)
    return found


def cross_entropy_(scores_NV: Tensor, targets_N: Tensor, weight_N: Tensor, *, gradient: bool) -> Tensor:
    """Σ -w log softmax(scores)[target] as a float32 scalar; with `gradient` the scores become its gradient, in place.

    Targets of weight 0 are not read. Raises IndexError for one outside the vocabulary.
    """
    assert runs_on(scores_NV) and scores_NV.is_contiguous()
    targets_N, weight_N = targets_N.contiguous(), weight_N.contiguous()
    loss_N = torch.empty(len(scores_NV), dtype=torch.float32)
    failed = _code().ratoon_cross_entropy(
        *(ctypes.c_void_p(x.data_ptr()) for x in (scores_NV, targets_N, weight_N, loss_N)),
        *(ctypes.c_int64(n) for n in (*scores_NV.shape, int(gradient), torch.get_num_threads())),
    )
    if failed == 2:
        raise IndexError(f"a target is outside the vocabulary of {scores_NV.shape[1]} tokens")
    if failed:
        raise MemoryError("no memory for a row of scores")
    return loss_N.sum(dtype=torch.float64).float()


# -- the operations --------------------------------------------------------------------------------------------------

_library: Any = torch.library
_lib = _library.Library("ratoon", "DEF")
_SHARED = (
    "Tensor? cos, Tensor? sin, Tensor? position, Tensor? first, Tensor? last, int heads, int kv_heads, float scale, "
    "float eps, int window, bool causal"
)
_lib.define(f"attention(Tensor qkv, {_SHARED}) -> (Tensor, Tensor)")
_lib.define(f"attention_backward(Tensor d_out, Tensor qkv, Tensor lse, {_SHARED}) -> Tensor")
_lib.define("gelu_tanh(Tensor x, Tensor? bias) -> Tensor")
_lib.define("gelu_tanh_backward(Tensor d_out, Tensor x, Tensor? bias) -> Tensor")
_lib.define("embedding_backward(Tensor d_out, Tensor ids, int vocab) -> Tensor")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(qkv: Tensor, rest: Sequence[Any], **more: Tensor) -> _Call:
    """The arguments of the C code: `rest` are those that both passes share, in their order."""
    cos, sin, position, first, last, heads, kv_heads, scale, eps, window, causal = rest
    B, T, X = qkv.shape
    numbers = {
        "threads": torch.get_num_threads(), "rows": B, "tokens": T, "heads": heads, "kv_heads": kv_heads,
        "channels": X // (heads + 2 * kv_heads), "window": window, "rotating": 0 if cos is None else cos.shape[-1],
        "scale": scale, "eps": eps, "causal": causal,
    }  # fmt: skip
    tensors = {"qkv": qkv, "cos": cos, "sin": sin, "position": position, "first": first, "last": last, **more}
    return _Call(**numbers, **{name: _pointer(tensor) for name, tensor in tensors.items()})


def _attention(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, T, X = qkv.shape
    heads, kv_heads = rest[5], rest[6]
    qkv = qkv.contiguous()
    out = qkv.new_empty(B, T, X // (heads + 2 * kv_heads) * heads)
    lse = torch.empty(B, heads, T, dtype=torch.float32)
    if _code().ratoon_attention(ctypes.byref(_call(qkv, rest, out=out, lse=lse))):
        raise MemoryError("no memory for attention's scratch")
    return out, lse


def _attention_backward(d_out: Tensor, qkv: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    d_qkv = torch.empty_like(qkv)
    if _code().ratoon_attention_backward(ctypes.byref(_call(qkv, rest, lse=lse, d_out=d_out, d_qkv=d_qkv))):
        raise MemoryError("no memory for attention's scratch")
    return d_qkv


def _embedding_backward(d_out: Tensor, ids: Tensor, vocab: int) -> Tensor:
    width = d_out.shape[-1]
    d_out, ids = d_out.contiguous(), ids.contiguous()
    d_table = torch.zeros(vocab, width, dtype=torch.float32)
    _code().ratoon_embedding_backward(
        *(ctypes.c_void_p(x.data_ptr()) for x in (ids, d_out, d_table)),
        *(ctypes.c_int64(n) for n in (ids.numel(), width, torch.get_num_threads())),
    )
    return d_table.to(d_out.dtype)


def _gelu(x: Tensor, bias: Tensor | None, d_out: Tensor | None) -> Tensor:
    x, d_out = x.contiguous(), None if d_out is None else d_out.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    _code().ratoon_gelu_tanh(
        *(ctypes.c_void_p(_pointer(tensor)) for tensor in (x, bias, d_out, out)),
        *(ctypes.c_int64(n) for n in (x.numel() // width, width, torch.get_num_threads())),
    )
    return out


def _gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return _gelu(x, bias, None)


def _gelu_backward(d_out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return _gelu(x, bias, d_out)


def _gelu_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep_gelu(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    d_x = torch.ops.ratoon.gelu_tanh_backward(d_out, x, bias)
    return d_x, None if bias is None else d_x.flatten(0, -2).sum(0)


def _attention_fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, T, X = qkv.shape
    heads, kv_heads = rest[5], rest[6]
    return qkv.new_empty(B, T, X // (heads + 2 * kv_heads) * heads), qkv.new_empty(B, heads, T, dtype=torch.float32)


def _attention_backward_fake(d_out: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _embedding_backward_fake(d_out: Tensor, ids: Tensor, vocab: int) -> Tensor:
    return d_out.new_empty(vocab, d_out.shape[-1])


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, position, first, last, *ctx.rest = inputs
    ctx.save_for_backward(qkv, output[1], cos, sin, position, first, last)


def _attention_gradient(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, lse, *tables = ctx.saved_tensors
    return torch.ops.ratoon.attention_backward(d_out, qkv, lse, *tables, *ctx.rest), *([None] * 11)


for _name, _run, _shape in (
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
    ("gelu_tanh", _gelu_forward, _gelu_fake),
    ("gelu_tanh_backward", _gelu_backward, _gelu_fake),
    ("embedding_backward", _embedding_backward, _embedding_backward_fake),
):
    _lib.impl(_name, _run, "CPU")
    _library.register_fake(f"ratoon::{_name}", _shape, lib=_lib)
_library.register_autograd("ratoon::gelu_tanh", _gelu_gradient, setup_context=_keep_gelu, lib=_lib)
_library.register_autograd("ratoon::attention", _attention_gradient, setup_context=_keep_attention, lib=_lib)
