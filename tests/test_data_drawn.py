"""Which rows become test rows, shots and limits: drawn from the run's seed, or from a seed of their own."""

from __future__ import annotations

import json
from pathlib import Path

from ratoon.data.records import RecordSettings, read_parts
from ratoon.tasks.registry import task_of


def places(folder: Path, run_seed: int, **more: object) -> dict[str, list[str]]:
    rows = [{"text": f"a text of number {i} and its own words {i * i}", "label": "ab"[i % 2]} for i in range(60)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = {"train": [str(path)], "test_fraction": 0.3, "shots": 5, "limit_test_rows": 10, "near": 1.0, **more}
    task = task_of({"kind": "classification"})
    parts = read_parts(task, RecordSettings.model_validate(table), seed=run_seed)
    return {"train": sorted(one.place for one in parts.train), "test": sorted(one.place for one in parts.test)}


def test_the_seed_of_the_run_draws(tmp_path: Path) -> None:
    one, other = places(tmp_path, 1), places(tmp_path, 2)
    assert one == places(tmp_path, 1)
    assert one["train"] != other["train"] and one["test"] != other["test"]
    assert (len(one["train"]), len(one["test"])) == (10, 10)


def test_a_seed_of_the_data_draws_the_same_rows_for_runs_of_every_seed(tmp_path: Path) -> None:
    assert places(tmp_path, 1, seed=7) == places(tmp_path, 2, seed=7) == places(tmp_path, 7)
    assert places(tmp_path, 1, seed=7) != places(tmp_path, 1)
