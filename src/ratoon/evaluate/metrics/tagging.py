"""How well tokens are tagged: entities as conlleval and seqeval count them, and the plain report by tag.

Decides how tags are read into entities. `entity_…` is the relaxed reading of conlleval and of seqeval's default: an
I- that follows nothing of its type begins an entity, so IOB1 and IOB2 are both read right. `strict_…` is seqeval's
`mode="strict", scheme=IOB2`: only B- begins one. The token report takes each tag, O among them, as a class. Which
sub-word carries a word's tag is the task's.

Letters: N sentences, K types or tags, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ratoon.base.errors import DataError
from ratoon.evaluate.metrics.counts import averaged_heads, averages, expect_pairs, table
from ratoon.evaluate.metrics.value import Floats, Head, Measured, measured, ratio, summed

Span = tuple[str, int, int]
"""An entity: its type, its first token and the one behind its last."""


def tagging(
    expected: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    *,
    seed: int = 1,
    resamples: int = 1000,
) -> Measured:
    """Entity F1 (micro, the main figure), precision and recall in three averages and two readings; then accuracy and
    the same nine of the tags.

    Equal to seqeval (default and strict IOB2) and, for `token_…`, to scikit-learn's classification report over all
    tokens. Averages go over the types or tags that are expected or predicted somewhere. Intervals draw sentences.
    Tables: `per_entity`, `per_entity_strict`, `per_tag`, `confusion` (of tags). Raises `DataError` for sentences of
    two lengths and for tags that are not O, B-type or I-type (`tasks.tagging.iob2` turns other schemes into these).
    """
    n = expect_pairs(expected, predicted)
    for number, (one, other) in enumerate(zip(expected, predicted, strict=True), start=1):
        if len(one) != len(other):
            raise DataError(
                f"a sentence of {len(one)} tags has {len(other)} predicted",
                where=f"record {number}",
                expected="one tag for each token",
            )
        for tag in (*one, *other):
            _expect_tag(tag, number)
    if not any(expected):
        raise DataError("no sentence holds a token", expected="at least one tagged token")
    readings = [_entity_counts(expected, predicted, read) for read in (spans, strict_spans)]
    tags, tag_counts, confusion = _tag_counts(expected, predicted)
    blocks = [counts for _, counts in readings] + [tag_counts]
    widths = [block.shape[1] for block in blocks]
    borders = np.cumsum(widths)[:-1]

    def formula(sums_RS: Floats) -> Floats:
        parts = [np.split(part, 3, axis=1) for part in np.split(sums_RS, borders, axis=1)]
        accuracy_R = ratio(parts[2][0].sum(axis=1), parts[2][2].sum(axis=1))
        nines = [averages(part[0], part[1], part[2]) for part in parts]
        return np.concatenate([nines[0], nines[1], accuracy_R[:, None], nines[2]], axis=1)

    sums_NS = np.concatenate(blocks, axis=1)
    totals = [np.split(block.sum(axis=0), 3) for block in blocks]
    entities, tokens = int(totals[0][2].sum()), int(totals[2][2].sum())
    of_entities, of_tokens = f"{entities} entities in {n} sentences", f"{tokens} tokens in {n} sentences"
    heads = [
        *averaged_heads("entity_", "entity|read:conlleval, seqeval default", of_entities),
        *averaged_heads("strict_", "entity|read:seqeval strict IOB2", f"{int(totals[1][2].sum())} entities"),
        Head("token_accuracy", "accuracy|token|classes:tags and O", note=of_tokens),
        *averaged_heads("token_", "token|classes:tags and O", of_tokens),
    ]
    tables: dict[str, Any] = {
        "per_entity": table(readings[0][0], *totals[0]),
        "per_entity_strict": table(readings[1][0], *totals[1]),
        "per_tag": table(tags, *totals[2]),
        "confusion": {"labels": tags, "counts": confusion},
    }
    per_record = _by_sentence(blocks)
    figures = summed(sums_NS, formula)
    return measured(figures, n, heads, seed=seed, resamples=resamples, tables=tables, per_record=per_record)


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of IOB1 or IOB2 tags, read as conlleval (Tjong Kim Sang & De Meulder 2003) and seqeval's default: an
    entity begins at B-, at an I- behind O, and at an I- of another type."""
    found: list[Span] = []
    began, kind = 0, ""
    for place, tag in enumerate((*tags, "O")):
        letter, _, this = tag.partition("-")
        if kind and (letter != "I" or this != kind):
            found.append((kind, began, place))
            kind = ""
        if letter != "O" and not kind:
            began, kind = place, this
    return found


def strict_spans(tags: Sequence[str]) -> list[Span]:
    """The entities of IOB2 tags, read as seqeval's strict mode: only B- begins one; an I- that follows nothing of its
    type is none."""
    found: list[Span] = []
    began, kind = 0, ""
    for place, tag in enumerate((*tags, "O")):
        letter, _, this = tag.partition("-")
        if kind and (letter != "I" or this != kind):
            found.append((kind, began, place))
            kind = ""
        if letter == "B":
            began, kind = place, this
    return found


def _entity_counts(
    expected: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    read: Callable[[Sequence[str]], list[Span]],
) -> tuple[list[str], Floats]:
    """The types, and hits, predicted and expected entities of each type by sentence, (N, 3K)."""
    pairs = [(set(read(one)), set(read(other))) for one, other in zip(expected, predicted, strict=True)]
    types = sorted({kind for pair in pairs for side in pair for kind, _, _ in side})
    place = {kind: number for number, kind in enumerate(types)}
    counts = np.zeros((len(pairs), 3, len(types)))
    for number, (one, other) in enumerate(pairs):
        for block, side in enumerate((one & other, other, one)):
            for kind, _, _ in side:
                counts[number, block, place[kind]] += 1
    return types, counts.reshape(len(pairs), 3 * len(types))


def _tag_counts(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[list[str], Floats, list[list[int]]]:
    """The tags, hits, predicted and expected tokens of each by sentence (N, 3K), and the confusion of all."""
    tags = sorted({tag for side in (expected, predicted) for sentence in side for tag in sentence})
    place, k = {tag: number for number, tag in enumerate(tags)}, len(tags)
    counts, confusion = np.zeros((len(expected), 3, k)), np.zeros((k, k), dtype=np.int64)
    for number, (one, other) in enumerate(zip(expected, predicted, strict=True)):
        of_one = np.array([place[tag] for tag in one], dtype=np.int64)
        of_other = np.array([place[tag] for tag in other], dtype=np.int64)
        counts[number, 0] = np.bincount(of_one[of_one == of_other], minlength=k)
        counts[number, 1] = np.bincount(of_other, minlength=k)
        counts[number, 2] = np.bincount(of_one, minlength=k)
        np.add.at(confusion, (of_one, of_other), 1)
    return tags, counts.reshape(len(expected), 3 * k), confusion.tolist()


def _by_sentence(blocks: Sequence[Floats]) -> dict[str, list[float]]:
    """F1 of each sentence's entities (1 where there is none and none was found) and the share of its tokens that are
    right (1 for a sentence without tokens)."""
    hits, found, there = (part.sum(axis=1) for part in np.split(blocks[0], 3, axis=1))
    right, _, tokens = (part.sum(axis=1) for part in np.split(blocks[2], 3, axis=1))
    return {
        "entity_f1": ratio(2 * hits, found + there, otherwise=1.0).tolist(),
        "token_accuracy": ratio(right, tokens, otherwise=1.0).tolist(),
    }


def _expect_tag(tag: str, number: int) -> None:
    if tag != "O" and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
        raise DataError(
            f"'{tag}' is no tag of IOB1 or IOB2",
            where=f"record {number}",
            expected="O, B-type or I-type",
            fix="turn other schemes into IOB2 with ratoon.evaluate.metrics.tagging.iob2",
        )
