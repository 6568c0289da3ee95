"""Writing so that a reader sees the old or the new, never a half.

A file is written beside its place, flushed to the disk and renamed over it. A folder is built beside its
place and renamed as a whole, or exchanged with the one that stands there; it counts only once its manifest
(`artifact.py`) stands in it, written last. A process killed at any moment leaves at most a sibling named
`.….partial-…` (where the system cannot exchange folders, `.….retired-…`), which `sweep` mends.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ratoon.base.errors import StorageError, storage_errors

PARTIAL = ".partial-"
_RETIRED = ".retired-"
_being_written: set[Path] = set()
"""Siblings that this very process is writing now: a `sweep` in another of its threads leaves them alone."""


@contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """A name beside `path` for what is not whole yet."""
    sibling = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}").absolute()
    _being_written.add(sibling)
    try:
        yield sibling
    finally:
        _being_written.discard(sibling)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk; folders only where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write that takes its place at `path` when the block ends without an error.

    Raises `StorageError` when the disk refuses; the old file is then untouched.
    """
    path = Path(path)
    with storage_errors(path), _sibling(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, mode, encoding=None if "b" in mode else "utf-8") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)
            fsync_path(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    with atomic_file(path) as handle:
        handle.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as readable JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill that takes its place at `path` when the block ends without an error.

    `replace` allows a folder that already stands at `path` to be exchanged; without it a `StorageError`
    says so before anything is written.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise StorageError(
            "the folder exists already", where=path, expected="a new name", fix="choose another name or remove it"
        )
    if path.exists() and not path.is_dir():
        raise StorageError("a file stands there", where=path, expected="a folder or a new name", fix="choose another")
    with storage_errors(path), _sibling(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            for inner in sorted(partial.rglob("*"), reverse=True):
                fsync_path(inner)
            fsync_path(partial)
            if not path.exists():
                os.rename(partial, path)
            elif _exchange(partial, path):
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _step_aside(partial, path)
            fsync_path(path.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, StorageError) and (error.where or "").startswith(str(partial)):
                raise StorageError(  # under the name that the user knows
                    error.found,
                    where=f"{path}{(error.where or '')[len(str(partial)) :]}",
                    expected=error.expected,
                    fix=error.fix,
                ) from error
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step of the system; False where it cannot (`renameat2`, Linux 3.15)."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _step_aside(new: Path, path: Path) -> None:
    """Put `new` in the place of `path` where the two cannot be exchanged: rename cannot replace a filled folder, so
    the old one steps aside first. A process killed between the two leaves it for `sweep` to put back."""
    retired = path.with_name(f".{path.name}{_RETIRED}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    os.rename(path, retired)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(retired, path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> list[str]:
    """Mend what a killed process left in `folder`; returns a sentence for each thing done.

    Half-written siblings are removed. A folder that had stepped aside for a new one that never arrived is
    put back.
    """
    done: list[str] = []
    folder = Path(folder)
    if not folder.is_dir():
        return done
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(".") or _alive(entry):
            continue
        if _RETIRED in entry.name:
            home = entry.with_name(entry.name[1:].split(_RETIRED)[0])
            if home.exists():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                os.rename(entry, home)
                done.append(f"put back {home.name}: its replacement was interrupted")
        elif PARTIAL in entry.name:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
            done.append(f"removed the half-written {entry.name[1:].split(PARTIAL)[0]}")
    return done


def _alive(entry: Path) -> bool:
    """Whether the process that writes this sibling still runs and still writes it."""
    number = entry.name.rpartition("-")[0].rpartition("-")[2]
    if not number.isdigit():
        return False
    if int(number) == os.getpid():
        return entry.absolute() in _being_written
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
