"""What evaluation asks of a model, and how a local one answers.

Tasks know a `Scorer` and nothing else: a local model, a remote endpoint and a fake for tests are all the same to them.
Decides where a context ends and its continuation begins, and the windows of a text that is longer than the context;
both as EleutherAI's lm-evaluation-harness does (`TemplateLM._encode_pair`, `get_rolling_token_windows`), so that
figures can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.data.pack import strided_grid
from ratoon.generate.lm import LanguageModel
from ratoon.generate.rows import Generated
from ratoon.generate.sample import Sampling
from ratoon.model.likelihood import token_choices

BATCH_TOKENS = 1 << 13
"""Tokens read at once, padding included."""


@dataclass(frozen=True)
class Likelihood:
    """The summed log probability (nats) of `n_tokens` tokens, and whether greedy decoding would have given each of
    them. `dropped_tokens`: tokens cut from the context's left, which happens on request only."""

    logprob: float
    is_greedy: bool
    n_tokens: int
    dropped_tokens: int = 0


class Scorer(Protocol):
    """What evaluation knows of a model."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """log p(continuation | context) of each (context, continuation)."""
        ...

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        """log p(text) of each text, however long it is, each token predicted once."""
        ...

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Generated]:
        """One answer for each prompt."""
        ...


@dataclass(frozen=True)
class _Window:
    """Tokens read together, of which ids[first] … are predicted; `owner` is the question it belongs to."""

    owner: int
    ids: list[int]
    first: int


class LocalScorer:
    """A model on this machine as a `Scorer`. Questions of like length are read together; none hears of its neighbours.

    `stride_tokens`: how far the windows of a long text move on; if absent, as far as the context is long, as
    lm-evaluation-harness has it. `shorten="left"`: contexts that do not fit lose their beginning, counted in
    `dropped_tokens`, instead of being refused.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        context_tokens: int | None = None,
        stride_tokens: int | None = None,
        shorten: Literal["left"] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        if lm.tokenizer is None:
            raise ArtifactError(f"'{lm.name}' has no tokenizer, and text cannot be scored without one")
        self.lm, self.tokenizer, self.shorten, self.batch_tokens = lm, lm.tokenizer, shorten, batch_tokens
        self.context_tokens = lm.context_tokens if context_tokens is None else context_tokens
        self.stride_tokens = self.context_tokens if stride_tokens is None else stride_tokens
        if not 1 <= self.context_tokens <= lm.context_tokens:
            raise ConfigError(f"context_tokens is {self.context_tokens:,}", expected=f"1 to {lm.context_tokens:,}")
        if not 1 <= self.stride_tokens <= self.context_tokens:
            raise ConfigError(f"stride_tokens is {self.stride_tokens:,}", expected=f"1 to {self.context_tokens:,}")

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """log p(continuation | context) of each pair; `split` says where the one ends and the other begins.

        Raises `DataError` for a continuation without a token of its own, and for a pair that is longer than the
        model's context, unless `shorten="left"`; a continuation is never cut.
        """
        windows, dropped = [], []
        for number, (context, continuation) in enumerate(pairs):
            before, after = self.split(context, continuation)
            if not after:
                raise DataError(
                    "the continuation has no token of its own",
                    where=f"pair {number + 1}",
                    expected="a continuation that adds at least one token to its context",
                )
            excess = len(before) + len(after) - 1 - self.context_tokens
            if excess > 0 and (self.shorten is None or excess >= len(before)):
                fits = len(after) <= self.context_tokens
                raise DataError(
                    f"context and continuation have {len(before):,} + {len(after):,} tokens",
                    where=f"pair {number + 1}",
                    expected=f"at most {self.context_tokens + 1:,} together",
                    fix='keep only the context\'s end with shorten="left" (--shorten left)'
                    if fits
                    else "a continuation is never cut: give a shorter one",
                )
            dropped.append(max(0, excess))
            kept = before[max(0, excess) :]
            windows.append(_Window(number, kept + after, len(kept)))
        found = self._score(windows, len(pairs))
        return [
            Likelihood(one.logprob, one.is_greedy, one.n_tokens, cut) for one, cut in zip(found, dropped, strict=True)
        ]

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        """log p(text) of each text as a document of its own: its first token is predicted from the token that begins a
        document in training, each token once, in windows of the context's length that move on by the stride. The end
        of the text is not predicted. Raises `ArtifactError` when the tokenizer has no token to begin with.
        """
        begin = self._begin()
        windows = []
        for number, ids in enumerate(self.tokenizer.encode_batch(list(texts))):
            if not ids:
                continue
            stream = [begin, *ids]
            row = min(self.context_tokens, len(ids))
            grid = strided_grid(len(stream), row, min(self.stride_tokens, row))
            for start, first, last in zip(grid.starts, grid.learned_from, grid.learned_to, strict=True):
                windows.append(_Window(number, stream[int(start) : int(start + last) + 1], int(first) + 1))
        return self._score(windows, len(texts))

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Generated]:
        """One answer for each prompt."""
        return self.lm.generate(list(prompts), sampling, shorten=self.shorten)

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of the context and those of the continuation.

        Spaces at the end of the context go to the continuation, where a tokenizer expects them. Then both are encoded
        together, and the continuation is what follows after as many tokens as the context alone has: where the two
        would grow together into one token, the whole is spelled as it would be in a text. Nothing before it means the
        beginning of a document. A prompt begins as the model's tokenizer begins a text (a begin token, where it has
        the habit).
        """
        moved = len(context) - len(context.rstrip())
        if moved:
            context, continuation = context[:-moved], context[-moved:] + continuation
        if not context:
            ids = self.tokenizer.encode(continuation)
            return [self._begin()], ids
        before = self.tokenizer.encode_prompt(context)
        return before, self.tokenizer.encode_prompt(context + continuation)[len(before) :]

    def _begin(self) -> int:
        tokenizer = self.tokenizer
        for found in (tokenizer.separator_id, tokenizer.bos_id, *self.lm.eos_ids):
            if found is not None:
                return found
        raise ArtifactError(
            "the tokenizer has no token that begins a document: the first token has nothing to be predicted from",
            where=self.lm.facts.get("path"),
            fix="give a context that is not empty",
        )

    @torch.no_grad()
    def _score(self, windows: list[_Window], questions: int) -> list[Likelihood]:
        logprob, greedy, tokens = [0.0] * questions, [True] * questions, [0] * questions
        model = self.lm.model
        device = model.head_weight().device
        for group in self._groups(windows):
            longest = max(len(window.ids) for window in group) - 1
            # Padding stands on the right, where a causal model cannot see it.
            rows = [window.ids[:-1] + [0] * (longest + 1 - len(window.ids)) for window in group]
            hidden_BTD = model(torch.tensor(rows, device=device))
            wanted_ND = torch.cat(
                [hidden_BTD[row, window.first - 1 : len(window.ids) - 1] for row, window in enumerate(group)]
            )
            targets = [id for window in group for id in window.ids[window.first :]]
            logprob_N, best_N = token_choices(model, wanted_ND, torch.tensor(targets, device=device))
            counts = [len(window.ids) - window.first for window in group]
            sums = torch.split(logprob_N.double().cpu(), counts)
            for window, part_N, best in zip(group, sums, torch.split(best_N.cpu(), counts), strict=True):
                logprob[window.owner] += float(part_N.sum())
                greedy[window.owner] &= bool(best.all())
                tokens[window.owner] += len(part_N)
        return [Likelihood(*found) for found in zip(logprob, greedy, tokens, strict=True)]

    def _groups(self, windows: list[_Window]) -> Iterator[list[_Window]]:
        """Windows of like length together, the longest first, so that a lack of memory shows at once."""
        group: list[_Window] = []
        for window in sorted(windows, key=lambda window: -len(window.ids)):
            if group and (len(group) + 1) * len(group[0].ids) > self.batch_tokens:
                yield group
                group = []
            group.append(window)
        if group:
            yield group
