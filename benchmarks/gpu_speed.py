"""Tokens per second of training on one GPU, and the share of its peak: Ratoon beside Transformers' GPT-2, by turns.

    python benchmarks/gpu_speed.py --rounds 7 [--peak-tflops 989]

The shape is GPT-2's small one: 12 layers, 768 wide, rows of 1,024 tokens, 50,257 tokens in the vocabulary (124 million
parameters); the tokens are random, which is as good for speed. `--peak-tflops`: what the maker says of bfloat16
products without sparsity, to give the share of that, too; the measured ceiling is always there. `--shape S` is a trial
of this script wherever there is no GPU, and no figure to keep. `--json FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from train_speed import flops_a_token, units_of
from train_worker import SHAPES
from workers import Worker, alternate, ratio

VOCAB = 50_257
TRIAL_VOCAB = 512
MATMUL = "matmul bf16"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=["gpt2", "S"], default="gpt2")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--peers", default="autocast-bf16,autocast-bf16 compiled")
    options.add_argument("--ours", default="gpt2,default,default-muon")
    options.add_argument("--peak-tflops", type=float, default=None, help="the maker's figure for bfloat16 products")
    options.add_argument("--json", default=None)
    chosen = options.parse_args()

    import torch

    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    elif chosen.shape == "gpt2":
        print("no GPU: not run (`--shape S` tries this script on the CPU)")
        return
    else:
        where = "no GPU: a trial of the script on the CPU, no figures to keep"
    trial = chosen.shape != "gpt2"
    common = {"text": None, "vocab": TRIAL_VOCAB if trial else VOCAB, "shape": chosen.shape, "warm_up": 3}
    workers: list[Worker] = []

    def start(name: str, way: dict[str, Any]) -> None:
        print(f"starting {name}", file=sys.stderr, flush=True)
        workers.append(Worker(name, "train_worker.py", {**common, **way}))

    for name in chosen.peers.split(","):
        precision, _, compiled = name.partition(" ")
        start(f"peer {name}", {"way": "peer", "precision": precision, "compile": compiled == "compiled"})
    for name in chosen.ours.split(","):
        kind, _, optimizer = name.partition("-")
        start(f"ratoon {name}", {"way": "ratoon", "kind": kind, "train": {"optimizer": optimizer or "adamw"}})
    start(MATMUL, {"way": "matmul", "n": 1024 if trial else 8192, "dtype": "bfloat16"})
    speeds = alternate(workers, units_of(workers), chosen.rounds)
    report(chosen, where, workers, speeds, common["vocab"])
    for worker in workers:
        worker.close()


def report(chosen: Any, where: str, workers: list[Worker], speeds: dict[str, list[float]], vocab: int) -> None:
    """The table, and the file with every figure."""
    shape = SHAPES[chosen.shape]
    ceiling = statistics.median(speeds[MATMUL])
    peers = [worker.name for worker in workers if worker.name.startswith("peer")]
    best = max(peers, key=lambda name: statistics.median(speeds[name]))
    print(f"{where}\n\nshape {chosen.shape}: {shape}, vocabulary {vocab:,}, {chosen.rounds} rounds; ", end="")
    print(f"bf16 products {ceiling / 1e12:.3g} TFLOP/s\n")
    maker = chosen.peak_tflops
    last, line = (" share of the maker's peak |", "---:|") if maker else ("", "")
    print(f"| | tokens/s (median) | against the peer's best | share of the ceiling | GPU memory MiB |{last}")
    print(f"|---|---:|---:|---:|---:|{line}")
    for worker in workers:
        if worker.name == MATMUL:
            continue
        versus = ratio(speeds, worker.name, best)
        rate = statistics.median(speeds[worker.name]) * flops_a_token(shape, worker.facts["parameters"], vocab)
        memory = worker.facts.get("gpu_peak_bytes")
        told = f"{memory / 2**20:,.0f}" if memory is not None else "–"
        end = f" {rate / (maker * 1e12):.0%} |" if maker else ""
        print(
            f"| {worker.name} | {statistics.median(speeds[worker.name]):,.0f} | {versus[0]:.2f} "
            f"({versus[1]:.2f}–{versus[2]:.2f}) | {rate / ceiling:.0%} | {told} |{end}"
        )
    if chosen.json:
        facts = {"where": where, "speeds": speeds, "workers": {worker.name: worker.facts for worker in workers}}
        Path(chosen.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
