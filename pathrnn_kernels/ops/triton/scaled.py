"""What the kernels of scaled rows share: powers of two, by bits, and how programs full of numbers are launched.

By bits they are exact, and alike on every device, where a device's exp2 need not be.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: The exponent of a zero row.
ZERO = tl.constexpr(-(1 << 40))
#: An exponent below this is a sum with ZERO.
HALF_ZERO = tl.constexpr(-(1 << 39))

#: Of an NVIDIA multiprocessor, 32 bits each.
_REGISTERS = 1 << 16


def whole(num_warps: int) -> dict[str, int]:
    """Launch options of programs that may take as many registers as there are.

    Without the word ptxas may spill, to make room for more programs on a multiprocessor.
    """
    options: dict[str, int] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if torch.version.hip is None:
        options["maxnreg"] = min(255, _REGISTERS // (32 * num_warps))
    return options


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def is_double(x: Tensor) -> bool:
    return x.dtype == torch.float64


def either(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel is given some pointer even where it reads none."""
    return other if x is None else x


@triton.jit
def least_exponent(DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the least normal number."""
    return -1022 if DOUBLE else -126


@triton.jit
def centre(DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The exponent that the largest entry of a row is brought to."""
    return 300 if DOUBLE else 30


@triton.jit
def log2_floor(x, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """⌊log₂ x⌋ of a normal x > 0; below zero and subnormals come -127 (-1023), above inf and nan 128 (1024)."""
    if DOUBLE:
        return ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    else:
        return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def power_of_two(n, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """2ⁿ for int32 n; 0 where that is below the normal numbers, the largest power where it is above."""
    if DOUBLE:
        return ((tl.minimum(tl.maximum(n, -1023), 1023) + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return ((tl.minimum(tl.maximum(n, -127), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def least_normal(DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    return power_of_two(tl.full([], least_exponent(DOUBLE), tl.int32), DOUBLE)


@triton.jit
def faint(DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^(digits + 2) least normal numbers: what underflowed in a sum from there on is less than its rounding."""
    return power_of_two(tl.full([], -967 if DOUBLE else -100, tl.int32), DOUBLE)


@triton.jit
def times_power(x, n, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x · 2ⁿ for int64 n, in two steps, neither of which leaves the normal range where x and the result do not."""
    near = tl.minimum(tl.maximum(n, -4096), 4096).to(tl.int32)
    half = near >> 1
    return x * power_of_two(half, DOUBLE) * power_of_two(near - half, DOUBLE)


@triton.jit
def log_scale(largest, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """m: 2^-m brings ``largest`` to [1, 2); to [2, 4) for the largest powers, whose inverse is subnormal."""
    m = log2_floor(largest, DOUBLE)
    most = 1022 if DOUBLE else 126
    return tl.where((largest > 0) & (m <= most + 1), tl.minimum(m, most), 0)


@triton.jit
def square_exponent(largest, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """True w² = (w · 2^-m)² · 2^this."""
    return tl.where(largest == 0, ZERO, 2 * log_scale(largest, DOUBLE).to(tl.int64))


@triton.jit
def flushed(exponent):  # type: ignore[no-untyped-def]
    """ZERO for whatever exponent a zero has got by multiplication."""
    return tl.where(exponent < HALF_ZERO, ZERO, exponent)


@triton.jit
def top_of(exponents, more, count, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest exponent of a sequence or, with ``more``, of its products with another."""
    tops = tl.full([CHUNK], ZERO, tl.int64)
    for start in range(0, count, CHUNK):
        t = start + tl.arange(0, CHUNK)
        own = tl.load(exponents + t, t < count, other=ZERO)
        if more is not None:
            own += tl.load(more + t, t < count, other=ZERO)
        tops = tl.maximum(tops, own)
    return flushed(tl.max(tops, 0))


@triton.jit
def square(w, scale):  # type: ignore[no-untyped-def]
    return (w * scale) * (w * scale)


@triton.jit
def tile(matrix, row, column, rows, columns):  # type: ignore[no-untyped-def]
    """Some entries of a contiguous matrix, 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * columns + column[None, :], inside, other=0)


@triton.jit
def transposed_tile(matrix, row, column, rows, columns):  # type: ignore[no-untyped-def]
    """The same, ``[column, row]``."""
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    return tl.load(matrix + row.to(tl.int64)[None, :] * columns + column[:, None], inside, other=0)


@triton.jit
def natural_exponent(top, usual):  # type: ignore[no-untyped-def]
    """Of a result whose entries are about 2^(top + usual): 0 for values of ordinary size, and for a zero."""
    m = top + usual
    return tl.where((top == ZERO) | ((m >= 0) & (m <= 60)), 0, m)
