"""What `update.c` does, as calls on tensors; on machines without a compiler, and on a GPU, torch does the same.

Decides when the C code is used. What it computes is said where it is called: `weights.py`, `optim.py`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ratoon.model.native import Unavailable, library

_NUMBERS = ("rate", "beta1", "beta2", "epsilon", "decay", "step", "factor")


class _AdamW(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "threads")),
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "mean", "square", "low")),
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


def collect(gradients: Sequence[Tensor], starts: Sequence[int], summed: Tensor) -> None:
    """summed[start:] += gradient (bfloat16) for each; the starts ascend."""
    code, count = _code(), len(gradients)
    assert code is not None
    numbers, pointers = ctypes.c_int64 * count, ctypes.c_void_p * count
    code.ratoon_collect(
        pointers(*(one.data_ptr() for one in gradients)),
        numbers(*starts),
        numbers(*(one.numel() for one in gradients)),
        ctypes.c_int64(count),
        ctypes.c_void_p(summed.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )


def norm(vector: Tensor) -> float:
    """The length of a float32 vector."""
    code = _code()
    assert code is not None
    arguments = ctypes.c_void_p(vector.data_ptr()), ctypes.c_int64(vector.numel())
    squares = float(code.ratoon_square_sum(*arguments, ctypes.c_int64(torch.get_num_threads())))
    return math.sqrt(squares)


def adamw(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, low: Tensor | None, **numbers: float) -> None:
    """One step of AdamW on `gradient` · factor, which is 0 afterwards; `low` (bfloat16) gets the rounded weights."""
    code = _code()
    assert code is not None and numbers.keys() == set(_NUMBERS)
    tensors = {"weight": weight, "gradient": gradient, "mean": mean, "square": square}
    call = _AdamW(n=weight.numel(), threads=torch.get_num_threads(), **numbers)
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
    call.low = None if low is None else low.data_ptr()
    code.ratoon_adamw(ctypes.byref(call))
