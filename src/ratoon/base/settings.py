"""Typed settings: the one base class of every table of settings, and how a YAML file becomes one.

Decides what is refused (unknown keys, wrong types, impossible values) and that the refusal names file,
line and key, with the nearest known key. What the settings mean is decided where they are used.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from ratoon.base.errors import ConfigError


class Settings(BaseModel):
    """A table of settings: unknown keys are refused, values are typed, instances do not change.

    `protected_namespaces` is emptied so that a key may be called `model…`. Numbers are finite, and `true` is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)
    explained_by: ClassVar[str] = "ratoon schema"
    """The command that says what the keys mean."""

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds_in(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("a number is expected, not true or false")
        return value


def _kinds_in(annotation: Any) -> set[Any]:
    """The classes that an annotation names, inside unions too (not inside lists and tables)."""
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for argument in get_args(annotation) for kind in _kinds_in(argument)}
    if get_origin(annotation) is Annotated:
        return _kinds_in(get_args(annotation)[0])
    return {annotation} if isinstance(annotation, type) else set()


S = TypeVar("S", bound=Settings)


COMMAND_LINE = "command line"


class _Mapping(dict[str, Any]):
    """A mapping that remembers the line of each of its keys; 0 is the command line."""

    lines: dict[str, int]


class _LineLoader(yaml.SafeLoader):
    """YAML's safe loader; keeps line numbers, refuses a key that stands twice.

    Words and numbers are YAML 1.2's. YAML 1.1 reads `1e-3` as a string, `off` and `no` as false, `010` as eight,
    `1:30` as ninety and `2024-05-01` as a date: each a trap in a table of settings.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


def _construct_mapping(loader: _LineLoader, node: yaml.MappingNode) -> _Mapping:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)  # `<<: *other`: what stands here wins over what is merged in
    mapping = _Mapping()
    mapping.lines = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        mapping.lines[str(key)] = key_node.start_mark.line + 1
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_LineLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
for _kind, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _LineLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` naming the line for anything else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=path, expected="a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 at byte {error.start}", where=path, fix="save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror}", where=path, expected="a YAML recipe") from None
    try:
        found = yaml.load(text, Loader=_LineLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"not readable as YAML: {error.problem}", where=f"{path}:{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not readable as YAML: {error}", where=path) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"the file holds a {type(found).__name__}", where=path, expected="keys with values")
    return found


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=200", …]` as `{"train.steps": 200, …}`; values are read as YAML."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"'{text}' is not key=value", where=COMMAND_LINE, expected="for example train.steps=200")
        try:
            values[key.strip()] = yaml.load(value, Loader=_LineLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '{key}' is not readable as YAML: {error}", where=COMMAND_LINE) from None
    return values


def merge(table: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`table` with dotted-key `overrides` put in; neither argument changes."""
    merged: dict[str, Any] = _copy(table)
    for dotted, value in overrides.items():
        place = merged
        *parents, last = dotted.split(".")
        for parent in parents:
            inner = place.get(parent)
            if inner is None:
                inner = place[parent] = _Mapping()
                inner.lines = {}
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"'{parent}' is a value, not a table",
                    where=f"{dotted}={value}",
                    expected=f"{parent}={inner!r} to stand alone",
                )
            place = inner
        place[last] = value
        if isinstance(place, _Mapping):
            place.lines[last] = 0
    return merged


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        copy = _Mapping({key: _copy(inner) for key, inner in value.items()})
        copy.lines = dict(getattr(value, "lines", {}))
        return copy
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def build(kind: type[S], table: dict[str, Any], *, where: str | os.PathLike[str] = "settings", within: str = "") -> S:
    """`table` as settings of `kind`; `within` is the dotted key under which the table stands in its file.

    Raises `ConfigError` for the first thing that does not fit, with file, line, key, what was found, and
    the nearest known key where one is close.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # An unknown key explains the most, so it is told first.
        details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
        raise _explain(kind, table, details, os.fspath(where), within) from None


def _explain(
    kind: type[Settings], table: dict[str, Any], details: list[ErrorDetails], where: str, within: str
) -> ConfigError:
    detail = details[0]
    path = [str(part) for part in detail["loc"]]
    line = _line_of(table, path)
    place = where if line is None else COMMAND_LINE if line == 0 else f"{where}:{line}"
    dotted = ".".join([within, *path] if within else path)
    command = f"ratoon schema {within}" if within else kind.explained_by
    more = f"; {len(details) - 1} more after it" if len(details) > 1 else ""
    if detail["type"] == "extra_forbidden":
        known = _keys_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
        return ConfigError(
            f"unknown key '{dotted}'{more}",
            where=place,
            expected=f"did you mean '{near[0]}'?" if near else "one of: " + ", ".join(sorted(known)),
            fix=f"`{command}` lists every key with what it means",
        )
    if detail["type"] == "missing":
        return ConfigError(f"the key '{dotted}' is missing{more}", where=place, fix=f"`{command}` says what it means")
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    shown = "" if isinstance(given, dict) else f" (found {given!r})"
    return ConfigError(f"'{dotted or where}': {message}{shown}{more}", where=place, fix=f"`{command}` lists every key")


def _line_of(table: Any, path: list[str]) -> int | None:
    line = None
    for part in path:
        if isinstance(table, dict):
            line = getattr(table, "lines", {}).get(part, line)
            table = table.get(part)
        elif isinstance(table, list) and part.isdigit() and int(part) < len(table):
            table = table[int(part)]
        else:
            break
    return line


def _keys_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The keys known where an unknown one stood; passes through optional and listed tables."""
    current: list[type[BaseModel]] = [kind]
    for part in path:
        inner: list[type[BaseModel]] = []
        for model in current:
            field = model.model_fields.get(part)
            if field is not None:
                inner += _tables_in(field.annotation)
        current = inner or current
    return sorted({name for model in current for name in model.model_fields})


def _tables_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _tables_in(argument)]
