"""`ratoon doctor`: looks at this machine, measures what decides how fast it trains, and trains a toy on it.

Decides what is looked at, what counts as a problem, and what is advised. The parts themselves (compiler, allocator,
loop) are those that training uses.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from ratoon.data.batch import Batch

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "pydantic")
OPTIONAL = {
    "pyarrow": ("parquet files as a source", "ratoon[data]"),
    "zstandard": ("files ending in .zst as a source", "ratoon[data]"),
    "tensorboard": ("track: [tensorboard]", "ratoon[track]"),
    "wandb": ("track: [wandb]", "ratoon[track]"),
    "mlflow-skinny": ("track: [mlflow]", "ratoon[track]"),
    "transformers": ("comparing logits with Transformers' in `ratoon verify`", "transformers"),
}
LEAST_MEMORY_BYTES = 2 * 10**9
LEAST_DISK_BYTES = 3 * 10**9
"""About what the largest of the catalogue, its folder and a run's checkpoints take."""
BUSY_LOAD_FRACTION = 0.75
"""Of the cores; one more program is Ratoon itself."""

PRODUCT_SIDE = 1024
MEASURE_SECONDS = 0.4
BLOCK_NUMBERS = 8 * 2**20
"""A tensor of 32 MiB: of the size that training makes and drops many times a step."""

TOY_STEPS, TOY_ROWS, TOY_TOKENS = 40, 16, 64
LEARNED_FRACTION = 0.9
"""The toy has learned when its loss ends below this share of its first one; it ends far below."""


@dataclass(frozen=True)
class Finding:
    """Something that was looked at: what was found, and, if it is a problem, what to do."""

    name: str
    found: str
    ok: bool = True
    advice: str | None = None
    fatal: bool = False
    """Training does not work here; everything else costs speed or a feature."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print every finding as JSON.")
def command(as_json: bool) -> None:
    """Look at this machine: versions, compilers, threads, allocator, memory, disk, speed; and train a toy on it.

    Each problem comes with what to do about it. Exits with 1 only if training does not work here.
    """
    from ratoon.cli.output import aligned, answer, answer_json, talk

    facts: dict[str, Any] = {}
    findings = []
    for finding in examine(facts):
        talk(f"  {finding.name}: {'ok' if finding.ok else 'see below'}")
        findings.append(finding)
    problems = [finding for finding in findings if not finding.ok]
    if as_json:
        answer_json({"ok": not problems, "findings": [asdict(finding) for finding in findings], **facts})
    else:
        answer("\n".join(aligned([(finding.name, finding.found) for finding in findings])))
        for finding in problems:
            answer(f"{'PROBLEM' if finding.fatal else 'advice'}: {finding.name}: {finding.advice}")
        if not problems:
            answer("nothing to mend")
    if any(finding.fatal for finding in problems):
        sys.exit(1)


def examine(facts: dict[str, Any]) -> Iterator[Finding]:
    """Every finding, as it is made; figures for programs are put into `facts`."""
    # First of all: what the allocator costs untuned can only be measured before anything tunes it.
    allocator = _allocator(facts)
    yield from _machine(facts)
    yield _threads(facts)
    yield _load(facts)
    yield allocator
    yield _memory(facts)
    yield _disk(facts)
    yield from _speed(facts)
    yield _gpu(facts)
    yield from _compilers(facts)
    yield from _packages(facts)
    yield _cache(facts)
    yield _toy(facts)


def _machine(facts: dict[str, Any]) -> Iterator[Finding]:
    from ratoon import __version__
    from ratoon.cli.machine import machine
    from ratoon.store.artifact import versions

    found = machine()
    facts["machine"] = found
    facts["versions"] = {"ratoon": __version__, "python": found["python"], **versions(*LIBRARIES)}
    yield Finding("machine", f"{found['system']}, {found['processor']}, {found['cores']} cores")
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))


def _threads(facts: dict[str, Any]) -> Finding:
    cores, threads = facts["machine"]["cores"], facts["machine"]["threads"]
    given = os.environ.get("OMP_NUM_THREADS")
    found = f"{threads} for {cores} cores" + (f" (OMP_NUM_THREADS={given})" if given else "")
    if threads == cores:
        return Finding("threads", found)
    doing = "leaves cores idle" if threads < cores else "lets threads wait for each other"
    undo = "unset OMP_NUM_THREADS" if given else f"set OMP_NUM_THREADS={cores}"
    return Finding("threads", found, False, f"that {doing}: {undo}, unless other programs need the machine too")


def _load(facts: dict[str, Any]) -> Finding:
    """Whether other programs use the cores: every figure below is then lower than it could be."""
    cores = facts["machine"]["cores"]
    if not hasattr(os, "getloadavg"):
        return Finding("load", "this system does not tell")
    load = os.getloadavg()[0]
    facts["load"] = load
    found = f"{load:.1f} programs want to run, on {cores} cores"
    if load <= BUSY_LOAD_FRACTION * cores + 1:
        return Finding("load", found)
    return Finding("load", found, False, "others use the cores, so the speeds here are too low: look again when idle")


def _allocator(facts: dict[str, Any]) -> Finding:
    from ratoon.model.allocator import tune_allocator

    before = _block_seconds()
    sentence = tune_allocator()
    after = _block_seconds()
    facts["allocator"] = {"done": sentence, "before_seconds": before, "after_seconds": after}
    cost = (
        f"a new block of {BLOCK_NUMBERS * 4 // 2**20} MiB takes {before * 1e3:.1f} ms before, {after * 1e3:.1f} after"
    )
    left_alone = "partly tuned" in sentence or "cannot be reached" in sentence
    return Finding(
        "allocator",
        f"{sentence}; {cost}",
        not left_alone,
        "freed memory goes back to the system and costs page faults: preload jemalloc (LD_PRELOAD) when training"
        if left_alone
        else None,
    )


def _block_seconds() -> float:
    """Seconds to make a large tensor, fill it and drop it; the best of a few."""
    import torch

    source = torch.ones(BLOCK_NUMBERS)

    def once() -> None:
        source.neg()

    return _best_seconds(once, 0.15)


def _best_seconds(action: Callable[[], None], seconds: float) -> float:
    """The shortest of the runs that fit into about `seconds`, after one that does not count."""
    action()
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        action()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= until:
            return best


def _memory(facts: dict[str, Any]) -> Finding:
    import psutil

    from ratoon.cli.output import size_words

    memory = psutil.virtual_memory()
    facts["memory"] = {"total_bytes": int(memory.total), "available_bytes": int(memory.available)}
    found = f"{size_words(memory.available)} of {size_words(memory.total)} available"
    if memory.available >= LEAST_MEMORY_BYTES:
        return Finding("memory", found)
    return Finding("memory", found, False, "close other programs, or choose size: tiny and recompute_blocks: true")


def _disk(facts: dict[str, Any]) -> Finding:
    from ratoon.cli.output import size_words

    free = shutil.disk_usage(Path.cwd()).free
    facts["disk"] = {"folder": str(Path.cwd()), "free_bytes": free}
    found = f"{size_words(free)} free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("disk", found + ", not writable", False, "runs are written to ./runs: go to a folder of yours")
    if free >= LEAST_DISK_BYTES:
        return Finding("disk", found)
    return Finding("disk", found, False, "free some space, or lower train.keep_checkpoints")


def _speed(facts: dict[str, Any]) -> Iterator[Finding]:
    """Matrix products in float32 and bfloat16: the ceiling of training on this processor."""
    import torch

    from ratoon.train.device import has_fast_bf16

    rates = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        rates[name] = _product_rate(torch.ones(PRODUCT_SIDE, PRODUCT_SIDE, dtype=dtype))
    native = has_fast_bf16()
    facts["matmul_gflops"] = rates
    facts["bf16_native"] = native
    found = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in rates.items())
    yield Finding("matrix products", f"{found} ({PRODUCT_SIDE} x {PRODUCT_SIDE}, {torch.get_num_threads()} threads)")
    slow = native and rates["bf16"] < rates["float32"]
    how = "the processor multiplies it" if native else "not in this processor: train.precision auto means float32"
    advice = "it is slower than float32 here: set train.precision=float32" if slow else None
    yield Finding("bf16", how, not slow, advice)


def _product_rate(square: torch.Tensor) -> float:
    """Billions of operations a second of a product of two square matrices."""
    import torch

    def once() -> None:
        torch.mm(square, square)

    return 2 * len(square) ** 3 / _best_seconds(once, MEASURE_SECONDS) / 1e9


def _gpu(facts: dict[str, Any]) -> Finding:
    import torch

    from ratoon.cli.output import size_words

    if torch.cuda.is_available():
        found = facts["machine"]
        name = f"{found['gpu']}, {size_words(found['gpu_memory_bytes'])}"
        rate = _gpu_rate()
        facts["gpu_matmul_gflops"] = rate
        return Finding("GPU", f"{name}, bf16 {rate:,.0f} GFLOP/s")
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "none; the processor trains")
    return Finding(
        "GPU",
        f"nvidia-smi is here, but torch {torch.__version__} sees no GPU",
        False,
        "install a torch built for this driver (https://pytorch.org/get-started)",
    )


def _gpu_rate() -> float:
    import torch

    square = torch.ones(8 * PRODUCT_SIDE, 8 * PRODUCT_SIDE, dtype=torch.bfloat16, device="cuda")

    def once() -> None:
        torch.mm(square, square)
        torch.cuda.synchronize()

    return 2 * len(square) ** 3 / _best_seconds(once, MEASURE_SECONDS) / 1e9


def _compilers(facts: dict[str, Any]) -> Iterator[Finding]:
    """Both compilers at work: torch.compile on a line, and the decoding step in C."""
    from ratoon.generate.native import kernel
    from ratoon.model import fused
    from ratoon.model.native import Unavailable
    from ratoon.train.compiled import missing_compiler

    began = time.perf_counter()
    reason = missing_compiler()
    facts["torch_compile"] = {"works": reason is None, "reason": reason}
    if reason is None:
        yield Finding("torch.compile", f"works (a line in {time.perf_counter() - began:.1f} s)")
    else:
        advice = "install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
        yield Finding("torch.compile", reason, False, f"training runs uncompiled, which is slower: {advice}")
    try:
        kernel()
    except Unavailable as error:
        facts["c_step"] = {"works": False, "reason": str(error)}
        advice = "install a C compiler (Debian, Ubuntu: apt install gcc; macOS: xcode-select --install)"
        yield Finding("C step", str(error), False, f"generating text goes through torch, which is slower: {advice}")
    else:
        facts["c_step"] = {"works": True, "reason": None}
        yield Finding("C step", "compiled for this processor: generating text does not need torch's calls")
    reason = fused.missing()
    facts["c_training"] = {"works": reason is None, "reason": reason}
    yield Finding(
        "C training",
        "compiled for this processor: attention, losses and gradients of bfloat16 training need fewer of torch's calls"
        if reason is None
        else f"not used: {reason}; training goes through torch alone",
    )


def _packages(facts: dict[str, Any]) -> Iterator[Finding]:
    """Optional packages; a missing one is no problem until it is wanted."""
    here, missing = {}, []
    for package, (purpose, extra) in OPTIONAL.items():
        try:
            here[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append((package, purpose, extra))
    facts["optional"] = {
        "installed": here,
        "missing": [{"package": name, "for": purpose, "install": extra} for name, purpose, extra in missing],
    }
    if here:
        yield Finding("optional packages", ", ".join(f"{name} {version}" for name, version in here.items()))
    for name, purpose, extra in missing:
        yield Finding(f"without {name}", f'no {purpose}; pip install "{extra}" brings it')


def _cache(facts: dict[str, Any]) -> Finding:
    from ratoon.base.catalog import HOME_VARIABLE, home
    from ratoon.base.errors import StorageError
    from ratoon.cli.output import size_words
    from ratoon.store.atomic import write_text

    folder = home()
    probe = folder / ".doctor"
    try:
        write_text(probe, "written to see whether it can be\n")
        probe.unlink()
    except (StorageError, OSError) as error:
        facts["cache"] = {"folder": str(folder), "writable": False}
        reason = error.found if isinstance(error, StorageError) else str(error)
        return Finding("cache folder", f"{folder}: {reason}", False, f"let {HOME_VARIABLE} name a folder of yours")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    facts["cache"] = {"folder": str(folder), "writable": True, "bytes": size}
    return Finding("cache folder", f"{folder}, {size_words(size)}, {size_words(shutil.disk_usage(folder).free)} free")


def _toy(facts: dict[str, Any]) -> Finding:
    """Train a toy through the one loop and look whether its loss goes down."""
    from ratoon.base.errors import RatoonError
    from ratoon.base.settings import build
    from ratoon.model.config import ModelConfig
    from ratoon.model.init import init_weights
    from ratoon.model.transformer import Transformer
    from ratoon.train.loop import Hooks, train
    from ratoon.train.settings import TrainSettings

    table = {"steps": TOY_STEPS, "rows": TOY_ROWS, "context_tokens": TOY_TOKENS, "compile": "off"}
    settings = build(TrainSettings, {**table, "log_every_steps": TOY_STEPS // 4}, where="toy")
    shape = {"vocab_size": 256, "layers": 2, "width": 64, "heads": 4, "mlp_width": 256, "context_tokens": TOY_TOKENS}
    model = Transformer(build(ModelConfig, shape, where="toy"))
    init_weights(model, 1)
    records: list[dict[str, Any]] = []
    began = time.perf_counter()
    try:
        train(model, _Toy(), settings, hooks=Hooks(log=records.append))
    except RatoonError as error:
        facts["toy"] = {"works": False, "reason": error.found}
        return Finding("toy", f"training failed: {error.found}", False, error.fix or "report this", True)
    first, last = records[0]["loss"], records[-1]["loss"]
    rate = max(record["tokens_per_second"] for record in records[1:])
    facts["toy"] = {
        "works": last < LEARNED_FRACTION * first,
        "first_loss": first,
        "last_loss": last,
        "tokens_per_second": rate,
        "seconds": time.perf_counter() - began,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    found = (
        f"{facts['toy']['parameters']:,} parameters, {TOY_STEPS} steps in {facts['toy']['seconds']:.1f} s: "
        f"loss {first:.2f} -> {last:.2f}, {rate:,.0f} tokens/s"
    )
    if facts["toy"]["works"]:
        return Finding("toy", found)
    return Finding("toy", found, False, "its loss should have fallen: run `make test` and report what fails", True)


class _Toy:
    """Rows of bytes from Python's own documentation, which every machine has."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        import numpy as np

        text = "\n".join(topics.values()).encode("utf-8")[: 1 << 20]
        self.ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def batch(self, step: int) -> Batch:
        import numpy as np

        from ratoon.base.seeds import stream
        from ratoon.data.batch import Batch

        starts = stream(1, "doctor", step).integers(0, len(self.ids) - TOY_TOKENS - 1, TOY_ROWS)
        window = self.ids[starts[:, None] + np.arange(TOY_TOKENS + 1)]
        shape = (TOY_ROWS, TOY_TOKENS)
        return Batch(
            ids_BT=window[:, :-1],
            targets_BT=window[:, 1:],
            weight_BT=np.ones(shape, np.float32),
            document_BT=np.zeros(shape, np.int32),
            position_BT=np.tile(np.arange(TOY_TOKENS), (TOY_ROWS, 1)),
            rows=tuple(f"byte {start}" for start in starts),
        )

    def state(self) -> dict[str, Any]:
        return {}
