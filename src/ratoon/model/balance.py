"""The loss that keeps a mixture's experts in use.

Decides the formula; how much it counts is `ModelConfig.moe`'s, and that it is added `train/loss.py`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(router_BTE: Tensor, experts_per_token: int, keep_BT: Tensor | None = None) -> Tensor:
    """The load-balancing loss of each row (B,): E · Σ_e f_e p_e (Switch Transformer, arXiv:2101.03961, eq. 4-6).

    f_e: share of the row's choices that fell on expert e; p_e: mean router probability. Taken row by row, so that it
    adds up over micro-batches and processes. `keep_BT` leaves padding out.
    """
    B, T, E = router_BTE.shape
    probability_BTE = router_BTE.float().softmax(-1)
    chosen_BTk = probability_BTE.topk(experts_per_token, dim=-1).indices
    chosen_BTE = torch.zeros_like(probability_BTE).scatter(-1, chosen_BTk, 1.0)
    keep_BT1 = torch.ones(B, T, 1, device=router_BTE.device) if keep_BT is None else keep_BT[..., None].float()
    tokens_B1 = keep_BT1.sum(1).clamp(min=1)
    share_BE = (chosen_BTE * keep_BT1).sum(1) / tokens_B1
    mean_BE = (probability_BTE * keep_BT1).sum(1) / tokens_B1
    return E * (share_BE * mean_BE).sum(-1)
