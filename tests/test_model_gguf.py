"""GGUF: block formats bit for bit, models laid out as llama.cpp's converter does, broken files, real weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError
from ratoon.model.folder import read_model, write_model
from ratoon.model.gguf import Entry, dequantize, read_gguf, read_gguf_model
from ratoon.model.quants import FORMATS
from theirs import (
    EXPERTS,
    GEMMA,
    GPT2,
    NEOX,
    SMALL,
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

Kind = gguf.GGMLQuantizationType


@pytest.mark.parametrize("number", FORMATS)
def test_block_formats(number: int) -> None:
    """Random blocks, every bit pattern of them: the same float32 as the gguf package's, bit for bit."""
    name, numbers, size, _ = FORMATS[number]
    kind = Kind(number)
    assert kind.name == name
    assert gguf.GGML_QUANT_SIZES[kind] == (numbers, size)
    blocks = np.random.default_rng(number).integers(0, 256, (64, size * (256 // numbers)), dtype=np.uint8)
    ours = dequantize(blocks.reshape(-1), Entry((64, 256), number, 0, blocks.size)).numpy()
    theirs = np.asarray(gguf.quants.dequantize(blocks, kind), dtype=np.float32).reshape(64, 256)
    strange = np.isnan(theirs)
    assert np.array_equal(strange, np.isnan(ours))
    assert strange.mean() < 0.5
    assert np.array_equal(ours.view(np.uint32)[~strange], theirs.view(np.uint32)[~strange])


def test_all_formats_of_the_issue() -> None:
    wanted = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"}
    assert {name for name, *_ in FORMATS.values()} == wanted


# -- models, laid out as llama.cpp's converter does --------------------------------------------------------------------

ARCHITECTURES: dict[str, tuple[str, Table]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama-tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True, "rope_parameters": rope("default")}),
    "llama-linear": ("LlamaConfig", SMALL | {"rope_parameters": rope("linear", factor=3.0)}),
    "llama-yarn": (
        "LlamaConfig",
        SMALL | {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama-3": (
        "LlamaConfig",
        SMALL
        | {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 10}),
    "qwen3moe": ("Qwen3MoeConfig", SMALL | EXPERTS | {"norm_topk_prob": True}),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL | GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 8, "eos_token_id": 2},
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gptneox": ("GPTNeoXConfig", NEOX),
    "gptneox-sequential": ("GPTNeoXConfig", NEOX | {"use_parallel_residual": False}),
}
TRANSFORMERS_READS = ("llama", "llama-tied", "qwen2")
"""Where Transformers' own reading can be trusted: it leaves out scaled positions, Qwen 3's heads unless 128 wide,
and the scale of Gemma's scores."""


def their_model(name: str) -> Any:
    import transformers

    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    model.tie_weights()
    return model


def write_gguf(
    path: Path,
    name: str,
    model: Any,
    *,
    keys: Table | None = None,
    without: str | None = None,
    quantize: Kind | None = None,
    more: dict[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """Write a Transformers model as llama.cpp's converter does: its names, its turned heads, its fused matrices."""
    config, architecture = model.config, name.split("-")[0]
    writer = gguf.GGUFWriter(path, architecture)
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if architecture in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon if architecture == "gpt2" else config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(channels)
        writer.add_value_length(channels)
    if architecture == "gptneox":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * channels))
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    if architecture in ("llama", "qwen2", "qwen3", "qwen3moe"):
        parameters = config.rope_parameters
        writer.add_rope_freq_base(parameters["rope_theta"])
        if parameters["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
            writer.add_rope_scaling_factor(parameters["factor"])
        if parameters["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        if parameters["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(model, parameters, channels))
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in (keys or {}).items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    for their_name, value in laid_out(model, architecture, heads, kv, channels).items():
        found = names.get_name(their_name, try_suffixes=(".weight", ".bias"))
        assert found is not None, their_name
        if found == without:
            continue
        array = value.detach().float().contiguous().numpy()
        if quantize is not None and array.ndim == 2 and array.shape[-1] % 32 == 0:
            raw = gguf.quants.quantize(array, quantize)
            writer.add_tensor(found, raw, raw_dtype=quantize)
        else:
            writer.add_tensor(found, array)
    for tensor, array in (more or {}).items():
        writer.add_tensor(tensor, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(model: Any, parameters: Table, channels: int) -> np.ndarray[Any, Any]:
    """What the converter writes for Llama 3: plain angles over stretched ones."""
    plain = parameters["rope_theta"] ** -(torch.arange(0, channels, 2).double() / channels)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


def laid_out(model: Any, architecture: str, heads: int, kv: int, channels: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    state = model.state_dict()
    tied = model.config.tie_word_embeddings
    for name, value in state.items():
        if tied and name in ("lm_head.weight", "embed_out.weight"):
            continue
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            group = heads if "q_proj" in name else kv
            value = value.reshape(group, 2, channels // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.t()
        if architecture == "gptneox" and "query_key_value" in name:
            parts = value.reshape(heads, 3, channels, *value.shape[1:])
            value = torch.cat([parts[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            found[name.replace("gate_up_proj", "gate_proj.weight")] = value[:, :half]
            found[name.replace("gate_up_proj", "up_proj.weight")] = value[:, half:]
            continue
        if name.endswith("experts.down_proj"):
            name += ".weight"
        found[name] = value
    return found


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, ids_BT: Tensor, tmp_path: Path) -> None:
    """The logits of the model that was written; and of Transformers' own reading of the file, where it reads it."""
    import transformers

    model = their_model(name)
    write_gguf(tmp_path / "model.gguf", name, model)
    ours, metadata = read_gguf_model(tmp_path / "model.gguf")
    wanted = logits_of_theirs(model, ids_BT)
    assert difference(logits_of_ours(ours, ids_BT), wanted) < 1e-4
    assert metadata["general.architecture"] == name.split("-")[0]
    assert (ours.cfg.bos_id, ours.cfg.eos_ids) == (1, (2,))
    if name in TRANSFORMERS_READS:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
        )
        assert difference(logits_of_ours(ours, ids_BT), logits_of_theirs(theirs.eval(), ids_BT)) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_written_as_a_folder(name: str, ids_BT: Tensor, tmp_path: Path) -> None:
    """Every architecture that is read can be written as its family's folder."""

    model = their_model(name)
    write_gguf(tmp_path / "model.gguf", name, model)
    ours, _ = read_gguf_model(tmp_path / "model.gguf")
    write_model(ours, tmp_path / "folder")
    assert equal(weights(read_model(tmp_path / "folder")), weights(ours))
    wanted = logits_of_theirs(model, ids_BT)
    assert difference(logits_of_theirs(load_theirs(tmp_path / "folder"), ids_BT), wanted) < 1e-4


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_quantized_model(kind: Kind, ids_BT: Tensor, tmp_path: Path) -> None:
    """Weights in blocks reach the right places: the logits of Transformers' reading of the same file."""
    import transformers

    model = their_model("llama")
    write_gguf(tmp_path / "model.gguf", "llama", model, quantize=kind)
    ours, _ = read_gguf_model(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    found = logits_of_ours(ours, ids_BT)
    assert difference(found, logits_of_theirs(theirs.eval(), ids_BT)) < 1e-4
    assert difference(found, logits_of_theirs(model, ids_BT)) > 1e-4


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_llama() -> Any:
    return their_model("llama")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_llama: Any) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(path, "llama", small_llama)
    return path.read_bytes()


def refused(path: Path, words: str, read: Callable[[Path], Any] = read_gguf_model) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(path) in (caught.value.where or "")


def test_cut_at_any_place(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    places = np.random.default_rng(0).integers(1, len(whole) - 32, 60).tolist()
    for size in [0, 3, 23, 24, 25, *places, len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError):
            read_gguf_model(path)


def test_damaged_head(whole: bytes, tmp_path: Path) -> None:
    """Any one byte of the head changed: an ArtifactError or a model, never another error, and never out of memory."""
    path = tmp_path / "damaged.gguf"
    random = np.random.default_rng(1)
    head = whole.index(b"output_norm")
    for place in random.integers(0, head, 150).tolist():
        raw = bytearray(whole)
        raw[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(bytes(raw))
        try:
            read_gguf(path)
        except ArtifactError:
            continue


def test_not_gguf(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + whole[4:])
    refused(path, "does not begin with GGUF")
    path.write_bytes(whole[:4] + (9).to_bytes(4, "little") + whole[8:])
    refused(path, "version 9")
    refused(tmp_path / "none.gguf", "no such file")


def test_unknown_tensor_type(whole: bytes, tmp_path: Path) -> None:
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[:at] + (39).to_bytes(4, "little") + whole[at + 4 :])
    refused(path, "'token_embd.weight' is of type 39")


def test_unknown_architecture(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole.replace(b"llama", b"lemma"))
    refused(path, "'lemma' is not supported")


REFUSED: list[tuple[Table, str]] = [
    ({"keys": {"attention.scale": 0.3}}, "attention.scale"),
    ({"keys": {"attention.clamp_kqv": 3.0}}, "attention.clamp_kqv"),
    ({"keys": {"logit_scale": 2.0}}, "logit_scale"),
    ({"keys": {"expert_count": 8}}, "expert_count"),
    ({"keys": {"rope.dimension_count": 4}}, "rope.dimension_count"),
    ({"keys": {"rope.scaling.type": "longrope"}}, "longrope"),
    (
        {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.3}},
        "attn_factor",
    ),
    ({"without": "blk.1.attn_q.weight"}, "layers.1.attention.q.weight"),
    ({"without": "output_norm.weight"}, "final_norm.weight"),
    ({"more": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, "attn_sinks"),
    ({"more": {"blk.9.attn_norm.weight": np.zeros(32, np.float32)}}, "layers.9.attention_norm.weight"),
    ({"more": {"rope_freqs.weight": np.ones(4, np.float32) * 3}}, "rope_freqs"),
    ({"without": "blk.0.attn_q.weight", "more": {"blk.0.attn_q.weight": np.zeros((30, 32), np.float32)}}, "(30, 32)"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_refused(changes: Table, words: str, small_llama: Any, tmp_path: Path) -> None:
    """What would change the computation is named, never passed over."""
    path = tmp_path / "x.gguf"
    write_gguf(path, "llama", small_llama, **changes)
    refused(path, words)


# -- the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: logits and ids as Transformers' of the same file, and of the folder that we write."""
    import transformers

    import ratoon

    began = time.perf_counter()
    lm = ratoon.load(str(smollm2_path))
    lm.save(tmp_path / "smollm2")
    print(f"read and written in {time.perf_counter() - began:.1f} s")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    texts = [
        "The capital of France is",
        "def reverse(text):\n    return",
        "从前有座山，山里有座庙。",
        "  two  spaces\n\n\tand é",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    tokenizer_of_gguf = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    assert lm.tokenizer is not None
    for text in texts:
        ids = lm.tokenizer.encode(text)
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        assert ids == tokenizer_of_gguf(text, add_special_tokens=False).input_ids
        assert lm.tokenizer.decode(ids) == text
    ids_BT = torch.randint(0, 49_152, (2, 300), generator=torch.Generator().manual_seed(3))
    ids_BT[0, :5] = torch.tensor(lm.tokenizer.encode(texts[0])[:5])
    wanted = logits_of_theirs(theirs, ids_BT)
    assert difference(lm.logits(ids_BT), wanted) < 1e-4
    del theirs
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype=torch.float32).eval()
    assert difference(logits_of_theirs(written, ids_BT), wanted) < 1e-4
    again = ratoon.load(str(tmp_path / "smollm2"))
    assert torch.equal(again.logits(ids_BT[:1, :50]), lm.logits(ids_BT[:1, :50]))
