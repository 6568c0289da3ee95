"""What goes wrong in training stops it before the weights move, is told once and clearly, and loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import little
from ratoon.base.errors import ConfigError, NumericError
from ratoon.data.batch import Batch
from ratoon.model.transformer import Transformer
from ratoon.store.runs import Run
from ratoon.train import checkpoint, device
from ratoon.train.loss import Inputs, next_token

BAD_STEP, BAD_ROW = 3, 5
NAME = f"little:{BAD_STEP}/{BAD_ROW}"


# -- numbers that are not finite ---------------------------------------------------------------------------------------


class Spoilt(little.Rows):
    """Rows as always, but for one number in one row of one step."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        if step == BAD_STEP:
            batch.weight_BT[BAD_ROW, 0] = self.value
        return batch


def spoilt_loss(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Next token, and a loss that is NaN where the bad row is in the batch."""
    loss, weight = next_token(model, inputs)
    return (loss * float("nan") if NAME in inputs.rows else loss), weight


def spoilt_gradient(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A finite loss with an infinite gradient for the bad row: √0."""
    loss, weight = next_token(model, inputs)
    if NAME in inputs.rows:
        loss = loss + ((model.embed.weight - model.embed.weight.detach()).sum() ** 2).sqrt()
    return loss, weight


def stopped(run: Run | None = None, **changes: Any) -> tuple[NumericError, little.Outcome]:
    with pytest.raises(NumericError) as caught:
        little.go(run=run, steps=8, **changes)
    return caught.value, caught.value.outcome  # type: ignore[attr-defined]


CASES: dict[str, dict[str, Any]] = {
    "NaN in the data": {"loader": Spoilt(float("nan"))},
    "infinity in the data": {"loader": Spoilt(float("inf"))},
    "NaN in the loss": {"objective": spoilt_loss},
    "infinite gradient": {"objective": spoilt_gradient},
}


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_it_stops_before_the_step_and_names_the_row(case: str, precision: str, micro: int) -> None:
    error, outcome = stopped(**CASES[case], precision=precision, micro_batch_rows=micro)
    assert error.found.startswith("the gradient norm" if case == "infinite gradient" else "the loss")
    assert f"at step {BAD_STEP}" in error.found and "weights were not touched" in error.found
    assert error.where == f"rows: {NAME}"
    assert "--resume" in str(error.fix)
    assert little.same(outcome.weights, weights_before(BAD_STEP, precision=precision, micro_batch_rows=micro))
    assert len(outcome.losses()) == BAD_STEP


def weights_before(step: int, **changes: Any) -> dict[str, Tensor]:
    """The weights that a run of 8 steps has when it asks for the batch of `step`."""

    class Ends(little.Rows):
        def batch(self, number: int) -> Batch:
            if number == step:
                raise EOFError
            return super().batch(number)

    with pytest.raises(EOFError) as caught:
        little.go(steps=8, loader=Ends(), **changes)
    outcome: little.Outcome = caught.value.outcome  # type: ignore[attr-defined]
    return outcome.weights


def test_float16_leaves_out_a_step_whose_gradient_overflows() -> None:
    """One step is left out and counted; the weights are what they were before it, and the run goes on."""
    seen: list[dict[str, Tensor]] = []

    def evaluate(step: int, model: Transformer) -> dict[str, Any]:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {}

    outcome = little.go(
        objective=spoilt_gradient, precision="autocast-fp16", steps=8, evaluate=evaluate, evaluate_every_steps=1
    )
    assert outcome.result is not None and outcome.result.steps == 8
    moved = [not little.same(one, other) for one, other in itertools.pairwise(seen)]
    assert moved == [step != BAD_STEP for step in range(8)]
    told = [record.get("skipped_steps", 0) for record in outcome.records if record["kind"] == "train"]
    assert told == [0] * BAD_STEP + [1] * (8 - BAD_STEP)
    assert [record for record in outcome.records if record["kind"] == "train"][BAD_STEP]["grad_norm"] is None


def test_float16_stops_when_no_scale_helps() -> None:
    def from_then_on(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
        loss, weight = next_token(model, inputs)
        if int(inputs.rows[0].split(":")[1].split("/")[0]) >= BAD_STEP:
            loss = loss + ((model.embed.weight - model.embed.weight.detach()).sum() ** 2).sqrt()
        return loss, weight

    with pytest.raises(NumericError, match="gradient norm became") as caught:
        little.go(objective=from_then_on, precision="autocast-fp16", steps=200, schedule="constant")
    outcome: little.Outcome = caught.value.outcome  # type: ignore[attr-defined]
    before = little.go(steps=BAD_STEP, precision="autocast-fp16", schedule="constant")
    assert little.same(outcome.weights, before.weights)
    assert len(outcome.losses()) < 60  # each try halves the scale


def test_a_batch_without_anything_to_learn_is_refused() -> None:
    class Masked(little.Rows):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            if step == 2:
                batch.weight_BT[:] = 0.0
            return batch

    error, _ = stopped(loader=Masked())
    assert "every weight is 0" in error.found and "step 2" in str(error.where)


def test_nan_in_the_weights_is_found_at_the_first_step() -> None:
    made = little.model()
    with torch.no_grad():
        made.layers[0].mlp.up.weight[3, 2] = float("nan")
    error, outcome = stopped(made=made)
    assert "at step 0" in error.found
    assert "none alone" in str(error.where) or "little:0/0" in str(error.where)
    assert outcome.losses() == []


def test_weights_that_became_infinite_are_never_saved(tmp_path: Path) -> None:
    """An update that overflows is seen before it is written down; the older checkpoint stays the last."""
    run = little.new_run(tmp_path / "a")

    def spoil(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            with torch.no_grad():
                made.embed.weight[0, 0] = float("inf")

    made = little.model()
    error, _ = stopped(run=run, made=made, checkpoint_every_steps=2, log=spoil)
    assert "not finite" in error.found or "became" in error.found
    last = checkpoint.pointed(run.checkpoints, "last")
    assert last is not None and last.name == "step-00000004"
    assert all(value.isfinite().all() for value in checkpoint.load_weights(last).values())


def test_a_stopped_run_goes_on_when_the_data_is_mended(tmp_path: Path) -> None:
    run = little.new_run(tmp_path / "a")
    stopped(run=run, loader=Spoilt(float("nan")), checkpoint_every_steps=1)
    rest = little.go(little.model(seed=9), run=run, steps=8, resume=True, checkpoint_every_steps=1)
    assert little.same(rest.weights, little.go(steps=8).weights)


# -- memory --------------------------------------------------------------------------------------------------------


def words_with_memory(monkeypatch: pytest.MonkeyPatch, free: int, **changes: Any) -> little.Outcome:
    monkeypatch.setattr(device, "free_bytes", lambda place: free)
    return little.go(steps=2, **changes)


def need(rows: int) -> int:
    """What the estimate says for a micro-batch of so many rows, as free memory that just suffices."""
    made, settings = little.model(), little.settings()
    trained = sum(p.numel() for p in made.parameters())
    place = device.find_place(settings)
    activations = device.activation_bytes(made.cfg, rows * little.TOKENS, little.TOKENS, place, False)
    return int((16 * trained + activations) / device.MEMORY_SHARE) + 1


def test_micro_batches_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = words_with_memory(monkeypatch, 1 << 40)
    assert plenty.told("8 rows a step in 1 micro-batches of 8")
    for rows in (4, 2, 1):
        outcome = words_with_memory(monkeypatch, need(rows))
        assert outcome.told(f"in {8 // rows} micro-batches of {rows}"), outcome.words
        assert little.largest_difference(outcome.weights, plenty.weights) < 1e-5


def test_what_never_fits_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="one row of 16 tokens needs about") as caught:
        words_with_memory(monkeypatch, need(1) // 2)
    assert "recompute_blocks" in str(caught.value.fix)


def test_recomputing_blocks_lets_more_rows_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made, settings = little.model(layers=12), little.settings()
    place = device.find_place(settings)
    plain, again = (
        device.activation_bytes(made.cfg, 1000, little.TOKENS, place, recompute) for recompute in (False, True)
    )
    assert again < plain / 2


def test_the_estimate_is_not_below_what_a_step_keeps() -> None:
    """Bytes the backward pass keeps of a forward pass, counted tensor by tensor, in float32."""
    for changes in ({}, {"mlp": "relu2"}, {"positions": "learned", "norm": "layer", "mlp": "gelu_tanh"}):
        made = little.model(width=64, mlp_width=256, layers=4, **changes)
        kept: dict[int, int] = {}
        own = {p.data_ptr() for p in made.parameters()}

        def pack(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
            return tensor

        batch = little.Rows(rows=16).batch(0)
        made.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = next_token(made, Inputs.of(batch, torch.device("cpu")))
        place = device.find_place(little.settings())
        estimate = device.activation_bytes(made.cfg, batch.ids_BT.size, little.TOKENS, place, False)
        assert sum(kept.values()) <= estimate <= 6 * sum(kept.values())
        del loss


# -- the disk ------------------------------------------------------------------------------------------------------

FULL = """
import json, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import little
from ratoon.base.errors import StorageError

run = little.new_run(Path(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def fill(record):
    # From here on no file may grow beyond 16 KiB: weights and optimizer do not fit.
    if record["kind"] == "train" and record["step"] == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))

try:
    little.go(run=run, steps=9, checkpoint_every_steps=2, log=fill)
except StorageError as error:
    print(json.dumps(error.as_dict()))
"""


def test_a_full_disk_leaves_the_older_checkpoints_whole(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    run = little.new_run(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(Path(__file__).parent), str(run.folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    error = json.loads(done.stdout.splitlines()[-1])
    assert error["error"] == "StorageError" and error["found"] == "the disk is full"
    assert "step-00000006" in error["where"] and "--resume" in error["fix"]
    found = checkpoint.complete(run.checkpoints)
    assert [folder.name for folder in found] == ["step-00000002", "step-00000004"]
    for folder in found:
        checkpoint.load_weights(folder)
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")]
    rest = little.go(little.model(seed=9), run=run, steps=9, checkpoint_every_steps=2, resume=True)
    assert rest.told("going on from step 4")
    assert little.same(rest.weights, little.go(steps=9).weights)


# -- no compiler ---------------------------------------------------------------------------------------------------

UNCOMPILED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import little
outcome = little.go(compile="auto", steps=3)
print(json.dumps({"words": outcome.words, "losses": outcome.losses()}))
"""


def test_without_a_compiler_it_says_so_and_gives_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCOMPILED, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CXX": str(tmp_path / "nowhere" / "g++"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    told = [sentence for sentence in found["words"] if sentence.startswith("not compiled, which costs speed")]
    assert len(told) == 1 and "g++" in told[0]
    assert found["losses"] == little.go(steps=3).losses()


def test_compile_off_is_said() -> None:
    assert little.go(steps=1, compile="off").told("not compiled: train.compile is off")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_compiled_is_eager(what: str) -> None:
    """Fused operations round in another order, and that is all they may do."""
    eager = little.go(steps=4, optimizer="adamw", epsilon=1e-2)
    compiled = little.go(steps=4, optimizer="adamw", epsilon=1e-2, compile=what)
    if compiled.told("which costs speed and nothing else"):
        pytest.skip("no compiler here")
    assert compiled.told("compiled")
    assert np.allclose(eager.losses(), compiled.losses(), rtol=1e-5)
    assert little.largest_difference(eager.weights, compiled.weights) < 1e-5


# -- Ctrl-C, as a user types it ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(own_folder: Path) -> None:
    text = "".join(f"Shoot number {i} of row {i % 7} is {'green' if i % 3 else 'dry'}.\n" for i in range(300))
    (own_folder / "text.txt").write_text(text, encoding="utf-8")
    (own_folder / "recipe.yaml").write_text(
        "name: a\n"
        "data: {sources: [text.txt], vocab_size: 300, split_documents: lines}\n"
        "model: {size: tiny, settings: {layers: 1, width: 16, heads: 2}}\n"
        "train: {steps: 100000, rows: 8, context_tokens: 16, precision: float32, compile: 'off', log_every_steps: 1}\n"
        "samples: [Shoot]\n"
        "sample_tokens: 4\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "ratoon", "pretrain", "recipe.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = Run(own_folder / "runs" / "a")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=own_folder, env=environment) as process:
        until = time.monotonic() + 120
        while sum(record["kind"] == "train" for record in run.read_metrics()) < 5:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    state = run.read_state()
    assert state["status"] == "interrupted" and "--resume" in state["reason"]
    last = checkpoint.pointed(run.checkpoints, "last")
    assert last is not None
    step = int(last.name.removeprefix("step-"))
    assert step >= 5
    more = [*command, "--resume", f"train.steps={step + 3}"]
    done = subprocess.run(more, capture_output=True, text=True, cwd=own_folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {step}" in done.stderr and "not bit for bit" in done.stderr
    assert run.read_state()["status"] == "done" and run.report.is_file()
    trained = [record["step"] for record in run.read_metrics() if record["kind"] == "train"]
    assert trained == list(range(1, step + 4))
