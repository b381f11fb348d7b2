"""What enters path_chain's chains and what comes of them: squared sums, drives, sums over time, log γ².

Specification: tests/gpu_model.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scaled import (
    HALF_ZERO,
    ZERO,
    centre,
    either,
    faint,
    is_double,
    least_normal,
    log2_floor,
    log_scale,
    natural_exponent,
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

#: Rows that one program sums by columns; of more, partial sums are added by a second launch.
_SPLIT = tl.constexpr(1024)
#: Columns of a program that sums over rows, and rows that it takes at a time.
_WIDE, _TALL = tl.constexpr(32), tl.constexpr(32)
#: Entries that the programs for single vectors take at a time.
_CHUNK = tl.constexpr(1024)
#: Below it, what products of float64 that underflow have lost shows in their sum.
_FAINT = tl.constexpr(2.0**-967)
#: Steps that a program which sums over time takes at a time.
_STEPS = tl.constexpr(64)
#: Rows and columns of a program that sums over pairs: 64 spill.
_PAIR_TILE = 32
#: Units of a program of the drives, and inputs that it takes at a time.
_UNITS, _INPUTS = tl.constexpr(16), tl.constexpr(64)
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _scale(most, DOUBLE: tl.constexpr):
    return power_of_two(-log_scale(most, DOUBLE), DOUBLE)


@triton.jit
def _near(DOUBLE: tl.constexpr):
    """2^centre: drives and head come near it, as the chains keep what they make of them."""
    return power_of_two(tl.full([], centre(DOUBLE), tl.int32), DOUBLE)


@triton.jit
def _nonzero(w, squares):
    """Squares of what is zero out of the way, where the least is looked for."""
    return tl.where(w != 0, squares, float("inf"))


@triton.jit
def _columns(
    w, largest, sums, exponent, underflow, block, split, rows, columns, DOUBLE: tl.constexpr, NEAR: tl.constexpr
):
    """Of the squares, the sums of the block-th _WIDE columns over the split-th _SPLIT rows."""
    most = tl.load(largest)
    scale = _scale(most, DOUBLE)
    column = block * _WIDE + tl.arange(0, _WIDE)
    total = tl.zeros([_TALL, _WIDE], w.dtype.element_ty)
    least = tl.full([_TALL, _WIDE], float("inf"), w.dtype.element_ty)
    first = split * _SPLIT
    for start in range(first, tl.minimum(first + _SPLIT, rows), _TALL):
        row = start + tl.arange(0, _TALL)
        entries = tile(w, row, column, rows, columns)
        squares = square(entries, scale)
        total += squares
        least = tl.minimum(least, _nonzero(entries, squares))
    found = tl.sum(total, 0)
    up = 0
    if NEAR:
        found *= _near(DOUBLE)
        up = centre(DOUBLE)
    tl.store(sums + split.to(tl.int64) * columns + column, found, column < columns)
    tl.store(underflow, 1, tl.min(tl.min(least, 1), 0) < least_normal(DOUBLE))
    if (block == 0) & (split == 0):
        tl.store(exponent, square_exponent(most, DOUBLE) - up)


@triton.jit(do_not_specialize=["rows", "columns"])
def _column_sums(w, largest, sums, exponent, underflow, rows, columns, DOUBLE: tl.constexpr):
    _columns(w, largest, sums, exponent, underflow, tl.program_id(0), tl.program_id(1), rows, columns, DOUBLE, False)


def column_sums(w: Tensor, largest: Tensor, underflow: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_r (w[r, n] · 2^-m)² and its exponent 2m."""
    rows, columns = w.shape
    splits = triton.cdiv(rows, _SPLIT.value)
    sums, exponent = w.new_empty(splits, columns), largest.new_empty(1, dtype=torch.int64)
    with on_device(w):
        _column_sums[(triton.cdiv(columns, _WIDE.value), splits)](
            w, largest, sums, exponent, underflow, rows, columns, is_double(w), enable_fp_fusion=True
        )
    return _total(sums), exponent


def _total(sums: Tensor) -> Tensor:
    return sums[0] if len(sums) == 1 else sums.sum(0)


@triton.jit
def _drive(
    weight, bias_ih, bias_hh, inputs, inputs_exponent, largest, drive, exponents, underflow, block, hidden, width,
    layers,
    DOUBLE: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The block-th _UNITS entries of every layer's drive."""
    dtype = weight.dtype.element_ty
    stride = hidden.to(tl.int64)
    row = block * _UNITS + tl.arange(0, _UNITS)
    live = row < hidden
    most = tl.load(largest)
    scale = _scale(most, DOUBLE)
    total = tl.zeros([_UNITS, _INPUTS], dtype)
    least = tl.full([_UNITS, _INPUTS], float("inf"), dtype)
    given = tl.zeros([_UNITS, _INPUTS], tl.int1)
    for start in range(0, width, _INPUTS):
        column = start + tl.arange(0, _INPUTS)
        w = tile(weight, row, column, hidden, width)
        squares = square(w, scale)
        least = tl.minimum(least, _nonzero(w, squares))
        if INPUTS:
            x = tl.load(inputs + column, column < width, other=0)[None, :]
            squares *= x
            given |= (w != 0) & (x != 0)
        else:
            given |= w != 0
        total += squares
    underflows = tl.min(tl.min(least, 1), 0) < least_normal(DOUBLE)
    pushed = tl.sum(total, 1)
    driven = tl.max(given.to(tl.int32), 1) > 0
    top = square_exponent(most, DOUBLE)
    if INPUTS:
        top += tl.load(inputs_exponent)
    for i in range(layers):
        at = i * stride + row
        if BIAS:
            most_ih, most_hh = tl.load(largest + 2 * layers + i), tl.load(largest + 3 * layers + i)
            b_ih, b_hh = tl.load(bias_ih + at, live, other=0), tl.load(bias_hh + at, live, other=0)
            ih, hh = square(b_ih, _scale(most_ih, DOUBLE)), square(b_hh, _scale(most_hh, DOUBLE))
            underflows |= tl.min(tl.minimum(_nonzero(b_ih, ih), _nonzero(b_hh, hh)), 0) < least_normal(DOUBLE)
            driven |= (b_ih != 0) | (b_hh != 0)
            e_ih, e_hh = square_exponent(most_ih, DOUBLE), square_exponent(most_hh, DOUBLE)
            joint = tl.maximum(top, tl.maximum(e_ih, e_hh))
            pushed = times_power(pushed, top - joint, DOUBLE)
            pushed += times_power(ih, e_ih - joint, DOUBLE) + times_power(hh, e_hh - joint, DOUBLE)
            top = joint
        underflows |= tl.max((driven & (pushed < least_normal(DOUBLE))).to(tl.int32), 0) > 0
        tl.store(drive + at, pushed * _near(DOUBLE), live)
        if block == 0:
            tl.store(exponents + i, tl.where(top < HALF_ZERO, ZERO, top - centre(DOUBLE)))
        # Only the first layer has inputs of its own.
        pushed, driven = tl.zeros([_UNITS], dtype), tl.zeros([_UNITS], tl.int1)
        top = tl.full([], ZERO, tl.int64)
    tl.store(underflow, 1, underflows)


@triton.jit
def _square_sum(x, largest, total, exponent, underflow, count, DOUBLE: tl.constexpr):
    most = tl.load(largest)
    scale = _scale(most, DOUBLE)
    sums = tl.zeros([_CHUNK], x.dtype.element_ty)
    least = tl.full([_CHUNK], float("inf"), x.dtype.element_ty)
    for start in range(0, count, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        entry = tl.load(x + i, i < count, other=0)
        squares = square(entry, scale)
        sums += squares
        least = tl.minimum(least, _nonzero(entry, squares))
    tl.store(total, tl.sum(sums, 0))
    tl.store(exponent, square_exponent(most, DOUBLE))
    tl.store(underflow, 1, tl.min(least, 0) < least_normal(DOUBLE))


@triton.jit(do_not_specialize=["hidden", "width", "layers", "outputs"])
def _ends(
    weight, bias_ih, bias_hh, head_weight, head_bias, inputs, inputs_exponent, largest,
    drive, drive_exponents, head, head_exponent, bias, bias_exponent, underflow, hidden, width, layers, outputs,
    DOUBLE: tl.constexpr, INPUTS: tl.constexpr, BIAS: tl.constexpr, HEAD: tl.constexpr, HEAD_BIAS: tl.constexpr,
):  # fmt: skip
    """Programs for the drives, then one for the head's bias, then those for the head, as in _column_sums."""
    drives, place = tl.cdiv(hidden, _UNITS), tl.program_id(0)
    largest_head = largest + (4 * layers if BIAS else 2 * layers)
    if place < drives:
        _drive(
            weight, bias_ih, bias_hh, inputs, inputs_exponent, largest, drive, drive_exponents, underflow, place,
            hidden, width, layers, DOUBLE, INPUTS, BIAS,
        )  # fmt: skip
    elif place == drives:
        if HEAD_BIAS:
            _square_sum(head_bias, largest_head + (1 if HEAD else 0), bias, bias_exponent, underflow, outputs, DOUBLE)
        else:
            tl.store(bias, 0.0)
            tl.store(bias_exponent, ZERO)
    else:
        across, place = tl.cdiv(hidden, _WIDE), place - drives - 1
        block, split = place % across, place // across
        if HEAD:
            _columns(
                head_weight, largest_head, head, head_exponent, underflow, block, split, outputs, hidden, DOUBLE, True
            )
        else:
            column = block * _WIDE + tl.arange(0, _WIDE)
            tl.store(head + column, tl.full([_WIDE], 1, weight.dtype.element_ty) * _near(DOUBLE), column < hidden)
            tl.store(head_exponent, -centre(DOUBLE))


def ends(
    weight_ih: Tensor,
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    inputs: Tensor | None,
    inputs_exponent: Tensor | None,
    layers: int,
    largest: Tensor,
    underflow: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The drive of layer 0 and the biases' part of the others' ``[L, H]``, the head's squared column sums ``[H]`` and
    its bias's sum of squares ``[1]``, each with exponents."""
    hidden, width = weight_ih.shape
    outputs = next((len(x) for x in (head_weight, head_bias) if x is not None), 1)
    splits = triton.cdiv(outputs, _SPLIT.value) if head_weight is not None else 1
    drive, head, bias = (weight_ih.new_empty(shape) for shape in ((layers, hidden), (splits, hidden), (1,)))
    exponents = [largest.new_empty(n, dtype=torch.int64) for n in (layers, 1, 1)]
    programs = triton.cdiv(hidden, _UNITS.value) + 1 + splits * triton.cdiv(hidden, _WIDE.value)
    with on_device(drive):
        _ends[(programs,)](
            weight_ih, _end_to_end(bias_ih, weight_ih), _end_to_end(bias_hh, weight_ih),
            either(head_weight, weight_ih), either(head_bias, weight_ih), either(inputs, weight_ih),
            either(inputs_exponent, exponents[0]), largest, drive, exponents[0], head, exponents[1], bias,
            exponents[2], underflow, hidden, width, layers, outputs, is_double(drive), inputs is not None,
            bool(bias_ih), head_weight is not None, head_bias is not None, enable_fp_fusion=True,
        )  # fmt: skip
    return drive, exponents[0], _total(head), exponents[1], bias, exponents[2]


def _end_to_end(biases: list[Tensor], other: Tensor) -> Tensor:
    if len(biases) > 1:
        return torch.cat(biases)
    return biases[0] if biases else other


@triton.jit
def _row_sum(rows, exponents, total, exponent, underflow, count, hidden, DOUBLE: tl.constexpr):
    """The sum over time of _WIDE columns."""
    column = tl.program_id(0) * _WIDE + tl.arange(0, _WIDE)
    top = top_of(exponents, None, count, _STEPS)
    sums = tl.zeros([_STEPS, _WIDE], rows.dtype.element_ty)
    some = tl.zeros([_STEPS, _WIDE], tl.int1)
    for start in range(0, count, _STEPS):
        t = start + tl.arange(0, _STEPS)
        x = tile(rows, t, column, count, hidden)
        e = tl.load(exponents + t, t < count, other=ZERO)
        some |= x != 0
        sums += times_power(x, (e - top)[:, None], DOUBLE)
    result = natural_exponent(top, centre(DOUBLE))
    summed = tl.sum(sums, 0)
    found = times_power(summed, top - result, DOUBLE)
    tl.store(total + column, found, column < hidden)
    there = tl.max(some.to(tl.int32), 0) > 0
    underflows = there & ((summed < faint(DOUBLE)) | (found < least_normal(DOUBLE)))
    tl.store(underflow, 1, tl.max(underflows.to(tl.int32), 0) > 0)
    if tl.program_id(0) == 0:
        tl.store(exponent, result)


@triton.jit(do_not_specialize=["count", "more_count", "hidden"])
def _row_sums(
    rows, exponents, total, exponent, more_rows, more_exponents, more_total, more_exponent, underflow, count,
    more_count,
    hidden, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program (k, y): columns k of sequence y."""
    if tl.program_id(1) == 0:
        _row_sum(rows, exponents, total, exponent, underflow, count, hidden, DOUBLE)
    else:
        _row_sum(more_rows, more_exponents, more_total, more_exponent, underflow, more_count, hidden, DOUBLE)


def row_sums(
    rows: Tensor, exponents: Tensor, more_rows: Tensor | None, more_exponents: Tensor | None, underflow: Tensor
) -> list[Tensor]:
    """Σ_t rows[t] · 2^exponents[t] and its exponent, on a natural scale; of one sequence or two."""
    hidden = rows.shape[1]
    both = more_rows is not None
    found = [x for _ in range(2) for x in (rows.new_empty(hidden), exponents.new_empty(1))]
    with on_device(rows):
        _row_sums[(triton.cdiv(hidden, _WIDE.value), 2 if both else 1)](
            rows, exponents, *found[:2], either(more_rows, rows), either(more_exponents, exponents), *found[2:],
            underflow, len(rows), 0 if more_rows is None else len(more_rows), hidden, is_double(rows),
            enable_fp_fusion=True,
        )  # fmt: skip
    return found if both else found[:2]


@triton.jit(do_not_specialize=["late", "early", "hidden"])
def _pair_sums(
    d, d_exponents, h, h_exponents, sums, exponent, underflow, late, early, hidden,
    DOUBLE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (j, k): TILE × TILE entries of Σ_t δ_t h_tᵀ."""
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (j < hidden)[:, None] & (k < hidden)[None, :]
    count = tl.minimum(early, late)
    top = top_of(d_exponents, h_exponents, count, _CHUNK)
    dtype = d.dtype.element_ty
    summed = tl.zeros([TILE, TILE], dtype)
    for start in range(0, count, STEPS):
        t = start + tl.arange(0, STEPS)
        live = t < count
        shift = tl.load(d_exponents + t, live, other=ZERO) + tl.load(h_exponents + t, live, other=ZERO) - top
        delta = times_power(transposed_tile(d, t, j, count, hidden), shift[None, :], DOUBLE)
        summed = tl.dot(delta, tile(h, t, k, count, hidden), summed, input_precision="ieee", out_dtype=dtype)
    result = natural_exponent(top, 2 * centre(DOUBLE))
    total = times_power(summed, top - result, DOUBLE)
    # Of an entry that has pairs and is yet too small, what underflowed counts. That was a number of δ, to meet one of
    # h, which is near its centre: 2^24 above it at most, whatever the sizes.
    tiny = total < least_normal(DOUBLE)
    above = power_of_two(tl.full([], centre(DOUBLE) + 24, tl.int32), DOUBLE)
    small = inside & (tiny | (summed < faint(DOUBLE) * above))
    if tl.max(tl.max(small.to(tl.int32), 1), 0) > 0:
        pairs, most = tl.zeros([TILE, TILE], tl.float32), tl.full([STEPS, TILE], 1, dtype)
        for start in range(0, count, STEPS):
            t = start + tl.arange(0, STEPS)
            delta, rows = transposed_tile(d, t, j, count, hidden), tile(h, t, k, count, hidden)
            one = tl.dot((delta != 0).to(tl.float32), (rows != 0).to(tl.float32), input_precision="ieee")
            pairs += one
            most = tl.maximum(most, rows)
        small &= tiny | (summed < 2 * faint(DOUBLE) * tl.max(most, 0)[None, :])
        tl.store(underflow, 1, tl.max(tl.max((small & (pairs > 0)).to(tl.int32), 1), 0) > 0)
    tl.store(sums + j.to(tl.int64)[:, None] * hidden + k[None, :], total, inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(exponent, result)


def pair_sums(
    d: Tensor, d_exponents: Tensor, h: Tensor, h_exponents: Tensor, underflow: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_t δ_t h_tᵀ ``[H, H]`` over the steps that both have, and its exponent, on a natural scale."""
    hidden = d.shape[1]
    sums, exponent = d.new_empty(hidden, hidden), d_exponents.new_empty(1)
    double = is_double(d)
    tiles = triton.cdiv(hidden, _PAIR_TILE)
    options = whole(4) if double else {"num_warps": 4, "enable_fp_fusion": True}
    with on_device(d):
        _pair_sums[(tiles, tiles)](
            d, d_exponents, h, h_exponents, sums, exponent, underflow, len(d), len(h), hidden, double,
            TILE=_PAIR_TILE, STEPS=16, **options,
        )  # fmt: skip
    return sums, exponent


@triton.jit
def _log(x, exponent):
    """log(x · 2^exponent) of a float64 x ≥ 0. The exponents meet as integers, so that what cancels does so exactly."""
    own = log2_floor(x, True).to(tl.int64)
    mantissa = tl.where(x > 0, times_power(x, -own, True), 1.0)
    return tl.where(x > 0, tl.log(mantissa) + (own + exponent).to(tl.float64) * _LN2, float("-inf"))


@triton.jit(do_not_specialize=["steps", "hidden", "count"])
def _finish(
    outputs,
    outputs_exponent,
    head,
    head_exponent,
    head_bias,
    head_bias_exponent,
    largest,
    underflow,
    out,
    of_bias,
    arithmetic,
    steps,
    hidden,
    count,
):
    """One program."""
    slots = tl.arange(0, _CHUNK)
    sums = tl.zeros([_CHUNK], tl.float64)
    meet = tl.zeros([_CHUNK], tl.int1)
    for start in range(0, hidden, _CHUNK):
        i = start + slots
        x = tl.load(outputs + i, i < hidden, other=0).to(tl.float64)
        y = tl.load(head + i, i < hidden, other=0).to(tl.float64)
        sums += x * y
        meet |= (x != 0) & (y != 0)
    finite = tl.full([_CHUNK], 1, tl.int1)
    for start in range(0, count, _CHUNK):
        finite &= tl.abs(tl.load(largest + start + slots, start + slots < count, other=0)) < float("inf")
    dot = tl.sum(sums, 0)
    through = _log(dot, tl.load(outputs_exponent) + tl.load(head_exponent))
    bias = _log(tl.load(head_bias).to(tl.float64) * steps, tl.load(head_bias_exponent))
    top = tl.maximum(through, bias)
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.exp(through - top) + tl.exp(bias - top)
    value = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    # Products of float64 may underflow; those of float32 do not.
    missing = (tl.load(underflow) != 0) | ((tl.max(meet.to(tl.int32), 0) != 0) & (dot < _FAINT))
    tl.store(out, tl.where((tl.min(finite.to(tl.int32), 0) != 0) & (missing == 0), value, float("nan")))
    tl.store(of_bias, steps)
    tl.store(arithmetic, tl.where(missing, -1, 0))


def finish(
    outputs: Tensor,
    outputs_exponent: Tensor,
    head: Tensor,
    head_exponent: Tensor,
    head_bias: Tensor,
    head_bias_exponent: Tensor,
    steps: int,
    largest: Tensor,
    underflow: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """log γ² of outputs · head + steps · head_bias, float64; nan where ``largest`` is not finite, or something
    underflows. Then ``steps``, and -1 where something underflows."""
    log_norm, bias = outputs.new_empty((), dtype=torch.float64), outputs.new_empty(1)
    arithmetic = outputs.new_empty((), dtype=torch.int8)
    with on_device(outputs):
        _finish[(1,)](
            outputs, outputs_exponent, head, head_exponent, head_bias, head_bias_exponent, largest, underflow, log_norm,
            bias, arithmetic, steps, len(outputs), len(largest), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return log_norm, bias, arithmetic
