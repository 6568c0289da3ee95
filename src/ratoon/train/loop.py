"""The one loop: Batch -> objective -> backward -> update -> record.

Decides the order of things in a step, and when to record, evaluate, save and stop. What a batch is comes from the
loader, what is learned from the objective, what an evaluation is from a callback; none of them is known here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ratoon.adapt.contract import Method, Moment
from ratoon.base.errors import ConfigError, NumericError
from ratoon.base.seeds import derive
from ratoon.data.batch import Batch
from ratoon.model import int8
from ratoon.model.allocator import Kept, release_freed, tune_allocator
from ratoon.model.encoder_decoder import AnyModel
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import Parent
from ratoon.store.runs import Run
from ratoon.train import checkpoint
from ratoon.train.compiled import compile_model
from ratoon.train.device import Place, World, find_place, fit_rows, memory_bytes
from ratoon.train.loss import Inputs, next_token
from ratoon.train.optim import MATRIX, Optimizer, group_parameters
from ratoon.train.resumed import expect_same
from ratoon.train.schedule import share
from ratoon.train.settings import TrainSettings
from ratoon.train.stop import Wishes
from ratoon.train.trunk import Trunk
from ratoon.train.weights import FlatWeights, can_split

Objective = Callable[[Any, Inputs], tuple[Tensor, Tensor]]
Record = dict[str, Any]
EVALUATIONS_A_RUN = 10
LOWEST_SCALE = 2.0**-24
"""float16: a gradient that is not finite with so small a share of the first loss scale is not the scale's fault."""

METHOD = "method."
"""What a method keeps for its next steps lies beside the optimizer's state, under names that begin so."""


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
    """How a run ended; `last` holds the latest figures of training, and those of evaluation as `eval_…`."""

    steps: int
    tokens: int
    seconds: float
    last: Record = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None


def train(
    model: AnyModel,
    loader: BatchSource,
    settings: TrainSettings,
    run: Run | None = None,
    *,
    objective: Objective = next_token,
    hooks: Hooks | None = None,
    parents: list[Parent] | None = None,
    resume: bool = False,
    method: Method | None = None,
    trunk: Trunk | None = None,
) -> Result:
    """Train `model` on the loader's batches as `settings` say; afterwards its parameters are the float32 masters.

    What asks for a gradient is trained. `method`, already installed, has its hooks called; `trunk` gives what the
    frozen blocks compute.

    With a `run`, checkpoints are written to it; `resume` goes on from its latest whole one, bit for bit as if nothing
    had happened. Raises `NumericError` at the first loss or gradient that is not finite, before the weights move;
    `KeyboardInterrupt` after saving when the user asked to stop; `StorageError` when the disk refuses; `ConfigError`
    when the run holds checkpoints already and is not resumed.
    """
    world = World()
    try:
        session = _Session(model, loader, settings, run, objective, hooks or Hooks(), parents or [], world, method)
        session.trunk = trunk
        if trunk is not None:
            (hooks or Hooks()).talk(trunk.open(model.cfg.width, session.place.work, session.place.products))
        try:
            if resume:
                session.resume()
            elif run is not None:
                session.expect_new()
            with Wishes(run.folder if run is not None and world.first else None) as wishes:
                return session.go(wishes)
        finally:
            session.finish()
    finally:
        world.close()


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _dropped(records: int) -> str:
    return f"; {records} records of steps after it dropped" if records else ""


def _expect_fitting(settings: TrainSettings, model: AnyModel, world: World) -> None:
    """Raise `ConfigError` for rows that processes cannot share, or that are longer than the model's context."""
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


class _Session:
    """One call of `train`: the objects of a run and the counters that a checkpoint keeps."""

    def __init__(
        self,
        model: AnyModel,
        loader: BatchSource,
        settings: TrainSettings,
        run: Run | None,
        objective: Objective,
        hooks: Hooks,
        parents: list[Parent],
        world: World,
        method: Method | None = None,
    ) -> None:
        self.model: Any = model  # of either kind; methods and callbacks know theirs
        self.loader, self.settings, self.run = loader, settings, run
        self.method = method
        self.trunk: Trunk | None = None
        self.penalty = 0.0
        self.objective, self.hooks, self.parents, self.world = objective, hooks, parents, world
        _expect_fitting(settings, model, world)
        allocator = tune_allocator()
        self.place: Place = find_place(settings)
        self.frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        model.to(self.place.device)
        groups = group_parameters(model, settings)
        # Weights and gradients that AdamW alone touches need neither whole masters nor, where a step is one
        # micro-batch, a float32 sum.
        lean = (
            not groups[MATRIX]
            and not (method and method.looks_inside)
            and can_split(self.place.work, self.place.device)
        )
        self.alone = lean and world.size == 1
        self.weights = FlatWeights(groups, self.place.work, split=lean)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.place.work)
        low = torch.bfloat16 in (self.place.work, self.place.autocast)
        rounded = int8.round_frozen(model) if self.place.products == "int8" else None
        self.optimizer = Optimizer(self.weights, settings, torch.bfloat16 if low else torch.float32)
        release_freed()
        model.recompute_blocks = settings.recompute_blocks
        trained = self.weights.size
        rows = settings.rows // world.size
        self.micro_rows = int(world.share(fit_rows(model.configs, settings, self.place, rows, trained)))
        self.step = self.tokens = 0
        self.seconds_before = self.spent_seconds = 0.0  # before a resume; of the budget
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.measured_at = self.written_at = self.tenth = -1  # steps last looked at, and saved; tenth last evaluated
        self.skipped_steps = 0
        # The loss is a sum: what would be 2^16 for a mean is divided by about the tokens that it sums over.
        tokens = settings.rows * settings.context_tokens
        self.scale = 2.0 ** (16 - tokens.bit_length()) if self.place.autocast == torch.float16 else 1.0
        self.lowest_scale = self.scale * LOWEST_SCALE
        self.good_steps = 0
        self.began = time.perf_counter()
        self.saved_at = self.began
        self.last: Record = {}
        if world.first:
            hooks.talk(f"{self.place.device}, {self.place.precision}; {allocator}")
            if rounded is not None:
                hooks.talk(rounded)
            hooks.talk(compile_model(model, settings))
            if settings.recompute_blocks:
                hooks.talk("blocks are computed again in the backward pass: less memory, a third more arithmetic")
            for sentence in settings.without_effect():
                hooks.talk(sentence)
            parts = math.ceil(rows / self.micro_rows)
            hooks.talk(f"{settings.rows} rows a step in {parts * world.size} micro-batches of {self.micro_rows}")
        else:
            compile_model(model, settings)

    # -- one step ------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, learning_share: float) -> tuple[float, float, float]:
        """One update of the weights at that share of the peak learning rates; returns loss per unit of weight,
        gradient norm, positions that were read.

        Loss and weight are summed over micro-batches and processes and divided once.
        """
        device = self.place.device
        totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, weight, positions learned and read
        parts = batch.split(math.ceil(len(batch.ids_BT) / self.micro_rows))
        for number, part in enumerate(parts):
            torch.manual_seed(derive(self.settings.seed, "step", self.step, self.world.rank, number))  # dropout
            inputs = self.inputs(part)
            with self.place.computing():
                loss, weight = self.objective(self.model, inputs)
            (loss * self.scale if self.scale != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
            if not (self.alone and len(parts) == 1):
                self.weights.collect()
            counts = weight.new_tensor([part.valid_tokens, part.read_tokens])
            totals += torch.cat([torch.stack([loss.detach(), weight]), counts])
        self.world.add_up(totals)
        loss_sum, weight_sum, learned, positions = totals.tolist()
        self.tokens += int(learned)
        if not math.isfinite(loss_sum):
            raise self._not_finite("loss", loss_sum, batch)
        if weight_sum <= 0:
            self.weights.clear()
            raise NumericError(
                "no position of the step is learned: every weight is 0",
                where=f"step {self.step}, rows {', '.join(batch.rows[:4]) or 'unnamed'}",
                fix="look at the rows' masks with the data's ledger",
            )
        self._add_term(weight_sum)
        if not self.alone:
            self.world.add_up(self.weights.summed)
        factor = 1.0 / (weight_sum * self.scale)
        norm = self.weights.norm() * factor
        if not math.isfinite(norm):
            if self.place.autocast != torch.float16 or self.scale <= self.lowest_scale:
                raise self._not_finite("gradient norm", norm, batch)
            # Expected with float16: the scale was too high for this step. It is left out, and a lower one tried.
            self.scale, self.good_steps = self.scale / 2, 0
            self.skipped_steps += 1
            self.weights.clear()
            return loss_sum / weight_sum, norm, positions
        clip = self.settings.clip_norm
        if clip is not None and norm > clip:
            factor *= clip / norm
        if self.method is not None and type(self.method).on_gradient is not Method.on_gradient:
            self.weights.summed.mul_(factor)
            factor = 1.0
            self.method.on_gradient(self.model, self._moment())
        self.optimizer.step(learning_share, factor)
        if self.method is not None and type(self.method).on_step is not Method.on_step:
            self.method.on_step(self.model, self._moment())
            self.weights.publish()
        if self.place.autocast == torch.float16:
            self.good_steps += 1
            if self.good_steps % 2000 == 0:
                self.scale *= 2
        return loss_sum / weight_sum, norm, positions

    def inputs(self, batch: Batch) -> Inputs:
        """A micro-batch on the device, with what the frozen trunk gives for it."""
        virtual = self.method.virtual_tokens if self.method is not None else 0
        inputs = Inputs.of(batch, self.place.device, step=self.step, virtual_tokens=virtual)
        if self.trunk is None:
            return inputs
        with self.place.computing():
            return self.trunk.fill(self.model, inputs)

    def _add_term(self, weight_sum: float) -> None:
        """Add the gradient of the method's own term: it counts once a step, however many tokens the step has."""
        if self.method is None:
            return
        with self.place.computing():
            term = self.method.loss_term(self.model)
        if term is None:
            return
        self.penalty = float(term.detach())
        if not math.isfinite(self.penalty):
            raise NumericError(f"the penalty of {self.method.kind} became {self.penalty}", where=f"step {self.step}")
        (term * (weight_sum * self.scale / self.world.size)).backward()  # type: ignore[no-untyped-call]
        self.weights.collect()

    def _moment(self) -> Moment:
        views = self.weights
        gradients = {name: views.view(views.summed, name) for name in views.slots}
        return Moment(self.step, self.progress(), self.settings.steps, views.release(), gradients)

    def _not_finite(self, what: str, value: float, batch: Batch) -> NumericError:
        """The error for a non-finite number, naming the rows of any process that alone give one."""
        here = "" if self.world.size == 1 else f"process {self.world.rank} "
        names = batch.rows or tuple(f"{here}row {index}" for index in range(len(batch.ids_BT)))
        guilty = []
        with torch.compiler.set_stance("force_eager"):
            for name, row in zip(names, batch.split(len(batch.ids_BT)), strict=True):
                self.weights.clear()
                with self.place.computing():
                    loss, _ = self.objective(self.model, self.inputs(row))
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                if not (loss.isfinite() and all(one.isfinite().all() for one in self.weights.gradients())):
                    guilty.append(name)
        self.weights.clear()
        guilty, everything = self.world.gather(guilty), self.world.gather(list(names))
        rows = _some(guilty) if guilty else f"none alone; the step held {_some(everything)}"
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
        return self.world.share(self.spent_seconds / (60 * self.settings.budget_minutes))

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.began

    def go(self, wishes: Wishes) -> Result:
        """Steps until the end, or until a wish to stop.

        Whatever is recorded of a step is recorded before its checkpoint is written: a run that goes on from there has
        nothing to write twice and nothing missing.
        """
        settings = self.settings
        self.model.train()
        window_began, window_tokens = time.perf_counter(), 0
        kept = Kept()
        first, spent_to = self.step, time.perf_counter()
        while (progress := self.progress()) < 1:
            paused = time.perf_counter()
            self.between(progress, wishes)
            window_began += time.perf_counter() - paused
            learning_share = share(self.step, progress, settings)
            loss, norm, positions = self.update(self.loader.batch(self.step), learning_share)
            now, before = time.perf_counter(), spent_to
            spent_to = now
            if self.step > first:  # the first step also compiles: the budget begins behind it
                self.spent_seconds += now - before
            self.step += 1
            window_tokens += int(positions)
            if self.place.device.type == "cpu":
                kept.step(memory_bytes(self.place.device))
            if self.step % settings.log_every_steps == 0 or self.step == 1:
                self.record(
                    "train",
                    loss=loss,
                    learning_rate=settings.learning_rate * learning_share,
                    grad_norm=norm if math.isfinite(norm) else None,
                    tokens_per_second=window_tokens / (now - window_began),
                    memory_bytes=memory_bytes(self.place.device),
                    progress=progress,
                    **({"skipped_steps": self.skipped_steps} if self.skipped_steps else {}),
                    **({"penalty": self.penalty} if self.penalty else {}),
                    **(self.method.figures() if self.method is not None else {}),
                )
                window_began, window_tokens = now, 0
        self._stop_if_asked(wishes)
        if self.measured_at != self.step:
            self.measure(evaluate=True, sample=True)
        self.save()
        return Result(self.step, self.tokens, self.seconds(), dict(self.last), self.best_loss, self.best_step)

    def between(self, progress: float, wishes: Wishes) -> None:
        """What is due before the next step: stopping, evaluating, sampling, saving."""
        self._stop_if_asked(wishes)
        if self.measured_at != self.step:
            evaluate, tenth = _every(self.settings.evaluate_every_steps, self.step), int(progress * EVALUATIONS_A_RUN)
            if self.settings.evaluate_every_steps is None:
                evaluate = tenth > self.tenth
            self.tenth = tenth
            self.measure(
                evaluate=evaluate, sample=self.step == 0 or _every(self.settings.sample_every_steps, self.step)
            )
        if self.world.share(float(wishes.take_save())) or self._save_due():
            self.save()

    def _stop_if_asked(self, wishes: Wishes) -> None:
        if self.world.share(float(wishes.stop)):
            self.save()
            raise KeyboardInterrupt

    def record(self, kind: str, **facts: Any) -> None:
        """Hand a record to the log, from the first process only."""
        entry = {"step": self.step, "kind": kind, "time_seconds": self.seconds(), "tokens": self.tokens, **facts}
        if self.world.first:
            self.hooks.log(entry)
        if kind == "train":
            self.last.update(facts)

    def measure(self, *, evaluate: bool, sample: bool) -> None:
        """Evaluate on held-out text, write samples; a model that is the best so far is saved and marked."""
        self.measured_at = self.step
        if not (evaluate or sample):
            return
        if self.world.first:
            self.model.eval()
            with torch.no_grad(), torch.compiler.set_stance("eager_on_recompile"):
                found = self.hooks.evaluate(self.step, self.model) if evaluate and self.hooks.evaluate else {}
                if found:
                    self.record("eval", **found)
                    self.last.update({f"eval_{key}": value for key, value in found.items()})
                for text in self.hooks.sample(self.step, self.model) if sample and self.hooks.sample else []:
                    self.record("sample", **text)
            self.model.train()
            told = found.get("choose", found.get("loss"))
            loss = math.nan if told is None else float(told)
            if self.step and (loss < self.best_loss if self.best_loss is not None else math.isfinite(loss)):
                self.best_loss, self.best_step = loss, self.step
                self.save()
                if self.run is not None:
                    checkpoint.mark_best(self.run.checkpoints, self.step, loss)
        self.world.wait()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        settings = self.settings
        if settings.checkpoint_every_steps is not None:
            return self.step > 0 and _every(settings.checkpoint_every_steps, self.step)
        late = time.perf_counter() - self.saved_at > 60 * settings.checkpoint_every_minutes
        return bool(self.world.share(float(late)))

    def save(self) -> None:
        """Write the checkpoint of this step, from the first process, unless it was written already."""
        if self.run is None or not self.world.first or self.written_at == self.step:
            return
        if not self.weights.finite():
            raise NumericError(
                f"the weights are not finite after step {self.step - 1}; they are not saved",
                where=self.run.checkpoints,
                expected="finite weights; every checkpoint there is older and whole",
                fix="lower the learning rate or lengthen warmup_steps, then --resume",
            )
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds(),
            "spent_seconds": self.spent_seconds,
            "micro_rows": self.micro_rows,
            "precision": self.place.precision,
            "world": self.world.size,
            "measured_at": self.measured_at,
            "tenth": self.tenth,
            "last": self.last,
            "skipped_steps": self.skipped_steps,
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
            self.optimizer.state() | self._method_state(),
            state,
            parents=self.parents,
            keep=self.settings.keep_checkpoints,
        )
        self.saved_at, self.written_at = time.perf_counter(), self.step

    def _method_state(self) -> dict[str, Tensor]:
        state = self.method.state() if self.method is not None else {}
        return {METHOD + name: value for name, value in state.items()}

    def expect_new(self) -> None:
        """Refuse to write a new run over one that has checkpoints."""
        assert self.run is not None
        found = checkpoint.complete(self.run.checkpoints)
        if found:
            raise ConfigError(
                f"the run has checkpoints already, the latest is {found[-1].name}",
                where=self.run.checkpoints,
                expected="a new run",
                fix="add --resume to go on with it, or give the run another name",
            )
        self.world.wait()

    def resume(self) -> None:
        """Take over the run's latest whole checkpoint; without one, start from the beginning.

        Raises `ArtifactError` when none is whole or it would go on with other data; `ConfigError` when a setting that
        decides the numbers changed.
        """
        assert self.run is not None, "resuming needs a run"
        root, talk = self.run.checkpoints, self._talk
        if self.world.first:
            for sentence in [*self.run.sweep(), *checkpoint.mend(root)[1]]:
                talk(sentence)
        self.world.wait()
        folder = checkpoint.pointed(root, "last")
        if folder is None:
            dropped = self.run.rewind_metrics(-1) if self.world.first else 0
            talk(f"no checkpoint was written yet: starting from the beginning{_dropped(dropped)}")
            return
        weights, optimizer, state = checkpoint.load(folder)
        self._expect_same(state, folder)
        values = self.weights.release()
        checkpoint.put_weights(values, weights, folder)
        self.weights.take(values)
        self.optimizer.load_state(optimizer)
        if self.method is not None:
            own = {name: value for name, value in optimizer.items() if name.startswith(METHOD)}
            self.method.load_state({name.removeprefix(METHOD): value for name, value in own.items()})
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds_before, self.spent_seconds = state["seconds"], state["spent_seconds"]
        self.scale, self.good_steps, self.skipped_steps = state["scale"], state["good_steps"], state["skipped_steps"]
        self.measured_at, self.tenth, self.last = state["measured_at"], state["tenth"], state["last"]
        self.written_at = self.step
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        if self.world.first:
            self._point_best(root)
            talk(f"going on from step {self.step}{_dropped(self.run.rewind_metrics(self.step))}")
        self.began = self.saved_at = time.perf_counter()

    def _talk(self, sentence: str) -> None:
        if self.world.first:
            self.hooks.talk(sentence)

    def _point_best(self, root: Path) -> None:
        """Let `best` point where the state says: a process may have died between saving and pointing."""
        if self.best_loss is None or self.best_step is None:
            return
        folder = root / checkpoint.folder_name(self.best_step)
        if folder not in checkpoint.complete(root):
            self._talk(f"the best checkpoint, {folder.name}, is gone; the best is sought anew from here")
            self.best_loss = self.best_step = None
            (root / "best").unlink(missing_ok=True)
        elif checkpoint.pointed(root, "best") != folder:
            checkpoint.mark_best(root, self.best_step, self.best_loss)

    def _expect_same(self, state: dict[str, Any], folder: Path) -> None:
        """Refuse other data and other numbers; say what else is not as it was."""
        other = expect_same(state, self.loader.state(), self.settings, folder)
        if self.settings.micro_batch_rows is None:
            self.micro_rows = state["micro_rows"]
        kept = {"precision": self.place.precision, "world": self.world.size, "micro_rows": self.micro_rows}
        other += [f"{key} was {state[key]}, is {value}" for key, value in kept.items() if state[key] != value]
        if other:
            self._talk(f"the run goes on, but not bit for bit as it would have: {'; '.join(other)}")

    def finish(self) -> None:
        """Give the model its float32 masters, and frozen parameters as they came."""
        int8.unround(self.model)
        for name, parameter in self.model.named_parameters():
            own = name in self.weights.slots
            parameter.data = self.weights.copied(name) if own else self.frozen[name].to(self.place.device)
            parameter.grad = None
        self.model.eval()
