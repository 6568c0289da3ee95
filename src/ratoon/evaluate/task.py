"""How good a model is at a task: what it answers to each record, and what is measured of that.

Decides how records are put to a model (packed rows through a head, or prompts through the one decoding loop) and which
measures belong to a task. The measures are `metrics/`'s, what a record is the task's, training's loss `train/`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.data.batch import Batch
from ratoon.data.examples import in_order, joined
from ratoon.evaluate.metrics.value import Measured
from ratoon.generate.lm import LanguageModel
from ratoon.generate.sample import Sampling
from ratoon.tasks.contract import Encoded, Task, TooLong
from ratoon.tasks.example import Example

Progress = Callable[[int, int], None]
READ_TOKENS = 256
"""Sentences of a document that are read together, where the model does not say what it learned with."""
PROBABILITY_DIGITS = 6
"""Places of probabilities that are kept, and measured: so a kept prediction comes to what it came to."""
ROW_TOKENS = 4096
"""Places of the rows that are read at once: many short records share them."""


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one record. `probabilities` in the order of the task's labels, where it has them;
    `nats` and `tokens`: how likely the right answer was, for tasks that are decoded; of a pair `nats` is what a token
    of the chosen answer costs more than one of the rejected."""

    record: Any
    answer: Any
    probabilities: tuple[float, ...] | None = None
    text: str | None = None
    nats: float | None = None
    tokens: int = 0
    cut_tokens: int = 0
    """Tokens of the record that the model did not read."""
    group: str = ""
    """The record's group, where the prediction comes without its record."""

    def as_dict(self, task: Task[Any]) -> dict[str, Any]:
        """The prediction as a line of predictions.jsonl."""
        expected = task.expected(self.record)
        facts: dict[str, Any] = {
            "id": self.record.id,
            "place": self.record.place,
            "input": task.text(self.record),
            "expected": _plain(expected),
            "answer": _plain(self.answer),
        }
        if self.probabilities is not None:
            facts["probabilities"] = [round(float(one), PROBABILITY_DIGITS) for one in self.probabilities]
        if self.text is not None:
            facts["text"] = self.text
        if self.tokens:
            facts |= {"nats": self.nats, "tokens": self.tokens}
        if self.cut_tokens:
            facts["cut_tokens"] = self.cut_tokens
        if getattr(self.record, "group", ""):
            facts["group"] = self.record.group
        return facts


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


@dataclass
class TaskReport:
    """A measurement of a task: the predictions, what was measured of them, and what was measured without records that
    also stand in training."""

    task: Task[Any]
    predictions: list[Prediction]
    measured: Measured
    without_copies: Measured | None = None
    copies: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def cut(self) -> str | None:
        """What the model did not read of the records, as a sentence; None: it read all."""
        found = self.facts.get("cut")
        return found and f"{found['records']:,} records were too long: {found['tokens']:,} tokens were not read"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the predictions as plain values."""
        found = {
            "task": self.task.kind,
            "task_version": self.task.version,
            "measure": self.task.measure,
            "n": len(self.predictions),
            **self.measured.as_dict(),
            **self.facts,
        }
        found.pop("per_record")
        if self.copies:
            found["copies_of_training"] = self.copies
            found["without_copies"] = (
                None if self.without_copies is None else [one.as_dict() for one in self.without_copies.values]
            )
        return found


def evaluate_task(
    lm: LanguageModel,
    task: Task[Any],
    records: Sequence[Any],
    *,
    language: str = "en",
    too_long: TooLong = "cut-right",
    seen_places: set[str] | frozenset[str] = frozenset(),
    sampling: Sampling | None = None,
    progress: Progress | None = None,
    kept: list[Prediction] | None = None,
) -> TaskReport:
    """Put `records` to the model and measure the answers; or measure `kept` ones, which it gave to them before.

    `seen_places`: places of records that also stand in training; if there are any, everything is measured without them
    too. Raises `DataError` when there is no record, or one does not fit the model.
    """
    if not records:
        raise DataError("there is no record to measure on", where="data.test", fix="name files with rows of the task")
    for record in records:
        task.check(record)
    predictions = kept
    if predictions is None:
        predictions = predict(lm, task, records, too_long=too_long, sampling=sampling, progress=progress)
    cut = [one.cut_tokens for one in predictions if one.cut_tokens]
    clean = [one for one in predictions if one.record.place not in seen_places]
    copies = len(predictions) - len(clean)
    return TaskReport(
        task,
        predictions,
        measure(task, predictions, language),
        measure(task, clean, language) if copies and clean else None,
        copies,
        {"cut": {"records": len(cut), "tokens": sum(cut)}} if cut else {},
    )


def predict(
    lm: LanguageModel,
    task: Task[Any],
    records: Sequence[Any],
    *,
    too_long: TooLong = "cut-right",
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """The model's answer to each record, in their order."""
    if task.head() is not None:
        return _by_head(lm, task, records, too_long, progress)
    if task.measure == "preference":
        return _by_likelihood(lm, task, records, too_long)
    return _by_decoding(lm, task, records, too_long, sampling, progress)


def encode(lm: LanguageModel, task: Task[Any], record: Any, too_long: TooLong, room_tokens: int) -> Encoded:
    """A record as examples, as training sees it."""
    if lm.tokenizer is None:
        raise ArtifactError(f"'{lm.name}' has no tokenizer, and text cannot be read without one")
    return task.encode(record, lm.tokenizer, room_tokens=room_tokens, too_long=too_long)


@contextmanager
def _one_type(model: Any) -> Iterator[None]:
    """Let a model whose trained parameters are in float32 beside a base of 16 bits compute in the latter, as in
    training."""
    lowest = min((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
    whole = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype != lowest}
    try:
        for parameter, value in whole.items():
            parameter.data = value.to(lowest)
        yield
    finally:
        for parameter, value in whole.items():
            parameter.data = value


def calibrate(
    lm: LanguageModel, task: Task[Any], records: Sequence[Any], *, too_long: TooLong = "cut-right"
) -> str | None:
    """Let the task learn from held-out records how this model's scores are to be read; what it learned, as a sentence.
    Tasks that have nothing to learn there ask the model nothing."""
    if type(task).calibrate is Task.calibrate:
        return None
    with _one_type(lm.model):
        said = _head_says(lm, task, records, too_long, None) if records else []
    return task.calibrate(records, [one.parts[0][0] for one in said])


@dataclass(frozen=True)
class _Said:
    """What the head says of a record: the scores of each of its pieces, the pieces' places, tokens that were cut."""

    parts: list[npt.NDArray[np.float32]]
    places: Any
    cut_tokens: int


def _by_head(
    lm: LanguageModel, task: Task[Any], records: Sequence[Any], too_long: TooLong, progress: Progress | None
) -> list[Prediction]:
    wanted = task.head()
    assert wanted is not None
    predictions = []
    for record, said in zip(records, _head_says(lm, task, records, too_long, progress), strict=True):
        probabilities = None
        if wanted.kind == "sequence":
            scores: Any = said.parts[0][0]
            probabilities = _probabilities(scores, wanted.problem)
        elif wanted.kind == "token":
            scores = np.concatenate(said.parts)
        else:
            scores = list(zip(said.places, said.parts, strict=True))
        answer = task.read_scores(record, scores)
        predictions.append(Prediction(record, answer, probabilities, cut_tokens=said.cut_tokens))
    return predictions


def _head_says(
    lm: LanguageModel, task: Task[Any], records: Sequence[Any], too_long: TooLong, progress: Progress | None
) -> list[_Said]:
    """The head's scores of each record. Raises `ArtifactError` for a model with another head, `DataError` for a record
    that does not fit the model."""
    wanted, head = task.head(), lm.model.task_head
    assert wanted is not None
    if head is None:
        raise ArtifactError(
            f"'{lm.name}' has no head for the task {task.kind}",
            where=lm.facts.get("path"),
            expected=f"a head of kind {wanted.kind}",
            fix="fine-tune it for the task: ratoon finetune",
        )
    if head.cfg.labels != wanted.labels or head.cfg.kind != wanted.kind:
        raise ArtifactError(
            f"the head scores {', '.join(head.cfg.labels[:8])}",
            where=lm.facts.get("path"),
            expected=", ".join(wanted.labels[:8]),
            fix="the task's labels must be those that the model was trained with",
        )
    policy: TooLong = "split" if wanted.kind in ("token", "span") else too_long
    leading = lm.virtual_tokens
    room = lm.context_tokens - leading
    examples: list[Example] = []
    owner: list[int] = []
    places: list[Any] = []
    cut: list[int] = []
    for number, record in enumerate(records):
        found = encode(lm, task, record, policy, room)
        places.append(found.places)
        cut.append(found.cut_tokens)
        if not found.examples:
            raise DataError(f"the record cannot be put to the model: {found.reason}", where=record.place)
        examples += found.examples
        owner += [number] * len(found.examples)
    scores = _joined_scores(lm, task, records, examples, owner, wanted.kind, progress)
    by_record: list[list[Any]] = [[] for _ in records]
    for number, found_scores in zip(owner, scores, strict=True):
        by_record[number].append(found_scores)
    return [_Said(*one) for one in zip(by_record, places, cut, strict=True)]


def _joined_scores(
    lm: LanguageModel,
    task: Task[Any],
    records: Sequence[Any],
    examples: list[Example],
    owner: list[int],
    kind: str,
    progress: Progress | None,
) -> list[npt.NDArray[np.float32]]:
    """The scores of each example; those that stand together in a document are read together, as in training."""
    pieces = Counter(owner)
    behind = (
        [
            at > 0
            and owner[at - 1] == number - 1
            and pieces[number] == pieces[number - 1] == 1
            and task.together(records[number - 1], records[number])
            for at, number in enumerate(owner)
        ]
        if kind == "token"
        else []
    )
    if not any(behind):
        return head_scores(lm, examples, asked=kind == "span", progress=progress)
    # As many tokens together as training's rows have: more would be another context than was learned.
    room = int(lm.facts.get("data", {}).get("row_tokens", READ_TOKENS))
    whole, groups = joined(examples, behind, min(room, lm.context_tokens) - lm.virtual_tokens)
    found: list[npt.NDArray[np.float32]] = []
    for scores, group in zip(head_scores(lm, whole, progress=progress), groups, strict=True):
        counts = [sum(weight > 0 for weight in examples[number].weight) for number in group]
        found += np.split(scores, np.cumsum(counts)[:-1])
    return found


def _probabilities(scores_K: npt.NDArray[np.float32], problem: str) -> tuple[float, ...] | None:
    if problem == "number":
        return None
    wide_K = scores_K.astype(np.float64)
    if problem == "several":
        found = 1 / (1 + np.exp(-wide_K))
    else:
        shifted = np.exp(wide_K - wide_K.max())
        found = shifted / shifted.sum()
    return tuple(found.tolist())


@torch.no_grad()
def head_scores(
    lm: LanguageModel, examples: Sequence[Example], *, asked: bool = False, progress: Progress | None = None
) -> list[npt.NDArray[np.float32]]:
    """The head's scores (positions, labels) of each example: at its positions of weight above 0, or, `asked`, at those
    whose target is above 0."""
    model, leading = lm.model, lm.virtual_tokens
    longest = max(example.places for example in examples) + leading
    row_tokens = min(lm.context_tokens, max(longest, 256))
    device = model.head_weight().device
    assert model.task_head is not None
    found: list[npt.NDArray[np.float32] | None] = [None] * len(examples)
    done = 0
    for batch, rows in in_order(
        examples, context_tokens=row_tokens, rows=max(1, ROW_TOKENS // row_tokens), leading=leading
    ):
        hidden_BTD, document_BT, position_BT = _read(model, batch, device)
        at_BT = torch.from_numpy((batch.targets_BT > 0) if asked else (batch.weight_BT > 0)).to(device)
        own_BT = position_BT >= leading if leading else None
        scores_NK = model.task_head(hidden_BTD, at_BT, document_BT, own_BT).cpu().numpy()
        at = 0
        flags = at_BT.cpu().numpy()
        for row, members in enumerate(rows):
            for document, number in enumerate(members):
                n = int(flags[row][batch.document_BT[row] == document].sum())
                found[number] = scores_NK[at : at + n]
                at += n
        done += sum(map(len, rows))
        if progress is not None:
            progress(done, len(examples))
    return [one for one in found if one is not None]


def _read(model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    document_BT = torch.from_numpy(batch.document_BT).to(device)
    position_BT = torch.from_numpy(batch.position_BT).to(device)
    hidden_BTD = model(torch.from_numpy(batch.ids_BT).to(device), position_BT, document_BT)
    return hidden_BTD, document_BT, position_BT


def _by_decoding(
    lm: LanguageModel,
    task: Task[Any],
    records: Sequence[Any],
    too_long: TooLong,
    sampling: Sampling | None,
    progress: Progress | None,
) -> list[Prediction]:
    """Greedy answers, unless a sampling says otherwise, and how likely the right ones were."""
    if task.measure == "perplexity":
        found = likelihoods(lm, task, records, too_long)
        return [
            Prediction(record, None, nats=sum(one.nats), tokens=sum(one.tokens), cut_tokens=one.cut_tokens)
            for record, one in zip(records, found, strict=True)
        ]
    assert lm.tokenizer is not None
    questions = [
        task.question(record, lm.tokenizer, room_tokens=lm.context_tokens - lm.virtual_tokens, too_long=too_long)
        for record in records
    ]
    order = sorted(range(len(records)), key=lambda number: -len(questions[number].ids))
    texts: list[str] = [""] * len(records)
    chunk = 64
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        longest = max(questions[number].max_new_tokens for number in part)
        chosen = sampling if sampling is not None else _searching(task, longest)
        for number, text in zip(part, lm.answer([questions[number] for number in part], chosen), strict=True):
            texts[number] = text
        if progress is not None:
            progress(min(start + chunk, len(order)), len(order))
    return [
        Prediction(record, task.read_answer(record, text), text=text, cut_tokens=question.cut_tokens)
        for record, text, question in zip(records, texts, questions, strict=True)
    ]


def _searching(task: Task[Any], max_new_tokens: int) -> Sampling:
    """How answers are sought: greedily, or by beams where the task's settings say so."""
    settings: Any = task.settings
    beams, penalty = getattr(settings, "num_beams", 1), getattr(settings, "length_penalty", None)
    if beams == 1:
        if penalty is not None:
            raise ConfigError("length_penalty has no effect without beams", where="task.num_beams", expected="above 1")
        return Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    norm = {} if penalty is None else {"length_penalty": penalty, "length_norm": "wu"}
    return Sampling(max_new_tokens=max_new_tokens, temperature=0.0, num_beams=beams, **norm)


@dataclass
class Likelihoods:
    """Of one record: -log p of what is learned in nats, and of how many tokens, for what stands in it (0) and beside it
    (1); split records are summed. `cut_tokens`: what was not read."""

    nats: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cut_tokens: int = 0


@torch.no_grad()
def likelihoods(lm: LanguageModel, task: Task[Any], records: Sequence[Any], too_long: TooLong) -> list[Likelihoods]:
    """How likely what is learned of each record is. Raises `DataError` where nothing of any record fits."""
    from ratoon.model.likelihood import token_losses

    examples: list[Example] = []
    owner: list[tuple[int, int]] = []
    sums = [Likelihoods() for _ in records]
    room = lm.context_tokens - lm.virtual_tokens
    for number, record in enumerate(records):
        found = encode(lm, task, record, too_long, room)
        sums[number].cut_tokens = found.cut_tokens
        for example in found.examples:
            for side, one in enumerate(one for one in (example, example.beside) if one is not None):
                examples.append(Example(one.ids, one.weight, one.name))
                owner.append((number, side))
    if not examples:
        raise DataError("no record fits the model", where=records[0].place, expected=f"at most {room:,} tokens")
    row_tokens = min(lm.context_tokens, max(256, max(example.places for example in examples) + lm.virtual_tokens))
    device = lm.model.head_weight().device
    for batch, rows in in_order(
        examples, context_tokens=row_tokens, rows=max(1, ROW_TOKENS // row_tokens), leading=lm.virtual_tokens
    ):
        hidden_BTD, _, _ = _read(lm.model, batch, device)
        loss_BT = token_losses(lm.model, hidden_BTD, torch.from_numpy(batch.targets_BT).to(device)).cpu().numpy()
        for row, members in enumerate(rows):
            for document, place in enumerate(members):
                learned = (batch.document_BT[row] == document) & (batch.weight_BT[row] > 0)
                number, side = owner[place]
                sums[number].nats[side] += float(loss_BT[row][learned].sum(dtype=np.float64))
                sums[number].tokens[side] += int(learned.sum())
    return sums


def _by_likelihood(lm: LanguageModel, task: Task[Any], records: Sequence[Any], too_long: TooLong) -> list[Prediction]:
    """Pairs: which of the two answers the model finds likelier, per token."""
    predictions = []
    for record, one in zip(records, likelihoods(lm, task, records, too_long), strict=True):
        chosen, rejected = (nats / max(tokens, 1) for nats, tokens in zip(one.nats, one.tokens, strict=True))
        answer = "chosen" if chosen < rejected else "rejected"
        predictions.append(
            Prediction(record, answer, nats=chosen - rejected, tokens=sum(one.tokens), cut_tokens=one.cut_tokens)
        )
    return predictions


def measure(
    task: Task[Any],
    predictions: Sequence[Prediction],
    language: str,
    *,
    expected: Sequence[Any] | None = None,
    **drawing: Any,
) -> Measured:
    """The measures that belong to the task; `drawing` (seed, resamples) is for their intervals. `expected`: the right
    answers, where the predictions come without their records. Raises `ConfigError` for a library that is missing."""
    if expected is None:
        expected = [task.expected(one.record) for one in predictions]
    answers = [one.answer for one in predictions]
    labels = list(getattr(task, "labels", ()))
    given = [one.probabilities for one in predictions]
    probabilities = None
    if all(one is not None for one in given):
        probabilities = np.round(np.asarray(given, dtype=np.float64), PROBABILITY_DIGITS)
    if task.measure == "classification":
        from ratoon.evaluate.metrics.classification import classification

        return classification(expected, answers, labels, probabilities, **drawing)
    if task.measure == "multi_label":
        from ratoon.evaluate.metrics.classification import multi_label

        return multi_label(expected, answers, labels, probabilities, **drawing)
    if task.measure == "tagging":
        from ratoon.evaluate.metrics.tagging import tagging

        return tagging(expected, answers, **drawing)
    if task.measure == "numbers":
        from ratoon.evaluate.metrics.numbers import scores, scores_by_group

        scoring: Any = task
        if not scoring.grouped:
            return scores(expected, answers, *(scoring.scales()[""] or ()), **drawing)
        groups = [one.group if one.record is None else one.record.group for one in predictions]
        return scores_by_group(expected, answers, groups, scoring.scales(), **drawing)
    if task.measure == "answers":
        from ratoon.evaluate.metrics.answers import answers as question_answers

        return question_answers(expected, answers, language, **drawing)
    if task.measure == "translation":
        from ratoon.evaluate.metrics.overlap import translation

        return translation(expected, answers, getattr(task.settings, "target_language", None) or language, **drawing)
    if task.measure == "summaries":
        from ratoon.evaluate.metrics.overlap import summaries

        return summaries(expected, answers, language, **drawing)
    if task.measure == "perplexity":
        from ratoon.evaluate.metrics.likelihood import perplexity

        return perplexity([one.nats or 0.0 for one in predictions], [one.tokens for one in predictions], **drawing)
    if task.measure == "preference":
        from ratoon.evaluate.metrics.preference import preference

        return preference([-(one.nats or 0.0) for one in predictions], **drawing)
    raise ConfigError(f"there is no measure '{task.measure}'", where=f"task {task.kind}")
