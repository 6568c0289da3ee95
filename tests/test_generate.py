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
