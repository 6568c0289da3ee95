"""Families: how a Hugging Face `config.json` and its weight names map to our settings and names, and back.

A family is one entry of the table at the end: its keys, what is fixed for it, and its weights. A key that changes what
is computed is understood or refused, never passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.model.config import ModelConfig

Table = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """Our tensors <-> one of theirs. `split` turns theirs into ours, `join` ours into theirs."""

    ours: tuple[str, ...]
    theirs: str
    split: Callable[[Tensor, ModelConfig], list[Tensor]] = lambda x, cfg: [x]
    join: Callable[[list[Tensor], ModelConfig], Tensor] = lambda xs, cfg: xs[0]


def _same(ours: str, theirs: str) -> Rule:
    return Rule((ours,), theirs)


def _turned(ours: str, theirs: str) -> Rule:
    """GPT-2 keeps matrices as (in, out)."""
    return Rule((ours,), theirs, lambda x, cfg: [x.t()], lambda xs, cfg: xs[0].t())


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"layers.{{i}}.attention.{name}.{kind}" for name in "qkv")


def _split_heads(x: Tensor, cfg: ModelConfig) -> list[Tensor]:
    """GPT-NeoX: q, k and v of each head stand together."""
    parts = x.view(cfg.heads, 3, cfg.channels, *x.shape[1:])
    return [parts[:, j].reshape(-1, *x.shape[1:]) for j in range(3)]


def _join_heads(xs: list[Tensor], cfg: ModelConfig) -> Tensor:
    parts = [x.view(cfg.heads, cfg.channels, *x.shape[1:]) for x in xs]
    return torch.stack(parts, dim=1).reshape(-1, *xs[0].shape[1:])


@dataclass(frozen=True)
class Family:
    """One entry of the table. `keys`: their key -> our setting, copied both ways. `fixed`: our settings that this
    family always has. `must`: their keys that may have one value only, with that value. `read` and `write` hold what
    is more than a copy. `defaults`: what Transformers takes an absent key to be."""

    model_type: str
    architecture: str
    keys: dict[str, str]
    fixed: Table
    must: Table
    weights: tuple[Rule, ...]
    read: Callable[[Table], Table] = lambda theirs: {}
    write: Callable[[ModelConfig], Table] = lambda cfg: {}
    free: frozenset[str] = field(default_factory=frozenset)
    """Our settings that `read` and `write` deal with."""
    reads: frozenset[str] = field(default_factory=frozenset)
    """Their keys that `read` deals with."""
    defaults: Table = field(default_factory=dict)


# Keys that say nothing about what is computed at inference, or are derived.
_SILENT = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "attention_dropout", "hidden_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout", "pretraining_tp", "output_router_logits",
    "router_aux_loss_coef", "id2label", "label2id", "_num_labels", "problem_type", "return_dict",
    "output_hidden_states", "output_attentions", "output_past", "chunk_size_feed_forward", "is_decoder",
    "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "task_specific_params", "n_ctx", "n_special", "predict_special_tokens",
    "gradient_checkpointing", "cache_implementation", "unsloth_fixed", "_attn_implementation", "is_llama_config",
    "transformers.js_config",
}  # fmt: skip

_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"})
_WINDOW_KEYS = frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"})
_EXPERT_KEYS = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
     "decoder_sparse_step", "mlp_only_layers"}
)  # fmt: skip

# Keys that any family may carry, and that must have these values.
_MUST_EVERYWHERE: Table = {"is_encoder_decoder": False, "rope_interleaved": False}

_PLAIN_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "context_tokens",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}
_GROUPED_KEYS = {**_PLAIN_KEYS, "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}

_LLAMA_WEIGHTS = (
    _same("embed.weight", "model.embed_tokens.weight"),
    _same("final_norm.weight", "model.norm.weight"),
    _same("head.weight", "lm_head.weight"),
    *(
        _same(f"layers.{{i}}.attention.{n}.{kind}", f"model.layers.{{i}}.self_attn.{n}_proj.{kind}")
        for n in "qkvo"
        for kind in ("weight", "bias")
    ),
    *(
        _same(f"layers.{{i}}.mlp.{n}.{kind}", f"model.layers.{{i}}.mlp.{n}_proj.{kind}")
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    _same("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    _same("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    _same("layers.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    _same("layers.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)

_EXPERT_WEIGHTS = (
    _same("layers.{i}.mlp.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *(
        Rule(
            (f"layers.{{i}}.mlp.{n}",),
            f"model.layers.{{i}}.mlp.experts.{{e}}.{n}_proj.weight",
        )
        for n in ("gate", "up", "down")
    ),
)


# -- rotary positions, in the spelling of Transformers 4 and of 5 -----------------------------------------------------


def _read_rope(theirs: Table, default_theta: float = 10_000.0, fraction: float | None = None) -> Table:
    """`rope_theta` and `rope_scaling` (4.x) or `rope_parameters` (5.x) as our settings.

    `fraction`: the share of the channels that rotates where the table names none; None for families that turn all.
    """
    old, new = theirs.get("rope_scaling") or {}, theirs.get("rope_parameters") or {}
    table: Table = {**new, **old}
    both = [key for key in old.keys() & new.keys() if old[key] != new[key]]
    theta: Any = table.get("rope_theta", theirs.get("rope_theta") or default_theta)
    if both or (table.get("rope_theta") and theirs.get("rope_theta") not in (None, theta)):
        raise ArtifactError(
            f"rotary positions are said twice, and differ in {', '.join(sorted(both)) or 'rope_theta'}",
            where="config.json",
            expected="rope_parameters alone, or rope_theta and rope_scaling",
        )
    unknown = sorted(
        key
        for key, value in table.items()
        if key not in _SCALING_KEYS and key not in _ROPE_TABLE_KEYS and value not in (None, False)
    )
    if unknown:
        raise ArtifactError(
            f"the rotary settings {', '.join(unknown)} are not known, and may change what the model computes",
            where="config.json",
            expected="of " + ", ".join(sorted({*_SCALING_KEYS, *_ROPE_TABLE_KEYS})),
        )
    ours: Table = {"rope_theta": float(theta)}
    share = table.get("partial_rotary_factor")
    if fraction is not None:
        ours["rope_fraction"] = fraction if share is None else share
    elif share not in (None, 1, 1.0):
        raise ArtifactError(
            f"'partial_rotary_factor' is {share}", where="config.json", expected="1: this family turns all channels"
        )
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return ours
    if kind not in _USED_BY_SCALING:
        raise ArtifactError(
            f"rotary positions are scaled as '{kind}'", where="config.json", expected="default, linear, llama3 or yarn"
        )
    if table.get("factor") is None and kind != "yarn":
        raise ArtifactError(f"rotary positions are scaled as '{kind}' without a factor", where="config.json")
    scaling: Table = {"kind": kind, "factor": table.get("factor")}
    for name in _USED_BY_SCALING[kind]:
        if table.get(name) is not None:
            scaling[_SCALING_KEYS[name]] = table[name]
    if kind != "linear":
        longest = theirs.get("max_position_embeddings")
        outer = theirs.get("original_max_position_embeddings")  # where it stands, Transformers prefers it
        scaling["original_context_tokens"] = outer or scaling.get("original_context_tokens") or longest
        if scaling["factor"] is None and longest:
            scaling["factor"] = longest / scaling["original_context_tokens"]
    return {**ours, "rope_scaling": scaling}


_ROPE_TABLE_KEYS = frozenset({"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "finetuned"})
_SCALING_KEYS = {
    "original_max_position_embeddings": "original_context_tokens",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}

_USED_BY_SCALING: dict[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
        "truncate",
    ),
}  # fmt: skip


def _write_rope(cfg: ModelConfig) -> Table:
    parameters: Table = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    scaling = cfg.rope_scaling
    if scaling is not None:
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        values = {name: getattr(scaling, _SCALING_KEYS[name]) for name in _USED_BY_SCALING[scaling.kind]}
        parameters |= {name: value for name, value in values.items() if value is not None}
    both: Table = {"rope_parameters": parameters, "rope_theta": cfg.rope_theta}
    if scaling is not None:
        both["rope_scaling"] = parameters
    return both


_ROPE = frozenset({"rope_theta", "rope_scaling"})


# -- what is more than a copy ----------------------------------------------------------------------------------------


def _read_llama(theirs: Table) -> Table:
    bias = bool(theirs.get("attention_bias", False))
    return {**_read_rope(theirs), "qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(theirs.get("mlp_bias", False))}


def _write_llama(cfg: ModelConfig) -> Table:
    return {**_write_rope(cfg), "attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}


def _read_windows(theirs: Table, *, default_on: bool) -> Table:
    """Sliding windows by `layer_types`, else by `use_sliding_window` and `max_window_layers`, else in all layers."""
    layers, window = theirs["num_hidden_layers"], theirs.get("sliding_window")
    types = theirs.get("layer_types")
    if window is None or not theirs.get("use_sliding_window", default_on):
        if "sliding_attention" in (types or ()):
            raise ArtifactError(
                "'layer_types' names sliding attention, and there is no window for it",
                where="config.json",
                expected="a 'sliding_window', and 'use_sliding_window' true where the family has it",
            )
        return {}
    if types is None:
        first = theirs.get("max_window_layers", 0) if "use_sliding_window" in theirs else 0
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    _check_types(types, layers)
    if set(types) == {"full_attention"}:
        return {}
    return {"windows": tuple(window if kind == "sliding_attention" else None for kind in types)}


def _check_types(types: list[str], layers: int) -> None:
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ArtifactError(
            f"'layer_types' is {types}",
            where="config.json",
            expected=f"full_attention or sliding_attention for each of {layers} layers",
        )


def _write_windows(cfg: ModelConfig) -> Table:
    sizes = {window for window in cfg.windows or () if window is not None}
    if not sizes:
        return {"sliding_window": None}
    if len(sizes) > 1:
        raise ConfigError(f"windows of {sorted(sizes)} tokens in one model", where="model.windows", expected="one size")
    return {
        "sliding_window": sizes.pop(),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in cfg.windows or ()],
    }


def _one_window(theirs: Table, *, default_on: bool) -> Table:
    """A window in all layers or in none: what Mistral and Qwen3-MoE know."""
    found = _read_windows({**theirs, "layer_types": None, "max_window_layers": 0}, default_on=default_on)
    wanted = "sliding_attention" if found else "full_attention"
    types = theirs.get("layer_types") or [wanted]
    if set(types) != {wanted}:
        raise ArtifactError(
            f"'layer_types' is {sorted(set(types))}",
            where="config.json",
            expected=f"'{wanted}' in every layer: this family has sliding windows in all layers or in none",
        )
    return found


def _read_mistral(theirs: Table) -> Table:
    return {**_read_rope(theirs), **_one_window(theirs, default_on=True)}


def _write_mistral(cfg: ModelConfig) -> Table:
    if cfg.windows and None in cfg.windows:
        raise ConfigError("Mistral has sliding windows in all layers or in none", where="model.windows")
    return {**_write_rope(cfg), "sliding_window": cfg.windows[0] if cfg.windows else None}


def _read_qwen(theirs: Table) -> Table:
    return {**_read_rope(theirs), **_read_windows(theirs, default_on=False)}


def _write_qwen(cfg: ModelConfig) -> Table:
    windows = _write_windows(cfg)
    used = windows["sliding_window"] is not None
    return {**_write_rope(cfg), **windows, "use_sliding_window": used, "max_window_layers": 0 if used else cfg.layers}


def _read_qwen3(theirs: Table) -> Table:
    bias = bool(theirs.get("attention_bias", False))
    return {**_read_qwen(theirs), "qkv_bias": bias, "out_bias": bias}


def _write_qwen3(cfg: ModelConfig) -> Table:
    return {**_write_qwen(cfg), "attention_bias": cfg.qkv_bias}


def _read_qwen3_moe(theirs: Table) -> Table:
    layers, step = theirs["num_hidden_layers"], theirs.get("decoder_sparse_step", 1)
    dense = set(theirs.get("mlp_only_layers") or ())
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    ours = {
        **_read_rope(theirs),
        **_one_window(theirs, default_on=False),
        "qkv_bias": bool(theirs.get("attention_bias", False)),
        "out_bias": bool(theirs.get("attention_bias", False)),
        "moe": {
            "experts": theirs.get("num_experts") or theirs.get("num_local_experts") or 128,
            "experts_per_token": theirs.get("num_experts_per_tok", 8),
            "expert_width": theirs.get("moe_intermediate_size", 768),
            "normalize_weights": bool(theirs.get("norm_topk_prob", False)),
            "balance_weight": theirs.get("router_aux_loss_coef", 0.001),
        },
    }
    return ours if len(sparse) == layers else {**ours, "moe_layers": sparse}


def _write_qwen3_moe(cfg: ModelConfig) -> Table:
    if cfg.moe is None:
        raise ConfigError("the family qwen3_moe needs experts", where="model.moe")
    if cfg.windows and None in cfg.windows:
        raise ConfigError("Qwen3-MoE has sliding windows in all layers or in none", where="model.windows")
    window = cfg.windows[0] if cfg.windows else None
    return {
        **_write_rope(cfg),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "attention_bias": cfg.qkv_bias,
        "num_experts": cfg.moe.experts,
        "num_experts_per_tok": cfg.moe.experts_per_token,
        "moe_intermediate_size": cfg.moe.expert_width,
        "norm_topk_prob": cfg.moe.normalize_weights,
        "router_aux_loss_coef": cfg.moe.balance_weight,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(cfg.layers) if not cfg.has_experts(i)],
    }


_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _read_gelu(theirs: Table, key: str, default: str) -> Table:
    act = theirs.get(key, default)
    if act not in _GELUS:
        raise ArtifactError(f"the activation '{act}' is not known", where="config.json", expected=", ".join(_GELUS))
    return {"mlp": _GELUS[act]}


def _write_gelu(cfg: ModelConfig) -> str:
    return "gelu" if cfg.mlp == "gelu" else "gelu_new"


def _read_gpt2(theirs: Table) -> Table:
    width = theirs.get("n_inner") or 4 * theirs.get("n_embd", 0)
    return {"mlp_width": width, **_read_gelu(theirs, "activation_function", "gelu_new")}


def _write_gpt2(cfg: ModelConfig) -> Table:
    return {
        "n_inner": cfg.mlp_width,
        "activation_function": _write_gelu(cfg),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _read_neox(theirs: Table) -> Table:
    theta = theirs.get("rotary_emb_base", theirs.get("rope_theta"))
    bias = bool(theirs.get("attention_bias", True))
    return {
        **_read_rope({**theirs, "rope_theta": theta}, fraction=theirs.get("rotary_pct", 0.25)),
        **_read_gelu(theirs, "hidden_act", "gelu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "norm_layout": "parallel" if theirs.get("use_parallel_residual", True) else "pre",
    }


def _write_neox(cfg: ModelConfig) -> Table:
    rope = _write_rope(cfg)
    rope["rope_parameters"] = {**rope["rope_parameters"], "partial_rotary_factor": cfg.rope_fraction}
    return {
        **rope,
        "rotary_pct": cfg.rope_fraction,
        "rotary_emb_base": cfg.rope_theta,
        "attention_bias": cfg.qkv_bias,
        "use_parallel_residual": cfg.norm_layout == "parallel",
        "hidden_act": _write_gelu(cfg),
    }


def _read_gemma3(theirs: Table) -> Table:
    layers = theirs["num_hidden_layers"]
    pattern: int = theirs.get("_sliding_window_pattern") or theirs.get("sliding_window_pattern") or 6
    types = theirs.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
    ]
    _check_types(types, layers)
    rope = theirs.get("rope_parameters") or {}
    full = {**theirs, "rope_parameters": rope.get("full_attention") or {}, "rope_scaling": theirs.get("rope_scaling")}
    sliding = _read_rope(
        {"rope_parameters": rope.get("sliding_attention") or {}, "rope_theta": theirs.get("rope_local_base_freq")}
    )
    if "rope_scaling" in sliding or rope.keys() - {"full_attention", "sliding_attention"}:
        raise ArtifactError(
            "the rotary positions of the sliding-window layers are scaled, or rope_parameters names other layers",
            where="config.json",
            expected="rope_parameters for full_attention and sliding_attention, the latter of type 'default'",
        )
    window = theirs.get("sliding_window", 4096)
    if window is None and "sliding_attention" in types:
        raise ArtifactError("layers of sliding attention without a 'sliding_window'", where="config.json")
    return {
        **_read_rope(full, 1_000_000.0),
        "rope_local_theta": sliding["rope_theta"],
        "windows": tuple(window if kind == "sliding_attention" else None for kind in types),
        "embedding_scale": float(theirs["hidden_size"]) ** 0.5,
        "query_scale": float(theirs.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def _write_gemma3(cfg: ModelConfig) -> Table:
    rope = _write_rope(cfg)["rope_parameters"]
    local = cfg.rope_local_theta if cfg.rope_local_theta is not None else cfg.rope_theta
    table = {
        **_write_windows(cfg),
        "query_pre_attn_scalar": round((cfg.query_scale or cfg.channels**-0.5) ** -2),
        "rope_theta": cfg.rope_theta,
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
    table.setdefault("layer_types", ["full_attention"] * cfg.layers)
    if table["sliding_window"] is None:
        table["sliding_window"] = cfg.context_tokens
    return table


_QWEN_DEFAULTS: Table = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

# -- the table -------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu"},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            _read_llama,
            _write_llama,
            _ROPE | {"qkv_bias", "out_bias", "mlp_bias"},
            reads=_ROPE_KEYS | {"attention_bias", "mlp_bias"},
            defaults={"rms_norm_eps": 1e-6},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu"},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            _read_mistral,
            _write_mistral,
            _ROPE | {"windows"},
            reads=_ROPE_KEYS | {"sliding_window", "layer_types"},
            defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {**_PLAIN_KEYS, "num_key_value_heads": "kv_heads"},
            {"mlp": "swiglu", "qkv_bias": True},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            _read_qwen,
            _write_qwen,
            _ROPE | {"windows"},
            reads=_ROPE_KEYS | _WINDOW_KEYS,
            defaults=_QWEN_DEFAULTS,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu", "qk_norm": "before_rope"},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            _read_qwen3,
            _write_qwen3,
            _ROPE | {"windows", "qkv_bias", "out_bias"},
            reads=_ROPE_KEYS | _WINDOW_KEYS | {"attention_bias"},
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu", "qk_norm": "before_rope"},
            {"hidden_act": "silu"},
            (*_LLAMA_WEIGHTS, *_EXPERT_WEIGHTS),
            _read_qwen3_moe,
            _write_qwen3_moe,
            _ROPE | {"windows", "qkv_bias", "out_bias", "moe", "moe_layers"},
            reads=_ROPE_KEYS | _WINDOW_KEYS | _EXPERT_KEYS | {"attention_bias"},
            defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "sliding_window": 4096},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            {
                **_GROUPED_KEYS,
                "final_logit_softcapping": "logit_softcap",
            },
            {"mlp": "geglu_tanh", "qk_norm": "before_rope", "norm_weight": "plus_one", "norm_layout": "sandwich"},
            {
                "hidden_activation": "gelu_pytorch_tanh",
                "attention_bias": False,
                "use_bidirectional_attention": False,
                # Transformers reads this key for Gemma 3 and then leaves the scores as they are.
                "attn_logit_softcapping": None,
            },
            (
                *(rule for rule in _LLAMA_WEIGHTS if "mlp_norm" not in rule.ours[0]),
                _same("layers.{i}.attention_post_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
                _same("layers.{i}.mlp_norm.weight", "model.layers.{i}.pre_feedforward_layernorm.weight"),
                _same("layers.{i}.mlp_post_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight"),
            ),
            _read_gemma3,
            _write_gemma3,
            _ROPE | {"windows", "rope_local_theta", "embedding_scale", "query_scale"},
            reads=_ROPE_KEYS
            | {
                "rope_local_base_freq",
                "sliding_window",
                "layer_types",
                "_sliding_window_pattern",
                "sliding_window_pattern",
                "query_pre_attn_scalar",
            },
            defaults={
                "vocab_size": 262_208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "max_position_embeddings": 131_072,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
            },
        ),
        Family(
            "nanochat",
            "NanoChatForCausalLM",
            {**_PLAIN_KEYS, "num_key_value_heads": "kv_heads", "final_logit_softcapping": "logit_softcap"},
            {"mlp": "relu2", "qk_norm": "after_rope", "norm_weight": "none", "embedding_norm": True, "rope_sign": -1},
            {"hidden_act": "relu2", "attention_bias": False},
            (
                *(rule for rule in _LLAMA_WEIGHTS if "mlp." not in rule.ours[0] and "norm" not in rule.ours[0]),
                _same("layers.{i}.mlp.up.weight", "model.layers.{i}.mlp.fc1.weight"),
                _same("layers.{i}.mlp.down.weight", "model.layers.{i}.mlp.fc2.weight"),
            ),
            _read_rope,
            _write_rope,
            _ROPE,
            reads=_ROPE_KEYS,
            defaults={"rms_norm_eps": 1e-6, "final_logit_softcapping": 15.0},
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            {
                "vocab_size": "vocab_size",
                "n_embd": "width",
                "n_layer": "layers",
                "n_head": "heads",
                "n_positions": "context_tokens",
                "layer_norm_epsilon": "norm_eps",
                "tie_word_embeddings": "tied_embeddings",
            },
            {
                "norm": "layer",
                "positions": "learned",
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            },
            {
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            (
                _same("embed.weight", "transformer.wte.weight"),
                _same("place.weight", "transformer.wpe.weight"),
                _same("head.weight", "lm_head.weight"),
                Rule(
                    _qkv("weight"),
                    "transformer.h.{i}.attn.c_attn.weight",
                    lambda x, cfg: [part.t() for part in torch.split(x, cfg.width, dim=1)],
                    lambda xs, cfg: torch.cat([x.t() for x in xs], dim=1),
                ),
                Rule(
                    _qkv("bias"),
                    "transformer.h.{i}.attn.c_attn.bias",
                    lambda x, cfg: list(torch.split(x, cfg.width)),
                    lambda xs, cfg: torch.cat(xs),
                ),
                *(
                    rule
                    for ours, theirs in (
                        ("attention.o", "attn.c_proj"),
                        ("mlp.up", "mlp.c_fc"),
                        ("mlp.down", "mlp.c_proj"),
                    )
                    for rule in (
                        _turned(f"layers.{{i}}.{ours}.weight", f"transformer.h.{{i}}.{theirs}.weight"),
                        _same(f"layers.{{i}}.{ours}.bias", f"transformer.h.{{i}}.{theirs}.bias"),
                    )
                ),
                *(
                    _same(f"{ours}.{kind}", f"{theirs}.{kind}")
                    for kind in ("weight", "bias")
                    for ours, theirs in (
                        ("final_norm", "transformer.ln_f"),
                        ("layers.{i}.attention_norm", "transformer.h.{i}.ln_1"),
                        ("layers.{i}.mlp_norm", "transformer.h.{i}.ln_2"),
                    )
                ),
            ),
            _read_gpt2,
            _write_gpt2,
            frozenset({"mlp_width", "mlp"}),
            reads=frozenset({"n_inner", "activation_function"}),
            defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            {
                "vocab_size": "vocab_size",
                "hidden_size": "width",
                "num_hidden_layers": "layers",
                "num_attention_heads": "heads",
                "intermediate_size": "mlp_width",
                "max_position_embeddings": "context_tokens",
                "layer_norm_eps": "norm_eps",
                "tie_word_embeddings": "tied_embeddings",
            },
            {"norm": "layer", "mlp_bias": True},
            {},
            (
                _same("embed.weight", "gpt_neox.embed_in.weight"),
                _same("head.weight", "embed_out.weight"),
                *(
                    Rule(
                        _qkv(kind),
                        f"gpt_neox.layers.{{i}}.attention.query_key_value.{kind}",
                        _split_heads,
                        _join_heads,
                    )
                    for kind in ("weight", "bias")
                ),
                *(
                    _same(f"{ours}.{kind}", f"gpt_neox.{theirs}.{kind}")
                    for kind in ("weight", "bias")
                    for ours, theirs in (
                        ("final_norm", "final_layer_norm"),
                        ("layers.{i}.attention.o", "layers.{i}.attention.dense"),
                        ("layers.{i}.mlp.up", "layers.{i}.mlp.dense_h_to_4h"),
                        ("layers.{i}.mlp.down", "layers.{i}.mlp.dense_4h_to_h"),
                        ("layers.{i}.attention_norm", "layers.{i}.input_layernorm"),
                        ("layers.{i}.mlp_norm", "layers.{i}.post_attention_layernorm"),
                    )
                ),
            ),
            _read_neox,
            _write_neox,
            _ROPE | {"rope_fraction", "qkv_bias", "out_bias", "norm_layout", "mlp"},
            reads=_ROPE_KEYS
            | {"rotary_pct", "rotary_emb_base", "attention_bias", "hidden_act", "use_parallel_residual"},
            defaults={"layer_norm_eps": 1e-5},
        ),
    )
}

# What decides training alone, or only how the model is begun.
_OUTSIDE = {"family", "init_std", "zero_init_outputs", "bos_id", "eos_ids", "pad_id", "task_head"}


def config_from_folder(theirs: Table, where: str) -> ModelConfig:
    """A Hugging Face `config.json` as our settings.

    Raises `ArtifactError` for an unknown family, a missing key, or a key that changes what is computed in a way we do
    not know.
    """
    model_type = theirs.get("model_type", "")
    family = FAMILIES.get(model_type)
    if family is None:
        raise ArtifactError(
            f"models of the family '{model_type or 'unnamed'}' are not supported",
            where=where,
            expected="one of: " + ", ".join(sorted(FAMILIES)),
        )
    for key, wanted in {**_MUST_EVERYWHERE, **family.must}.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if key in theirs and theirs[key] not in allowed:
            raise ArtifactError(
                f"'{key}' is {theirs[key]!r}",
                where=where,
                expected=" or ".join(map(repr, allowed)),
                fix="use another model",
            )
    ours: Table = {"family": model_type, **family.fixed}
    filled = {**family.defaults, **theirs}
    _refuse_unknown(family, theirs, where)
    for key, mine in family.keys.items():
        if key in filled:
            ours[mine] = filled[key]
        elif ModelConfig.model_fields[mine].is_required():
            raise ArtifactError(f"the key '{key}' is missing", where=where)
        elif mine == "tied_embeddings":
            ours[mine] = False
    try:
        ours |= family.read(filled)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(f"a setting is not what it should be: {error}", where=where) from None
    eos = theirs.get("eos_token_id")
    ours |= {
        "bos_id": theirs.get("bos_token_id"),
        "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_id": theirs.get("pad_token_id"),
        "zero_init_outputs": False,
    }
    try:
        return build(ModelConfig, ours, where=where)
    except ConfigError as error:
        raise ArtifactError(f"the settings cannot be: {error.found}", where=where) from None


def _refuse_unknown(family: Family, theirs: Table, where: str) -> None:
    known = _SILENT | family.reads | family.keys.keys() | family.must.keys() | _MUST_EVERYWHERE.keys()
    unknown = sorted(key for key, value in theirs.items() if key not in known and value not in (None, False, [], {}))
    if unknown:
        raise ArtifactError(
            f"the settings {', '.join(unknown)} are not known, and may change what the model computes",
            where=where,
            fix="if they do not matter, remove them from config.json",
        )


def config_to_folder(cfg: ModelConfig, dtype: str) -> Table:
    """Our settings as the `config.json` of their family. Raises `ConfigError` for what the family cannot say."""
    return _say(cfg, check_expressible(cfg), dtype)


def _say(cfg: ModelConfig, family: Family, dtype: str) -> Table:
    theirs: Table = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "torch_dtype": dtype,
        **{key: value[0] if isinstance(value, tuple) else value for key, value in family.must.items()},
    }
    for key, mine in family.keys.items():
        value = {"kv_heads": cfg.kv, "head_dim": cfg.channels}.get(mine, getattr(cfg, mine))
        theirs[key] = value
    theirs |= family.write(cfg)
    theirs |= {
        "bos_token_id": cfg.bos_id,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        "pad_token_id": cfg.pad_id,
        "use_cache": True,
    }
    return theirs


def check_expressible(cfg: ModelConfig) -> Family:
    """The family of `cfg`, after checking that it can say everything in it. Raises `ConfigError` naming what not.

    The settings are written and read again: what comes back must mean the same.
    """
    family = FAMILIES.get(cfg.family)
    if family is None:
        raise ConfigError(
            f"there is no family '{cfg.family}'",
            where="model.family",
            expected="one of: " + ", ".join(sorted(FAMILIES)),
        )
    said = set(family.keys.values()) | family.free | _OUTSIDE
    for name, info in ModelConfig.model_fields.items():
        if name in said:
            continue
        value = getattr(cfg, name)
        wanted = family.fixed.get(name, info.default)
        if name in ("kv_heads", "head_dim"):
            value, wanted = (cfg.kv, cfg.heads) if name == "kv_heads" else (cfg.channels, cfg.width // cfg.heads)
        if value != wanted:
            raise _cannot_say(family, name, value, wanted)
    given, back = _meaning(cfg), _meaning(config_from_folder(_say(cfg, family, "float32"), "config.json"))
    for name, value in given.items():
        wanted = back[name]
        close = isinstance(value, float) and isinstance(wanted, float) and math.isclose(value, wanted, rel_tol=1e-9)
        if value != wanted and not close:
            raise _cannot_say(family, name, value, wanted)
    return family


def _cannot_say(family: Family, name: str, value: Any, wanted: Any) -> ConfigError:
    return ConfigError(
        f"the family {family.model_type} cannot have {name}: {value!r}",
        where=f"model.{name}",
        expected=repr(wanted),
        fix="choose another family or leave the setting out, so that what is trained loads elsewhere",
    )


def _meaning(cfg: ModelConfig) -> Table:
    """The settings that decide what is computed, each spelled in one way."""
    table = cfg.model_dump(exclude=_OUTSIDE)
    table |= {"kv_heads": cfg.kv, "head_dim": cfg.channels}
    table["query_scale"] = cfg.channels**-0.5 if cfg.query_scale is None else cfg.query_scale
    table["windows"] = tuple(cfg.window(i) for i in range(cfg.layers))
    table["moe_layers"] = tuple(i for i in range(cfg.layers) if cfg.has_experts(i))
    if cfg.rope_scaling is not None and cfg.rope_scaling.kind != "linear":
        original = cfg.rope_scaling.original_context_tokens or cfg.context_tokens
        table["rope_scaling"]["original_context_tokens"] = original
    if cfg.rope_local_theta is None or all(window is None for window in table["windows"]):
        # Without a theta of their own, sliding layers turn as the others do.
        plain = cfg.rope_scaling is None or all(window is None for window in table["windows"])
        table["rope_local_theta"] = cfg.rope_theta if plain else None
    return table
