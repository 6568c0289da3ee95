"""Everything on record of a run, as a page wants it: typed, derived figures beside what they are derived from.

Reads only what lies in the run's folder, and takes it as it is: a run that has just begun or a file that a crash cut
gives less, never an error. How it is shown is decided by `page.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ratoon.base.errors import ArtifactError
from ratoon.store.runs import Run

LOG_LINES = 60
STATUSES = ("done", "running", "interrupted", "failed")
KEPT = ("train", "held_out")

CURVES = (
    ("loss", "loss"),
    ("learning_rate", "learning_rate"),
    ("throughput", "tokens_per_second"),
    ("memory", "memory_bytes"),
    ("gradient_norm", "grad_norm"),
    ("rank", "mean_rank"),
)
"""The curves of a page, and the key of the training records that each is drawn from."""

Pair = tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """A held-out measurement with its 95 % intervals, as the evaluation wrote them."""

    step: int
    loss: float
    perplexity: float
    bits_per_byte: float | None = None
    interval: Pair | None = None
    perplexity_interval: Pair | None = None
    bits_interval: Pair | None = None
    interval_of: str | None = None
    n_tokens: int | None = None
    n_in_all: int | None = None
    n_documents: int | None = None
    n_bytes: int | None = None
    n_text_tokens: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    signature: str | None = None

    @classmethod
    def of(cls, table: dict[str, Any], step: int) -> Measurement | None:
        """From a record of kind eval or the manifest's `evaluation`; nothing when its loss is not a number."""
        loss, perplexity = number(table.get("loss")), number(table.get("perplexity"))
        if loss is None:
            return None
        return cls(
            step,
            loss,
            math.exp(min(loss, 700.0)) if perplexity is None else perplexity,
            number(table.get("bits_per_byte")),
            interval=_pair(table.get("interval")),
            perplexity_interval=_pair(table.get("perplexity_interval")),
            bits_interval=_pair(table.get("bits_per_byte_interval")),
            interval_of=_string(table.get("interval_of")),
            n_tokens=integer(table.get("n_tokens")),
            n_in_all=integer(table.get("n_tokens_in_all")),
            n_documents=integer(table.get("n_documents")),
            n_bytes=integer(table.get("n_bytes")),
            n_text_tokens=integer(table.get("n_text_tokens")),
            tokens=integer(table.get("tokens")),
            seconds=number(table.get("time_seconds")),
            signature=_string(table.get("signature")),
        )


@dataclass(frozen=True)
class Sample:
    """What the model wrote after `prompt`, at some steps."""

    prompt: str
    texts: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Account:
    """A line of the ledger."""

    name: str
    documents: int
    bytes: int
    tokens: int
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Records:
    """Everything on record of a run."""

    run: Run
    state: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    ledger: dict[str, Any] | None
    recipe: str
    log: tuple[str, ...]
    torn: int
    """Lines of metrics.jsonl that are not a record."""

    @classmethod
    def read(cls, run: Run) -> Records:
        """Read a run's folder. Raises `ArtifactError` when there is none, or its manifest cannot be read."""
        state = run.read_state()
        if not run.state_path.is_file() or not isinstance(state, dict):
            raise ArtifactError(
                "there is no run in this folder",
                where=run.folder,
                expected=f"a folder with {run.state_path.name}",
                fix="`ratoon runs` lists the runs",
            )
        metrics = tuple(record for record in run.read_metrics() if isinstance(record, dict))
        lines = sum(bool(line.strip()) for line in _text(run.metrics_path).splitlines())
        return cls(
            run=run,
            state=state,
            metrics=metrics,
            ledger=_ledger(run.folder / "ledger.json"),
            recipe=_text(run.recipe_path),
            log=tuple(_text(run.folder / "log.txt").splitlines()),
            torn=lines - len(metrics),
        )

    # -- how it stands ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.state.get("name") or self.run.name)

    @property
    def status(self) -> str:
        """done, running, interrupted, failed; unknown when the manifest says none of them."""
        status = self.state.get("status")
        return str(status) if status in STATUSES else "unknown"

    @property
    def last_step(self) -> int | None:
        """The last step with any record of training or measuring."""
        steps = [record["step"] for record in self.metrics if isinstance(record.get("step"), int)]
        return max(steps) if steps else None

    @property
    def progress(self) -> float | None:
        """The share of the plan that the last training record names."""
        found = self.pairs("train", "progress")
        return found[-1][1] if found else None

    @property
    def commands(self) -> list[str]:
        """What to type next: the run's own list, or how to go on with a run that did not reach its end."""
        if self.status == "done":
            return [str(command) for command in self.state.get("next_commands") or []]
        verb = "finetune" if self.recipe_table("task") else "pretrain"
        return [f"ratoon {verb} {self.run.recipe_path} --resume"] if self.recipe else []

    @property
    def log_tail(self) -> list[str]:
        """The last lines of the log."""
        return list(self.log[-LOG_LINES:])

    # -- figures ---------------------------------------------------------------------------------------------------

    def pairs(self, kind: str, key: str) -> list[Pair]:
        """(step, value) of the records of that kind which have a number, finite or not, under that key."""
        found = []
        for record in self.metrics:
            step, value = record.get("step"), record.get(key)
            if record.get("kind") == kind and isinstance(step, int) and isinstance(value, (int, float)):
                found.append((float(step), float(value)))
        return found

    @property
    def not_finite(self) -> int:
        """Values of the curves that are NaN or infinite."""
        keys = [("train", key) for _, key in CURVES] + [("eval", "loss")]
        return sum(not math.isfinite(value) for kind, key in keys for _, value in self.pairs(kind, key))

    @cached_property
    def measurements(self) -> list[Measurement]:
        """The held-out measurements during training, in order."""
        found = (
            Measurement.of(record, record.get("step", 0)) for record in self.metrics if record.get("kind") == "eval"
        )
        return [one for one in found if one is not None]

    @property
    def final(self) -> Measurement | None:
        """The measurement of the model that the run left behind: that of a finished run only."""
        table = self.state.get("evaluation")
        if self.status != "done" or not isinstance(table, dict):
            return None
        return Measurement.of(table, integer(self.state.get("step")) or 0)

    @property
    def shown(self) -> Measurement | None:
        """The final measurement, else the latest of those after training began, else any."""
        return self.final or (self.measurements[-1] if self.measurements else None)

    @property
    def untrained(self) -> Measurement | None:
        """The measurement before the first step."""
        return next((one for one in self.measurements if one.step == 0), None)

    @property
    def best(self) -> Measurement | None:
        """The lowest held-out loss after training began."""
        return min((one for one in self.measurements if one.step > 0), key=lambda one: one.loss, default=None)

    @property
    def vocab_size(self) -> int | None:
        """Tokens that the model chooses from; before there is a model, those of the tokenizer."""
        own = integer(self._table("model").get("vocab_size"))
        return own or integer(self._table("data").get("vocab_size"))

    @property
    def uniform(self) -> Measurement | None:
        """A uniform guess over the vocabulary, its bits per byte on the text of the shown measurement."""
        if not self.vocab_size:
            return None
        like = self.shown
        bits = None
        if like is not None and like.n_text_tokens and like.n_bytes:
            bits = math.log2(self.vocab_size) * like.n_text_tokens / like.n_bytes
        return Measurement(0, math.log(self.vocab_size), float(self.vocab_size), bits)

    @property
    def comparison(self) -> list[tuple[str, Measurement]]:
        """(phrase, measurement) of what the model is compared with, and of itself."""
        rows = [("row_uniform", self.uniform)]
        rows.append(("row_start" if self.state.get("init") else "row_untrained", self.untrained))
        if self.shown is not None and self.shown is not self.untrained:
            rows.append(("row_final" if self.final else "row_latest", self.shown))
        return [(key, one) for key, one in rows if one is not None]

    @property
    def speed(self) -> tuple[float, int] | None:
        """Median of the recorded tokens per second, and of how many records."""
        return _reduced(self.pairs("train", "tokens_per_second"), _median)

    @property
    def peak_memory(self) -> tuple[float, int] | None:
        """Highest recorded memory in bytes, and of how many records."""
        return _reduced(self.pairs("train", "memory_bytes"), max)

    @property
    def seconds(self) -> float | None:
        """Seconds of training."""
        known = number(self.state.get("seconds")) if self.status == "done" else None
        return known if known is not None else self._last("time_seconds")

    @property
    def tokens(self) -> int | None:
        """Tokens learned from."""
        known = integer(self.state.get("tokens")) if self.status == "done" else None
        return known if known is not None else integer(self._last("tokens"))

    @property
    def steps(self) -> int | None:
        """Steps of training done."""
        known = integer(self.state.get("steps")) if self.status == "done" else None
        return known if known is not None else self.last_step

    @property
    def untaught(self) -> bool:
        """Whether the run reached its end without a step."""
        return self.status == "done" and self.steps == 0

    @property
    def passes(self) -> float | None:
        """Passes over the training part, of a finished run."""
        return number(self.state.get("passes")) if self.status == "done" else None

    @property
    def skipped_steps(self) -> int:
        """Steps left out for a float16 overflow."""
        found = self.pairs("train", "skipped_steps")
        return int(found[-1][1]) if found else 0

    # -- what it is made of ----------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int | None:
        """Parameters of the model."""
        return integer(self._table("model").get("parameters"))

    @property
    def sources(self) -> list[str]:
        """Where the text comes from."""
        found = self._table("data").get("sources")
        return [str(source) for source in found] if isinstance(found, list) else []

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        try:
            table = yaml.safe_load(self.recipe)
        except yaml.YAMLError:
            return {}
        return table if isinstance(table, dict) else {}

    def recipe_table(self, key: str) -> dict[str, Any]:
        """A table of the recipe, or nothing."""
        found = self._recipe.get(key)
        return found if isinstance(found, dict) else {}

    @property
    def recipe_train(self) -> dict[str, Any]:
        """The table `train` of the recipe, or nothing."""
        return self.recipe_table("train")

    @property
    def matrix_learning_rate(self) -> float | None:
        """Muon's peak learning rate where it is used; its course is that of AdamW's."""
        muon = self.recipe_train.get("optimizer") == "muon"
        return number(self.recipe_train.get("matrix_learning_rate")) if muon else None

    @property
    def model(self) -> dict[str, Any]:
        """The settings of the model, or nothing."""
        return self._table("model")

    @property
    def machine(self) -> dict[str, Any]:
        """The facts of the machine."""
        return self._table("machine")

    @property
    def derived(self) -> list[dict[str, Any]]:
        """Values that nobody gave: key, value, reason."""
        found = self.state.get("derived")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    @cached_property
    def samples(self) -> list[Sample]:
        """What was written after each prompt, in order of steps."""
        texts: dict[tuple[str, int], list[tuple[int, str]]] = {}
        seen: dict[tuple[str, int], int] = {}
        for record in self.metrics:
            prompt, step = str(record.get("prompt", "")), record.get("step")
            if record.get("kind") != "sample" or not isinstance(step, int):
                continue
            count = seen[prompt, step] = seen.get((prompt, step), 0) + 1  # a prompt may stand twice in the recipe
            texts.setdefault((prompt, count), []).append((step, str(record.get("text", ""))))
        return [Sample(prompt, tuple(sorted(found, key=lambda one: one[0]))) for (prompt, _), found in texts.items()]

    @property
    def notes(self) -> list[str]:
        """What the preparation had to say."""
        return [str(note) for note in (self.ledger or {}).get("notes") or []]

    @property
    def read_account(self) -> Account:
        """What was read."""
        assert self.ledger is not None
        return _account("read", self.ledger.get("read", {}))

    @cached_property
    def accounts(self) -> list[Account]:
        """The accounts of the ledger, what was kept first."""
        tables = (self.ledger or {}).get("accounts", {})
        names = [*(name for name in KEPT if name in tables), *(name for name in tables if name not in KEPT)]
        return [_account(name, tables[name]) for name in names]

    @property
    def sum_account(self) -> Account:
        """The accounts added up, here and now."""
        return Account(
            "sum",
            sum(one.documents for one in self.accounts),
            sum(one.bytes for one in self.accounts),
            sum(one.tokens for one in self.accounts),
        )

    @property
    def adds_up(self) -> bool:
        """Whether the sum equals what was read, in documents, bytes and tokens."""
        read, total = self.read_account, self.sum_account
        return (read.documents, read.bytes, read.tokens) == (total.documents, total.bytes, total.tokens)

    @property
    def left_out_file(self) -> str:
        """The file that names every place of what was left out."""
        return str(Path(str(self._table("data").get("prepared", "data"))) / "left_out.jsonl")

    @property
    def recipe_lines(self) -> Iterator[tuple[str, str, str]]:
        """(indent and key with its colon, value, end) of each line of the recipe, to be coloured."""
        for line in self.recipe.splitlines():
            head, colon, tail = line.partition(":")
            is_key = bool(colon) and (not tail or tail.startswith(" ")) and '"' not in head and "'" not in head
            yield (head + colon, tail, "\n") if is_key else ("", line, "\n")

    def _table(self, key: str) -> dict[str, Any]:
        found = self.state.get(key)
        return found if isinstance(found, dict) else {}

    def _last(self, key: str) -> float | None:
        found = self.pairs("train", key)
        return found[-1][1] if found else None


def _ledger(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_text(path))
    except ValueError:
        return None
    good = isinstance(found, dict) and isinstance(found.get("read"), dict) and isinstance(found.get("accounts"), dict)
    return found if good else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def integer(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _pair(value: Any) -> Pair | None:
    found = [number(one) for one in value] if isinstance(value, (list, tuple)) else []
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return found[0], found[1]


def _account(name: str, table: dict[str, Any]) -> Account:
    documents, size, tokens = (integer(table.get(what)) or 0 for what in ("documents", "bytes", "tokens"))
    return Account(name, documents, size, tokens, tuple(str(place) for place in table.get("places", ())))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _reduced(pairs: list[Pair], how: Callable[[list[float]], float]) -> tuple[float, int] | None:
    values = [value for _, value in pairs if math.isfinite(value)]
    return (float(how(values)), len(values)) if values else None
