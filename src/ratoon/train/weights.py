"""Trained weights as flat buffers: what the model computes with, and the float32 master the optimizer moves.

All trained parameters lie side by side in one buffer (each parameter is a view of it), and so does their gradient.
Scaling, clipping, summing over processes, the optimizer's update and the cast back are then a handful of
operations on long vectors, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ratoon.train import update


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat buffers."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        """One after its last number."""
        return self.start + self.shape.numel()


class FlatWeights:
    """Parameters of some groups, in the groups' order.

    `work` holds what the model computes with (`dtype`), `master` the float32 values the optimizer moves (the same
    memory as `work` where that is float32), `summed` the float32 gradient of a whole step. Where the model computes in
    float32 its gradients are views of `summed`, added up by autograd itself; else `collect` adds them up.
    """

    def __init__(self, groups: Mapping[str, Iterable[tuple[str, nn.Parameter]]], dtype: torch.dtype) -> None:
        self.slots: dict[str, Slot] = {}
        self.bounds: dict[str, tuple[int, int]] = {}
        found: list[nn.Parameter] = []
        offset = 0
        for group, members in groups.items():
            start = offset
            for name, parameter in members:
                self.slots[name] = Slot(name, offset, parameter.shape)
                found.append(parameter)
                offset += parameter.numel()
            self.bounds[group] = (start, offset)
        device = found[0].device if found else torch.device("cpu")
        self.master = torch.empty(offset, dtype=torch.float32, device=device)
        for parameter, slot in zip(found, self.slots.values(), strict=True):
            self.master[slot.start : slot.stop] = parameter.detach().flatten().float()
        separate = dtype != torch.float32
        self.work = self.master.to(dtype) if separate else self.master
        self.summed = torch.zeros_like(self.master)
        for parameter, slot in zip(found, self.slots.values(), strict=True):
            parameter.data = self.work[slot.start : slot.stop].view(slot.shape)
            parameter.grad = None if separate else self.summed[slot.start : slot.stop].view(slot.shape)
        self.parameters = found

    def collect(self) -> None:
        """Add the gradient of a micro-batch to the step's sum, in float32, and drop it."""
        if self.work is self.master:
            return
        found = [
            (parameter.grad, slot.start)
            for parameter, slot in zip(self.parameters, self.slots.values(), strict=True)
            if parameter.grad is not None
        ]
        if update.usable(self.summed) and self.work.dtype == torch.bfloat16:
            update.collect([gradient.contiguous() for gradient, _ in found], [start for _, start in found], self.summed)
        else:
            parts = [self.summed[start : start + gradient.numel()] for gradient, start in found]
            torch._foreach_add_(parts, [gradient.flatten() for gradient, _ in found])
        self._drop()

    def norm(self) -> float:
        """The length of the step's gradient."""
        if update.usable(self.summed):
            return update.norm(self.summed)
        return float(torch.linalg.vector_norm(self.summed))

    def gradients(self) -> Iterator[Tensor]:
        """The gradients of a micro-batch that was not collected."""
        return (parameter.grad for parameter in self.parameters if parameter.grad is not None)

    def clear(self) -> None:
        """Forget the step's gradient."""
        self.summed.zero_()
        self._drop()

    def _drop(self) -> None:
        if self.work is not self.master:
            for parameter in self.parameters:
                parameter.grad = None

    def publish(self, start: int = 0, stop: int | None = None) -> None:
        """Round the master, or a part of it, into what the model computes with."""
        if self.work is not self.master:
            self.work[start:stop].copy_(self.master[start:stop])

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to the parameter `name`, in its shape."""
        slot = self.slots[name]
        return buffer[slot.start : slot.stop].view(slot.shape)

    def release(self) -> dict[str, Tensor]:
        """The float32 value of each parameter by name (views of the master)."""
        return {name: self.view(self.master, name) for name in self.slots}
