"""How the next token is chosen from scores: the settings, and pure functions over logits.

Every function takes logits (B, V) and returns logits (B, V) with the tokens that are out set to -inf; none keeps a
state. The order they are applied in is `warp`'s; beams and the loop itself are `decode.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ratoon.base.seeds import stream
from ratoon.base.settings import Settings

_TOP_P_FIRST_TRY_TOKENS = 256


class Sampling(Settings):
    """How to go on from a prompt. The default is greedy: the likeliest token each time, nothing drawn."""

    max_new_tokens: int = Field(default=128, ge=1, description="the most tokens to add to a prompt")
    min_new_tokens: int = Field(default=0, ge=0, description="the end token is out of reach until so many are there")
    temperature: float = Field(default=0.0, ge=0, description="scores are divided by it before drawing; 0 = greedy")
    top_k: int | None = Field(default=None, ge=1, description="draw among the k likeliest; absent = all")
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="draw among the likeliest that together reach this probability; absent = all",
    )
    min_p: float | None = Field(
        default=None, gt=0, le=1, description="draw among those at least this fraction of the likeliest's probability"
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        description="scores of tokens that occurred are divided (if negative, multiplied) by it; 1 = off",
    )
    stop: tuple[str, ...] = Field(default=(), description="texts that end the answer; they are not part of it")
    seed: int = Field(default=0, ge=0, description="the seed of what is drawn; greedy and beams draw nothing")
    num_beams: int = Field(default=1, ge=1, description="sequences kept side by side (beam search); 1 = off")
    length_penalty: float = Field(
        default=1.0,
        description="beams are ranked by summed log probability / length ** this; above 0 favours long ones",
    )
    length_norm: Literal["power", "wu"] = Field(
        default="power",
        description="power: the length itself is raised to length_penalty; wu: (5 + length) / 6 is, which short "
        "translations take better (Wu et al., 2016)",
    )
    early_stopping: bool = Field(
        default=False,
        description="beam search ends once num_beams answers are complete, though a better one may follow",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Sampling:
        if any(not text for text in self.stop):
            raise ValueError("an empty stop text would end every answer at once")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search draws nothing: leave temperature at 0, or num_beams at 1")
        if self.temperature == 0:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect at temperature 0 (greedy): give a temperature above 0")
        if self.num_beams == 1 and (self.length_penalty != 1.0 or self.length_norm != "power" or self.early_stopping):
            raise ValueError("length_penalty, length_norm and early_stopping have no effect without num_beams above 1")
        return self


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Scores of tokens marked in `seen_BV` (bool), divided by `penalty` if positive, multiplied if negative.

    Keskar et al., arXiv:1909.05858, section 4.1, in the form that treats negative scores alike.
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the k highest scores of each row (and what equals the k-th)."""
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least `p`, at least one.

    Holtzman et al., arXiv:1904.09751, eq. 2-3.
    """
    V = logits_BV.shape[-1]
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    # Sorting a whole vocabulary costs more than a small model's step; a few hundred tokens nearly always reach p.
    tried = min(_TOP_P_FIRST_TRY_TOKENS, V)
    top_BN, index_BN = logits_BV.topk(tried, dim=-1)
    if tried < V and bool(((top_BN - total_B1).exp().sum(-1) < p).any()):
        top_BN, index_BN = logits_BV.sort(dim=-1, descending=True)
    probability_BN = (top_BN - total_B1).exp()
    before_BN = probability_BN.cumsum(-1) - probability_BN
    kept_BN = top_BN.masked_fill(before_BN >= p, float("-inf"))
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, index_BN, kept_BN)


def keep_min_p(logits_BV: Tensor, min_p: float) -> Tensor:
    """Keep tokens whose probability is at least `min_p` times the likeliest's (Nguyen et al., arXiv:2407.01082)."""
    best_B1 = logits_BV.max(dim=-1, keepdim=True).values
    return logits_BV.masked_fill((logits_BV - best_B1).exp() < min_p, float("-inf"))


def warp(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p, min-p, in this order (Transformers' own)."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV


def draw(logits_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """One token of each row (B,), by inverting the cumulative probability at `uniform_B` in [0, 1)."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    point_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]
    # Rounding may land behind the last token that can be drawn.
    last_B = logits_BV.shape[-1] - 1 - logits_BV.isfinite().flip(-1).int().argmax(-1)
    return torch.minimum(token_B, last_B)


def row_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[np.random.Generator]:
    """A random stream for each prompt: it depends on the seed, the prompt and how often the same prompt stood before
    it, so that what a prompt draws does not depend on the batch it is in, and equal prompts draw differently."""
    count: dict[str, int] = {}
    streams = []
    for prompt in prompts:
        name = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).hexdigest()
        streams.append(stream(seed, "sample", name, count.setdefault(name, 0)))
        count[name] += 1
    return streams
