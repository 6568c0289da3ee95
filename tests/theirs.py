"""Small models of Transformers for the tests of ours: settings, random weights, comparing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratoon.model.transformer import Transformer

VOCAB, LONG, WINDOW = 61, 40, 7
Table = dict[str, Any]

SMALL: Table = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
GPT2: Table = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
NEOX: Table = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
EXPERTS: Table = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
GEMMA: Table = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str, **more: Any) -> Table:
    return {"rope_type": kind, "rope_theta": 500.0, **more}


def randomize(model: torch.nn.Module) -> None:
    """Every parameter random: gains and biases too."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.6 + 0.4 * values if parameter.ndim == 1 else 0.25 * values)


def load_theirs(folder: Path) -> Any:
    """Transformers' model of a folder, after checking that it found exactly the weights it wanted."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits_of_theirs(model: Any, ids_BT: Tensor) -> Tensor:
    found: Tensor = model(ids_BT, use_cache=False).logits
    return found


@torch.no_grad()
def logits_of_ours(model: Transformer, ids_BT: Tensor) -> Tensor:
    return model.logits(model(ids_BT))


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    assert float(one.std()) > 0.1, "logits that say nothing prove nothing"
    return float((one - other).abs().max())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}
