"""All parameters, or all but those frozen by name or by depth.

Decides which of the base's own parameters are trained; nothing is put in.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Literal

from pydantic import Field

from ratoon.adapt.contract import Method, trained
from ratoon.base.errors import ConfigError
from ratoon.base.settings import Settings
from ratoon.model.encoder_decoder import AnyModel


class FullSettings(Settings):
    """Which of the model's own parameters are trained."""

    kind: Literal["full"] = Field("full", description="all parameters, or some of the model's own")
    freeze: tuple[str, ...] = Field(
        (), description="parameters that stay as they are, by pattern: `embed.*`, `layers.*.mlp.*`, `encoder.*`"
    )
    freeze_layers: int = Field(
        0,
        ge=0,
        description="so many blocks from the input on stay as they are, the embedding with them; an encoder's blocks "
        "are counted before its decoder's",
    )
    train: tuple[str, ...] = Field((), description="only these are trained, by pattern; absent: all but the frozen")


class Full(Method):
    """All parameters, with parts of the trunk frozen where that is asked for."""

    kind = "full"
    settings: FullSettings

    def install(self, model: AnyModel, *, seed: int) -> None:
        """Set which parameters ask for gradients. Raises `ConfigError` for a pattern that names nothing, and when
        nothing is left to train."""
        wanted = self._wanted(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        if not wanted:
            raise ConfigError("every parameter is frozen", where="method.freeze", expected="something to train")

    def _wanted(self, model: AnyModel) -> set[str]:
        settings = self.settings
        names = [name for name, _ in model.named_parameters()]
        head = {name for name in names if name.startswith("task_head.")}
        for key, patterns in (("freeze", settings.freeze), ("train", settings.train)):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    shown = ", ".join(sorted({re.sub(r"\d+", "*", name) for name in names})[:12])
                    raise ConfigError(
                        f"the pattern '{pattern}' names no parameter",
                        where=f"method.{key}",
                        expected=f"a pattern such as {shown}",
                    )
        if settings.freeze_layers > len(model.layers):
            raise ConfigError(
                f"freeze_layers is {settings.freeze_layers}", where="method", expected=f"at most {len(model.layers)}"
            )
        kept = {name for pattern in settings.freeze for name in fnmatch.filter(names, pattern)}
        if settings.freeze_layers:
            encoder_layers = len({name.split(".")[2] for name in names if name.startswith("encoder.layers.")})
            kept |= {name for name in names if _depth(name, encoder_layers) < settings.freeze_layers}
        chosen = {name for pattern in settings.train for name in fnmatch.filter(names, pattern)} or set(names)
        return (chosen - kept) | (head - {n for p in settings.freeze for n in fnmatch.filter(sorted(head), p)})

    def count(self, model: AnyModel) -> int:
        """Numbers of the parameters that are named."""
        wanted = self._wanted(model)
        return sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name in wanted and not name.startswith("task_head.")
        )

    def merge(self, model: AnyModel, *, allow_loss: bool = False) -> None:
        """Nothing to do: the base's own parameters were trained."""

    def remove(self, model: AnyModel) -> None:
        """Refused: the base itself was trained."""
        if trained(model):
            raise ConfigError(
                "method full trains the model itself: there is nothing to take out",
                where="method",
                fix="load the base again",
            )


def _depth(name: str, encoder_layers: int) -> float:
    """How deep a parameter lies: the block's number; embeddings before their blocks, what follows the last one after.

    An encoder's blocks are counted before the decoder's; its last norm goes with its last block.
    """
    part, _, rest = name.partition(".")
    if part == "encoder":
        return min(_depth(rest, 0), encoder_layers - 0.5)
    if part == "decoder":
        return max(0, _depth(rest, 0)) + encoder_layers
    if name.startswith(("embed.", "place.", "embed_norm.")):
        return -1
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found.group(1)) if found else float("inf")
