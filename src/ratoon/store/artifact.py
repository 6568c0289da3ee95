"""An artifact is a folder with a manifest: what it is, what is in it, and what it was made from.

Tokenizer, shards, checkpoint, model, adapter and report are kinds of this one thing. The manifest is
written last, so a folder without one is not an artifact. Its `hash` is derived from the contents alone:
equal contents, equal hash, wherever and whenever they were made.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ratoon.base.errors import ArtifactError
from ratoon.store.atomic import write_text

MANIFEST = "ratoon.json"
Kind = Literal["tokenizer", "shards", "checkpoint", "model", "adapter", "report", "run"]


class FileEntry(BaseModel):
    """One file of an artifact."""

    bytes: int
    sha256: str


class Parent(BaseModel):
    """What an artifact was made from."""

    kind: Kind
    hash: str
    name: str = ""


class Manifest(BaseModel):
    """The manifest of an artifact; `facts` holds what the kind wants to say about itself."""

    model_config = ConfigDict(extra="allow")

    kind: Kind
    hash: str
    files: dict[str, FileEntry]
    parents: list[Parent] = []
    facts: dict[str, Any] = {}
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] = {}

    def parent(self, kind: Kind) -> Parent | None:
        """The first parent of that kind, if any."""
        return next((parent for parent in self.parents if parent.kind == kind), None)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, Ratoon and `packages`, as installed."""
    found = {"python": platform.python_version()}
    for package in ("ratoon", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _contents_hash(kind: str, files: dict[str, FileEntry]) -> str:
    lines = [kind, *(f"{name} {entry.sha256}" for name, entry in sorted(files.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def seal(
    folder: str | os.PathLike[str],
    kind: Kind,
    *,
    parents: Iterable[Parent] = (),
    facts: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    packages: Iterable[str] = ("torch", "numpy", "tokenizers"),
    known: dict[str, str] | None = None,
) -> Manifest:
    """Write the manifest of the filled `folder`: from here on it is an artifact of `kind`.

    `known` gives hashes that the writer computed while writing, so that big files are not read twice.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): FileEntry(
            bytes=path.stat().st_size,
            sha256=(known or {}).get(path.relative_to(folder).as_posix()) or file_hash(path),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = Manifest(
        kind=kind,
        hash=_contents_hash(kind, files),
        files=files,
        parents=list(parents),
        facts=facts or {},
        recipe=recipe,
        versions=versions(*packages),
    )
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def read_manifest(
    folder: str | os.PathLike[str], kind: Kind | None = None, *, check: Literal["size", "hash"] = "size"
) -> Manifest:
    """The manifest of an artifact, after checking that the folder holds what it says.

    `check="size"` compares names and sizes (cheap, finds a torn copy), `"hash"` reads every file. Raises
    `ArtifactError` for a missing or unreadable manifest, another kind, a missing or changed file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            "the folder is no Ratoon artifact: it has no manifest" if folder.is_dir() else "there is no such folder",
            where=path if folder.is_dir() else folder,
            expected=f"a folder with {MANIFEST}, which is written last",
            fix="if it was being written when a process ended, write it again",
        )
    try:
        manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise ArtifactError(
            f"the manifest is not readable: {error}", where=path, fix="fetch or make the folder again"
        ) from None
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"the folder holds a {manifest.kind}", where=folder, expected=f"a {kind}")
    if manifest.hash != _contents_hash(manifest.kind, manifest.files):
        raise ArtifactError(
            "the manifest was changed by hand or torn: its hash is not that of the files it names",
            where=path,
            expected=_contents_hash(manifest.kind, manifest.files),
            fix="fetch or make the folder again",
        )
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError("a file of the manifest is missing", where=file, fix="fetch or make the folder again")
        size = file.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(
                f"the file has {size:,} bytes",
                where=file,
                expected=f"{entry.bytes:,}",
                fix="fetch or make the folder again",
            )
        if check == "hash" and file_hash(file) != entry.sha256:
            raise ArtifactError(
                "the file's contents changed",
                where=file,
                expected=f"sha256 {entry.sha256}",
                fix="fetch or make the folder again",
            )
    return manifest


def expect_parent(manifest: Manifest, parent: Manifest, *, where: str | os.PathLike[str]) -> None:
    """Raise `ArtifactError` unless `manifest` names `parent` as what it was made from."""
    named = manifest.parent(parent.kind)
    if named is None or named.hash != parent.hash:
        raise ArtifactError(
            f"the {manifest.kind} does not say with which {parent.kind} it was made"
            if named is None
            else f"the {manifest.kind} was made with another {parent.kind} ({named.hash[:12]})",
            where=where,
            expected=f"{parent.kind} {parent.hash[:12]}",
            fix=f"use the {parent.kind} it was made with, or make the {manifest.kind} again",
        )
