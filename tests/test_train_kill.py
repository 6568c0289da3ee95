"""kill -9 at any moment: a killed and resumed run ends with the weights of one that nobody touched; a model folder is
the old one or the new one, never half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import little
from ratoon.model.folder import read_model
from ratoon.train import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

STEPS, KILLS = 64, 20

FORKS = """
import os, random, select, signal, sys, time

def killed_after(marks, seconds, work):
    '''Fork; the child works and writes a byte for each mark; SIGKILL it so long after that mark. Was it killed?'''
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            work(lambda: os.write(writing, b"."))
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    seen = 0
    while seen < marks:
        got = os.read(reading, 1)
        if not got:
            break
        seen += 1
    if seen == marks:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return False
"""

TRAIN = (
    FORKS
    + """
import json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import little

folder, steps, kills = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
settings = json.loads(sys.argv[5])
run = little.new_run(folder / "a")
words = []

def work(mark):
    def log(record):
        run.append_metrics(record)
        mark()
    # Where there is a checkpoint, nothing of the model that is handed in may matter.
    made = little.model(seed=99 if (run.checkpoints / "last").exists() else 1)
    loader = little.real_loader(folder / "shards")
    little.go(made, loader, run, resume=True, log=log, steps=steps, **settings)

random.seed(7)
done = 0
while done < kills:
    # A step and its checkpoint take some milliseconds: the moment falls anywhere in them.
    if not killed_after(random.randint(1, 4), random.random() * 0.03, work):
        break
    done += 1
    words.append(sorted(path.name.split(".partial-")[0] for path in run.checkpoints.iterdir()))
killed_after(10**9, 0, work)
print(json.dumps({"kills": done, "left": words}))
"""
)


def script(text: str, *arguments: object) -> dict[str, Any]:
    """Run a script; what it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", text, str(Path(__file__).parent), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


CASES: dict[str, dict[str, Any]] = {
    "muon bf16, a checkpoint a step": {"precision": "bf16", "checkpoint_every_steps": 1},
    "adamw float32, one in three": {"optimizer": "adamw", "checkpoint_every_steps": 3, "micro_batch_rows": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_twenty_times_is_never_killed(tmp_path: Path, case: str) -> None:
    settings = CASES[case]
    steps = STEPS if settings["checkpoint_every_steps"] == 1 else STEPS // 2
    little.shards(tmp_path / "shards")
    found = script(TRAIN, tmp_path, steps, KILLS, json.dumps(settings))
    run = little.new_run(tmp_path / "a")
    assert found["kills"] >= (KILLS if settings["checkpoint_every_steps"] == 1 else 8), found
    last = checkpoint.pointed(run.checkpoints, "last")
    assert last is not None and last.name == checkpoint.folder_name(steps)
    whole = little.go(loader=little.real_loader(tmp_path / "shards"), steps=steps, **settings)
    assert little.same(checkpoint.load_weights(last), whole.weights)
    # The record, too, has no gap and no double, and says what was trained.
    trained = [record for record in run.read_metrics() if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, steps + 1))
    assert [record["loss"] for record in trained] == whole.losses()
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")]


WRITE = (
    FORKS
    + """
import json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import little
import torch
from ratoon.model.folder import read_model, write_model
from ratoon.store.atomic import sweep

folder = Path(sys.argv[2]) / "model"
old, new = little.model(seed=1, width=256, mlp_width=512), little.model(seed=2, width=256, mlp_width=512)
write_model(old, folder, extra_files={"note.txt": b"old"})
seen = {"old": 0, "new": 0, "half-written siblings": 0}

def work(mark):
    mark()
    write_model(new, folder, extra_files={"note.txt": b"new"}, replace=True)

def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

random.seed(3)
started = time.perf_counter()
write_model(old, folder, extra_files={"note.txt": b"old"}, replace=True)
takes = time.perf_counter() - started
for _ in range(40):
    killed_after(1, random.random() * 1.6 * takes, work)
    seen["half-written siblings"] += len([p for p in folder.parent.iterdir() if p.name.startswith(".")]) > 0
    sweep(folder.parent)
    assert [p.name for p in folder.parent.iterdir()] == ["model"], list(folder.parent.iterdir())
    found, note = read_model(folder), (folder / "note.txt").read_bytes()
    which = "old" if same(found, old) else "new"
    assert same(found, {"old": old, "new": new}[which]) and note == which.encode(), (which, note)
    seen[which] += 1
    if which == "new":
        write_model(old, folder, extra_files={"note.txt": b"old"}, replace=True)
print(json.dumps(seen))
"""
)


def test_a_model_folder_is_the_old_or_the_new(tmp_path: Path) -> None:
    seen = script(WRITE, tmp_path)
    assert seen["old"] and seen["new"] and seen["half-written siblings"], seen
    read_model(tmp_path / "model")
