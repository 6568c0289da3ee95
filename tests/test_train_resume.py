"""Resumed = uninterrupted, bit for bit, whatever ended the first part; and what may not be resumed is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import little
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.store.runs import Run
from ratoon.train import checkpoint

STEPS = 9
CASES = {
    "adamw float32": {"optimizer": "adamw", "precision": "float32"},
    "adamw bf16": {"optimizer": "adamw", "precision": "bf16"},
    "moments in bfloat16": {"optimizer": "adamw", "precision": "bf16", "moments": "bfloat16"},
    "muon float32": {"optimizer": "muon", "precision": "float32"},
    "muon bf16": {"optimizer": "muon", "precision": "bf16"},
    "muon autocast-fp16": {"optimizer": "muon", "precision": "autocast-fp16"},
    "cosine after a warm-up": {"schedule": "cosine", "warmup_steps": 4, "final_fraction": 0.1},
    "micro-batches": {"micro_batch_rows": 3, "precision": "bf16"},
}


def at(step: int, action: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """A log that does something when the record of `step` arrives, once the update is made."""

    def log(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == step:
            action()

    return log


class Killed(Exception):
    """Stands for a process that dies without another word."""


def die() -> None:
    raise Killed


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(run: Run, action: Callable[[], Any], error: type[BaseException], **changes: Any) -> None:
    """The first part of a run: ends after step 5."""
    with pytest.raises(error):
        little.go(run=run, steps=STEPS, log=at(5, action), **changes)


ENDS: dict[str, tuple[Callable[[], Any], type[BaseException], int]] = {
    "Ctrl-C": (ctrl_c, KeyboardInterrupt, 5),
    "SIGTERM": (terminate, KeyboardInterrupt, 5),
    "death": (die, Killed, 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("end", ENDS)
def test_resumed_is_uninterrupted(tmp_path: Path, case: str, end: str) -> None:
    action, error, goes_on_from = ENDS[end]
    changes = CASES[case]
    whole = little.go(steps=STEPS, **changes)
    run = little.new_run(tmp_path / "a")
    interrupted(run, action, error, checkpoint_every_steps=3, **changes)
    rest = little.go(little.model(seed=99), run=run, steps=STEPS, resume=True, checkpoint_every_steps=3, **changes)
    assert rest.told(f"going on from step {goes_on_from}")
    assert not rest.told("not bit for bit")
    assert little.same(whole.weights, rest.weights)
    assert rest.losses() == whole.losses()[goes_on_from:]
    assert [r["learning_rate"] for r in rest.records] == [r["learning_rate"] for r in whole.records][goes_on_from:]
    assert rest.records[-1]["tokens"] == whole.records[-1]["tokens"]


def test_the_real_loader_goes_on_where_it_was(tmp_path: Path) -> None:
    """More steps than one pass over the text, so that the resumed part begins in another pass."""
    loader = little.real_loader(tmp_path / "shards")
    steps = 40
    assert loader.passes(steps) > 1.5 and loader.passes(29) > 1
    whole = little.go(loader=loader, steps=steps)
    run = little.new_run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        little.go(loader=little.real_loader(tmp_path / "shards"), run=run, steps=steps, log=at(29, ctrl_c))
    rest = little.go(loader=little.real_loader(tmp_path / "shards"), run=run, steps=steps, resume=True)
    assert little.same(whole.weights, rest.weights)


def test_experts_and_frozen_parameters_resume_too(tmp_path: Path) -> None:
    def made(seed: int) -> Any:
        model = little.model(seed, moe=little.EXPERTS, tied_embeddings=False)
        torch.manual_seed(0)
        with torch.no_grad():
            model.embed.weight.copy_(torch.randn_like(model.embed.weight))
        model.embed.weight.requires_grad_(False)
        return model

    before = made(1).embed.weight.clone()
    whole = little.go(made(1), steps=STEPS, precision="bf16")
    run = little.new_run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        little.go(made(1), run=run, steps=STEPS, precision="bf16", log=at(5, ctrl_c))
    rest = little.go(made(99), run=run, steps=STEPS, precision="bf16", resume=True)
    assert little.same(whole.weights, rest.weights)
    assert torch.equal(rest.weights["embed.weight"], before)  # frozen: bit for bit, not rounded to bfloat16


def test_a_file_asks_for_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    outcome = little.go(run=run, steps=6, log=at(2, (run.folder / "save").touch), keep_checkpoints=5)
    assert outcome.result is not None and outcome.result.steps == 6
    assert [path.name for path in checkpoint.complete(run.checkpoints)] == ["step-00000002", "step-00000006"]
    assert not (run.folder / "save").exists()


def test_a_signal_asks_for_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    before = signal.getsignal(signal.SIGUSR1)
    little.go(run=run, steps=6, log=at(4, lambda: os.kill(os.getpid(), signal.SIGUSR1)), keep_checkpoints=5)
    assert [path.name for path in checkpoint.complete(run.checkpoints)] == ["step-00000004", "step-00000006"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        little.go(run=run, steps=6, log=at(2, twice))
    assert checkpoint.complete(run.checkpoints) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_asked_to_stop_after_the_last_step_nothing_is_lost(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    interrupted(run, die, Killed, checkpoint_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        little.go(run=run, steps=STEPS, resume=True, log=at(STEPS, ctrl_c))
    rest = little.go(run=run, steps=STEPS, resume=True)
    assert rest.result is not None and rest.result.steps == STEPS
    assert little.same(rest.weights, little.go(steps=STEPS).weights)


# -- the records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("every", [1, 2])
def test_metrics_have_no_gap_and_no_double(tmp_path: Path, end: str, every: int) -> None:
    """`metrics.jsonl` of an interrupted and resumed run holds what that of an uninterrupted one holds."""
    action, error, _ = ENDS[end]

    def part(run: Run, resume: bool, log: Any = None) -> None:
        def both(record: dict[str, Any]) -> None:
            run.append_metrics(record)
            if log is not None:
                log(record)

        little.go(
            run=run,
            resume=resume,
            steps=12,
            log=both,
            log_every_steps=every,
            evaluate=lambda step, model: {"loss": float(model.embed.weight.double().sum()) + 100 - step},
            sample=lambda step, model: [{"prompt": "a", "text": str(step)}, {"prompt": "b", "text": str(step)}],
            evaluate_every_steps=4,
            sample_every_steps=3,
            checkpoint_every_steps=5,
        )

    def facts(run: Run) -> list[Any]:
        clocks = ("time_seconds", "tokens_per_second", "memory_bytes")
        return [{k: v for k, v in record.items() if k not in clocks} for record in run.read_metrics()]

    whole, run = little.new_run(tmp_path / "whole"), little.new_run(tmp_path / "a")
    part(whole, False)
    for step in (2, 6, 8, 12):  # before the first checkpoint, between two, at an evaluation, at the end
        with pytest.raises(error):
            part(run, step != 2, at(step, action))
    with open(run.metrics_path, "a", encoding="utf-8") as handle:
        handle.write('{"step": 12, "kind": "tra')  # the line that a crash cut
    part(run, True)
    assert facts(run) == facts(whole)


def test_time_and_best_go_on(tmp_path: Path) -> None:
    losses = {0: 9.0, 2: 5.0, 4: 7.0, 6: 8.0, 8: 6.0, 9: 6.5}
    run = little.new_run(tmp_path / "a")
    facts: dict[str, Any] = {"evaluate": lambda step, model: {"loss": losses[step]}, "evaluate_every_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        little.go(run=run, steps=STEPS, log=at(5, ctrl_c), keep_checkpoints=1, **facts)
    first = checkpoint.load(run.checkpoints / "step-00000005")[2]
    rest = little.go(run=run, steps=STEPS, resume=True, keep_checkpoints=1, **facts)
    assert rest.result is not None
    assert (rest.result.best_loss, rest.result.best_step) == (5.0, 2)
    assert rest.result.seconds > first["seconds"] > 0
    assert rest.records[0]["time_seconds"] > first["seconds"]
    best = checkpoint.pointed(run.checkpoints, "best")
    assert best is not None and best.name == "step-00000002"


# -- what is refused, and what is said ---------------------------------------------------------------------------------


def resumable(tmp_path: Path, **changes: Any) -> Run:
    run = little.new_run(tmp_path / "a")
    interrupted(run, ctrl_c, KeyboardInterrupt, **changes)
    return run


def test_other_data_is_refused(tmp_path: Path) -> None:
    run = resumable(tmp_path)
    with pytest.raises(ArtifactError, match="other data: seed changed"):
        little.go(run=run, loader=little.Rows(seed=5), steps=STEPS, resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.02), ("optimizer", "adamw"), ("weight_decay", 0.0), ("beta2", 0.9), ("precision", "bf16"),
        ("schedule", "constant"), ("warmup_steps", 1), ("clip_norm", 0.5), ("momentum", 0.5), ("seed", 7),
    ],
)  # fmt: skip
def test_other_numbers_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    run = resumable(tmp_path)
    with pytest.raises(ConfigError, match=f"train.{key} is "):
        little.go(run=run, steps=STEPS, resume=True, **{key: value})


def test_another_model_is_refused(tmp_path: Path) -> None:
    run = resumable(tmp_path)
    with pytest.raises(ArtifactError, match="has the shape"):
        little.go(little.model(mlp_width=50), run=run, steps=STEPS, resume=True)
    with pytest.raises(ArtifactError, match="the checkpoint lacks"):
        little.go(little.model(layers=3), run=run, steps=STEPS, resume=True)


def test_more_steps_are_allowed_and_said(tmp_path: Path) -> None:
    run = resumable(tmp_path)
    outcome = little.go(run=run, steps=STEPS + 2, resume=True)
    assert outcome.told("not bit for bit") and outcome.told(f"steps was {STEPS}, is {STEPS + 2}")
    assert outcome.result is not None and outcome.result.steps == STEPS + 2


def test_other_micro_batches_are_allowed_and_said(tmp_path: Path) -> None:
    run = resumable(tmp_path)
    outcome = little.go(run=run, steps=STEPS, resume=True, micro_batch_rows=2)
    assert outcome.told("micro_rows was 8, is 2")
    assert little.largest_difference(outcome.weights, little.go(steps=STEPS).weights) < 1e-4


def test_micro_batches_found_from_memory_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with more memory free must not change the numbers of a resumed run."""
    run = resumable(tmp_path, micro_batch_rows=2, precision="bf16")
    rest = little.go(run=run, steps=STEPS, resume=True, precision="bf16")
    assert not rest.told("not bit for bit")
    assert little.same(rest.weights, little.go(steps=STEPS, micro_batch_rows=2, precision="bf16").weights)


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    run = resumable(tmp_path)
    with pytest.raises(ConfigError, match="has checkpoints already"):
        little.go(run=run, steps=STEPS)


def test_without_a_checkpoint_it_starts_from_the_beginning(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    run.append_metrics({"step": 3, "kind": "train"})
    outcome = little.go(run=run, steps=4, resume=True)
    assert outcome.told("starting from the beginning; 1 records")
    assert little.same(outcome.weights, little.go(steps=4).weights)
    assert list(run.read_metrics()) == []


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    first = little.go(run=run, steps=4)
    again = little.go(little.model(seed=99), run=run, steps=4, resume=True)
    assert again.records == []
    assert little.same(first.weights, again.weights)
