"""How likely a model finds given tokens, without the scores of all tokens in memory at once.

Decides nothing about which tokens count; that is the caller's (`evaluate/`). The loss that training differentiates is
`train/loss.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ratoon.model.transformer import Transformer

CHUNK_NUMBERS = 1 << 24
"""Scores held at once (64 MiB as float32): small enough to matter, large enough to keep the matrix product busy."""


@torch.no_grad()
def token_losses(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """-log p(target) of each position in nats: hidden states (…, D), targets (…) -> (…) float32."""
    parts = [
        F.cross_entropy(scores_NV, targets_N, reduction="none")
        for scores_NV, targets_N in _chunks(model, hidden_BTD, targets_BT)
    ]
    return torch.cat(parts).view(targets_BT.shape)


@torch.no_grad()
def token_choices(model: Transformer, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) of each position (N,) float32 in nats, and whether the target is the likeliest token (N,) bool."""
    logprobs, best = [], []
    for scores_NV, part_N in _chunks(model, hidden_ND, targets_N):
        logprobs.append(-F.cross_entropy(scores_NV, part_N, reduction="none"))
        best.append(scores_NV.argmax(-1) == part_N)
    return torch.cat(logprobs), torch.cat(best)


def _chunks(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores (N, V) in float32 with their targets (N,), some rows at a time; at least one pair."""
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    rows = max(1, CHUNK_NUMBERS // model.cfg.vocab_size)
    for h_ND, t_N in zip(torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True):
        yield model.logits(h_ND).float(), t_N
