"""The keys and values of what a model has read, so that the next token costs one token.

A cache is an argument of the model's call, never part of a module: one model serves many requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ratoon.model.config import ModelConfig


class Cache:
    """Keys and values of `batch` rows, room for `capacity` tokens; all rows share one axis of slots.

    Rows of unequal length are padded on the LEFT with slots of document -1. `document_BS` says which document each
    filled slot belongs to; `length` how many slots are filled.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, cfg.kv, capacity, cfg.channels)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(cfg.layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(cfg.layers)]
        self.memory: list[tuple[Tensor, Tensor] | None] = [None] * cfg.layers
        """Per layer, keys and values of the encoder's output (cross attention), made at the first call."""
        self.memory_of = list(range(batch))
        """Whose memory each row has, as numbers of the first rows: beams of one prompt share it."""
        self.document_BS = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.padded = False
        self.length = 0
        self.capacity = capacity

    def extend(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new keys and values of a layer behind the filled slots; returns all (B, K, S, C) of it.

        The filled length moves on once for all layers, by `advance`.
        """
        end = self.length + k_BKTC.shape[2]
        assert end <= self.capacity, f"{end} tokens do not fit a cache of {self.capacity}"
        self.keys[layer][:, :, self.length : end] = k_BKTC
        self.values[layer][:, :, self.length : end] = v_BKTC
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def mark(self, tokens: int, document_BT: Tensor | None) -> Tensor | None:
        """Note the documents of the next `tokens` slots; returns those of all slots (B, S), None if all are 0."""
        if document_BT is not None:
            self.document_BS[:, self.length : self.length + tokens] = document_BT
            self.padded = True
        return self.document_BS[:, : self.length + tokens] if self.padded else None

    def advance(self, tokens: int) -> None:
        """The next slots are filled in every layer."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forget every slot from `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of the former row rows[i] (int64): what beam search and finished rows need."""
        memory_of = [self.memory_of[row] for row in rows.tolist()]
        moved = memory_of != self.memory_of
        self.memory_of = memory_of
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer].index_select(0, rows)
            self.values[layer] = self.values[layer].index_select(0, rows)
            memory = self.memory[layer]
            if memory is not None and moved:
                self.memory[layer] = (memory[0].index_select(0, rows), memory[1].index_select(0, rows))
        self.document_BS = self.document_BS.index_select(0, rows)
