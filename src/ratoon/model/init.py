"""First values of the weights.

Decides the distribution of every parameter; a parameter that no rule knows is an error, never left as it was.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ratoon.base.seeds import derive
from ratoon.model.config import HeadConfig
from ratoon.model.encoder_decoder import EncoderDecoder
from ratoon.model.layers import Norm
from ratoon.model.transformer import Experts, TaskHead, Transformer


@torch.no_grad()
def init_weights(model: Transformer | EncoderDecoder, seed: int) -> None:
    """Fill every parameter from the stream `init` of `seed`; each parameter draws from a stream of its own name.

    Matrices and embeddings: normal with `init_std`; biases 0; gains 1 (0 where the norm adds 1). Projections back
    into the stream start at 0 (`zero_init_outputs`) or, as in GPT-2, with the deviation divided by √(2 L).
    """
    parts = [model] if isinstance(model, Transformer) else [model.decoder, model.encoder]
    for part, transformer in enumerate(parts):
        _init(transformer, seed, part)
    for name, parameter in model.named_parameters():
        assert not parameter.isnan().any(), f"{name} was never set"


def _init(model: Transformer, seed: int, part: int) -> None:
    cfg = model.cfg
    outputs = {"o.weight", "down.weight", "down"}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            leaf = f"{module_name.rsplit('.', 1)[-1]}.{name}"
            if isinstance(module, TaskHead):
                parameter.zero_()  # all tokens weigh the same
            elif isinstance(module, Norm):
                parameter.fill_(1.0 if name == "weight" and not module.plus_one else 0.0)
            elif name == "bias":
                parameter.zero_()
            elif leaf in outputs or (isinstance(module, Experts) and name == "down"):
                if cfg.zero_init_outputs:
                    parameter.zero_()
                else:
                    _normal(parameter, cfg.init_std / math.sqrt(2 * cfg.layers), seed, part, full)
            elif isinstance(module, nn.Linear | nn.Embedding | Experts):
                _normal(parameter, cfg.init_std, seed, part, full)
            else:
                raise AssertionError(f"no rule sets {full}")


@torch.no_grad()
def add_head(model: Transformer, head: HeadConfig, seed: int) -> None:
    """Put a new task head onto a model, with first values from the stream `head` of `seed`; one that says a number
    begins with 0, which stands for the mean of the numbers.

    A head that stands there already, or one that scores tokens, is taken away.
    """
    model.cfg = model.cfg.model_copy(update={"task_head": head})
    weight = model.head_weight()
    model.head = None
    model.task_head = TaskHead(model.cfg).to(weight.device, weight.dtype)
    for name, parameter in model.task_head.named_parameters():
        if name == "score.weight" and head.problem != "number":
            _normal(parameter, model.cfg.init_std, seed, 0, "task_head.score.weight")
        else:
            parameter.zero_()


def _normal(parameter: nn.Parameter, std: float, seed: int, part: int, name: str) -> None:
    generator = torch.Generator().manual_seed(derive(seed, "init", part, name))
    values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    parameter.copy_(values)
