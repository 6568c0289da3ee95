"""Files -> a prepared folder: tokenizer, training and held-out shards, ledger.

Decides what is a duplicate, what is held out, and that the ledger adds up. Reads the sources anew for each of its
stages (to decide, to train a tokenizer, to write), so that memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError, DataError, StorageError
from ratoon.data.ledger import Account, Ledger
from ratoon.data.shards import Shards, ShardWriter
from ratoon.data.sources import Document, Reading, find_files, read
from ratoon.data.values import EMPTY
from ratoon.store.artifact import Manifest, Parent, read_manifest, seal
from ratoon.store.atomic import atomic_folder, sweep, write_json
from ratoon.text.tokenizer import Tokenizer

BATCH_DOCUMENTS = 512
BATCH_BYTES = 4 << 20
TRAIN, HELD_OUT, DUPLICATE, SHORT = "train", "held_out", "duplicate", "too_short"

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
    split_han: bool = False,
    held_out_fraction: float = 0.05,
    reading: Reading | None = None,
    min_characters: int = 0,
    seed: int = 1,
    replace: bool = False,
    progress: Callable[[str, int], None] = lambda stage, documents: None,
) -> Prepared:
    """Prepare `sources` (files and folders, or a callable giving documents) into the folder `out`.

    Without a `tokenizer` one of `vocab_size` is trained on the training part (`split_han`: see `Tokenizer.train`). A
    document whose text stood before, but for white space at its ends, is a duplicate; which ones are held out depends
    on `seed` and the text alone. Raises `DataError` for what cannot be read or is too little; `StorageError` when the
    disk refuses or `out` stands already. `out` appears whole or not at all.
    """
    out = Path(out)
    if not 0 <= held_out_fraction < 1:
        raise ConfigError(
            f"{held_out_fraction} is no share of the text", where="held_out_fraction", expected="0 up to below 1"
        )
    if out.exists() and not replace:
        raise StorageError(
            "the folder exists already", where=out, expected="a new name", fix="choose another name or remove it"
        )
    if out.parent.is_dir():
        sweep(out.parent)
    reading = reading or Reading()
    if callable(sources):
        source = sources
    else:
        found = Ledger()
        files = find_files(sources, found)

        def source(ledger: Ledger) -> Iterator[Document]:
            for note in found.notes:
                ledger.note(note)
            return read(files, reading, ledger)

    decisions = _decide(source, held_out_fraction, min_characters, seed, progress)
    if tokenizer is None:
        texts = _training_texts(source, decisions, progress)
        tokenizer = Tokenizer.train(texts, vocab_size=vocab_size, split_han=split_han)
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
    """What becomes of each document, by its number, and how many bytes it had; `cut` is the character at which the only
    document is divided."""

    reasons: list[str]
    sizes: list[int]
    cut: int | None = None

    def again(self, source: Iterator[Document]) -> Iterator[tuple[str, Document]]:
        """The documents of another reading with their reasons. Raises `DataError` when they differ."""
        number = 0
        for number, document in enumerate(source, start=1):
            if number > len(self.sizes) or self.sizes[number - 1] != document.bytes:
                raise self._changed(document.place)
            yield self.reasons[number - 1], document
        if number != len(self.sizes):
            raise self._changed("the last file")

    def _changed(self, where: str) -> DataError:
        return DataError(
            "the sources changed while they were read",
            where=where,
            expected=f"the {len(self.sizes):,} documents of the first reading",
            fix="prepare again when nothing writes to them",
        )


def _decide(
    source: Source, fraction: float, min_characters: int, seed: int, progress: Callable[[str, int], None]
) -> _Decisions:
    seen: set[bytes] = set()
    reasons: list[str] = []
    sizes: list[int] = []
    keys: list[tuple[int, int]] = []  # (draw, number) of what is kept
    only: str | None = None
    ledger = Ledger()
    for number, document in enumerate(source(ledger)):
        sizes.append(document.bytes)
        bare = document.text.strip()
        if not bare:
            reasons.append(EMPTY)
        elif len(bare) < min_characters:
            reasons.append(SHORT)
        else:
            digest = _digest(bare, document)
            if digest in seen:
                reasons.append(DUPLICATE)
            else:
                seen.add(digest)
                reasons.append(TRAIN)
                # Texts that differ in white space alone fall on the same side.
                key = _digest(" ".join(bare.split()), document)
                draw = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest()
                keys.append((int.from_bytes(draw, "little"), number))
                only = document.text if len(keys) == 1 else None
        if number % 1000 == 0:
            progress("reading", number)
    if not keys:
        raise _nothing_left(reasons, ledger)
    if only is not None:
        return _Decisions(reasons, sizes, _line_cut(only, fraction) if fraction else None)
    threshold = int(fraction * 2**64)
    held = [number for draw, number in keys if draw < threshold]
    if not held and fraction > 0:
        held = [min(keys)[1]]
    if len(held) == len(keys):
        held.remove(max(keys)[1])
    for number in held:
        reasons[number] = HELD_OUT
    return _Decisions(reasons, sizes)


def _digest(text: str, document: Document) -> bytes:
    try:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        raise DataError(
            "the text holds a lone surrogate: it is no Unicode text",
            where=document.place,
            expected="text that can be written as UTF-8",
        ) from None


def _nothing_left(reasons: list[str], ledger: Ledger) -> DataError:
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    for reason, account in ledger.accounts.items():
        counts[reason] = counts.get(reason, 0) + account.documents
    places = [place for account in ledger.accounts.values() for place in account.places[:1]]
    told = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return DataError(
        f"nothing is left of {sum(counts.values()):,} documents" + (f": {told}" if told else ""),
        where="; ".join([*places, *(note for note in ledger.notes if note.startswith("nothing stands"))]) or "sources",
        expected="at least one text",
        fix="look at the sources: they are empty, all too short, or their text field is another",
    )


def _line_cut(text: str, fraction: float) -> int:
    """Where a lone text is divided: before its last `fraction`, at the end of a line or else of a word when one ends
    not long before."""
    at = max(1, int(len(text) * (1 - fraction)))
    least = max(1, at - int(len(text) * min(fraction, 1 - fraction) / 2))
    for border in ("\n", " "):
        found = text.rfind(border, least - 1, at)
        if found >= 0:
            return found + 1
    return at


def _training_texts(source: Source, decisions: _Decisions, progress: Callable[[str, int], None]) -> Iterator[str]:
    for number, (reason, document) in enumerate(decisions.again(source(Ledger()))):
        if reason == TRAIN:
            yield document.text if decisions.cut is None else document.text[: decisions.cut]
        if number % 1000 == 0:
            progress("training the tokenizer", number)


Part = tuple[Document, str, int]
"""A text to write with its reason, and as how many documents it counts."""


def _parts(decided: Iterator[tuple[str, Document]], cut: int | None) -> Iterator[Part]:
    """Each document, counted once; the only kept one as its two parts, of which the first counts."""
    for reason, document in decided:
        if cut is None or reason != TRAIN:
            yield document, reason, 1
            continue
        head, tail = document.text[:cut], document.text[cut:]
        size = len(head.encode())
        yield Document(head, document.source, document.line, size), TRAIN, 1
        if tail:
            line = document.line + head.count("\n")
            yield Document(tail, document.source, line, document.bytes - size), HELD_OUT, 0


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += part[0].bytes
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
    begin = [] if tokenizer.separator_id is None else [tokenizer.separator_id]
    with ExitStack() as files:
        left_out = files.enter_context(open(folder / "left_out.jsonl", "w", encoding="utf-8"))

        def leave_out(reason: str, where: str, size: int) -> None:
            row = {"reason": reason, "where": where, "bytes": size}
            left_out.write(json.dumps(row, ensure_ascii=False) + "\n")

        ledger = Ledger(leave_out)

        def received() -> Iterator[Document]:
            for document in source(ledger):
                ledger.receive(1, document.bytes)
                yield document

        writers = {
            part: files.enter_context(ShardWriter(folder / part, tokenizer.vocab_size)) for part in (TRAIN, HELD_OUT)
        }
        written = 0
        for batch in _batches(_parts(decisions.again(received()), decisions.cut)):
            encoded = tokenizer.encode_batch([document.text for document, _, _ in batch])
            ledger.receive(0, 0, sum(map(len, encoded)))
            for (document, reason, whole), ids in zip(batch, encoded, strict=True):
                ledger.book(reason, whole, document.bytes, len(ids), where=document.place)
                if reason in writers:
                    writers[reason].add(begin + ids, document.bytes, document.place)
                if decisions.cut is not None and reason == HELD_OUT:
                    ledger.note(f"one document only: its last part, from {document.place} on, is held out")
                written += whole
            progress("writing", written)
        parent = Parent(kind="tokenizer", hash=tokenizer.hash)
        for part, writer in writers.items():
            facts = writer.close(parent, tokenizer.separator_id).facts
            _agree(ledger, part, facts["text_bytes"], facts["tokens"] - facts["documents"] * len(begin))
    return ledger


def _agree(ledger: Ledger, part: str, size: int, tokens: int) -> None:
    """Raise `DataError` unless the shards of `part` hold what is booked under it."""
    account = ledger.accounts.get(part, Account())
    if (account.bytes, account.tokens) != (size, tokens):
        raise DataError(
            f"the shards of '{part}' hold {size:,} bytes in {tokens:,} tokens",
            where="preparation",
            expected=f"{account.bytes:,} bytes in {account.tokens:,} tokens, as booked",
            fix="please report this: nothing was written",
        )
