"""path_update_, in C++ and in Triton, and plain torch, against decimal arithmetic: numbers of any size."""

import itertools
import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

import pytest
import torch
from step_cases import F32, F64, SCALES, Case, fresh, in_plain_torch

from pathrnn_kernels import plain
from pathrnn_kernels.kappa import Scaled
from pathrnn_kernels.ops.step import OVERFLOW, path_update_
from pathrnn_kernels.ops.triton import problem

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of Triton's interpreter, about infinity
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

EXACT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN)
TWO = Decimal(2)
UNITS = 4  # exponents of units are up to twice that


def power(n):
    return EXACT.power(TWO, int(n))


def case_of(seed, dtype, size=0, spread=0, tiny=0):
    """κ around 2^size, entries down to 2^(-2 spread) of it, gradients around 2^-tiny, some weights 0."""
    case = Case(1, 1, 3, 2, 2, dtype=dtype, units=UNITS, entries=spread > 0, seed=seed, size=size)
    generator = torch.Generator().manual_seed(seed)
    for i, e in enumerate(case.entry_exponents):
        if spread:  # none above 0, as the chains give them
            case.entry_exponents[i] = torch.randint(-2 * spread, 1, e.shape, generator=generator)
    own = iter(case.entry_exponents)
    scaled = []
    for i, s in enumerate(case.scaled):
        again = i and s is case.scaled[i - 1]
        scaled.append(scaled[-1] if again else (*s[:4], next(own) if spread else None))
    case.scaled = [tuple(s) for s in scaled]
    for g in case.gradients:
        g.mul_(2.0**-tiny)
    for w in case.weights[:4]:  # not the head's, of whose paths γ² is
        w.view(-1)[:: 1 + seed % 2] = 0
    return case


def kappa_of(s):
    exponents = Scaled(*s).exponents().expand_as(s[0])
    rows = [t.reshape(len(t), -1).tolist() for t in (s[0], exponents)]
    return [
        [EXACT.multiply(Decimal(m), power(e)) for m, e in zip(*row, strict=True)] for row in zip(*rows, strict=True)
    ]


def entries(case):
    """(weight, row, column, κ) of every entry."""
    for i, (w, s) in enumerate(zip(case.weights, case.scaled, strict=True)):
        kappas = kappa_of(s)
        for r in range(len(w)):
            for c in range(w[0].numel()):
                rows, columns = len(kappas), len(kappas[0])
                yield i, r, c, kappas[r if rows > 1 else 0][c if columns > 1 else 0]


def at(tensor, r, c):
    return Decimal(float(tensor.reshape(len(tensor), -1)[r, c]))


def smallest(dtype):
    """What is lost below the range in canonical coordinates: two units to a weight, and two such numbers added."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 2.0 ** (2 * UNITS + 1)


def update(how, case, rule, numbers, state=((), (), ()), scale="none", eps=0.0, radius=0.0):
    op = path_update_
    if how == "triton":
        if problem() is not None or torch.cuda.is_available():  # there tests/gpu has it
            pytest.skip(problem() or "the kernels are not interpreted")
        from pathrnn_kernels.ops.triton import step

        op = step.path_update_
    status = op(
        case.weights, case.gradients, *map(list, state), None, [], numbers, rule, *case.structure(), SCALES[scale], eps,
        radius, None, None, *case.kappa(),
    )  # fmt: skip
    return int(status)


def take(case, how, numbers, radius, scale="path_norm", eps=0.0):
    if how != "plain":
        return update(how, case, "sgd", numbers, ((), (), ()), scale, eps, radius)
    weights = [case.entry(i, numbers, numbers[0], ()) for i in range(len(case.weights))]
    status, commit = plain.sgd(weights, case.log_path_norm, scale, eps, radius or None, None, 1.0)
    commit(status == 0)
    return int(status)


#: Interpreted kernels are slow: of these, few.
RATES = [(0.5, 0.0), (0.5, 1e-3), (2.0**90, 1e-3), (1e160, 1e-3)]
INTERPRETED = [(0.0, (0.5, 1e-3)), (1e-3, (0.5, 0.0)), (0.0, (1e160, 1e-3))]


@pytest.mark.parametrize(
    ("how", "seed", "eps", "rate_and_radius"),
    [
        *itertools.product(("kernels", "plain"), range(4), (0.0, 1e-3), RATES),
        *[pytest.param("triton", 0, *own, marks=pytest.mark.slow) for own in INTERPRETED],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F32, {"tiny": 118}),  # the gradient's last digits are near the end of the range, the quotient is not
        (F32, {"size": -90}),
        (F32, {"size": 1500, "spread": 20}),
        (F32, {"spread": 1400, "tiny": 100}),
        (F64, {}),
        (F64, {"size": -1700, "spread": 200}),
        (F64, {"spread": 900, "tiny": 700}),
        (F64, {"spread": 1900, "tiny": 1000}),
    ],
    ids=str,
)
def test_path_sgd_is_right_or_says_so(how, seed, dtype, options, eps, rate_and_radius):
    rate, radius = rate_and_radius
    case = case_of(seed, dtype, **options)
    norm = EXACT.exp(Decimal(float(case.log_path_norm)))
    limit = Decimal(torch.finfo(dtype).max)
    steps, square, beyond = [], Decimal(0), set()
    for i, r, c, k in entries(case):
        divisor = EXACT.add(k, EXACT.multiply(Decimal(eps), norm))
        g = at(case.gradients[i], r, c)
        d = EXACT.divide(EXACT.multiply(norm, g), divisor) if divisor else Decimal(0)
        if abs(d) > limit:
            beyond.add(i)
        delta = EXACT.multiply(Decimal(-rate), d)
        square = EXACT.add(square, EXACT.divide(EXACT.multiply(k, EXACT.multiply(delta, delta)), norm))
        steps.append((i, r, c, delta))
    length = EXACT.sqrt(square)
    share = EXACT.divide(Decimal(radius), length) if radius and length > Decimal(radius) else Decimal(1)
    before = [w.clone() for w in case.weights]
    status = take(case, how, (rate, 0.0, 0.0, 0.0, 0.0), radius, eps=eps)
    if beyond:
        assert status == OVERFLOW + 4 * min(beyond)
    elif status:
        # Where a length or a step is no number of the dtype's.
        assert status % 4 == OVERFLOW % 4
        assert any(abs(delta) > limit for _, _, _, delta in steps)
    if status:
        assert all(torch.equal(w, old) for w, old in zip(case.weights, before, strict=True))
        return
    # Of γ² as an exponential, of the quotient, of the share and of the sum.
    few = 16 * torch.finfo(dtype).eps + 8 * abs(float(case.log_path_norm)) * torch.finfo(F64).eps
    for i, r, c, delta in steps:
        old = at(before[i], r, c)
        want = float(EXACT.add(old, EXACT.multiply(share, delta)))
        if abs(want) > float(limit) * (1 - few):
            continue
        size = max(abs(float(old)), abs(want))
        assert abs(float(at(case.weights[i], r, c)) - want) <= few * size + smallest(dtype)


@pytest.mark.parametrize(
    ("how", "seed"),
    [*itertools.product(("kernels", "plain"), range(4)), pytest.param("triton", 0, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F32, {"tiny": 110}),
        (F32, {"size": 1500, "spread": 20}),
        (F32, {"spread": 40}),
        (F32, {"spread": 200}),
        (F64, {}),
        (F64, {"tiny": 900}),
        (F64, {"size": -1700, "spread": 200}),
        (F64, {"spread": 900, "tiny": 700}),
    ],
    ids=str,
)
@pytest.mark.parametrize("grown", (1.0, 2.0**100))
def test_steps_in_path_coordinates_are_right_or_say_so(how, seed, dtype, options, grown):
    """The first step: |m| = (1 - β₁) |g̃| and sqrt(v) = sqrt(1 - β₂) |g̃|, so that u is sign(g)."""
    case = case_of(seed, dtype, **options)
    keep = 0.75
    numbers = (0.5 * grown, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, (1 - keep) / (0.5 * grown))
    head, bias = len(case.weights) - 2, len(case.weights) - 1
    everything = list(entries(case))
    norm = Decimal(0)
    for i, r, c, k in everything:
        if i == head:
            w = at(case.weights[i], r, c)
            norm = EXACT.add(norm, EXACT.multiply(k, EXACT.multiply(w, w)))
    limit = Decimal(torch.finfo(dtype).max)
    square = Decimal(0)
    for i, r, c, k in everything:
        if i != bias and k:
            g = at(case.gradients[i], r, c)
            square = EXACT.add(square, EXACT.divide(EXACT.multiply(g, g), k))
    length = EXACT.sqrt(square)
    wants, beyond, perhaps = [], set(), set()
    few = 24 * torch.finfo(dtype).eps
    for i, r, c, k in everything:
        if i == bias:
            continue
        old, g, n = at(case.weights[i], r, c), at(case.gradients[i], r, c), case.weights[i].numel()
        step = Decimal(0)
        seen = k and float(EXACT.divide(abs(g), EXACT.multiply(EXACT.sqrt(k), length))) > math.sqrt(
            torch.finfo(dtype).tiny
        )
        if k:
            step = EXACT.multiply(Decimal(numbers[0]), EXACT.sqrt(EXACT.divide(norm, EXACT.multiply(k, Decimal(n)))))
        want = EXACT.add(EXACT.multiply(Decimal(keep), old), EXACT.multiply(step, Decimal(-1 if g > 0 else 1)))
        if abs(want) > limit:
            (beyond if seen else perhaps).add(i)
        wants.append((i, r, c, old, want if seen else None))
    before = [w.clone() for w in case.weights]
    state = fresh(case)
    if how == "plain":
        status = in_plain_torch(case, numbers, *state)
    else:
        status = update(how, case, "coordinates", numbers, state)
    if status:
        # Of an entry whose square the dtype does not hold, both answers are right.
        assert status in {OVERFLOW + 4 * i for i in {*perhaps, *sorted(beyond)[:1]}}
        assert all(torch.equal(w, old) for w, old in zip(case.weights, before, strict=True))
        assert not any(t.any() for part in state for t in part)
        return
    assert not beyond
    for i, r, c, old, want in wants:
        if want is None or abs(float(want)) > float(limit) * (1 - few):
            continue
        size = max(abs(float(old)), abs(float(want)))
        assert abs(float(at(case.weights[i], r, c)) - float(want)) <= few * size + smallest(dtype)
