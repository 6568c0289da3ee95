"""A method in thirty lines: train few parameters, and leave the rest bit for bit as they are.

BitFit's idea (Ben Zaken et al., arXiv:2106.10199) for a model without biases: only the gains of the norms are trained.
The loop trains what asks for a gradient when it begins, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.data.pack import Example, pack_whole, whole_rows
from ratoon.model.config import ModelConfig
from ratoon.model.init import init_weights
from ratoon.model.transformer import Norm, Transformer
from ratoon.train.loop import train
from ratoon.train.settings import TrainSettings

TOKENS, ROWS = 32, 8


def install(model: nn.Module) -> int:
    """Freeze everything but the norms; returns how many parameters are trained."""
    model.requires_grad_(False)
    for parameter in trainable(model):
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in trainable(model))


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """The gains of the norms."""
    return (p for module in model.modules() if isinstance(module, Norm) for p in module.parameters())


class Counting:
    """Rows that count upwards from a random number."""

    def batch(self, step: int) -> Batch:
        starts = stream(1, "counting", step).integers(0, 20, ROWS)
        rows = [Example([(start + i) % 20 for i in range(TOKENS + 1)], [1.0] * TOKENS) for start in starts]
        return whole_rows(rows, pack_whole(rows, TOKENS), TOKENS)

    def state(self) -> dict[str, int]:
        return {"seed": 1}


def main() -> tuple[int, dict[str, bool]]:
    """Train the gains; returns how many parameters that are, and which parameters changed."""
    shape = {"vocab_size": 20, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "context_tokens": TOKENS}
    model = Transformer(ModelConfig(**shape, zero_init_outputs=False))
    init_weights(model, 1)
    count = install(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    train(model, Counting(), TrainSettings(steps=10, rows=ROWS, context_tokens=TOKENS, compile="off"))
    changed = {name: not torch.equal(value, before[name]) for name, value in model.named_parameters()}
    print(f"{count} of {sum(p.numel() for p in model.parameters())} parameters were trained")
    return count, changed


if __name__ == "__main__":
    main()
