"""How likely a model finds given continuations of given contexts: reading the pairs, and what they come to together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.interval import ratio_interval, share_interval
from ratoon.evaluate.score import Likelihood, Scorer

FIELDS = ("context", "continuation")


@dataclass(frozen=True)
class Pair:
    """A context, what follows it, and the file and line they stand in."""

    context: str
    continuation: str
    place: str


@dataclass(frozen=True)
class PairsReport:
    """The likelihood of each pair, and means over pairs with 95 % intervals."""

    pairs: list[Pair]
    found: list[Likelihood]

    def as_dict(self) -> dict[str, Any]:
        """`loss` is in nats per token of the continuations, `loglikelihood` their mean sum per pair; `greedy_fraction`
        is the share of continuations that greedy decoding would have given."""
        logprob = np.array([one.logprob for one in self.found])
        tokens = np.array([one.n_tokens for one in self.found], dtype=np.float64)
        greedy = sum(one.is_greedy for one in self.found)
        return {
            "n_pairs": len(self.found),
            "n_tokens": int(tokens.sum()),
            "loglikelihood": float(logprob.mean()),
            "loglikelihood_interval": _listed(ratio_interval(logprob, np.ones(len(logprob)))),
            "loss": float(-logprob.sum() / tokens.sum()),
            "interval": _listed(ratio_interval(-logprob, tokens)),
            "greedy_fraction": greedy / len(self.found),
            "greedy_interval": list(share_interval(greedy, len(self.found))),
            "interval_of": "pairs",
            "dropped_tokens": sum(one.dropped_tokens for one in self.found),
            "pairs": [
                {
                    "where": pair.place,
                    "loglikelihood": one.logprob,
                    "n_tokens": one.n_tokens,
                    "is_greedy": one.is_greedy,
                    "dropped_tokens": one.dropped_tokens,
                }
                for pair, one in zip(self.pairs, self.found, strict=True)
            ],
        }


def score_pairs(scorer: Scorer, pairs: Sequence[Pair]) -> PairsReport:
    """log p(continuation | context) of each pair. Raises `DataError` naming file and line of one that cannot be
    scored."""
    try:
        found = scorer.loglikelihood([(pair.context, pair.continuation) for pair in pairs])
    except DataError as error:
        number = (error.where or "").removeprefix("pair ")
        if not number.isdigit():
            raise
        place = pairs[int(number) - 1].place
        raise DataError(error.found, where=place, expected=error.expected, fix=error.fix) from None
    return PairsReport(list(pairs), found)


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """The pairs of a JSONL file, one object with `context` and `continuation` a line; empty lines are passed over.

    Raises `DataError` with file and line for what is no such object, and for a file without any.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError("there is no such file", where=path, expected="a JSONL file of pairs") from None
    pairs = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 at byte {error.start} of the line", where=place, fix="save as UTF-8") from None
        except ValueError as error:
            raise DataError(f"not readable as JSON: {error}", where=place, expected="one JSON object a line") from None
        wrong = [f for f in FIELDS if not isinstance(row, dict) or not isinstance(row.get(f), str)]
        if wrong:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"the row has no text under '{wrong[0]}'",
                where=place,
                expected='{"context": "…", "continuation": "…"}' + f"; the row has: {has}",
            )
        pairs.append(Pair(row["context"], row["continuation"], place))
    if not pairs:
        raise DataError("the file holds no pair", where=path, expected='{"context": "…", "continuation": "…"} a line')
    return pairs


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
