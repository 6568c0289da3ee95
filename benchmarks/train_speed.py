"""Tokens per second and memory of training: Ratoon beside Transformers' GPT-2, by turns in one run.

    python benchmarks/train_speed.py --text input.txt --shape M --rounds 7

`--text`: tinyshakespeare (`ratoon pull shakespeare`). Prints a table in Markdown; `--json FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from train_worker import SHAPES
from workers import Worker, alternate, ratio

SECONDS_A_BLOCK = 4.0


def flops_a_token(shape: dict[str, int], parameters: int, vocab: int) -> float:
    """6 for each weight of a matrix, and attention's two products, of which the causal half is needed."""
    D, L, T = shape["width"], shape["layers"], shape["context"]
    matrices = L * 12 * D * D + D * vocab
    return 6 * matrices + 6 * L * T * D


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", required=True)
    options.add_argument("--shape", choices=list(SHAPES), default="M")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--peers", default="all", help="all, or names such as bf16-compiled, separated by commas")
    options.add_argument("--ours", default="gpt2,default,default-muon")
    options.add_argument("--no-tuned", action="store_true", help="without the peer's tuned allocator")
    options.add_argument("--json", default=None)
    chosen = options.parse_args()
    shape = SHAPES[chosen.shape]
    common = {"text": chosen.text, "shape": chosen.shape, "warm_up": 3 if chosen.shape == "S" else 2}

    peers = {
        f"{short}-{'compiled' if compiled else 'eager'}": {"way": "peer", "precision": precision, "compile": compiled}
        for short, precision in (("float32", "float32"), ("bf16", "autocast-bf16"))
        for compiled in (False, True)
    }
    if chosen.peers != "all":
        peers = {name: peers[name] for name in chosen.peers.split(",") if name}
    workers: list[Worker] = []

    def start(name: str, way: dict[str, Any]) -> None:
        print(f"starting {name}", file=sys.stderr, flush=True)
        workers.append(Worker(name, "train_worker.py", {**common, **way}))

    for name, way in peers.items():
        start(f"peer {name}", way)
    if len(workers) > 1:  # the best of the peer's forms is the one that the rest is compared with
        units = units_of(workers)
        first = alternate(workers, units, 2)
        best = max(first, key=lambda name: statistics.median(first[name]))
    else:
        best = workers[0].name if workers else ""
    if best and not chosen.no_tuned:
        start("peer tuned", {**peers[best.removeprefix("peer ")], "allocator": True})
    for name in chosen.ours.split(","):  # e.g. gpt2, default, default-muon
        kind, _, optimizer = name.partition("-")
        start(f"ratoon {name}", {"way": "ratoon", "kind": kind, "train": {"optimizer": optimizer or "adamw"}})
    start("matmul bf16", {"way": "matmul", "n": 4096, "dtype": "bfloat16"})
    speeds = alternate(workers, units_of(workers), chosen.rounds)
    report(chosen, shape, workers, speeds, best)
    for worker in workers:
        worker.close()


def units_of(workers: list[Worker]) -> dict[str, int]:
    """How many units of work of each worker fill a block of time."""
    found = {}
    for worker in workers:
        once = worker.go(1)["seconds"]
        some = max(1, round(0.5 / once))
        found[worker.name] = max(1, round(SECONDS_A_BLOCK * some / worker.go(some)["seconds"]))
    return found


def report(
    chosen: Any, shape: dict[str, int], workers: list[Worker], speeds: dict[str, list[float]], best: str
) -> None:
    """The table, and the file with every figure."""
    ceiling = statistics.median(speeds["matmul bf16"])
    vocab = next(worker.facts["vocab"] for worker in workers if "vocab" in worker.facts)
    print(f"shape {chosen.shape}: {shape}, {chosen.rounds} rounds, bf16 products {ceiling / 1e9:,.0f} GFLOP/s\n")
    print("| | tokens/s (median) | against the peer's best | share of the ceiling | peak memory MiB | above start |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = []
    for worker in workers:
        if worker.name == "matmul bf16":
            continue
        speed = statistics.median(speeds[worker.name])
        share = [
            rate * flops_a_token(shape, worker.facts["parameters"], vocab) / top
            for rate, top in zip(speeds[worker.name], speeds["matmul bf16"], strict=True)
        ]
        versus = ratio(speeds, worker.name, best) if best else (float("nan"),) * 3
        peak = worker.facts["peak_bytes"] / 2**20
        above = peak - worker.facts["before_bytes"] / 2**20
        print(
            f"| {worker.name} | {speed:,.0f} | {versus[0]:.2f} ({versus[1]:.2f}–{versus[2]:.2f}) | "
            f"{statistics.median(share):.0%} | {peak:,.0f} | {above:,.0f} |"
        )
        rows.append({"name": worker.name, "speeds": speeds[worker.name], "facts": worker.facts})
    if chosen.json:
        facts = {"shape": shape, "ceiling": speeds["matmul bf16"], "cores": os.cpu_count(), "rows": rows, "best": best}
        Path(chosen.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
