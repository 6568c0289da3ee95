"""Objectives of tasks that put a head onto the model, and the names by which tasks ask for any objective.

An objective is `(model, inputs) -> (summed loss, summed weight)`; the loss of the next token is `loss.py`'s, of
sequences beside sources and of preference pairs in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ratoon.base.errors import ConfigError
from ratoon.model.transformer import Transformer
from ratoon.train.loss import Inputs, next_token, read

Objective = Callable[[Any, Inputs], tuple[Tensor, Tensor]]


def head_scores(model: Transformer, inputs: Inputs, at_BT: Tensor | None = None) -> Tensor:
    """The head's scores (N, labels) in float32 at the positions of weight above 0, or at `at_BT`, in reading order."""
    assert model.task_head is not None, "the objective needs a task head"
    hidden_BTD = read(model, inputs)
    at_BT = inputs.weight_BT > 0 if at_BT is None else at_BT
    own_BT = None
    if inputs.virtual_tokens and inputs.position_BT is not None:
        own_BT = inputs.position_BT >= inputs.virtual_tokens
    scores_NK: Tensor = model.task_head(hidden_BTD, at_BT, inputs.document_BT, own_BT)
    return scores_NK


def label(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Σ w·(-log p(label)) over the asked positions: a label for each token, or for each text at its last token."""
    head = model.task_head
    assert head is not None, "the objective needs a task head"
    if head.cfg.pooling == "last":
        # Every position is scored, asked or not: a head costs little, and what is kept has one size in every step
        # (blocks of changing sizes leave the allocator's memory in pieces, which grows by gigabytes).
        scores_NK = head.score(read(model, inputs)).float().flatten(0, 1)
        weight_N = inputs.weight_BT.flatten()
        loss_N = F.cross_entropy(scores_NK, inputs.targets_BT.flatten(), reduction="none")
        return (loss_N * weight_N).sum(), weight_N.sum()
    scores_NK = head_scores(model, inputs)
    at_BT = inputs.weight_BT > 0
    loss_N = F.cross_entropy(scores_NK, inputs.targets_BT[at_BT], reduction="none")
    weight_N = inputs.weight_BT[at_BT]
    return (loss_N * weight_N).sum(), weight_N.sum()


def vectors(inputs: Inputs) -> Tensor:
    """What is asked of each document as a whole, in the order of the asked positions: (N, K)."""
    at_BT = inputs.weight_BT > 0
    row_N = at_BT.nonzero()[:, 0]
    document_BT = torch.zeros_like(inputs.ids_BT) if inputs.document_BT is None else inputs.document_BT
    return inputs.tensor("vector_BMK")[row_N, document_BT[at_BT].long()]


def several_labels(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Σ w · the mean over labels of the binary cross entropy; any number of labels may hold."""
    scores_NK = head_scores(model, inputs)
    loss_N = F.binary_cross_entropy_with_logits(scores_NK, vectors(inputs), reduction="none").mean(-1)
    weight_N = inputs.weight_BT[inputs.weight_BT > 0]
    return (loss_N * weight_N).sum(), weight_N.sum()


def numbers(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Σ w · the mean squared error of the scores."""
    scores_NK = head_scores(model, inputs)
    loss_N = (scores_NK - vectors(inputs)).square().mean(-1)
    weight_N = inputs.weight_BT[inputs.weight_BT > 0]
    return (loss_N * weight_N).sum(), weight_N.sum()


def span(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Σ w · the mean of -log p(begin) and -log p(end), each over the positions of the document where an answer may
    stand (targets 1); begin and end count from the text, not from a method's slots before it. Devlin et al.,
    arXiv:1810.04805, section 4.2."""
    allowed_BT = inputs.targets_BT > 0
    scores_N2 = head_scores(model, inputs, allowed_BT)
    at_BT = inputs.weight_BT > 0
    B, T = inputs.ids_BT.shape
    document_BT = torch.zeros_like(inputs.ids_BT) if inputs.document_BT is None else inputs.document_BT.long()
    place_BT = torch.arange(T, device=at_BT.device).expand(B, T) if inputs.position_BT is None else inputs.position_BT
    row_B1 = torch.arange(B, device=at_BT.device)[:, None]
    unit_BT = row_B1 * (T + 1) + document_BT + 1
    asked_M = unit_BT[at_BT]  # ascending: one position a document
    number_N = torch.searchsorted(asked_M, unit_BT[allowed_BT])
    target_M2 = vectors(inputs).long()
    place_N = place_BT[allowed_BT] - inputs.virtual_tokens
    count = len(asked_M)
    losses = []
    for end in (0, 1):
        score_N = scores_N2[:, end]
        top_M = torch.full((count,), float("-inf"), device=score_N.device)
        top_M = top_M.scatter_reduce(0, number_N, score_N.detach(), "amax")
        sum_M = torch.zeros(count, device=score_N.device).index_add(0, number_N, (score_N - top_M[number_N]).exp())
        right_N = place_N == target_M2[number_N, end]
        right_M = torch.zeros(count, device=score_N.device).index_add(0, number_N, torch.where(right_N, score_N, 0.0))
        losses.append(sum_M.log() + top_M - right_M)
    weight_M = inputs.weight_BT[at_BT]
    return (0.5 * (losses[0] + losses[1]) * weight_M).sum(), weight_M.sum()


def objective_of(name: str) -> Objective:
    """The objective that a task names."""
    if name == "sequence_to_sequence":
        from ratoon.train.loss import sequence_to_sequence

        return sequence_to_sequence
    if name == "preference":
        from ratoon.train.preference import preference

        return preference()
    found: dict[str, Objective] = {
        "next_token": next_token,
        "token_label": label,
        "text_label": label,
        "text_labels": several_labels,
        "numbers": numbers,
        "span": span,
    }
    if name not in found:
        raise ConfigError(f"there is no objective '{name}'", expected=", ".join(found))
    return found[name]
