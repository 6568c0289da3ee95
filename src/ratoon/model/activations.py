"""The activations of an MLP, by the names of `ModelConfig.mlp`.

Decides how each is computed where PyTorch's own way is slow. Whether an MLP is gated is `config.py`'s; C code for
one of them is `fused.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """x Φ(x) by tanh (Hendrycks & Gimpel, arXiv:1606.08415)."""
    # The tanh form equals x·sigmoid(2z): one exponential where tanh costs three times as much on a CPU.
    if x.device.type == "cpu" and x.requires_grad:
        return x * torch.sigmoid((2 * math.sqrt(2 / math.pi)) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    positive = F.relu(x)
    return positive * positive


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": _relu2,
    "swiglu": F.silu,
    "geglu_tanh": gelu_tanh,
}
