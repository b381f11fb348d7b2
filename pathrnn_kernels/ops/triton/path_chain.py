"""Both chains of path_chain in one launch. Specification: tests/gpu_model.py.

W̃ is formed from W while loading. A row of a chain is centred when it is read, by the largest of its entries, so every
program finds the same power of two by itself: one barrier a step is all that the programs of a chain need.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted
from .scaled import (
    ZERO,
    centre,
    either,
    is_double,
    least_exponent,
    least_normal,
    log2_floor,
    log_scale,
    on_device,
    power_of_two,
    square,
    times_power,
    whole,
)

#: Bytes of W̃ that a program keeps in registers: a quarter of what a multiprocessor has.
RESIDENT_BYTES = 64 << 10
#: Longer rows do not fit the registers of a program that reads them whole.
HIDDEN_LIMIT = 1 << 14
#: Steps after which a chain is tested for convergence: often enough, and the test costs little.
_CHECK_EVERY = tl.constexpr(8)
#: Where a program streams W, it has so many tiles of so many bytes under way: latency times its bandwidth.
_STAGES = tl.constexpr(5)
_TILE_BYTES = 8 << 10
#: int32 between the counters of the two chains: each has a cache line of its own.
_APART = tl.constexpr(32)


@triton.jit
def _weights(weight, out, into, hidden):
    """Those from units ``into`` to units ``out``, ``[out, into]``. Offsets fit 32 bits: HIDDEN_LIMIT² does."""
    mask = (out < hidden)[:, None] & (into < hidden)[None, :]
    return tl.load(weight + into[None, :] * hidden + out[:, None], mask, other=0)


@triton.jit
def _streamed(
    weight, scale, source, first, width, hidden, shift, DOUBLE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """ROWS entries of W̃ · (source · 2^shift), over the first ``width`` entries of source."""
    out = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, TILE], weight.dtype.element_ty)
    for start in tl.range(0, width, TILE, num_stages=_STAGES):
        into = start + tl.arange(0, TILE)
        x = times_power(tl.load(source + into, into < width, other=0), shift, DOUBLE)
        total += square(_weights(weight, out, into, hidden), scale) * x[None, :]
    return tl.sum(total, 1)


@triton.jit
def _least(w, scale):
    """The least nonzero w̃, 0 if one underflows, infinity if there is none."""
    return tl.min(tl.min(tl.where(w != 0, square(w, scale), float("inf")), 1), 0)


@triton.jit
def _meet(arrivals, target):
    """Waits until ``target`` programs have arrived; what they stored before can be read after."""
    tl.debug_barrier()  # the release is one thread's: the others' stores come before it
    tl.atomic_add(arrivals, 1, sem="release")
    while tl.atomic_add(arrivals, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _least_streamed(weight, scale, first, every, hidden, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The same of every ``every``-th group of rows."""
    least = tl.full([], float("inf"), weight.dtype.element_ty)
    for row in range(first, hidden, every):
        for start in range(0, hidden, TILE):
            w = _weights(weight, row + tl.arange(0, ROWS), start + tl.arange(0, TILE), hidden)
            least = tl.minimum(least, _least(w, scale))
    return least


@triton.jit
def _next_row(
    weight, matrix, scale, before, centred, shift, width, product_shift, drive, drive_width, drive_shift, result,
    first, every, hidden, DOUBLE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's part of W̃ y_{s-1} + drive_s, which it stores, and where it underflows.

    TILE 0: ``matrix`` is its part of W̃, and ``centred`` is y_{s-1} · 2^shift. Else both are read from memory, and what
    is returned is of its last group of rows.
    """
    if TILE == 0:
        out = first + tl.arange(0, ROWS)
        driven = tl.load(drive + out, out < drive_width, other=0)
        product = tl.sum(matrix * centred[None, :], 1)
        y, underflows = _joined(product, product_shift, driven, drive_shift, DOUBLE)
        tl.store(result + out, y, out < hidden)
    else:
        y = tl.zeros([ROWS], weight.dtype.element_ty)
        underflows = tl.zeros([ROWS], tl.int1)
        for row in range(first, hidden, every):
            out = row + tl.arange(0, ROWS)
            driven = tl.load(drive + out, out < drive_width, other=0)
            product = _streamed(weight, scale, before, row, width, hidden, shift, DOUBLE, ROWS, TILE)
            y, small = _joined(product, product_shift, driven, drive_shift, DOUBLE)
            underflows |= small
            tl.store(result + out, y, out < hidden)
    return y, underflows


@triton.jit(do_not_specialize=["hidden", "seq_len", "drive_h_rows", "drive_d_rows", "last_only", "ones_h0"])
def _chains(
    weight_h, largest_h, drive_h, drive_h_exponents, h, h_exponents,
    weight_d, largest_d, drive_d, drive_d_exponents, d, d_exponents,
    any_underflow, arrivals, hidden, seq_len, drive_h_rows, drive_d_rows, last_only, ones_h0,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """y_s = W̃ y_{s-1} + drive_s. Program (b, c): ROWS units (where W̃ is streamed, every such group of its own) of chain
    c: h, and δ backwards in time with W̃ᵀ. Weights are stored by columns, ``[into, out]``, so that lanes lie along the
    outputs: the sums over the inputs need few shuffles. For δ that is W itself.

    TILE 0: the program's part of W̃ stays in registers. SHARED: a chain has several programs; else the one needs no
    memory between the steps.
    """
    forward, backward = tl.program_id(1) == 0, tl.program_id(1) == 1
    block, blocks = tl.program_id(0), tl.num_programs(0)
    weight, largest, drive, drive_exponents, drive_rows = weight_h, largest_h, drive_h, drive_h_exponents, drive_h_rows
    rows, row_exponents = h, h_exponents
    if backward:
        weight, largest, drive, drive_exponents, drive_rows = (
            weight_d, largest_d, drive_d, drive_d_exponents, drive_d_rows,
        )  # fmt: skip
        rows, row_exponents = d, d_exponents
        arrivals += _APART
    # Step s is at row s of h, at row T - s of d.
    origin, direction = tl.where(backward, seq_len, 0), tl.where(backward, -1, 1)
    dtype = weight.dtype.element_ty
    most = tl.load(largest)
    m = log_scale(most, DOUBLE)
    scale = power_of_two(-m, DOUBLE)

    unit = tl.arange(0, BLOCK)
    live = unit < hidden
    if TILE == 0:
        w = _weights(weight, block * ROWS + tl.arange(0, ROWS), unit, hidden)
        matrix = square(w, scale)
        least = _least(w, scale)
    else:
        matrix = scale  # is not read
        least = _least_streamed(weight, scale, block * ROWS, blocks * ROWS, hidden, ROWS, TILE)
    # An entry below this may underflow when it is multiplied.
    threshold = power_of_two(least_exponent(DOUBLE) - log2_floor(least, DOUBLE), DOUBLE)
    threshold = tl.maximum(threshold, least_normal(DOUBLE))
    underflow = least < least_normal(DOUBLE)
    x_underflows = tl.zeros([BLOCK], tl.int1)
    out_underflows = tl.zeros([ROWS], tl.int1)

    start = (ones_h0 != 0) & forward
    x = (unit < tl.where(start, hidden, 0)).to(dtype)
    e = tl.where(start, tl.full([], 0, tl.int64), ZERO)
    if forward:
        tl.store(rows + unit, x, live)
        if block == 0:
            tl.store(row_exponents, e)
    tl.debug_barrier()  # every thread may read all of row 0
    s = tl.full([], 0, tl.int32)
    moving = s < seq_len
    while moving:
        before = rows + (origin + direction * s).to(tl.int64) * hidden
        s += 1
        here = (origin + direction * s).to(tl.int64)
        driven = forward | (s == 1) | (last_only == 0)
        place = tl.where(drive_rows == 1, 0, tl.where(backward, here, here - 1))
        drive_e = tl.where(driven, tl.load(drive_exponents + place), ZERO)
        drive_width = tl.where(driven, hidden, 0)
        x_most = tl.max(x, 0)
        shift = centre(DOUBLE) - log2_floor(x_most, DOUBLE)
        centred = times_power(x, shift, DOUBLE)
        x_underflows |= (x != 0) & (centred < threshold)
        product_e = tl.where((x_most == 0) | (most == 0), ZERO, e - shift + 2 * m)
        e_next = tl.maximum(product_e, drive_e)
        width = tl.where(x_most == 0, 0, hidden)  # h_0 and a row of zeros are not read
        y, underflows = _next_row(
            weight, matrix, scale, before, centred, shift, width, product_e - e_next, drive + place * hidden,
            drive_width, drive_e - e_next, rows + here * hidden, block * ROWS, blocks * ROWS, hidden,
            DOUBLE, ROWS, TILE,
        )  # fmt: skip
        out_underflows |= underflows
        if SHARED:
            _meet(arrivals, s * blocks)
            x_next = tl.load(rows + here * hidden + unit, live, other=0)
        else:
            x_next = y
        e_next = tl.where(tl.max(x_next, 0) == 0, ZERO, e_next)
        if block == 0:
            tl.store(row_exponents + here, e_next)
        moving = s < seq_len
        if (s % _CHECK_EVERY == 0) & (drive_rows == 1):
            moving &= (e_next != e) | (tl.max((x_next != x).to(tl.int32), 0) != 0)
        x, e = x_next, e_next
    # It has converged: the programs share out the copies.
    for later in range(s + 1 + block, seq_len + 1, blocks):
        here = (origin + direction * later).to(tl.int64)
        tl.store(rows + here * hidden + unit, x, live)
        tl.store(row_exponents + here, e)
    some = underflow | (tl.max(x_underflows.to(tl.int32), 0) != 0) | (tl.max(out_underflows.to(tl.int32), 0) != 0)
    tl.store(any_underflow, 1, some)


@triton.jit
def _joined(product, product_shift, drive, drive_shift, DOUBLE: tl.constexpr):
    """product · 2^product_shift + drive · 2^drive_shift, and where one underflows that the other does not dwarf."""
    part, pushed = times_power(product, product_shift, DOUBLE), times_power(drive, drive_shift, DOUBLE)
    y = part + pushed
    least = least_normal(DOUBLE)
    underflow = ((product != 0) & (part < least)) | ((drive != 0) & (pushed < least))
    rounding = 2.0**55 if DOUBLE else 2.0**26  # ``least`` is less than half a unit in the last place of this times it
    return y, underflow & (y < least * rounding)


class Shape(NamedTuple):
    """How a chain is laid out on its programs."""

    BLOCK: int
    ROWS: int
    TILE: int
    num_warps: int


def shape(hidden: int, itemsize: int, plan: str, blocks: int) -> Shape:
    """The layout of ``blocks`` programs a chain.

    Raises:
        ValueError: a plan that there is not, or a size that it does not serve.
    """
    if plan not in ("block", "grid"):
        raise ValueError(f"plan is {plan!r}; the triton backend has 'block' and 'grid' (no clusters)")
    block = triton.next_power_of_2(hidden)
    rows = triton.next_power_of_2(triton.cdiv(hidden, blocks))
    resident = block * rows * itemsize
    if plan == "block" and (blocks != 1 or resident > RESIDENT_BYTES):
        limit = 1 << (int(RESIDENT_BYTES / itemsize).bit_length() - 1) // 2
        raise ValueError(
            f"plan 'block' serves one program a chain and hidden sizes up to {limit} at {itemsize} bytes a number, "
            f"not {blocks} and {hidden}; use plan 'grid'"
        )
    if hidden > HIDDEN_LIMIT:
        raise ValueError(
            f"plan 'grid' serves hidden sizes up to {HIDDEN_LIMIT}, not {hidden}; use backend 'cuda' or 'cpu'"
        )
    if blocks > 1 and interpreted():
        raise ValueError(
            f"blocks is {blocks}, but interpreted programs run in turn and cannot synchronise: use blocks=1"
        )
    if resident <= RESIDENT_BYTES:
        return Shape(block, rows, 0, min(max(resident >> 12, block >> 9, 1), 16))
    rows = min(rows, 32)
    return Shape(block, rows, min(_TILE_BYTES // itemsize // rows, block), 8)


def chains(
    weight_h: Tensor,
    largest_h: Tensor,
    drive_h: Tensor,
    drive_h_exponents: Tensor,
    weight_d: Tensor | None,
    largest_d: Tensor | None,
    drive_d: Tensor | None,
    drive_d_exponents: Tensor | None,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    plan: str,
    blocks: int,
    any_underflow: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h ``[T + 1, H]``, its exponents, δ ``[T, H]`` (no rows without weight_d) and its exponents."""
    hidden = len(weight_h)
    both = weight_d is not None
    layout = shape(hidden, weight_h.element_size(), plan, blocks)
    programs = min(blocks, triton.cdiv(hidden, layout.ROWS))
    h, d = weight_h.new_empty(seq_len + 1, hidden), weight_h.new_empty(seq_len if both else 0, hidden)
    h_exponents, d_exponents = (drive_h_exponents.new_empty(len(rows)) for rows in (h, d))
    # Counters of programs that meet; others are given some pointer.
    arrivals = drive_h_exponents.new_zeros(2 * _APART.value, dtype=torch.int32) if plan == "grid" else h_exponents
    options = whole(layout.num_warps)
    if programs > 1:
        options["launch_cooperative_grid"] = True  # programs that wait for each other must all be running
    try:
        with on_device(h):
            _chains[(programs, 2 if both else 1)](
                weight_h.t().contiguous(), largest_h, drive_h, drive_h_exponents, h, h_exponents,
                either(weight_d, weight_h), either(largest_d, largest_h), either(drive_d, drive_h),
                either(drive_d_exponents, drive_h_exponents), d, d_exponents,
                any_underflow, arrivals, hidden, seq_len, len(drive_h), 1 if drive_d is None else len(drive_d),
                int(last_only), int(ones_h0), is_double(h),
                layout.BLOCK, layout.ROWS, layout.TILE, plan == "grid", **options,
            )  # fmt: skip
    except RuntimeError as error:
        where = f"plan {plan!r} with {programs} programs a chain"
        raise RuntimeError(f"chains: {where} did not launch: {error}") from error
    return h, h_exponents, d, d_exponents
