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

from ratoon.base.errors import ArtifactError, storage_errors
from ratoon.store.artifact import MANIFEST, Parent, read_manifest, seal
from ratoon.store.atomic import atomic_folder, sweep, write_json, write_text

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
    return root / words[0] if words and (root / words[0] / MANIFEST).is_file() else None


def complete(root: Path) -> list[Path]:
    """Checkpoints below `root` whose manifest was written, oldest first."""
    return sorted(path.parent for path in root.glob(f"step-*/{MANIFEST}"))


def retain(root: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints and the best one, and what an interrupted removal left."""
    best = pointed(root, "best")
    kept = {*complete(root)[-keep:], best}
    for folder in root.glob("step-*"):
        if folder not in kept:
            # The manifest goes first: a folder that is half removed is no checkpoint.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def mend(root: Path) -> tuple[Path | None, list[str]]:
    """Make the latest whole checkpoint the latest; returns it (None: none was ever written) and a sentence for each
    thing done.

    Half-written folders are removed. A checkpoint whose files do not hash to what its manifest says is set aside under
    the name `torn-…`. Raises `ArtifactError` when there are checkpoints and none is whole.
    """
    done = sweep(root)
    torn: list[ArtifactError] = []
    for folder in reversed(complete(root)):
        try:
            read_manifest(folder, "checkpoint", check="hash")
        except ArtifactError as error:
            torn.append(error)
            continue
        for reason, broken in zip(torn, reversed(complete(root)), strict=False):
            with storage_errors(broken):
                aside = broken.with_name(f"torn-{broken.name}")
                shutil.rmtree(aside, ignore_errors=True)
                broken.rename(aside)
            done.append(
                f"the checkpoint {broken.name} is torn ({reason.found}: {reason.where}); it is set aside as "
                f"{aside.name}, and {folder.name} is used"
            )
        if pointed(root, "last") != folder:
            write_text(root / "last", folder.name + "\n")
        return folder, done
    if torn:
        raise ArtifactError(
            f"none of the {len(torn)} checkpoints is whole; the latest: {torn[0].found}",
            where=torn[0].where,
            expected=torn[0].expected,
            fix="put the file back from a copy, or start the run again under another name",
        )
    return None, done


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer state and state of a checkpoint that `mend` found whole."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), state


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
