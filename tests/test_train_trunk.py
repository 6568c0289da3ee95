"""The frozen trunk: cached = computed bit for bit through the loop, what is read when, and how deep it is."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import little
from ratoon.adapt.methods import method_of
from ratoon.data.examples import ExampleLoader
from ratoon.model.transformer import Transformer
from ratoon.store.runs import Run
from ratoon.train.compiled import missing_compiler
from ratoon.train.loop import Hooks, train
from ratoon.train.objectives import objective_of
from ratoon.train.trunk import Trunk, frozen_layers
from test_encoder_decoder import build as build_both
from test_train_objectives import build as with_head
from test_train_objectives import examples

ROW, LAYERS, FROZEN = 32, 4, 2
LORA_ABOVE = {"kind": "lora", "rank": 2, "layers": [2, 3]}


def build(method: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    """Four blocks with a head, of which the lower two are frozen."""
    made = with_head("text_label", "last", layers=LAYERS, **changes)
    method_of(method if method is not None else {"kind": "full", "freeze_layers": FROZEN}).install(made, seed=1)
    return made


def loader(rows: int = 2) -> ExampleLoader:
    return ExampleLoader(examples("text_label", 12), rows=rows, context_tokens=ROW, seed=1)


def go(
    trunk: Trunk | None, made: Transformer | None = None, run: Run | None = None, *, epochs: int = 3, log: Any = None,
    resume: bool = False, **changes: Any,
) -> little.Outcome:  # fmt: skip
    """Train through the loop, with a trunk or without."""
    outcome, rows = little.Outcome(), loader()
    outcome.model = made if made is not None else build()

    def both(record: dict[str, Any]) -> None:
        outcome.records.append(record)
        if log is not None:
            log(record)

    settings = little.settings(rows=2, context_tokens=ROW, steps=rows.steps(epochs), **changes)
    hooks = Hooks(log=both, talk=outcome.words.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcome.result = train(
            outcome.model, rows, settings, run, objective=objective_of("text_label"), hooks=hooks, trunk=trunk,
            resume=resume,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return outcome


def trunk_in(folder: Path | None, key: str = "base", layers: int = FROZEN) -> Trunk:
    rows = loader()
    return Trunk(layers, folder, rows=len(rows), tokens=ROW, key={"base": key, "loader": rows.state()})


@pytest.mark.parametrize("precision", ["float32", "bf16", "autocast-bf16"])
def test_cached_equals_uncached_bit_for_bit(tmp_path: Path, precision: str) -> None:
    plain = go(None, precision=precision)
    kept = trunk_in(tmp_path / "trunk")
    cached = go(kept, precision=precision)
    again = go(trunk_in(None), precision=precision)
    assert cached.losses() == plain.losses() == again.losses()
    assert little.same(cached.weights, plain.weights) and little.same(again.weights, plain.weights)
    assert not little.same(cached.weights, dict(build().named_parameters()))
    rows, seen = len(loader()), 2 * loader().steps(3)
    # A step of two rows that ends an epoch may take a row of the next one along.
    assert rows <= kept.computed <= rows + 1 and kept.computed + kept.reads == seen, "computed once, then read"


@pytest.mark.parametrize("method", [LORA_ABOVE, {"kind": "full", "train": ["layers.3.*"]}], ids=["lora", "one-block"])
def test_cached_equals_uncached_with_few_parameters(tmp_path: Path, method: dict[str, Any]) -> None:
    layers = frozen_layers(build(method))
    assert layers == (2 if method is LORA_ABOVE else 3)
    cached = go(trunk_in(tmp_path / "trunk", layers=layers), build(method))
    assert cached.losses() == go(None, build(method)).losses()


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason="no compiler here")
def test_cached_equals_uncached_in_bf16_with_compiled_blocks(tmp_path: Path) -> None:
    told = {"precision": "bf16", "compile": "blocks"}
    uncached = go(trunk_in(None), **told)
    cached = go(trunk_in(tmp_path / "trunk"), **told)
    assert cached.told("block by block")
    assert cached.losses() == uncached.losses() and little.same(cached.weights, uncached.weights)


def test_what_is_read_is_what_stands_there(tmp_path: Path) -> None:
    """A changed file that still hashes right is believed: so it is read, and not computed on the side."""
    trunk = trunk_in(tmp_path / "trunk")

    def spoil(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == loader().steps(1):
            assert trunk.store is not None and trunk.have is not None
            trunk.store[:] = 0
            trunk.have[:] = zlib_of_zeros(trunk)

    whole, spoilt = go(None), go(trunk, log=spoil)
    first = loader().steps(1)
    assert spoilt.losses()[:first] == whole.losses()[:first] and spoilt.losses() != whole.losses()


def zlib_of_zeros(trunk: Trunk) -> int:
    import zlib

    assert trunk.store is not None
    return zlib.crc32(bytes(trunk.store[0].nbytes))


def test_a_row_that_is_not_as_it_was_written_is_computed_anew(tmp_path: Path) -> None:
    trunk = trunk_in(tmp_path / "trunk")

    def spoil(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == loader().steps(1):
            assert trunk.store is not None
            trunk.store[0, 0, 0] += 1

    assert go(trunk, log=spoil).losses() == go(None).losses()
    assert trunk.computed > len(loader())


def test_a_resumed_run_reads_what_was_kept(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    steps = loader().steps(1) + 1

    def die(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == steps:
            raise Killed

    every = {"checkpoint_every_steps": steps - 1}
    whole = go(None, run=little.new_run(tmp_path / "whole"), **every)
    with pytest.raises(Killed):
        go(trunk_in(tmp_path / "trunk"), run=little.new_run(tmp_path / "cut"), log=die, **every)
    trunk = trunk_in(tmp_path / "trunk")
    resumed = go(trunk, run=Run(tmp_path / "cut"), resume=True, **every)
    assert little.same(whole.weights, resumed.weights)
    assert trunk.computed == 0 and trunk.reads > 0


@pytest.mark.parametrize("change", ["base", "rows", "layers", "dtype"])
def test_another_base_packing_depth_or_type_is_written_anew(tmp_path: Path, change: str) -> None:
    first = trunk_in(tmp_path / "trunk")
    first.open(32, torch.float32)
    assert first.have is not None
    first.have[:] = 1
    same = trunk_in(tmp_path / "trunk")
    same.open(32, torch.float32)
    assert same.have is not None and same.have.all(), "the same again is gone on with"
    other = trunk_in(tmp_path / "trunk", "another" if change == "base" else "base", FROZEN + (change == "layers"))
    if change == "rows":
        other.key["loader"] = {**other.key["loader"], "examples": "0" * 64}
    other.open(32, torch.bfloat16 if change == "dtype" else torch.float32)
    assert other.have is not None and not np.asarray(other.have).any()


@pytest.mark.parametrize("told", ["by its figures", "by its refusal"])
def test_a_full_disk_computes_in_each_epoch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    class Full:
        free = 2 << 30

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    if told == "by its figures":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Full)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    trunk = trunk_in(tmp_path / "trunk")
    outcome = go(trunk)
    assert outcome.told("more than the disk has to spare") and outcome.told("computed in each epoch")
    assert outcome.losses() == go(None).losses()
    assert trunk.reads == trunk.computed == 0 and not (tmp_path / "trunk").exists()


def test_files_that_are_torn_are_written_anew(tmp_path: Path) -> None:
    trunk_in(tmp_path / "trunk").open(32, torch.float32)
    for name in ("trunk.bin", "have.bin"):
        (tmp_path / "trunk" / name).unlink()
        assert go(trunk_in(tmp_path / "trunk")).losses() == go(None).losses()


def test_closing_removes_the_files(tmp_path: Path) -> None:
    trunk = trunk_in(tmp_path / "trunk")
    outcome = go(trunk)
    assert outcome.told("computed once") and (tmp_path / "trunk").is_dir()
    trunk.close()
    assert not (tmp_path / "trunk").exists()


# -- how deep ----------------------------------------------------------------------------------------------------------


def test_how_deep_the_frozen_trunk_is() -> None:
    assert frozen_layers(build({"kind": "full"})) == 0, "the embedding is trained"
    assert frozen_layers(build()) == FROZEN
    assert frozen_layers(build({"kind": "full", "freeze_layers": LAYERS})) == LAYERS, "only the head is trained"
    assert frozen_layers(build({"kind": "lora"})) == 0, "parts in the first block"
    assert frozen_layers(build(LORA_ABOVE)) == 2
    assert frozen_layers(build({"kind": "full", "freeze": ["layers.*", "final_norm.*"]})) == 0, (
        "the embedding below them"
    )


def test_tied_embeddings_that_are_trained_above_have_no_trunk_below() -> None:
    """Without a head for a task the last matrix is the embedding: where it learns, the first layer's input changes."""
    tied = little.model(layers=LAYERS)
    assert tied.cfg.tied_embeddings
    method_of({"kind": "full", "train": ["embed.*", "layers.3.*"]}).install(tied, seed=1)
    assert frozen_layers(tied) == 0
    method_of({"kind": "full", "train": ["layers.3.*"]}).install(tied, seed=1)
    assert frozen_layers(tied) == 3
    untied = little.model(layers=LAYERS, tied_embeddings=False)
    method_of({"kind": "full", "train": ["head.*"]}).install(untied, seed=1)
    assert frozen_layers(untied) == LAYERS


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_have_no_trunk(kind: str) -> None:
    made = little.model(layers=LAYERS)
    method_of({"kind": kind, "tokens": 3}).install(made, seed=1)
    assert frozen_layers(made) == 0


def test_mixtures_and_encoder_decoders_have_no_trunk() -> None:
    experts = little.model(layers=LAYERS, moe=little.EXPERTS)
    method_of({"kind": "full", "train": ["layers.3.*"]}).install(experts, seed=1)
    assert frozen_layers(experts) == 0, "the balance of every router is a part of the loss"
    both = build_both()
    both.requires_grad_(False)
    assert frozen_layers(both) == 0
