"""Attention: which keys a query sees, and the weighted mean of their values.

Decides the mask and how the product is computed on each device; projections, norms and positions are
`transformer.py`'s, what is remembered between calls is `cache.py`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK_TOKENS = 128
"""Queries taken at once under a causal mask: keys after the block are never multiplied. With 256 tokens and
blocks of 128 a quarter of the square is left out; smaller blocks leave out more but starve the matrix product."""

PLAIN_LIMIT_TOKENS = 1024
"""Up to here the CPU multiplies the plain square, which is faster than its flash kernel and costs B·H·T²/2
numbers; beyond it the memory decides and the flash kernel is used."""


def visible(
    document_BT: Tensor | None,
    document_BS: Tensor | None,
    *,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Which of `keys` each of the last `queries` slots sees: bool (B or 1, 1, T, S), or None where a plain causal
    (or full) product is exact.

    A query sees keys of its own document; causal: none after it; `window`: only the last `window` keys, itself
    included. Padding slots (document -1) see each other, so that no row of the softmax is empty; what they compute
    is never read.
    """
    offset = keys - queries
    needs_window = window is not None and keys > window
    if document_BT is None and not needs_window and (not causal or offset == 0 or queries == 1):
        return None
    query_slot_T = torch.arange(offset, keys, device=device)[:, None]
    key_slot_S = torch.arange(keys, device=device)[None, :]
    keep = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        keep = key_slot_S <= query_slot_T
    if needs_window:
        assert window is not None
        keep = keep & (key_slot_S > query_slot_T - window)
        if not causal:
            keep = keep & (key_slot_S < query_slot_T + window)
    keep_BTS = keep[None]
    if document_BT is not None:
        assert document_BS is not None
        keep_BTS = keep_BTS & (document_BT[:, :, None] == document_BS[:, None, :])
    return keep_BTS[:, None]


def attend(
    q_BHTC: Tensor,
    k_BKSC: Tensor,
    v_BKSC: Tensor,
    *,
    keep_B1TS: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v over the visible keys -> (B, H, T, C). Query heads share key/value heads in groups.

    `keep_B1TS` (bool) says which keys are visible; None means all of them, or with `causal` all up to the query
    (which then needs as many keys as queries, or one query). `softcap`: scores become c·tanh(score / c).
    """
    B, H, T, C = q_BHTC.shape
    K, S = k_BKSC.shape[1], k_BKSC.shape[2]
    flash = softcap is None and T > 1 and (q_BHTC.device.type != "cpu" or max(T, S) > PLAIN_LIMIT_TOKENS)
    if flash:
        return F.scaled_dot_product_attention(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            attn_mask=keep_B1TS,
            is_causal=causal and keep_B1TS is None,
            scale=scale,
            enable_gqa=H != K,
        )
    if not causal or T == 1 or S != T or T <= QUERY_BLOCK_TOKENS:
        keep = keep_B1TS
        if keep is None and causal and T > 1:
            keep = torch.ones(T, S, dtype=torch.bool, device=q_BHTC.device).tril(S - T)[None, None]
        return _product(q_BHTC, k_BKSC, v_BKSC, keep, scale, softcap)
    parts = []
    block = QUERY_BLOCK_TOKENS
    for start in range(0, T, block):
        stop = min(start + block, T)
        if keep_B1TS is None:
            keep = torch.ones(stop - start, stop, dtype=torch.bool, device=q_BHTC.device).tril(start)[None, None]
        else:
            keep = keep_B1TS[:, :, start:stop, :stop]
        parts.append(_product(q_BHTC[:, :, start:stop], k_BKSC[:, :, :stop], v_BKSC[:, :, :stop], keep, scale, softcap))
    return torch.cat(parts, dim=2)


def _product(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, keep: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    B, H, T, C = q_BHTC.shape
    K = k_BKSC.shape[1]
    if H != K:  # the queries of a group stand side by side, so keys are never copied
        q_BHTC = q_BHTC.reshape(B, K, H // K * T, C)
    scores = (q_BHTC @ k_BKSC.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if keep is not None:
        if H != K:
            scores = scores.view(B, K, H // K, T, -1)
            keep = keep[:, :, None]
        scores = scores.masked_fill(~keep, float("-inf"))
        if H != K:
            scores = scores.view(B, K, H // K * T, -1)
    mixed = torch.softmax(scores, dim=-1).to(v_BKSC.dtype) @ v_BKSC
    return mixed.reshape(B, H, T, C)
