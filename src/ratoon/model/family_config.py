"""A Hugging Face `config.json` as our settings, and our settings as one, by the entry of the family.

Decides that a key that changes what is computed is understood or refused, never passed over, and that nothing is
written that would be lost. What a family's keys mean is said in `families.py`.
"""

from __future__ import annotations

import math
from typing import Any

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.model.config import ModelConfig
from ratoon.model.families import FAMILIES
from ratoon.model.family import Family, Table

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

# Keys that any family may carry, and that must have these values.
_MUST_EVERYWHERE: Table = {"is_encoder_decoder": False, "rope_interleaved": False}

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
