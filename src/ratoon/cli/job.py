"""What every run has in common: a folder, a log, a state that says how it ended, a line that moves, and trackers.

What a run does between its begin and its end is `pretrain.py`'s and `finetune.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from ratoon.store.runs import Run
    from ratoon.train.device import World
    from ratoon.train.settings import TrainSettings

Talk = Callable[[str], None]
Log = Callable[[dict[str, Any]], None]


class Job:
    """One run, from its recipe to its page. Under `torchrun` every process has one; the first writes and talks."""

    verb = "pretrain"

    def __init__(self, run: Run, world: World, resume: bool, language: str) -> None:
        self.run, self.world, self.resume, self.language = run, world, resume, language

    def talk(self, sentence: str) -> None:
        """A sentence for people, and for the run's log."""
        if not self.world.first:
            return
        click.echo(sentence, err=True)
        with open(self.run.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")

    def state(self, **facts: Any) -> None:
        """Put facts into the run's manifest."""
        if self.world.first:
            self.run.write_state(**facts)

    def end(self, status: str, reason: str) -> None:
        """Say in the manifest and on the page how the run ended."""
        if self.world.first:
            self.state(status=status, reason=reason)
            self.page()

    def resume_command(self) -> str:
        """What a person types to go on."""
        return f"ratoon {self.verb} {self.run.recipe_path} --resume"

    def page(self) -> None:
        """Write the run's page."""
        from ratoon.report.page import write_page

        write_page(self.run, language=self.language)  # type: ignore[arg-type]

    @contextmanager
    def records(self, settings: TrainSettings, track: tuple[str, ...], recipe: dict[str, Any]) -> Iterator[Log]:
        """Where the loop's records go: metrics, trackers, and the line that moves; closed however training ends."""
        from ratoon.cli.progress import TrainingLine
        from ratoon.train.track import trackers

        line = TrainingLine(settings.steps, settings.budget_minutes)
        tracker = trackers(track, self.run, recipe, talk=self.talk) if self.world.first else None  # type: ignore[arg-type]

        def log(record: dict[str, Any]) -> None:
            assert tracker is not None
            tracker.log(record)
            line(record)

        status: Literal["done", "failed", "interrupted"] = "failed"
        try:
            yield log
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            line.close()
            if tracker is not None:
                tracker.close(status)


def run_job(name: str, root: str | Path, resume: bool, make: Callable[[Run, World], Any]) -> Run:
    """Open the run `name`, let `make` give its job, and see it through; its manifest says how it ended.

    Raises `RatoonError` for whatever goes wrong, `KeyboardInterrupt` after saving.
    """
    from ratoon.base.errors import RatoonError
    from ratoon.store.runs import Run
    from ratoon.train.device import World

    world = World()
    try:
        if world.first:
            _open_run(name, root, resume)
        world.wait()
        job = make(Run(Path(root) / name), world)
        try:
            job.go()
        except KeyboardInterrupt:
            job.end("interrupted", f"stopped by the user; `{job.resume_command()}` goes on")
            raise
        except RatoonError as error:
            job.end("failed", error.found)
            raise
        found: Run = job.run
        return found
    finally:
        world.close()


def _open_run(name: str, root: str | Path, resume: bool) -> None:
    from ratoon.store.runs import Run
    from ratoon.train.checkpoint import complete

    run = Run(Path(root) / name)
    if resume:
        Run.find(name, root)  # says which runs there are
    elif not run.state_path.exists() or complete(run.checkpoints):
        Run.create(name, root)  # refuses a name that is taken
    # else: a run of that name ended before there was anything to lose
