"""First values: every weight is set, from the seed alone, with the scale that the settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import little
from ratoon.model.config import ModelConfig
from ratoon.model.encoder_decoder import EncoderDecoder
from ratoon.model.init import init_weights
from ratoon.model.transformer import Transformer
from test_model_attention import TORCH_LIKE, VARIANTS

WIDE: dict[str, Any] = {"vocab_size": 400, "width": 128, "heads": 4, "kv_heads": 2, "mlp_width": 300, "init_std": 0.05}


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_left_unset(name: str, zero: bool) -> None:
    """A new model is NaN all over; afterwards every number is finite, and the output is too."""
    model = Transformer(little.config(**VARIANTS[name], zero_init_outputs=zero, tied_embeddings=False, head_bias=True))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    init_weights(model, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert model.logits(model(torch.arange(9)[None])).isfinite().all()


def test_an_unset_weight_is_heard() -> None:
    """A parameter that no rule knows is an error, not a silent leftover."""
    model = Transformer(little.config())
    model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.full((3,), float("nan"))))
    with pytest.raises(AssertionError, match=r"layers\.0\.extra"):
        init_weights(model, 1)


def test_encoder_decoder_is_set_and_its_parts_differ() -> None:
    model = EncoderDecoder(little.config(**TORCH_LIKE, causal=False), little.config(**TORCH_LIKE, cross_attention=True))
    init_weights(model, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    one, other = model.encoder.layers[0].attention.q.weight, model.decoder.layers[0].attention.q.weight
    assert not torch.equal(one, other)


def _made(seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    model = Transformer(little.config(**changes))
    init_weights(model, seed)
    return dict(model.named_parameters())


def test_the_seed_decides() -> None:
    """Equal seeds give equal bits, whatever torch's own random state is; other seeds other weights."""
    torch.manual_seed(1)
    one = _made(7)
    torch.manual_seed(2)
    assert little.same(one, _made(7))
    other = _made(8)
    assert all(not torch.equal(one[name], other[name]) for name in one if one[name].std() > 0)


def test_a_weight_does_not_depend_on_the_others() -> None:
    """Each parameter has a stream of its own name: a third layer leaves the first two as they were."""
    two, three = _made(7, layers=2, zero_init_outputs=True), _made(7, layers=3, zero_init_outputs=True)
    assert all(torch.equal(two[name], three[name]) for name in two)


@pytest.mark.parametrize("zero", [True, False])
def test_scales(zero: bool) -> None:
    """Matrices have the deviation `init_std`; projections back into the stream 0, or init_std / √(2 L)."""
    cfg = ModelConfig(
        **WIDE, layers=3, context_tokens=200, tied_embeddings=False, zero_init_outputs=zero, norm="layer",
        positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = Transformer(cfg)
    init_weights(model, 3)
    outputs = 0
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            output = name.endswith(("o.weight", "down.weight"))
            outputs += output
            wanted = (0.0 if zero else 0.05 / 6**0.5) if output else 0.05
            assert float(value.std()) == pytest.approx(wanted, rel=0.03, abs=1e-12), name
            assert float(value.mean()) == pytest.approx(0.0, abs=0.002), name
            if wanted:  # a normal distribution: 4.6 % beyond two deviations
                beyond = float((value.abs() > 2 * wanted).double().mean())
                assert beyond == pytest.approx(0.0455, abs=0.006), name
    assert outputs == 6


def test_gains_that_add_one_start_at_zero() -> None:
    made = _made(1, norm_weight="plus_one", norm_layout="sandwich")
    gains = [value for name, value in made.items() if "norm" in name]
    assert len(gains) == 2 * 4 + 1
    assert not any(value.any() for value in gains)


def test_a_new_model_predicts_nothing_yet() -> None:
    """With outputs at 0 each block is the identity: the logits are those of the normed embedding alone."""
    model = Transformer(little.config(tied_embeddings=False, zero_init_outputs=True))
    init_weights(model, 1)
    ids_BT = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids_BT), model.final_norm(model.embed(ids_BT)), atol=1e-6)


def test_bfloat16_weights_are_the_rounded_float32_ones() -> None:
    low = Transformer(little.config()).to(torch.bfloat16)
    init_weights(low, 7)
    wanted = {name: value.to(torch.bfloat16) for name, value in _made(7).items()}
    assert little.same(dict(low.named_parameters()), wanted)
