"""The one decoding loop: read the prompts, choose, read what was chosen, until every row is done.

Decides batching, capacity and when a row ends. What is chosen is a strategy: `OneEach` (greedy and sampling) here,
`Beams` in `beam.py`; what they share is in `rows.py`. Scores are changed in `sample.py`, text is watched in
`stopping.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ratoon.adapt.bank import leading_slots, these_rows
from ratoon.adapt.slots import with_virtual
from ratoon.base.errors import ConfigError, DataError
from ratoon.generate.beam import Beams
from ratoon.generate.native import MOST_ROWS, NativeStep
from ratoon.generate.rows import Ends, Finish, Generated, MakeDecoder, Move, Row, Strategy, fit
from ratoon.generate.sample import Sampling, draw, penalize_repetition, row_streams, warp
from ratoon.model.cache import Cache
from ratoon.model.encoder_decoder import EncoderDecoder
from ratoon.model.native import Unavailable
from ratoon.model.transformer import Transformer

Kernel = Literal["auto", "native", "torch"]
BATCH_ROWS = 16
"""Prompts decoded side by side."""
PREFILL_TOKENS = 512
"""Prompt tokens read at once: enough to fill the matrix product, few enough that scores stay small in memory."""


class Reader:
    """The model's side of the loop: reads prompts and tokens through a cache, gives the last token's scores."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        kernel: Kernel,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.numbers = list(range(len(prompts)) if numbers is None else numbers)
        """Which of the caller's prompts each row of the cache goes on from; by it adapters are chosen."""
        weight = model.head_weight()
        self.device = weight.device
        self.cache = Cache(model.cfg, len(prompts), capacity, dtype=weight.dtype, device=self.device)
        longest = max(len(prompt) for prompt in prompts)
        self.padding = [longest - len(prompt) for prompt in prompts]
        self.position = [len(prompt) for prompt in prompts]
        self.memory_document_BS: Tensor | None = None
        self.native: NativeStep | None = None
        if kernel != "torch":
            try:
                self.native = NativeStep(model, self.cache)
            except Unavailable as error:
                if kernel == "native":
                    raise ConfigError(f"kernel='native' cannot be had: {error}", fix="leave kernel at 'auto'") from None

    def prefill(self, memory_BSD: Tensor | None = None, memory_document_BS: Tensor | None = None) -> Tensor:
        """Read all prompts, padded on the left where they are unequal; scores (B, V) after their last tokens."""
        self.memory_document_BS = memory_document_BS
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(self.padding, self.prompts, strict=True)]
        ids_BT = torch.tensor(rows, device=self.device)
        position_BT = document_BT = None
        if any(self.padding):
            padding_B1 = torch.tensor(self.padding, device=self.device)[:, None]
            slot_BT = torch.arange(ids_BT.shape[1], device=self.device)[None] - padding_B1
            position_BT = slot_BT.clamp(min=0)
            document_BT = torch.where(slot_BT < 0, -1, 0).to(torch.int32)
        for start in range(0, ids_BT.shape[1], PREFILL_TOKENS):
            part = slice(start, start + PREFILL_TOKENS)
            with these_rows(self.model, self.numbers):
                hidden_BTD = self.model(
                    ids_BT[:, part],
                    None if position_BT is None else position_BT[:, part],
                    None if document_BT is None else document_BT[:, part],
                    self.cache,
                    memory_BSD=memory_BSD,
                    memory_document_BS=memory_document_BS,
                )
        return self.model.logits(hidden_BTD[:, -1])

    def step(self, move: Move) -> Tensor:
        """Read one more token in each row; scores (B, V) after it."""
        if move.rows is not None:
            self._reorder(move.rows)
        position = self.position
        self.position = [place + 1 for place in position]
        native = self.native
        if native is not None and len(move.ids) <= MOST_ROWS and min(position) >= native.first_position:
            return native(move.ids, position, self.padding)
        ids_B1 = torch.tensor(move.ids, device=self.device)[:, None]
        position_B1 = torch.tensor(position, device=self.device)[:, None] if self.cache.padded else None
        with these_rows(self.model, self.numbers):
            hidden_B1D = self.model(ids_B1, position_B1, None, self.cache, memory_document_BS=self.memory_document_BS)
        return self.model.logits(hidden_B1D[:, -1])

    def _reorder(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.cache.reorder(index)
        self.position = [self.position[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self.numbers = [self.numbers[row] for row in rows]
        if self.memory_document_BS is not None:
            self.memory_document_BS = self.memory_document_BS.index_select(0, index)


class OneEach:
    """Greedy and sampling: each row goes its own way and leaves the batch when it is done."""

    def __init__(
        self,
        rows: list[Row],
        ends: Ends,
        vocab_size: int,
        *,
        logprobs: bool,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.live = rows
        self.ends = ends
        self.logprobs = logprobs
        self.on_text = on_text
        self.done: dict[int, Finish] = {}
        sampling = ends.sampling
        self.seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
            for number, row in enumerate(rows):
                self.seen_BV[number, row.prompt] = True
        for row in rows:
            row.watch = ends.watch(row.prompt)

    def choose(self, logits_BV: Tensor) -> list[int]:
        """The next token of each live row."""
        sampling = self.ends.sampling
        scores_BV = logits_BV
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV.to(scores_BV.device)
            scores_BV = penalize_repetition(scores_BV, self.seen_BV, sampling.repetition_penalty)
        short = [number for number, row in enumerate(self.live) if len(row.ids) < sampling.min_new_tokens]
        if short and self.ends.eos_ids:
            scores_BV = scores_BV.clone()
            for id in self.ends.eos_ids:
                scores_BV[short, id] = float("-inf")
        chances = [row.chance.random() for row in self.live if row.chance is not None]
        chosen_B = draw(warp(scores_BV, sampling), chances) if chances else scores_BV.argmax(-1)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, chosen_B[:, None], True)
        if self.logprobs:
            taken_B = logits_BV.log_softmax(-1).gather(1, chosen_B[:, None])[:, 0]
            for row, logprob in zip(self.live, taken_B.tolist(), strict=True):
                row.logprobs.append(logprob)
        chosen: list[int] = chosen_B.tolist()
        return chosen

    def advance(self, logits_BV: Tensor) -> Move | None:
        """One token more for each live row."""
        ids = self.choose(logits_BV.float())
        staying = [number for number, row in enumerate(self.live) if not self._add(row, ids[number])]
        if not staying:
            return None
        if len(staying) == len(self.live):
            return Move(ids, None)
        self.live = [self.live[number] for number in staying]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[staying]
        return Move([ids[number] for number in staying], staying)

    def _add(self, row: Row, id: int) -> bool:
        """Whether the row is done with this token."""
        row.ids.append(id)
        finish: Finish | None = None
        if id in self.ends.eos_ids:
            finish = "eos"
        elif row.watch is not None:
            self._show(row, row.watch.push(id))
            if row.watch.stopped:
                finish = "stop"
        if finish is None and len(row.ids) == row.room:
            finish = row.full
        if finish is None:
            return False
        if row.watch is not None:
            self._show(row, row.watch.finish())
        self.done[row.index] = finish
        return True

    def _show(self, row: Row, text: str) -> None:
        if text and self.on_text is not None:
            self.on_text(row.index, text)

    def result(self, row: Row) -> Generated:
        """The answer of a row that is done."""
        return Generated(
            ids=row.ids,
            text=row.watch.text if row.watch is not None else None,
            finish=self.done[row.index],
            prompt_tokens=len(row.prompt),
            dropped_prompt_tokens=row.dropped,
            logprobs=row.logprobs if self.logprobs else None,
        )


@torch.no_grad()
def generate(
    model: Transformer | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    decoder: MakeDecoder | None = None,
    eos_ids: Sequence[int] | None = None,
    sources: Sequence[Sequence[int]] | None = None,
    shorten: Literal["left"] | None = None,
    logprobs: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    batch_rows: int = BATCH_ROWS,
    kernel: Kernel = "auto",
    virtual_tokens: int = 0,
) -> list[Generated]:
    """Go on from each prompt (token ids); one answer for each, whatever its neighbours are.

    `decoder` makes a stream decoder for what follows a prompt (text and stop texts need one). `eos_ids`: the
    model's own if absent. `sources`: an encoder-decoder's source ids, one for each prompt. `on_text(prompt
    number, new text)` is called as text comes: whole characters, never a part of a stop text. `kernel`: single
    tokens are read by the C step where it can be had ("auto"), always ("native", or an error), or never ("torch").
    `virtual_tokens`: slots that the loop puts in front of each prompt for the method that is installed; those of
    adapters chosen by row (`adapt/bank.py`) are known.
    Raises `ConfigError` for settings that cannot be met here, `DataError` for a prompt that does not fit (see `fit`).
    """
    sampling = sampling or Sampling()
    transformer = model.decoder if isinstance(model, EncoderDecoder) else model
    cfg = transformer.cfg
    if not cfg.causal:
        raise ConfigError("the model is an encoder: it reads, it does not write", expected="a causal model")
    if decoder is None and (sampling.stop or on_text is not None):
        raise ConfigError("stop texts and streaming need a tokenizer", expected="a model folder with tokenizer.json")
    if sampling.num_beams > 1 and on_text is not None:
        raise ConfigError("beam search has no text to stream before its end", fix="leave out streaming, or num_beams")
    if (sources is not None) != isinstance(model, EncoderDecoder):
        raise ConfigError("sources belong to an encoder-decoder, and it cannot do without them")
    if isinstance(model, EncoderDecoder) and sources is not None:
        _check_sources(sources, len(prompts), model.encoder.cfg.context_tokens)
    leading = [virtual_tokens + slots for slots in leading_slots(transformer, len(prompts))]
    rows = fit(prompts, sampling, cfg.context_tokens, shorten, leading)
    ends = Ends(tuple(cfg.eos_ids if eos_ids is None else eos_ids), sampling, decoder)
    if sampling.temperature > 0:
        for row, chance in zip(rows, row_streams([row.prompt for row in rows], sampling.seed), strict=True):
            row.chance = chance
    answers: dict[int, Generated] = {}
    # Rows of like length stand together: less padding.
    ordered = sorted(
        rows, key=lambda row: (-row.leading - len(row.prompt), -len(sources[row.index]) if sources is not None else 0)
    )
    for start in range(0, len(ordered), batch_rows):
        group = ordered[start : start + batch_rows]
        strategy: Strategy
        if sampling.num_beams > 1:
            strategy = Beams(group, ends, logprobs=logprobs)
        else:
            strategy = OneEach(group, ends, cfg.vocab_size, logprobs=logprobs, on_text=on_text)
        _run(model, group, strategy, [sources[row.index] for row in group] if sources is not None else None, kernel)
        answers.update({row.index: strategy.result(row) for row in group})
    return [answers[row.index] for row in rows]


def _run(
    model: Transformer | EncoderDecoder,
    rows: list[Row],
    strategy: Strategy,
    sources: Sequence[Sequence[int]] | None,
    kernel: Kernel,
) -> None:
    """Read the rows' prompts, then choose and read until the strategy has enough."""
    # Rows are aligned at the end of their prompts.
    prompts = [with_virtual(row.prompt, row.leading) for row in rows]
    capacity = max(map(len, prompts)) + max(row.room for row in rows) - 1
    transformer = model.decoder if isinstance(model, EncoderDecoder) else model
    reader = Reader(transformer, prompts, capacity, kernel, [row.index for row in rows])
    memory_BSD = memory_document_BS = None
    if isinstance(model, EncoderDecoder):
        assert sources is not None, "an encoder-decoder has a source for each prompt"
        source_BS, memory_document_BS = _pad_sources(sources, reader.device)
        memory_BSD = model.encode(source_BS, memory_document_BS)
    logits_BV = reader.prefill(memory_BSD, memory_document_BS)
    threads = torch.get_num_threads()
    try:
        if reader.native is not None:
            # Torch's threads spin for milliseconds after each of its operations, on the cores the C step needs.
            torch.set_num_threads(1)
        while (move := strategy.advance(logits_BV)) is not None:
            logits_BV = reader.step(move)
    finally:
        torch.set_num_threads(threads)


def _check_sources(sources: Sequence[Sequence[int]], prompts: int, context_tokens: int) -> None:
    """Raises `DataError` for a source that is empty or longer than the encoder's context."""
    if len(sources) != prompts:
        raise ConfigError(f"{len(sources)} sources for {prompts} prompts", expected="one source for each prompt")
    for number, source in enumerate(sources):
        if not 1 <= len(source) <= context_tokens:
            raise DataError(
                f"the source has {len(source):,} tokens",
                where=f"source {number}",
                expected=f"1 to {context_tokens:,}, the encoder's context",
                fix="shorten it, or split it into sentences" if len(source) else "leave it out",
            )


def _pad_sources(sources: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources padded on the right, by at least one slot: a prompt's own padding then has something to look at, and
    no row of the softmax is empty."""
    longest = max(len(source) for source in sources) + 1
    ids_BS = torch.zeros(len(sources), longest, dtype=torch.int64, device=device)
    document_BS = torch.full((len(sources), longest), -1, dtype=torch.int32, device=device)
    for number, source in enumerate(sources):
        ids_BS[number, : len(source)] = torch.tensor(list(source), device=device)
        document_BS[number, : len(source)] = 0
    return ids_BS, document_BS
