"""A little model and little data for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratoon.base.seeds import stream
from ratoon.data.batch import IGNORED, Batch
from ratoon.data.loader import Loader
from ratoon.data.shards import Shards, ShardWriter
from ratoon.model.config import ModelConfig, MoE
from ratoon.model.init import init_weights
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import Parent
from ratoon.store.runs import Run
from ratoon.train.loop import BatchSource, Hooks, Record, Result, train
from ratoon.train.settings import TrainSettings

VOCAB, TOKENS, ROWS = 23, 16, 8
EXPERTS = MoE(experts=4, experts_per_token=2, expert_width=24, balance_weight=0.5)


def config(**changes: Any) -> ModelConfig:
    """A Transformer of some ten thousand parameters."""
    table: dict[str, Any] = {
        "vocab_size": VOCAB,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 48,
        "context_tokens": 64,
        "init_std": 0.2,
        "zero_init_outputs": False,  # blocks that add nothing would hide every defect inside them
    }
    return ModelConfig(**(table | changes))


def model(seed: int = 1, **changes: Any) -> Transformer:
    """A little model with every parameter random: gains and biases too."""
    made = Transformer(config(**changes))
    init_weights(made, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


def settings(**changes: Any) -> TrainSettings:
    """Float32, eager, quiet."""
    table: dict[str, Any] = {
        "rows": ROWS,
        "context_tokens": TOKENS,
        "precision": "float32",
        "compile": "off",
        "log_every_steps": 1,
        "learning_rate": 0.01,
    }
    if not {"steps", "budget_minutes"} & changes.keys():
        table["steps"] = 6
    return TrainSettings(**(table | changes))


class Rows:
    """Rows of counting tokens in two documents and padding, with unequal masks and weights; a function of the step.

    Process `rank` of `world` gets its share of the rows.
    """

    def __init__(self, *, rows: int = ROWS, seed: int = 0, rank: int = 0, world: int = 1, tokens: int = TOKENS) -> None:
        self.rows, self.seed, self.tokens = rows, seed, tokens
        self.mine = slice(rank * rows // world, (rank + 1) * rows // world)

    def batch(self, step: int) -> Batch:
        random = stream(self.seed, "little", step)
        shape = (self.rows, self.tokens)
        first, stride = random.integers(0, VOCAB, (self.rows, 1)), random.integers(1, 4, (self.rows, 1))
        ids = (first + stride * np.arange(self.tokens + 1)) % VOCAB
        cut, end = random.integers(2, 7, (self.rows, 1)), random.integers(8, self.tokens + 1, (self.rows, 1))
        place = np.arange(self.tokens)[None, :]
        document = np.where(place < cut, 0, np.where(place < end, 1, IGNORED)).astype(np.int32)
        position = np.where(place < cut, place, np.where(place < end, place - cut, 0))
        weight = random.choice([0.0, 0.5, 1.0, 3.0], shape) * (random.random((self.rows, 1)) < 0.8)
        weight[0] = 1.0  # never a step without anything to learn
        batch = Batch(
            ids_BT=ids[:, :-1],
            targets_BT=ids[:, 1:],
            weight_BT=np.where(document == IGNORED, 0, weight).astype(np.float32),
            document_BT=document,
            position_BT=position.astype(np.int64),
            rows=tuple(f"little:{step}/{row}" for row in range(self.rows)),
        )
        return part(batch, self.mine)

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "seed": self.seed, "tuple": (1, 2)}


def part(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    return Batch(
        ids_BT=batch.ids_BT[rows],
        targets_BT=batch.targets_BT[rows],
        weight_BT=batch.weight_BT[rows],
        document_BT=batch.document_BT[rows],
        position_BT=batch.position_BT[rows],
        rows=batch.rows[rows],
    )


def shards(folder: Path, tokens: int = 3000, seed: int = 0) -> Shards:
    """Documents of counting tokens, as real shards."""
    if not folder.exists():
        random, left = stream(seed, "shards"), tokens
        writer = ShardWriter(folder, VOCAB)
        while left > 0:
            length = int(random.integers(5, 60))
            first, stride = random.integers(0, VOCAB), random.integers(1, 4)
            writer.add(((first + stride * np.arange(length)) % VOCAB).tolist(), length, f"little:{left}")
            left -= length
        writer.close(Parent(kind="tokenizer", hash="0" * 64), None)
    return Shards(folder)


def real_loader(folder: Path, *, rank: int = 0, world: int = 1, seed: int = 1) -> Loader:
    """The project's loader over `shards(folder)`."""
    return Loader(shards(folder), rows=ROWS, context_tokens=TOKENS, seed=seed, rank=rank, world=world)


class Outcome:
    """A run's model, weights, records and words."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.words: list[str] = []
        self.model: Transformer
        self.result: Result | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def told(self, words: str) -> bool:
        return any(words in sentence for sentence in self.words)

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if record["kind"] == "train"]


def go(
    made: Transformer | None = None,
    loader: BatchSource | None = None,
    run: Run | None = None,
    *,
    resume: bool = False,
    evaluate: Any = None,
    sample: Any = None,
    log: Any = None,
    objective: Any = None,
    **changes: Any,
) -> Outcome:
    """Train a little and keep what came of it; on an error the outcome hangs on the exception as `.outcome`."""
    outcome = Outcome()
    outcome.model = made if made is not None else model()

    def both(record: Record) -> None:
        outcome.records.append(record)
        if log is not None:
            log(record)

    more = {} if objective is None else {"objective": objective}
    hooks = Hooks(log=both, talk=outcome.words.append, evaluate=evaluate, sample=sample)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on tensors of this size wait for each other, for seconds on a busy machine
    try:
        outcome.result = train(
            outcome.model, loader or Rows(), settings(**changes), run, hooks=hooks, resume=resume, **more
        )
    except BaseException as error:
        error.outcome = outcome  # type: ignore[attr-defined]
        raise
    finally:
        torch.set_num_threads(threads)
    return outcome


def new_run(folder: Path) -> Run:
    """A run in a folder of its own."""
    run = Run(folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    return run


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference of any number."""
    assert one.keys() == other.keys()
    return max(float((one[name].detach() - other[name].detach()).abs().max()) for name in one)
