"""`ratoon evaluate` of a task model as a user types it: measures, files, floors, robustness, attacks, two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import little_tasks
from little_tasks import KINDS, rows_of, table, write
from ratoon.cli.main import run as ratoon

WITHOUT_FLOOR = {"generation", "dialogue", "preference"}


@pytest.fixture(scope="session")
def made_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return little_tasks.base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(own_folder: Path, made_base: Path) -> Path:
    shutil.copytree(made_base, own_folder / "base")
    return own_folder


def tuned(kind: str, place: Path, count: int = 24, **changes: Any) -> None:
    write(place / "rows.jsonl", rows_of(kind, count))
    Path("recipe.yaml").write_text(yaml.safe_dump(table(kind, **changes)), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert ratoon(["--debug", "evaluate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_measured_again_as_it_was(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(kind, place)
    before = json.loads((place / "runs/tuned/evaluation/evaluation.json").read_text(encoding="utf-8"))
    found = measured(capsys, "tuned", "--dtype", before["dtype"], "--out", "again")
    assert found["values"] == before["values"] and found["task"] == kind
    assert (place / "again/report.html").is_file() and (place / "again/predictions.jsonl").is_file()
    assert ratoon(["evaluate", "tuned"]) == 0
    assert found["values"][0]["signature"] and capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_FLOOR])
def test_floors_stand_beside(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(kind, place, 48)
    found = measured(capsys, "tuned", "--floor")
    assert found["floors"]
    for floor in found["floors"]:
        assert floor["values"][0]["name"] == found["values"][0]["name"] and floor["seconds"] >= 0
        assert floor["paired"]["n"] == found["n"]


def test_a_model_that_does_not_beat_its_floor_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"{'fine' if i % 2 else 'awful'} number {i * 7919}", "label": "ab"[i % 2]} for i in range(120)]
    write(place / "rows.jsonl", rows)
    recipe = table("classification", train__learning_rate=1e-9)
    recipe["data"]["test_fraction"] = 0.4
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--floor"]) == 0
    assert "does NOT beat the best floor, tfidf-svm" in capsys.readouterr().err


@pytest.mark.parametrize("kind", sorted(WITHOUT_FLOOR))
def test_tasks_without_floor_refuse(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(kind, place)
    assert ratoon(["evaluate", "tuned", "--floor"]) == 2
    assert "has no floor" in capsys.readouterr().err


def test_robustness_and_attack(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification", place, 40)
    found = measured(
        capsys, "tuned", "--robust", "--perturb", "typos,drops", "--strengths", "0.2,0.5", "--attack", "20"
    )
    curves = found["robust"]["curves"]
    assert len(curves) == 2
    assert found["attack"]["budget_queries"] == 20
    assert 0 <= found["attack"]["accuracy_under_attack"] <= found["attack"]["accuracy_before"] <= 1


def test_two_models_on_the_same_records(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification", place, 40)
    tuned("classification", place, 40, name="other", seed=2)
    found = measured(capsys, "tuned", "--against", "tuned")
    assert found["against"][0]["difference"] == 0 and found["against"][0]["p_value"] == 1
    assert measured(capsys, "tuned", "--against", "other")["against"][0]["model"] == "other"


def test_rows_of_a_file_in_place_of_the_test_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification", place)
    write(place / "more.jsonl", rows_of("classification", 24)[:7])
    found = measured(capsys, "tuned", "more.jsonl")
    assert found["n"] == 7 and found["copies_of_training"] > 0 and found["without_copies"] is not None
    assert measured(capsys, "tuned", "more.jsonl", "--limit-rows", "3")["n"] == 3
    write(place / "strange.jsonl", [{"text": "x", "label": "neither"}])
    assert ratoon(["evaluate", "tuned", "strange.jsonl"]) == 2
    assert "'neither' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--perturb", "typos"], "without --robust"),
        (["--strengths", "0.1"], "without --robust"),
        (["--robust", "--strengths", "much"], "no list of shares"),
        (["--robust", "--perturb", "typoes"], "typos"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("classification", place)
    assert ratoon(["evaluate", "tuned", *options]) == 2
    assert words in capsys.readouterr().err


def test_options_of_tasks_on_a_model_without_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "a.jsonl", [{"text": "a text of some words"}])
    assert ratoon(["evaluate", "base", "a.jsonl", "--floor"]) == 2
    assert "was not fine-tuned for a task" in capsys.readouterr().err
