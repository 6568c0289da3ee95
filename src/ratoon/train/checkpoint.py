"""Checkpoints: everything that decides the next step, written whole or not at all.

`checkpoints/step-…` holds float32 weights, the optimizer and `state.json`; `last` and `best` beside them are one-line
files with a folder's name. Decides what is kept; when to write is the loop's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ratoon.base.errors import ArtifactError
from ratoon.store.artifact import Parent, read_manifest, seal
from ratoon.store.atomic import atomic_folder, write_json, write_text

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def save(
    root: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    *,
    parents: list[Parent],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and point `last` at it; then drop the oldest beyond `keep`, never the best.

    Raises `StorageError` when the disk refuses; every older checkpoint is then untouched.
    """
    folder = root / folder_name(step)
    with atomic_folder(folder, replace=True) as partial:
        save_file({name: value.contiguous() for name, value in weights.items()}, partial / WEIGHTS)
        save_file({name: value.contiguous() for name, value in optimizer.items()}, partial / OPTIMIZER)
        write_json(partial / STATE, state)
        seal(partial, "checkpoint", parents=parents, facts={"step": step})
    write_text(root / "last", folder.name + "\n")
    retain(root, keep)
    return folder


def mark_best(root: Path, step: int, loss: float) -> None:
    """Point `best` at the checkpoint of `step`."""
    write_text(root / "best", f"{folder_name(step)} {loss!r}\n")


def pointed(root: Path, name: str) -> Path | None:
    """The folder that `last` or `best` names, if it stands."""
    pointer = root / name
    if not pointer.is_file():
        return None
    words = pointer.read_text(encoding="utf-8").split()
    return root / words[0] if words and (root / words[0] / "ratoon.json").is_file() else None


def complete(root: Path) -> list[Path]:
    """Whole checkpoints below `root`, oldest first: those whose manifest was written."""
    return sorted(path.parent for path in root.glob("step-*/ratoon.json"))


def retain(root: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints and the best one."""
    best = pointed(root, "best")
    for folder in complete(root)[:-keep]:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)


def load_latest(root: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """The latest whole checkpoint's folder, weights, optimizer state and state; None where there is none.

    Raises `ArtifactError` when its files do not hash to what its manifest says.
    """
    folders = complete(root)
    if not folders:
        return None
    folder = folders[-1]
    read_manifest(folder, "checkpoint", check="hash")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return folder, load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), state


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of one checkpoint, by parameter name."""
    read_manifest(folder, "checkpoint", check="hash")
    return load_file(folder / WEIGHTS)


def put_weights(target: dict[str, Tensor], found: dict[str, Tensor], where: Path) -> None:
    """Copy the checkpoint's weights into `target`. Raises `ArtifactError` naming what does not fit."""
    missing, extra = sorted(target.keys() - found.keys()), sorted(found.keys() - target.keys())
    if missing or extra:
        raise ArtifactError(
            f"the checkpoint lacks {missing[:3]} and has {extra[:3]} too many",
            where=where,
            expected="the parameters of the recipe's model",
            fix="resume with the recipe the run was started with",
        )
    with torch.no_grad():
        for name, value in target.items():
            if found[name].shape != value.shape:
                raise ArtifactError(
                    f"'{name}' has the shape {tuple(found[name].shape)}",
                    where=where,
                    expected=str(tuple(value.shape)),
                    fix="resume with the recipe the run was started with",
                )
            value.copy_(found[name])
