"""A little base and little rows of every task, as files in a folder where a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import little
from ratoon.model.folder import write_model
from ratoon.text.tokenizer import Tokenizer

WORDS = ("red", "green", "blue", "cold", "warm", "good", "bad", "old", "new", "small", "great", "far")


def base(folder: Path, *, seed: int = 1, template: str | None = None, **changes: Any) -> Path:
    """A model of random weights that reads bytes, as a folder; `template` in place of its chat template ("": none, and
    no tokens of turns either)."""
    tokenizer = Tokenizer.bytes_only()
    if template == "":
        tokenizer = Tokenizer.train([], vocab_size=257, special_tokens=["<|endoftext|>"])
    elif template is not None:
        tokenizer = Tokenizer(tokenizer.core, {**tokenizer.config, "chat_template": template})
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "context_tokens": 128,
        "bos_id": tokenizer.bos_id,
        "eos_ids": (tokenizer.eos_id,),
        "pad_id": tokenizer.pad_id,
    }
    write_model(little.model(seed, **(shape | changes)), folder, extra_files=tokenizer.files())
    return folder


def texts(count: int) -> list[str]:
    """Texts that are unlike each other: no two are near copies."""
    size = len(WORDS)
    return [f"{WORDS[i % size]} {WORDS[(i * 5 + i // size + 1) % size]} {i * 7919}" for i in range(count)]


def rows_of(kind: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of a task."""
    found: list[dict[str, Any]] = []
    for number, text in enumerate(texts(count)):
        first, second, last = text.split(" ")
        if kind == "classification":
            found.append({"text": text, "label": "even" if number % 2 else "odd"})
        elif kind == "multi-label":
            found.append({"text": text, "labels": ["third"] * (number % 3 == 0) + ["odd"] * (number % 2)})
        elif kind == "tagging":
            found.append(
                {"words": [first, second, last], "tags": ["O", "B-X" if number % 2 else "O", "I-X"[:1] + "-Y"]}
            )
            found[-1]["tags"][2] = "B-Y"
        elif kind == "pairs":
            found.append({"first": text, "second": f"{second} {last}", "label": str(number % 2)})
        elif kind == "pair-scoring":
            found.append({"first": text, "second": f"{second} {last}", "score": number % 5 / 2})
        elif kind == "scoring":
            found.append({"text": text, "score": number % 5})
        elif kind == "extractive":
            found.append(
                {"question": f"what is {first}?", "context": f"{text} end", "answers": {"text": [second],
                 "answer_start": [text.index(second, len(first))]}}
            )  # fmt: skip
        elif kind == "question-answering":
            found.append({"question": f"{first} or {second}?", "answer": second})
        elif kind == "dialogue":
            found.append(
                {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": first},
                              {"role": "user", "content": last}, {"role": "assistant", "content": second}]}
            )  # fmt: skip
        elif kind == "generation":
            found.append({"text": text})
        elif kind == "translation":
            found.append({"en": text, "zh": f"{second} {first}"})
        elif kind == "summarization":
            found.append({"document": f"{text} and more", "summary": first})
        elif kind == "preference":
            found.append({"prompt": text, "chosen": first, "rejected": last})
    return found


KINDS = (
    "classification", "multi-label", "tagging", "pairs", "pair-scoring", "scoring", "extractive", "question-answering",
    "dialogue", "generation", "translation", "summarization", "preference",
)  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as jsonl."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table(kind: str, **changes: Any) -> dict[str, Any]:
    """A recipe of some seconds; `changes` have dotted keys."""
    from ratoon.base.settings import merge

    found: dict[str, Any] = {
        "name": "tuned",
        "task": {"kind": kind},
        "data": {"train": ["rows.jsonl"], "validation_fraction": 0.15, "test_fraction": 0.15},
        "model": {"base": "base"},
        "method": {"kind": "lora", "rank": 2},
        "epochs": 2,
        "train": {"context_tokens": 96, "precision": "float32", "compile": "off", "learning_rate": 0.005},
    }
    if kind in ("question-answering", "translation", "summarization"):
        found["task"]["max_new_tokens"] = 6
    merged = merge(found, {key.replace("__", "."): value for key, value in changes.items()})
    plain: dict[str, Any] = json.loads(json.dumps(merged))
    return plain
