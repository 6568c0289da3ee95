"""Which of two answers a model finds likelier: the share of pairs it tells as people did, and by how much.

Decides what a pair counts; how likely each answer is was found by the scorer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.metrics.value import Head, Measured, measured, summed


def preference(margins: Sequence[float], *, seed: int = 1, resamples: int = 1000) -> Measured:
    """`accuracy` (the main figure): the share of pairs whose chosen answer is the likelier one; and `margin`, by how
    many nats per token it is likelier on average.

    `margins`: of each pair, the chosen answer's mean log probability of a token less the rejected one's, in nats. Pairs
    in which both are equally likely count one half. per_record: both. Compared with the model before its training, the
    margin is what DPO moves, with the means of an answer's tokens in place of their sums (Rafailov et al.,
    arXiv:2305.18290, eq. 7). Raises `DataError` for no pair and for a margin that is not a number.
    """
    margin_N = np.asarray(margins, dtype=np.float64)
    wrong = ~np.isfinite(margin_N)
    if wrong.any():
        raise DataError(
            "a pair's likelihood is not a number", where=f"record {int(np.argmax(wrong)) + 1}", expected="finite nats"
        )
    right_N = (margin_N > 0) + 0.5 * (margin_N == 0)
    figures = summed(
        np.stack([right_N, margin_N, np.ones(len(margin_N))], axis=1), lambda s_RS: s_RS[:, :2] / s_RS[:, 2:]
    )
    heads = [
        Head("accuracy", "accuracy|pairs whose chosen answer has the higher mean log-likelihood per token|ties:half"),
        Head("margin", "mean over pairs of chosen less rejected|nats per token"),
    ]
    per_record = {"accuracy": right_N.tolist(), "margin": margin_N.tolist()}
    return measured(figures, len(margin_N), heads, seed=seed, resamples=resamples, per_record=per_record)
