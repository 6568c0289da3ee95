"""The families: how the settings and weight names of each, in a Hugging Face folder, are ours.

A family is one entry of the table: its keys, what is fixed for it, and its weights. The form of an entry is decided in
`family.py`; what is more than a copy of a setting, in `family_settings.py`; how entries are used, in
`family_config.py`.
"""

from __future__ import annotations

import torch

from ratoon.model.family import Family, Rule, Table, join_heads, qkv, same, split_heads, turned
from ratoon.model.family_settings import (
    EXPERT_KEYS,
    ROPE,
    ROPE_KEYS,
    WINDOW_KEYS,
    read_gemma3,
    read_gpt2,
    read_llama,
    read_mistral,
    read_neox,
    read_qwen,
    read_qwen3,
    read_qwen3_moe,
    read_rope,
    write_gemma3,
    write_gpt2,
    write_llama,
    write_mistral,
    write_neox,
    write_qwen,
    write_qwen3,
    write_qwen3_moe,
    write_rope,
)

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
    same("embed.weight", "model.embed_tokens.weight"),
    same("final_norm.weight", "model.norm.weight"),
    same("head.weight", "lm_head.weight"),
    *(
        same(f"layers.{{i}}.attention.{n}.{kind}", f"model.layers.{{i}}.self_attn.{n}_proj.{kind}")
        for n in "qkvo"
        for kind in ("weight", "bias")
    ),
    *(
        same(f"layers.{{i}}.mlp.{n}.{kind}", f"model.layers.{{i}}.mlp.{n}_proj.{kind}")
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    same("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    same("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    same("layers.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    same("layers.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)

_EXPERT_WEIGHTS = (
    same("layers.{i}.mlp.router.weight", "model.layers.{i}.mlp.gate.weight"),
    *(
        Rule(
            (f"layers.{{i}}.mlp.{n}",),
            f"model.layers.{{i}}.mlp.experts.{{e}}.{n}_proj.weight",
        )
        for n in ("gate", "up", "down")
    ),
)

_QWEN_DEFAULTS: Table = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

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
            read_llama,
            write_llama,
            ROPE | {"qkv_bias", "out_bias", "mlp_bias"},
            reads=ROPE_KEYS | {"attention_bias", "mlp_bias"},
            defaults={"rms_norm_eps": 1e-6},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu"},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            read_mistral,
            write_mistral,
            ROPE | {"windows"},
            reads=ROPE_KEYS | {"sliding_window", "layer_types"},
            defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {**_PLAIN_KEYS, "num_key_value_heads": "kv_heads"},
            {"mlp": "swiglu", "qkv_bias": True},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            read_qwen,
            write_qwen,
            ROPE | {"windows"},
            reads=ROPE_KEYS | WINDOW_KEYS,
            defaults=_QWEN_DEFAULTS,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu", "qk_norm": "before_rope"},
            {"hidden_act": "silu"},
            _LLAMA_WEIGHTS,
            read_qwen3,
            write_qwen3,
            ROPE | {"windows", "qkv_bias", "out_bias"},
            reads=ROPE_KEYS | WINDOW_KEYS | {"attention_bias"},
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _GROUPED_KEYS,
            {"mlp": "swiglu", "qk_norm": "before_rope"},
            {"hidden_act": "silu"},
            (*_LLAMA_WEIGHTS, *_EXPERT_WEIGHTS),
            read_qwen3_moe,
            write_qwen3_moe,
            ROPE | {"windows", "qkv_bias", "out_bias", "moe", "moe_layers"},
            reads=ROPE_KEYS | WINDOW_KEYS | EXPERT_KEYS | {"attention_bias"},
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
                same("layers.{i}.attention_post_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
                same("layers.{i}.mlp_norm.weight", "model.layers.{i}.pre_feedforward_layernorm.weight"),
                same("layers.{i}.mlp_post_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight"),
            ),
            read_gemma3,
            write_gemma3,
            ROPE | {"windows", "rope_local_theta", "embedding_scale", "query_scale"},
            reads=ROPE_KEYS
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
                same("layers.{i}.mlp.up.weight", "model.layers.{i}.mlp.fc1.weight"),
                same("layers.{i}.mlp.down.weight", "model.layers.{i}.mlp.fc2.weight"),
            ),
            read_rope,
            write_rope,
            ROPE,
            reads=ROPE_KEYS,
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
                same("embed.weight", "transformer.wte.weight"),
                same("place.weight", "transformer.wpe.weight"),
                same("head.weight", "lm_head.weight"),
                Rule(
                    qkv("weight"),
                    "transformer.h.{i}.attn.c_attn.weight",
                    lambda x, cfg: [part.t() for part in torch.split(x, cfg.width, dim=1)],
                    lambda xs, cfg: torch.cat([x.t() for x in xs], dim=1),
                ),
                Rule(
                    qkv("bias"),
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
                        turned(f"layers.{{i}}.{ours}.weight", f"transformer.h.{{i}}.{theirs}.weight"),
                        same(f"layers.{{i}}.{ours}.bias", f"transformer.h.{{i}}.{theirs}.bias"),
                    )
                ),
                *(
                    same(f"{ours}.{kind}", f"{theirs}.{kind}")
                    for kind in ("weight", "bias")
                    for ours, theirs in (
                        ("final_norm", "transformer.ln_f"),
                        ("layers.{i}.attention_norm", "transformer.h.{i}.ln_1"),
                        ("layers.{i}.mlp_norm", "transformer.h.{i}.ln_2"),
                    )
                ),
            ),
            read_gpt2,
            write_gpt2,
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
                same("embed.weight", "gpt_neox.embed_in.weight"),
                same("head.weight", "embed_out.weight"),
                *(
                    Rule(
                        qkv(kind),
                        f"gpt_neox.layers.{{i}}.attention.query_key_value.{kind}",
                        split_heads,
                        join_heads,
                    )
                    for kind in ("weight", "bias")
                ),
                *(
                    same(f"{ours}.{kind}", f"gpt_neox.{theirs}.{kind}")
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
            read_neox,
            write_neox,
            ROPE | {"rope_fraction", "qkv_bias", "out_bias", "norm_layout", "mlp"},
            reads=ROPE_KEYS
            | {"rotary_pct", "rotary_emb_base", "attention_bias", "hidden_act", "use_parallel_residual"},
            defaults={"layer_norm_eps": 1e-5},
        ),
    )
}
