"""Texts that were never prepared, made measurable: documents of any source as shards in a passing folder.

The same measurement (`run.py`) then serves a held-out part and a file that somebody hands over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon.data.ledger import Ledger
from ratoon.data.shards import Shards, ShardWriter
from ratoon.data.sources import Document
from ratoon.store.artifact import Parent
from ratoon.text.tokenizer import Tokenizer

BATCH_DOCUMENTS = 256
MEASURED, EMPTY = "measured", "empty"


@contextmanager
def as_shards(documents: Iterable[Document], tokenizer: Tokenizer, ledger: Ledger) -> Iterator[Shards]:
    """`documents` as shards that are gone when the context ends. Every document is booked in `ledger`: as measured, or
    as empty, the only ones left out. Nothing else is done to them; duplicates count as often as they occur."""
    with tempfile.TemporaryDirectory(prefix="ratoon-") as folder:
        writer = ShardWriter(Path(folder) / "shards", tokenizer.vocab_size)
        separator = tokenizer.separator_id
        begin = [] if separator is None else [separator]
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode_batch([one.text for one in batch]), strict=True):
                ledger.receive(1, document.bytes, len(ids))
                if not document.text.strip():
                    ledger.book(EMPTY, 1, document.bytes, len(ids), where=document.place)
                    continue
                ledger.book(MEASURED, 1, document.bytes, len(ids))
                writer.add(begin + ids, document.bytes, document.place)
        ledger.check()
        writer.close(Parent(kind="tokenizer", hash=tokenizer.hash), separator)
        yield Shards(writer.folder)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
