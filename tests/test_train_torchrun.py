"""Two processes under `torchrun` learn what one process learns from the same rows, and none waits for a dead one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import little
from ratoon.train import checkpoint

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "muon": {"steps": 6},
    "adamw, micro-batches": {"steps": 6, "optimizer": "adamw", "micro_batch_rows": 3, "epsilon": 1e-2},
    "cosine, clipped": {"steps": 6, "schedule": "cosine", "warmup_steps": 2, "clip_norm": 0.1},
}

TOGETHER = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import little
from safetensors.torch import save_file

folder, cases = Path(sys.argv[2]), json.loads(sys.argv[3])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
for number, (kind, settings) in enumerate(cases):
    made = little.model(moe=little.EXPERTS, tied_embeddings=False) if kind == "experts" else little.model()
    loader = (
        little.real_loader(folder / "shards", rank=rank, world=world)
        if kind == "shards" else little.Rows(rank=rank, world=world)
    )
    outcome = little.go(made, loader, **settings)
    save_file({name: value.contiguous() for name, value in outcome.weights.items()}, folder / f"{number}-{rank}.bin")
    (folder / f"{number}-{rank}.json").write_text(json.dumps([outcome.losses(), outcome.words, outcome.result.tokens]))
dist.destroy_process_group()
"""


def torchrun(folder: Path, *arguments: object, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def written(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Rows have unequal weights, so the processes' shares weigh unequally: only one division by the sum is right."""
    little.shards(tmp_path / "shards")
    cases = [("rows", CASES[name]) for name in CASES]
    cases += [("experts", {"steps": 4}), ("shards", {"steps": 5}), ("rows", {"steps": 4, "precision": "bf16"})]
    done = torchrun(tmp_path, written(tmp_path, TOGETHER), HERE, tmp_path, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    for number, (kind, settings) in enumerate(cases):
        made = little.model(moe=little.EXPERTS, tied_embeddings=False) if kind == "experts" else little.model()
        loader = little.real_loader(tmp_path / "shards") if kind == "shards" else little.Rows()
        one = little.go(made, loader, **settings)
        first, second = (load_file(tmp_path / f"{number}-{rank}.bin") for rank in range(2))
        assert little.same(first, second), (kind, settings)
        losses, words, tokens = json.loads((tmp_path / f"{number}-0.json").read_text(encoding="utf-8"))
        exact = settings.get("precision", "float32") == "float32"
        assert little.largest_difference(first, one.weights) <= (1e-5 if exact else 3e-2), (kind, settings)
        assert np.allclose(losses, one.losses(), rtol=1e-5 if exact else 1e-2), (kind, settings)
        assert one.result is not None and tokens == one.result.tokens
        assert any("8 rows a step in" in sentence for sentence in words)
        silent = json.loads((tmp_path / f"{number}-1.json").read_text(encoding="utf-8"))
        assert silent[:2] == [[], []]  # records and words are the first one's business


DIES = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import little
from ratoon.base.errors import RatoonError

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = Path(sys.argv[2])

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left: let them speak first

class Dying(little.Rows):
    def batch(self, step):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)

try:
    little.go(little.model(), Dying(rank=rank, world=world), little.new_run(folder / "a"),
              steps=500, checkpoint_every_steps=2)
except RatoonError as error:
    (folder / f"error-{rank}.txt").write_text(str(error))
    raise
"""


def test_a_process_that_dies_is_noticed_and_named(tmp_path: Path) -> None:
    began = time.monotonic()
    done = torchrun(tmp_path, written(tmp_path, DIES), HERE, tmp_path, seconds=120)
    assert done.returncode != 0
    assert time.monotonic() - began < 110  # the patience between processes is hours: this is no waiting
    told = (tmp_path / "error-0.txt").read_text(encoding="utf-8")
    assert "another process of this run ended" in told and "process 0 of 2" in told and "--resume" in told
    run = little.new_run(tmp_path / "a")
    last = checkpoint.pointed(run.checkpoints, "last")
    assert last is not None and last.name == "step-00000002"
    assert checkpoint.load_weights(last).keys() == dict(little.model().named_parameters()).keys()


@pytest.mark.slow
def test_pretrain_under_torchrun(own_folder: Path) -> None:
    """The verb as a user types it: the same recipe and, to rounding, the same model; one run folder, one page."""
    text = "".join(f"Shoot number {i} of row {i % 7} is {'green' if i % 3 else 'dry'}.\n" for i in range(300))
    (own_folder / "text.txt").write_text(text, encoding="utf-8")
    (own_folder / "recipe.yaml").write_text(
        "name: two\n"
        "data: {sources: [text.txt], vocab_size: 300, split_documents: lines}\n"
        "model: {size: tiny, settings: {layers: 1, width: 16, heads: 2}}\n"
        "train: {steps: 6, rows: 8, context_tokens: 16, precision: float32, compile: 'off', log_every_steps: 1}\n"
        "samples: [Shoot]\n"
        "sample_tokens: 4\n",
        encoding="utf-8",
    )
    done = torchrun(own_folder, "-m", "ratoon", "pretrain", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    one = subprocess.run(
        [sys.executable, "-m", "ratoon", "pretrain", "recipe.yaml", "name=one"],
        capture_output=True,
        text=True,
        cwd=own_folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert one.returncode == 0, one.stderr
    assert done.stderr.count("next:") == 1
    runs = own_folder / "runs"
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["one", "two"]
    assert (runs / "two" / "report.html").is_file()
    weights = [load_file(runs / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert little.largest_difference(*weights) < 1e-5
    losses = [
        [r["loss"] for r in little.new_run(runs / name).read_metrics() if r["kind"] == "train"]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 6 and np.allclose(*losses, rtol=1e-5)
