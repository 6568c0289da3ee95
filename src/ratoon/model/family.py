"""What a family is: an entry of the table in `families.py`, and the rules by which its weights are ours.

Decides the form of an entry. Which families there are is said in `families.py`; how an entry is used, in
`family_config.py` (settings), `folder.py` (weights) and `heads.py` (task heads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ratoon.model.config import ModelConfig

Table = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """Our tensors <-> one of theirs. `split` turns theirs into ours, `join` ours into theirs."""

    ours: tuple[str, ...]
    theirs: str
    split: Callable[[Tensor, ModelConfig], list[Tensor]] = lambda x, cfg: [x]
    join: Callable[[list[Tensor], ModelConfig], Tensor] = lambda xs, cfg: xs[0]


def same(ours: str, theirs: str) -> Rule:
    """A tensor that is theirs as it stands."""
    return Rule((ours,), theirs)


def turned(ours: str, theirs: str) -> Rule:
    """GPT-2 keeps matrices as (in, out)."""
    return Rule((ours,), theirs, lambda x, cfg: [x.t()], lambda xs, cfg: xs[0].t())


def qkv(kind: str) -> tuple[str, ...]:
    """Our names of queries', keys' and values' `weight` or `bias`, for a rule that joins them."""
    return tuple(f"layers.{{i}}.attention.{name}.{kind}" for name in "qkv")


def split_heads(x: Tensor, cfg: ModelConfig) -> list[Tensor]:
    """GPT-NeoX: q, k and v of each head stand together."""
    parts = x.view(cfg.heads, 3, cfg.channels, *x.shape[1:])
    return [parts[:, j].reshape(-1, *x.shape[1:]) for j in range(3)]


def join_heads(xs: list[Tensor], cfg: ModelConfig) -> Tensor:
    """Back from `split_heads`."""
    parts = [x.view(cfg.heads, cfg.channels, *x.shape[1:]) for x in xs]
    return torch.stack(parts, dim=1).reshape(-1, *xs[0].shape[1:])


@dataclass(frozen=True)
class Family:
    """One entry of the table. `keys`: their key -> our setting, copied both ways. `fixed`: our settings that this
    family always has. `must`: their keys that may have one value only, with that value. `read` and `write` hold what
    is more than a copy. `defaults`: what Transformers takes an absent key to be."""

    model_type: str
    architecture: str
    keys: dict[str, str]
    fixed: Table
    must: Table
    weights: tuple[Rule, ...]
    read: Callable[[Table], Table] = lambda theirs: {}
    write: Callable[[ModelConfig], Table] = lambda cfg: {}
    free: frozenset[str] = field(default_factory=frozenset)
    """Our settings that `read` and `write` deal with."""
    reads: frozenset[str] = field(default_factory=frozenset)
    """Their keys that `read` deals with."""
    defaults: Table = field(default_factory=dict)
