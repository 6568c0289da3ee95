"""The one loop: Batch -> objective -> backward -> update -> record.

Decides the order of things in a step, and when to record, evaluate, save and stop. What a batch is comes from the
loader, what is learned from the objective, what an evaluation is from a callback; none of them is known here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError, NumericError
from ratoon.data.batch import Batch
from ratoon.model.allocator import tune_allocator
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import Parent
from ratoon.store.runs import Run
from ratoon.train import checkpoint
from ratoon.train.compiled import compile_model
from ratoon.train.device import Place, World, find_place, fit_rows, memory_bytes
from ratoon.train.loss import Inputs, next_token
from ratoon.train.optim import Optimizer, group_parameters
from ratoon.train.schedule import share
from ratoon.train.settings import TrainSettings
from ratoon.train.stop import Wishes
from ratoon.train.weights import FlatWeights

Objective = Callable[[Transformer, Inputs], tuple[Tensor, Tensor]]
Record = dict[str, Any]
EVALUATIONS_A_RUN = 10


class BatchSource(Protocol):
    """What the loop asks of a loader: the batch of a step, for this process's share of the rows."""

    def batch(self, step: int) -> Batch:
        """The rows of a step; a function of the step alone."""

    def state(self) -> dict[str, Any]:
        """What decides the batches, to be compared on resuming."""


@dataclass
class Hooks:
    """What happens around the steps. `evaluate` and `sample` give metrics and texts; `log` takes every record;
    `talk` takes sentences for people."""

    evaluate: Callable[[int, Transformer], Record] | None = None
    sample: Callable[[int, Transformer], list[Record]] | None = None
    log: Callable[[Record], None] = lambda record: None
    talk: Callable[[str], None] = lambda sentence: None


@dataclass
class Result:
    """How a run ended: `stopped` is "done" or "asked"."""

    steps: int
    tokens: int
    seconds: float
    stopped: str
    last: Record = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None


def train(
    model: Transformer,
    loader: BatchSource,
    settings: TrainSettings,
    run: Run | None = None,
    *,
    objective: Objective = next_token,
    hooks: Hooks | None = None,
    parents: list[Parent] | None = None,
    resume: bool = False,
) -> Result:
    """Train `model` on the loader's batches as `settings` say; afterwards its parameters are the float32 masters.

    With a `run`, checkpoints are written to it; `resume` goes on from its latest one, bit for bit as if nothing had
    happened. Raises `NumericError` at the first loss or gradient that is not finite, before the weights move;
    `KeyboardInterrupt` after saving when the user asked to stop; `StorageError` when the disk refuses.
    """
    world = World()
    try:
        session = _Session(model, loader, settings, run, objective, hooks or Hooks(), parents or [], world)
        if resume:
            session.resume()
        with Wishes(run.folder if run is not None and world.first else None) as wishes:
            result = session.go(wishes)
        session.finish()
        return result
    finally:
        world.close()


class _Session:
    """One call of `train`: the objects of a run and the counters that a checkpoint keeps."""

    def __init__(
        self,
        model: Transformer,
        loader: BatchSource,
        settings: TrainSettings,
        run: Run | None,
        objective: Objective,
        hooks: Hooks,
        parents: list[Parent],
        world: World,
    ) -> None:
        self.model, self.loader, self.settings, self.run = model, loader, settings, run
        self.objective, self.hooks, self.parents, self.world = objective, hooks, parents, world
        if settings.rows % world.size:
            raise ConfigError(
                f"{settings.rows} rows cannot be shared evenly by {world.size} processes",
                where="train.rows",
                expected=f"a multiple of {world.size}",
            )
        if settings.context_tokens > model.cfg.context_tokens:
            raise ConfigError(
                f"rows of {settings.context_tokens} tokens are longer than the model's context",
                where="train.context_tokens",
                expected=f"at most {model.cfg.context_tokens}",
            )
        allocator = tune_allocator()
        self.place: Place = find_place(settings)
        self.frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        model.to(self.place.device)
        groups = group_parameters(model, settings)
        self.weights = FlatWeights(groups, self.place.work)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.place.work)
        self.optimizer = Optimizer(self.weights, settings)
        model.recompute_blocks = settings.recompute_blocks
        trained = self.weights.master.numel()
        rows = settings.rows // world.size
        self.micro_rows = int(world.share(fit_rows(model.cfg, settings, self.place, rows, trained)))
        self.step = self.tokens = 0
        self.seconds_before = 0.0
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.scale = 2.0**16 if self.place.autocast == torch.float16 else 1.0
        self.good_steps = 0
        self.began = time.perf_counter()
        self.saved_at = self.began
        self.last: Record = {}
        if world.first:
            hooks.talk(f"{self.place.device}, {self.place.precision}; {allocator}")
            hooks.talk(compile_model(model, settings))
            parts = math.ceil(rows / self.micro_rows)
            hooks.talk(f"{settings.rows} rows a step in {parts * world.size} micro-batches of {self.micro_rows}")
        else:
            compile_model(model, settings)

    # -- one step ------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> tuple[float, float, float]:
        """One update of the weights; returns loss per unit of weight, gradient norm, learned positions.

        Loss and weight are summed over micro-batches and processes and divided once.
        """
        self.model.train()
        device = self.place.device
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, weight, positions
        parts = batch.split(math.ceil(len(batch.ids_BT) / self.micro_rows))
        for part in parts:
            inputs = Inputs.of(part, device)
            with self.place.computing():
                loss, weight = self.objective(self.model, inputs)
            (loss * self.scale if self.scale != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
            self.weights.collect()
            totals += torch.stack([loss.detach().double(), weight.double(), weight.new_tensor(part.valid_tokens)])
        self.world.add_up(totals)
        loss_sum, weight_sum, positions = totals.tolist()
        if not math.isfinite(loss_sum):
            raise self._not_finite("loss", loss_sum, batch)
        if weight_sum <= 0:
            raise NumericError(
                "no position of the step is learned: every weight is 0",
                where=f"step {self.step}, rows {', '.join(batch.rows[:4]) or 'unnamed'}",
                fix="look at the rows' masks with the data's ledger",
            )
        self.world.add_up(self.weights.summed)
        self.weights.summed *= 1.0 / (weight_sum * self.scale)
        norm = float(torch.linalg.vector_norm(self.weights.summed))
        if not math.isfinite(norm):
            if self.place.autocast == torch.float16:  # expected with float16: the scale was too high; try lower
                self.scale, self.good_steps = self.scale / 2, 0
                self.weights.clear()
                return loss_sum / weight_sum, norm, positions
            raise self._not_finite("gradient norm", norm, batch)
        clip = self.settings.clip_norm
        if clip is not None and norm > clip:
            self.weights.summed *= clip / norm
        self.optimizer.step(share(self.step, self.progress(), self.settings))
        self.weights.clear()
        if self.place.autocast == torch.float16:
            self.good_steps += 1
            if self.good_steps % 2000 == 0:
                self.scale *= 2
        return loss_sum / weight_sum, norm, positions

    def _not_finite(self, what: str, value: float, batch: Batch) -> NumericError:
        """The error for a non-finite number, naming the rows that alone give one."""
        self.weights.clear()
        guilty = []
        names = batch.rows or tuple(f"row {index}" for index in range(len(batch.ids_BT)))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for name, row in zip(names, batch.split(len(batch.ids_BT)), strict=True):
                with self.place.computing():
                    loss, _ = self.objective(self.model, Inputs.of(row, self.place.device))
                if not math.isfinite(float(loss)):
                    guilty.append(name)
        rows = ", ".join(guilty[:8]) if guilty else f"none alone; the step held {', '.join(names[:8])}"
        return NumericError(
            f"the {what} became {value} at step {self.step}; the weights were not touched",
            where=f"rows: {rows}",
            expected="a finite number",
            fix="look at these rows; else lower the learning rate or lengthen warmup_steps, then --resume",
        )

    # -- the run -------------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """How far the run is, 0 to 1; the same in every process."""
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        assert self.settings.budget_minutes is not None
        return self.world.share(self.seconds() / (60 * self.settings.budget_minutes))

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.began

    def go(self, wishes: Wishes) -> Result:
        """Steps until the end, or until a wish to stop."""
        settings = self.settings
        stopped = "done"
        if self.step == 0:
            self.measure()
        window_began, window_tokens, evaluated = time.perf_counter(), 0, int(self.progress() * EVALUATIONS_A_RUN)
        while (progress := self.progress()) < 1:
            learning_share = share(self.step, progress, settings)
            loss, norm, positions = self.update(self.loader.batch(self.step))
            self.step += 1
            self.tokens += int(positions)
            window_tokens += int(positions)
            if self.step % settings.log_every_steps == 0 or self.step == 1:
                now = time.perf_counter()
                self.record(
                    "train",
                    loss=loss,
                    learning_rate=settings.learning_rate * learning_share,
                    grad_norm=norm,
                    tokens_per_second=window_tokens / (now - window_began),
                    memory_bytes=memory_bytes(self.place.device),
                    progress=progress,
                )
                window_began, window_tokens = now, 0
            tenth = int(self.progress() * EVALUATIONS_A_RUN)
            due = (
                self.step % settings.evaluate_every_steps == 0
                if settings.evaluate_every_steps is not None
                else tenth > evaluated and self.progress() < 1
            )
            if due:
                evaluated, paused = tenth, time.perf_counter()
                self.measure()
                window_began += time.perf_counter() - paused
            if self.world.share(float(wishes.stop)):
                stopped = "asked"
                break
            if self.world.share(float(wishes.take_save())) or self._save_due():
                self.save()
        if stopped == "done" and self.last.get("eval_step") != self.step:
            self.measure()
        self.save()
        if stopped == "asked":
            raise KeyboardInterrupt
        return Result(self.step, self.tokens, self.seconds(), stopped, dict(self.last), self.best_loss, self.best_step)

    def record(self, kind: str, **facts: Any) -> None:
        """Hand a record to the log, from the first process only."""
        entry = {"step": self.step, "kind": kind, "time_seconds": self.seconds(), "tokens": self.tokens, **facts}
        if self.world.first:
            self.hooks.log(entry)
        if kind == "train":
            self.last.update(facts)

    def measure(self) -> None:
        """Evaluate on held-out text and write samples; remember the best."""
        settings, model = self.settings, self.model
        first, last = self.step == 0, self.progress() >= 1
        every = settings.sample_every_steps
        sampling = first or last or (every is not None and self.step % every == 0)
        if self.world.first:
            model.eval()
            with torch.no_grad(), torch.compiler.set_stance("eager_on_recompile"):
                if self.hooks.evaluate is not None:
                    found = self.hooks.evaluate(self.step, model)
                    self.record("eval", **found)
                    self.last.update({f"eval_{key}": value for key, value in found.items()}, eval_step=self.step)
                    loss = found.get("loss")
                    if loss is not None and self.step and (self.best_loss is None or loss < self.best_loss):
                        self.best_loss, self.best_step = float(loss), self.step
                        if self.run is not None:
                            self.save()
                            checkpoint.mark_best(self.run.checkpoints, self.step, self.best_loss)
                if self.hooks.sample is not None and sampling:
                    for sample in self.hooks.sample(self.step, model):
                        self.record("sample", **sample)
            model.train()
        self.world.wait()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        settings = self.settings
        if settings.checkpoint_every_steps is not None:
            return self.step % settings.checkpoint_every_steps == 0
        late = time.perf_counter() - self.saved_at > 60 * settings.checkpoint_every_minutes
        return bool(self.world.share(float(late)))

    def save(self) -> None:
        """Write the checkpoint of this step, from the first process, unless it stands already."""
        if self.run is None or not self.world.first:
            return
        if checkpoint.pointed(self.run.checkpoints, "last") == self.run.checkpoints / checkpoint.folder_name(self.step):
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds(),
            "micro_rows": self.micro_rows,
            "precision": self.place.precision,
            "world": self.world.size,
            "scale": self.scale,
            "good_steps": self.good_steps,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "loader": self.loader.state(),
            "settings": self.settings.model_dump(mode="json"),
        }
        checkpoint.save(
            self.run.checkpoints,
            self.step,
            self.weights.release(),
            self.optimizer.state(),
            state,
            parents=self.parents,
            keep=self.settings.keep_checkpoints,
        )
        self.saved_at = time.perf_counter()

    def resume(self) -> None:
        """Take over the run's latest whole checkpoint.

        Raises `ArtifactError` when there is none or it would go on with other data; `ConfigError` when a setting that
        decides the numbers changed.
        """
        assert self.run is not None, "resuming needs a run"
        found = checkpoint.load_latest(self.run.checkpoints)
        if found is None:
            self.hooks.talk("no checkpoint was written yet: starting from the beginning")
            return
        folder, weights, optimizer, state = found
        if state["loader"] != self.loader.state():
            changed = sorted(
                key
                for key in {*state["loader"], *self.loader.state()}
                if state["loader"].get(key) != self.loader.state().get(key)
            )
            raise ArtifactError(
                f"the resumed run would see other data: {', '.join(changed)} changed",
                where=folder,
                expected=", ".join(f"{key}={state['loader'].get(key)!r}" for key in changed),
                fix="resume with the data the run was started with, or start a new run with init: from this one",
            )
        self._expect_same(state, folder.name)
        checkpoint.put_weights(self.weights.release(), weights, folder)
        self.weights.publish()
        self.optimizer.load_state(optimizer)
        self.step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
        self.scale, self.good_steps = state["scale"], state["good_steps"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self.micro_rows = state["micro_rows"]
        self.began = time.perf_counter()
        if self.world.first:
            dropped = self.run.rewind_metrics(self.step)
            self.hooks.talk(
                f"going on from step {self.step}" + (f"; {dropped} later records dropped" if dropped else "")
            )

    def _expect_same(self, state: dict[str, Any], where: str) -> None:
        free = {
            "steps", "budget_minutes", "compile", "evaluate_every_steps", "evaluate_tokens", "sample_every_steps",
            "log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints",
            "micro_batch_rows",
        }  # fmt: skip
        now, then = self.settings.model_dump(mode="json"), state["settings"]
        for key in now.keys() - free:
            if now[key] != then.get(key):
                raise ConfigError(
                    f"train.{key} is {now[key]!r}, but the run was started with {then.get(key)!r}",
                    where=where,
                    fix="resume with the recipe in the run's folder, or start a new run",
                )
        if state["precision"] != self.place.precision or state["world"] != self.world.size:
            self.hooks.talk(
                f"resumed as {self.place.precision} in {self.world.size} processes, saved as {state['precision']} in "
                f"{state['world']}: the run goes on, but not bit for bit"
            )

    def finish(self) -> None:
        """Give the model its float32 masters, and frozen parameters as they came."""
        masters = self.weights.release()
        for name, parameter in self.model.named_parameters():
            parameter.data = masters[name].clone() if name in masters else self.frozen[name].to(self.place.device)
            parameter.grad = None
        self.model.eval()
