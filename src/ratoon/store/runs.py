"""A run's folder: recipe, metrics, checkpoints, the model, the page. Decides names and layout.

What the numbers mean is decided by who writes them.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError, storage_errors
from ratoon.store.atomic import sweep, write_json, write_text

RUNS = "runs"
_NAME = re.compile(r"\w[\w.\-]*")


class Run:
    """The folder of one run. Creating the object touches nothing; `create` makes the folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def recipe_path(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def state_path(self) -> Path:
        return self.folder / "manifest.json"

    @classmethod
    def create(cls, name: str, root: str | os.PathLike[str] = RUNS) -> Run:
        """A new run's folder; raises `ConfigError` for a bad name or one that is taken."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' cannot name a run", where="run", expected="letters, digits, . _ -")
        run = cls(Path(root) / name)
        if run.state_path.exists():
            raise ConfigError(
                f"the run '{name}' exists already",
                where=run.folder,
                expected="a new name",
                fix="add --resume to go on with it, or give another name with name=…",
            )
        with storage_errors(run.folder):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def find(cls, name: str, root: str | os.PathLike[str] = RUNS) -> Run:
        """The run of that name (or folder). Raises `ArtifactError` naming those that exist."""
        for folder in (Path(root) / name, Path(name)):
            if (folder / "manifest.json").is_file():
                return cls(folder)
        names = [run.name for run in cls.all(root)]
        near = difflib.get_close_matches(name, names, n=1)
        raise ArtifactError(
            f"there is no run '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            where=Path(root),
            expected=f"one of: {', '.join(names) or 'none yet'}",
            fix="`ratoon runs` lists them",
        )

    @classmethod
    def all(cls, root: str | os.PathLike[str] = RUNS) -> list[Run]:
        """Every run below `root`, oldest first."""
        folders = [path.parent for path in Path(root).glob("*/manifest.json")]
        return [
            cls(folder) for folder in sorted(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime)
        ]

    def write_state(self, **facts: Any) -> None:
        """Merge `facts` (status, step, figures, parents …) into the run's `manifest.json`."""
        write_json(self.state_path, {**self.read_state(), "kind": "run", **facts})

    def read_state(self) -> dict[str, Any]:
        """The run's `manifest.json`, or `{}` when it was never written."""
        if not self.state_path.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(self.state_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"the run's state is not readable: {error}",
                where=self.state_path,
                expected="JSON, as Ratoon wrote it",
                fix="put the file back from a copy, or start the run again under another name",
            ) from None
        return found

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`; a line is whole or, after a crash, ignored by `read_metrics`.

        Raises `StorageError` when the disk refuses; the lines before are whole then.
        """
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with storage_errors(self.metrics_path), open(self.metrics_path, "ab", buffering=0) as handle:
            before = handle.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that fills takes a part, and says so at the next
                    line = line[handle.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):  # what the disk said first is what is told
                    handle.truncate(before)
                raise

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The records of `metrics.jsonl` in order."""
        if not self.metrics_path.is_file():
            return
        with open(self.metrics_path, encoding="utf-8", errors="replace") as handle:
            for line in handle:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # the line that a crash cut

    def rewind_metrics(self, step: int) -> int:
        """Drop the records after `step` (a resumed run writes them again); returns how many were dropped."""
        if not self.metrics_path.is_file():
            return 0
        records = list(self.read_metrics())
        kept = [record for record in records if record.get("step", 0) <= step]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        # A line that a crash cut has no end: the next record would be glued to it and lost.
        if text != self.metrics_path.read_text(encoding="utf-8", errors="replace"):
            write_text(self.metrics_path, text)
        return len(records) - len(kept)

    def sweep(self) -> list[str]:
        """Mend what a killed process left in this run's folders; one sentence for each thing done."""
        return [*sweep(self.folder), *sweep(self.checkpoints)]
