"""IA3 (Liu et al., arXiv:2205.05638): keys, values and the MLP's inner activation are multiplied by learned vectors.

Decides where the vectors stand (section 3.3: behind the products of keys and values, in front of the MLP's last one)
and that they start as ones. Which layers there are is said by `inject.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ratoon.adapt.contract import freeze
from ratoon.adapt.inject import (
    PREFIX,
    Adapted,
    Beside,
    SiteSettings,
    Unit,
    Values,
    adapted,
    can_join,
    chosen_sites,
    joined_base,
    named_units,
    outputs_of,
    place,
    plain_layer,
    refuse_unknown,
    say_targets,
    told_units,
    units,
)
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.model.layers import Linear
from ratoon.model.transformer import Transformer

PAPERS = ("k", "v", "down", "cross_k", "cross_v")
"""Kinds that get a vector where the settings name none: l_k, l_v and l_ff of eq. 1."""


class IA3Settings(SiteSettings):
    """Learned vectors that multiply activations."""

    kind: Literal["ia3"] = Field("ia3", description="vectors that multiply keys, values and the MLP's inside")


class IA3Linear(Adapted):
    """l * (W x + b), or with `inner` W (l * x) + b; `scale` is l."""

    def __init__(self, base: Linear, *, inner: bool) -> None:
        super().__init__(base)
        self.inner = inner
        weight = base.weight
        channels = base.in_features if inner else base.out_features
        self.scale = nn.Parameter(torch.ones(channels, device=weight.device, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype)
        found: Tensor = self.base(x * scale) if self.inner else self.base(x) * scale
        return found

    def merged(self) -> tuple[Tensor, Tensor | None]:
        weight, bias, scale = self.base.weight.float(), self.base.bias, self.scale.float()
        if self.inner:
            return weight * scale, None if bias is None else bias.float()
        return weight * scale[:, None], None if bias is None else bias.float() * scale

    def side_by_side(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
        if not can_join(layers, IA3Linear) or any(isinstance(one, IA3Linear) and one.inner for one in layers):
            return None
        scales = [
            layer.scale.to(x.dtype) if isinstance(layer, IA3Linear) else x.new_ones(outputs_of(layer))
            for layer in layers
        ]
        return joined_base(layers, x) * torch.cat(scales)


class IA3(Beside):
    """One vector for each chosen layer; the layers themselves are frozen."""

    kind = "ia3"
    part = IA3Linear
    settings: IA3Settings

    def _units(self, model: Transformer) -> list[tuple[Unit, bool]]:
        """The units, and whether their vector multiplies what they read."""
        if self._told is None:
            chosen = units(model, chosen_sites(model, self.settings, PAPERS))
            return [(unit, unit.sites[0].kind == "down") for unit in chosen]
        inner = {"target_modules": self._told.get("feedforward_modules")}
        names = {name for name, _ in told_units(model, inner)} if inner["target_modules"] else set()
        found = [(unit, name in names) for name, unit in told_units(model, self._told)]
        odd = [unit for unit, inside in found if inside and len(unit.whole) > 1]
        if odd:
            raise ArtifactError(
                f"feedforward_modules names {odd[0].name}, which holds queries, keys and values",
                where="adapter_config.json",
                expected="modules of one matrix",
            )
        return found

    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model and put the vectors in, all ones."""
        found = [(site.name, inner) for unit, inner in self._units(model) for site in unit.sites]
        layers = {name: plain_layer(model, name) for name, _ in found}
        freeze(model)
        for name, inner in found:
            place(model, name, IA3Linear(layers[name], inner=inner).train(model.training))

    def count(self, model: Transformer) -> int:
        """K C for keys, K C for values and F for the MLP of each block: the width that is multiplied."""
        return sum(unit.inputs if inner else unit.outputs for unit, inner in self._units(model))

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """PEFT's `IA3Config`."""
        found = self._units(model)
        named = named_units(model, [unit for unit, _ in found], self.kind)
        inner = [name for (name, _), (_, inside) in zip(named, found, strict=True) if inside]
        said = {name: say_targets(model, names, by_layer=False)["target_modules"]
                for name, names in (("all", [name for name, _ in named]), ("inner", inner)) if names}  # fmt: skip
        if not set(said.get("inner", ())) <= set(said["all"]):
            # PEFT wants the one to be a part of the other: then both are told by whole names.
            said = {"all": sorted(name for name, _ in named), "inner": sorted(inner)}
        return {
            "peft_type": "IA3",
            "target_modules": said["all"],
            "feedforward_modules": said.get("inner", []),
            "fan_in_fan_out": any(unit.turned for _, unit in named),
        }

    @torch.no_grad()
    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """`ia3_l` of each module: (out, 1), or (1, in) where it multiplies what is read. A site of a fused matrix
        without a vector has ones."""
        found: dict[str, Tensor] = {}
        parts = adapted(model, IA3Linear)
        every = self._units(model)
        for (name, unit), (_, inner) in zip(named_units(model, [u for u, _ in every], self.kind), every, strict=True):
            first = parts[unit.sites[0].name].scale.detach()
            scales = [
                parts[site.name].scale.detach() if site.name in parts else first.new_ones(site.outputs)
                for site in unit.whole
            ]
            found[f"{PREFIX}{name}.ia3_l"] = first[None] if inner else unit.join(scales)[:, None]
        return found

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> IA3:
        """The method that an `IA3Config` says."""
        if config.get("ratoon") is not None:
            return cls(build(IA3Settings, config["ratoon"], where="ratoon.json"))
        refuse_unknown(config, ("target_modules", "exclude_modules", "feedforward_modules"), ("init_ia3_weights",))
        method = cls(build(IA3Settings, {}))
        method._told = dict(config)
        return method

    @torch.no_grad()
    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed vectors the values of a PEFT folder."""
        values, parts = Values(weights), adapted(model, IA3Linear)
        every = self._units(model)
        for (name, unit), (_, inner) in zip(named_units(model, [u for u, _ in every], self.kind), every, strict=True):
            outputs = sum(site.outputs for site in unit.whole)
            found = values.take([f"{PREFIX}{name}.ia3_l"], (1, unit.inputs) if inner else (outputs, 1))
            scales = [found[0]] if inner else [one[:, 0] for one in unit.split(found)]
            for site, scale in zip(unit.whole, scales, strict=True):
                if site.name in parts:
                    parts[site.name].scale.copy_(scale)
                elif not torch.equal(scale, torch.ones_like(scale)):
                    raise ConfigError(f"the adapter multiplies {site.name}, and the settings leave it out")
        values.expect_end()
