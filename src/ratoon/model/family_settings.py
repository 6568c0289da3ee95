"""Settings of families that are more than a copy: rotary positions, sliding windows, biases, experts, activations.

Decides how each is read from a `config.json`, in the spelling of Transformers 4 and of 5, and written to one. Which
family uses which of them is said in `families.py`.
"""

from __future__ import annotations

from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.model.config import ModelConfig
from ratoon.model.family import Table

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"})
WINDOW_KEYS = frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"})
EXPERT_KEYS = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
     "decoder_sparse_step", "mlp_only_layers"}
)  # fmt: skip
"""Their keys of rotary positions, of windows, of experts."""


# -- rotary positions, in the spelling of Transformers 4 and of 5 -----------------------------------------------------


def read_rope(theirs: Table, default_theta: float = 10_000.0, fraction: float | None = None) -> Table:
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


def write_rope(cfg: ModelConfig) -> Table:
    """Our rotary positions in both spellings."""
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


ROPE = frozenset({"rope_theta", "rope_scaling"})
"""Our settings that `read_rope` and `write_rope` deal with."""


# -- what is more than a copy ----------------------------------------------------------------------------------------


def read_llama(theirs: Table) -> Table:
    """Rotary positions, biases of attention (of all four projections) and of the MLP."""
    bias = bool(theirs.get("attention_bias", False))
    return {**read_rope(theirs), "qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(theirs.get("mlp_bias", False))}


def write_llama(cfg: ModelConfig) -> Table:
    """Back from `read_llama`."""
    return {**write_rope(cfg), "attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}


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


def read_mistral(theirs: Table) -> Table:
    """Rotary positions, a window in all layers or in none."""
    return {**read_rope(theirs), **_one_window(theirs, default_on=True)}


def write_mistral(cfg: ModelConfig) -> Table:
    """Back from `read_mistral`. Raises `ConfigError` for windows in some layers."""
    if cfg.windows and None in cfg.windows:
        raise ConfigError("Mistral has sliding windows in all layers or in none", where="model.windows")
    return {**write_rope(cfg), "sliding_window": cfg.windows[0] if cfg.windows else None}


def read_qwen(theirs: Table) -> Table:
    """Rotary positions, windows by layer."""
    return {**read_rope(theirs), **_read_windows(theirs, default_on=False)}


def write_qwen(cfg: ModelConfig) -> Table:
    """Back from `read_qwen`."""
    windows = _write_windows(cfg)
    used = windows["sliding_window"] is not None
    return {**write_rope(cfg), **windows, "use_sliding_window": used, "max_window_layers": 0 if used else cfg.layers}


def read_qwen3(theirs: Table) -> Table:
    """As `read_qwen`, and biases of attention."""
    bias = bool(theirs.get("attention_bias", False))
    return {**read_qwen(theirs), "qkv_bias": bias, "out_bias": bias}


def write_qwen3(cfg: ModelConfig) -> Table:
    """Back from `read_qwen3`."""
    return {**write_qwen(cfg), "attention_bias": cfg.qkv_bias}


def read_qwen3_moe(theirs: Table) -> Table:
    """Rotary positions, one window, biases of attention, the experts and the layers that have them."""
    layers, step = theirs["num_hidden_layers"], theirs.get("decoder_sparse_step", 1)
    dense = set(theirs.get("mlp_only_layers") or ())
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    ours = {
        **read_rope(theirs),
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


def write_qwen3_moe(cfg: ModelConfig) -> Table:
    """Back from `read_qwen3_moe`. Raises `ConfigError` without experts, and for windows in some layers."""
    if cfg.moe is None:
        raise ConfigError("the family qwen3_moe needs experts", where="model.moe")
    if cfg.windows and None in cfg.windows:
        raise ConfigError("Qwen3-MoE has sliding windows in all layers or in none", where="model.windows")
    window = cfg.windows[0] if cfg.windows else None
    return {
        **write_rope(cfg),
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


def read_gpt2(theirs: Table) -> Table:
    """The width of the MLP where none is said, and its activation."""
    width = theirs.get("n_inner") or 4 * theirs.get("n_embd", 0)
    return {"mlp_width": width, **_read_gelu(theirs, "activation_function", "gelu_new")}


def write_gpt2(cfg: ModelConfig) -> Table:
    """Back from `read_gpt2`."""
    return {
        "n_inner": cfg.mlp_width,
        "activation_function": _write_gelu(cfg),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def read_neox(theirs: Table) -> Table:
    """Rotary positions of a share of the channels, the activation, biases, whether the MLP stands beside attention."""
    theta = theirs.get("rotary_emb_base", theirs.get("rope_theta"))
    bias = bool(theirs.get("attention_bias", True))
    return {
        **read_rope({**theirs, "rope_theta": theta}, fraction=theirs.get("rotary_pct", 0.25)),
        **_read_gelu(theirs, "hidden_act", "gelu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "norm_layout": "parallel" if theirs.get("use_parallel_residual", True) else "pre",
    }


def write_neox(cfg: ModelConfig) -> Table:
    """Back from `read_neox`."""
    rope = write_rope(cfg)
    rope["rope_parameters"] = {**rope["rope_parameters"], "partial_rotary_factor": cfg.rope_fraction}
    return {
        **rope,
        "rotary_pct": cfg.rope_fraction,
        "rotary_emb_base": cfg.rope_theta,
        "attention_bias": cfg.qkv_bias,
        "use_parallel_residual": cfg.norm_layout == "parallel",
        "hidden_act": _write_gelu(cfg),
    }


def read_gemma3(theirs: Table) -> Table:
    """Rotary positions of two kinds of layers, windows by layer, the scales of embeddings and queries."""
    layers = theirs["num_hidden_layers"]
    pattern: int = theirs.get("_sliding_window_pattern") or theirs.get("sliding_window_pattern") or 6
    types = theirs.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
    ]
    _check_types(types, layers)
    rope = theirs.get("rope_parameters") or {}
    full = {**theirs, "rope_parameters": rope.get("full_attention") or {}, "rope_scaling": theirs.get("rope_scaling")}
    sliding = read_rope(
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
        **read_rope(full, 1_000_000.0),
        "rope_local_theta": sliding["rope_theta"],
        "windows": tuple(window if kind == "sliding_attention" else None for kind in types),
        "embedding_scale": float(theirs["hidden_size"]) ** 0.5,
        "query_scale": float(theirs.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def write_gemma3(cfg: ModelConfig) -> Table:
    """Back from `read_gemma3`."""
    rope = write_rope(cfg)["rope_parameters"]
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
