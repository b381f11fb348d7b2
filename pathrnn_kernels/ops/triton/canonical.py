"""Canonical coordinates: the exponents of what reaches every unit and of what it reaches, and the weights rescaled.

Specification: tests/gpu_model.py. Exponents are sums and maxima of integers: in any order, the same.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scaled import either, is_double, least_normal, log2_floor, on_device, power_of_two, times_power

#: The exponent of a unit that nothing reaches.
NONE = tl.constexpr(-(1 << 30))
_ROWS, _COLUMNS = tl.constexpr(16), tl.constexpr(64)
#: Weights that one program rescales.
_TILE = tl.constexpr(1024)
#: Entries of W_hh that a program of reach has under way.
_REACH_ENTRIES = 4096


@triton.jit
def _square_exponents(w, DOUBLE: tl.constexpr):
    """2 ⌊log₂ |w|⌋ as int32, NONE for a zero; subnormal numbers are brought among the normal ones first."""
    up = 64 if DOUBLE else 32
    size = tl.abs(w)
    small = size < least_normal(DOUBLE)
    e = log2_floor(tl.where(small, size * power_of_two(tl.full([], up, tl.int32), DOUBLE), size), DOUBLE)
    return tl.where(size == 0, NONE, 2 * tl.where(small, e - up, e))


@triton.jit
def _through(exponents, source):
    return tl.where((exponents == NONE) | (source == NONE), NONE, exponents + source)


@triton.jit
def _maxima_of(
    w, source, result, block, inner, outer, step_inner, step_outer, SOURCE: tl.constexpr, DOUBLE: tl.constexpr
):
    """The block-th _ROWS results: maxima over ``inner``, _COLUMNS at a time."""
    out = block * _ROWS + tl.arange(0, _ROWS)
    most = tl.full([_ROWS, _COLUMNS], NONE, tl.int32)
    for start in range(0, inner, _COLUMNS):
        at = start + tl.arange(0, _COLUMNS)
        mask = (out < outer)[:, None] & (at < inner)[None, :]
        tile = tl.load(
            w + out.to(tl.int64)[:, None] * step_outer + at.to(tl.int64)[None, :] * step_inner, mask, other=0
        )
        found = _square_exponents(tile, DOUBLE)
        if SOURCE:
            found = _through(found, tl.load(source + at, at < inner, other=NONE)[None, :])
        most = tl.maximum(most, found)
    tl.store(result + out, tl.max(most, 1), out < outer)


@triton.jit(do_not_specialize=["rows_r", "rows_n", "columns_r", "columns_n"])
def _maxima(
    rows, row_source, row_maxima, columns, column_source, column_maxima, rows_r, rows_n, columns_r, columns_n,
    ROW_SOURCE: tl.constexpr, COLUMN_SOURCE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Programs of the rows, then of the columns."""
    row_blocks, place = tl.cdiv(rows_r, _ROWS), tl.program_id(0)
    if place < row_blocks:
        _maxima_of(rows, row_source, row_maxima, place, rows_n, rows_r, 1, rows_n, ROW_SOURCE, DOUBLE)
    else:
        _maxima_of(
            columns, column_source, column_maxima, place - row_blocks, columns_r, columns_n, columns_n, 1,
            COLUMN_SOURCE, DOUBLE,
        )  # fmt: skip


def maxima(
    rows: Tensor | None, row_source: Tensor | None, columns: Tensor | None, column_source: Tensor | None
) -> tuple[Tensor, Tensor]:
    """max_n 2 e(rows[r, n]) + row_source[n] and max_r 2 e(columns[r, n]) + column_source[r], e = ⌊log₂ |·|⌋; int32."""
    like = columns if rows is None else rows
    assert like is not None
    shapes = [(0, 0) if w is None else w.shape for w in (rows, columns)]
    found = [torch.empty(n, dtype=torch.int32, device=like.device) for n in (shapes[0][0], shapes[1][1])]
    programs = sum(triton.cdiv(len(x), _ROWS.value) for x in found)
    with on_device(like):
        _maxima[(programs,)](
            either(rows, like), either(row_source, found[0]), found[0], either(columns, like),
            either(column_source, found[1]), found[1], *shapes[0], *shapes[1],
            row_source is not None, column_source is not None, is_double(like), enable_fp_fusion=True,
        )  # fmt: skip
    return found[0], found[1]


@triton.jit(do_not_specialize=["hidden", "chains"])
def _reach(
    weight_h, start_h, bias_ih, bias_hh, weight_d, start_d, f, g, hidden, chains,
    BIAS: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program i: one chain's h, or its δ. Where all units are reached from the start, W_hh is not read."""
    side, chain = tl.program_id(0) // chains, (tl.program_id(0) % chains).to(tl.int64)
    weight, start, result = weight_h, start_h, f
    out_stride, into_stride = hidden.to(tl.int64), tl.full([], 1, tl.int64)
    if side == 1:
        weight, start, result = weight_d, start_d, g
        out_stride, into_stride = into_stride, out_stride
    weight += chain * hidden * hidden
    result += chain * hidden
    unit = tl.arange(0, BLOCK)
    live = unit < hidden
    found = tl.load(start + chain * hidden + unit, live, other=0)
    if BIAS:
        for_h = unit < tl.where(side == 0, hidden, 0)
        b_ih = tl.load(bias_ih + chain * hidden + unit, for_h, other=0)
        b_hh = tl.load(bias_hh + chain * hidden + unit, for_h, other=0)
        found = tl.maximum(found, tl.maximum(_square_exponents(b_ih, DOUBLE), _square_exponents(b_hh, DOUBLE)))
    tl.store(result + unit, found, live)
    missing = tl.sum((live & (found == NONE)).to(tl.int32), 0)
    before = missing + 1
    while (missing > 0) & (missing < before):
        tl.debug_barrier()  # what all threads stored is read
        more = tl.full([BLOCK, TILE], NONE, tl.int32)
        for first in range(0, hidden, TILE):
            into = first + tl.arange(0, TILE)
            source = tl.load(result + into, into < hidden, other=NONE)
            mask = (live & (found == NONE))[:, None] & ((into < hidden) & (source != NONE))[None, :]
            at = unit.to(tl.int64)[:, None] * out_stride + into.to(tl.int64)[None, :] * into_stride
            w = tl.load(weight + at, mask, other=0)
            more = tl.maximum(more, _through(_square_exponents(w, DOUBLE), source[None, :]))
        found = tl.where(found == NONE, tl.max(more, 1), found)
        tl.debug_barrier()
        tl.store(result + unit, found, live)
        before = missing
        missing = tl.sum((live & (found == NONE)).to(tl.int32), 0)


def reach(
    weight_h: Tensor,
    start_h: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_d: Tensor,
    start_d: Tensor,
) -> tuple[Tensor, Tensor]:
    """Exponents of every unit's first h and of its last δ, int32 ``[n, H]`` of n chains."""
    chains, hidden = start_h.shape
    f, g = torch.empty_like(start_h), torch.empty_like(start_d)
    block = triton.next_power_of_2(hidden)
    with on_device(weight_h):
        _reach[(2 * chains,)](
            weight_h, start_h, either(bias_ih, weight_h), either(bias_hh, weight_h), weight_d, start_d, f, g, hidden,
            chains, bias_ih is not None, is_double(weight_h), block, max(1, min(block, _REACH_ENTRIES // block)),
            num_warps=min(max(block >> 7, 4), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return f, g


@triton.jit
def _unit_exponent(f, g):
    """d, even: half the difference, rounded down; of one that is missing, the other alone."""
    return tl.where(g == NONE, tl.where(f == NONE, 0, f), tl.where(f == NONE, -g, ((f - g) >> 2) * 2))


@triton.jit
def _place(y, chains, directions, hidden, inputs, biases, outputs, head_bias, vocabulary):
    """Weight y of those that lie end to end: its start, rows and columns, and the units of these, -1 for none."""
    wide = (directions * hidden).to(tl.int64)
    all_ih = wide * inputs + (chains - directions) * hidden * wide
    square = hidden.to(tl.int64) * hidden
    none = tl.full([], -1, tl.int64)
    rows, columns, at, target, source = hidden.to(tl.int64), wide, none, none, none
    if y < chains:
        columns = tl.where(y < directions, inputs, wide)
        upper = wide * inputs + (y - directions) * hidden * wide
        at = tl.where(y < directions, y.to(tl.int64) * hidden * inputs, upper)
        target = y.to(tl.int64) * hidden
        source = tl.where(y < directions, none, (y // directions - 1) * wide)
    elif y < 2 * chains:
        columns = hidden.to(tl.int64)
        at = all_ih + (y - chains) * square
        target = (y - chains).to(tl.int64) * hidden
        source = target
    elif y < 2 * chains + biases:
        columns = tl.full([], 1, tl.int64)
        at = all_ih + chains * square + (y - 2 * chains).to(tl.int64) * hidden
        target = (y % chains).to(tl.int64) * hidden
    else:
        left = y - 2 * chains - biases
        at = all_ih + chains * square + biases.to(tl.int64) * hidden
        has_head = (outputs > 0).to(tl.int32)
        is_head = (left == 0) & (outputs > 0)
        is_bias = (left == has_head) & (head_bias > 0) & (not is_head)
        after = at + outputs * wide
        rows = tl.where(is_head, outputs, tl.where(is_bias, head_bias, vocabulary)).to(tl.int64)
        columns = tl.where(is_head, wide, tl.where(is_bias, 1, inputs))
        source = tl.where(is_head, (chains - directions) * hidden.to(tl.int64), none)
        at = tl.where(is_head, at, tl.where(is_bias, after, after + head_bias))
    return at, rows, columns, target, source


@triton.jit
def _rescaled(w, f, g, n, count, columns, target, source, DOUBLE: tl.constexpr):
    """Entries n of a weight in canonical coordinates, and where one that is not zero leaves the normal numbers."""
    row, column = n // columns, n % columns
    has_target, has_source = n < tl.where(target >= 0, count, 0), n < tl.where(source >= 0, count, 0)
    to_f = tl.load(f + target + row, has_target, other=0)
    to_g = tl.load(g + target + row, has_target, other=0)
    of_f = tl.load(f + source + column, has_source, other=0)
    of_g = tl.load(g + source + column, has_source, other=0)
    shift = (_unit_exponent(of_f, of_g) - _unit_exponent(to_f, to_g)) >> 1
    finite = tl.abs(w) < float("inf")
    idle = (of_f == NONE) & (to_g == NONE)
    found = tl.where(idle, 0.0, times_power(w, shift.to(tl.int64), DOUBLE)).to(w.dtype)
    limit = 2000 if DOUBLE else 250
    over = tl.abs(found) == float("inf")
    underflows = (tl.abs(found) < least_normal(DOUBLE)) | over | (shift > limit) | (shift < -limit)
    underflows &= (w != 0) & finite & (idle == 0)
    most = power_of_two(tl.full([], 1023 if DOUBLE else 127, tl.int32), DOUBLE)
    return tl.where(underflows & over, tl.where(w < 0, -most, most), found), underflows


@triton.jit(
    do_not_specialize=["chains", "directions", "hidden", "inputs", "biases", "outputs", "head_bias", "vocabulary"]
)
def _canonical(
    flat, f, g, units, largest, underflow, chains, directions, hidden, inputs, biases, outputs, head_bias, vocabulary,
    BALANCED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program (x, y): tile x of weight y. ``biases``: 2 C, or 0."""
    n, y = tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE), tl.program_id(1)
    at, rows, columns, target, source = _place(
        y, chains, directions, hidden, inputs, biases, outputs, head_bias, vocabulary
    )
    if y == 0:
        inside = n < chains * hidden
        d = tl.full([_TILE], 0, tl.int32)
        if BALANCED:
            d = _unit_exponent(tl.load(f + n, inside, other=0), tl.load(g + n, inside, other=0))
        tl.store(units + n, d.to(tl.int64), inside)
    count = rows * columns
    live = n < count
    found = tl.load(flat + at + n, live, other=0)
    if BALANCED:
        found, underflows = _rescaled(found, f, g, n, count, columns, target, source, DOUBLE)
        tl.store(flat + at + n, found, live)
        tl.store(underflow, 1, tl.max(underflows.to(tl.int32), 0) > 0)
    # By their bits magnitudes are ordered, nan above all.
    if DOUBLE:
        bits = tl.max(tl.abs(found).to(tl.int64, bitcast=True), 0)
        tl.atomic_max(largest.to(tl.pointer_type(tl.int64), bitcast=True) + y, bits)
    else:
        bits = tl.max(tl.abs(found).to(tl.int32, bitcast=True), 0)
        tl.atomic_max(largest.to(tl.pointer_type(tl.int32), bitcast=True) + y, bits)


def canonical_(
    flat: Tensor,
    f: Tensor,
    g: Tensor,
    directions: int,
    inputs: int,
    bias: bool,
    outputs: int,
    head_bias: int,
    vocabulary: int,
    balanced: bool,
    largest: Tensor,
    underflow: Tensor,
) -> Tensor:
    """Rescales all weights, end to end in ``flat``; their largest magnitudes, and d of every unit, int64 ``[C, H]``."""
    chains, hidden = f.shape
    units = torch.empty(f.shape, dtype=torch.int64, device=f.device)
    wide = directions * hidden
    most = max(hidden * max(inputs, wide), outputs * wide, head_bias, vocabulary * inputs, chains * hidden)
    with on_device(flat):
        _canonical[(triton.cdiv(most, _TILE.value), len(largest))](
            flat, f, g, units, largest, underflow, chains, directions, hidden, inputs, 2 * chains if bias else 0,
            outputs, head_bias, vocabulary, balanced, is_double(flat), enable_fp_fusion=True,
        )  # fmt: skip
    return units
