"""Bottleneck adapters: a small MLP behind the parts of a block, added to what they give.

Houlsby et al. (arXiv:1902.00751, section 2.1) put one behind attention and one behind the MLP, Pfeiffer et al.
(arXiv:2005.00247, section 3.1) one behind the MLP alone; both before the sum with the stream. Decides the small MLP
and where it stands; which layers there are is said by `Transformer.sites()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ratoon.adapt.contract import Method, freeze
from ratoon.adapt.inject import Adapted, adapted, place, plain_layer, take_out
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.seeds import derive
from ratoon.base.settings import Settings, build
from ratoon.model.layers import Linear
from ratoon.model.transformer import Site, Transformer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
Activation = Literal["relu", "gelu", "silu", "tanh"]
FIRST_STD = 0.01
"""Deviation of the first product's first values (Houlsby et al., section 3.1); the second product starts at 0."""
PARTS = ("down", "down_bias", "up", "up_bias")


class BottleneckSettings(Settings):
    """A small MLP behind the parts of a block."""

    reduction: float = Field(16, ge=1, description="the stream is this many times wider than the bottleneck")
    layers: tuple[int, ...] | None = Field(None, description="blocks that get one, counted from 0; absent: all")


class HoulsbySettings(BottleneckSettings):
    """Bottlenecks behind attention and behind the MLP."""

    kind: Literal["houlsby"] = Field("houlsby", description="bottleneck adapters behind attention and MLP")
    activation: Activation = Field("gelu", description="between the two products")


class PfeifferSettings(BottleneckSettings):
    """Bottlenecks behind the MLP."""

    kind: Literal["pfeiffer"] = Field("pfeiffer", description="bottleneck adapters behind the MLP")
    activation: Activation = Field("relu", description="between the two products")


class WithBottleneck(Adapted):
    """h + U act(W h + b) + c for the output h (…, D) of the layer `base`; W (R, D), U (D, R)."""

    def __init__(self, base: Linear, rank: int, activation: Activation, generator: torch.Generator) -> None:
        super().__init__(base)
        D, weight = base.out_features, base.weight
        self.activation = ACTIVATIONS[activation]
        first_RD = torch.empty(rank, D)
        nn.init.trunc_normal_(first_RD, std=FIRST_STD, a=-2 * FIRST_STD, b=2 * FIRST_STD, generator=generator)
        values = (first_RD, torch.zeros(rank), torch.zeros(D, rank), torch.zeros(D))
        self.down, self.down_bias, self.up, self.up_bias = (
            nn.Parameter(value.to(weight.device, weight.dtype)) for value in values
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, self.base(x))

    def after(self, x: Tensor, h: Tensor) -> Tensor:
        """What stands in the layer's place, from what the layer itself gave."""
        return h + F.linear(self.activation(F.linear(h, self.down, self.down_bias)), self.up, self.up_bias)


class Bottleneck(Method):
    """Bottlenecks behind the layers of some kinds, which are the last ones of a block's parts."""

    settings: HoulsbySettings | PfeifferSettings
    behind: tuple[str, ...]
    not_merged = "its parts have an activation between them, so that no matrix says what they do"

    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model and put the bottlenecks in. Raises `ConfigError` for blocks that the model lacks, and for a
        mixture of experts, which has no one last layer."""
        layers = {site: plain_layer(model, site.name) for site in self._sites(model)}
        freeze(model)
        for site, base in layers.items():
            generator = torch.Generator().manual_seed(derive(seed, "method", self.kind, site.name))
            part = WithBottleneck(base, self._rank(site), self.settings.activation, generator)
            place(model, site.name, part.train(model.training))

    def _sites(self, model: Transformer) -> list[Site]:
        layers = self.settings.layers if self.settings.layers is not None else tuple(range(model.cfg.layers))
        unknown = sorted({layer for layer in layers if not 0 <= layer < model.cfg.layers})
        if unknown or not layers:
            raise ConfigError(
                f"the layers {', '.join(map(str, unknown)) or '()'}",
                where="method.layers",
                expected=f"some of 0 to {model.cfg.layers - 1}, the model's blocks",
            )
        sites = [site for site in model.sites() if site.kind in self.behind and site.layer in layers]
        if len(sites) < len(self.behind) * len(set(layers)):
            mixtures = sorted(layer for layer in layers if model.cfg.has_experts(layer))
            raise ConfigError(
                f"the MLP of block {mixtures[0]} is a mixture of experts: it has no last layer to stand behind",
                where="method.kind",
                expected="blocks whose MLP is dense, or another method (method.layers leaves blocks out)",
            )
        return sites

    def _rank(self, site: Site) -> int:
        return max(1, round(site.outputs / self.settings.reduction))

    def count(self, model: Transformer) -> int:
        """2 R D + R + D for each, R = D / reduction."""
        return sum(2 * self._rank(site) * site.outputs + self._rank(site) + site.outputs for site in self._sites(model))

    def remove(self, model: Transformer) -> None:
        """Take the bottlenecks out."""
        take_out(model, WithBottleneck)

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """What adapter_config.json says. PEFT has no such method: `peft_type` is one that it refuses by name."""
        return {"peft_type": "BOTTLENECK", **self.settings.model_dump(mode="json")}

    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """The parts of each bottleneck by the name of the layer it stands behind: `layers.0.mlp.down.up`, …"""
        found = adapted(model, WithBottleneck)
        return {f"{name}.{part}": getattr(module, part).detach() for name, module in found.items() for part in PARTS}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Bottleneck:
        """The method that such a config says."""
        table = {key: value for key, value in config.items() if key in cls.settings_kind().model_fields}
        return cls(build(cls.settings_kind(), table, where="adapter_config.json"))

    @classmethod
    def settings_kind(cls) -> type[HoulsbySettings] | type[PfeifferSettings]:
        """The class of the settings."""
        return HoulsbySettings if cls.kind == "houlsby" else PfeifferSettings

    @torch.no_grad()
    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed bottlenecks their values. Raises `ArtifactError` for tensors that do not fit."""
        found = adapted(model, WithBottleneck)
        wanted = {f"{name}.{part}": getattr(module, part) for name, module in found.items() for part in PARTS}
        odd = sorted(wanted.keys() ^ weights.keys())
        if odd:
            lacks = "has no" if odd[0] in wanted else "has a"
            raise ArtifactError(f"the adapter {lacks} tensor {odd[0]}", expected="four for each layer it stands behind")
        for name, parameter in wanted.items():
            if weights[name].shape != parameter.shape:
                raise ArtifactError(
                    f"{name} has the shape {tuple(weights[name].shape)}", expected=str(tuple(parameter.shape))
                )
            parameter.copy_(weights[name])


class Houlsby(Bottleneck):
    """Behind attention and behind the MLP."""

    kind = "houlsby"
    behind = ("o", "down")


class Pfeiffer(Bottleneck):
    """Behind the MLP."""

    kind = "pfeiffer"
    behind = ("down",)
