"""Bad input of `ratoon finetune`: one clear error or a counted warning for each kind, with file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import little_tasks
from little_tasks import rows_of, table, write
from ratoon.base.errors import ArtifactError, RatoonError
from ratoon.cli.main import run as ratoon
from ratoon.generate.lm import load

Rows = list[dict[str, Any]]


@pytest.fixture
def place(with_base: Path) -> Path:
    return with_base


def finetune(recipe: dict[str, Any], rows: Rows | None = None, *arguments: str) -> int:
    if rows is not None:
        write(Path("rows.jsonl"), rows)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ratoon(["--debug", "finetune", "recipe.yaml", *arguments])


def error(recipe: dict[str, Any], rows: Rows | None = None) -> RatoonError:
    with pytest.raises(RatoonError) as caught:
        finetune(recipe, rows)
    return caught.value


def ledger(part: str = "train") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("runs/tuned/ledger.json").read_text(encoding="utf-8"))["parts"][part]
    return found


def changed(kind: str, at: int, **fields: Any) -> Rows:
    """Rows of a task with one of them changed; a field of None is taken out."""
    rows = rows_of(kind)
    rows[at] = {key: value for key, value in {**rows[at], **fields}.items() if value is not None}
    return rows


# -- fields ------------------------------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("classification", {"text": None}, "the row has no field 'text'"),
    ("classification", {"text": ""}, "the field 'text' is empty"),
    ("classification", {"text": "  \n "}, "the field 'text' is blank"),
    ("classification", {"label": None}, "the row has no field 'label'"),
    ("tagging", {"tags": ["O"]}, "3 words have 1 tags"),
    ("tagging", {"words": ["", "a", "b"]}, "the word '' has no token of its own"),
    ("scoring", {"score": "many"}, "'many' is no number"),
    ("translation", {"zh": ""}, "the field 'zh' is empty"),
    ("question-answering", {"answer": "  "}, "the field 'answer' is blank"),
    ("extractive", {"answers": {"text": ["nowhere"], "answer_start": [0]}}, "the answer 'nowhere' is not in the text"),
    ("dialogue", {"messages": []}, ""),
    ("preference", {"rejected": None}, "the row has no answer that was rejected"),
]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize(("kind", "fields", "found"), [BAD_FIELDS[5], BAD_FIELDS[0]], ids=["unfit", "no-field"])
def test_a_bad_row_of_any_part_is_found_before_training(
    kind: str, fields: dict[str, Any], found: str, part: str, place: Path
) -> None:
    rows, bad = rows_of(kind), changed(kind, 1, **fields)[:2]
    write(place / "bad.jsonl", bad)
    recipe = table(kind)
    recipe["data"] = {"train": ["rows.jsonl"], "validation_fraction": 0.1, "most_lost_fraction": 0.5, "leaks": "report"}
    recipe["data"][part] = ["bad.jsonl", "rows.jsonl"] if part == "train" else ["bad.jsonl"]
    said = error(recipe, rows)
    assert str(said.where) == "bad.jsonl:2" and found in said.found
    assert not Path("runs/tuned/metrics.jsonl").exists()
    recipe["data"]["on_bad_row"] = "skip"
    assert finetune(recipe | {"name": "left"}, rows) == 0


@pytest.mark.parametrize(("kind", "fields", "found"), BAD_FIELDS)
def test_a_bad_row_is_refused_with_its_line_or_left_out_and_counted(
    kind: str, fields: dict[str, Any], found: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = changed(kind, 4, **fields)
    said = error(table(kind), rows)
    assert said.exit_code == 2 and said.where is not None
    assert str(said.where) == "rows.jsonl:5" and found in said.found
    recipe = table(kind)
    recipe["data"] |= {"on_bad_row": "skip", "most_lost_fraction": 0.2}
    recipe["name"] = "left"
    assert finetune(recipe, rows) == 0
    parts = json.loads(Path("runs/left/ledger.json").read_text(encoding="utf-8"))["parts"]
    reasons = {reason: one for part in parts.values() for reason, one in part["reasons"].items()}
    mine = [one for one in reasons.values() if "rows.jsonl:5" in one["places"]]
    assert len(mine) == 1 and mine[0]["rows"] == 1
    assert "rows.jsonl:5" in capsys.readouterr().err, "what is left out is said aloud"


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "multi-label"])
def test_a_label_that_training_does_not_have(kind: str, place: Path) -> None:
    field = "label" if kind == "classification" else "labels"
    write(place / "more.jsonl", changed(kind, 2, **{field: "never" if field == "label" else ["never"]})[:6])
    recipe = table(kind)
    recipe["data"] = {"train": ["rows.jsonl"], "test": ["more.jsonl"]}
    said = error(recipe, rows_of(kind))
    assert said.found == "the label 'never' is not known" and str(said.where) == "more.jsonl:3"
    assert said.fix is not None and "task.labels" in said.fix


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_a_training_row_with_a_label_that_was_not_told(kind: str, place: Path) -> None:
    told = ["odd", "even"] if kind == "classification" else ["O", "B-X", "B-Y"]
    never = {"label": "never"} if kind == "classification" else {"tags": ["O", "O", "B-Z"]}
    write(place / "other.jsonl", rows_of(kind)[:4])
    recipe = table(kind, task__labels=told)
    recipe["data"] = {"train": ["rows.jsonl"], "validation": ["other.jsonl"], "duplicates": "keep"}
    said = error(recipe, changed(kind, 9, **never))
    assert "is not known" in said.found and str(said.where) == "rows.jsonl:10"


def test_labels_that_a_split_lacks_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("classification")
    write(place / "test.jsonl", [{"text": f"entirely apart {n}", "label": "odd"} for n in range(3)])
    recipe = table("classification", task__labels=["odd", "even", "rare"])
    recipe["data"] = {"train": ["rows.jsonl"], "test": ["test.jsonl"], "validation_fraction": 0.2}
    assert finetune(recipe, rows) == 0
    said = capsys.readouterr().err
    assert "no training row has the label rare: it cannot be learned" in said
    assert "test: nothing is measured of 2 of 3 labels that no row has: even, rare" in said


def test_one_label_alone_is_nothing_to_tell_apart(place: Path) -> None:
    said = error(table("classification"), [{**row, "label": "same"} for row in rows_of("classification")])
    assert "the training rows have 1 label" in said.found


# -- length ------------------------------------------------------------------------------------------------------------


def test_a_text_longer_than_a_row_is_refused_or_cut_and_counted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = changed("classification", 4, text="long " * 40)
    recipe = table("classification")
    recipe["data"] |= {"validation_fraction": 0.05, "test_fraction": 0.0}
    said = error(recipe, rows)
    assert said.found == "the record has 200 tokens" and str(said.where) == "rows.jsonl:5"
    assert "96" in str(said.expected) and "data.too_long" in str(said.fix)
    recipe["data"] |= {"too_long": "cut-right", "most_lost_fraction": 0.5}
    assert finetune(recipe, rows) == 0
    assert ledger()["rows"]["cut"] == 1 and ledger()["tokens"]["cut"] == 200 - 96
    assert "too long: cut on the right" in capsys.readouterr().err
    recipe["data"] |= {"most_lost_fraction": 0.01}
    assert "of the data would be lost" in error(recipe | {"name": "other"}, rows).found
    said = capsys.readouterr().err
    assert "too long: cut on the right" in said, "what is refused for its losses says them first"
    refused = json.loads(Path("runs/other/ledger.json").read_text(encoding="utf-8"))["parts"]["train"]
    assert refused["rows"]["cut"] == 1 and refused["tokens"]["cut"] == 200 - 96
    page = Path("runs/other/report.html").read_text(encoding="utf-8")
    assert "cut on the right" in page and "of the data would be lost" in page


def test_a_long_sentence_is_split_between_words_and_answered_whole(place: Path) -> None:
    count = 60
    rows = changed("tagging", 4, words=["word"] * count, tags=["O"] * count)
    recipe = table("tagging")
    recipe["data"] |= {"too_long": "split"}
    assert finetune(recipe, rows) == 0
    parts = json.loads(Path("runs/tuned/ledger.json").read_text(encoding="utf-8"))["parts"]
    lines = Path("runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    tested = [json.loads(line) for line in lines]
    assert sum(part["rows"].get("split", 0) for part in parts.values()) + any(
        one["place"] == "rows.jsonl:5" for one in tested
    ) == 1  # fmt: skip
    assert all(len(one["answer"]) == len(one["expected"]) for one in tested)


def test_a_row_longer_than_the_model_reads(place: Path) -> None:
    said = error(table("classification", train__context_tokens=512), rows_of("classification"))
    assert "rows of 512 tokens are longer than the model's context" in said.found


# -- copies ------------------------------------------------------------------------------------------------------------


def test_ids_that_stand_twice_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": max(4, number), **row} for number, row in enumerate(rows_of("classification"))]
    recipe = table("classification")
    recipe["data"] |= {"validation_fraction": 0.05, "test_fraction": 0.0}
    assert finetune(recipe, rows, "--show", "1") == 0
    assert "1 ids of train stand at several rows: '4' at rows.jsonl:" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["report", "drop", "refuse"])
def test_test_rows_that_stand_in_training(policy: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("classification")
    write(place / "test.jsonl", [*rows[:2], *[{"text": f"entirely apart {n * 31}", "label": "odd"} for n in range(3)]])
    recipe = table("classification")
    recipe["data"] = {
        "train": ["rows.jsonl"], "test": ["test.jsonl"], "validation_fraction": 0.1, "leaks": policy,
    }  # fmt: skip
    if policy == "refuse":
        said = error(recipe, rows)
        assert "training rows also stand in validation or test" in said.found and "exact copy" in str(said.where)
        return
    assert finetune(recipe, rows) == 0
    told = capsys.readouterr().err
    evaluation = json.loads(Path("runs/tuned/manifest.json").read_text(encoding="utf-8"))["evaluation"]
    if policy == "report":
        assert "2 of 5 rows of test stand in train as they are" in told
        assert evaluation["copies_of_training"] == 2
        assert [one["n"] for one in evaluation["without_copies"]][:1] == [3] and evaluation["n"] == 5
        assert "without 2 records that also stand in training: accuracy" in told
    else:
        dropped = {reason: one for reason, one in ledger()["reasons"].items() if "copy of a row of test" in reason}
        assert sum(one["rows"] for one in dropped.values()) == 2
        assert evaluation.get("copies_of_training") is None, "the rest of training is clean"


def test_equal_training_rows_are_left_out_and_counted(place: Path) -> None:
    rows = rows_of("classification")
    recipe = table("classification")
    write(place / "other.jsonl", [{"text": "entirely apart", "label": "odd"}])
    recipe["data"] = {"train": ["rows.jsonl"], "validation": ["other.jsonl"]}
    assert finetune(recipe, [*rows, rows[3], rows[3]]) == 0
    found = ledger()
    reason = found["reasons"]["equal to an earlier row"]
    assert found["rows"]["duplicate"] == reason["rows"] == 2


# -- chat templates ----------------------------------------------------------------------------------------------------

HIDES_THE_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "found"),
    [("", "no chat template"), (HIDES_THE_END, "no special token ends the turn")],
    ids=["none", "hides-the-end"],
)
@pytest.mark.parametrize("kind", ["dialogue", "preference"])
def test_chat_templates_that_cannot_teach(kind: str, template: str, found: str, own_folder: Path) -> None:
    little_tasks.base(own_folder / "base", template=template)
    said = error(table(kind), rows_of(kind))
    assert found in said.found and said.exit_code == 2
    assert not Path("runs/tuned/model").exists()


# -- bases and heads ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(place: Path) -> None:
    assert finetune(table("classification"), rows_of("classification")) == 0
    load("tuned")
    shutil.rmtree(place / "base")
    little_tasks.base(place / "base", seed=2)
    with pytest.raises(ArtifactError, match="the adapter was made for another base"):
        load("tuned")
    said = error(table("classification", name="more", model__adapter="tuned"))
    assert "the adapter was made for another base" in said.found


def test_an_adapter_whose_base_is_gone_says_where_it_was_looked_for(place: Path) -> None:
    assert finetune(table("classification"), rows_of("classification")) == 0
    shutil.rmtree(place / "base")
    with pytest.raises(ArtifactError, match="there is no model 'base'"):
        load("tuned")


def test_a_head_that_is_missing_from_a_saved_folder(place: Path) -> None:
    from ratoon.cli.measure import task_of_model
    from ratoon.data.records import read_parts
    from ratoon.evaluate.task import evaluate_task
    from ratoon.recipe.tuning import load_tuning

    assert finetune(table("classification", method={"kind": "full"}), rows_of("classification")) == 0
    recipe = load_tuning("runs/tuned/recipe.yaml")
    folder = place / "runs/tuned/model"
    lm = load(folder)
    task = task_of_model(lm)
    records = read_parts(task, recipe.data, seed=1).test
    evaluate_task(lm, task, records)
    with pytest.raises(ArtifactError, match="'base' has no head for the task classification"):
        evaluate_task(load("base"), task, records)
    # The weights alone are gone: the folder says it has a head.
    weights = load_file(folder / "model.safetensors")
    assert weights.pop("score.weight") is not None
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert "score.weight" in str(caught.value) or "model.safetensors" in str(caught.value)


def test_the_head_of_an_adapter_is_missing(place: Path) -> None:
    assert finetune(table("classification"), rows_of("classification")) == 0
    folder = place / "runs/tuned/model"
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "score" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "ratoon.json").unlink()  # else its hash says that the file was changed
    with pytest.raises(ArtifactError):
        load(folder)


# -- merging -----------------------------------------------------------------------------------------------------------


def test_a_merged_save_that_would_lose_precision_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = table("generation", train__learning_rate=1e-5)
    assert finetune(recipe, rows_of("generation")) == 0
    assert ratoon(["export", "tuned", "low", "--dtype", "bfloat16"]) == 2
    said = capsys.readouterr().err
    assert "would lose" in said and "bfloat16" in said and not Path("low").exists()
    assert ratoon(["export", "tuned", "whole"]) == 0
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    adapted, whole = load("tuned"), load("whole")
    assert float((adapted.logits(ids) - whole.logits(ids)).abs().max()) < 1e-4
    assert whole.facts["task"]["kind"] == "generation"


@pytest.mark.parametrize("method", ["prefix", "houlsby"])
def test_what_cannot_be_merged_says_why_before_or_after(
    method: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = table("generation", method={"kind": method})
    assert finetune(recipe, rows_of("generation")) == 0
    assert "ratoon export" not in capsys.readouterr().err
    assert ratoon(["export", "tuned", "whole"]) == 2
    assert f"{method} cannot be merged" in capsys.readouterr().err
    said = error(recipe | {"merge": True, "name": "merged"})
    assert f"{method} cannot be merged" in said.found
    assert not list(Path("runs/merged/checkpoints").glob("step-*")), "said before anything was trained"


# -- nothing left ------------------------------------------------------------------------------------------------------


def test_all_rows_filtered_away(place: Path) -> None:
    said = error(table("classification", data__where={"label": "none such"}), rows_of("classification"))
    assert said.found.startswith("no training row is left: not wanted (data.where) (24 rows, first rows.jsonl:1)")
    said = error(table("classification"), [])
    assert said.exit_code == 2 and "row" in said.found


def test_a_run_whose_rows_teach_nothing_does_not_start(place: Path) -> None:
    recipe = table("translation")
    recipe["train"]["context_tokens"] = 8
    recipe["data"] |= {"too_long": "cut-right", "most_lost_fraction": 1.0}
    said = error(recipe, rows_of("translation"))
    assert "nothing would be learned" in said.found and not Path("runs/tuned/checkpoints/last").exists()


def test_a_file_that_is_not_there(place: Path) -> None:
    said = error(table("classification", data__train=["nowhere.jsonl"]))
    assert "nowhere.jsonl" in str(said) and said.exit_code == 2


def test_a_recipe_that_pretrains(place: Path) -> None:
    said = error({"name": "x", "data": {"sources": ["a.txt"]}})
    assert said.found == "the recipe has no task: it pretrains a model" and "ratoon pretrain" in str(said.fix)


# -- afterwards --------------------------------------------------------------------------------------------------------


def test_the_list_of_runs_and_a_run_in_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(table("classification"), rows_of("classification")) == 0
    held = json.loads(Path("runs/tuned/manifest.json").read_text(encoding="utf-8"))
    figure = held["evaluation"]["values"][0]
    capsys.readouterr()
    assert ratoon(["runs"]) == 0
    assert f"{figure['name']} {figure['value']:.4f}" in capsys.readouterr().out
    assert ratoon(["runs", "show", "tuned"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"accuracy {figure['value']:.4f} [{figure['interval'][0]:.4f}, " in said
    assert f"n = {figure['n']:,} records" in said and "task classification, by lora on base" in said
    assert f"examples there {held['data']['train_examples']:,} to train on" in said and "learned places" in said
    # Stopped on its way, it is fine-tuning that goes on.
    held |= {"status": "stopped"}
    Path("runs/tuned/manifest.json").write_text(json.dumps(held), encoding="utf-8")
    assert ratoon(["runs", "show", "tuned"]) == 0
    assert "ratoon finetune" in capsys.readouterr().out
