"""What befalls a text on its way: mistakes of typing, spelling and form, and small changes of its meaning.

Decides the kinds of perturbation, what each may touch, and whether the label of a record survives it. How strength
picks among sites stands in `edits.py`, the tables in `lookalikes.py`, `homophones.py`, `negation.py` and `names.py`;
what a model makes of the result is measured in `evaluate/robust.py`.

Strength is the expected share of eligible places that are touched: characters, words, or places where a rule applies,
as the kind's `unit` says. Everything is drawn from the generator handed in and from nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from ratoon.base.errors import ConfigError
from ratoon.base.seeds import stream
from ratoon.text import negation
from ratoon.text.edits import Edited, Site, Span, edit, free_sites
from ratoon.text.homophones import HAN, Homophones
from ratoon.text.lookalikes import HOMOGLYPHS, KEYBOARD, WIDTHS
from ratoon.text.names import Names

Unit: TypeAlias = Literal["character", "word", "place"]

_LETTERS = re.compile(f"(?:(?![{HAN}])[^\\W\\d_])+")
"""A word: letters of a script that spells (Chinese characters are words themselves)."""
_HAN_RUN = re.compile(f"[{HAN}]+")
_HAN_GAP = re.compile(f"(?<=[{HAN}])(?:[ \\u3000](?=[{HAN}])|(?=[{HAN}]))")
"""Between two Chinese characters: a space, or nothing."""


@dataclass(frozen=True)
class Material:
    """What perturbations take from the data set itself: its names, and how often it uses its Chinese characters."""

    names: Names = field(default_factory=Names)
    homophones: Homophones = field(default_factory=Homophones)

    @classmethod
    def of(cls, texts: Sequence[str], entities: Mapping[str, Iterable[str]] | None = None) -> Material:
        """The material of a data set's texts. `entities`: kind to names, where names are marked; if absent, English
        names are found by their capitals."""
        return cls(Names.of(texts, entities), Homophones.of(texts))


_NOTHING = Material()


@dataclass(frozen=True)
class Perturbation:
    """One kind of perturbation. `keeps_label`: a person would give the perturbed record the same label; `unit`: what
    strength is a share of; `needs_names`: without a pool of names (`Material`) it has nothing to put in."""

    name: str
    what: str
    unit: Unit
    find: Callable[[str, Material], list[Site]]
    keeps_label: bool = True
    needs_names: bool = False

    def __call__(
        self,
        text: str,
        strength: float,
        random: np.random.Generator,
        protected: Sequence[Span] | None = None,
        material: Material = _NOTHING,
    ) -> str:
        """The perturbed text; `apply` tells what was done to it."""
        return self.apply(text, strength, random, protected, material).text

    def apply(
        self,
        text: str,
        strength: float,
        random: np.random.Generator,
        protected: Sequence[Span] | None = None,
        material: Material = _NOTHING,
    ) -> Edited:
        """Perturb `text`, leaving the characters of `protected` spans as they are. Strength 0 gives the text bit for
        bit; a text without an eligible place comes back as it is, with `eligible` 0. Raises `ConfigError` for a
        strength outside 0 … 1, and for missing names or a missing package."""
        return edit(text, self.sites(text, protected, material), strength, random)

    def applies_to(self, text: str, protected: Sequence[Span] | None = None, material: Material = _NOTHING) -> bool:
        """Whether `text` has any place that this perturbation can touch."""
        return bool(self.sites(text, protected, material))

    def sites(self, text: str, protected: Sequence[Span] | None = None, material: Material = _NOTHING) -> list[Site]:
        """Every eligible place of `text`, in order."""
        if self.needs_names and not material.names.by_kind:
            raise ConfigError(
                f"'{self.name}' has no names to put in",
                expected="at least two names of one kind in the data set",
                fix="give the entities of the data set, or leave this perturbation out",
            )
        return free_sites(self.find(text, material), protected)


def _by_table(table: Mapping[str, tuple[str, ...]]) -> Callable[[str, Material], list[Site]]:
    def find(text: str, material: Material) -> list[Site]:
        return [Site(i, i + 1, table[character]) for i, character in enumerate(text) if character in table]

    return find


def _case(text: str, material: Material) -> list[Site]:
    """Letters that have another case of one character, and come back from it."""
    swapped = ((i, c, c.swapcase()) for i, c in enumerate(text))
    return [Site(i, i + 1, (o,)) for i, c, o in swapped if o != c and len(o) == 1 and o.swapcase() == c]


def _spacing(text: str, material: Material) -> list[Site]:
    """A word loses the space before it or is torn in two; between Chinese characters a space comes or goes."""
    found = []
    for word in _LETTERS.finditer(text):
        start, end = word.span()
        torn = tuple(f"{text[start:cut]} {text[cut:end]}" for cut in range(start + 1, end))
        if start > 1 and text[start - 1] == " " and not text[start - 2].isspace():
            # Both mistakes are as likely, however many places a word may be torn at.
            joined = (text[start:end],) * max(1, len(torn))
            found.append(Site(start - 1, end, (*joined, *(f" {choice}" for choice in torn))))
        elif torn:
            found.append(Site(start, end, torn))
    for gap in _HAN_GAP.finditer(text):
        found.append(Site(gap.start(), gap.end(), ("" if gap.group() else " ",)))
    return sorted(found, key=lambda site: site.start)


def _homophones(text: str, material: Material) -> list[Site]:
    return [Site(offset, offset + 1, alike) for offset, alike in material.homophones.choices(text)]


def _drops(text: str, material: Material) -> list[Site]:
    """Every letter or Chinese character but the first of its word or run: no text becomes empty, and beginnings are
    seldom lost. Digits stay, since a number without one is another number."""
    runs = sorted(match.span() for pattern in (_LETTERS, _HAN_RUN) for match in pattern.finditer(text))
    return [Site(i, i + 1, ("",)) for start, end in runs for i in range(start + 1, end)]


def _swaps(text: str, material: Material) -> list[Site]:
    """A word has two different letters beside each other exchanged; of Chinese characters, every two beside each
    other."""
    found = []
    for word in _LETTERS.finditer(text):
        letters, start = word.group(), word.start()
        swapped = tuple(
            f"{letters[:i]}{letters[i + 1]}{letters[i]}{letters[i + 2 :]}"
            for i in range(len(letters) - 1)
            if letters[i] != letters[i + 1]
        )
        if swapped:
            found.append(Site(start, word.end(), swapped))
    for run in _HAN_RUN.finditer(text):
        for i in range(run.start(), run.end() - 1, 2):
            if text[i] != text[i + 1]:
                found.append(Site(i, i + 2, (text[i + 1] + text[i],)))
    return sorted(found, key=lambda site: site.start)


def _negation(text: str, material: Material) -> list[Site]:
    return negation.sites(text)


def _entities(text: str, material: Material) -> list[Site]:
    return material.names.sites(text)


PERTURBATIONS: dict[str, Perturbation] = {
    one.name: one
    for one in (
        Perturbation("typos", "a letter becomes one whose key touches its own", "character", _by_table(KEYBOARD)),
        Perturbation("case", "a letter changes between small and capital", "character", _case),
        Perturbation("spacing", "a space is lost or put inside a word", "word", _spacing),
        Perturbation("width", "half-width characters become full-width, and back", "character", _by_table(WIDTHS)),
        Perturbation(
            "homoglyphs",
            "a Latin letter becomes a look-alike, Cyrillic or Greek",
            "character",
            _by_table(HOMOGLYPHS),
        ),
        Perturbation("homophones", "a Chinese character becomes a common one of its sound", "character", _homophones),
        Perturbation("drops", "a character is lost", "character", _drops),
        Perturbation("swaps", "two characters beside each other change places", "word", _swaps),
        Perturbation("negation", "a negation is put in or taken out", "place", _negation, keeps_label=False),
        Perturbation(
            "entities",
            "a name becomes another of the data",
            "place",
            _entities,
            keeps_label=False,
            needs_names=True,
        ),
    )
}
"""Every perturbation by its name."""


def perturbation(name: str) -> Perturbation:
    """The perturbation of that name. Raises `ConfigError` with the nearest name for one that is unknown."""
    if name in PERTURBATIONS:
        return PERTURBATIONS[name]
    near = difflib.get_close_matches(name, PERTURBATIONS, n=1)
    raise ConfigError(
        f"there is no perturbation '{name}'",
        expected=", ".join(PERTURBATIONS),
        fix=f"did you mean '{near[0]}'?" if near else None,
    )


@dataclass(frozen=True)
class Copy:
    """A perturbed copy of the text at `source` (its place among those given)."""

    source: int
    name: str
    edited: Edited


@dataclass(frozen=True)
class Copies:
    """Perturbed copies of training texts, and how many texts gave none because nothing in them was touched."""

    copies: list[Copy]
    unchanged: int


def perturbed_copies(
    texts: Sequence[str],
    names: Sequence[str],
    strength: float,
    *,
    seed: int,
    rounds: int = 1,
    protected: Sequence[Sequence[Span]] | None = None,
    material: Material | None = None,
) -> Copies:
    """Copies of training texts with mistakes in them, `rounds` of each text, to train on beside the texts themselves.

    Each copy has one perturbation, drawn among those of `names` that apply to its text. A copy that came out unchanged
    is not given but counted. `protected`: spans for each text. A text's copies depend on the seed, its place and its
    round only. Raises `ConfigError` for an unknown name, and for one after which a label may no longer be true.
    """
    if not names:
        raise ConfigError("no perturbation is named", expected="one or more of: " + ", ".join(PERTURBATIONS))
    kinds = [perturbation(name) for name in names]
    for kind in kinds:
        if not kind.keeps_label:
            raise ConfigError(
                f"'{kind.name}' may change what the right label is, and its copies would be learned with the old one",
                expected=", ".join(name for name, one in PERTURBATIONS.items() if one.keeps_label),
            )
    material = Material.of(texts) if material is None else material
    copies: list[Copy] = []
    unchanged = 0
    for round_number in range(rounds):
        for source, text in enumerate(texts):
            random = stream(seed, "perturbed copies", round_number, source)
            spans = None if protected is None else protected[source]
            found = [(kind, sites) for kind in kinds if (sites := kind.sites(text, spans, material))]
            if not found:
                unchanged += 1
                continue
            kind, sites = found[int(random.integers(len(found)))]
            edited = edit(text, sites, strength, random)
            if edited.changed:
                copies.append(Copy(source, kind.name, edited))
            else:
                unchanged += 1
    return Copies(copies, unchanged)
