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


VERB = (
    FORKS
    + """
import json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
os.chdir(sys.argv[2])
import torch
import ratoon.cli.machine, ratoon.data.prepare, ratoon.data.loader, ratoon.evaluate.run, ratoon.generate.lm
import ratoon.model.folder, ratoon.report.page, ratoon.train.loop, ratoon.train.track
from ratoon.cli.pretrain import run_recipe
from ratoon.recipe import load

table, kills = json.loads(sys.argv[3]), int(sys.argv[4])
sys.stderr = open("stderr.txt", "w")

def pretrain(name):
    # As a user would: the same command, with --resume once there is something to resume.
    def work(mark):
        mark()
        started = (Path("runs") / name / "manifest.json").exists()
        run_recipe(load({**table, "name": name}), resume=started)
    return work

began = time.perf_counter()
killed_after(10**9, 0, pretrain("whole"))
takes = time.perf_counter() - began
random.seed(5)
reached = []
for _ in range(kills):
    if not killed_after(1, random.random() * 0.1 * takes, pretrain("killed")):
        break
    folder = Path("runs") / "killed"
    state = json.loads((folder / "manifest.json").read_text()) if (folder / "manifest.json").exists() else {}
    reached.append([state.get("status"), (folder / "data").exists(), len(list(folder.glob("checkpoints/step-*")))])
else:
    killed_after(10**9, 0, pretrain("killed"))
print(json.dumps({"reached": reached, "takes": takes}))
"""
)


@pytest.mark.slow
def test_pretrain_killed_anywhere_between_text_and_page(tmp_path: Path) -> None:
    """The verb, killed while it prepares, trains, saves, evaluates and writes: the model is the same to the bit."""
    text = "".join(f"Shoot number {i} of row {i % 7} is {'green' if i % 3 else 'dry'}.\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    table = {
        "data": {"sources": ["text.txt"], "vocab_size": 300, "split_documents": "lines"},
        "model": {"size": "tiny", "settings": {"layers": 1, "width": 16, "heads": 2}},
        "train": {
            "steps": 30,
            "rows": 8,
            "context_tokens": 16,
            "precision": "float32",
            "compile": "off",
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
        },
        "samples": ["Shoot"],
        "sample_tokens": 4,
    }
    found = script(VERB, tmp_path, json.dumps(table), KILLS)
    runs = tmp_path / "runs"
    assert len(found["reached"]) >= 5, found
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (runs / "killed" / "model" / name).read_bytes() == (runs / "whole" / "model" / name).read_bytes(), name
    for name in ("whole", "killed"):
        state = json.loads((runs / name / "manifest.json").read_text(encoding="utf-8"))
        assert state["status"] == "done"
        assert (runs / name / "report.html").is_file()
    losses = [
        [record["loss"] for record in little.new_run(runs / name).read_metrics() if record["kind"] in ("train", "eval")]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
