"""path_update_ against plain torch in float64 (pathrnn_kernels/plain.py), and against a rescaling by powers of two."""

import dataclasses
import itertools
import math

import pytest
import torch
from step_cases import (
    COORDINATES,
    F32,
    F64,
    SCALES,
    Case,
    assert_steps_alike,
    fresh,
    in_plain_torch,
    rescale_,
    roundings,
)

from pathrnn_kernels import plain
from pathrnn_kernels.ops.step import NO_PATH, OVERFLOW, UNREACHED, path_update_

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [
    Case(1, 1, 5, 3, 2),
    Case(1, 1, 1, 1, 1),
    Case(2, 2, 3, 1, 4, bias=False, head_bias=False),
    Case(3, 1, 33, 2, 1, vocabulary=7),
    Case(1, 2, 70, 5, 3, head=False, vocabulary=2),
    Case(1, 1, 300, 1, 10),
    Case(2, 1, 6, 2, 3, units=200, dtype=F64),
    Case(2, 1, 6, 2, 3, units=31, dtype=F32),
    Case(2, 1, 6, 2, 3, entries=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"L{c.layers}D{c.directions}H{c.hidden}")
dtypes = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))


def of_dtype(case, dtype):
    if dtype == F32 and case.units > 31:
        pytest.skip("beyond float32's range")
    return dataclasses.replace(case, dtype=dtype)


def sgd(case, numbers, scale="path_norm", eps=0.0, radius=0.0, constant=None, missing=(), first=None, **more):
    gradients = [None if i in missing else g for i, g in enumerate(case.gradients)]
    return path_update_(
        case.weights,
        gradients,
        first or [],
        [],
        [],
        constant,
        [],
        numbers,
        "sgd",
        *case.structure(),
        SCALES[scale],
        eps,
        radius,
        more.get("grad_scale"),
        more.get("found_inf"),
        *case.kappa(),
    )


@cases
@dtypes
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", ({}, {"eps": 0.3}, {"radius": 0.01}, {"momentum": 0.9, "decay": 0.1}), ids=str)
def test_path_sgd(case, dtype, scale, options):
    if dtype == F32 and scale == "none":
        case = dataclasses.replace(case, size=30)
    case, twin = of_dtype(case, dtype), of_dtype(case, dtype)
    missing = {0} if len(case.weights) > 3 else set()
    momentum, decay = options.get("momentum", 0.0), options.get("decay", 0.0)
    numbers = (1e-3 if scale != "none" else 2.0 ** (case.size - 10), momentum, decay, float(momentum > 0), 1.0)
    eps, radius = options.get("eps", 0.0), options.get("radius", 0.0)
    before = [w.clone() for w in case.weights]
    state = []
    for c in (case, twin):
        moving = [i for i in range(len(c.weights)) if i not in missing]
        first = [torch.ldexp(torch.ones_like(c.weights[i]), torch.tensor(-3)) * c.weights[i] for i in moving]
        constant = torch.tensor(math.nan, dtype=F64) if scale == "first_step" else None
        if c is case:
            assert sgd(c, numbers, scale, eps, radius, constant, missing, first if momentum else None) == 0
        else:
            entries = [
                c.entry(i, numbers, numbers[0], (m if momentum else None,)) for i, m in zip(moving, first, strict=True)
            ]
            status, commit = plain.sgd(entries, c.log_path_norm, scale, eps, radius or None, constant, 1.0)
            assert status == 0
            commit(status == 0)
        state.append((first, constant))
    assert any((p != q).any() for p, q in zip(case.weights, before, strict=True))
    # Of q, of the momentum and of the sum; the radius' share has those of a sum in float64, and the constant those of
    # its logarithm, which is as large as that of κ.
    count = 8 + (2 * case.size * math.log(2) if scale == "first_step" and dtype == F64 else 0)
    assert_steps_alike(case, twin, before, count)
    for m, n in zip(state[0][0], state[1][0], strict=True):
        torch.testing.assert_close(
            m, n, rtol=roundings(dtype, count), atol=float(n.abs().max()) * roundings(dtype, count)
        )
    if scale == "first_step":
        torch.testing.assert_close(state[0][1], state[1][1], rtol=0, atol=1e-6 if dtype == F32 else 1e-12)


def coordinates(case, numbers, first, second, counts, **more):
    return path_update_(
        case.weights,
        case.gradients,
        first,
        second,
        counts,
        None,
        more.get("rates", []),
        numbers,
        "coordinates",
        *case.structure(),
        0,
        0.0,
        0.0,
        more.get("grad_scale"),
        more.get("found_inf"),
        *case.kappa(),
    )


@cases
@dtypes
@pytest.mark.parametrize("numbers", COORDINATES, ids=str)
def test_steps_in_path_coordinates(case, dtype, numbers):
    case, twin = of_dtype(case, dtype), of_dtype(case, dtype)
    states = fresh(case), fresh(twin)
    for step in range(4):
        before = [w.clone() for w in case.weights]
        assert coordinates(case, numbers, *states[0]) == in_plain_torch(twin, numbers, *states[1]) == 0
        # The gradient in the coordinates has six, m and v some more, their ratio all of these, to a power; and the
        # change of the weights from which both now start adds up.
        assert_steps_alike(case, twin, before, 100 * (step + 1))
        for c in (case, twin):
            for g in c.gradients:
                g.mul_(-1.5)
        for p, q in zip(case.weights, twin.weights, strict=True):
            q.copy_(p)
        for mine, other in zip(itertools.chain(*states[0]), itertools.chain(*states[1]), strict=True):
            other.copy_(mine)
    assert [int(n) for n in states[0][2]] == [int(n) for n in states[1][2]]


def test_a_subnormal_kappa_is_a_path():
    """What an instruction for 1/sqrt takes for 0 (AVX2's does)."""
    case, twin = (Case(1, 1, 5, 3, 2, dtype=F32) for _ in range(2))
    for c in (case, twin):
        c.kappas[1].view(-1)[0] = 1e-40
        c.gradients[1].view(-1)[0] = 1e-10
    before = [w.clone() for w in case.weights]
    assert coordinates(case, COORDINATES[1], *fresh(case)) == in_plain_torch(twin, COORDINATES[1], *fresh(twin)) == 0
    assert case.weights[1].view(-1)[0] != before[1].view(-1)[0]
    assert_steps_alike(case, twin, before, 100)


@pytest.mark.parametrize("tiny", (-15, 25, 35, 50, 70))
def test_lengths_of_gradients_whose_squares_are_below_the_range(tiny):
    """Of float32, where sums are formed again in float64: rows of vectors and a rest of one."""
    case, twin = (Case(1, 1, 21, 3, 2, dtype=F32, units=0, size=0) for _ in range(2))
    for c in (case, twin):
        for g in c.gradients:
            g.mul_(2.0**-tiny)
    before = snapshot(case)
    assert coordinates(case, COORDINATES[1], *fresh(case)) == in_plain_torch(twin, COORDINATES[1], *fresh(twin)) == 0
    assert_steps_alike(case, twin, before, 100)
    case, twin = dataclasses.replace(case), dataclasses.replace(twin)
    for c in (case, twin):
        for g in c.gradients:
            g.mul_(2.0**-tiny)
    numbers, before = (2.0**tiny, 0.0, 0.0, 0.0, 0.0), snapshot(case)
    assert sgd(case, numbers, "none", radius=0.01) == 0
    entries = [twin.entry(i, numbers, numbers[0], (None,)) for i in range(len(twin.weights))]
    status, commit = plain.sgd(entries, twin.log_path_norm, "none", 0.0, 0.01, None, 1.0)
    assert status == 0
    commit(status == 0)
    assert any((p != q).any() for p, q in zip(case.weights, before, strict=True))
    assert_steps_alike(case, twin, before, 8)


@pytest.mark.parametrize("rule", ("sgd", "coordinates"))
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.units == 4], ids=lambda c: f"L{c.layers}D{c.directions}H{c.hidden}"
)
def test_a_step_commutes_bit_for_bit_with_powers_of_two(case, rule):
    case, twin = of_dtype(case, F32), of_dtype(case, F32)
    chains = case.layers * case.directions
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-50, 51, (chains, case.hidden), generator=generator)
    exponents[:, ::2] = 60 - exponents[:, ::2].abs() % 2
    exponents[:, 1::2] = -exponents[:, 1::2].abs() // 8
    rescale_(twin, exponents)
    if rule == "sgd":
        numbers = (1.0, 0.0, 0.1, 0.0, 0.0)
        for c in (case, twin):
            assert sgd(c, numbers, radius=0.01) == 0
    else:
        states = fresh(case), fresh(twin)
        for c, state in zip((case, twin), states, strict=True):
            assert coordinates(c, COORDINATES[2], *state) == 0 == coordinates(c, COORDINATES[1], *state)
        for mine, other in zip(itertools.chain(*states[0]), itertools.chain(*states[1]), strict=True):
            assert torch.equal(mine, other)
    rescale_(case, exponents)
    for p, q in zip(case.weights, twin.weights, strict=True):
        assert torch.equal(p, q)


def test_one_and_two_threads_agree_bit_for_bit():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        case = Case(1, 1, 200, 3, 2, dtype=F32)
        assert sgd(case, (1.0, 0.0, 0.0, 0.0, 0.0), radius=0.01) == 0
        states = fresh(case)
        assert coordinates(case, COORDINATES[1], *states) == 0
        results.append([*case.weights, *states[0]])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def snapshot(case):
    return [w.clone() for w in case.weights]


def assert_untouched(case, before):
    assert all(torch.equal(p, q) for p, q in zip(case.weights, before, strict=True))


def test_what_may_not_be_done_changes_nothing():
    numbers = (1.0, 0.0, 0.0, 0.0, 0.0)
    case = Case(1, 1, 5, 3, 2, dtype=F32)
    before = snapshot(case)
    case.gradients[2].fill_(1e38)
    assert sgd(case, (1.0, 0.0, 0.0, 0.0, 0.0), scale="path_norm") == OVERFLOW + 4 * 2
    assert_untouched(case, before)

    case = Case(1, 1, 5, 3, 2, dtype=F32)
    case.kappas[1].zero_()
    assert sgd(case, numbers) == UNREACHED + 4 * 1
    assert coordinates(case, COORDINATES[0], *fresh(case)) == UNREACHED + 4 * 1
    assert_untouched(case, before)
    case.gradients[1].zero_()
    assert sgd(case, numbers) == 0

    case = Case(1, 1, 5, 3, 2, dtype=F32, head_bias=False)
    before = snapshot(case)
    case.log_path_norm.fill_(-math.inf)
    assert sgd(case, numbers) == NO_PATH == coordinates(case, COORDINATES[0], *fresh(case))
    assert_untouched(case, before)

    case = Case(1, 1, 5, 3, 2, dtype=F32)
    before = snapshot(case)
    assert sgd(case, numbers, found_inf=torch.ones(1)) == 0
    assert_untouched(case, before)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite_leaves_the_step_out_whatever_else_of_it_is(value):
    case = Case(1, 1, 5, 3, 2, entries=True, head_bias=False)
    case.entry_exponents[1].view(-1)[0] = -4000  # 1/sqrt(κ) is beyond float64
    before = snapshot(case)
    assert coordinates(case, COORDINATES[1], *fresh(case)) == OVERFLOW + 4
    case.gradients[3][0] = value
    assert coordinates(case, COORDINATES[1], *fresh(case)) == 0 == in_plain_torch(case, COORDINATES[1], *fresh(case))
    assert_untouched(case, before)


def test_a_grad_scale_is_taken_out():
    case, twin = Case(1, 1, 5, 3, 2), Case(1, 1, 5, 3, 2)
    for g in twin.gradients:
        g.mul_(2.0**16)
    assert sgd(case, (1.0, 0.0, 0.0, 0.0, 0.0)) == 0
    assert sgd(twin, (1.0, 0.0, 0.0, 0.0, 0.0), grad_scale=torch.full((1,), 2.0**16)) == 0
    assert all(torch.equal(p, q) for p, q in zip(case.weights, twin.weights, strict=True))


def test_strided_weights_gradients_and_states():
    case, twin = Case(2, 1, 6, 3, 4), Case(2, 1, 6, 3, 4)

    def strided(x):
        return x if x.dim() < 2 else x.T.contiguous().T

    twin.weights = [strided(w) for w in twin.weights]
    twin.gradients = [strided(g) for g in twin.gradients]
    states = fresh(case), tuple([strided(t) for t in part] for part in fresh(case))
    for c, state in zip((case, twin), states, strict=True):
        assert coordinates(c, COORDINATES[1], *state) == 0
        assert sgd(c, (1.0, 0.9, 0.0, 0.0, 0.0), first=state[0]) == 0
    for mine, other in zip([*case.weights, *states[0][0]], [*twin.weights, *states[1][0]], strict=True):
        assert torch.equal(mine, other)
