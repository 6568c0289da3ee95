"""AdaLoRA (Zhang et al., arXiv:2303.10512): the change of each layer as P Λ Q, with singular values taken away where
they matter least.

Decides the penalty that keeps P and Q orthogonal, the importance of a triplet, and the budget over a run. The hooks
are the loop's: a user has nothing to call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ratoon.adapt.contract import Moment, freeze
from ratoon.adapt.inject import (
    PREFIX,
    Beside,
    SiteSettings,
    Unit,
    Values,
    adapted,
    chosen_sites,
    named_units,
    place,
    plain_layer,
    refuse_unknown,
    say_targets,
    told_units,
    units,
)
from ratoon.adapt.lora import LORA_KEYS, LORA_SILENT, LowRank
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.seeds import derive
from ratoon.base.settings import build
from ratoon.model.layers import Linear
from ratoon.model.transformer import Transformer


class AdaLoraSettings(SiteSettings):
    """Triplets of a left vector, a singular value and a right vector beside each linear layer."""

    kind: Literal["adalora"] = Field("adalora", description="low-rank adaptation with a budget of ranks")
    initial_rank: int = Field(12, ge=1, description="triplets of each layer in the beginning; the paper: 1.5 of rank")
    rank: int = Field(8, ge=1, description="triplets of a layer in the end, on average")
    alpha: float = Field(16.0, gt=0, description="the change is scaled by alpha / initial_rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of a layer's inputs that Q does not see in training")
    orthogonality: float = Field(0.1, ge=0, description="weight of the penalty (the paper's gamma: 0.1 to 0.5)")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the run with all triplets")
    final_fraction: float = Field(0.3, gt=0, lt=1, description="share of the run, at its end, with the last budget")
    every_steps: int = Field(10, ge=1, description="steps between two allocations of the budget")
    beta1: float = Field(0.85, ge=0, lt=1, description="memory of the sensitivity")
    beta2: float = Field(0.85, ge=0, lt=1, description="memory of its uncertainty")

    @model_validator(mode="after")
    def _fits(self) -> AdaLoraSettings:
        if self.rank > self.initial_rank:
            raise ValueError(f"the last rank, {self.rank}, is above initial_rank, {self.initial_rank}")
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ValueError("warmup_fraction and final_fraction leave nothing between them")
        return self


class AdaLoraLinear(LowRank):
    """W x + s P Λ Q x (eq. 3). `E` is Λ's diagonal as a column; layers that are one matrix have one Q and one Λ."""

    def __init__(
        self, base: Linear, P_OR: Tensor, E_R1: nn.Parameter, Q_RI: nn.Parameter, scale: float, dropout: float
    ):
        super().__init__(base, dropout)
        self.scale = scale
        self.P = nn.Parameter(P_OR)
        self.E = E_R1
        self.Q = Q_RI

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.Q * (self.E * self.scale), self.P

    def shared(self) -> nn.Parameter:
        return self.Q


class AdaLora(Beside):
    """SVD-like triplets beside each chosen layer, and a budget of them that is spent where it matters."""

    kind = "adalora"
    part = AdaLoraLinear
    settings: AdaLoraSettings

    def __init__(self, settings: AdaLoraSettings) -> None:
        super().__init__(settings)
        self._kept: Tensor | None = None
        """(units, R0) bool: the triplets of the last allocation; None before the first one."""
        self._final = False
        self._installed: list[Unit] = []
        self._named: dict[str, dict[str, str]] = {}
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    def _units(self, model: Transformer) -> list[Unit]:
        if self._told is not None:
            return [unit for _, unit in told_units(model, self._told)]
        return units(model, chosen_sites(model, self.settings))

    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model and put the triplets in: P and Q of random orthonormal columns and rows (Gaussian directions
        on which the penalty is 0), Λ zero (section 3.1). Raises `ConfigError` where a layer is narrower than the rank.
        """
        R = self.settings.initial_rank
        found = self._units(model)
        layers = {site.name: plain_layer(model, site.name) for unit in found for site in unit.sites}
        for unit in found:
            if min(unit.inputs, unit.outputs) < R:
                raise ConfigError(
                    f"{R} triplets at {unit.sites[0].name}, of {unit.inputs} inputs and {unit.outputs} outputs",
                    where="method.initial_rank",
                    expected=f"at most {min(unit.inputs, unit.outputs)}",
                )
        freeze(model)
        self._installed, self._named = found, {}
        for unit in found:
            weight = layers[unit.sites[0].name].weight
            generator = torch.Generator().manual_seed(derive(seed, "method", self.kind, unit.sites[0].name))
            P_OR = torch.linalg.qr(torch.randn(unit.outputs, R, generator=generator)).Q
            Q_RI = torch.linalg.qr(torch.randn(unit.inputs, R, generator=generator)).Q.t().contiguous()
            Q = nn.Parameter(Q_RI.to(weight.device, weight.dtype))
            E = nn.Parameter(torch.zeros(R, 1, device=weight.device, dtype=weight.dtype))
            parts = torch.split(P_OR, [site.outputs for site in unit.sites])
            for site, P in zip(unit.sites, parts, strict=True):
                own = P.clone().to(weight.device, weight.dtype)
                scale = self.settings.alpha / (R + 1e-5)  # as the authors' code divides, and PEFT
                module = AdaLoraLinear(layers[site.name], own, E, Q, scale, self.settings.dropout)
                place(model, site.name, module.train(model.training))

    def count(self, model: Transformer) -> int:
        """R0 (in + out + 1) for each matrix; what is pruned stands there still, as zeros."""
        R = self.settings.initial_rank
        return sum(R * (unit.inputs + unit.outputs + 1) for unit in self._units(model))

    # -- the loop's hooks ----------------------------------------------------------------------------------------------

    def loss_term(self, model: Transformer) -> Tensor | None:
        """gamma Σ ‖Pᵀ P - I‖² + ‖Q Qᵀ - I‖² over the matrices (eq. 4, in eq. 5's sum), in float32."""
        if not self.settings.orthogonality:
            return None
        R = self.settings.initial_rank
        parts = adapted(model, AdaLoraLinear)
        grams = []
        for unit in self._installed:
            mine = [parts[site.name] for site in unit.sites]
            grams.append(sum(one.P.float().t() @ one.P.float() for one in mine))
            grams.append(mine[0].Q.float() @ mine[0].Q.float().t())
        stack = torch.stack(grams)  # type: ignore[arg-type]
        return self.settings.orthogonality * (stack - torch.eye(R, device=stack.device)).square().sum()

    @torch.no_grad()
    def on_gradient(self, model: Transformer, moment: Moment) -> None:
        """Sensitivity |w dL/dw| of each number (eq. 8), smoothed (eq. 9), and how far it strays from that (eq. 10)."""
        if self._final or self._ahead(moment) >= 1 - self.settings.final_fraction:
            return  # the budget is settled: nothing asks for importances any more
        names = sorted({name for parts in self._names_of_parts(model).values() for name in parts.values()})
        if not self._sensitivity:
            for name in names:
                self._sensitivity[name] = torch.zeros_like(moment.values[name])
                self._uncertainty[name] = torch.zeros_like(moment.values[name])
        now = torch._foreach_mul([moment.values[n] for n in names], [moment.gradients[n] for n in names])
        torch._foreach_abs_(now)
        mean, stray = [self._sensitivity[n] for n in names], [self._uncertainty[n] for n in names]
        torch._foreach_lerp_(mean, now, 1 - self.settings.beta1)
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(stray, now, 1 - self.settings.beta2)

    @torch.no_grad()
    def on_step(self, model: Transformer, moment: Moment) -> None:
        """Set the singular values of the triplets outside the budget to 0 (eq. 6, 12). Until the last phase they may
        grow again; there they stay 0."""
        ahead = self._ahead(moment)
        last = ahead >= 1 - self.settings.final_fraction
        begun = ahead > self.settings.warmup_fraction
        if not self._final and (last or (begun and (moment.step + 1) % self.settings.every_steps == 0)):
            found = self._installed
            scores_UR = self.importance(model)
            budget = self.budget(len(found), ahead)
            chosen = scores_UR.flatten().topk(budget).indices
            kept = torch.zeros(scores_UR.numel(), dtype=torch.bool, device=scores_UR.device)
            kept[chosen] = True
            self._kept, self._final = kept.view_as(scores_UR), last
            assert int(kept.sum()) == budget
            assert not last or budget == self.settings.rank * len(found), "the last budget is rank x matrices"
            self._prune(model, moment)
        elif self._final:
            self._prune(model, moment)

    def budget(self, matrices: int, progress: float) -> int:
        """Triplets that the whole model may have at that share of the run (eq. 12): all of them while it warms up,
        fewer by a cubic law, the last budget in the end."""
        settings = self.settings
        first, last = settings.initial_rank * matrices, settings.rank * matrices
        if progress <= settings.warmup_fraction:
            return first
        if progress >= 1 - settings.final_fraction:
            return last
        left = 1 - (progress - settings.warmup_fraction) / (1 - settings.final_fraction - settings.warmup_fraction)
        return round(last + (first - last) * left**3)

    def importance(self, model: Transformer) -> Tensor:
        """The importance of each triplet (units, R0): s of its singular value and the means of s over its two vectors
        (eq. 7), where s is sensitivity times uncertainty (eq. 11)."""
        names = self._names_of_parts(model)

        def score(name: str) -> Tensor:
            return self._sensitivity[name] * self._uncertainty[name]

        rows = []
        for unit in self._installed:
            mine = [names[site.name] for site in unit.sites]
            left_R = sum(score(one["P"]).sum(0) for one in mine) / unit.outputs
            rows.append(score(mine[0]["E"]).flatten() + left_R + score(mine[0]["Q"]).mean(1))
        return torch.stack(rows)

    def _prune(self, model: Transformer, moment: Moment) -> None:
        names = self._names_of_parts(model)
        assert self._kept is not None
        for unit, kept_R in zip(self._installed, self._kept, strict=True):
            values = moment.values[names[unit.sites[0].name]["E"]]
            values.masked_fill_(~kept_R.to(values.device)[:, None], 0.0)

    def _ahead(self, moment: Moment) -> float:
        """The share of the run that is over with this step: the last step of a run of steps is the end."""
        return moment.progress if moment.steps is None else (moment.step + 1) / moment.steps

    def _names_of_parts(self, model: Transformer) -> dict[str, dict[str, str]]:
        """By site: the names under which the loop knows P, E and Q (shared ones stand under the first site's name)."""
        if not self._named:
            by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
            self._named = {
                site: {part: by_identity[id(getattr(module, part))] for part in "PEQ"}
                for site, module in adapted(model, AdaLoraLinear).items()
            }
        return self._named

    def figures(self) -> dict[str, float]:
        """The triplets that are not taken away: of a matrix on average, and of all together."""
        every = self.settings.initial_rank * len(self._installed)
        left = every if self._kept is None else int(self._kept.sum())
        return {"mean_rank": left / len(self._installed), "rank_in_all": left}

    def state(self) -> dict[str, Tensor]:
        """Sensitivities, uncertainties, and the triplets of the last allocation."""
        found = {f"sensitivity.{name}": value for name, value in self._sensitivity.items()}
        found |= {f"uncertainty.{name}": value for name, value in self._uncertainty.items()}
        if self._kept is not None:
            found["kept"] = self._kept.to(torch.uint8)
        return found | {"final": torch.tensor([int(self._final)], dtype=torch.uint8)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for start, table in (("sensitivity.", self._sensitivity), ("uncertainty.", self._uncertainty)):
            table.clear()
            table.update({n.removeprefix(start): v.clone() for n, v in state.items() if n.startswith(start)})
        self._kept = state["kept"].bool() if "kept" in state else None
        self._final = bool(state["final"].item())

    def facts(self, model: Transformer) -> dict[str, Any]:
        """The ranks at the end: of each matrix, and of all together; and whether the schedule has come to its end."""
        parts, found = adapted(model, AdaLoraLinear), self._installed
        kept = self._kept if self._kept is not None else torch.ones(len(found), self.settings.initial_rank)
        ranks = {unit.sites[0].name: int(kept_R.sum()) for unit, kept_R in zip(found, kept, strict=True)}
        if self._final:
            for unit in found:
                assert int((parts[unit.sites[0].name].E != 0).sum()) <= ranks[unit.sites[0].name], unit.sites[0].name
        return {
            "ranks": ranks,
            "rank_in_all": sum(ranks.values()),
            "rank_asked_for": self.settings.rank * len(found),
            "budget_reached": self._final,
        }

    # -- after training ------------------------------------------------------------------------------------------------

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """PEFT's `AdaLoraConfig`. Its schedule is told as over: the adapter is trained."""
        named = named_units(model, self._units(model), self.kind)
        alpha = self.settings.alpha
        return {
            "peft_type": "ADALORA",
            "init_r": self.settings.initial_rank,
            "target_r": self.settings.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.settings.dropout,
            "orth_reg_weight": self.settings.orthogonality,
            "beta1": self.settings.beta1,
            "beta2": self.settings.beta2,
            "deltaT": self.settings.every_steps,
            "tinit": 0,
            "tfinal": 0,
            "total_step": 1,
            "bias": "none",
            "fan_in_fan_out": any(unit.turned for _, unit in named),
            **say_targets(model, [name for name, _ in named], by_layer=True),
        }

    @torch.no_grad()
    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """`lora_A` (Q), `lora_E` (Λ) and `lora_B` (P) of each module, pruned triplets included."""
        found: dict[str, Tensor] = {}
        parts = adapted(model, AdaLoraLinear)
        for name, unit in named_units(model, self._units(model), self.kind):
            first = parts[unit.sites[0].name]
            found[f"{PREFIX}{name}.lora_A"] = first.Q.detach()
            found[f"{PREFIX}{name}.lora_E"] = first.E.detach()
            found[f"{PREFIX}{name}.lora_B"] = unit.join(
                [
                    parts[site.name].P.detach() if site.name in parts else first.Q.new_zeros(site.outputs, len(first.Q))
                    for site in unit.whole
                ]
            )
        return found

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdaLora:
        """The method that an `AdaLoraConfig` says. Raises `ArtifactError` for what it may say and we do not know."""
        if config.get("ratoon") is not None:
            return cls(build(AdaLoraSettings, config["ratoon"], where="ratoon.json"))
        refuse_unknown({**config, "bias": None if config.get("bias") == "none" else config.get("bias")}, KEYS, SILENT)
        rank = int(config.get("init_r", 12))
        table = {
            "initial_rank": rank,
            "rank": min(rank, int(config.get("target_r", 8))),
            "alpha": config.get("lora_alpha", 8),
            "dropout": config.get("lora_dropout", 0.0),
        }
        method = cls(build(AdaLoraSettings, table, where="adapter_config.json"))
        method._told = dict(config)
        return method

    @torch.no_grad()
    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed triplets the values of a PEFT folder; where it has fewer (`rank_pattern`), the others are
        0."""
        R = self.settings.initial_rank
        values, parts = Values(weights), adapted(model, AdaLoraLinear)
        pattern = (self._told or {}).get("rank_pattern") or {}
        kept = []
        for name, unit in named_units(model, self._units(model), self.kind):
            mask = torch.tensor(pattern.get(f"{name}.lora_E", [True] * R), dtype=torch.bool).flatten()
            if len(mask) != R:
                raise ArtifactError(f"rank_pattern of {name} has {len(mask)} places", expected=f"init_r: {R}")
            kept.append(mask)
            r, whole = int(mask.sum()), sum(site.outputs for site in unit.whole)
            key = f"{PREFIX}{name}.lora_"
            first = parts[unit.sites[0].name]
            for parameter, found in (
                (first.Q, values.take([f"{key}A"], (r, unit.inputs))),
                (first.E, values.take([f"{key}E"], (r, 1))),
            ):
                parameter.zero_()
                parameter[mask] = found.to(parameter.device, parameter.dtype)
            ups = unit.split(values.take([f"{key}B"], (whole, r)))
            for site, up in zip(unit.whole, ups, strict=True):
                if site.name in parts:
                    P = parts[site.name].P
                    P.zero_()
                    P[:, mask] = up.to(P.device, P.dtype)
        values.expect_end()
        if pattern:
            self._kept = torch.stack(kept)


KEYS = (LORA_KEYS - {"use_dora", "use_rslora", "alpha_pattern", "r"}) | {"init_r", "target_r"}
SILENT = LORA_SILENT | {"r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
