"""Preference: packed is unpacked is the definition; the reference is asked once and kept; the loop with pairs.

That losses and gradients are TRL's is seen in test_train_preference_trl.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import little
from made_pairs import CPU, TOKENS, batches, pairs, reference_of, summed, swapped
from ratoon.adapt.methods import method_of
from ratoon.base.errors import ArtifactError, ConfigError, DataError, NumericError
from ratoon.data.examples import ExampleLoader, in_order
from ratoon.data.pack import Example
from ratoon.model.balance import balance_loss
from ratoon.model.transformer import Transformer
from ratoon.store.runs import Run
from ratoon.train import preference as preference_module
from ratoon.train.device import Place, find_place
from ratoon.train.loop import Hooks, train
from ratoon.train.loss import Inputs, next_token
from ratoon.train.noise import with_noise
from ratoon.train.objectives import objective_of
from ratoon.train.preference import (
    Margins,
    margins,
    preference,
    reference_arrays,
    with_arrays,
)
from ratoon.train.settings import NoiseSettings


def logged(model: Transformer, example: Example) -> Tensor:
    """The definition: Σ w log p of an example's tokens, one text at a time, from all logits in float64."""
    ids = torch.tensor([example.ids])
    log_TV = model.logits(model(ids[:, :-1])).double().log_softmax(-1)[0]
    found = log_TV.gather(1, ids[0, 1:, None])[:, 0]
    return (found * torch.tensor(example.weight[: len(found)], dtype=torch.float64)).sum()


def defined_with_gradients(
    model: Transformer, examples: Sequence[Example], loss: Callable[[Tensor], Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Σ `loss`(h) over pairs that have their reference, from the definition, and its gradient for each parameter."""
    total = torch.zeros((), dtype=torch.float64)
    for one in examples:
        assert one.beside is not None and one.vector is not None and one.beside.vector is not None
        chosen, rejected = logged(model, one) - one.vector[0], logged(model, one.beside) - one.beside.vector[0]
        total = total + loss(chosen - rejected)
    named = dict(model.named_parameters())
    return float(total), dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


# -- the definition ----------------------------------------------------------------------------------------------------


def logistic(beta: float, smoothing: float = 0.0) -> Callable[[Tensor], Tensor]:
    def loss(h: Tensor) -> Tensor:
        right = 1 / (1 + torch.exp(-beta * h))
        return -(1 - smoothing) * right.log() - smoothing * (1 - right).log()

    return loss


MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "own head": {"tied_embeddings": False, "head_bias": True},
    "softcap": {"logit_softcap": 1.5},
}


@pytest.mark.parametrize("chunk", [1 << 24, 5 * little.VOCAB], ids=["one chunk", "chunks of 5"])
@pytest.mark.parametrize("case", MODELS)
def test_packed_is_unpacked_is_the_definition(case: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratoon.model.likelihood.CHUNK_NUMBERS", chunk)
    monkeypatch.setattr("ratoon.train.loss.CHUNK_NUMBERS", chunk)
    model, before = little.model(1, **MODELS[case]), little.model(2, **MODELS[case])
    examples = reference_of(before, pairs())
    for one in examples:
        assert one.beside is not None and one.vector is not None and one.beside.vector is not None
        assert one.vector[0] == pytest.approx(float(logged(before, one)), rel=1e-6)
        assert one.beside.vector[0] == pytest.approx(float(logged(before, one.beside)), rel=1e-6)
    expected, wanted = defined_with_gradients(model, examples, logistic(0.4, 0.1))
    objective = preference(beta=0.4, label_smoothing=0.1)
    alone = [one for example in examples for one in batches([example])]
    packed = batches(examples, context_tokens=60)
    assert len(packed[0].ids_BT) < len(alone) and int(packed[0].document_BT.max()) > 3  # type: ignore[union-attr]
    for inputs in (alone, packed):
        found, weight, gradients = summed(model, inputs, objective)
        assert weight == len(examples)
        assert found == pytest.approx(expected, rel=1e-6)
        for name, value in wanted.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-5)


def test_each_pair_counts_once_whatever_shares_its_row() -> None:
    """Unequal rows: the last ones hold fewer pairs, and micro-batches fewer documents than the batch."""
    model, examples = little.model(1), reference_of(little.model(2), pairs(9))
    batch = next(in_order(examples, context_tokens=60, rows=100))[0]
    assert len({int(row.max()) for row in batch.document_BT}) > 1
    objective = preference()
    whole = summed(model, [Inputs.of(batch, CPU)], objective)
    for parts in (2, len(batch.ids_BT)):
        found = summed(model, [Inputs.of(one, CPU) for one in batch.split(parts)], objective)
        assert found[:2] == pytest.approx(whole[:2], rel=1e-6)
        assert little.largest_difference(found[2], whole[2]) < 1e-5


def test_a_reference_of_its_own_gives_margins_of_nothing() -> None:
    model = little.model()
    found = batches(reference_of(model, pairs()))
    loss, weight, gradients = summed(model, found, preference(beta=0.5))
    assert loss / weight == pytest.approx(math.log(2), abs=1e-5)
    assert any(value.abs().max() > 1e-3 for value in gradients.values())
    one = margins(model, found[0])
    assert one.margin_P.abs().max() < 1e-5
    assert summed(model, found, preference(beta=0.5, kind="ipo"))[0] / weight == pytest.approx(1.0, abs=1e-4)


def test_an_answer_is_right_where_it_is_rewarded_more() -> None:
    """Whatever the sign of both; a draw is not right."""
    found = Margins(torch.tensor([-1.0, 1.0, 0.5]), torch.tensor([-2.0, 2.0, 0.5]))
    assert found.right_P.tolist() == [True, False, False]
    assert found.margin_P.tolist() == [1.0, -1.0, 0.0]


def test_weights_of_tokens_scale_their_share() -> None:
    examples = [replace(one, weight=[0.5 * w for w in one.weight]) for one in pairs(3)]
    model, before = little.model(1), little.model(2)
    found = reference_of(before, examples)
    loss, wanted = defined_with_gradients(model, found, logistic(0.4))
    mine, _, gradients = summed(model, batches(found), preference(beta=0.4))
    assert mine == pytest.approx(loss, rel=1e-6)
    assert little.largest_difference(gradients, wanted) < 2e-5
    assert found[0].vector is not None
    assert found[0].vector[0] == pytest.approx(float(logged(before, examples[0])), rel=1e-6)


def test_experts_are_balanced_as_often_as_a_row_has_pairs() -> None:
    model = little.model(1, moe=little.EXPERTS)
    found = batches(reference_of(little.model(2, moe=little.EXPERTS), pairs()))[0]
    bare = little.model(1, moe=little.EXPERTS.model_copy(update={"balance_weight": 0.0}))
    added = float(preference()(model, found)[0] - preference()(bare, found)[0])
    routers: list[Tensor] = []
    model(found.ids_BT, found.position_BT, found.document_BT, routers=routers)
    assert found.document_BT is not None
    count_B = (found.document_BT.max(1).values + 1) // 2
    assert count_B.max() > 1
    each = [(balance_loss(one, 2, found.document_BT >= 0) * count_B).sum() for one in routers]
    assert added == pytest.approx(0.5 * float(sum(each)) / len(each), rel=1e-4)


def test_nothing_wide_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that the graph keeps has a score for each token."""
    monkeypatch.setattr("ratoon.model.likelihood.CHUNK_NUMBERS", 4 * little.VOCAB)
    monkeypatch.setattr("ratoon.train.loss.CHUNK_NUMBERS", 4 * little.VOCAB)
    model, examples = little.model(1), reference_of(little.model(2), pairs())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        preference()(model, batches(examples)[0])
    wide = [one for one in kept if little.VOCAB in one.shape]
    assert kept and {tuple(one.shape) for one in wide} <= {(little.VOCAB, model.cfg.width)}


def test_without_gradients_the_value_is_the_same_and_costs_no_backward() -> None:
    model, examples = little.model(1), reference_of(little.model(2), pairs())
    with torch.no_grad():
        loss, weight = preference()(model, batches(examples)[0])
    assert not loss.requires_grad
    assert (float(loss), float(weight)) == summed(model, batches(examples), preference())[:2]


def test_noise_on_embeddings_goes_with_it() -> None:
    model, examples = little.model(1).train(), reference_of(little.model(2), pairs())
    plain = summed(model, batches(examples), preference())
    found = summed(model, batches(examples), with_noise(preference(), NoiseSettings(adversarial_epsilon=0.5), 1))
    assert found[1] == plain[1]
    assert found[0] > plain[0] + 1e-3


@pytest.mark.parametrize("objective", [preference(), next_token], ids=["preference", "next token"])
def test_one_graph_can_be_gone_through_twice(objective: Any) -> None:
    """As adversarial noise does."""
    model = little.model(1)
    loss, _ = objective(model, batches(reference_of(little.model(2), pairs()))[0])
    parameters = list(model.parameters())
    first = torch.autograd.grad(3.0 * loss, parameters, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(one, 3.0 * other, rtol=1e-4, atol=1e-4)


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_reference_comes_back_from_arrays(tmp_path: Path) -> None:
    examples = pairs()
    found = reference_of(little.model(), examples)
    np.savez(tmp_path / "reference.npz", **reference_arrays(found))
    with np.load(tmp_path / "reference.npz") as arrays:
        assert with_arrays(examples, arrays) == found
        assert with_arrays(found, arrays) == found
        for others in (examples[:-1], examples[::-1], [swapped(examples[0]), *examples[1:]], pairs(seed=1)):
            with pytest.raises(ArtifactError, match="of other pairs"):
                with_arrays(others, arrays)
    with pytest.raises(ArtifactError, match="of other pairs"):
        with_arrays(examples, {})


def test_the_reference_is_the_same_however_it_is_packed() -> None:
    model = little.model()
    one = reference_arrays(reference_of(model, pairs(), context_tokens=60, rows=1))
    other = reference_arrays(reference_of(model, pairs(), context_tokens=32, rows=4))
    np.testing.assert_allclose(one["log_probability_P2"], other["log_probability_P2"], rtol=1e-6)
    assert np.unique(one["log_probability_P2"]).size == one["log_probability_P2"].size


def test_asking_leaves_the_model_as_it_was() -> None:
    """Also where training computes in another precision."""
    model = little.model().train()
    model.layers[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    where = [parameter.data_ptr() for parameter in model.parameters()]
    low = Place(CPU, "bf16", torch.bfloat16, None)
    told: list[tuple[int, int]] = []
    rough = reference_of(model, pairs(), place=low, progress=lambda done, all_: told.append((done, all_)))
    exact = reference_of(model, pairs(), place=find_place(little.settings()))
    assert exact == reference_of(model, pairs()) != rough
    wanted = reference_of(little.model().to(torch.bfloat16), pairs())
    assert rough == wanted
    assert little.same(before, model.state_dict())
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    assert model.training and not any(p.requires_grad for p in model.layers[0].parameters())
    assert told[-1] == (7, 7) and [done for done, _ in told] == sorted(done for done, _ in told) and len(told) > 1


def test_dropout_is_off_while_the_reference_is_asked() -> None:
    model = little.model()
    method_of({"kind": "lora", "rank": 4, "dropout": 0.5}).install(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.ones_like(parameter))
    inputs = batches(pairs())[0]
    assert not torch.equal(model.train()(inputs.ids_BT), model(inputs.ids_BT))
    assert reference_of(model.train(), pairs()) == reference_of(model.eval(), pairs())


def test_a_training_in_low_precision_begins_at_no_margin() -> None:
    """The reference is asked as precisely as training computes: else the difference would look like a preference."""
    model = little.model()
    place = find_place(little.settings(precision="bf16"))
    found = reference_of(model, pairs(), place=place)
    model.to(torch.bfloat16)
    assert margins(model, batches(found)[0]).margin_P.abs().max() < 0.01
    rough = reference_of(little.model(), pairs())
    assert margins(model, batches(rough)[0]).margin_P.abs().max() > 0.001


def test_slots_of_a_method_come_before_each_answer() -> None:
    model = little.model()
    method = method_of({"kind": "prefix", "tokens": 3})
    method.install(model, seed=1)
    found = reference_of(model, pairs(), leading=3)
    assert found != reference_of(little.model(), pairs())
    batch = next(in_order(found, context_tokens=40, rows=100, leading=3))[0]
    inputs = Inputs.of(batch, CPU, virtual_tokens=3)
    assert margins(model, inputs).margin_P.abs().max() < 1e-5
    loss, weight = preference()(model, inputs)
    assert float(loss / weight) == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(one is not None and one.abs().max() > 0 for one in gradients)


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass
class Tuned:
    """A model tuned on pairs with LoRA: its weights before and after, its pairs, its records."""

    model: Transformer
    base: dict[str, Tensor]
    examples: list[Example]
    records: list[dict[str, Any]]
    weights: dict[str, Tensor]

    def margins(self) -> Margins:
        found = [margins(self.model, one) for one in batches(self.examples)]
        return Margins(torch.cat([one.chosen_P for one in found]), torch.cat([one.rejected_P for one in found]))


STEPS = 12


def tune(
    run: Run | None = None,
    *,
    resume: bool = False,
    kept: dict[str, Any] | None = None,
    log: Any = None,
    objective: Any = None,
    **changes: Any,
) -> Tuned:
    model = little.model()
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    method = method_of({"kind": "lora", "rank": 4})
    method.install(model, seed=1)
    told = {"steps": STEPS, "rows": 4, "context_tokens": TOKENS, "learning_rate": 0.02} | changes
    settings = little.settings(**told)
    examples = (
        with_arrays(pairs(12), kept) if kept is not None else reference_of(model, pairs(12), place=find_place(settings))
    )
    loader = ExampleLoader(examples, rows=4, context_tokens=TOKENS, seed=1)
    records: list[dict[str, Any]] = []

    def record(one: dict[str, Any]) -> None:
        records.append(one)
        if log is not None:
            log(one)

    def evaluate(step: int, found: Any) -> dict[str, Any]:
        loss = weight = 0.0
        for one in batches(examples):
            more = (objective or preference())(found, one)
            loss, weight = loss + float(more[0]), weight + float(more[1])
        return {"loss": loss / weight, "n_tokens": int(weight)}

    train(
        model, loader, settings, run, objective=objective or preference(), resume=resume, method=method,
        hooks=Hooks(evaluate=evaluate, log=record),
    )  # fmt: skip
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Tuned(model, base, examples, records, weights)


def test_the_chosen_answers_win_and_the_base_stays() -> None:
    found = tune(steps=25)
    after = found.margins()
    assert bool(after.right_P.all()) and float(after.margin_P.min()) > 0.1
    losses = [one["loss"] for one in found.records if one["kind"] == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.5
    measured = [one for one in found.records if one["kind"] == "eval"]
    assert measured[-1]["n_tokens"] == 12 and measured[-1]["loss"] < measured[0]["loss"]
    assert found.records[-1]["tokens"] > 0
    own = {name for name in found.weights if name.endswith((".A", ".B"))}
    frozen = {name.replace(".base.", "."): value for name, value in found.weights.items() if name not in own}
    assert own and little.same(frozen, found.base)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resumed_is_uninterrupted(tmp_path: Path, precision: str) -> None:
    """With the reference that was kept: the model of a resumed run was trained already."""
    whole = tune(precision=precision)
    run = little.new_run(tmp_path / "a")
    place = find_place(little.settings(precision=precision))
    kept = reference_arrays(reference_of(little.model(), pairs(12), place=place))

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(run, log=stop, checkpoint_every_steps=3, precision=precision)
    rest = tune(run, resume=True, kept=kept, checkpoint_every_steps=3, precision=precision)
    assert little.same(whole.weights, rest.weights)


def test_micro_batches_are_one_batch() -> None:
    whole, parts = tune(), tune(micro_batch_rows=1)
    assert little.largest_difference(whole.weights, parts.weights) < 1e-3


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"beta": 0.0}, "beta is 0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"beta": math.nan}, "beta is nan"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"kind": "hinge"}, "no loss of pairs 'hinge'"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "no effect with kind: ipo"),
    ],
)
def test_settings_that_mean_nothing_are_refused(told: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preference(**told)


def test_examples_that_are_no_pairs_are_refused() -> None:
    good = pairs(2)
    alone = replace(good[1], beside=None)
    three = replace(good[1], beside=good[0])
    empty = replace(good[1], beside=replace(alone, weight=[0.0] * len(alone.weight)))
    last = replace(good[1], beside=replace(alone, weight=[0.0] * (len(alone.ids) - 1) + [1.0]))
    labelled = replace(good[1], beside=Example([4, 5], [1.0, 1.0], targets=[1, 1]))
    for wrong, words in (
        (alone, "no pair"), (three, "no pair"), (empty, "nothing is learned"), (last, "nothing is learned"),
        (labelled, "labels"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            reference_of(little.model(), [good[0], wrong])
        assert "pair 1" in str(caught.value)


def test_rows_that_are_no_pairs_are_refused() -> None:
    model, examples = little.model(), reference_of(little.model(), pairs(4))
    three = [*examples[:2], replace(examples[2], beside=None)]
    for wrong, words in (
        (batches(three, context_tokens=60)[0], "5 documents"),
        (batches([replace(pairs(1)[0], beside=None)], context_tokens=len(pairs(1)[0].ids) - 1)[0], "one document"),
        (batches(pairs(4))[0], "without what their reference says"),
    ):
        for ask in (preference(), lambda model, inputs: margins(model, inputs)):
            with pytest.raises(DataError, match=words):
                ask(model, wrong)
    inputs = batches(examples)[0]
    assert inputs.document_BT is not None
    silent = replace(inputs, weight_BT=inputs.weight_BT * (inputs.document_BT != 1))
    with pytest.raises(DataError, match="without learned tokens"):
        preference()(model, silent)


def test_a_reference_that_is_no_number_is_refused() -> None:
    model = little.model()
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    with pytest.raises(NumericError, match="infinitely unlikely"):
        reference_of(model, pairs())


def test_the_tasks_name_means_the_usual_loss() -> None:
    model, inputs = little.model(1), batches(reference_of(little.model(2), pairs()))
    assert summed(model, inputs, objective_of("preference"))[:2] == summed(model, inputs, preference(beta=0.1))[:2]
    assert preference_module.BETA == 0.1
