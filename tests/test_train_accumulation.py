"""Equal means equal: micro-batches, packing, gradient checkpointing and precision change how, never what is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import little
from ratoon.data.batch import IGNORED, Batch
from ratoon.model.transformer import Transformer
from ratoon.train.loss import Inputs, next_token

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "windows": {"windows": (9, None), "rope_local_theta": 300.0, "qk_norm": "before_rope"},
    "experts": {"moe": little.EXPERTS},
    "learned positions": {"positions": "learned", "norm": "layer", "mlp": "gelu", "qkv_bias": True, "kv_heads": None},
    "windows and caps": {"windows": (5, None), "logit_softcap": 4.0, "attention_softcap": 8.0, "qk_norm": "after_rope"},
}

LOW_FRACTION = {"experts": 0.3} | dict.fromkeys(MODELS.keys() - {"experts"}, 0.08)
"""How far bfloat16's gradients may be from float32's; a token that the router sends elsewhere moves experts' more."""


def gradients(
    made: Transformer, batches: list[Batch], *, recompute: bool = False
) -> tuple[float, float, dict[str, Tensor]]:
    """Summed loss, summed weight and summed gradients over batches."""
    made.zero_grad()
    made.train()
    made.recompute_blocks = recompute
    total = weights = 0.0
    for batch in batches:
        loss, weight = next_token(made, Inputs.of(batch, CPU))
        loss.backward()
        total, weights = total + loss.item(), weights + weight.item()
    return total, weights, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to a few last bits of float32, beside the largest gradient."""
    largest = max(float(value.abs().max()) for value in one.values())
    assert little.largest_difference(one, other) <= 3e-6 * largest


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("case", MODELS)
def test_one_by_eight_is_two_by_four_is_eight_by_one(case: str, optimizer: str) -> None:
    """Rows have unequal weights: only the sum over all micro-batches, divided once, is the same.

    A large `epsilon` keeps AdamW's first step from turning rounding into signs.
    """
    outcomes = [
        little.go(little.model(**MODELS[case]), steps=3, micro_batch_rows=micro, optimizer=optimizer, epsilon=1e-2)
        for micro in (8, 4, 3, 1)
    ]
    before = dict(little.model(**MODELS[case]).named_parameters())
    for outcome in outcomes[1:]:
        assert little.largest_difference(outcomes[0].weights, outcome.weights) <= 1e-6
        assert np.allclose(outcomes[0].losses(), outcome.losses(), rtol=1e-5)
    assert little.largest_difference(before, outcomes[0].weights) > 1e-3  # something was learned


def test_a_mean_of_means_would_be_seen() -> None:
    """The defect this guards against, planted: dividing each micro-batch by its own weight."""

    def mean_of_means(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
        loss, weight = next_token(model, inputs)
        return loss / weight.clamp(min=1e-9), torch.ones(())

    right = little.go(steps=1, micro_batch_rows=8, optimizer="adamw", epsilon=1e-2)
    wrong = little.go(steps=1, micro_batch_rows=2, optimizer="adamw", epsilon=1e-2, objective=mean_of_means)
    assert little.largest_difference(right.weights, wrong.weights) > 1e-4


def test_the_record_tells_the_loss_of_the_whole_step() -> None:
    made = little.model()
    loss, weight, _ = gradients(made, [little.Rows().batch(0)])
    record = little.go(steps=1, micro_batch_rows=3).records[0]
    assert record["loss"] == pytest.approx(loss / weight, rel=1e-6)
    assert record["tokens"] == little.Rows().batch(0).valid_tokens


def test_the_gradient_norm_is_of_the_mean_and_clipping_scales_it() -> None:
    made = little.model()
    _, weight, grads = gradients(made, [little.Rows().batch(0)])
    norm = float(torch.stack([(g / weight).norm() for g in grads.values()]).norm())
    record = little.go(steps=1).records[0]
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    # With a huge epsilon AdamW's first step is learning_rate * gradient / epsilon: clipping can be read off it.
    plain = {"steps": 1, "optimizer": "adamw", "epsilon": 1e3, "weight_decay": 0.0, "learning_rate": 1e3}
    start = dict(little.model().named_parameters())

    def move(**more: Any) -> float:
        moved = little.go(**plain, **more).weights
        return float(torch.stack([(moved[name] - start[name].detach()).norm() for name in start]).norm())

    assert move(clip_norm=None) == pytest.approx(norm, rel=1e-2)
    assert move(clip_norm=norm * 2) == pytest.approx(norm, rel=1e-2)
    assert move(clip_norm=norm / 4) == pytest.approx(norm / 4, rel=1e-2)


# -- packing -----------------------------------------------------------------------------------------------------


def apart(batch: Batch) -> list[Batch]:
    """Each document of each row in a row of its own, without padding."""
    rows = []
    for row in range(len(batch.ids_BT)):
        for document in sorted(set(batch.document_BT[row].tolist()) - {IGNORED}):
            inside = batch.document_BT[row] == document
            rows.append(
                Batch(
                    ids_BT=batch.ids_BT[row][inside][None],
                    targets_BT=batch.targets_BT[row][inside][None],
                    weight_BT=batch.weight_BT[row][inside][None],
                    document_BT=np.zeros((1, int(inside.sum())), np.int32),
                    position_BT=np.arange(int(inside.sum()))[None],
                )
            )
    return rows


@pytest.mark.parametrize("case", sorted(MODELS.keys() - {"experts"}))
def test_packed_is_unpacked(case: str) -> None:
    made = little.model(**MODELS[case])
    batch = little.Rows().batch(0)
    loss, weight, packed = gradients(made, [batch])
    loss_apart, weight_apart, unpacked = gradients(made, apart(batch))
    assert loss == pytest.approx(loss_apart, rel=1e-6)
    assert weight == pytest.approx(weight_apart)
    close(packed, unpacked)


def test_packed_is_unpacked_with_experts() -> None:
    """Routing is by token, so packing changes nothing; the balance loss is by row, so it is left out here."""
    made = little.model(moe=little.EXPERTS.model_copy(update={"balance_weight": 0.0}))
    batch = little.Rows().batch(0)
    loss, _, packed = gradients(made, [batch])
    loss_apart, _, unpacked = gradients(made, apart(batch))
    assert loss == pytest.approx(loss_apart, rel=1e-6)
    close(packed, unpacked)


@pytest.mark.parametrize("case", MODELS)
def test_bfloat16_sees_the_same_documents(case: str) -> None:
    """The products and fused operations of bfloat16 are others than float32's; what they compute must not be: the
    gradients of packed rows, and of each document alone, are those of the same weights in float32, to rounding."""
    shape = {"width": 64, "heads": 4, "mlp_width": 96, "context_tokens": 160, **MODELS[case]}
    low, exact = little.model(**shape), little.model(**shape)
    low.to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    batch = little.Rows(tokens=150).batch(0)
    wanted_loss, weight, wanted = gradients(exact, [batch])
    for batches in ([batch], apart(batch)):
        loss, same_weight, found = gradients(low, batches)
        assert loss == pytest.approx(wanted_loss, rel=1e-2)
        assert same_weight == pytest.approx(weight)
        assert found.keys() == wanted.keys()
        whole = max(float(value.norm()) for value in wanted.values())
        for name, value in wanted.items():  # a key's bias has no gradient: it is the same for all keys
            apart_by = float((found[name].float() - value).norm()) / max(float(value.norm()), 0.01 * whole)
            assert apart_by < LOW_FRACTION[case], (name, apart_by)


def test_the_balance_loss_is_there_and_leaves_padding_out() -> None:
    with_it, without = (
        little.model(moe=little.EXPERTS.model_copy(update={"balance_weight": weight})) for weight in (0.5, 0.0)
    )
    batch = little.Rows().batch(0)
    loss, weight, _ = gradients(with_it, [batch])
    plain, _, _ = gradients(without, [batch])
    assert loss - plain > 0.1 * weight  # at its least, with even routing, it is experts_per_token times the weight
    padding = batch.document_BT == IGNORED
    assert padding.any()
    other = Batch(**{**vars(batch), "ids_BT": np.where(padding, 3, batch.ids_BT)})
    assert gradients(with_it, [other])[0] == pytest.approx(loss, rel=1e-6)


# -- the same numbers by other ways ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODELS)
def test_recomputed_blocks_give_equal_gradients(case: str) -> None:
    made = little.model(**MODELS[case])
    batches = [little.Rows().batch(step) for step in range(2)]
    loss, _, kept = gradients(made, batches)
    loss_again, _, again = gradients(made, batches, recompute=True)
    assert loss == loss_again
    assert little.same(kept, again)


def test_recomputing_keeps_less() -> None:
    def kept_bytes(recompute: bool) -> int:
        made, total = little.model(layers=4), 0
        own = {p.data_ptr() for p in made.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += 0 if tensor.data_ptr() in own else tensor.numel() * tensor.element_size()
            return tensor

        made.train()
        made.recompute_blocks = recompute
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            next_token(made, Inputs.of(little.Rows().batch(0), CPU))
        return total

    assert kept_bytes(True) < kept_bytes(False) / 3


@pytest.mark.parametrize("precision", ["bf16", "autocast-bf16", "autocast-fp16"])
def test_lower_precision_learns_about_the_same(precision: str) -> None:
    exact = little.go(steps=8, optimizer="adamw", learning_rate=3e-3)
    lower = little.go(steps=8, optimizer="adamw", learning_rate=3e-3, precision=precision)
    assert lower.losses() != exact.losses()
    assert np.allclose(lower.losses(), exact.losses(), rtol=0.02)
    assert all(p.dtype == torch.float32 for p in lower.model.parameters())
    assert lower.told(precision)


def fit(made: Transformer, batch: Batch, **changes: Any) -> float:
    class One:
        batch: Callable[[int], Batch] = staticmethod(lambda step: batch)
        state = staticmethod(dict)

    return little.go(made, One(), rows=len(batch.ids_BT), schedule="constant", **changes).losses()[-1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ten_rows_are_learned_by_heart(optimizer: str) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, little.VOCAB, (10, little.TOKENS + 1))
    ids[:, 0] = np.arange(10)  # the first token tells the row, so that everything after it can be known
    batch = Batch(
        ids_BT=ids[:, :-1],
        targets_BT=ids[:, 1:],
        weight_BT=np.ones((10, little.TOKENS), np.float32),
        document_BT=np.zeros((10, little.TOKENS), np.int32),
        position_BT=np.tile(np.arange(little.TOKENS), (10, 1)),
    )
    made = little.model(zero_init_outputs=True)
    assert fit(made, batch, steps=150, optimizer=optimizer, weight_decay=0.0) < 0.02
