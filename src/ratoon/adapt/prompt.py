"""Prompt tuning (Lester et al., arXiv:2104.08691): learned embeddings in front of each text, and nothing else.

Decides the vectors and their first values; which slots are theirs is said in `slots.py`, and the model puts them in
through `Transformer.virtual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ratoon.adapt.contract import freeze
from ratoon.adapt.slots import Virtual, fill, room_for
from ratoon.base.errors import ArtifactError
from ratoon.base.seeds import derive
from ratoon.base.settings import Settings, build
from ratoon.model.transformer import Transformer

PEFT_TENSOR = "prompt_embeddings"
"""The one tensor of a folder of PEFT that holds virtual tokens."""


class PromptSettings(Settings):
    """Learned embeddings in front of each text."""

    kind: Literal["prompt"] = Field("prompt", description="prompt tuning")
    tokens: int = Field(20, ge=1, description="virtual tokens in front of each text; the paper's figure 3 (a): 20")
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary", description="first values: embeddings of sampled tokens, those of `text`, or random numbers"
    )
    text: str | None = Field(None, description="the text whose embeddings are the first values; with init: text")

    @model_validator(mode="after")
    def _fits(self) -> PromptSettings:
        if (self.init == "text") != (self.text is not None):
            raise ValueError("`text` and `init: text` belong together")
        return self


class VirtualTokens(nn.Module):
    """Vectors (P, D) for the first slots of each document."""

    def __init__(self, values_PD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values_PD)

    @property
    def tokens(self) -> int:
        """P."""
        return len(self.weight)

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """The stream with the vectors in the slots of positions below P."""
        return fill(x_BTD, self.weight, 0, position_BT)


class Prompt(Virtual):
    """P vectors of the stream's width in front of each text."""

    kind = "prompt"
    settings: PromptSettings

    def __init__(self, settings: PromptSettings) -> None:
        super().__init__(settings, settings.tokens)

    @torch.no_grad()
    def install(self, model: Transformer, *, seed: int) -> None:
        """Freeze the model and put the vectors in. Raises `ConfigError` where they leave no room for a text."""
        room_for(model, self.virtual_tokens)
        weight = model.embed.weight
        if self.settings.init == "random":  # section 3.1: uniform in [-0.5, 0.5]
            generator = torch.Generator().manual_seed(derive(seed, "method", self.kind, "random"))
            values_PD = torch.rand(self.virtual_tokens, model.cfg.width, generator=generator) - 0.5
        else:
            values_PD = weight[self._start_ids(model, seed)].clone()
            if model.cfg.embedding_scale is not None:
                values_PD *= model.cfg.embedding_scale
        freeze(model)
        model.virtual = VirtualTokens(values_PD.to(weight.device, weight.dtype))

    def count(self, model: Transformer) -> int:
        """P · D."""
        return self.virtual_tokens * model.cfg.width

    def remove(self, model: Transformer) -> None:
        """Take the vectors out."""
        model.virtual = None

    def peft_config(self, model: Transformer) -> dict[str, Any]:
        """The method as PEFT's adapter_config.json says it."""
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.virtual_tokens,
            "token_dim": model.cfg.width,
            "num_layers": model.cfg.layers,
            "num_attention_heads": model.cfg.heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",  # says how training began; the values lie beside it
        }

    def peft_weights(self, model: Transformer) -> dict[str, Tensor]:
        """The vectors (P, D) under PEFT's name."""
        assert isinstance(model.virtual, VirtualTokens)
        return {PEFT_TENSOR: model.virtual.weight.detach()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Prompt:
        """The method that a config of PEFT says."""
        return cls(
            build(PromptSettings, {"tokens": virtual_tokens_of(config), "init": "random"}, where="adapter_config.json")
        )

    @torch.no_grad()
    def load_peft(self, model: Transformer, weights: Mapping[str, Tensor]) -> None:
        """Give the installed method the values of a PEFT folder. Raises `ArtifactError` for tensors that do not fit."""
        assert isinstance(model.virtual, VirtualTokens)
        weight = model.virtual.weight
        weight.copy_(the_tensor(weights, (self.virtual_tokens, model.cfg.width)))


def virtual_tokens_of(config: Mapping[str, Any]) -> int:
    """How many virtual tokens a config of PEFT asks for. Raises `ArtifactError` for what is no number of them, and for
    an encoder-decoder's, which has them twice."""
    tokens, twice = config.get("num_virtual_tokens"), config.get("num_transformer_submodules") not in (None, 1)
    if not isinstance(tokens, int) or tokens < 1 or twice:
        said = f"num_virtual_tokens {tokens}, num_transformer_submodules {config.get('num_transformer_submodules')}"
        raise ArtifactError(
            f"the adapter says {said}", where="adapter_config.json", expected="at least one token, of one decoder"
        )
    return tokens


def the_tensor(weights: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """PEFT's one tensor of virtual tokens, after checking that it stands alone and has the shape."""
    found = weights.get(PEFT_TENSOR)
    if found is None or len(weights) > 1:
        raise ArtifactError(
            f"the adapter holds {', '.join(sorted(weights)) or 'nothing'}", expected=f"the tensor {PEFT_TENSOR} alone"
        )
    if tuple(found.shape) != shape:
        raise ArtifactError(
            f"{PEFT_TENSOR} has the shape {tuple(found.shape)}",
            expected=f"{shape}: (virtual tokens, what a token has in this base)",
            fix="the adapter was made for a base of other widths or another number of layers",
        )
    return found
