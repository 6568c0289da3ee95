"""What `update.c` does, as calls on tensors; on machines without a compiler, and on a GPU, torch does the same.

Decides when the C code is used. What it computes is said where it is called: `weights.py`, `optim.py`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratoon.model.native import Unavailable, library

_NUMBERS = ("rate", "beta1", "beta2", "epsilon", "decay", "step", "factor")
_TENSORS = ("weight", "gradient", "mean", "square", "low_mean", "low_square", "low", "rest")
_32_BITS = 0xFFFFFFFF

Parts = Sequence[tuple[int, Tensor]]
"""bfloat16 gradients and where each begins in the flat vector; the places ascend."""


class _Parts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gradient", "start", "count")),
        ("parts", ctypes.c_int64),
    ]


class _AdamW(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "threads")),
        *((name, ctypes.c_void_p) for name in (*_TENSORS, "parts")),
        *((name, ctypes.c_double) for name in _NUMBERS),
    ]


@functools.cache
def _code() -> ctypes.CDLL | None:
    try:
        code = library(Path(__file__).with_name("update.c"), "-fopenmp")
    except Unavailable:
        return None
    code.ratoon_square_sum.restype = ctypes.c_double
    return code


def usable(tensor: Tensor) -> bool:
    """Whether the C code can work on a tensor of that kind."""
    return tensor.device.type == "cpu" and _code() is not None


def _lying(parts: Parts) -> tuple[_Parts, list[Any]]:
    """The parts as the C code takes them, and what must live while it works."""
    tensors = [tensor.contiguous() for _, tensor in parts]
    numbers, pointers = ctypes.c_int64 * len(parts), ctypes.c_void_p * len(parts)
    kept: list[Any] = [
        pointers(*(one.data_ptr() for one in tensors)),
        numbers(*(start for start, _ in parts)),
        numbers(*(one.numel() for one in tensors)),
    ]
    return _Parts(*(ctypes.addressof(one) for one in kept), len(parts)), [*kept, tensors]


def collect(parts: Parts, summed: Tensor) -> None:
    """summed[start:] += gradient for each part."""
    code = _code()
    assert code is not None
    lying, kept = _lying(parts)
    pointer, threads = ctypes.c_void_p(summed.data_ptr()), ctypes.c_int64(torch.get_num_threads())
    code.ratoon_collect(ctypes.byref(lying), pointer, threads)
    del kept


def norm(vector: Tensor | None, parts: Parts = (), size: int = 0) -> float:
    """The length of a float32 vector; without one, of `size` numbers that are 0 beside the parts."""
    code = _code()
    assert code is not None
    lying, kept = _lying(parts)
    n = ctypes.c_int64(size if vector is None else vector.numel())
    pointer = ctypes.c_void_p(None if vector is None else vector.data_ptr())
    squares = float(code.ratoon_square_sum(pointer, ctypes.byref(lying), n, ctypes.c_int64(torch.get_num_threads())))
    del kept
    return math.sqrt(squares)


def narrow(value: Tensor, low: Tensor) -> None:
    """Round float32 numbers into `low` (bfloat16): to the nearest, halves away from 0, as `adamw` does."""
    code = _code()
    assert code is not None and value.is_contiguous() and low.is_contiguous()
    n, pointer = ctypes.c_int64(value.numel()), ctypes.c_void_p(low.data_ptr())
    code.ratoon_narrow(ctypes.c_void_p(value.data_ptr()), n, pointer)


def split(value: Tensor, high: Tensor, rest: Tensor) -> None:
    """Put float32 numbers into `high` (bfloat16, rounded as `narrow` does) and `rest` (int16: what the rounding left,
    in units of float32's last place); `join` gives them again, bit for bit."""
    code = _code()
    assert code is not None and value.is_contiguous() and high.is_contiguous() and rest.is_contiguous()
    pointers = (ctypes.c_void_p(one.data_ptr()) for one in (high, rest))
    code.ratoon_split(ctypes.c_void_p(value.data_ptr()), ctypes.c_int64(value.numel()), *pointers)


def join(high: Tensor, rest: Tensor) -> Tensor:
    """The float32 numbers that `split` took apart."""
    code = _code()
    assert code is not None and high.is_contiguous() and rest.is_contiguous()
    value = torch.empty(high.shape, dtype=torch.float32)
    pointers = (ctypes.c_void_p(one.data_ptr()) for one in (high, rest))
    code.ratoon_join(*pointers, ctypes.c_int64(high.numel()), ctypes.c_void_p(value.data_ptr()))
    return value


def narrow_moments(mean: Tensor, square: Tensor, low_mean: Tensor, low_square: Tensor, *, step: int) -> None:
    """Round float32 moments into bfloat16, up or down by chance, each as likely as the number lies near to it: on
    average nothing is lost, where rounding to the nearest would lose every change below 1/512.

    The chance is that of a number's place and of `step`: the same in all processes, and again on resuming.
    """
    if usable(mean) and mean.is_contiguous() and square.is_contiguous():
        code = _code()
        assert code is not None and low_mean.is_contiguous() and low_square.is_contiguous()
        from_, to = (
            [ctypes.c_void_p(one.data_ptr()) for one in pair] for pair in ((mean, square), (low_mean, low_square))
        )
        code.ratoon_narrow_moments(*from_, ctypes.c_int64(mean.numel()), ctypes.c_int64(step), *to)
        return
    narrow_moments_by_torch(mean, square, low_mean, low_square, step=step)


def narrow_moments_by_torch(mean: Tensor, square: Tensor, low_mean: Tensor, low_square: Tensor, *, step: int) -> None:
    """The same, bit for bit, where there is no compiler, and on a GPU."""
    x = torch.arange(mean.numel(), dtype=torch.int64, device=mean.device)
    x = (x * 0x9E3779B1 + step * 0x85EBCA77) & _32_BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _32_BITS
    x = x ^ (x >> 16)
    for value, low, odds in ((mean, low_mean, x & 0xFFFF), (square, low_square, x >> 16)):
        bits = (value.view(torch.int32).to(torch.int64) & _32_BITS) + odds
        rounded = (((bits >> 16) & 0xFFFF) << 16).to(torch.int32).view(torch.float32)
        low.copy_(torch.where(value.isnan(), value, rounded))


def adamw(
    *,
    mean: Tensor,
    square: Tensor,
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
    low: Tensor | None = None,
    rest: Tensor | None = None,
    parts: Parts = (),
    **numbers: float,
) -> None:
    """One step of AdamW on `gradient` · factor, which is 0 afterwards; `low` (bfloat16) gets the rounded weights.

    Both moments are float32, or both bfloat16, rounded as `narrow_moments` does.
    Without `weight` the weights are `low` and `rest` (see `split`); without `gradient` it is that of the parts.
    """
    code = _code()
    assert code is not None and numbers.keys() == set(_NUMBERS)
    lying, kept = _lying(parts)
    assert mean.dtype == square.dtype
    lower = "low_" if mean.dtype == torch.bfloat16 else ""
    moments = {f"{lower}mean": mean, f"{lower}square": square}
    tensors = {"weight": weight, "gradient": gradient, "low": low, "rest": rest, **moments}
    call = _AdamW(n=mean.numel(), threads=torch.get_num_threads(), parts=ctypes.addressof(lying), **numbers)
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    code.ratoon_adamw(ctypes.byref(call))
    del kept
