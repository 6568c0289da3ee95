"""What the loop and its strategies share: a prompt on its way, the answer it becomes, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from ratoon.base.errors import DataError
from ratoon.generate.sample import Sampling
from ratoon.generate.stopping import Decoder, Watch

Finish = Literal["eos", "stop", "length", "context"]
MakeDecoder = Callable[[Sequence[int]], Decoder]
"""Makes the stream decoder of what follows a prompt (ids)."""


@dataclass
class Generated:
    """One answer. `ids` are all generated tokens, the end token or those of a stop text included; `text` (None
    without a tokenizer) leaves both out. `finish`: why it ended; "context" means that the model's context was full.
    `logprobs`: log probability of each token under the model itself, before temperature and cuts (nats).
    `dropped_prompt_tokens`: how many were cut from the prompt's left, which happens on request only.
    """

    ids: list[int]
    text: str | None
    finish: Finish
    prompt_tokens: int
    dropped_prompt_tokens: int = 0
    logprobs: list[float] | None = None
    score: float | None = None

    def __str__(self) -> str:
        return self.text if self.text is not None else " ".join(map(str, self.ids))


@dataclass
class Row:
    """A prompt and what came of it so far. `room`: the most tokens that may be added. `leading`: virtual slots in front
    of it."""

    index: int
    prompt: list[int]
    room: int
    full: Finish
    dropped: int = 0
    leading: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    watch: Watch | None = None
    chance: np.random.Generator | None = None


@dataclass(frozen=True)
class Move:
    """What is read next: a token for each row of the cache, after its rows became copies of the former `rows`
    (None: they stay as they are)."""

    ids: list[int]
    rows: list[int] | None


class Strategy(Protocol):
    """Chooses from the scores of the cache's rows; None ends the loop."""

    def advance(self, logits_BV: Tensor) -> Move | None: ...

    def result(self, row: Row) -> Generated: ...


@dataclass(frozen=True)
class Ends:
    """What ends an answer, and how its text is made."""

    eos_ids: tuple[int, ...]
    sampling: Sampling
    decoder: MakeDecoder | None

    def watch(self, prompt: Sequence[int]) -> Watch | None:
        """A new text to watch, where there is a tokenizer."""
        return Watch(self.decoder(prompt), self.sampling.stop) if self.decoder is not None else None


def fit(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context_tokens: int,
    shorten: Literal["left"] | None,
    leading: Sequence[int] | None = None,
) -> list[Row]:
    """Prompts as rows that fit the context. Raises `DataError` for an empty prompt and for one longer than the
    context, unless `shorten="left"`: then the last tokens are kept that leave room for `max_new_tokens`, or half the
    context if that is more, and the row counts what was dropped. `leading`: virtual slots in front of each prompt,
    which take their part of the context.
    """
    rows = []
    for index, prompt in enumerate(prompts):
        kept = list(prompt)
        if not kept:
            raise DataError(
                "the prompt is empty: there is nothing to go on from",
                where=f"prompt {index}",
                expected="at least one token",
                fix="give a text, or the model's first token (bos)",
            )
        dropped, slots = 0, 0 if leading is None else leading[index]
        context = context_tokens - slots
        if len(kept) > context:
            if shorten is None:
                raise DataError(
                    f"the prompt has {len(kept):,} tokens",
                    where=f"prompt {index}",
                    expected=f"at most {context:,}, the model's context",
                    fix='shorten it, or keep only its end with shorten="left" (--shorten left)',
                )
            keep = max(context - sampling.max_new_tokens + 1, (context + 1) // 2)
            dropped = len(kept) - keep
            kept = kept[dropped:]
        left = context - len(kept) + 1  # the last token is never read, so it needs no place
        full: Finish = "length" if sampling.max_new_tokens <= left else "context"
        rows.append(Row(index, kept, min(sampling.max_new_tokens, left), full, dropped, slots))
    return rows
