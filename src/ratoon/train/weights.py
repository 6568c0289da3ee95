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


def can_split(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of that kind can be kept as what the model computes with and what the rounding left."""
    return dtype == torch.bfloat16 and update.usable(torch.empty(0, device=device))


class FlatWeights:
    """Parameters of some groups, in the groups' order.

    `work` holds what the model computes with (`dtype`), `master` the float32 values the optimizer moves (the same
    memory as `work` where that is float32), `summed` the float32 gradient of a whole step. Where the model computes in
    float32 its gradients are views of `summed`, added up by autograd itself; else `collect` adds them up.

    With `split` there is no master: `rest` holds the 16 bits by which bfloat16 `work` differs from it (`update.split`),
    half of its memory. A gradient that was not collected, because nothing else is added to it, is `pending`.
    """

    def __init__(
        self, groups: Mapping[str, Iterable[tuple[str, nn.Parameter]]], dtype: torch.dtype, *, split: bool = False
    ) -> None:
        self.slots: dict[str, Slot] = {}
        self.bounds: dict[str, tuple[int, int]] = {}
        self.parameters: list[nn.Parameter] = []
        self.size = 0
        for group, members in groups.items():
            start = self.size
            for name, parameter in members:
                self.slots[name] = Slot(name, self.size, parameter.shape)
                self.parameters.append(parameter)
                self.size += parameter.numel()
            self.bounds[group] = (start, self.size)
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        assert not split or (device.type == "cpu" and dtype == torch.bfloat16)
        self.rest = torch.empty(self.size, dtype=torch.int16) if split else None
        self._master = None if split else torch.empty(self.size, dtype=torch.float32, device=device)
        separate = dtype != torch.float32
        self.work = torch.empty(self.size, dtype=dtype, device=device) if separate else self.master
        self._summed: Tensor | None = None
        for parameter, slot in zip(self.parameters, self.slots.values(), strict=True):
            self._put(slot, parameter.detach())
            parameter.data = self.work[slot.start : slot.stop].view(slot.shape)
            parameter.grad = None if separate else self.summed[slot.start : slot.stop].view(slot.shape)

    @property
    def master(self) -> Tensor:
        """The float32 values, where they lie in one piece."""
        assert self._master is not None
        return self._master

    @property
    def summed(self) -> Tensor:
        """The step's gradient in float32; its memory is taken when it is first needed."""
        if self._summed is None:
            self._summed = torch.zeros(self.size, dtype=torch.float32, device=self.work.device)
        return self._summed

    def _put(self, slot: Slot, value: Tensor) -> None:
        """Set a parameter's float32 values, and what the model computes with."""
        if self.rest is not None:
            place = slice(slot.start, slot.stop)
            update.split(value.flatten().float().contiguous(), self.work[place], self.rest[place])
            return
        self.master[slot.start : slot.stop] = value.flatten().float()
        self.publish(slot.start, slot.stop)

    def collect(self) -> None:
        """Add the gradient of a micro-batch to the step's sum, in float32, and drop it."""
        if self.work is self._master:
            return
        found = self.pending()
        if update.usable(self.summed) and self.work.dtype == torch.bfloat16:
            update.collect(found, self.summed)
        else:
            parts = [self.summed[start : start + gradient.numel()] for start, gradient in found]
            torch._foreach_add_(parts, [gradient.flatten() for _, gradient in found])
        self.drop()

    def pending(self, start: int = 0, stop: int | None = None) -> list[tuple[int, Tensor]]:
        """The gradients of a micro-batch that were not collected, in that part of the vector: where each begins in it,
        and the gradient."""
        if self.work is self._master:
            return []
        stop = self.size if stop is None else stop
        return [
            (slot.start - start, parameter.grad)
            for parameter, slot in zip(self.parameters, self.slots.values(), strict=True)
            if parameter.grad is not None and start <= slot.start < stop
        ]

    def norm(self) -> float:
        """The length of the step's gradient."""
        if found := self.pending():
            return update.norm(None, found, self.size)
        if update.usable(self.summed):
            return update.norm(self.summed)
        return float(torch.linalg.vector_norm(self.summed))

    def gradients(self) -> Iterator[Tensor]:
        """The gradients of a micro-batch that was not collected."""
        return (parameter.grad for parameter in self.parameters if parameter.grad is not None)

    def clear(self) -> None:
        """Forget the step's gradient."""
        if self._summed is not None:
            self._summed.zero_()
        self.drop()

    def drop(self) -> None:
        """Forget what was not collected."""
        if self.work is not self._master:
            for parameter in self.parameters:
                parameter.grad = None

    def publish(self, start: int = 0, stop: int | None = None) -> None:
        """Round the master, or a part of it, into what the model computes with."""
        if self.rest is not None or self.work is self._master:
            return
        if self.work.dtype == torch.bfloat16 and update.usable(self.work):
            update.narrow(self.master[start:stop], self.work[start:stop])
        else:
            self.work[start:stop].copy_(self.master[start:stop])

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to the parameter `name`, in its shape."""
        slot = self.slots[name]
        return buffer[slot.start : slot.stop].view(slot.shape)

    def value(self, name: str) -> Tensor:
        """The float32 value of a parameter: a view of the master, or with `split` a tensor of its own."""
        if self.rest is None:
            return self.view(self.master, name)
        return update.join(self.view(self.work, name), self.view(self.rest, name))

    def copied(self, name: str) -> Tensor:
        """The float32 value of a parameter, as a tensor of its own."""
        value = self.value(name)
        return value if self.rest is not None else value.clone()

    def release(self) -> dict[str, Tensor]:
        """The float32 value of each parameter by name."""
        return {name: self.value(name) for name in self.slots}

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Set the float32 values, and what the model computes with."""
        for name, slot in self.slots.items():
            self._put(slot, values[name])

    def finite(self) -> bool:
        """Whether every number is."""
        held = self.work if self._master is None else self._master
        return bool(torch.linalg.vector_norm(held, dtype=torch.float32).isfinite())
