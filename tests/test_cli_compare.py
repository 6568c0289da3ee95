"""`ratoon compare` as a user types it: what the table says is what the runs' folders hold, who is tested against whom,
and what cannot be compared."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from little_tasks import KINDS, WORDS, base, rows_of, table, write
from ratoon.base.errors import DataError
from ratoon.cli.main import run as ratoon
from ratoon.evaluate.kept import averaged, counted_again
from ratoon.evaluate.metrics.classification import classification
from ratoon.evaluate.metrics.value import compare
from ratoon.report.compare_records import method_words
from ratoon.tasks.registry import restored, task_of

TESTED = 90


def tune(name: str, kind: str = "classification", **changes: Any) -> None:
    """A run on rows.jsonl that is measured on test.jsonl."""
    recipe = table(kind, name=name, **{"train__log_every_steps": 1, "epochs": 3, **changes})
    recipe["data"] = {"train": ["rows.jsonl"], "test": ["test.jsonl"], "validation_fraction": 0.15, "near": 1.0,
                      **recipe.pop("rows", {})}  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert ratoon(["--debug", "finetune", "recipe.yaml"]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one task: all parameters, IA3, and LoRA from three seeds."""
    import torch

    folder = tmp_path_factory.mktemp("runs")
    base(folder / "base")
    texts = [f"{'fine' if i % 2 else 'awful'} number {i * 7919} {WORDS[i % 12]}" for i in range(80 + TESTED)]
    rows = [{"text": text, "label": "ab"[(i + (i % 5 == 0)) % 2]} for i, text in enumerate(texts)]
    write(folder / "rows.jsonl", rows[:80])
    write(folder / "test.jsonl", rows[80:])
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        tune("few-ia3", method={"kind": "ia3"}, train__learning_rate=0.03)
        tune("few-full", method={"kind": "full"}, train__learning_rate=0.003, epochs=8)
        for seed in (1, 2, 3):
            tune(f"few-lora-{seed}", seed=seed)
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    return folder


LORA = [f"few-lora-{seed}" for seed in (1, 2, 3)]
ALL = ["few-ia3", "few-full", *LORA]


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """The folder with the runs as the current one; only to be read."""
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A copy of two of the runs, to be changed."""
    for name in ("few-ia3", "few-full"):
        shutil.copytree(made / "runs" / name, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert ratoon(["--debug", "compare", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert ratoon(["compare", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


def evaluation(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"runs/{name}/evaluation/evaluation.json").read_text(encoding="utf-8"))
    return found


# -- what is said ------------------------------------------------------------------------------------------------------


def test_each_figure_is_that_of_the_runs_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, *ALL)
    assert found["task"] == "classification" and found["figure"] == "accuracy" and found["n_rows"] == TESTED
    assert {lane["name"] for lane in found["runs"]} == set(ALL) and found["notes"] == []
    assert [lane["score"] for lane in found["runs"]] == sorted((lane["score"] for lane in found["runs"]), reverse=True)
    for lane in found["runs"]:
        folder = Path("runs") / lane["name"]
        main, state = evaluation(lane["name"])["values"][0], json.loads((folder / "manifest.json").read_text("utf-8"))
        assert (lane["score"], lane["interval"], lane["n"]) == (main["value"], main["interval"], main["n"])
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        train = [one for one in records if one["kind"] == "train"]
        assert len(train) > 3
        assert lane["tokens_per_second"] == statistics.median(one["tokens_per_second"] for one in train[1:])
        assert lane["peak_memory_bytes"] == max(one["memory_bytes"] for one in train)
        assert lane["disk_bytes"] == sum(path.stat().st_size for path in (folder / "model").rglob("*"))
        assert lane["trainable_parameters"] == state["model"]["trained"]
        assert (lane["seconds"], lane["passes"], lane["steps"]) == (state["seconds"], state["passes"], state["steps"])
        assert lane["seeds"] == [int(lane["name"][-1]) if "lora" in lane["name"] else 1]
    methods = {lane["name"]: lane["method"] for lane in found["runs"]}
    assert methods["few-lora-1"] == "lora rank=2" and methods["few-full"] == "full" and methods["few-ia3"] == "ia3"
    settings = {lane["name"]: lane["settings"] for lane in found["runs"]}
    assert "learning_rate=0.003" in settings["few-full"] and "learning_rate=0.005" in settings["few-lora-1"]


def test_one_table_holds_it_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    found = told(capsys, *ALL)
    assert ratoon(["compare", *ALL]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip().startswith("few-")}
    assert list(lines) == [lane["name"] for lane in found["runs"]]
    best, *others = found["runs"]
    assert " best " in lines[best["name"]]
    for lane in found["runs"]:
        for part in (f"{lane['score']:.4f}", f"{lane['trainable_parameters']:,}", f" {lane['steps']} ", lane["method"]):
            assert part in lines[lane["name"]], (lane["name"], part)
    for lane in others:
        assert f"p {lane['to_best']['p_value']:.3f}" in lines[lane["name"]]
    assert f"the same {TESTED} rows: Accuracy" in said


def test_the_best_is_what_evaluate_against_says(copied: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bootstrap over kept predictions is the one over answers just given."""
    for name in ("base", "rows.jsonl", "test.jsonl"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, copied / name)
    best, other = told(capsys, "few-ia3", "few-full")["runs"]
    assert best["to_best"] is None and other["to_best"]["difference"] == other["score"] - best["score"] < 0
    dtype = evaluation(best["name"])["dtype"]
    capsys.readouterr()
    against = ["--against", best["name"], "--dtype", dtype, "--out", "again", "--json"]
    assert ratoon(["evaluate", other["name"], *against]) == 0
    wanted = json.loads(capsys.readouterr().out)["against"][0]
    assert wanted["difference"] == pytest.approx(other["to_best"]["difference"])
    assert wanted["interval"] == pytest.approx(other["to_best"]["interval"])
    assert wanted["p_value"] == other["to_best"]["p_value"]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_that_are_kept_give_the_figure_again(kind: str, with_base: Path) -> None:
    write(with_base / "rows.jsonl", rows_of(kind))
    Path("recipe.yaml").write_text(yaml.safe_dump(table(kind, epochs=1)), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0
    found = evaluation("tuned")
    lines = Path("runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    state = json.loads(Path("runs/tuned/manifest.json").read_text(encoding="utf-8"))
    measured = counted_again(restored(state["task"]), [json.loads(line) for line in lines], "en")
    for one, value in zip(found["values"], measured.values, strict=False):
        if one["name"] == value.name:
            assert value.value == pytest.approx(one["value"]) and value.signature == one["signature"]
    assert measured.values[0].name == found["values"][0]["name"]
    assert compare(measured, measured, measured.values[0].name).difference == 0


def test_a_narrow_terminal_gets_it_in_three_tables(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    lines = {}
    for columns in (100, 250):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert ratoon(["compare", *ALL]) == 0
        lines[columns] = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[100])) <= 100
    assert sum("few-ia3" in line for line in lines[100]) == 3 and sum("few-ia3" in line for line in lines[250]) == 1
    (wide,) = (line for line in lines[250] if "few-ia3" in line)
    narrow = " ".join(line for line in lines[100] if "few-ia3" in line)
    assert all(word in narrow for word in wide.split() if "=" not in word), "the same figures"


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_seeds_are_one_line_with_mean_and_deviation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    singly, found = told(capsys, *ALL), told(capsys, *ALL, "--by-seed")
    assert len(singly["runs"]) == 5 and all(lane["spread"] is None for lane in singly["runs"])
    lanes = {lane["name"]: lane for lane in found["runs"]}
    assert set(lanes) == {"few-lora", "few-full", "few-ia3"}
    scores = [evaluation(name)["values"][0]["value"] for name in LORA]
    lora = lanes["few-lora"]
    assert lora["runs"] == LORA and lora["seeds"] == [1, 2, 3]
    assert lora["score"] == pytest.approx(sum(scores) / 3) and lora["spread"] == pytest.approx(statistics.stdev(scores))
    assert len(set(scores)) > 1 and lora["interval"][0] < lora["score"] < lora["interval"][1]
    own = {lane["name"]: lane for lane in singly["runs"]}
    assert lora["seconds"] == pytest.approx(statistics.fmean(own[name]["seconds"] for name in LORA))
    assert lora["peak_memory_bytes"] == max(own[name]["peak_memory_bytes"] for name in LORA)
    assert lanes["few-ia3"]["spread"] is None and lanes["few-ia3"]["interval"] == own["few-ia3"]["interval"]
    capsys.readouterr()
    assert ratoon(["compare", *ALL, "--by-seed"]) == 0
    said = capsys.readouterr().out
    assert f"{lora['score']:.4f} ± {lora['spread']:.4f}" in said and "1, 2, 3" in said and "means" in said


def test_another_setting_is_another_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/few-ia3", "runs/few-other")
    path = Path("runs/few-other/recipe.yaml")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe |= {"seed": 7, "name": "few-other"}
    recipe["train"]["seed"] = 7
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert [len(one["runs"]) for one in told(capsys, "few-ia3", "few-other", "--by-seed")["runs"]] == [2]
    recipe["train"]["weight_decay"] = 0.5
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = told(capsys, "few-ia3", "few-other", "--by-seed")["runs"]
    assert [len(one["runs"]) for one in found] == [1, 1] and "weight_decay=0.5" in found[1]["settings"]


def test_the_mean_is_drawn_with_the_same_records() -> None:
    """Against the definition: for each draw the mean of the two accuracies, and the percentiles of that."""
    from ratoon.base.seeds import stream

    random = stream(4, "answers")
    expected = random.choice(["a", "b"], 200).tolist()
    given = [[one if random.random() < p else "c" for one in expected] for p in (0.9, 0.6)]
    parts = [classification(expected, answers, ["a", "b", "c"], resamples=1) for answers in given]
    found = averaged(parts, "accuracy").values[0]
    right_2N = np.array([[one == other for one, other in zip(expected, answers, strict=True)] for answers in given])
    drawn = stream(1, "bootstrap", 200).integers(0, 200, size=(1000, 200))
    means = [float(right_2N[:, row].mean()) for row in drawn]
    assert found.value == pytest.approx(right_2N.mean())
    assert found.interval == pytest.approx(np.percentile(means, [2.5, 97.5]))
    with pytest.raises(DataError, match="no figure 'bleu'"):
        averaged(parts, "bleu")


# -- what cannot be compared -------------------------------------------------------------------------------------------


def test_one_run_alone_the_same_twice_and_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one run alone" in refused(capsys, "few-ia3")
    assert "named twice" in refused(capsys, "few-ia3", "few-ia3")
    said = refused(capsys, "few-ia3", "few-ful")
    assert "did you mean 'few-full'" in said
    assert ratoon(["compare"]) == 2


def change(name: str, edit: Callable[[dict[str, Any]], Any], file: str = "manifest.json") -> None:
    path = Path("runs") / name / file
    found = json.loads(path.read_text(encoding="utf-8"))
    edit(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def test_runs_that_are_not_finished_or_not_fine_tuned(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change("few-full", lambda state: state.update(status="interrupted"))
    said = refused(capsys, "few-ia3", "few-full")
    assert "'few-full' is not finished: its status is interrupted" in said and "--resume" in said
    change("few-full", lambda state: state.pop("task"))
    assert "'few-full' was not fine-tuned for a task" in refused(capsys, "few-ia3", "few-full")


def test_a_run_without_test_figures(copied: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "base", "base")
    shutil.copy(made / "rows.jsonl", "rows.jsonl")
    tune("blind", method={"kind": "ia3"}, rows={"test": []})
    said = refused(capsys, "few-ia3", "blind")
    assert "'blind' has no test figures" in said and "ratoon evaluate blind FILE" in said


def test_runs_of_two_tasks(copied: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "base", "base")
    write(Path("rows.jsonl"), rows_of("generation"))
    write(Path("test.jsonl"), rows_of("generation", 30)[24:])
    tune("texts", "generation", epochs=1)
    said = refused(capsys, "few-ia3", "texts")
    assert "'few-ia3' was fine-tuned for classification, 'texts' for generation" in said


def lines_of(name: str) -> list[dict[str, Any]]:
    return lines_at(Path("runs") / name / "evaluation" / "predictions.jsonl")


def lines_at(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_runs_measured_on_different_rows(copied: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "rows.jsonl", "test.jsonl"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, copied / name)
    path, lines = Path("runs/few-full/evaluation/predictions.jsonl"), lines_of("few-full")
    write(path, [{**line, "input": "another", "place": "x:1"} if at == 4 else line for at, line in enumerate(lines)])
    said = refused(capsys, "few-ia3", "few-full")
    assert "measured on different rows: row 5 is" in said and "x:1" in said and "data.test" in said
    write(path, [{**line, "expected": "b" if line["expected"] == "a" else "a"} if not at else line
                 for at, line in enumerate(lines)])  # fmt: skip
    assert "row 1 is" in refused(capsys, "few-ia3", "few-full")
    # Read by another template, a row is still the row of its place.
    write(path, [{**line, "input": f"Text: {line['input']}"} for line in lines])
    assert told(capsys, "few-ia3", "few-full")["notes"] == []
    capsys.readouterr()
    kept = path.read_text(encoding="utf-8")
    assert ratoon(["evaluate", "few-full", "--limit-rows", "20"]) == 0
    assert ratoon(["evaluate", "few-full", "test.jsonl"]) == 0
    Path("apart").mkdir()
    shutil.copy("test.jsonl", "apart/test.jsonl")
    assert ratoon(["evaluate", "few-full", "apart/test.jsonl"]) == 0  # of the same name
    found = sorted(Path("runs/few-full").glob("evaluation-test-*"))
    assert len(found) == 2
    beside = Path("runs/few-full/evaluation-20-rows"), found[0]
    assert [len(lines_at(folder / "predictions.jsonl")) for folder in beside] == [20, TESTED]
    assert path.read_text(encoding="utf-8") == kept  # the run's own figures stand
    capsys.readouterr()
    shutil.rmtree(path.parent)
    beside[0].rename(path.parent)
    assert f"different rows: {TESTED} and 20" in refused(capsys, "few-ia3", "few-full")
    assert ratoon(["evaluate", "few-full"]) == 0
    assert len(told(capsys, "few-ia3", "few-full")["runs"]) == 2


def test_a_share_of_the_rows_is_another_for_each_seed(with_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(with_base / "rows.jsonl", rows_of("classification", 40))
    for seed in (1, 2):
        Path("recipe.yaml").write_text(
            yaml.safe_dump(table("classification", name=f"s{seed}", seed=seed)), encoding="utf-8"
        )
        assert ratoon(["finetune", "recipe.yaml"]) == 0
    assert "drawn from the seed" in refused(capsys, "s1", "s2", "--by-seed")
    for seed in (1, 2):  # nor are they taken for the same where nothing but the figures is kept
        shutil.rmtree(f"runs/s{seed}/evaluation")
    assert "drawn from the seed" in refused(capsys, "s1", "s2")


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_without_predictions_the_figures_stand_and_it_is_said(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = told(capsys, "few-ia3", "few-full")
    Path("runs/few-full/evaluation/predictions.jsonl").unlink()
    found = told(capsys, "few-ia3", "few-full")
    assert [one["what"] for one in found["notes"]] == ["note_rows", "note_not_paired"]
    assert [lane["score"] for lane in found["runs"]] == [lane["score"] for lane in before["runs"]]
    assert all(lane["to_best"] is None for lane in found["runs"])
    shutil.rmtree("runs/few-full/evaluation")  # the manifest keeps the figures
    assert told(capsys, "few-ia3", "few-full")["runs"] == found["runs"]
    capsys.readouterr()
    assert ratoon(["compare", "few-ia3", "few-full"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "taken to have the same test rows by their number" in said
    assert "few-full stands without a paired bootstrap: its predictions are not kept" in said


def test_predictions_that_are_not_those_of_the_figures(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of("few-full")
    write(Path("runs/few-full/evaluation/predictions.jsonl"), [{**line, "answer": "a"} for line in lines])
    found = told(capsys, "few-ia3", "few-full")
    assert "come to 0.5" in found["notes"][0]["reason"] and found["runs"][1]["to_best"] is None
    write(Path("runs/few-full/evaluation/predictions.jsonl"),
          [{key: line[key] for key in line if key != "answer"} for line in lines])  # fmt: skip
    assert told(capsys, "few-ia3", "few-full")["notes"][0]["reason"] == "the prediction has no 'answer'"


def test_other_number_types_are_told(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change("few-full", lambda found: found.update(dtype="float16"), "evaluation/evaluation.json")
    (note,) = told(capsys, "few-ia3", "few-full")["notes"]
    assert note["what"] == "note_types" and "float16" in note["types"]


def test_figures_counted_in_two_ways(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(
        "few-full", lambda found: found["values"][0].update(signature="accuracy|other"), "evaluation/evaluation.json"
    )
    assert "their signature is" in refused(capsys, "few-ia3", "few-full")


def test_likelihoods_without_their_tokens_cannot_be_counted_again() -> None:
    task = task_of({"kind": "generation"})
    with pytest.raises(DataError, match="no 'nats'"):
        counted_again(task, [{"expected": ["x"], "answer": None}], "en")


# -- methods in words --------------------------------------------------------------------------------------------------


def test_methods_are_told_by_their_size_and_by_what_is_not_usual() -> None:
    lora = {"kind": "lora", "rank": 8, "alpha": 16.0, "decomposed": False, "targets": "all", "layers": None}
    full = {"kind": "full", "freeze": [], "freeze_layers": 0}
    made = [lora, lora | {"decomposed": True}, lora | {"alpha": 32.0}, full, full | {"freeze_layers": 30}]
    usual = [lora, lora, lora, full, full]
    assert method_words(made, usual) == [
        "lora rank=8 alpha=16",
        "lora rank=8 alpha=16 decomposed",
        "lora rank=8 alpha=32",
        "full",
        "full freeze_layers=30",
    ]
    assert method_words(made[:1], usual[:1]) == ["lora rank=8"]
    assert method_words(made[1:2], usual[:1]) == ["lora rank=8 decomposed"], "alone as well"
