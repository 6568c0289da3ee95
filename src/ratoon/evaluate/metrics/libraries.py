"""The libraries of the extra `[eval]`, imported when they are needed: what is missing is named with its cure."""

from __future__ import annotations

import importlib
from typing import Any

from ratoon.base.errors import ConfigError


def library(name: str) -> Any:
    """The module `name` of a library that comes with `ratoon[eval]`. Raises `ConfigError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        raise ConfigError(
            f"the library '{missing}' is not installed",
            expected="the libraries of the extra [eval] (sacrebleu, nltk, rouge-score, scikit-learn)",
            fix="pip install 'ratoon[eval]'",
        ) from error
