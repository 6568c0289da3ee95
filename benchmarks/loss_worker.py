"""One training run on tinyshakespeare's characters from given first weights: Ratoon's loop, or Transformers' GPT-2.
Prints the held-out loss before and after."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train_worker import SHAPES, Shards, ids_of, peer_model, ratoon_config, split

EVALUATED_ROWS = 64


def held_out_loss(logits_of: Callable[[Any], Any], held_out: np.ndarray[Any, Any], context: int) -> float:
    """Mean loss (nats a character) over all of `held_out`, cut into rows of `context`; the same code for each way."""
    import torch

    rows = (len(held_out) - 1) // context
    ids = torch.from_numpy(held_out[: rows * context + 1].astype(np.int64))
    inputs, targets = ids[:-1].view(rows, context), ids[1:].view(rows, context)
    total = 0.0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for start in range(0, rows, EVALUATED_ROWS):
            part = slice(start, start + EVALUATED_ROWS)
            logits = logits_of(inputs[part]).float().flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, targets[part].flatten(), reduction="sum"))
    return total / (rows * context)


def first_weights(shape: dict[str, int], vocab: int, seed: int) -> Any:
    """Transformers' GPT-2 with its own first weights: both ways of the same architecture begin with them."""
    import torch

    torch.manual_seed(seed)
    return peer_model(shape, vocab)


def settings_of(options: dict[str, Any], shape: dict[str, int]) -> Any:
    """The settings, which the peer's loop reads too."""
    from ratoon.train.settings import TrainSettings

    table = {"rows": shape["rows"], "context_tokens": shape["context"], **options["train"]}
    return TrainSettings(**table)


def ratoon(options: dict[str, Any]) -> None:
    """Ratoon's loop; `gpt2` from the peer's first weights, through a folder that the peer wrote."""
    from ratoon.model.folder import read_model
    from ratoon.model.init import init_weights
    from ratoon.model.transformer import Transformer

    shape = SHAPES[options["shape"]]
    ids, vocab = ids_of(options["text"])
    if options["kind"] == "gpt2":
        with tempfile.TemporaryDirectory() as folder:
            first_weights(shape, vocab, options["seed"]).save_pretrained(folder)
            model = read_model(folder)
    else:
        model = Transformer(ratoon_config(options["kind"], shape, vocab))
        init_weights(model, options["seed"])
    train_ratoon(model, ids, shape, settings_of(options, shape), options["seed"])


def timed(options: dict[str, Any]) -> None:
    """Ratoon alone, as the recipe derives size and schedule from the minutes there are."""
    from ratoon.model.config import ModelConfig
    from ratoon.model.init import init_weights
    from ratoon.model.transformer import Transformer
    from ratoon.recipe import load, settle

    recipe: dict[str, Any] = {"data": {"corpus": "shakespeare"}, "minutes": options["minutes"]}
    if options["size"] is not None:
        recipe["model"] = {"size": options["size"]}
    plan = settle(load(recipe))
    ids, vocab = ids_of(options["text"])
    model = Transformer(ModelConfig(vocab_size=vocab, **plan.shape))
    init_weights(model, options["seed"])
    shape = {"rows": plan.train.rows, "context": plan.train.context_tokens}
    train_ratoon(model, ids, shape, plan.train, options["seed"], all_evaluations=True)


def train_ratoon(
    model: Any,
    ids: np.ndarray[Any, Any],
    shape: dict[str, int],
    settings: Any,
    seed: int,
    all_evaluations: bool = False,
) -> None:
    """Train and print; with `all_evaluations` the loss of each tenth of the run, too."""
    from ratoon.store.runs import Run
    from ratoon.train.loop import Hooks, train

    learned, held_out = split(ids)

    def loss() -> float:
        return held_out_loss(lambda rows: model.logits(model(rows)), held_out, shape["context"])

    found: dict[str, Any] = {"first": loss(), "parameters": sum(p.numel() for p in model.parameters())}
    evaluated: list[tuple[int, float]] = []

    def evaluate(step: int, _: Any) -> dict[str, Any]:
        evaluated.append((step, loss()))
        return {"loss": evaluated[-1][1]}

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        run.checkpoints.mkdir(parents=True)
        hooks = Hooks(
            evaluate=evaluate if all_evaluations else None, talk=lambda said: print(said, file=sys.stderr, flush=True)
        )
        result = train(model, Shards(learned, shape, seed), settings, run, hooks=hooks)
    found |= {"last": loss(), "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds}
    print(json.dumps({**found, "evaluated": evaluated}))


def peer(options: dict[str, Any]) -> None:
    """Transformers' GPT-2 with torch's AdamW, its parameters grouped as Ratoon groups them."""
    import torch

    from ratoon.train.schedule import share

    shape = SHAPES[options["shape"]]
    settings = settings_of(options, shape)
    ids, vocab = ids_of(options["text"])
    learned, held_out = split(ids)
    model = first_weights(shape, vocab, options["seed"])

    def loss() -> float:
        model.eval()
        return held_out_loss(lambda rows: model(input_ids=rows).logits, held_out, shape["context"])

    found: dict[str, Any] = {"first": loss(), "parameters": sum(p.numel() for p in model.parameters())}
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    called = torch.compile(model)
    low = options["precision"] == "autocast-bf16"
    loader = Shards(learned, shape, options["seed"])
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share(step, step / settings.steps, settings)
        rows, targets = (torch.from_numpy(array) for array in loader.arrays(step))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            mean = called(input_ids=rows, labels=targets, shift_labels=targets).loss
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = settings.steps * shape["rows"] * shape["context"]
    print(json.dumps({**found, "last": loss(), "steps": settings.steps, "tokens": tokens}))


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    {"ratoon": ratoon, "peer": peer, "timed": timed}[chosen["way"]](chosen)
