"""Optimizers over flat weights: AdamW, and Muon for hidden matrices with AdamW for the rest.

Decides which parameter is moved by what. The learning rate of the moment comes from `schedule.py`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ratoon.model.layers import Embedding, Linear
from ratoon.model.transformer import Experts
from ratoon.train import update
from ratoon.train.settings import TrainSettings
from ratoon.train.weights import FlatWeights

MATRIX, DECAYED, PLAIN = "matrix", "decayed", "plain"


def group_parameters(model: nn.Module, settings: TrainSettings) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters by how they are moved.

    `matrix`: hidden matrices (Muon); `decayed`: other matrices and embeddings (AdamW with weight decay); `plain`:
    gains and biases (AdamW without).
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {MATRIX: [], DECAYED: [], PLAIN: []}
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = owner[id(parameter)]
        hidden = parameter.ndim >= 2 and isinstance(module, Linear | Experts)
        if hidden and not name.endswith("head.weight") and "router" not in name and settings.optimizer == "muon":
            groups[MATRIX].append((name, parameter))
        elif parameter.ndim >= 2 or isinstance(module, Embedding):
            groups[DECAYED].append((name, parameter))
        else:
            groups[PLAIN].append((name, parameter))
    return groups


class Optimizer:
    """Moves the master of `FlatWeights` by the step's summed gradient; Muon multiplies in `product`."""

    def __init__(self, weights: FlatWeights, settings: TrainSettings, product: torch.dtype = torch.bfloat16) -> None:
        self.weights = weights
        self.settings = settings
        self.product = product
        self.step_number = torch.zeros((), dtype=torch.float32)
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        for group in (DECAYED, PLAIN):
            start, stop = weights.bounds[group]
            moments = torch.bfloat16 if settings.moments == "bfloat16" else torch.float32
            self.mean[group] = self._zeros(stop - start, moments)
            self.square[group] = self._zeros(stop - start, moments)
        start, stop = weights.bounds[MATRIX]
        self.momentum = self._zeros(stop - start)
        # Matrices of one shape are orthogonalized together; experts are stacks of matrices already.
        self.by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, slot in weights.slots.items():
            if start <= slot.start < stop:
                self.by_shape[(slot.shape[-2], slot.shape[-1])].append(name)

    def _zeros(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=self.weights.work.device)

    @torch.no_grad()
    def step(self, share: float, factor: float = 1.0) -> None:
        """One update by the summed gradient times `factor`, which is then forgotten; `share` is the schedule's share
        of the peak learning rates."""
        self.step_number += 1
        lying = bool(self.weights.pending())
        for group in (DECAYED, PLAIN):
            start, stop = self.weights.bounds[group]
            if start < stop:
                self._adamw(group, start, stop, share, factor, lying)
        if self.by_shape:
            self._muon(share, factor)
        self.weights.drop()

    def _adamw(self, group: str, start: int, stop: int, share: float, factor: float, lying: bool) -> None:
        """One group; `lying`: the gradient was not collected, but lies where backward put it."""
        settings, weights = self.settings, self.weights
        rate = settings.learning_rate * share
        decay = settings.weight_decay if group == DECAYED else 0.0
        work = weights.work[start:stop]
        if update.usable(work) and work.dtype in (torch.bfloat16, torch.float32):
            update.adamw(
                weight=weights.master[start:stop] if weights.rest is None else None,
                gradient=None if lying else weights.summed[start:stop],
                mean=self.mean[group],
                square=self.square[group],
                low=work if work.dtype == torch.bfloat16 else None,
                rest=None if weights.rest is None else weights.rest[start:stop],
                parts=weights.pending(start, stop) if lying else (),
                rate=rate,
                beta1=settings.beta1,
                beta2=settings.beta2,
                epsilon=settings.epsilon,
                decay=decay,
                step=float(self.step_number),
                factor=factor,
            )
            return
        gradient, master = weights.summed[start:stop], weights.master[start:stop]
        gradient *= factor
        mean, square = self.mean[group], self.square[group]
        if mean.dtype == torch.float32:
            self._adamw_by_torch(master, gradient, mean, square, rate, decay)
        else:
            # Places count from the beginning of the group: what is rounded by chance is rounded as the C code does.
            wide_mean, wide_square = mean.float(), square.float()
            self._adamw_by_torch(master, gradient, wide_mean, wide_square, rate, decay)
            update.narrow_moments(wide_mean, wide_square, mean, square, step=int(self.step_number))
        gradient.zero_()
        weights.publish(start, stop)

    def _adamw_by_torch(
        self, master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, decay: float
    ) -> None:
        settings = self.settings
        torch._fused_adamw_(
            [master],
            [gradient],
            [mean],
            [square],
            [],
            [self.step_number.to(master.device)],
            lr=rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=decay,
            eps=settings.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )

    def _muon(self, share: float, factor: float) -> None:
        settings, weights = self.settings, self.weights
        start, stop = weights.bounds[MATRIX]
        gradient = weights.summed[start:stop]
        gradient *= factor
        self.momentum.lerp_(gradient, 1 - settings.momentum)
        direction = gradient.lerp_(self.momentum, settings.momentum)  # Nesterov
        rate = settings.matrix_learning_rate * share
        weights.master[start:stop] *= 1 - rate * settings.weight_decay
        for (rows, columns), names in self.by_shape.items():
            slots = [weights.slots[name] for name in names]
            stack = torch.cat([direction[s.start - start : s.stop - start].view(-1, rows, columns) for s in slots])
            moved = orthogonalize(stack.to(self.product))
            targets = [weights.view(weights.master, name).view(-1, rows, columns) for name in names]
            parts = torch.split(moved, [len(target) for target in targets])
            for target, part in zip(targets, parts, strict=True):
                target.add_(part, alpha=-rate * max(1.0, rows / columns) ** 0.5)
        gradient.zero_()
        weights.publish(start, stop)

    def state(self) -> dict[str, Tensor]:
        """Everything that decides the next updates, by name."""
        return {
            "step_number": self.step_number,
            "momentum": self.momentum,
            **{f"mean.{group}": value for group, value in self.mean.items()},
            **{f"square.{group}": value for group, value in self.square.items()},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for name, value in self.state().items():
            value.copy_(state[name])


def orthogonalize(stack: Tensor, iterations: int = 5) -> Tensor:
    """Each matrix (…, rows, columns) -> about U Vᵀ of its singular value decomposition, in the stack's own type.

    Newton-Schulz in the quintic form with Muon's coefficients (Jordan et al. 2024): singular values end between about
    0.7 and 1.2.
    """
    x = stack.reshape(-1, *stack.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).reshape(stack.shape)
