"""Shards on disk, the one packer, and the loader whose position is the step."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.data.batch import IGNORED, Batch
from ratoon.data.loader import Loader, held_out_batches
from ratoon.data.pack import Example, pack_whole, stream_grid, stream_rows, whole_rows
from ratoon.data.shards import Shards, ShardWriter
from ratoon.store.artifact import MANIFEST, Parent, read_manifest, seal

TOKENIZER = Parent(kind="tokenizer", hash="ab" * 32)
SEPARATOR = 0


def write(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 1000,
    separator: int | None = SEPARATOR,
    shard_tokens: int = 1 << 20,
) -> Shards:
    """Documents as shards; each begins with the separator, if there is one."""
    with ShardWriter(folder, vocab_size, shard_tokens) as writer:
        for number, ids in enumerate(documents):
            begun = list(ids) if separator is None else [separator, *ids]
            writer.add(begun, 2 * len(ids), f"file.txt:{number + 1}")
        writer.close(TOKENIZER, separator)
    return Shards(folder)


def counting(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of numbers that are all different, from 1."""
    numbers = itertools.count(1)
    return [[next(numbers) for _ in range(length)] for length in lengths]


# -- shards ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 999), max_size=9), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 30),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_tokens_come_back_over_the_borders_of_files(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    bounds: tuple[float, float],
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "x"
    shards = write(folder, documents, shard_tokens=shard_tokens)
    stream = [token for ids in documents for token in (SEPARATOR, *ids)]
    assert shards.n_tokens == len(stream) and shards.n_documents == len(documents)
    assert shards.tokens(0, len(stream)).tolist() == stream
    start, stop = sorted(int(bound * len(stream)) for bound in bounds)
    if start < stop:
        assert shards.tokens(start, stop).tolist() == stream[start:stop]
    assert shards.bytes_of_text == sum(2 * len(ids) for ids in documents)
    assert shards.document_starts.tolist() == [0, *itertools.accumulate(len(ids) + 1 for ids in documents)]
    for number in range(len(documents)):
        place = int(shards.document_starts[number])
        assert shards.name_of(place) == f"file.txt:{number + 1} (token 0)"
    manifest = read_manifest(folder, "shards", check="hash")
    assert manifest.facts["tokens"] == len(stream) and shards.tokenizer_hash == TOKENIZER.hash


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    shards = write(tmp_path / "x", counting([50]))
    assert all(isinstance(part, np.memmap) and part.mode == "r" for part in shards._parts)


@pytest.mark.parametrize(("vocab_size", "name"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_two_bytes_a_token_as_long_as_they_hold_every_id(tmp_path: Path, vocab_size: int, name: str) -> None:
    largest = vocab_size - 1
    shards = write(tmp_path / "x", [[1, largest, 2]], vocab_size=vocab_size)
    assert shards.manifest.facts["dtype"] == name and shards.largest_id == largest
    assert shards.tokens(0, 4).tolist() == [0, 1, largest, 2]
    size = np.dtype(name).itemsize
    assert (tmp_path / "x" / "tokens-00000.bin").read_bytes() == b"".join(
        value.to_bytes(size, "little") for value in (0, 1, largest, 2)
    )


@pytest.mark.parametrize("bad", [1000, -1, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match="outside the vocabulary") as caught:
        write(tmp_path / "x", [[1, 2], [3, bad]])
    assert caught.value.where == "file.txt:2" and caught.value.expected == "0 … 999"
    with pytest.raises(ArtifactError, match="no manifest"):
        Shards(tmp_path / "x")


@pytest.mark.parametrize("name", ["tokens-00000.bin", "starts.npy", "bytes.npy", "names.txt"])
def test_a_truncated_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x", counting([20, 30]))
    path = tmp_path / "x" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(ArtifactError, match="bytes") as caught:
        Shards(tmp_path / "x")
    assert str(caught.value.where).endswith(name)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        Shards(tmp_path / "x")


def test_files_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", counting([20, 30]))
    path = tmp_path / "x" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    facts = read_manifest_facts(tmp_path / "x")
    seal(tmp_path / "x", "shards", parents=[TOKENIZER], facts=facts)
    with pytest.raises(ArtifactError, match="the files hold 51 tokens") as caught:
        Shards(tmp_path / "x")
    assert caught.value.expected == "52 as the manifest says"


def read_manifest_facts(folder: Path) -> dict[str, object]:
    import json

    facts: dict[str, object] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["facts"]
    return facts


def test_a_folder_that_is_no_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    seal(tmp_path / "x", "shards")
    with pytest.raises(ArtifactError, match="no shards of its own"):
        Shards(tmp_path / "x")


def test_names_with_odd_signs_stay_one_a_document(tmp_path: Path) -> None:
    names = ["a\nb", "c\u2028d", "e\x0bf", "g\rh", "i\x85"]
    with ShardWriter(tmp_path / "x", 10) as writer:
        for name in names:
            writer.add([1], 1, name)
        writer.close(TOKENIZER, None)
    assert Shards(tmp_path / "x").names == ["a b", "c\u2028d", "e\x0bf", "g h", "i\x85"]


# -- the packer: streams -----------------------------------------------------------------------------------------------


@given(tokens=st.integers(2, 200), row_tokens=st.integers(1, 60), offset=st.integers(0, 59))
def test_a_grid_learns_every_token_but_the_first_once(tokens: int, row_tokens: int, offset: int) -> None:
    if tokens < row_tokens + 1:
        with pytest.raises(DataError, match="which is not one row"):
            stream_grid(tokens, row_tokens, offset)
        return
    offset = min(offset, row_tokens - 1, tokens - row_tokens - 1)
    grid = stream_grid(tokens, row_tokens, max(0, offset))
    learned: Counter[int] = Counter()
    for start, begin, end in zip(grid.starts, grid.learned_from, grid.learned_to, strict=True):
        assert start >= 0 and start + row_tokens < tokens and 0 <= begin < end <= row_tokens
        learned.update(range(int(start + begin) + 1, int(start + end) + 1))
    assert learned == Counter(range(1, tokens))


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def check_rows(batch: Batch, shards: Shards) -> Counter[int]:
    """What every row of a stream must be; returns how often each token of the stream is learned (weight 1)."""
    stream = shards.tokens(0, shards.n_tokens)
    starts = shards.document_starts
    place_of = {int(token): place for place, token in enumerate(stream) if token != SEPARATOR}
    learned: Counter[int] = Counter()
    for row in range(len(batch.ids_BT)):
        ids, targets = batch.ids_BT[row], batch.targets_BT[row]
        inner = next(t for t, token in enumerate([*ids, targets[-1]]) if int(token) in place_of)
        first = place_of[int([*ids, targets[-1]][inner])] - inner
        assert ids.tolist() == stream[first : first + len(ids)].tolist()
        assert targets.tolist() == stream[first + 1 : first + len(ids) + 1].tolist()
        documents = np.searchsorted(starts, np.arange(first, first + len(ids)), side="right") - 1
        assert batch.document_BT[row].tolist() == (documents - documents[0]).tolist()
        begins = np.maximum(starts[documents], first)
        assert batch.position_BT[row].tolist() == (np.arange(first, first + len(ids)) - begins).tolist()
        assert set(batch.weight_BT[row].tolist()) <= {0.0, 1.0}
        learned.update((first + 1 + np.flatnonzero(batch.weight_BT[row])).tolist())
    return learned


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, row_tokens=st.integers(2, 24), offset=st.integers(0, 23), shard_tokens=st.integers(5, 400))
def test_a_pass_over_a_stream_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], row_tokens: int, offset: int, shard_tokens: int
) -> None:
    shards = write(tmp_path_factory.mktemp("stream") / "x", counting(lengths), shard_tokens=shard_tokens)
    if shards.n_tokens < row_tokens + 1:
        return
    grid = stream_grid(shards.n_tokens, row_tokens, min(offset, row_tokens - 1, shards.n_tokens - row_tokens - 1))
    batch = stream_rows(shards, grid, np.arange(len(grid)), row_tokens)
    assert check_rows(batch, shards) == Counter(range(1, shards.n_tokens))
    assert batch.valid_tokens == shards.n_tokens - 1
    assert batch.rows[0].startswith("file.txt:1")


def test_without_a_separator_no_document_predicts_the_next(tmp_path: Path) -> None:
    shards = write(tmp_path / "x", counting([5, 1, 7, 3]), separator=None)
    grid = stream_grid(shards.n_tokens, 4)
    learned = check_rows(stream_rows(shards, grid, np.arange(len(grid)), 4), shards)
    begins = {int(start) for start in shards.document_starts[:-1]}
    assert learned == Counter(set(range(shards.n_tokens)) - begins)


def test_positions_and_documents_by_hand(tmp_path: Path) -> None:
    shards = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6, 7]])
    batch = stream_rows(shards, stream_grid(shards.n_tokens, 4), np.asarray([0, 1]), 4)
    assert batch.ids_BT.tolist() == [[0, 1, 2, 0], [3, 0, 4, 5]]
    assert batch.targets_BT.tolist() == [[1, 2, 0, 3], [0, 4, 5, 6]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert batch.rows == ("file.txt:1 (token 0)", "file.txt:2 (token 1)")
    assert not batch.one_document_rows


# -- the packer: whole examples ----------------------------------------------------------------------------------------

examples = st.lists(st.integers(1, 17), min_size=1, max_size=30)


@given(lengths=examples, row_tokens=st.just(16))
def test_whole_examples_stay_whole(lengths: list[int], row_tokens: int) -> None:
    many = [
        Example(ids, [0.5 + (token % 3) for token in ids], f"example:{number}")
        for number, ids in enumerate(counting(lengths))
    ]
    rows = pack_whole(many, row_tokens)
    assert sorted(number for members in rows for number in members) == list(range(len(many)))
    batch = whole_rows(many, rows, row_tokens)
    assert batch.ids_BT.shape == (len(rows), row_tokens)
    for row, members in enumerate(rows):
        documents = batch.document_BT[row]
        assert sorted(set(documents.tolist()) - {IGNORED}) == list(range(len(members)))
        assert batch.rows[row] == ", ".join(many[number].name for number in members)
        for document, number in enumerate(members):
            places = np.flatnonzero(documents == document)
            ids, weight = list(many[number].ids), list(many[number].weight)
            assert (np.diff(places) == 1).all()
            assert batch.ids_BT[row, places].tolist() == (ids[:-1] or ids)
            assert batch.position_BT[row, places].tolist() == list(range(len(places)))
            if len(ids) > 1:
                assert batch.targets_BT[row, places].tolist() == ids[1:]
                assert batch.weight_BT[row, places].tolist() == weight[: len(ids) - 1]
            else:
                assert batch.weight_BT[row, places].tolist() == [0]
        free = documents == IGNORED
        assert not batch.weight_BT[row, free].any() and not batch.position_BT[row, free].any()
    # Best fit wastes less than what two rows could have shared.
    used = sorted(int((batch.document_BT[row] >= 0).sum()) for row in range(len(rows)))
    assert len(used) < 2 or used[0] + used[1] > row_tokens


def test_examples_that_do_not_fit_are_refused() -> None:
    good = Example([1, 2, 3], [1, 1, 1], "good")
    with pytest.raises(DataError, match="has 18 tokens") as caught:
        pack_whole([good, Example(list(range(18)), [1] * 18, "long:7")], 16)
    assert caught.value.where == "long:7" and caught.value.expected == "at most 17"
    pack_whole([Example(list(range(17)), [1] * 17)], 16)
    with pytest.raises(DataError, match="has no tokens") as empty:
        pack_whole([good, Example([], [], "empty:3")], 16)
    assert empty.value.where == "empty:3"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_with_its_place(bad: float) -> None:
    with pytest.raises(DataError, match="weight that is no number") as caught:
        pack_whole([Example([1, 2, 3], [1.0, bad, 1.0], "file:9")], 16)
    assert caught.value.where == "file:9"


def test_packing_is_the_same_each_time() -> None:
    random = np.random.default_rng(3)
    many = [Example([1] * int(n), [1.0] * int(n)) for n in random.integers(1, 18, 300)]
    rows = pack_whole(many, 16)
    assert rows == pack_whole(many, 16)
    assert sum(max(1, len(example.ids) - 1) for example in many) / (16 * len(rows)) > 0.95


# -- the loader --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    random = np.random.default_rng(1)
    return write(
        tmp_path_factory.mktemp("loader") / "x", counting(random.integers(1, 60, 20).tolist()), shard_tokens=99
    )


def equal(one: Batch, other: Batch) -> bool:
    return (
        all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("ids_BT", "targets_BT", "weight_BT", "document_BT", "position_BT")
        )
        and one.rows == other.rows
    )


def loader(shards: Shards, *, rows: int = 4, seed: int = 1, rank: int = 0, world: int = 1) -> Loader:
    return Loader(shards, rows=rows, context_tokens=16, seed=seed, rank=rank, world=world)


def test_a_batch_is_a_function_of_seed_and_step(shards: Shards) -> None:
    in_order = [loader(shards).batch(step) for step in range(60)]
    one = loader(shards)
    for step in np.random.default_rng(5).permutation(60).tolist():
        assert equal(one.batch(step), in_order[step])
        assert equal(one.batch(step), in_order[step])
    assert equal(loader(shards).batch(59), in_order[59])


@pytest.mark.parametrize(("rows", "world"), [(4, 2), (4, 4), (6, 3), (8, 2)])
def test_ranks_share_the_batch_exactly(shards: Shards, rows: int, world: int) -> None:
    whole = loader(shards, rows=rows)
    shares = [loader(shards, rows=rows, rank=rank, world=world) for rank in range(world)]
    for step in range(30):  # over the ends of several passes
        batch, parts = whole.batch(step), [share.batch(step) for share in shares]
        assert all(len(part.ids_BT) == rows // world for part in parts)
        for name in ("ids_BT", "targets_BT", "weight_BT", "document_BT", "position_BT"):
            assert np.array_equal(getattr(batch, name), np.concatenate([getattr(part, name) for part in parts]))
        assert batch.rows == tuple(name for part in parts for name in part.rows)
    with pytest.raises(ConfigError, match="cannot be shared evenly"):
        loader(shards, rows=rows, world=5 if rows != 5 else 7)


def test_every_token_is_learned_once_a_pass(shards: Shards) -> None:
    one = loader(shards, rows=1)
    step = 0
    for number in range(4):
        learned: Counter[int] = Counter()
        while one.passes(step) < number + 1:
            learned.update(check_rows(one.batch(step), shards))
            step += 1
        assert learned == Counter(range(1, shards.n_tokens)), f"pass {number}"
    assert one.passes(0) == 0.0 and one.passes(step) == 4.0


def test_passes_differ_and_seeds_differ(shards: Shards) -> None:
    one = loader(shards, rows=1)
    per_pass: list[list[str]] = []
    step = 0
    for number in range(3):
        names = []
        while one.passes(step) < number + 1:
            names.append(one.batch(step).rows[0])
            step += 1
        per_pass.append(names)
    assert per_pass[0] != per_pass[1] and set(per_pass[0]) != set(per_pass[1])  # another order, other borders
    other = [loader(shards, rows=1, seed=2).batch(step).rows[0] for step in range(20)]
    assert other != per_pass[0][:20]
    places = [[int(number) for number in re.findall(r"[0-9]+", name)] for name in per_pass[0]]
    assert places != sorted(places)


def test_the_state_names_what_it_gives(shards: Shards, tmp_path: Path) -> None:
    state = loader(shards).state()
    assert state == {"shards": shards.manifest.hash, "rows": 4, "context_tokens": 16, "seed": 1}
    assert loader(shards, rank=1, world=2).state() == state
    other = write(tmp_path / "x", counting([50, 50]))
    changed = [
        loader(shards, seed=2).state(),
        loader(shards, rows=8).state(),
        loader(other).state(),
        Loader(shards, rows=4, context_tokens=17, seed=1).state(),
    ]
    assert all(one != state for one in changed)


def test_a_text_of_one_row_and_no_more(tmp_path: Path) -> None:
    exact = write(tmp_path / "x", [list(range(1, 17))])
    one = Loader(exact, rows=2, context_tokens=16, seed=1)
    assert one.batch(0).ids_BT.tolist() == [list(range(16))] * 2 and one.batch(3).one_document_rows
    with pytest.raises(DataError, match="which is not one row of 17"):
        Loader(exact, rows=2, context_tokens=17, seed=1)


def test_held_out_text_is_gone_over_once(shards: Shards, tmp_path: Path) -> None:
    learned: Counter[int] = Counter()
    for batch in held_out_batches(shards, rows=3, context_tokens=16):
        assert len(batch.ids_BT) <= 3
        learned.update(check_rows(batch, shards))
    assert learned == Counter(range(1, shards.n_tokens))
    short = write(tmp_path / "short", [[1, 2, 3]])
    assert [batch.targets_BT.tolist() for batch in held_out_batches(short, rows=3, context_tokens=16)] == [[[1, 2, 3]]]
    few = list(held_out_batches(shards, rows=3, context_tokens=16, limit_tokens=64))
    assert 0 < sum(batch.valid_tokens for batch in few) <= 64
    nothing = write(tmp_path / "nothing", [])
    with pytest.raises(DataError, match="nothing to measure on"):
        list(held_out_batches(nothing, rows=3, context_tokens=16))


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_split_into_its_rows(shards: Shards) -> None:
    batch = loader(shards, rows=7).batch(0)
    for parts in (1, 2, 3, 7):
        split = batch.split(parts)
        assert len(split) == parts
        assert np.array_equal(np.concatenate([part.ids_BT for part in split]), batch.ids_BT)
        assert tuple(name for part in split for name in part.rows) == batch.rows
        assert sum(part.valid_tokens for part in split) == batch.valid_tokens
        assert sum(part.weight for part in split) == batch.weight
    assert len(batch.split(20)) == 7
