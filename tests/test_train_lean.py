"""Weights without whole masters, and gradients without a float32 sum: the same numbers as with them, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import little
from ratoon.adapt.full import Full, FullSettings
from ratoon.model.transformer import Transformer
from ratoon.train import update
from ratoon.train.loop import Hooks, train
from ratoon.train.weights import FlatWeights, can_split

pytestmark = pytest.mark.skipif(
    not can_split(torch.bfloat16, torch.device("cpu")), reason="needs a C compiler for the update"
)


class Watched(Full):
    """All parameters, by a method that asks to look at the weights: the loop keeps masters and sums for it."""

    seen = 0

    def on_step(self, model: Transformer, moment: Any) -> None:
        self.seen += 1


def every_kind_of_number() -> torch.Tensor:
    """Random bits without NaN, both infinities, halves between two bfloat16 numbers, zeros, the smallest ones."""
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64)
    halves = (bits[:20_000] & ~0xFFFF) | 0x8000
    edges = torch.tensor([0, -(2**31), 1, 0x8000, 0x7FFF, 0x7F800000, 0x7F800000 - 2**31, 0x7F7FFFFF])
    found = torch.cat([bits, halves, edges]).to(torch.int32).view(torch.float32)
    return found[~found.isnan()].contiguous()


def test_split_and_join_give_the_same_bits() -> None:
    value = every_kind_of_number()
    high, rest = torch.empty(len(value), dtype=torch.bfloat16), torch.empty(len(value), dtype=torch.int16)
    update.split(value, high, rest)
    assert torch.equal(update.join(high, rest).view(torch.int32), value.view(torch.int32))


def test_rounding_is_to_the_nearest() -> None:
    """As torch rounds, but for halves, which go away from 0 here and to the even neighbour there."""
    value = every_kind_of_number()
    high = torch.empty(len(value), dtype=torch.bfloat16)
    update.narrow(value, high)
    half = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert half.sum() > 10_000
    assert torch.equal(high[~half], value[~half].to(torch.bfloat16))
    assert (high[half].float().abs() > value[half].abs()).all()


@pytest.mark.parametrize("rows", [8, 4])
def test_a_step_is_the_same_with_and_without_masters_and_sums(rows: int) -> None:
    """Also where the rows of a step are taken in two parts, whose gradients are summed."""
    found = []
    for kind in (Full, Watched):
        model = little.model(width=64, mlp_width=128)
        method = kind(FullSettings())
        method.install(model, seed=1)
        losses: list[dict[str, Any]] = []
        settings = little.settings(
            precision="bf16", optimizer="adamw", steps=12, log_every_steps=1, micro_batch_rows=rows
        )
        train(model, little.Rows(), settings, method=method, hooks=Hooks(log=losses.append))
        numbers = [(one["loss"], one["grad_norm"]) for one in losses if one["kind"] == "train"]
        found.append((numbers, {name: p.detach().clone() for name, p in model.named_parameters()}))
        assert isinstance(method, Watched) == bool(getattr(method, "seen", 0))
    (ours, weights), (theirs, expected) = found
    assert len(ours) == 12 and ours == theirs
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_who_looks_inside() -> None:
    from ratoon.adapt.methods import method_of

    assert not Full(FullSettings()).looks_inside and not method_of({"kind": "lora"}).looks_inside
    assert method_of({"kind": "adalora"}).looks_inside and Watched(FullSettings()).looks_inside


def test_a_pending_gradient_has_the_length_of_its_sum() -> None:
    """Parts without a gradient count as 0, and parts may lie across the blocks that the C code works in."""
    generator = torch.Generator().manual_seed(2)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (30_001, 7, 20_000, 5)]
    weights = FlatWeights({"all": [(str(i), p) for i, p in enumerate(parameters)]}, torch.bfloat16, split=True)
    for index in (0, 1, 3):
        shape = parameters[index].shape
        parameters[index].grad = torch.randn(shape, generator=generator).to(torch.bfloat16)
    assert [start for start, _ in weights.pending()] == [0, 30_001, 50_008]
    length = torch.cat([gradient.double() for _, gradient in weights.pending()]).norm()
    pending = weights.norm()
    weights.collect()
    assert weights.pending() == [] and weights.norm() == pending
    assert pending == pytest.approx(float(length), rel=1e-6)


def test_what_was_taken_is_released() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    weights = FlatWeights({"all": [("one", parameter)]}, torch.bfloat16, split=True)
    value = torch.randn(3, 5)
    weights.take({"one": value})
    assert torch.equal(weights.release()["one"], value)
    assert torch.allclose(parameter.float(), value, rtol=2**-8) and weights.finite()
    weights.work[2] = float("inf")
    assert not weights.finite()
