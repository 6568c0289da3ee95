"""LoRA (Hu et al., arXiv:2106.09685), rank-stabilised (Kalajdzievski, arXiv:2312.03732), and DoRA (Liu et al.,
arXiv:2402.09353).

Decides the two small matrices beside a layer, their first values and their scale, and how they are computed: one
product for the A of all layers that read the same input. Where they go is said by `inject.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

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
    joined_bias,
    named_units,
    outputs_of,
    pattern_of,
    place,
    plain_layer,
    refuse_unknown,
    say_targets,
    told_units,
    units,
)
from ratoon.base.seeds import derive
from ratoon.base.settings import build
from ratoon.model.layers import Linear, side_by_side
from ratoon.model.transformer import Transformer


class LoraSettings(SiteSettings):
    """Two small matrices beside each linear layer."""

    kind: Literal["lora"] = Field("lora", description="low-rank adaptation")
    rank: int = Field(8, ge=1, description="inner width of the two matrices")
    alpha: float = Field(16.0, gt=0, description="their product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of a layer's inputs that its A does not see in training")
    rank_stabilized: bool = Field(False, description="scaled by alpha / sqrt(rank): for high ranks")
    decomposed: bool = Field(False, description="DoRA: each output's length is learned apart from its direction")


class LowRank(Adapted):
    """base(x) + drop(x) Dᵀ Uᵀ with D (R, in), U (out, R): what methods of two small matrices share."""

    def __init__(self, base: Linear, dropout: float) -> None:
        super().__init__(base)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """D and U, the scale in one of them."""
        raise NotImplementedError

    def shared(self) -> nn.Parameter:
        """The parameter by which modules that share their D are known."""
        raise NotImplementedError

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, self.base(x))

    def after(self, x: Tensor, h: Tensor) -> Tensor:
        """What stands in the layer's place, from what the layer itself gave."""
        down_RI, up_OR = (one.to(h.dtype) for one in self.factors())
        return h + (self._dropped(x) @ down_RI.t()) @ up_OR.t()

    def change(self) -> Tensor:
        """U D (out, in), in float32."""
        down_RI, up_OR = self.factors()
        return up_OR.float() @ down_RI.float()

    def merged(self) -> tuple[Tensor, Tensor | None]:
        bias = self.base.bias
        return self.base.weight.float() + self.change(), None if bias is None else bias.float()

    def side_by_side(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
        if not can_join(layers, type(self)):
            return None
        return joined_base(layers, x) + joined_change(layers, self._dropped(x))


def joined_change(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x Dᵀ Uᵀ of some layers side by side, in two products; 0 for those without parts."""
    # No dictionary by identity here: the compiler would compile each block anew.
    mine = [layer for layer in layers if isinstance(layer, LowRank)]
    downs, ups = [], []
    for layer in layers:
        if isinstance(layer, LowRank):
            down_RI, up_OR = (one.to(x.dtype) for one in layer.factors())
            downs.append(down_RI)
            ups.append(up_OR)
        else:
            ups.append(x.new_zeros(outputs_of(layer), 0))
    if len(mine) > 1 and all(layer.shared() is mine[0].shared() for layer in mine[1:]):  # fused layers have one A
        rank = len(downs[0])
        ups = [up_OR if up_OR.shape[1] else x.new_zeros(len(up_OR), rank) for up_OR in ups]
        return (x @ downs[0].t()) @ torch.cat(ups).t()
    up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return (x @ torch.cat(downs).t()) @ up.t()


class LoraLinear(LowRank):
    """W x + s B A x (arXiv:2106.09685, eq. 3)."""

    def __init__(self, base: Linear, A_RI: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(base, dropout)
        self.scale = scale
        self.A = A_RI
        weight = base.weight
        self.B = nn.Parameter(torch.zeros(base.out_features, len(A_RI), device=weight.device, dtype=weight.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B * self.scale

    def shared(self) -> nn.Parameter:
        return self.A


class DoraLinear(LoraLinear):
    """m (W + s B A) / ‖W + s B A‖ with the length of each output's row (arXiv:2402.09353, eq. 5).

    The learned length m is kept as ‖W‖ + `shift`: bfloat16 has room for the small change of a length, not for the
    length with its change. The norm below is no part of the gradient (section 4.3).
    """

    square_O: Tensor

    def __init__(self, base: Linear, A_RI: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(base, A_RI, scale, dropout)
        weight = base.weight
        self.shift = nn.Parameter(torch.zeros(base.out_features, device=weight.device, dtype=weight.dtype))
        self.register_buffer("square_O", weight.detach().float().square().sum(1), persistent=False)

    def gain(self) -> Tensor:
        """m / ‖W + s B A‖ (out,), in float32."""
        return (self.square_O.sqrt() + self.shift.float()) / self._length()

    @torch.no_grad()
    def _length(self) -> Tensor:
        """‖W + s B A‖ of each row without that matrix: ‖w‖² + 2 s w Aᵀ b + s² bᵀ A Aᵀ b."""
        down, up = self.factors()
        down_RI, up_OR = down.float(), up.float()
        crossed_OR = (self.base.weight @ down.to(self.base.weight.dtype).t()).float()
        inner_OR = 2 * crossed_OR + up_OR @ (down_RI @ down_RI.t())
        return (self.square_O + (inner_OR * up_OR).sum(1)).clamp(min=0).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self._with_gain(x, side_by_side((self.base,), x, None))

    def after(self, x: Tensor, h: Tensor) -> Tensor:
        return self._with_gain(x, h if self.base.bias is None else h - self.base.bias)

    def _with_gain(self, x: Tensor, h: Tensor) -> Tensor:
        """From the layer's output without its bias."""
        h = super().after(x, h) * self.gain().to(h.dtype)
        return h if self.base.bias is None else h + self.base.bias

    def merged(self) -> tuple[Tensor, Tensor | None]:
        bias = self.base.bias
        whole = self.base.weight.float() + self.change()
        weight = whole * ((self.square_O.sqrt() + self.shift.float()) / whole.norm(dim=1))[:, None]
        return weight, None if bias is None else bias.float()

    def side_by_side(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
        if not can_join(layers, type(self)):
            return None
        gains = [
            layer.gain() if isinstance(layer, DoraLinear) else torch.ones(outputs_of(layer), device=x.device)
            for layer in layers
        ]
        h = joined_base(layers, x, with_bias=False) + joined_change(layers, self._dropped(x))
        h = h * torch.cat(gains).to(h.dtype)
        bias = joined_bias(layers)
        return h if bias is None else h + bias


@dataclass(frozen=True)
class Parts:
    """What a unit gets."""

    unit: Unit
    rank: int
    alpha: float


class Lora(Beside):
    """Two small matrices beside each chosen layer, which are frozen; folded in as in section 4.1 of the paper."""

    kind = "lora"
    part = LoraLinear
    settings: LoraSettings

    def _units(self, model: Transformer) -> list[Parts]:
        settings, told = self.settings, self._told
        if told is None:
            chosen = units(model, chosen_sites(model, settings))
            return [Parts(unit, settings.rank, settings.alpha) for unit in chosen]
        return [
            Parts(
                unit,
                pattern_of(told.get("rank_pattern"), name, settings.rank),
                pattern_of(told.get("alpha_pattern"), name, settings.alpha),
            )
            for name, unit in told_units(model, told)
        ]

    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model and put the matrices in: A as in the authors' code, uniform in ± 1/sqrt(in); B zero."""
        found = self._units(model)
        layers = {site.name: plain_layer(model, site.name) for one in found for site in one.unit.sites}
        freeze(model)
        part = DoraLinear if self.settings.decomposed else LoraLinear
        for one in found:
            weight = layers[one.unit.sites[0].name].weight
            generator = torch.Generator().manual_seed(derive(seed, "method", self.kind, one.unit.sites[0].name))
            bound = 1 / math.sqrt(one.unit.inputs)
            values_RI = torch.empty(one.rank, one.unit.inputs).uniform_(-bound, bound, generator=generator)
            A_RI = nn.Parameter(values_RI.to(weight.device, weight.dtype))
            scale = one.alpha / (math.sqrt(one.rank) if self.settings.rank_stabilized else one.rank)
            for site in one.unit.sites:
                module = part(layers[site.name], A_RI, scale, self.settings.dropout)
                place(model, site.name, module.train(model.training))

    def count(self, model: Transformer) -> int:
        """R (in + out) for each matrix, with DoRA a length for each output; q, k and v have one A where their family
        keeps them as one matrix."""
        each = 1 if self.settings.decomposed else 0
        return sum(
            one.rank * (one.unit.inputs + one.unit.outputs) + each * one.unit.outputs for one in self._units(model)
        )

    def facts(self, model: Transformer) -> dict[str, Any]:
        """How many layers have matrices, and their ranks."""
        ranks = [len(module.A) for module in adapted(model, LoraLinear).values()]
        return {"layers": len(ranks), "ranks": sorted(set(ranks))}

    # -- as PEFT has it ------------------------------------------------------------------------------------------------

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """PEFT's `LoraConfig`."""
        settings = self.settings
        named = named_units(model, [one.unit for one in self._units(model)], self.kind)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": _whole(settings.alpha),
            "lora_dropout": settings.dropout,
            "use_rslora": settings.rank_stabilized,
            "use_dora": settings.decomposed,
            "bias": "none",
            "fan_in_fan_out": any(unit.turned for _, unit in named),
            **say_targets(model, [name for name, _ in named], by_layer=True),
        }
        for key, pattern in (("rank", "rank_pattern"), ("alpha", "alpha_pattern")):
            other = {
                name.replace(".", r"\."): getattr(one, key)
                for (name, _), one in zip(named, self._units(model), strict=True)
                if getattr(one, key) != getattr(settings, key)
            }
            if other:
                config[pattern] = other
        return config

    @torch.no_grad()
    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """`lora_A.weight` (R, in), `lora_B.weight` (out, R) and DoRA's `lora_magnitude_vector` (out,) of each module. A
        site of a fused matrix that has no parts has zeros there, and the length that it has."""
        found: dict[str, Tensor] = {}
        parts = adapted(model, LoraLinear)
        for name, unit in named_units(model, [one.unit for one in self._units(model)], self.kind):
            mine = [parts.get(site.name) for site in unit.whole]
            A = parts[unit.sites[0].name].A.detach()
            found[f"{PREFIX}{name}.lora_A.weight"] = A
            found[f"{PREFIX}{name}.lora_B.weight"] = unit.join(
                [
                    A.new_zeros(site.outputs, len(A)) if part is None else part.B.detach()
                    for site, part in zip(unit.whole, mine, strict=True)
                ]
            )
            if self.settings.decomposed:
                lengths = [
                    part.square_O.sqrt() + part.shift.float()
                    if isinstance(part, DoraLinear)
                    else plain_layer(model, site.name).weight.float().square().sum(1).sqrt()
                    for site, part in zip(unit.whole, mine, strict=True)
                ]
                found[f"{PREFIX}{name}.lora_magnitude_vector"] = unit.join(lengths)
        return found

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Lora:
        """The method that a `LoraConfig` says. Raises `ArtifactError` for what it may say and we do not know."""
        if config.get("ratoon") is not None:
            return cls(build(LoraSettings, config["ratoon"], where="ratoon.json"))
        refuse_unknown({**config, **_said_otherwise(config)}, LORA_KEYS, LORA_SILENT)
        table = {
            "rank": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "dropout": config.get("lora_dropout", 0.0),
            "rank_stabilized": config.get("use_rslora", False),
            "decomposed": config.get("use_dora", False),
        }
        method = cls(build(LoraSettings, table, where="adapter_config.json"))
        method._told = dict(config)
        return method

    @torch.no_grad()
    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed matrices the values of a PEFT folder."""
        values, parts = Values(weights), adapted(model, LoraLinear)
        found = self._units(model)
        for (name, unit), one in zip(named_units(model, [o.unit for o in found], self.kind), found, strict=True):
            R = one.rank
            whole = sum(site.outputs for site in unit.whole)
            A = values.take([f"{PREFIX}{name}.lora_A.weight"], (R, unit.inputs))
            ups = unit.split(values.take([f"{PREFIX}{name}.lora_B.weight"], (whole, R)))
            key = f"{PREFIX}{name}.lora_magnitude_vector"
            lengths = (
                unit.split(values.take([key, f"{key}.weight"], (whole,)))
                if self.settings.decomposed
                else [None] * len(ups)
            )
            for site, B, length in zip(unit.whole, ups, lengths, strict=True):
                part = parts.get(site.name)
                if part is None:
                    continue  # a site of a fused matrix that our settings leave out
                part.A.copy_(A)
                part.B.copy_(B)
                if isinstance(part, DoraLinear) and length is not None:
                    part.shift.copy_(length.float().to(part.square_O.device) - part.square_O.sqrt())
        values.expect_end()


def _whole(number: float) -> float | int:
    """A whole number without its point: what PEFT writes."""
    return int(number) if number == int(number) else number


LORA_KEYS = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    }
)  # fmt: skip
LORA_SILENT = frozenset({"qalora_group_size", "ensure_weight_tying", "eva_config"})
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""First values that leave the base's weights as they are, so that a saved adapter stands beside the plain base."""


def _said_otherwise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Known keys with values that ask for what we do not have, under names that `refuse_unknown` tells."""
    odd: dict[str, Any] = {}
    if config.get("bias", "none") != "none":
        odd["bias (of the base, trained)"] = config["bias"]
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        odd["init_lora_weights (which changes the base)"] = config["init_lora_weights"]
    return odd
