"""Where the sentences of a text begin and end, English and Chinese, by rule.

Decides what ends a sentence: 。！？… and a line's end always; . ! ? where a space and something other than a small
letter follow, or, after Chinese, Chinese; not after a title, an initial or another usual abbreviation.
"""

from __future__ import annotations

import re

from ratoon.text.edits import Span
from ratoon.text.homophones import HAN

_CLOSING = "\"'”’」』）)\\]"
_END = re.compile(
    f"[。！？!?…]+[{_CLOSING}]*(?=[{HAN}“「『《（])|[。！？…]+[{_CLOSING}]*"
    f"|[.!?]+[{_CLOSING}]*(?=\\s+[^\\sa-z])|(?<=[{HAN}])\\.(?=[{HAN}])|\\n+"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|Sen|Rep|Gov|Gen|Col|Lt|Sgt|St|Jr|Sr|vs|cf|e\.g|i\.e|al|etc|No|Fig|Eq|Inc|Co"
    r"|Corp|Ltd|approx|Jan|Feb|Mar|Apr|Aug|Sept|Sep|Oct|Nov|Dec)\.$"
)


def sentences(text: str) -> list[Span]:
    """Start and end of each sentence of `text`, without the space around it."""
    found: list[Span] = []
    begin = 0
    for end in [*_ends(text), len(text)]:
        part = text[begin:end]
        if part.strip():
            found.append((begin + len(part) - len(part.lstrip()), begin + len(part.rstrip())))
        begin = end
    return found


def _ends(text: str) -> list[int]:
    return [
        match.end()
        for match in _END.finditer(text)
        if match.group() != "." or not _ABBREVIATION.search(text[max(0, match.end() - 8) : match.end()])
    ]
