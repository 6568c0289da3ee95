"""Tokens per second of generation, one prompt, greedy: Ratoon beside Transformers and llama.cpp, by turns in one run.

    python benchmarks/generate_speed.py --rounds 7 [--llama-python PYTHON]

The model is SmolLM2-135M-Instruct (`ratoon pull smollm2-135m-instruct`); 105 tokens in, 128 out, end tokens ignored.
`--llama-python`: a Python that can import `llama_cpp`; without it llama.cpp is measured where this one can. Prints a
table in Markdown; `--json FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

from workers import HERE, Worker, ratio

SCRIPT = "generate_worker.py"


def once(options: dict[str, Any]) -> dict[str, Any]:
    """A worker's answer that needs no turns."""
    done = subprocess.run(
        [sys.executable, str(HERE / SCRIPT), json.dumps(options)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def llama_python(given: str | None) -> str | None:
    """A Python that imports llama_cpp, if there is one. A given one that cannot is an error."""
    python = given or sys.executable
    done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if done.returncode == 0:
        return python
    if given:
        raise SystemExit(f"{given} cannot import llama_cpp: {done.stderr.strip().splitlines()[-1]}")
    return None


def measure(workers: list[Worker], new: int, rounds: int, units: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each worker in each round: of the whole call, and of decoding alone."""
    speeds: dict[str, dict[str, list[float]]] = {kind: {w.name: [] for w in workers} for kind in ("whole", "decode")}
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            answer = worker.go(units)
            worker.facts.update(answer)
            whole = statistics.median(answer["whole_seconds"][-units:])
            first = statistics.median(answer["first_seconds"][-units:])
            speeds["whole"][worker.name].append(new / whole)
            speeds["decode"][worker.name].append((new - 1) / (whole - first))
        said = ", ".join(f"{name} {found[-1]:,.1f}" for name, found in speeds["whole"].items())
        print(f"round {number + 1}/{rounds}: {said}", file=sys.stderr, flush=True)
    return speeds


def same_tokens(workers: list[Worker]) -> list[str]:
    """Up to which token each way agrees with Ratoon in float32. Raises when a float32 way does not to the end."""
    exact = workers[0].facts["ids"]
    said = []
    for worker in workers[1:]:
        ids = worker.facts["ids"]
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(exact, ids, strict=True)))
        if "float32" in worker.name and alike < len(exact):
            raise SystemExit(f"{worker.name} gives another token at {alike + 1}: {ids[alike]}, not {exact[alike]}")
        agrees = "the same tokens" if alike == len(exact) else f"the same {alike} of {len(exact)} tokens at first"
        said.append(f"{worker.name}: {agrees}")
    return said


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m-instruct", help="a name of the catalogue, or a GGUF file")
    options.add_argument("--prompt-tokens", type=int, default=105)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--calls", type=int, default=1, help="calls of each way in a round, whose median counts")
    options.add_argument("--llama-python", default=None, help="a Python that can import llama_cpp")
    options.add_argument("--json", default=None)
    chosen = options.parse_args()

    from ratoon.generate.lm import locate

    model = str(locate(chosen.model).resolve())
    python = llama_python(chosen.llama_python)
    common = {"model": model, "new": chosen.new_tokens, "warm_up": 1}
    common["prompt"] = once({"way": "prompt", "model": model, "prompt_tokens": chosen.prompt_tokens})["ids"]
    workers: list[Worker] = []

    def start(name: str, way: dict[str, Any], python: str = sys.executable) -> None:
        print(f"starting {name}", file=sys.stderr, flush=True)
        workers.append(Worker(name, SCRIPT, {**common, **way}, python=python))

    with tempfile.TemporaryDirectory() as folder:
        print("Transformers reads the file, once", file=sys.stderr, flush=True)
        once({"way": "save_peer", "model": model, "folder": folder})
        for dtype in ("float32", "bfloat16"):
            start(f"ratoon {dtype}", {"way": "ratoon", "dtype": dtype})
        for dtype in ("float32", "bfloat16"):
            start(f"transformers {dtype}", {"way": "peer", "dtype": dtype, "folder": folder})
        if python is None:
            print("llama.cpp: not measured, no llama_cpp to import", file=sys.stderr)
        else:
            start("llama.cpp", {"way": "llama"}, python)
        speeds = measure(workers, chosen.new_tokens, chosen.rounds, chosen.calls)
        agreed = same_tokens(workers)
        for worker in workers:
            worker.close()
    report(chosen, workers, speeds, agreed)


def report(chosen: Any, workers: list[Worker], speeds: dict[str, dict[str, list[float]]], agreed: list[str]) -> None:
    """The table, and the file with every figure."""
    whole, decode = speeds["whole"], speeds["decode"]
    peers = [worker.name for worker in workers if worker.name.startswith("transformers")]
    best = max(peers, key=lambda name: statistics.median(whole[name]))
    print(f"{chosen.prompt_tokens} tokens in, {chosen.new_tokens} out, {chosen.rounds} rounds; best peer: {best}\n")
    llama = any(worker.name == "llama.cpp" for worker in workers)
    last = " against llama.cpp |" if llama else ""
    print(f"| | tokens/s, whole call (median) | against the peer's best | decoding alone | against the peer's |{last}")
    print("|---|---:|---:|---:|---:|" + ("---:|" if llama else ""))
    for worker in workers:
        versus, alone = ratio(whole, worker.name, best), ratio(decode, worker.name, best)
        line = (
            f"| {worker.name} | {statistics.median(whole[worker.name]):,.1f} | "
            f"{versus[0]:.2f} ({versus[1]:.2f}–{versus[2]:.2f}) | {statistics.median(decode[worker.name]):,.1f} | "
            f"{alone[0]:.2f} ({alone[1]:.2f}–{alone[2]:.2f}) |"
        )
        if llama:
            gap = ratio(whole, worker.name, "llama.cpp")
            line += f" {gap[0]:.2f} ({gap[1]:.2f}–{gap[2]:.2f}) |"
        print(line)
    print("\nBeside Ratoon in float32, " + "; ".join(agreed) + ".")
    if chosen.json:
        facts = {"speeds": speeds, "best": best, "workers": {worker.name: worker.facts for worker in workers}}
        Path(chosen.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
