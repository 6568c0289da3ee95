"""How surprised a model is by texts: perplexity from each record's nats and tokens.

Decides nothing but the ratio; its interval is `evaluate/interval.py`'s, records being the units. Which tokens count
is the scorer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.interval import ratio_interval
from ratoon.evaluate.metrics.counts import expect_pairs
from ratoon.evaluate.metrics.value import Floats, Measured, Value, ratio, summed


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> Measured:
    """Perplexity (the main figure) and loss in nats per token: all nats over all tokens, and e to that.

    The intervals are `ratio_interval`'s over records, no resampling. `n` is in tokens. per_record: `loss`, 0 for a
    record without tokens. Raises `DataError` where no token was predicted, or a record's nats are not a number.
    """
    n = expect_pairs(nats, tokens)
    nats_N, tokens_N = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    wrong = ~np.isfinite(nats_N) | (tokens_N < 0)
    if wrong.any() or not tokens_N.sum():
        place = f"record {int(np.argmax(wrong)) + 1}" if wrong.any() else None
        raise DataError(
            "a record's nats are not a number" if place else "no token was predicted",
            where=place,
            expected="finite nats and counts of tokens, some above 0",
        )
    loss = float(nats_N.sum() / tokens_N.sum())
    interval = ratio_interval(nats_N, tokens_N)
    note = "a single record: no interval" if interval is None else f"{n} records"
    above = None if interval is None else (_exp(interval[0]), _exp(interval[1]))
    count = int(tokens_N.sum())
    values = [
        Value(name, value, count, reach, sign, higher_is_better=False, unit="token", note=note)
        for name, value, reach, sign in (
            ("perplexity", _exp(loss), above, "perplexity|nats over tokens of all records"),
            ("loss", loss, interval, "loss|nats per token of all records"),
        )
    ]
    per_record = {"loss": ratio(nats_N, tokens_N).tolist()}
    told = "ratio of sums|of:records|interval:cluster-robust normal 95"
    return Measured(values, {}, per_record, told, n, summed(np.stack([nats_N, tokens_N], axis=1), _figures))


def _figures(sums_RS: Floats) -> Floats:
    loss_R = ratio(sums_RS[:, 0], sums_RS[:, 1], otherwise=math.nan)
    return np.stack([np.exp(np.minimum(loss_R, 700.0)), loss_R], axis=1)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
