"""C code of Ratoon, compiled once for this machine where a C compiler is, and kept in Ratoon's folder.

Decides how and where it is built. What the code does, and what happens where there is none, is its caller's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ratoon.store.atomic import write_bytes

_FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC")


class Unavailable(Exception):
    """There is no compiled code on this machine; the message says why."""


@functools.cache
def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The compiled `source`, built with `flags` for this processor. Raises `Unavailable` where that cannot be."""
    from ratoon.base.catalog import home

    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        raise Unavailable("there is no C compiler (cc, gcc or clang)")
    tuned = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    words = [compiler, *_FLAGS, *flags, tuned]
    key = hashlib.sha256(b"\0".join([source.read_bytes(), *map(str.encode, words), _cpu()])).hexdigest()[:16]
    path = home() / "native" / f"{source.stem}-{key}.so"
    if not path.is_file():
        _compile([*words, str(source), "-lm"], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled {source.name} cannot be loaded: {error}") from None


def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            line = next((line for line in handle if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def _cpu() -> bytes:
    """What `-march=native` depends on: a folder shared by several machines keeps one file for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / path.name
        try:
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"the C compiler did not run: {error}") from None
        if done.returncode:
            raise Unavailable(f"the C compiler refused: {done.stderr.strip().splitlines()[-1:]}")
        write_bytes(path, built.read_bytes())
