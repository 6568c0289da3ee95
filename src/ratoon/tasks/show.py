"""Examples for people's eyes: each token as text, with what is learned at it.

Decides how tokens are spelled (a character of several tokens stands at the last of them) and which weight is a token's:
that of predicting it. Colours and lines are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ratoon.tasks.example import Example
from ratoon.text.stream import StreamDecoder
from ratoon.text.tokenizer import Tokenizer


class Shown(NamedTuple):
    """A token: its text, the weight with which it is learned (of the next-token kind: predicted; of the labelled kind:
    given its label), and what is asked at it, where that is not the token itself."""

    text: str
    weight: float
    target: str | None


def show(example: Example, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> list[Shown]:
    """The tokens of an example; `labels` name the numbers it asks for (`task.head().labels`)."""
    texts = spelled(example.ids, tokenizer)
    if example.targets is None:
        own = [0.0, *example.weight[: len(texts) - 1]]
        return [Shown(text, weight, None) for text, weight in zip(texts, own, strict=True)]
    found = []
    for position, (text, weight, target) in enumerate(zip(texts, example.weight, example.targets, strict=True)):
        asked = None
        if any(example.targets) and example.vector is not None:  # a span: the places of begin and end
            ends = [name for name, at in zip(labels or ("begin", "end"), example.vector, strict=True) if at == position]
            asked = ", ".join(ends) or None
            weight = float(bool(ends))
        elif weight and example.vector is not None:
            asked = ", ".join(f"{number:g}" for number in example.vector)
        elif weight:
            asked = labels[target] if labels else str(target)
        found.append(Shown(text, weight, asked))
    return found


def show_parts(example: Example, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> dict[str, list[Shown]]:
    """The same with what stands beside: `source` (what an encoder reads), `text`, `beside` (the rejected answer)."""
    parts = {"text": show(example, tokenizer, labels)}
    if example.source is not None:
        parts = {"source": [Shown(text, 0.0, None) for text in spelled(example.source, tokenizer)], **parts}
    if example.beside is not None:
        parts["beside"] = show(example.beside, tokenizer, labels)
    return parts


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds; special tokens by their spelling. Joined, it is what all decode to."""
    stream = StreamDecoder(tokenizer, skip_special=False)
    texts = [stream.push(id) for id in ids]
    if texts:
        texts[-1] += stream.flush()
    return texts
