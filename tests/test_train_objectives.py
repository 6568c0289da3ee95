"""The objectives of task heads against plain torch, one document at a time: values, gradients, packed = alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import little
from ratoon.base.errors import ConfigError
from ratoon.base.seeds import stream
from ratoon.data.pack import pack_whole, whole_rows
from ratoon.model.config import HeadConfig
from ratoon.model.init import add_head
from ratoon.model.transformer import Transformer
from ratoon.tasks.example import Example
from ratoon.train.loss import Inputs, next_token, sequence_to_sequence
from ratoon.train.objectives import Objective, objective_of

LABELS, ROW, CPU = ("a", "b", "c"), 32, torch.device("cpu")
HEADS: dict[str, Any] = {
    "token_label": {"kind": "token", "labels": LABELS},
    "text_label": {"kind": "sequence", "labels": LABELS},
    "text_labels": {"kind": "sequence", "labels": LABELS, "problem": "several"},
    "numbers": {"kind": "sequence", "labels": ("score",), "problem": "number"},
    "span": {"kind": "span", "labels": ("begin", "end")},
}
POOLED = [("text_label", pooling) for pooling in ("mean", "attention")]
CASES = [(name, "last") for name in HEADS] + POOLED


def build(name: str, pooling: str = "last", *, causal: bool = True, **changes: Any) -> Transformer:
    """A little model with every parameter random, the head's too."""
    made = little.model(**changes)
    made.set_causal(causal)
    add_head(made, HeadConfig(**HEADS[name], pooling=pooling), seed=3)
    assert made.task_head is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.task_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def examples(name: str, count: int = 7, seed: int = 0) -> list[Example]:
    """Texts of many lengths with unequal weights, some asked for more than one label or a number."""
    random, found = stream(seed, "objectives", name), []
    for number in range(count):
        length = int(random.integers(3, 14))
        ids = random.integers(0, little.VOCAB, length).tolist()
        weight = [0.0] * (length - 1) + [float(random.choice([0.5, 1.0, 3.0]))]
        targets, vector = [0] * length, None
        if name == "token_label":
            weight = random.choice([0.0, 1.0, 2.0], length).tolist()
            weight[0] = 1.0
            targets = random.integers(0, len(LABELS), length).tolist()
        elif name == "text_label":
            targets[-1] = int(random.integers(0, len(LABELS)))
        elif name == "text_labels":
            vector = random.integers(0, 2, len(LABELS)).astype(float).tolist()
        elif name == "numbers":
            vector = [float(random.random())]
        else:
            targets = [0, *([1] * (length - 1))]
            begin, end = sorted(random.integers(1, length, 2).tolist())
            vector = [float(begin), float(end)]
        found.append(Example(ids, weight, f"text {number}", targets, vector))
    return found


def inputs_of(some: list[Example], row_tokens: int = ROW, leading: int = 0) -> Inputs:
    batch = whole_rows(some, pack_whole(some, row_tokens, leading=leading), row_tokens, leading=leading)
    return Inputs.of(batch, CPU, virtual_tokens=leading)


def alone(model: Transformer, name: str, example: Example, pooling: str = "last") -> tuple[Tensor, float]:
    """Loss and weight of one text, from the definition: no packing, no mask, float64 where numbers are summed."""
    assert model.task_head is not None and example.targets is not None
    hidden_TD = model(torch.tensor([example.ids]))[0]
    score, query = model.task_head.score, model.task_head.query
    if name in ("token_label", "span"):
        scores_TK = F.linear(hidden_TD, score.weight, score.bias).double()
    else:
        if pooling == "last":
            pooled_D = hidden_TD[-1]
        elif pooling == "mean":
            pooled_D = hidden_TD.mean(0)
        else:
            assert query is not None
            pooled_D = (torch.softmax(hidden_TD @ query / math.sqrt(len(query)), 0)[:, None] * hidden_TD).sum(0)
        scores_TK = F.linear(pooled_D, score.weight, score.bias)[None].double()
    total = torch.zeros((), dtype=torch.float64)
    if name == "token_label":
        for place, (target, weight) in enumerate(zip(example.targets, example.weight, strict=True)):
            total = total - weight * torch.log_softmax(scores_TK[place], 0)[target]
        return total, sum(example.weight)
    weight = example.weight[-1]
    if name == "text_label":
        return -weight * torch.log_softmax(scores_TK[0], 0)[example.targets[-1]], weight
    assert example.vector is not None
    asked = torch.tensor(example.vector, dtype=torch.float64)
    if name == "text_labels":
        p = torch.sigmoid(scores_TK[0])
        return -weight * (asked * p.log() + (1 - asked) * (1 - p).log()).mean(), weight
    if name == "numbers":
        return weight * (scores_TK[0, 0] - asked[0]) ** 2, weight
    places = [place for place, target in enumerate(example.targets) if target]
    for end in (0, 1):
        shares = [math.exp(scores_TK[place, end].item()) for place in places]  # brute force: every place there is
        log_all = scores_TK[places, end].exp().sum().log()
        assert log_all.item() == pytest.approx(math.log(sum(shares)))
        total = total - 0.5 * weight * (scores_TK[int(asked[end]), end] - log_all)
    return total, weight


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "pooling"), CASES)
def test_packed_equals_the_definition_of_each_text_alone(name: str, pooling: str, causal: bool) -> None:
    model, some = build(name, pooling, causal=causal), examples(name)
    inputs = inputs_of(some)
    assert len(inputs.ids_BT) < len(some), "texts share rows"
    loss, weight = objective_of(name)(model, inputs)
    packed = gradients(model, loss)
    found = [alone(model, name, example, pooling) for example in some]
    wanted = sum(one for one, _ in found)
    assert isinstance(wanted, Tensor)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    assert float(weight) == pytest.approx(sum(weight for _, weight in found))
    apart = gradients(model, wanted)
    assert packed.keys() == apart.keys() and any(key.startswith("task_head.score") for key in packed)
    for key, value in packed.items():
        scale = float(apart[key].abs().max())
        assert float((value - apart[key]).abs().max()) <= 2e-5 * max(scale, 0.1), key


@pytest.mark.parametrize("name", HEADS)
def test_what_is_not_asked_changes_nothing(name: str) -> None:
    model, some = build(name), examples(name)
    objective = objective_of(name)
    inputs = inputs_of(some)
    loss, weight = objective(model, inputs)
    padding = inputs.document_BT < 0  # type: ignore[operator]
    assert bool(padding.any())
    other = replace(inputs, ids_BT=torch.where(padding, 7, inputs.ids_BT))
    assert torch.equal(objective(model, other)[0], loss)
    # Weights are linear: twice the weight is twice the loss.
    double, weights = objective(model, replace(inputs, weight_BT=2 * inputs.weight_BT))
    assert float(double) == pytest.approx(2 * float(loss), rel=1e-6) and float(weights) == 2 * float(weight)


@pytest.mark.parametrize("name", HEADS)
def test_texts_alone_in_their_rows_give_the_same_sum(name: str) -> None:
    model, some = build(name), examples(name)
    objective = objective_of(name)
    together = objective(model, inputs_of(some))
    apart = [objective(model, inputs_of([example])) for example in some]
    assert float(together[0]) == pytest.approx(sum(float(loss) for loss, _ in apart), rel=2e-6)
    assert float(together[1]) == sum(float(weight) for _, weight in apart)


def test_a_span_is_found_by_brute_force_over_all_begins_and_ends() -> None:
    """p(begin) · p(end) over all pairs of places sums to 1, and the loss is the mean of the two -log p."""
    model, some = build("span"), examples("span", count=4)
    for example in some:
        assert example.targets is not None and example.vector is not None
        places = [place for place, target in enumerate(example.targets) if target]
        shares = {}
        for begin, end in itertools.product(places, places):
            one = replace(example, vector=[float(begin), float(end)], weight=[0.0] * (len(example.ids) - 1) + [1.0])
            loss, _ = objective_of("span")(model, inputs_of([one]))
            shares[begin, end] = math.exp(-2 * float(loss))
        assert sum(shares.values()) == pytest.approx(1.0, rel=1e-5)
        begin, end = (int(place) for place in example.vector)
        loss, weight = objective_of("span")(model, inputs_of([example]))
        assert float(loss) == pytest.approx(-0.5 * float(weight) * math.log(shares[begin, end]), rel=1e-5)


def test_a_span_counts_places_from_the_text_and_not_from_virtual_tokens() -> None:
    """Behind slots that are a method's, the places of an answer stand as far from the text's own begin."""
    model, some = build("span"), examples("span", count=5)
    leading = 3
    inputs = inputs_of(some, leading=leading)
    loss, _ = objective_of("span")(model, inputs)
    total = 0.0
    for example in some:
        assert example.targets is not None and example.vector is not None
        # The slots hold id 0; what stands at them is not asked.
        moved = Example(
            [0] * leading + list(example.ids),
            [0.0] * leading + list(example.weight),
            targets=[0] * leading + list(example.targets),
            vector=[place + leading for place in example.vector],
        )
        total += alone(model, "span", moved)[0].item()
    assert float(loss) == pytest.approx(total, rel=2e-6)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_pooling_leaves_out_the_slots_of_a_method(pooling: str) -> None:
    model, some = build("text_label", pooling), examples("text_label", count=4)
    assert model.task_head is not None
    leading = 3
    loss, _ = objective_of("text_label")(model, inputs_of(some, leading=leading))
    total = 0.0
    for example in some:
        assert example.targets is not None
        hidden_TD = model(torch.tensor([[0] * leading + list(example.ids)]))[0, leading:]
        if pooling == "mean":
            pooled_D = hidden_TD.mean(0)
        else:
            query = model.task_head.query
            assert query is not None
            pooled_D = (torch.softmax(hidden_TD @ query / math.sqrt(len(query)), 0)[:, None] * hidden_TD).sum(0)
        score = model.task_head.score
        log = torch.log_softmax(F.linear(pooled_D, score.weight, score.bias), 0)
        total -= log[example.targets[-1]].item() * example.weight[-1]
    assert float(loss) == pytest.approx(total, rel=2e-6)


def test_a_trunk_that_is_given_is_gone_on_from() -> None:
    model, some = build("text_label"), examples("text_label")
    inputs = inputs_of(some)
    loss, _ = objective_of("text_label")(model, inputs)
    trunk_BTD = model.trunk(inputs.ids_BT, 1, inputs.position_BT, inputs.document_BT)
    again, _ = objective_of("text_label")(model, replace(inputs, trunk_BTD=trunk_BTD, trunk_layers=1))
    assert torch.equal(loss, again)
    other, _ = objective_of("text_label")(model, replace(inputs, trunk_BTD=trunk_BTD + 1, trunk_layers=1))
    assert not torch.equal(loss, other)


def test_heads_learn_through_the_loop() -> None:
    """Ten texts overfit with every objective."""

    class Rows:
        def __init__(self, some: list[Example]) -> None:
            rows = pack_whole(some, ROW)
            self.found = whole_rows(some, rows, ROW)

        def batch(self, step: int) -> Any:
            return self.found

        def state(self) -> dict[str, Any]:
            return {}

    for name in HEADS:
        rows = Rows(examples(name))
        count = len(rows.found.ids_BT)
        outcome = little.go(
            build(name), rows, objective=objective_of(name), steps=30, rows=count, context_tokens=ROW,
            learning_rate=0.02, optimizer="adamw", schedule="constant",
        )  # fmt: skip
        losses = outcome.losses()
        assert losses[-1] < 0.25 * losses[0], (name, losses[0], losses[-1])


def test_names_of_objectives() -> None:
    assert objective_of("next_token") is next_token
    assert objective_of("sequence_to_sequence") is sequence_to_sequence
    pairs: Objective = objective_of("preference")
    assert callable(pairs)
    with pytest.raises(ConfigError, match="no objective 'texts'"):
        objective_of("texts")


def test_little_numbers_and_great_scores_stay_finite() -> None:
    model, some = build("span"), examples("span")
    assert model.task_head is not None
    with torch.no_grad():
        model.task_head.score.weight *= 1e4  # a softmax without its maximum taken off would overflow
    loss, _ = objective_of("span")(model, inputs_of(some))
    assert np.isfinite(float(loss)) and all(value.isfinite().all() for value in gradients(model, loss).values())
