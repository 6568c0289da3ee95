"""Prefix tuning (Li & Liang, arXiv:2101.00190): learned keys and values in front of each text, in every layer.

Decides the values, and the MLP through which they may be trained; which slots are theirs is said in `slots.py`, and
attention puts them in through `Attention.prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ratoon.adapt.contract import freeze
from ratoon.adapt.prompt import PEFT_TENSOR, the_tensor, virtual_tokens_of
from ratoon.adapt.slots import Virtual, fill, room_for
from ratoon.base.errors import ConfigError
from ratoon.base.seeds import derive
from ratoon.base.settings import Settings, build
from ratoon.model.cache import Cache
from ratoon.model.config import ModelConfig
from ratoon.model.transformer import Attention, Transformer

RANDOM_STD = 0.02
"""Deviation of random first values: keys near 0 take an even share of attention, values near 0 add little."""


class PrefixSettings(Settings):
    """Learned keys and values in front of each text."""

    kind: Literal["prefix"] = Field("prefix", description="prefix tuning")
    tokens: int = Field(20, ge=1, description="virtual tokens in front of each text")
    reparametrize: bool = Field(
        False, description="train through an MLP, steadier and larger (section 4.3); saved without it"
    )
    mlp_width: int | None = Field(None, ge=1, description="the MLP's hidden width; absent: channels of a token's keys")
    init: Literal["vocabulary", "text", "random"] | None = Field(
        None,
        description="first values: what the model itself computes for sampled tokens, or for `text` (section 7.4), or "
        "random numbers; absent: vocabulary, or random through an MLP",
    )
    text: str | None = Field(None, description="the text whose keys and values are the first; with init: text")

    @model_validator(mode="after")
    def _fits(self) -> PrefixSettings:
        if (self.init == "text") != (self.text is not None):
            raise ValueError("`text` and `init: text` belong together")
        if self.reparametrize and self.init not in (None, "random"):
            raise ValueError("an MLP (`reparametrize`) starts at random: keys of tokens are not what it gives at first")
        if self.mlp_width is not None and not self.reparametrize:
            raise ValueError("`mlp_width` is the width of an MLP that `reparametrize` switches on")
        return self


class Prefix(nn.Module):
    """Keys and values of one layer (P, K·C each) for the first slots of each document."""

    def __init__(self, keys_PX: Tensor, values_PX: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys_PX)
        self.values = nn.Parameter(values_PX)

    @property
    def tokens(self) -> int:
        """P."""
        return len(self.keys)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K·C)."""
        return self.keys, self.values

    def forward(self, k_BTKC: Tensor, v_BTKC: Tensor, start: int, position_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with the learned ones in the slots of positions below P."""
        shape = k_BTKC.shape
        keys_PX, values_PX = self.plain()
        k_BTX = fill(k_BTKC.reshape(*shape[:2], -1), keys_PX, start, position_BT)
        v_BTX = fill(v_BTKC.reshape(*shape[:2], -1), values_PX, start, position_BT)
        return k_BTX.view(shape), v_BTX.view(shape)


class Source(nn.Module):
    """What the MLP's last product reads: tanh(E W + b) (P, M), the same for all layers."""

    def __init__(self, tokens: int, channels: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(tokens, channels))
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.table, self.weight, self.bias))


class ReparametrizedPrefix(Prefix):
    """A layer's keys and values as its part of the MLP's last product; `source` is one module for all layers."""

    def __init__(self, source: Source, channels: int) -> None:
        nn.Module.__init__(self)
        self.source = source
        width = len(source.bias)
        self.weight = nn.Parameter(torch.empty(2 * channels, width))
        self.bias = nn.Parameter(torch.empty(2 * channels))

    @property
    def tokens(self) -> int:
        """P."""
        return len(self.source.table)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K·C)."""
        keys_PX, values_PX = F.linear(self.source(), self.weight, self.bias).chunk(2, dim=-1)
        return keys_PX, values_PX


class PrefixTuning(Virtual):
    """P keys and values in front of each text, in every layer."""

    kind = "prefix"
    settings: PrefixSettings

    def __init__(self, settings: PrefixSettings) -> None:
        super().__init__(settings, settings.tokens)

    @torch.no_grad()
    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model and put the prefix in. Raises `ConfigError` where it leaves no room for a text."""
        room_for(model, self.virtual_tokens)
        prefixes = self._made(model, seed)
        freeze(model)
        weight = model.head_weight()
        for attention, prefix in zip(attentions(model), prefixes, strict=True):
            attention.prefix = prefix.to(weight.device, weight.dtype)

    def _made(self, model: Transformer, seed: int) -> list[Prefix]:
        cfg, P, X = model.cfg, self.virtual_tokens, channels_of(model.cfg)
        generator = torch.Generator().manual_seed(derive(seed, "method", self.kind, "random"))
        if self.settings.reparametrize:
            source = Source(P, X, self._width(cfg))
            source.table.normal_(generator=generator)
            made = [ReparametrizedPrefix(source, X) for _ in range(cfg.layers)]
            products = [(source.weight, source.bias), *((prefix.weight, prefix.bias) for prefix in made)]
            for weight, bias in products:
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)
            return list(made)
        if self.settings.init == "random":
            values = [torch.randn(2, P, X, generator=generator) * RANDOM_STD for _ in range(cfg.layers)]
            return [Prefix(keys_PX, values_PX) for keys_PX, values_PX in values]
        return self._activations(model, seed)

    def _activations(self, model: Transformer, seed: int) -> list[Prefix]:
        """What the model itself computes for tokens in these slots: it goes on as if it had read them."""
        cfg, P = model.cfg, self.virtual_tokens
        if cfg.cross_attention:
            raise ConfigError(
                "the decoder of an encoder-decoder has no keys of tokens without a source",
                where="method.init",
                expected="random",
            )
        weight = model.head_weight()
        cache = Cache(cfg, 1, P, dtype=weight.dtype, device=weight.device)
        model(self._start_ids(model, seed)[None], cache=cache)
        return [
            Prefix(*(kept[0].transpose(0, 1).reshape(P, -1).clone() for kept in pair))
            for pair in zip(cache.keys, cache.values, strict=True)
        ]

    def _width(self, cfg: ModelConfig) -> int:
        return self.settings.mlp_width or channels_of(cfg)

    def count(self, model: Transformer) -> int:
        """2 L P K C; through an MLP of width M with X = K C: P X + (X + 1) M + 2 L X (M + 1)."""
        L, P, X = model.cfg.layers, self.virtual_tokens, channels_of(model.cfg)
        if not self.settings.reparametrize:
            return 2 * L * P * X
        M = self._width(model.cfg)
        return P * X + (X + 1) * M + 2 * L * X * (M + 1)

    def remove(self, model: Transformer) -> None:
        """Take the prefix out."""
        for attention in attentions(model):
            attention.prefix = None

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """The method as PEFT's adapter_config.json says it. The MLP is no part of what is saved."""
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.virtual_tokens,
            "token_dim": channels_of(model.cfg),
            "num_layers": model.cfg.layers,
            "num_attention_heads": model.cfg.kv,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": self._width(model.cfg),
            "prefix_projection": False,
        }

    @torch.no_grad()
    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """Keys and values side by side, layer after layer (P, L · 2 · K · C), under PEFT's name."""
        found = [part for attention in attentions(model) for part in _prefix_of(attention).plain()]
        return {PEFT_TENSOR: torch.cat(found, dim=1)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PrefixTuning:
        """The method that a config of PEFT says; what lies in a folder is the plain prefix, trained how it may."""
        return cls(
            build(PrefixSettings, {"tokens": virtual_tokens_of(config), "init": "random"}, where="adapter_config.json")
        )

    @torch.no_grad()
    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed method the values of a PEFT folder; an MLP is left behind. Raises `ArtifactError` for
        tensors that do not fit."""
        P, X, L = self.virtual_tokens, channels_of(model.cfg), model.cfg.layers
        found_LPX = the_tensor(weights, (P, 2 * L * X)).view(P, 2 * L, X).transpose(0, 1)
        weight = model.head_weight()
        for number, attention in enumerate(attentions(model)):
            pair = found_LPX[2 * number : 2 * number + 2].to(weight.device, weight.dtype)
            attention.prefix = Prefix(pair[0].clone(), pair[1].clone())


def channels_of(cfg: ModelConfig) -> int:
    """Channels of a token's keys, and of its values: K · C."""
    return cfg.kv * cfg.channels


def attentions(model: Transformer) -> list[Attention]:
    """Each layer's attention over the text itself."""
    found = [block.attention for block in model.layers]
    assert all(isinstance(attention, Attention) for attention in found)
    return found  # type: ignore[return-value]


def _prefix_of(attention: Attention) -> Prefix:
    assert isinstance(attention.prefix, Prefix)
    return attention.prefix
