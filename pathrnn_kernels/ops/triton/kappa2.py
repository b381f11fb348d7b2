"""κ⁽²⁾ of one chain: a few lags, one certificate of two, and the other lags only where neither holds.

The proofs stand in ``reference._rank_one`` (certificate A, Perron) and ``reference._geometric`` (B), whose names are
used here: P_n = W̃ⁿ, C_n the sum over the pairs of steps n + 1 apart, x and u the Perron vectors, χ and σ lengths of the
rows and columns of the deviation from ρⁿ x uᵀ. Nothing is decided on the host: every kernel is launched, and the one
that sums the other lags ends at once where a certificate holds. Specification: tests/gpu_model.py.

1. ``_powers``: P_0 … P_N; a program has some columns, which need no others'.
2. ``_lags``: S of the first N lags, lag i by the programs i, and C_{N-1}.
3. ``_perron``: x and u by power iteration, with the bounds of Collatz and Wielandt.
4. ``_deviations``: χ, σ, the ratios of P_N to P_{N-1}, and xᵀδ_t.
5. ``_bounds``: κ of the first N lags, and what certificate A is made of.
6. ``_tail``: the lags from N on by A, or by B, and what B's bound is made of.
7. ``_lags`` again, unless A or B holds: lags i + N, i + 2N, … by the programs i, from P_i in steps of P_N.
8. ``_result``: κ in the weights' dtype, the number of lags, and the bound.

In float64 are x, u, ρ, bounds and the recursion of the tail, which cost H² or T H operations; powers and sums over
pairs, which cost more, are in the weights' dtype. A column of a power has an exponent of its own, and so has a row of
S, since columns of P meet rows of S. κ itself stays on the scale of κ⁽¹⁾: a path that uses a weight m times counts m in
κ⁽¹⁾ and 2m(m-1) in κ⁽²⁾, which is therefore at most 2(T-1) times as large, entry by entry.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scaled import (
    ZERO,
    centre,
    faint,
    flushed,
    is_double,
    least_normal,
    log2_floor,
    log_scale,
    on_device,
    power_of_two,
    square,
    square_exponent,
    tile,
    times_power,
    top_of,
    transposed_tile,
    whole,
)

_LN2 = tl.constexpr(math.log(2))
_LARGEST = tl.constexpr(1.7976931348623157e308)
#: Columns of powers, or units of a sequence, that a program has.
_UNITS = tl.constexpr(16)
#: Rows of a product that it forms at a time, and terms of its sums.
_ROWS, _DEPTH = tl.constexpr(32), tl.constexpr(16)
#: Entries along either side of a tile in float64, and steps or entries that single vectors take at a time.
_TILE, _CHUNK = tl.constexpr(32), tl.constexpr(256)
#: Power iteration ends after so many steps: what mixes more slowly has no certificate A after few lags.
_ITERATIONS = 32

# Places in ``numbers``, float64: the bounds of both brackets, then what _bounds and _tail find.
_CONTRACTION, _WIDEST_COLUMN, _LONGEST_ROW, _BOUND_A = (tl.constexpr(n) for n in (4, 5, 6, 7))
NUMBERS = 8
# Places in ``maxima``, the bits of float64, zeros at first: A's three cases; of B, the share of the error in κ and the
# relative half width of the enclosure.
_SHARE, _WIDTH = tl.constexpr(3), tl.constexpr(4)
MAXIMA = 5


@triton.jit
def _number(bits):
    """A float64 argument: Triton would make float32 of a float."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _certain(x):
    """inf for nan, which certifies nothing, and which maxima would pass over."""
    return tl.where(x <= _LARGEST, x, float("inf"))


@triton.jit
def _raise(maxima, PLACE: tl.constexpr, x):
    """The maximum with a block of numbers ≥ 0, whose bits are ordered as they are."""
    most = tl.max(tl.max(_certain(x), 1), 0)
    tl.atomic_max(maxima + PLACE, most.to(tl.int64, bitcast=True))


@triton.jit
def _maximum(maxima, PLACE: tl.constexpr):
    return tl.load(maxima + PLACE).to(tl.float64, bitcast=True)


@triton.jit
def _all_max(x, count):
    """The largest of a vector in float64."""
    most = tl.full([_CHUNK], 0, tl.float64)
    for start in range(0, count, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        most = tl.maximum(most, _certain(tl.load(x + i, i < count, other=0)))
    return tl.max(most, 0)


@triton.jit
def _scaling(largest, DOUBLE: tl.constexpr):
    """What brings W near 1, and the exponent of W̃ then."""
    most = tl.load(largest)
    return power_of_two(-log_scale(most, DOUBLE), DOUBLE), square_exponent(most, DOUBLE)


# ---- powers and lags -------------------------------------------------------------------------------------------------


@triton.jit
def _advance(
    matrix, scale, exponents, top, old, shift, new, j, hidden, underflow, SQUARED: tl.constexpr, DOUBLE: tl.constexpr
):
    """new[:, j] = matrix · old[:, j] · 2^shift, and the largest entry of every column.

    ``matrix`` is W, to be scaled and squared, or a power, whose columns count 2^(exponents - top). Where an entry is so
    small that what underflowed in it may count, and there is a path, ``underflow`` is set.
    """
    dtype = matrix.dtype.element_ty
    stride = hidden.to(tl.int64)
    live = (j < hidden)[None, :]
    most = tl.zeros([_UNITS], dtype)
    for first in range(0, hidden, _ROWS):
        k = first + tl.arange(0, _ROWS)
        total = tl.zeros([_ROWS, _UNITS], dtype)
        for start in range(0, hidden, _DEPTH):
            i = start + tl.arange(0, _DEPTH)
            w, p = tile(matrix, k, i, hidden, hidden), tile(old, i, j, hidden, hidden)
            if SQUARED:
                w = square(w, scale)
                p = times_power(p, shift[None, :], DOUBLE)
            else:
                own = tl.load(exponents + i, i < hidden, other=ZERO) - top
                p = times_power(p, shift[None, :] + own[:, None], DOUBLE)
            total = tl.dot(w, p, total, input_precision="ieee", out_dtype=dtype)
        inside = (k < hidden)[:, None] & live
        tl.store(new + k[:, None] * stride + j[None, :], total, inside)
        most = tl.maximum(most, tl.max(total, 0))
        small = inside & (total < faint(DOUBLE))
        if tl.max(tl.max(small.to(tl.int32), 1), 0) > 0:
            paths = tl.zeros([_ROWS, _UNITS], tl.float32)
            for start in range(0, hidden, _DEPTH):
                i = start + tl.arange(0, _DEPTH)
                w, p = tile(matrix, k, i, hidden, hidden), tile(old, i, j, hidden, hidden)
                one = tl.dot((w != 0).to(tl.float32), (p != 0).to(tl.float32), input_precision="ieee")
                paths += one
            tl.store(underflow, 1, tl.max(tl.max((small & (paths > 0)).to(tl.int32), 1), 0) > 0)
    return most


@triton.jit
def _shift(most, DOUBLE: tl.constexpr):
    """Brings a column whose largest entry is ``most`` near 1."""
    return tl.where(most > 0, -log2_floor(most, DOUBLE), 0).to(tl.int64)


@triton.jit(do_not_specialize=["hidden", "count"])
def _powers(weight, largest, powers, exponents, underflow, hidden, count, DOUBLE: tl.constexpr):
    """Program b: columns b of P_0 … P_count, as they come, and their exponents."""
    j = tl.program_id(0) * _UNITS + tl.arange(0, _UNITS)
    stride = hidden.to(tl.int64)
    matrix = stride * hidden
    scale, own = _scaling(largest, DOUBLE)
    most = tl.zeros([_UNITS], weight.dtype.element_ty)
    for first in range(0, hidden, _ROWS):
        k = first + tl.arange(0, _ROWS)
        at, inside = k[:, None] * stride + j[None, :], (k < hidden)[:, None] & (j < hidden)[None, :]
        squares = square(tl.load(weight + at, inside, other=0), scale)
        tl.store(powers + at, (k[:, None] == j[None, :]).to(squares.dtype), inside)
        tl.store(powers + matrix + at, squares, inside)
        most = tl.maximum(most, tl.max(squares, 0))
    exponent = tl.where(most > 0, own, ZERO)
    tl.store(exponents + j, tl.zeros([_UNITS], tl.int64), j < hidden)
    tl.store(exponents + stride + j, exponent, j < hidden)
    for n in range(1, count):
        tl.debug_barrier()  # what all threads stored is read
        shift = _shift(most, DOUBLE)
        old = powers + n * matrix
        most = _advance(weight, scale, exponents, own, old, shift, old + matrix, j, hidden, underflow, True, DOUBLE)
        exponent = tl.where(most > 0, flushed(exponent + own - shift), ZERO)
        tl.store(exponents + (n + 1) * stride + j, exponent, j < hidden)


@triton.jit
def _add_lag(
    d, d_exponents, h, h_exponents, power, exponent, sums, total_exponent, overlap, overlap_exponent, n, j, steps,
    hidden, first, keeps, DOUBLE: tl.constexpr,
):  # fmt: skip
    """S[j] += P_n[:, j] ⊙ C_n[j], on one exponent a row, the larger; C_n itself is kept where ``keeps``."""
    dtype = d.dtype.element_ty
    stride = hidden.to(tl.int64)
    live = (j < hidden)[:, None]
    pairs = steps - 1 - n
    top = top_of(d_exponents + n + 1, h_exponents, pairs, _CHUNK)
    term = flushed(exponent + top)
    joint = tl.maximum(total_exponent, term)
    if keeps:
        tl.store(overlap_exponent, top)
    for begin in range(0, hidden, _ROWS):
        k = begin + tl.arange(0, _ROWS)
        products = tl.zeros([_UNITS, _ROWS], dtype)
        for start in range(0, pairs, _DEPTH):
            t = start + tl.arange(0, _DEPTH)
            there = t < pairs
            shift = tl.load(d_exponents + t + n + 1, there, other=ZERO) + tl.load(h_exponents + t, there, other=ZERO)
            late = transposed_tile(d + (n + 1) * stride, t, j, pairs, hidden)
            late = times_power(late, (shift - top)[None, :], DOUBLE)
            products = tl.dot(late, tile(h, t, k, pairs, hidden), products, input_precision="ieee", out_dtype=dtype)
        at, inside = j[:, None] * stride + k[None, :], live & (k < hidden)[None, :]
        if keeps:
            tl.store(overlap + at, products, inside)
        p = tl.load(power + k[None, :] * stride + j[:, None], inside, other=0)
        total = times_power(products * p, (term - joint)[:, None], DOUBLE)
        before = tl.load(sums + at, inside & (first == 0), other=0)
        tl.store(sums + at, total + times_power(before, (total_exponent - joint)[:, None], DOUBLE), inside)
    return joint


@triton.jit(do_not_specialize=["rtol", "steps", "hidden", "tried"])
def _lags(
    d, d_exponents, h, h_exponents, powers, exponents, scratch, sums, sum_exponents, overlap, overlap_exponent,
    numbers, maxima, rtol, underflow, steps, hidden, tried,
    OTHERS: tl.constexpr, CERTIFIED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program (b, i): rows b of S of lag i or, with OTHERS, of lags i + tried, i + 2 tried, … on top of it.

    ``CERTIFIED``: whether a certificate, which may hold, has been tried.
    """
    j = tl.program_id(0) * _UNITS + tl.arange(0, _UNITS)
    lag = tl.program_id(1)
    stride = hidden.to(tl.int64)
    matrix = stride * hidden
    place = lag * matrix
    exponent = tl.load(exponents + lag * stride + j, j < hidden, other=ZERO)
    if OTHERS:
        count = steps - 1  # of all lags
        if CERTIFIED:
            bound = tl.minimum(tl.load(numbers + _BOUND_A), _geometric_bound(maxima))
            count = tl.where(bound <= _number(rtol), 0, count)
        top = top_of(exponents + tried * stride, None, hidden, _CHUNK)
        total_exponent = tl.load(sum_exponents + lag * stride + j, j < hidden, other=ZERO)
        old, new = powers + place, scratch + place
        shift = tl.zeros([_UNITS], tl.int64)
        for n in range(lag + tried, count, tried):
            most = _advance(
                powers + tried * matrix, 0.0, exponents + tried * stride, top, old, shift, new, j, hidden, underflow,
                False, DOUBLE,
            )  # fmt: skip
            exponent = tl.where(most > 0, flushed(exponent + top - shift), ZERO)
            tl.debug_barrier()
            total_exponent = _add_lag(
                d, d_exponents, h, h_exponents, new, exponent, sums + place, total_exponent, overlap, overlap_exponent,
                n, j, steps, hidden, 0, False, DOUBLE,
            )  # fmt: skip
            shift = _shift(most, DOUBLE)
            old, new = new, old
            tl.debug_barrier()
    else:
        total_exponent = _add_lag(
            d, d_exponents, h, h_exponents, powers + place, exponent, sums + place, tl.full([_UNITS], ZERO, tl.int64),
            overlap, overlap_exponent, lag, j, steps, hidden, 1, CERTIFIED and lag == tried - 1, DOUBLE,
        )  # fmt: skip
    tl.store(sum_exponents + lag * stride + j, total_exponent, j < hidden)


# ---- certificate A ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rtol", "steps", "hidden", "limit"])
def _perron(
    weight, largest, power, power_exponents, vectors, numbers, rtol, steps, hidden, limit, DOUBLE: tl.constexpr
):
    """Program 0: x; 1: u; the bracket of ρ of each, W̃ being scaled. From P · 1, by power iteration."""
    side = tl.program_id(0)
    stride = hidden.to(tl.int64)
    x, image = vectors + side * stride, vectors + (2 + side) * stride
    out_stride, in_stride = stride, tl.full([], 1, tl.int64)
    if side == 1:
        out_stride, in_stride = in_stride, out_stride
    scale, _ = _scaling(largest, DOUBLE)
    top = top_of(power_exponents, None, hidden, _CHUNK)
    for begin in range(0, hidden, _TILE):
        o = begin + tl.arange(0, _TILE)
        total = tl.zeros([_TILE, _TILE], tl.float64)
        for start in range(0, hidden, _TILE):
            i = start + tl.arange(0, _TILE)
            inside = (o < hidden)[:, None] & (i < hidden)[None, :]
            p = tl.load(power + o[:, None] * out_stride + i[None, :] * in_stride, inside, other=0).to(tl.float64)
            column = tl.where(side == 0, i[None, :], o[:, None])
            total += times_power(p, tl.load(power_exponents + column, inside, other=ZERO) - top, True)
        tl.store(x + o, tl.sum(total, 1), o < hidden)
    wanted = 1 + _number(rtol) / (64 * steps)
    low, high = tl.full([], 0, tl.float64), tl.full([], float("inf"), tl.float64)
    step, searching = 0, 1
    while (step < limit) & (searching == 1):
        tl.debug_barrier()
        lows, highs = tl.full([_TILE], float("inf"), tl.float64), tl.full([_TILE], 0, tl.float64)
        mosts = tl.full([_TILE], 0, tl.float64)
        for begin in range(0, hidden, _TILE):
            o = begin + tl.arange(0, _TILE)
            total = tl.zeros([_TILE, _TILE], tl.float64)
            for start in range(0, hidden, _TILE):
                i = start + tl.arange(0, _TILE)
                inside = (o < hidden)[:, None] & (i < hidden)[None, :]
                w = tl.load(weight + o[:, None] * out_stride + i[None, :] * in_stride, inside, other=0)
                total += square(w, scale).to(tl.float64) * tl.load(x + i, i < hidden, other=0)[None, :]
            y = tl.sum(total, 1)
            tl.store(image + o, y, o < hidden)
            ratio = y / tl.load(x + o, o < hidden, other=1)
            lows = tl.minimum(lows, tl.where(o < hidden, tl.where(ratio > 0, ratio, 0.0), float("inf")))
            highs = tl.maximum(highs, tl.where(o < hidden, _certain(ratio), 0.0))
            mosts = tl.maximum(mosts, y)
        low, high = tl.min(lows, 0), tl.max(highs, 0)
        searching = tl.where(high <= wanted * low, 0, 1)
        shift = -log2_floor(tl.max(mosts, 0), True).to(tl.int64)
        tl.debug_barrier()
        for start in range(0, tl.where(searching == 1, hidden, 0), _CHUNK):
            i = start + tl.arange(0, _CHUNK)
            tl.store(x + i, times_power(tl.load(image + i, i < hidden, other=0), shift, True), i < hidden)
        step += 1
    tl.store(numbers + 2 * side, low)
    tl.store(numbers + 2 * side + 1, high)


@triton.jit
def _spectrum(vectors, numbers, steps, hidden):
    """log ρ of the scaled W̃, θ, and uᵀx of the vectors as they are."""
    total = tl.zeros([_CHUNK], tl.float64)
    for start in range(0, hidden, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        total += tl.load(vectors + i, i < hidden, other=0) * tl.load(vectors + hidden + i, i < hidden, other=0)
    low = tl.log(tl.minimum(tl.load(numbers), tl.load(numbers + 2)))
    high = tl.log(tl.maximum(tl.load(numbers + 1), tl.load(numbers + 3)))
    return (low + high) / 2, _certain(tl.exp(steps * ((high - low) / 2)) - 1), tl.sum(total, 0)


@triton.jit
def _limits(exponents, vectors, log_rho, dot, j, n, own, hidden):
    """ρⁿ u_j on the scale of column j of a power, which tends to this times x."""
    u = tl.load(vectors + hidden + j, j < hidden, other=1) / dot
    ahead = n * own - tl.load(exponents + j, j < hidden, other=0)
    return u * tl.exp(n * log_rho + ahead.to(tl.float64) * _LN2)


@triton.jit
def _squared_deviation(power, vectors, limits, k, j, hidden):
    """z², z = P_n[k, j] / (ρⁿ x_k u_j) - 1; 0 outside."""
    inside = (k < hidden)[:, None] & (j < hidden)[None, :]
    p = tile(power, k, j, hidden, hidden).to(tl.float64)
    x = tl.load(vectors + k, k < hidden, other=1)
    z = p / (x[:, None] * limits[None, :]) - 1
    return tl.where(inside, z * z, 0.0)


@triton.jit
def _pi(vectors, dot, i, hidden):
    return tl.load(vectors + i, i < hidden, other=0) * tl.load(vectors + hidden + i, i < hidden, other=0) / dot


@triton.jit
def _row_lengths(power, exponents, vectors, log_rho, dot, lengths, k, n, own, hidden):
    """χ_n[k]."""
    squares = tl.zeros([_UNITS], tl.float64)
    for start in range(0, hidden, _TILE):
        j = start + tl.arange(0, _TILE)
        limits = _limits(exponents, vectors, log_rho, dot, j, n, own, hidden)
        z = _squared_deviation(power, vectors, limits, k, j, hidden)
        squares += tl.sum(z * _pi(vectors, dot, j, hidden)[None, :], 1)
    tl.store(lengths + k, _certain(tl.sqrt(squares)), k < hidden)


@triton.jit
def _column_lengths(power, exponents, vectors, log_rho, dot, lengths, j, n, own, hidden):
    """σ_n[j]."""
    squares = tl.zeros([_UNITS], tl.float64)
    limits = _limits(exponents, vectors, log_rho, dot, j, n, own, hidden)
    for start in range(0, hidden, _TILE):
        k = start + tl.arange(0, _TILE)
        z = _squared_deviation(power, vectors, limits, k, j, hidden)
        squares += tl.sum(z * _pi(vectors, dot, k, hidden)[:, None], 0)
    tl.store(lengths + j, _certain(tl.sqrt(squares)), j < hidden)


@triton.jit
def _ratios(before, e_before, after, e_after, ratios, line, by_column, own, hidden):
    """The least and the largest ratio of some lines, columns or rows, over 2^own."""
    stride = hidden.to(tl.int64)
    lows, highs = tl.full([_UNITS], float("inf"), tl.float64), tl.full([_UNITS], 0, tl.float64)
    for start in range(0, hidden, _TILE):
        other = start + tl.arange(0, _TILE)
        j = tl.where(by_column, line[:, None], other[None, :])
        k = tl.where(by_column, other[None, :], line[:, None])
        inside = (j < hidden) & (k < hidden)
        p = tl.load(before + k * stride + j, inside, other=0).to(tl.float64)
        q = tl.load(after + k * stride + j, inside, other=0).to(tl.float64)
        shift = tl.load(e_after + j, inside, other=0) - tl.load(e_before + j, inside, other=0) - own
        ratio = times_power(q / tl.where(p > 0, p, 1.0), shift, True)
        lows = tl.minimum(lows, tl.min(tl.where(p > 0, ratio, float("inf")), 1))
        highs = tl.maximum(highs, tl.max(tl.where(p > 0, ratio, tl.where(q > 0, float("inf"), 0.0)), 1))
    # A line without any positive entry stays zero: its ratios do not matter.
    at = ratios + tl.where(by_column, 0, 2) * stride + line
    tl.store(at, tl.where(lows < float("inf"), lows, 0.0), line < hidden)
    tl.store(at + stride, highs, line < hidden)


@triton.jit
def _dots(d, vectors, dots, first, every, steps, hidden):
    """xᵀδ of some of the steps but the first, on the scales of the rows."""
    for begin in range(first, steps - 1, every):
        t = begin + tl.arange(0, _UNITS)
        total = tl.zeros([_UNITS, _TILE], tl.float64)
        for start in range(0, hidden, _TILE):
            i = start + tl.arange(0, _TILE)
            late = tile(d + hidden, t, i, steps - 1, hidden)
            total += late.to(tl.float64) * tl.load(vectors + i, i < hidden, other=0)[None, :]
        tl.store(dots + t, tl.sum(total, 1), t < steps - 1)


@triton.jit(do_not_specialize=["steps", "hidden", "tried"])
def _deviations(
    d, largest, powers, exponents, vectors, numbers, rows, columns, ratios, dots, steps, hidden, tried,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program (b, y): rows b of χ_{y+1}, y < tried - 1; then blocks b of σ, of the ratios of columns and of rows, and
    of xᵀδ."""
    unit, y = tl.program_id(0) * _UNITS + tl.arange(0, _UNITS), tl.program_id(1)
    stride = hidden.to(tl.int64)
    matrix = stride * hidden
    _, own = _scaling(largest, DOUBLE)
    log_rho, _, dot = _spectrum(vectors, numbers, steps, hidden)
    last, e_last = powers + (tried - 1) * matrix, exponents + (tried - 1) * stride
    if y < tried - 1:
        power, e_power, lengths = powers + (y + 1) * matrix, exponents + (y + 1) * stride, rows + y * stride
        _row_lengths(power, e_power, vectors, log_rho, dot, lengths, unit, y + 1, own, hidden)
    elif y == tried - 1:
        _column_lengths(last, e_last, vectors, log_rho, dot, columns, unit, tried - 1, own, hidden)
    elif y < tried + 2:
        _ratios(last, e_last, last + matrix, e_last + stride, ratios, unit, y == tried, own, hidden)
    else:
        _dots(d, vectors, dots, tl.program_id(0) * _UNITS, tl.num_programs(0) * _UNITS, steps, hidden)


@triton.jit
def _share(error, known):
    """error / κ with 0 / 0 = 0."""
    return tl.where(error == 0, 0.0, error / tl.where(error == 0, 1.0, known))


@triton.jit
def _kappa_of(
    weight, kappa1, sums, sum_exponents, at, j, inside, factor, scale, own, kappa1_exponent, hidden, lags,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """κ⁽¹⁾ + f W̃ ⊙ S, S as the programs of _lags have it, and f W̃, in float64 on the scale of κ⁽¹⁾; j is a column."""
    stride = hidden.to(tl.int64)
    matrix = stride * hidden
    w = factor * square(tl.load(weight + at, inside, other=0), scale).to(tl.float64)
    kappa = tl.load(kappa1 + at, inside, other=0).to(tl.float64)
    for i in range(lags):
        e = tl.load(sum_exponents + i * stride + j, j < hidden, other=ZERO) + own - kappa1_exponent
        kappa += times_power(w * tl.load(sums + i * matrix + at, inside, other=0).to(tl.float64), e, True)
    return kappa, w


@triton.jit(do_not_specialize=["factor_bits", "steps", "hidden", "tried"])
def _bounds(
    weight, largest, d, sums, sum_exponents, overlap, overlap_exponent, power_exponents, vectors, numbers, rows,
    columns, dots, kappa1, kappa1_exponent, factor_bits, kappa, maxima, steps, hidden, tried, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program b: rows b of κ, and of the errors of certificate A relative to it."""
    j = tl.program_id(0) * _UNITS + tl.arange(0, _UNITS)
    stride = hidden.to(tl.int64)
    scale, own = _scaling(largest, DOUBLE)
    factor, e1 = _number(factor_bits), tl.load(kappa1_exponent)
    log_rho, _theta, dot = _spectrum(vectors, numbers, steps, hidden)
    rho = tl.exp(log_rho + own.to(tl.float64) * _LN2)
    last = tried - 1
    # g: how much a unit's share of δ varies with the step.
    least, most = tl.full([_UNITS], float("inf"), tl.float64), tl.full([_UNITS], 0, tl.float64)
    for first in range(0, steps - 1, _TILE):
        t = first + tl.arange(0, _TILE)
        inside = (t < steps - 1)[:, None] & (j < hidden)[None, :]
        late = tile(d + stride, t, j, steps - 1, hidden).to(tl.float64)
        shares = late / tl.load(dots + t, t < steps - 1, other=1)[:, None]
        least = tl.minimum(least, tl.min(tl.where(inside, tl.where(shares > 0, shares, 0.0), float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(inside, _certain(shares), 0.0), 0))
    sigma = tl.load(columns + j, j < hidden, other=0)
    limits = _limits(power_exponents, vectors, log_rho, dot, j, last, own, hidden)[:, None]
    lag_exponent = tl.load(power_exponents + j, j < hidden, other=ZERO) + tl.load(overlap_exponent) + own - e1
    growth = (most / least * sigma)[:, None]
    decay = tl.where(rho < 1, tl.exp(tried * tl.log(rho)) / (1 - rho), float("inf"))
    column = j.to(tl.int64)[:, None]
    for start in range(0, hidden, _TILE):
        k = start + tl.arange(0, _TILE)
        inside = (j < hidden)[:, None] & (k < hidden)[None, :]
        at = column * stride + k[None, :]
        known, w = _kappa_of(
            weight, kappa1, sums, sum_exponents, at, column, inside, factor, scale, own, e1, hidden, tried, DOUBLE
        )
        tl.store(kappa + at, known, inside)
        total, series = tl.zeros([_TILE], tl.float64), tl.zeros([_TILE], tl.float64)
        chi = tl.zeros([_TILE], tl.float64)
        for n in range(1, tried):
            chi = tl.load(rows + (n - 1) * stride + k, k < hidden, other=0)
            total += chi
            series += tl.exp(n * tl.log(rho)) * chi
        x = tl.load(vectors + k, k < hidden, other=0)[None, :]
        pairs = tl.load(overlap + at, inside, other=0).to(tl.float64)
        share = tl.where(w == 0, 0.0, _share(times_power(w * pairs * x * limits, lag_exponent[:, None], True), known))
        share = tl.where(inside, share, 0.0)
        none = share == 0
        sigmas = sigma[:, None]
        _raise(maxima, 0, tl.where(none, 0.0, growth * total[None, :] * share))
        _raise(maxima, 1, tl.where(none, 0.0, sigmas * series[None, :] * share))
        _raise(maxima, 2, tl.where(none, 0.0, sigmas * (series + decay * chi)[None, :] * share))
    if tl.program_id(0) == 0:
        norm = tl.zeros([_CHUNK], tl.float64)
        for start in range(0, hidden, _CHUNK):
            i = start + tl.arange(0, _CHUNK)
            chi = tl.load(rows + (last - 1) * stride + i, i < hidden, other=0)
            norm += _pi(vectors, dot, i, hidden) * chi * chi
        tl.store(numbers + _CONTRACTION, _certain(tl.sqrt(tl.sum(norm, 0))))
        tl.store(numbers + _WIDEST_COLUMN, _all_max(columns, hidden))
        tl.store(numbers + _LONGEST_ROW, _all_max(rows, hidden))  # of χ_1


@triton.jit
def _with_drift(error, drift, holds, theta):
    """The bound of the relative error, where x, u and ρ have theirs."""
    return tl.where(holds & (drift < 1), _certain(((1 + theta) * error + drift) / (1 - drift)), float("inf"))


@triton.jit
def _rank_one_bound(numbers, maxima, theta, rho, tried, SHRINKS: tl.constexpr):
    """The bound of certificate A: the best of its three cases, of which two are for δ that shrinks."""
    contraction, sigma = tl.load(numbers + _CONTRACTION), tl.load(numbers + _WIDEST_COLUMN)
    left = tl.where(contraction < 1, 1 - contraction, 1.0)
    bound = _with_drift(_maximum(maxima, 0) / left, theta * (1 + sigma / left), contraction < 1, theta)
    if SHRINKS:
        drift = theta * (2 + sigma * tl.load(numbers + _LONGEST_ROW))
        shrunk = tl.exp((tried - 1) * tl.log(rho)) * contraction
        left = tl.where(shrunk < 1, 1 - shrunk, 1.0)
        bound = tl.minimum(bound, _with_drift(_maximum(maxima, 1) / left, drift, shrunk < 1, theta))
        bound = tl.minimum(bound, _with_drift(_maximum(maxima, 2), drift, rho < 1, theta))
    return bound


# ---- the tail --------------------------------------------------------------------------------------------------------


@triton.jit
def _geometric_bound(maxima):
    """Of certificate B. Beside the tail, too, which is part of κ and no less than the lower end of the enclosure."""
    width = _maximum(maxima, _WIDTH)
    beside = tl.where(width < 1, width / (1 - tl.where(width < 1, width, 0.0)), float("inf"))
    return tl.minimum(_maximum(maxima, _SHARE), beside)


@triton.jit
def _relative_width(ratios, hidden):
    """The largest of (hi - lo) / lo."""
    most = tl.full([_CHUNK], 0, tl.float64)
    for start in range(0, hidden, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        low, high = tl.load(ratios + i, i < hidden, other=0), tl.load(ratios + hidden + i, i < hidden, other=0)
        most = tl.maximum(most, tl.where(high > low, _certain((high - low) / low), 0.0))
    return tl.max(most, 0)


@triton.jit
def _way(ratios, maxima, rank_one, left, hidden):
    """Whether the tail of ``left`` steps scans δ, and whether neither certificate is to be had."""
    of_columns, of_rows = _relative_width(ratios, hidden), _relative_width(ratios + 2 * hidden.to(tl.int64), hidden)
    # Wider ratios give enclosures too wide: no bound rests on this guess.
    hopeless = (rank_one == 0) & (tl.minimum(of_columns, of_rows) * left > 1)
    if hopeless | rank_one:
        tl.atomic_max(maxima + _SHARE, tl.full([], float("inf"), tl.float64).to(tl.int64, bitcast=True))
        tl.atomic_max(maxima + _WIDTH, tl.full([], float("inf"), tl.float64).to(tl.int64, bitcast=True))
    return rank_one | (of_columns <= of_rows), hopeless


@triton.jit
def _scan(
    source, source_exponents, other_exponents, scanned, scanned_exponents, least, most, unit, live, by_column, count,
    own, stride,
):  # fmt: skip
    """y_t = r ⊙ (x_t + y_{t-1}) for r between both ends of the ratios: their middle is stored.

    Returned are half the distance over the middle, the largest over the steps, and the largest exponent of a pair with
    the ``other`` sequence.
    """
    dtype = scanned.dtype.element_ty
    low, high, width = tl.zeros([_UNITS], tl.float64), tl.zeros([_UNITS], tl.float64), tl.zeros([_UNITS], tl.float64)
    exponent, top = tl.full([_UNITS], ZERO, tl.int64), tl.full([_UNITS], ZERO, tl.int64)
    for s in range(0, count):
        t = tl.where(by_column, count - 1 - s, s)
        place = t.to(tl.int64) * stride + unit
        x, e = tl.load(source + place, live, other=0).to(tl.float64), tl.load(source_exponents + t)
        joint = tl.maximum(exponent, e)
        x = times_power(x, e - joint, True)
        low = least * (x + times_power(low, exponent - joint, True))
        high = most * (x + times_power(high, exponent - joint, True))
        some = high > 0
        m = tl.where(some, log2_floor(high, True), 0).to(tl.int64)
        low, high = times_power(low, -m, True), times_power(high, -m, True)
        exponent = tl.where(some, flushed(joint + own + m), ZERO)
        middle = (low + high) / 2
        width = tl.maximum(width, _certain(tl.where(high == 0, 0.0, (high - low) / 2 / middle)))
        tl.store(scanned + place, middle.to(dtype), live)
        tl.store(scanned_exponents + place, exponent, live)
        top = tl.maximum(top, flushed(exponent + tl.load(other_exponents + t)))
    return tl.where(live, width, 0.0), top


@triton.jit
def _scanned_pairs(
    scanned, scanned_exponents, other, other_exponents, top, unit, live, o, count, hidden, DOUBLE: tl.constexpr
):
    """Σ_t y_t z_tᵀ of the scanned units and entries o of the other sequence, on the scales 2^top."""
    dtype = scanned.dtype.element_ty
    stride = hidden.to(tl.int64)
    total = tl.zeros([_UNITS, _TILE], dtype)
    for first in range(0, count, _DEPTH):
        t = first + tl.arange(0, _DEPTH)
        there = t < count
        place = t.to(tl.int64)[None, :] * stride + unit[:, None]
        e = tl.load(scanned_exponents + place, live[:, None] & there[None, :], other=ZERO)
        e += tl.load(other_exponents + t, there, other=ZERO)[None, :]
        y = tl.load(scanned + place, live[:, None] & there[None, :], other=0)
        y = times_power(y, e - top[:, None], DOUBLE)
        total = tl.dot(y, tile(other, t, o, count, hidden), total, input_precision="ieee", out_dtype=dtype)
    return total


@triton.jit
def _last_power(power, power_exponents, vectors, rank_one, log_rho, own, dot, j, k, inside, stride, tried):
    """Entries (j, k) of the power that the tail goes on from, on the scales 2^e, and e; for A of its limit."""
    e = tl.load(power_exponents + j, inside, other=ZERO)
    p = tl.load(power + k.to(tl.int64) * stride + j, inside, other=0).to(tl.float64)
    u, x = tl.load(vectors + stride + j, inside, other=0), tl.load(vectors + k, inside, other=0)
    limits = tl.exp((tried - 1) * log_rho + ((tried - 1) * own - e).to(tl.float64) * _LN2) * u / dot * x
    return tl.where(rank_one, limits, p), e


@triton.jit
def _missing(EXPONENT: tl.constexpr, DOUBLE: tl.constexpr):
    """What may be missing of a term, less than the least normal number, times 2^EXPONENT above the centre."""
    power = power_of_two(tl.full([], centre(DOUBLE) + EXPONENT, tl.int32), DOUBLE)
    return (power * least_normal(DOUBLE)).to(tl.float64)


@triton.jit(do_not_specialize=["factor_bits", "rtol", "steps", "hidden", "tried"])
def _tail(
    d, d_exponents, h, h_exponents, weight, largest, power, power_exponents, vectors, numbers, ratios, scanned,
    scanned_exponents, kappa1_exponent, factor_bits, rtol, kappa, maxima, underflow, steps, hidden, tried,
    SHRINKS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program b: rows b of κ, with the tail by scanning units b of δ, or columns b, by scanning h.

    δ against time, from the first step that no lag has taken, with ratios of the columns of powers; or h with those of
    their rows. For A both ends are ρ.
    """
    unit = tl.program_id(0) * _UNITS + tl.arange(0, _UNITS)
    live = unit < hidden
    stride = hidden.to(tl.int64)
    scale, own = _scaling(largest, DOUBLE)
    factor, e1 = _number(factor_bits), tl.load(kappa1_exponent)
    log_rho, theta, dot = _spectrum(vectors, numbers, steps, hidden)
    rho = tl.exp(log_rho + own.to(tl.float64) * _LN2)
    bound = _rank_one_bound(numbers, maxima, theta, rho, tried, SHRINKS)
    if tl.program_id(0) == 0:
        tl.store(numbers + _BOUND_A, bound)
    rank_one = bound <= _number(rtol)
    by_column, hopeless = _way(ratios, maxima, rank_one, steps - 1 - tried, hidden)
    count = tl.where(hopeless, 0, steps - 1 - tried)

    late, late_exponents = d + (tried + 1) * stride, d_exponents + tried + 1
    source, source_exponents, other, other_exponents = h, h_exponents, late, late_exponents
    if by_column:
        source, source_exponents, other, other_exponents = late, late_exponents, h, h_exponents
    at = ratios + tl.where(by_column, 0, 2) * stride + unit
    least = tl.where(rank_one, tl.exp(log_rho), tl.load(at, live, other=0))
    most = tl.where(rank_one, tl.exp(log_rho), tl.load(at + stride, live, other=0))
    width, top = _scan(
        source, source_exponents, other_exponents, scanned, scanned_exponents, least, most, unit, live, by_column,
        count, own, stride,
    )  # fmt: skip
    if rank_one == 0:
        _raise(maxima, _WIDTH, width[:, None])
    tl.debug_barrier()

    # Of every term of the sums a number less than the least normal one may be missing, which was to meet one of h or δ.
    missing = _missing(27, DOUBLE) * (steps - 1 - tried)
    roundoff = 2.0**-52 if DOUBLE else 2.0**-23
    for start in range(0, tl.where(hopeless, 0, hidden), _TILE):
        o = start + tl.arange(0, _TILE)
        inside = live[:, None] & (o < hidden)[None, :]
        total = _scanned_pairs(
            scanned, scanned_exponents, other, other_exponents, top, unit, live, o, count, hidden, DOUBLE
        )
        j = tl.where(by_column, unit[:, None], o[None, :])
        k = tl.where(by_column, o[None, :], unit[:, None])
        entry = j.to(tl.int64) * stride + k
        p, e = _last_power(power, power_exponents, vectors, rank_one, log_rho, own, dot, j, k, inside, stride, tried)
        w = factor * square(tl.load(weight + entry, inside, other=0), scale).to(tl.float64)
        scaled = flushed(e + top[:, None]) + own - e1
        term = times_power(w * p * total.to(tl.float64), scaled, True)
        known = tl.load(kappa + entry, inside, other=0)
        weak = inside & (known > 0) & (times_power(w * p * missing, scaled, True) > roundoff * (known + term))
        tl.store(kappa + entry, known + term, inside)
        if rank_one:
            tl.store(underflow, 1, tl.max(tl.max(weak.to(tl.int32), 1), 0) > 0)
        else:
            share = tl.where(inside, _certain(_share(term * width[:, None], known)), 0.0)
            _raise(maxima, _SHARE, tl.where(weak, float("inf"), share))


# ---- the result ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["factor_bits", "rtol", "steps", "hidden", "tried"])
def _result(
    weight, largest, kappa1, kappa1_exponent, factor_bits, sums, sum_exponents, kappa, numbers, maxima, rtol, found,
    lags, bounds, underflow, steps, hidden, tried, CERTIFIED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program b: rows b of κ, in the dtype of the weights on the scale of κ⁽¹⁾."""
    j = (tl.program_id(0) * _UNITS + tl.arange(0, _UNITS)).to(tl.int64)[:, None]
    stride = hidden.to(tl.int64)
    scale, own = _scaling(largest, DOUBLE)
    factor, e1 = _number(factor_bits), tl.load(kappa1_exponent)
    bound = tl.full([], float("inf"), tl.float64)
    if CERTIFIED:
        bound = tl.minimum(tl.load(numbers + _BOUND_A), _geometric_bound(maxima))
        bound = tl.where(bound <= _number(rtol), bound, float("inf"))
    certified = bound < float("inf")
    if tl.program_id(0) == 0:
        tl.store(lags, tl.where(certified, tried, steps - 1).to(tl.int64))
        tl.store(bounds, tl.where(certified, bound, 0.0))
    top = tl.full([_UNITS, 1], ZERO, tl.int64)
    for i in range(tried):
        top = tl.maximum(top, tl.load(sum_exponents + i * stride + j, j < hidden, other=ZERO))
    # As in _tail, of all lags, with powers whose entries are 4 H at most.
    missing = _missing(29, DOUBLE) * steps * steps * hidden
    roundoff = 2.0**-52 if DOUBLE else 2.0**-23
    for start in range(0, hidden, _TILE):
        k = start + tl.arange(0, _TILE)[None, :]
        inside = (j < hidden) & (k < hidden)
        at = j * stride + k
        every, w = _kappa_of(
            weight, kappa1, sums, sum_exponents, at, j, inside, factor, scale, own, e1, hidden, tried, DOUBLE
        )
        if CERTIFIED:
            every = tl.where(certified, tl.load(kappa + at, inside, other=0), every)
        narrow = every.to(found.dtype.element_ty)
        tl.store(found + at, narrow, inside)
        # Where κ⁽¹⁾ is 0 there is nothing to lose: whoever meets a weight twice meets it once.
        some = inside & (tl.load(kappa1 + at, inside, other=0) > 0)
        error = times_power(w * missing, top + own - e1, True)
        right = (error <= roundoff * every) & (narrow >= least_normal(DOUBLE))
        tl.store(underflow, 1, tl.max(tl.max((some & (right == 0)).to(tl.int32), 1), 0) > 0)


def second_term(
    weight: Tensor,
    largest: Tensor,
    d: Tensor,
    d_exponents: Tensor,
    h: Tensor,
    h_exponents: Tensor,
    kappa1: Tensor,
    kappa1_exponent: Tensor,
    factor: float,
    rtol: float,
    tried: int,
    shrinks: bool,
    maxima: Tensor,
    lags: Tensor,
    bounds: Tensor,
    underflow: Tensor,
) -> Tensor:
    """κ⁽¹⁾ + factor · W̃ ⊙ S ``[H, H]``, on the scale of κ⁽¹⁾; it sets ``lags``, ``bounds`` and ``underflow``, ``[1]``.

    ``tried`` lags are summed before a certificate is tried, where there are more and rtol is not 0; ``shrinks`` says
    whether δ_t ≥ δ_{t+1}. ``maxima``, int64 ``[MAXIMA]``, are zeros.
    """
    steps, hidden = d.shape
    tried = min(tried, steps - 1)
    more = tried < steps - 1
    certifies = more and rtol > 0 and tried > 1
    double, bits = is_double(weight), (_bits(factor), _bits(rtol))
    blocks, programs = triton.cdiv(hidden, _UNITS.value), whole(8 if double else 4)
    sequences = (d, d_exponents, h, h_exponents)
    last = tried if more else max(tried - 1, 1)
    powers, exponents = weight.new_empty(last + 1, hidden, hidden), d_exponents.new_empty(last + 1, hidden)
    sums, sum_exponents = weight.new_empty(tried, hidden, hidden), d_exponents.new_empty(tried, hidden)
    found = torch.empty_like(weight)
    # Without a certificate there is nothing in them.
    overlap, overlap_exponent, scratch = found, exponents, powers
    numbers, kappa = (weight.new_empty(n, dtype=torch.float64) for n in (NUMBERS, hidden * hidden if certifies else 0))
    with on_device(d):
        _powers[(blocks,)](weight, largest, powers, exponents, underflow, hidden, last, double, **programs)
        if certifies:
            overlap, overlap_exponent = torch.empty_like(weight), d_exponents.new_empty(1)
        lag_arguments = (sums, sum_exponents, overlap, overlap_exponent, numbers, maxima, bits[1], underflow)
        _lags[(blocks, tried)](
            *sequences, powers, exponents, scratch, *lag_arguments, steps, hidden, tried, False, certifies, double,
            **programs,
        )  # fmt: skip
        if certifies:
            wide = [(6 * hidden,), (tried - 1, hidden), (hidden,), (4, hidden), (steps,)]
            vectors, rows, columns, ratios, dots = (weight.new_empty(shape, dtype=torch.float64) for shape in wide)
            scanned, scanned_exponents = torch.empty_like(d), torch.empty_like(d, dtype=torch.int64)
            _perron[(2,)](
                weight, largest, powers[-1], exponents[-1], vectors, numbers, bits[1], steps, hidden, _ITERATIONS,
                double, **programs,
            )  # fmt: skip
            _deviations[(blocks, tried + 3)](
                d, largest, powers, exponents, vectors, numbers, rows, columns, ratios, dots, steps, hidden, tried,
                double, **programs,
            )  # fmt: skip
            _bounds[(blocks,)](
                weight, largest, d, sums, sum_exponents, overlap, overlap_exponent, exponents[tried - 1], vectors,
                numbers, rows, columns, dots, kappa1, kappa1_exponent, bits[0], kappa, maxima, steps, hidden, tried,
                double, **programs,
            )  # fmt: skip
            _tail[(blocks,)](
                *sequences, weight, largest, powers[tried - 1], exponents[tried - 1], vectors, numbers, ratios, scanned,
                scanned_exponents, kappa1_exponent, *bits, kappa, maxima, underflow, steps, hidden, tried, shrinks,
                double, **programs,
            )  # fmt: skip
        if more:
            scratch = torch.empty_like(sums)
            _lags[(blocks, tried)](
                *sequences, powers, exponents, scratch, *lag_arguments, steps, hidden, tried, True, certifies, double,
                **programs,
            )  # fmt: skip
        _result[(blocks,)](
            weight, largest, kappa1, kappa1_exponent, bits[0], sums, sum_exponents, kappa, numbers, maxima, bits[1],
            found, lags, bounds, underflow, steps, hidden, tried, certifies, double, **programs,
        )  # fmt: skip
    return found


def _bits(x: float) -> int:
    """As int64, for ``_number``."""
    found: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return found
