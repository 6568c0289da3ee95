"""Asking a run to save, or to save and stop, from outside: signals, and a file for systems without them."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Wishes:
    """What was asked of the run since the last look.

    Ctrl-C or SIGTERM: save after this step, then stop; a second one stops at once. SIGUSR1, or a file named `save` in
    the run's folder: save and go on. Signals are caught between `__enter__` and `__exit__`, in the main thread only.
    """

    def __init__(self, folder: Path | None) -> None:
        self.stop = False
        self._save = False
        self._file = None if folder is None else folder / "save"
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Wishes:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_stop)
            if hasattr(signal, "SIGUSR1"):
                self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        if self._file is not None and self._file.exists():
            self._file.unlink(missing_ok=True)
            asked = True
        return asked
