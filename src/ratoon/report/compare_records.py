"""What is on record of finished fine-tuned runs that are laid side by side: figures, cost, and how they differ.

Decides which runs can be compared at all (one task, the same test rows), which of their settings are told, and which
runs are the same but for their seed. Whether one is surely better is counted in `evaluate/`; reading an evaluation is
`task_records.py`'s, the page `compare_page.py`'s.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.base.settings import read_yaml
from ratoon.report.task_records import EVALUATION, Difference, Evaluation, Figure, number
from ratoon.store.runs import Run

SIZES = ("rank", "initial_rank", "tokens", "reduction", "freeze_layers")
"""Settings of a method that say how much it trains: told wherever a run has them."""
OWN = ("name", "seed", "train.seed", "train.steps", "language")
"""Keys of a recipe that have a column of their own, or say nothing of how a run learned."""
ROWS_FROM = ("test", "test_fraction", "validation_fraction", "where", "group", "part", "limit_test_rows")
"""Settings of the data that decide which rows are the test rows."""
MOST_LETTERS = 28
"""Of a setting's value that is told."""


@dataclass(frozen=True)
class TunedRun:
    """A finished run with its measures. `recipe`: the resolved recipe as a flat table with dotted keys; sizes in bytes,
    `passes` over the rows; `kept`: whether each test row's answer is on record."""

    name: str
    facts: dict[str, Any]
    recipe: dict[str, Any]
    evaluation: Evaluation
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    disk_bytes: int

    @classmethod
    def read(cls, run: Run) -> TunedRun:
        """From the run's folder. Raises `ConfigError` for a run that is not finished, was not fine-tuned for a task, or
        has no test figures."""
        facts = run.read_state()
        status = str(facts.get("status", "unknown"))
        task = facts.get("task")
        if not isinstance(task, dict):
            raise ConfigError(
                f"the run '{run.name}' was not fine-tuned for a task",
                where=run.state_path,
                expected="a run of `ratoon finetune`",
                fix="pretrained models are measured by `ratoon evaluate`",
            )
        if status != "done":
            raise ConfigError(
                f"the run '{run.name}' is not finished: its status is {status}",
                where=run.state_path,
                expected="status done",
                fix=f"go on with it: ratoon finetune {run.recipe_path} --resume",
            )
        train = [one for one in run.read_metrics() if one.get("kind") == "train"]
        speeds = [found for one in train if (found := number(one.get("tokens_per_second"))) is not None]
        memory = [found for one in train if (found := number(one.get("memory_bytes"))) is not None]
        return cls(
            run.name,
            facts,
            flat(read_yaml(run.recipe_path)),
            _evaluation(run, facts),
            statistics.median(speeds[1:] or speeds) if speeds else None,  # the first step also compiles
            int(max(memory)) if memory else None,
            _bytes_below(run.model),
        )

    @property
    def task(self) -> str:
        """The task's kind."""
        return str(self.facts["task"].get("kind"))

    @property
    def main(self) -> Figure:
        """The main figure."""
        return self.evaluation.values[0]

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return int(self.recipe.get("seed", 0))

    @property
    def language(self) -> str:
        """The language of the texts."""
        return str(self.recipe.get("language", "en"))

    @property
    def method(self) -> dict[str, Any]:
        """The method's table, as the recipe gives it."""
        return {key.removeprefix("method."): value for key, value in self.recipe.items() if key.startswith("method.")}

    @property
    def kept(self) -> bool:
        """Whether there is a line of predictions.jsonl for each test row."""
        return not self.evaluation.torn and len(self.evaluation.predictions) == self.evaluation.n


@dataclass(frozen=True)
class Lane:
    """One line of the table: a run, or runs that differ in their seed alone, whose figures are means (`spread`: the
    standard deviation of the score over them, n - 1). `to_best`: the line less the best one."""

    name: str
    runs: list[str]
    seeds: list[int]
    method: str
    settings: str
    score: Figure
    spread: float | None
    trainable_parameters: int | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    disk_bytes: int | None
    seconds: float | None
    passes: float | None
    steps: int | None
    to_best: Difference | None = None

    def as_dict(self) -> dict[str, Any]:
        """The line as plain values."""
        apart = self.to_best
        return {
            "name": self.name,
            "runs": self.runs,
            "seeds": self.seeds,
            "method": self.method,
            "settings": self.settings,
            "score": self.score.value,
            "interval": None if self.score.interval is None else list(self.score.interval),
            "spread": self.spread,
            "n": self.score.n,
            "trainable_parameters": self.trainable_parameters,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "passes": self.passes,
            "steps": self.steps,
            "to_best": None if apart is None else {
                "difference": apart.difference,
                "interval": None if apart.interval is None else list(apart.interval),
                "p_value": apart.p_value,
                "n": apart.n,
                "signature": apart.signature,
            },
        }  # fmt: skip


@dataclass(frozen=True)
class Note:
    """Something that must be said of a comparison: a phrase of `compare_phrases.py`, and what stands in it."""

    key: str
    values: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, the best first. `notes`: what must be said of it."""

    task: str
    measure: str
    figure: Figure
    n_rows: int
    lanes: list[Lane]
    notes: list[Note] = field(default_factory=list)

    @property
    def seeded(self) -> bool:
        """Whether some line is the mean over several seeds."""
        return any(len(lane.runs) > 1 for lane in self.lanes)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain values."""
        return {
            "task": self.task,
            "measure": self.measure,
            "figure": self.figure.name,
            "higher_is_better": self.figure.higher_is_better,
            "signature": self.figure.signature,
            "n_rows": self.n_rows,
            "runs": [lane.as_dict() for lane in self.lanes],
            "notes": [{"what": note.key, **note.values} for note in self.notes],
        }


def flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A table of tables with dotted keys; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


# -- whether runs can be compared --------------------------------------------------------------------------------------


def expect_comparable(runs: Sequence[TunedRun]) -> list[Note]:
    """Raise `ConfigError` for runs of different tasks or figures, `DataError` for those measured on different rows;
    returns what could not be looked at, and what else makes them unlike."""
    first = runs[0]
    for one in runs[1:]:
        if one.task != first.task:
            raise ConfigError(
                f"'{first.name}' was fine-tuned for {first.task}, '{one.name}' for {one.task}",
                where="command line",
                expected="runs of one task",
            )
        for what, ours, theirs in (
            ("main figure", first.main.name, one.main.name),
            ("signature", first.main.signature, one.main.signature),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"'{first.name}' and '{one.name}' cannot be compared: their {what} is {ours} and {theirs}",
                    where="command line",
                    expected="runs measured in the same way",
                    fix="measure both with this release: ratoon evaluate RUN",
                )
    said = [note for one in runs[1:] if (note := _expect_same_rows(first, one)) is not None]
    types = {str(one.evaluation.facts.get("dtype")) for one in runs if one.evaluation.facts.get("dtype")}
    return [*said, Note("note_types", {"types": ", ".join(sorted(types))})] if len(types) > 1 else said


def _expect_same_rows(one: TunedRun, other: TunedRun) -> Note | None:
    """Raise `DataError` where two runs were measured on different rows; a note where that cannot be known."""
    fix = (
        "give both the same data.test; a share of the training rows (data.test_fraction) is drawn from the seed; "
        f"after `ratoon evaluate RUN FILE` measure the run's own rows again: ratoon evaluate {other.name}"
    )
    different = f"'{one.name}' and '{other.name}' were measured on different rows"
    if one.evaluation.n != other.evaluation.n:
        raise DataError(
            f"{different}: {one.evaluation.n:,} and {other.evaluation.n:,}",
            where=f"{one.name}, {other.name}", expected="runs measured on the same test rows", fix=fix,
        )  # fmt: skip
    if one.kept and other.kept:
        at = _first_unlike(one.evaluation.predictions, other.evaluation.predictions)
        if at is not None:
            places = [str(run.evaluation.predictions[at].get("place")) for run in (one, other)]
            raise DataError(
                f"{different}: row {at + 1:,} is {places[0]} and {places[1]}",
                where=f"{one.name}, {other.name}", expected="runs measured on the same test rows", fix=fix,
            )  # fmt: skip
        return None
    origins = [{key: run.recipe.get(f"data.{key}") for key in ROWS_FROM} for run in (one, other)]
    for origin, run in zip(origins, (one, other), strict=True):
        if not origin["test"] or origin["limit_test_rows"]:
            origin["seed"] = run.seed
    if origins[0] != origins[1]:
        told = [", ".join(f"{key} {value}" for key, value in origin.items() if value) for origin in origins]
        raise DataError(
            f"{different}: {told[0]}; {told[1]}",
            where=f"{one.name}, {other.name}", expected="runs measured on the same test rows", fix=fix,
        )  # fmt: skip
    return Note("note_rows", {"one": one.name, "other": other.name})


def _first_unlike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int | None:
    """Where two files of predictions stop being about the same rows: what is expected must be equal, and what is read
    or, where the runs' templates read it differently, the row's place."""
    for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        same = one.get("input") == other.get("input") or one.get("place") == other.get("place")
        if not same or one.get("expected") != other.get("expected"):
            return at
    return None


# -- how runs differ ---------------------------------------------------------------------------------------------------


def by_seed(runs: Sequence[TunedRun]) -> list[list[TunedRun]]:
    """The runs in groups whose recipes are equal but for the seed (and the name), in the order of their first."""
    groups: dict[str, list[TunedRun]] = {}
    for run in runs:
        told = {key: value for key, value in run.recipe.items() if key not in ("name", "seed", "train.seed")}
        groups.setdefault(json.dumps(told, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def method_words(settings: Sequence[Mapping[str, Any]], usual: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each run's method in words, from all of its settings and from those a method has when nothing is told: its kind,
    how large it is, and whatever is not as usual or differs between runs of the same kind."""
    words = []
    for own, default in zip(settings, usual, strict=True):
        alike = [one for one in settings if one.get("kind") == own.get("kind")]
        said = [str(own.get("kind", "full"))]
        for key, value in own.items():
            differs = value != default.get(key) or any(one.get(key) != value for one in alike)
            if key != "kind" and value not in (None, False, 0, []) and (differs or key in SIZES):
                said.append(key if value is True else f"{key}={_plain(value)}")
        words.append(" ".join(said))
    return words


def other_words(runs: Sequence[TunedRun]) -> list[str]:
    """What else differs between the runs' recipes, for each run."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    told = [key for key in keys if key not in OWN and not key.startswith("method.")]
    unlike = [key for key in told if any(run.recipe.get(key) != runs[0].recipe.get(key) for run in runs)]
    if len({str(run.recipe.get("train.steps")) for run in runs}) > 1:  # these follow from the steps unless told
        unlike = [key for key in unlike if key not in ("train.warmup_steps", "train.evaluate_every_steps")]
    return [
        ", ".join(f"{key.removeprefix('train.')}={_plain(run.recipe.get(key))}" for key in unlike if key in run.recipe)
        for run in runs
    ]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    words = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    return words if len(words) <= MOST_LETTERS else words[: MOST_LETTERS - 1] + "…"


# -- lines -------------------------------------------------------------------------------------------------------------


def lane(group: Sequence[TunedRun], score: Figure, method: str, settings: str) -> Lane:
    """The line of a run, or of several that differ in their seed: figures of cost are their means, memory the most."""
    scores = [run.main.value for run in group if run.main.value is not None]
    spread = statistics.stdev(scores) if len(scores) == len(group) > 1 else None
    told = [run.facts for run in group]
    memory = [run.peak_memory_bytes for run in group if run.peak_memory_bytes is not None]
    steps = _mean([number(one.get("steps")) for one in told])
    disk = _mean([float(run.disk_bytes) for run in group])
    learned = number((told[0].get("model") or {}).get("trained"))
    return Lane(
        group[0].name if len(group) == 1 else _shared_name([run.name for run in group]),
        [run.name for run in group],
        [run.seed for run in group],
        method,
        settings,
        score,
        spread,
        None if learned is None else int(learned),
        _mean([run.tokens_per_second for run in group]),
        max(memory) if memory else None,
        round(disk) if disk else None,
        _mean([number(one.get("seconds")) for one in told]),
        _mean([number(one.get("passes")) for one in told]),
        None if steps is None else round(steps),
    )


def mean_figure(group: Sequence[TunedRun]) -> Figure:
    """The mean of the runs' main figures, without an interval; of one run the figure as it stands."""
    main = group[0].main
    if len(group) == 1:
        return main
    value = _mean([run.main.value for run in group])
    return Figure(main.name, value, None, main.n, main.unit, main.signature, main.higher_is_better)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _shared_name(names: list[str]) -> str:
    """What the names begin with, without what joins a number to it."""
    shared = "".join(letters[0] for letters in takewhile(lambda some: len(set(some)) == 1, zip(*names, strict=False)))
    return shared.rstrip("-_.").removesuffix("seed").rstrip("-_.") or names[0]


def _bytes_below(folder: os.PathLike[str]) -> int:
    return sum(
        os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names
    )  # fmt: skip


def _evaluation(run: Run, facts: dict[str, Any]) -> Evaluation:
    """The run's evaluation with its predictions; where that folder is gone, the figures that the manifest keeps."""
    folder = run.folder / "evaluation"
    if (folder / EVALUATION).is_file():
        found = Evaluation.read(folder)
    else:
        kept = facts.get("evaluation")
        try:
            found = Evaluation.of({"measure": "", **kept} if isinstance(kept, dict) else None)
        except ArtifactError:
            found = None
    if found is None or found.main is None or found.main.value is None:
        raise ConfigError(
            f"the run '{run.name}' has no test figures",
            where=folder / EVALUATION,
            expected="a run with test rows (data.test, or data.test_fraction)",
            fix=f"measure it on a file: ratoon evaluate {run.name} FILE",
        )
    return found
