"""The ledger adds up; duplicates are booked; what is held out is held out for good."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratoon.base.errors import ArtifactError, ConfigError, DataError, StorageError
from ratoon.data import prepare as preparing
from ratoon.data.ledger import SHOWN_PLACES, Ledger
from ratoon.data.prepare import Prepared, Source, prepare
from ratoon.data.shards import Shards
from ratoon.data.sources import Document, Reading
from ratoon.store.artifact import Parent, seal
from ratoon.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_only()


def source(texts: list[str]) -> Source:
    def documents(ledger: Ledger) -> Iterator[Document]:
        for number, text in enumerate(texts, start=1):
            yield Document(text, "list", number, len(text.encode()))

    return documents


def texts_of(shards: Shards, tokenizer: Tokenizer) -> list[str]:
    starts = shards.document_starts
    return [tokenizer.decode(shards.tokens(int(a), int(b)).tolist()) for a, b in itertools.pairwise(starts)]


def left_out(prepared: Prepared) -> list[dict[str, Any]]:
    lines = (prepared.folder / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def adds_up(prepared: Prepared) -> None:
    """Everything read is booked once, and the shards hold what is booked as kept."""
    ledger = prepared.ledger
    for what in ("documents", "bytes", "tokens"):
        assert ledger["read"][what] == sum(account[what] for account in ledger["accounts"].values())
    separators = 0 if prepared.tokenizer.separator_id is None else 1
    for name, shards in (("train", prepared.train), ("held_out", prepared.held_out)):
        account = ledger["accounts"].get(name, {"bytes": 0, "tokens": 0})
        assert account["bytes"] == shards.bytes_of_text
        assert account["tokens"] == shards.n_tokens - separators * shards.n_documents
    others = Counter(row["reason"] for row in left_out(prepared))
    assert others == {
        reason: account["documents"]
        for reason, account in ledger["accounts"].items()
        if reason not in ("train", "held_out")
    }


# -- on real text ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real English and Chinese text in files of several kinds, with some that is bad in it."""
    folder = tmp_path_factory.mktemp("mixed")
    with gzip.open(shared_data / "tinyshakespeare" / "input.txt.gz", "rt", encoding="utf-8") as handle:
        plays = handle.read(60_000)
    (folder / "plays.txt").write_text(plays, encoding="utf-8")
    with gzip.open(shared_data / "modern_zh" / "luxun.jsonl.gz", "rt", encoding="utf-8") as handle:
        essays = [next(handle) for _ in range(60)]
    with gzip.open(folder / "essays.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.writelines(
            [*essays, "\n", essays[3], '{"text": "cut', "\n", '{"title": "without text"}\n', *essays[5:8]]
        )
    with gzip.open(shared_data / "modern_zh" / "cluecorpussmall_sampled.txt.gz", "rt", encoding="utf-8") as handle:
        (folder / "news.md").write_text("".join(next(handle) for _ in range(40)), encoding="utf-8")
    shutil.copyfile(folder / "plays.txt", folder / "the same plays.txt")
    (folder / "empty.txt").write_text("")
    (folder / "table.csv").write_text('text,n\n"a, quoted",1\ncut\n' + "\n".join(f"row {n},1" for n in range(30)))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def prepared(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("prepared") / "out"
    return prepare([mixed], out, vocab_size=600, held_out_fraction=0.1, reading=Reading(on_bad_row="skip"))


def test_the_ledger_of_a_mixed_folder_adds_up(prepared: Prepared, mixed: Path) -> None:
    adds_up(prepared)
    accounts = prepared.ledger["accounts"]
    assert prepared.ledger["read"]["documents"] == 60 + 7 + 4 + 32  # essays, what was put to them, files, rows
    assert accounts["duplicate"]["documents"] == 5
    assert accounts["duplicate"]["places"] == [
        *(f"{mixed / 'essays.jsonl.gz'}:{line}" for line in (62, 65, 66, 67)),
        f"{mixed / 'the same plays.txt'}:1",
    ]
    assert accounts["empty"]["places"] == [f"{mixed / 'essays.jsonl.gz'}:61", f"{mixed / 'empty.txt'}:1"]
    assert accounts["broken row"]["places"] == [f"{mixed / 'essays.jsonl.gz'}:63", f"{mixed / 'table.csv'}:3"]
    assert accounts["missing field"]["places"] == [f"{mixed / 'essays.jsonl.gz'}:64"]
    assert accounts["broken row"]["tokens"] == 0 and accounts["duplicate"]["tokens"] > 1000
    assert f"not read, kind unknown: {mixed / 'picture.png'}" in prepared.ledger["notes"]


def test_the_shards_hold_the_texts_and_nothing_else(prepared: Prepared, mixed: Path) -> None:
    kept = texts_of(prepared.train, prepared.tokenizer) + texts_of(prepared.held_out, prepared.tokenizer)
    plays = (mixed / "plays.txt").read_text(encoding="utf-8")
    assert Counter(kept)[plays] == 1 and len(kept) == len(set(kept)) == 60 + 2 + 31
    names = prepared.train.names + prepared.held_out.names
    assert len(set(names)) == len(kept) and f"{mixed / 'plays.txt'}:1" in names


def test_the_tokenizer_never_saw_what_is_held_out(mixed: Path, tmp_path: Path) -> None:
    secret = "Zyzzogeton zyzzogeton zyzzogeton. " * 50
    texts = [f"plain words number {number} and some more of them" for number in range(40)]
    for seed in range(1, 50):
        done = prepare(source([*texts, secret]), tmp_path / str(seed), vocab_size=500, held_out_fraction=0.2, seed=seed)
        held = texts_of(done.held_out, done.tokenizer)
        if secret in held:
            assert "zzoget" not in "".join(done.tokenizer.core.get_vocab())
            return
    raise AssertionError("never held out")


def test_preparing_again_gives_the_same(prepared: Prepared, mixed: Path, tmp_path: Path) -> None:
    reading = Reading(on_bad_row="skip")
    again = prepare([mixed], tmp_path / "out", vocab_size=600, held_out_fraction=0.1, reading=reading)
    assert again.manifest.hash == prepared.manifest.hash
    other = prepare([mixed], tmp_path / "other", vocab_size=600, held_out_fraction=0.1, reading=reading, seed=2)
    assert other.held_out.names != prepared.held_out.names


# -- duplicates and the held-out part ----------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["a", "b", "中", " ", "\n", "longer words here", "🙂"]), max_size=4).map("".join)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(words, min_size=1, max_size=25),
    fraction=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    least=st.integers(0, 3),
)
def test_every_list_of_texts_adds_up(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], fraction: float, least: int
) -> None:
    out = tmp_path_factory.mktemp("list") / "out"
    wanted = [text for text in dict.fromkeys(text.strip() for text in texts) if text and len(text) >= least]
    if not wanted:
        with pytest.raises(DataError, match="nothing is left"):
            prepare(source(texts), out, tokenizer=BYTES, min_characters=least, held_out_fraction=fraction)
        return
    done = prepare(source(texts), out, tokenizer=BYTES, min_characters=least, held_out_fraction=fraction)
    adds_up(done)
    assert done.ledger["read"]["documents"] == len(texts)
    train, held = (texts_of(shards, BYTES) for shards in (done.train, done.held_out))
    if len(wanted) == 1:
        assert "".join(train + held).strip() == wanted[0] and len(train) == 1
        assert len(held) == (1 if fraction and len("".join(train + held)) > 1 else 0)
    else:
        assert sorted(text.strip() for text in train + held) == sorted(wanted)
        assert len(train) > 0 and (len(held) > 0) == (fraction > 0)


def test_duplicates_are_exact_but_for_white_space_at_the_ends(tmp_path: Path) -> None:
    texts = ["one text", "one text\n", "one  text", "One text", "  one text"]
    done = prepare(source([*texts, "another", "one text"]), tmp_path / "out", tokenizer=BYTES)
    assert done.ledger["accounts"]["duplicate"]["places"] == ["list:2", "list:5", "list:7"]
    assert [row["where"] for row in left_out(done)] == ["list:2", "list:5", "list:7"]


def test_texts_that_differ_in_white_space_alone_fall_on_one_side(tmp_path: Path) -> None:
    texts = [form for n in range(60) for form in (f"text number {n}", f"text  number\n{n}")]
    done = prepare(source(texts), tmp_path / "out", tokenizer=BYTES, held_out_fraction=0.3)
    held = {" ".join(text.split()) for text in texts_of(done.held_out, BYTES)}
    assert held and not held & {" ".join(text.split()) for text in texts_of(done.train, BYTES)}


def test_what_is_held_out_stays_so_when_texts_come_and_go(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(300)]
    first = prepare(source(texts), tmp_path / "a", tokenizer=BYTES, held_out_fraction=0.1)
    more = prepare(
        source(["new " + t for t in texts] + texts[::-1]), tmp_path / "b", tokenizer=BYTES, held_out_fraction=0.1
    )
    fewer = prepare(source(texts[::2]), tmp_path / "c", tokenizer=BYTES, held_out_fraction=0.1)
    held = set(texts_of(first.held_out, BYTES))
    assert not held & set(texts_of(first.train, BYTES)) and 10 < len(held) < 60
    assert set(texts_of(more.held_out, BYTES)) & set(texts) == held
    assert set(texts_of(fewer.held_out, BYTES)) == held & set(texts[::2])
    # A greater share holds out what a smaller one did, and more.
    greater = prepare(source(texts), tmp_path / "d", tokenizer=BYTES, held_out_fraction=0.3)
    assert held < set(texts_of(greater.held_out, BYTES))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_a_lone_text_is_cut_at_a_line_near_its_last_part(fraction: float, tmp_path: Path) -> None:
    lines = "".join(f"line {number} of a text\n" for number in range(100))
    done = prepare(source([lines]), tmp_path / "lines", tokenizer=BYTES, held_out_fraction=fraction)
    (train,), (held,) = (texts_of(shards, BYTES) for shards in (done.train, done.held_out))
    assert train + held == lines and train.endswith("\n") and abs(len(held) / len(lines) - fraction) < 0.03
    assert done.held_out.names == [f"list:{1 + train.count(chr(10))}"]
    assert any("one document only" in note for note in done.ledger["notes"])
    adds_up(done)
    # A title before one endless line is no place to cut at.
    endless = "Title\n" + "word " * 400
    done = prepare(source([endless]), tmp_path / "endless", tokenizer=BYTES, held_out_fraction=fraction)
    (train,), (held,) = (texts_of(shards, BYTES) for shards in (done.train, done.held_out))
    assert train + held == endless and train.endswith(" ") and abs(len(held) / len(endless) - fraction) < 0.03


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_ledger_that_does_not_add_up_is_refused() -> None:
    for what in ("documents", "bytes", "tokens"):
        ledger = Ledger()
        ledger.receive(2, 10, 5)
        ledger.book("train", 1, 6, 3)
        ledger.book("duplicate", 1, 4, 2, where="a:1")
        ledger.check()
        setattr(ledger.accounts["train"], what, getattr(ledger.accounts["train"], what) - 1)
        with pytest.raises(DataError, match=f"the ledger is off: .* {what} were read"):
            ledger.check()


def test_a_document_that_gets_lost_on_the_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = source([f"text {number}" for number in range(20)])
    honest = preparing._parts

    def losing(decided: Any, cut: int | None) -> Iterator[preparing.Part]:
        return (part for number, part in enumerate(honest(decided, cut)) if number != 5)

    monkeypatch.setattr(preparing, "_parts", losing)
    with pytest.raises(DataError, match="20 documents were read, 19 are booked"):
        prepare(texts, tmp_path / "out", tokenizer=BYTES)
    monkeypatch.setattr(preparing, "_parts", honest)
    add = preparing.ShardWriter.add
    monkeypatch.setattr(preparing.ShardWriter, "add", lambda self, ids, size, name: add(self, ids[:-1], size, name))
    with pytest.raises(DataError, match="the shards of 'train' hold"):
        prepare(texts, tmp_path / "out", tokenizer=BYTES)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_change_between_the_readings_are_noticed(tmp_path: Path) -> None:
    for change in (1, -1):
        readings = itertools.count()

        def documents(ledger: Ledger, change: int = change, readings: Iterator[int] = readings) -> Iterator[Document]:
            return source([f"text {number}" for number in range(20 + change * next(readings))])(ledger)

        with pytest.raises(DataError, match="changed while they were read"):
            prepare(documents, tmp_path / "out", tokenizer=BYTES)
    changing = iter(["a text", "some text"])
    with pytest.raises(DataError, match="changed while they were read"):
        prepare(lambda ledger: source([next(changing), "x"])(ledger), tmp_path / "out", tokenizer=BYTES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_shares_that_are_none(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no share of the text"):
        prepare(source(["a", "b"]), tmp_path / "out", tokenizer=BYTES, held_out_fraction=fraction)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is left of 3 documents: 1 empty, 2 too_short"):
        prepare(source(["a", " ", "bb"]), tmp_path / "out", tokenizer=BYTES, min_characters=5)


def test_a_lone_surrogate_has_a_place(tmp_path: Path) -> None:
    def documents(ledger: Ledger) -> Iterator[Document]:
        yield Document("fine", "mine", 1, 4)
        yield Document("x\ud800", "mine", 2, 4)

    with pytest.raises(DataError, match="lone surrogate") as caught:
        prepare(documents, tmp_path / "out", tokenizer=BYTES)
    assert caught.value.where == "mine:2"


def test_a_folder_that_stands_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def never(ledger: Ledger) -> Iterator[Document]:
        raise AssertionError("read")

    with pytest.raises(StorageError, match="exists already"):
        prepare(never, tmp_path / "out", tokenizer=BYTES)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    done = prepare(source([f"text {number}" for number in range(9)]), tmp_path / "out", tokenizer=BYTES)
    other = Tokenizer.train(["words words words"], vocab_size=270)
    other.save(done.folder / "tokenizer")
    with pytest.raises(ArtifactError, match="the file has"):  # a copy over the old one
        Prepared.open(done.folder)
    seal(done.folder / "tokenizer", "tokenizer")
    seal(done.folder, "shards", parents=[Parent(kind="tokenizer", hash=other.hash)])
    with pytest.raises(ArtifactError, match="the tokenizer does not fit the shards") as caught:
        Prepared.open(done.folder)
    assert BYTES.hash[:12] in str(caught.value.expected) and other.hash[:12] in str(caught.value.expected)


def test_places_are_shown_in_part_and_written_in_full(tmp_path: Path) -> None:
    done = prepare(source(["same"] * 50 + ["other"]), tmp_path / "out", tokenizer=BYTES)
    assert done.ledger["accounts"]["duplicate"]["documents"] == 49
    assert len(done.ledger["accounts"]["duplicate"]["places"]) == SHOWN_PLACES
    assert [row["where"] for row in left_out(done)] == [f"list:{number}" for number in range(2, 51)]
