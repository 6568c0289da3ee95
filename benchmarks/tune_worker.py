"""One way of fine-tuning SmolLM2-135M: Ratoon's loop, or the loop that people write around Transformers and PEFT.

Two kinds of data: `rows`, full rows of running text for the next token; `short`, labelled questions of about 13 tokens,
which Ratoon packs and the peer pads (sorted by length within 50 batches, as its `group_by_length` does).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from workers import Turns, peak_bytes

ROWS, TOKENS, EXAMPLES, RANK = 8, 256, 32, 8
LEARNING_RATE = {"lora": 5e-4, "full": 5e-5}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def opened(path: str) -> Any:
    """A file of text, packed or not."""
    return gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8")


def text_rows(path: str, tokenizer: Any) -> np.ndarray[Any, Any]:
    """The text as rows of TOKENS + 1 ids; each row begins where the one before ends."""
    with opened(path) as file:
        ids = tokenizer.encode(file.read()[:3_000_000])
    count = (len(ids) - 1) // TOKENS
    return np.stack([np.asarray(ids[i * TOKENS : (i + 1) * TOKENS + 1], dtype=np.int64) for i in range(count)])


def questions(path: str, tokenizer: Any) -> tuple[list[list[int]], list[int], list[str]]:
    """Ids, label numbers, and the labels of a file with `text` and `category`."""
    with opened(path) as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["category"] for row in rows})
    order = np.random.default_rng(1).permutation(len(rows))
    ids = tokenizer.encode_batch([rows[i]["text"] for i in order])
    return ids, [labels.index(rows[i]["category"]) for i in order], labels


class Told:
    """A loader that waits between blocks and counts the tokens that are no padding."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def rows_of(self, step: int) -> Any:
        raise NotImplementedError

    def batch(self, step: int) -> Any:
        self.turns.step()
        found = self.rows_of(step)
        self.turns.count(found.read_tokens)
        return found

    def state(self) -> dict[str, Any]:
        return {}


def ratoon(options: dict[str, Any]) -> None:
    """Ratoon's own loop, as `ratoon finetune` calls it."""
    import torch

    from ratoon.adapt.methods import method_of
    from ratoon.data.batch import Batch
    from ratoon.data.examples import ExampleLoader
    from ratoon.generate.lm import load
    from ratoon.model.config import HeadConfig
    from ratoon.model.init import add_head
    from ratoon.tasks.example import Example
    from ratoon.train.loop import Hooks, train
    from ratoon.train.objectives import objective_of
    from ratoon.train.settings import TrainSettings

    lora = options["method"] == "lora"
    lm = load(options["model"], dtype="bfloat16" if lora else "float32", device="cpu")
    assert lm.tokenizer is not None
    turns = Turns(options["warm_up"], 0, {"before_bytes": peak_bytes()})
    losses: list[float] = []

    class Rows(Told):
        def __init__(self) -> None:
            super().__init__(turns)
            self.rows = text_rows(options["data"], lm.tokenizer)
            self.same: dict[str, Any] = {
                "weight_BT": np.ones((ROWS, TOKENS), np.float32),
                "document_BT": np.zeros((ROWS, TOKENS), np.int32),
                "position_BT": np.broadcast_to(np.arange(TOKENS), (ROWS, TOKENS)).copy(),
            }

        def rows_of(self, step: int) -> Batch:
            part = self.rows[[(step * ROWS + i) % len(self.rows) for i in range(ROWS)]]
            return Batch(ids_BT=part[:, :-1].copy(), targets_BT=part[:, 1:].copy(), **self.same)

    class Short(Told):
        def __init__(self) -> None:
            super().__init__(turns)
            ids, labels, self.labels = questions(options["data"], lm.tokenizer)
            examples = [
                Example(one, [0.0] * (len(one) - 1) + [1.0], targets=[label] * len(one))
                for one, label in zip(ids, labels, strict=True)
            ]
            self.packed = ExampleLoader(examples, rows=2, context_tokens=TOKENS, seed=1)

        def rows_of(self, step: int) -> Batch:
            return self.packed.batch(step)

    short = options["data_kind"] == "short"
    loader: Any = Short() if short else Rows()
    if short:
        add_head(lm.model, HeadConfig(kind="sequence", labels=tuple(loader.labels)), 1)
    method = method_of({"kind": "lora", "rank": RANK} if lora else {"kind": "full"})
    method.install(lm.model, seed=1)
    settings = TrainSettings(
        steps=10**9, rows=2 if short else ROWS, context_tokens=TOKENS, optimizer="adamw", schedule="constant",
        learning_rate=LEARNING_RATE[options["method"]], weight_decay=0.0, beta2=0.999, log_every_steps=1,
        moments="float32" if lora else "bfloat16", frozen_products=options.get("products", "exact"),
        checkpoint_every_minutes=1e6,
    )  # fmt: skip

    def log(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            losses.append(record["loss"])
            turns.facts["losses"] = losses[:60]

    with tempfile.TemporaryDirectory():
        train(lm.model, loader, settings, None, method=method, hooks=Hooks(log=log),
              objective=objective_of("text_label" if short else "next_token"))  # fmt: skip
    assert torch


def peer(options: dict[str, Any]) -> None:
    """Transformers with PEFT: eager, AdamW, gradient norm clipped at 1; `precision` and `allocator` as told."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from ratoon.generate.lm import load  # the same tokenizer for both

    if options.get("allocator"):
        from ratoon.model.allocator import tune_allocator

        tune_allocator()
    torch.manual_seed(1)
    tokenizer: Any = load(options["model"], dtype="bfloat16").tokenizer
    short, lora = options["data_kind"] == "short", options["method"] == "lora"
    kind = torch.bfloat16 if options["precision"] == "bf16" else torch.float32
    if short:
        ids, labels, names = questions(options["data"], tokenizer)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            options["folder"], num_labels=len(names), dtype=kind
        )
        model.config.pad_token_id = 0
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(options["folder"], dtype=kind)
        rows = text_rows(options["data"], tokenizer)
    model.config.use_cache = False
    if lora:
        task = "SEQ_CLS" if short else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type=task))
    model.train()
    before = peak_bytes()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE[options["method"]], weight_decay=0.0, fused=True)
    turns = Turns(options["warm_up"], 0, {"before_bytes": before})
    losses: list[float] = []
    order: list[int] = []
    for step in itertools.count():
        turns.step()
        if short:
            if not order:  # sorted by length inside 50 batches, then batch by batch
                block = [(step * EXAMPLES + i) % len(ids) for i in range(50 * EXAMPLES)]
                block.sort(key=lambda i: len(ids[i]))
                batches = [block[i : i + EXAMPLES] for i in range(0, len(block), EXAMPLES)]
                np.random.default_rng(step).shuffle(batches)
                order = list(itertools.chain.from_iterable(batches))
            members, order = order[:EXAMPLES], order[EXAMPLES:]
            longest = max(len(ids[i]) for i in members)
            x = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in members])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in members])
            inputs = {"input_ids": x, "attention_mask": mask, "labels": torch.tensor([labels[i] for i in members])}
            turns.count(int(mask.sum()))
        else:
            part = torch.from_numpy(rows[[(step * ROWS + i) % len(rows) for i in range(ROWS)]])
            inputs = {"input_ids": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()}
            inputs["shift_labels"] = inputs["labels"]
            turns.count(ROWS * TOKENS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options["precision"] == "autocast-bf16"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        turns.facts["losses"] = losses[:60]


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    sys.stdout = sys.stderr  # what libraries print is no answer
    assert Path(told["data"]).is_file(), told["data"]
    {"ratoon": ratoon, "peer": peer}[told["way"]](told)
