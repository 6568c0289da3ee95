"""The shape of a Transformer, as typed settings free of torch.

Decides which architectures can be said. How a foreign `config.json` maps to this is decided in
`families.py`; what the settings compute, in `transformer.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ratoon.base.settings import Settings

OWN_FAMILY = "ratoon-encoder-decoder"
"""The family of both parts of an encoder-decoder: no family of Transformers is written so."""


class RopeScaling(Settings):
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["linear", "llama3", "yarn"] = Field(description="which rule stretches the frequencies")
    factor: float = Field(gt=0, description="how much longer than the trained context")
    original_context_tokens: int | None = Field(None, description="trained context (llama3, yarn)")
    low_freq_factor: float = Field(1.0, description="llama3: waves longer than context / this are stretched whole")
    high_freq_factor: float = Field(4.0, description="llama3: waves shorter than context / this are left alone")
    beta_fast: float = Field(32.0, description="yarn: channels that turn more often in the context are left alone")
    beta_slow: float = Field(1.0, description="yarn: channels that turn less often are stretched whole")
    attention_factor: float | None = Field(None, description="yarn: scale of cos and sin; absent = 0.1 ln(factor) + 1")
    mscale: float | None = Field(None, description="yarn: scale of cos and sin by the factor (DeepSeek)")
    mscale_all_dim: float | None = Field(None, description="yarn: the same, divided out of it")
    truncate: bool = Field(True, description="yarn: the borders are rounded to whole channels")


class MoE(Settings):
    """A mixture-of-experts MLP: top-k routing with a load-balancing loss (Switch Transformer, eq. 4-6)."""

    experts: int = Field(ge=2, description="experts of a layer")
    experts_per_token: int = Field(ge=1, description="experts that a token is sent to")
    expert_width: int = Field(ge=1, description="hidden width of one expert")
    normalize_weights: bool = Field(True, description="the chosen experts' weights sum to 1")
    balance_weight: float = Field(0.001, ge=0, description="weight of the load-balancing loss")


class HeadConfig(Settings):
    """A head for a task in place of the scores of the next token; see `model/head.py`."""

    kind: Literal["token", "sequence", "span"] = Field(
        description="token: labels of each token; sequence: of a whole text; span: where an answer begins and ends"
    )
    labels: tuple[str, ...] = Field(min_length=1, description="names of the scores, in their order")
    problem: Literal["one", "several", "number"] = Field(
        "one", description="one label is right, several may be, or each score is a number"
    )
    pooling: Literal["last", "mean", "attention"] = Field(
        "last", description="sequence: which tokens' output the head reads; Transformers knows `last` alone"
    )

    @model_validator(mode="after")
    def _fits(self) -> HeadConfig:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label stands twice")
        if self.kind != "sequence" and (self.pooling != "last" or self.problem != "one"):
            raise ValueError(f"a head of kind {self.kind} has neither pooling nor another problem than 'one'")
        if self.kind == "span" and len(self.labels) != 2:
            raise ValueError("a span has two scores: begin and end")
        return self


class ModelConfig(Settings):
    """A Transformer's shape. Widths are channels, lengths tokens."""

    family: str = Field("llama", description="the Hugging Face family it is written as; see model/families.py")
    vocab_size: int = Field(ge=1, description="tokens; absent in a recipe: the tokenizer's")
    width: int = Field(ge=1, description="channels of the hidden state")
    layers: int = Field(ge=1, description="blocks of attention and MLP")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int | None = Field(None, description="key/value heads (grouped-query attention); absent = heads")
    head_dim: int | None = Field(None, description="channels of a head; absent = width / heads")
    mlp_width: int = Field(ge=1, description="hidden width of the MLP; absent in a recipe: 4 times the width")
    context_tokens: int = Field(ge=1, description="the longest context; absent in a recipe: that of the rows")

    norm: Literal["rms", "layer"] = Field("rms", description="RMS norm, or layer norm with mean and bias")
    norm_eps: float = Field(1e-5, description="added under the norm's root")
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

    positions: Literal["rotary", "learned", "none"] = Field("rotary", description="how a token knows its place")
    rope_theta: float = Field(10_000.0, description="base of the rotary wavelengths")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="share of a head's channels that rotate (GPT-NeoX)")
    rope_sign: Literal[1, -1] = Field(1, description="direction of the rotation (NanoChat turns the other way)")
    rope_scaling: RopeScaling | None = Field(None, description="stretching beyond the trained context; absent: none")
    rope_local_theta: float | None = Field(None, description="theta of the sliding-window layers (Gemma 3); unscaled")

    query_scale: float | None = Field(None, description="scores are multiplied by this; absent = head_dim ** -0.5")
    qkv_bias: bool = Field(False, description="biases of the query, key and value projections")
    out_bias: bool = Field(False, description="bias of the attention's output projection")
    qk_norm: Literal["none", "before_rope", "after_rope"] = Field(
        "none", description="queries and keys are normed, before or after the rotation"
    )
    attention_softcap: float | None = Field(None, description="scores go through cap * tanh(score / cap)")
    windows: tuple[int | None, ...] | None = Field(
        None, description="per layer: keys a token sees, itself included; null = all before it"
    )

    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu_tanh"] = Field(
        "swiglu", description="the MLP's activation; swiglu and geglu_tanh have a gate"
    )
    mlp_bias: bool = Field(False, description="biases of the MLP's projections")
    moe: MoE | None = Field(None, description="a mixture of experts in place of the MLP; absent: none")
    moe_layers: tuple[int, ...] | None = Field(None, description="layers with experts; absent = all, if moe is given")

    tied_embeddings: bool = Field(True, description="the head is the embedding's matrix")
    head_bias: bool = Field(False, description="bias of the head")
    logit_softcap: float | None = Field(None, description="logits go through cap * tanh(logit / cap)")
    init_std: float = Field(0.02, description="standard deviation of new weights")
    zero_init_outputs: bool = Field(True, description="output projections start at 0, so each block starts as identity")

    causal: bool = Field(True, description="False: an encoder, each token sees all of its document")
    cross_attention: bool = Field(False, description="a decoder that also attends to an encoder's output")
    task_head: HeadConfig | None = Field(None, description="a head for a task; absent: scores of the next token")
    bos_id: int | None = Field(None, description="token that begins a text; absent in a recipe: the tokenizer's")
    eos_ids: tuple[int, ...] = Field((), description="tokens that end a text; absent in a recipe: the tokenizer's")
    pad_id: int | None = Field(None, description="padding token; absent in a recipe: the tokenizer's")

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


class EncoderDecoderSettings(Settings):
    """The shape of an encoder-decoder of pre-norm blocks with rotary positions, one vocabulary on both sides.

    As it stands, it suits some ten thousand short pairs on two cores: 5.5 million parameters beside the embedding.
    """

    encoder_layers: int = Field(3, ge=1, description="blocks that read the source")
    decoder_layers: int = Field(3, ge=1, description="blocks that write the target")
    width: int = Field(256, ge=1, description="channels of the hidden state")
    heads: int = Field(4, ge=1, description="heads of each attention")
    mlp: Literal["relu2", "swiglu"] = Field("relu2", description="the MLP's activation; swiglu has a gate")
    mlp_width: int | None = Field(None, ge=1, description="hidden width of the MLP; absent: 4 times the width")
    context_tokens: int = Field(256, ge=2, description="the longest source and the longest target")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="in training, the share of each block's additions that is left out"
    )
    shared_embeddings: bool = Field(True, description="source, target and the scores use one table")

    def configs(
        self, vocab_size: int, *, bos_id: int, eos_ids: tuple[int, ...], pad_id: int | None = None
    ) -> tuple[ModelConfig, ModelConfig]:
        """The encoder's and the decoder's settings."""
        shape: dict[str, Any] = {
            "family": OWN_FAMILY,
            "vocab_size": vocab_size,
            "width": self.width,
            "heads": self.heads,
            "mlp": self.mlp,
            "mlp_width": self.mlp_width or 4 * self.width,
            "context_tokens": self.context_tokens,
            "bos_id": bos_id,
            "eos_ids": eos_ids,
            "pad_id": pad_id,
        }
        encoder = ModelConfig(**shape, layers=self.encoder_layers, causal=False)
        tied = self.shared_embeddings
        decoder = ModelConfig(**shape, layers=self.decoder_layers, cross_attention=True, tied_embeddings=tied)
        return encoder, decoder
