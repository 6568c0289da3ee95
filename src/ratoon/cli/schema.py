"""`ratoon schema`: every key of a recipe, for people as a list and for editors as a JSON schema.

Both are read off the settings themselves, the tables `train` and `model.settings` included.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo


@click.command()
@click.argument("key", required=False)
@click.option("--finetune", is_flag=True, help="The keys of a recipe of fine-tuning, in place of pretraining's.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON schema, for editors.")
def command(key: str | None, finetune: bool, as_json: bool) -> None:
    """Print every key of a recipe with its type, its default and what it means; with KEY, that one or those below it.

    `ratoon schema task.scoring` and `ratoon schema method.lora` print the settings of one task or method.

    `ratoon schema --json > recipe.schema.json` gives editors what they need: a recipe that begins with the line
    `# yaml-language-server: $schema=recipe.schema.json` is completed and checked while it is written.
    """
    from ratoon.base.errors import ConfigError
    from ratoon.cli.output import answer, answer_json

    keys = list(tuning_keys() if finetune else all_keys())
    if key is not None:
        keys = _below(key, keys) or _below(key, [*all_keys(), *tuning_keys()]) or list(_of_kind(key))
        if not keys:
            known = [one.name for one in (*all_keys(), *tuning_keys())]
            near = difflib.get_close_matches(key, known, n=1) or [
                name for name in known if name.rsplit(".", 1)[-1] == key
            ]
            raise ConfigError(
                f"a recipe has no key '{key}'",
                where="command line",
                expected=f"did you mean '{near[0]}'?" if near else "a dotted key, for example train.rows",
                fix="`ratoon schema` lists the keys of pretraining, `ratoon schema --finetune` those of fine-tuning",
            )
    if as_json:
        whole = tuning_schema if finetune else json_schema
        answer_json(whole() if key is None else {"keys": [vars(one) for one in keys]})
    else:
        answer("\n".join(_listing(keys)))


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


def all_keys() -> Iterator[Key]:
    """Every key of a recipe, dotted, in the order of the settings."""
    from ratoon.recipe import Recipe

    yield from _keys(Recipe, "")


def tuning_keys() -> Iterator[Key]:
    """Every key of a recipe of fine-tuning; those of a task or a method say of which kinds they are."""
    from ratoon.recipe.tuning import TuneRecipe
    from ratoon.train.settings import TrainSettings

    for name, field in TuneRecipe.model_fields.items():
        if name in ("task", "method"):
            yield Key(name, "table", None, field.is_required(), field.description or "")
            yield Key(f"{name}.kind", ", ".join(_kinds(name)), None, name == "task", "which one")
            yield from _by_kind(name)
        elif name == "train":
            yield Key(name, "table", None, False, field.description or "")
            yield from _keys(TrainSettings, name)
        elif (inner := _inner(field.annotation)) is not None:
            yield Key(name, "table", None, field.is_required(), _first_line(inner))
            yield from _keys(inner, name)
        else:
            yield _key(name, field)


def _kinds(table: str) -> dict[str, type[BaseModel]]:
    """The settings of each task, or of each method, by kind."""
    from ratoon.adapt.methods import METHODS, settings_of
    from ratoon.tasks.registry import TASKS, class_of

    if table == "method":
        return {kind: settings_of(kind) for kind in METHODS}
    return {kind: class_of(kind).settings_type for kind in TASKS}


def _below(key: str, keys: list[Key]) -> list[Key]:
    """The key and those below it, each once."""
    found = {one.name: one for one in reversed(keys) if one.name == key or one.name.startswith(key + ".")}
    return list(reversed(found.values()))


def _of_kind(key: str) -> Iterator[Key]:
    """What `task.scoring` or `method.lora` names: the settings of that kind, with its own defaults."""
    table, _, kind = key.partition(".")
    if table in ("task", "method") and (settings := _kinds(table).get(kind)) is not None:
        yield Key(f"{table}.kind", kind, None, True, _first_line(settings))
        yield from (one for one in _keys(settings, table) if one.name != f"{table}.kind")


def _by_kind(table: str) -> Iterator[Key]:
    found: dict[str, tuple[Key, list[str]]] = {}
    for kind, settings in _kinds(table).items():
        for one in _keys(settings, table):
            if one.name != f"{table}.kind":
                found.setdefault(one.name, (one, []))[1].append(kind)
    for one, kinds in found.values():
        yield Key(one.name, one.type, one.default, False, f"{one.description} [{', '.join(kinds)}]")


def tuning_schema() -> dict[str, Any]:
    """The JSON schema of a recipe of fine-tuning: `task` and `method` are one of their kinds."""
    from ratoon.recipe.tuning import TuneRecipe
    from ratoon.train.settings import TrainSettings

    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TuneRecipe.model_json_schema(),
    }
    train = TrainSettings.model_json_schema()
    train.pop("required", None)
    schema["properties"]["train"] = train
    for table in ("task", "method"):
        choices = []
        for kind, settings in _kinds(table).items():
            inner = settings.model_json_schema()
            schema.setdefault("$defs", {}).update(inner.pop("$defs", {}))
            inner["properties"] = {**inner.get("properties", {}), "kind": {"const": kind}}
            inner["required"] = sorted({*inner.get("required", []), "kind"})
            choices.append(inner)
        told = schema["properties"][table].get("description")
        schema["properties"][table] = {"description": told, "oneOf": choices}
    return schema


def _tables() -> dict[str, type[BaseModel]]:
    """The tables whose keys are decided elsewhere than in the recipe's own settings."""
    from ratoon.model.config import ModelConfig
    from ratoon.train.settings import TrainSettings

    return {"train": TrainSettings, "model.settings": ModelConfig}


def _keys(kind: type[BaseModel], within: str) -> Iterator[Key]:
    for field_name, field in kind.model_fields.items():
        name = f"{within}.{field_name}" if within else field_name
        inner = _tables().get(name) or _inner(field.annotation)
        if inner is None:
            yield _key(name, field)
            continue
        optional = type(None) in get_args(field.annotation)
        kind_words = "table, or absent" if optional else "table"
        required = field.is_required() and not within.startswith("model.settings")
        yield Key(name, kind_words, None, required, _first_line(inner) if not field.description else field.description)
        yield from _keys(inner, name)


def _inner(annotation: Any) -> type[BaseModel] | None:
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _key(name: str, field: FieldInfo) -> Key:
    words = type_words(field.annotation)
    limits = [f"{sign} {getattr(one, attribute)}" for one in field.metadata for attribute, sign in _limits(one)]
    default = None if field.is_required() else field.default
    required = field.is_required()
    table, _, last = name.rpartition(".")
    if table == "model.settings":
        required = False  # the size gives what is left open
        default = _defaults_of_sizes().get(last, default)
    if isinstance(default, tuple):
        default = list(default)
    return Key(name, ", ".join([words, *limits]), default, required, field.description or "")


def _defaults_of_sizes() -> dict[str, Any]:
    """What a recipe's model is where nothing is said, as far as it is the same for every size."""
    from ratoon.recipe import SIZES, default_shape

    shapes = [default_shape(size, size.context_tokens) for size in SIZES.values()]
    return {key: value for key, value in shapes[0].items() if all(shape[key] == value for shape in shapes)}


def _limits(one: Any) -> list[tuple[str, str]]:
    return [(name, sign) for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")) if hasattr(one, name)]


_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "absent",
    Any: "anything",
}


def type_words(annotation: Any) -> str:
    """A type for people: `whole number, or absent`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(one) for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(one) for one in arguments)
    if origin in (tuple, list):
        return f"list of {type_words(arguments[0])}"
    if origin is dict:
        return "table"
    return _WORDS.get(annotation) or type_words(arguments[0] if arguments else Any)


def _first_line(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _listing(keys: list[Key]) -> list[str]:
    import textwrap

    lines = []
    for one in keys:
        given = "required" if one.required else "" if one.default is None else f"default {_shown(one.default)}"
        lines.append(f"{one.name}: {one.type}" + (f" ({given})" if given else ""))
        if one.description:
            lines += textwrap.wrap(one.description, 110, initial_indent="    ", subsequent_indent="    ")
    return lines


def _shown(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, default=lambda one: one.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe; the tables `train` and `model.settings` hold their own keys."""
    from ratoon.recipe import Recipe

    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    for dotted, kind in _tables().items():
        inner = kind.model_json_schema()
        schema["$defs"] |= inner.pop("$defs", {})
        inner.pop("required", None)  # what is absent is derived
        if dotted == "model.settings":
            for key, value in _defaults_of_sizes().items():
                inner["properties"][key]["default"] = value
        *parents, last = dotted.split(".")
        place = schema
        for parent in parents:
            place = _resolved(schema, place["properties"][parent])
        given = place["properties"][last]
        place["properties"][last] = {**inner, "description": given.get("description", inner.get("description"))}
    return schema


def _resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    reference = part.get("$ref")
    found: dict[str, Any] = part if reference is None else schema["$defs"][reference.rsplit("/", 1)[-1]]
    return found
