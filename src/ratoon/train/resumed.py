"""What must be as it was for a run to go on: its data, and the settings that decide its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.train.settings import FREE_ON_RESUME, LENGTH, TrainSettings


def expect_same(
    state: dict[str, Any], loader_state: dict[str, Any], settings: TrainSettings, folder: Path
) -> list[str]:
    """Compare a checkpoint's state with the loader and the settings of now; returns what changed of the run's length,
    which is free but moves the schedule.

    Raises `ArtifactError` for other data, `ConfigError` for a setting that decides the numbers.
    """
    then, now = state["loader"], json.loads(json.dumps(loader_state))
    changed = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    if changed:
        raise ArtifactError(
            f"the resumed run would see other data: {', '.join(changed)} changed",
            where=folder,
            expected=", ".join(f"{key}={then.get(key)!r}" for key in changed),
            fix="resume with the data the run was started with, or start a new run with init: from this one",
        )
    then, now = state["settings"], settings.model_dump(mode="json")
    for key in sorted(now.keys() - FREE_ON_RESUME):
        if now[key] != then.get(key):
            raise ConfigError(
                f"train.{key} is {now[key]!r}, but the run was started with {then.get(key)!r}",
                where=folder,
                fix="resume with the recipe in the run's folder, or start a new run",
            )
    return [f"{key} was {then[key]}, is {now[key]}" for key in sorted(LENGTH) if now[key] != then[key]]
