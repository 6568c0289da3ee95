"""Preference: the model is to find the chosen of two answers likelier than the rejected one, measured from where it
began.

Decides the loss of a pair (DPO, its smoothed form, IPO), what the reference says of each answer, and when it is asked:
once, before training. That the two answers of a pair stand right behind each other in one row is the packer's; what
they are is the task's; where the reference is kept is the verb's.

The gradient is that of a cross entropy whose weights are known once the pairs' losses are: so nothing larger is kept
than where the next token is learned, and every position that nothing is learned of costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ratoon.base.errors import ArtifactError, ConfigError, DataError, NumericError
from ratoon.data.examples import digest, in_order
from ratoon.data.pack import Example
from ratoon.model import int8
from ratoon.model.likelihood import token_losses
from ratoon.model.transformer import Transformer
from ratoon.train.device import Place
from ratoon.train.loss import Inputs, cross_entropy, read, rounded, with_balance
from ratoon.train.objectives import Objective

Kind = Literal["sigmoid", "ipo"]
BETA = 0.1
"""β where nothing else is said: how strongly the model is held to its reference (the paper's, section 6)."""


# -- the loss --------------------------------------------------------------------------------------------------------


def preference(*, beta: float = BETA, label_smoothing: float = 0.0, kind: Kind = "sigmoid") -> Objective:
    """The objective on pairs: Σ of the pairs' losses and the number of pairs, each counting 1 however long it is.

    With h = log π(chosen)/ref(chosen) - log π(rejected)/ref(rejected), the sums of an answer's learned tokens:
    *sigmoid*: -log σ(β h), Rafailov et al., arXiv:2305.18290, eq. 7; with `label_smoothing` ε, the share of pairs that
    may be labelled the wrong way round, -(1 - ε) log σ(β h) - ε log σ(-β h) (cDPO: eq. 3 of Mitchell's note on it).
    *ipo*: (h' - 1/(2 β))², Azar et al., arXiv:2310.12036, eq. 17 with τ = β; h' takes the means of an answer's tokens,
    as its authors do (the paper has the sums, under which long answers would decide).

    Reads the rows' documents in twos, chosen first, and `vector_BMK` from `with_reference`. Raises `ConfigError` for
    settings that mean nothing; the objective `DataError` for rows that are no pairs or lack their reference.
    """
    if not 0 < beta < float("inf"):
        raise ConfigError(f"beta is {beta}", where="preference.beta", expected="a number above 0, such as 0.1")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing is {label_smoothing}",
            where="preference.label_smoothing",
            expected="at least 0 and below 0.5: the share of pairs labelled the wrong way round",
        )
    if kind not in ("sigmoid", "ipo"):
        raise ConfigError(f"there is no loss of pairs '{kind}'", where="preference.kind", expected="sigmoid, ipo")
    if kind == "ipo" and label_smoothing:
        raise ConfigError(
            "label_smoothing has no effect with kind: ipo",
            where="preference.label_smoothing",
            expected="0 with ipo",
            fix="leave it out, or take kind: sigmoid",
        )

    def loss_of(ratio_P2: Tensor, weight_P2: Tensor) -> Tensor:
        """Losses (P,) from the answers' log ratios and how much was learned of each."""
        if kind == "ipo":
            mean_P2 = ratio_P2 / weight_P2
            return (mean_P2[:, 0] - mean_P2[:, 1] - 1 / (2 * beta)).square()
        logit_P = beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
        return -(1 - label_smoothing) * F.logsigmoid(logit_P) - label_smoothing * F.logsigmoid(-logit_P)

    def objective(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return _objective(model, inputs, loss_of)

    return objective


def _objective(
    model: Transformer, inputs: Inputs, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ `loss_of` over the pairs, and their number.

    For the gradient, dL = Σ s·w·d log p with s the slope of an answer's summed log probability: a cross entropy with
    the weights -s·w.
    """
    pairs = _Pairs.of(inputs)
    reference_BM = _reference(inputs)
    routers: list[Tensor] | None = [] if model.cfg.moe is not None else None
    hidden_BTD = read(model, inputs, routers)
    with torch.enable_grad():
        sum_BM = _summed(model, hidden_BTD, inputs, pairs).requires_grad_()
        loss_P = loss_of(pairs.take(sum_BM - reference_BM), pairs.take(pairs.weight_BM))
        loss = loss_P.sum()
        (slope_BM,) = torch.autograd.grad(loss, sum_BM)
    count_B = pairs.count_B.to(torch.float32)
    total = loss.detach().float()
    if torch.is_grad_enabled():
        weight_BT = -pairs.spread(slope_BM.float()) * inputs.weight_BT
        moved = cross_entropy(model, hidden_BTD, inputs.targets_BT, weight_BT)
        total = total + (moved - moved.detach())
    return with_balance(model, total, routers, inputs, count_B), count_B.sum()


@dataclass(frozen=True)
class Margins:
    """The implicit rewards of pairs, β log π/ref of each answer (arXiv:2305.18290, section 5), in the order in which
    the pairs stand in their rows."""

    chosen_P: Tensor
    rejected_P: Tensor

    @property
    def margin_P(self) -> Tensor:
        """By how much the chosen answer is rewarded more."""
        return self.chosen_P - self.rejected_P

    @property
    def right_P(self) -> Tensor:
        """Whether it is rewarded more at all."""
        return self.chosen_P > self.rejected_P


@torch.no_grad()
def margins(model: Transformer, inputs: Inputs, *, beta: float = BETA) -> Margins:
    """The implicit rewards of the rows' pairs, in nats times β, float32. Raises `DataError` as the objective does."""
    pairs = _Pairs.of(inputs)
    ratio_BM = _summed(model, read(model, inputs), inputs, pairs) - _reference(inputs)
    reward_P2 = (beta * pairs.take(ratio_BM)).float()
    return Margins(reward_P2[:, 0], reward_P2[:, 1])


# -- answers in rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """Where the answers stand in rows: documents 2j and 2j + 1 of a row are pair j.

    `unit_BT`: row · M + document (padding: B · M); `weight_BM`: Σ of the learned weight, float64; `count_B`: pairs of
    each row.
    """

    unit_BT: Tensor
    weight_BM: Tensor
    count_B: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> _Pairs:
        """Raises `DataError` for a row whose documents do not come in twos, and for one that nothing is learned of."""
        document_BT, weight_BT = inputs.document_BT, inputs.weight_BT
        if document_BT is None:
            raise _no_pairs(inputs, 0, "one document")
        B, documents_B = len(document_BT), document_BT.max(1).values.long() + 1
        M = max(1, int(documents_B.max()))
        row_B1 = torch.arange(B, device=document_BT.device)[:, None]
        unit_BT = torch.where(document_BT >= 0, row_B1 * M + document_BT, B * M).long()
        weight_BM = _by_unit(unit_BT, weight_BT, (B, M))
        there_BM = torch.arange(M, device=document_BT.device) < documents_B[:, None]
        empty_B = (there_BM & ~(weight_BM > 0)).any(1)
        wrong_B = (documents_B % 2 != 0) | empty_B
        if bool(wrong_B.any()):
            row = int(wrong_B.nonzero()[0, 0])
            number = int(documents_B[row])
            raise _no_pairs(inputs, row, "an answer without learned tokens" if empty_B[row] else f"{number} documents")
        return cls(unit_BT, weight_BM, documents_B // 2)

    def take(self, value_BM: Tensor) -> Tensor:
        """A number for each document, as pairs (P, 2)."""
        M = value_BM.shape[1] // 2 * 2
        there_BQ = torch.arange(M // 2, device=value_BM.device) < self.count_B[:, None]
        return value_BM[:, :M].reshape(len(value_BM), M // 2, 2)[there_BQ]

    def spread(self, value_BM: Tensor) -> Tensor:
        """A number for each document, at each of its places (B, T); 0 at padding."""
        return torch.cat([value_BM.flatten(), value_BM.new_zeros(1)])[self.unit_BT]


def _no_pairs(inputs: Inputs, row: int, found: str) -> DataError:
    return DataError(
        f"a row holds {found}, which is no number of pairs",
        where=inputs.rows[row] if inputs.rows else f"row {row}",
        expected="for each example a chosen and a rejected answer, of which something is learned",
        fix="make the examples with task.kind: preference",
    )


def _reference(inputs: Inputs) -> Tensor:
    """What the reference gave for each document (B, M), float64. Raises `DataError` where it was not asked."""
    found = inputs.extra.get("vector_BMK")
    if found is None or found.shape[2] != 1:
        raise DataError(
            "the pairs come without what their reference says of them",
            where=inputs.rows[0] if inputs.rows else "row 0",
            expected="one number for each answer",
            fix="give the examples to with_reference before they are packed",
        )
    reference_BM = inputs.tensor("vector_BMK")[..., 0].double()
    assert inputs.document_BT is not None
    return reference_BM[:, : max(1, int(inputs.document_BT.max()) + 1)]  # a micro-batch may have fewer than the batch


def _summed(model: Transformer, hidden_BTD: Tensor, inputs: Inputs, pairs: _Pairs) -> Tensor:
    """Σ w·log p(target) of each document (B, M) in nats, float64, without a gradient."""
    weight_N, targets_N = inputs.weight_BT.flatten(), inputs.targets_BT.flatten()
    index_N = rounded(weight_N.nonzero()[:, 0], weight_N)
    targets_N = targets_N[index_N].where(weight_N[index_N] != 0, 0)
    nats_N = token_losses(model, hidden_BTD.detach().flatten(0, 1)[index_N], targets_N)
    log_N = -(nats_N.double() * weight_N[index_N])
    return _by_unit(pairs.unit_BT.flatten()[index_N], log_N, pairs.weight_BM.shape)


def _by_unit(unit_N: Tensor, value_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums of values by document (B, M), float64: the order of adding is not seen in a float32 made of them."""
    total_U = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.float64, device=value_N.device)
    return total_U.index_add(0, unit_N.flatten(), value_N.flatten().double())[:-1].view(shape)


# -- the reference ---------------------------------------------------------------------------------------------------


def with_reference(
    model: Transformer,
    examples: Sequence[Example],
    *,
    context_tokens: int,
    rows: int,
    leading: int = 0,
    place: Place | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """The pairs with the reference's summed log probability (nats) as the `vector` of each of their two answers.

    The reference is the model as it is: to be called once, before training, with the method installed (where its parts
    begin by changing nothing, that is the base). `rows` rows of `context_tokens` places are read at once; `leading` as
    for the packer. `place`: where training will compute and how precisely, so that training begins at a margin of 0 and
    not at the rounding of another precision; the model is left as it was. `progress`: called with pairs done and all.

    Raises `DataError` for an example that is no pair or of whose answers nothing is learned, `NumericError` where the
    reference is no number.
    """
    bare = [_bare(example, number) for number, example in enumerate(examples)]
    found_P2 = np.zeros((len(bare), 2), np.float32)
    done = 0
    with _reading(model, place) as device:
        for batch, members in in_order(bare, context_tokens=context_tokens, rows=rows, leading=leading):
            inputs = Inputs.of(batch, device, virtual_tokens=leading)
            pairs = _Pairs.of(inputs)
            sum_P2 = pairs.take(_summed(model, read(model, inputs), inputs, pairs)).float().cpu()
            numbers = [number for row in members for number in row]
            found_P2[numbers] = sum_P2.numpy()
            if not bool(sum_P2.isfinite().all()):
                number = numbers[int((~sum_P2.isfinite().all(1)).nonzero()[0, 0])]
                raise NumericError(
                    "the reference finds an answer infinitely unlikely, or its numbers overflow",
                    where=bare[number].name or f"example {number}",
                    expected="a finite log probability",
                    fix="look at the example; else compute with precision: float32",
                )
            done += len(numbers)
            if progress is not None:
                progress(done, len(bare))
    return _attached(bare, found_P2)


def reference_arrays(examples: Sequence[Example]) -> dict[str, npt.NDArray[Any]]:
    """What `with_reference` found, to be kept with the run: `log_probability_P2` (nats, float32) and `examples`, the
    hash of the pairs that it belongs to."""
    vectors = [(example.vector, example.beside.vector if example.beside else None) for example in examples]
    assert all(a is not None and b is not None for a, b in vectors), "examples of with_reference"
    numbers = np.array([[a[0], b[0]] for a, b in vectors if a is not None and b is not None], np.float32)
    return {"log_probability_P2": numbers.reshape(-1, 2), "examples": _hash(examples)}


def with_arrays(examples: Sequence[Example], arrays: Mapping[str, npt.NDArray[Any]]) -> list[Example]:
    """The pairs with what `reference_arrays` kept: a resumed run must not ask a model that was trained already.

    Raises `ArtifactError` where it was kept for other pairs, or for these in another order.
    """
    bare = [_bare(example, number) for number, example in enumerate(examples)]
    numbers, kept_for = arrays.get("log_probability_P2"), arrays.get("examples")
    whole = numbers is not None and kept_for is not None and numbers.shape == (len(bare), 2)
    if not whole or not np.array_equal(np.asarray(kept_for), _hash(bare)):
        raise ArtifactError(
            "the reference that was kept is of other pairs",
            where="reference of the pairs",
            expected=f"the run's own {len(bare):,} pairs, in the order in which it began",
            fix="resume with the data the run was started with, or start a new run",
        )
    return _attached(bare, np.asarray(numbers, np.float32))


def _bare(example: Example, number: int) -> Example:
    """The pair without a reference. Raises `DataError` where it is no pair."""
    other = example.beside
    found = None
    if other is None or other.beside is not None:
        found = "an example is no pair of answers"
    elif example.targets is not None or other.targets is not None:
        found = "an answer has labels, where its tokens are what is learned"
    elif not all(_learned(answer) > 0 for answer in (example, other)):
        found = "nothing is learned of an answer"
    if found is not None or other is None:
        raise DataError(
            found or "",
            where=example.name or f"example {number}",
            expected="a chosen answer with the rejected one beside it, each with learned tokens",
            fix="make the examples with task.kind: preference",
        )
    return replace(example, vector=None, beside=replace(other, vector=None))


def _learned(answer: Example) -> float:
    return float(np.sum(np.asarray(answer.weight, np.float64)[: max(0, len(answer.ids) - 1)]))


def _attached(bare: Sequence[Example], numbers_P2: npt.NDArray[np.float32]) -> list[Example]:
    found = []
    for example, (chosen, rejected) in zip(bare, numbers_P2.tolist(), strict=True):
        assert example.beside is not None
        found.append(replace(example, vector=(chosen,), beside=replace(example.beside, vector=(rejected,))))
    return found


def _hash(examples: Sequence[Example]) -> npt.NDArray[np.uint8]:
    bare = [_bare(example, number) for number, example in enumerate(examples)]
    return np.frombuffer(bytes.fromhex(digest(bare)), np.uint8)


@contextlib.contextmanager
def _reading(model: Transformer, place: Place | None) -> Iterator[torch.device]:
    """The model as training will compute with it, without dropout and gradients; afterwards as it was."""
    parameters, training = list(model.parameters()), model.training
    kept, began = [one.data for one in parameters], model.head_weight().device
    device = began if place is None else place.device
    model.eval()
    try:
        if place is not None:
            model.to(place.device)
            for one in parameters:
                one.data = one.data.to(place.work)
            if place.products == "int8":
                int8.round_frozen(model)
        with torch.no_grad(), place.computing() if place is not None else contextlib.nullcontext():
            yield device
    finally:
        if place is not None and place.products == "int8":
            int8.unround(model)
        model.to(began)
        for one, data in zip(parameters, kept, strict=True):
            one.data = data
        model.train(training)
