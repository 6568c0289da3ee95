"""Ratoon: the whole life of a GPT on one's own machine.

`ratoon.load(name)` gives a model that reads and writes; `ratoon.run(recipe, {…})` trains one. Torch is imported when
it is first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run"]

if TYPE_CHECKING:
    from ratoon.generate.lm import LanguageModel
    from ratoon.store.runs import Run


def load(name: str, **options: Any) -> LanguageModel:
    """A model by run name, folder, GGUF file or catalogue name; see `ratoon.generate.lm.load`."""
    from ratoon.generate.lm import load as load_model

    return load_model(name, **options)


def run(recipe: Any, overrides: dict[str, Any] | None = None, *, resume: bool = False) -> Run:
    """Train as a recipe (a YAML file, a shipped name, or a table) says, or fine-tune where it has a task; returns the
    run."""
    from ratoon.cli.finetune import run_tuning
    from ratoon.cli.pretrain import run_recipe
    from ratoon.recipe import load as load_recipe
    from ratoon.recipe import read_table
    from ratoon.recipe.tuning import load_tuning

    finished: Run
    if "task" in read_table(recipe)[0]:
        finished = run_tuning(load_tuning(recipe, overrides), resume=resume)
        return finished
    finished = run_recipe(load_recipe(recipe, overrides), resume=resume)
    return finished
