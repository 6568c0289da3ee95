"""Pairs of answers for `ratoon finetune`: the reference is asked once, and kept in the run's folder.

Decides where the reference's numbers lie and when they are read again. What they are, and the loss of a pair, is
decided in `train/preference.py`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ratoon.cli.finetune import Material
    from ratoon.data.examples import ExampleLoader
    from ratoon.generate.lm import LanguageModel
    from ratoon.store.runs import Run
    from ratoon.tasks.preference import Preference
    from ratoon.train.settings import TrainSettings

REFERENCE = "reference.npz"
"""The file in a run's folder: what the model said of every pair before it was trained."""


def prepare(
    run: Run, lm: LanguageModel, task: Preference, material: Material, loader: ExampleLoader, settings: TrainSettings
) -> Any:
    """The objective of the task's pairs; the loader's and the validation examples get what the reference says of them.

    The reference is the model as it is now, with the method's parts that do not change anything yet. A run that goes on
    reads what was kept. Raises as `train.preference` does, `ArtifactError` for numbers that were kept for other pairs.
    """
    import numpy as np

    from ratoon.evaluate.task import ROW_TOKENS
    from ratoon.store.atomic import write_bytes
    from ratoon.train.device import World, find_place
    from ratoon.train.preference import preference, reference_arrays, with_arrays, with_reference

    told = task.settings
    objective = preference(beta=told.beta, label_smoothing=told.label_smoothing, kind=told.loss)
    path, world = run.folder / REFERENCE, World()
    parts = {"train": loader.examples, "validation": material.validation}
    if world.first and not path.is_file():
        arrays: dict[str, Any] = {}
        for name, examples in parts.items():
            found = with_reference(
                lm.model,
                examples,
                context_tokens=loader.context_tokens,
                rows=max(1, ROW_TOKENS // loader.context_tokens),
                leading=lm.virtual_tokens,
                place=find_place(settings),
            )
            arrays |= {f"{name}.{key}": value for key, value in reference_arrays(found).items()}
        kept = io.BytesIO()
        np.savez(kept, **arrays)  # type: ignore[arg-type]
        write_bytes(path, kept.getvalue())
    world.wait()
    with np.load(path) as arrays_on_disk:
        read = {
            name: {key.removeprefix(f"{name}."): arrays_on_disk[key] for key in arrays_on_disk if key.startswith(name)}
            for name in parts
        }
    loader.examples = with_arrays(parts["train"], read["train"])
    material.validation[:] = with_arrays(parts["validation"], read["validation"])
    return objective
