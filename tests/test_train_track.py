"""Trackers: what was recorded is read back from each of them, through its own reader; none of them stops a run."""

from __future__ import annotations

import builtins
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import little
from ratoon.base.errors import ConfigError, StorageError
from ratoon.store.runs import Run
from ratoon.train import track
from ratoon.train.track import Tracker, figures, texts, trackers

RECIPE = {"name": "a", "train": {"steps": 6, "learning_rate": 0.01}}
NAMES = ("tensorboard", "wandb", "mlflow")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no server, no home of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def train_record(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "kind": "train", "time_seconds": 1.0 * step, "tokens": 8 * step, "loss": loss}


# -- readers: what each tracker itself would show ------------------------------------------------------------------


def tensorboard_scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def tensorboard_texts(run: Run) -> dict[str, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    return {tag: [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)] for tag in found.Tags()["tensors"]}


def wandb_entries(path: Path) -> Iterator[bytes]:
    """The entries of a `.wandb` file: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole entry, or the last piece of one
            yield whole
            whole = b""


class WandBRun:
    """The rows, ids, configuration and exit codes of every file that the processes of a run wrote, in order."""

    def __init__(self, run: Run) -> None:
        from wandb.proto import wandb_internal_pb2

        self.rows: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.config: dict[str, Any] = {}
        self.exits: list[int] = []
        self.projects: list[str] = []
        files = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        for path in files:
            for data in wandb_entries(path):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    self.ids.append(record.run.run_id)
                    self.projects.append(record.run.project)
                    self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                elif kind == "history":
                    items = record.history.item
                    row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                    self.rows.append(row | {"_step": record.history.step.num})
                elif kind == "exit":
                    self.exits.append(record.exit.exit_code)

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(row["_step"], row[name]) for row in self.rows if name in row]


class MLflowRun:
    """The one run in the run folder's store."""

    def __init__(self, run: Run, uri: str | None = None) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri or (run.folder / "mlflow").resolve().as_uri())
        experiment = self.client.get_experiment_by_name("ratoon")
        assert experiment is not None
        runs = self.client.search_runs([experiment.experiment_id])
        assert len(runs) == 1
        self.run = runs[0]

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(self.run.info.run_id, name)]

    def text(self, name: str, folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        return Path(self.client.download_artifacts(self.run.info.run_id, name, str(folder))).read_text("utf-8")


def series(run: Run, name: str) -> dict[str, list[tuple[int, float]]]:
    """A number's course in each tracker."""
    return {
        "tensorboard": tensorboard_scalars(run).get(name, []),
        "wandb": WandBRun(run).series(name),
        "mlflow": MLflowRun(run).series(name),
    }


# -- one run -------------------------------------------------------------------------------------------------------


def test_a_real_run_is_read_back_from_each(tmp_path: Path) -> None:
    run, words = little.new_run(tmp_path / "a"), []
    tracker = trackers(NAMES, run, RECIPE, talk=words.append)
    little.go(
        run=run,
        steps=4,
        evaluate=lambda step, model: {"loss": 2.0 - step / 8, "interval": (1.0, 3.0 + step), "n_tokens": 7},
        sample=lambda step, model: [{"prompt": "Once", "text": f"upon {step}"}, {"prompt": "从前", "text": "有座山"}],
        evaluate_every_steps=2,
        log=tracker.log,
    )
    tracker.close("done")
    records = list(run.read_metrics())
    losses = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    for name, found in series(run, "train/loss").items():
        assert [step for step, _ in found] == [1, 2, 3, 4], name
        assert np.allclose([v for _, v in found], [v for _, v in losses], rtol=1e-6), name
    for name, found in series(run, "eval/loss").items():
        assert found == [(0, 2.0), (2, 1.75), (4, 1.5)], name
    for name, found in series(run, "eval/interval_high").items():
        assert found == [(0, 3.0), (2, 5.0), (4, 7.0)], name
    assert set(tensorboard_scalars(run)) >= {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"}

    shown = tensorboard_texts(run)
    assert "Once upon 4" in shown["sample/1/text_summary"][-1]
    assert "从前 有座山" in shown["sample/2/text_summary"][-1]
    assert '"learning_rate": 0.01' in shown["recipe/text_summary"][0]
    wandb_run = WandBRun(run)
    assert [row["sample/2"] for row in wandb_run.rows if "sample/2" in row] == ["从前 有座山"] * 2
    assert (wandb_run.projects, wandb_run.exits) == (["ratoon"], [0])
    assert wandb_run.config["train"]["learning_rate"] == 0.01
    assert (run.folder / "wandb").is_dir()
    mlflow_run = MLflowRun(run)
    assert mlflow_run.run.info.status == "FINISHED"
    assert mlflow_run.run.data.params["train.learning_rate"] == "0.01"
    assert mlflow_run.text("samples/step-00000004-1.txt", tmp_path / "got") == "Once upon 4"
    assert json.loads(mlflow_run.text("recipe.json", tmp_path / "got"))["name"] == "a"
    assert any("offline" in sentence and "API key" in sentence for sentence in words)
    assert any("wandb sync" in sentence for sentence in words)
    assert any("tensorboard --logdir" in sentence for sentence in words)


@pytest.mark.parametrize(("status", "code", "ended"), [("failed", 1, "FAILED"), ("interrupted", 130, "KILLED")])
def test_how_a_run_ended_is_told(tmp_path: Path, status: Any, code: int, ended: str) -> None:
    run = little.new_run(tmp_path / "a")
    tracker = trackers(("wandb", "mlflow"), run, RECIPE)
    tracker.log(train_record(1, 3.0))
    tracker.close(status)
    assert WandBRun(run).exits == [code]
    assert MLflowRun(run).run.info.status == ended


def test_without_trackers_there_is_metrics_jsonl_alone(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    tracker = trackers((), run, RECIPE)
    tracker.log(train_record(1, 3.0))
    tracker.close()
    assert list(run.read_metrics()) == [train_record(1, 3.0)]
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_numbers_and_words_of_a_record() -> None:
    record = {"step": 3, "kind": "eval", "loss": 1, "interval": [0.5, 1.5], "note": "x", "ok": True, "none": None}
    assert figures(record) == {"eval/loss": 1.0, "eval/interval_low": 0.5, "eval/interval_high": 1.5}
    assert texts({"step": 1, "kind": "sample", "prompt": "a", "text": "b", "model": "c"}) == "a b"
    assert texts({"step": 1, "kind": "note", "words": "hello"}) == "words: hello"


# -- resuming ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_same_runs_without_gap_or_double(tmp_path: Path) -> None:
    """Killed after recording steps that no checkpoint holds: they are computed and recorded again."""
    run = little.new_run(tmp_path / "a")
    tracker = trackers(NAMES, run, RECIPE)

    def until_five(record: dict[str, Any]) -> None:
        tracker.log(record)
        if record["kind"] == "train" and record["step"] == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        little.go(run=run, steps=8, checkpoint_every_steps=3, log=until_five)
    tracker.close("failed")
    assert [r["step"] for r in run.read_metrics()] == [1, 2, 3, 4, 5]
    noted = json.loads((run.folder / "trackers.json").read_text())

    again = trackers(NAMES, run, RECIPE)
    assert little.go(run=run, steps=8, checkpoint_every_steps=3, resume=True, log=again.log).told("from step 3")
    again.close("done")
    assert json.loads((run.folder / "trackers.json").read_text()) == noted
    assert [r["step"] for r in run.read_metrics()] == list(range(1, 9))
    expected = little.go(steps=8).losses()
    found = series(run, "train/loss")
    # The step at which the first process ended may stand twice in wandb's files: whether its service took it cannot
    # be known. Its server keeps one row a step.
    assert found["wandb"][4] == found["wandb"][5]
    del found["wandb"][5]
    for name, course in found.items():
        assert [step for step, _ in course] == list(range(1, 9)), name
        assert np.allclose([v for _, v in course], expected, rtol=1e-6), name
    assert len(set(WandBRun(run).ids)) == 1
    assert MLflowRun(run).run.info.status == "FINISHED"
    assert len(tensorboard_texts(run)["recipe/text_summary"]) == 1


def test_a_tracker_added_on_resuming_gets_what_comes(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    trackers((), run, RECIPE).log(train_record(7, 3.0))
    later = trackers(("wandb",), run, RECIPE)
    later.log(train_record(2, 3.0))
    later.close()
    assert WandBRun(run).series("train/loss") == [(2, 3.0)]


def test_a_run_that_another_store_has_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, words = little.new_run(tmp_path / "a"), []
    trackers(("mlflow",), run, RECIPE).close()
    other = (tmp_path / "elsewhere").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    tracker = trackers(("mlflow",), run, RECIPE, talk=words.append)
    tracker.log(train_record(1, 3.0))
    tracker.close()
    assert MLflowRun(run, other).series("train/loss") == [(1, 3.0)]
    assert any("a new one begins" in sentence for sentence in words)


# -- what goes wrong -----------------------------------------------------------------------------------------------


class Failing:
    """A tracker that fails at chosen records."""

    def __init__(self, fails: Callable[[int], bool], *, begin: bool = False, close: bool = False) -> None:
        self.fails, self.tried, self.taken = fails, 0, []
        self.fail_begin, self.fail_close = begin, close

    def begin(self, kept_step: int) -> None:
        if self.fail_begin:
            raise OSError("no route")

    def write(self, record: dict[str, Any]) -> None:
        self.tried += 1
        if self.fails(record["step"]):
            raise ConnectionError("the server hung up\nand more lines")
        self.taken.append(record["step"])

    def close(self, status: str) -> None:
        if self.fail_close:
            raise OSError("still no route")


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path: Path) -> None:
    run, words = little.new_run(tmp_path / "a"), []
    bad, good = Failing(lambda step: step in (2, 4, 6)), Failing(lambda step: False)
    tracker = Tracker(run, {"bad": bad, "good": good}, words.append)
    result = little.go(run=run, steps=8, log=tracker.log).result
    tracker.close()
    assert result is not None and result.steps == 8
    assert [r["step"] for r in run.read_metrics()] == list(range(1, 9))
    assert (bad.taken, good.taken) == ([1, 3, 5, 7, 8], list(range(1, 9)))
    assert tracker.lost == {"bad": 3}
    assert len([sentence for sentence in words if "the server hung up" in sentence]) == 1
    assert "and more lines" not in " ".join(words)
    assert any("bad did not take 3 records" in sentence for sentence in words)


def test_a_tracker_that_goes_on_failing_is_left_alone(tmp_path: Path) -> None:
    words: list[str] = []
    bad = Failing(lambda step: step > 1, close=True)
    tracker = Tracker(little.new_run(tmp_path / "a"), {"bad": bad}, words.append)
    for step in range(1, 12):
        tracker.log(train_record(step, 1.0))
    tracker.close()
    assert bad.tried == 1 + track.PATIENCE_TRIES
    assert tracker.lost == {"bad": 10}
    assert len(words) == 2


def test_a_tracker_that_lets_the_run_wait_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(track.time, "monotonic", lambda: float(next(clock)))
    bad = Failing(lambda step: True)
    tracker = Tracker(little.new_run(tmp_path / "a"), {"bad": bad}, lambda _: None)
    for step in range(1, 9):
        tracker.log(train_record(step, 1.0))
    assert bad.tried == 2  # 6 seconds each


def test_a_tracker_that_cannot_begin_or_end_is_said_once(tmp_path: Path) -> None:
    words: list[str] = []
    bad = Failing(lambda step: False, begin=True, close=True)
    tracker = Tracker(little.new_run(tmp_path / "a"), {"bad": bad}, words.append)
    tracker.log(train_record(1, 1.0))
    tracker.close()
    assert len(words) == 1 and "no route" in words[0]


def test_a_full_disk_under_metrics_is_an_error_of_ours(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        trackers((), run, RECIPE).log(train_record(1, 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = builtins.__import__
    gone = "torch.utils.tensorboard" if name == "tensorboard" else name

    def without(module: str, *rest: Any, **more: Any) -> Any:
        if module == gone or module.startswith(f"{gone}."):
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        return real(module, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for loaded in [m for m in sys.modules if m == gone or m.startswith(f"{gone}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ConfigError, match=r"ratoon\[track\]") as caught:
        trackers((name,), little.new_run(tmp_path / "a"), RECIPE)
    assert name in caught.value.found


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensorboard, wandb, mlflow"):
        trackers(("tensorbord",), little.new_run(tmp_path / "a"), RECIPE)


def test_a_tracker_that_cannot_be_opened_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ConfigError, match="mlflow") as caught:
        trackers(("mlflow",), little.new_run(tmp_path / "a"), RECIPE)
    assert "MLFLOW_TRACKING_URI" in (caught.value.fix or "")


def test_torn_ids_are_an_error(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    (run.folder / "trackers.json").write_text("{")
    with pytest.raises(ConfigError, match=r"trackers\.json"):
        trackers(("wandb",), run, RECIPE)
