"""A frozen trunk is computed once: what the blocks below the first trained one give is kept on disk and read again.

Decides how deep the frozen trunk is, and where its outputs lie. Rows are packed once (`data/examples.py`), so that a
row's number says what its trunk gives; with or without the file the numbers are the same, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ratoon.model.transformer import Transformer
from ratoon.train.loss import Inputs

Numbers = npt.NDArray[Any]

KEPT_FREE_BYTES = 2 << 30
"""Room that is left on the disk: a cache never takes the last of it."""


def frozen_layers(model: Any) -> int:
    """Blocks from the input on in which nothing is trained, with the embedding below them; 0 where that is trained."""
    if not isinstance(model, Transformer) or model.virtual is not None:
        return 0
    inputs = (model.embed, model.place, model.embed_norm)
    if any(parameter.requires_grad for part in inputs if part is not None for parameter in part.parameters()):
        return 0
    if model.cfg.moe is not None and any(model.cfg.has_experts(layer) for layer in range(model.cfg.layers)):
        return 0  # the balance loss reads every router
    for number, block in enumerate(model.layers):
        if any(parameter.requires_grad for parameter in block.parameters()):
            return number
    return len(model.layers)


def _sum_of(row: Numbers) -> int:
    """A checksum that is never 0, which stands for a row that is not there."""
    return zlib.crc32(row.tobytes()) or 1


def _reserve(path: Path, size_bytes: int) -> bool:
    """Make a file whose room on the disk is taken, where the system can: a mapped file that finds no room when it is
    written ends the process. False where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                file.truncate(size_bytes)
    except OSError:
        shutil.rmtree(path.parent, ignore_errors=True)
        return False
    return True


class Trunk:
    """The outputs of the first `layers` blocks for numbered rows; with a `folder` they are kept there.

    There are `rows` rows of `tokens` places. `key` is what decides what is computed (base, rows): a folder with another
    one is written anew.
    """

    def __init__(
        self, layers: int, folder: Path | None = None, *, rows: int, tokens: int, key: dict[str, Any] | None = None
    ) -> None:
        self.layers, self.folder, self.key = layers, folder, {**(key or {}), "layers": layers}
        self.rows, self.tokens = rows, tokens
        self.store: np.memmap[Any, Any] | None = None
        self.have: np.memmap[Any, Any] | None = None
        self.reads = self.computed = 0

    def open(self, width: int, dtype: torch.dtype, products: str = "exact") -> str:
        """Make room for the rows of that width and type, from such products; returns a sentence on what was decided."""
        rows, tokens = self.rows, self.tokens
        if self.folder is None or not self.layers:
            return f"the first {self.layers} blocks are frozen: computed without a gradient"
        bytes_each = 2 if dtype in (torch.bfloat16, torch.float16) else 4
        needed = rows * tokens * width * bytes_each
        about = f"{needed / 2**20:,.0f} MiB"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        key = {**self.key, "rows": rows, "tokens": tokens, "width": width, "dtype": str(dtype), "products": products}
        told, data, marks = (self.folder / name for name in ("trunk.json", "trunk.bin", "have.bin"))
        known = told.is_file() and json.loads(told.read_text(encoding="utf-8")) == key
        known = known and data.is_file() and data.stat().st_size == needed and marks.is_file()
        if not known:
            shutil.rmtree(self.folder, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free
            if free < needed + KEPT_FREE_BYTES or not _reserve(data, needed):
                return (
                    f"the first {self.layers} blocks are frozen, but {about} for their outputs are more than the disk "
                    f"has to spare ({free / 2**20:,.0f} MiB are free): computed in each epoch"
                )
        kind = np.uint16 if bytes_each == 2 else np.float32
        self.store = np.memmap(data, kind, "r+", shape=(rows, tokens, width))
        self.have = np.memmap(marks, np.uint32, "r+" if known else "w+", shape=(rows,))
        told.write_text(json.dumps(key), encoding="utf-8")
        return f"the first {self.layers} blocks are frozen: computed once, {about} in {self.folder}"

    def fill(self, model: Transformer, inputs: Inputs) -> Inputs:
        """The inputs with what the trunk gives for them, read or computed."""
        if not self.layers:
            return inputs
        if self.store is None or self.have is None:
            return replace(inputs, trunk_BTD=self._compute(model, inputs), trunk_layers=self.layers)
        number_B = np.asarray(inputs.extra["number_B"])
        found_BTD = self._read(number_B)
        if found_BTD is not None:
            self.reads += len(number_B)
            found = torch.from_numpy(found_BTD)
            kind = model.head_weight().dtype
            trunk_BTD = found.view(kind) if found.dtype == torch.uint16 else found
            trunk_BTD = trunk_BTD.to(inputs.ids_BT.device)
        else:
            trunk_BTD = self._compute(model, inputs)
            self.computed += len(number_B)
            kept = trunk_BTD.detach().cpu().contiguous()
            assert kept.element_size() == self.store.itemsize, f"{kept.dtype} was not what `open` made room for"
            self.store[number_B] = (kept.view(torch.uint16) if kept.element_size() == 2 else kept).numpy()
            self.have[number_B] = [_sum_of(self.store[number]) for number in number_B]
        return replace(inputs, trunk_BTD=trunk_BTD, trunk_layers=self.layers)

    def _read(self, number_B: Numbers) -> Numbers | None:
        """The rows of those numbers, if each is there and as it was written: a machine without power may keep the
        mark of a row and lose the row."""
        assert self.store is not None and self.have is not None
        mark_B = self.have[number_B]
        if not mark_B.all():
            return None
        found: Numbers = self.store[number_B]
        whole = all(_sum_of(row) == mark for row, mark in zip(found, mark_B, strict=True))
        return found if whole else None

    def _compute(self, model: Transformer, inputs: Inputs) -> Tensor:
        return model.trunk(inputs.ids_BT, self.layers, inputs.position_BT, inputs.document_BT)

    def close(self) -> None:
        """Let go of the files, and remove them: they are made again when they are needed."""
        self.store = self.have = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
