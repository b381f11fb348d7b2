"""path_update_ on a GPU: a step of Path-SGD, or of Adam in path coordinates.

Three launches for all weights together: programs of BLOCK entries measure, one program decides, and the programs apply
what was decided; ``scale="first_step"`` has one more of each of the first two. They find the weights through a table on
the device, int64 ``[rows, fields]``, of addresses, sizes and the bits of float64 numbers; it is kept as long as these
are the same. Every entry is brought to canonical coordinates, where unit exponents are not seen (Theorem 1), which is
exact, and all arithmetic is done there, in float32 for float32 weights and rates of ordinary size. Quotients and
products are of mantissas, whose exponents are added beside them, so that nothing in between is out of range. Sums are
in float64, with an exponent each, over programs first and those in a fixed order.

The host reads nothing. Arguments are those of ops/step.py.

Bytes moved, for n weights of b bytes each and κ counted where it is dense: 5 b n without momentum, 7 b n with it and
10 b n in coordinates, of which the second reading of gradients and κ, 2 b n, is from the L2 cache where they fit it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import step as codes
from .scaled import least_normal, log2_floor, on_device, times_power, whole

_BLOCK = tl.constexpr(1024)
#: Results of programs that the one that decides takes at a time.
_CHUNK = tl.constexpr(1024)
_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_LN2 = tl.constexpr(math.log(2))
_ZERO = tl.constexpr(-(1 << 40))  # the exponent of a sum of nothing

# Columns of the table. Its rows: recurrent weights, the others that move, the head's bias by rule "coordinates", and
# there, where the head has a bias, the head's weight once more, for γ² of the paths through it.
_START = tl.constexpr(0)  # the weight's first program
_SIZE = tl.constexpr(1)
_COLUMNS = tl.constexpr(2)  # 1 of a vector
_KAPPA = tl.constexpr(3)
_ROW_STRIDE = tl.constexpr(4)
_COLUMN_STRIDE = tl.constexpr(5)
_EXPONENT = tl.constexpr(6)  # address of κ's
_ENTRIES = tl.constexpr(7)  # address of its entries' exponents, strides as κ's; 0 for none
_ROW_UNITS = tl.constexpr(8)  # address of the rows' unit exponents; 0 for none
_COLUMN_UNITS = tl.constexpr(9)
_WEIGHT = tl.constexpr(10)
_GRADIENT = tl.constexpr(11)
_FIRST = tl.constexpr(12)  # 0 for none
_SECOND = tl.constexpr(13)
_COUNT = tl.constexpr(14)
_RATE32 = tl.constexpr(15)  # address of a learning rate in float32; 0 for none
_RATE64 = tl.constexpr(16)
_CODE = tl.constexpr(17)  # 4 times the weight's place
_EPS = tl.constexpr(18)
_RADIUS = tl.constexpr(19)
_NUMBERS = tl.constexpr(20)
_FIELDS = tl.constexpr(29)

# What is decided: places in ``scratch``, int64, where float64 lies by its bits.
_MOVES = tl.constexpr(0)  # whether the weights are written
_BIAS_MOVES = tl.constexpr(1)
_SHARE = tl.constexpr(2)  # of the step that the radius leaves; its exponent
_LENGTH = tl.constexpr(2)  # by rule "coordinates" one over the gradient's; its exponent
_CONSTANT = tl.constexpr(4)  # log, of scale="first_step"
_NO_CONSTANT = tl.constexpr(5)
_HEADER = tl.constexpr(6)
_RULE = tl.constexpr(4)  # then of every row correction, rate and its exponent, and what is kept of the weight
# Then, an array each, what every program has found: a word of these bits and of a weight that overflows; an exponent; a
# sum; and that of gradients, for scale="first_step", or by rule "coordinates" the exponent of a bound of its steps.
_PULLED = tl.constexpr(1)  # some gradient is not 0
_PATHS = tl.constexpr(2)  # some κ is not
_INFINITE = tl.constexpr(4)  # some step of the bias is not finite
_CODE_BITS = tl.constexpr(3)  # bits to the left: the code of the weight
_NONE = tl.constexpr(1 << 40)  # the code of no weight

_NO_PATH = tl.constexpr(codes.NO_PATH)
_NO_FIRST = tl.constexpr(codes.NO_CONSTANT)
_UNBOUNDED = tl.constexpr(codes.UNBOUNDED)
_OVERFLOW = tl.constexpr(codes.OVERFLOW)
_UNREACHED = tl.constexpr(codes.UNREACHED)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _power_of_e(log):
    """e^log as a mantissa in [1, 2) and an exponent; (0, 0) for -inf."""
    exponent = tl.where(tl.abs(log) < float("inf"), tl.floor(log / _LN2), 0.0)
    return tl.exp(log - exponent * _LN2), exponent.to(tl.int64)


@triton.jit
def _root(mantissa, exponent):
    odd = exponent & 1
    return tl.sqrt(tl.where(odd == 1, 2 * mantissa, mantissa)), (exponent - odd) >> 1


@triton.jit
def _times(x, n):
    """x · 2ⁿ."""
    return times_power(x, n, x.dtype == tl.float64)


@triton.jit
def _normal(x):
    """x as a mantissa of 1 ≤ |x| < 2 and an exponent; 0, inf and nan are mantissas."""
    double: tl.constexpr = x.dtype == tl.float64
    small = tl.abs(x) < least_normal(double)
    exponent = log2_floor(tl.abs(tl.where(small, _times(x, 60), x)), double) - tl.where(small, 60, 0)
    return _times(x, -exponent), exponent.to(tl.int64)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _any(flags):
    return tl.max(flags.to(tl.int32), 0) > 0


# ---- the table -------------------------------------------------------------------------------------------------------


@triton.jit
def _entry(table, program, rows, ROWS: tl.constexpr):
    """The table's row of a program's weight, and which it is."""
    slots = tl.arange(0, ROWS)
    starts = tl.load(table + slots * _FIELDS + _START, slots < rows, other=0x7FFFFFFF)
    which = tl.sum((starts <= program).to(tl.int32), 0) - 1
    return table + which * _FIELDS, which


@triton.jit
def _places(entry, program):
    """Of a program's entries: their number, whether they are there, row and column."""
    first = (program - tl.load(entry + _START)) * _BLOCK
    columns = tl.load(entry + _COLUMNS)
    # 32 bits divide several times faster than 64; columns of one weight fit them.
    from_row = (first % columns + tl.arange(0, _BLOCK)).to(tl.uint32)
    row = first // columns + from_row // columns.to(tl.uint32)
    i = first + tl.arange(0, _BLOCK)
    return i, i < tl.load(entry + _SIZE), row, from_row % columns.to(tl.uint32)


@triton.jit
def _number(entry, FIELD: tl.constexpr):
    return tl.load(entry + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def _unless_0(inside, x):
    """inside & (x != 0) of a block and a number. (Triton's interpreter makes integers of a single bool for a block.)"""
    return inside & (tl.broadcast_to(x, inside.shape) != 0)


@triton.jit
def _read(entry, FIELD: tl.constexpr, i, inside, DTYPE: tl.constexpr):
    """Of a tensor, zeros where there is none."""
    address = tl.load(entry + FIELD)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + i, _unless_0(inside, address), other=0)


@triton.jit
def _write(entry, FIELD: tl.constexpr, i, inside, value, DTYPE: tl.constexpr):
    address = tl.load(entry + FIELD)
    if DTYPE.primitive_bitwidth < 32:  # rounded from float64 it would be in one step here, in two there
        value = value.to(tl.float32)
    tl.store(address.to(tl.pointer_type(DTYPE)) + i, value.to(DTYPE), _unless_0(inside, address))


@triton.jit
def _up(entry, row, column, inside):
    """n: the weight times 2ⁿ, and its gradient over it, are in canonical coordinates. Unit exponents are even."""
    rows, columns = tl.load(entry + _ROW_UNITS), tl.load(entry + _COLUMN_UNITS)
    of_rows = tl.load(rows.to(tl.pointer_type(tl.int64)) + row, _unless_0(inside, rows), other=0)
    of_columns = tl.load(columns.to(tl.pointer_type(tl.int64)) + column, _unless_0(inside, columns), other=0)
    return (of_columns - of_rows) >> 1


@triton.jit
def _kappa(entry, row, column, inside, ENTRIES: tl.constexpr, KAPPA: tl.constexpr, U: tl.constexpr):
    """κ as mantissas and exponents; beyond the last entry it is not 0."""
    i = row * tl.load(entry + _ROW_STRIDE) + column * tl.load(entry + _COLUMN_STRIDE)
    kappa, exponent = _normal(tl.load(tl.load(entry + _KAPPA).to(tl.pointer_type(KAPPA)) + i, inside, other=1).to(U))
    exponent += tl.load(tl.load(entry + _EXPONENT).to(tl.pointer_type(tl.int64)))
    if ENTRIES:
        exponent += _read(entry, _ENTRIES, i, inside, tl.int64)
    return kappa, exponent


@triton.jit
def _unit(kappa, exponent):
    """1/sqrt(κ), 0 on no path, as mantissas in (1/2, 1] and exponents."""
    odd = exponent & 1
    root = _sqrt(tl.where(odd == 1, 2 * kappa, kappa))
    return tl.where(kappa > 0, _divide(tl.full(kappa.shape, 1, kappa.dtype), root), 0.0), (odd - exponent) >> 1


@triton.jit
def _rate(entry, there):
    single, double = tl.load(entry + _RATE32, there, other=0), tl.load(entry + _RATE64, there, other=0)
    rate = tl.load(entry + _NUMBERS, there, other=0).to(tl.float64, bitcast=True)
    rate += tl.load(single.to(tl.pointer_type(tl.float32)), there & (single != 0), other=0).to(tl.float64)
    return rate + tl.load(double.to(tl.pointer_type(tl.float64)), there & (double != 0), other=0)


@triton.jit
def _unscaled(grad_scale):
    if grad_scale is None:
        return tl.full([], 1, tl.float64)
    else:
        return 1 / tl.load(grad_scale).to(tl.float64)


# ---- a step of Path-SGD, entry by entry ------------------------------------------------------------------------------


@triton.jit
def _factor(norm, norm_exponent, scratch, grad_scale, SCALE: tl.constexpr):
    """What a gradient is multiplied with."""
    if SCALE == 1:
        factor, exponent = tl.where(norm == 0, 1.0, norm), norm_exponent
    elif SCALE == 2:
        constant = tl.load(scratch + _CONSTANT).to(tl.float64, bitcast=True)
        factor, exponent = _power_of_e(tl.where(constant == constant, constant, 0.0))
    else:
        factor, exponent = tl.full([], 1, tl.float64), tl.full([], 0, tl.int64)
    factor, more = _normal(factor * _unscaled(grad_scale))
    return factor, exponent + more


@triton.jit
def _divisor(entry, kappa, exponent, up, norm, norm_exponent, DAMPED: tl.constexpr):
    """κ + eps γ² as mantissas, inf for 0, and exponents."""
    if DAMPED:
        damping, own = _normal(_number(entry, _EPS) * norm)
        # γ² is one number for all weights: its share is 2^-2n of it.
        own = tl.where(damping > 0, own + norm_exponent - 2 * up, _ZERO)
        most = tl.maximum(tl.where(kappa > 0, exponent, _ZERO), own)
        kappa = _times(kappa, exponent - most) + _times(damping.to(kappa.dtype), own - most)
        exponent = most
    return tl.where(kappa == 0, float("inf"), kappa), exponent  # on no path: no step


@triton.jit
def _descent(
    entry, i, inside, up, kappa, exponent, scratch, log_norm, grad_scale,
    SCALE: tl.constexpr, DAMPED: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """-Δ over the learning rate, before it is shortened, as a mantissa and an exponent, and that, likewise; the new
    momentum; and whether the step of a finite gradient overflows.

    All in the weight's own coordinates: in others an entry on no path may lie beyond all numbers."""
    norm, norm_exponent = _power_of_e(tl.load(log_norm).to(tl.float64))
    gradient = _read(entry, _GRADIENT, i, inside, DTYPE).to(U)
    divisor, exponent = _divisor(entry, kappa, exponent, up, norm, norm_exponent, DAMPED)
    factor, factor_exponent = _factor(norm, norm_exponent, scratch, grad_scale, SCALE)
    pull, of_pull = _normal(gradient)
    quotient = _divide(pull * factor.to(U), divisor)
    quotient = tl.where(_number(entry, _NUMBERS + 4) != 0, -quotient, quotient)
    of_quotient = of_pull + factor_exponent - exponent - 2 * up
    decay, momentum = _number(entry, _NUMBERS + 2), _number(entry, _NUMBERS + 1)
    step = _times(quotient, of_quotient)
    step += decay.to(U) * _read(entry, _WEIGHT, i, _unless_0(inside, decay), DTYPE).to(U)
    first = momentum.to(U) * _read(entry, _FIRST, i, inside, DTYPE).to(U) + step
    step = tl.where(_number(entry, _NUMBERS + 3) != 0, step + momentum.to(U) * first, first)
    alone = (decay == 0) & (momentum == 0)  # a quotient that nothing is added to need be no number before the rate is
    step, of_step = tl.where(alone, quotient, step), tl.where(alone, of_quotient, 0)
    rate, rate_exponent = _normal(_rate(entry, tl.full([], True, tl.int1)))
    # Of what is written nothing is out of range; a radius brings back any step.
    held = tl.abs(first) <= LIMIT
    unbounded = _number(entry, _RADIUS) == 0
    held &= tl.abs(tl.where(unbounded, _times(step, of_step + rate_exponent) * rate.to(U), 0 * step)) <= LIMIT
    return step, of_step, rate, rate_exponent, first, inside & _is_finite(gradient) & (held == 0)


@triton.jit
def _sum_up(words, programs, inside, factor, exponent, x):
    """Leaves Σ factor · x² 2^exponent, of factors of ordinary size."""
    x, more = _normal(x)
    square = factor.to(tl.float64) * x.to(tl.float64) * x.to(tl.float64)
    exponent = tl.where(inside & (square != 0), exponent + 2 * more, _ZERO)
    top = tl.max(exponent, 0)
    square = tl.where(inside, _times(square, exponent - top), 0.0)
    tl.store(words + programs, top)
    tl.store(words + 2 * programs, tl.sum(square, 0).to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["rows", "programs"])
def _measure_first(
    table, scratch, rows, programs, log_norm, constant, grad_scale,
    DAMPED: tl.constexpr, ENTRIES: tl.constexpr, DTYPE: tl.constexpr, KAPPA: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ g² and Σ (g/κ)² in the weights' own coordinates, where the constant is to be found."""
    found = tl.load(constant)
    if found != found:
        program = tl.program_id(0)
        entry, _which = _entry(table, program, rows, ROWS)
        i, inside, row, column = _places(entry, program)
        up = _up(entry, row, column, inside)
        kappa, exponent = _kappa(entry, row, column, inside, ENTRIES, KAPPA, tl.float64)
        norm, norm_exponent = _power_of_e(tl.load(log_norm).to(tl.float64))
        divisor, exponent = _divisor(entry, kappa, exponent, up, norm, norm_exponent, DAMPED)
        gradient = _read(entry, _GRADIENT, i, inside, DTYPE).to(tl.float64) * _unscaled(grad_scale)
        words = scratch + _HEADER + _RULE * ROWS + program
        _sum_up(
            words, programs, inside, tl.full(divisor.shape, 1, tl.float64), -2 * (exponent + 2 * up), gradient / divisor
        )
        tl.store(words + 3 * programs, tl.sum(gradient * gradient, 0).to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["programs"])
def _decide_first(scratch, programs, constant, ROWS: tl.constexpr):
    """log(‖g‖ / ‖g/κ‖), once; nan where either is 0, for then no step is taken that could fix it."""
    found = tl.load(constant)
    refused = tl.full([], 0, tl.int64)
    if found != found:
        words = scratch + _HEADER + _RULE * ROWS
        divided, exponent = _total(words + 2 * programs, words + programs, 0, programs)
        total, _exponent_of_0 = _total(words + 3 * programs, None, 0, programs)
        bad = (_is_finite(total) & _is_finite(divided)) == 0
        none = (total == 0) | (divided == 0) | bad
        logs = tl.log(tl.where(none, 1.0, total)) - tl.log(tl.where(none, 1.0, divided))
        found = tl.where(none, found, (logs - exponent.to(tl.float64) * _LN2) / 2)
        refused = tl.where(bad, _NO_FIRST, 0).to(tl.int64)
    tl.store(scratch + _CONSTANT, found.to(tl.int64, bitcast=True))
    tl.store(scratch + _NO_CONSTANT, refused)


# ---- measure, decide, apply ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "programs", "bias", "mass"])
def _measure(
    table, scratch, rows, programs, bias, mass, log_norm, grad_scale,
    COORDINATES: tl.constexpr, SCALE: tl.constexpr, DAMPED: tl.constexpr, ENTRIES: tl.constexpr, LIMIT: tl.constexpr,
    DTYPE: tl.constexpr, KAPPA: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of every program Σ κ Δ², by rule "coordinates" Σ g²/κ, and what may not be."""
    program = tl.program_id(0)
    entry, which = _entry(table, program, rows, ROWS)
    i, inside, row, column = _places(entry, program)
    up = _up(entry, row, column, inside)
    kappa, exponent = _kappa(entry, row, column, inside, ENTRIES, KAPPA, U)
    words = scratch + _HEADER + _RULE * ROWS + program
    factor, code = kappa, tl.full([], _NONE, tl.int64)
    x = _read(entry, _GRADIENT, i, inside, DTYPE).to(U)
    bits = tl.where(_any(x != 0), _PULLED, 0) | tl.where(_any(inside & (kappa > 0)), _PATHS, 0)
    if COORDINATES:
        if which == bias:
            quotient = x.to(tl.float64) * _unscaled(grad_scale) / _times(kappa.to(tl.float64), exponent)
            bits |= tl.where(_any(inside & (_is_finite(quotient) == 0)), _INFINITE, 0)
        unit, of_unit = _unit(kappa, exponent)
        # What no step of the program reaches, but for γ.
        _rate_mantissa, rate_exponent = _normal(_rate(entry, tl.full([], True, tl.int1)))
        reach = tl.max(tl.where(inside & (kappa > 0), of_unit - up, _ZERO), 0) + rate_exponent + 1
        tl.store(words + 3 * programs, reach)
        is_mass = which == mass  # there it is the weight
        factor = tl.where(is_mass, kappa, unit * unit)
        exponent = tl.where(is_mass, exponent + 2 * up, 2 * (of_unit - up))
    else:
        x, of_x, rate, rate_exponent, _first, overflows = _descent(
            entry, i, inside, up, kappa, exponent, scratch, log_norm, grad_scale, SCALE, DAMPED, LIMIT, DTYPE, U
        )
        code = tl.where(_any(overflows), tl.load(entry + _CODE), _NONE)
        factor, exponent = factor * (rate * rate).to(U), exponent + 2 * (rate_exponent + of_x + up)
    tl.store(words, (code << _CODE_BITS) | bits)
    _sum_up(words, programs, inside, factor, exponent, x)


@triton.jit
def _total(values, exponents, first, last):
    """Σ value · 2^exponent of programs as one such number; float64 by its bits."""
    slots = tl.arange(0, _CHUNK)
    top = tl.full([], 0, tl.int64)
    if exponents is not None:
        most = tl.full([_CHUNK], _ZERO, tl.int64)
        for start in range(first, last, _CHUNK):
            there = start + slots < last
            value = tl.load(values + start + slots, there, other=0).to(tl.float64, bitcast=True)
            exponent = tl.load(exponents + start + slots, there, other=0) + log2_floor(value, True)
            most = tl.maximum(most, tl.where(value != 0, exponent, _ZERO))
        top = tl.max(most, 0)
    total = tl.zeros([_CHUNK], tl.float64)
    for start in range(first, last, _CHUNK):
        there = start + slots < last
        value = tl.load(values + start + slots, there, other=0).to(tl.float64, bitcast=True)
        if exponents is not None:
            value = _times(value, tl.load(exponents + start + slots, there, other=0) - top)
        total += value
    return tl.sum(total, 0), top


@triton.jit
def _bits(words, first, last):
    """All bits of programs, spread over _CHUNK words, and the code of the first weight that overflows."""
    slots = tl.arange(0, _CHUNK)
    bits, code = tl.zeros([_CHUNK], tl.int64), tl.full([_CHUNK], _NONE, tl.int64)
    for start in range(first, last, _CHUNK):
        word = tl.load(words + start + slots, start + slots < last, other=_NONE << _CODE_BITS)
        bits |= word
        code = tl.minimum(code, word >> _CODE_BITS)
    return bits, tl.min(code, 0)


@triton.jit
def _power(x, power):
    """x^power of 0 ≤ x ≤ 1."""
    if power == 1:
        result = x
    elif power == 2:
        result = x * x
    elif power == 3:
        result = x * x * x
    else:
        positive = x > 0
        log = tl.log(tl.where(positive, x.to(tl.float64), 1.0))
        result = tl.where(positive, tl.exp(power * log), 0.0).to(x.dtype)
    return result


@triton.jit
def _in_coordinates(entry, scratch, which, i, inside, up, kappa, exponent, DTYPE: tl.constexpr, U: tl.constexpr):
    """The weight and its averages after the step, and whether it overflows."""
    rule = scratch + _HEADER + which * _RULE
    correction, rate, rate_exponent = _number(rule, 0).to(U), _number(rule, 1).to(U), tl.load(rule + 2)
    beta1, beta2 = _number(entry, _NUMBERS + 1), _number(entry, _NUMBERS + 2)
    unit, of_unit = _unit(kappa, exponent)
    gradient, weight = _read(entry, _GRADIENT, i, inside, DTYPE).to(U), _read(entry, _WEIGHT, i, inside, DTYPE).to(U)
    pull, of_pull = _normal(gradient)
    g = pull * unit * _number(scratch, _LENGTH).to(U)
    g = _times(g, of_pull + of_unit - up + tl.load(scratch + _LENGTH + 1))
    g = tl.where(_number(entry, _NUMBERS + 7) != 0, -g, g)
    m, v = _read(entry, _FIRST, i, inside, DTYPE).to(U), _read(entry, _SECOND, i, inside, DTYPE).to(U)
    m = beta1.to(U) * m + (1 - beta1).to(U) * g
    v = beta2.to(U) * v + (1 - beta2).to(U) * g * g
    root = _sqrt(v * correction)
    # Squares below the dtype's range belong to entries that are as good as on no path.
    reached = root > 0
    size = tl.where(reached, _divide(tl.abs(m), tl.where(reached, root + _number(entry, _NUMBERS + 4).to(U), 1.0)), 0.0)
    step = _power(tl.minimum(size, 1.0), _number(entry, _NUMBERS + 3)) * (rate * unit)
    step = _times(step, rate_exponent + of_unit - up)
    value = _number(rule, 3).to(U) * weight - tl.where(m < 0, -step, step)
    overflows = inside & _is_finite(gradient) & _is_finite(weight) & (_is_finite(value) == 0)
    return value, m, v, overflows


@triton.jit
def _overflow(
    table, scratch, reaches, root_exponent, moving, programs, ENTRIES: tl.constexpr, SAFE: tl.constexpr,
    DTYPE: tl.constexpr, KAPPA: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The code of the first weight that a step in coordinates brings out of range, where the bounds do not exclude it.

    What is below 2^SAFE is nothing beside the largest number.
    """
    slots = tl.arange(0, _CHUNK)
    most, overflow = tl.full([_CHUNK], _ZERO, tl.int64), tl.full([], _NONE, tl.int64)
    for start in range(0, programs, _CHUNK):
        most = tl.maximum(most, tl.load(reaches + start + slots, start + slots < programs, other=_ZERO))
    if tl.max(most, 0) + root_exponent > SAFE:
        for program in range(programs):
            if tl.load(reaches + program) + root_exponent > SAFE:
                entry, which = _entry(table, program, moving, ROWS)
                i, inside, row, column = _places(entry, program)
                up = _up(entry, row, column, inside)
                kappa, exponent = _kappa(entry, row, column, inside, ENTRIES, KAPPA, U)
                _value, _m, _v, gone = _in_coordinates(entry, scratch, which, i, inside, up, kappa, exponent, DTYPE, U)
                overflow = tl.where(_any(gone), tl.minimum(overflow, tl.load(entry + _CODE)), overflow)
    return overflow


@triton.jit
def _unreached(table, words, recurrent):
    """The status if a recurrent weight is on no path and its gradient is not 0, for the first such; else 0."""
    status = tl.full([], 0, tl.int64)
    for row in range(recurrent):
        entry = table + row * _FIELDS
        start = tl.load(entry + _START)
        bits, _lost = _bits(words, start, start + tl.cdiv(tl.load(entry + _SIZE), _BLOCK))
        found = (status == 0) & _any((bits & _PULLED) != 0) & (_any((bits & _PATHS) != 0) == 0)
        status = tl.where(found, _UNREACHED + tl.load(entry + _CODE), status)
    return status


@triton.jit
def _counts(table, rows, ROWS: tl.constexpr):
    """Of every row, where its steps are counted."""
    slots = tl.arange(0, ROWS)
    return tl.load(table + slots * _FIELDS + _COUNT, slots < rows, other=0).to(tl.pointer_type(tl.float32))


@triton.jit
def _decide_rates(
    table, scratch, moving, rows, norm, norm_exponent, length, length_exponent, BIAS: tl.constexpr, ROWS: tl.constexpr
):
    """By rule "coordinates", from γ² and the gradient's squared length: whether weights move, all counts, γ's exponent.

    Leaves what _in_coordinates reads.
    """
    slots = tl.arange(0, ROWS)
    weights, entries = slots < moving, table + slots * _FIELDS
    steps = tl.load(_counts(table, rows, ROWS), slots < rows, other=0) + 1
    length, length_exponent = _root(length, length_exponent)
    goes = (length > 0) & _is_finite(length)
    if BIAS:
        of_bias = tl.sum(tl.where(slots == moving, steps, 0.0), 0)
        goes &= of_bias > _number(table, _NUMBERS + 5)
    beta2 = tl.load(entries + _NUMBERS + 2, weights, other=0).to(tl.float64, bitcast=True)
    warmup = tl.load(entries + _NUMBERS + 6, weights, other=0).to(tl.float64, bitcast=True)
    root, root_exponent = _root(norm, norm_exponent)
    decay = tl.load(entries + _NUMBERS + 8, weights, other=0).to(tl.float64, bitcast=True)
    rate = _rate(entries, weights) * tl.minimum(steps.to(tl.float64) / tl.maximum(warmup, 1.0), 1.0)
    keep = 1 - rate * decay
    rate, rate_exponent = _normal(rate / tl.sqrt(tl.load(entries + _SIZE, weights, other=1).to(tl.float64)))
    correction = 1 / (1 - tl.exp(steps.to(tl.float64) * tl.log(beta2)))
    tl.store(scratch + _LENGTH, (1 / length).to(tl.int64, bitcast=True))
    tl.store(scratch + _LENGTH + 1, -length_exponent)
    rules = scratch + _HEADER + slots * _RULE
    tl.store(rules, correction.to(tl.int64, bitcast=True))
    tl.store(rules + 1, (rate * root).to(tl.int64, bitcast=True))
    tl.store(rules + 2, rate_exponent + root_exponent)
    tl.store(rules + 3, keep.to(tl.int64, bitcast=True))
    return goes, steps, root_exponent


@triton.jit
def _share(total, exponent, norm, norm_exponent, radius):
    """What the radius leaves of a step whose squared length this is, as a mantissa and an exponent."""
    length, length_exponent = _root(total / tl.where(norm > 0, norm, 1.0), exponent - norm_exponent)
    # nan, from a gradient that is not finite, is not longer: torch's own optimisers let it through too.
    longer = (_times(length / radius, length_exponent) > 1) & _is_finite(length) & (norm > 0)
    share, share_exponent = _normal(tl.where(longer, radius / tl.where(longer, length, 1.0), 1.0))
    return share, share_exponent - tl.where(longer, length_exponent, 0)


@triton.jit(do_not_specialize=["recurrent", "moving", "rows", "programs", "weight_programs", "pulling_programs"])
def _decide(
    table, scratch, status, recurrent, moving, rows, programs, weight_programs, pulling_programs, log_norm, constant,
    found_inf,
    COORDINATES: tl.constexpr, SCALE: tl.constexpr, ENTRIES: tl.constexpr, SAFE: tl.constexpr, DTYPE: tl.constexpr,
    KAPPA: tl.constexpr, U: tl.constexpr, BOUNDED: tl.constexpr, BIAS: tl.constexpr, MASS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the status, and what apply needs to know. ``rows`` is without that of γ²."""
    words = scratch + _HEADER + _RULE * ROWS
    exponents, sums = words + programs, words + 2 * programs
    log = tl.load(log_norm).to(tl.float64)
    norm, norm_exponent = _power_of_e(log)
    if MASS:
        norm, norm_exponent = _total(sums, exponents, pulling_programs, programs)
        norm = tl.where(log == log, norm, log)  # a κ that is none
    bits, overflow = _bits(words, 0, pulling_programs)
    pulled = _any((bits & _PULLED) != 0)
    unreached = _unreached(table, words, recurrent)
    code = tl.where(_is_finite(norm), unreached, _UNBOUNDED)
    if COORDINATES or SCALE == 1 or BOUNDED:
        code = tl.where((norm == 0) & pulled, _NO_PATH, code)
    if SCALE == 2:
        code = tl.where(code == 0, tl.load(scratch + _NO_CONSTANT), code)
    if COORDINATES:
        length, length_exponent = _total(sums, exponents, 0, weight_programs)
        goes, steps, root_exponent = _decide_rates(
            table, scratch, moving, rows, norm, norm_exponent, length, length_exponent, BIAS, ROWS
        )
        tl.debug_barrier()  # what threads have read or written here, others write or read below
        if goes & (code == 0):
            overflow = _overflow(
                table, scratch, words + 3 * programs, root_exponent + 1, moving, weight_programs, ENTRIES, SAFE, DTYPE,
                KAPPA, U, ROWS,
            )  # fmt: skip
    code = tl.where((code == 0) & (overflow != _NONE), _OVERFLOW + overflow, code)
    taken = tl.full([], True, tl.int1)
    if found_inf is not None:
        taken = tl.load(found_inf).to(tl.float64) == 0  # nan is a word, too
        code = tl.where(taken, code, 0)
    tl.store(status, code)
    taken &= code == 0

    if COORDINATES:
        fine = _any((bits & _INFINITE) != 0) == 0
        goes &= taken
        tl.store(scratch + _BIAS_MOVES, (taken & fine).to(tl.int64))
        tl.store(scratch + _MOVES, goes.to(tl.int64))
        slots = tl.arange(0, ROWS)
        counted = (slots < rows) & (tl.where(slots < moving, goes.to(tl.int32), taken.to(tl.int32)) != 0)
        tl.store(_counts(table, rows, ROWS), steps, counted)
    else:
        share, share_exponent = tl.full([], 1, tl.float64), tl.full([], 0, tl.int64)
        if BOUNDED:
            total, exponent = _total(sums, exponents, 0, weight_programs)
            share, share_exponent = _share(total, exponent, norm, norm_exponent, _number(table, _RADIUS))
        tl.store(scratch + _MOVES, taken.to(tl.int64))
        tl.store(scratch + _SHARE, share.to(tl.int64, bitcast=True))
        tl.store(scratch + _SHARE + 1, share_exponent)
        if SCALE == 2:
            tl.store(constant, tl.load(scratch + _CONSTANT).to(tl.float64, bitcast=True), taken)


@triton.jit(do_not_specialize=["rows", "bias"])
def _apply(
    table, scratch, rows, bias, log_norm, grad_scale,
    COORDINATES: tl.constexpr, SCALE: tl.constexpr, DAMPED: tl.constexpr, ENTRIES: tl.constexpr, LIMIT: tl.constexpr,
    DTYPE: tl.constexpr, KAPPA: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every weight and its state, written once, where a step is taken."""
    program = tl.program_id(0)
    entry, which = _entry(table, program, rows, ROWS)
    moves = tl.load(scratch + _MOVES + (which == bias).to(tl.int32)) != 0  # a bias: _BIAS_MOVES
    if moves:
        i, inside, row, column = _places(entry, program)
        up = _up(entry, row, column, inside)
        kappa, exponent = _kappa(entry, row, column, inside, ENTRIES, KAPPA, U)
        if COORDINATES:
            if which == bias:
                _move_bias(entry, i, inside, kappa, exponent, grad_scale, DTYPE)
            else:
                value, m, v, _lost = _in_coordinates(entry, scratch, which, i, inside, up, kappa, exponent, DTYPE, U)
                _write(entry, _WEIGHT, i, inside, value, DTYPE)
                _write(entry, _FIRST, i, inside, m, DTYPE)
                _write(entry, _SECOND, i, inside, v, DTYPE)
        else:
            share = tl.load(scratch + _SHARE).to(tl.float64, bitcast=True)
            step, of_step, rate, rate_exponent, first, _lost = _descent(
                entry, i, inside, up, kappa, exponent, scratch, log_norm, grad_scale, SCALE, DAMPED, LIMIT, DTYPE, U
            )
            step = _times(step, of_step + rate_exponent + tl.load(scratch + _SHARE + 1)) * (rate * share).to(U)
            _write(entry, _WEIGHT, i, inside, _read(entry, _WEIGHT, i, inside, DTYPE).to(U) - step, DTYPE)
            _write(entry, _FIRST, i, inside, first, DTYPE)


@triton.jit
def _move_bias(entry, i, inside, kappa, exponent, grad_scale, DTYPE: tl.constexpr):
    """The output's bias by eq. (8) as it stands, no entry of g/κ counting for more than 1."""
    gradient = _read(entry, _GRADIENT, i, inside, DTYPE).to(tl.float64) * _unscaled(grad_scale)
    quotient = gradient / _times(kappa.to(tl.float64), exponent)
    quotient = tl.minimum(tl.maximum(quotient, -1.0), 1.0)
    quotient = tl.where(_number(entry, _NUMBERS + 7) != 0, -quotient, quotient)
    value = _read(entry, _WEIGHT, i, inside, DTYPE).to(tl.float64) - _rate(entry, tl.full([], True, tl.int1)) * quotient
    _write(entry, _WEIGHT, i, inside, value, DTYPE)


# ---- on the host -----------------------------------------------------------------------------------------------------

#: Numbers of a weight, by rule.
_COUNTS = {"sgd": 5, "coordinates": 9}
_MOST = max(_COUNTS.values())


class _Shape(NamedTuple):
    """Rows of a table: recurrent weights, all but the head's bias by rule "coordinates", and all without that of γ²;
    and programs: of all, of ``moving`` and of ``rows``."""

    recurrent: int
    moving: int
    rows: int
    programs: int
    weight_programs: int
    pulling_programs: int


#: Tables by all that they were made from. Training needs few: torch hands out the same memory again.
_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, _Shape]] = OrderedDict()
_TABLES = 16


class _Update(NamedTuple):
    """The arguments of ops/step.py, in their order."""

    weights: Sequence[Tensor]
    gradients: Sequence[Any]
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    counts: Sequence[Tensor]
    constant: Tensor | None
    rates: Sequence[Tensor]
    numbers: Sequence[float]
    rule: str
    chains: int
    bidirectional: bool
    bias: bool
    head: bool
    head_bias: bool
    embedding: bool
    scale: int
    eps: float
    radius: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    kappas: Sequence[Tensor]
    exponents: Tensor
    unit_exponents: Tensor
    entry_exponents: Sequence[Tensor]
    log_path_norm: Tensor


def path_update_(*arguments: Any) -> Tensor:
    """The status, int64, 0-dim, on the device: 0 once the step is taken or left out; with any other it is left out.

    Raises:
        TypeError: tensors on different devices, or state of another dtype than its weight.
        ValueError: arguments that do not fit.
    """
    given = _Update(*arguments)
    moving = [i for i, g in enumerate(given.gradients) if g is not None]
    _check(given, len(moving))
    if not moving:
        return torch.zeros((), dtype=torch.int64, device=given.log_path_norm.device)
    dense, copies = _dense(given, moving)
    with on_device(given.log_path_norm):
        status = _launch(*_table(dense, moving), dense)
    for own, copy in copies:
        own.copy_(copy)
    # Autograd has to hear of a change behind its back.
    state = [*given.first, *given.second, *given.counts]
    changed = [*(given.weights[i] for i in moving), *state, *([] if given.constant is None else [given.constant])]
    torch.autograd.graph.increment_version(changed)
    return status


def _check(given: _Update, moving: int) -> None:
    if given.rule not in _COUNTS:
        raise ValueError(f"rule is {given.rule!r}; use one of {', '.join(map(repr, _COUNTS))}")
    expected = (4 if given.bias else 2) * given.chains + given.head + given.head_bias + given.embedding
    if len(given.weights) != expected:
        raise ValueError(f"there are {len(given.weights)} weights; these chains have {expected}")
    each, numbers, rates = _COUNTS[given.rule], len(given.numbers), len(given.rates)
    if numbers not in (each, moving * each):
        raise ValueError(f"there are {numbers} numbers for {moving} gradients; give {each} once, or for each")
    if rates not in (0, 1, moving):
        raise ValueError(f"there are {rates} rates for {moving} gradients; give none, one, or one for each")
    for state in (given.first, given.second, given.counts):
        if len(state) not in (0, moving):
            raise ValueError(f"there are {len(state)} tensors of state for {moving} gradients; give none, or each")


def _dense(given: _Update, moving: list[int]) -> tuple[_Update, list[tuple[Tensor, Tensor]]]:
    """With contiguous tensors and the gradients of ``moving`` alone; and what is to be copied back to what."""
    copies: list[tuple[Tensor, Tensor]] = []

    def dense(t: Tensor, written: bool = False) -> Tensor:
        if t.is_contiguous():
            return t
        copy = t.contiguous()
        if written:
            copies.append((t, copy))
        return copy

    first, second, counts = (
        [dense(t, written=True) for t in state] for state in (given.first, given.second, given.counts)
    )
    return given._replace(
        weights=[dense(w, written=g is not None) for w, g in zip(given.weights, given.gradients, strict=True)],
        gradients=[dense(given.gradients[i]) for i in moving],
        first=first,
        second=second,
        counts=counts,
        kappas=[dense(k) for k in given.kappas],
        unit_exponents=dense(given.unit_exponents),
        entry_exponents=[dense(e) for e in given.entry_exponents],
    ), copies


def _table(given: _Update, moving: list[int]) -> tuple[Tensor, _Shape]:
    """On the device: one that was made before, or a new one."""
    device = given.log_path_norm.device
    of_weights = (*given.weights, *given.gradients, *given.first, *given.second, *given.counts, *given.rates)
    tensors = (*of_weights, *given.kappas, *given.entry_exponents, given.exponents, given.unit_exponents)
    if any(t.device != device and t.numel() > 0 for t in tensors):
        devices = sorted({str(t.device) for t in tensors if t.numel() > 0} | {str(device)})
        raise TypeError(f"the tensors of a step are on {', '.join(devices)}: move all of them to one device")
    made_from: tuple[Any, ...] = (
        *given[_Update._fields.index("rule") : _Update._fields.index("scale")],
        tuple(given.numbers),
        given.eps,
        given.radius,
        tuple(moving),
        tuple(t.data_ptr() for t in tensors),
        tuple(t.shape for t in (*given.weights, *given.kappas, *given.first, *given.second, *given.counts)),
        tuple(t.dtype for t in of_weights),
        # Of this stream, on which the table's memory is its own, and filled.
        torch.cuda.current_stream().cuda_stream if device.type == "cuda" else device,
    )
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = None if capturing else _tables.get(made_from)
    if found is not None:
        with contextlib.suppress(KeyError):  # another thread may have made room
            _tables.move_to_end(made_from)
        return found
    rows, shape = _rows(given, moving)
    table = _on_device(rows, device, capturing), shape
    if not capturing:
        _tables[made_from] = table
        while len(_tables) > _TABLES:
            _tables.popitem(last=False)
    return table


def _launch(table: Tensor, shape: _Shape, given: _Update) -> Tensor:
    recurrent, moving, rows, programs, weight_programs, pulling_programs = shape
    all_rows = rows + (programs > pulling_programs)
    slots = triton.next_power_of_2(all_rows)
    status = torch.empty((), dtype=torch.int64, device=table.device)
    size = _HEADER.value + _RULE.value * slots + 4 * programs
    scratch = torch.empty(size, dtype=torch.int64, device=table.device)
    bias, mass = (moving if moving < rows else -1), (rows if rows < all_rows else -1)
    rule, constant, log_norm, grad_scale = given.rule, given.constant, given.log_path_norm, given.grad_scale
    # A step of odd size may be below the range.
    rates = given.numbers[:: _COUNTS[rule]] if rule == "sgd" else ()
    dtype = given.weights[0].dtype
    wide = dtype == torch.float64 or any(x and not 2.0**-60 <= x <= 2.0**60 for x in rates)
    kind = {"COORDINATES": rule == "coordinates", "SCALE": given.scale if rule == "sgd" else 0}
    has_entries = any(map(Tensor.numel, given.entry_exponents))
    kappa_dtype = _DTYPES[given.kappas[0].dtype]
    of_kappa = {"ENTRIES": has_entries, "DTYPE": _DTYPES[dtype], "KAPPA": kappa_dtype, "ROWS": slots}
    damping = {"DAMPED": given.eps > 0 and rule == "sgd"}
    limits = torch.finfo(dtype)
    options = {**kind, **of_kappa, "U": tl.float64 if wide else tl.float32}
    if kind["SCALE"] == 2:
        first = _measure_first[(programs,)]
        first(table, scratch, rows, programs, log_norm, constant, grad_scale, **of_kappa, **damping, **whole(8))
        _decide_first[(1,)](scratch, programs, constant, ROWS=slots, **whole(4))
    entries = {**options, **damping, "LIMIT": limits.max, **whole(8)}
    _measure[(programs,)](table, scratch, all_rows, programs, bias, mass, log_norm, grad_scale, **entries)
    _decide[(1,)](
        table, scratch, status, recurrent, moving, rows, programs, weight_programs, pulling_programs, log_norm,
        constant, given.found_inf, **options, BOUNDED=given.radius > 0, BIAS=bias >= 0, MASS=mass >= 0,
        SAFE=math.frexp(limits.max)[1] + math.frexp(limits.eps)[1] - 3, **whole(8),
    )  # fmt: skip
    _apply[(pulling_programs,)](table, scratch, rows, bias, log_norm, grad_scale, **entries)
    return status


def _rows(given: _Update, moving: list[int]) -> tuple[list[int], _Shape]:
    """The table, row by row."""
    per_chain = 4 if given.bias else 2
    of_chains = per_chain * given.chains
    head = of_chains if given.head else -1
    bias = head + 1 if given.rule == "coordinates" and given.head_bias else -1
    recurrent, bias_last = 0, 2
    ranks = [bias_last if i == bias else recurrent if i < of_chains and i % per_chain == 1 else 1 for i in moving]
    order: list[tuple[int, int | None]] = [(moving[s], s) for s in sorted(range(len(moving)), key=ranks.__getitem__)]
    if bias >= 0:
        order.append((head, None))
    table: list[int] = []
    starts = [0]
    for i, s in order:
        table += _row(given, i, s, starts[-1])
        starts.append(starts[-1] + triton.cdiv(given.weights[i].numel(), _BLOCK.value))
    weights = len(moving) - ranks.count(bias_last)
    counts = ranks.count(recurrent), weights, len(moving)
    return table, _Shape(*counts, starts[-1], starts[weights], starts[len(moving)])


def _row(given: _Update, i: int, s: int | None, start: int) -> list[int]:
    """Of weight i, the s-th of those that move; None: of γ²."""
    directions, per_chain = (2 if given.bidirectional else 1), (4 if given.bias else 2)
    shared = per_chain // 4  # both biases of a chain have one κ
    chain, kind = divmod(i, per_chain)
    if chain < given.chains:
        place = (per_chain - shared) * chain + min(kind, 2)
        units = chain, (chain - chain % directions - directions, chain, -1, -1)[kind]
    else:
        place = i - shared * given.chains
        units = -1, given.chains - directions if given.head and i == per_chain * given.chains else -1
    weight, kappa, exponents = given.weights[i], given.kappas[place], given.unit_exponents
    states = [None if s is None or not state else state[s] for state in (given.first, given.second, given.counts)]
    for state in states[:2]:
        if state is not None and state.numel() > 0 and state.dtype != weight.dtype:
            raise TypeError(
                f"a tensor of state is {state.dtype}, but its weight is {weight.dtype} (cast since?): convert one"
            )
        if state is not None and state.numel() > 0 and state.shape != weight.shape:
            raise ValueError(f"a tensor of state has shape {tuple(state.shape)}, its weight {tuple(weight.shape)}")
    averaged = given.rule == "coordinates" and s is not None and i != per_chain * given.chains + given.head
    if averaged and any(state is None or state.numel() == 0 for state in states[:2]) and weight.numel() > 0:
        raise ValueError(f"weight {i} has no averages; give first and second of its shape")
    if s is not None and given.gradients[s].dtype != weight.dtype:
        raise TypeError(f"a gradient is {given.gradients[s].dtype}, but its weight is {weight.dtype}: convert one")
    if states[2] is not None and (states[2].dtype != torch.float32 or states[2].numel() != 1):
        raise TypeError(f"a count of steps is {states[2].dtype}, {tuple(states[2].shape)}; it must be one float32")
    strides = kappa.expand_as(weight).stride()
    rate = None if s is None or not given.rates else given.rates[s if len(given.rates) > 1 else 0]
    single = rate is not None and rate.dtype == torch.float32
    return [
        start,
        weight.numel(),
        weight.shape[1] if weight.dim() == 2 else 1,
        kappa.data_ptr(),
        strides[0],
        strides[1] if weight.dim() == 2 else 0,
        given.exponents.data_ptr() + place * given.exponents.stride(0) * 8,
        given.entry_exponents[place].data_ptr() if given.entry_exponents else 0,
        *(exponents.data_ptr() + c * exponents.stride(0) * 8 if c >= 0 else 0 for c in units),
        weight.data_ptr(),
        (weight if s is None else given.gradients[s]).data_ptr(),
        *(0 if state is None else state.data_ptr() for state in states),
        rate.data_ptr() if rate is not None and single else 0,
        rate.data_ptr() if rate is not None and not single else 0,
        4 * i,
        *map(_float_bits, [given.eps, given.radius, *([0.0] * _MOST if s is None else _numbers(given, s))]),
    ]


def _numbers(given: _Update, s: int) -> list[float]:
    """Of the s-th weight that moves."""
    each = _COUNTS[given.rule]
    first = s * each if len(given.numbers) > each else 0
    own = list(given.numbers[first : first + each])
    if given.rates:
        own[0] = 0.0
    if given.rule == "sgd" and not (given.first and given.first[s].numel()):  # no momentum where there is none of it
        own[1] = own[3] = 0.0
    return own + [0.0] * (_MOST - each)


def _float_bits(x: float) -> int:
    return struct.unpack("q", struct.pack("d", x))[0]


def _on_device(values: list[int], device: torch.device, capturing: bool) -> Tensor:
    if capturing:
        # A copy would be from the host's memory again at every replay; the arguments of kernels stay in the graph.
        table = torch.zeros(len(values), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), values)
        return table
    pinned = device.type != "cpu"
    return torch.tensor(values, device="cpu", pin_memory=pinned).to(device, non_blocking=True)
