"""One way of training on tinyshakespeare's characters: Ratoon's loop, Transformers' GPT-2, or bare matrix products."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from workers import Turns, peak_bytes

SHAPES: dict[str, dict[str, int]] = {
    "S": {"layers": 4, "width": 128, "heads": 4, "context": 64, "rows": 12},
    "M": {"layers": 6, "width": 384, "heads": 6, "context": 256, "rows": 64},
    "gpt2": {"layers": 12, "width": 768, "heads": 12, "context": 1024, "rows": 16},
}


RANDOM_TOKENS = 1 << 22


def ids_of(path: str | None, vocab: int | None = None) -> tuple[np.ndarray[Any, Any], int]:
    """The text's characters as numbers, and how many there are of them; without a text, random numbers below
    `vocab`, which are as good for speed."""
    if path is None:
        assert vocab is not None and vocab <= 1 << 16, "random tokens need a vocabulary of uint16"
        return np.random.default_rng(1).integers(0, vocab, RANDOM_TOKENS, dtype=np.uint16), vocab
    text = Path(path).read_text(encoding="utf-8")
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    return np.array([letters[letter] for letter in text], dtype=np.uint16), len(letters)


def split(ids: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """First nine tenths to learn from, the rest held out."""
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def ratoon_config(kind: str, shape: dict[str, int], vocab: int) -> Any:
    """`gpt2`: the peer's architecture; `default`: ours, with as many parameters."""
    from ratoon.model.config import ModelConfig

    common = {
        "vocab_size": vocab,
        "layers": shape["layers"],
        "width": shape["width"],
        "heads": shape["heads"],
        "context_tokens": shape["context"],
        "mlp_width": 4 * shape["width"],
    }
    if kind == "gpt2":
        return ModelConfig(
            family="gpt2",
            norm="layer",
            positions="learned",
            mlp="gelu_tanh",
            mlp_bias=True,
            qkv_bias=True,
            out_bias=True,
            zero_init_outputs=False,
            **common,
        )
    from ratoon.recipe import Size, default_shape

    size = Size(
        layers=shape["layers"],
        width=shape["width"],
        heads=shape["heads"],
        context_tokens=shape["context"],
        rows=shape["rows"],
    )
    return ModelConfig(**(default_shape(size, shape["context"]) | common))


def settle_gpu(turns: Turns) -> None:
    """Before an answer: wait for what a GPU has still to do, and say the most memory it has held."""
    if turns.left == 0:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            turns.facts["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()


class Shards:
    """Rows of the text at random places, drawn as the peer draws them: the same data for both."""

    def __init__(self, ids: np.ndarray[Any, Any], shape: dict[str, int], seed: int, turns: Turns | None = None) -> None:
        self.ids, self.shape, self.seed, self.turns = ids, shape, seed, turns
        B, T = shape["rows"], shape["context"]
        self.same: dict[str, Any] = {
            "weight_BT": np.ones((B, T), np.float32),
            "document_BT": np.zeros((B, T), np.int32),
            "position_BT": np.broadcast_to(np.arange(T), (B, T)).copy(),
            "rows": tuple(f"row {row}" for row in range(B)),
        }

    def arrays(self, step: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        random = np.random.default_rng([self.seed, step])
        T = self.shape["context"]
        starts = random.integers(0, len(self.ids) - T - 1, self.shape["rows"])
        rows = np.stack([self.ids[start : start + T + 1] for start in starts]).astype(np.int64)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def batch(self, step: int) -> Any:
        from ratoon.data.batch import Batch

        if self.turns is not None:
            settle_gpu(self.turns)
            self.turns.step()
        ids, targets = self.arrays(step)
        return Batch(ids_BT=ids, targets_BT=targets, **self.same)

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed}


def ratoon(options: dict[str, Any]) -> None:
    """Ratoon's own loop, from its public entrance; the loader stops it before each block."""
    from ratoon.model.init import init_weights
    from ratoon.model.transformer import Transformer
    from ratoon.store.runs import Run
    from ratoon.train.loop import Hooks, train
    from ratoon.train.settings import TrainSettings

    shape = SHAPES[options["shape"]]
    ids, vocab = ids_of(options["text"], options.get("vocab"))
    model = Transformer(ratoon_config(options["kind"], shape, vocab))
    init_weights(model, 1)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"before_bytes": peak_bytes(), "parameters": parameters, "vocab": vocab}
    settings = TrainSettings(
        steps=10**9, rows=shape["rows"], context_tokens=shape["context"], **options.get("train", {})
    )
    turns = Turns(options["warm_up"], shape["rows"] * shape["context"], facts)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        run.checkpoints.mkdir(parents=True)
        train(model, Shards(split(ids)[0], shape, 1, turns), settings, run, hooks=Hooks(log=run.append_metrics))


def peer_model(shape: dict[str, int], vocab: int) -> Any:
    """Transformers' GPT-2 without dropout, as pretraining uses it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=shape["context"],
            n_embd=shape["width"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def peer(options: dict[str, Any]) -> None:
    """The loop that people write around Transformers' GPT-2: fused AdamW, gradient norm clipped at 1."""
    import torch

    if options.get("allocator"):
        from ratoon.model.allocator import tune_allocator

        tune_allocator()
    torch.manual_seed(1)
    shape = SHAPES[options["shape"]]
    ids, vocab = ids_of(options["text"], options.get("vocab"))
    model = peer_model(shape, vocab)
    model.train()
    before = peak_bytes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    called = torch.compile(model) if options["compile"] else model
    low = options["precision"] == "autocast-bf16"
    loader = Shards(split(ids)[0], shape, 1)
    facts = {"before_bytes": before, "parameters": sum(p.numel() for p in model.parameters()), "vocab": vocab}
    turns = Turns(options["warm_up"], shape["rows"] * shape["context"], facts)
    for step in itertools.count():
        settle_gpu(turns)
        turns.step()
        rows, targets = loader.arrays(step)
        x = torch.from_numpy(rows).to(device)
        y = torch.from_numpy(targets).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            # shift_labels: targets that are shifted already, so that each of the T positions is learned
            loss = called(input_ids=x, labels=y, shift_labels=y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())


def matmul(options: dict[str, Any]) -> None:
    """The machine's ceiling: products of square matrices. `done` counts floating-point operations."""
    import torch

    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    n = options["n"]
    a, b = (torch.randn(n, n).to(getattr(torch, options["dtype"])) for _ in range(2))
    out = torch.empty_like(a)

    turns = Turns(options["warm_up"], 2 * n**3)
    while True:
        turns.step()
        torch.mm(a, b, out=out)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    {"ratoon": ratoon, "peer": peer, "matmul": matmul}[chosen["way"]](chosen)
