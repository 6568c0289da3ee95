"""Typed settings: the one base class of every table of settings, and how a YAML file becomes one.

Decides what is refused (unknown keys, wrong types, impossible values) and that the refusal names file,
line and key, with the nearest known key. What the settings mean is decided where they are used.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ratoon.base.errors import ConfigError


class Settings(BaseModel):
    """A table of settings: unknown keys are refused, values are typed, instances do not change.

    `protected_namespaces` is emptied so that a key may be called `model…`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


S = TypeVar("S", bound=Settings)


class _Mapping(dict[str, Any]):
    """A mapping that remembers the line of each of its keys."""

    lines: dict[str, int]


class _LineLoader(yaml.SafeLoader):
    """YAML's safe loader; keeps line numbers, refuses a key that stands twice."""


def _construct_mapping(loader: _LineLoader, node: yaml.MappingNode) -> _Mapping:
    loader.flatten_mapping(node)
    mapping = _Mapping()
    mapping.lines = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
        mapping.lines[str(key)] = key_node.start_mark.line + 1
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_LineLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
# YAML 1.1 reads 1e-3 as a string: in tables of learning rates that is a trap, so numbers are numbers.
_LineLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` naming the line for anything else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=path, expected="a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 at byte {error.start}", where=path, fix="save the file as UTF-8") from None
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
            raise ConfigError(
                f"'{text}' is not key=value", where="command line", expected="for example train.steps=200"
            )
        try:
            values[key.strip()] = yaml.load(value, Loader=_LineLoader) if value.strip() else None
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '{key}' is not readable as YAML: {error}", where="command line") from None
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
                inner = place[parent] = {}
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"'{parent}' is a value, not a table",
                    where=f"{dotted}={value}",
                    expected=f"{parent}={inner!r} to stand alone",
                )
            place = inner
        place[last] = value
    return merged


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        copy = _Mapping({key: _copy(inner) for key, inner in value.items()})
        copy.lines = dict(getattr(value, "lines", {}))
        return copy
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def build(kind: type[S], table: dict[str, Any], *, where: str | os.PathLike[str] = "settings") -> S:
    """`table` as settings of `kind`.

    Raises `ConfigError` for the first thing that does not fit, with file, line, key, what was found, and
    the nearest known key where one is close.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # An unknown key explains the most, so it is told first.
        details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
        raise _explain(kind, table, details, os.fspath(where)) from None


def _explain(kind: type[Settings], table: dict[str, Any], details: list[ErrorDetails], where: str) -> ConfigError:
    detail = details[0]
    path = [str(part) for part in detail["loc"]]
    line = _line_of(table, path)
    place = f"{where}:{line}" if line else where
    dotted = ".".join(path)
    more = f"; {len(details) - 1} more after it" if len(details) > 1 else ""
    if detail["type"] == "extra_forbidden":
        known = _keys_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
        return ConfigError(
            f"unknown key '{dotted}'{more}",
            where=place,
            expected=f"did you mean '{near[0]}'?" if near else "one of: " + ", ".join(sorted(known)),
            fix="`ratoon schema` lists every key with what it means",
        )
    if detail["type"] == "missing":
        return ConfigError(
            f"the key '{dotted}' is missing{more}", where=place, fix="`ratoon schema` says what it means"
        )
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    shown = "" if isinstance(given, dict) else f" (found {given!r})"
    return ConfigError(
        f"'{dotted or where}': {message}{shown}{more}", where=place, fix="`ratoon schema` lists every key"
    )


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
