"""The recipe of a pretraining run: everything it is told, in one typed table, and what is derived when it is not told.

Free of torch. Decides keys, defaults and derivations; what the settings do is decided on the floors they belong to.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from ratoon.base.catalog import ENTRIES, entry, shipped
from ratoon.base.errors import ConfigError
from ratoon.base.settings import Settings, build, merge, read_yaml
from ratoon.model.config import ModelConfig
from ratoon.model.count import parameters
from ratoon.train.settings import TrainSettings


@dataclass(frozen=True)
class Derived:
    """A value that nobody gave, and why it is what it is."""

    key: str
    value: Any
    reason: str


class DataSettings(Settings):
    """Where the text comes from and how it is prepared."""

    sources: tuple[str, ...] = Field((), description="files and folders of text")
    corpus: str | None = Field(
        None, description="a name of the catalogue, in place of `sources`; see `ratoon pull --list`"
    )
    prepared: str | None = Field(None, description="a folder that `ratoon prepare` made, in place of `sources`")
    tokenizer: str | None = Field(None, description="a folder with a tokenizer; absent: one is trained, or the model's")
    vocab_size: int = Field(
        4096, ge=259, description="tokens of the tokenizer that is trained; read without `tokenizer`"
    )
    split_han: bool = Field(
        False,
        description="every Chinese character is a token of its own, for tags and answers that begin at any character; "
        "read without `tokenizer`",
    )
    held_out_fraction: float = Field(0.05, gt=0, lt=0.9, description="share of the documents that is never trained on")
    split_documents: str | None = Field(
        None,
        description="what a document is in plain text: file, lines, blank-lines, or a separator of your own; "
        "absent: what the catalogue says of `corpus`, else file",
    )
    field: str | None = Field(None, description="the field that holds the text in rows; absent: recognised, and said")
    encoding: str = Field("utf-8", description="encoding of the sources")
    on_bad_row: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: rows that cannot be read are left out, counted"
    )
    min_characters: int = Field(0, ge=0, description="shorter texts are left out, counted")

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        given = [name for name in ("sources", "corpus", "prepared") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give one of sources, corpus, prepared; found {', '.join(given) or 'none'}")
        return self


class Size(Settings):
    """One setting of the dial `size`."""

    layers: int
    width: int
    heads: int
    context_tokens: int
    rows: int


TOKENS_A_PARAMETER = 20

SIZES: dict[str, Size] = {
    "tiny": Size(layers=4, width=128, heads=4, context_tokens=128, rows=32),
    "small": Size(layers=6, width=256, heads=4, context_tokens=256, rows=32),
    "medium": Size(layers=6, width=384, heads=6, context_tokens=256, rows=64),
    "large": Size(layers=12, width=512, heads=8, context_tokens=512, rows=64),
    "gpt2": Size(layers=12, width=768, heads=12, context_tokens=1024, rows=256),
}


def _as_given(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A table is checked, and kept as it was read: it knows the lines of its keys."""
    check(value)
    return value


Table = Annotated[dict[str, Any], WrapValidator(_as_given)]


class ModelSettings(Settings):
    """The model: one to go on with (`init`), or a new one by `size`, with single settings changed by name."""

    init: str | None = Field(None, description="go on training this model: a run, a folder, a GGUF file, a name")
    size: Literal["tiny", "small", "medium", "large", "gpt2"] | None = Field(
        None, description="the dial: layers, width, heads, context and rows follow from it"
    )
    settings: Table = Field(
        {}, description="settings of the Transformer by name (layers, width, family, mlp, …), over those of the size"
    )


class Recipe(Settings):
    """A pretraining run."""

    _where: str = "recipe"
    _replaced: tuple[Derived, ...] = ()

    name: str = Field("run", description="the run's folder is runs/<name>")
    language: Literal["en", "zh"] = Field("en", description="language of the page")
    seed: int = Field(1, ge=0, description="the one seed; every use of chance has its own stream under it")
    minutes: float | None = Field(None, gt=0, description="the dial: size and schedule follow from the time there is")
    data: DataSettings
    model: ModelSettings = ModelSettings.model_construct(init=None, size=None, settings={})
    train: Table = Field({}, description="see the table `train`")
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="trackers beside metrics.jsonl"
    )
    samples: tuple[str, ...] = Field((), description="prompts that the model goes on from, before and after")
    sample_tokens: int = Field(80, ge=1, description="new tokens of a sample")


@dataclass(frozen=True)
class Plan:
    """A recipe with everything settled but the vocabulary, which comes with the tokenizer."""

    recipe: Recipe
    train: TrainSettings
    shape: dict[str, Any]
    derived: tuple[Derived, ...]

    def model_config(self, vocab_size: int, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> ModelConfig:
        """The new model's settings for that tokenizer."""
        ids = {"bos_id": bos_id, "eos_ids": () if eos_id is None else (eos_id,), "pad_id": pad_id}
        return build(ModelConfig, {"vocab_size": vocab_size, **ids, **self.shape}, where="model.settings")

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe, as it is written into the run's folder."""
        table = self.recipe.model_dump(mode="json", exclude_defaults=False)
        table["train"] = self.train.model_dump(mode="json")
        table["model"]["settings"] = dict(self.shape)
        if table["model"]["size"] is None:
            table["model"]["size"] = next((one.value for one in self.derived if one.key == "model.size"), None)
        return table


def read_table(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a YAML file, a shipped recipe's name or a table says, and where it stands. Raises `ConfigError`."""
    if isinstance(recipe, Mapping):
        return dict(recipe), "recipe"
    path = Path(recipe)
    if not path.is_file() and str(recipe) in shipped():
        path = shipped()[str(recipe)]
    if not path.is_file():
        near = difflib.get_close_matches(str(recipe), shipped(), n=1)
        raise ConfigError(
            f"there is no recipe '{recipe}'",
            where=path,
            expected=f"did you mean '{near[0]}'?" if near else "a YAML file, or one of: " + ", ".join(shipped()),
            fix="`ratoon recipes` lists those that ship",
        )
    return read_yaml(path), str(path)


def _named(recipe: Any) -> str:
    return str(recipe) if isinstance(recipe, str | os.PathLike) else "RECIPE"


def load(recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A YAML file, a shipped recipe's name or a table, with dotted `overrides`, as a Recipe.

    Raises `ConfigError` naming file, line and key for whatever does not fit.
    """
    table, where = read_table(recipe)
    if "task" in table:
        raise ConfigError(
            "the recipe has a task: it fine-tunes a model", where=where, fix=f"ratoon finetune {_named(recipe)}"
        )
    merged = merge(table, dict(overrides or {}))
    replaced = _replace(merged, overrides or {})
    found = build(Recipe, merged, where=where)
    found._where, found._replaced = where, replaced
    return found


INSTEAD = {
    "data.sources": ("data.corpus", "data.prepared"),
    "data.corpus": ("data.sources", "data.prepared"),
    "data.prepared": ("data.sources", "data.corpus"),
    "train.steps": ("train.budget_minutes",),
    "train.budget_minutes": ("train.steps", "minutes"),
    "minutes": ("train.steps", "train.budget_minutes"),
}
"""Keys that exclude each other: an override of one takes the place of what the file says of the others."""


def _replace(table: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[Derived, ...]:
    replaced = []
    for key, others in INSTEAD.items():
        if overrides.get(key) is None:
            continue
        for other in others:
            *parents, last = other.split(".")
            place: Any = table
            for parent in parents:
                place = place.get(parent) if isinstance(place, dict) else None
            if overrides.get(other) is None and isinstance(place, dict) and place.get(last) is not None:
                del place[last]
                replaced.append(Derived(other, None, f"{key} is given in its place"))
    return tuple(replaced)


def settle(recipe: Recipe) -> Plan:
    """Derive what the recipe leaves open. Raises `ConfigError` for what does not fit, with file, line and key."""
    derived = list(recipe._replaced)

    def settle_one(table: dict[str, Any], key: str, value: Any, reason: str) -> None:
        last = key.rsplit(".", 1)[-1]
        if table.get(last) is None:
            table[last] = value
            derived.append(Derived(key, value, reason))

    where = recipe._where
    if recipe.model.init is not None and (recipe.model.size or recipe.model.settings):
        raise ConfigError(
            "model.init goes on with a model as it is; size and settings make a new one", where=where, fix="give one"
        )
    data, found = with_documents(recipe.data, where)
    derived += found
    recipe = recipe.model_copy(update={"data": data})
    train = merge(recipe.train, {})
    name: str | None = recipe.model.size
    if name is None and recipe.model.init is None:
        name, why = _size_for(recipe.minutes or train.get("budget_minutes"))
        derived.append(Derived("model.size", name, why))
    if recipe.minutes is not None and train.get("steps") is None:
        settle_one(train, "train.budget_minutes", recipe.minutes, "the dial `minutes`")
    settle_one(train, "train.seed", recipe.seed, "the recipe's seed")
    if name is not None:
        settle_one(train, "train.context_tokens", SIZES[name].context_tokens, f"size {name}")
        settle_one(train, "train.rows", SIZES[name].rows, f"size {name}")
    open_ended = train.get("steps") is None and train.get("budget_minutes") is None
    if open_ended and name is not None:
        # Names and types are checked before anything is computed with them.
        build(TrainSettings, merge(train, {"steps": sys.maxsize}), where=where, within="train")
    shape = {} if name is None else _settled_shape(recipe, name, train["context_tokens"], derived)
    if open_ended and name is not None:
        about = parameters(build(ModelConfig, {"vocab_size": recipe.data.vocab_size, **shape}, where=where))
        tokens = TOKENS_A_PARAMETER * about
        settle_one(
            train,
            "train.steps",
            max(1, round(tokens / (train["rows"] * train["context_tokens"]))),
            f"{TOKENS_A_PARAMETER} tokens for each of about {about / 1e6:.1f} million parameters "
            "(Hoffmann et al., arXiv:2203.15556)",
        )
    return Plan(recipe, build(TrainSettings, train, where=where, within="train"), shape, tuple(derived))


def with_documents(data: DataSettings, where: str) -> tuple[DataSettings, list[Derived]]:
    """`data` with what a document is, if that is left open. Raises `ConfigError` for a corpus that there is not."""
    split, why = "file", "nothing else is said"
    if data.corpus is not None:
        found = entry(data.corpus, where=f"{where}, data.corpus")
        if found.kind != "corpus":
            corpora = ", ".join(one.name for one in ENTRIES.values() if one.kind == "corpus")
            raise ConfigError(
                f"'{data.corpus}' is a {found.kind}", where=f"{where}, data.corpus", expected=f"a corpus: {corpora}"
            )
        split, why = found.split_documents, f"the catalogue says so of {data.corpus}"
    if data.prepared is not None or data.split_documents is not None:
        return data, []
    return data.model_copy(update={"split_documents": split}), [Derived("data.split_documents", split, why)]


def _size_for(minutes: Any) -> tuple[str, str]:
    """The size that fits the time, and why. Something that is no number is refused later, with its line."""
    if not isinstance(minutes, int | float):
        return "medium", "no minutes given"
    name = "medium" if minutes >= 20 else "small" if minutes >= 3 else "tiny"
    return name, f"what learns most in {minutes:g} minutes on two cores"


def _settled_shape(recipe: Recipe, name: str, context_tokens: Any, derived: list[Derived]) -> dict[str, Any]:
    """The Transformer's settings: those of the size, with the given ones over them, checked."""
    given = recipe.model.settings
    shape = default_shape(SIZES[name], context_tokens) | given
    if "mlp_width" not in given:
        shape["mlp_width"] = 4 * shape["width"] if isinstance(shape["width"], int) else 1
    checked = merge(given, {})
    for key, value in {"vocab_size": recipe.data.vocab_size, **shape}.items():
        checked.setdefault(key, value)
    build(ModelConfig, checked, where=recipe._where, within="model.settings")
    for key in ("layers", "width", "heads"):
        if key not in given:
            derived.append(Derived(f"model.settings.{key}", shape[key], f"size {name}"))
    return shape


def default_shape(size: Size, context_tokens: int) -> dict[str, Any]:
    """Our default architecture, which Transformers knows as NanoChat: RMS norms without gains, normed queries and
    keys, ReLU² (So et al., arXiv:2109.08668), rotary positions, embedding and head apart."""
    return {
        "family": "nanochat",
        "layers": size.layers,
        "width": size.width,
        "heads": size.heads,
        "context_tokens": context_tokens,
        "norm_weight": "none",
        "norm_eps": 1e-6,
        "embedding_norm": True,
        "qk_norm": "after_rope",
        "rope_sign": -1,
        "mlp": "relu2",
        "tied_embeddings": False,
    }
