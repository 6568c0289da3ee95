"""Rotary positions (Su et al., arXiv:2104.09864) and how their frequencies stretch to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ratoon.model.config import ModelConfig, RopeScaling


def frequencies(cfg: ModelConfig, *, local: bool = False) -> tuple[Tensor, float]:
    """Angles per position (rotating channels / 2,) float32 and the factor on cos and sin.

    `local`: for sliding-window layers of models that give them a theta of their own, unscaled (Gemma 3).
    """
    rotating = round(cfg.channels * cfg.rope_fraction)
    theta = cfg.rope_local_theta if local and cfg.rope_local_theta is not None else cfg.rope_theta
    plain = 1.0 / (theta ** (torch.arange(0, rotating, 2, dtype=torch.float32) / rotating))
    if cfg.rope_scaling is None or (local and cfg.rope_local_theta is not None):
        return plain, 1.0
    return _stretched(plain, cfg.rope_scaling, theta, rotating, cfg.context_tokens)


def _stretched(
    plain: Tensor, scaling: RopeScaling, theta: float, rotating: int, context_tokens: int
) -> tuple[Tensor, float]:
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    original = scaling.original_context_tokens or context_tokens
    if scaling.kind == "llama3":
        # Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended.
        wavelength = 2 * math.pi / plain
        low_wavelength = original / scaling.low_freq_factor
        high_wavelength = original / scaling.high_freq_factor
        blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        middle = (1 - blend) * plain / scaling.factor + blend * plain
        slowed = torch.where(wavelength > low_wavelength, plain / scaling.factor, plain)
        return torch.where((wavelength <= low_wavelength) & (wavelength >= high_wavelength), middle, slowed), 1.0
    # YaRN (Peng et al., arXiv:2309.00071, eq. 17-23): interpolate slow channels, keep fast ones.

    def channel(rotations: float) -> float:
        return rotating * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotating - 1)
    ramp = ((torch.arange(rotating // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    stretched = plain / scaling.factor * ramp + plain * (1 - ramp)

    def attention_scale(factor: float, mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.attention_factor is not None:
        return stretched, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return stretched, attention_scale(scaling.factor, scaling.mscale) / attention_scale(
            scaling.factor, scaling.mscale_all_dim
        )
    return stretched, attention_scale(scaling.factor)


class Rotary:
    """Tables of cos and sin for every position of the context; no module, so that a cast of the model to bfloat16
    and back leaves the angles exact."""

    def __init__(self, cfg: ModelConfig, *, local: bool = False) -> None:
        self.cfg = cfg
        self.local = local
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each (context_tokens, rotating channels / 2)."""
        found = self._tables.get((device, dtype))
        if found is None:
            angles, factor = frequencies(self.cfg, local=self.local)
            turns = torch.arange(self.cfg.context_tokens, dtype=torch.float32)[:, None] * angles[None]
            cos, sin = turns.cos() * factor, turns.sin() * factor * self.cfg.rope_sign
            found = cos.to(device, dtype), sin.to(device, dtype)
            self._tables[(device, dtype)] = found
        return found


def rotate(x_BTHC: Tensor, cos_BT1r: Tensor, sin_BT1r: Tensor) -> Tensor:
    """Turn the first 2r channels of each head, channel i together with channel i + r."""
    r = cos_BT1r.shape[-1]
    first, second = x_BTHC[..., :r], x_BTHC[..., r : 2 * r]
    turned = [first * cos_BT1r - second * sin_BT1r, second * cos_BT1r + first * sin_BT1r]
    if 2 * r < x_BTHC.shape[-1]:
        turned.append(x_BTHC[..., 2 * r :])
    return torch.cat(turned, dim=-1)
