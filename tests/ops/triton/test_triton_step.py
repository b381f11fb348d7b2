"""path_update_ in Triton: against the C++ op, plain torch, and itself on a network rescaled by powers of two."""

import dataclasses
import itertools
import math

import pytest
import torch
from step_cases import (
    COORDINATES,
    FAR,
    ON_A_PATH,
    SCALES,
    Case,
    Launched,
    assert_no_path_needs_no_range,
    assert_steps_alike,
    assert_steps_on_a_path,
    fresh,
    in_plain_torch,
    rescale_,
    roundings,
)
from triton_cases import DEVICE, F32, F64, MARKS, dtypes, moved

from pathrnn_kernels import plain
from pathrnn_kernels.ops.step import NO_CONSTANT, NO_PATH, OVERFLOW, UNBOUNDED, UNREACHED, path_update_
from pathrnn_kernels.ops.triton import step as triton_step

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*of a Tensor that is not a leaf:UserWarning")]

NETWORKS = {
    "one layer": Case(1, 1, 5, 3, 2),
    "both directions": Case(2, 2, 3, 2, 4, bias=False, head_bias=False),
    "embedding": Case(2, 1, 4, 2, 1, vocabulary=3),
    "without a head": Case(1, 2, 4, 1, 3, head=False),
    "one of all": Case(1, 1, 1, 1, 1),
    "entry exponents": Case(2, 1, 4, 2, 3, entries=True),
}
SGD = (1e-3, 0.0, 0.0, 0.0, 0.0)
SLOW = pytest.mark.slow


def build(network, dtype=F64, **changes):
    return dataclasses.replace(NETWORKS[network], dtype=dtype, **changes)


def flat(x):
    return itertools.chain(*map(flat, x)) if isinstance(x, list | tuple) else [x]


def update(
    op, case, rule, numbers, scale="none", eps=0.0, radius=0.0, constant=None, state=((), (), ()), rates=(), **more
):
    """The status as an int."""
    arguments = [
        case.weights,
        more.get("gradients", case.gradients),
        *map(list, state),
        constant,
        list(rates),
        numbers,
        rule,
        *case.structure(),
        SCALES[scale],
        eps,
        radius,
        more.get("grad_scale"),
        more.get("found_inf"),
        *case.kappa(),
    ]
    if op is path_update_ or DEVICE == "cpu":
        return int(op(*arguments))
    there = [moved(x) for x in arguments]
    status = int(op(*there))
    for one, other in zip(flat(arguments), flat(there), strict=True):
        if isinstance(one, torch.Tensor):
            one.copy_(other)
    return status


def triton_update(*arguments, **options):
    return update(triton_step.path_update_, *arguments, **options)


def cpp_update(*arguments, **options):
    return update(path_update_, *arguments, **options)


def snapshot(case):
    return [w.clone() for w in case.weights]


def assert_untouched(case, before):
    assert all(torch.equal(p, q) for p, q in zip(case.weights, before, strict=True))


def momentum_of(case):
    return [w / 8 for w in case.weights]


# --- Path-SGD ---------------------------------------------------------------------------------------------------------

OPTIONS = (
    ("none", {}),
    ("none", {"momentum": 0.9, "decay": 0.1, "maximize": 1.0}),
    ("path_norm", {"radius": 0.01}),
    ("path_norm", {"radius": 0.01, "momentum": 0.9, "decay": 0.1, "nesterov": 1.0}),
    ("path_norm", {"eps": 0.3}),
    ("first_step", {"radius": 0.5}),
    ("first_step", {"eps": 0.3, "momentum": 0.5}),
)


def with_dtypes(cases):
    """Each with both; interpreted, where a case takes seconds, with one in turn, most of them in the long tail."""
    if DEVICE == "cpu":
        alternating = [(*case, dtype) for case, dtype in zip(cases, itertools.cycle((F32, F64)), strict=False)]
        return [pytest.param(*case, marks=[SLOW] if n % 4 else []) for n, case in enumerate(alternating)]
    return [(*case, dtype) for case in cases for dtype in (F32, F64)]


@pytest.mark.parametrize(
    "network, scale, options, dtype",
    with_dtypes(
        [(name, *OPTIONS[3]) for name in NETWORKS]
        + [(name, *option) for name, option in zip(itertools.cycle(NETWORKS), OPTIONS, strict=False)]
    ),
    ids=str,
)
def test_path_sgd(network, scale, options, dtype):
    size = 30 if dtype == F32 and scale == "none" else 200
    momentum, radius, eps = options.get("momentum", 0.0), options.get("radius", 0.0), options.get("eps", 0.0)
    lr = 2.0 ** (size - 10) if scale == "none" else 1e-3
    numbers = (lr, momentum, *(options.get(key, 0.0) for key in ("decay", "nesterov", "maximize")))
    cases = [build(network, dtype, size=size) for _ in range(3)]
    before, found = snapshot(cases[0]), []
    for case, how in zip(cases, (triton_update, cpp_update, None), strict=True):
        first = momentum_of(case) if momentum else []
        constant = torch.tensor(math.nan, dtype=F64) if scale == "first_step" else None
        if how is not None:
            state = first, (), ()
            assert how(case, "sgd", numbers, scale, eps, radius, constant, state) == 0
        else:
            entries = [case.entry(i, numbers, lr, (m,)) for i, m in enumerate(first or [None] * len(case.weights))]
            status, commit = plain.sgd(entries, case.log_path_norm, scale, eps, radius or None, constant, 1.0)
            assert status == 0
            commit(status == 0)
        found.append((first, constant))
    assert any((p != q).any() for p, q in zip(cases[0].weights, before, strict=True))
    # As in test_step.py: of q, of the momentum, of the sum; and of the constant's logarithm, which is as large as κ's.
    count = 8 + (2 * size * math.log(2) if scale == "first_step" and dtype == F64 else 0)
    for twin, (first, constant) in zip(cases[1:], found[1:], strict=True):
        assert_steps_alike(cases[0], twin, before, count)
        for m, n in zip(found[0][0], first, strict=True):
            atol = float(n.abs().max()) * roundings(dtype, count)
            torch.testing.assert_close(m, n, rtol=roundings(dtype, count), atol=atol)
        if scale == "first_step":
            torch.testing.assert_close(found[0][1], constant, rtol=0, atol=1e-12)


def test_a_constant_is_found_once():
    constant = torch.tensor(math.nan, dtype=F64)
    case = build("one layer")
    still = [torch.zeros_like(g) for g in case.gradients]
    assert triton_update(case, "sgd", SGD, "first_step", constant=constant, gradients=still) == 0
    assert constant.isnan()
    assert triton_update(case, "sgd", SGD, "first_step", constant=constant) == 0
    fixed = float(constant)
    assert math.isfinite(fixed)
    for g in case.gradients:
        g.mul_(3)
    assert triton_update(case, "sgd", SGD, "first_step", constant=constant) == 0
    assert float(constant) == fixed


def test_numbers_and_rates_of_every_weight():
    case, twin = build("both directions"), build("both directions")
    count = len(case.weights)
    numbers = [x for i in range(count) for x in (0.0, 0.1 * (i % 3), 0.01 * i, 0.0, float(i % 2))]
    rates = [torch.tensor(1e-3 * (i + 1), dtype=(F32, F64)[i % 2]) for i in range(count)]
    none = torch.empty(0, dtype=F64)
    for c, how in ((case, triton_update), (twin, cpp_update)):
        # Weights without momentum have no buffer either, and one stays where it is.
        first = [m if i % 3 else none for i, m in enumerate(momentum_of(c))][1:]
        gradients = [None, *c.gradients[1:]]
        before = snapshot(c)
        state = first, (), ()
        assert how(c, "sgd", numbers[5:], "path_norm", state=state, rates=rates[1:], gradients=gradients) == 0
        assert torch.equal(c.weights[0], before[0])
    assert_steps_alike(case, twin, before, 8)
    one = torch.tensor(0.5, dtype=F32)
    for c, how in ((case, triton_update), (twin, cpp_update)):
        assert how(c, "sgd", SGD, "path_norm", rates=[one]) == 0
    assert_steps_alike(case, twin, before, 16)


@SLOW
def test_many_programs(monkeypatch):
    """More of them than one reads at a time."""
    hidden = 1100
    if DEVICE == "cpu":
        hidden = 12
        monkeypatch.setattr(triton_step, "_BLOCK", triton_step.tl.constexpr(8))
        monkeypatch.setattr(triton_step, "_CHUNK", triton_step.tl.constexpr(8))
    case, twin = Case(1, 1, hidden, 3, 2), Case(1, 1, hidden, 3, 2)
    before = snapshot(case)
    assert triton_update(case, "sgd", SGD, "path_norm", radius=1e-3) == 0
    assert cpp_update(twin, "sgd", SGD, "path_norm", radius=1e-3) == 0
    assert_steps_alike(case, twin, before, 8)
    case.gradients[1].view(-1)[-1] = 1e300  # of the last entries
    assert triton_update(case, "sgd", (1.0, *SGD[1:]), "none", radius=1e-3) == 0
    case.kappas[1].zero_()
    assert triton_update(case, "sgd", SGD) == UNREACHED + 4


# --- path coordinates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network, numbers, dtype",
    with_dtypes([(name, COORDINATES[0]) for name in NETWORKS] + [("embedding", n) for n in COORDINATES[1:]]),
    ids=str,
)
def test_steps_in_path_coordinates(network, numbers, dtype):
    cases = [build(network, dtype) for _ in range(3)]
    states = [fresh(case) for case in cases]
    for _ in range(2 + int(numbers[5])):
        before = snapshot(cases[0])
        assert triton_update(cases[0], "coordinates", numbers, state=states[0]) == 0
        assert cpp_update(cases[1], "coordinates", numbers, state=states[1]) == 0
        assert in_plain_torch(cases[2], numbers, *states[2]) == 0
        for twin, state in zip(cases[1:], states[1:], strict=True):
            # The gradient in the coordinates has six roundings, m and v some more, their ratio all of these, to a
            # power.
            assert_steps_alike(cases[0], twin, before, 100)
            for mine, other in zip(flat(states[0][:2]), flat(state[:2]), strict=True):
                torch.testing.assert_close(mine, other, rtol=roundings(dtype, 20), atol=roundings(dtype, 20))
                other.copy_(mine)
            for p, q in zip(cases[0].weights, twin.weights, strict=True):
                q.copy_(p)
            assert list(map(int, state[2])) == list(map(int, states[0][2]))
        for g in flat([case.gradients for case in cases]):
            g.mul_(-1.5)
    assert int(states[0][2][0]) == 2


def test_a_bias_alone_and_all_but_the_bias():
    case, twin = build("one layer", size=0), build("one layer", size=0)
    numbers, bias = COORDINATES[0], len(case.weights) - 1
    for moving in ([bias], range(bias)):
        before = snapshot(case)
        for c, how in ((case, triton_update), (twin, cpp_update)):
            gradients = [g if i in moving else None for i, g in enumerate(c.gradients)]
            state = [[x for i, x in enumerate(part) if i in moving] for part in fresh(c)]
            assert how(c, "coordinates", numbers, state=state, gradients=gradients) == 0
            assert [int(n) for n in state[2]] == [1] * len(moving)
        assert [(p != q).any().item() for p, q in zip(case.weights, before, strict=True)] == [
            i in moving for i in range(len(before))
        ]
        assert_steps_alike(case, twin, before, 100)


# --- Theorem 2, bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("sgd", "coordinates"))
@pytest.mark.parametrize(
    "network",
    ("one layer", *(pytest.param(n, marks=SLOW) for n in ("both directions", "embedding", "entry exponents"))),
)
def test_a_step_commutes_bit_for_bit_with_powers_of_two(network, rule):
    case, twin = build(network, F32), build(network, F32)
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-50, 51, (case.layers * case.directions, case.hidden), generator=generator)
    exponents[:, ::2] = 60 - exponents[:, ::2].abs() % 2
    exponents[:, 1::2] = -exponents[:, 1::2].abs() // 8
    rescale_(twin, exponents)
    before = snapshot(case)
    states = fresh(case), fresh(twin)
    for c, state in zip((case, twin), states, strict=True):
        if rule == "coordinates":
            for numbers in COORDINATES[:0:-1]:
                assert triton_update(c, rule, numbers, state=state) == 0
        else:
            assert triton_update(c, "sgd", (1.0, 0.0, 0.1, 0.0, 0.0), "path_norm", radius=0.01) == 0
    assert sum(torch.equal(p, q) for p, q in zip(case.weights, before, strict=True)) <= 1
    if rule == "coordinates":
        assert all(torch.equal(mine, other) for mine, other in zip(flat(states[0]), flat(states[1]), strict=True))
    rescale_(case, exponents)
    assert all(torch.equal(p, q) for p, q in zip(case.weights, twin.weights, strict=True))


def test_units_beyond_the_range_of_the_dtype():
    case, twin = build("embedding", units=200), build("embedding", units=200)
    before = snapshot(case)
    for c, how in ((case, triton_update), (twin, cpp_update)):
        assert how(c, "sgd", SGD, "path_norm", radius=0.01) == 0
    assert_steps_alike(case, twin, before, 8)


# --- what may not be done, and what is left out -----------------------------------------------------------------------


def test_what_may_not_be_done_changes_nothing():
    case = build("one layer", F32)
    before = snapshot(case)
    case.gradients[2].fill_(1e38)
    numbers = (1.0, *SGD[1:])
    state = momentum_of(case), (), ()
    kept = [m.clone() for m in state[0]]
    assert triton_update(case, "sgd", numbers, "path_norm", state=state) == OVERFLOW + 4 * 2
    assert_untouched(case, before)
    assert all(torch.equal(m, n) for m, n in zip(state[0], kept, strict=True))
    assert triton_update(case, "sgd", numbers, "path_norm", found_inf=torch.ones(1)) == 0
    assert_untouched(case, before)

    for rule, of_rule in (("sgd", numbers), ("coordinates", COORDINATES[0])):
        case = build("one layer", F32)
        state = fresh(case) if rule == "coordinates" else ((), (), ())
        case.kappas[1].zero_()
        assert triton_update(case, rule, of_rule, state=state) == UNREACHED + 4
        assert triton_update(case, rule, of_rule, state=state, found_inf=torch.ones(1)) == 0
        assert_untouched(case, before)
        assert all(not x.any() for x in flat(state))
        case.gradients[1].zero_()
        assert triton_update(case, rule, of_rule, state=state) == 0

        case = build("one layer", F32, head_bias=False)
        before_without = snapshot(case)
        case.log_path_norm.fill_(-math.inf)
        state = fresh(case) if rule == "coordinates" else ((), (), ())
        options = {"radius": 1.0} if rule == "sgd" else {}
        assert triton_update(case, rule, of_rule, state=state, **options) == NO_PATH
        case.log_path_norm.fill_(math.nan)
        assert triton_update(case, rule, of_rule, state=state, **options) == UNBOUNDED
        assert_untouched(case, before_without)
        assert all(not x.any() for x in flat(state))

    case = build("one layer", F32)
    case.log_path_norm.fill_(math.nan)  # a κ that could not be had, though the head's own sum could
    assert triton_update(case, "coordinates", COORDINATES[0], state=fresh(case)) == UNBOUNDED
    constant = torch.tensor(math.nan, dtype=F64)
    case = build("one layer", F64)
    case.gradients[0].fill_(1e200)
    assert triton_update(case, "sgd", numbers, "first_step", constant=constant) == NO_CONSTANT
    assert constant.isnan()
    assert_untouched(case, snapshot(build("one layer", F64)))


@pytest.mark.parametrize("zeros", (False, True))
def test_a_step_in_coordinates_that_overflows_changes_nothing(zeros):
    """γ/sqrt(κ) of weight_hh is beyond the range: its steps are, unless its gradients are 0."""
    case = build("one layer", F32)
    case.exponents[1] -= 340
    case.gradients[1] *= 0 if zeros else 2.0**-120  # so that it does not make all others vanish
    before, state = snapshot(case), fresh(case)
    status = triton_update(case, "coordinates", (*COORDINATES[0][:-1], 0.0), state=state)  # nothing decays
    if zeros:
        assert status == 0
        moved = [i for i, (p, q) in enumerate(zip(case.weights, before, strict=True)) if not torch.equal(p, q)]
        assert moved == [0, 2, 3, 4]  # of the bias g/κ is as nothing
        assert all(int(n) == 1 for n in state[2])
    else:
        assert status == OVERFLOW + 4 * 1
        assert_untouched(case, before)
        assert not any(x.any() for x in flat(state))


@SLOW
@dtypes
@pytest.mark.parametrize("rate", (1e30, 1e160))
def test_a_radius_shortens_a_step_of_any_length(rate, dtype):
    """It leaves of it what it leaves of one a little too long."""
    cases = build("embedding", dtype), build("embedding", dtype)
    before = snapshot(cases[0])
    for case, lr in zip(cases, (rate, 1e3), strict=True):
        assert triton_update(case, "sgd", (lr, *SGD[1:]), "path_norm", radius=1e-3) == 0
    # Of quotients, rates, shares and sums.
    assert_steps_alike(*cases, before, 8)


def test_a_step_that_is_not_finite_is_lost():
    """Though its quotients are."""
    case = build("one layer", F32)
    before = snapshot(case)
    status = triton_update(case, "sgd", (1e38, *SGD[1:]), "path_norm")
    assert status >= OVERFLOW and status % 4 == OVERFLOW % 4
    assert_untouched(case, before)
    first = [torch.full_like(w, 3e38) for w in case.weights]
    numbers = (1e-3, 1.5, 0.0, 1.0, 0.0)
    status = triton_update(case, "sgd", numbers, state=(first, (), ()), radius=1e-3)
    assert status >= OVERFLOW and status % 4 == OVERFLOW % 4
    assert_untouched(case, before)


@pytest.mark.parametrize("rule", ("sgd", "coordinates"))
@pytest.mark.parametrize("where", (1, 5), ids=("weight_hh", "head.bias"))
def test_a_gradient_that_is_not_finite(rule, where):
    found = []
    for how in (triton_update, cpp_update):
        case = build("one layer", F32)
        case.gradients[where].view(-1)[0] = math.nan
        case.gradients[where].view(-1)[1] = math.inf
        state = fresh(case) if rule == "coordinates" else ((), (), ())
        numbers = SGD if rule == "sgd" else COORDINATES[0]
        status = how(case, rule, numbers, "path_norm" if rule == "sgd" else "none", radius=0.0, state=state)
        found.append([torch.tensor(status), *case.weights, *flat(state)])
    tolerance = roundings(F32, 100)
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("rule", ("sgd", "coordinates"))
def test_a_grad_scale_is_taken_out(rule):
    case, twin = build("one layer"), build("one layer")
    for g in twin.gradients:
        g.mul_(2.0**16)
    for c, scale in ((case, None), (twin, torch.full((1,), 2.0**16))):
        state = fresh(c) if rule == "coordinates" else ((), (), ())
        numbers = SGD if rule == "sgd" else COORDINATES[0]
        options = {"scale": "first_step", "constant": torch.tensor(math.nan, dtype=F64)} if rule == "sgd" else {}
        assert triton_update(c, rule, numbers, state=state, grad_scale=scale, **options) == 0
    assert all(torch.equal(p, q) for p, q in zip(case.weights, twin.weights, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_strided_weights_gradients_and_states():
    case, twin = build("embedding"), build("embedding")

    def strided(x):
        return x if x.dim() < 2 else x.T.contiguous().T

    twin.weights, twin.gradients = (list(map(strided, x)) for x in (twin.weights, twin.gradients))
    twin.kappas = list(map(strided, twin.kappas))
    states = fresh(case), tuple(list(map(strided, part)) for part in fresh(case))
    for c, state in zip((case, twin), states, strict=True):
        assert triton_update(c, "coordinates", COORDINATES[1], state=state) == 0
        assert triton_update(c, "sgd", (1e-3, 0.9, 0.0, 0.0, 0.0), "path_norm", state=(state[0], (), ())) == 0
    for mine, other in zip(flat([case.weights, states[0]]), flat([twin.weights, states[1]]), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_halves(dtype):
    cases = [build("one layer", dtype, size=-30) for _ in range(2)]
    for case, how in zip(cases, (triton_update, cpp_update), strict=True):
        case.kappas = [k.float() for k in case.kappas]
        first = momentum_of(case)
        assert how(case, "sgd", (1e-3, 0.9, 0.1, 0.0, 0.0), "path_norm", state=(first, (), ())) == 0
        for i, g in enumerate(case.gradients):
            g.fill_(torch.finfo(dtype).max if i == 4 else 0)
        assert how(case, "sgd", SGD) == OVERFLOW + 4 * 4  # it is in float32's range, if the dtype is float16
        case.weights.extend(first)
    # In float32 they differ by some roundings, of which one may turn that to the dtype.
    torch.testing.assert_close(cases[0].weights, cases[1].weights, rtol=roundings(dtype, 1), atol=0)


def of_sgd(case, lr=1e-3):
    numbers = (lr, *SGD[1:])
    nothing = [], [], [], None, []
    arguments = [case.weights, case.gradients, *nothing, numbers, "sgd", *case.structure(), 0, 0.0, 1.0, None, None]
    return [moved(x) for x in (*arguments, *case.kappa())]


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ("first", "second"))
def test_state_of_another_dtype_is_refused(state):
    """As after a cast of the network: the kernels read it as of the weight's."""
    case = build("one layer", F32)
    before = snapshot(case)
    states = {
        "first": momentum_of(case),
        "second": momentum_of(case),
        "counts": [torch.zeros(()) for _ in case.weights],
    }
    states[state][1] = states[state][1].double()
    with pytest.raises(
        TypeError, match=r"a tensor of state is torch.float64, but its weight is torch.float32 \(cast since"
    ):
        triton_update(
            case, "coordinates", (1e-3, 0.9, 0.99, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0), state=tuple(states.values())
        )
    assert_untouched(case, before)


def test_tables_are_made_once_for_a_layout(monkeypatch):
    monkeypatch.setattr(triton_step, "_TABLES", 2)
    triton_step._tables.clear()
    Launched(monkeypatch, triton_step)
    case = build("one layer")
    for _ in range(2):
        triton_step.path_update_(*of_sgd(case))
    (table,) = [table for table, _ in triton_step._tables.values()]
    assert len(table) == len(case.weights) * triton_step._FIELDS.value
    case.gradients[0] = case.gradients[0].clone()
    for lr in (0.1, 0.2, 0.3):
        triton_step.path_update_(*of_sgd(case, lr))
    assert len(triton_step._tables) == 2


@pytest.mark.parametrize("capturing", (False, True))
def test_a_table_on_the_device(capturing):
    """While a CUDA graph is captured there is no copy from the host, whose memory may be another's at the replay."""
    values = [0, 1, -(1 << 63), (1 << 63) - 1, triton_step._float_bits(-0.1)]
    with Launched.watching() as watching:
        table = triton_step._on_device(values, torch.device(DEVICE), capturing)
    assert table.tolist() == values and table.device.type == DEVICE
    assert not capturing or not {"aten::_to_copy", "aten::copy_", "aten::_pin_memory"} & set(watching.calls)


def test_three_launches_and_nothing_else(monkeypatch):
    arguments = of_sgd(build("embedding"))
    with Launched(monkeypatch, triton_step) as launched:
        triton_step.path_update_(*arguments)
        launched.calls.clear()
        triton_step.path_update_(*arguments)
    assert launched.kernels == 2 * ["_measure", "_decide", "_apply"]
    # Memory for the status and for what is measured, no copy, and nothing is read.
    assert launched.calls == 2 * ["aten::empty"]
    launched.kernels.clear()
    triton_update(build("one layer"), "sgd", SGD, "first_step", constant=torch.tensor(math.nan, dtype=F64))
    assert tuple(launched.kernels) == launched.KERNELS


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit():
    case = build("one layer")
    for rule, numbers, options, message in (
        ("adam", SGD, {}, "rule is 'adam'"),
        ("sgd", SGD[1:], {}, "there are 4 numbers for 6 gradients; give 5 once, or for each"),
        ("sgd", SGD, {"rates": [torch.ones(())] * 2}, "there are 2 rates for 6 gradients"),
        ("sgd", SGD, {"state": (case.weights[:2], (), ())}, "there are 2 tensors of state for 6 gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_update(case, rule, numbers, **options)
    case.weights.pop()
    with pytest.raises(ValueError, match="there are 5 weights; these chains have 6"):
        triton_update(case, "sgd", SGD)
    case = build("one layer")
    if DEVICE == "cpu":
        with pytest.raises(TypeError, match="the tensors of a step are on cpu, meta: move all of them to one device"):
            triton_update(case, "sgd", SGD, rates=[torch.ones((), device="meta")])


@pytest.mark.parametrize("kind", ("no more", "decay, radius", "momentum", "PathAdam"))
def test_weights_on_no_path_between_units_far_apart(monkeypatch, kind):
    """float32 does not hold these weights in canonical coordinates."""
    monkeypatch.setenv("PATHRNN_BACKEND", "triton")
    make, expected = FAR[kind]
    for link in (1e-20, 1e20):
        assert_no_path_needs_no_range(make, expected, link, momentum=kind == "momentum", hidden=10)


@pytest.mark.parametrize("kind", ON_A_PATH)
def test_steps_on_a_path_between_units_far_apart(monkeypatch, kind):
    monkeypatch.setenv("PATHRNN_BACKEND", "triton")
    for link, dtype in ((1e-30, F32), (1e30, F32), (1e-150, F64)):
        assert_steps_on_a_path(kind, link, 12, dtype)
