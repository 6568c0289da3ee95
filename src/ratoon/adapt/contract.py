"""What a method of fine-tuning is, and which there are.

Decides the hooks that the loop calls, for every method and in the same order: a budget schedule or a penalty needs
nothing from the user. Where a method's parts go is said by `Transformer.sites()` and done by `inject.py`; each paper's
mathematics stands in a file of its own; how an adapter lies on disk is `folder.py`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ratoon.base.errors import ConfigError
from ratoon.base.settings import Settings
from ratoon.model.transformer import Transformer


@dataclass(frozen=True)
class Moment:
    """Where a run stands, as the loop's hooks see it.

    `values` and `gradients` are float32 and by parameter name: the weights that the optimizer moves, and the step's
    gradient, already divided by the summed weight. `progress` is 0 at the first step and 1 at the end; `steps` is None
    where a budget of minutes decides.
    """

    step: int
    progress: float
    steps: int | None
    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


class Method(ABC):
    """A way of training a model, with all parameters or few.

    The life of one: `install` freezes what is frozen and puts the method's own parts in; training calls `loss_term`,
    `on_gradient` and `on_step`; then the parts are saved (`adapt/folder.py`), folded in (`merge`) or taken out
    (`remove`). A new one is one file with one such class, named in `METHODS`.
    """

    kind: ClassVar[str]
    """Its name in a recipe."""
    virtual_tokens: int = 0
    """Slots at the beginning of each document that stand for no token of the text (prompt and prefix tuning): the
    caller puts so many ids before each text, whose embeddings or keys and values are the method's. Positions count
    them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def exact(self) -> bool:
        """Whether the settings alone say where the parts are. A foreign adapter may have them where no settings of ours
        put them; then its config says it, and goes on saying it when it is saved again."""
        return True

    def read_text(self, encode: Callable[[str], Sequence[int]]) -> None:  # noqa: B027
        """Take the ids of a text that the settings name, where parts start from one; called before `install`."""

    @abstractmethod
    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model, put the method's parts in and let their parameters ask for gradients.

        Afterwards the model computes what it did before, bit for bit where the paper's first values allow it. A task
        head is always trained; `install` leaves it as it is. Random first values come from streams of `seed`. Raises
        `ConfigError` for settings that fit no site of this model.
        """

    @abstractmethod
    def count(self, model: Transformer) -> int:
        """The number of trained parameters by the paper's formula, from the model's sites alone; a task head not
        included. Can be asked before and after `install`."""

    def loss_term(self, model: Transformer) -> Tensor | None:
        """What is added to the loss of a step (a scalar per step, not per token); None: nothing."""
        return None

    def on_gradient(self, model: Transformer, moment: Moment) -> None:  # noqa: B027 - most methods need no hook
        """Called with the whole gradient of a step, before the weights move."""

    def on_step(self, model: Transformer, moment: Moment) -> None:  # noqa: B027
        """Called after the weights have moved; what is changed in `moment.values` in place is what the model has
        from then on."""

    def figures(self) -> dict[str, float]:
        """Where the method stands after a step, by name, for the step's record; asked for only where one is written.
        The names are no other key of that record."""
        return {}

    @property
    def looks_inside(self) -> bool:
        """Whether it reads or changes weights or gradients between the steps, or adds to the loss."""
        hooks = ("on_gradient", "on_step", "loss_term")
        return any(getattr(type(self), hook) is not getattr(Method, hook) for hook in hooks)

    def state(self) -> dict[str, Tensor]:
        """What decides the next steps beside parameters, for checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take over what `state` gave."""

    @torch.no_grad()
    def merge(self, model: Transformer, *, allow_loss: bool = False) -> None:
        """Fold the parts into the base's weights and take them out; the model then computes the same (up to rounding in
        its own type). Raises `ConfigError` with the reason where the paper's parts are no change of weights, and where
        weights of few bits would lose a part of the change, unless `allow_loss`."""
        raise ConfigError(
            f"{self.kind} cannot be merged: {self.not_merged}",
            where="method",
            fix="save the adapter beside its base; every verb loads it with its base",
        )

    def unmerge(self, model: Transformer) -> None:
        """Undo `merge`, bit for bit: the base's weights are what they were, and the parts stand beside them again.
        Raises `ConfigError` where this method has merged nothing into this model."""
        raise ConfigError(f"{self.kind} has merged nothing", where="method", expected="a call of merge before")

    not_merged: ClassVar[str] = "its parts are no change of the base's weights"

    @abstractmethod
    def remove(self, model: Transformer) -> None:
        """Take the parts out: the base is what it was before `install`, bit for bit."""

    def facts(self, model: Transformer) -> dict[str, Any]:
        """What a report says of the method after training (ranks at the end, …)."""
        return {}

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """The installed method as PEFT's `adapter_config.json` says it, `peft_type` included; what every adapter has
        (base, task, head) is added by `folder.py`. Raises `ConfigError` for what that layout cannot say."""
        raise self._no_adapter()

    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """The installed method's values under PEFT's names, without a task head."""
        raise self._no_adapter()

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method:
        """The method that such a config says, not yet installed; where the folder is one of ours, `config["ratoon"]`
        holds the method's settings. Raises `ArtifactError` for settings that are not known and change what is
        computed."""
        raise ConfigError(f"{cls.kind} is no adapter", where="adapter_config.json")

    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed method the values that `peft_weights` names. Raises `ArtifactError` for a tensor that is
        missing, too much, or of another shape."""
        raise self._no_adapter()

    def _no_adapter(self) -> ConfigError:
        return ConfigError(
            f"{self.kind} has no adapter: what it trains are the model's own weights",
            where="method",
            fix="save the model",
        )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ask for a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def freeze(model: Transformer) -> None:
    """No parameter asks for a gradient but those of a task head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("task_head."))
