"""The recipe of a fine-tuning run: a base, a task, its rows, a method; and what is derived when it is not told.

Free of torch. Decides keys, defaults and derivations; what the settings of a task or a method are is decided in their
own files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ratoon.base.errors import ConfigError
from ratoon.base.settings import Settings, build, merge
from ratoon.data.records import RecordSettings
from ratoon.recipe.pretraining import Derived, Table, read_table
from ratoon.tasks.registry import class_of
from ratoon.train.settings import NoiseSettings, TrainSettings

EXAMPLES_A_STEP, FEWEST_EXAMPLES_A_STEP, WANTED_STEPS = 32, 8, 200
"""A step has so many examples; fewer, where the run would otherwise have fewer steps than wanted."""
EXAMPLES_FROM_NOTHING = 128
"""The same for new weights: on pairs of sentences they learn more of the same epochs than with 32, in half the time."""

LEARNING_RATES = {"full": 2e-4, "lora": 1e-3, "adalora": 5e-3, "ia3": 3e-2, "houlsby": 1e-3, "pfeiffer": 1e-3,
                  "prefix": 1e-2, "prompt": 3e-2}  # fmt: skip
"""Peak learning rates of the methods, as found for a model MEASURED_WIDTH wide on two data sets of a few hundred steps
(benchmarks/RESULTS.md)."""
MEASURED_WIDTH = 576
"""A wider model has so much less of the rate as it is wider: what AdamW's step of a matrix does to the next layer grows
with its width (Yang et al., arXiv:2203.03466, table 3). A narrower one has the same rate: more was not tried."""
FROM_NOTHING = 1e-3
"""Peak learning rate of a model that begins with random weights."""


class TunedModel(Settings):
    """The model that is fine-tuned, and how it reads."""

    base: str | None = Field(None, description="a run, a folder, a GGUF file, or a name of the catalogue")
    adapter: str | None = Field(None, description="go on with an adapter that was made for this base")
    architecture: Literal["decoder", "encoder-decoder"] = Field(
        "decoder", description="encoder-decoder: a new sequence-to-sequence model with random weights, see `settings`"
    )
    settings: Table = Field({}, description="encoder-decoder: layers, widths; see `ratoon schema model.settings`")
    tokenizer: str | None = Field(
        None, description="encoder-decoder: whose tokenizer; absent: one is trained on the rows"
    )
    vocab_size: int = Field(8000, ge=259, description="encoder-decoder: tokens of the tokenizer that is trained")
    attention: Literal["causal", "both"] = Field(
        "causal", description="both: each token sees the whole text (tasks with a head); causal: what is before it"
    )
    pooling: Literal["last", "mean", "attention"] = Field(
        "last", description="which tokens the head of a whole text reads"
    )

    @model_validator(mode="after")
    def _fits(self) -> TunedModel:
        new = self.architecture == "encoder-decoder"
        if new == (self.base is not None):
            raise ValueError(
                "give 'base', or architecture: encoder-decoder, which begins anew"
                if not new
                else "an encoder-decoder begins anew: it has no 'base'"
            )
        if not new and (self.settings or self.tokenizer):
            raise ValueError("'settings' and 'tokenizer' are for a new encoder-decoder; a base has its own")
        if new and (self.attention != "causal" or self.pooling != "last" or self.adapter):
            raise ValueError("an encoder-decoder has neither 'attention', 'pooling' nor 'adapter'")
        return self


class TuneRecipe(Settings):
    """A fine-tuning run."""

    explained_by: ClassVar[str] = "ratoon schema --finetune"
    _where: str = "recipe"
    _replaced: tuple[Derived, ...] = ()

    name: str = Field("tuned", description="the run's folder is runs/<name>")
    language: Literal["en", "zh"] = Field("en", description="language of the texts, for measures, and of the page")
    seed: int = Field(1, ge=0, description="the one seed; every use of chance has its own stream under it")
    task: Table = Field(description="`kind` names the task, other keys are its settings; see the tables `task.…`")
    data: RecordSettings
    model: TunedModel
    method: Table = Field({"kind": "full"}, description="`kind` names the method, other keys are its settings")
    epochs: float | None = Field(None, gt=0, description="passes over the rows; absent: 3, or as train.steps says")
    train: Table = Field({}, description="see the table `train`")
    noise: NoiseSettings = Field(
        default_factory=lambda: NoiseSettings.model_validate({}),
        description="what makes training harder, so that the model stands more",
    )
    merge: bool = Field(False, description="fold the adapter into the base's weights at the end")
    keep_trunk: bool = Field(
        True, description="what frozen lower blocks compute is kept on disk during the run and read again"
    )
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="trackers beside metrics.jsonl"
    )

    @model_validator(mode="after")
    def _fits(self) -> TuneRecipe:
        if self.noise.on_embeddings and self.model.architecture == "encoder-decoder":
            raise ValueError("noise on embeddings is for models that read one text: an encoder-decoder has two inputs")
        return self


@dataclass(frozen=True)
class TunePlan:
    """A recipe with everything settled but what the number of rows decides."""

    recipe: TuneRecipe
    derived: tuple[Derived, ...]

    def train_settings(
        self, *, rows_an_epoch: int, examples: int, width: int = MEASURED_WIDTH
    ) -> tuple[TrainSettings, tuple[Derived, ...]]:
        """The settings of the loop, for so many rows and examples and a model of that width. Raises `ConfigError` for
        what does not fit."""
        recipe = self.recipe
        table = merge(recipe.train, {})
        derived: list[Derived] = []

        def settle(key: str, value: Any, reason: str) -> None:
            if table.get(key) is None:
                table[key] = value
                derived.append(Derived(f"train.{key}", value, reason))

        new = recipe.model.architecture == "encoder-decoder"
        kind = str(recipe.method.get("kind", "full"))
        each = examples / rows_an_epoch
        epochs = recipe.epochs if recipe.epochs is not None else 3
        at_once = EXAMPLES_FROM_NOTHING if new else EXAMPLES_A_STEP
        if table.get("steps") is None and table.get("budget_minutes") is None:
            at_once = min(at_once, max(FEWEST_EXAMPLES_A_STEP, round(epochs * examples / WANTED_STEPS)))
        rows = max(1, round(at_once / each))
        settle("rows", min(rows, max(1, rows_an_epoch // 2)), f"about {at_once} examples a step, {each:.1f} a row")
        if table.get("steps") is None and table.get("budget_minutes") is None:
            steps = max(1, -(-round(epochs * rows_an_epoch) // int(table["rows"])))
            settle("steps", steps, f"{epochs:g} epochs of {rows_an_epoch:,} rows")
        settle("seed", recipe.seed, "the recipe's seed")
        settle("optimizer", "muon" if new else "adamw", "new weights" if new else "fine-tuning")
        if kind == "full" and not new:
            settle("moments", "bfloat16", f"method {kind}: half the memory of AdamW's state")
        if new:
            settle("learning_rate", FROM_NOTHING, "new weights")
        else:
            rate, told = LEARNING_RATES.get(kind, LEARNING_RATES["lora"]), f"method {kind}"
            if width > MEASURED_WIDTH:
                told += f": {rate:g}, less by {MEASURED_WIDTH} / {width} for the model's width"
            settle("learning_rate", float(f"{rate * min(1, MEASURED_WIDTH / width):.3g}"), told)
        settle("schedule", "wsd" if new else "cosine", "new weights" if new else "fine-tuning")
        settle("weight_decay", 0.1 if new else 0.01, "new weights" if new else "fine-tuning")
        if table.get("steps") is not None:
            settle("warmup_steps", int(table["steps"]) // 10, "a tenth of the steps")
        if table.get("evaluate_every_steps") is None and table.get("steps") is not None:
            epoch = max(1, round(rows_an_epoch / int(table["rows"])))
            settle("evaluate_every_steps", min(epoch, int(table["steps"])), "each epoch")
        return build(TrainSettings, table, where=recipe._where, within="train"), tuple(derived)

    @property
    def context_tokens(self) -> int:
        """Places of a row."""
        return int(self.recipe.train.get("context_tokens") or TrainSettings.model_fields["context_tokens"].default)

    def as_dict(self, train: TrainSettings | None = None) -> dict[str, Any]:
        """The resolved recipe, as it is written into the run's folder."""
        table = self.recipe.model_dump(mode="json", exclude_defaults=False)
        if train is not None:
            table["train"] = train.model_dump(mode="json")
            table["epochs"] = None
        return table


def load_tuning(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TuneRecipe:
    """A YAML file, a shipped recipe's name or a table, with dotted `overrides`, as a TuneRecipe.

    Raises `ConfigError` naming file, line and key for whatever does not fit.
    """
    table, where = read_table(recipe)
    table, replaced = _of_another_kind(table, overrides or {})
    merged = merge(table, dict(overrides or {}))
    if "task" not in merged:
        raise ConfigError(
            "the recipe has no task: it pretrains a model",
            where=where,
            expected="a table `task` with its `kind`",
            fix="ratoon pretrain runs it; `ratoon recipes` lists those with a task",
        )
    merged = _with_sources(merged, where)
    found = build(TuneRecipe, merged, where=where)
    found._where, found._replaced = where, replaced
    return found


def _of_another_kind(table: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Derived, ...]]:
    """The table without settings of a task or method whose kind is overridden by another: they are not its own. Nor is
    the learning rate that was chosen for another method."""
    replaced = []
    for name in ("task", "method"):
        kind, given = overrides.get(f"{name}.kind"), table.get(name)
        if kind is None or not isinstance(given, dict) or given.get("kind", "full") == kind:
            continue
        table = merge(table, {})
        for key in [key for key in given if key not in ("kind", "fields")]:
            del table[name][key]
            replaced.append(
                Derived(f"{name}.{key}", None, f"it was set for {given.get('kind', 'full')}, not for {kind}")
            )
        train = table.get("train")
        if name == "method" and isinstance(train, dict) and train.get("learning_rate") is not None:
            table = merge(table, {})
            del table["train"]["learning_rate"]
            if "train.learning_rate" not in overrides:
                told = f"it was set for {given.get('kind', 'full')}, not for {kind}"
                replaced.append(Derived("train.learning_rate", None, told))
    return table, tuple(replaced)


def _with_sources(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The table with `task.as_source` as the architecture has it: an encoder reads sources apart, any other model reads
    them before the answer."""
    task, model = table["task"], table.get("model")
    if not isinstance(task, dict) or not isinstance(model, dict) or "kind" not in task:
        return table  # what is wrong, the settings say themselves
    new = model.get("architecture") == "encoder-decoder"
    kind = class_of(task["kind"])
    if "as_source" not in kind.settings_type.model_fields:
        if new:
            raise ConfigError(
                f"an encoder-decoder writes a text for a source, and the task {kind.kind} has no such answer",
                where=where,
                expected="translation, summarization or question-answering",
                fix="give model.base, or another task.kind",
            )
        return table
    if task.get("as_source", new) != new:
        raise ConfigError(
            "the encoder of an encoder-decoder reads the source" if new else "a base has no encoder to read a source",
            where=where,
            expected=f"task.as_source: {str(new).lower()}",
            fix="leave task.as_source out: it follows model.architecture",
        )
    return merge(table, {"task.as_source": True}) if new else table


def settle_tuning(recipe: TuneRecipe) -> TunePlan:
    """Check what can be checked before a row is read. Raises `ConfigError` with file, line and key."""
    probe = merge(recipe.train, {})
    if probe.get("steps") is None and probe.get("budget_minutes") is None:
        probe["steps"] = 1_000_000_000
    build(TrainSettings, probe, where=recipe._where, within="train")
    if recipe.epochs is not None and (recipe.train.get("steps") or recipe.train.get("budget_minutes")):
        raise ConfigError(
            "epochs and train.steps (or train.budget_minutes) are both given", where=recipe._where, fix="give one"
        )
    return TunePlan(recipe, recipe._replaced)
