"""Products with frozen matrices in 8-bit integers, forward and backward.

Decides how a factor is rounded: each row of the inputs, and each of the matrix' outputs, has a scale of its own, the
largest number of the row becoming 127 (the vector-wise form of LLM.int8(), Dettmers et al., arXiv:2208.07339, section
2.1); the gradient of the inputs is a product of the same codes (as in SwitchBack, Wortsman et al., arXiv:2304.13013).
Sums are whole numbers and so exact: layers side by side, rows packed or alone, give the same bits. What is learned is
never rounded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ratoon.base.errors import ConfigError

if TYPE_CHECKING:
    from ratoon.model.encoder_decoder import AnyModel
    from ratoon.model.layers import Linear

LARGEST = 127
SMALLEST_WIDTH = 16
"""Layers with fewer inputs or outputs (a mixture's router) stay as they are: nothing is won there."""
PROBE_ROWS, PROBES = 256, 5


def codes_of(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, D) int8 and scales (N, 1) float32 with codes · scales ≈ x, at most half a scale apart."""
    scale_N1 = x_ND.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) * (1 / LARGEST)
    return (x_ND.float() * (1 / scale_N1)).round().to(torch.int8), scale_N1


class Product(torch.autograd.Function):
    """x Wᵀ from the codes (O, I) and scales (O,) of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the type of `x`."""
        ctx.save_for_backward(codes_OI, scale_O)
        codes_NI, scale_N1 = codes_of(x.reshape(-1, x.shape[-1]))
        sums_NO = torch._int_mm(codes_NI, codes_OI.t())
        return (sums_NO.float() * scale_N1 * scale_O).to(x.dtype).view(*x.shape[:-1], len(codes_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(…, O) -> (…, I): the outputs' scales go into the gradient before it is rounded."""
        (g,) = gradients
        codes_OI, scale_O = ctx.saved_tensors
        codes_NO, scale_N1 = codes_of(g.reshape(-1, g.shape[-1]).float() * scale_O)
        sums_NI = torch._int_mm(codes_NO, codes_OI)
        return (sums_NI.float() * scale_N1).to(g.dtype).view(*g.shape[:-1], codes_OI.shape[1]), None, None


def product(x: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x Wᵀ (…, O), W given by its codes and scales."""
    found: Tensor = Product.apply(x, codes_OI, scale_O)  # type: ignore[no-untyped-call]
    return found


def round_frozen(model: AnyModel) -> str:
    """Give the frozen linear layers of the blocks their codes, which they compute with from then on; returns a
    sentence on how many there are and how fast it is here. Raises `ConfigError` on a GPU."""
    layers = _frozen(model)
    if not layers:
        return "train.frozen_products: int8 has no effect: no linear layer of the blocks is frozen"
    device = layers[0].weight.device
    if device.type != "cpu":
        raise ConfigError(
            f"8-bit products are made for the processor, and the model is on {device}",
            where="train.frozen_products",
            expected="exact, on a GPU",
        )
    for layer in layers:
        layer.codes, scale_O1 = codes_of(layer.weight.detach())
        layer.scale = scale_O1.flatten()
    widest = max(layers, key=lambda layer: layer.weight.numel())
    ratio = _seconds(widest, exact=True) / _seconds(widest, exact=False)
    kind = str(widest.weight.dtype).removeprefix("torch.")
    return f"products with {len(layers)} frozen matrices in 8-bit integers ({ratio:.1f} times as fast as {kind} here)"


def unround(model: AnyModel) -> None:
    """The layers compute with their own weights again."""
    for layer in _linear(model):
        layer.codes = layer.scale = None


def _frozen(model: AnyModel) -> list[Linear]:
    return [
        layer
        for layer in _linear(model)
        if not layer.weight.requires_grad and min(layer.in_features, layer.out_features) >= SMALLEST_WIDTH
    ]


def _linear(model: AnyModel) -> list[Linear]:
    from ratoon.model.layers import Linear

    return [module for block in model.layers for module in block.modules() if type(module) is Linear]


@torch.no_grad()
def _seconds(layer: Linear, *, exact: bool) -> float:
    """The fastest of some products."""
    x_NI = torch.ones(PROBE_ROWS, layer.in_features, dtype=layer.weight.dtype)
    codes, scale = layer.codes, layer.scale
    assert codes is not None and scale is not None
    times = []
    for _ in range(PROBES):
        began = time.perf_counter()
        if exact:
            x_NI @ layer.weight.t()
        else:
            product(x_NI, codes, scale)
        times.append(time.perf_counter() - began)
    return min(times)
