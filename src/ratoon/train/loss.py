"""Losses, summed: what the loop adds up over a step and divides once.

An objective is `(model, inputs) -> (summed loss, summed weight)`. The cross entropy never holds the scores of all
tokens at once: it takes them in chunks and computes their gradient in the same pass (the loss is a sum, so the
gradient that comes from above is a scalar known to be the same for all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ratoon.base.errors import ConfigError
from ratoon.data.batch import Batch
from ratoon.model import fused
from ratoon.model.balance import balance_loss
from ratoon.model.encoder_decoder import EncoderDecoder
from ratoon.model.likelihood import CHUNK_NUMBERS
from ratoon.model.transformer import Transformer


@dataclass(frozen=True)
class Inputs:
    """A `Batch` on the model's device. `document_BT` and `position_BT` are None where plain causal rows make them
    say nothing."""

    ids_BT: Tensor
    targets_BT: Tensor
    weight_BT: Tensor
    document_BT: Tensor | None
    position_BT: Tensor | None
    rows: tuple[str, ...]
    extra: dict[str, Any]
    trunk_BTD: Tensor | None = None
    """What the first `trunk_layers` blocks give for these rows (with 0: the embedded tokens), where that is known."""
    trunk_layers: int = 0
    step: int = 0
    virtual_tokens: int = 0
    """Slots at the beginning of each document that are the method's, not the text's."""

    def tensor(self, name: str) -> Tensor:
        """What stands under that name beside the rows, on their device."""
        value = torch.as_tensor(self.extra[name])
        return value.to(self.ids_BT.device)

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, step: int = 0, virtual_tokens: int = 0) -> Inputs:
        """Move a batch to `device`."""
        plain = batch.one_document_rows and bool((batch.position_BT[:, 0] == 0).all())
        return cls(
            ids_BT=torch.from_numpy(batch.ids_BT).to(device),
            targets_BT=torch.from_numpy(batch.targets_BT).to(device),
            weight_BT=torch.from_numpy(batch.weight_BT).to(device),
            document_BT=None if plain else torch.from_numpy(batch.document_BT).to(device),
            position_BT=None if plain else torch.from_numpy(batch.position_BT).to(device),
            rows=batch.rows,
            extra=batch.extra,
            step=step,
            virtual_tokens=virtual_tokens,
        )


def read(model: Transformer, inputs: Inputs, routers: list[Tensor] | None = None) -> Tensor:
    """The model's hidden states (B, T, D) of the rows, from where their trunk ends."""
    hidden_BTD: Tensor = model(
        inputs.ids_BT,
        inputs.position_BT,
        inputs.document_BT,
        routers=routers,
        trunk_BTD=inputs.trunk_BTD,
        trunk_layers=inputs.trunk_layers,
    )
    return hidden_BTD


def next_token(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Σ w·(-log p(target)) over the positions, and Σ w; with experts, their load-balancing loss is added.

    Each row's balance loss counts as much as the row has learned weight, so that accumulated micro-batches give the
    same sum as one batch.
    """
    routers: list[Tensor] | None = [] if model.cfg.moe is not None else None
    hidden_BTD = read(model, inputs, routers)
    loss = cross_entropy(model, hidden_BTD, inputs.targets_BT, inputs.weight_BT)
    return with_balance(model, loss, routers, inputs, inputs.weight_BT.sum(1)), inputs.weight_BT.sum()


def with_balance(
    model: Transformer, loss: Tensor, routers: list[Tensor] | None, inputs: Inputs, weight_B: Tensor
) -> Tensor:
    """The loss with the load-balancing losses of `routers` added, each row's as often as `weight_B` says."""
    if routers and model.cfg.moe is not None and model.cfg.moe.balance_weight:
        keep_BT = None if inputs.document_BT is None else inputs.document_BT >= 0
        for router_BTE in routers:
            per_row_B = balance_loss(router_BTE, model.cfg.moe.experts_per_token, keep_BT)
            loss = loss + model.cfg.moe.balance_weight / len(routers) * (per_row_B * weight_B).sum()
    return loss


def sequence_to_sequence(model: EncoderDecoder, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Σ w·(-log p(target | what stands before it, its source)) over the positions, and Σ w.

    Beside the rows stand `source_BS` and `source_document_BS`: a target document attends to the source of its own
    number alone. Raises `ConfigError` where the sources' rows are longer than the encoder's context.
    """
    source_BS = inputs.tensor("source_BS")
    if source_BS.shape[1] > model.encoder.cfg.context_tokens:
        raise ConfigError(
            f"rows of {source_BS.shape[1]} source tokens are longer than the encoder's context",
            where="train.context_tokens",
            expected=f"at most {model.encoder.cfg.context_tokens}",
        )
    hidden_BTD = model(
        inputs.ids_BT, source_BS, inputs.document_BT, inputs.tensor("source_document_BS"), inputs.position_BT
    )
    return cross_entropy(model.decoder, hidden_BTD, inputs.targets_BT, inputs.weight_BT), inputs.weight_BT.sum()


def cross_entropy(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Σ w·(-log softmax(head · hidden)[target]) as a float32 scalar. Positions of weight 0 cost nothing."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    targets_N, weight_N = targets_BT.reshape(-1), weight_BT.reshape(-1)
    learned = int(torch.count_nonzero(weight_N))
    if learned < weight_N.numel() * 0.9:  # prompts, padding: their scores are not needed at all
        index = rounded(weight_N.nonzero()[:, 0], weight_N)
        hidden_ND, targets_N, weight_N = hidden_ND[index], targets_N[index], weight_N[index]
    head_VD = model.head_weight()
    if torch.is_autocast_enabled(hidden_ND.device.type):
        low = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, head_VD = hidden_ND.to(low), head_VD.to(low)
    bias_V = None if model.head is None else model.head.bias
    total: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, bias_V, targets_N, weight_N, model.cfg.logit_softcap
    )
    return total


SELECTED_STEP = 256
"""Learned positions are taken in so many at a time. Blocks of ever other sizes leave the allocator's memory in pieces
that nothing fits into: measured, 30 MiB more a step."""


HEAD_CHUNK_NUMBERS = 1 << 27
"""Scores held at once where the head's own gradient is wanted and the scores become their gradient in place: each chunk
more adds a matrix of the head's size in float32, at a higher cost than that of the scores (benchmarks/LOG.md)."""


def rounded(index_N: Tensor, weight_N: Tensor) -> Tensor:
    """The positions, filled up with some of weight 0 to a multiple of `SELECTED_STEP`, as far as there are such."""
    idle = (weight_N == 0).nonzero()[:, 0]
    return torch.cat([index_N, idle[: -len(index_N) % SELECTED_STEP]])


class _CrossEntropy(torch.autograd.Function):
    """Chunked cross entropy; the gradient is made where the scores are, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weight_N: Tensor,
        softcap: float | None,
    ) -> Tensor:
        N, V = hidden_ND.shape[0], head_VD.shape[0]
        needs = [hidden_ND.requires_grad, head_VD.requires_grad, bias_V is not None and bias_V.requires_grad]
        wide = torch.float32 if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
        in_c = softcap is None and bias_V is None and head_VD.dtype == hidden_ND.dtype and fused.runs_on(hidden_ND)
        score = _score_in_c if in_c else _score
        d_hidden = torch.empty(hidden_ND.shape, dtype=wide, device=hidden_ND.device) if needs[0] else None
        d_head: Tensor | None = None
        d_bias = torch.zeros(V, dtype=torch.float32, device=head_VD.device) if needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        rows = max(1, (HEAD_CHUNK_NUMBERS if in_c and needs[1] else CHUNK_NUMBERS) // V)
        rows = max(1, -(-N // max(1, -(-N // rows))))  # chunks of one size
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            h_ND = hidden_ND[part]
            loss, d_NV = score(h_ND, head_VD, bias_V, targets_N[part], weight_N[part], softcap, any(needs))
            total += loss
            if d_NV is None:
                continue
            if d_bias is not None:
                d_bias += d_NV.sum(0)
            d_low_NV = d_NV.to(wide)
            if d_hidden is not None:
                torch.mm(d_low_NV, head_VD.to(wide), out=d_hidden[part])
            if needs[1]:
                more = torch.mm(d_low_NV.t(), h_ND.to(wide))
                d_head = more if rows >= N else more.float() if d_head is None else d_head.add_(more)
        if needs[1] and d_head is None:  # nothing to learn: no chunk at all
            d_head = torch.zeros_like(head_VD)
        ctx.save_for_backward(d_hidden, d_head, d_bias)
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: adversarial noise goes through one graph twice. On a CPU it costs nothing to see a factor of 1.
        by = None if upstream[0].device.type == "cpu" and upstream[0] == 1 else upstream[0]
        gradients = [
            None if d is None else (d if by is None else d * by).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)


def _score(
    h_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weight_N: Tensor,
    softcap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some rows and, if asked for, the gradient of their scores (N, V) in float32."""
    t_N1, w_N1 = targets_N.where(weight_N != 0, 0)[:, None], weight_N[:, None]
    raw_NV = F.linear(h_ND, head_VD, bias_V).float()
    scores_NV = raw_NV if softcap is None else softcap * torch.tanh(raw_NV / softcap)
    log_NV = torch.log_softmax(scores_NV, dim=-1)
    loss = -(log_NV.gather(1, t_N1) * w_N1).sum()
    if not gradient:
        return loss, None
    d_NV = log_NV.exp_().scatter_add_(1, t_N1, torch.full_like(t_N1, -1, dtype=torch.float32)).mul_(w_N1)
    return loss, d_NV if softcap is None else d_NV * (1 - (scores_NV / softcap) ** 2)


def _score_in_c(
    h_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weight_N: Tensor,
    softcap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `_score`, in one pass over bfloat16 scores."""
    scores_NV = F.linear(h_ND, head_VD)
    loss = fused.cross_entropy_(scores_NV, targets_N, weight_N, gradient=gradient)
    return loss, scores_NV if gradient else None
