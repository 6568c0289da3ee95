"""The Transformer, in one file: decoder, encoder, and cross attention between them are settings of it.

Decides what the settings of `config.py` compute. Attention's product is in `attention.py`, rotary tables in
`rotary.py`, the MLP's activations in `activations.py`, the loss of a mixture's balance in `balance.py`, first values of
the weights in `init.py`, foreign weight names in `families.py`.

Letters at the end of a tensor's name are its axes:
  B batch · T tokens · S keys' length · D width · H query heads · K key/value heads · C channels of a head ·
  F hidden of the MLP · V vocabulary · R rank · E experts · L layers · N tokens of a batch in one line
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ratoon.model import fused
from ratoon.model.activations import ACTIVATIONS, gelu_tanh
from ratoon.model.attention import attend, visible
from ratoon.model.cache import Cache
from ratoon.model.config import ModelConfig
from ratoon.model.layers import Embedding, Linear, Norm, is_plain, side_by_side
from ratoon.model.rotary import Rotary, rotate


@dataclass(frozen=True)
class Reading:
    """What all blocks of one call share; made once, by `Transformer.forward`."""

    rope: tuple[Tensor, Tensor] | None
    rope_local: tuple[Tensor, Tensor] | None
    keep: dict[int | None, Tensor | None]
    keep_memory: Tensor | None
    fused: bool = False
    """Attention goes through the C code of `fused.py`; then `keep` is empty and `first_BT` and `last_BT` say what is
    visible (`last_BT` where attention is not causal), and where that code turns queries and keys itself, `rope` holds
    whole float32 tables and `position_BT` the places."""
    position_BT: Tensor | None = None
    first_BT: Tensor | None = None
    last_BT: Tensor | None = None
    start: int = 0
    """The place of the first token where `position_BT` is absent."""
    inside: bool = False
    """The C code norms and turns queries and keys itself."""


class MLP(nn.Module):
    """down(act(up x)), or gated: down(act(gate x) · up x) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.mlp]
        self.gate = Linear(cfg.width, cfg.mlp_width, bias=cfg.mlp_bias) if cfg.gated else None
        self.up = Linear(cfg.width, cfg.mlp_width, bias=cfg.mlp_bias)
        self.down = Linear(cfg.mlp_width, cfg.width, bias=cfg.mlp_bias)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.gate is not None:
            return self.down(self.act(self.gate(x_BTD)) * self.up(x_BTD)), None
        return self.down(self._hidden(x_BTD)), None

    def _hidden(self, x_BTD: Tensor) -> Tensor:
        """act(up x)."""
        up = self.up
        if self.act is gelu_tanh and is_plain(up) and up.out_features % 16 == 0 and fused.runs_on(x_BTD):
            return fused.gelu_tanh(side_by_side((up,), x_BTD, None), up.bias)
        hidden_BTF: Tensor = self.act(up(x_BTD))
        return hidden_BTF


class Experts(nn.Module):
    """A mixture of experts: each token goes to the k experts its router likes best.

    Experts' weights are stacked: gate, up (E, F, D), down (E, D, F).
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.moe is not None
        self.moe = cfg.moe
        self.act = ACTIVATIONS[cfg.mlp]
        E, F_, D = cfg.moe.experts, cfg.moe.expert_width, cfg.width
        self.router = Linear(D, E, bias=False)
        self.gate = nn.Parameter(torch.full((E, F_, D), float("nan"))) if cfg.gated else None
        self.up = nn.Parameter(torch.full((E, F_, D), float("nan")))
        self.down = nn.Parameter(torch.full((E, D, F_), float("nan")))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        router_NE = self.router(x_ND)
        weight_Nk, expert_Nk = router_NE.float().softmax(-1).topk(self.moe.experts_per_token, dim=-1)
        if self.moe.normalize_weights:
            weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        weight_Nk = weight_Nk.to(x_ND.dtype)
        # Tokens are sorted by expert, so that each expert multiplies one dense block.
        order = expert_Nk.flatten().argsort(stable=True)
        token = order // self.moe.experts_per_token
        counts = torch.bincount(expert_Nk.flatten(), minlength=self.moe.experts).tolist()
        pieces = []
        for expert, block_ND in enumerate(torch.split(x_ND.index_select(0, token), counts)):
            hidden = F.linear(block_ND, self.up[expert])
            if self.gate is not None:
                hidden = self.act(F.linear(block_ND, self.gate[expert])) * hidden
            else:
                hidden = self.act(hidden)
            pieces.append(F.linear(hidden, self.down[expert]))
        mixed = torch.cat(pieces) * weight_Nk.flatten().index_select(0, order)[:, None]
        out_ND = torch.zeros_like(x_ND).index_add(0, token, mixed)
        return out_ND.view(B, T, D), router_NE.view(B, T, -1)


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads; over the row itself, or over an encoder's output."""

    def __init__(self, cfg: ModelConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.cfg, self.layer, self.cross = cfg, layer, cross
        self.window = None if cross else cfg.window(layer)
        self.scale = cfg.query_scale if cfg.query_scale is not None else cfg.channels**-0.5
        self.q = Linear(cfg.width, cfg.heads * cfg.channels, bias=cfg.qkv_bias)
        self.k = Linear(cfg.width, cfg.kv * cfg.channels, bias=cfg.qkv_bias)
        self.v = Linear(cfg.width, cfg.kv * cfg.channels, bias=cfg.qkv_bias)
        self.o = Linear(cfg.heads * cfg.channels, cfg.width, bias=cfg.out_bias)
        normed = cfg.qk_norm != "none" and not cross
        self.q_norm = Norm(cfg, cfg.channels) if normed else None
        self.k_norm = Norm(cfg, cfg.channels) if normed else None
        self.prefix: nn.Module | None = None
        """Prefix tuning: `prefix(k_BTKC, v_BTKC, start, position_BT)` puts learned keys and values, neither normed nor
        turned, into a document's first slots."""

    def forward(self, x_BTD: Tensor, reading: Reading, cache: Cache | None, memory_BSD: Tensor | None) -> Tensor:
        B, T, _ = x_BTD.shape
        cfg = self.cfg
        if reading.fused and not self.cross:
            fused_BTD: Tensor = self.o(self._fused(x_BTD, reading))
            return fused_BTD
        q_BTHC = self.q(x_BTD).view(B, T, cfg.heads, cfg.channels)
        if self.cross:
            k_BKSC, v_BKSC = self._memory(memory_BSD, cache)
            q_BHTC = q_BTHC.transpose(1, 2)
            keep, causal = reading.keep_memory, False
        else:
            k_BTKC = self.k(x_BTD).view(B, T, cfg.kv, cfg.channels)
            v_BTKC = self.v(x_BTD).view(B, T, cfg.kv, cfg.channels)
            q_BTHC, k_BTKC = self._place(q_BTHC, k_BTKC, reading)
            if self.prefix is not None:
                k_BTKC, v_BTKC = self.prefix(k_BTKC, v_BTKC, reading.start, reading.position_BT)
            q_BHTC, k_BKSC, v_BKSC = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
            if cache is not None:
                k_BKSC, v_BKSC = cache.extend(self.layer, k_BKSC, v_BKSC)
            keep, causal = reading.keep[self.window], cfg.causal
        out_BHTC = attend(
            q_BHTC, k_BKSC, v_BKSC, keep_B1TS=keep, causal=causal, scale=self.scale, softcap=cfg.attention_softcap
        )
        mixed_BTD: Tensor = self.o(out_BHTC.transpose(1, 2).reshape(B, T, cfg.heads * cfg.channels))
        return mixed_BTD

    def _fused(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """What the heads mixed (B, T, H·C), by the C code."""
        cfg = self.cfg
        inside = reading.inside
        qkv_BTX = self._project(x_BTD)
        if not inside:
            B, T, _ = qkv_BTX.shape
            heads_BTNC = qkv_BTX.view(B, T, cfg.heads + 2 * cfg.kv, cfg.channels)
            q_BTHC, k_BTKC, v_BTKC = torch.split(heads_BTNC, [cfg.heads, cfg.kv, cfg.kv], dim=2)
            q_BTHC, k_BTKC = self._place(q_BTHC, k_BTKC, reading)
            if self.prefix is not None:
                k_BTKC, v_BTKC = self.prefix(k_BTKC, v_BTKC, reading.start, reading.position_BT)
            qkv_BTX = torch.cat([q_BTHC, k_BTKC, v_BTKC], dim=2).view(B, T, -1)
        return fused.attend(
            qkv_BTX,
            self._rope(reading) if inside else None,
            reading.position_BT,
            reading.first_BT,
            reading.last_BT,
            heads=cfg.heads,
            kv_heads=cfg.kv,
            scale=self.scale,
            norm_eps=cfg.norm_eps if inside and self.q_norm is not None else None,
            window=self.window,
            causal=cfg.causal,
        )

    def _project(self, x_BTD: Tensor) -> Tensor:
        """Queries, keys and values side by side: one product where the three are plain layers, and as few as an
        adapter's modules can where these stand in their place (`side_by_side` of `adapt/inject.py`)."""
        layers = (self.q, self.k, self.v)
        if not all(is_plain(layer) for layer in layers):
            for layer in layers:
                join = getattr(layer, "side_by_side", None)
                joined: Tensor | None = None if join is None else join(layers, x_BTD)
                if joined is not None:
                    return joined
            return torch.cat([layer(x_BTD) for layer in layers], dim=-1)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        return side_by_side(layers, x_BTD, torch.cat(biases) if biases else None)

    def _place(self, q_BTHC: Tensor, k_BTKC: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """Norm and turn queries and keys, in the order of the settings."""
        if self.q_norm is not None and self.k_norm is not None and self.cfg.qk_norm == "before_rope":
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        rope = self._rope(reading)
        if rope is not None:
            q_BTHC, k_BTKC = rotate(q_BTHC, *rope), rotate(k_BTKC, *rope)
        if self.q_norm is not None and self.k_norm is not None and self.cfg.qk_norm == "after_rope":
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        return q_BTHC, k_BTKC

    def _rope(self, reading: Reading) -> tuple[Tensor, Tensor] | None:
        """cos and sin of this layer: its own where layers with a window have them."""
        return reading.rope_local if self.window is not None and reading.rope_local is not None else reading.rope

    def _memory(self, memory_BSD: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output; with a cache they are made once."""
        if cache is not None:
            kept = cache.memory[self.layer]
            if kept is not None:
                return kept
        assert memory_BSD is not None, "cross attention needs the encoder's output"
        B, S, _ = memory_BSD.shape
        k_BKSC = self.k(memory_BSD).view(B, S, self.cfg.kv, self.cfg.channels).transpose(1, 2)
        v_BKSC = self.v(memory_BSD).view(B, S, self.cfg.kv, self.cfg.channels).transpose(1, 2)
        if cache is not None:
            cache.memory[self.layer] = (k_BKSC, v_BKSC)
        return k_BKSC, v_BKSC


class Block(nn.Module):
    """Attention, cross attention where asked for, MLP; each added to the stream as `norm_layout` says."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = cfg.norm_layout == "parallel"
        sandwich = cfg.norm_layout == "sandwich"
        self.attention_norm = Norm(cfg, cfg.width)
        self.attention = Attention(cfg, layer)
        self.attention_post_norm = Norm(cfg, cfg.width) if sandwich else None
        self.cross_norm = Norm(cfg, cfg.width) if cfg.cross_attention else None
        self.cross = Attention(cfg, layer, cross=True) if cfg.cross_attention else None
        self.mlp_norm = Norm(cfg, cfg.width)
        self.mlp = Experts(cfg) if cfg.has_experts(layer) else MLP(cfg)
        self.mlp_post_norm = Norm(cfg, cfg.width) if sandwich else None
        self.dropout = 0.0
        """In training, the share of each addition to the stream that is left out (Srivastava et al., 2014)."""

    def forward(
        self, x_BTD: Tensor, reading: Reading, cache: Cache | None = None, memory_BSD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after the block, and the router's scores (B, T, E) where the MLP is a mixture."""
        mixed_BTD = self.attention(self.attention_norm(x_BTD), reading, cache, None)
        if self.parallel:
            out_BTD, router = self.mlp(self.mlp_norm(x_BTD))
            return x_BTD + self._thinned(mixed_BTD + out_BTD), router
        if self.attention_post_norm is not None:
            mixed_BTD = self.attention_post_norm(mixed_BTD)
        x_BTD = x_BTD + self._thinned(mixed_BTD)
        if self.cross is not None and self.cross_norm is not None:
            x_BTD = x_BTD + self._thinned(self.cross(self.cross_norm(x_BTD), reading, cache, memory_BSD))
        out_BTD, router = self.mlp(self.mlp_norm(x_BTD))
        if self.mlp_post_norm is not None:
            out_BTD = self.mlp_post_norm(out_BTD)
        return x_BTD + self._thinned(out_BTD), router

    def _thinned(self, added_BTD: Tensor) -> Tensor:
        return F.dropout(added_BTD, self.dropout) if self.dropout and self.training else added_BTD


def _angles(
    rotary: Rotary | None, x_BTD: Tensor, start: int, position_BT: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """cos and sin of each token's place (1 or B, T, 1, r), in the stream's type."""
    if rotary is None:
        return None
    cos, sin = rotary.tables(x_BTD.device, x_BTD.dtype)
    if position_BT is None:
        stop = start + x_BTD.shape[1]
        return cos[None, start:stop, None], sin[None, start:stop, None]
    return cos[position_BT][:, :, None], sin[position_BT][:, :, None]


@dataclass(frozen=True)
class Site:
    """A linear layer that a method may change: its name in the model, what it is (`q k v o gate up down`, in cross
    attention `cross_q` …), its block, and its widths."""

    name: str
    kind: str
    layer: int
    inputs: int
    outputs: int


class TaskHead(nn.Module):
    """A linear layer that scores a token, a whole text, or the ends of a span, in place of the next token.

    Laid out as Transformers' `…ForTokenClassification`, `…ForSequenceClassification` and `…ForQuestionAnswering`. For
    a text the outputs of its tokens are pooled first: the last one, their mean, or their mean weighted by attention of
    one learned query (Yang et al., 2016, eq. 5-7 without the hidden layer; all tokens weigh the same while it is 0).
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.task_head is not None
        self.cfg = cfg.task_head
        self.score = Linear(cfg.width, len(self.cfg.labels), bias=self.cfg.kind != "sequence")
        self.query = nn.Parameter(torch.full((cfg.width,), float("nan"))) if self.cfg.pooling == "attention" else None

    def forward(
        self, hidden_BTD: Tensor, at_BT: Tensor, document_BT: Tensor | None = None, own_BT: Tensor | None = None
    ) -> Tensor:
        """Scores in float32 of the positions where `at_BT` (bool) is true, in reading order: (N, labels).

        A text's position is that of its last token. `own_BT` (bool) says which tokens are pooled; absent: all of its
        document's.
        """
        if self.cfg.pooling == "last":
            # Every position is scored: that costs little, and large blocks have one size in every step (those of
            # changing sizes leave the allocator's memory in pieces, which grows by gigabytes).
            scores_BTK: Tensor = self.score(hidden_BTD).float()
            return scores_BTK[at_BT]
        scores_NK: Tensor = self.score(self._pool(hidden_BTD, at_BT, document_BT, own_BT)).float()
        return scores_NK

    def _pool(self, hidden_BTD: Tensor, at_BT: Tensor, document_BT: Tensor | None, own_BT: Tensor | None) -> Tensor:
        B, T, D = hidden_BTD.shape
        if document_BT is None:
            document_BT = torch.zeros(B, T, dtype=torch.int32, device=hidden_BTD.device)
        own_BT = document_BT >= 0 if own_BT is None else own_BT & (document_BT >= 0)
        row_B1 = torch.arange(B, device=hidden_BTD.device)[:, None]
        unit_BT = row_B1 * (T + 1) + document_BT + 1  # one number for each document of each row
        _, number_BT = torch.unique(unit_BT, return_inverse=True)
        count = int(number_BT.max()) + 1
        number_N, hidden_ND = number_BT.flatten(), hidden_BTD.flatten(0, 1).float()
        weight_N = own_BT.flatten().float()
        if self.query is not None:
            score_N = hidden_ND @ self.query.float() / math.sqrt(D)
            top_M = torch.full((count,), float("-inf"), device=score_N.device)
            top_M = top_M.scatter_reduce(0, number_N, score_N.detach(), "amax")
            weight_N = weight_N * torch.exp(score_N - top_M[number_N])
        total_M = torch.zeros(count, device=hidden_BTD.device).index_add(0, number_N, weight_N)
        sum_MD = torch.zeros(count, D, device=hidden_BTD.device).index_add(0, number_N, hidden_ND * weight_N[:, None])
        at_N = number_BT[at_BT]
        return (sum_MD[at_N] / total_M[at_N, None]).to(hidden_BTD.dtype)


class Transformer(nn.Module):
    """A stack of blocks between an embedding and a head. Parameters are NaN until `init.py` or a reader sets them."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab_size, cfg.width)
        self.place = Embedding(cfg.context_tokens, cfg.width) if cfg.positions == "learned" else None
        self.embed_norm = Norm(cfg, cfg.width) if cfg.embedding_norm else None
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.layers))
        self.final_norm = Norm(cfg, cfg.width)
        scores_tokens = not cfg.tied_embeddings and cfg.task_head is None
        self.head = Linear(cfg.width, cfg.vocab_size, bias=cfg.head_bias) if scores_tokens else None
        self.task_head = TaskHead(cfg) if cfg.task_head is not None else None
        self.virtual: nn.Module | None = None
        """Prompt tuning: `virtual(x_BTD, position_BT)` puts learned vectors into a document's first slots."""
        self.rotary = Rotary(cfg) if cfg.positions == "rotary" else None
        two_thetas = cfg.positions == "rotary" and cfg.rope_local_theta is not None
        self.rotary_local = Rotary(cfg, local=True) if two_thetas else None
        self.recompute_blocks = False
        """Gradient checkpointing: a block's inside is computed again in the backward pass instead of kept."""

    def forward(
        self,
        ids_BT: Tensor,
        position_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        cache: Cache | None = None,
        *,
        memory_BSD: Tensor | None = None,
        memory_document_BS: Tensor | None = None,
        routers: list[Tensor] | None = None,
        trunk_BTD: Tensor | None = None,
        trunk_layers: int = 0,
    ) -> Tensor:
        """Token ids (B, T) -> the last layer's normed output (B, T, D).

        `position_BT` absent: counted from the cache's length on, the same for each row. `document_BT` absent: each
        row is one document. `memory_BSD`: an encoder's output, for cross attention, visible where
        `memory_document_BS` equals the row's document. `routers`, if given, is filled with each mixture layer's
        router scores (B, T, E). `trunk_BTD`: what `trunk` gave for the first `trunk_layers` blocks, which are then not
        computed again.
        """
        if trunk_BTD is None:
            assert not trunk_layers
            trunk_BTD = self.embedded(ids_BT, position_BT, cache.length if cache is not None else 0)
        start = cache.length if cache is not None else 0
        reading = self._reading(trunk_BTD, start, position_BT, document_BT, cache, memory_document_BS)
        x_BTD = self._through(trunk_BTD, reading, range(trunk_layers, len(self.layers)), cache, memory_BSD, routers)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        hidden_BTD: Tensor = self.final_norm(x_BTD)
        return hidden_BTD

    @torch.no_grad()
    def trunk(
        self, ids_BT: Tensor, layers: int, position_BT: Tensor | None = None, document_BT: Tensor | None = None
    ) -> Tensor:
        """The stream (B, T, D) behind the first `layers` blocks, without a gradient: what a frozen trunk computes."""
        x_BTD = self.embedded(ids_BT, position_BT)
        reading = self._reading(x_BTD, 0, position_BT, document_BT, None, None)
        return self._through(x_BTD, reading, range(layers), None, None, None)

    def _through(
        self,
        x_BTD: Tensor,
        reading: Reading,
        layers: range,
        cache: Cache | None,
        memory_BSD: Tensor | None,
        routers: list[Tensor] | None,
    ) -> Tensor:
        for layer in layers:
            block = self.layers[layer]
            if self.recompute_blocks and self.training and cache is None:
                x_BTD, router = checkpoint(block, x_BTD, reading, None, memory_BSD, use_reentrant=False)
            else:
                x_BTD, router = block(x_BTD, reading, cache, memory_BSD)
            if routers is not None and router is not None:
                routers.append(router)
        return x_BTD

    def embedded(self, ids_BT: Tensor, position_BT: Tensor | None = None, start: int = 0) -> Tensor:
        """The stream before the first block (B, T, D)."""
        T = ids_BT.shape[1]
        if is_plain(self.embed) and self.embed.weight.requires_grad and fused.runs_on(self.embed.weight):
            x_BTD = fused.embed(ids_BT, self.embed.weight)
        else:
            x_BTD = self.embed(ids_BT)
        if self.cfg.embedding_scale is not None:
            x_BTD = x_BTD * torch.tensor(self.cfg.embedding_scale, dtype=x_BTD.dtype, device=x_BTD.device)
        if self.virtual is not None:
            place_BT = (
                torch.arange(start, start + T, device=ids_BT.device)[None] if position_BT is None else position_BT
            )
            x_BTD = self.virtual(x_BTD, place_BT)
        if self.place is not None:
            places = self.place.weight[start : start + T][None] if position_BT is None else self.place(position_BT)
            x_BTD = x_BTD + places
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        return x_BTD

    def _reading(
        self,
        x_BTD: Tensor,
        start: int,
        position_BT: Tensor | None,
        document_BT: Tensor | None,
        cache: Cache | None,
        memory_document_BS: Tensor | None,
    ) -> Reading:
        T = x_BTD.shape[1]
        rotaries = (self.rotary, self.rotary_local)
        keep_memory = None
        if memory_document_BS is not None:
            own_BT = torch.zeros_like(x_BTD[..., 0], dtype=torch.int32) if document_BT is None else document_BT
            keep_BTS = own_BT[:, :, None] == memory_document_BS[:, None, :]
            # Padding sees everything, so that no row of the softmax is empty where the sources have no padding.
            keep_memory = (keep_BTS | (own_BT < 0)[:, :, None])[:, None]
        if cache is None and fused.fits(self.cfg, x_BTD):
            first_BT = None if document_BT is None else fused.run_starts(document_BT)
            last_BT = None if document_BT is None or self.cfg.causal else fused.run_ends(document_BT)
            inside = fused.turns_inside(self.cfg) and not self._has_prefix()
            if inside:
                rope, rope_local = (
                    None if one is None else one.tables(x_BTD.device, torch.float32) for one in rotaries
                )
            else:
                rope, rope_local = (_angles(one, x_BTD, 0, position_BT) for one in rotaries)
            return Reading(rope, rope_local, {}, keep_memory, True, position_BT, first_BT, last_BT, inside=inside)
        rope, rope_local = (_angles(one, x_BTD, start, position_BT) for one in rotaries)
        document_BS = cache.mark(T, document_BT) if cache is not None else document_BT
        if document_BT is None and document_BS is not None:
            document_BT = document_BS[:, start:]
        keep = {
            window: visible(
                document_BT,
                document_BS,
                queries=T,
                keys=start + T,
                causal=self.cfg.causal,
                window=window,
                device=x_BTD.device,
            )
            for window in {self.cfg.window(layer) for layer in range(self.cfg.layers)}
        }
        return Reading(rope, rope_local, keep, keep_memory, position_BT=position_BT, start=start)

    def _has_prefix(self) -> bool:
        """Whether a layer has learned keys and values, which are put in after the rotation."""
        return any(isinstance(block, Block) and block.attention.prefix is not None for block in self.layers)

    @property
    def configs(self) -> tuple[ModelConfig, ...]:
        """The settings of the model's parts: its own."""
        return (self.cfg,)

    def set_causal(self, causal: bool) -> None:
        """Let each token see what stands before it, or (False) all of its document."""
        self.cfg = self.cfg.model_copy(update={"causal": causal})
        for block in self.layers:
            attention: Any = block.attention
            attention.cfg = self.cfg

    def head_weight(self) -> Tensor:
        """The matrix (V, D) that turns hidden states into scores; the embedding's own where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def sites(self) -> list[Site]:
        """The linear layers of all blocks, in their order: what a method may change. Mixtures' experts and routers are
        none."""
        found = []
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name.startswith("layers.") and not name.endswith("router"):
                _, layer, part, kind = name.split(".")[:4]
                kind = f"cross_{kind}" if part == "cross" else kind
                found.append(
                    Site(name.removesuffix(".base"), kind, int(layer), module.in_features, module.out_features)
                )
        return found

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary (…, V)."""
        assert self.task_head is None or self.cfg.tied_embeddings, "a task head stands in the next token's place"
        logits = F.linear(hidden_BTD, self.head_weight(), None if self.head is None else self.head.bias)
        cap = self.cfg.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
