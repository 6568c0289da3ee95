"""GGUF's block formats -> float32 (the layouts of ggml's block_q… structures).

Each function takes blocks as bytes (N, bytes a block) and gives numbers (N, numbers a block).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _half(raw: Bytes) -> Floats:
    """Two bytes of each block as a float16 (N, 1)."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """Low halves of all bytes, then high halves."""
    return np.concatenate([raw & 0x0F, raw >> 4], axis=-1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """32 bits as 32 numbers 0 or 16."""
    return (np.unpackbits(raw, axis=-1, bitorder="little") << 4).astype(np.uint8)


def _q4_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4])


def _q5_0(b: Bytes) -> Floats:
    q = _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])
    return _half(b[:, :2]) * (q.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    q = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return _half(b[:, :2]) * q.astype(np.float32) + _half(b[:, 2:4])


def _q8_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _crumbs(raw: Bytes) -> Bytes:
    """Two-bit numbers: (N, 64) bytes -> (N, 256), in halves of 128 and there by shift 0, 2, 4, 6."""
    halves = raw.reshape(len(raw), 2, 1, 32)
    return ((halves >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(len(raw), 256).astype(np.uint8)


def _q2_k(b: Bytes) -> Floats:
    scales, q = b[:, :16], _crumbs(b[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    d, low = _half(b[:, 80:82]), _half(b[:, 82:84])
    steps, mins = d * (scales & 0x0F), low * (scales >> 4)
    values: Floats = (steps[:, :, None] * q - mins[:, :, None]).reshape(-1, 256)
    return values


def _q3_k(b: Bytes) -> Floats:
    bits = ((b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(-1, 256)
    q = _crumbs(b[:, 32:96]).astype(np.int8) - (4 - 4 * bits.astype(np.int8))
    raw = b[:, 96:108]
    low = np.concatenate([raw[:, :8] & 0x0F, raw[:, :8] >> 4], axis=1)
    high = ((raw[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(-1, 16)
    scales = (low | (high << 4)).astype(np.int8) - 32
    steps = _half(b[:, 108:110]) * scales
    values: Floats = (steps[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256).astype(np.float32)
    return values


def _scales_and_mins(raw: Bytes) -> tuple[Bytes, Bytes]:
    """The eight six-bit scales and mins that Q4_K and Q5_K pack into 12 bytes."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    mins = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=1)
    return scales, mins


def _q4_k(b: Bytes) -> Floats:
    scales, mins = _scales_and_mins(b[:, 4:16])
    halves = b[:, 16:].reshape(-1, 4, 1, 32)
    q = ((halves >> np.array([0, 4], np.uint8)[:, None]) & 0x0F).reshape(-1, 8, 32).astype(np.float32)
    steps, low = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * mins
    return (steps[:, :, None] * q - low[:, :, None]).reshape(-1, 256)


def _q5_k(b: Bytes) -> Floats:
    scales, mins = _scales_and_mins(b[:, 4:16])
    halves = b[:, 48:].reshape(-1, 4, 1, 32)
    q = ((halves >> np.array([0, 4], np.uint8)[:, None]) & 0x0F).reshape(-1, 8, 32)
    high = (b[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    values = (q | (high << 4)).astype(np.float32)
    steps, low = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * mins
    return (steps[:, :, None] * values - low[:, :, None]).reshape(-1, 256)


def _q6_k(b: Bytes) -> Floats:
    low = ((b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]) & 0x0F).reshape(-1, 8, 32)
    high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(-1, 8, 32)
    q = (low | (high << 4)).astype(np.int8) - 32
    steps = _half(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return (steps[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256).astype(np.float32)


def _f32(b: Bytes) -> Floats:
    return b.view("<f4").astype(np.float32)


def _f16(b: Bytes) -> Floats:
    return b.view("<f2").astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


FORMATS: dict[int, tuple[str, int, int, Callable[[Bytes], Floats]]] = {
    0: ("F32", 1, 4, _f32),
    1: ("F16", 1, 2, _f16),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    6: ("Q5_0", 32, 22, _q5_0),
    7: ("Q5_1", 32, 24, _q5_1),
    8: ("Q8_0", 32, 34, _q8_0),
    10: ("Q2_K", 256, 84, _q2_k),
    11: ("Q3_K", 256, 110, _q3_k),
    12: ("Q4_K", 256, 144, _q4_k),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
    30: ("BF16", 1, 2, _bf16),
}
"""Number of the type in the file -> name, numbers a block, bytes a block, how to read it."""
