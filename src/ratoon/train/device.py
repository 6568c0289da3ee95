"""Where training runs: device, precision, processes, and how many rows fit at once.

Decides from the machine and the settings; says what it decided.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ratoon.base.errors import ConfigError, RatoonError
from ratoon.model.attention import PLAIN_LIMIT_TOKENS
from ratoon.model.config import ModelConfig
from ratoon.model.count import kept_activations
from ratoon.model.native import processor_flags
from ratoon.train.settings import TrainSettings

MEMORY_SHARE = 0.6
"""Share of the free memory that a micro-batch may plan with: the rest is for what the estimate does not see."""

CPU_MICRO_BATCH_TOKENS = 4096
"""Tokens that keep a CPU's matrix products busy: more of them at once are no faster (benchmarks/LOG.md) and only need
more memory. A GPU takes what fits."""

PATIENCE_HOURS = 12
"""How long processes wait for the first one while it evaluates and saves; a process that ended is noticed at once."""


@dataclass(frozen=True)
class Place:
    """A device and a precision: `work` is the type of the weights the model computes with, `autocast` the lower one
    used inside operations, if any; `products`: those with frozen matrices, exact or int8."""

    device: torch.device
    precision: str
    work: torch.dtype
    autocast: torch.dtype | None
    products: str = "exact"

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The context in which the forward pass runs."""
        if self.autocast is None:
            yield
        else:
            with torch.autocast(self.device.type, dtype=self.autocast):
                yield


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX, or Arm's bf16)."""
    return not processor_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def fast_dtype() -> str:
    """What a model is best held in here: bfloat16 where it is multiplied fast, else float32."""
    fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_fast_bf16()
    return "bfloat16" if fast else "float32"


def find_place(settings: TrainSettings) -> Place:
    """The device there is (a GPU before the CPU) and the precision that `settings.precision` means on it."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if fast_dtype() == "bfloat16" else "float32"
    work = torch.bfloat16 if precision == "bf16" else torch.float32
    low = {"autocast-bf16": torch.bfloat16, "autocast-fp16": torch.float16}.get(precision)
    return Place(device, precision, work, low, settings.frozen_products)


class World:
    """The processes that train together. Started by `torchrun`; one process alone is a world of one."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._started_here = False
        if self.size > 1 and not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=PATIENCE_HOURS))
            self._started_here = True

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Something all processes do at once; fails clearly in those that are left when another one ended."""
        try:
            yield
        except RuntimeError as error:
            raise RatoonError(
                "another process of this run ended",
                where=f"process {self.rank} of {self.size}",
                fix="its own message says why; then run the same command with --resume",
            ) from error

    def add_up(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)

    def share(self, value: float) -> float:
        """The first process's `value`, in every process."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        if torch.cuda.is_available():
            tensor = tensor.cuda()
        with self._together():
            dist.broadcast(tensor, 0)
        return float(tensor.item())

    def gather(self, names: list[str]) -> list[str]:
        """The names of all processes, in their order, in every process."""
        if self.size == 1:
            return names
        found: list[list[str]] = [[] for _ in range(self.size)]
        with self._together():
            dist.all_gather_object(found, names)
        return [name for part in found for name in part]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            with self._together():
                dist.barrier()

    def close(self) -> None:
        """Leave the group, if it was joined here."""
        if self._started_here and dist.is_initialized():
            dist.destroy_process_group()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_bytes(device: torch.device) -> int:
    """Memory in use by this process: resident on a CPU, peak allocated on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def activation_bytes(cfg: ModelConfig, tokens: int, context_tokens: int, place: Place, recompute: bool) -> int:
    """About how much a forward pass over `tokens` keeps for the backward pass on `place`; on the high side."""
    low = 2 if (place.autocast or place.work) in (torch.bfloat16, torch.float16) else 4
    keeps_scores = place.device.type == "cpu" and context_tokens <= PLAIN_LIMIT_TOKENS
    return kept_activations(cfg, tokens, context_tokens, low, recompute, keeps_scores)


def fit_rows(
    cfg: ModelConfig | Sequence[ModelConfig], settings: TrainSettings, place: Place, rows: int, trained: int
) -> int:
    """Rows of a micro-batch: `rows` halved (rounding up) until they fit the free memory, and on a CPU until they are
    few enough to be no slower.

    `cfg`: the settings of the model, or of its parts; `trained`: parameters with a gradient. Raises `ConfigError` when
    not even one row fits.
    """
    if settings.micro_batch_rows is not None:
        return min(rows, settings.micro_batch_rows)
    cfgs = [cfg] if isinstance(cfg, ModelConfig) else cfg
    budget = free_bytes(place.device) * MEMORY_SHARE
    optimizer = trained * ((12 if place.work != torch.float32 else 8) + 2 * settings.moment_bytes)
    micro = rows
    while place.device.type == "cpu" and micro > 1 and micro * settings.context_tokens > CPU_MICRO_BATCH_TOKENS:
        micro = (micro + 1) // 2
    while True:
        tokens = micro * settings.context_tokens
        need = optimizer + sum(
            activation_bytes(one, tokens, settings.context_tokens, place, settings.recompute_blocks) for one in cfgs
        )
        if need <= budget:
            return micro
        if micro == 1:
            raise ConfigError(
                f"one row of {settings.context_tokens} tokens needs about {need / 2**30:.1f} GiB",
                where="train.context_tokens",
                expected=f"at most {budget / 2**30:.1f} GiB ({MEMORY_SHARE:.0%} of what is free)",
                fix="shorten context_tokens, choose a smaller model, or set recompute_blocks: true",
            )
        micro = (micro + 1) // 2
