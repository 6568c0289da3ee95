"""An example: tokens that stay together, with what is learned of them.

The one form in which every task hands its records to the packer (`data/pack.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Tokens that stay together in one row.

    Two kinds. *Next token* (`targets` is None): `weight[i]` is how much predicting ids[i + 1] from ids[: i + 1] counts.
    *Labelled*: `targets[i]` is what position i itself should be given (a label's number), and `weight[i]` how much that
    counts; 0 = nothing is asked there. `vector`: what is asked of the text as a whole, where a label's number does not
    say it (several labels as 0 and 1, numbers, begin and end of a span): it belongs to the document, whose weight
    stands at its last token. `source`: what an encoder reads beside it. `beside`: a second example that stands right
    behind this one in the same row (the rejected answer of a pair).
    """

    ids: Sequence[int]
    weight: Sequence[float]
    name: str = ""
    targets: Sequence[int] | None = None
    vector: Sequence[float] | None = None
    source: Sequence[int] | None = None
    beside: Example | None = None

    def __post_init__(self) -> None:
        if self.targets is None:
            assert len(self.weight) >= len(self.ids) - 1, "a weight for each prediction"
        else:
            assert len(self.weight) == len(self.targets) == len(self.ids), "a target and a weight for each token"

    @property
    def places(self) -> int:
        """Slots of a row that it takes: a last id that is only a target takes none."""
        own = len(self.ids) if self.targets is not None else max(1, len(self.ids) - 1)
        return own if self.beside is None else own + self.beside.places
