"""`ratoon pretrain`: recipe -> shards -> loader, model, objective -> the one loop -> model, evaluation, page.

Decides the order of a run's life and what is kept of it. How a step goes is `train/loop.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.cli.job import Job, run_job

if TYPE_CHECKING:
    from ratoon.data.prepare import Prepared
    from ratoon.generate.lm import LanguageModel
    from ratoon.model.transformer import Transformer
    from ratoon.recipe import Plan, Recipe
    from ratoon.store.runs import Run
    from ratoon.train.device import World
    from ratoon.train.loop import Hooks, Result

FINAL_EVALUATION_TOKENS = 1 << 20
PROMPT_WORDS = 6
PROMPTS = 3


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--resume", is_flag=True, help="Go on with the run of that name, from its last checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's final facts as JSON.")
def command(recipe: str, overrides: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Train a model as RECIPE says: a YAML file, or the name of one that ships (`ratoon recipes`).

    KEY=VALUE changes single settings, e.g. `train.steps=200 data.sources=[book.txt]`. Ctrl-C saves and stops;
    `touch runs/NAME/save` saves without stopping. The answer is the run's folder.
    """
    from ratoon.base.settings import parse_overrides
    from ratoon.cli.output import answer, answer_json
    from ratoon.recipe import load

    run = run_recipe(load(recipe, parse_overrides(list(overrides))), resume=resume)
    if as_json:
        answer_json(run.read_state())
    else:
        answer(str(run.folder))


def run_recipe(recipe: Recipe, *, resume: bool = False, root: str | Path = "runs") -> Run:
    """Train as `recipe` says and leave a whole run behind: data, checkpoints, model, evaluation, page.

    Under `torchrun` every process calls this; the first one writes and talks. Raises `RatoonError` for whatever goes
    wrong, `KeyboardInterrupt` after saving; the run's manifest then says why it ended.
    """
    from ratoon.recipe import settle

    plan = settle(recipe)
    return run_job(recipe.name, root, resume, lambda run, world: _Job(run, plan, world, resume))


class _Job(Job):
    """One run, from its recipe to its page."""

    def __init__(self, run: Run, plan: Plan, world: World, resume: bool) -> None:
        super().__init__(run, world, resume, plan.recipe.language)
        self.plan = plan
        self.taught = False
        """Whether the model that is trained on can answer in a conversation."""

    def go(self) -> None:
        """Everything, in order."""
        from ratoon.cli.machine import machine

        recipe = self.plan.recipe
        if self.world.first:
            self.state(name=recipe.name, status="running", reason=None, machine=machine(), language=recipe.language)
        prepared = self.prepared()
        model, parents = self.model(prepared)
        self.announce(prepared, model)
        result = self.train(prepared, model, parents)
        if self.world.first:
            self.finish(prepared, model, parents, result)
        self.world.wait()

    # -- data ----------------------------------------------------------------------------------------------------

    def prepared(self) -> Prepared:
        """The recipe's data, prepared by the first process, unless that was done before."""
        from ratoon.data.prepare import Prepared

        data = self.plan.recipe.data
        if data.prepared is not None:
            return Prepared.open(data.prepared)
        folder = self.run.folder / "data"
        if self.world.first and not (folder / "ratoon.json").is_file():
            self._prepare(folder)
        self.world.wait()
        return Prepared.open(folder)

    def _prepare(self, folder: Path) -> None:
        from ratoon.cli.prepare import prepare_as_told
        from ratoon.cli.tokenizer import tokenizer_of

        recipe = self.plan.recipe
        name = recipe.data.tokenizer or recipe.model.init
        prepare_as_told(
            recipe.data,
            folder,
            tokenizer=None if name is None else tokenizer_of(name),
            seed=recipe.seed,
            talk=self.talk,
        )

    # -- model ---------------------------------------------------------------------------------------------------

    def model(self, prepared: Prepared) -> tuple[Transformer, list[Any]]:
        """The model to train and what it is made from."""
        from ratoon.model.init import init_weights
        from ratoon.model.transformer import Transformer
        from ratoon.store.artifact import Parent

        parents = [
            Parent(kind="shards", hash=prepared.manifest.hash, name=str(prepared.folder)),
            Parent(kind="tokenizer", hash=prepared.tokenizer.hash),
        ]
        init = self.plan.recipe.model.init
        if init is not None:
            lm, parent = _initial(init, prepared)
            self.taught = lm.can_chat
            return lm.model, [*parents, parent]
        tokenizer = prepared.tokenizer
        model = Transformer(
            self.plan.model_config(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        )
        init_weights(model, self.plan.recipe.seed)
        return model, parents

    def announce(self, prepared: Prepared, model: Transformer) -> None:
        """Say what was derived, and write down the resolved recipe, before anything is trained."""
        import shutil

        import yaml

        from ratoon.store.atomic import write_text

        if not self.world.first:
            return
        for one in self.plan.derived:
            self.talk(f"derived {one.key} = {one.value} ({one.reason})")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cfg = model.cfg
        self.talk(f"model: {parameters:,} parameters, {cfg.layers} layers, {cfg.width} wide, family {cfg.family}")
        write_text(self.run.recipe_path, yaml.safe_dump(self.plan.as_dict(), sort_keys=False, allow_unicode=True))
        shutil.copyfile(prepared.folder / "ledger.json", self.run.folder / "ledger.json")
        data = self.plan.recipe.data
        self.state(
            derived=[{"key": one.key, "value": one.value, "reason": one.reason} for one in self.plan.derived],
            model={
                "parameters": parameters,
                "family": cfg.family,
                **cfg.model_dump(mode="json", exclude_defaults=True),
            },
            data={
                "sources": list(data.sources) or [data.corpus or data.prepared],
                "prepared": str(prepared.folder),
                "train_tokens": prepared.train.n_tokens,
                "held_out_tokens": prepared.held_out.n_tokens,
                "vocab_size": prepared.tokenizer.vocab_size,
            },
            init=self.plan.recipe.model.init,
        )

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, prepared: Prepared, model: Transformer, parents: list[Any]) -> Result:
        """The loop, with what happens around it."""
        from ratoon.data.loader import Loader
        from ratoon.train.loop import train

        settings = self.plan.train
        loader = Loader(
            prepared.train,
            rows=settings.rows,
            context_tokens=settings.context_tokens,
            seed=settings.seed,
            rank=self.world.rank,
            world=self.world.size,
        )
        with self.records(settings, self.plan.recipe.track, self.plan.as_dict()) as log:
            result = train(
                model,
                loader,
                settings,
                self.run,
                hooks=self._hooks(prepared, log),
                parents=parents,
                resume=self.resume,
            )
        self.talk(
            f"trained {result.steps:,} steps, {result.tokens:,} tokens ({loader.passes(result.steps):.1f} passes) in "
            f"{result.seconds:,.0f} s"
        )
        self.state(passes=loader.passes(result.steps))
        return result

    def _hooks(self, prepared: Prepared, log: Callable[[dict[str, Any]], None]) -> Hooks:
        from ratoon.evaluate.run import held_out
        from ratoon.generate.lm import LanguageModel
        from ratoon.train.loop import Hooks

        settings, recipe = self.plan.train, self.plan.recipe
        prompts = list(recipe.samples) or _prompts(prepared)

        def evaluate(step: int, model: Transformer) -> dict[str, Any]:
            found = held_out(
                model,
                prepared.held_out,
                context_tokens=settings.context_tokens,
                rows=settings.rows,
                limit_tokens=settings.evaluate_tokens,
            )
            return found.as_dict()

        def sample(step: int, model: Transformer) -> list[dict[str, Any]]:
            lm = LanguageModel(model, prepared.tokenizer, recipe.name)
            room = model.cfg.context_tokens - max(len(lm.encode(prompt)) for prompt in prompts)
            tokens = max(1, min(recipe.sample_tokens, room))
            made = lm.generate(prompts, max_new_tokens=tokens, temperature=0.8, top_p=0.95, seed=recipe.seed)
            return [{"prompt": p, "text": one.text} for p, one in zip(prompts, made, strict=True)]

        return Hooks(evaluate=evaluate, sample=sample, log=log, talk=self.talk)

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, prepared: Prepared, model: Transformer, parents: list[Any], result: Result) -> None:
        """Write the best model, evaluate it on the whole held-out part, write the page, say what to type next."""
        from ratoon.evaluate.run import held_out
        from ratoon.model.folder import write_model
        from ratoon.train import checkpoint

        step = result.best_step or result.steps
        if step != result.steps:
            folder = self.run.checkpoints / checkpoint.folder_name(step)
            checkpoint.put_weights(dict(model.named_parameters()), checkpoint.load_weights(folder), folder)
            self.talk(
                f"the model is that of step {step:,}, the best on held-out text; the last step's is in "
                f"{self.run.checkpoints}"
            )
        settings = self.plan.train
        final = held_out(
            model,
            prepared.held_out,
            context_tokens=settings.context_tokens,
            rows=settings.rows,
            limit_tokens=FINAL_EVALUATION_TOKENS,
        ).as_dict()
        manifest = write_model(
            model,
            self.run.model,
            extra_files=prepared.tokenizer.files(),
            parents=parents,
            facts={"step": step, "tokens": result.tokens, "evaluation": final, "chat": self.taught},
            recipe=self.plan.as_dict(),
            replace=True,
        )
        commands = next_commands(self.run, self.plan.recipe.language, self.taught)
        self.state(
            status="done",
            step=step,
            steps=result.steps,
            tokens=result.tokens,
            seconds=result.seconds,
            evaluation=final,
            model_hash=manifest.hash,
            next_commands=commands,
        )
        self.page()
        low, high = final["interval"]
        self.talk(
            f"held-out loss {final['loss']:.4f} [{low:.4f}, {high:.4f}], perplexity {final['perplexity']:.2f}, "
            f"{final['bits_per_byte']:.4f} bits per byte, n = {final['n_tokens']:,} tokens"
        )
        self.talk(f"page: {self.run.report}")
        self.talk("next:\n  " + "\n  ".join(commands))


def next_commands(run: Run, language: str, taught: bool) -> list[str]:
    """What a person would type next. A model that was never `taught` to converse goes on from text instead."""
    prompt = "从前" if language == "zh" else "The function"
    commands = [
        f'ratoon generate {run.name} "{prompt}" --temperature 0.8',
        f"ratoon evaluate {run.name}",
        f"ratoon verify {run.name}",
        f"ratoon export {run.name} {run.name}-hf",
        f"ratoon pretrain {run.recipe_path} name={run.name}-longer train.budget_minutes=30",
    ]
    return [f"ratoon chat {run.name}" + ("" if taught else " --plain"), *commands]


def _initial(name: str, prepared: Prepared) -> tuple[LanguageModel, Any]:
    """The model to go on with. Raises `ArtifactError` when the shards were made with another tokenizer."""
    from ratoon.cli.export import model_parent
    from ratoon.generate.lm import load, locate

    lm = load(name, device="cpu")
    if lm.tokenizer is None:
        raise ArtifactError(f"the model '{name}' has no tokenizer", where="model.init", expected="tokenizer.json")
    if lm.tokenizer.hash != prepared.tokenizer.hash:
        raise ArtifactError(
            "the tokenizer does not fit the weights",
            where=prepared.folder,
            expected=f"the tokenizer of '{name}' ({lm.tokenizer.hash[:12]}), found {prepared.tokenizer.hash[:12]}",
            fix="leave data.tokenizer out, or prepare the data with the model's tokenizer",
        )
    lm.model.requires_grad_(True)
    return lm, model_parent(name, locate(name))


def _prompts(prepared: Prepared) -> list[str]:
    """The first words of a few held-out documents, spread over the part."""
    shards = prepared.held_out
    prompts: list[str] = []
    count = len(shards.document_starts) - 1
    for number in sorted({count * i // PROMPTS for i in range(PROMPTS)}):
        start, stop = int(shards.document_starts[number]), int(shards.document_starts[number + 1])
        text = prepared.tokenizer.decode([int(token) for token in shards.tokens(start, min(stop, start + 64))])
        words = text.split()
        cut = " ".join(words[:PROMPT_WORDS])
        if len(words) < PROMPT_WORDS or len(cut) > 80:  # no spaces between words: Chinese
            cut = text.strip()[:12]
        if cut:
            prompts.append(cut)
    if not prompts:
        raise ConfigError("no prompt could be taken from the held-out text", where="samples", fix="give samples: [...]")
    return prompts
