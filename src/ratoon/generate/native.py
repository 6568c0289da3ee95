"""Decoding in C: one call a token, for dense decoders on the CPU.

Python and torch need a dozen calls a layer, and torch's products of one row leave half of the memory's speed unused.
`step.c` is compiled once for this machine (`model/native.py`); the weights are the
model's own, read in place. Decides which models it can express; everything else goes through the model itself, as
everything does where there is no compiler. A test holds the two equal for every family.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ratoon.model.cache import Cache
from ratoon.model.layers import Linear, Norm
from ratoon.model.native import Unavailable, library
from ratoon.model.transformer import MLP, Attention, Block, Transformer

MOST_ROWS = 8
"""Up to here one pass over the weights in C is faster than torch's matrix product."""

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "geglu_tanh": 1, "relu2": 2, "swiglu": 3}
_LAYOUTS = {"pre": 0, "parallel": 1, "sandwich": 2}
_QK_NORMS = {"none": 0, "before_rope": 1, "after_rope": 2}


def _structure(name: str, **fields: object) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_pointer, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_Norm = _structure("_Norm", weight=_pointer, bias=_pointer)
_Linear = _structure("_Linear", weight=_pointer, bias=_pointer)
_Layer = _structure(
    "_Layer",
    **dict.fromkeys(("attention_norm", "attention_post", "mlp_norm", "mlp_post", "q_norm", "k_norm"), _Norm),
    **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), _Linear),
    **dict.fromkeys(("keys", "values", "cos", "sin"), _pointer),
    window=_int,
)
_SIZES = (
    *("threads", "rows", "width", "layers", "heads", "kv_heads", "channels", "hidden", "vocab", "rotating"),
    *("capacity", "slot", "bf16", "layer_norm", "layout", "qk_norm", "activation", "gated"),
)
_Step = _structure(
    "_Step",
    **dict.fromkeys(_SIZES, _int),
    **dict.fromkeys(("eps", "scale", "attention_softcap", "logit_softcap"), _double),
    layer=_pointer,
    final=_Norm,
    head=_Linear,
    **dict.fromkeys(("position", "first", "x", "logits"), _pointer),
)


@functools.cache
def kernel() -> Callable[[object], int]:
    """The compiled step. Raises `Unavailable` where there is no compiler, or it refuses."""
    step = library(Path(__file__).with_name("step.c"), "-pthread").ratoon_step
    step.argtypes = [ctypes.c_void_p]
    step.restype = ctypes.c_int
    return cast(Callable[[object], int], step)


def why_not(model: Transformer) -> str | None:
    """Why the C step cannot stand for this model; None if it can. Looks at the layers as they are, so that a model
    with an adapter, a hook or a layer of another kind keeps its own forward pass. Virtual tokens were read with the
    prompt: what fills their slots has no part in a step behind them (see `NativeStep.first_position`)."""
    cfg, slots = model.cfg, _slots(model)
    if cfg.moe is not None or cfg.cross_attention or not cfg.causal:
        return "mixtures of experts, cross attention and encoders are not expressed in C"
    weight = model.head_weight()
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights in {weight.dtype} on {weight.device.type}: float32 or bfloat16 on the CPU are expressed in C"
    known = (Transformer, Block, Attention, MLP, Linear, Norm, nn.ModuleList, type(model.embed))
    for name, module in model.named_modules():
        if _within(name, slots):
            continue
        if type(module) not in known:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has a hook"
    for name, parameter in model.named_parameters():
        if _within(name, slots):
            continue
        if parameter.dtype != weight.dtype or not parameter.is_contiguous() or parameter.device != weight.device:
            return f"{name} is stored unlike the other weights"
    return None


def _slots(model: Transformer) -> dict[str, Any]:
    """What fills the slots of virtual tokens, by its place in the model."""
    places: dict[str, nn.Module | None] = {"virtual": model.virtual}
    for number, block in enumerate(model.layers):
        if isinstance(block, Block):
            places[f"layers.{number}.attention.prefix"] = block.attention.prefix
    return {name: module for name, module in places.items() if module is not None}


def _within(name: str, places: Collection[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


class NativeStep:
    """The C step of one model and one cache. Raises `Unavailable` where `why_not` has a reason."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        reason = why_not(model)
        if reason is not None:
            raise Unavailable(reason)
        self._run = kernel()
        self.model, self.cache = model, cache
        self.first_position: int = max((module.tokens for module in _slots(model).values()), default=0)
        """Tokens at places before it are those of virtual tokens, which this step does not know."""
        self._alive: list[Tensor] = []
        cfg = model.cfg
        blocks = [block for block in model.layers if isinstance(block, Block)]
        self._layers = (_Layer * cfg.layers)(*map(self._layer, blocks))
        self._seen: tuple[Tensor, ...] = ()
        tables = model.rotary.tables(torch.device("cpu"), torch.float32) if model.rotary is not None else None
        self._step = _Step(
            threads=torch.get_num_threads(),
            width=cfg.width,
            layers=cfg.layers,
            heads=cfg.heads,
            kv_heads=cfg.kv,
            channels=cfg.channels,
            hidden=cfg.mlp_width,
            vocab=cfg.vocab_size,
            rotating=tables[0].shape[1] if tables is not None else 0,
            capacity=cache.capacity,
            bf16=cache.keys[0].dtype == torch.bfloat16,
            layer_norm=cfg.norm == "layer",
            layout=_LAYOUTS[cfg.norm_layout],
            qk_norm=_QK_NORMS[cfg.qk_norm],
            activation=_ACTIVATIONS[cfg.mlp],
            gated=cfg.gated,
            eps=cfg.norm_eps,
            scale=blocks[0].attention.scale,
            attention_softcap=cfg.attention_softcap or 0.0,
            logit_softcap=cfg.logit_softcap or 0.0,
            layer=ctypes.addressof(self._layers),
            final=self._norm(model.final_norm),
            head=_Linear(model.head_weight().data_ptr(), self._floats(None if model.head is None else model.head.bias)),
        )

    def __call__(self, ids: Sequence[int], positions: Sequence[int], first: Sequence[int]) -> Tensor:
        """Read one token in each row of the cache; scores (B, V) float32. `positions` of the tokens; `first`: each
        row's first slot that is no padding."""
        cfg, cache, step = self.model.cfg, self.cache, self._step
        assert cache.length < cache.capacity, f"a cache of {cache.capacity} tokens is full"
        self._point_at_cache()
        position_B, first_B = torch.tensor(positions), torch.tensor(first)
        x_BD = self._embed(torch.tensor(ids), position_B)
        logits_BV = torch.empty(len(ids), cfg.vocab_size)
        step.rows, step.slot = len(ids), cache.length
        step.position, step.first = position_B.data_ptr(), first_B.data_ptr()
        step.x, step.logits = x_BD.data_ptr(), logits_BV.data_ptr()
        if self._run(ctypes.addressof(step)):
            raise MemoryError("no memory or no thread for a decoding step")
        cache.mark(1, None)
        cache.advance(1)
        return logits_BV

    def _embed(self, ids_B: Tensor, position_B: Tensor) -> Tensor:
        model = self.model
        x_BD: Tensor = model.embed(ids_B)
        if model.cfg.embedding_scale is not None:
            x_BD = x_BD * torch.tensor(model.cfg.embedding_scale, dtype=x_BD.dtype)
        if model.place is not None:
            x_BD = x_BD + model.place(position_B)
        if model.embed_norm is not None:
            x_BD = model.embed_norm(x_BD)
        return x_BD.float().contiguous()

    def _point_at_cache(self) -> None:
        """The cache's tensors are new ones after rows were reordered."""
        now = (*self.cache.keys, *self.cache.values)
        if len(now) == len(self._seen) and all(a is b for a, b in zip(now, self._seen, strict=True)):
            return
        for layer, keys, values in zip(self._layers, self.cache.keys, self.cache.values, strict=True):
            assert keys.is_contiguous() and values.is_contiguous()
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._seen = now

    def _layer(self, block: Block) -> ctypes.Structure:
        attention, mlp, model = block.attention, block.mlp, self.model
        local = attention.window is not None and model.rotary_local is not None
        rotary = model.rotary_local if local else model.rotary
        cos, sin = rotary.tables(torch.device("cpu"), torch.float32) if rotary is not None else (None, None)
        assert isinstance(mlp, MLP)
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            attention_post=self._norm(block.attention_post_norm),
            mlp_norm=self._norm(block.mlp_norm),
            mlp_post=self._norm(block.mlp_post_norm),
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            q=self._linear(attention.q),
            k=self._linear(attention.k),
            v=self._linear(attention.v),
            o=self._linear(attention.o),
            gate=self._linear(mlp.gate),
            up=self._linear(mlp.up),
            down=self._linear(mlp.down),
            cos=self._floats(cos),
            sin=self._floats(sin),
            window=attention.window or 0,
        )

    def _norm(self, norm: Norm | None) -> ctypes.Structure:
        if norm is None:
            return _Norm()
        weight: Tensor | None = norm.weight
        if weight is not None and norm.plus_one:
            weight = 1.0 + weight.float()
        return _Norm(self._floats(weight), self._floats(norm.bias))

    def _linear(self, linear: nn.Linear | None) -> ctypes.Structure:
        if linear is None:
            return _Linear()
        return _Linear(linear.weight.data_ptr(), self._floats(linear.bias))

    def _floats(self, values: Tensor | None) -> int | None:
        """The address of small values as floats, kept alive as long as this object."""
        if values is None:
            return None
        self._alive.append(values.detach().float().contiguous())
        return self._alive[-1].data_ptr()
