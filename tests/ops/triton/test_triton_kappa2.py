"""κ⁽²⁾'s sums and filter in Triton against their specification, gpu_model."""

import gpu_model
import pytest
import tolerances
import torch
from triton_cases import DEVICE, F32, F64, MARKS, dtypes, moved, run, same, truth

pytestmark = MARKS

ZERO = gpu_model.ZERO


def rows(count, hidden, dtype, spread=20):
    """Centred rows, one of them zero where there are several."""
    x, exponents = 2.0**30 * torch.rand(count, hidden, dtype=dtype), torch.randint(-spread, spread + 1, (count,))
    if count > 2:
        x[count // 2], exponents[count // 2] = 0, ZERO
    return x, exponents


def check_sums(*arguments, terms):
    sums, exponent = run("pair_sums", *arguments)
    same((sums, exponent), truth("pair_sums", *arguments), tolerances.path(arguments[0].dtype, 1, terms))
    return sums, exponent


@dtypes
@pytest.mark.parametrize("hidden, steps", ((1, 1), (3, 2), (17, 40), (70, 3)))
def test_pair_sums(hidden, steps, dtype):
    """κ⁽¹⁾'s sum, then lags with weights on top of a former result; h has a row more than δ."""
    d, h = rows(steps, hidden, dtype), rows(steps + 1, hidden, dtype)
    check_sums(*d, *h, 0, None, None, None, None, terms=steps)
    weights, weight_exponents = 2.0**30 * torch.rand(3, hidden, hidden, dtype=dtype), torch.tensor([-40, 7, 0])
    weights[0, 0] = 0
    check_sums(*d, *h, 1, weights, weight_exponents, None, None, terms=steps + 3)
    for e in (-50, 50 if dtype == F32 else 300):
        previous = (torch.rand(hidden, hidden, dtype=dtype), torch.tensor([e]))
        check_sums(*d, *h, 1, weights, weight_exponents, *previous, terms=steps + 3)


@dtypes
@pytest.mark.parametrize("usual", (-300, 0, 60, 61, 900))
def test_natural_scale(usual, dtype):
    """Without weights: exponent 0 for sums of ordinary size."""
    centre = gpu_model.centre(dtype)
    d, h = (2.0**centre * torch.rand(3, 5, dtype=dtype) for _ in range(2))
    e = torch.tensor([usual, usual - 9, usual - 1]) - centre
    sums, exponent = check_sums(d, e, h, torch.full((3,), -centre), 0, None, None, None, None, terms=3)
    assert exponent == (0 if 0 <= usual <= 60 else usual)
    assert 2.0**-5 < torch.ldexp(sums.double(), exponent - usual).max() < 2.0**3


@dtypes
def test_room(dtype):
    """Three factors a step's growth above their centre, summed over many steps, stay finite."""
    centre = gpu_model.centre(dtype)
    x = torch.full((40, 3), 2.0 ** (centre + 12), dtype=dtype)
    e = torch.zeros(40, dtype=torch.int64)
    weights = torch.full((1, 3, 3), 2.0 ** (centre + 12), dtype=dtype)
    check_sums(x, e, x, e, 0, weights, e[:1], None, None, terms=40)


def test_nothing_left():
    """Lags beyond the last step, and rows of zeros, add nothing."""
    x, e = torch.ones(2, 3, dtype=F64), torch.zeros(2, dtype=torch.int64)
    weights = torch.ones(2, 3, 3, dtype=F64)
    sums, exponent = run("pair_sums", x, e, x, e, 2, weights, e, None, None)
    assert not sums.any() and exponent.item() == ZERO
    sums, exponent = run("pair_sums", x, e, x, e, 5, weights, e, weights[0], e[:1])
    assert torch.equal(torch.ldexp(sums, exponent), weights[0])
    zeros = (torch.zeros(2, 3, dtype=F64), torch.full((2,), ZERO))
    sums, exponent = run("pair_sums", *zeros, x, e + 700, 0, None, None, None, None)
    assert not sums.any() and exponent.item() == 0


@pytest.mark.parametrize("before", (0, 20))
def test_what_underflows_before_it_meets_a_large_number_is_told(before):
    from pathrnn_kernels.ops.triton import kappa2

    rows, wanted = gpu_model.dropped(before)
    lost = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    sums, exponent = kappa2.pair_sums(*map(moved, rows), 0, None, None, None, None, lost)
    found, rtol = float(sums[1, 1]) * 2.0 ** int(exponent), tolerances.path(F32, 1, 400)
    assert lost or found == pytest.approx(wanted, rel=rtol, abs=0)


@dtypes
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("hidden, steps", ((1, 1), (17, 9), (130, 7)))
def test_filtered(hidden, steps, reverse, dtype):
    x, exponents = rows(steps, hidden, dtype)
    for ratio_exponent in (-31, -20, -60):
        arguments = (
            x,
            exponents,
            2.0**30 * (0.5 + torch.rand(hidden, dtype=dtype) / 2),
            torch.tensor([ratio_exponent]),
        )
        rtol = tolerances.path(dtype, steps, 1)
        same(run("filtered", *arguments, reverse), truth("filtered", *arguments, reverse), rtol)


def test_filtered_zeros():
    """Zero rows in front stay zero; a ratio of zero leaves nothing."""
    x = torch.tensor([[0.0, 0], [1, 2], [0, 0]])
    e = torch.tensor([ZERO, 3, ZERO])
    for ratio, alive in ((torch.ones(2), [False, True, True]), (torch.zeros(2), [False] * 3)):
        y, exponents = run("filtered", x, e, ratio, torch.tensor([0]), False)
        assert (y != 0).any(1).tolist() == alive and (exponents != ZERO).tolist() == alive


def test_refusal():
    x = torch.zeros(1, 1, device=DEVICE).expand(1, 16385)
    with pytest.raises(ValueError, match="hidden sizes up to 16384, not 16385"):
        run("filtered", x, torch.zeros(1).long(), x[0], torch.zeros(1).long(), False)
