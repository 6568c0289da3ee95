"""Noise on the embeddings: NEFTune's bound and scale, FGM against its definition by hand, the same noise after all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import little
from ratoon.data.examples import ExampleLoader
from ratoon.data.pack import pack_whole, whole_rows
from ratoon.model.transformer import Transformer
from ratoon.store.runs import Run
from ratoon.train.loss import Inputs, next_token
from ratoon.train.noise import adversarial, neftune, with_noise
from ratoon.train.objectives import Objective, objective_of
from ratoon.train.settings import NoiseSettings
from test_train_objectives import HEADS, build, examples

ROW, CPU = 32, torch.device("cpu")
NEFTUNE, FGM = NoiseSettings(neftune_alpha=5.0), NoiseSettings(adversarial_epsilon=0.7)
BOTH = NoiseSettings(neftune_alpha=5.0, adversarial_epsilon=0.7)


def packed(name: str = "text_label", count: int = 7) -> Inputs:
    some = examples(name, count)
    return Inputs.of(whole_rows(some, pack_whole(some, ROW), ROW), CPU)


def embeddings_seen(noisy: Any, model: Transformer, inputs: Inputs) -> list[Tensor]:
    """What an objective is given in place of the embeddings, each time it is asked."""
    seen: list[Tensor] = []

    def objective(_: Transformer, given: Inputs) -> tuple[Tensor, Tensor]:
        assert given.trunk_BTD is not None and given.trunk_layers == 0
        seen.append(given.trunk_BTD)
        return given.trunk_BTD.square().sum(), given.weight_BT.sum()

    noisy(objective)(model, inputs)
    return seen


def test_nothing_asked_is_the_objective_itself() -> None:
    assert with_noise(next_token, NoiseSettings(), 1) is next_token
    assert with_noise(next_token, NoiseSettings(perturbed_copies=2), 1) is next_token


@pytest.mark.parametrize("settings", [NEFTUNE, FGM, BOTH])
def test_measuring_knows_no_noise(settings: NoiseSettings) -> None:
    model, inputs = build("text_label").eval(), packed()
    plain, noisy = objective_of("text_label"), with_noise(objective_of("text_label"), settings, 1)
    assert torch.equal(plain(model, inputs)[0], noisy(model, inputs)[0])
    model.train()
    assert not torch.equal(plain(model, inputs)[0], noisy(model, inputs)[0])
    assert torch.equal(plain(model, inputs)[1], noisy(model, inputs)[1])


def test_neftune_is_uniform_up_to_alpha_over_root_of_length_and_width() -> None:
    model, inputs, alpha = build("text_label"), packed(count=30), 5.0
    model.train()
    (seen_BTD,) = embeddings_seen(lambda plain: with_noise(plain, NEFTUNE, 1), model, inputs)
    noise_BTD = (seen_BTD - model.embedded(inputs.ids_BT, inputs.position_BT)).detach()
    assert inputs.document_BT is not None
    D, units = noise_BTD.shape[-1], []
    for row, document_T in enumerate(inputs.document_BT.tolist()):
        for document in set(document_T) - {-1}:
            own = torch.tensor([place for place, one in enumerate(document_T) if one == document])
            bound = alpha / math.sqrt(len(own) * D)
            unit_ND = noise_BTD[row, own] / bound
            assert float(unit_ND.abs().max()) <= 1 + 1e-4
            units.append(unit_ND.flatten())
    everything = torch.cat(units)
    count = len(everything)
    # Uniform on (-1, 1): mean 0, variance 1/3, fourth moment 1/5; five standard errors.
    assert abs(float(everything.mean())) < 5 * math.sqrt(1 / 3 / count)
    assert abs(float(everything.square().mean()) - 1 / 3) < 5 * math.sqrt((1 / 5 - 1 / 9) / count)
    assert float(everything.max()) > 0.99 and float(everything.min()) < -0.99


def test_a_row_without_documents_is_one_document() -> None:
    x_BTD = torch.zeros(2, 16, 4)
    streams = [torch.Generator().manual_seed(number) for number in (1, 2)]
    noise_BTD = neftune(x_BTD, None, 8.0, streams)
    assert float(noise_BTD.abs().max()) <= 8.0 / math.sqrt(16 * 4) and float(noise_BTD.abs().max()) > 0.9
    assert not torch.equal(noise_BTD[0], noise_BTD[1])


def test_the_noise_of_a_row_is_its_own_in_every_step_and_in_any_company() -> None:
    model, inputs = build("text_label").train(), packed(count=30)
    numbers = torch.arange(len(inputs.ids_BT)).numpy()

    def seen(step: int, rows: slice, seed: int = 1) -> Tensor:
        assert inputs.document_BT is not None and inputs.position_BT is not None
        part = replace(
            inputs,
            ids_BT=inputs.ids_BT[rows],
            weight_BT=inputs.weight_BT[rows],
            document_BT=inputs.document_BT[rows],
            position_BT=inputs.position_BT[rows],
            extra={"number_B": numbers[rows]},
            step=step,
        )
        (found,) = embeddings_seen(lambda plain: with_noise(plain, NEFTUNE, seed), model, part)
        return found.detach()

    together = seen(3, slice(None))
    assert torch.equal(together, torch.cat([seen(3, slice(0, 2)), seen(3, slice(2, None))]))
    assert torch.equal(together[1:2], seen(3, slice(1, 2)))
    for other in (seen(4, slice(None)), seen(3, slice(None), seed=2)):
        assert not torch.equal(together, other)


@pytest.mark.parametrize("epsilon", [0.1, 2.0])
def test_fgm_is_its_definition_by_hand(epsilon: float) -> None:
    """½ L(x) + ½ L(x + ε g / |g|), g of each text alone; the moved embeddings are constants of the second loss."""
    model, some = build("text_label").train(), examples("text_label")
    inputs = Inputs.of(whole_rows(some, pack_whole(some, ROW), ROW), CPU)
    objective = objective_of("text_label")
    noisy = with_noise(objective, NoiseSettings(adversarial_epsilon=epsilon), 1)
    loss, weight = noisy(model, inputs)
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    packed_grad = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    total, weights = torch.zeros(()), 0.0
    for example in some:
        one = Inputs.of(whole_rows([example], [[0]], len(example.ids)), CPU)
        x_BTD = model.embed(one.ids_BT)
        plain, w = objective(model, replace(one, trunk_BTD=x_BTD, trunk_layers=0))
        (g_BTD,) = torch.autograd.grad(plain, x_BTD, retain_graph=True)
        r_BTD = epsilon * g_BTD / torch.linalg.vector_norm(g_BTD)
        harder, _ = objective(model, replace(one, trunk_BTD=x_BTD + r_BTD, trunk_layers=0))
        assert harder.item() > plain.item(), "moved against the text, the loss is larger"
        total, weights = total + 0.5 * (plain + harder), weights + w.item()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5) and weight.item() == weights
    model.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert float((p.grad - packed_grad[name]).abs().max()) < 1e-4 * max(1.0, float(p.grad.abs().max())), name


def test_a_text_without_a_gradient_is_not_moved() -> None:
    slope_BTD = torch.zeros(1, 4, 2)
    slope_BTD[0, :2] = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    document_BT = torch.tensor([[0, 0, 1, 1]])
    found = adversarial(slope_BTD, document_BT, 10.0)
    assert torch.allclose(found[0, :2], torch.tensor([[6.0, 0.0], [0.0, 8.0]]))
    assert torch.equal(found[0, 2:], torch.zeros(2, 2))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("settings", [FGM, BOTH], ids=["fgm", "both"])
@pytest.mark.parametrize("name", ["next_token", *HEADS])
def test_the_whole_gradient_is_half_of_each(name: str, settings: NoiseSettings, precision: str) -> None:
    """Both passes reach the weights: what is thrown away while the first gradient is taken would show here."""
    made = (little.model() if name == "next_token" else build(name)).train()
    if precision == "bf16":
        made = made.to(torch.bfloat16)
    inputs, objective = packed("text_label" if name == "next_token" else name), objective_of(name)
    given: list[Tensor] = []

    def spying(model: Transformer, one: Inputs) -> tuple[Tensor, Tensor]:
        assert one.trunk_BTD is not None
        given.append(one.trunk_BTD.detach())
        return objective(model, one)

    loss, _ = with_noise(spying, settings, 1)(made, inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    # Of what lies above the embeddings alone: that below sees the sum of both.
    found = {n: p.grad.float() for n, p in made.named_parameters() if p.grad is not None and n != "embed.weight"}
    made.zero_grad(set_to_none=True)
    for x_BTD in given:
        one, _ = objective(made, replace(inputs, trunk_BTD=x_BTD, trunk_layers=0))
        (0.5 * one).backward()
    assert len(given) == 2 and found
    tolerance = 1e-5 if precision == "float32" else 2e-2
    for n, p in made.named_parameters():
        if n in found:
            assert p.grad is not None
            scale = max(0.1, float(p.grad.float().abs().max()))
            assert float((p.grad.float() - found[n]).abs().max()) <= tolerance * scale, n


class Killed(Exception):
    """Stands for a process that dies without another word."""


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen-embedding"])
def test_resumed_and_micro_batched_runs_have_the_same_noise(tmp_path: Path, frozen: bool) -> None:
    objective: Objective = with_noise(objective_of("text_label"), BOTH, 1)

    def go(run: Run | None, **more: Any) -> little.Outcome:
        made = build("text_label")
        made.embed.weight.requires_grad_(not frozen)
        loader = ExampleLoader(examples("text_label", 40), rows=4, context_tokens=ROW, seed=1)
        return little.go(
            made, loader, run, objective=objective, steps=6, rows=4, context_tokens=ROW, checkpoint_every_steps=2,
            **more,
        )  # fmt: skip

    def die(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 3:
            raise Killed

    whole = go(little.new_run(tmp_path / "whole"))
    with pytest.raises(Killed):
        go(little.new_run(tmp_path / "cut"), log=die)
    resumed = go(Run(tmp_path / "cut"), resume=True)
    assert resumed.told("going on from step 2") and little.same(whole.weights, resumed.weights)
    apart = go(None, micro_batch_rows=1)
    assert little.largest_difference(whole.weights, apart.weights) < 1e-4
    assert apart.losses() == pytest.approx(whole.losses(), rel=1e-5)
