"""Where a method's parts go: which linear layers, how a module takes a layer's place, and how it is folded into it.

Decides what the settings `targets` and `layers` name, which layers a family's file keeps as one matrix (there the parts
on the inputs' side must be one as well, or PEFT's layout could not hold them), and that folding in refuses to lose
bits. What the parts compute stands in each paper's file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ratoon.adapt.contract import Method
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import Settings
from ratoon.model.family import Rule
from ratoon.model.heads import weights_of
from ratoon.model.layers import Linear, is_plain, side_by_side
from ratoon.model.transformer import Site, Transformer

Kind = Literal["q", "k", "v", "o", "gate", "up", "down", "cross_q", "cross_k", "cross_v", "cross_o"]


class SiteSettings(Settings):
    """Which linear layers a method changes."""

    targets: Literal["all"] | tuple[Kind, ...] = Field(
        "all", description="kinds of linear layers: some of q, k, v, o, gate, up, down (cross_q … in a decoder that "
        "reads a source), or all"
    )  # fmt: skip
    layers: tuple[int, ...] | None = Field(
        None, description="blocks, counted from 0; absent: all. What lies below the first one is computed but once"
    )


class Adapted(nn.Module):
    """A linear layer `base` with a method's parts beside it; stands in the layer's place."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in float32 of the one layer that computes the same."""
        raise NotImplementedError

    def side_by_side(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
        """What `layers`, of which this is one, give for one input, side by side: with as few products as the method
        can; None: each by itself."""
        return None


def can_join(layers: Sequence[nn.Module], kind: type[Adapted]) -> bool:
    """Whether some layers are plain ones or of one method, without hooks: then their weights may be used in them."""
    for layer in layers:
        own = type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks
        base = layer.base if own and isinstance(layer, Adapted) else layer
        if type(base) is not Linear or not is_plain(base):
            return False
    return True


def joined_base(layers: Sequence[nn.Module], x: Tensor, *, with_bias: bool = True) -> Tensor:
    """What the bases of some layers give for one input, side by side: one product."""
    return side_by_side([_base(layer) for layer in layers], x, joined_bias(layers) if with_bias else None)


def joined_bias(layers: Sequence[nn.Module]) -> Tensor | None:
    """The biases of some layers' bases side by side; of a block's layers all have one, or none."""
    biases: list[Tensor] = [bias for bias in (_base(layer).bias for layer in layers) if bias is not None]
    return torch.cat(biases) if biases else None


def outputs_of(layer: nn.Module) -> int:
    """The width of what a plain layer gives."""
    assert isinstance(layer, Linear)
    return layer.out_features


def _base(layer: nn.Module) -> Linear:
    found = layer.base if isinstance(layer, Adapted) else layer
    assert isinstance(found, Linear)
    return found


# -- which layers ------------------------------------------------------------------------------------------------------


def chosen_sites(model: Transformer, settings: SiteSettings, default: Sequence[str] | None = None) -> list[Site]:
    """The sites that the settings name; `default`: the kinds that "all" stands for, of those the model has.

    Raises `ConfigError` for a kind or a block that the model lacks, and when nothing is left.
    """
    sites = model.sites()
    kinds = {site.kind for site in sites}
    wanted = (kinds if default is None else kinds & set(default)) if settings.targets == "all" else settings.targets
    lacking = [kind for kind in wanted if kind not in kinds]
    if lacking or not wanted:
        raise ConfigError(
            f"the model has no linear layer of the kind {', '.join(lacking) or '(none named)'}",
            where="method.targets",
            expected=f"some of {', '.join(dict.fromkeys(site.kind for site in sites))}",
        )
    blocks = {site.layer for site in sites}
    layers = blocks if settings.layers is None else set(settings.layers)
    if layers - blocks or not layers:
        raise ConfigError(
            f"the blocks {', '.join(map(str, sorted(layers - blocks))) or '()'}",
            where="method.layers",
            expected=f"some of {min(blocks)} to {max(blocks)}, the blocks that have linear layers",
        )
    found = [site for site in sites if site.kind in wanted and site.layer in layers]
    if not found:
        raise ConfigError(
            "none of the chosen blocks has a layer of the chosen kinds", where="method.layers", expected="another block"
        )
    return found


@dataclass(frozen=True)
class Unit:
    """Sites that a family's file keeps as one matrix, in the file's order: mostly one; q, k and v in GPT-2.

    `whole` names all of the matrix' sites, `sites` those of them that a method changes. `name` is the module's name
    in Transformers; None where no family of Transformers has such a layer.
    """

    sites: tuple[Site, ...]
    whole: tuple[Site, ...]
    name: str | None
    split: Callable[[Tensor], list[Tensor]]
    """A tensor over the matrix' outputs (the first axis) -> those of each of `whole`."""
    join: Callable[[list[Tensor]], Tensor]
    turned: bool
    """The file has the matrix as (in, out)."""

    @property
    def inputs(self) -> int:
        """Width of what the sites read."""
        return self.whole[0].inputs

    @property
    def outputs(self) -> int:
        """Summed widths of what the changed sites give."""
        return sum(site.outputs for site in self.sites)


def units(model: Transformer, sites: Iterable[Site] | None = None) -> list[Unit]:
    """The units of the sites (absent: of all of the model's), in their order."""
    chosen = {site.name: site for site in (model.sites() if sites is None else sites)}
    every = {site.name: site for site in model.sites()}
    rules = _rules(model)
    found: list[Unit] = []
    done: set[str] = set()
    for name, site in chosen.items():
        if name in done:
            continue
        rule = rules.get(name)
        if rule is None:
            found.append(Unit((site,), (site,), None, lambda x: [x], lambda xs: xs[0], False))
            continue
        whole = tuple(every[_site_name(ours, site.layer)] for ours in rule.ours)
        mine = tuple(one for one in whole if one.name in chosen)
        done |= {one.name for one in mine}
        found.append(_unit(model, rule, site.layer, mine, whole))
    return found


def _site_name(ours: str, layer: int) -> str:
    return ours.format(i=layer).removesuffix(".weight")


def _rules(model: Transformer) -> dict[str, Rule]:
    """The family's rule of each site; none for models that no family can say."""
    cfg = getattr(model, "cfg", None)
    if not isinstance(model, Transformer) or cfg is None or cfg.cross_attention:
        return {}
    rules = [rule for rule in weights_of(cfg) if "{i}" in rule.theirs and rule.ours[0].endswith(".weight")]
    return {_site_name(ours, layer): rule for rule in rules for ours in rule.ours for layer in range(cfg.layers)}


def _unit(model: Transformer, rule: Rule, layer: int, mine: tuple[Site, ...], whole: tuple[Site, ...]) -> Unit:
    cfg = model.cfg
    # A family says how outputs are laid out by the rule of its bias, which has no other axis; a matrix alone has none.
    name = rule.theirs.format(i=layer).removesuffix(".weight")
    bias = rule.theirs.removesuffix(".weight") + ".bias"
    layout = next((one for one in weights_of(cfg) if one.theirs == bias), None) if len(whole) > 1 else None
    assert layout is not None or len(whole) == 1, f"no rule says how the outputs of {name} are laid out"
    column = rule.join([torch.zeros(site.outputs, 1, device="meta") for site in whole], cfg)
    turned = column.shape[0] == 1
    if layout is None:
        return Unit(mine, whole, name, lambda x: [x], lambda xs: xs[0], turned)
    return Unit(mine, whole, name, lambda x: layout.split(x, cfg), lambda xs: layout.join(xs, cfg), turned)


# -- in place, and out of it -------------------------------------------------------------------------------------------


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set `module` in the place `name` of the model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def plain_layer(model: nn.Module, name: str) -> Linear:
    """The linear layer at a site. Raises `ConfigError` where a method's part stands in its place already."""
    layer = model.get_submodule(name)
    if not isinstance(layer, Linear):
        raise ConfigError(
            f"{name} has a part of another method already ({type(layer).__name__})",
            where="method",
            fix="take it out (remove) or fold it in (merge) first",
        )
    return layer


A = TypeVar("A", bound=Adapted)


def adapted(model: nn.Module, kind: type[A]) -> dict[str, A]:
    """The modules of a method in the model, by the name of the site they stand at."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def take_out(model: nn.Module, kind: type[Adapted]) -> None:
    """The layers themselves stand in their places again, as they were."""
    for name, module in adapted(model, kind).items():
        place(model, name, module.base)


@dataclass(frozen=True)
class Folded:
    """What folding in changed: the module, and its base's own weight and bias before."""

    module: Adapted
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def fold_in(model: nn.Module, kind: type[Adapted], method: str, *, allow_loss: bool) -> dict[str, Folded]:
    """Each module's layer computes alone what both computed; the modules are taken out.

    Raises `ConfigError` before anything is changed where the model's weights have too few bits for the change, and
    `allow_loss` does not allow for it.
    """
    found = adapted(model, kind)
    if not found:
        raise ConfigError(f"the model has no part of {method}", where="merge", fix="install or load the adapter first")
    if not allow_loss:
        _expect_no_loss(found, method)
    folded = {}
    for name, module in found.items():
        base = module.base
        weight, bias = module.merged()
        folded[name] = Folded(module, base.weight.data, None if base.bias is None else base.bias.data)
        base.weight.data = weight.to(base.weight.dtype)
        if bias is not None and base.bias is not None:
            base.bias.data = bias.to(base.bias.dtype)
        place(model, name, base)
    return folded


def unfold(model: nn.Module, folded: Mapping[str, Folded], method: str) -> None:
    """Undo `fold_in`: the very tensors of before. Raises `ConfigError` where nothing was folded into this model."""
    if not folded or any(model.get_submodule(name) is not one.module.base for name, one in folded.items()):
        raise ConfigError(f"{method} has folded nothing into this model", where="unmerge", expected="a merge before")
    for name, one in folded.items():
        one.module.base.weight.data = one.weight
        if one.bias is not None:
            one.module.base.bias.data = one.bias
        place(model, name, one.module)


class Beside(Method):
    """What methods have in common whose parts stand in the places of linear layers: where the parts are may be told by
    a config of PEFT, and they can be folded in, unfolded and taken out."""

    part: ClassVar[type[Adapted]]
    """The module that stands in a layer's place."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._told: Mapping[str, Any] | None = None
        """A config of PEFT that says where the parts are; None: the settings do."""
        self._folded: dict[str, Folded] = {}

    @property
    def exact(self) -> bool:
        return self._told is None

    def merge(self, model: Transformer, *, allow_loss: bool = False) -> None:
        """What layer and parts compute together, in the layer's place."""
        self._folded = fold_in(model, self.part, self.kind, allow_loss=allow_loss)

    def unmerge(self, model: Transformer) -> None:
        """The layers' own weights, bit for bit, with the parts beside them."""
        unfold(model, self._folded, self.kind)
        self._folded = {}

    def remove(self, model: Transformer) -> None:
        """Take the parts out."""
        take_out(model, self.part)


def _expect_no_loss(found: Mapping[str, Adapted], method: str) -> None:
    """Raises `ConfigError` naming the share of the change that the weights' type cannot hold."""
    wanted = lost = 0.0
    dtypes = set()
    for module in found.values():
        before = module.base.weight
        if before.dtype == torch.float32:
            continue
        dtypes.add(str(before.dtype).removeprefix("torch."))
        after, _ = module.merged()
        wanted += float((after - before.float()).square().sum())
        lost += float((after - after.to(before.dtype).float()).square().sum())
    if lost > 0:
        share = math.sqrt(lost / wanted) if wanted > 0 else 1.0
        raise ConfigError(
            f"merging {method} into {', '.join(sorted(dtypes))} weights would lose {share:.1%} of the change "
            "(precision: the length of the rounding over that of the change)",
            where="merge",
            expected="weights in float32",
            fix="load the base in float32 and merge there, keep the adapter beside its base, or allow the loss",
        )


# -- as PEFT names them ------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."


def named_units(model: Transformer, found: Iterable[Unit], method: str) -> list[tuple[str, Unit]]:
    """Units with the names of their modules. Raises `ConfigError` where Transformers has no such layer."""
    named = []
    for unit in found:
        if unit.name is None:
            raise ConfigError(
                f"PEFT's layout cannot say where the parts of {method} go: no family of Transformers has the layer "
                f"{unit.sites[0].name}",
                where="save",
                fix="merge the adapter and save the whole model",
            )
        named.append((unit.name, unit))
    return named


def say_targets(model: Transformer, names: Sequence[str], *, by_layer: bool) -> dict[str, Any]:
    """`target_modules` (and `layers_to_transform`) that mean these modules and no other ones.

    Short names where they are enough; the modules' whole names where they are not, or a method of PEFT
    (`by_layer` false) knows no layers.
    """
    every = [unit.name for unit in units(model) if unit.name is not None]
    wanted = set(names)
    ends = sorted({_end(name, every) for name in names})
    if {name for name in every if _ends_with(name, ends)} == wanted:
        return {"target_modules": ends}
    layers = sorted({_layer(name) for name in names})
    if by_layer and {name for name in every if _ends_with(name, ends) and _layer(name) in layers} == wanted:
        return {"target_modules": ends, "layers_to_transform": layers}
    return {"target_modules": sorted(wanted)}


def _layer(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    assert found is not None
    return int(found.group(1))


def _end(name: str, every: Sequence[str]) -> str:
    """The shortest end of a module's name that means modules of its kind alone (`c_proj` means two in GPT-2)."""
    own = re.sub(r"\.\d+\.", ".#.", name)
    parts = name.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if all(re.sub(r"\.\d+\.", ".#.", other) == own for other in every if other.endswith("." + end)):
            return end
    return name


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def told_units(model: Transformer, config: Mapping[str, Any]) -> list[tuple[str, Unit]]:
    """The modules that a config of PEFT means, by its own rules of `target_modules`, `exclude_modules` and
    `layers_to_transform`. Raises `ArtifactError` where it means none of the model's linear layers."""
    target, exclude = config.get("target_modules"), config.get("exclude_modules")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    every = named_units(model, units(model), str(config.get("peft_type")))
    found = []
    for name, unit in every:
        if _means(exclude, name) or not (target == "all-linear" or _means(target, name)):
            continue
        if not layers or isinstance(target, str) or name in (target or ()) or _layer(name) in layers:
            found.append((name, unit))
    if not found:
        raise ArtifactError(
            f"target_modules is {target!r}, and names no linear layer of this base",
            where="adapter_config.json",
            expected=f"some of {', '.join(sorted({_end(name, [n for n, _ in every]) for name, _ in every}))}",
            fix="the adapter was made for a base of another family",
        )
    return found


def _means(said: Any, name: str) -> bool:
    if not said:
        return False
    return re.fullmatch(said, name) is not None if isinstance(said, str) else _ends_with(name, said)


def pattern_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that a module's name matches, as PEFT reads `rank_pattern`."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def refuse_unknown(config: Mapping[str, Any], known: Iterable[str], silent: Iterable[str]) -> None:
    """Raises `ArtifactError` for a key that says something (is neither empty nor false), and that we do not know."""
    quiet = {*known, *silent, *SILENT_KEYS}
    odd = sorted(key for key, value in config.items() if key not in quiet and value not in (None, False, {}, [], "", 0))
    if odd:
        raise ArtifactError(
            f"'{odd[0]}' is {config[odd[0]]!r}, which is not known and may change what the adapter computes",
            where="adapter_config.json",
            expected="of " + ", ".join(sorted(known)),
        )


SILENT_KEYS = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "modules_to_save", "fan_in_fan_out", "megatron_core", "ratoon",
    }
)  # fmt: skip
"""Keys that change nothing of what is computed, or that `folder.py` reads."""


class Values:
    """The tensors of an adapter's folder, taken one by one: what is missing, too much, or of another shape is told."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.left = set(weights)

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        """The tensor of the first of `names` that is there. Raises `ArtifactError` where none fits."""
        name = next((name for name in names if name in self.left), None)
        if name is None:
            raise ArtifactError(
                f"the adapter has no tensor {names[0]}",
                where="adapter_model.safetensors",
                expected="the values of every layer that adapter_config.json names",
            )
        self.left.discard(name)
        found = self.weights[name]
        if tuple(found.shape) != shape:
            raise ArtifactError(
                f"{name} has the shape {tuple(found.shape)}",
                where="adapter_model.safetensors",
                expected=f"{shape} for this base and these settings",
                fix="the adapter was made for a base of other widths",
            )
        return found

    def expect_end(self) -> None:
        """Raises `ArtifactError` where tensors are left over."""
        if self.left:
            raise ArtifactError(
                f"the adapter has {len(self.left)} tensors that no layer of this base takes (first: {min(self.left)})",
                where="adapter_model.safetensors",
                fix="the adapter changes what only Transformers has, or was made for another base",
            )
