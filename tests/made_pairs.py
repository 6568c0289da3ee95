"""Pairs of answers, with their reference, in rows: for the tests of preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import little
from ratoon.base.seeds import stream
from ratoon.data.examples import in_order
from ratoon.data.pack import Example
from ratoon.model.transformer import Transformer
from ratoon.train.loss import Inputs
from ratoon.train.preference import with_reference

CPU = torch.device("cpu")
END = 2
TOKENS = 32


def answer(prompt: Sequence[int], words: Sequence[int], name: str = "") -> Example:
    """An answer behind its prompt, of which nothing is learned."""
    ids = [*prompt, *words]
    return Example(ids, [0.0] * (len(prompt) - 1) + [1.0] * len(words) + [0.0], name)


def pairs(count: int = 7, vocab: int = little.VOCAB, seed: int = 0) -> list[Example]:
    """Pairs of answers of unequal lengths behind prompts of unequal lengths."""
    random = stream(seed, "pairs")
    found = []
    for number in range(count):
        prompt, chosen, rejected = (
            random.integers(3, vocab, int(random.integers(low, high))).tolist()
            for low, high in ((2, 6), (1, 5), (2, 7))
        )
        other = answer(prompt, [*rejected, END], f"pair {number}")
        found.append(replace(answer(prompt, [*chosen, END], f"pair {number}"), beside=other))
    return found


def swapped(example: Example) -> Example:
    assert example.beside is not None
    return replace(example.beside, beside=replace(example, beside=None))


def reference_of(model: Transformer, examples: Sequence[Example], **more: Any) -> list[Example]:
    return with_reference(model, examples, **({"context_tokens": TOKENS, "rows": 3} | more))


def batches(examples: Sequence[Example], context_tokens: int = TOKENS, rows: int = 100) -> list[Inputs]:
    return [Inputs.of(batch, CPU) for batch, _ in in_order(examples, context_tokens=context_tokens, rows=rows)]


def summed(model: Transformer, inputs: Sequence[Inputs], objective: Any) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, weight and gradients of some batches together."""
    model.zero_grad()
    losses, weights = 0.0, 0.0
    for one in inputs:
        loss, weight = objective(model, one)
        loss.backward()
        losses, weights = losses + float(loss), weights + float(weight)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses, weights, gradients
