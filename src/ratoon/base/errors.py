"""What an error is in Ratoon: what was found, where, what was expected, what to do.

Decides the classes of errors and how they read. Exit codes of the command line are attributes of the
classes; printing them is the business of `cli/`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class RatoonError(Exception):
    """An error a user can act on.

    `found` is one sentence; `where` names file, line or key; `expected` and `fix` say what would have
    been right and what to do. The message is the four in that order, each on a line of its own.
    """

    exit_code = 1

    def __init__(
        self,
        found: str,
        *,
        where: str | os.PathLike[str] | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.found = found
        self.where = None if where is None else os.fspath(where)
        self.expected = expected
        self.fix = fix
        lines = [found]
        if self.where:
            lines.append(f"  where:    {self.where}")
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  to do:    {fix}")
        super().__init__("\n".join(lines))

    def as_dict(self) -> dict[str, str | None]:
        """The error as plain fields, for `--json`."""
        return {
            "error": type(self).__name__,
            "found": self.found,
            "where": self.where,
            "expected": self.expected,
            "fix": self.fix,
        }


class ConfigError(RatoonError):
    """A setting is unknown, of the wrong type, or impossible together with another."""

    exit_code = 2


class DataError(RatoonError):
    """Data that the user gave cannot be used as it is."""

    exit_code = 2


class ArtifactError(RatoonError):
    """A file or folder that Ratoon or another program wrote is missing, torn, or belongs elsewhere."""

    exit_code = 2


class NumericError(RatoonError):
    """A number stopped being finite. Raised before it can reach the weights."""

    exit_code = 1


class StorageError(RatoonError):
    """The disk refused: no space, no permission. What stood there before is untouched."""

    exit_code = 1


class GateError(RatoonError):
    """A check that guards a promotion or a run said no."""

    exit_code = 3


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EROFS, errno.EIO, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


@contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the error of a full, read-only or failing disk, whoever raised it, into a `StorageError` naming `path`."""
    try:
        yield
    except RatoonError:
        raise
    except Exception as error:
        # Libraries that write through their own runtime (safetensors, arrow) raise errors of their own class, with
        # the system's number in the words.
        words = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(words.group(1)) if words else None
        if number in _FULL or "No space left" in str(error):
            found, expected, first = "the disk is full", "room for the whole file beside the old one", "free some space"
        elif number in _REFUSED:
            found = f"the file could not be written: {getattr(error, 'strerror', None) or error}"
            expected, first = "a folder that can be written to", "mend what stands in the way"
        else:
            raise
        raise StorageError(
            found,
            where=path,
            expected=expected,
            fix=f"{first} or choose another folder, then run the same command again (with --resume for a run); "
            "what stood there before is whole",
        ) from error
