"""The decoding loop: cached = naive, batched = single, beams = exhaustive search, stops, streams, seeds, capacity."""

from __future__ import annotations

import pytest
import torch

from ratoon.generate.decode import generate
from ratoon.generate.sample import Sampling
from ratoon.model.config import ModelConfig, MoE, RopeScaling
from ratoon.model.transformer import Transformer

BASE = {"vocab_size": 61, "width": 32, "layers": 3, "heads": 4, "mlp_width": 48, "context_tokens": 64}
SHAPES: dict[str, dict[str, object]] = {
    "llama": {"kv_heads": 2},
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "mlp": "gelu_tanh",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "gpt_neox": {
        "norm": "layer",
        "norm_layout": "parallel",
        "rope_fraction": 0.25,
        "mlp": "gelu",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied_embeddings": False,
    },
    "qwen2": {"kv_heads": 2, "qkv_bias": True},
    "qwen3": {"kv_heads": 1, "head_dim": 16, "qk_norm": "before_rope"},
    "qwen3_moe": {
        "kv_heads": 2,
        "qk_norm": "before_rope",
        "moe": MoE(experts=4, experts_per_token=2, expert_width=24),
        "moe_layers": (0, 2),
    },
    "gemma3": {
        "kv_heads": 2,
        "norm_weight": "plus_one",
        "norm_layout": "sandwich",
        "mlp": "geglu_tanh",
        "qk_norm": "before_rope",
        "embedding_scale": 5.65,
        "windows": (7, 7, None),
        "rope_local_theta": 100.0,
        "query_scale": 0.3,
        "attention_softcap": 9.0,
        "logit_softcap": 11.0,
    },
    "nanochat": {
        "norm_weight": "none",
        "embedding_norm": True,
        "mlp": "relu2",
        "qk_norm": "after_rope",
        "rope_sign": -1,
        "logit_softcap": 15.0,
        "tied_embeddings": False,
    },
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_context_tokens=16)},
}
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [60, 59]]


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.25) -> torch.nn.Module:
    """Every parameter random, norms too; large enough that the next token is not a matter of rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values + 1.0 if "norm" in name and name.endswith("weight") else values)
    return model


def build(family: str = "llama", **changes: object) -> Transformer:
    model = Transformer(ModelConfig.model_validate({**BASE, **SHAPES[family], **changes}))
    randomize(model)
    return model


@torch.no_grad()
def naive(model: Transformer, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Greedy without a cache: the whole text is read again for every token."""
    ids, logprobs = list(prompt), []
    for _ in range(tokens):
        logits = model.logits(model(torch.tensor([ids])))[0, -1].float()
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[len(prompt) :], logprobs


class Letters:
    """A stand-in for a stream decoder: every id is a fixed run of bytes, so characters may fall apart."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.waiting = b""

    def push(self, id: int) -> str:
        self.waiting += self.pieces[id]
        for cut in range(len(self.waiting), -1, -1):
            try:
                text = self.waiting[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.waiting = self.waiting[cut:]
            return text
        raise AssertionError

    def flush(self) -> str:
        return self.waiting.decode(errors="replace")


@pytest.mark.parametrize("family", SHAPES)
def test_greedy_equals_the_naive_loop(family: str) -> None:
    model = build(family)
    for prompt in PROMPTS:
        found = generate(model, [prompt], Sampling(max_new_tokens=20), logprobs=True)[0]
        ids, logprobs = naive(model, prompt, 20)
        assert found.ids == ids
        assert found.logprobs == pytest.approx(logprobs, abs=2e-4)
        assert found.finish == "length"


@pytest.mark.parametrize("family", SHAPES)
def test_a_batch_of_unequal_prompts_equals_single_ones(family: str) -> None:
    model = build(family)
    alone = [generate(model, [prompt], Sampling(max_new_tokens=20))[0].ids for prompt in PROMPTS]
    assert [row.ids for row in generate(model, PROMPTS, Sampling(max_new_tokens=20))] == alone
    turned = generate(model, PROMPTS[::-1], Sampling(max_new_tokens=20))
    assert [row.ids for row in turned] == alone[::-1]
    assert len({tuple(ids) for ids in alone}) == len(alone)


def exhaustive(model: Transformer, prompt: list[int], tokens: int, eos: int, penalty: float) -> tuple[list[int], float]:
    """The best of all answers there are: everything that ends with `eos` or is `tokens` long."""
    best: tuple[float, list[int]] = (float("-inf"), [])

    @torch.no_grad()
    def walk(ids: list[int], total: float) -> None:
        nonlocal best
        if ids and (ids[-1] == eos or len(ids) == tokens):
            best = max(best, (total / len(ids) ** penalty, ids))
            return
        logprob_V = model.logits(model(torch.tensor([prompt + ids])))[0, -1].float().log_softmax(-1)
        for id, logprob in enumerate(logprob_V.tolist()):
            walk([*ids, id], total + logprob)

    walk([], 0.0)
    return best[1], best[0]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
def test_wide_beams_find_what_exhaustive_search_finds(penalty: float) -> None:
    model = build(vocab_size=5, width=16, layers=2)
    sampling = Sampling(max_new_tokens=4, num_beams=64, length_penalty=penalty)
    for prompt in ([1], [2, 3], [4, 1, 1]):
        found = generate(model, [prompt], sampling, eos_ids=[0])[0]
        ids, rank = exhaustive(model, prompt, 4, 0, penalty)
        assert found.ids == ids
        assert found.score == pytest.approx(rank, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"length_penalty": 0.3}, {"early_stopping": True}, {"repetition_penalty": 1.4}]
)
def test_beams_equal_those_of_transformers(changes: dict[str, float | bool]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    eos_ids = tuple(range(3, 61, 9))
    model = build(eos_ids=eos_ids)
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=list(eos_ids),
            pad_token_id=0,
        )
    ).eval()
    names = {"attention.": "self_attn.", "mlp_norm": "post_attention_layernorm", "attention_norm": "input_layernorm"}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        for part in "qkvo":
            name = name.replace(f"self_attn.{part}.", f"self_attn.{part}_proj.")
        for part in ("gate", "up", "down"):
            name = name.replace(f"mlp.{part}.", f"mlp.{part}_proj.")
        state["model." + name.replace("embed.", "embed_tokens.").replace("final_norm", "norm")] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    peer.load_state_dict(state)
    settings = {"early_stopping": "never", **changes}
    ended = 0
    for seed in range(12):
        prompt = torch.randint(4, 61, (1, 3 + seed), generator=torch.Generator().manual_seed(seed))
        theirs = peer.generate(
            prompt, num_beams=4, max_new_tokens=14, do_sample=False, attention_mask=torch.ones_like(prompt), **settings
        )[0, prompt.shape[1] :].tolist()
        found = generate(model, [prompt[0].tolist()], Sampling(max_new_tokens=14, num_beams=4, **changes))[0]
        assert found.ids == theirs
        ended += found.finish == "eos"
    assert ended > 0, "answers that end by themselves should occur"
