"""Seconds to read SmolLM2's GGUF file and write it as safetensors, beside Transformers' reading alone, by turns.

    python benchmarks/gguf_speed.py --rounds 5

A fresh process for each reading: importing, reading and writing are told apart, and the process's whole time is the
parent's. Both read into float32. Transformers only reads: it refuses to save what it has read from such a file. Prints
a table in Markdown; `--json FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workers import ratio

PARTS = ("import", "read", "write", "process")


def work(way: str, file: str, folder: str) -> None:
    """In the fresh process: one reading and writing; prints the seconds of each part."""
    clock = [time.perf_counter()]
    if way == "ratoon":
        from ratoon.generate.lm import load

        clock.append(time.perf_counter())
        lm = load(file, device="cpu")
        clock.append(time.perf_counter())
        lm.save(folder)  # Transformers refuses to save what it read from a GGUF file: its part ends with reading
    else:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        clock.append(time.perf_counter())
        place = Path(file)
        AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, dtype="float32")
    clock.append(time.perf_counter())
    print(json.dumps({name: b - a for name, a, b in zip(PARTS, clock, clock[1:], strict=False)}))


def fresh(way: str, file: str) -> dict[str, float]:
    """The seconds of one reading in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--work", way, file, os.path.join(place, "model")]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        whole = time.perf_counter() - began
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": whole}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m-instruct", help="a name of the catalogue, or a GGUF file")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", default=None)
    options.add_argument("--work", nargs=3, metavar=("WAY", "FILE", "DIR"), help="one reading, in this process")
    chosen = options.parse_args()
    if chosen.work:
        return work(*chosen.work)

    from ratoon.generate.lm import locate

    file = str(locate(chosen.model).resolve())
    with open(file, "rb") as handle:  # from the disk once: both then read what the system keeps in memory
        while handle.read(1 << 24):
            pass
    seconds: dict[str, dict[str, list[float]]] = {part: {"ratoon": [], "transformers": []} for part in PARTS}
    for number in range(1 + chosen.rounds):
        for way in ("ratoon", "transformers") if number % 2 == 0 else ("transformers", "ratoon"):
            found = fresh(way, file)
            if number:  # the first round is a warm-up
                for part, value in found.items():
                    seconds[part][way].append(value)
            print(way, {part: round(value, 2) for part, value in found.items()}, file=sys.stderr, flush=True)
    print(f"{chosen.rounds} rounds after 1 warm-up, {os.path.getsize(file) / 1e6:.0f} MB\n")
    print("| seconds (median) | ratoon | transformers | times as fast |")
    print("|---|---:|---:|---:|")
    names = {
        "import": "importing",
        "read": "reading",
        "write": "writing safetensors",
        "process": "whole process (Transformers': without writing)",
    }
    for part, told in names.items():
        ours = f"{statistics.median(seconds[part]['ratoon']):.2f}"
        if part == "write":
            print(f"| {told} | {ours} | refused | |")
            continue
        versus = ratio(seconds[part], "transformers", "ratoon")
        peers = f"{statistics.median(seconds[part]['transformers']):.2f}"
        print(f"| {told} | {ours} | {peers} | {versus[0]:.1f} ({versus[1]:.1f}–{versus[2]:.1f}) |")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(seconds, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
