"""Rows of one split that stand in another: found before training, so that a score means what it says.

Decides what a copy is. Exact: equal once width, case and blanks are made alike. Near: the sets of character n-grams
overlap by at least `near` (Jaccard). Both are found exactly, none is guessed: near copies by prefix filtering
(Chaudhuri et al. 2006; Bayardo et al. 2007; Xiao et al. 2008, PPJoin), every candidate then counted. What is done about
copies (leaving out training rows, scoring without test rows) is the caller's; the lists for it are made here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ratoon.base.errors import ConfigError

SHINGLE, SHINGLE_CJK = 5, 3
"""Characters of an n-gram; the second where at least half of all letters are Chinese, Japanese or Korean."""
SHOWN_PLACES = 20
"""Places kept in `as_dict` for each finding."""

_CHUNK = 4_000_000  # entries worked on at once: bounds the memory, not the result
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
_SLACK = 1e-9  # bounds are loosened by it, so that rounding never drops a candidate

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Keyed:
    """A row as the guard sees it: `text` is what would give the answer away, `label` the answer (or None)."""

    id: str
    text: str
    place: str
    label: Any = None


@dataclass(frozen=True)
class Copy:
    """Row `row` of one split and row `other` of another are copies; `similarity` is the Jaccard of their n-grams."""

    kind: Literal["exact", "near"]
    row: int
    other: int
    similarity: float
    place: str
    copy_of: str


@dataclass(frozen=True)
class Group:
    """Rows of one split with the same text. `labels`: how many different labels they have."""

    rows: tuple[int, ...]
    labels: int


@dataclass(frozen=True)
class Drop:
    """A row to leave out: its number and place, why, and the row it is a copy of."""

    row: int
    place: str
    reason: str
    copy_of: str


@dataclass
class Leaks:
    """What was found. `texts[split][row]` numbers the texts alike in all splits; -1 is a row without text."""

    splits: Mapping[str, Sequence[Keyed]]
    near: float
    shingle: int
    texts: dict[str, Ints]
    near_texts: dict[tuple[str, str], tuple[Ints, Ints, Floats]]
    duplicate_ids: dict[str, dict[str, tuple[int, ...]]]
    _rows: dict[str, dict[int, list[int]]] = field(default_factory=dict, repr=False)

    def rows_of(self, split: str) -> dict[int, list[int]]:
        """The rows of a split that hold each text."""
        if split not in self._rows:
            found: dict[int, list[int]] = {}
            for row, text in enumerate(self.texts[split].tolist()):
                if text >= 0:
                    found.setdefault(text, []).append(row)
            self._rows[split] = found
        return self._rows[split]

    def copies(self, split: str, elsewhere: str) -> list[Copy]:
        """For each row of `split` that stands `elsewhere`, in order: the row there that is most like it."""
        there = self.rows_of(elsewhere)
        mine_keyed, their_keyed = self.splits[split], self.splits[elsewhere]
        best: dict[int, tuple[float, int]] = {}
        left, right, similarity = self._near(split, elsewhere)
        for mine, other, alike in zip(left.tolist(), right.tolist(), similarity.tolist(), strict=True):
            candidate = (-alike, there[other][0])
            best[mine] = min(best.get(mine, candidate), candidate)
        found = []
        for row, text in enumerate(self.texts[split].tolist()):
            kind: Literal["exact", "near"] = "exact" if text in there else "near"
            if text in there or text in best:
                minus, other = (-1.0, there[text][0]) if kind == "exact" else best[text]
                found.append(Copy(kind, row, other, -minus, mine_keyed[row].place, their_keyed[other].place))
        return found

    def seen(self, split: str, elsewhere: str) -> dict[str, list[str]]:
        """The ids of the rows of `split` that stand `elsewhere`: `{"exact": [...], "near": [...]}`."""
        ids: dict[str, list[str]] = {"exact": [], "near": []}
        for copy in self.copies(split, elsewhere):
            ids[copy.kind].append(self.splits[split][copy.row].id)
        return ids

    @property
    def test_ids_seen_in_training(self) -> dict[str, list[str]]:
        """`seen("test", "train")`; nothing where one of the two is not there."""
        return self.seen("test", "train") if {"test", "train"} <= self.splits.keys() else {"exact": [], "near": []}

    def repeated(self, split: str) -> list[Group]:
        """Texts that stand more than once in one split, with their rows; `labels` > 1 where they contradict."""
        keyed = self.splits[split]
        return [
            Group(tuple(rows), len({repr(keyed[row].label) for row in rows}))
            for rows in self.rows_of(split).values()
            if len(rows) > 1
        ]

    def drop(self, of: str = "train", keep: Sequence[str] = ("validation", "test"), *, near: bool = True) -> list[Drop]:
        """Which rows of `of` to leave out so that none of them stands in the splits of `keep`, each once, in order.

        With `near` the near copies too. Splits that are not there are passed over.
        """
        found: dict[int, Drop] = {}
        for other in keep:
            if other == of or not {other, of} <= self.splits.keys():
                continue
            for copy in self.copies(of, other):
                if copy.kind == "exact" or near:
                    reason = f"{copy.kind} copy of a row of {other}"
                    found.setdefault(copy.row, Drop(copy.row, copy.place, reason, copy.copy_of))
        return [found[row] for row in sorted(found)]

    def _near(self, split: str, elsewhere: str) -> tuple[Ints, Ints, Floats]:
        if (split, elsewhere) in self.near_texts:
            return self.near_texts[split, elsewhere]
        right, left, similarity = self.near_texts[elsewhere, split]
        return left, right, similarity

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Later splits beside earlier ones: test in train, test in validation, validation in train."""
        names = list(self.splits)
        for at, elsewhere in enumerate(names):
            for split in names[at + 1 :]:
                yield split, elsewhere

    def as_dict(self) -> dict[str, Any]:
        """Everything found as plain values, with the first places of each."""
        between = []
        for split, elsewhere in self._pairs():
            copies = self.copies(split, elsewhere)
            mine, theirs = self.splits[split], self.splits[elsewhere]
            kinds: dict[str, Any] = {}
            for kind in ("exact", "near"):
                of_kind = [copy for copy in copies if copy.kind == kind]
                kinds[kind] = {
                    "rows": len(of_kind),
                    "with_another_label": sum(mine[c.row].label != theirs[c.other].label for c in of_kind),
                    "places": [[c.place, c.copy_of, round(c.similarity, 4)] for c in of_kind[:SHOWN_PLACES]],
                }
            between.append({"split": split, "stands_in": elsewhere, "of_rows": len(mine), **kinds})
        inside = {}
        for split, keyed in self.splits.items():
            groups = self.repeated(split)
            unlike = [group for group in groups if group.labels > 1]
            inside[split] = {
                "rows": len(keyed),
                "without_text": int((self.texts[split] < 0).sum()),
                "repeated_rows": sum(len(group.rows) - 1 for group in groups),
                "repeated_with_another_label": sum(len(group.rows) for group in unlike),
                "places": [[keyed[row].place for row in group.rows[:SHOWN_PLACES]] for group in groups[:SHOWN_PLACES]],
                "places_with_another_label": [
                    [keyed[row].place for row in group.rows[:SHOWN_PLACES]] for group in unlike[:SHOWN_PLACES]
                ],
                "duplicate_ids": {
                    name: [keyed[row].place for row in rows[:SHOWN_PLACES]]
                    for name, rows in list(self.duplicate_ids[split].items())[:SHOWN_PLACES]
                },
                "duplicate_id_count": len(self.duplicate_ids[split]),
            }
        return {"near": self.near, "shingle_characters": self.shingle, "between": between, "inside": inside}

    def sentences(self) -> list[str]:
        """What a person should know, one sentence a finding, with places of both sides."""
        found = self.as_dict()
        said = []
        for one in found["between"]:
            for kind, words in (
                ("exact", "as they are"),
                ("near", f"nearly as they are (at least {self.near:g} alike)"),
            ):
                rows, places = one[kind]["rows"], one[kind]["places"][:3]
                if rows:
                    share = f"{rows:,} of {one['of_rows']:,} rows of {one['split']} stand in {one['stands_in']} {words}"
                    unlike = one[kind]["with_another_label"]
                    share += f", {unlike:,} of them with another label" if unlike else ""
                    said.append(f"{share}: " + "; ".join(f"{mine} = {other}" for mine, other, _ in places))
            if not one["exact"]["rows"] and not one["near"]["rows"]:
                said.append(f"no row of {one['split']} stands in {one['stands_in']}")
        for split, one in found["inside"].items():
            if one["repeated_rows"]:
                places = "; ".join(" = ".join(group[:3]) for group in one["places"][:3])
                said.append(f"{one['repeated_rows']:,} rows of {split} repeat an earlier one: {places}")
            if one["repeated_with_another_label"]:
                places = "; ".join(" = ".join(group[:3]) for group in one["places_with_another_label"][:3])
                count = one["repeated_with_another_label"]
                said.append(f"{count:,} rows of {split} have the same text and another label: {places}")
            if one["duplicate_id_count"]:
                name, places = next(iter(one["duplicate_ids"].items()))
                said.append(
                    f"{one['duplicate_id_count']:,} ids of {split} stand at several rows: "
                    f"{name!r} at {', '.join(places[:3])}"
                )
            if one["without_text"]:
                said.append(f"{one['without_text']:,} rows of {split} have no text and were compared with none")
        return said


def normalise(text: str) -> str:
    """`text` with width (NFKC), case and blanks made alike: what exact copies are equal in."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_leaks(splits: Mapping[str, Sequence[Keyed]], *, near: float = 0.8) -> Leaks:
    """Exact and near copies between `splits`, exact copies and repeated ids inside each.

    Near: |A ∩ B| / |A ∪ B| >= `near` for the sets A, B of character n-grams of the normalised texts. Texts shorter than
    one n-gram have exact copies only; rows without text have none. Raises `ConfigError` for `near` outside (0, 1].
    """
    if not 0 < near <= 1:
        raise ConfigError(f"near is {near:g}", where="near", expected="more than 0, at most 1 (1: the same n-grams)")
    number: dict[str, int] = {}
    texts: dict[str, Ints] = {}
    for split, keyed in splits.items():
        plain = map(normalise, (one.text for one in keyed))
        texts[split] = np.array([number.setdefault(t, len(number)) if t else -1 for t in plain], dtype=np.int64)
    unique = list(number)
    shingle = _shingle_of(unique)
    sets = _Sets(unique, shingle)
    names = list(splits)
    near_texts = {}
    for at, elsewhere in enumerate(names):
        for split in names[at + 1 :]:
            mine, theirs = (np.unique(texts[name][texts[name] >= 0]) for name in (split, elsewhere))
            near_texts[split, elsewhere] = sets.near(mine, theirs, near)
    return Leaks(dict(splits), near, shingle, texts, near_texts, {s: _twice(keyed) for s, keyed in splits.items()})


def _twice(keyed: Sequence[Keyed]) -> dict[str, tuple[int, ...]]:
    """The ids that several rows have, with those rows."""
    rows: dict[str, list[int]] = {}
    for row, one in enumerate(keyed):
        rows.setdefault(one.id, []).append(row)
    return {name: tuple(found) for name, found in rows.items() if len(found) > 1}


def _shingle_of(texts: Sequence[str]) -> int:
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    cjk = sum(len(_CJK.findall(text)) for text in texts)
    return SHINGLE_CJK if letters and 2 * cjk >= letters else SHINGLE


class _Sets:
    """The n-grams of each text as a sorted list of ranks, rare ones first: `ranks[starts[i] : starts[i + 1]]`."""

    def __init__(self, texts: Sequence[str], shingle: int) -> None:
        codes, owner = _grams(texts, shingle)
        _, codes = np.unique(codes, return_inverse=True)
        self.kinds = int(codes.max()) + 1 if len(codes) else 1
        pairs = _distinct(owner * self.kinds + codes)  # a set: each n-gram of a text once
        owner, codes = np.divmod(pairs, self.kinds)
        order = np.argsort(np.bincount(codes, minlength=self.kinds), kind="stable")
        rank = np.empty(self.kinds, dtype=np.int64)
        rank[order] = np.arange(self.kinds)
        self.keys = np.sort(owner * self.kinds + rank[codes])
        owner, self.ranks = np.divmod(self.keys, self.kinds)
        self.starts = np.searchsorted(owner, np.arange(len(texts) + 1))
        self.sizes = np.diff(self.starts)

    def near(self, mine: Ints, theirs: Ints, near: float) -> tuple[Ints, Ints, Floats]:
        """Pairs of a text of `mine` and another of `theirs` with Jaccard >= `near`: the texts, and the Jaccard. For
        every text that has such a partner the pair with the one most like it is there.

        Two such texts share one of the first |A| - ceil(near * |A|) + 1 ranks of each (prefix filter), their sizes
        differ by no more than the factor `near` (length filter), and what is left from the first shared rank on must
        suffice (position filter).
        """
        t = near - _SLACK
        text, at, rank = self._prefixes(theirs, t)
        size = self.sizes[text]
        stride = int(self.sizes.max(initial=0)) + 2
        order = np.argsort(rank * stride + size, kind="stable")
        text, at, rank, size = text[order], at[order], rank[order], size[order]
        posted = rank * stride + size
        asking, asked_at, asked = self._prefixes(mine, t)
        mine_size = self.sizes[asking]
        smallest = np.ceil(t * mine_size).astype(np.int64)
        largest = np.minimum(np.floor(mine_size / t), stride - 1).astype(np.int64)
        first = np.searchsorted(posted, asked * stride + smallest, side="left")
        count = np.searchsorted(posted, asked * stride + largest, side="right") - first
        kept: tuple[Ints, Ints, Floats] = (mine[:0], mine[:0], np.zeros(0))
        for which, place in _spread(first, count):
            a, b = asking[which], text[place]
            left = np.minimum(self.sizes[a] - asked_at[which], self.sizes[b] - at[place])
            fits = (a != b) & (left >= t / (1 + t) * (self.sizes[a] + self.sizes[b]) - _SLACK)
            a, b = np.divmod(_distinct(a[fits] * len(self.sizes) + b[fits]), len(self.sizes))
            shared = self._shared(a, b)
            alike = shared / (self.sizes[a] + self.sizes[b] - shared)
            near_ones = alike >= near
            kept = _best(*(np.concatenate([o, n[near_ones]]) for o, n in zip(kept, (a, b, alike), strict=True)))
        return kept

    def _prefixes(self, texts: Ints, t: float) -> tuple[Ints, Ints, Ints]:
        """For each rank in the prefixes of `texts`: the text, the place of the rank in it, the rank."""
        sizes = self.sizes[texts]
        length = np.where(sizes > 0, sizes - np.ceil(t * sizes).astype(np.int64) + 1, 0)
        text = np.repeat(texts, length)
        at = np.arange(len(text)) - np.repeat(np.cumsum(length) - length, length)
        return text, at, self.ranks[self.starts[text] + at]

    def _shared(self, a: Ints, b: Ints) -> Ints:
        """|A ∩ B| of each pair: the ranks of the smaller set looked up among those of the other."""
        swap = self.sizes[a] > self.sizes[b]
        a, b = np.where(swap, b, a), np.where(swap, a, b)
        shared = np.zeros(len(a), dtype=np.int64)
        for which, place in _spread(self.starts[a], self.sizes[a]):
            wanted = b[which] * self.kinds + self.ranks[place]
            spot = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            shared += np.bincount(which[self.keys[spot] == wanted], minlength=len(a))
        return shared


def _distinct(numbers: Ints) -> Ints:
    """The different numbers, sorted. (Sorting is several times faster here than numpy's table of hashes.)"""
    numbers = np.sort(numbers)
    first: NDArray[np.bool_] = np.diff(numbers, prepend=-1) != 0
    return numbers[first]


def _best(a: Ints, b: Ints, alike: Floats) -> tuple[Ints, Ints, Floats]:
    """Of pairs only those that are the best of their left or of their right text, the smaller numbers first: thousands
    of texts from one mould make millions of pairs, and none but these are asked for."""
    keep = np.zeros(len(a), dtype=bool)
    for side, other in ((a, b), (b, a)):
        order = np.lexsort((other, -alike, side))
        keep[order[np.diff(side[order], prepend=-1) != 0]] = True
    return a[keep], b[keep], alike[keep]


def _spread(first: Ints, count: Ints) -> Iterator[tuple[Ints, Ints]]:
    """All (i, first[i] + k) with k < count[i], a chunk at a time; one i may be larger than a chunk, none is cut."""
    end = np.cumsum(count)
    low = 0
    while low < len(count):
        base = end[low] - count[low]
        high = max(int(np.searchsorted(end, base + _CHUNK, side="right")), low + 1)
        inner = count[low:high]
        which = np.repeat(np.arange(low, high), inner)
        yield which, first[which] + np.arange(len(which)) - np.repeat(end[low:high] - inner - base, inner)
        low = high


def _grams(texts: Sequence[str], shingle: int) -> tuple[Ints, Ints]:
    """A number for every n-gram, equal only for equal ones, and the text that it stands in."""
    flat = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    alphabet, letters = np.unique(flat, return_inverse=True)
    kinds, codes = max(len(alphabet), 1), letters.astype(np.int64)
    most = kinds
    for step in range(1, shingle):
        if most * kinds >= 2**62:  # too many to be told apart by a product: number those that occur
            _, codes = np.unique(codes, return_inverse=True)
            most = int(codes.max()) + 1
        codes = codes[:-1] * kinds + letters[step:]
        most *= kinds
    owner = np.repeat(np.arange(len(texts)), lengths)
    begins = np.arange(len(codes))
    whole = begins + shingle <= np.cumsum(lengths)[owner[: len(codes)]]
    return codes[whole], owner[: len(codes)][whole]
