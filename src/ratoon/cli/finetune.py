"""`ratoon finetune`: recipe -> records -> examples -> model, method, objective -> the one loop -> model and measures.

Decides the order of a fine-tuning run's life and what is kept of it. How a step goes is `train/loop.py`'s, what a
record is the task's, what is trained the method's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.cli.job import Job, run_job

if TYPE_CHECKING:
    from ratoon.adapt.contract import Method
    from ratoon.data.examples import ExampleLoader
    from ratoon.data.records import Parts
    from ratoon.generate.lm import LanguageModel
    from ratoon.recipe.tuning import TunePlan, TuneRecipe
    from ratoon.store.runs import Run
    from ratoon.tasks.contract import Task
    from ratoon.tasks.example import Example
    from ratoon.text.tokenizer import Tokenizer
    from ratoon.train.device import World
    from ratoon.train.loop import Result
    from ratoon.train.settings import TrainSettings


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option(
    "--show", type=click.IntRange(min=1), metavar="N", help="Print N records as the model would see them; stop."
)
@click.option("--resume", is_flag=True, help="Go on with the run of that name, from its last checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's final facts as JSON.")
def command(recipe: str, overrides: tuple[str, ...], show: int | None, resume: bool, as_json: bool) -> None:
    """Fine-tune a model for a task as RECIPE says: a YAML file, or the name of one that ships (`ratoon recipes`).

    KEY=VALUE changes single settings, e.g. `method.kind=lora data.train=[rows.jsonl]`. Ctrl-C saves and stops. The
    answer is the run's folder.
    """
    from ratoon.base.settings import parse_overrides
    from ratoon.cli.output import answer, answer_json
    from ratoon.recipe.tuning import load_tuning

    found = load_tuning(recipe, parse_overrides(list(overrides)))
    if show is not None:
        from ratoon.cli.show import show_records

        show_records(found, show, as_json=as_json)
        return
    run = run_tuning(found, resume=resume)
    if as_json:
        answer_json(run.read_state())
    else:
        answer(str(run.folder))


def run_tuning(recipe: TuneRecipe, *, resume: bool = False, root: str | Path = "runs") -> Run:
    """Fine-tune as `recipe` says and leave a whole run behind: ledger, checkpoints, model or adapter, measures, page.

    Raises as `cli.pretrain.run_recipe` does.
    """
    from ratoon.recipe.tuning import settle_tuning

    plan = settle_tuning(recipe)
    return run_job(recipe.name, root, resume, lambda run, world: _Job(run, plan, world, resume))


@dataclass
class Material:
    """What a run learns from: the task with its labels, the records of all parts, and the examples of two of them."""

    task: Task[Any]
    parts: Parts
    train: list[Example]
    validation: list[Example]


def read_material(
    recipe: TuneRecipe,
    tokenizer: Tokenizer,
    talk: Callable[[str], None],
    *,
    leading: int = 0,
    rows: Parts | None = None,
    most_tokens: int | None = None,
    book: Callable[[Parts], None] = lambda parts: None,
) -> Material:
    """Read, split, check and encode the recipe's rows; everything is booked and said. With `most_tokens`, the model's
    context, the test rows are looked at as well: what cannot be measured is found out before anything is trained.
    `book` gets what was booked, also where it is then refused.

    Raises `DataError` for rows that do not fit, when too much would be lost, and when nothing would be learned.
    """
    from ratoon.data.records import booked, encode_records, measurable
    from ratoon.tasks.registry import task_of

    settings = recipe.data
    task = task_of(dict(recipe.task))
    parts = rows if rows is not None else read_all(recipe, task)
    for note in [note for ledger in parts.ledgers.values() for note in ledger.notes] + parts.sentences:
        talk(note)
    for sentence in task.settle(parts.train):
        talk(sentence)
    for record in [*parts.train, *parts.validation, *parts.test]:
        task.check(record)
    for name in ("validation", "test"):
        for sentence in absent_labels(task, name, parts.of(name)):
            talk(sentence)
    told: dict[str, Any] = {"too_long": settings.too_long, "on_bad_row": settings.on_bad_row}
    room, unfit = int(recipe.train.get("context_tokens") or 256) - leading, list[Any]()
    ledger = parts.ledgers["train"]
    train = encode_records(task, perturbed(recipe, task, parts, talk), tokenizer, ledger, room_tokens=room, **told)
    validation = encode_records(
        task, parts.validation, tokenizer, parts.ledgers["validation"], room_tokens=room, unfit=unfit, **told
    )
    left_out = {record.place for record in unfit}
    parts.validation = [record for record in parts.validation if record.place not in left_out]
    if most_tokens is not None:
        most = most_tokens - leading
        parts.test = measurable(task, parts.test, tokenizer, parts.ledgers["test"], room_tokens=most, **told)
    for name, one in parts.ledgers.items():
        if one.rows_read:
            for sentence in booked(one):
                talk(f"{name}: {sentence}")
    book(parts)
    ledger.refuse_if_all_masked()
    ledger.refuse_if_lost(settings.most_lost_fraction)
    return Material(task, parts, train, validation)


def absent_labels(task: Task[Any], name: str, records: list[Any]) -> list[str]:
    """A sentence where labels of the task stand in no record of a part: nothing can be measured of them."""
    labels = getattr(task, "labels", ())
    if not labels or not records:
        return []
    found: set[Any] = set()
    for record in records:
        expected = task.expected(record)
        found |= {expected} if isinstance(expected, str) else set(expected)
    absent = [label for label in labels if label not in found]
    if not absent:
        return []
    shown = ", ".join(absent[:12]) + (" …" if len(absent) > 12 else "")
    return [f"{name}: nothing is measured of {len(absent):,} of {len(labels):,} labels that no row has: {shown}"]


def read_all(recipe: TuneRecipe, task: Task[Any]) -> Parts:
    """The records of all parts, as the recipe says."""
    from ratoon.data.records import read_parts

    return read_parts(task, recipe.data, seed=recipe.seed)


def perturbed(recipe: TuneRecipe, task: Task[Any], parts: Parts, talk: Callable[[str], None]) -> list[Any]:
    """The training records with perturbed copies beside them, where that is asked for; what came out as it went in is
    counted and said. Raises `ConfigError` for perturbations after which an answer may be wrong."""
    noise = recipe.noise
    if not noise.perturbed_copies:
        return parts.train
    from ratoon.evaluate.task_robust import bearable, protected
    from ratoon.text.perturb import perturbed_copies

    texts = [task.text(record) for record in parts.train]
    found = perturbed_copies(
        texts, bearable(task, noise.perturb, where="noise.perturb"), noise.strength, seed=recipe.seed,
        rounds=noise.perturbed_copies, protected=[protected(task, text) for text in texts],
    )  # fmt: skip
    talk(
        f"{len(found.copies):,} perturbed copies of training records; {found.unchanged:,} came out unchanged: left out"
    )
    records, copies = list(parts.train), Counter[int]()
    for copy in found.copies:
        record = parts.train[copy.source]
        copies[copy.source] += 1
        mark = f"~{copies[copy.source]}"
        changed = task.with_text(record, copy.edited.text)
        records.append(replace(changed, id=f"{record.id}{mark}", place=f"{record.place}{mark}"))
    return records


class _Job(Job):
    """One fine-tuning run, from its recipe to its page."""

    verb = "finetune"

    def __init__(self, run: Run, plan: TunePlan, world: World, resume: bool) -> None:
        super().__init__(run, world, resume, plan.recipe.language)
        self.plan, self.recipe = plan, plan.recipe

    def go(self) -> None:
        """Everything, in order."""
        from ratoon.cli.machine import machine
        from ratoon.tasks.registry import task_of

        recipe = self.recipe
        self.state(name=recipe.name, status="running", reason=None, machine=machine(), language=recipe.language)
        method = self._method()
        rows = read_all(recipe, task_of(dict(recipe.task)))
        lm, parents = self._begin(method, rows)
        assert lm.tokenizer is not None
        method = self._adapter(lm, method, parents)
        material = read_material(recipe, lm.tokenizer, self.talk, leading=method.virtual_tokens, rows=rows,
                                 most_tokens=lm.context_tokens, book=self._book)  # fmt: skip
        method.read_text(lm.tokenizer.encode)
        self._install(lm, material.task, method)
        loader, settings = self._loader(lm, material, method)
        self._announce(lm, material, method, loader, settings)
        result = self._train(lm, material, method, loader, settings, parents)
        if self.world.first:
            self._finish(lm, material, method, parents, settings, result)
        self.world.wait()

    def page(self) -> None:
        """The run's page: that of its measures, written with them, or one that says that there are none, and why."""
        from ratoon.report.task_unmeasured import write_unmeasured_page

        state = self.run.read_state()
        if state.get("status") != "done" or not state.get("evaluation"):
            write_unmeasured_page(self.run, language="zh" if self.language == "zh" else "en")
        self.talk(f"page: {self.run.report}")

    # -- model and method ------------------------------------------------------------------------------------------

    def _method(self) -> Method:
        from ratoon.adapt.contract import Method
        from ratoon.adapt.methods import method_of

        method = method_of(dict(self.recipe.method))
        if self.recipe.merge and method.kind == "full":
            self.talk("merge has no effect with method.kind: full: the model's own weights are trained")
        elif self.recipe.merge and type(method).merge is Method.merge:
            raise ConfigError(f"{method.kind} cannot be merged: {method.not_merged}", where="merge", fix="leave it out")
        return method

    def _begin(self, method: Method, rows: Parts) -> tuple[LanguageModel, list[Any]]:
        """The model that is trained, with its tokenizer, and what it is made from."""
        from ratoon.cli.export import model_parent
        from ratoon.generate.lm import load, locate
        from ratoon.store.artifact import Parent
        from ratoon.train.device import fast_dtype

        name = self.recipe.model.base
        if name is None:
            from ratoon.cli.translate import new_model

            if method.kind != "full" and not self.recipe.merge:
                raise ConfigError(
                    f"the parts of {method.kind} on an encoder-decoder cannot be saved apart from it",
                    where="method.kind",
                    fix="say merge: true, or method.kind: full",
                )
            return new_model(self.recipe, self.run, self.talk, rows)
        # A frozen base may be held in the type that training computes with; what is trained or merged may not.
        exact = method.kind == "full" or self.recipe.merge or self.recipe.train.get("precision", "auto") != "auto"
        lm = load(name, dtype="float32" if exact else fast_dtype(), device="cpu")
        if lm.tokenizer is None:
            raise ArtifactError(f"the model '{name}' has no tokenizer", where="model.base", expected="tokenizer.json")
        lm.virtual_tokens = method.virtual_tokens
        return lm, [model_parent(name, locate(name)), Parent(kind="tokenizer", hash=lm.tokenizer.hash)]

    def _adapter(self, lm: LanguageModel, method: Method, parents: list[Any]) -> Method:
        """The method that is trained: the recipe's, or that of the adapter which is gone on with, put into the base."""
        from ratoon.adapt.folder import base_hash, is_adapter, load_adapter
        from ratoon.cli.export import model_parent
        from ratoon.generate.lm import locate

        name = self.recipe.model.adapter
        if name is None:
            return method
        folder = locate(name)
        if not is_adapter(folder):
            raise ConfigError(f"'{name}' is no adapter", where="model.adapter", fix="name it as model.base")
        found = load_adapter(lm.model, folder, base_hash=base_hash(locate(str(self.recipe.model.base))), talk=self.talk)
        own = found.settings.model_dump(mode="json")
        asked = method.settings.model_dump(mode="json")
        for key in ("kind", *self.recipe.method):
            if (value := asked[key]) != own.get(key):
                raise ConfigError(
                    f"method.{key} is {value!r}, but the adapter was made with {own.get(key)!r}",
                    where="method",
                    expected=f"method.kind: {found.kind}; its other settings are the adapter's",
                )
        lm.virtual_tokens = found.virtual_tokens
        parents.append(model_parent(name, folder).model_copy(update={"kind": "adapter"}))
        self.talk(f"going on with the adapter '{name}' ({found.kind})")
        return found

    def _install(self, lm: LanguageModel, task: Task[Any], method: Method) -> None:
        """Let the model read as the recipe says, put the task's head on, and install the method."""
        from ratoon.model.config import HeadConfig
        from ratoon.model.init import add_head

        told, head = self.recipe.model, task.head()
        if head is None and (told.attention == "both" or told.pooling != "last"):
            raise ConfigError(
                f"the task {task.kind} is answered token by token",
                where="model.attention" if told.attention == "both" else "model.pooling",
                expected="attention: causal and pooling: last; both are for tasks with a head",
            )
        if told.attention == "both":
            lm.model.set_causal(False)
        if head is not None:
            pooling = told.pooling if head.kind == "sequence" else "last"
            if pooling != told.pooling:
                raise ConfigError(f"the task {task.kind} scores single tokens", where="model.pooling", expected="last")
            wanted = HeadConfig(kind=head.kind, labels=head.labels, problem=head.problem, pooling=pooling)
            if lm.model.cfg.task_head != wanted:
                if lm.model.cfg.task_head is not None:
                    self.talk("the base has a head for another task: a new one takes its place")
                add_head(lm.model, wanted, self.recipe.seed)
        if self.recipe.model.adapter is None:
            method.install(lm.model, seed=self.recipe.seed)

    # -- data ------------------------------------------------------------------------------------------------------

    def _loader(self, lm: LanguageModel, material: Material, method: Method) -> tuple[ExampleLoader, TrainSettings]:
        """The rows of the run, and the settings that their number decides."""
        from ratoon.data.examples import ExampleLoader

        def make(rows: int) -> ExampleLoader:
            return ExampleLoader(
                material.train,
                rows=rows,
                context_tokens=self.plan.context_tokens,
                seed=self.recipe.seed,
                leading=method.virtual_tokens,
                rank=self.world.rank,
                world=self.world.size,
            )

        loader = make(self.world.size)
        learned = max(len(material.train), len(material.parts.train))  # neighbours may share an example
        settings, self.derived = self.plan.train_settings(
            rows_an_epoch=len(loader), examples=learned, width=lm.model.head_weight().shape[1]
        )
        loader.rows = settings.rows
        return loader, settings

    def _book(self, parts: Parts) -> None:
        """Write down what became of each row, also of a run that is refused for it."""
        from ratoon.store.atomic import write_json

        if self.world.first:
            ledgers = {name: ledger.as_dict() for name, ledger in parts.ledgers.items()}
            write_json(self.run.folder / "ledger.json", {"parts": ledgers, "leaks": parts.leaks.as_dict()})

    def _announce(
        self, lm: LanguageModel, material: Material, method: Method, loader: ExampleLoader, settings: TrainSettings
    ) -> None:
        """Say what was derived and what is trained, and write down the resolved recipe, before anything is trained."""
        import yaml

        from ratoon.adapt.contract import trained
        from ratoon.store.atomic import write_text

        if not self.world.first:
            return
        for one in (*self.plan.derived, *self.derived):
            self.talk(f"derived {one.key} = {one.value} ({one.reason})")
        model = lm.model
        total = sum(parameter.numel() for parameter in model.parameters())
        learns = sum(parameter.numel() for parameter in trained(model).values())
        self.talk(f"{method.kind}: {learns:,} of {total:,} parameters are trained ({learns / total:.2%})")
        self.talk(
            f"{len(material.train):,} examples in {len(loader):,} rows of {loader.context_tokens} tokens, "
            f"{loader.filled:.0%} filled"
        )
        write_text(
            self.run.recipe_path, yaml.safe_dump(self.plan.as_dict(settings), sort_keys=False, allow_unicode=True)
        )
        self.state(
            derived=[
                {"key": one.key, "value": one.value, "reason": one.reason}
                for one in (*self.plan.derived, *self.derived)
            ],
            model={"parameters": total, "trained": learns, "family": model.cfg.family, "layers": model.cfg.layers,
                   "width": model.cfg.width},
            task=material.task.facts(),
            method={"kind": method.kind, "trained": learns, "formula": method.count(model)},
            data={
                "sources": list(self.recipe.data.train),
                "train_examples": len(material.train),
                "validation_examples": len(material.validation),
                "test_records": len(material.parts.test),
                "rows": len(loader),
                "filled": loader.filled,
            },
            base=self.recipe.model.base,
        )  # fmt: skip

    # -- training --------------------------------------------------------------------------------------------------

    def _train(
        self,
        lm: LanguageModel,
        material: Material,
        method: Method,
        loader: ExampleLoader,
        settings: TrainSettings,
        parents: list[Any],
    ) -> Result:
        """The loop, with what happens around it."""
        from ratoon.train.loop import Hooks, train
        from ratoon.train.noise import with_noise

        objective = self._objective(lm, material, loader, settings)
        trunk = self._trunk(lm, loader, settings, parents)
        try:
            with self.records(settings, self.recipe.track, self.plan.as_dict(settings)) as log:
                result = train(
                    lm.model,
                    loader,
                    settings,
                    self.run,
                    objective=with_noise(objective, self.recipe.noise, settings.seed),
                    hooks=Hooks(self._validate(lm, material, objective, settings), None, log, self.talk),
                    parents=parents,
                    resume=self.resume,
                    method=method,
                    trunk=trunk,
                )
        finally:
            if trunk is not None:
                self.state(trunk={"layers": trunk.layers, "rows_read": trunk.reads, "rows_computed": trunk.computed})
        if trunk is not None:
            trunk.close()
        self.talk(
            f"trained {result.steps:,} steps, {result.tokens:,} learned places ({loader.passes(result.steps):.1f} "
            f"epochs) in {result.seconds:,.0f} s"
        )
        self.state(passes=loader.passes(result.steps), seconds=result.seconds)
        return result

    def _objective(self, lm: LanguageModel, material: Material, loader: ExampleLoader, settings: TrainSettings) -> Any:
        from ratoon.train.objectives import objective_of

        task: Any = material.task
        if task.objective == "preference":
            from ratoon.cli.preference import prepare

            return prepare(self.run, lm, task, material, loader, settings)
        name = task.objective
        if self.recipe.model.architecture == "encoder-decoder":
            name = "sequence_to_sequence"
        return objective_of(name)

    def _trunk(self, lm: LanguageModel, loader: ExampleLoader, settings: TrainSettings, parents: list[Any]) -> Any:
        """The frozen trunk, where there is one and nothing happens below it."""
        from ratoon.train.trunk import Trunk, frozen_layers

        layers = 0 if self.recipe.noise.on_embeddings else frozen_layers(lm.model)
        if not layers:
            return None
        folder = self.run.folder / "trunk" / str(self.world.rank) if self.recipe.keep_trunk else None
        key = {"base": parents[0].hash, "loader": loader.state(), "attention": self.recipe.model.attention}
        return Trunk(layers, folder, rows=len(loader), tokens=loader.context_tokens, key=key)

    def _validate(self, lm: LanguageModel, material: Material, objective: Any, settings: TrainSettings) -> Any:
        """The evaluation on the way: the loss of the validation examples, and the task's measure where a head gives
        it."""
        from ratoon.evaluate.validate import Validation
        from ratoon.train.loss import Inputs

        if not material.validation:
            return None
        validation = Validation(lm, material.task, material.parts.validation, material.validation, objective, Inputs.of)
        return validation.callback(settings.evaluate_tokens, self.recipe.language, settings.context_tokens)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(
        self,
        lm: LanguageModel,
        material: Material,
        method: Method,
        parents: list[Any],
        settings: TrainSettings,
        result: Result,
    ) -> None:
        """Write the best model or adapter, measure it on the test records as it was saved, write the page."""
        from ratoon.adapt.contract import Method

        step = self._best(lm, method, result)
        self._calibrate(lm, material)
        facts = {
            "task": material.task.facts(),
            "chat": lm.facts.get("chat", True) if material.task.kind != "dialogue" else True,
            "step": step,
            "method": method.kind,
            "data": {
                "too_long": self.recipe.data.too_long,
                "language": self.recipe.language,
                "row_tokens": settings.context_tokens,
            },
        }
        manifest = self._write(lm, method, parents, facts)
        self.state(status="done", step=step, steps=result.steps, tokens=result.tokens, model_hash=manifest.hash,
                   best={"step": result.best_step, "by": result.best_loss}, evaluation=None)  # fmt: skip
        if material.parts.test:
            from ratoon.cli.measure import measure_run

            report = measure_run(self.run, material.task, material.parts, language=self.recipe.language, talk=self.talk)
            self.state(evaluation=report)
        commands = [f"ratoon evaluate {self.run.name}" + ("" if material.parts.test else " FILE")]
        if type(method).merge is not Method.merge:  # others stay beside their base
            commands.append(f"ratoon export {self.run.name} {self.run.name}-hf")
        self.state(next_commands=commands)
        self.page()
        self.talk("next:\n  " + "\n  ".join(commands))

    def _best(self, lm: LanguageModel, method: Method, result: Result) -> int:
        """Let the model be that of the best step on the validation rows; returns the step. A method whose schedule of
        ranks had not come to its end there keeps the last step: its adapter would have more than was asked for."""
        step = result.best_step or result.steps
        if step != result.steps:
            self._take(lm, method, step)
            if method.facts(lm.model).get("budget_reached") is False:
                self._take(lm, method, result.steps)
                self.talk(f"step {step:,} was the best on the validation rows, but its ranks were not reduced yet")
                step = result.steps
            else:
                self.talk(f"the model is that of step {step:,}, the best on the validation rows")
        self.state(method_facts=method.facts(lm.model))
        return step

    def _calibrate(self, lm: LanguageModel, material: Material) -> None:
        """How the model's scores are to be read, where the validation rows show it."""
        from ratoon.evaluate.task import calibrate

        learned = calibrate(lm, material.task, material.parts.validation, too_long=self.recipe.data.too_long)
        if learned is not None:
            self.talk(learned)
            self.state(task=material.task.facts())

    def _take(self, lm: LanguageModel, method: Method, step: int) -> None:
        """Weights and the method's own state of a step's checkpoint."""
        from ratoon.adapt.contract import trained
        from ratoon.train import checkpoint
        from ratoon.train.loop import METHOD

        folder = self.run.checkpoints / checkpoint.folder_name(step)
        checkpoint.put_weights({**trained(lm.model)}, checkpoint.load_weights(folder), folder)
        _, optimizer, _ = checkpoint.load(folder)
        own = {name.removeprefix(METHOD): value for name, value in optimizer.items() if name.startswith(METHOD)}
        method.load_state(own)

    def _write(self, lm: LanguageModel, method: Method, parents: list[Any], facts: dict[str, Any]) -> Any:
        """The run's model: a whole one where all is trained or the adapter was merged, else the adapter."""
        from ratoon.model.folder import write_model

        assert lm.tokenizer is not None
        if self.recipe.merge and method.kind != "full":
            method.merge(lm.model)
            facts["merged"] = method.kind
        elif method.kind != "full":
            from ratoon.adapt.folder import save_adapter

            return save_adapter(
                lm.model,
                method,
                self.run.model,
                base=str(self.recipe.model.base),
                parents=parents,
                facts=facts | {"attention": self.recipe.model.attention},
                replace=True,
            )
        return write_model(
            lm.model,
            self.run.model,
            extra_files=lm.tokenizer.files(),
            parents=parents,
            facts=facts,
            recipe=self.plan.as_dict(),
            replace=True,
        )
