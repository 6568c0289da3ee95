"""Attention and the embedding's gradient in C = the plain way, forward and backward; and everywhere else the plain way
is taken."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ratoon.data.batch import Batch
from ratoon.model import fused
from ratoon.model.attention import attend, visible
from ratoon.model.config import ModelConfig
from ratoon.model.init import init_weights
from ratoon.model.transformer import Transformer

needs_code = pytest.mark.skipif(fused.missing() is not None, reason=f"no C code here: {fused.missing()}")

CASES: dict[str, dict[str, Any]] = {
    "llama, grouped": {"kv_heads": 2, "head_dim": 32},
    "nanochat": {"norm_weight": "none", "qk_norm": "after_rope", "rope_sign": -1, "head_dim": 32},
    "gpt2": {"norm": "layer", "positions": "learned", "mlp": "gelu_tanh", "mlp_bias": True, "out_bias": True},
    "neox": {"norm": "layer", "rope_fraction": 0.5, "head_dim": 64, "norm_layout": "parallel", "heads": 2},
    "qwen3: gains before the rotation": {"qk_norm": "before_rope", "head_dim": 48, "kv_heads": 1},
    "gains after the rotation": {"qk_norm": "after_rope", "head_dim": 32},
    "16 channels": {"head_dim": 16},
    "windows, own theta": {"windows": (7, None), "rope_local_theta": 100.0, "head_dim": 32},
    "window over blocks": {"windows": (100, 65), "head_dim": 32, "query_scale": 0.3},
}


def made(**changes: Any) -> Transformer:
    table: dict[str, Any] = {
        "vocab_size": 50, "width": 64, "layers": 2, "heads": 4, "mlp_width": 96, "context_tokens": 300,
        "init_std": 0.15, "zero_init_outputs": False,
    }  # fmt: skip
    model = Transformer(ModelConfig(**(table | changes)))
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def documents(T: int) -> tuple[Tensor, Tensor]:
    """Rows of one document, of two, and of one with padding behind it; and the tokens' places."""
    document_BT = torch.zeros(3, T, dtype=torch.int32)
    document_BT[1, T // 2 :] = 1
    document_BT[2, 1 + T // 3 :] = -1
    position_BT = torch.arange(T).expand(3, T).clone()
    position_BT[1, T // 2 :] -= T // 2
    return document_BT, position_BT


def result(
    model: Transformer, dtype: torch.dtype, use: bool, ids: Tensor, position: Tensor | None, document: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and gradients, with the C code or without."""
    model = copy.deepcopy(model).to(dtype)
    before, fused._usable = fused._usable, use
    try:
        hidden = model(ids, position, document)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        if document is not None:
            weight = weight * (document >= 0)[..., None]
        (hidden * weight).sum().backward()
    finally:
        fused._usable = before
    kept = hidden.detach().double() if document is None else hidden.detach().double() * (document >= 0)[..., None]
    return kept, {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def distance(one: Tensor, other: Tensor, scale: float) -> float:
    return float((one - other).norm() / scale)


@needs_code
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both directions"])
@pytest.mark.parametrize("T", [2, 17, 64, 65, 130, 256])
@pytest.mark.parametrize("case", CASES)
def test_c_is_as_near_to_float64_as_the_plain_way(case: str, T: int, causal: bool) -> None:
    """In bfloat16 neither is exact: the C code may err as much as the plain product does, and no more."""
    # A softmax over two keys hangs on one difference of rounded scores.
    slack = 0.02 if T == 2 else 5e-3
    model = made(**CASES[case], causal=causal)
    ids = torch.randint(0, 50, (3, T), generator=torch.Generator().manual_seed(T))
    for document, position in ((None, None), documents(T)):
        exact, exact_grads = result(model, torch.float64, False, ids, position, document)
        plain, plain_grads = result(model, torch.bfloat16, False, ids, position, document)
        ours, our_grads = result(model, torch.bfloat16, True, ids, position, document)
        assert not torch.equal(plain, ours)  # the C code was really taken
        scale = float(exact.norm())
        assert distance(ours, exact, scale) < 1.5 * distance(plain, exact, scale) + 1e-3
        whole = float(torch.cat([g.flatten() for g in exact_grads.values()]).norm())
        assert our_grads.keys() == exact_grads.keys()
        for name, exact_grad in exact_grads.items():
            scale = max(float(exact_grad.norm()), 1e-3 * whole)
            off = distance(our_grads[name], exact_grad, scale)
            assert off < 1.5 * distance(plain_grads[name], exact_grad, scale) + slack, name


def packed(rows: int, T: int, shortest: int, longest: int, generator: torch.Generator) -> Tensor:
    """Rows (rows, T) filled with documents of random lengths; each row ends with padding, the first with none."""
    document_BT = torch.full((rows, T), -1, dtype=torch.int32)
    for row in range(rows):
        at, stop = 0, T - row * longest // 2
        while at < stop:
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            document_BT[row, at : min(at + length, stop)] = at
            at += length
    return document_BT


@needs_code
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both directions"])
@pytest.mark.parametrize("window", [None, 5, 90])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (10, 40), (3, 150)])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(9, 3, 64), (4, 4, 32), (6, 1, 16)])
def test_random_documents_give_the_mask_of_the_plain_way(
    heads: int, kv_heads: int, channels: int, shortest: int, longest: int, window: int | None, causal: bool
) -> None:
    """Outputs and the gradients of queries, keys and values, against float64 with the mask written out."""
    generator = torch.Generator().manual_seed(longest + (window or 0))
    rows, T = 3, 211
    document_BT = packed(rows, T, shortest, longest, generator)
    qkv_BTX = torch.randn(rows, T, (heads + 2 * kv_heads) * channels, generator=generator).bfloat16()
    upstream_BTX = torch.randn(rows, T, heads * channels, generator=generator).bfloat16()
    upstream_BTX = upstream_BTX * (document_BT >= 0)[..., None]

    ours = qkv_BTX.clone().requires_grad_()
    runs = fused.run_starts(document_BT), fused.run_ends(document_BT)
    sizes = {"heads": heads, "kv_heads": kv_heads, "scale": 0.3, "norm_eps": None}
    out_BTX = fused.attend(ours, None, None, *runs, **sizes, window=window, causal=causal)
    out_BTX.backward(upstream_BTX)

    exact = qkv_BTX.double().requires_grad_()
    keep_B1TS = visible(document_BT, document_BT, queries=T, keys=T, causal=causal, window=window, device=exact.device)
    q, k, v = (
        one.view(rows, T, -1, channels).transpose(1, 2)
        for one in exact.split([n * channels for n in (heads, kv_heads, kv_heads)], dim=-1)
    )
    plain = attend(q, k, v, keep_B1TS=keep_B1TS, causal=causal, scale=0.3).transpose(1, 2).flatten(2)
    plain.backward(upstream_BTX.double())

    assert ours.grad is not None and exact.grad is not None
    real = (document_BT >= 0)[..., None]
    whole = float(exact.grad.norm())
    parts = [(out_BTX * real, plain * real, 0.0)]
    for at, n in ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)):
        part = slice(at * channels, (at + n) * channels)
        parts.append((ours.grad[..., part], exact.grad[..., part], 0.01 * whole))
    for found, wanted, least in parts:
        assert distance(found.detach().double(), wanted.detach(), max(float(wanted.detach().norm()), least)) < 0.01
    assert torch.equal(ours.grad * ~real, torch.zeros_like(ours))  # nothing reaches padding


@needs_code
@pytest.mark.parametrize("at", [0, 63, 64, 129])
def test_in_both_directions_the_last_token_reaches_the_first(at: int) -> None:
    """Each token of a document feels a change anywhere in it; behind the document's end nobody does."""
    model = made(head_dim=32, causal=False, layers=1).to(torch.bfloat16)
    ids = torch.randint(0, 50, (1, 200))
    document = torch.zeros(1, 200, dtype=torch.int32)
    document[0, 130:] = 1
    changed = ids.clone()
    changed[0, at] = (ids[0, at] + 1) % 50
    with torch.no_grad():
        differ = (model(ids, None, document) != model(changed, None, document)).any(-1)[0]
    assert differ[:130].all()
    assert not differ[130:].any()


@needs_code
def test_documents_do_not_see_each_other() -> None:
    """Packed = apart, bit for bit where the blocks lie alike: the first document of a row does not feel the second."""
    model = made(head_dim=32).to(torch.bfloat16)
    ids = torch.randint(0, 50, (1, 100))
    document = torch.zeros(1, 100, dtype=torch.int32)
    document[0, 40:] = 1
    position = torch.cat([torch.arange(40), torch.arange(60)])[None]
    with torch.no_grad():
        packed = model(ids, position, document)
        changed = ids.clone()
        changed[0, :40] = (changed[0, :40] + 1) % 50
        assert torch.equal(model(changed, position, document)[0, 40:], packed[0, 40:])
        assert not torch.equal(model(changed, position, document)[0, :40], packed[0, :40])
        alone = model(ids[:, 40:])
    assert (packed[0, 40:].float() - alone[0].float()).abs().max() < 0.1


@needs_code
def test_the_result_does_not_depend_on_threads_or_repeats() -> None:
    model = made(head_dim=32)
    ids = torch.randint(0, 50, (3, 130))
    first = result(model, torch.bfloat16, True, ids, None, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again = result(model, torch.bfloat16, True, ids, None, None)
            assert torch.equal(again[0], first[0])
            assert torch.equal(again[1]["embed.weight"], first[1]["embed.weight"])
    finally:
        torch.set_num_threads(threads)


@needs_code
def test_a_number_that_is_not_finite_stays_visible() -> None:
    """A NaN in one key reaches every later token of its document, and none of an earlier block."""
    model = made(head_dim=32, layers=1).to(torch.bfloat16)
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
        ids = torch.randint(8, 50, (1, 90))
        ids[0, 70] = 7
        hidden = model(ids)
    assert hidden[0, :64].isfinite().all()
    assert hidden[0, 70:].isnan().all()


@needs_code
@pytest.mark.parametrize("width", [16, 40, 64])
def test_the_embeddings_gradient_is_the_sum_over_its_tokens(width: int) -> None:
    table = torch.randn(11, width).bfloat16().requires_grad_()
    ids = torch.randint(0, 11, (4, 33))
    upstream = torch.randn(4, 33, width).bfloat16()
    found = fused.embed(ids, table)
    assert torch.equal(found, table[ids])
    found.backward(upstream)
    assert table.grad is not None
    exact = torch.zeros(11, width, dtype=torch.float64).index_add(0, ids.flatten(), upstream.double().view(-1, width))
    assert torch.equal(table.grad, exact.float().bfloat16()) or (table.grad - exact).abs().max() < 0.02


@needs_code
def test_operations_pass_torchs_own_checks() -> None:
    qkv = torch.randn(2, 20, 3 * 32).bfloat16().requires_grad_()
    rest = (None, None, None, None, None, 1, 1, 0.2, -1.0, 0, True)
    torch.library.opcheck(torch.ops.ratoon.attention, (qkv, *rest), test_utils=("test_schema", "test_faketensor"))
    ids = torch.randint(0, 9, (2, 5))
    gradient = torch.randn(2, 5, 32).bfloat16()
    torch.library.opcheck(
        torch.ops.ratoon.embedding_backward, (gradient, ids, 9), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    "changes",
    [{"attention_softcap": 5.0}, {"head_dim": 24}],
    ids=["soft-cap", "24 channels"],
)
def test_what_it_does_not_express_goes_the_plain_way(changes: dict[str, Any]) -> None:
    model = made(**changes)
    ids = torch.randint(0, 50, (3, 30))
    assert torch.equal(
        result(model, torch.bfloat16, True, ids, None, None)[0],
        result(model, torch.bfloat16, False, ids, None, None)[0],
    )


def test_float32_goes_the_plain_way() -> None:
    model, ids = made(), torch.randint(0, 50, (3, 30))
    assert torch.equal(
        result(model, torch.float32, True, ids, None, None)[0], result(model, torch.float32, False, ids, None, None)[0]
    )


def test_runs_of_documents() -> None:
    document = torch.tensor([[0, 0, 1, 1, 1, -1], [3, 3, 3, 3, 3, 3]])
    assert fused.run_starts(document).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert fused.run_ends(document).tolist() == [[1, 1, 4, 4, 4, 5], [5] * 6]


@needs_code
@pytest.mark.parametrize("vocab", [7, 16, 65, 4096])
def test_the_cross_entropy_is_that_of_torch(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    scores = (3 * torch.randn(40, vocab, generator=generator)).bfloat16()
    targets = torch.randint(0, vocab, (40,), generator=generator)
    weight = torch.rand(40, generator=generator) * (torch.rand(40, generator=generator) < 0.7)
    targets[weight == 0] = -1  # not read
    exact = scores.double().requires_grad_()
    kept = weight > 0
    summed = (F.cross_entropy(exact[kept], targets[kept], reduction="none") * weight[kept]).sum()
    summed.backward()
    loss = float(summed.detach())
    assert exact.grad is not None
    untouched = scores.clone()
    assert fused.cross_entropy_(untouched, targets, weight, gradient=False) == pytest.approx(loss, rel=1e-5)
    assert torch.equal(untouched, scores)
    assert fused.cross_entropy_(scores, targets, weight, gradient=True) == pytest.approx(loss, rel=1e-5)
    assert (scores.double() - exact.grad).abs().max() < 0.004
    assert (scores[~kept] == 0).all()


@needs_code
def test_a_target_outside_the_vocabulary_is_refused() -> None:
    scores = torch.zeros(3, 20).bfloat16()
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match="20 tokens"):
            fused.cross_entropy_(scores, torch.tensor([1, wrong, 2]), torch.ones(3), gradient=True)


@needs_code
def test_a_score_that_is_not_finite_gives_a_loss_that_is_not() -> None:
    for bad in (float("nan"), float("inf")):
        scores = torch.zeros(2, 20).bfloat16()
        scores[1, 5] = bad
        assert not fused.cross_entropy_(scores, torch.tensor([1, 2]), torch.ones(2), gradient=False).isfinite()


@needs_code
@pytest.mark.parametrize("with_bias", [True, False])
def test_gelu_is_that_of_torch(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(3, 5, 48, generator=generator)).bfloat16().requires_grad_()
    bias = torch.randn(48, generator=generator).bfloat16().requires_grad_() if with_bias else None
    upstream = torch.randn(3, 5, 48, generator=generator).bfloat16()
    with torch.no_grad():
        x[0, 0, :4] = torch.tensor([-100.0, 100.0, 0.0, -8.0])
    exact = [one.detach().double().requires_grad_() for one in (x, bias) if one is not None]
    wanted = F.gelu(sum(exact[1:], start=exact[0]), approximate="tanh")
    wanted.backward(upstream.double())
    found = fused.gelu_tanh(x, bias)
    found.backward(upstream)
    assert (found.double() - wanted).abs().max() < 0.3  # half a last place of 100 in bfloat16
    assert torch.allclose(found.double(), wanted, rtol=2**-8, atol=1e-5)
    assert x.grad is not None and exact[0].grad is not None
    assert torch.allclose(x.grad.double(), exact[0].grad, rtol=2**-7, atol=1e-3)
    if bias is not None:
        assert bias.grad is not None and exact[1].grad is not None
        assert torch.allclose(bias.grad.double(), exact[1].grad, rtol=0.02, atol=0.02)


def test_a_document_in_two_places_of_a_row_is_refused() -> None:
    """The C code counts on runs where the plain way compares numbers: what would tell them apart cannot be made."""
    ids = np.zeros((1, 4), np.int64)
    for document, fine in (([0, 0, 1, -1], True), ([0, 1, 0, 0], False)):
        table = {"weight_BT": np.ones((1, 4), np.float32), "document_BT": np.array([document], np.int32)}
        with contextlib.nullcontext() if fine else pytest.raises(AssertionError, match="two places"):
            Batch(ids_BT=ids, targets_BT=ids, position_BT=ids, **table)
