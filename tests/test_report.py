"""The page of a run: what it says, that it says it whatever the run's end, and that nothing leaves the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratoon.base.seeds import stream
from ratoon.report.page import write_page
from ratoon.store.runs import Run

STEPS = 420
VOCAB = 4096
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \"quoted\" '{{ 7*7 }}'"
PROMPTS = ("The following example", "Return a new string", "Raises ValueError if")
LEDGER = {
    "read": {"documents": 9120, "bytes": 2_214_887, "tokens": 601_204},
    "accounts": {
        "train": {"documents": 8301, "bytes": 2_001_004, "tokens": 543_117, "places": []},
        "held_out": {"documents": 437, "bytes": 105_411, "tokens": 28_621, "places": []},
        "duplicate": {
            "documents": 361,
            "bytes": 108_460,
            "tokens": 29_463,
            "places": [f"python-docs/topics.jsonl:{line}" for line in range(41, 1041, 50)],
        },
        "empty": {"documents": 21, "bytes": 12, "tokens": 3, "places": ["python-docs/docstrings.jsonl:7"]},
    },
    "notes": ["text is taken from the field 'text' of docstrings.jsonl"],
}


def loss_at(step: int) -> float:
    return 3.1 + 5.2 * math.exp(-step / 60)


def evaluation(step: int, n_tokens: int = 28_600) -> dict[str, Any]:
    loss = loss_at(step) + 0.05
    bits = loss * 28_184 / 105_411 / math.log(2)
    return {
        "loss": loss,
        "interval": [loss - 0.03, loss + 0.03],
        "perplexity": math.exp(loss),
        "perplexity_interval": [math.exp(loss - 0.03), math.exp(loss + 0.03)],
        "bits_per_byte": bits,
        "bits_per_byte_interval": [bits - 0.011, bits + 0.012],
        "interval_of": "documents",
        "n_tokens": n_tokens,
        "n_text_tokens": 28_184,
        "n_documents": 437,
        "n_bytes": 105_411,
        "signature": "ratoon 0.1.0, bfloat16, tokenizer 0123456789ab, text ba9876543210",
    }


def make_run(root: Path, *, steps: int = STEPS, every: int = 10, language: str = "en", **state: Any) -> Run:
    """A finished run with the records that the loop and the verb write, of plausible numbers."""
    run = Run.create("garden", root)
    noise = stream(1, "report test")
    marks = {round(steps * tenth / 10 / every) * every for tenth in range(11)}
    with open(run.metrics_path, "w", encoding="utf-8") as out:

        def put(step: int, kind: str, **facts: Any) -> None:
            record = {"step": step, "kind": kind, "time_seconds": step * 0.42, "tokens": step * 8192, **facts}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")

        for step in [0, 1, *range(every, steps + 1, every)]:
            if step:
                progress = step / steps
                put(
                    step,
                    "train",
                    loss=loss_at(step) + 0.08 * float(noise.standard_normal()),
                    learning_rate=3e-3 * min(1.0, (1 - progress) / 0.6),
                    grad_norm=0.4 + 0.1 * float(noise.random()),
                    tokens_per_second=19_000 + 900 * float(noise.standard_normal()),
                    memory_bytes=int(6.1e8 + 4e7 * (1 - math.exp(-step / 40))),
                    progress=progress,
                )
            if step in marks:
                put(step, "eval", **evaluation(step))
            if step in (0, steps):
                for prompt in PROMPTS:
                    text = (
                        " of the string that is the same as the given one.\n\n    >>> s = 'a'"
                        if step
                        else " the the, xq"
                    )
                    put(step, "sample", prompt=prompt, text=text)
    (run.folder / "ledger.json").write_text(json.dumps(LEDGER), encoding="utf-8")
    recipe = {
        "name": "garden",
        "language": language,
        "seed": 1,
        "minutes": 3.0,
        "data": {"corpus": "python-docs", "vocab_size": VOCAB, "held_out_fraction": 0.05},
        "model": {"size": "small", "settings": {"layers": 6, "width": 256}},
        "train": {"rows": 32, "context_tokens": 256, "optimizer": "muon", "learning_rate": 0.003, "matrix_learning_rate": 0.02},
        "samples": list(PROMPTS),
    }
    run.recipe_path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (run.folder / "log.txt").write_text(
        "2026-01-02 03:04:05 model: 6,815,744 parameters, 6 layers, 256 wide, family nanochat\n", encoding="utf-8"
    )
    facts: dict[str, Any] = {
        "name": "garden",
        "status": "done",
        "reason": None,
        "language": language,
        "machine": {
            "system": "Linux x86_64",
            "processor": "AMD EPYC 9R14",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16_480_919_552,
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
        },
        "derived": [
            {"key": "model.size", "value": "small", "reason": "what learns most in 3 minutes on two cores"},
            {"key": "train.budget_minutes", "value": 3.0, "reason": "the dial `minutes`"},
            {"key": "train.context_tokens", "value": 256, "reason": "size small"},
        ],
        "model": {
            "parameters": 6_815_744,
            "family": "nanochat",
            "layers": 6,
            "width": 256,
            "heads": 4,
            "context_tokens": 256,
        },
        "data": {
            "sources": ["python-docs"],
            "prepared": "runs/garden/data",
            "train_tokens": 543_117,
            "held_out_tokens": 28_621,
            "vocab_size": VOCAB,
        },
        "init": None,
        "passes": steps * 8192 / 543_117,
        "step": steps,
        "steps": steps,
        "tokens": steps * 8192,
        "seconds": steps * 0.42 + 4,
        "evaluation": evaluation(steps, 28_621),
        "next_commands": ['ratoon generate garden "The function" --temperature 0.8', "ratoon verify garden"],
    }
    run.write_state(**facts | state)
    return run


def test_it_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert write_page(run) == run.report
