"""The Batch: what every kind of training looks like to the loop.

Pretraining, fine-tuning, replay and distillation differ in how a Batch is made, never in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -1
"""`document_BT` of a padding slot: it belongs to no document, is never attended to, never learned."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with what to learn from them.

    `targets_BT[b, t]` is what position t should predict (the NEXT token for next-token training: the
    shift is made here, nowhere else). `weight_BT` 0 = not learned. `document_BT` numbers the documents of
    a row (0, 1, …; `IGNORED` = padding), each a run of neighbouring slots;
    attention never crosses them. `position_BT` counts from 0 in each
    document (a document continued from an earlier row goes on counting from 0 in this row).
    `rows` says where each row came from, for error messages. `extra` holds what one objective alone needs.
    """

    ids_BT: npt.NDArray[np.int64]
    targets_BT: npt.NDArray[np.int64]
    weight_BT: npt.NDArray[np.float32]
    document_BT: npt.NDArray[np.int32]
    position_BT: npt.NDArray[np.int64]
    rows: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.ids_BT.shape
        for name in ("targets_BT", "weight_BT", "document_BT", "position_BT"):
            assert getattr(self, name).shape == shape, f"{name} {getattr(self, name).shape} is not {shape}"
        runs, documents = ((np.diff(rows, axis=1) != 0).sum() for rows in (self.document_BT, np.sort(self.document_BT)))
        assert runs == documents, "a document stands in two places of a row: attention counts on runs"

    @property
    def valid_tokens(self) -> int:
        """Positions that are learned from."""
        return int(np.count_nonzero(self.weight_BT))

    @property
    def read_tokens(self) -> int:
        """Positions that are read: all but padding."""
        return int(np.count_nonzero(self.document_BT >= 0))

    @property
    def weight(self) -> float:
        """The summed weight, which the loss is divided by once a step."""
        return float(self.weight_BT.sum(dtype=np.float64))

    @property
    def one_document_rows(self) -> bool:
        """Every row is one whole document without padding: plain causal attention is exact."""
        return bool((self.document_BT == self.document_BT[:, :1]).all() and (self.document_BT >= 0).all())

    def split(self, parts: int) -> list[Batch]:
        """The same rows as `parts` batches of equal row counts (the last may be smaller)."""
        if parts == 1:
            return [self]
        bounds = np.array_split(np.arange(self.ids_BT.shape[0]), parts)
        return [
            Batch(
                ids_BT=self.ids_BT[index],
                targets_BT=self.targets_BT[index],
                weight_BT=self.weight_BT[index],
                document_BT=self.document_BT[index],
                position_BT=self.position_BT[index],
                rows=tuple(self.rows[i] for i in index) if self.rows else (),
                extra={
                    key: value[index] if isinstance(value, np.ndarray) else value for key, value in self.extra.items()
                },
            )
            for index in bounds
            if len(index)
        ]
