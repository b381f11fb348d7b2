"""κ⁽²⁾: sums over pairs of steps times powers of W̃ in one pass, and the filtered sequence of a geometric tail.

Specification: tests/gpu_model.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device
from .scaled import (
    HALF_ZERO,
    ZERO,
    centre,
    either,
    faint,
    is_double,
    least_normal,
    log2_floor,
    natural_exponent,
    power_of_two,
    times_power,
    whole,
)

#: ``filtered`` holds a row in one program's registers.
HIDDEN_LIMIT = 1 << 14


@triton.jit(do_not_specialize=["late", "early", "offset"])
def _tops(
    d_exponents, h_exponents, weight_exponents, tops, late, early, offset, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Program i: the largest exponent of lag i, before and after its weight."""
    lag = tl.program_id(0)
    most = tl.full([BLOCK], ZERO, tl.int64)
    for start in range(0, tl.minimum(early, late - offset - lag), BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = (t < early) & (t + offset + lag < late)
        e_d = tl.load(d_exponents + t + offset + lag, live, other=ZERO)
        e_h = tl.load(h_exponents + t, live, other=ZERO)
        most = tl.maximum(most, tl.maximum(e_d + e_h, ZERO))
    top = tl.max(most, 0)
    tl.store(tops + 2 * lag, top)
    if WEIGHTED:
        top += tl.load(weight_exponents + lag)
    tl.store(tops + 2 * lag + 1, tl.where(top < HALF_ZERO, ZERO, top))


@triton.jit(do_not_specialize=["late", "early", "offset", "hidden", "lags"])
def _pair_sums(
    d, d_exponents, h, h_exponents, weights, tops, previous, previous_exponent, sums, exponent, lost,
    late, early, offset, hidden, lags,
    DOUBLE: tl.constexpr, WEIGHTED: tl.constexpr, PREVIOUS: tl.constexpr, LOST: tl.constexpr,
    TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (j, k): TILE × TILE entries of previous + Σ_lags weightᵀ ⊙ Σ_t δ_{t+lag} h_tᵀ."""
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (j < hidden)[:, None] & (k < hidden)[None, :]
    at = j.to(tl.int64)[:, None] * hidden + k[None, :]
    # A power of W̃ is centred as δ and h are: where the three meet, one centre is taken off to keep out of overflow.
    margin = centre(DOUBLE) if WEIGHTED else 0
    top = tl.full([], ZERO, tl.int64)
    for lag in range(lags):
        top = tl.maximum(top, tl.load(tops + 2 * lag + 1))
    top = tl.where(top == ZERO, ZERO, top + margin)
    matrix = hidden.to(tl.int64) * hidden
    dtype = d.dtype.element_ty
    total = tl.zeros([TILE, TILE], dtype)
    if PREVIOUS:
        e = tl.load(previous_exponent)
        top = tl.maximum(top, e)
        total += times_power(tl.load(previous + at, inside, other=0), e - top, DOUBLE)
    for lag in range(lags):
        most = tl.load(tops + 2 * lag)
        products = tl.zeros([TILE, TILE], dtype)
        for start in range(0, tl.minimum(early, late - offset - lag), STEPS):
            t = start + tl.arange(0, STEPS)
            later = t + offset + lag
            live = (t < early) & (later < late)
            shift = tl.load(d_exponents + later, live, other=ZERO) + tl.load(h_exponents + t, live, other=ZERO) - most
            delta = tl.load(
                d + later.to(tl.int64)[None, :] * hidden + j[:, None], (j < hidden)[:, None] & live[None, :], other=0
            )
            rows = tl.load(
                h + t.to(tl.int64)[:, None] * hidden + k[None, :], live[:, None] & (k < hidden)[None, :], other=0
            )
            delta = times_power(delta, shift[None, :], DOUBLE)
            products = tl.dot(delta, rows, products, input_precision="ieee", out_dtype=dtype)
        products = times_power(products, tl.load(tops + 2 * lag + 1) - top, DOUBLE)
        if WEIGHTED:
            mirrored = lag * matrix + k.to(tl.int64)[None, :] * hidden + j[:, None]
            products *= tl.load(weights + mirrored, inside, other=0)
        total += products
    result = top
    summed = total
    if not WEIGHTED:
        result = natural_exponent(top, 2 * centre(DOUBLE))
        total = times_power(total, top - result, DOUBLE)
    if LOST:
        # Of an entry that has pairs and is yet too small, what underflowed counts. That was a number of δ, to meet one
        # of h, which is near its centre: 2^24 above it at most, whatever the sizes.
        tiny = total < least_normal(DOUBLE)
        above = power_of_two(tl.full([], centre(DOUBLE) + 24, tl.int32), DOUBLE)
        small = inside & (tiny | (summed < faint(DOUBLE) * above))
        if tl.max(tl.max(small.to(tl.int32), 1), 0) > 0:
            pairs, most = tl.zeros([TILE, TILE], tl.float32), tl.full([STEPS, TILE], 1, dtype)
            for start in range(0, tl.minimum(early, late - offset), STEPS):
                t = start + tl.arange(0, STEPS)
                live = (t < early) & (t + offset < late)
                delta = tl.load(
                    d + (t + offset).to(tl.int64)[None, :] * hidden + j[:, None],
                    (j < hidden)[:, None] & live[None, :], other=0,
                )  # fmt: skip
                rows = tl.load(
                    h + t.to(tl.int64)[:, None] * hidden + k[None, :], live[:, None] & (k < hidden)[None, :], other=0
                )
                one = tl.dot((delta != 0).to(tl.float32), (rows != 0).to(tl.float32), input_precision="ieee")
                pairs += one
                most = tl.maximum(most, rows)
            small &= tiny | (summed < 2 * faint(DOUBLE) * tl.max(most, 0)[None, :])
            tl.store(lost, 1, tl.max(tl.max((small & (pairs > 0)).to(tl.int32), 1), 0) > 0)
    tl.store(sums + at, total, inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(exponent, result)


def pair_sums(
    d: Tensor,
    d_exponents: Tensor,
    h: Tensor,
    h_exponents: Tensor,
    offset: int,
    weights: Tensor | None,
    weight_exponents: Tensor | None,
    previous: Tensor | None,
    previous_exponent: Tensor | None,
    lost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """previous + Σ_i weights[i]ᵀ ⊙ Σ_t δ_{t+offset+i} h_tᵀ and its exponent; without weights on a natural scale."""
    hidden = d.shape[1]
    lags = 1 if weights is None else len(weights)
    tops = d_exponents.new_empty(lags, 2)
    sums, exponent = d.new_empty(hidden, hidden), d_exponents.new_empty(1)
    steps = (len(d), len(h), offset)
    double = is_double(d)
    tile = 32  # 64 spills
    options = whole(4) if double else {"num_warps": 4, "enable_fp_fusion": True}
    with on_device(d):
        _tops[(lags,)](
            d_exponents, h_exponents, either(weight_exponents, d_exponents), tops, *steps,
            WEIGHTED=weights is not None, BLOCK=1024, enable_fp_fusion=True,
        )  # fmt: skip
        _pair_sums[(triton.cdiv(hidden, tile), triton.cdiv(hidden, tile))](
            d, d_exponents, h, h_exponents, either(weights, d), tops, either(previous, d),
            either(previous_exponent, d_exponents),
            sums, exponent, either(lost, exponent), *steps, hidden, lags, double, weights is not None,
            previous is not None, lost is not None,
            TILE=tile, STEPS=16, **options,
        )  # fmt: skip
    return sums, exponent


@triton.jit(do_not_specialize=["count", "hidden", "reverse"])
def _filtered(
    rows, exponents, ratio, ratio_exponent, out, out_exponents, count, hidden, reverse,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_t = ratio ⊙ (x_t + y_before), centred at every step."""
    unit = tl.arange(0, BLOCK)
    live = unit < hidden
    factor = tl.load(ratio + unit, live, other=0)
    factor_e = tl.load(ratio_exponent)
    y = tl.zeros([BLOCK], rows.dtype.element_ty)
    e = tl.full([], ZERO, tl.int64)
    for s in range(count):
        t = tl.where(reverse != 0, count - 1 - s, s).to(tl.int64)
        x = tl.load(rows + t * hidden + unit, live, other=0)
        x_e = tl.load(exponents + t)
        top = tl.maximum(x_e, e)
        y = factor * (times_power(x, x_e - top, DOUBLE) + times_power(y, e - top, DOUBLE))
        most = tl.max(y, 0)
        shift = centre(DOUBLE) - log2_floor(most, DOUBLE)
        y = times_power(y, shift, DOUBLE)
        e = tl.where(most == 0, ZERO, top + factor_e - shift)
        tl.store(out + t * hidden + unit, y, live)
        tl.store(out_exponents + t, e)


def filtered(
    rows: Tensor, exponents: Tensor, ratio: Tensor, ratio_exponent: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y_t = ratio · 2^ratio_exponent ⊙ (x_t + y_{t-1}), y_{t+1} for reverse, from zero; and the exponents.

    Raises:
        ValueError: rows too long for one program.
    """
    count, hidden = rows.shape
    if hidden > HIDDEN_LIMIT:
        raise ValueError(f"κ⁽²⁾ serves hidden sizes up to {HIDDEN_LIMIT}, not {hidden}; use rtol=0 or backend 'cuda'")
    out, out_exponents = torch.empty_like(rows), torch.empty_like(exponents)
    block = triton.next_power_of_2(hidden)
    with on_device(rows):
        _filtered[(1,)](
            rows, exponents, ratio, ratio_exponent, out, out_exponents, count, hidden, int(reverse),
            is_double(rows), BLOCK=block, num_warps=min(max(block >> 8, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return out, out_exponents
