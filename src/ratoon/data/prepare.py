"""Files -> a prepared folder: tokenizer, training and held-out shards, ledger.

Decides what is a duplicate, what is held out, and that the ledger adds up. Reads the sources twice (once to decide,
once to write), so that memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratoon.base.errors import ArtifactError, DataError
from ratoon.data.ledger import Ledger
from ratoon.data.shards import Shards, ShardWriter
from ratoon.data.sources import Document, Reading, find_files, read
from ratoon.store.artifact import Manifest, Parent, read_manifest, seal
from ratoon.store.atomic import atomic_folder, sweep, write_json
from ratoon.text.tokenizer import Tokenizer

BATCH_DOCUMENTS = 512
BATCH_BYTES = 4 << 20
TRAIN, HELD_OUT, DUPLICATE, EMPTY, SHORT = "train", "held_out", "duplicate", "empty", "too_short"

Source = Callable[[Ledger], Iterator[Document]]
"""Documents, anew at each call; rows it leaves out are booked in the ledger it is given."""


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened."""

    folder: Path
    tokenizer: Tokenizer
    train: Shards
    held_out: Shards
    ledger: dict[str, Any]
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Prepared:
        """Open what `prepare` wrote. Raises `ArtifactError` when it is torn or its parts do not belong together."""
        folder = Path(folder)
        manifest = read_manifest(folder, "shards")
        tokenizer = Tokenizer.load(folder / "tokenizer")
        train, held_out = Shards(folder / "train"), Shards(folder / "held_out")
        for shards in (train, held_out):
            if shards.tokenizer_hash != tokenizer.hash:
                raise ArtifactError(
                    "the tokenizer does not fit the shards",
                    where=shards.folder,
                    expected=f"tokenizer {str(shards.tokenizer_hash)[:12]}, found {tokenizer.hash[:12]}",
                    fix="prepare the data again with this tokenizer",
                )
        ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        return cls(folder, tokenizer, train, held_out, ledger, manifest)


def prepare(
    sources: Sequence[str | os.PathLike[str]] | Source,
    out: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    held_out_fraction: float = 0.05,
    reading: Reading | None = None,
    min_characters: int = 0,
    seed: int = 1,
    replace: bool = False,
    progress: Callable[[str, int], None] = lambda stage, documents: None,
) -> Prepared:
    """Prepare `sources` (files and folders, or a callable giving documents) into the folder `out`.

    Without a `tokenizer` one of `vocab_size` is trained on the training part. Raises `DataError` for what cannot be
    read or is too little; `StorageError` when the disk refuses. `out` appears whole or not at all.
    """
    out = Path(out)
    if out.parent.is_dir():
        sweep(out.parent)
    reading = reading or Reading()
    if callable(sources):
        source = sources
    else:
        files = find_files(sources, Ledger())

        def source(ledger: Ledger) -> Iterator[Document]:
            find_files(sources, ledger)
            return read(files, reading, ledger)

    decisions = _decide(source, held_out_fraction, min_characters, seed, progress)
    if tokenizer is None:
        tokenizer = Tokenizer.train(_training_texts(source, decisions, progress), vocab_size=vocab_size)
    with atomic_folder(out, replace=replace) as folder:
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        seal(folder / "tokenizer", "tokenizer", facts={"hash": tokenizer.hash}, packages=("tokenizers",))
        ledger = _write(source, decisions, tokenizer, folder, progress)
        ledger.check()
        write_json(folder / "ledger.json", ledger.as_dict())
        seal(
            folder,
            "shards",
            parents=[Parent(kind="tokenizer", hash=tokenizer.hash)],
            facts={"held_out_fraction": held_out_fraction, "seed": seed, "ledger": ledger.as_dict()["read"]},
        )
    return Prepared.open(out)


@dataclass
class _Decisions:
    """What becomes of each document, by its number; `cut` is the character at which the only document is divided."""

    reasons: list[str]
    cut: int | None = None


def _decide(
    source: Source, fraction: float, min_characters: int, seed: int, progress: Callable[[str, int], None]
) -> _Decisions:
    seen: set[bytes] = set()
    reasons: list[str] = []
    keys: list[tuple[int, int]] = []  # (draw, number) of what is kept
    only: str | None = None
    for number, document in enumerate(source(Ledger())):
        plain = " ".join(document.text.split())
        if not plain:
            reasons.append(EMPTY)
        elif len(plain) < min_characters:
            reasons.append(SHORT)
        else:
            digest = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in seen:
                reasons.append(DUPLICATE)
            else:
                seen.add(digest)
                reasons.append(TRAIN)
                draw = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(8, "little")).digest()
                keys.append((int.from_bytes(draw, "little"), number))
                only = document.text if len(keys) == 1 else None
        if number % 1000 == 0:
            progress("reading", number)
    if not keys:
        raise DataError(
            f"nothing is left of {len(reasons):,} documents",
            where="preparation",
            expected="at least one text",
            fix="look at the sources: they are empty, all too short, or their text field is another",
        )
    if only is not None:
        return _Decisions(reasons, _line_cut(only, fraction))
    threshold = int(fraction * 2**64)
    held = [number for draw, number in keys if draw < threshold]
    if not held and fraction > 0:
        held = [min(keys)[1]]
    if len(held) == len(keys):
        held.remove(max(keys)[1])
    for number in held:
        reasons[number] = HELD_OUT
    return _Decisions(reasons)


def _line_cut(text: str, fraction: float) -> int:
    """Where a lone text is divided: after the line that ends nearest before its last `fraction`."""
    at = int(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, at) + 1
    return line if line > 0 else at


def _training_texts(source: Source, decisions: _Decisions, progress: Callable[[str, int], None]) -> Iterator[str]:
    for number, document in enumerate(source(Ledger())):
        if decisions.reasons[number] == TRAIN:
            yield document.text if decisions.cut is None else document.text[: decisions.cut]
        if number % 1000 == 0:
            progress("training the tokenizer", number)


def _batches(source: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in source:
        batch.append(document)
        size += document.bytes
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    source: Source,
    decisions: _Decisions,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Callable[[str, int], None],
) -> Ledger:
    ledger = Ledger()
    writers = {part: ShardWriter(folder / part, tokenizer.vocab_size) for part in (TRAIN, HELD_OUT)}
    separator = tokenizer.separator_id
    begin = [] if separator is None else [separator]
    number = 0
    with open(folder / "left_out.jsonl", "w", encoding="utf-8") as left_out:
        for batch in _batches(source(ledger)):
            parts = [part for i, document in enumerate(batch) for part in _parts(document, number + i, decisions)]
            encoded = tokenizer.encode_batch([document.text for document, _, _ in parts])
            for (document, reason, whole), ids in zip(parts, encoded, strict=True):
                kept = reason in writers
                ledger.receive(whole, document.bytes, len(ids))
                ledger.book(reason, whole, document.bytes, len(ids), where=None if kept else document.place)
                if kept:
                    writers[reason].add(begin + ids, document.bytes, document.place)
                else:
                    left_out.write(json.dumps({"reason": reason, "where": document.place}) + "\n")
                if decisions.cut is not None and reason == HELD_OUT:
                    ledger.note(f"one document only: its last part, from {document.place} on, is held out")
            number += len(batch)
            progress("writing", number)
    parent = Parent(kind="tokenizer", hash=tokenizer.hash)
    for writer in writers.values():
        writer.close(parent, separator)
    return ledger


def _parts(document: Document, number: int, decisions: _Decisions) -> list[tuple[Document, str, int]]:
    """A document with its reason, counted once; the only kept one as its two parts, of which the first counts."""
    reason = decisions.reasons[number]
    if decisions.cut is None or reason != TRAIN:
        return [(document, reason, 1)]
    head, tail = document.text[: decisions.cut], document.text[decisions.cut :]
    head_bytes = len(head.encode("utf-8", "surrogatepass"))
    line = document.line + head.count("\n")
    return [
        (Document(head, document.source, document.line, head_bytes), TRAIN, 1),
        (Document(tail, document.source, line, document.bytes - head_bytes), HELD_OUT, 0),
    ]
