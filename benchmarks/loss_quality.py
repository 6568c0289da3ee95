"""Held-out loss after equal tokens: Ratoon beside Transformers' GPT-2, from the same first weights, on equal batches.

    python benchmarks/loss_quality.py --text input.txt --shape S --steps 2000
    python benchmarks/loss_quality.py --text input.txt --minutes 8 [--size medium]

`--text`: tinyshakespeare (`ratoon pull shakespeare`); its first nine tenths are learned from, all of the last tenth is
held out. Loss is in nats a character, in float32, of rows as long as the context, by the same code for each way. The
same AdamW, schedule (warm-up, cosine to a tenth) and clipping on both sides; Ratoon's default architecture is trained
with Muon at the learning rates that recipes have, on the same batches. `--minutes`: Ratoon alone, the best loss it
reaches in that time. Prints tables in Markdown; `--json FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from workers import HERE

SAME_FIRST_LOSS = 1e-4


def once(options: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, str(HERE / "loss_worker.py"), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float]) -> float:
    """Standard deviation, where there is more than one value."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean difference of pairs with its 95 % interval (Student's)."""
    from ratoon.evaluate.interval import student_975

    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    reach = student_975(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - reach, mean + reach


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", required=True)
    options.add_argument("--shape", choices=["S", "M"], default="S")
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's peak, for both")
    options.add_argument(
        "--precision", choices=["autocast-bf16", "float32"], default="autocast-bf16", help="the peer's"
    )
    options.add_argument("--ways", default="transformers,ratoon gpt2,ratoon default-muon")
    options.add_argument("--minutes", type=float, default=None, help="Ratoon alone, for so long")
    options.add_argument("--size", default=None, help="with --minutes: the dial, in place of what the minutes mean")
    options.add_argument("--json", default=None)
    chosen = options.parse_args()
    seeds = range(1, chosen.seeds + 1)
    if chosen.minutes is not None:
        results = {"ratoon": [timed(chosen, seed) for seed in seeds]}
        report_timed(chosen, results["ratoon"])
    else:
        results = equal_tokens(chosen, seeds)
        report(chosen, results)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def timed(chosen: Any, seed: int) -> dict[str, Any]:
    """One run by the clock."""
    found = once({"way": "timed", "text": chosen.text, "minutes": chosen.minutes, "size": chosen.size, "seed": seed})
    print(f"seed {seed}: {found['evaluated']}", file=sys.stderr, flush=True)
    return found


def equal_tokens(chosen: Any, seeds: range) -> dict[str, list[dict[str, Any]]]:
    """Every way with every seed."""
    adamw = {
        "steps": chosen.steps,
        "optimizer": "adamw",
        "learning_rate": chosen.learning_rate,
        "schedule": "cosine",
        "warmup_steps": min(100, chosen.steps // 10),
        "final_fraction": 0.1,
    }
    known: dict[str, dict[str, Any]] = {
        "transformers": {"way": "peer", "precision": chosen.precision, "train": adamw},
        "ratoon gpt2": {"way": "ratoon", "kind": "gpt2", "train": adamw},
        "ratoon default-muon": {"way": "ratoon", "kind": "default", "train": {"steps": chosen.steps}},
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.ways.split(",")}
    if unknown := results.keys() - known.keys():
        raise SystemExit(f"--ways: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    for seed in seeds:
        for name, found in results.items():
            found.append(once({"text": chosen.text, "shape": chosen.shape, "seed": seed, **known[name]}))
            print(
                f"seed {seed}, {name}: {found[-1]['first']:.4f} -> {found[-1]['last']:.4f}", file=sys.stderr, flush=True
            )
    return results


def report(chosen: Any, results: dict[str, list[dict[str, Any]]]) -> None:
    """The table. Raises when the same architecture did not begin with the same weights."""
    peers = results.get("transformers", [])
    for ours, theirs in zip(results.get("ratoon gpt2", []), peers, strict=False):
        if abs(ours["first"] - theirs["first"]) > SAME_FIRST_LOSS:
            raise SystemExit(f"not the same first weights: loss {ours['first']:.6f} and {theirs['first']:.6f}")
    tokens = next(iter(results.values()))[0]["tokens"]
    precision = f"peer in {chosen.precision}, compiled"
    print(f"shape {chosen.shape}, {chosen.steps} steps, {tokens:,} tokens, {chosen.seeds} seeds; {precision}\n")
    print("| | parameters | held-out loss (mean) | spread over seeds | less the peer's (95 % interval) |")
    print("|---|---:|---:|---:|---:|")
    for name, found in results.items():
        last = [one["last"] for one in found]
        line = f"| {name} | {found[0]['parameters']:,} | {statistics.fmean(last):.4f} | {spread(last):.4f} |"
        if peers and name != "transformers":
            mean, low, high = interval([a - b["last"] for a, b in zip(last, peers, strict=True)])
            line += f" {mean:+.4f} ({low:+.4f} to {high:+.4f})"
        print(line + " |")


def report_timed(chosen: Any, found: list[dict[str, Any]]) -> None:
    """The table of runs by the clock."""
    print(f"{chosen.minutes:g} minutes, {chosen.seeds} seeds\n")
    print("| seed | parameters | steps | tokens | best held-out loss | at step | last |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for seed, one in enumerate(found, start=1):
        step, best = min([*one["evaluated"], (one["steps"], one["last"])], key=lambda pair: pair[1])
        counts = f"{one['parameters']:,} | {one['steps']:,} | {one['tokens']:,}"
        print(f"| {seed} | {counts} | {best:.4f} | {step:,} | {one['last']:.4f} |")


if __name__ == "__main__":
    main()
