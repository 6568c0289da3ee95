"""What a model costs, from its settings alone: parameters, FLOPs, bytes. Free of torch.

Decides how things are counted. What a machine makes of it is measured elsewhere (`ratoon plan`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ratoon.model.config import ModelConfig

MASTER_BYTES = 4
"""Master weights and the step's summed gradient are float32."""
MUON_BYTES = 4
"""Optimizer state of a parameter: Muon's momentum. AdamW's are two moments of `moment_bytes` each."""


def parameters(cfg: ModelConfig) -> int:
    """Numbers that the model learns, each once: a tied head is the embedding's."""
    bias = cfg.vocab_size if cfg.head_bias and not cfg.tied_embeddings else 0
    layers = sum(_layer_matrices(cfg, layer, chosen=False) + _layer_vectors(cfg, layer) for layer in range(cfg.layers))
    return _tables(cfg) + layers + _norm(cfg, cfg.width) * (2 if cfg.embedding_norm else 1) + bias


def hidden_matrices(cfg: ModelConfig) -> int:
    """Parameters of the blocks' matrices, routers left out: what Muon moves."""
    routers = sum(cfg.width * cfg.moe.experts for i in range(cfg.layers) if cfg.moe is not None and cfg.has_experts(i))
    return sum(_layer_matrices(cfg, layer, chosen=False) for layer in range(cfg.layers)) - routers


def multiplied_parameters(cfg: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all matrices of the blocks (of experts those it chooses, and the
    router) and the head, tied or not. Looking up an embedding multiplies nothing."""
    blocks = sum(_layer_matrices(cfg, layer, chosen=True) for layer in range(cfg.layers))
    return blocks + cfg.vocab_size * cfg.width


def flops_per_token(cfg: ModelConfig, context_tokens: int, *, training: bool = True) -> float:
    """Floating-point operations of a token in rows of `context_tokens`: 2 for each multiplied parameter, and
    attention's two products over the keys it sees; three times that with the backward pass (Kaplan et al.,
    arXiv:2001.08361, section 2.1).

    Keys that a causal mask or a window hides are not counted: of a causal square it is the half. Norms, activations,
    rotations and the softmax are left out.
    """
    assert not cfg.cross_attention, "what a decoder costs depends on its encoder's row"
    seen = sum(_mean_keys(cfg.window(layer), context_tokens, cfg.causal) for layer in range(cfg.layers))
    forward = 2 * multiplied_parameters(cfg) + 4 * cfg.heads * cfg.channels * seen
    return 3 * forward if training else forward


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at once."""

    weights: int
    """What the model computes with."""
    masters: int
    """Float32 master weights, where the weights themselves are not float32."""
    gradients: int
    """The micro-batch's gradient, and the step's float32 sum where that is another."""
    optimizer: int
    activations: int
    """What the forward pass of a micro-batch keeps for the backward pass; on the high side."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.masters + self.gradients + self.optimizer + self.activations


def bytes_needed(
    cfg: ModelConfig,
    *,
    rows: int,
    context_tokens: int,
    weight_bytes: int = 4,
    activation_bytes: int = 4,
    trained: int | None = None,
    by_muon: int = 0,
    recompute: bool = False,
    keeps_scores: bool = True,
    split: bool = False,
    summed: bool = True,
    moment_bytes: int = 4,
) -> Memory:
    """Memory of training with micro-batches of `rows` x `context_tokens`.

    `weight_bytes`: of a number the model computes with (2: bfloat16 with float32 masters); `activation_bytes`: of a
    number that flows; `trained`: parameters that are trained (absent: all), `by_muon` of them by Muon and the rest by
    AdamW; `recompute`: gradient checkpointing; `keeps_scores`: attention keeps its probabilities (plain products do,
    flash kernels do not); `split`: of the masters only what the computing weights lack is kept; `summed`: gradients of
    micro-batches are summed in float32; `moment_bytes`: of each of AdamW's two moments.
    """
    everything = parameters(cfg)
    trained = everything if trained is None else trained
    separate = weight_bytes != MASTER_BYTES
    return Memory(
        weights=everything * weight_bytes,
        masters=trained * (MASTER_BYTES - weight_bytes if split else MASTER_BYTES) if separate else 0,
        gradients=trained * (weight_bytes + MASTER_BYTES * summed if separate else MASTER_BYTES),
        optimizer=(trained - by_muon) * 2 * moment_bytes + by_muon * MUON_BYTES,
        activations=kept_activations(
            cfg, rows * context_tokens, context_tokens, activation_bytes, recompute, keeps_scores
        ),
    )


def kept_activations(
    cfg: ModelConfig, tokens: int, context_tokens: int, number_bytes: int, recompute: bool, keeps_scores: bool
) -> int:
    """About how many bytes a forward pass over `tokens` keeps for the backward pass; on the high side.

    Per token and layer: the stream twice, the norms' outputs, q, k, v and what attention mixed, the MLP's insides,
    and a square of attention's probabilities where they are kept; another for cross attention, whose memory is taken
    to be as long as the row.
    """
    heads_width = (cfg.heads + 2 * cfg.kv) * cfg.channels
    mlp = (3 if cfg.gated else 2) * cfg.mlp_width
    if cfg.moe is not None:
        mlp = 3 * cfg.moe.expert_width * cfg.moe.experts_per_token
    attentions = 2 if cfg.cross_attention else 1
    inside = 6 * cfg.width + (1 + 2 * attentions) * heads_width + 2 * mlp
    square = cfg.heads * context_tokens * 3 * attentions if keeps_scores else 0
    layers = 1 if recompute else cfg.layers
    kept = tokens * (layers * (inside + square) + cfg.layers * cfg.width) * number_bytes
    return kept + tokens * cfg.width * 8


def checkpoint_bytes(cfg: ModelConfig, *, trained: int | None = None, by_muon: int = 0, moment_bytes: int = 4) -> int:
    """A checkpoint on the disk: float32 weights of all parameters, and the optimizer's state of the trained ones."""
    everything = parameters(cfg)
    trained = everything if trained is None else trained
    return everything * MASTER_BYTES + (trained - by_muon) * 2 * moment_bytes + by_muon * MUON_BYTES


def _tables(cfg: ModelConfig) -> int:
    """Embedding, learned positions, and the head where it is its own."""
    places = cfg.context_tokens if cfg.positions == "learned" else 0
    return (cfg.vocab_size * (1 if cfg.tied_embeddings else 2) + places) * cfg.width


def _norm(cfg: ModelConfig, channels: int) -> int:
    return 2 * channels if cfg.norm == "layer" else 0 if cfg.norm_weight == "none" else channels


def _layer_matrices(cfg: ModelConfig, layer: int, *, chosen: bool) -> int:
    """Parameters of a block's matrices; `chosen`: of the experts only those that a token goes to."""
    attention = cfg.width * cfg.channels * (2 * cfg.heads + 2 * cfg.kv) * (2 if cfg.cross_attention else 1)
    sides = 3 if cfg.gated else 2
    if cfg.moe is None or not cfg.has_experts(layer):
        return attention + sides * cfg.width * cfg.mlp_width
    experts = cfg.moe.experts_per_token if chosen else cfg.moe.experts
    return attention + cfg.width * (cfg.moe.experts + experts * sides * cfg.moe.expert_width)


def _layer_vectors(cfg: ModelConfig, layer: int) -> int:
    """Parameters of a block's gains and biases."""
    norms = 2 + (2 if cfg.norm_layout == "sandwich" else 0) + (1 if cfg.cross_attention else 0)
    found = norms * _norm(cfg, cfg.width)
    if cfg.qk_norm != "none":
        found += 2 * _norm(cfg, cfg.channels)
    attentions = 2 if cfg.cross_attention else 1
    if cfg.qkv_bias:
        found += attentions * cfg.channels * (cfg.heads + 2 * cfg.kv)
    if cfg.out_bias:
        found += attentions * cfg.width
    if cfg.mlp_bias and not cfg.has_experts(layer):
        found += (2 if cfg.gated else 1) * cfg.mlp_width + cfg.width
    return found


def _mean_keys(window: int | None, context_tokens: int, causal: bool) -> float:
    """Keys that a token of a row sees on average."""
    reach = context_tokens if window is None else min(window, context_tokens)
    # Up to `reach` tokens see as many keys as stand before them and themselves; the others see `reach`.
    one_side = (reach * (reach + 1) / 2 + (context_tokens - reach) * reach) / context_tokens
    return one_side if causal else 2 * one_side - 1
