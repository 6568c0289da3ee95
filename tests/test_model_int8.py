"""Products with frozen matrices in 8-bit integers: what they are, that they are near, and that all else stays equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import little
from ratoon.adapt.contract import trained
from ratoon.adapt.methods import method_of
from ratoon.base.errors import ConfigError
from ratoon.model import int8
from ratoon.model.int8 import codes_of, product, round_frozen, unround
from ratoon.model.layers import Linear, side_by_side
from ratoon.model.transformer import Transformer
from ratoon.train.compiled import missing_compiler
from ratoon.train.device import find_place
from ratoon.train.loop import Hooks, train
from test_adapt_matrix import ADAPTERS, ENTRIES, MODELS, Entry, Table, TenRows, ids_of, installed, logits, values_of
from test_train_preference import pairs, reference_of
from test_train_resume import at, ctrl_c
from test_train_trunk import LORA_ABOVE, build, go, trunk_in

KINDS = [torch.float32, torch.bfloat16]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Rows of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x = x * 10 ** torch.empty(*shape[:-1], 1).uniform_(-4, 4, generator=generator)
    x[..., 0, :] = 0
    return x


def rounded(layer: Linear) -> Linear:
    layer.codes, scale = codes_of(layer.weight.detach())
    layer.scale = scale.flatten()
    return layer


def linear(inputs_: int, outputs: int, seed: int = 2) -> Linear:
    made = Linear(inputs_, outputs, bias=False)
    made.weight.data = torch.randn(outputs, inputs_, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_at_most_half_a_scale_away(kind: torch.dtype) -> None:
    x = inputs(40, 33).to(kind)
    codes, scale = codes_of(x)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -127
    apart = (codes.double() * scale.double() - x.double()).abs()
    assert bool((apart <= scale.double() * 0.5 * (1 + 1e-5)).all())
    assert bool((codes.abs().amax(-1)[1:] == 127).all()) and not codes[0].any(), "all of the range is used"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 16, 16), (7, 33, 18), (70, 64, 50)])
def test_product_and_gradient_are_those_of_the_codes(kind: torch.dtype, rows: int, width: int, outputs: int) -> None:
    x, layer = inputs(2, rows + 1, width).to(kind).requires_grad_(), linear(width, outputs)
    codes_OI, scale_O1 = codes_of(layer.weight)
    y = product(x, codes_OI, scale_O1.flatten())
    codes, scale = codes_of(x.detach())
    wanted = (codes.double() * scale.double()) @ (codes_OI.double() * scale_O1.double()).t()
    torch.testing.assert_close(y.detach(), wanted.to(kind), rtol=1e-6 if kind == torch.float32 else 1e-2, atol=0)
    g = inputs(2, rows + 1, outputs, seed=5).to(kind)
    y.backward(g)  # type: ignore[no-untyped-call]
    codes, scale = codes_of(g.float() * scale_O1.flatten())
    wanted = (codes.double() * scale.double()) @ codes_OI.double()
    assert x.grad is not None and x.grad.dtype == kind
    torch.testing.assert_close(x.grad, wanted.to(kind), rtol=1e-6 if kind == torch.float32 else 1e-2, atol=0)


def test_it_is_near_the_exact_product() -> None:
    """Rounding a normal row to 8 bits is wrong by about 1 % of its length; a defect in a scale is by far more."""
    x, layer = inputs(200, 96), linear(96, 80)
    exact, found = x @ layer.weight.t(), rounded(layer)(x)
    apart = (found - exact).norm(dim=1)[1:] / exact.norm(dim=1)[1:]
    assert 0.001 < float(apart.mean()) < 0.02 and float(apart.max()) < 0.04


def test_what_is_not_finite_is_not_hidden() -> None:
    layer = rounded(linear(32, 24))
    for wrong in (float("nan"), float("inf")):
        x = torch.ones(3, 32)
        x[1, 5] = wrong
        y = layer(x)
        assert not bool(y[1].isfinite().any()) and bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_side_by_side_and_row_by_row_are_the_same_bits(kind: torch.dtype) -> None:
    layers = [rounded(linear(48, outputs, seed)) for seed, outputs in enumerate((40, 17, 32))]
    x = inputs(90, 48).to(kind)
    joined = side_by_side(layers, x, None)
    assert torch.equal(joined, torch.cat([layer(x) for layer in layers], -1))
    assert torch.equal(joined, torch.cat([side_by_side(layers, row[None], None) for row in x]))
    bias = torch.randn(89).to(kind)
    assert torch.equal(side_by_side(layers, x, bias), joined + bias)
    layers[1].codes = layers[1].scale = None
    layers[1].to(kind)
    mixed = side_by_side(layers, x, None).split([40, 17, 32], -1)
    assert torch.equal(mixed[1], F.linear(x, layers[1].weight)) and torch.equal(mixed[2], joined[:, 57:])


def codes(model: Transformer) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith(".codes")}


@pytest.mark.parametrize(("entry", "changes"), ADAPTERS)
def test_every_method_computes_with_the_codes_of_what_is_frozen(entry: Entry, changes: Table) -> None:
    model, method = installed(entry, changes, random=True)
    exact, learned, before = logits(model, ids_of(method)), trained(model), values_of(model)
    assert round_frozen(model).startswith("products with 1")
    found = codes(model)
    assert len(found) == len(little.model(**changes).sites()), "every layer of the blocks"
    near = logits(model, ids_of(method))
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05
    gradients = []
    for rounds in (True, False):
        (round_frozen if rounds else unround)(model)
        model.zero_grad()
        model.train()
        (model.logits(model(ids_of(method))) ** 2).mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in learned.values()]))  # type: ignore[union-attr]
        model.eval()
    alike = float(F.cosine_similarity(gradients[0], gradients[1], dim=0))
    assert 0.97 < alike < 1 - 1e-6
    assert torch.equal(logits(model, ids_of(method)), exact) and little.same(values_of(model), before)
    assert not codes(model) and model.state_dict().keys() == installed(entry, changes)[0].state_dict().keys()


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "houlsby", "full-frozen"])
def test_ten_rows_overfit(name: str) -> None:
    entry = ENTRIES[name]
    method, records, words = method_of(entry.table), [], []
    model = little.model()
    method.install(model, seed=1)
    settings = little.settings(
        steps=100, rows=10, learning_rate=entry.rate, weight_decay=0.0, warmup_steps=0, frozen_products="int8"
    )
    hooks = Hooks(log=records.append, talk=words.append)
    train(model, TenRows(method.virtual_tokens), settings, hooks=hooks, method=method)
    found = [record["loss"] for record in records if record["kind"] == "train"]
    assert found[-1] < (entry.falls_to + 0.05) * found[0], (found[0], found[-1])
    frozen = 7 if name == "full-frozen" else 14
    assert any(word.startswith(f"products with {frozen} frozen matrices in 8-bit integers (") for word in words)
    assert not codes(model), "the finished model computes with its own weights"


def lora() -> Transformer:
    made = little.model()
    method_of({"kind": "lora", "rank": 4}).install(made, seed=1)
    return made


@pytest.mark.parametrize("precision", ["float32", "bf16", "autocast-bf16"])
def test_resumed_is_uninterrupted_and_cut_in_micro_batches_is_near(tmp_path: Path, precision: str) -> None:
    told: dict[str, Any] = {"steps": 8, "precision": precision, "frozen_products": "int8"}
    whole = little.go(lora(), **told)
    run = little.new_run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        little.go(lora(), run=run, log=at(5, ctrl_c), **told)
    rest = little.go(lora(), run=run, resume=True, **told)
    assert rest.losses() == whole.losses()[5:] and little.same(rest.weights, whole.weights)
    assert whole.losses() != little.go(lora(), **{**told, "frozen_products": "exact"}).losses()
    parts = little.go(lora(), micro_batch_rows=2, **told)
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-4 if precision == "float32" else 2e-2)


def test_a_run_does_not_change_its_products_on_the_way(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        little.go(lora(), run=run, steps=8, log=at(5, ctrl_c))
    with pytest.raises(Exception, match="frozen_products"):
        little.go(lora(), run=run, steps=8, resume=True, frozen_products="int8")


def test_a_kept_trunk_is_that_of_its_products(tmp_path: Path) -> None:
    plain = go(None, build(LORA_ABOVE), frozen_products="int8")
    kept = trunk_in(tmp_path / "trunk")
    cached = go(kept, build(LORA_ABOVE), frozen_products="int8")
    assert cached.losses() == plain.losses() and kept.reads > 0
    other = trunk_in(tmp_path / "trunk")
    exact = go(other, build(LORA_ABOVE))
    assert other.computed > 0 and exact.losses() == go(None, build(LORA_ABOVE)).losses() != plain.losses()


def test_a_reference_is_asked_as_training_computes() -> None:
    """So that preference begins at a margin of 0."""
    place = find_place(little.settings(frozen_products="int8"))
    model = lora()
    found = reference_of(model, pairs(), place=place)
    assert not codes(model)
    round_frozen(model)
    assert found == reference_of(model, pairs(), place=find_place(little.settings()))
    unround(model)
    assert found != reference_of(model, pairs())


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason="no compiler here")
@pytest.mark.parametrize("arch", MODELS)
def test_compiled_is_eager(arch: str) -> None:
    def made() -> Transformer:
        model = little.model(**MODELS[arch])
        method_of({"kind": "lora", "rank": 4}).install(model, seed=1)
        return model

    told: dict[str, Any] = {"steps": 4, "frozen_products": "int8"}
    eager, whole = little.go(made(), **told), little.go(made(), compile="model", **told)
    assert whole.told("compiled as a whole") and whole.losses() == pytest.approx(eager.losses(), rel=2e-3)


def test_nothing_frozen_is_said_and_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert little.go(frozen_products="int8").told("no linear layer of the blocks is frozen")
    with pytest.raises(ConfigError, match="made for the processor, and the model is on meta") as caught:
        round_frozen(lora().to("meta"))
    assert caught.value.where == "train.frozen_products"


def test_a_router_and_what_is_learned_are_never_rounded() -> None:
    made = little.model(moe=little.EXPERTS)
    made.requires_grad_(False)
    made.layers[0].attention.q.weight.requires_grad_(True)
    round_frozen(made)
    assert sorted(codes(made)) == sorted(
        f"layers.{layer}.attention.{kind}.codes" for layer in (0, 1) for kind in "qkvo" if (layer, kind) != (0, "q")
    )
    assert made.layers[0].attention.q.codes is None and little.EXPERTS.experts < int8.SMALLEST_WIDTH
