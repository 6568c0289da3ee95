"""The layers that all else is built of: products, tables of vectors, norms.

Decides how a product is asked for (with a bias, several side by side, by codes in place of a weight) and that weights
which nobody set are NaN. What they make together is `transformer.py`'s, products of whole numbers `int8.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratoon.model import int8
from ratoon.model.config import ModelConfig


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. Compiled for a CPU the bias is added apart: the compiler puts that into the operation that follows,
    while a product with a bias copies it into every row first."""
    if bias is not None and x.device.type == "cpu" and torch.compiler.is_compiling():
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer that starts as NaN: weights that nobody set are heard at once.

    With `codes` (out, in) and `scale` (out,) it computes with these in place of its weight (`int8.py`).
    """

    codes: Tensor | None
    scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.codes is not None:
            return side_by_side((self,), x, self.bias)
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))
        if self.bias is not None:
            nn.init.constant_(self.bias, float("nan"))


def side_by_side(layers: Sequence[Linear], x: Tensor, bias: Tensor | None) -> Tensor:
    """What some layers give for one input, side by side: one product of their weights, or of their codes."""
    codes = [layer.codes for layer in layers if layer.codes is not None]
    if not codes:
        weights = [layer.weight for layer in layers]
        return linear(x, weights[0] if len(weights) == 1 else torch.cat(weights), bias)
    if len(codes) == len(layers):
        scales = [layer.scale for layer in layers if layer.scale is not None]
        h = int8.product(x, *((codes[0], scales[0]) if len(codes) == 1 else (torch.cat(codes), torch.cat(scales))))
    else:
        h = torch.cat([side_by_side((layer,), x, None) for layer in layers], dim=-1)
    return h if bias is None else h + bias


class Embedding(nn.Embedding):
    """A table of vectors that starts as NaN."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich, arXiv:1910.07467) or layer norm over the last axis, with or without a gain."""

    def __init__(self, cfg: ModelConfig, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.eps = cfg.norm_eps
        self.plus_one = cfg.norm_weight == "plus_one"
        self.weight = nn.Parameter(torch.full((channels,), float("nan"))) if cfg.norm_weight != "none" else None
        self.bias = nn.Parameter(torch.full((channels,), float("nan"))) if cfg.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, (self.channels,), self.weight, self.bias, self.eps)
        if self.plus_one:
            assert self.weight is not None
            return (F.rms_norm(x.float(), (self.channels,), None, self.eps) * (1.0 + self.weight.float())).to(x.dtype)
        return F.rms_norm(x, (self.channels,), self.weight, self.eps)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is what it was made as: no adapter in its place, no hook. Then its weight may be used in it."""
    return type(layer) in (Linear, Embedding) and not layer._forward_hooks and not layer._forward_pre_hooks
