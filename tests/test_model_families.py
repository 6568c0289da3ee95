"""Every family against Transformers, with every parameter random: read, written, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError, RatoonError
from ratoon.model.config import ModelConfig, MoE, RopeScaling
from ratoon.model.families import FAMILIES
from ratoon.model.family_config import _meaning, check_expressible, config_from_folder, config_to_folder
from ratoon.model.folder import read_config, read_model, write_model
from ratoon.model.init import init_weights
from ratoon.model.transformer import Transformer
from theirs import (
    EXPERTS,
    GEMMA,
    GPT2,
    LONG,
    MIXED,
    NEOX,
    SMALL,
    VOCAB,
    WINDOW,
    Table,
    difference,
    equal,
    load_theirs,
    logits_of_ours,
    logits_of_theirs,
    randomize,
    rope,
    weights,
)

LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=1.0)

YARN_PLUS = YARN | {"attention_factor": 1.7, "truncate": False}


@dataclass(frozen=True)
class Case:
    """A family's settings as Transformers' configuration class takes them."""

    kind: str
    settings: Table


def _cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, kind: str, base: Table, **changes: Any) -> tuple[str, Case]:
        return name, Case(kind, base | changes)

    def llama(name: str, **changes: Any) -> tuple[str, Case]:
        return case(f"llama-{name}", "LlamaConfig", SMALL, **changes)

    yield llama("untied")
    yield llama("tied", tie_word_embeddings=True)
    yield llama("no-groups", num_key_value_heads=4)
    yield llama("one-key-head", num_key_value_heads=1)
    yield llama("wide-heads", head_dim=12)
    yield llama("biases", attention_bias=True, mlp_bias=True)
    yield llama("theta", rope_parameters=rope("default"))
    yield llama("linear", rope_parameters=rope("linear", factor=3.0))
    yield llama("llama3", rope_parameters=LLAMA3)
    yield llama("yarn", rope_parameters=YARN)
    yield llama("yarn-attention", rope_parameters=YARN_PLUS)
    yield llama("yarn-mscale", rope_parameters=YARN | {"mscale": 1.3, "mscale_all_dim": 0.6})
    yield llama("no-end", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    yield case("mistral", "MistralConfig", SMALL, sliding_window=None)
    yield case("mistral-window", "MistralConfig", SMALL, sliding_window=WINDOW)
    yield case("mistral-heads", "MistralConfig", SMALL, sliding_window=None, head_dim=12, tie_word_embeddings=True)
    for family, extra in (("Qwen2", {}), ("Qwen3", {"head_dim": 10})):
        name, kind = family.lower(), f"{family}Config"
        yield case(name, kind, SMALL, **extra)
        yield case(f"{name}-tied", kind, SMALL, **extra, tie_word_embeddings=True)
        window = {"use_sliding_window": True, "sliding_window": WINDOW}
        yield case(f"{name}-window", kind, SMALL, **extra, **window, max_window_layers=1)
        yield case(f"{name}-layers", kind, SMALL, **extra, **window, layer_types=MIXED)
        yield case(f"{name}-yarn", kind, SMALL, **extra, rope_parameters=YARN)
    yield case("qwen3-biases", "Qwen3Config", SMALL, head_dim=8, attention_bias=True)
    moe = "Qwen3MoeConfig"
    yield case("qwen3-moe", moe, SMALL | EXPERTS)
    yield case("qwen3-moe-normed", moe, SMALL | EXPERTS, norm_topk_prob=True, tie_word_embeddings=True)
    yield case("qwen3-moe-some", moe, SMALL | EXPERTS, mlp_only_layers=[1], norm_topk_prob=True)
    yield case("qwen3-moe-step", moe, SMALL | EXPERTS, decoder_sparse_step=2)
    yield case("qwen3-moe-window", moe, SMALL | EXPERTS, use_sliding_window=True, sliding_window=WINDOW)
    yield case("qwen3-moe-biases", moe, SMALL | EXPERTS, attention_bias=True)
    gemma = "Gemma3TextConfig"
    yield case("gemma3", gemma, SMALL | GEMMA, layer_types=MIXED)
    yield case("gemma3-pattern", gemma, SMALL | GEMMA, sliding_window_pattern=2)
    yield case("gemma3-untied", gemma, SMALL | GEMMA, layer_types=MIXED, tie_word_embeddings=False)
    yield case("gemma3-full", gemma, SMALL | GEMMA, layer_types=["full_attention"] * 3)
    yield case("gemma3-softcap", gemma, SMALL | GEMMA, layer_types=MIXED, final_logit_softcapping=2.0)
    two = {"full_attention": rope("linear", factor=3.0), "sliding_attention": {**rope("default"), "rope_theta": 77.0}}
    yield case("gemma3-scaled", gemma, SMALL | GEMMA, layer_types=MIXED, rope_parameters=two)
    nano = "NanoChatConfig"
    yield case("nanochat", nano, SMALL)
    yield case("nanochat-plain", nano, SMALL, final_logit_softcapping=None, num_key_value_heads=4)
    yield case("nanochat-tied", nano, SMALL, tie_word_embeddings=True, rope_parameters=rope("default"))
    yield case("nanochat-yarn", nano, SMALL, rope_parameters=YARN)
    yield case("gpt2", "GPT2Config", GPT2)
    yield case("gpt2-inner", "GPT2Config", GPT2, n_inner=52, layer_norm_epsilon=0.01)
    yield case("gpt2-untied", "GPT2Config", GPT2, tie_word_embeddings=False)
    yield case("gpt2-gelu", "GPT2Config", GPT2, activation_function="gelu")
    neox = "GPTNeoXConfig"
    turned = {"rope_theta": 500.0, "rope_type": "default"}
    yield case("neox", neox, NEOX)
    yield case("neox-sequential", neox, NEOX, use_parallel_residual=False)
    yield case("neox-half", neox, NEOX, rope_parameters=turned | {"partial_rotary_factor": 0.5})
    yield case("neox-whole", neox, NEOX, rope_parameters=turned | {"partial_rotary_factor": 1.0})
    scaled = rope("linear", factor=3.0, partial_rotary_factor=0.5)
    yield case("neox-linear", neox, NEOX, rope_parameters=scaled)
    yield case("neox-no-bias", neox, NEOX, attention_bias=False)
    yield case("neox-tied-tanh", neox, NEOX, tie_word_embeddings=True, hidden_act="gelu_fast")


CASES = dict(_cases())


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    return torch.randint(0, VOCAB, (2, LONG), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A case's folder, saved by Transformers, and the model that was saved; made once."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            case = CASES[name]
            config = getattr(transformers, case.kind)(**case.settings)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            randomize(model)
            model.tie_weights()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_family(name: str, saved: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    """Read what Transformers wrote, write what it reads, lose nothing on the way."""
    folder, model = saved(name)
    wanted = logits_of_theirs(model, ids_BT)
    ours = read_model(folder)
    assert difference(logits_of_ours(ours, ids_BT), wanted) < 1e-4

    write_model(ours, tmp_path / "ours")
    assert difference(logits_of_theirs(load_theirs(tmp_path / "ours"), ids_BT), wanted) < 1e-4
    assert equal(load_file(tmp_path / "ours" / "model.safetensors"), load_file(folder / "model.safetensors"))
    again = read_model(tmp_path / "ours")
    assert equal(weights(again), weights(ours))
    assert again.cfg == ours.cfg


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-moe-some", "gemma3-untied", "gpt2-untied", "neox", "nanochat"])
def test_sharded_both_ways(name: str, saved: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    _, model = saved(name)
    wanted = logits_of_theirs(model, ids_BT)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = read_model(tmp_path / "theirs")
    assert difference(logits_of_ours(ours, ids_BT), wanted) < 1e-4
    write_model(ours, tmp_path / "ours", shard_bytes=20_000)
    files = list((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 22_000 for file in files)
    assert difference(logits_of_theirs(load_theirs(tmp_path / "ours"), ids_BT), wanted) < 1e-4
    assert equal(weights(read_model(tmp_path / "ours")), weights(ours))


def test_rounded_on_the_way(saved: Any, tmp_path: Path) -> None:
    """Writing as bfloat16 rounds each weight once, and the config says so."""
    folder, _ = saved("llama-tied")
    ours = read_model(folder)
    write_model(ours, tmp_path / "low", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "low" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    low = read_model(tmp_path / "low", dtype=torch.bfloat16)
    assert equal(weights(low), {name: value.to(torch.bfloat16) for name, value in weights(ours).items()})


def test_models_born_here(ids_BT: Tensor, tmp_path: Path) -> None:
    """Settings of our own, the recipe's default among them, as Transformers reads them."""
    from ratoon.recipe import load, settle

    small: Table = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 52, "vocab_size": VOCAB, "context_tokens": 64}
    born: list[Table] = [
        settle(load({"data": {"sources": ["x"]}, "model": {"size": "tiny"}, "minutes": 1})).shape | small,
        small | {"family": "llama", "kv_heads": 1, "rope_scaling": RopeScaling(kind="yarn", factor=2.0)},
        small | {"family": "qwen3", "qk_norm": "before_rope", "windows": (None, WINDOW)},
        small
        | {
            "family": "qwen3_moe",
            "qk_norm": "before_rope",
            "moe": MoE(experts=3, experts_per_token=2, expert_width=20),
            "moe_layers": (1,),
        },
    ]
    for number, table in enumerate(born):
        ours = Transformer(ModelConfig(**table)).eval()
        init_weights(ours, 1)
        randomize(ours)
        write_model(ours, tmp_path / str(number))
        found = logits_of_theirs(load_theirs(tmp_path / str(number)), ids_BT)
        assert difference(found, logits_of_ours(ours, ids_BT)) < 1e-4
        assert equal(weights(read_model(tmp_path / str(number))), weights(ours))


# -- every key that is read matters, and means what Transformers takes it to mean ------------------------------------

CHANGES: list[tuple[str, str, Any]] = [
    ("llama-untied", "rms_norm_eps", 0.5),
    ("llama-untied", "rope_parameters", rope("default")),
    ("llama-llama3", "rope_parameters", LLAMA3 | {"factor": 2.0}),
    ("llama-llama3", "rope_parameters", LLAMA3 | {"low_freq_factor": 2.0}),
    ("llama-llama3", "rope_parameters", LLAMA3 | {"high_freq_factor": 9.0}),
    ("llama-llama3", "rope_parameters", LLAMA3 | {"original_max_position_embeddings": 9}),
    ("llama-yarn", "rope_parameters", YARN | {"factor": 2.0}),
    ("llama-yarn", "rope_parameters", YARN | {"truncate": False}),
    ("llama-yarn-attention", "rope_parameters", YARN_PLUS | {"beta_fast": 3.0}),
    ("llama-yarn-attention", "rope_parameters", YARN_PLUS | {"beta_slow": 0.3}),
    ("llama-yarn-attention", "rope_parameters", YARN_PLUS | {"attention_factor": 1.1}),
    ("llama-yarn", "rope_parameters", YARN | {"original_max_position_embeddings": 9}),
    ("llama-yarn-mscale", "rope_parameters", YARN | {"mscale": 2.0, "mscale_all_dim": 0.6}),
    ("llama-linear", "rope_parameters", rope("linear", factor=5.0)),
    ("mistral-window", "sliding_window", 4),
    ("mistral-window", "sliding_window", None),
    ("mistral", "sliding_window", 5),
    ("qwen2-window", "sliding_window", 4),
    ("qwen2-window", "layer_types", MIXED),
    ("qwen3-layers", "layer_types", MIXED[::-1][1:] + MIXED[1:2]),
    ("qwen3", "rms_norm_eps", 0.5),
    ("qwen3-moe", "norm_topk_prob", True),
    ("qwen3-moe", "num_experts_per_tok", 3),
    ("qwen3-moe-window", "sliding_window", 4),
    ("gemma3", "query_pre_attn_scalar", 40),
    ("gemma3", "sliding_window", 4),
    ("gemma3", "layer_types", ["full_attention"] * 3),
    ("gemma3", "final_logit_softcapping", 1.0),
    (
        "gemma3-scaled",
        "rope_parameters",
        {"full_attention": rope("linear", factor=9.0), "sliding_attention": rope("default")},
    ),
    ("nanochat", "final_logit_softcapping", 1.0),
    ("nanochat", "final_logit_softcapping", None),
    ("nanochat", "rms_norm_eps", 0.5),
    ("gpt2", "layer_norm_epsilon", 0.5),
    ("gpt2", "activation_function", "gelu"),
    ("neox", "layer_norm_eps", 0.5),
    ("neox", "hidden_act", "gelu_new"),
    ("neox", "use_parallel_residual", False),
    ("neox", "rope_parameters", {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}),
]


def changed(folder: Path, out: Path, changes: Table, *, drop: tuple[str, ...] = ()) -> Path:
    """A copy of a folder with other settings."""
    shutil.copytree(folder, out)
    table = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({key: value for key, value in table.items() if key not in drop}))
    return out


@pytest.mark.parametrize(("name", "key", "value"), CHANGES)
def test_settings_matter(name: str, key: str, value: Any, saved: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    """One setting changed: other logits, and the same as Transformers'."""
    folder, model = saved(name)
    other = changed(folder, tmp_path / "other", {key: value})
    ours = logits_of_ours(read_model(other), ids_BT)
    assert difference(ours, logits_of_theirs(model, ids_BT)) > 2e-4
    assert difference(ours, logits_of_theirs(load_theirs(other), ids_BT)) < 1e-4


OLD_ROPE: list[tuple[str, Table]] = [
    ("llama-theta", {"rope_theta": 500.0, "rope_scaling": None}),
    ("llama-linear", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("llama-llama3", {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    ("llama-yarn", {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    (
        "gemma3-scaled",
        {"rope_theta": 500.0, "rope_local_base_freq": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    ("neox-half", {"rotary_pct": 0.5, "rotary_emb_base": 500.0}),
]


@pytest.mark.parametrize(("name", "table"), OLD_ROPE)
def test_spelling_of_transformers_4(name: str, table: Table, saved: Any, tmp_path: Path) -> None:
    """Rotary positions as Transformers 4 wrote them mean the same."""
    folder, _ = saved(name)
    old = changed(folder, tmp_path / "old", table, drop=("rope_parameters",))
    assert read_config(old) == read_config(folder)


@pytest.mark.parametrize(
    "name", ["llama-untied", "mistral", "qwen2", "qwen3", "qwen3-moe", "gemma3", "nanochat", "gpt2", "neox"]
)
def test_absent_keys(name: str, saved: Any, tmp_path: Path) -> None:
    """A key that is not there is refused, or means what Transformers takes it to be."""
    import transformers

    folder, _ = saved(name)
    table = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, CASES[name].kind)
    silent = {"model_type", "bos_token_id", "eos_token_id", "pad_token_id"}
    checked = 0
    for key in table.keys() - silent:
        less = {k: v for k, v in table.items() if k != key}
        try:
            ours = config_from_folder(less, "config.json")
        except ArtifactError as error:
            # What Transformers would assume does not fit our small shapes, or the key has to be there.
            assert key in error.found or key in ("num_key_value_heads", "num_experts_per_tok")
            continue
        full = json.loads(kind(**less).to_json_string(use_diff=False))
        known = {k: v for k, v in full.items() if k in table}
        assert _meaning(ours) == _meaning(config_from_folder(known, "config.json")), key
        checked += 1
    assert checked > 5


# -- refused, with one clear error -----------------------------------------------------------------------------------

REFUSED: list[tuple[str, Table, str]] = [
    ("llama-untied", {"model_type": "bloom"}, "'bloom'"),
    ("llama-untied", {"model_type": None}, "unnamed"),
    ("llama-untied", {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
    ("llama-untied", {"residual_multiplier": 0.2}, "residual_multiplier"),
    ("llama-untied", {"sliding_window": 5}, "sliding_window"),
    ("llama-untied", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama-untied", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama-untied", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("llama-untied", {"rope_parameters": rope("dynamic", factor=2.0)}, "'dynamic'"),
    ("llama-untied", {"rope_parameters": rope("longrope", factor=2.0, short_factor=[1.0])}, "short_factor"),
    ("llama-untied", {"rope_parameters": rope("linear")}, "factor"),
    ("llama-untied", {"rope_parameters": rope("default", partial_rotary_factor=0.5)}, "partial_rotary_factor"),
    ("llama-untied", {"rope_theta": 7.0, "rope_parameters": rope("default")}, "said twice"),
    ("llama-untied", {"num_key_value_heads": 3}, "3 key/value heads"),
    ("llama-untied", {"vocab_size": "many"}, "vocab_size"),
    ("llama-untied", {"rope_theta": "far", "rope_parameters": None}, "far"),
    ("mistral-window", {"layer_types": MIXED}, "layer_types"),
    ("qwen3-moe-window", {"layer_types": MIXED}, "layer_types"),
    ("qwen3-moe", {"num_experts_per_tok": 9}, "9 experts per token"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"sliding_window": None}, "sliding_window"),
    ("gemma3", {"layer_types": ["chunked_attention", *MIXED[1:]]}, "layer_types"),
    ("gemma3", {"attn_logit_softcapping": 0.7}, "attn_logit_softcapping"),
    ("qwen2-window", {"use_sliding_window": False}, "layer_types"),
    ("qwen2-window", {"layer_types": MIXED[:2]}, "layer_types"),
    ("qwen3-layers", {"layer_types": ["linear_attention", *MIXED[1:]]}, "layer_types"),
    (
        "gemma3",
        {"rope_parameters": {"full_attention": rope("default"), "sliding_attention": rope("linear", factor=2.0)}},
        "sliding-window layers",
    ),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"activation_function": "relu"}, "'relu'"),
    ("gpt2", {"rope_theta": 100.0}, "rope_theta"),
    ("neox", {"hidden_act": "silu"}, "'silu'"),
    ("nanochat", {"attention_bias": True}, "attention_bias"),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_settings_refused(name: str, changes: Table, words: str, saved: Any, tmp_path: Path) -> None:
    folder, _ = saved(name)
    with pytest.raises(ArtifactError) as caught:
        read_model(changed(folder, tmp_path / "other", changes))
    assert words in caught.value.found
    assert "config.json" in (caught.value.where or "")


def test_not_json(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("llama-untied")
    shutil.copytree(folder, tmp_path / "other")
    for text, words in (("{", "not readable as JSON"), ("[1]", "a list")):
        (tmp_path / "other" / "config.json").write_text(text)
        with pytest.raises(ArtifactError, match=words):
            read_model(tmp_path / "other")
    with pytest.raises(ArtifactError, match="no such folder"):
        read_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        read_model(tmp_path / "empty")


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def drop(state: dict[str, Tensor]) -> None:
        del state[name]

    return drop


def _with(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: torch.zeros(shape)})


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], None], str]] = [
    ("llama-untied", _without(Q), "layers.1.attention.q.weight"),
    ("llama-untied", _without("lm_head.weight"), "head.weight"),
    ("llama-untied", _with("model.layers.1.self_attn.q_proj.bias", 32), "model.layers.1.self_attn.q_proj.bias"),
    ("llama-untied", _with("model.layers.7.input_layernorm.weight", 32), "model.layers.7"),
    ("llama-untied", _with(Q, 32, 31), "(32, 31)"),
    ("llama-tied", _with("lm_head.weight", VOCAB, 32), "'lm_head.weight' differs"),
    ("gpt2", _with("transformer.h.0.attn.c_attn.weight", 32, 90), "transformer.h.0.attn.c_attn.weight"),
    ("neox", _with("gpt_neox.layers.0.attention.query_key_value.weight", 95, 32), "query_key_value"),
    ("qwen3-moe", _without("model.layers.0.mlp.experts.3.up_proj.weight"), "layers.0.mlp"),
    ("qwen3-moe", _with("model.layers.0.mlp.experts.3.up_proj.weight", 19, 32), "model.layers.0.mlp.experts"),
]


@pytest.mark.parametrize(("name", "change", "words"), BROKEN)
def test_weights_refused(name: str, change: Any, words: str, saved: Any, tmp_path: Path) -> None:
    """A missing, surplus or mis-shaped tensor, named."""
    folder, _ = saved(name)
    shutil.copytree(folder, tmp_path / "other")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError) as caught:
        read_model(tmp_path / "other")
    assert words in caught.value.found


def test_files_refused(saved: Any, tmp_path: Path) -> None:
    """A cut file, an index that names nothing, a pickle, no weights at all."""
    folder, model = saved("llama-untied")
    cut = shutil.copytree(folder, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 300, len(whole) // 2, len(whole) - 1):
        (cut / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_model(cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        read_model(cut)
    (cut / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="pickle"):
        read_model(cut)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    next(iter(sorted((tmp_path / "shards").glob("*.safetensors")))).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        read_model(tmp_path / "shards")
    for text in ("{", "{}", "[]", json.dumps({"weight_map": {"a": "../other.safetensors"}})):
        index.write_text(text)
        with pytest.raises(ArtifactError) as caught:
            read_model(tmp_path / "shards")
        assert "index" in (caught.value.where or "")
    name, file = next(iter(table["weight_map"].items()))
    other = next(f for f in table["weight_map"].values() if f != file)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    table["weight_map"][name] = other
    (tmp_path / "again" / index.name).write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match="the index says"):
        read_model(tmp_path / "again")


def test_head_beside_a_tied_embedding(saved: Any, tmp_path: Path) -> None:
    """A head that only repeats the embedding is no surplus; old buffers are none either."""
    folder, _ = saved("llama-tied")
    shutil.copytree(folder, tmp_path / "other")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert equal(weights(read_model(tmp_path / "other")), weights(read_model(folder)))


def test_stacked_experts(saved: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    """Experts as Transformers 5 keeps them in memory, stacked, are read too."""
    folder, model = saved("qwen3-moe")
    shutil.copytree(folder, tmp_path / "other")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert equal(weights(read_model(tmp_path / "other")), weights(read_model(folder)))


BASE: Table = {"vocab_size": 9, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24, "context_tokens": 8}
UNSAYABLE: list[tuple[Table, str]] = [
    ({"family": "t5"}, "t5"),
    ({"qkv_bias": True}, "out_bias"),
    ({"mlp": "relu2"}, "mlp"),
    ({"windows": (4, 4)}, "windows"),
    ({"logit_softcap": 3.0}, "logit_softcap"),
    ({"cross_attention": True}, "cross_attention"),
    ({"head_bias": True, "tied_embeddings": False}, "head_bias"),
    ({"rope_scaling": RopeScaling(kind="linear", factor=2.0, beta_fast=3.0)}, "rope_scaling"),
    ({"family": "mistral", "windows": (4, None)}, "Mistral"),
    ({"family": "qwen2", "qkv_bias": True, "windows": (4, 3)}, "one model"),
    ({"family": "gpt_neox", "norm": "layer", "mlp_bias": True, "mlp": "relu2"}, "mlp"),
    (
        {"family": "gpt_neox", "norm": "layer", "mlp_bias": True, "mlp": "gelu", "norm_layout": "sandwich"},
        "norm_layout",
    ),
    ({"family": "gpt_neox", "norm": "layer", "mlp_bias": True, "mlp": "gelu", "qkv_bias": True}, "out_bias"),
    ({"family": "qwen3_moe", "qk_norm": "before_rope"}, "experts"),
    (
        {
            "family": "gemma3_text",
            "mlp": "geglu_tanh",
            "qk_norm": "before_rope",
            "norm_weight": "plus_one",
            "norm_layout": "sandwich",
            "embedding_scale": 4.0,
            "query_scale": 0.3,
        },
        "query_scale",
    ),
    (
        {
            "family": "gemma3_text",
            "mlp": "geglu_tanh",
            "qk_norm": "before_rope",
            "norm_weight": "plus_one",
            "norm_layout": "sandwich",
            "embedding_scale": 3.0,
        },
        "embedding_scale",
    ),
]


@pytest.mark.parametrize(("changes", "words"), UNSAYABLE)
def test_what_a_family_cannot_say(changes: Table, words: str, tmp_path: Path) -> None:
    """A setting that would be lost in the family's config.json is refused before anything is written."""
    cfg = ModelConfig(**(BASE | changes))
    with pytest.raises(ConfigError) as caught:
        check_expressible(cfg)
    assert words in str(caught.value)
    model = Transformer(cfg)
    with pytest.raises(ConfigError):
        write_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_family_has_cases() -> None:
    kinds = {config_from_case(case).family for case in CASES.values()}
    assert kinds == set(FAMILIES)


def config_from_case(case: Case) -> ModelConfig:
    import transformers

    return config_from_folder(json.loads(getattr(transformers, case.kind)(**case.settings).to_json_string()), "case")


def test_errors_are_for_users() -> None:
    assert issubclass(ArtifactError, RatoonError)
    assert config_to_folder(ModelConfig(**BASE), "float32")["model_type"] == "llama"
