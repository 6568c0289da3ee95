"""The base of a fine-tuned model at its task, untrained: what the fine-tuning itself brought.

Decides how a base is asked. Where the model writes, the base gets the same prompts, decoded in the same way; where a
likelihood is measured, the same tokens; where a head gives one label, the base has no head, and its answer is the label
whose name it finds likeliest behind the text. How answers are measured is `task.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.evaluate.floor_of_task import standing
from ratoon.evaluate.metrics.value import Measured, compare
from ratoon.evaluate.task import Prediction, Progress, TaskReport, measure, predict
from ratoon.generate.decode import Reader
from ratoon.generate.lm import LanguageModel
from ratoon.generate.translate import Translator
from ratoon.tasks.contract import Task, TooLong, too_long
from ratoon.tasks.parts import continued, fit, joined, not_split, parts_of

BY_LIKELIHOOD = ("classification", "pairs")
"""Tasks with a head whose labels have names that a language model can be asked about."""
TEMPLATES = {
    ("classification", "en"): "{text}\nLabel:",
    ("classification", "zh"): "{text}\n标签：",
    ("pairs", "en"): "{first}\n{second}\nLabel:",
    ("pairs", "zh"): "{first}\n{second}\n标签：",
}
"""What stands before a label's name. The name follows as it is written, `_` as a space."""
BATCH_TOKENS = 1 << 13
"""Places of the prompts that are read at once, padding included."""


def expect_base(lm: LanguageModel, task: Task[Any]) -> None:
    """Raise `ConfigError` for a task that a base without training cannot be measured at."""
    if isinstance(lm, Translator):
        raise ConfigError(
            f"'{lm.name}' is an encoder-decoder that began with random weights: it has no base",
            where="--base",
            fix="leave --base out; --floor puts the cheap classics beside it",
        )
    if task.head() is None or task.kind in BY_LIKELIHOOD:
        return
    raise ConfigError(
        f"a base answers no {task.kind} without a head, and an untrained head would be chance",
        where="--base",
        expected=f"a task whose answer is written, or one of {', '.join(BY_LIKELIHOOD)}",
        fix="train a head alone on the frozen base, and name that run with --against: "
        f"ratoon finetune RECIPE method.kind=full method.freeze_layers={len(lm.model.layers)}",
    )


def base_beside(
    report: TaskReport, base: LanguageModel, *, language: str, policy: TooLong, progress: Progress | None = None
) -> dict[str, Any]:
    """The base measured on the report's records: its name, how it was asked, values, seconds, tokens that were cut, and
    the paired bootstrap of ours less it in the main figure. Raises as `expect_base`, and as `predict`."""
    began = time.perf_counter()
    predictions, how = base_answers(
        base, report.task, [one.record for one in report.predictions], language=language, policy=policy,
        progress=progress,
    )  # fmt: skip
    measured = measure(report.task, predictions, language)
    main = report.measured.values[0].name
    found = {
        "name": base.name,
        "what": how,
        "values": [one.as_dict() for one in measured.values],
        "seconds": time.perf_counter() - began,
        "cut_tokens": sum(one.cut_tokens for one in predictions),
        "paired": compare(report.measured, measured, main).as_dict(),
    }
    if report.task.measure == "preference":
        found["moved"] = compare(report.measured, measured, "margin").as_dict()
    return found


def sentence(measured: Measured, found: dict[str, Any]) -> str:
    """Whether the model beats its base, said plainly."""
    ours, theirs, paired = measured.values[0], found["values"][0]["value"], found["paired"]
    word = standing(ours, theirs, paired)
    if word is None:
        return f"{ours.name} is undefined: nothing can be said about the base"
    low, high = paired["interval"]
    moved = found.get("moved")
    said = ""
    if moved is not None and moved["interval"] is not None:
        least, most = moved["interval"]
        said = (
            f"; its training moved the margin by {moved['difference']:+.4f} nats per token [{least:+.4f}, {most:+.4f}]"
        )
    return (
        f"the model {word} its base, {found['name']} ({found['what']}): {ours.name} {ours.value:.4f} against "
        f"{theirs:.4f}, difference {paired['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{said}"
    )


def base_answers(
    base: LanguageModel,
    task: Task[Any],
    records: Sequence[Any],
    *,
    language: str,
    policy: TooLong,
    progress: Progress | None = None,
) -> tuple[list[Prediction], str]:
    """What the base answers to each record, and how it was asked, in words. `policy`: what becomes of texts that are
    too long, as the run has it."""
    expect_base(base, task)
    if base.model.task_head is not None:
        return predict(base, task, records, too_long=policy, progress=progress), "untrained here, by a head of its own"
    if task.head() is not None:
        asked = Labels(base, task, language)
        shown = asked.template.replace("\n", "\\n")
        how = f"untrained, the label of the highest mean log-likelihood per token after “{shown}”"
        return asked.answers(records, policy, progress), how
    found = predict(base, task, records, too_long=policy, progress=progress)
    written = task.measure not in ("perplexity", "preference")
    return found, "untrained, the same prompts and decoding" if written else "untrained, the same tokens"


class Labels:
    """A task's labels as continuations of a text, scored by a language model.

    A label's score is the mean log probability of its tokens (nats), so that long names are not punished for their
    length. The prompt is read once; labels that begin alike share the tokens that they share.
    """

    def __init__(self, lm: LanguageModel, task: Task[Any], language: str) -> None:
        if lm.tokenizer is None:
            raise ArtifactError(f"'{lm.name}' has no tokenizer, and text cannot be read without one")
        self.lm, self.task, self.tokenizer = lm, task, lm.tokenizer
        side = "zh" if language.startswith("zh") else "en"
        self.template = TEMPLATES[task.kind, side]
        labelled: Any = task
        self.labels: tuple[str, ...] = labelled.labels
        space = " " if side == "en" else ""
        self.ids = [continued(space + label.replace("_", " "), self.tokenizer) for label in self.labels]
        empty = [label for label, ids in zip(self.labels, self.ids, strict=True) if not ids]
        if empty:
            raise DataError(f"the label '{empty[0]}' has no token", where="task.labels", expected="labels with a name")

    def answers(self, records: Sequence[Any], policy: TooLong, progress: Progress | None = None) -> list[Prediction]:
        """The likeliest label of each record."""
        prompts, cut = zip(*(self.prompt(record, policy) for record in records), strict=True)
        scores_NK = self.scores(prompts, progress)
        best = scores_NK.argmax(1).tolist()
        return [
            Prediction(record, self.labels[number], cut_tokens=tokens)
            for record, number, tokens in zip(records, best, cut, strict=True)
        ]

    def prompt(self, record: Any, policy: TooLong) -> tuple[list[int], int]:
        """The ids before the label, and how many were cut: the text is shortened as the run does it, so that the
        longest label fits. Raises `DataError` where it is too long and must not be."""
        not_split(policy, "a text with one label")
        values = {"text": record.text}
        if self.task.kind == "pairs":
            values = {"first": record.text, "second": record.second}
        parts = parts_of(self.template, values, self.tokenizer)
        whole = len(joined(parts))
        room = self.lm.context_tokens - self.lm.virtual_tokens - max(map(len, self.ids)) + 1
        if whole > room and policy == "refuse":
            raise too_long(record.place, whole, room)
        found = fit(parts, room, policy, values)
        if found is None:
            raise too_long(record.place, whole, room)
        return joined(found[0]), found[1]

    @torch.no_grad()
    def scores(self, prompts: Sequence[list[int]], progress: Progress | None = None) -> Tensor:
        """Mean log probability of each label behind each prompt, (N, K) float64 on the CPU. Raises `ArtifactError` for
        an adapter's virtual tokens: a base has none."""
        if self.lm.virtual_tokens:
            raise ArtifactError(f"'{self.lm.name}' has an adapter's virtual tokens: it is no base")
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        found_NK = torch.empty(len(prompts), len(self.labels), dtype=torch.float64)
        done, deepest = 0, max(map(len, self.ids))
        while done < len(order):
            rows = max(1, BATCH_TOKENS // (len(prompts[order[done]]) + deepest))
            numbers = order[done : done + rows]
            some = [prompts[number] for number in numbers]
            reader = Reader(self.lm.model, some, len(some[0]) + deepest, "torch")
            scores_BV = reader.prefill()
            sums_BK = torch.zeros(len(some), len(self.labels), dtype=torch.float64)
            self._walk(reader, list(range(len(self.labels))), 0, scores_BV, sums_BK)
            found_NK[numbers] = sums_BK
            done += len(numbers)
            if progress is not None:
                progress(done, len(order))
        return found_NK / torch.tensor([len(ids) for ids in self.ids], dtype=torch.float64)

    def _walk(self, reader: Reader, labels: list[int], depth: int, scores_BV: Tensor, sums_BK: Tensor) -> None:
        """Add the log probabilities of the labels' tokens from `depth` on; all of them have the same tokens before."""
        model, cache = reader.model, reader.cache
        by_token: dict[int, list[int]] = {}
        for number in labels:
            by_token.setdefault(self.ids[number][depth], []).append(number)
        tokens = list(by_token)
        wide_BV = scores_BV.float()
        chosen_BM = (wide_BV[:, tokens] - wide_BV.logsumexp(-1, keepdim=True)).double().cpu()
        for place, token in enumerate(tokens):
            members = by_token[token]
            sums_BK[:, members] += chosen_BM[:, place, None]
            longer = [number for number in members if len(self.ids[number]) > depth + 1]
            if not longer:
                continue
            filled = cache.length
            ids_B1 = torch.full((len(reader.prompts), 1), token, device=scores_BV.device)
            position_B1 = None
            if cache.padded:
                position_B1 = torch.tensor(reader.position, device=scores_BV.device)[:, None] + depth
            hidden_B1D = model(ids_B1, position_B1, None, cache)
            self._walk(reader, longer, depth + 1, model.logits(hidden_B1D[:, -1]), sums_BK)
            cache.rewind(filled)
