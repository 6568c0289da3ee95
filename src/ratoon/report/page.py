"""The page of a run: one HTML file that tells what was trained, on what, how good it is, and what to type next.

Reads only what lies in the run's folder. Decides what is shown and in which order; wording is `phrases.py`'s, curves
are `plots.py`'s, looks are the style sheet's in `templates/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ratoon.base.errors import ArtifactError
from ratoon.report import plots
from ratoon.report.phrases import PHRASES, Language, duration, figure, phrase, sentence, size, whole
from ratoon.store.atomic import write_text
from ratoon.store.runs import Run

TEMPLATES = Path(__file__).parent / "templates"
LOG_LINES = 60
STATUSES = ("done", "running", "interrupted", "failed")
KEPT = ("train", "held_out")
WIDE, NARROW = (1040, 360), (400, 300)


def write_page(run: Run, *, language: Language = "en") -> Path:
    """Write `report.html` into the run's folder, from what lies there, and return its path.

    Works for a run in any state: finished, failed, interrupted, just begun. The page is one file without outside
    references. Raises `ArtifactError` when the folder holds no run; `StorageError` when the disk refuses.
    """
    write_text(run.report, render(Records.read(run), language))
    return run.report


def render(records: Records, language: Language) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    script = (TEMPLATES / "page.js").read_text(encoding="utf-8").strip()
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8").strip()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def say(key: str, **values: Any) -> Markup:
        strong = {name: value if isinstance(value, Markup) else Markup.escape(value) for name, value in values.items()}
        return Markup(Markup.escape(phrase(key, language)).format(**strong))

    environment.filters |= {
        "whole": whole,
        "figure": figure,
        "size": size,
        "duration": lambda seconds: duration(seconds, language),
        "sentence": lambda text: sentence(str(text), language),
        "b": lambda text: Markup("<b>{}</b>").format(text),
        "code": lambda text: Markup("<code>{}</code>").format(text),
    }
    return environment.get_template("page.html").render(
        say=say,
        r=records,
        curves=[_picture(curve, records, say) for curve in _curves(records)],
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        known=PHRASES,
    )


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """A held-out measurement. The interval is that of the loss; the other two follow it, being functions of it."""

    step: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_tokens: int | None
    interval: tuple[float, float] | None
    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, table: dict[str, Any], step: int) -> Measurement | None:
        """From a record of kind eval or the manifest's `evaluation`; nothing when its loss is not a number."""
        loss = _number(table.get("loss"))
        if loss is None:
            return None
        low, high = [*(_number(value) for value in table.get("interval") or ()), None, None][:2]
        perplexity = _number(table.get("perplexity"))
        return cls(
            step,
            loss,
            math.exp(min(loss, 700.0)) if perplexity is None else perplexity,
            _number(table.get("bits_per_byte")),
            _integer(table.get("n_tokens")),
            None if low is None or high is None else (low, high),
            _integer(table.get("tokens")),
            _number(table.get("time_seconds")),
        )

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """The exponential of the loss's interval."""
        return None if self.interval is None else (math.exp(self.interval[0]), math.exp(self.interval[1]))

    @property
    def bits_interval(self) -> tuple[float, float] | None:
        """The loss's interval in bits per byte: over the same text the two are proportional."""
        if self.interval is None or self.bits_per_byte is None or not self.loss:
            return None
        ratio = self.bits_per_byte / self.loss
        return self.interval[0] * ratio, self.interval[1] * ratio


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
        """Read a run's folder. Raises `ArtifactError` when there is none, or its manifest is not a table."""
        try:
            state = run.read_state()
        except ValueError as error:
            raise ArtifactError(
                "the run's manifest is not JSON", where=run.state_path, expected="a table", fix=str(error)
            ) from error
        if not run.state_path.is_file() or not isinstance(state, dict):
            raise ArtifactError(
                "there is no run in this folder",
                where=run.folder,
                expected=f"a folder with {run.state_path.name}",
                fix="`ratoon runs` lists the runs",
            )
        metrics = tuple(record for record in run.read_metrics() if isinstance(record, dict))
        lines = sum(bool(line.strip()) for line in _text(run.metrics_path).splitlines())
        ledger = _text(run.folder / "ledger.json")
        return cls(
            run=run,
            state=state,
            metrics=metrics,
            ledger=json.loads(ledger) if ledger else None,
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
        return [f"ratoon pretrain {self.run.recipe_path} --resume"] if self.recipe else []

    @property
    def log_tail(self) -> list[str]:
        """The last lines of the log."""
        return list(self.log[-LOG_LINES:])

    # -- figures ---------------------------------------------------------------------------------------------------

    def pairs(self, kind: str, key: str) -> list[tuple[float, float]]:
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
        found = (Measurement.of(record, record.get("step", 0)) for record in self.metrics if record["kind"] == "eval")
        return [one for one in found if one is not None]

    @property
    def final(self) -> Measurement | None:
        """The measurement of the model that the run left behind: that of a finished run only."""
        table = self.state.get("evaluation")
        if self.status != "done" or not isinstance(table, dict):
            return None
        return Measurement.of(table, _integer(self.state.get("step")) or 0)

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
        """Tokens of the vocabulary."""
        return _integer(self._table("data").get("vocab_size"))

    @property
    def uniform(self) -> Measurement | None:
        """A uniform guess over the vocabulary, its bits per byte by the tokens and bytes of the shown measurement."""
        if not self.vocab_size:
            return None
        loss = math.log(self.vocab_size)
        like = self.shown
        bits = None if like is None or like.bits_per_byte is None or not like.loss else like.bits_per_byte / like.loss
        return Measurement(0, loss, float(self.vocab_size), None if bits is None else bits * loss, None, None)

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
        known = _number(self.state.get("seconds")) if self.status == "done" else None
        return known if known is not None else self._last("time_seconds")

    @property
    def tokens(self) -> int | None:
        """Tokens learned from."""
        known = _integer(self.state.get("tokens")) if self.status == "done" else None
        return known if known is not None else _integer(self._last("tokens"))

    @property
    def steps(self) -> int | None:
        """Steps of training done."""
        known = _integer(self.state.get("steps")) if self.status == "done" else None
        return known if known is not None else self.last_step

    @property
    def passes(self) -> float | None:
        """Passes over the training part, of a finished run."""
        return _number(self.state.get("passes")) if self.status == "done" else None

    @property
    def skipped_steps(self) -> int:
        """Steps left out for a float16 overflow."""
        found = self.pairs("train", "skipped_steps")
        return int(found[-1][1]) if found else 0

    # -- what it is made of ----------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int | None:
        """Parameters of the model."""
        return _integer(self._table("model").get("parameters"))

    @property
    def sources(self) -> list[str]:
        """Where the text comes from."""
        found = self._table("data").get("sources")
        return [str(source) for source in found] if isinstance(found, list) else []

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
            if record.get("kind") != "sample":
                continue
            prompt, step = str(record.get("prompt", "")), int(record.get("step", 0))
            number = seen[prompt, step] = seen.get((prompt, step), 0) + 1  # a prompt may stand twice in the recipe
            texts.setdefault((prompt, number), []).append((step, str(record.get("text", ""))))
        return [Sample(prompt, tuple(sorted(found, key=lambda one: one[0]))) for (prompt, _), found in texts.items()]

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


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _account(name: str, table: dict[str, Any]) -> Account:
    counts = (_integer(table.get(what)) or 0 for what in ("documents", "bytes", "tokens"))
    return Account(name, *counts, places=tuple(str(place) for place in table.get("places", ())))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _reduced(pairs: list[tuple[float, float]], how: Any) -> tuple[float, int] | None:
    values = [value for _, value in pairs if math.isfinite(value)]
    return (float(how(values)), len(values)) if values else None


# -- curves ------------------------------------------------------------------------------------------------------------

CURVES = (
    ("loss", "loss"),
    ("learning_rate", "learning_rate"),
    ("throughput", "tokens_per_second"),
    ("memory", "memory_bytes"),
    ("gradient_norm", "grad_norm"),
)
SCALES = {"memory": 1e-6}


@dataclass(frozen=True)
class _Curve:
    """A curve to show: the training records under one key, and for the loss the held-out points."""

    name: str
    x: plots.Floats
    y: plots.Floats
    held_x: plots.Floats
    held_y: plots.Floats


def _curves(records: Records) -> list[_Curve]:
    curves = []
    for name, key in CURVES:
        x, y = plots.finite(records.pairs("train", key))
        held = records.pairs("eval", "loss") if name == "loss" else []
        held_x, held_y = plots.finite(held)
        if len(x) or len(held_x):
            curves.append(_Curve(name, x, y * SCALES.get(name, 1.0), held_x, held_y))
    return curves


def _picture(curve: _Curve, records: Records, say: Any) -> dict[str, Any]:
    """What the template needs of a curve: the pictures (wide and narrow), the legend, a label for screen readers."""
    window = plots.smoothing_window(len(curve.y)) if curve.name == "loss" else 1
    layers = []
    legend = []
    if len(curve.x):
        if window > 1:
            layers.append(plots.Curve(curve.x, curve.y, "train", "thin"))
            legend.append(("thin", say("legend_train")))
            legend.append(("line", say("legend_smooth", n=window)))
        elif curve.name == "loss":
            legend.append(("line", say("legend_train")))
        layers.append(plots.Curve(curve.x, plots.smooth(curve.y, window)))
    best = records.best if curve.name == "loss" else None
    uniform = records.uniform if curve.name == "loss" else None
    if len(curve.held_x):
        layers.append(plots.Curve(curve.held_x, curve.held_y, "held-out", "points"))
        legend.append(("points", say("legend_held_out")))
        if best is not None:
            legend.append(("ring", say("legend_best", loss=f"{best.loss:.4f}", step=whole(best.step))))
    if uniform is not None:
        legend.append(("level", say("legend_uniform", loss=f"{uniform.loss:.4f}")))
    log = curve.name in ("loss", "gradient_norm") and plots.wants_log(curve.y)
    if log:
        legend.append(("none", say("log_axis")))

    def frame(width: int, height: int) -> plots.Frame:
        return plots.Frame(
            width,
            height,
            log=log,
            from_zero=curve.name != "loss",
            level=None if uniform is None else uniform.loss,
            mark=None if best is None else (float(best.step), best.loss),
            mark_text="" if best is None else f"{best.loss:.3f}",
        )

    shapes = {"wide": WIDE, "narrow": NARROW} if curve.name == "loss" else {"small": (510, 230)}
    pictures = {shape: plots.draw(layers, frame(*wh), key=f"{curve.name}-{shape}") for shape, wh in shapes.items()}
    x, y = (curve.x, curve.y) if len(curve.x) else (curve.held_x, curve.held_y)
    label = say(
        "curve_label",
        title=say(curve.name),
        first=figure(y[0]),
        start=whole(x[0]),
        last=figure(y[-1]),
        end=whole(x[-1]),
        low=figure(y.min()),
        high=figure(y.max()),
    )
    thinned = len(plots.envelope(x, y)[0]) < len(x)
    return {
        "name": curve.name,
        "pictures": pictures,
        "legend": legend,
        "label": label,
        "count": say("thinned" if thinned else "records", n=whole(len(x))),
    }
