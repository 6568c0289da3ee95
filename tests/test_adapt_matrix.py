"""Every method on every kind of model: what the contract of `adapt/contract.py` promises. A new method is one entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import little
from ratoon.adapt.contract import Method, Moment, trained
from ratoon.adapt.folder import load_adapter, save_adapter
from ratoon.adapt.methods import METHODS, method_of
from ratoon.base.errors import ConfigError
from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.model.config import HeadConfig
from ratoon.model.init import add_head
from ratoon.model.transformer import Transformer
from ratoon.train.loop import Hooks, train

Table = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method and what is true of it. `rate` and `falls_to`: the learning rate with which it overfits ten rows, and
    the share of the first loss that is left."""

    table: Table
    adapter: bool = True
    starts_as_base: bool = True
    merges: bool = True
    rate: float = 0.03
    falls_to: float = 0.15


ENTRIES = {
    "full": Entry({"kind": "full"}, adapter=False, rate=0.01, falls_to=0.05),
    "full-frozen": Entry({"kind": "full", "freeze_layers": 1}, adapter=False, rate=0.01, falls_to=0.3),
    "lora": Entry({"kind": "lora", "rank": 4}),
    "lora-upper": Entry({"kind": "lora", "rank": 3, "targets": ("q", "v", "up"), "layers": (1,)}, falls_to=0.6),
    "rslora": Entry({"kind": "lora", "rank": 4, "rank_stabilized": True, "alpha": 4.0}),
    "dora": Entry({"kind": "lora", "rank": 4, "decomposed": True}),
    "adalora": Entry({"kind": "adalora", "initial_rank": 6, "rank": 4, "alpha": 24.0}),
    "ia3": Entry({"kind": "ia3"}, rate=0.1, falls_to=0.8),
    "houlsby": Entry({"kind": "houlsby", "reduction": 2}, merges=False, falls_to=0.2),
    "pfeiffer": Entry({"kind": "pfeiffer", "reduction": 2}, merges=False, falls_to=0.4),
    "prefix": Entry({"kind": "prefix", "tokens": 5}, merges=False, starts_as_base=False, rate=0.1, falls_to=0.75),
    "prompt": Entry({"kind": "prompt", "tokens": 5}, merges=False, starts_as_base=False, rate=0.1, falls_to=0.93),
}
MODELS: dict[str, Table] = {
    "llama": {},
    "gpt2": {"family": "gpt2", "kv_heads": 4, "norm": "layer", "positions": "learned", "mlp": "gelu_tanh",
             "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "nanochat": {"family": "nanochat", "mlp": "relu2", "qk_norm": "after_rope", "norm_weight": "none",
                 "embedding_norm": True, "rope_sign": -1},
}  # fmt: skip
CASES = [pytest.param(entry, changes, id=f"{name}-{arch}") for name, entry in ENTRIES.items()
         for arch, changes in MODELS.items()]  # fmt: skip
ADAPTERS = [case for case in CASES if case.values[0].adapter]  # type: ignore[union-attr]


def installed(entry: Entry, changes: Table, *, random: bool = False) -> tuple[Transformer, Method]:
    model, method = little.model(**changes).eval(), method_of(entry.table)
    method.install(model, seed=3)
    if random:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, method


def ids_of(method: Method | None = None) -> Tensor:
    ids_BT = torch.randint(0, little.VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    slots = torch.zeros(3, 0 if method is None else method.virtual_tokens, dtype=torch.long)
    return torch.cat([slots, ids_BT], dim=1)


def logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids_BT))


def values_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_method_is_in_the_matrix() -> None:
    assert {entry.table["kind"] for entry in ENTRIES.values()} == set(METHODS)


@pytest.mark.parametrize(("entry", "changes"), CASES)
def test_before_training_it_is_the_base(entry: Entry, changes: Table) -> None:
    model, method = installed(entry, changes)
    base, found = logits(little.model(**changes).eval(), ids_of()), logits(model, ids_of(method))
    if entry.starts_as_base:
        assert torch.equal(base, found)
    else:
        assert method.virtual_tokens and found.shape[1] == base.shape[1] + method.virtual_tokens
        assert found.isfinite().all()


@pytest.mark.parametrize(("entry", "changes"), CASES)
def test_only_what_is_declared_gets_a_gradient(entry: Entry, changes: Table) -> None:
    model, method = installed(entry, changes, random=True)
    declared = trained(model)
    assert method.count(little.model(**changes)) == method.count(model) > 0
    assert method.count(model) == sum(parameter.numel() for parameter in declared.values())
    model.train()
    (model.logits(model(ids_of(method))) ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in declared), name
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize(("entry", "changes"), CASES)
def test_a_head_is_always_trained(entry: Entry, changes: Table) -> None:
    model, method = little.model(**changes), method_of(entry.table)
    add_head(model, HeadConfig(kind="token", labels=("a", "b")), seed=1)  # type: ignore[call-arg]
    method.install(model, seed=1)
    head = sum(parameter.numel() for name, parameter in trained(model).items() if name.startswith("task_head."))
    assert head == little.config().width * 2 + 2
    assert method.count(model) + head == sum(parameter.numel() for parameter in trained(model).values())


@pytest.mark.parametrize(("entry", "changes"), ADAPTERS)
def test_merged_is_unmerged(entry: Entry, changes: Table) -> None:
    model, method = installed(entry, changes, random=True)
    if not entry.merges:
        with pytest.raises(ConfigError, match=f"{method.kind} cannot be merged: its parts"):
            method.merge(model)
        return
    base, apart = values_of(little.model(**changes)), logits(model, ids_of())
    with pytest.raises(ConfigError, match="folded nothing"):
        method.unmerge(model)
    method.merge(model)
    assert values_of(model).keys() == base.keys(), "the parts are taken out"
    assert float((logits(model, ids_of()) - apart).abs().max()) < 1e-5 * float(apart.abs().max())
    assert not torch.allclose(apart, logits(little.model(**changes).eval(), ids_of()), atol=0.05)
    method.unmerge(model)
    assert torch.equal(logits(model, ids_of()), apart)
    method.remove(model)
    assert little.same(values_of(model), base)


@pytest.mark.parametrize(("entry", "changes"), ADAPTERS)
def test_merging_that_would_lose_bits_is_refused(entry: Entry, changes: Table) -> None:
    if not entry.merges:
        pytest.skip("it merges nowhere")
    model, method = installed(entry, changes, random=True)
    model.bfloat16()
    before = values_of(model)
    with pytest.raises(ConfigError, match=r"into bfloat16 weights would lose \d+\.\d% of the change"):
        method.merge(model)
    assert little.same(before, values_of(model)), "nothing is changed before it is refused"
    method.merge(model, allow_loss=True)
    assert all(value.dtype == torch.bfloat16 for value in values_of(model).values())
    method.unmerge(model)
    assert little.same(before, values_of(model))


@pytest.mark.parametrize(("entry", "changes"), ADAPTERS)
def test_saved_is_loaded(entry: Entry, changes: Table, tmp_path: Path) -> None:
    model, method = installed(entry, changes, random=True)
    save_adapter(model, method, tmp_path / "adapter")
    again = little.model(**changes).eval()
    other = load_adapter(again, tmp_path / "adapter", talk=lambda sentence: pytest.fail(sentence))
    assert type(other) is type(method) and other.virtual_tokens == method.virtual_tokens
    assert torch.equal(logits(model, ids_of(method)), logits(again, ids_of(other)))
    one, two = method.peft_weights(model), other.peft_weights(again)
    assert little.same(one, two)


@pytest.mark.parametrize(("entry", "changes"), ADAPTERS)
def test_taken_out_the_base_is_whole(entry: Entry, changes: Table) -> None:
    base = little.model(**changes).eval()
    before, modules = logits(base, ids_of()), {name: type(module) for name, module in base.named_modules()}
    model, method = installed(entry, changes, random=True)
    method.remove(model)
    assert little.same(values_of(model), values_of(base))
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert torch.equal(logits(model, ids_of()), before)


class TenRows:
    """The same ten rows at each step, of sixteen tokens that follow no rule, behind a method's slots."""

    def __init__(self, virtual_tokens: int) -> None:
        ids = stream(1, "ten").integers(1, little.VOCAB, (10, little.TOKENS + 1))
        slots = np.zeros((10, virtual_tokens), dtype=ids.dtype)
        read, targets = np.concatenate([slots, ids[:, :-1]], 1), np.concatenate([slots, ids[:, 1:]], 1)
        weight = np.ones(read.shape, dtype=np.float32)
        weight[:, :virtual_tokens] = 0
        place = np.broadcast_to(np.arange(read.shape[1]), read.shape)
        self.one = Batch(
            ids_BT=read,
            targets_BT=targets,
            weight_BT=weight,
            document_BT=np.zeros(read.shape, dtype=np.int32),
            position_BT=place.astype(np.int64),
            rows=tuple(f"ten:{row}" for row in range(10)),
        )

    def batch(self, step: int) -> Batch:
        return self.one

    def state(self) -> Table:
        return {}


def fit(entry: Entry, method: Method, changes: Table, **settings: Any) -> tuple[Transformer, list[float]]:
    """A model trained on ten rows with the one loop, and the losses of its steps."""
    model, records = little.model(**changes), []
    method.install(model, seed=1)
    table = {"steps": 100, "rows": 10, "learning_rate": entry.rate, "weight_decay": 0.0, "warmup_steps": 0,
             "context_tokens": little.TOKENS + method.virtual_tokens, **settings}  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = TenRows(method.virtual_tokens)
        train(model, rows, little.settings(**table), hooks=Hooks(log=records.append), method=method)
    finally:
        torch.set_num_threads(threads)
    return model, [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize(("entry", "changes"), CASES)
def test_ten_rows_overfit(entry: Entry, changes: Table) -> None:
    method = method_of(entry.table)
    before = values_of(little.model(**changes))
    model, found = fit(entry, method, changes)
    assert found[-1] < entry.falls_to * found[0], (found[0], found[-1])
    if entry.adapter:
        after = {name.replace(".base.", "."): value for name, value in values_of(model).items()}
        assert all(torch.equal(before[name], after[name]) for name in before), "the base did not move"


@pytest.mark.parametrize("name", ENTRIES)
def test_bfloat16_fits_too(name: str) -> None:
    """Work weights of bfloat16 with float32 masters, the base's among them."""
    entry = ENTRIES[name]
    _, found = fit(entry, method_of(entry.table), {}, precision="bf16")
    assert found[-1] < entry.falls_to * found[0], (found[0], found[-1])


@pytest.mark.parametrize("name", ENTRIES)
def test_every_hook_is_called(name: str) -> None:
    entry = ENTRIES[name]
    calls: list[tuple[str, int | None]] = []

    class Spy(METHODS[entry.table["kind"]]):  # type: ignore[misc]
        def loss_term(self, model: Transformer) -> Tensor | None:
            calls.append(("loss_term", None))
            return super().loss_term(model)

        def on_gradient(self, model: Transformer, moment: Moment) -> None:
            calls.append(("on_gradient", moment.step))
            assert moment.gradients.keys() == moment.values.keys() == trained(model).keys()
            assert any(bool(value.any()) for value in moment.gradients.values())
            super().on_gradient(model, moment)

        def on_step(self, model: Transformer, moment: Moment) -> None:
            calls.append(("on_step", moment.step))
            super().on_step(model, moment)

    fit(entry, Spy(method_of(entry.table).settings), {}, steps=3)
    assert calls == [
        call for step in range(3) for call in (("loss_term", None), ("on_gradient", step), ("on_step", step))
    ]
