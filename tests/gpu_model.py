"""What every kernel of the GPU backends computes, in plain torch: their specification, and the truth in their tests.

Sequences are "tempered rows": ``rows [n, H]`` and int64 ``exponents [n]``, row t standing for rows[t] · 2^exponents[t].
They may be handed to ``ops.gpu`` as a third set of kernels beside those of ``ops.cuda`` and ``ops.triton``.
"""

import math

import torch
from torch import Tensor

ZERO = -(1 << 40)


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
    return drive, exponents, *head, *bias


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


def row_sums(rows, exponents):
    total, top = join(list(zip(rows, exponents, strict=True)), rows.dtype)
    return natural(torch.zeros_like(rows[0]) if total is None else total, top, centre(rows.dtype))


def pair_sums(
    d, d_exponents, h, h_exponents, offset, weights=None, weight_exponents=None, previous=None, previous_exponent=None
):
    parts = [] if previous is None else [(previous, previous_exponent)]
    for i in range(1 if weights is None else len(weights)):
        shift = offset + i
        n = max(0, min(len(d) - shift, len(h)))
        late, early = d[shift : shift + n], h[:n]
        exponents = d_exponents[shift : shift + n] + h_exponents[:n]
        live = (late != 0).any(1) & (early != 0).any(1)
        if not live.any():
            continue
        top = int(exponents[live].max())
        tile = ldexp(late[live], (exponents[live] - top)[:, None]).T @ early[live]
        parts.append((tile, top) if weights is None else (weights[i].T * tile, top + int(weight_exponents[i])))
    total, top = join(parts, d.dtype)
    total = torch.zeros(d.shape[1], d.shape[1], dtype=d.dtype) if total is None else total
    # With weights it is a term of a longer sum, which wants the range that a natural scale would give away.
    return natural(total, top, 2 * centre(d.dtype)) if weights is None else (total, torch.tensor([top]))


def filtered(rows, exponents, ratio, ratio_exponent, reverse):
    order = range(len(rows) - 1, -1, -1) if reverse else range(len(rows))
    out, out_exponents = torch.zeros_like(rows), torch.full_like(exponents, ZERO)
    before, e = torch.zeros_like(ratio), ZERO
    for t in order:
        total, top = join([(rows[t], exponents[t]), (before, e)], rows.dtype)
        if total is None:
            before, e = torch.zeros_like(ratio), ZERO
            continue
        before, e = ratio * total, top + int(ratio_exponent)
        if bool((before != 0).any()):
            shift = centre(before.dtype) - (math.frexp(float(before.max()))[1] - 1)
            before, e = ldexp(before, shift), e - shift
        out[t], out_exponents[t] = before, e
    return out, out_exponents


def finish(outputs, outputs_exponent, head, head_exponent, head_bias, head_bias_exponent, steps, largest):
    """log γ², float64, 0-dim: outputs · head + steps · head_bias; nan where an entry of ``largest`` is not finite."""
    if not largest.isfinite().all():
        return torch.tensor(math.nan, dtype=torch.float64)
    dot = (outputs.double() @ head.double(), int(outputs_exponent + head_exponent))
    bias = (head_bias[0].double() * steps, int(head_bias_exponent))
    logs = []
    for value, exponent in (dot, bias):
        mantissa, own = torch.frexp(value)
        logs.append(mantissa.log() + (own.long() + exponent).double() * math.log(2))
    return torch.logaddexp(*logs)


def precondition(gradients, divisors, log_scales):
    result = []
    for g, divisor, log_scale in zip(gradients, divisors, log_scales, strict=True):
        quotient = g.double() / divisor.double() * math.exp(log_scale)
        result.append(torch.where(divisor == 0, 0.0, quotient).to(g.dtype))
    return result
