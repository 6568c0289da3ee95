"""Beam search: several sequences side by side for each prompt, the best by summed log probability kept.

A strategy of the loop in `decode.py`, for causal models and for encoder-decoders alike. Scores and the end are those of
Transformers' beam search with `early_stopping="never"` (here the default: nothing better can follow) or `True`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ratoon.generate.rows import Ends, Finish, Generated, Move, Row
from ratoon.generate.sample import Sampling, penalize_repetition
from ratoon.generate.stopping import text_of


def length_norm(length_tokens: int, sampling: Sampling) -> float:
    """What a sequence's summed log probability is divided by: length^α, or ((5 + length) / 6)^α of Wu et al.,
    arXiv:1609.08144, eq. 14 (its coverage penalty is left out)."""
    length = (5 + length_tokens) / 6 if sampling.length_norm == "wu" else length_tokens
    return float(length**sampling.length_penalty)


@dataclass(frozen=True)
class Beam:
    """A sequence that may go on; `logprobs` under the model itself, `score` their sum after penalties."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A complete sequence with its rank."""

    beam: Beam
    rank: float
    finish: Finish


@dataclass
class Search:
    """One prompt's beams. They stand side by side in the cache, starting with one."""

    row: Row
    beams: list[Beam] = field(default_factory=lambda: [Beam()])
    answers: list[Answer] = field(default_factory=list)


class Beams:
    """Beam search over the rows of a batch; a row's beams leave the cache when its search is over."""

    def __init__(self, rows: list[Row], ends: Ends, *, logprobs: bool) -> None:
        self.ends = ends
        self.logprobs = logprobs
        self.live = [Search(row) for row in rows]
        self.done: dict[int, Answer] = {}

    def advance(self, logits_BV: Tensor) -> Move | None:
        """One token more for each beam."""
        logprob_BV = logits_BV.float().log_softmax(-1)
        ids: list[int] = []
        rows: list[int] = []
        live = []
        first = 0
        for search in self.live:
            count = len(search.beams)
            chosen = self._grow(search, logprob_BV[first : first + count])
            if chosen is not None:
                ids += [search.beams[number].ids[-1] for number in range(len(search.beams))]
                rows += [first + parent for parent in chosen]
                live.append(search)
            first += count
        self.live = live
        if not live:
            return None
        return Move(ids, None if rows == list(range(first)) else rows)

    def _grow(self, search: Search, logprob_bV: Tensor) -> list[int] | None:
        """Replace the beams by their best continuations; returns which beam each came from, None when it is over."""
        sampling, row = self.ends.sampling, search.row
        width = sampling.num_beams
        score_bV = self._penalized(search, logprob_bV) + torch.tensor(
            [beam.score for beam in search.beams], device=logprob_bV.device
        ).unsqueeze(1)
        V = score_bV.shape[1]
        wanted = min(max(2, 1 + len(self.ends.eos_ids)) * width, score_bV.numel())
        best = score_bV.flatten().topk(wanted)
        beams: list[Beam] = []
        parents: list[int] = []
        for place, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, id = divmod(index, V)
            if score == float("-inf") or len(beams) == width:
                break
            old = search.beams[parent]
            logprob = float(logprob_bV[parent, id]) if self.logprobs else 0.0
            beam = Beam((*old.ids, id), (*old.logprobs, logprob), score)
            finish = self._finish(row, beam)
            if finish is None:
                beams.append(beam)
                parents.append(parent)
            elif place < width:
                self._complete(search, beam, finish)
        search.beams = beams
        if self._over(search):
            self.done[row.index] = search.answers[0]
            return None
        return parents

    def _penalized(self, search: Search, logprob_bV: Tensor) -> Tensor:
        sampling = self.ends.sampling
        if sampling.repetition_penalty != 1.0:
            seen_bV = torch.zeros_like(logprob_bV, dtype=torch.bool)
            for number, beam in enumerate(search.beams):
                seen_bV[number, [*search.row.prompt, *beam.ids]] = True
            logprob_bV = penalize_repetition(logprob_bV, seen_bV, sampling.repetition_penalty)
        if len(search.beams[0].ids) < sampling.min_new_tokens and self.ends.eos_ids:
            logprob_bV = logprob_bV.clone()
            logprob_bV[:, list(self.ends.eos_ids)] = float("-inf")
        return logprob_bV

    def _finish(self, row: Row, beam: Beam) -> Finish | None:
        if beam.ids[-1] in self.ends.eos_ids:
            return "eos"
        if self.ends.sampling.stop and self.ends.decoder is not None:
            watch = self.ends.watch(row.prompt)
            assert watch is not None
            for id in beam.ids:
                watch.push(id)
            if watch.stopped:
                return "stop"
        return row.full if len(beam.ids) == row.room else None

    def _complete(self, search: Search, beam: Beam, finish: Finish) -> None:
        sampling = self.ends.sampling
        if sampling.early_stopping and len(search.answers) == sampling.num_beams:
            return
        rank = beam.score / length_norm(len(beam.ids), sampling)
        search.answers.append(Answer(beam, rank, finish))
        search.answers.sort(key=lambda answer: -answer.rank)
        del search.answers[sampling.num_beams :]

    def _over(self, search: Search) -> bool:
        """Whether nothing that can still come is better than the answers there are."""
        sampling = self.ends.sampling
        if not search.beams:
            return True
        if len(search.answers) < sampling.num_beams:
            return False
        if sampling.early_stopping:
            return True
        # A negative sum shrinks with the length it may still be divided by.
        length = search.row.room if sampling.length_penalty > 0 else len(search.beams[0].ids)
        return bool(search.beams[0].score / length_norm(length, sampling) <= search.answers[-1].rank)

    def result(self, row: Row) -> Generated:
        """The best answer of a row."""
        answer = self.done[row.index]
        ids = list(answer.beam.ids)
        text = None
        if self.ends.decoder is not None:
            shown = ids[:-1] if answer.finish == "eos" else ids
            text = text_of(self.ends.decoder(row.prompt), shown, self.ends.sampling.stop)
        return Generated(
            ids=ids,
            text=text,
            finish=answer.finish,
            prompt_tokens=len(row.prompt),
            dropped_prompt_tokens=row.dropped,
            logprobs=list(answer.beam.logprobs) if self.logprobs else None,
            score=answer.rank,
        )
