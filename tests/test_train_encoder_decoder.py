"""The encoder-decoder in the one loop: resuming, micro-batches, dropout, learning, frozen parts, what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import little
from ratoon.adapt.full import Full, FullSettings
from ratoon.base.errors import ConfigError
from ratoon.data.examples import ExampleLoader
from ratoon.generate.decode import generate
from ratoon.generate.sample import Sampling
from ratoon.model.config import EncoderDecoderSettings
from ratoon.model.count import parameters
from ratoon.model.encoder_decoder import new_encoder_decoder
from ratoon.model.init import init_weights
from ratoon.store.runs import Run
from ratoon.train import device
from ratoon.train.loss import Inputs, sequence_to_sequence
from test_encoder_decoder import BEGIN, END, PAD, SHAPE, VOCAB, build, packed, pairs, scores

# -- the loop ----------------------------------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {"objective": sequence_to_sequence, "context_tokens": 24, "rows": 8}


def loader() -> ExampleLoader:
    return ExampleLoader(pairs(200), rows=8, context_tokens=24, seed=1)


class Killed(Exception):
    """Stands for a process that dies without another word."""


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resumed_equals_uninterrupted_with_dropout(tmp_path: Path, precision: str) -> None:
    def go(run: Run, **more: Any) -> little.Outcome:
        return little.go(
            build(dropout=0.2),
            loader(),
            run,
            steps=8,
            checkpoint_every_steps=3,
            precision=precision,
            **TRAINING,
            **more,
        )

    def die(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            raise Killed

    whole = go(little.new_run(tmp_path / "whole"))
    with pytest.raises(Killed):
        go(little.new_run(tmp_path / "cut"), log=die)
    resumed = go(Run(tmp_path / "cut"), resume=True)
    assert resumed.told("going on from step 3")
    assert little.same(whole.weights, resumed.weights)
    assert not little.same(whole.weights, dict(build().named_parameters()))


def test_micro_batches_add_up_to_the_whole_step() -> None:
    def go(**more: Any) -> little.Outcome:
        return little.go(build(), loader(), steps=3, **TRAINING, **more)

    one = go()
    for rows in (4, 1):
        many = go(micro_batch_rows=rows)
        assert little.largest_difference(one.weights, many.weights) < 1e-4
        assert many.losses() == pytest.approx(one.losses(), rel=1e-5)


def test_recomputed_blocks_give_the_same_in_both_parts() -> None:
    plain = little.go(build(), loader(), steps=2, **TRAINING)
    again = little.go(build(), loader(), steps=2, recompute_blocks=True, **TRAINING)
    assert again.model.encoder.recompute_blocks and again.model.decoder.recompute_blocks  # type: ignore[union-attr]
    assert little.largest_difference(plain.weights, again.weights) < 1e-6


def test_dropout_is_for_training_alone() -> None:
    model, batch = build(dropout=0.5), packed(pairs(5))
    with torch.no_grad():
        assert torch.equal(scores(model, batch), scores(build(), batch))
        model.train()
        torch.manual_seed(1)
        one = scores(model, batch)
        assert not torch.equal(one, scores(model, batch))
        torch.manual_seed(1)
        assert torch.equal(one, scores(model, batch))


@pytest.mark.timeout(120)
def test_the_loop_teaches_it_to_reverse_strings() -> None:
    """Trained for seconds on packed pairs of 3 to 7 letters, it reverses strings it never saw."""
    shape = {"encoder_layers": 2, "decoder_layers": 2, "width": 64, "heads": 4, "mlp_width": 128}
    model = new_encoder_decoder(
        EncoderDecoderSettings(**(SHAPE | shape)), VOCAB, bos_id=BEGIN, eos_ids=(END,), pad_id=PAD
    )
    init_weights(model, 1)
    held_out = pairs(60, seed=99)
    secret = {tuple(example.source or ()) for example in held_out}
    known = [example for example in pairs(3000) if tuple(example.source or ()) not in secret]
    outcome = little.go(
        model,
        ExampleLoader(known, rows=16, context_tokens=24, seed=1),
        **TRAINING | {"rows": 16},
        steps=360,
        learning_rate=0.004,
        weight_decay=0.01,
        warmup_steps=10,
    )
    assert outcome.told("16 rows a step")
    many = [list(example.source or ()) for example in held_out]
    for sampling in (Sampling(max_new_tokens=10), Sampling(max_new_tokens=10, num_beams=3)):
        answers = generate(model, [[BEGIN]] * len(many), sampling, sources=many)
        right = sum(one.ids == list(example.ids)[1:] for one, example in zip(answers, held_out, strict=True))
        assert right >= 0.95 * len(many), f"{right} of {len(many)}, loss {outcome.losses()[-1]:.4f}"


# -- parts that are frozen ---------------------------------------------------------------------------------------------


def frozen(**table: Any) -> tuple[set[str], set[str]]:
    """Names that are trained, and all names."""
    model = build()
    Full(FullSettings(**table)).install(model, seed=1)
    names = {name for name, _ in model.named_parameters()}
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}, names


def test_train_the_decoder_and_freeze_the_rest() -> None:
    for table in ({"train": ("decoder.*",)}, {"freeze": ("encoder.*",)}):
        model = build()
        method = Full(FullSettings(**table))
        method.install(model, seed=1)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        assert method.count(model) == sum(p.numel() for n, p in before.items() if n.startswith("decoder."))
        batch = packed(pairs(4))
        source, document = (torch.from_numpy(batch.extra[name]) for name in ("source_BS", "source_document_BS"))
        with torch.no_grad():
            memory = model.encode(source, document)
        little.go(model, loader(), steps=2, **TRAINING)
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name]) == name.startswith("encoder."), name
        with torch.no_grad():
            assert torch.equal(model.encode(source, document), memory)


def test_patterns_and_depth_reach_both_parts() -> None:
    trained, names = frozen(freeze=("decoder.layers.*.cross.*", "encoder.embed.*"))
    assert names - trained == {n for n in names if (".cross." in n and "decoder" in n) or n == "encoder.embed.weight"}
    trained, names = frozen(freeze_layers=1)
    assert names - trained == {n for n in names if n.startswith(("encoder.layers.0.", "encoder.embed."))}
    trained, names = frozen(freeze_layers=2)
    assert names - trained == {n for n in names if n.startswith("encoder.")}
    trained, names = frozen(freeze_layers=3)
    assert trained == {n for n in names if n.startswith(("decoder.layers.1.", "decoder.layers.2.", "decoder.final"))}
    with pytest.raises(ConfigError, match="freeze_layers is 6") as caught:
        frozen(freeze_layers=6)
    assert caught.value.expected == "at most 5"
    with pytest.raises(ConfigError, match="names no parameter"):
        frozen(train=("layers.*",))


# -- what a method and a plan read off it ------------------------------------------------------------------------------


def test_sites_name_linear_layers_of_both_parts() -> None:
    model = build(mlp="swiglu")
    sites = model.sites()
    for site in sites:
        layer = model.get_submodule(site.name)
        assert isinstance(layer, torch.nn.Linear)
        assert (layer.in_features, layer.out_features) == (site.inputs, site.outputs)
        assert any(layer is module for module in model.layers[site.layer].modules())
    assert len(sites) == 2 * 7 + 3 * 11
    assert sum(site.kind.startswith("cross_") for site in sites) == 3 * 4
    inside = {id(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert {id(model.get_submodule(site.name)) for site in sites} == inside


@pytest.mark.parametrize("shared", [True, False])
def test_parameters_are_counted_by_formula(shared: bool) -> None:
    model = build(shared_embeddings=shared)
    table = VOCAB * 32 if shared else 0
    assert sum(p.numel() for p in model.parameters()) == sum(map(parameters, model.configs)) - table


def test_the_estimate_is_not_below_what_a_step_keeps() -> None:
    """Bytes the backward pass keeps of a forward pass, counted tensor by tensor, in float32."""
    model = build(heads=8, context_tokens=128).train()
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    batch = packed(pairs(100), 128)  # the squares of attention are most of it
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = sequence_to_sequence(model, Inputs.of(batch, torch.device("cpu")))
    place = device.find_place(little.settings())
    estimate = sum(device.activation_bytes(cfg, batch.ids_BT.size, 128, place, False) for cfg in model.configs)
    assert sum(kept.values()) <= estimate <= 3 * sum(kept.values())
    del loss
