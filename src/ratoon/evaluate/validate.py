"""The evaluation on the way of a fine-tuning run: loss on the validation examples, and the task's main measure.

Decides which part of the validation records is read each time, and by what the best step is chosen: the task's main
measure where a head gives it at once, else the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ratoon.data.examples import in_order
from ratoon.evaluate.task import ROW_TOKENS, measure, predict
from ratoon.generate.lm import LanguageModel
from ratoon.tasks.contract import Task
from ratoon.tasks.example import Example

NEIGHBOURS = 16
"""Records of a part that are taken one after another: files are sorted by label, and sentences stand in documents."""

T = TypeVar("T")


def spread(items: Sequence[T], share: float) -> list[T]:
    """About that share of the items (one at least), in runs of neighbours spread evenly over them all."""
    runs = [items[start : start + NEIGHBOURS] for start in range(0, len(items), NEIGHBOURS)]
    wanted = max(1, round(share * len(items)))
    count = min(len(runs), -(-wanted // NEIGHBOURS))
    chosen = [runs[number * len(runs) // count] for number in range(count)]
    return [item for run in chosen for item in run][: max(wanted, 1)]


class Validation:
    """The validation records of a run, and how they are put to the model that is trained.

    `objective` is training's; `inputs_of` makes its inputs from a batch.
    """

    def __init__(
        self,
        lm: LanguageModel,
        task: Task[Any],
        records: Sequence[Any],
        examples: Sequence[Example],
        objective: Callable[..., Any],
        inputs_of: Callable[..., Any],
    ) -> None:
        self.lm, self.task, self.objective, self.inputs_of = lm, task, objective, inputs_of
        self.records, self.examples = list(records), list(examples)

    def callback(self, limit_tokens: int, language: str, context_tokens: int) -> Callable[[int, Any], dict[str, Any]]:
        """What the loop calls: `(step, model) -> figures`. About `limit_tokens` places are read at most, spread over
        the part in runs of neighbours."""
        share = min(1.0, limit_tokens / sum(example.places for example in self.examples))
        examples, records = spread(self.examples, share), spread(self.records, share)

        def evaluate(step: int, model: Any) -> dict[str, Any]:
            loss, weight = self._loss(model, examples, context_tokens)
            found: dict[str, Any] = {"loss": loss, "n_tokens": int(weight), "n_records": len(records)}
            if self.task.head() is not None:
                value = measure(self.task, predict(self.lm, self.task, records), language, resamples=1).values[0]
                if value.value is not None:
                    found["measure"] = {"name": value.name, "value": value.value}
                    found["choose"] = -value.value if value.higher_is_better else value.value
            return found

        return evaluate

    @torch.no_grad()
    def _loss(self, model: Any, examples: Sequence[Example], context_tokens: int) -> tuple[float, float]:
        total = weights = 0.0
        leading = self.lm.virtual_tokens
        device = model.head_weight().device
        rows = max(1, ROW_TOKENS // context_tokens)
        for batch, _ in in_order(examples, context_tokens=context_tokens, rows=rows, leading=leading):
            loss, weight = self.objective(model, self.inputs_of(batch, device, virtual_tokens=leading))
            total, weights = total + float(loss), weights + float(weight)
        return total / max(weights, 1e-9), weights
