"""What every kernel of the GPU backends computes, in plain torch: their specification, and the truth in their tests.

Sequences are "scaled rows": ``rows [n, H]`` and int64 ``exponents [n]``, row t standing for rows[t] · 2^exponents[t].
They may be handed to ``ops.gpu`` as a third set of kernels beside those of ``ops.cuda`` and ``ops.triton``.
"""

import math

import torch
from torch import Tensor

ZERO = -(1 << 40)
#: Below it, what products of float64 that underflow have lost shows in their sum.
FAINT = 2.0**-967


def centre(dtype):
    """The exponent that the largest entry of a row is brought to."""
    return 30 if dtype == torch.float32 else 300


def log_scale_of(largest):
    """m: 2^-m brings the largest entry to [1, 2), or as close as a normal 2^-m can."""
    value = float(largest)
    if value == 0 or not math.isfinite(value):
        return 0
    bias = 127 if largest.dtype == torch.float32 else 1023
    return min(max(math.frexp(value)[1] - 1, -bias), bias - 1)


def ldexp(x: Tensor, exponent) -> Tensor:
    """x · 2^exponent in two steps, neither of which leaves the range where the result does not."""
    exponent = torch.as_tensor(exponent).clamp(-2200, 2200).to(torch.int32)
    return torch.ldexp(torch.ldexp(x, exponent // 2), exponent - exponent // 2)


def true(rows: Tensor, exponents: Tensor) -> Tensor:
    """The values in float64, where they fit."""
    return ldexp(rows.double(), exponents.reshape(-1, *[1] * (rows.dim() - 1)))


def same(found, wanted, rtol):
    """Assert that two (rows, exponents) agree entry by entry, whatever their exponents."""
    (rows, exponents), (other, other_exponents) = found, wanted
    assert rows.shape == other.shape and rows.dtype == other.dtype and exponents.dtype == torch.int64
    exponents, other_exponents = exponents.reshape(-1).cpu(), other_exponents.reshape(-1).cpu()
    if rows.dim() == 1 or len(exponents) != len(rows):
        rows, other = rows.reshape(1, -1), other.reshape(1, -1)
    rows, other = rows.double().cpu(), other.double().cpu()
    assert rows.isfinite().all() and (rows >= 0).all()
    shift = torch.where((rows > 0).any(1) & (other > 0).any(1), other_exponents - exponents, 0)
    torch.testing.assert_close(rows, ldexp(other, shift[:, None]), rtol=rtol, atol=0)


def squares(w, largest):
    return torch.ldexp(w, torch.tensor(-log_scale_of(largest))).square()


def square_exponent(largest):
    return torch.tensor([2 * log_scale_of(largest) if float(largest) != 0 else ZERO])


def join(parts, dtype):
    """The sum of (vector, exponent) on the largest exponent of those that are not zero."""
    parts = [(x, int(e)) for x, e in parts if bool((x != 0).any())]
    if not parts:
        return None, ZERO
    top = max(e for _, e in parts)
    return sum(ldexp(x, e - top) for x, e in parts), top


def _faded(w, largest):
    """Whether the square of an entry that is not zero leaves the normal numbers."""
    return ((w != 0) & (squares(w, largest) < torch.finfo(w.dtype).tiny)).any()


#: The exponent of a unit that nothing reaches, int32.
NONE = -(1 << 30)


def square_exponents(w):
    """Of every entry 2 ⌊log₂ |w|⌋, NONE for a zero."""
    return torch.where(w == 0, NONE, 2 * (torch.frexp(w).exponent - 1))


def _reached(exponents, source):
    """The largest of exponents + source along the last dimension, of those that are there."""
    there = (exponents != NONE) & (source != NONE)
    return torch.where(there, exponents + source, NONE).amax(-1).int()


def maxima(rows, row_source, columns, column_source):
    """max_n 2 e(rows[r, n]) + row_source[n] and max_r 2 e(columns[r, n]) + column_source[r], int32; e = ⌊log₂ |·|⌋.

    No source is zeros, no matrix gives no entries.
    """
    found = []
    for w, source in ((rows, row_source), (None if columns is None else columns.T, column_source)):
        if w is None:
            found.append(torch.empty(0, dtype=torch.int32))
        else:
            found.append(_reached(square_exponents(w), torch.zeros(1, dtype=torch.int32) if source is None else source))
    return tuple(found)


def reach(weight_h, start_h, bias_ih, bias_hh, weight_d, start_d):
    """Exponents of every unit's first h, by paths of the largest weights, and of its last δ; int32 [n, H] of n chains.

    Where start and biases leave a unit at NONE, that of the first step of the chain that reaches it.
    """
    result = []
    for weight, start, biases in ((weight_h, start_h, (bias_ih, bias_hh)), (weight_d.mT, start_d, ())):
        found = start.clone()
        for bias in biases:
            if bias is not None:
                found = torch.maximum(found, square_exponents(bias).int())
        exponents = square_exponents(weight)
        while True:
            more = torch.where(found == NONE, _reached(exponents, found[:, None]), found)
            if torch.equal(more, found):
                break
            found = more
        result.append(found)
    return tuple(result)


def unit_exponents(f, g):
    """d: half the difference of both, rounded down to an even number; of one that is missing, the other alone."""
    both = (f.long() - g) // 4 * 2
    return torch.where(g == NONE, torch.where(f == NONE, 0, f.long()), torch.where(f == NONE, -g.long(), both))


def canonical_(flat, f, g, directions, inputs, bias, outputs, head_bias, vocabulary, balanced, largest, lost):
    """All weights end to end, in place: w · 2^((d_source - d_target) / 2); their d, int64 [C, H].

    In this order: weight_ih, weight_hh and with ``bias`` bias_ih, bias_hh of every chain; head weight
    ``[outputs, D H]`` unless ``outputs`` is 0, head bias, embedding ``[vocabulary, I]``, of which the last two have no
    units. What leads from a unit that nothing reaches to one that reaches nothing becomes 0: it adds nothing to either.
    ``largest``, zeros at first, becomes the largest magnitude of each. Without ``balanced`` all d are 0.
    """
    chains, hidden = f.shape
    d = unit_exponents(f, g) if balanced else torch.zeros_like(f, dtype=torch.int64)
    at, which = 0, 0

    def take(rows, columns, target, source):
        nonlocal at, which
        w = flat[at : at + rows * columns].view(rows, columns)
        to = torch.zeros(rows, dtype=torch.int64) if target is None else d[target]
        of = torch.zeros(columns, dtype=torch.int64) if source is None else d[source].reshape(-1)
        if balanced and target is not None and source is not None:
            w = torch.where((g[target] == NONE)[:, None] & (f[source].reshape(-1) == NONE), 0, w)
        found = ldexp(w, (of - to[:, None]) // 2)
        limits = torch.finfo(flat.dtype)
        lost.logical_or_(((w != 0) & ((found.abs() < limits.tiny) | (found.isinf() & w.isfinite()))).any())
        found = torch.where(w.isfinite(), found.clamp(-limits.max, limits.max), found)
        flat[at : at + rows * columns] = found.reshape(-1)
        largest[which] = found.abs().amax()
        at, which = at + rows * columns, which + 1

    for c in range(chains):
        below = slice((c // directions - 1) * directions, c // directions * directions)
        take(hidden, inputs if c < directions else directions * hidden, c, below if c >= directions else None)
    for c in range(chains):
        take(hidden, hidden, c, slice(c, c + 1))
    for _ in range(2 if bias else 0):
        for c in range(chains):
            take(hidden, 1, c, None)
    if outputs:
        take(outputs, directions * hidden, None, slice(chains - directions, chains))
    if head_bias:
        take(head_bias, 1, None, None)
    if vocabulary:
        take(vocabulary, inputs, None, None)
    return d


def column_sums(w, largest, lost):
    lost |= _faded(w, largest)
    return squares(w, largest).sum(0), square_exponent(largest)


def ends(weight_ih, bias_ih, bias_hh, head_weight, head_bias, inputs, inputs_exponent, layers, largest, lost):
    """largest: of weight_ih, weight_hh, bias_ih, bias_hh, layer by layer, then of the head's weight and bias."""
    hidden, dtype = len(weight_ih), weight_ih.dtype
    at = iter(largest.split(1))
    largest_ih, *_ = [next(at) for _ in range(2 * layers)]
    largest_bias = [[next(at) for _ in biases] for biases in (bias_ih, bias_hh)]
    drive, exponents = torch.zeros(layers, hidden, dtype=dtype), torch.full((layers,), ZERO)
    for i in range(layers):
        parts = []
        if i == 0:
            x, e = (torch.ones_like(weight_ih[0]), 0) if inputs is None else (inputs, inputs_exponent)
            lost |= _faded(weight_ih, largest_ih)
            parts.append((squares(weight_ih, largest_ih) @ x, square_exponent(largest_ih) + e))
        for biases, most in zip((bias_ih, bias_hh), largest_bias, strict=True):
            if biases:
                lost |= _faded(biases[i], most[i])
                parts.append((squares(biases[i], most[i]), square_exponent(most[i])))
        row, exponents[i] = join(parts, dtype)
        if row is not None:
            drive[i] = row
            given = sum((x != 0).int() for x, _ in parts) > 0
            lost |= (given & (row < torch.finfo(dtype).tiny)).any()
    head = (torch.ones(hidden, dtype=dtype), torch.zeros(1, dtype=torch.int64))
    bias = (torch.zeros(1, dtype=dtype), torch.tensor([ZERO]))
    if head_weight is not None:
        head = column_sums(head_weight, next(at), lost)
    if head_bias is not None:
        bias = column_sums(head_bias[:, None], next(at), lost)
    # Near the centre, as the chains keep what they make of them.
    up = centre(dtype)
    exponents = torch.where(exponents == ZERO, ZERO, exponents - up)
    return drive * 2.0**up, exponents, head[0] * 2.0**up, head[1] - up, *bias


def _chain(weight, largest, drive, drive_exponents, start, start_exponent, seq_len, once):
    """y_s = W̃ y_{s-1} + drive_s, s = 1 … seq_len; with ``once`` the drive acts at s = 1 alone."""
    matrix, weight_exponent = squares(weight, largest), int(square_exponent(largest))
    rows, exponents = [start], [start_exponent]
    for s in range(1, seq_len + 1):
        before, e = rows[-1], exponents[-1]
        if bool((before != 0).any()):
            shift = centre(before.dtype) - (math.frexp(float(before.max()))[1] - 1)
            before, e = ldexp(before, shift), e - shift
        parts = [(matrix @ before, e + weight_exponent)]
        if s == 1 or not once:
            place = 0 if len(drive) == 1 else s - 1
            parts.append((drive[place], drive_exponents[place]))
        row, e = join(parts, before.dtype)
        rows.append(torch.zeros_like(start) if row is None else row)
        exponents.append(e)
    return torch.stack(rows), torch.tensor(exponents)


def chains(
    weight_h,
    largest_h,
    drive_h,
    drive_h_exponents,
    weight_d,
    largest_d,
    drive_d,
    drive_d_exponents,
    seq_len,
    last_only,
    ones_h0,
    plan,
    blocks,
    lost,
):
    dtype, hidden = weight_h.dtype, len(weight_h)
    zero = torch.zeros(hidden, dtype=dtype)
    start = (torch.ones_like(zero), 0) if ones_h0 else (zero, ZERO)
    h, h_exponents = _chain(weight_h, largest_h, drive_h, drive_h_exponents, *start, seq_len, False)
    d, d_exponents = torch.empty(0, hidden, dtype=dtype), torch.empty(0, dtype=torch.int64)
    if weight_d is not None:
        d, d_exponents = _chain(
            weight_d.T, largest_d, drive_d.flip(0), drive_d_exponents.flip(0), zero, ZERO, seq_len, last_only
        )
        d, d_exponents = d[1:].flip(0), d_exponents[1:].flip(0)
    # Exact: a wider dtype keeps what this one loses.
    if dtype == torch.float32:
        wide = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in (weight_h, largest_h, drive_h, drive_h_exponents, weight_d, largest_d, drive_d, drive_d_exponents)
        ]
        more = chains(*wide, seq_len, last_only, ones_h0, plan, blocks, lost)
        lost |= ((more[0] != 0) & (h == 0)).any() | ((more[2] != 0) & (d == 0)).any()
    for w, largest in ((weight_h, largest_h), (weight_d, largest_d)):
        if w is not None:
            lost |= _faded(w, largest)
    return h, h_exponents, d, d_exponents


def natural(total, top, usual):
    """A result on the scale 1 where a total on 2^top whose entries are about 2^usual is at home there."""
    m = top + usual
    exponent = 0 if top == ZERO or 0 <= m <= 60 else m
    return (total if top == ZERO else ldexp(total, top - exponent)), torch.tensor([exponent])


def row_sums(rows, exponents, more_rows, more_exponents, lost):
    """Of one or two sequences."""
    first = _row_sums(rows, exponents, lost)
    return first if more_rows is None else (*first, *_row_sums(more_rows, more_exponents, lost))


def _row_sums(rows, exponents, lost):
    found = _row_sum(rows, exponents)
    lost |= ((rows != 0).any(0) & (found[0] < torch.finfo(rows.dtype).tiny)).any()
    return found


def _row_sum(rows, exponents):
    total, top = join(list(zip(rows, exponents, strict=True)), rows.dtype)
    return natural(torch.zeros_like(rows[0]) if total is None else total, top, centre(rows.dtype))


def pair_sums(d, d_exponents, h, h_exponents, lost):
    """Σ_t δ_t h_tᵀ over the steps that both have."""
    n = min(len(d), len(h))
    total, top = _overlap(d[:n], d_exponents[:n], h[:n], h_exponents[:n])
    some = (d[:n] != 0).double().T @ (h[:n] != 0).double() > 0
    # What underflows is a number of d, which was to meet one of h.
    limits = torch.finfo(d.dtype)
    lost |= (some & (total < 4 * limits.tiny / limits.eps * max(1.0, float(h[:n].max()) if n else 1.0))).any()
    return natural(total, top, 2 * centre(d.dtype))


def _overlap(late, late_exponents, early, early_exponents):
    exponents = late_exponents + early_exponents
    live = (late != 0).any(1) & (early != 0).any(1)
    if not live.any():
        return torch.zeros(late.shape[1], late.shape[1], dtype=late.dtype), ZERO
    top = int(exponents[live].max())
    return ldexp(late[live], (exponents[live] - top)[:, None]).T @ early[live], top


def second_term(
    weight, largest, d, d_exponents, h, h_exponents, kappa1, kappa1_exponent, factor, rtol, tried, shrinks, maxima,
    lags, bounds, lost,
):  # fmt: skip
    """κ⁽¹⁾ + factor · W̃ ⊙ S on the scale of κ⁽¹⁾, S being the sum of all lags, which it says in ``lags``.

    Where T - 1 is more than ``tried``, and rtol not 0, kernels may stop after these, with an error, relative, entry by
    entry, of no more than ``bounds`` ≤ rtol. ``shrinks``: whether δ_t ≥ δ_{t+1}. ``maxima``, int64 [5], are zeros.
    """
    matrix, own = squares(weight, largest).double(), int(square_exponent(largest))
    power, exponent, total = torch.eye(len(weight), dtype=torch.float64), 0, kappa1.double()
    late, early = d.double(), h.double()
    for n in range(1, len(d)):
        pairs, top = _overlap(late[n:], d_exponents[n:], early[: len(d) - n], h_exponents[: len(d) - n])
        if top > ZERO:
            total = total + factor * matrix * ldexp(power.T * pairs, exponent + top + own - int(kappa1_exponent))
        power, exponent = power @ matrix, exponent + own
        if not power.any():
            break
        m = math.frexp(float(power.max()))[1] - 1
        power, exponent = ldexp(power, -m), exponent + m
    lags.fill_(len(d) - 1)
    found = total.to(weight.dtype)
    lost |= ((kappa1 > 0) & ~((found >= torch.finfo(weight.dtype).tiny) & found.isfinite())).any()
    return found


def dropped(before, factor=False, steps=400):
    """Arguments of pair_sums in float32, whose entry [1, 1] is mostly of steps far below the first, and what that is.

    There δ is 2^before on its row's scale and a quarter of the least number on the first step's, or with ``factor``
    what brings it to that scale is; and h is as large as it gets.
    """
    large, small = 2.0 ** centre(torch.float32), -98  # above what sums of rows need to be sure of themselves
    apart = -151 if factor else -151 - before
    d = torch.tensor([[large, 2.0 ** (small // 2)]] + steps * [[large, 2.0**before]])
    h = torch.tensor([[large, 2.0 ** (small // 2)]] + steps * [[large, large]])
    exponents = torch.tensor([0] + steps * [apart])
    wanted = 2.0**small + steps * 2.0 ** (before + apart) * large
    return (d, exponents, h, torch.zeros_like(exponents)), wanted


def finish(outputs, outputs_exponent, head, head_exponent, head_bias, head_bias_exponent, steps, largest, lost):
    """log γ², float64, 0-dim: outputs · head + steps · head_bias; nan where an entry of ``largest`` is not finite, or
    something is lost.

    With it come ``steps`` itself, [1], and int8, 0-dim, -1 where something is lost.
    """
    dot = (outputs.double() @ head.double(), int(outputs_exponent + head_exponent))
    # Products of float64 may underflow; those of float32 do not.
    lost = lost[0] | (((outputs != 0) & (head != 0)).any() & (dot[0] < FAINT))
    state = torch.full_like(head_bias, steps), -lost.to(torch.int8)
    if lost or not largest.isfinite().all():
        return torch.tensor(math.nan, dtype=torch.float64), *state
    bias = (head_bias[0].double() * steps, int(head_bias_exponent))
    logs = []
    for value, exponent in (dot, bias):
        mantissa, own = torch.frexp(value)
        logs.append(mantissa.log() + (own.long() + exponent).double() * math.log(2))
    return torch.logaddexp(*logs), *state
