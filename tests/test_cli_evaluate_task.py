"""`ratoon evaluate` of a task model as a user types it: measures, files, floors, robustness, attacks, two models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from little_tasks import KINDS, rows_of, table, write
from ratoon.base.errors import DataError
from ratoon.cli.main import run as ratoon
from ratoon.evaluate import task as evaluate
from ratoon.evaluate.kept import counted_again
from ratoon.evaluate.task import predict
from ratoon.tasks.registry import restored

WITHOUT_FLOOR = {"preference"}


@pytest.fixture
def place(with_base: Path) -> Path:
    return with_base


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


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_answered_is_not_asked_again(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(kind, place, 48)
    tuned(kind, place, 48, name="other", seed=2, data__seed=1)
    folder = place / "runs/tuned/evaluation"
    before = {name: (folder / name).read_bytes() for name in ("evaluation.json", "predictions.jsonl")}
    asked: list[str] = []
    real = evaluate.predict

    def predict(lm: Any, *rest: Any, **more: Any) -> Any:
        asked.append(lm.name)
        return real(lm, *rest, **more)

    monkeypatch.setattr(evaluate, "predict", predict)
    found = measured(capsys, "tuned", "--against", "other")
    assert asked == ["other"]
    known = json.loads(before["evaluation.json"])
    assert found["values"] == known["values"] and found["tables"] == known["tables"]
    assert (folder / "predictions.jsonl").read_bytes() == before["predictions.jsonl"]
    asked.clear()
    measured(capsys, "tuned")
    assert asked == ["tuned"], "who asks for the measures alone, gets them anew"


@pytest.mark.parametrize("change", ["dtype", "weights", "rows", "lines"])
def test_other_answers_than_the_models_own_are_not_taken(
    change: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("classification", place, 48)
    folder = place / "runs/tuned/evaluation"
    facts = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    options = ["--dtype", "float32" if facts["dtype"] == "bfloat16" else "bfloat16"] if change == "dtype" else []
    if change == "weights":
        (folder / "evaluation.json").write_text(json.dumps(facts | {"model_hash": "0" * 64}), encoding="utf-8")
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    if change == "rows":
        first = json.loads(lines[0])["input"]
        text = (place / "rows.jsonl").read_text(encoding="utf-8")
        assert first in text
        (place / "rows.jsonl").write_text(text.replace(first, first + " and more"), encoding="utf-8")
    if change == "lines":
        (folder / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--floor", *options, "--out", "anew"]) == 0
    assert "it is not asked again" not in capsys.readouterr().err
    assert ratoon(["evaluate", "tuned"]) == 0 and ratoon(["evaluate", "tuned", "--floor"]) == 0
    assert "it is not asked again" in capsys.readouterr().err


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


def test_rows_of_a_file_beside_a_run_whose_test_rows_were_a_share(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("classification", place)
    tested = (place / "runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in tested]
    write(place / "same.jsonl", [{"text": row["input"], "label": row["expected"]} for row in rows])
    found = measured(capsys, "tuned", "same.jsonl")
    assert found["n"] == len(rows) and "copies_of_training" not in found, "the run did not learn from its test rows"
    (place / "rows.jsonl").unlink()
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "same.jsonl"]) == 0
    assert "training rows are not here" in capsys.readouterr().err
    assert ratoon(["evaluate", "tuned", "same.jsonl", "--floor"]) == 2


HIDDEN = {
    "classification": "label", "multi-label": "labels", "tagging": "tags", "pairs": "label", "pair-scoring": "score",
    "scoring": "score", "extractive": "answers", "question-answering": "answer", "translation": "zh",
    "summarization": "summary",
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN)
def test_rows_without_answers_are_answered_as_rows_with_them(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(kind, place)
    rows = rows_of(kind)[:6]
    write(place / "known.jsonl", rows)
    write(place / "hidden.jsonl", [{key: row[key] for key in row if key != HIDDEN[kind]} for row in rows])
    measured(capsys, "tuned", "known.jsonl", "--out", "known")
    found = measured(capsys, "tuned", "hidden.jsonl", "--unlabelled", "--out", "hidden")
    known, hidden = (
        [json.loads(line) for line in (place / name / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("known", "hidden")
    )
    assert found["n"] == 6 and not any("expected" in row for row in hidden)
    assert [row["answer"] for row in hidden] == [row["answer"] for row in known]
    assert not (place / "hidden/evaluation.json").exists()


@pytest.mark.parametrize("kind", ["generation", "dialogue"])
def test_tasks_that_need_the_answer_say_so(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(kind, place)
    assert ratoon(["evaluate", "tuned", "rows.jsonl", "--unlabelled"]) == 2
    assert "reads no row without its answer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["multi-label", "tagging", "pairs", "extractive", "question-answering"])
def test_robustness_of_every_shape_of_record(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(kind, place, 40)
    found = measured(capsys, "tuned", "--robust", "--perturb", "typos,case", "--strengths", "0.5")
    assert [curve["name"] for curve in found["robust"]["curves"]] == ["typos", "case"]
    for curve in found["robust"]["curves"]:
        assert curve["points"][0]["score"]["value"] == pytest.approx(found["values"][0]["value"])
        assert curve["points"][1]["n_changed"] > 0
    examples = [one for curve in found["robust"]["curves"] for one in curve["examples"]]
    rows = (place / "runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for one in examples:
        assert one["text"] == json.loads(rows[one["record"]])["input"]
        assert one["perturbed"] != one["text"]
        if kind == "extractive":
            assert one["perturbed"].split("\n")[1:] == one["text"].split("\n")[1:], "the text to search in stays"


def of_two_scales(place: Path) -> None:
    """A run on the same texts in two groups, one graded 2 to 8 and one 52 to 58."""
    rows = [{**row, "set": group, "score": low + number % 7}
            for number, row in enumerate(rows_of("scoring", 20)) for group, low in (("a", 2), ("b", 52))]  # fmt: skip
    write(place / "rows.jsonl", rows)
    changes = {"task__group": "set", "task__low": {"a": 2, "b": 52}, "task__high": {"a": 8, "b": 58}}
    Path("recipe.yaml").write_text(yaml.safe_dump(table("scoring", **changes)), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0


def test_a_perturbed_text_is_graded_on_the_scale_of_its_own_group(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_two_scales(place)
    asked: list[str] = []

    def spy(lm: Any, task: Any, records: Any, **options: Any) -> Any:
        found = predict(lm, task, records, **options)
        assert all(one.answer < 10 if record.group == "a" else one.answer > 50
                   for record, one in zip(records, found, strict=True))  # fmt: skip
        asked.extend(record.group for record in records)
        return found

    monkeypatch.setattr("ratoon.evaluate.task_robust.predict", spy)
    found = measured(capsys, "tuned", "--robust", "--perturb", "case", "--strengths", "1")
    (curve,) = found["robust"]["curves"]
    assert curve["points"][0]["score"]["value"] == pytest.approx(found["values"][0]["value"])
    lines = (place / "runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    own = [json.loads(line)["group"] for line in lines]
    assert set(own) == {"a", "b"} and asked == own * (len(asked) // len(own))


def test_a_saved_model_stretches_its_answers_as_the_validation_rows_showed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice told: by the run, and by the model that it saved; without it the same model answers nearer to the mean."""
    rows = [{**row, "text": f"{['one', 'two', 'six', 'ten'][number % 4]} {row['text']}", "score": 3 * (number % 4)}
            for number, row in enumerate(rows_of("scoring", 80))]  # fmt: skip
    write(place / "rows.jsonl", rows)
    for name, stretch in (("tuned", True), ("flat", False)):
        changes = {"name": name, "task__step": 0, "task__stretch": stretch, "method__kind": "full", "epochs": 4}
        changed = {key: value for key, value in table("scoring", **changes).items() if key != "method"}
        Path("recipe.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
        assert ratoon(["finetune", "recipe.yaml"]) == 0
    said = capsys.readouterr().err
    state = {
        name: json.loads((place / f"runs/{name}/manifest.json").read_text(encoding="utf-8"))["task"]
        for name in ("tuned", "flat")
    }
    mean, spread = state["tuned"]["held_out"]
    assert said.count("answers are stretched by") == 1 and f"answers are stretched by {1 / spread:.2f}" in said
    stretched, plain = (
        [json.loads(line)["answer"] for line in (place / f"runs/{name}/evaluation/predictions.jsonl").open()]
        for name in ("tuned", "flat")
    )
    kept = state["flat"]
    assert kept["held_out"] == [0.0, 1.0]
    ((middle, deviation),) = kept["spreads"].values()
    low, high = kept["ranges"][""]
    wanted = [middle + deviation * ((one - middle) / deviation - mean) / spread for one in plain]
    assert stretched == pytest.approx([min(high, max(low, one)) for one in wanted], abs=1e-3)
    found = measured(capsys, "tuned", "--dtype", "float32", "--out", "again")
    again = [json.loads(line)["answer"] for line in (place / "again/predictions.jsonl").open()]
    assert again == pytest.approx(stretched, abs=0.05) and found["task"] == "scoring"


def test_an_adapter_on_a_base_of_16_bits_is_calibrated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained is in float32 beside it, and is again afterwards."""
    write(place / "rows.jsonl", rows_of("scoring", 80))
    recipe = table("scoring", method__rank=4)
    del recipe["train"]["precision"]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert ratoon(["--debug", "finetune", "recipe.yaml"]) == 0
    assert re.search(r"answers are (not )?stretched.* \d+ validation rows", capsys.readouterr().err)
    weights = load_file(next((place / "runs/tuned/model").glob("adapter*.safetensors")))
    assert {one.dtype for one in weights.values()} == {torch.float32}


def test_with_few_validation_rows_answers_are_not_stretched_and_it_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("scoring", place)
    assert re.search(r"answers are not stretched: \d validation rows are too few", capsys.readouterr().err)


def test_groups_are_measured_alone_and_counted_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two scales 50 apart: of all numbers together the correlation would be near 1, whatever was learned."""
    of_two_scales(place)
    found = measured(capsys, "tuned", "--floor")
    values = {one["name"]: one for one in found["values"]}
    a, b = values["kappa_quadratic[a]"], values["kappa_quadratic[b]"]
    assert a["n"] + b["n"] == found["n"] == values["kappa_quadratic"]["n"]
    whole = [one["value"] for one in (a, b) if one["value"] is not None]
    assert values["kappa_quadratic"]["value"] == pytest.approx(sum(whole) / len(whole))
    assert values["spearman"]["value"] is None or values["spearman"]["value"] < 0.9
    assert [one["name"] for one in found["floors"][0]["values"]] == list(values)
    page = (place / "runs/tuned/evaluation/report.html").read_text(encoding="utf-8")
    assert "Quadratic weighted kappa, a" in page and "each group on its own scale" in page
    state = json.loads((place / "runs/tuned/manifest.json").read_text(encoding="utf-8"))
    lines = (place / "runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    again = counted_again(restored(state["task"]), [json.loads(line) for line in lines], "en")
    assert [one.value for one in again.values] == [one["value"] for one in found["values"]]
    bare = [{key: value for key, value in json.loads(line).items() if key != "group"} for line in lines]
    with pytest.raises(DataError, match="no 'group'"):
        counted_again(restored(state["task"]), bare, "en")


@pytest.mark.parametrize("kind", ["generation", "preference"])
def test_robustness_needs_an_answer(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(kind, place)
    assert ratoon(["evaluate", "tuned", "--robust"]) == 2
    assert "answers no text" in capsys.readouterr().err


def test_tags_bear_no_change_in_the_number_of_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("tagging", place)
    assert ratoon(["evaluate", "tuned", "--robust", "--perturb", "spacing"]) == 2
    assert "number of words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stride", "4"], "--stride has no effect on a model that was fine-tuned for classification"),
        (["--on-bad-row", "skip"], "--on-bad-row has no effect"),
        (["--data", "."], "--data has no effect without --suite"),
        (["--models", "a=b"], "--models has no effect without --suite"),
        (["--unlabelled"], "name a file"),
        (["rows.jsonl", "--unlabelled", "--floor"], "--floor needs answers"),
        (["--pairs", "p.jsonl", "--robust"], "--robust has no effect with --pairs"),
    ],
)
def test_options_that_nothing_would_read(
    options: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("classification", place)
    assert ratoon(["evaluate", "tuned", *options]) == 2
    assert words in capsys.readouterr().err


def test_measured_again_the_run_keeps_its_ledger(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification", place)
    wanted = json.loads((place / "runs/tuned/ledger.json").read_text(encoding="utf-8"))
    assert measured(capsys, "tuned")["ledger"] == wanted
    assert "ledger" not in measured(capsys, "tuned", "rows.jsonl", "--out", "others")


def test_everything_beside_the_measures_cuts_as_the_run_did(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts longer than the model's context that differ at their end only: cut on the other side, all are one."""
    text = "the same words again and again, "
    rows = [{"text": text * 6 + ("GOOD" if i % 2 else "bad") + f" {i}", "label": "ab"[i % 2]} for i in range(60)]
    write(place / "rows.jsonl", rows)
    recipe = table("classification", epochs=8, train__learning_rate=0.02)
    recipe["data"] |= {"too_long": "cut-left", "most_lost_fraction": 1, "near": 1.0}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0
    found = measured(capsys, "tuned", "--robust", "--perturb", "case", "--strengths", "0", "--attack", "1",
                     "--against", "tuned")  # fmt: skip
    value = found["values"][0]["value"]
    assert value > 0.8, "learned from the end of the texts"
    assert found["robust"]["clean"]["value"] == pytest.approx(value)
    assert found["attack"]["accuracy_before"] == pytest.approx(value)
    assert found["against"][0]["other"] == pytest.approx(value)


def test_two_models_are_compared_in_one_precision(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ratoon.generate import lm

    tuned("classification", place)
    seen: list[torch.dtype] = []
    real = lm.load

    def load(*arguments: Any, **told: Any) -> Any:
        found = real(*arguments, **told)
        seen.append(found.model.head_weight().dtype)
        return found

    monkeypatch.setattr(lm, "load", load)
    for dtype in ("float32", "bfloat16"):
        measured(capsys, "tuned", "--against", "tuned", "--dtype", dtype)
        assert seen[-2:] == [getattr(torch, dtype)] * 2
