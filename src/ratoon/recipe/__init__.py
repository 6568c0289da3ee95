"""The recipe: everything a run is told, in one typed table; and what is derived when it is not told.

Free of torch. Two kinds: pretraining (`pretraining.py`) and fine-tuning for a task (`tuning.py`), told apart by the
key `task`.
"""

from __future__ import annotations

from ratoon.base.catalog import shipped
from ratoon.recipe.pretraining import (
    INSTEAD,
    SIZES,
    TOKENS_A_PARAMETER,
    DataSettings,
    Derived,
    ModelSettings,
    Plan,
    Recipe,
    Size,
    default_shape,
    load,
    read_table,
    settle,
    with_documents,
)

__all__ = [
    "INSTEAD",
    "SIZES",
    "TOKENS_A_PARAMETER",
    "DataSettings",
    "Derived",
    "ModelSettings",
    "Plan",
    "Recipe",
    "Size",
    "default_shape",
    "load",
    "read_table",
    "settle",
    "shipped",
    "with_documents",
]
