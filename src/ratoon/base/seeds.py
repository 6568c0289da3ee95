"""Named random streams: each use of chance has a name, and one seed gives them all.

A stream depends on the seed and its names only, never on what was drawn elsewhere, so adding a use of
chance changes no other, and a resumed run needs no history to draw what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` under `seed`; for `torch.Generator.manual_seed`."""
    plain = [str(name).replace("\\", r"\\").replace("\x1f", r"\u") for name in names]
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{word}" for name, word in zip(names, plain, strict=True))])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The NumPy generator of the stream called `names` under `seed`."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))
