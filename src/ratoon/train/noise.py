"""Noise on the embeddings while training: NEFTune, and adversarial embeddings (FGM).

Decides how an objective is changed; the objective itself and the loop know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ratoon.base.seeds import derive
from ratoon.model.transformer import Transformer
from ratoon.train.loss import Inputs
from ratoon.train.objectives import Objective
from ratoon.train.settings import NoiseSettings


def with_noise(objective: Objective, settings: NoiseSettings, seed: int) -> Objective:
    """The objective on noisy embeddings; as it is where no noise is asked for.

    NEFTune (Jain et al., arXiv:2310.05914, algorithm 1): uniform noise times alpha / √(L·d), L the tokens of the
    document. FGM (Miyato et al., arXiv:1605.07725, eq. 4): the loss, and the loss at embeddings moved by epsilon along
    the loss's normed gradient of each document, each counted half.
    """
    if not settings.on_embeddings:
        return objective

    def noisy(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if not model.training:
            return objective(model, inputs)
        x_BTD = model.embedded(inputs.ids_BT, inputs.position_BT)
        if settings.neftune_alpha is not None:
            x_BTD = x_BTD + neftune(x_BTD, inputs.document_BT, settings.neftune_alpha, _streams(inputs, seed))
        if settings.adversarial_epsilon is None:
            return objective(model, replace(inputs, trunk_BTD=x_BTD, trunk_layers=0))
        leaf_BTD = x_BTD if x_BTD.requires_grad else x_BTD.detach().requires_grad_(True)
        loss, weight = objective(model, replace(inputs, trunk_BTD=leaf_BTD, trunk_layers=0))
        (slope_BTD,) = torch.autograd.grad(loss, leaf_BTD, retain_graph=True)
        moved_BTD = leaf_BTD + adversarial(slope_BTD, inputs.document_BT, settings.adversarial_epsilon)
        harder, _ = objective(model, replace(inputs, trunk_BTD=moved_BTD, trunk_layers=0))
        return 0.5 * (loss + harder), weight

    return noisy


def _streams(inputs: Inputs, seed: int) -> list[torch.Generator]:
    """A stream for each row in each step: the same after a resume, and however rows are shared out to micro-batches."""
    numbers = inputs.extra.get("number_B", range(len(inputs.ids_BT)))
    return [torch.Generator().manual_seed(derive(seed, "noise", inputs.step, int(number))) for number in numbers]


def _units(x_BTD: Tensor, document_BT: Tensor | None) -> Tensor:
    """A number for each document of each row (B, T); padding has one of its own."""
    B, T, _ = x_BTD.shape
    if document_BT is None:
        document_BT = torch.zeros(B, T, dtype=torch.int64, device=x_BTD.device)
    return torch.arange(B, device=x_BTD.device)[:, None] * (T + 1) + document_BT.long() + 1


def neftune(x_BTD: Tensor, document_BT: Tensor | None, alpha: float, streams: Sequence[torch.Generator]) -> Tensor:
    """Uniform noise (B, T, D) between -alpha / √(L·d) and alpha / √(L·d), each row's from its own stream."""
    unit_BT = _units(x_BTD, document_BT)
    count_U = torch.bincount(unit_BT.flatten(), minlength=int(unit_BT.max()) + 1)
    length_BT = count_U[unit_BT].to(torch.float32)
    rows = [torch.rand(x_BTD.shape[1:], generator=stream) for stream in streams]
    noise_BTD = torch.stack(rows).to(x_BTD.device) * 2 - 1
    return (noise_BTD * (alpha / (length_BT * x_BTD.shape[-1]).sqrt())[..., None]).to(x_BTD.dtype)


def adversarial(slope_BTD: Tensor, document_BT: Tensor | None, epsilon: float) -> Tensor:
    """epsilon · g / |g| with the norm over each document (B, T, D); 0 where the gradient is."""
    unit_BT = _units(slope_BTD, document_BT)
    square_BT = slope_BTD.float().square().sum(-1)
    total_U = torch.zeros(int(unit_BT.max()) + 1, device=slope_BTD.device)
    total_U = total_U.index_add(0, unit_BT.flatten(), square_BT.flatten())
    norm_BT1 = total_U[unit_BT].sqrt()[..., None]
    return torch.where(norm_BT1 > 0, epsilon * slope_BTD.float() / norm_BT1.clamp(min=1e-30), 0.0).to(slope_BTD.dtype)
