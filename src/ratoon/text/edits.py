"""Small edits of a text: where one may be made, which are made, and where the old places stand afterwards.

Decides how strength becomes a choice among sites and what a protected span protects. Which sites there are and what
may stand in them is the business of each kind of perturbation (`perturb.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ratoon.base.errors import ConfigError

Span: TypeAlias = tuple[int, int]
"""Characters start … end of a text, the end not included."""


@dataclass(frozen=True)
class Site:
    """A place of a text (characters start … end, the end not included) and what may stand there instead. None of the
    choices equals what stands there; start = end is a gap between two characters."""

    start: int
    end: int
    choices: Sequence[str]


@dataclass(frozen=True)
class Edited:
    """A text after its edits. `eligible`: sites there were; `edits`: (start, end, what stands there now) in the old
    text's characters, in order."""

    text: str
    eligible: int
    edits: tuple[tuple[int, int, str], ...] = ()

    @property
    def changed(self) -> int:
        """How many sites were edited."""
        return len(self.edits)

    def place(self, offset: int) -> int:
        """Where the character that stood at `offset` stands now; of a character that was replaced, where its
        replacement begins. Borders of a protected span are moved exactly."""
        moved = offset
        for start, end, new in self.edits:
            if end <= offset:
                moved += len(new) - (end - start)
            elif start < offset:
                return moved - (offset - start)
            else:
                break
        return moved


def free_sites(sites: Iterable[Site], protected: Sequence[Span] | None) -> list[Site]:
    """The sites that touch no protected span. A gap at the border of a span does not touch it."""
    if not protected:
        return list(sites)
    spans: list[Span] = []
    for start, end in sorted(protected):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    ends = [end for _, end in spans]
    kept = []
    for site in sites:
        following = bisect_right(ends, site.start)
        if following == len(spans) or spans[following][0] >= site.end:
            kept.append(site)
    return kept


def edit(text: str, sites: Sequence[Site], strength: float, random: np.random.Generator) -> Edited:
    """Edit each site with probability `strength`, a choice of its own drawn evenly.

    The sites edited at a strength are among those edited at any greater one when the generator begins in the same
    state, with the same choices: a curve over strengths follows one set of mistakes as it grows. Strength 0 gives the
    text as it is. Raises `ConfigError` for a strength outside 0 … 1.
    """
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"a strength of {strength}", expected="0 (nothing) to 1 (everything that can be touched)")
    if strength == 0.0 or not sites:
        return Edited(text, len(sites))
    chance, which = random.random((2, len(sites)))
    pieces, edits, done = [], [], 0
    for site, drawn, part in zip(sites, chance, which, strict=True):
        assert site.start >= done and len(site.choices), "sites are in order, apart from each other, and have a choice"
        if drawn >= strength:
            continue
        new = site.choices[int(part * len(site.choices))]
        pieces += [text[done : site.start], new]
        edits.append((site.start, site.end, new))
        done = site.end
    pieces.append(text[done:])
    return Edited("".join(pieces), len(sites), tuple(edits))
