"""The line that says how far a run is: on a terminal it moves, elsewhere a line comes now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 10.0


class TrainingLine:
    """Takes the records of a run and shows loss, speed, memory and the time left on stderr."""

    def __init__(self, steps: int | None, budget_minutes: float | None) -> None:
        self.steps, self.budget_seconds = steps, None if budget_minutes is None else 60 * budget_minutes
        self.moving = sys.stderr.isatty()
        self.shown_at = 0.0
        self.held_out: float | None = None
        self._began: tuple[float, float] | None = None
        self._width = 0

    def __call__(self, record: dict[str, Any]) -> None:
        """Show a record, if it is one that changes the line."""
        if record["kind"] == "eval":
            self.held_out = record.get("loss")
            self._write(f"step {record['step']:,}: held-out loss {record.get('loss', float('nan')):.4f}", stays=True)
        elif record["kind"] == "train":
            now = time.monotonic()
            if self.moving or now - self.shown_at >= LINE_SECONDS or record["step"] == 1:
                self.shown_at = now
                self._write(self._line(record), stays=not self.moving)

    def _line(self, record: dict[str, Any]) -> str:
        left = self.left_seconds(record)
        parts = [
            f"step {record['step']:,}" + (f"/{self.steps:,}" if self.steps else ""),
            f"loss {record['loss']:.4f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['memory_bytes'] / 2**30:.1f} GiB",
        ]
        if left is not None:
            parts.append(f"{_clock(left)} left")
        return " · ".join(parts)

    def left_seconds(self, record: dict[str, Any]) -> float | None:
        """Seconds until the end, from the pace of the steps (or from the budget)."""
        seconds = float(record["time_seconds"])
        if self.budget_seconds is not None:
            return max(0.0, self.budget_seconds - seconds)
        if self.steps is None:
            return None
        step = float(record["step"])
        if self._began is None:  # the first step compiles: it says nothing about the pace
            self._began = (step, seconds)
            return None
        steps, took = step - self._began[0], seconds - self._began[1]
        return (self.steps - step) * took / steps if steps > 0 else None

    def _write(self, text: str, *, stays: bool) -> None:
        if self.moving:
            sys.stderr.write("\r" + text.ljust(self._width) + ("\n" if stays else ""))
            self._width = 0 if stays else len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the line."""
        if self.moving and self._width:
            sys.stderr.write("\n")
            self._width = 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
