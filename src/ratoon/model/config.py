"""The shape of a Transformer, as typed settings free of torch.

Decides which architectures can be said. How a foreign `config.json` maps to this is decided in
`families.py`; what the settings compute, in `transformer.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ratoon.base.settings import Settings


class RopeScaling(Settings):
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0)
    original_context_tokens: int | None = Field(None, description="trained context (llama3, yarn)")
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = Field(None, description="yarn: scale of cos and sin; absent = 0.1 ln(factor) + 1")
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class MoE(Settings):
    """A mixture-of-experts MLP: top-k routing with a load-balancing loss (Switch Transformer, eq. 4-6)."""

    experts: int = Field(ge=2)
    experts_per_token: int = Field(ge=1)
    expert_width: int = Field(ge=1, description="hidden width of one expert")
    normalize_weights: bool = Field(True, description="the chosen experts' weights sum to 1")
    balance_weight: float = Field(0.001, ge=0, description="weight of the load-balancing loss")


class ModelConfig(Settings):
    """A Transformer's shape. Widths are channels, lengths tokens."""

    family: str = Field("llama", description="the Hugging Face family it is written as; see model/families.py")
    vocab_size: int = Field(ge=1)
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int | None = Field(None, description="absent = heads")
    head_dim: int | None = Field(None, description="channels of a head; absent = width / heads")
    mlp_width: int = Field(ge=1)
    context_tokens: int = Field(ge=1)

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_weight: Literal["plain", "plus_one", "none"] = Field(
        "plain", description="RMS norm's gain: w, 1 + w (Gemma), or none at all (NanoChat)"
    )
    norm_layout: Literal["pre", "parallel", "sandwich"] = Field(
        "pre",
        description="pre: x + f(norm x); parallel: x + attn(norm1 x) + mlp(norm2 x) (GPT-NeoX); "
        "sandwich: x + norm(f(norm x)) (Gemma)",
    )
    embedding_norm: bool = Field(False, description="norm right after the embedding (NanoChat)")
    embedding_scale: float | None = Field(None, description="the embedding is multiplied by this (Gemma)")

    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: float = 10_000.0
    rope_fraction: float = Field(1.0, gt=0, le=1, description="share of a head's channels that rotate (GPT-NeoX)")
    rope_sign: Literal[1, -1] = Field(1, description="direction of the rotation (NanoChat turns the other way)")
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = Field(None, description="theta of the sliding-window layers (Gemma 3); unscaled")

    query_scale: float | None = Field(None, description="scores are multiplied by this; absent = head_dim ** -0.5")
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    attention_softcap: float | None = None
    windows: tuple[int | None, ...] | None = Field(
        None, description="per layer: keys a token sees, itself included; null = all before it"
    )

    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu_tanh"] = "swiglu"
    mlp_bias: bool = False
    moe: MoE | None = None
    moe_layers: tuple[int, ...] | None = Field(None, description="layers with experts; absent = all, if moe is given")

    tied_embeddings: bool = True
    head_bias: bool = False
    logit_softcap: float | None = None
    init_std: float = 0.02
    zero_init_outputs: bool = Field(True, description="output projections start at 0, so each block starts as identity")

    causal: bool = Field(True, description="False: an encoder, each token sees all of its document")
    cross_attention: bool = Field(False, description="a decoder that also attends to an encoder's output")
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @property
    def kv(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up projection."""
        return self.mlp in ("swiglu", "geglu_tanh")

    def window(self, layer: int) -> int | None:
        """Keys a token of that layer sees, itself included; None = all before it."""
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        """Whether that layer's MLP is a mixture of experts."""
        return self.moe is not None and (self.moe_layers is None or layer in self.moe_layers)

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.heads % self.kv:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv} key/value heads evenly")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads, and head_dim is not given")
        if self.positions == "rotary" and round(self.channels * self.rope_fraction) % 2:
            raise ValueError(
                f"rotary positions need an even number of channels, not {self.channels * self.rope_fraction}"
            )
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")
        if self.moe is not None and self.moe.experts_per_token > self.moe.experts:
            raise ValueError(f"{self.moe.experts_per_token} experts per token of {self.moe.experts}")
        if self.norm == "layer" and self.norm_weight != "plain":
            raise ValueError("norm_weight is a setting of RMS norm; with layer norm it stays 'plain'")
        return self
