"""Which tasks there are, and how a recipe's table or a saved model's facts become one.

Decides the names of tasks. A task is loaded when it is asked for; a new one is its file and a line here.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Mapping
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.tasks.contract import Task

TASKS: dict[str, str] = {
    "generation": "ratoon.tasks.generation:Generation",
    "dialogue": "ratoon.tasks.dialogue:Dialogue",
    "extractive": "ratoon.tasks.answering:Extractive",
    "question-answering": "ratoon.tasks.answering:FreeAnswers",
    "translation": "ratoon.tasks.translation:Translation",
    "summarization": "ratoon.tasks.summarization:Summarization",
    "classification": "ratoon.tasks.classification:Classification",
    "multi-label": "ratoon.tasks.classification:MultiLabel",
    "tagging": "ratoon.tasks.tagging:Tagging",
    "pairs": "ratoon.tasks.pairs:Pairs",
    "pair-scoring": "ratoon.tasks.pairs:PairScoring",
    "scoring": "ratoon.tasks.scoring:Scoring",
    "preference": "ratoon.tasks.preference:Preference",
}
"""A task's kind, and where it is: module:class."""


def class_of(kind: str, *, where: str | os.PathLike[str] = "task.kind") -> type[Task[Any]]:
    """The task of that kind. Raises `ConfigError` for one that is unknown, with the nearest name."""
    if kind not in TASKS:
        near = difflib.get_close_matches(str(kind), TASKS, n=1)
        raise ConfigError(
            f"there is no task '{kind}'",
            where=where,
            expected=f"did you mean '{near[0]}'?" if near else f"one of {', '.join(TASKS)}",
        )
    module, _, name = TASKS[kind].partition(":")
    found: type[Task[Any]] = getattr(importlib.import_module(module), name)
    return found


def task_of(table: Mapping[str, Any], *, where: str | os.PathLike[str] = "recipe") -> Task[Any]:
    """The task of a recipe's table: `kind`, and the settings of that kind. Raises `ConfigError` as settings do."""
    if "kind" not in table:
        raise ConfigError("the task has no kind", where=where, expected=f"task.kind: one of {', '.join(TASKS)}")
    kind = class_of(table["kind"])
    settings = dict(table)
    del settings["kind"]
    if hasattr(table, "lines"):  # a table read from a file knows the lines of its keys
        kept = type(table)(settings)  # type: ignore[call-arg]
        kept.lines = table.lines  # type: ignore[attr-defined]
        settings = kept  # type: ignore[assignment]
    return kind(build(kind.settings_type, settings, where=where, within="task"))


def restored(facts: Mapping[str, Any], *, where: str | os.PathLike[str] = "manifest") -> Task[Any]:
    """The task that a saved model was trained for, from what `Task.facts` gave.

    Raises `ArtifactError` where it was saved by another version of the task, whose labels or masks may differ.
    """
    task = task_of({"kind": facts["kind"], **facts["settings"]}, where=where)
    if facts["version"] != task.version:
        raise ArtifactError(
            f"the model was trained for version {facts['version']} of the task {task.kind}",
            where=where,
            expected=f"version {task.version}",
            fix="train it again, or use the release that saved it",
        )
    task.restore(facts)
    return task
