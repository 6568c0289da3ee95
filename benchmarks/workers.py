"""Processes that are measured by turns: each holds one way of doing the work, does a block of it when asked, and
says how long it took.

A process of its own for each way, since an allocator, a compiler's cache and a thread pool belong to a process: what
one way sets must not help or hurt another. Only one of them works at any time.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Worker:
    """One way of doing the work, in a process that waits between its blocks."""

    def __init__(
        self,
        name: str,
        script: str,
        options: dict[str, Any],
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.facts = self._answer()  # after the warm-up

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker '{self.name}' ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def go(self, units: int) -> dict[str, Any]:
        """Do `units` of work; the answer holds at least `seconds` and `done` (tokens)."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{units}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process, by closing what it listens to."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Turns:
    """The worker's side, inside a loop that runs by itself: the loop calls `step()` before each step, which waits
    whenever what was asked for is done. In the loop's own thread: a second one would have a pool of threads of its
    own, and two pools on two cores wait for each other."""

    def __init__(self, warm_up: int, a_step: int, facts: dict[str, Any] | None = None) -> None:
        self.left, self.asked, self.a_step, self.facts = warm_up, warm_up, a_step, facts or {}
        self.counted = 0
        self.began = time.perf_counter()

    def count(self, done: int) -> None:
        """Book work of a step whose size is its own, in place of `a_step`."""
        self.counted += done

    def step(self) -> None:
        """Go on if something is left of what was asked for; else answer, and wait for more. Ends the process when
        the parent closes the pipe."""
        if self.left == 0:
            done = self.counted or self.asked * self.a_step
            answer = {"seconds": time.perf_counter() - self.began, "done": done}
            print(json.dumps({**self.facts, **answer, "peak_bytes": peak_bytes()}), file=sys.__stdout__, flush=True)
            line = sys.stdin.readline()
            if not line:
                sys.exit()
            self.left = self.asked = int(line)
            self.counted = 0
            self.began = time.perf_counter()
        self.left -= 1


def peak_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alternate(workers: list[Worker], units: dict[str, int], rounds: int) -> dict[str, list[float]]:
    """`rounds` rounds in which each worker has its turn, in an order that turns about; tokens per second of each."""
    speeds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            answer = worker.go(units[worker.name])
            worker.facts.update(answer)
            speeds[worker.name].append(answer["done"] / answer["seconds"])
        print(
            f"round {number + 1}/{rounds}: " + ", ".join(f"{name} {found[-1]:,.0f}" for name, found in speeds.items()),
            file=sys.stderr,
            flush=True,
        )
    return speeds


def ratio(speeds: dict[str, list[float]], ours: str, peer: str) -> tuple[float, float, float]:
    """Median, smallest and largest of the rounds' ratios ours / peer."""
    found = [a / b for a, b in zip(speeds[ours], speeds[peer], strict=True)]
    return statistics.median(found), min(found), max(found)
