"""Token ids on disk: memory-mapped, with the place of every document.

A shards folder: `tokens-00000.bin` … (uint16 or uint32), `starts.npy` (int64, documents + 1: where each document begins
in the stream of all files), `bytes.npy` (int64, UTF-8 bytes of each document's text), `names.txt` (file and line of
each document). Each document begins with the separator token, where the tokenizer has one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from ratoon.base.errors import ArtifactError, DataError, storage_errors
from ratoon.store.artifact import Manifest, Parent, read_manifest, seal

SHARD_TOKENS = 1 << 28
FACTS = {"dtype", "tokens", "documents", "text_bytes", "vocab_size", "largest_id", "separator_id"}


class ShardWriter:
    """Writes documents one after the other into a folder that the caller makes atomic; `close` seals it.

    As a context it lets go of its files when the block ends in an error.
    """

    def __init__(self, folder: str | os.PathLike[str], vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size = vocab_size
        self.dtype: np.dtype[np.uint16] | np.dtype[np.uint32] = (
            np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        )
        self.shard_tokens = shard_tokens
        self.starts, self.bytes = [0], list[int]()
        self.largest = -1
        self._files = 0
        self._in_file = shard_tokens
        self._tokens: IO[bytes] | None = None
        self._names = open(  # noqa: SIM115 - closed in `close`
            self.folder / "names.txt", "w", encoding="utf-8"
        )

    def add(self, ids: Sequence[int], text_bytes: int, name: str) -> None:
        """One document. Raises `DataError` for an id outside the vocabulary, `StorageError` when the disk refuses."""
        values = np.asarray(ids, dtype=np.int64)
        if len(values):
            largest = int(values.max())
            if largest >= self.vocab_size or int(values.min()) < 0:
                raise DataError(
                    f"token id {largest} is outside the vocabulary", where=name, expected=f"0 … {self.vocab_size - 1}"
                )
            self.largest = max(self.largest, largest)
        with storage_errors(self.folder):
            if self._in_file >= self.shard_tokens:
                self._next_file()
            assert self._tokens is not None
            self._tokens.write(values.astype(self.dtype).tobytes())
            self._names.write(name.replace("\n", " ").replace("\r", " ") + "\n")
        self._in_file += len(values)
        self.starts.append(self.starts[-1] + len(values))
        self.bytes.append(text_bytes)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._names):
            if file is not None:
                try:
                    file.close()
                except OSError:  # what it still held does not fit either; the error that counts is on its way
                    if error is None:
                        raise

    def _next_file(self) -> None:
        if self._tokens is not None:
            self._tokens.close()
        self._tokens = open(self.folder / f"tokens-{self._files:05d}.bin", "wb")  # noqa: SIM115
        self._files, self._in_file = self._files + 1, 0

    def close(self, tokenizer: Parent, separator_id: int | None) -> Manifest:
        """Write the indexes and the manifest."""
        with storage_errors(self.folder):
            if self._tokens is None:
                self._next_file()
            assert self._tokens is not None
            self._tokens.close()
            self._names.close()
            for name, values in (("starts.npy", self.starts), ("bytes.npy", self.bytes)):
                # np.save into a file says nothing of why the disk refused
                data = io.BytesIO()
                np.save(data, np.asarray(values, dtype=np.int64))
                (self.folder / name).write_bytes(data.getbuffer())
            return seal(
                self.folder,
                "shards",
                parents=[tokenizer],
                facts={
                    "dtype": self.dtype.name,
                    "tokens": self.starts[-1],
                    "documents": len(self.bytes),
                    "text_bytes": sum(self.bytes),
                    "vocab_size": self.vocab_size,
                    "largest_id": self.largest,
                    "separator_id": separator_id,
                },
                packages=("numpy", "tokenizers"),
            )


class Shards:
    """A shards folder opened for reading. Raises `ArtifactError` when files are missing, cut, or do not agree."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "shards")
        facts = self.manifest.facts
        if not facts.keys() >= FACTS:
            raise ArtifactError(
                "the folder holds no shards of its own",
                where=folder,
                expected="one of its parts: train or held_out" if (self.folder / "train").is_dir() else "shards",
                fix="open the part, or the whole with Prepared.open",
            )
        self.separator_id: int | None = facts["separator_id"]
        self.vocab_size: int = facts["vocab_size"]
        self.largest_id: int = facts["largest_id"]
        dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        files = sorted(self.folder.glob("tokens-*.bin"))
        self._parts = [np.memmap(file, dtype=dtype, mode="r") for file in files if file.stat().st_size]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self.document_starts: npt.NDArray[np.int64] = np.load(self.folder / "starts.npy")
        self.document_bytes: npt.NDArray[np.int64] = np.load(self.folder / "bytes.npy")
        self.n_tokens = int(self._ends[-1]) if len(self._ends) else 0
        if self.n_tokens != int(self.document_starts[-1]) or self.n_tokens != facts["tokens"]:
            raise ArtifactError(
                f"the files hold {self.n_tokens:,} tokens",
                where=folder,
                expected=f"{facts['tokens']:,} as the manifest says",
                fix="prepare the data again",
            )

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the tokenizer the ids are of."""
        parent = self.manifest.parent("tokenizer")
        return None if parent is None else parent.hash

    @property
    def n_documents(self) -> int:
        """Documents in all."""
        return len(self.document_bytes)

    @property
    def bytes_of_text(self) -> int:
        """UTF-8 bytes of all documents' texts."""
        return int(self.document_bytes.sum())

    @cached_property
    def names(self) -> list[str]:
        """File and line of each document."""
        return (self.folder / "names.txt").read_text(encoding="utf-8").split("\n")[:-1]

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids `start` … `stop` - 1 of the stream, as int64."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        pieces = []
        while start < stop:
            begin = 0 if first == 0 else int(self._ends[first - 1])
            end = min(stop, int(self._ends[first]))
            pieces.append(self._parts[first][start - begin : end - begin])
            start, first = end, first + 1
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return joined.astype(np.int64)

    def name_of(self, position: int) -> str:
        """File and line of the document that holds the token at `position`, and how far inside it is."""
        document = int(np.searchsorted(self.document_starts, position, side="right")) - 1
        return f"{self.names[document]} (token {position - int(self.document_starts[document])})"
