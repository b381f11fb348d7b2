"""Squared sums, drives, sums over time and log γ² in Triton against their specification, gpu_model."""

import math

import gpu_model
import pytest
import tolerances
import torch
from triton_cases import F32, F64, MARKS, dtypes, largest, moved, run, same, truth

pytestmark = MARKS

ZERO = gpu_model.ZERO


@dtypes
@pytest.mark.parametrize("rows, columns", ((1, 1), (130, 17), (1030, 3)))
def test_column_sums(rows, columns, dtype):
    w = torch.randn(rows, columns, dtype=dtype)
    for scale in (1.0, 0.9 * torch.finfo(dtype).max / w.abs().max().item(), 1e-30):
        arguments = (w * scale, largest(w * scale))
        *found, lost = run("column_sums", *arguments)
        same(found, truth("column_sums", *arguments), tolerances.path(dtype, 0, rows))
        assert not lost
    sums, exponent, lost = run("column_sums", torch.zeros_like(w), torch.zeros(1, dtype=dtype))
    assert not sums.any() and exponent.item() == ZERO and not lost


def ends(hidden, width, layers, dtype, bias=False, head=0, head_bias=False, inputs=False, scale=1.0):
    """Arguments of ``ends``; layers differ in the sizes of their biases, some of which are zero."""
    weight = 2.0**9 * scale * torch.randn(hidden, width, dtype=dtype)
    bias_ih, bias_hh = ([4.0**i * torch.randn(hidden, dtype=dtype) for i in range(bias * layers)] for _ in range(2))
    if layers > 1 and bias:
        bias_ih[0].zero_()
        bias_hh[1] *= 2.0**20
    head_weight = torch.randn(head, hidden, dtype=dtype) if head else None
    head_bias = 8 * torch.randn(head, dtype=dtype) if head_bias else None
    x = (torch.rand(width, dtype=dtype), torch.tensor([-31])) if inputs else (None, None)
    last = [t for t in (head_weight, head_bias) if t is not None]
    most = largest(weight, *[torch.full((1,), math.nan)] * (2 * layers - 1), *bias_ih, *bias_hh, *last, weight)
    return [weight, bias_ih, bias_hh, head_weight, head_bias, *x, layers, most]


def check_ends(arguments, size, lost=False):
    *found, flag = run("ends", *arguments)
    wanted = truth("ends", *arguments)
    for i in (0, 2, 4):
        same(found[i : i + 2], wanted[i : i + 2], tolerances.path(found[0].dtype, 0, size))
    assert flag.item() == lost
    return found


@dtypes
@pytest.mark.parametrize(
    "sizes, options",
    (
        ((1, 1, 1), {}),
        ((17, 3, 1), {"bias": True, "head": 5, "head_bias": True, "inputs": True}),
        ((100, 130, 3), {"bias": True, "head": 1030}),
        ((33, 70, 2), {"head": 1030, "head_bias": True, "inputs": True}),
        ((3, 5, 2), {"bias": True}),
    ),
    ids=str,
)
def test_ends(sizes, options, dtype):
    check_ends(ends(*sizes, dtype, **options), max(sizes[1], options.get("head", 0)))


@dtypes
def test_ends_far_apart(dtype):
    """Of weights and biases that differ by more than the dtype holds, the larger remain."""
    for scale in (1e-30, 1e25):
        check_ends(ends(5, 3, 2, dtype, bias=True, head=2, head_bias=True, scale=scale), 3)


def test_nothing_enters():
    for options in ({}, {"bias": True, "head": 2, "head_bias": True, "inputs": True}):
        arguments = ends(3, 2, 2, F64, **options)
        arguments = [x.zero_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
        arguments[1:3] = ([torch.zeros_like(b) for b in biases] for biases in arguments[1:3])
        drive, exponents, head, head_exponent, *_ = check_ends(arguments, 2)
        assert not drive.any() and (exponents == ZERO).all()
        centre = gpu_model.centre(F64)
        assert head_exponent.item() == (ZERO if options else 0) - centre and head.any() == (not options)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("place", ("weight_ih", "bias_ih", "bias_hh", "head", "head_bias", "sum", "column_sums"))
def test_lost(place, dtype):
    """A square that the dtype cannot hold is noticed wherever it is, and one that it can is not."""
    for power, lost in ((-70, True), (-30, False)) if dtype == F32 else ((-520, True), (-480, False)):
        weight, head, head_bias = (torch.ones(shape, dtype=dtype) for shape in ((20, 3), (1030, 20), (1030,)))
        bias_ih, bias_hh = ([torch.ones(20, dtype=dtype) for _ in range(2)] for _ in range(2))
        if place == "sum":  # the largest of its tensor, which is why it is lost beside another alone
            weight[2], bias_ih[0][:], bias_hh[0][:] = 0, 0, 0
            bias_ih[0][2] = 2.0**power
        else:
            places = {"weight_ih": weight[19], "bias_ih": bias_ih[1], "bias_hh": bias_hh[0], "head_bias": head_bias}
            places.get(place, head[1029])[1] = 2.0**power
        if place == "column_sums":
            found = run("column_sums", head, largest(head))
        else:
            most = largest(*[weight] * 4, *bias_ih, *bias_hh, head, head_bias)
            found = run("ends", weight, bias_ih, bias_hh, head, head_bias, None, None, 2, most)
        assert found[-1].item() == lost


@dtypes
@pytest.mark.parametrize("count, hidden", ((1, 1), (7, 3), (130, 17), (70, 100)))
def test_row_sums(count, hidden, dtype):
    centre = gpu_model.centre(dtype)
    for usual in (-500, 500, 10 - centre, 59 - centre, 62 - centre):
        rows, exponents = 2.0**centre * torch.rand(count, hidden, dtype=dtype), torch.randint(-99, 1, (count,)) + usual
        exponents[-1], exponents[count // 2] = usual, usual if count == 1 else ZERO
        rows[count // 2] *= count == 1
        wanted = truth("row_sums", rows, exponents, None, None)
        scale = gpu_model.row_sums(rows, exponents, None, None, torch.zeros(1, dtype=torch.bool))[1]  # the dtype's own
        more = 3 * rows[: count // 2 + 1], exponents[: count // 2 + 1]
        for second in (None, None), more:
            total, exponent, *others, lost = run("row_sums", rows, exponents, *second)
            same((total, exponent), wanted, tolerances.path(dtype, 0, count))
            assert exponent == scale and not lost
        same(others, truth("row_sums", *more, None, None), tolerances.path(dtype, 0, count))
    total, exponent, lost = run("row_sums", torch.zeros_like(rows), torch.full_like(exponents, ZERO), None, None)
    assert not total.any() and exponent == 0 and not lost


@dtypes
def test_a_column_that_fades_is_told(dtype):
    """Beside the others of its sum; not one that is zero."""
    for value, told in ((0.0, False), (torch.finfo(dtype).tiny, True)):
        rows = torch.full((5, 3), 2.0 ** gpu_model.centre(dtype), dtype=dtype)
        rows[:, 1] = value
        assert run("row_sums", rows, torch.zeros(5).long(), None, None)[-1] == told


def finish(*arguments):
    from pathrnn_kernels.ops.triton import kernels

    for flag in (True, False):
        found, bias, arithmetic = kernels.finish(*map(moved, (*arguments, torch.tensor([flag]))))
        assert bias.tolist() == [arguments[6]] and arithmetic.dtype == torch.int8 and arithmetic == -int(flag)
        assert found.isnan() or not flag
    again = kernels.finish(*map(moved, (*arguments, torch.tensor([False]))))[0]
    assert found.shape == () and found.dtype == F64
    assert found == again or found.isnan()
    return found.cpu()


# ---- pair_sums -------------------------------------------------------------------------------------------------------


def rows(count, hidden, dtype, spread=20):
    """Centred rows, one of them zero where there are several."""
    x, exponents = 2.0**30 * torch.rand(count, hidden, dtype=dtype), torch.randint(-spread, spread + 1, (count,))
    if count > 2:
        x[count // 2], exponents[count // 2] = 0, ZERO
    return x, exponents


def check_sums(*arguments, terms):
    *found, lost = run("pair_sums", *arguments)
    assert not lost
    same(found, truth("pair_sums", *arguments), tolerances.path(arguments[0].dtype, 1, terms))
    return found


@dtypes
@pytest.mark.parametrize("hidden, steps", ((1, 1), (3, 2), (17, 40), (70, 3)))
def test_pair_sums(hidden, steps, dtype):
    """h has a row more than δ."""
    check_sums(*rows(steps, hidden, dtype), *rows(steps + 1, hidden, dtype), terms=steps)


@dtypes
@pytest.mark.parametrize("usual", (-300, 0, 60, 61, 900))
def test_natural_scale(usual, dtype):
    """Exponent 0 for sums of ordinary size."""
    centre = gpu_model.centre(dtype)
    d, h = (2.0**centre * torch.rand(3, 5, dtype=dtype) for _ in range(2))
    e = torch.tensor([usual, usual - 9, usual - 1]) - centre
    sums, exponent = check_sums(d, e, h, torch.full((3,), -centre), terms=3)
    assert exponent == (0 if 0 <= usual <= 60 else usual)
    assert 2.0**-5 < torch.ldexp(sums.double(), exponent - usual).max() < 2.0**3


@dtypes
def test_room(dtype):
    """Factors a step's growth above their centre, summed over many steps, stay finite."""
    x = torch.full((40, 3), 2.0 ** (gpu_model.centre(dtype) + 12), dtype=dtype)
    e = torch.zeros(40, dtype=torch.int64)
    check_sums(x, e, x, e, terms=40)


def test_nothing_meets():
    x, e = torch.ones(2, 3, dtype=F64), torch.zeros(2, dtype=torch.int64)
    sums, exponent, lost = run("pair_sums", 0 * x, e + ZERO, x, e + 700)
    assert not sums.any() and exponent.item() == 0 and not lost


@pytest.mark.parametrize("before", (0, 20))
def test_what_underflows_before_it_meets_a_large_number_is_told(before):
    arguments, wanted = gpu_model.dropped(before)
    sums, exponent, lost = run("pair_sums", *arguments)
    found, rtol = float(sums[1, 1]) * 2.0 ** int(exponent), tolerances.path(F32, 1, 400)
    assert lost or found == pytest.approx(wanted, rel=rtol, abs=0)


# ---- log γ² ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("hidden", (1, 17, 1500))
def test_finish(hidden, dtype):
    """Products, and products and biases, as far apart as exponents go."""
    outputs, head, most = torch.rand(hidden, dtype=dtype), torch.rand(hidden, dtype=dtype), torch.rand(7, dtype=dtype)
    bias, zero = torch.rand(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    places = (0, 0, 0), (-4000, 4003, 1), (1 << 30, -(1 << 29), 1 << 29), (-(1 << 30), 5, -(1 << 30))
    for e, head_e, bias_e in places:
        for b, e_b in ((bias, bias_e), (bias, e + head_e), (zero, ZERO)):
            arguments = (outputs, torch.tensor([e]), head, torch.tensor([head_e]), b, torch.tensor([e_b]), 9, most)
            wanted = truth("finish", *arguments, torch.tensor([False]))[0]
            # The logarithm's own rounding, and the exponent's times log 2, beside that of γ².
            error = 4 * tolerances.unit_roundoff(F64)
            atol = tolerances.path(F64, 0, hidden)
            torch.testing.assert_close(finish(*arguments), wanted, rtol=error, atol=atol)


def test_finish_of_nothing_and_of_what_is_not_finite():
    zero, none, most = torch.zeros(3), torch.tensor([ZERO]), torch.ones(1030)
    one = torch.ones(1)
    assert finish(zero, none, zero + 1, one.long(), one * 0, none, 2, most) == -math.inf
    assert finish(zero, none, zero + 1, one.long(), one, one.long(), 2, most) == pytest.approx(math.log(4))
    for bad in (math.nan, math.inf):
        most[1029] = bad
        assert finish(zero, none, zero, none, one, one.long(), 2, most).isnan()
