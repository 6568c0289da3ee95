"""`ratoon plan`: what it says of a tiny recipe, held against what the run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratoon.cli import main
from ratoon.model.count import flops_per_token, parameters
from ratoon.recipe import load, settle

TEXT = "\n\n".join(f"The {i} little cats of house {i * 7 % 31} sleep on mat {i % 13}." for i in range(600))
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"sources": ["text.txt"], "vocab_size": 300, "split_documents": "blank-lines", "held_out_fraction": 0.1},
    "model": {"size": "tiny", "settings": {"layers": 2, "width": 32, "heads": 2}},
    "train": {"steps": 40, "rows": 4, "context_tokens": 32, "compile": "off", "precision": "float32"},
}


@pytest.fixture
def recipe(own_folder: Path) -> str:
    (own_folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (own_folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return "tiny.yaml"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main.run(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_it_says(recipe: str, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(own_folder.iterdir())
    found = plan(capsys, recipe, "--seconds", "0.2")
    assert sorted(own_folder.iterdir()) == before, "a plan writes nothing"
    cfg = settle(load(recipe)).model_config(300, None, None, None)
    assert found["model"]["parameters"] == parameters(cfg)
    assert found["steps"] == [40, 40]
    assert found["tokens"] == [40 * 4 * 32] * 2
    assert found["flops"] == [40 * 4 * 32 * flops_per_token(cfg, 32)] * 2
    assert found["passes"][0] == pytest.approx(40 * 128 / found["data"]["train_tokens"])
    low, high = found["time"]["seconds"]
    steps = found["measured"]["step_seconds"]
    assert found["measured"]["steps"] >= 3
    assert 0 < steps["low"] <= steps["median"] <= steps["high"]
    assert low == pytest.approx(40 * steps["low"])
    assert high >= 40 * steps["high"] + found["measured"]["first_step_seconds"]
    assert found["memory"]["micro_batch_rows"] == 4
    assert {one["key"] for one in found["derived"]} >= {"train.seed"}


def test_against_the_run(recipe: str, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of the data, parameters and bytes on the disk, as the run then finds them."""
    found = plan(capsys, recipe, "--seconds", "0")
    assert main.run(["pretrain", recipe, "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert found["data"]["train_tokens"] == pytest.approx(run["data"]["train_tokens"], rel=0.1)
    assert found["model"]["parameters"] == run["model"]["parameters"]
    folder = own_folder / "runs" / "tiny"
    sizes = [
        sum(file.stat().st_size for file in step.glob("*.safetensors"))
        for step in (folder / "checkpoints").glob("step-*")
    ]
    assert sizes
    assert all(size == pytest.approx(found["disk"]["checkpoint_bytes"], rel=0.05) for size in sizes)
    weights = (folder / "model" / "model.safetensors").stat().st_size
    assert weights == pytest.approx(found["disk"]["model_bytes"], rel=0.05)
    prepared = plan(capsys, recipe, "--seconds", "0", "data.sources=[]", f"data.prepared={folder / 'data'}")
    assert prepared["data"]["train_tokens"] == run["data"]["train_tokens"]
    again = plan(capsys, recipe, "--seconds", "0", "model=null", "model.init=tiny")
    assert again["model"]["parameters"] == run["model"]["parameters"]


def test_a_budget_of_minutes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The time is given, the steps are what fits."""
    found = plan(capsys, recipe, "train.steps=null", "train.budget_minutes=2", "--seconds", "0.2")
    steps = found["measured"]["step_seconds"]
    assert found["time"]["seconds"] == [120, 120]
    assert found["steps"] == [int(120 / steps["high"]), int(120 / steps["low"])]
    unmeasured = plan(capsys, recipe, "train.steps=null", "train.budget_minutes=2", "--seconds", "0")
    assert unmeasured["steps"] is unmeasured["tokens"] is unmeasured["flops"] is unmeasured["measured"] is None


def test_settings_show(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Optimizer, precision and recomputing change what is needed."""
    adamw, muon, low, again = (
        plan(capsys, recipe, "--seconds", "0", *more)["memory"]
        for more in (
            ("train.optimizer=adamw",),
            (),
            ("train.precision=bf16",),
            ("train.recompute_blocks=true",),
        )
    )
    assert adamw["optimizer_bytes"] > muon["optimizer_bytes"]
    assert low["weights_bytes"] * 2 == muon["weights_bytes"]
    assert low["masters_bytes"] == muon["weights_bytes"]
    assert again["activations_bytes"] < muon["activations_bytes"]


def test_for_people(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", recipe, "--seconds", "0.2"]) == 0
    said = capsys.readouterr()
    heads = [line.split()[0] for line in said.out.splitlines()]
    for head in ("model", "vocabulary", "data", "steps", "tokens", "passes", "memory", "disk", "measured", "time"):
        assert head in heads
    assert "derived train.seed = 1" in said.out
    assert "measuring steps" in said.err


def test_errors(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "nowhere.yaml"]) == 2
    assert main.run(["plan", recipe, "train.stepz=3"]) == 2
    assert main.run(["plan", recipe, "data.sources=[missing.txt]"]) == 2
    assert "missing.txt" in capsys.readouterr().err
