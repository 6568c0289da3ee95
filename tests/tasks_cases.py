"""What tests of tasks share: the tokenizers they run on, rows of every generative task, and the sum of tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from ratoon.tasks.contract import Encoded, Task
from ratoon.tasks.example import Example
from ratoon.tasks.registry import task_of
from ratoon.text.tokenizer import Tokenizer

ROOM = 10_000
POLICIES = ("cut-left", "cut-right")
TALK = {
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is the capital of France, and how many people live there today?"},
        {"role": "assistant", "content": "Paris. About two million."},
        {"role": "user", "content": "请用中文再说一遍：法国的首都是哪里？有多少人口？"},
        {"role": "assistant", "content": "巴黎，约两百万人。"},
        {"role": "user", "content": "Thank you, that was a great help to me and to my class!"},
        {"role": "assistant", "content": "You are welcome."},
    ]
}
PASSAGE = "The river rises in the northern hills. It was bridged in 1841 by Ann Lee. 桥长三百米，由石头建成。" * 3
GENERATIVE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "generation": (
        {"kind": "generation", "prompt_tokens": 7},
        {"text": "A river. 一条大河波浪宽，风吹稻花香两岸。"},
    ),
    "dialogue": ({"kind": "dialogue"}, TALK),
    "dialogue, last": ({"kind": "dialogue", "learn": "last"}, TALK),
    "translation": ({"kind": "translation"}, {"en": "The weather is fine today.", "zh": "今天天气很好。"}),
    "translation, chat": ({"kind": "translation", "through": "chat"}, {"en": "Good night, all.", "zh": "大家晚安。"}),
    "summary": ({"kind": "summarization"}, {"document": PASSAGE, "summaries": ["A bridge of 1841.", "A bridge."]}),
    "summary, chat": (
        {"kind": "summarization", "through": "chat", "system": "Be short.", "language": "zh"},
        {"document": PASSAGE, "summary": "桥建于1841年。"},
    ),
    "answer": ({"kind": "question-answering"}, {"question": "Who built it?", "answer": "Ann Lee, in 1841."}),
    "answer, context": (
        {"kind": "question-answering", "with_context": True, "language": "zh"},
        {"question": "桥有多长？", "context": PASSAGE, "answers": [{"text": "三百米", "answer_start": 3}]},
    ),
    "answer, chat": (
        {"kind": "question-answering", "through": "chat", "with_context": True},
        {"question": "Who built it?", "context": PASSAGE, "answers": {"text": ["Ann Lee"], "answer_start": [1]}},
    ),
}
"""Table of the task, and a row of it."""


def record_of(table: dict[str, Any], row: dict[str, Any], place: str = "rows.jsonl:1") -> tuple[Task[Any], Any]:
    task = task_of(table)
    return task, task.record(row, place)


def tokens_of(example: Example) -> int:
    own = len(example.ids) + len(example.source or ())
    return own + (tokens_of(example.beside) if example.beside is not None else 0)


def adds_up(found: Encoded, room_tokens: int) -> None:
    """The identity of tokens, counted here from the examples; and every example fits a row."""
    held = sum(tokens_of(example) for example in found.examples)
    assert found.rendered_tokens + found.repeated_tokens == held + found.cut_tokens
    assert found.cut_tokens >= 0 and found.repeated_tokens >= 0
    assert (found.reason is not None) or not (found.cut_tokens or found.repeated_tokens)
    for example in found.examples:
        assert example.places <= room_tokens


def learned(example: Example, tokenizer: Tokenizer) -> str:
    """The text of the tokens that are learned, special ones spelled out."""
    assert example.targets is None
    ids = [id for id, weight in zip(example.ids[1:], example.weight, strict=False) if weight]
    return tokenizer.decode(ids, skip_special=False)


def first_rows(path: Path, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a JSON or JSON-lines file of the real data."""
    text = gzip.decompress(path.read_bytes()).decode()
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows: list[dict[str, Any]] = found[start : start + count]
    return rows
