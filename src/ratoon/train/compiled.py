"""Compiling the model for training, and going on without where no compiler is.

Decides what is handed to `torch.compile`: the whole model, its blocks, or nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ratoon.model.encoder_decoder import AnyModel
from ratoon.train.settings import TrainSettings

WHOLE_MODEL_LAYERS = 8
"""Up to here the whole model is compiled (one graph, the least time between operations); deeper ones block by block,
so that a block is compiled once for all layers instead of once for each."""


def compile_model(model: AnyModel, settings: TrainSettings) -> str:
    """Mark `model` for compilation as `settings.compile` says; returns a sentence on what was decided and why.

    The compilation itself happens at the first step. Where none is possible the model runs as it is: slower, equal.
    """
    if settings.compile == "off":
        return "not compiled: train.compile is off"
    if (reason := missing_compiler()) is not None:
        return f"not compiled, which costs speed and nothing else: {reason}"
    what, why = settings.compile, "as train.compile says"
    if what == "auto":
        whole = len(model.layers) <= WHOLE_MODEL_LAYERS and model.cfg.moe is None and not settings.recompute_blocks
        what = "model" if whole else "blocks"
        why = f"{len(model.layers)} layers" if model.cfg.moe is None else "experts"
    if what == "model":
        model.compile(dynamic=False)
        return f"compiled as a whole ({why}); the first step takes longer"
    for block in model.layers:
        block.compile(dynamic=False, backend=_keeping_less)
    return f"compiled block by block ({why}); the first step takes longer"


KEPT_SHARE = 0.9
"""How much of what a block would keep for its backward pass it may keep. Below 1 the compiler computes again what costs
next to nothing (norms, the product of gate and up): a third less to keep at the same speed (benchmarks/LOG.md)."""


def _keeping_less(graph: Any, inputs: Any) -> Any:
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=KEPT_SHARE):
        return compile_fx(graph, inputs)


def missing_compiler() -> str | None:
    """Why nothing can be compiled here, or None: found out by compiling a line."""
    try:
        probe = torch.compile(_line, dynamic=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        probe(torch.ones(16, device=device))
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"{first[0][:160]} (a C++ compiler such as g++ makes it possible)"
    return None


def _line(x: torch.Tensor) -> torch.Tensor:
    return x.sigmoid() * x
