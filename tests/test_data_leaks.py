"""The leak guard: every copy is found, none is invented, and what to do about it is listed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratoon.base.errors import ConfigError
from ratoon.data import leaks as guard
from ratoon.data.leaks import Keyed, Leaks, find_leaks, normalise
from ratoon.data.ledger import Ledger
from ratoon.data.rows import RowReading, read_rows


def keyed(split: str, *texts: str, labels: str = "") -> list[Keyed]:
    return [
        Keyed(f"{split}{number}", text, f"{split}.txt:{number + 1}", labels[number : number + 1] or None)
        for number, text in enumerate(texts)
    ]


def jaccard(one: str, other: str, shingle: int) -> float:
    """By definition, with Python's sets."""
    a, b = ({text[i : i + shingle] for i in range(len(text) - shingle + 1)} for text in (one, other))
    return len(a & b) / len(a | b) if a | b else 0.0


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello  World", "hello\tworld "),
        ("ＡＢＣ１２３", "abc123"),
        ("Straße", "STRASSE"),
        ("全角　空格", "全角 空格"),
        ("ﬁne", "fine"),
    ],
)
def test_width_case_and_blanks_make_no_difference(one: str, other: str) -> None:
    found = find_leaks({"train": keyed("train", "another text", one), "test": keyed("test", other)})
    assert found.test_ids_seen_in_training == {"exact": ["test0"], "near": []}
    (copy,) = found.copies("test", "train")
    assert (copy.kind, copy.row, copy.other, copy.place, copy.copy_of) == ("exact", 0, 1, "test.txt:1", "train.txt:2")
    assert found.copies("train", "test")[0].row == 1


def test_texts_that_differ_in_a_mark_are_not_exact() -> None:
    found = find_leaks({"train": keyed("train", "It is so."), "test": keyed("test", "It is so!")}, near=1.0)
    assert found.test_ids_seen_in_training == {"exact": [], "near": []}
    assert found.sentences() == ["no row of test stands in train"]


def test_rows_without_text_are_no_copies_and_are_said() -> None:
    found = find_leaks({"train": keyed("train", "", "a"), "test": keyed("test", "  ", "b")})
    assert found.test_ids_seen_in_training == {"exact": [], "near": []}
    assert "1 rows of test have no text and were compared with none" in found.sentences()


def test_an_empty_split_and_an_absent_one() -> None:
    assert find_leaks({"train": keyed("train", "some text"), "test": []}).copies("train", "test") == []
    alone = find_leaks({"train": keyed("train", "some text", "some text")})
    assert alone.drop() == [] and alone.test_ids_seen_in_training == {"exact": [], "near": []}
    assert find_leaks({"test": keyed("test", "some text")}).drop() == []


# -- near: against the definition --------------------------------------------------------------------------------------

words = st.sampled_from(
    ["the cat sat", " on", " the mat", " today", "!", " and slept", "abcde", "x", "电影很好看", "我"]
)
text = st.lists(words, max_size=6).map("".join)


@settings(max_examples=150)
@given(
    st.lists(text, max_size=9),
    st.lists(text, max_size=9),
    st.sampled_from([0.3, 0.5, 0.6, 0.75, 0.8, 1.0]),
    st.booleans(),
)
def test_near_copies_are_those_of_the_definition(train: list[str], test: list[str], near: float, little: bool) -> None:
    """Every row with a partner of Jaccard >= near is found with its best partner; no other row is."""
    with pytest.MonkeyPatch.context() as patch:
        if little:
            patch.setattr(guard, "_CHUNK", 3)  # the work cut into many chunks gives the same
        found = find_leaks({"train": keyed("train", *train), "test": keyed("test", *test)}, near=near)
    for mine, there, split, elsewhere in ((test, train, "test", "train"), (train, test, "train", "test")):
        expected = {}
        for row, one in enumerate(map(normalise, mine)):
            alike = [1.0 if one == o else jaccard(one, o, found.shingle) for o in map(normalise, there) if o and one]
            exact = one in map(normalise, there)
            if alike and (exact or max(alike) >= near):
                expected[row] = ("exact" if exact else "near", max(alike))
        copies = found.copies(split, elsewhere)
        assert {copy.row: (copy.kind, copy.similarity) for copy in copies} == expected
        for copy in copies:
            pair = normalise(mine[copy.row]), normalise(there[copy.other])
            assert copy.similarity == (1.0 if copy.kind == "exact" else jaccard(*pair, found.shingle))


def test_the_threshold_itself_counts() -> None:
    """4 of 5 n-grams shared is 0.8: near at 0.8, not above."""
    one, other = "abcdefgh", "abcdefghi"  # 4 and 5 n-grams of 5
    assert jaccard(one, other, 5) == 0.8
    splits = {"train": keyed("train", one), "test": keyed("test", other)}
    assert find_leaks(splits, near=0.8).test_ids_seen_in_training["near"] == ["test0"]
    assert find_leaks(splits, near=0.81).test_ids_seen_in_training["near"] == []


def test_chinese_has_shingles_of_three() -> None:
    one, other = "这家酒店的位置很好服务", "这家酒店的位置很好服务员"
    found = find_leaks({"train": keyed("train", one), "test": keyed("test", other)})
    assert found.shingle == 3 and found.copies("test", "train")[0].similarity == pytest.approx(9 / 10)
    assert find_leaks({"train": keyed("train", "plain words"), "test": keyed("test", other)}).shingle == 3
    assert find_leaks({"train": keyed("train", "many plain words " * 3), "test": keyed("test", other)}).shingle == 5


def test_an_alphabet_too_large_for_a_product() -> None:
    """8,192 characters: the product of five of them, 2^65, would take the first and the 4,097th for the same."""
    blocks = ((0x12000, 0x12380), (0x13000, 0x13430), (0x14400, 0x14640), (0x17000, 0x187F0))
    letters = [chr(code) for low, high in blocks for code in range(low, high)][:8192]
    assert len(letters) == 8192 and all(normalise(letter) == letter for letter in letters)
    tail = letters[5] + letters[50] + letters[500] + letters[5000]
    whole = "".join(letters)
    found = find_leaks(
        {"train": keyed("train", letters[0] + tail, whole), "test": keyed("test", letters[4096] + tail, whole[:-1000])}
    )
    assert found.shingle == 5
    (copy,) = found.copies("test", "train")
    assert copy.row == 1 and copy.similarity == jaccard(whole, whole[:-1000], 5)


def test_texts_from_one_mould_keep_the_best_partner_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_CHUNK", 1000)
    mould = "the question that all of these rows begin with, and it is a long one: "
    train, test = ([mould + f"answer {number:03d}" for number in range(low, low + 60)] for low in (0, 1000))
    found = find_leaks({"train": keyed("train", *train), "test": keyed("test", *test)})
    copies = found.copies("test", "train")
    assert len(copies) == 60 and len(found.near_texts["test", "train"][0]) <= 120
    for copy in copies:
        assert copy.similarity == max(jaccard(test[copy.row], one, 5) for one in train)


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_of_many_near_partners_the_best_is_named(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_CHUNK", chunk)
    text = "eachofthese-is.the,beginning;of:one/and+the=same~long!sentence?cut&at|another^of%its*letters_and#on"
    train, test = ([text[:size] for size in range(low, 96, 6)] for low in (50, 53))
    found = find_leaks({"train": keyed("train", *train), "test": keyed("test", *test)}, near=0.7)
    copies = found.copies("test", "train") + found.copies("train", "test")
    best = [
        max(jaccard(one, other, 5) for other in there) for mine, there in ((test, train), (train, test)) for one in mine
    ]
    assert [copy.similarity for copy in copies] == best and len({round(one, 3) for one in best}) > 5


@pytest.mark.parametrize("near", [0.0, -1.0, 1.5])
def test_a_threshold_that_is_none(near: float) -> None:
    with pytest.raises(ConfigError, match="near is"):
        find_leaks({}, near=near)


# -- inside a split, and what to do ------------------------------------------------------------------------------------


def made() -> Leaks:
    return find_leaks(
        {
            "train": [
                *keyed("train", "a first text", "A first text", "a first  text", "the very same words stand here.",
                       "two", labels="xxyxx"),
                Keyed("train0", "a text with an id that is taken", "train.txt:9"),
            ],
            "validation": keyed("validation", "two", "nothing of it"),
            "test": keyed("test", "the very same words stand here", "TWO", "three", labels="zyx"),
        }
    )  # fmt: skip


def test_what_repeats_inside_a_split() -> None:
    found = made()
    (group,) = found.repeated("train")
    assert (group.rows, group.labels) == ((0, 1, 2), 2)
    assert found.repeated("test") == []
    assert found.duplicate_ids == {"train": {"train0": (0, 5)}, "validation": {}, "test": {}}
    inside = found.as_dict()["inside"]["train"]
    assert inside["repeated_rows"] == 2 and inside["repeated_with_another_label"] == 3
    assert inside["duplicate_ids"] == {"train0": ["train.txt:1", "train.txt:9"]} and inside["duplicate_id_count"] == 1


def test_which_training_rows_to_leave_out() -> None:
    found = made()
    assert [(drop.row, drop.reason, drop.copy_of) for drop in found.drop()] == [
        (3, "near copy of a row of test", "test.txt:1"),
        (4, "exact copy of a row of validation", "validation.txt:1"),
    ]
    assert [drop.row for drop in found.drop(near=False)] == [4]
    assert [drop.row for drop in found.drop(of="validation", keep=("test",))] == [0]
    assert {drop.place for drop in found.drop()} == {"train.txt:4", "train.txt:5"}
    kept = [row for number, row in enumerate(found.splits["train"]) if number not in {d.row for d in found.drop()}]
    clean = find_leaks({**found.splits, "train": kept})
    assert clean.copies("test", "train") == clean.copies("validation", "train") == clean.drop() == []


def test_it_is_said_with_places_of_both_sides() -> None:
    found = made()
    said = "\n".join(found.sentences())
    assert (
        "1 of 3 rows of test stand in train as they are, 1 of them with another label: test.txt:2 = train.txt:5" in said
    )
    assert "nearly as they are" in said and "test.txt:1 = train.txt:4" in said
    assert "2 rows of train repeat an earlier one: train.txt:1 = train.txt:2 = train.txt:3" in said
    assert "3 rows of train have the same text and another label" in said
    assert "1 ids of train stand at several rows: 'train0' at train.txt:1, train.txt:9" in said
    between = found.as_dict()["between"]
    assert [(one["split"], one["stands_in"]) for one in between] == [
        ("validation", "train"),
        ("test", "train"),
        ("test", "validation"),
    ]
    json.dumps(found.as_dict())


# -- real data ---------------------------------------------------------------------------------------------------------


def read(path: Path, text: str, **reading: tuple[str, ...]) -> list[Keyed]:
    rows = read_rows([path], RowReading(**reading), Ledger())  # type: ignore[arg-type]
    return [Keyed(row.place, row.fields[text], f"{path.name}:{row.line}", row.fields.get("label")) for row in rows]


def test_thucnews_shares_eight_titles(shared_data: Path) -> None:
    folder = shared_data / "thucnews_titles"
    splits = {
        name: read(folder / f"{file}.txt.gz", "text", columns=("text", "label"))
        for name, file in (("train", "dev"), ("test", "test"))
    }
    found = find_leaks(splits)
    exact, near = (found.test_ids_seen_in_training[kind] for kind in ("exact", "near"))
    assert found.shingle == 3 and len(exact) == 8 and len(near) == 3
    assert "test.txt.gz:981 = dev.txt.gz:7323" in found.sentences()[0]
    titles = {normalise(one.text) for one in splits["train"]}
    assert sum(normalise(one.text) in titles for one in splits["test"]) == 8
    by_place = {one.id: normalise(one.text) for one in splits["test"]}
    for place in near:
        assert max(jaccard(by_place[place], title, 3) for title in titles) >= 0.8
    copied = {normalise(splits["train"][copy.other].text) for copy in found.copies("test", "train")}
    held = [row for row, one in enumerate(splits["train"]) if normalise(one.text) in copied]
    assert [drop.row for drop in found.drop()] == held and len(held) == 12  # one title stands twice in training


def test_scitldr_shares_two_papers(shared_data: Path) -> None:
    """Long texts, three splits; the near ones by brute force over a sample."""
    folder = shared_data / "summ_en_scitldr"
    splits = {
        name: read(folder / f"{file}.jsonl.gz", "document")
        for name, file in (("train", "train"), ("validation", "dev"), ("test", "test"))
    }
    found = find_leaks(splits)
    assert {kind: len(ids) for kind, ids in found.test_ids_seen_in_training.items()} == {"exact": 2, "near": 2}
    assert [len(found.seen("validation", "train")[kind]) for kind in ("exact", "near")] == [1, 1]
    near = {copy.row for copy in found.copies("test", "train")}
    grams = [
        {plain[i : i + 5] for i in range(len(plain) - 4)}
        for plain in (normalise(one.text) for one in itertools.islice(splits["train"], 950, 960))
    ]
    for row, one in enumerate(splits["test"][270:285], start=270):
        plain = normalise(one.text)
        mine = {plain[i : i + 5] for i in range(len(plain) - 4)}
        assert (max(len(mine & g) / len(mine | g) for g in grams) >= 0.8) == (row in near)
