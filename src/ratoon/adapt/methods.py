"""All methods by name, and the method that a table of settings asks for.

Decides the names; a method's file is read when it is asked for. What a method does stands in that file.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ratoon.adapt.contract import Method
from ratoon.base.errors import ConfigError
from ratoon.base.settings import Settings, build

_WHERE: dict[str, tuple[str, str, str]] = {
    "full": ("full", "Full", "FullSettings"),
    "lora": ("lora", "Lora", "LoraSettings"),
    "adalora": ("adalora", "AdaLora", "AdaLoraSettings"),
    "ia3": ("ia3", "IA3", "IA3Settings"),
    "prefix": ("prefix", "PrefixTuning", "PrefixSettings"),
    "prompt": ("prompt", "Prompt", "PromptSettings"),
    "houlsby": ("bottleneck", "Houlsby", "HoulsbySettings"),
    "pfeiffer": ("bottleneck", "Pfeiffer", "PfeifferSettings"),
}
"""Kind -> file, method, settings."""


class _Methods(Mapping[str, type[Method]]):
    """Kind -> class; the file is read when the class is asked for."""

    def __getitem__(self, kind: str) -> type[Method]:
        file, name, _ = _WHERE[kind]
        found: type[Method] = getattr(importlib.import_module(f"ratoon.adapt.{file}"), name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_WHERE)

    def __len__(self) -> int:
        return len(_WHERE)


METHODS: Mapping[str, type[Method]] = _Methods()


def settings_of(kind: str) -> type[Settings]:
    """The class of a method's settings. Raises `ConfigError` for an unknown kind, naming the nearest."""
    if kind not in _WHERE:
        near = difflib.get_close_matches(kind, _WHERE, n=1)
        raise ConfigError(
            f"there is no method '{kind}'",
            where="method.kind",
            expected="one of: " + ", ".join(_WHERE),
            fix=f"did you mean '{near[0]}'?" if near else None,
        )
    file, _, name = _WHERE[kind]
    found: type[Settings] = getattr(importlib.import_module(f"ratoon.adapt.{file}"), name)
    return found


def method_of(settings: Settings | Mapping[str, Any], *, where: str | os.PathLike[str] = "recipe") -> Method:
    """The method that settings, or a table with its `kind`, ask for. Raises `ConfigError` for what does not fit."""
    if not isinstance(settings, Settings):
        table = dict(settings)
        settings = build(settings_of(str(table.get("kind", "full"))), table, where=where, within="method")
    kind: str = settings.kind  # type: ignore[attr-defined]
    return METHODS[kind](settings)
