"""The loss: the chunked cross entropy is the plain one, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import little
from ratoon.data.batch import Batch
from ratoon.model import likelihood
from ratoon.model.likelihood import token_losses
from ratoon.model.transformer import Transformer
from ratoon.train import loss as loss_module
from ratoon.train.loss import Inputs, cross_entropy, next_token

N = (5, 12)
CPU = torch.device("cpu")


def parts(made: Transformer, seed: int = 0, *, zeros: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, targets and weights that are no masks: 0, small, large."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*N, made.cfg.width, generator=generator)
    targets = torch.randint(0, made.cfg.vocab_size, N, generator=generator)
    weight = 3 * torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) >= zeros)
    return hidden, targets, weight


def reference(made: Transformer, hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The definition, in float64: Σ w·CE, and its gradients for hidden, head and bias."""
    leaves = [hidden.detach().double().requires_grad_(), made.head_weight().detach().double().requires_grad_()]
    if made.head is not None and made.head.bias is not None:
        leaves.append(made.head.bias.detach().double().requires_grad_())
    scores = F.linear(*leaves)
    cap = made.cfg.logit_softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
    total = (losses * weight.double().flatten()).sum()
    return total, list(torch.autograd.grad(total, leaves))


def ours(made: Transformer, hidden: Tensor, targets: Tensor, weight: Tensor, up: float = 1.0) -> tuple[Tensor, Any]:
    leaves = [hidden.detach().clone().requires_grad_(), made.head_weight()]
    if made.head is not None and made.head.bias is not None:
        leaves.append(made.head.bias)
    total = cross_entropy(made, leaves[0], targets, weight)
    return total, torch.autograd.grad(total * up, leaves)


CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "own head": {"tied_embeddings": False},
    "head with bias": {"tied_embeddings": False, "head_bias": True},
    "softcap": {"logit_softcap": 1.5},
    "softcap and bias": {"logit_softcap": 1.5, "tied_embeddings": False, "head_bias": True},
}


@pytest.mark.parametrize("zeros", [0.0, 0.05, 0.6], ids=["no zeros", "few zeros", "many zeros"])
@pytest.mark.parametrize("chunk", [1 << 24, 7 * little.VOCAB, 1], ids=["one chunk", "chunks of 7", "chunks of 1"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: str, chunk: int, zeros: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_NUMBERS", chunk)
    made = little.model(**CASES[case])
    hidden, targets, weight = parts(made, zeros=zeros)
    expected, expected_gradients = reference(made, hidden, targets, weight)
    found, gradients = ours(made, hidden, targets, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert len(gradients) == len(expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-5)


def test_the_gradient_from_above_scales_it() -> None:
    made = little.model(tied_embeddings=False, head_bias=True)
    values = parts(made)
    _, plain = ours(made, *values)
    _, scaled = ours(made, *values, up=-2.5)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one * -2.5)


def test_positions_of_weight_zero_count_for_nothing() -> None:
    """Whatever stands there: the target may even be outside the vocabulary, as a foreign -100 would be."""
    made = little.model()
    for zeros in (0.05, 0.7):
        hidden, targets, weight = parts(made, zeros=zeros)
        total, gradients = ours(made, hidden, targets, weight)
        other = torch.where(weight == 0, torch.full_like(targets, -100), targets)
        again, gradients_again = ours(made, hidden, other, weight)
        assert torch.equal(total, again)
        assert all(torch.equal(one, two) for one, two in zip(gradients, gradients_again, strict=True))
        assert not gradients[0][weight == 0].any()
        assert gradients[0][weight != 0].any()


def test_all_weights_zero_gives_zero_and_no_gradient() -> None:
    made = little.model()
    hidden, targets, weight = parts(made)
    total, gradients = ours(made, hidden, targets, torch.zeros_like(weight))
    assert total.item() == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["low weights", "autocast"])
def test_low_precision_is_near_the_definition(low: torch.dtype, autocast: bool) -> None:
    made = little.model(tied_embeddings=False, head_bias=True)
    hidden, targets, weight = parts(made)
    expected, expected_gradients = reference(made, hidden, targets, weight)
    if autocast:
        with torch.autocast("cpu", dtype=low):
            total, gradients = ours(made, hidden, targets, weight)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
    else:
        made.to(low)
        total, gradients = ours(made, hidden.to(low), targets, weight)
        assert all(gradient.dtype == low for gradient in gradients)
    assert total.dtype == torch.float32
    assert abs(total.item() / expected.item() - 1) < 0.01
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert 0 < error < 0.02


def test_a_frozen_head_gets_no_gradient() -> None:
    made = little.model(tied_embeddings=False)
    assert made.head is not None
    made.head.weight.requires_grad_(False)
    hidden, targets, weight = parts(made)
    hidden.requires_grad_()
    cross_entropy(made, hidden, targets, weight).backward()
    assert made.head.weight.grad is None
    assert hidden.grad is not None and hidden.grad.any()


def test_without_gradients_the_value_is_the_same() -> None:
    made = little.model(logit_softcap=1.5)
    hidden, targets, weight = parts(made)
    with torch.no_grad():
        value = cross_entropy(made, hidden, targets, weight)
    assert torch.equal(value, ours(made, hidden, targets, weight)[0])


@pytest.mark.parametrize("chunk", [1 << 24, 7 * little.VOCAB, 1])
def test_token_losses(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_NUMBERS", chunk)
    made = little.model(logit_softcap=1.5, tied_embeddings=False, head_bias=True)
    hidden, targets, _ = parts(made)
    with torch.no_grad():
        wanted = F.cross_entropy(made.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    found = token_losses(made, hidden, targets)
    assert found.shape == targets.shape
    torch.testing.assert_close(found.flatten(), wanted)


def test_next_token_is_the_model_and_the_sum() -> None:
    made = little.model()
    inputs = Inputs.of(little.Rows().batch(0), CPU)
    total, weight = next_token(made, inputs)
    hidden = made(inputs.ids_BT, inputs.position_BT, inputs.document_BT)
    wanted = (token_losses(made, hidden, inputs.targets_BT) * inputs.weight_BT).sum()
    torch.testing.assert_close(total, wanted)
    assert weight == inputs.weight_BT.sum()


def test_plain_rows_need_no_mask_and_give_the_same() -> None:
    """One whole document a row: documents and positions are left out, and nothing changes."""
    batch = little.Rows().batch(0)
    plain = Batch(
        ids_BT=batch.ids_BT,
        targets_BT=batch.targets_BT,
        weight_BT=np.ones_like(batch.weight_BT),
        document_BT=np.zeros_like(batch.document_BT),
        position_BT=np.tile(np.arange(little.TOKENS), (little.ROWS, 1)),
    )
    inputs = Inputs.of(plain, CPU)
    assert inputs.document_BT is None and inputs.position_BT is None
    made = little.model()
    spoken = Inputs(
        **{
            **vars(inputs),
            "document_BT": torch.from_numpy(plain.document_BT),
            "position_BT": torch.from_numpy(plain.position_BT),
        }
    )
    torch.testing.assert_close(next_token(made, inputs)[0], next_token(made, spoken)[0])
    shifted = Batch(**{**vars(plain), "position_BT": plain.position_BT + 3})
    assert Inputs.of(shifted, CPU).position_BT is not None
