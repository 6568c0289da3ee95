"""No dead setting: each field of `TrainSettings` changes weights, records, files or words, or is said to do nothing."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import little
from ratoon.base.errors import ConfigError
from ratoon.base.settings import build
from ratoon.data.loader import Loader
from ratoon.train import compiled
from ratoon.train.settings import TrainSettings

STEPS = 8
BASE: dict[str, Any] = {"steps": STEPS, "clip_norm": 1.0, "warmup_steps": 1}
HELD_OUT = {1: 5.0, 2: 4.0}
"""Losses of the evaluations: the best is early, so that it matters how many checkpoints are kept beside it."""

TOGGLED: dict[str, dict[str, Any]] = {
    "steps": {"steps": STEPS + 1},
    "budget_minutes": {"steps": None, "budget_minutes": 0.002},
    "rows": {"rows": 4},
    "context_tokens": {"context_tokens": 12},
    "micro_batch_rows": {"micro_batch_rows": 3},
    "seed": {"seed": 2},
    "optimizer": {"optimizer": "adamw"},
    "learning_rate": {"learning_rate": 0.02},
    "matrix_learning_rate": {"matrix_learning_rate": 0.01},
    "weight_decay": {"weight_decay": 0.2},
    "beta1": {"beta1": 0.8},
    "beta2": {"beta2": 0.9},
    "epsilon": {"epsilon": 1e-3},
    "moments": {"moments": "bfloat16"},
    "frozen_products": {"frozen_products": "int8"},
    "momentum": {"momentum": 0.5},
    "clip_norm": {"clip_norm": 0.01},
    "schedule": {"schedule": "cosine"},
    "warmup_steps": {"warmup_steps": 3},
    "decay_fraction": {"decay_fraction": 0.3},
    "final_fraction": {"final_fraction": 0.5},
    "precision": {"precision": "bf16"},
    "compile": {"compile": "blocks"},
    "recompute_blocks": {"recompute_blocks": True},
    "evaluate_every_steps": {"evaluate_every_steps": 3},
    "evaluate_tokens": {"evaluate_tokens": 64},
    "sample_every_steps": {"sample_every_steps": 3},
    "log_every_steps": {"log_every_steps": 3},
    "checkpoint_every_steps": {"checkpoint_every_steps": 5},
    "checkpoint_every_minutes": {"checkpoint_every_minutes": 1e-9},
    "keep_checkpoints": {"keep_checkpoints": 4},
}
READ_BY_THE_VERB = {"seed", "evaluate_tokens"}
"""What the loop has no business with: the order of the data is the loader's, the evaluation a callback's."""

WORLDS: dict[str, dict[str, Any]] = {
    "muon, wsd": {},
    "adamw": {"optimizer": "adamw"},
    "cosine": {"schedule": "cosine"},
    "constant": {"schedule": "constant"},
    "checkpoints by steps": {"checkpoint_every_steps": 2},
    "bf16": {"precision": "bf16"},
}


@dataclass
class Seen:
    """All that a run leaves behind, clocks and memory left out."""

    weights: dict[str, Tensor]
    records: list[dict[str, Any]]
    files: list[str]
    words: list[str]

    def differs(self, other: Seen) -> list[str]:
        found = [] if little.same(self.weights, other.weights) else ["weights"]
        return found + [name for name in ("records", "files", "words") if getattr(self, name) != getattr(other, name)]


CLOCKS = ("time_seconds", "tokens_per_second", "memory_bytes")
_seen: dict[str, Seen] = {}


def observe(**changes: Any) -> Seen:
    """A run on real shards, with a loader as the verb makes it; equal settings are run once."""
    table = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    if repr(table) in _seen:
        return _seen[repr(table)]
    made = little.settings(**table)
    with tempfile.TemporaryDirectory() as folder:
        run = little.new_run(Path(folder) / "a")
        loader = Loader(
            little.shards(Path(folder) / "shards"), rows=made.rows, context_tokens=made.context_tokens, seed=made.seed
        )
        outcome = little.go(
            loader=loader,
            run=run,
            evaluate=lambda step, model: {"loss": HELD_OUT.get(step, 9.0), "n_tokens": made.evaluate_tokens},
            sample=lambda step, model: [{"prompt": "a", "text": "b"}],
            **table,
        )
        files = sorted(path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*"))
        records = [{k: v for k, v in record.items() if k not in CLOCKS} for record in outcome.records]
        _seen[repr(table)] = Seen(outcome.weights, records, files, outcome.words)
    return _seen[repr(table)]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling changes is words and time; the words do not need the time."""
    monkeypatch.setattr(compiled, "missing_compiler", lambda: "the test says so")


def test_every_field_is_toggled() -> None:
    assert TOGGLED.keys() == TrainSettings.model_fields.keys()


def test_the_same_settings_leave_the_same_behind() -> None:
    """Otherwise every difference below would mean nothing."""
    one = observe()
    _seen.clear()
    assert one.differs(observe()) == []


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (world, name)
        for world, base in WORLDS.items()
        for name, toggled in TOGGLED.items()
        if name not in READ_BY_THE_VERB and {**base, **toggled} != base
    ],
)
def test_a_setting_has_an_effect_or_is_said_to_have_none(world: str, name: str) -> None:
    base = WORLDS[world]
    changed = {**base, **TOGGLED[name]}
    found = observe(**changed)
    differs = found.differs(observe(**base))
    silent = little.settings(**{k: v for k, v in {**BASE, **changed}.items() if v is not None}).without_effect()
    said = [sentence for sentence in silent if sentence.startswith(f"train.{name} ")]
    if said:
        assert differs == ["words"], f"{name} is said to have no effect, but {differs} changed"
        assert said[0] in found.words
    else:
        assert differs, f"train.{name} changed nothing, and nobody says so"
    assert all(sentence in found.words for sentence in silent)


COMPUTES = {
    "steps", "budget_minutes", "rows", "context_tokens", "optimizer", "learning_rate", "matrix_learning_rate",
    "weight_decay", "beta1", "beta2", "epsilon", "moments", "momentum", "clip_norm", "schedule", "warmup_steps",
    "decay_fraction", "final_fraction", "precision",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMPUTES))
def test_what_decides_the_numbers_changes_the_weights(name: str) -> None:
    """Words alone would not do here."""
    assert "weights" in observe(**TOGGLED[name]).differs(observe())


@pytest.mark.parametrize("name", sorted(TOGGLED.keys() - COMPUTES - READ_BY_THE_VERB - {"micro_batch_rows"}))
def test_what_does_not_decide_the_numbers_leaves_the_weights_alone(name: str) -> None:
    assert "weights" not in observe(**TOGGLED[name]).differs(observe())


def test_without_effect_is_said_only_of_what_was_changed() -> None:
    assert little.settings(optimizer="adamw", schedule="constant").without_effect() == []


# -- the two that the verb reads -----------------------------------------------------------------------------------


def pretrain(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **train: Any) -> Any:
    """`ratoon pretrain` of a tiny model on a text of its own, without its page."""
    from ratoon.cli import pretrain as verb
    from ratoon.recipe import load

    monkeypatch.setattr(verb._Job, "page", lambda self: None)
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(
            "".join(f"Shoot number {i} of row {i % 7} is {'green' if i % 3 else 'dry'}.\n" for i in range(300)),
            encoding="utf-8",
        )
    prepared = folder / "runs" / "base" / "data"
    table: dict[str, Any] = {
        "name": name,
        "data": {"prepared": str(prepared)}
        if prepared.is_dir()
        else {"sources": [str(text)], "vocab_size": 300, "split_documents": "lines"},
        "model": {"size": "tiny", "settings": {"layers": 1, "width": 16, "heads": 2}},
        "train": {"steps": 4, "rows": 8, "context_tokens": 16, "precision": "float32", "compile": "off", **train},
        "samples": ["Shoot"],
        "sample_tokens": 4,
    }
    return verb.run_recipe(load(table), root=folder / "runs")


def test_seed_and_evaluate_tokens_through_the_verb(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(run: Any) -> list[Any]:
        return [(r["n_tokens"], r["loss"]) for r in run.read_metrics() if r["kind"] == "eval"]

    def trained(run: Any) -> list[Any]:
        return [r["loss"] for r in run.read_metrics() if r["kind"] == "train"]

    base = pretrain(own_folder, "base", monkeypatch)
    again = pretrain(own_folder, "again", monkeypatch)
    assert trained(base) == trained(again) and evaluated(base) == evaluated(again)
    fewer = pretrain(own_folder, "fewer", monkeypatch, evaluate_tokens=64)
    assert all(one[0] < other[0] for one, other in zip(evaluated(fewer), evaluated(base), strict=True))
    seeded = pretrain(own_folder, "seeded", monkeypatch, seed=5)
    assert trained(seeded) != trained(base)


# -- combinations that cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "give 'steps' or 'budget_minutes'"),
        ({"steps": 5, "budget_minutes": 1}, "both given"),
        ({"steps": 5, "rows": 4, "micro_batch_rows": 5}, "more than the 4 rows"),
        ({"steps": 5, "warmup_steps": 5}, "leaves nothing"),
        ({"steps": 0}, "steps"),
        ({"steps": 5, "learning_rate": -1.0}, "learning_rate"),
        ({"steps": 5, "beta1": 1.0}, "beta1"),
        ({"steps": 5, "optimizer": "sgd"}, "optimizer"),
        ({"steps": 5, "learning_rat": 1e-3}, "learning_rate"),
        ({"steps": "many"}, "steps"),
    ],
)
def test_impossible_settings_are_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(TrainSettings, table, where="train")


def test_rows_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="longer than the model's context"):
        little.go(context_tokens=65)
