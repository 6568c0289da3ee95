"""Tokens per second, memory and loss of fine-tuning SmolLM2-135M: Ratoon beside Transformers + PEFT, by turns.

    python benchmarks/tune_speed.py --text wiki.txt --method lora
    python benchmarks/tune_speed.py --questions banking77/train.csv --method lora

`--text`: running text, rows of 256 tokens, 8 a step. `--questions`: a csv with `text` and `category`; real tokens are
counted, not padding. `ratoon int8` has `train.frozen_products: int8`. The model is `smollm2-135m-instruct` of the
catalogue (`ratoon pull`); the peer reads it as a folder that is exported first. Prints a table in Markdown; `--json
FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from workers import Worker, alternate, ratio

MODEL = "smollm2-135m-instruct"
SECONDS_A_BLOCK = 8.0
COMMON_STEPS = 20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text")
    options.add_argument("--questions")
    options.add_argument("--method", choices=["lora", "full"], default="lora")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--peers", default="bf16,autocast-bf16,bf16-tuned")
    options.add_argument("--json", default=None)
    chosen = options.parse_args()
    if (chosen.text is None) == (chosen.questions is None):
        options.error("give --text or --questions")
    from ratoon.cli.export import export

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        export(MODEL, folder, dtype="float32")
        common = {
            "model": MODEL,
            "folder": str(folder),
            "method": chosen.method,
            "data": chosen.text or chosen.questions,
            "data_kind": "rows" if chosen.text else "short",
            "warm_up": 2,
        }
        workers = []
        for name in chosen.peers.split(","):
            precision, _, tuned = name.partition("-tuned")
            told = {"way": "peer", "precision": precision, "allocator": name.endswith("-tuned")}
            print(f"starting peer {name}", file=sys.stderr, flush=True)
            workers.append(Worker(f"peer {name}", "tune_worker.py", {**common, **told}))
        for name in ["ratoon", *(["ratoon int8"] if chosen.method == "lora" else [])]:
            print(f"starting {name}", file=sys.stderr, flush=True)
            products = "int8" if name.endswith("int8") else "exact"
            workers.append(Worker(name, "tune_worker.py", {**common, "way": "ratoon", "products": products}))
        units = {}
        for worker in workers:
            first = worker.go(2)
            units[worker.name] = max(1, round(2 * SECONDS_A_BLOCK / first["seconds"]))
        speeds = alternate(workers, units, chosen.rounds)
        report(chosen, workers, speeds)
        for worker in workers:
            worker.close()


def report(chosen: Any, workers: list[Worker], speeds: dict[str, list[float]]) -> None:
    """The table, and every figure as JSON where that is asked for."""
    found: list[dict[str, Any]] = []
    common = min(COMMON_STEPS, *(len(worker.facts.get("losses", [])) for worker in workers))
    print("| way | tokens/s | ratoon against it | ratoon int8 | peak MiB | ratoon's share | loss of steps 1 to N |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    last = workers[-1].name
    ours = next(worker for worker in workers if worker.name == "ratoon")
    for worker in workers:
        middle, low, high = ratio(speeds, "ratoon", worker.name)
        other = "{:.2f} ({:.2f}-{:.2f})".format(*ratio(speeds, last, worker.name)) if last != "ratoon" else ""
        losses = worker.facts.get("losses", [])[:common]
        loss = statistics.mean(losses) if losses else float("nan")
        peak = worker.facts["peak_bytes"]
        share = ours.facts["peak_bytes"] / peak
        print(
            f"| {worker.name} | {statistics.median(speeds[worker.name]):,.0f} | {middle:.2f} ({low:.2f}-{high:.2f}) | "
            f"{other} | {peak / 2**20:,.0f} | {share:.2f} | {loss:.4f} (N = {common}) |"
        )
        found.append({"name": worker.name, "speeds": speeds[worker.name], "ratio": middle, "peak_bytes": peak,
                      "loss": loss, "steps": common})  # fmt: skip
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
