"""What lies on disk: old or new and never half, whatever the disk, the clock or a signal does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from ratoon.base.errors import ArtifactError, ConfigError, StorageError
from ratoon.data.ledger import Ledger
from ratoon.data.prepare import prepare
from ratoon.data.shards import ShardWriter
from ratoon.data.sources import Document
from ratoon.store import atomic
from ratoon.store.artifact import MANIFEST, Parent, expect_parent, file_hash, read_manifest, seal
from ratoon.store.atomic import PARTIAL, atomic_file, atomic_folder, sweep, write_bytes, write_json, write_text
from ratoon.store.runs import Run
from ratoon.text.tokenizer import Tokenizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- files and folders -------------------------------------------------------------------------------------------------


def test_a_file_is_old_until_it_is_new(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": "中"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "中"\n}\n'
    with atomic_file(path) as handle:
        handle.write(b"new")
        handle.flush()
        assert path.read_text(encoding="utf-8").startswith("{")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.json"]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(path) as handle:
            handle.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_what_is_renamed_was_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flushed(handle: int) -> None:
        done.append("flush")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda one, other: (done.append("rename"), replace(one, other)))
    monkeypatch.setattr(os, "rename", lambda one, other: (done.append("rename"), rename(one, other)))
    write_text(tmp_path / "file", "x")
    assert done == ["flush", "rename", "flush"]  # the file, then its folder's list of names
    done.clear()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
    assert done == ["flush"] * 3 + ["rename", "flush"]


def test_text_modes(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file", "w") as handle:
        handle.write("中")
    assert (tmp_path / "file").read_bytes() == "中".encode()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with atomic_folder(place) as folder:
        (folder / "inner").mkdir()
        write_text(folder / "inner" / "a", "1")
        assert not place.exists()
    assert (place / "inner" / "a").read_text() == "1" and names(tmp_path) == ["out"]


def test_a_folder_that_stands_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    with pytest.raises(StorageError, match="exists already"), atomic_folder(place):
        raise AssertionError("nothing is begun")
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        write_text(folder / "a", "1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.fixture(params=["exchanged", "stepping aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: in one step of the system, and where it has none."""
    if request.param == "stepping aside":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges two names in one step")
    return str(request.param)


def test_replacing_a_folder(tmp_path: Path, way: str) -> None:
    place = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_folder(place, replace=True) as folder:
            write_text(folder / text, text)
            if text == "new":
                assert names(place) == ["old"]
    assert names(place) == ["new"] and names(tmp_path) == ["out"]


def test_replacing_a_folder_and_failing(tmp_path: Path, way: str) -> None:
    place = tmp_path / "out"
    with atomic_folder(place) as folder:
        write_text(folder / "old", "old")
    with pytest.raises(ValueError), atomic_folder(place, replace=True) as folder:
        write_text(folder / "new", "new")
        raise ValueError
    assert names(place) == ["old"] and names(tmp_path) == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    write_text(place / "old", "old")
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename, calls = os.rename, []

    def failing(one: Any, other: Any) -> None:
        calls.append(one)
        if len(calls) == 2:
            raise OSError(5, "the disk failed")
        rename(one, other)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="the disk failed"), atomic_folder(place, replace=True) as folder:
        write_text(folder / "new", "new")
    assert len(calls) == 3 and names(place) == ["old"] and names(tmp_path) == ["out"]


def test_what_stands_in_the_way_is_told(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(StorageError, match="could not be written"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(StorageError, match="a file stands there"), atomic_folder(tmp_path / "file", replace=True):
        raise AssertionError("nothing is begun")
    assert (tmp_path / "file").read_text() == "x"


# -- sweeping ----------------------------------------------------------------------------------------------------------


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_sweep_removes_halves_and_puts_back_what_stepped_aside(tmp_path: Path) -> None:
    dead = dead_process()
    write_text(tmp_path / f".file{PARTIAL}{dead}-12345678", "half")
    write_text(tmp_path / f".out{PARTIAL}{dead}-12345678" / "a", "half")
    write_text(tmp_path / f".gone.retired-{dead}-12345678" / "a", "old")
    write_text(tmp_path / f".there.retired-{dead}-12345678" / "a", "old")
    write_text(tmp_path / "there" / "a", "new")
    write_text(tmp_path / ".hidden", "mine")
    assert sweep(tmp_path) == [
        "removed the half-written file",
        "put back gone: its replacement was interrupted",
        "removed the half-written out",
    ]
    assert names(tmp_path) == [".hidden", "gone", "there"]
    assert (tmp_path / "gone" / "a").read_text() == "old" and (tmp_path / "there" / "a").read_text() == "new"
    assert sweep(tmp_path) == [] and sweep(tmp_path / "absent") == []


def test_sweep_leaves_what_a_living_process_writes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write_text(tmp_path / f".out{PARTIAL}{process.pid}-12345678", "half")
        assert sweep(tmp_path) == []
    finally:
        process.communicate(b"\n")
    assert len(sweep(tmp_path)) == 1


def test_sweep_leaves_what_this_process_writes_in_another_thread(tmp_path: Path) -> None:
    inside, done = threading.Event(), threading.Event()

    def write() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            write_text(folder / "a", "1")
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=write)
    thread.start()
    assert inside.wait(20)
    assert sweep(tmp_path) == []
    done.set()
    thread.join()
    assert names(tmp_path) == ["out"]
    # A number that a dead process of the past shares with this one counts for nothing.
    write_text(tmp_path / f".x{PARTIAL}{os.getpid()}-12345678", "half")
    assert len(sweep(tmp_path)) == 1


# -- manifests ---------------------------------------------------------------------------------------------------------


def artifact(folder: Path, **more: Any) -> Path:
    write_text(folder / "a.txt", "one")
    write_text(folder / "inner" / "b.bin", "two")
    seal(folder, "shards", **more)
    return folder


def test_a_manifest_says_what_is_there_and_where_it_comes_from(tmp_path: Path) -> None:
    parent = Parent(kind="tokenizer", hash="ab" * 32, name="mine")
    folder = artifact(tmp_path / "x", parents=[parent], facts={"tokens": 3}, recipe={"seed": 1})
    found = read_manifest(folder, "shards", check="hash")
    assert found.parents == [parent] and found.parent("tokenizer") == parent and found.parent("model") is None
    assert found.facts == {"tokens": 3} and found.recipe == {"seed": 1}
    assert {name: entry.sha256 for name, entry in found.files.items()} == {
        "a.txt": file_hash(folder / "a.txt"),
        "inner/b.bin": file_hash(folder / "inner" / "b.bin"),
    }
    assert found.files["a.txt"].bytes == 3
    assert {"python", "ratoon", "numpy"} <= found.versions.keys()


def test_equal_contents_equal_hash(tmp_path: Path) -> None:
    one = artifact(tmp_path / "x", facts={"a": 1})
    other = artifact(tmp_path / "y", facts={"b": 2})
    assert read_manifest(one).hash == read_manifest(other).hash
    write_text(other / "a.txt", "two")
    assert seal(other, "shards").hash != read_manifest(one).hash
    write_text(other / "a.txt", "one")
    assert seal(other, "model").hash != read_manifest(one).hash
    os.rename(other / "a.txt", other / "c.txt")
    assert seal(other, "shards").hash != read_manifest(one).hash


def test_hashes_computed_while_writing_are_taken(tmp_path: Path) -> None:
    known = file_hash(artifact(tmp_path / "x") / "a.txt")
    assert seal(tmp_path / "x", "shards", known={"a.txt": known}).hash == read_manifest(tmp_path / "x").hash
    assert seal(tmp_path / "x", "shards", known={"a.txt": "0" * 64}).files["a.txt"].sha256 == "0" * 64


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "x")
    for name in ("a.txt", "inner/b.bin"):
        before = (folder / name).read_bytes()
        for place in range(len(before)):
            changed = bytearray(before)
            changed[place] ^= 1
            (folder / name).write_bytes(changed)
            read_manifest(folder)  # names and sizes agree
            with pytest.raises(ArtifactError, match="contents changed"):
                read_manifest(folder, check="hash")
        (folder / name).write_bytes(before)
    read_manifest(folder, check="hash")


def test_torn_and_missing_things_are_told(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "x")
    with pytest.raises(ArtifactError, match="holds a shards") as wrong:
        read_manifest(folder, "model")
    assert wrong.value.expected == "a model"
    (folder / "a.txt").write_text("longer")
    with pytest.raises(ArtifactError, match="has 6 bytes") as size:
        read_manifest(folder)
    assert size.value.expected == "3" and str(size.value.where).endswith("a.txt")
    (folder / "a.txt").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        read_manifest(folder)
    with pytest.raises(ArtifactError, match="no such folder"):
        read_manifest(tmp_path / "absent")
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="has no manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "shards"}', '{"kind": "cake"}', "\xff"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    folder = artifact(tmp_path / "x")
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="not readable"):
        read_manifest(folder)


def test_a_manifest_that_was_edited(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "x")
    (folder / "a.txt").write_text("eno")
    table = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    table["files"]["a.txt"]["sha256"] = file_hash(folder / "a.txt")
    write_json(folder / MANIFEST, table)
    with pytest.raises(ArtifactError, match="its hash is not that of the files"):
        read_manifest(folder)


def test_a_parent_that_is_another(tmp_path: Path) -> None:
    write_text(tmp_path / "t" / "tokenizer.json", "{}")
    tokenizer = seal(tmp_path / "t", "tokenizer")
    right = read_manifest(artifact(tmp_path / "x", parents=[Parent(kind="tokenizer", hash=tokenizer.hash)]))
    expect_parent(right, tokenizer, where="x")
    wrong = read_manifest(artifact(tmp_path / "y", parents=[Parent(kind="tokenizer", hash="00" * 32)]))
    with pytest.raises(ArtifactError, match="made with another tokenizer") as caught:
        expect_parent(wrong, tokenizer, where="y")
    assert tokenizer.hash[:12] in str(caught.value.expected) and caught.value.where == "y"
    with pytest.raises(ArtifactError, match="does not say with which tokenizer"):
        expect_parent(read_manifest(artifact(tmp_path / "z")), tokenizer, where="z")


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_is_made_found_and_listed(tmp_path: Path) -> None:
    for number, name in enumerate(("first", "Zweiter-2.0", "第三")):
        run = Run.create(name, tmp_path)
        run.write_state(status="running", step=number)
        os.utime(run.state_path, (1000 + number, 1000 + number))
        assert run.checkpoints.is_dir() and run.name == name
    assert [run.name for run in Run.all(tmp_path)] == ["first", "Zweiter-2.0", "第三"]
    assert Run.find("first", tmp_path).folder == tmp_path / "first"
    assert Run.find(str(tmp_path / "第三")).read_state()["step"] == 2
    with pytest.raises(ArtifactError, match="no run 'fourth'") as caught:
        Run.find("fourth", tmp_path)
    assert caught.value.expected == "one of: first, Zweiter-2.0, 第三"
    with pytest.raises(ConfigError, match="exists already") as taken:
        Run.create("first", tmp_path)
    assert "--resume" in str(taken.value.fix)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "two words", "line\n"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run"):
        Run.create(name, tmp_path)
    assert names(tmp_path) == []


def test_the_state_of_a_run_grows(tmp_path: Path) -> None:
    run = Run.create("a", tmp_path)
    assert run.read_state() == {}
    run.write_state(status="running", step=1)
    run.write_state(step=2, loss=0.5)
    assert run.read_state() == {"kind": "run", "status": "running", "step": 2, "loss": 0.5}
    run.state_path.write_text("{")
    with pytest.raises(ArtifactError, match="state is not readable"):
        run.read_state()


def test_metrics_survive_a_cut_line_and_are_rewound(tmp_path: Path) -> None:
    run = Run.create("a", tmp_path)
    assert list(run.read_metrics()) == [] and run.rewind_metrics(3) == 0
    for step in range(5):
        run.append_metrics({"step": step, "kind": "train", "text": "中"})
    with open(run.metrics_path, "ab") as handle:
        handle.write(b'{"step": 5, "ki')
    assert [record["step"] for record in run.read_metrics()] == [0, 1, 2, 3, 4]
    assert run.rewind_metrics(2) == 2
    run.append_metrics({"step": 3, "kind": "train"})
    assert [record["step"] for record in run.read_metrics()] == [0, 1, 2, 3]


def test_a_run_sweeps_its_folders(tmp_path: Path) -> None:
    run, dead = Run.create("a", tmp_path), dead_process()
    write_text(run.folder / f".manifest.json{PARTIAL}{dead}-12345678", "half")
    write_text(run.checkpoints / f".step{PARTIAL}{dead}-12345678", "half")
    assert len(run.sweep()) == 2


# -- a full disk -------------------------------------------------------------------------------------------------------

LIMIT = 64 << 10


def write_shards(folder: Path, tokens: int, documents: int = 1, name: str = "x") -> None:
    with atomic_folder(folder) as partial, ShardWriter(partial, 300) as writer:
        for _ in range(documents):
            writer.add([7] * tokens, tokens, name)
        writer.close(Parent(kind="tokenizer", hash="0" * 64), None)


def write_prepared(folder: Path, kept: int, left_out: int) -> None:
    def documents(ledger: Ledger) -> Iterator[Document]:
        for number in range(kept + left_out):
            text = f"{number}".zfill(200 if number < kept else 9)
            yield Document(text, "s" * 50, number + 1, len(text))

    prepare(documents, folder, tokenizer=Tokenizer.bytes_only(), min_characters=100)


def write_tokenizer(folder: Path) -> None:
    made = Tokenizer.train([], vocab_size=1256, special_tokens=[f"<|special {number}|>" for number in range(1000)])
    with atomic_folder(folder) as partial:
        made.save(partial)
        seal(partial, "tokenizer")


def write_manifest(folder: Path) -> None:
    with atomic_folder(folder) as partial:
        write_bytes(partial / "a", b"1")
        seal(partial, "model", facts={"words": ["w" * 100] * 5000})


def write_metrics(folder: Path) -> None:
    run = Run(folder)
    folder.mkdir()
    for step in range(100_000):
        run.append_metrics({"step": step, "kind": "train", "loss": 0.1 * step, "text": "t" * 99})


def write_state(folder: Path) -> None:
    run = Run(folder)
    run.write_state(step=1)
    run.write_state(step=2, words=["w" * 100] * 5000)


KINDS: dict[str, Callable[[Path], None]] = {
    "file": lambda place: write_bytes(place, b"x" * 500_000),
    "ledger": lambda place: write_json(place, {"places": ["p" * 100] * 5000}),
    "manifest": write_manifest,
    "tokenizer": write_tokenizer,
    "tokens": lambda place: write_shards(place, 100_000),
    "names": lambda place: write_shards(place, 1, 1500, "n" * 100),
    "indexes": lambda place: write_shards(place, 1, 20_000, ""),
    "left out": lambda place: write_prepared(place, 2, 3000),
    "prepared": lambda place: write_prepared(place, 2000, 0),
    "metrics": write_metrics,
    "state": write_state,
}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A real file system of `LIMIT` bytes, where one may be mounted."""
    folder = tmp_path_factory.mktemp("full")
    command = ["mount", "-t", "tmpfs", "-o", f"size={LIMIT}", "tmpfs", str(folder)]
    mounted = sys.platform == "linux" and os.geteuid() == 0
    mounted = mounted and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond `LIMIT` bytes: the system's own limit, everywhere but on Windows."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_cannot_grow_are_told_and_the_old_is_whole(kind: str, tmp_path: Path) -> None:
    check_full(kind, tmp_path, small_files())


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_and_the_old_is_whole(kind: str, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("no file system may be mounted here; the limit for files is tested beside this")
    try:
        check_full(kind, small_disk, nullcontext())
    finally:
        for path in sorted(small_disk.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def check_full(kind: str, folder: Path, limit: AbstractContextManager[None]) -> None:
    neighbour, place = folder / "neighbour", folder / "place"
    write_text(neighbour, "whole")
    if kind in ("file", "ledger"):
        write_text(place, "old")
    with pytest.raises(StorageError, match="the disk is full") as caught, limit:
        KINDS[kind](place)
    assert caught.value.where is not None and str(place) in caught.value.where
    assert "run the same command again" in str(caught.value.fix)
    assert neighbour.read_text() == "whole"
    assert set(names(folder)) <= {"neighbour", "place"}
    if kind in ("file", "ledger"):
        assert place.read_text() == "old"
    elif kind == "metrics":
        steps = [record["step"] for record in Run(place).read_metrics()]
        assert steps == list(range(len(steps))) and len(steps) > 100
        assert (place / "metrics.jsonl").read_bytes().endswith(b"}\n")
    elif kind == "state":
        assert Run(place).read_state() == {"kind": "run", "step": 1}
        assert names(place) == ["manifest.json"]
    else:
        assert not place.exists()


# -- kill -9 -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from ratoon.store.artifact import seal
from ratoon.store.atomic import atomic_folder, write_json
place = Path(sys.argv[1])
os.fsync = lambda handle: None  # a killed process loses nothing of what the system holds, and this is quicker
print("begin", flush=True)
generation = int(sys.argv[2])
while True:
    generation += 1
    with atomic_folder(place, replace=True) as partial:
        for number in range(12):
            (partial / f"part-{number}").write_text(str(generation))
        seal(partial, "model", facts={"generation": generation}, packages=())
    write_json(place.with_name("state.json"), {"generation": generation, "more": ["x" * 50] * 200})
"""


def kill_after(command: list[str], seconds: float) -> None:
    """Start a process, wait until it says that it begins, and kill it some time later."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"begin\n"
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("aside", [False, True])
def test_a_folder_survives_kill_at_any_moment(tmp_path: Path, aside: bool) -> None:
    place, draw, generation = tmp_path / "out", random.Random(5), 0
    program = KILLED.replace("place = Path", "from ratoon.store import atomic\nplace = Path")
    if aside:
        program = program.replace('print("begin"', 'atomic._exchange = lambda one, other: False\nprint("begin"')
    with atomic_folder(place) as folder:
        write_text(folder / "part-0", "0")
        seal(folder, "model", facts={"generation": 0}, packages=())
    moved = 0
    for _ in range(7):
        kill_after([sys.executable, "-c", program, str(place), str(generation)], draw.uniform(0.0, 0.25))
        if aside:
            sweep(tmp_path)
        found = read_manifest(place, "model", check="hash").facts["generation"]
        assert found >= generation
        assert found == 0 or {path.read_text() for path in place.glob("part-*")} == {str(found)}
        state = tmp_path / "state.json"
        assert not state.exists() or json.loads(state.read_text())["generation"] <= found
        sweep(tmp_path)
        assert set(names(tmp_path)) <= {"out", "state.json"}
        moved += found > generation
        generation = found
    assert moved >= 3, "the kills came before anything was written"


PREPARE = """
import os, sys
from ratoon.data.prepare import prepare
os.fsync = lambda handle: None
print("begin", flush=True)
done = prepare([sys.argv[1]], sys.argv[2], vocab_size=400, replace=True)
print(done.manifest.hash)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_prepare_survives_kill_at_any_moment(tmp_path: Path) -> None:
    source, place, draw = tmp_path / "in.jsonl", tmp_path / "work" / "out", random.Random(7)
    words = [f"word{number % 97}" for number in range(20)]
    with open(source, "w", encoding="utf-8") as handle:
        for number in range(1500):
            handle.write(json.dumps({"text": " ".join(draw.sample(words, 9)) + f" {number}"}) + "\n")
    command = [sys.executable, "-c", PREPARE, str(source), str(place)]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    took = time.monotonic() - began
    wanted = read_manifest(place, "shards", check="hash").hash
    killed = 0
    for number in range(8):
        if number == 4:  # from here on nothing stands there before
            for path in sorted(place.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            place.rmdir()
        kill_after(command, draw.uniform(0, took))
        killed += bool({*names(place.parent)} - {"out"})
        if place.exists():
            assert read_manifest(place, "shards", check="hash").hash == wanted
        else:
            assert number >= 4
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == wanted
    assert read_manifest(place, "shards", check="hash").hash == wanted
    assert names(place.parent) == ["out"]
