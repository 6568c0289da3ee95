"""LoRA, DoRA, AdaLoRA and IA3 against their papers' equations written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import little
from ratoon.adapt.adalora import AdaLora, AdaLoraLinear, AdaLoraSettings
from ratoon.adapt.contract import Method, Moment, trained
from ratoon.adapt.ia3 import IA3Linear
from ratoon.adapt.inject import adapted, units
from ratoon.adapt.lora import DoraLinear, Lora, LoraLinear
from ratoon.adapt.methods import METHODS, method_of, settings_of
from ratoon.base.errors import ConfigError
from ratoon.model import fused
from ratoon.model.encoder_decoder import EncoderDecoder
from ratoon.model.transformer import Transformer
from ratoon.train.loop import Hooks, train

Table = dict[str, Any]
GPT2: Table = {"family": "gpt2", "kv_heads": 4, "norm": "layer", "positions": "learned", "mlp": "gelu_tanh",
               "qkv_bias": True, "out_bias": True, "mlp_bias": True}  # fmt: skip
BIASES: Table = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
TABLES: dict[str, Table] = {
    "lora": {"kind": "lora", "rank": 3},
    "dora": {"kind": "lora", "rank": 3, "decomposed": True},
    "adalora": {"kind": "adalora", "initial_rank": 4, "rank": 2},
    "ia3": {"kind": "ia3"},
}


def installed(table: Table, *, seed: int = 1, random: bool = True, **changes: Any) -> tuple[Transformer, Method]:
    model, method = little.model(**changes).eval(), method_of(table)
    method.install(model, seed=seed)
    if random:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, method


def ids_of(rows: int = 2, tokens: int = 11) -> Tensor:
    return torch.randint(0, little.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(2))


def x_of(channels: int) -> Tensor:
    return torch.randn(2, 7, channels, generator=torch.Generator().manual_seed(6))


# -- LoRA and DoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 10 / 4), (True, 10 / math.sqrt(4))])
def test_lora_is_equation_3(stabilized: bool, scale: float) -> None:
    model, _ = installed({"kind": "lora", "rank": 4, "alpha": 10.0, "rank_stabilized": stabilized}, **BIASES)
    for name, part in adapted(model, LoraLinear).items():
        x = x_of(part.base.in_features)
        weight = part.base.weight + scale * part.B @ part.A
        torch.testing.assert_close(part(x), F.linear(x, weight, part.base.bias), atol=1e-5, rtol=1e-5, msg=name)


def test_dora_is_equation_5() -> None:
    """Output and gradients: the norm of the changed weight is a constant (section 4.3), the first length the base's."""
    fresh, _ = installed(TABLES["dora"], random=False, **BIASES)
    for part in adapted(fresh, DoraLinear).values():
        assert torch.equal(part.gain(), torch.ones(part.base.out_features))
    model, _ = installed(TABLES["dora"], **BIASES)
    assert len(adapted(model, DoraLinear)) == 14
    for part in adapted(model, DoraLinear).values():
        x = x_of(part.base.in_features)
        parts = (part.A, part.B, part.shift)
        out = part(x)
        found = torch.autograd.grad(out.square().sum(), parts)
        length = part.base.weight.norm(dim=1) + part.shift
        whole = part.base.weight + 16 / 3 * part.B @ part.A
        by_hand = F.linear(x, whole * (length / whole.norm(dim=1).detach())[:, None], part.base.bias)
        torch.testing.assert_close(out, by_hand, atol=1e-4, rtol=1e-4)
        for mine, wanted in zip(found, torch.autograd.grad(by_hand.square().sum(), parts), strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-3, rtol=1e-4)


def test_the_learned_length_is_exact_in_bfloat16() -> None:
    """A length near 6 with a change of 0.001 needs more than bfloat16's eight bits."""
    model, _ = installed(TABLES["dora"], random=False)
    part = next(iter(adapted(model, DoraLinear).values()))
    with torch.no_grad():
        part.base.weight.mul_(6 / part.base.weight.norm(dim=1, keepdim=True))
        part.square_O.fill_(36.0)
        part.shift.fill_(0.001)
    part.bfloat16()
    assert float((part.gain() - (1 + 0.001 / 6)).abs().max()) < 2e-6


@pytest.mark.parametrize("changes", [BIASES, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("q", "v"), ("k",), ("v", "down")])
@pytest.mark.parametrize("kind", TABLES)
def test_side_by_side_is_each_alone(kind: str, targets: tuple[str, ...], changes: Table) -> None:
    model, _ = installed({**TABLES[kind], "targets": targets}, **changes)
    attention = model.layers[1].attention
    layers = (attention.q, attention.k, attention.v)
    x = x_of(32)
    each = torch.cat([layer(x) for layer in layers], -1)
    parts = [parameter for parameter in attention.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(each.square().sum(), parts)
    joined = next(layer for layer in layers if hasattr(layer, "side_by_side")).side_by_side(layers, x)
    assert joined is not None
    torch.testing.assert_close(joined, each, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(joined.square().sum(), parts)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)
    assert torch.equal(attention._project(x), joined), "attention asks for it"
    attention.q.register_forward_hook(lambda module, given, out: out + 1)
    assert torch.equal(attention._project(x), torch.cat([layer(x) for layer in layers], -1)), (
        "a hook is not passed over"
    )


@pytest.mark.parametrize("kind", TABLES)
def test_the_c_code_and_torch_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = installed(TABLES[kind])
    with torch.no_grad():
        found = model(ids_of())
        monkeypatch.setattr(fused, "fits", lambda cfg, x: False)
        torch.testing.assert_close(found, model(ids_of()), atol=2e-5, rtol=1e-4)


def test_dropout_is_of_the_layers_input_and_of_training_alone() -> None:
    model, _ = installed({"kind": "lora", "rank": 3, "dropout": 0.5, "targets": ["down"]})
    part = next(iter(adapted(model, LoraLinear).values()))
    plain, _ = installed({"kind": "lora", "rank": 3, "targets": ["down"]})
    x = x_of(48)
    assert torch.equal(part(x), next(iter(adapted(plain, LoraLinear).values()))(x))
    model.train()
    torch.manual_seed(3)
    once = part(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    wanted = part.base(x) + 16 / 3 * (x * mask) @ part.A.T @ part.B.T
    torch.testing.assert_close(once, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(once, part(x))


def test_nothing_is_kept_for_frozen_weights() -> None:
    """The backward pass keeps a layer's input and its narrow products; neither its output nor a gradient of W."""
    model, _ = installed({"kind": "lora", "rank": 3})
    part = model.layers[0].mlp.up
    x = x_of(32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = part(x)
    own = {p.data_ptr() for p in part.parameters()}
    activations = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in own and t.numel() != part.B.numel()}
    assert sorted(activations.values()) == [2 * 7 * 3, x.numel()]
    out.sum().backward()
    assert part.base.weight.grad is None


def test_first_values_hang_on_the_seed_and_the_site_alone() -> None:
    model, _ = installed(TABLES["lora"], random=False)
    upper, _ = installed({**TABLES["lora"], "layers": [1], "targets": ["q", "up"]}, random=False)
    other, _ = installed(TABLES["lora"], seed=2, random=False)
    every = {name: part.A for name, part in adapted(model, LoraLinear).items()}
    for name, part in adapted(upper, LoraLinear).items():
        assert torch.equal(part.A, every[name])
        assert not torch.equal(part.A, adapted(other, LoraLinear)[name].A)
    assert not torch.equal(every["layers.0.attention.q"], every["layers.1.attention.q"])
    for name, A in every.items():
        bound = 1 / math.sqrt(A.shape[1])
        assert 0.8 * bound < float(A.abs().max()) <= bound, name


def test_fused_layers_share_what_they_read_with() -> None:
    """GPT-2 keeps q, k and v as one matrix, so that PEFT has one A for them."""
    model, method = installed(TABLES["lora"], **GPT2)
    attention = model.layers[0].attention
    assert attention.q.A is attention.k.A is attention.v.A and attention.q.B is not attention.k.B
    assert [len(unit.sites) for unit in units(model)[:3]] == [3, 1, 1]
    assert method.count(model) == 2 * 3 * ((32 + 96) + (32 + 32) + (32 + 48) + (48 + 32))
    llama, _ = installed(TABLES["lora"])
    assert llama.layers[0].attention.q.A is not llama.layers[0].attention.k.A


@pytest.mark.parametrize(
    ("table", "changes", "error"),
    [
        ({"targets": ["gate"]}, {"mlp": "relu2"}, "no linear layer of the kind gate"),
        ({"targets": []}, {}, "none named"),
        ({"layers": [0, 2]}, {}, "the blocks 2"),
        ({"layers": []}, {}, r"the blocks \(\)"),
        ({"targets": ["up"], "layers": [0]}, {"moe": little.EXPERTS, "moe_layers": (0,)}, "none of the chosen blocks"),
        ({"kind": "adalora", "initial_rank": 17}, {}, "17 triplets at layers.0.attention.k"),
    ],
)
def test_settings_that_fit_no_site_are_refused(table: Table, changes: Table, error: str) -> None:
    model = little.model(**changes)
    with pytest.raises(ConfigError, match=error):
        method_of({"kind": "lora", **table}).install(model, seed=1)
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing is frozen before it is refused"


def test_two_methods_do_not_stand_in_one_place() -> None:
    model, method = installed(TABLES["lora"])
    with pytest.raises(ConfigError, match="part of another method already"):
        method_of(TABLES["ia3"]).install(model, seed=1)
    method.remove(model)
    method_of(TABLES["ia3"]).install(model, seed=1)


def test_methods_by_name() -> None:
    assert isinstance(method_of({"kind": "lora", "rank": 2}), Lora) and METHODS["adalora"] is AdaLora
    assert method_of(AdaLoraSettings(rank=3)).settings.rank == 3  # type: ignore[attr-defined, call-arg]
    for kind in METHODS:
        assert METHODS[kind].kind == kind == settings_of(kind)(kind=kind).kind  # type: ignore[attr-defined, call-arg]
    with pytest.raises(ConfigError, match=r"did you mean 'lora'"):
        method_of({"kind": "loora"})
    with pytest.raises(ConfigError, match="rankk"):
        method_of({"kind": "lora", "rankk": 2})
    for wrong in ({"rank": 5, "initial_rank": 4}, {"warmup_fraction": 0.7, "final_fraction": 0.3}):
        with pytest.raises(ConfigError):
            method_of({"kind": "adalora", **wrong})


@pytest.mark.parametrize("kind", TABLES)
def test_a_reader_of_sources_has_methods_too(kind: str) -> None:
    """Encoder, decoder and the attention between them."""
    encoder = little.config(causal=False)
    model = EncoderDecoder(encoder, little.config(cross_attention=True))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        before = model(ids_of(), ids_of(2, 8))
        method = method_of({**TABLES[kind], "targets": ["cross_k", "cross_v", "up" if kind != "ia3" else "down"]})
        method.install(model, seed=1)  # type: ignore[arg-type]
        assert torch.equal(before, model(ids_of(), ids_of(2, 8)))
        assert method.count(model) == sum(p.numel() for p in trained(model).values())  # type: ignore[arg-type]
        for parameter in trained(model).values():
            parameter += 0.3
        assert not torch.allclose(before, model(ids_of(), ids_of(2, 8)), atol=0.01)
        method.remove(model)  # type: ignore[arg-type]
        assert torch.equal(before, model(ids_of(), ids_of(2, 8)))


@pytest.mark.parametrize("targets", ["all", ("q", "v")])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_blocks_are_compiled_once(kind: str, targets: Any) -> None:
    """One graph for the first block, whose input asks for no gradient, and one for all others, without a break: what
    the modules of one block are must not be compiled in."""
    torch._dynamo.reset()
    model, _ = installed({**TABLES[kind], "targets": targets}, layers=4)
    model.train()
    counter = CompileCounter()
    wanted = model(ids_of())
    for block in model.layers:
        block.compile(dynamic=False, fullgraph=True, backend=counter)
    torch.testing.assert_close(model(ids_of()), wanted)
    assert counter.frame_count == 2


# -- IA3 ---------------------------------------------------------------------------------------------------------------


def test_ia3_is_equation_1() -> None:
    """Keys and values behind their products, the MLP's inside in front of its last one."""
    model, method = installed(TABLES["ia3"], **BIASES)
    assert {name.rsplit(".", 1)[1] for name in adapted(model, IA3Linear)} == {"k", "v", "down"}
    assert method.count(model) == 2 * (2 * 16 + 48)
    for name, part in adapted(model, IA3Linear).items():
        x = x_of(part.base.in_features)
        inside = name.endswith("down")
        wanted = part.base(x * part.scale) if inside else part.base(x) * part.scale
        assert part.inner == inside and torch.equal(part(x), wanted)


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------


def fit(
    method: Method,
    model: Transformer | None = None,
    folder: Path | None = None,
    *,
    resume: bool = False,
    **changes: Any,
) -> Transformer:
    model = little.model() if model is None else model
    method.install(model, seed=1)
    run = None if folder is None else little.new_run(folder)
    settings = little.settings(**changes)
    train(model, little.Rows(), settings, run, hooks=Hooks(), method=method, resume=resume)
    return model


def test_adalora_is_equation_3_and_starts_orthogonal() -> None:
    fresh, method = installed(TABLES["adalora"], random=False)
    penalty = method.loss_term(fresh)
    assert penalty is not None and float(penalty) < 1e-8
    model, _ = installed(TABLES["adalora"], **BIASES)
    for part in adapted(model, AdaLoraLinear).values():
        x = x_of(part.base.in_features)
        weight = part.base.weight + 16 / 4 * part.P @ torch.diag(part.E[:, 0]) @ part.Q
        torch.testing.assert_close(part(x), F.linear(x, weight, part.base.bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, GPT2], ids=["llama", "gpt2"])
def test_the_penalty_is_equation_4(changes: Table) -> None:
    """With q, k and v as one matrix, P is that of the whole matrix."""
    model, method = installed({**TABLES["adalora"], "orthogonality": 0.3}, **changes)
    found = method.loss_term(model)
    parts = adapted(model, AdaLoraLinear)
    groups: dict[int, list[AdaLoraLinear]] = {}
    for part in parts.values():
        groups.setdefault(id(part.Q), []).append(part)
    assert len(groups) == (8 if changes else 14)
    total = torch.zeros(())
    for group in groups.values():
        P, Q, eye = torch.cat([part.P for part in group]), group[0].Q, torch.eye(4)
        total = total + (P.T @ P - eye).square().sum() + (Q @ Q.T - eye).square().sum()
    assert found is not None
    torch.testing.assert_close(found, 0.3 * total)
    assert method_of({**TABLES["adalora"], "orthogonality": 0.0}).loss_term(model) is None


def moment(model: Transformer, step: int, steps: int, seed: int) -> Moment:
    generator = torch.Generator().manual_seed(seed)
    values = {name: parameter.data for name, parameter in trained(model).items()}
    gradients = {name: torch.randn(value.shape, generator=generator) for name, value in values.items()}
    return Moment(step, step / steps, steps, values, gradients)


def test_importance_is_equations_7_to_11() -> None:
    model, method = installed({**TABLES["adalora"], "beta1": 0.7, "beta2": 0.6})
    assert isinstance(method, AdaLora)
    smooth: dict[str, Tensor] = {}
    stray: dict[str, Tensor] = {}
    for step in range(3):
        now = moment(model, step, 100, seed=step)
        method.on_gradient(model, now)
        for name, value in now.values.items():
            sensitivity = (value * now.gradients[name]).abs()
            smooth[name] = 0.7 * smooth.get(name, torch.zeros(())) + 0.3 * sensitivity
            stray[name] = 0.6 * stray.get(name, torch.zeros(())) + 0.4 * (sensitivity - smooth[name]).abs()
    found = method.importance(model)
    for number, name in enumerate(adapted(model, AdaLoraLinear)):
        s = {part: smooth[f"{name}.{part}"] * stray[f"{name}.{part}"] for part in "PEQ"}
        for triplet in range(4):
            wanted = s["E"][triplet, 0] + s["P"][:, triplet].mean() + s["Q"][triplet].mean()
            torch.testing.assert_close(found[number, triplet], wanted)


def test_the_budget_is_equation_12() -> None:
    method = method_of(
        {"kind": "adalora", "initial_rank": 12, "rank": 4, "warmup_fraction": 0.2, "final_fraction": 0.3}
    )
    assert isinstance(method, AdaLora)
    assert [method.budget(10, at) for at in (0.0, 0.1, 0.2)] == [120, 120, 120]
    assert [method.budget(10, at) for at in (0.7, 0.9, 1.0)] == [40, 40, 40]
    assert method.budget(10, 0.45) == round(40 + 80 * 0.5**3)
    steps = [method.budget(10, at / 100) for at in range(101)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("changes", [{}, GPT2], ids=["llama", "gpt2"])
def test_the_end_rank_is_the_target(changes: Table) -> None:
    """After a run: the rank of each change, of all together exactly the target, and what matters less is gone."""
    method = method_of({"kind": "adalora", "initial_rank": 5, "rank": 2, "every_steps": 3})
    model = fit(method, little.model(**changes), steps=30, learning_rate=0.02)
    facts = method.facts(model)
    parts, matrices = adapted(model, AdaLoraLinear), len(units(model))
    assert facts["budget_reached"] and facts["rank_in_all"] == facts["rank_asked_for"] == 2 * matrices
    ranks = {name: int(torch.linalg.matrix_rank(parts[name].change())) for name in facts["ranks"]}
    if not changes:
        assert ranks == facts["ranks"]
    assert sum(int((parts[name].E != 0).sum()) for name in ranks) == 2 * matrices
    assert len(set(facts["ranks"].values())) > 1, "a budget that is the same everywhere says nothing"


def test_the_ranks_of_a_run_are_on_record() -> None:
    """The budget of equation 12 in each training record; nobody is asked between two of them."""
    asked: list[int] = []

    class Watched(AdaLora):
        def figures(self) -> dict[str, float]:
            asked.append(1)
            return super().figures()

    settings = AdaLoraSettings(initial_rank=5, rank=2, every_steps=2)  # type: ignore[call-arg]
    method, model, records = Watched(settings), little.model(), list[Table]()
    method.install(model, seed=1)
    train(model, little.Rows(), little.settings(steps=30, log_every_steps=6), hooks=Hooks(log=records.append),
          method=method)  # fmt: skip
    found = {one["step"]: (one["mean_rank"], one["rank_in_all"]) for one in records if one["kind"] == "train"}
    matrices = len(units(model))
    wanted = {step: method.budget(matrices, step / 30) for step in (1, 6, 12, 18, 24, 30)}
    assert found == {step: (budget / matrices, budget) for step, budget in wanted.items()}
    assert wanted[1] == 5 * matrices > wanted[12] > wanted[30] == 2 * matrices
    assert len(asked) == len(found) and method_of(TABLES["lora"]).figures() == {}


def test_pruned_triplets_may_come_back_until_the_last_phase() -> None:
    model, method = installed({**TABLES["adalora"], "every_steps": 1, "warmup_fraction": 0.0, "final_fraction": 0.2})
    assert isinstance(method, AdaLora)
    chosen = []
    for step in range(10):
        method.on_gradient(model, moment(model, step, 10, seed=step))
        with torch.no_grad():
            for name, parameter in trained(model).items():
                if name.endswith(".E"):
                    parameter += 0.3
        method.on_step(model, moment(model, step, 10, seed=0))
        chosen.append(torch.stack([part.E[:, 0] != 0 for part in adapted(model, AdaLoraLinear).values()]))
        if step < 8:  # afterwards the choice is settled
            importance, kept = method.importance(model), chosen[-1]
            assert kept.all() or importance[kept].min() >= importance[~kept].max()
    counts = [int(one.sum()) for one in chosen]
    assert counts == [method.budget(14, (step + 1) / 10) for step in range(10)] and counts[-3:] == [28, 28, 28]
    assert any(bool((later & ~earlier).any()) for earlier, later in pairwise(chosen[:8]))
    assert torch.equal(chosen[-1], chosen[-2]) and torch.equal(chosen[-2], chosen[-3])


def test_adalora_goes_on_bit_for_bit(tmp_path: Path) -> None:
    table = {"kind": "adalora", "initial_rank": 4, "rank": 2, "every_steps": 2}
    changes = {"steps": 20, "checkpoint_every_steps": 5, "keep_checkpoints": 9}
    whole = fit(method_of(table), folder=tmp_path / "whole", **changes)
    folder = tmp_path / "half"

    class Stop(Exception):
        pass

    class Halting(AdaLora):
        def on_step(self, model: Transformer, moment: Moment) -> None:
            super().on_step(model, moment)
            if moment.step == 17:  # the last phase began with step 13; its choice is in the checkpoint of 15
                raise Stop

    settings = method_of(table).settings
    assert isinstance(settings, AdaLoraSettings)
    with pytest.raises(Stop):
        fit(Halting(settings), folder=folder, **changes)
    method = method_of(table)
    again = fit(method, folder=folder, resume=True, **changes)
    one, two = (dict(model.named_parameters()) for model in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert method.facts(again)["rank_in_all"] == 28
