"""Counting: parameters exactly, FLOPs as torch's own counter counts them, bytes of checkpoints as they are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import little
from ratoon.model.attention import visible
from ratoon.model.config import ModelConfig
from ratoon.model.count import (
    bytes_needed,
    checkpoint_bytes,
    flops_per_token,
    hidden_matrices,
    multiplied_parameters,
    parameters,
)
from ratoon.model.folder import empty_model
from ratoon.train.loss import next_token
from ratoon.train.optim import MATRIX, group_parameters
from test_model_attention import TORCH_LIKE, VARIANTS
from test_model_families import CASES, config_from_case


def built(cfg: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in empty_model(cfg).parameters())


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_families(name: str) -> None:
    cfg = config_from_case(CASES[name])
    assert parameters(cfg) == built(cfg)


MORE: list[dict[str, Any]] = [
    {"cross_attention": True},
    {**TORCH_LIKE, "cross_attention": True},
    {"tied_embeddings": False, "head_bias": True},
    {"moe": little.EXPERTS, "moe_layers": (1,), "mlp_bias": True},
    {"moe": little.EXPERTS, "mlp": "relu2", "norm_layout": "sandwich", "qk_norm": "after_rope"},
]


@pytest.mark.parametrize("changes", [*VARIANTS.values(), *MORE])
def test_parameters_of_settings(changes: dict[str, Any]) -> None:
    cfg = little.config(**changes)
    assert parameters(cfg) == built(cfg)
    groups = group_parameters(empty_model(cfg), little.settings(optimizer="muon"))
    assert hidden_matrices(cfg) == sum(parameter.numel() for _, parameter in groups[MATRIX])


def test_known_sizes() -> None:
    """GPT-2 has 124,439,808 parameters; SmolLM2-135M 134,515,008."""
    gpt2 = ModelConfig(
        family="gpt2", vocab_size=50257, width=768, layers=12, heads=12, mlp_width=3072, context_tokens=1024,
        norm="layer", positions="learned", mlp="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip
    assert parameters(gpt2) == 124_439_808
    smol = ModelConfig(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, context_tokens=8192)
    assert parameters(smol) == 134_515_008
    assert multiplied_parameters(smol) == 134_515_008 - (2 * 30 + 1) * 576


FLOPS: list[dict[str, Any]] = [
    {},
    {"kv_heads": None, "mlp": "relu2", "tied_embeddings": False},
    {"head_dim": 12, "mlp": "gelu"},
    {"moe": little.EXPERTS},
    {"moe": little.EXPERTS, "moe_layers": (0,), "mlp": "relu2"},
]


@pytest.mark.parametrize("changes", FLOPS)
def test_flops_against_torch(changes: dict[str, Any]) -> None:
    """Forward and backward of rows that see everything, as torch counts the products that are made."""
    model = little.model(**changes, causal=False).train()
    cfg, rows, tokens = model.cfg, 3, 20
    ids_BT = torch.arange(rows * tokens).view(rows, tokens) % cfg.vocab_size
    with FlopCounterMode(display=False) as counter:
        logits = model.logits(model(ids_BT))
    assert counter.get_total_flops() == pytest.approx(rows * tokens * flops_per_token(cfg, tokens, training=False))
    with FlopCounterMode(display=False) as counter:
        model.logits(model(ids_BT)).sum().backward()
    assert logits.shape == (rows, tokens, cfg.vocab_size)
    assert counter.get_total_flops() == pytest.approx(rows * tokens * flops_per_token(cfg, tokens))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 19, 100])
def test_attention_counts_what_is_seen(causal: bool, window: int | None) -> None:
    """Hidden keys cost nothing: the mean of visible keys, counted in the mask itself."""
    tokens = 20
    windows = (window, None)
    cfg = little.config(causal=causal, windows=windows)
    wanted = 0.0
    for one in windows:
        keep = visible(
            torch.zeros(1, tokens), torch.zeros(1, tokens), queries=tokens, keys=tokens, causal=causal, window=one,
            device=torch.device("cpu"),
        )  # fmt: skip
        assert keep is not None
        wanted += float(keep.sum()) / tokens
    attention = flops_per_token(cfg, tokens) - 6 * multiplied_parameters(cfg)
    assert attention == pytest.approx(12 * cfg.heads * cfg.channels * wanted)


def test_causal_is_half() -> None:
    full, half = (little.config(causal=causal) for causal in (False, True))
    six = 6 * multiplied_parameters(full)
    assert (flops_per_token(half, 4096) - six) / (flops_per_token(full, 4096) - six) == pytest.approx(0.5, abs=2e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_bytes_of_a_run(precision: str, optimizer: str, moments: str, tmp_path: Path) -> None:
    """A checkpoint has the size that was said, and the loop's buffers have it too."""
    from ratoon.train.device import World
    from ratoon.train.loop import Hooks, _Session

    run = little.new_run(tmp_path / "run")
    settings = little.settings(precision=precision, optimizer=optimizer, moments=moments)
    model = little.model(width=64, mlp_width=128)
    cfg = model.cfg
    by_muon = hidden_matrices(cfg) if optimizer == "muon" else 0
    session = _Session(model, little.Rows(), settings, run, next_token, Hooks(), [], World())
    try:
        weights, state = session.weights, session.optimizer.state()
        split = weights.rest is not None
        said = bytes_needed(
            cfg, rows=8, context_tokens=16, weight_bytes=2 if precision == "bf16" else 4, by_muon=by_muon,
            split=split, summed=not split, moment_bytes=settings.moment_bytes,
        )  # fmt: skip
        assert said.weights == weights.work.nbytes
        separate = precision == "bf16"
        assert said.masters == (0 if not separate else weights.rest.nbytes if split else weights.master.nbytes)
        passing = weights.work.nbytes if separate else 0  # a micro-batch's own, until collected
        assert said.gradients == passing + (0 if split else weights.summed.nbytes)
        assert said.optimizer == sum(value.nbytes for value in state.values()) - state["step_number"].nbytes
        assert said.total == said.weights + said.masters + said.gradients + said.optimizer + said.activations
    finally:
        session.finish()
    changes = {"precision": precision, "optimizer": optimizer, "moments": moments}
    little.go(little.model(width=64, mlp_width=128), run=run, steps=1, **changes)
    written = sum(file.stat().st_size for file in next(run.checkpoints.glob("step-*")).glob("*.safetensors"))
    assert written == pytest.approx(
        checkpoint_bytes(cfg, by_muon=by_muon, moment_bytes=settings.moment_bytes), rel=0.05
    )


def test_counting_needs_no_torch() -> None:
    words = "import sys, ratoon.model.count; import json; print(json.dumps('torch' in sys.modules))"
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) is False
