"""column_sums, ends, chains and finish in CUDA, emulated, against their specification."""

import itertools
import math

import gpu_model
import launches
import oracles
import pytest
import tolerances
import torch
from emulation import build
from gpu_model import ZERO, centre, same

from pathrnn_kernels import ops
from pathrnn_kernels.ops import cuda, gpu
from pathrnn_kernels.ops.plan import LAYOUTS, Plan, layout

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.slow,  # a compiler runs for a minute
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of Triton's interpreter, which κ⁽²⁾ runs in
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

F32, F64, I64 = torch.float32, torch.float64, torch.int64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
HIDDEN = pytest.mark.parametrize("hidden", (1, 3, 17, pytest.param(100, marks=pytest.mark.slow), 130))
SIZES = pytest.mark.parametrize(
    "hidden, steps", ((1, 1), (1, 7), (3, 2), (17, 40), pytest.param(100, 7, marks=pytest.mark.slow), (130, 2))
)
#: Blocks of a chain: slices that divide nothing, one block, more blocks than rows.
SOME_PLANS = pytest.mark.parametrize("plan", [("block", 1), ("cluster", 3), ("grid", 2)], ids=str)
PLANS = pytest.mark.parametrize(
    "plan",
    [("block", 1), ("cluster", 1), ("cluster", 3), ("cluster", 16), ("grid", 1), ("grid", 2), ("grid", 7)],
    ids=str,
)


def largest(weight):
    return weight.abs().max().reshape(1)


def tempered(count, hidden, dtype, exponents=(-3, 0, 2, 5)):
    rows = torch.rand(count, hidden, dtype=dtype) * 2.0 ** centre(dtype)
    return rows, torch.tensor(exponents)[torch.randint(len(exponents), (count,))]


def identical(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def run(kernel, *call):
    """A kernel's results, the flag ``lost`` as the last of them."""
    lost = torch.zeros(1, dtype=torch.bool)
    return *kernel(*call, lost), lost


def check_sums(kernel, model, call, rtol):
    """Against the specification; a repeat gives the same bits."""
    found, wanted = run(kernel, *call), run(model, *call)
    for i in range(0, len(found) - 1, 2):
        same(found[i : i + 2], wanted[i : i + 2], rtol)
    assert found[-1] or not wanted[-1]
    assert identical(found, run(kernel, *call))
    return found


# ---- column_sums -----------------------------------------------------------------------------------------------------


@DTYPES
@HIDDEN
@pytest.mark.parametrize("rows, scale", ((1, 1.0), (2, 1e-18), (129, 1e18), (33, 0.0), (2100, 1.0)))
def test_column_sums(rows, scale, hidden, dtype):
    """2100 rows are shared out."""
    w = torch.randn(rows, hidden, dtype=dtype) * scale
    found = check_sums(cuda.column_sums, gpu_model.column_sums, (w, largest(w)), tolerances.path(dtype, rows, 1))
    assert found[1] == gpu_model.square_exponent(largest(w)) and not found[2]


@DTYPES
def test_column_sums_of_the_largest_and_smallest_numbers(dtype):
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.tiny, limits.smallest_normal / 8):
        w = torch.full((3, 2), value, dtype=dtype)
        check_sums(cuda.column_sums, gpu_model.column_sums, (w, largest(w)), tolerances.path(dtype, 3, 1))


@DTYPES
def test_squares_below_the_normal_numbers_are_lost(dtype):
    """A weight beside the largest, 1: its square is normal or not. The flag is set, never cleared."""
    least = 2.0 ** (-63 if dtype == torch.float32 else -511)
    for value, lost in ((least, False), (least / 2, True), (0.0, False)):
        w = torch.ones(40, 9, dtype=dtype)
        w[33, 8] = value
        assert run(cuda.column_sums, w, largest(w))[2] == lost
        for place in ("weight_ih", "bias_ih", "bias_hh", "head_weight", "head_bias"):
            call = end_arguments(9, 40, 2, dtype)
            changed = call[place][1] if place.startswith("bias") else call[place]
            changed[...] = 1
            changed.view(-1)[-1] = value
            call["largest"] = all_largest(call)
            assert run(cuda.ends, *call.values())[-1] == lost, place
        flag = torch.ones(1, dtype=torch.bool)
        cuda.column_sums(w, largest(w), flag)
        assert flag


# ---- ends ------------------------------------------------------------------------------------------------------------


def all_largest(call):
    """In the order of gpu_model.ends; those of weight_hh, which the kernel passes over, and of what follows are nan."""
    unused = torch.full((call["layers"] + 1,), math.nan, dtype=call["weight_ih"].dtype)
    tensors = [*call["bias_ih"], *call["bias_hh"], call["head_weight"], call["head_bias"]]
    found = [largest(t) for t in tensors if t is not None]
    first = torch.cat([largest(call["weight_ih"]), unused[1:], unused[1:]])[: 2 * call["layers"]]
    return torch.cat([first, *found, unused[:1]])


def end_arguments(hidden, inputs, layers, dtype, bias=True, given=True, head=2, outputs=3, scales=(1.0, 0, 1.0)):
    """scales: of weight_ih, the exponent of the inputs, the scale of biases. head: 0 none, 1 without a bias, 2 with."""
    call = {
        "weight_ih": torch.randn(hidden, inputs, dtype=dtype) * scales[0],
        **{
            name: [torch.randn(hidden, dtype=dtype) * scales[2] * scale for _ in range(layers if bias else 0)]
            for name, scale in (("bias_ih", 1), ("bias_hh", 2))
        },
        "head_weight": torch.randn(outputs, hidden, dtype=dtype) if head else None,
        "head_bias": torch.randn(outputs, dtype=dtype) if head == 2 else None,
        "inputs": torch.rand(inputs, dtype=dtype) if given else None,
        "inputs_exponent": torch.tensor([int(scales[1])]) if given else None,
        "layers": layers,
    }
    return call | {"largest": all_largest(call)}


def check_ends(call, rtol):
    return check_sums(cuda.ends, gpu_model.ends, call.values(), rtol)


@DTYPES
@HIDDEN
@pytest.mark.parametrize("bias, given, head, layers, inputs", ((0, 0, 0, 1, 1), (1, 1, 1, 3, 3), (1, 0, 2, 1, 40)))
def test_ends(bias, given, head, layers, inputs, hidden, dtype):
    call = end_arguments(hidden, inputs, layers, dtype, bias, given, head)
    assert not check_ends(call, tolerances.path(dtype, inputs, 1))[-1]


@pytest.mark.parametrize("bias, given, head", list(itertools.product((False, True), (False, True), (0, 1, 2))))
def test_ends_of_every_network(bias, given, head):
    check_ends(end_arguments(5, 4, 2, F64, bias, given, head), tolerances.path(F64, 4, 1))


def test_ends_of_many_outputs_and_layers():
    """300 outputs: more than the threads that share a column. 70 layers: more than a launch takes."""
    check_ends(end_arguments(20, 3, 70, F32, outputs=300), tolerances.path(F32, 300, 1))


@DTYPES
@pytest.mark.parametrize(
    "scales", ((0, 0, 0), (0, 7, 1), (1, 7, 0), (1e-15, 0, 1), (1, 0, 1e-15), (1, 10**6, 1), (1, -(10**6), 1)), ids=str
)
def test_ends_of_extreme_sizes(scales, dtype):
    """What vanishes beside something far larger is not lost."""
    assert not check_ends(end_arguments(17, 5, 2, dtype, scales=scales), tolerances.path(dtype, 5, 1))[-1]


def test_a_drive_that_underflows_is_lost():
    """Unit 0 of two, on the exponent of unit 1: a bias alone, or a product with the inputs."""
    zero, one = torch.zeros(2), torch.ones(2)
    weight = torch.tensor([[0.0], [1.0]])
    for small, lost in ((1e-15, False), (1e-25, True)):
        for first, bias in ((weight, torch.tensor([1e-2, 0.0])), (torch.tensor([[1e-2], [1.0]]), zero)):
            inputs = torch.ones(1) if bias is not zero else torch.tensor([small**1.4])
            call = {
                "weight_ih": first,
                "bias_ih": [bias if bias is zero else bias * small / 1e-5],
                "bias_hh": [zero],
                "head_weight": None,
                "head_bias": None,
                "inputs": inputs,
                "inputs_exponent": torch.tensor([0 if bias is zero else 20]),
                "layers": 1,
            }
            found = run(cuda.ends, *call.values(), all_largest(call))
            assert found[-1] == lost and torch.equal(found[2], one * 2.0 ** centre(torch.float32))


# ---- chains ----------------------------------------------------------------------------------------------------------


def chain_arguments(hidden, steps, dtype, rows_h=1, rows_d=1, backward=True, last_only=False, ones_h0=False, scale=1.0):
    weights = [torch.randn(hidden, hidden, dtype=dtype) * scale / hidden**0.5 for _ in range(2)]
    back = [weights[1], largest(weights[1]), *tempered(rows_d, hidden, dtype)] if backward else [None] * 4
    return [weights[0], largest(weights[0]), *tempered(rows_h, hidden, dtype), *back, steps, last_only, ones_h0]


def check_chains(call, plan, rtol=None):
    """Against the specification, unless the kernel says that it lost something."""
    found, wanted = run(cuda.chains, *call, *plan), run(gpu_model.chains, *call, *plan)
    steps = call[8]
    rtol = rtol or tolerances.path(call[0].dtype, steps, len(call[0]))
    assert found[4] or not wanted[4]
    if not found[4]:
        same(found[:2], wanted[:2], rtol)
        same(found[2:4], wanted[2:4], rtol)
        for rows, exponents in (found[:2], found[2:4]):
            assert torch.equal(exponents == ZERO, (rows == 0).all(1))
    assert identical(found, run(cuda.chains, *call, *plan))
    return found


@SOME_PLANS
@DTYPES
@SIZES
def test_chains(hidden, steps, plan, dtype):
    call = chain_arguments(hidden, steps, dtype, 1, steps, ones_h0=steps == 40)
    if plan[0] == "block" and layout("block", hidden, 1, dtype.itemsize) is None:
        with pytest.raises(RuntimeError, match="do not fit"):
            run(cuda.chains, *call, *plan)
        return
    assert not check_chains(call, plan)[4]


@PLANS
@DTYPES
@pytest.mark.parametrize("hidden", (1, 3, 33))
def test_slices_of_every_size(hidden, plan, dtype):
    assert not check_chains(chain_arguments(hidden, 5, dtype), plan)[4]


@DTYPES
@pytest.mark.parametrize("plan, blocks", (("block", 1), ("cluster", 8)))
def test_every_layout_at_its_limits(plan, blocks, dtype):
    """As the choice of a plan knows them: W̃ as wide as each holds, and no wider one than the last does."""
    widest = 0
    for one in LAYOUTS[plan, dtype.itemsize]:
        widest = min(one.lanes * one.columns, blocks * one.most_rows)
        assert layout(plan, widest, blocks, dtype.itemsize) == one
        assert not check_chains(chain_arguments(widest, 3, dtype, ones_h0=True), (plan, blocks))[4]
    with pytest.raises(RuntimeError, match="do not fit into the registers"):
        run(cuda.chains, *chain_arguments(widest + 1, 1, dtype), plan, blocks)


@SOME_PLANS
@pytest.mark.parametrize(
    "rows_h, rows_d, backward, last_only, ones_h0",
    [
        case
        for case in itertools.product((1, 9), (1, 9), (True, False), (True, False), (True, False))
        if case[2] or (case[1] == 1 and not case[3])
    ],
)
def test_every_kind_of_chain(rows_h, rows_d, backward, last_only, ones_h0, plan):
    found = check_chains(chain_arguments(5, 9, F64, rows_h, rows_d, backward, last_only, ones_h0), plan)
    assert len(found[2]) == (9 if backward else 0)


@pytest.mark.parametrize("hidden, dtype", ((257, F32), (260, F32), (181, F64), (184, F64)))
def test_rows_that_do_not_fit_into_shared_memory_are_streamed(hidden, dtype):
    """257 and 181: rows that are not aligned."""
    check_chains(chain_arguments(hidden, 3, dtype, ones_h0=True), ("grid", 1))


MATRICES = {
    "zero": lambda x: 0 * x,
    "identity": lambda x: torch.eye(len(x), dtype=x.dtype),
    "growing": lambda x: 40 * x,
    "vanishing": lambda x: 0.02 * x,
    "enormous": lambda x: 1e15 * x,
    "tiny": lambda x: 1e-15 * x,
    "nilpotent": lambda x: x.triu(1),
    "permutation": lambda x: torch.eye(len(x), dtype=x.dtype)[x[0].argsort()],
    "dead row": lambda x: x * (torch.arange(len(x)) != 1)[:, None],
    "graded": lambda x: x * 10.0 ** -torch.arange(len(x), dtype=x.dtype),
}


@SOME_PLANS
@DTYPES
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("last_only", (False, True))
def test_matrices(matrix, last_only, plan, dtype):
    call = chain_arguments(6, 30, dtype, last_only=last_only, ones_h0=last_only)
    for place in (0, 4):
        call[place] = MATRICES[matrix](call[place])
        call[place + 1] = largest(call[place])
    check_chains(call, plan)


@SOME_PLANS
@DTYPES
def test_drives_of_extreme_exponents(plan, dtype):
    """Where one part dwarfs the other at every entry, nothing is lost."""
    call = chain_arguments(5, 12, dtype, 12, 12, ones_h0=True)
    for place in (2, 6):
        rows, exponents = tempered(12, 5, dtype, (-(10**6), 0, 10**6))
        dead = torch.rand(12) < 0.3
        call[place] = torch.where(dead[:, None], 0, rows)
        call[place + 1] = torch.where(dead, ZERO, exponents)
    assert not check_chains(call, plan)[4]


@SOME_PLANS
@DTYPES
@pytest.mark.parametrize("ones_h0", (False, True))
def test_chains_without_any_drive(plan, ones_h0, dtype):
    call = chain_arguments(5, 12, dtype, ones_h0=ones_h0)
    for place in (2, 6):
        call[place], call[place + 1] = torch.zeros(1, 5, dtype=dtype), torch.tensor([ZERO])
    found = check_chains(call, plan)
    assert found[0].any() == ones_h0 and not found[2].any()


@SOME_PLANS
@DTYPES
@pytest.mark.parametrize("last_only", (False, True))
def test_chains_that_come_to_rest(plan, last_only, dtype):
    """Long after the last bit has settled; with last_only δ vanishes meanwhile, and does not rest."""
    call = chain_arguments(7, 300, dtype, scale=0.3, last_only=last_only)
    check_chains(call, plan)
    # Zero from the third step on.
    call[0], call[4] = call[0].triu(1) * (torch.arange(7) > 4), call[4].triu(1) * (torch.arange(7) > 4)
    check_chains(call, plan)


@SOME_PLANS
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 30))])
def test_what_is_lost_is_said(seed, plan):
    """Weights over many orders of magnitude: float32 either equals float64 or says that it lost something."""
    torch.manual_seed(seed)
    call = chain_arguments(4, 10, F32, 10 if seed % 2 else 1, last_only=seed % 3 == 0, ones_h0=seed % 5 == 0)
    for place in (0, 4):
        weight = call[place].sign() * 10.0 ** (-torch.rand(4, 4) * (seed + 1)) * (torch.rand(4, 4) < 0.6)
        call[place], call[place + 1] = weight, largest(weight)
    for place in (2, 6):
        call[place] = call[place] * 10.0 ** (-torch.rand(call[place].shape) * (seed % 7) * 6)
    check_chains(call, plan)


@SOME_PLANS
@DTYPES
def test_growth_is_not_lost(plan, dtype):
    """The drive falls below every exponent of the rows."""
    call = chain_arguments(9, 100, dtype, 1, 100, scale=20)
    assert not check_chains(call, plan)[4]


# ---- finish ----------------------------------------------------------------------------------------------------------


def finish_arguments(hidden, dtype, exponents=(3, -2, 4)):
    return {
        "outputs": torch.rand(hidden, dtype=dtype),
        "outputs_exponent": torch.tensor(exponents[:1]),
        "head": torch.rand(hidden, dtype=dtype),
        "head_exponent": torch.tensor(exponents[1:2]),
        "head_bias": torch.rand(1, dtype=dtype),
        "head_bias_exponent": torch.tensor(exponents[2:]),
        "steps": 7,
        "largest": torch.rand(300, dtype=dtype),
        "lost": torch.zeros(1, dtype=torch.bool),
    }


@DTYPES
@pytest.mark.parametrize("hidden", (1, 3, 130, 600))
@pytest.mark.parametrize("exponents", ((3, -2, 4), (10**6, 10**6, 0), (-(10**6), 0, -(10**6)), (0, 0, 10**6)), ids=str)
def test_finish(hidden, exponents, dtype):
    call = finish_arguments(hidden, dtype, exponents)
    (found, *state), (wanted, *wanted_state) = cuda.finish(**call), gpu_model.finish(**call)
    assert identical(state, wanted_state)
    torch.testing.assert_close(
        found, wanted, rtol=tolerances.unit_roundoff(F64) * 16, atol=tolerances.path(F64, 1, 600)
    )
    again, _, arithmetic = cuda.finish(**(call | {"lost": torch.ones(1, dtype=torch.bool)}))
    assert again.isnan() and arithmetic == -1


@DTYPES
def test_finish_of_zeros_and_of_what_is_not_finite(dtype):
    call = finish_arguments(40, dtype)
    nothing = {"head_bias": torch.zeros(1, dtype=dtype), "head_bias_exponent": torch.tensor([ZERO])}
    no_path = {"outputs": torch.zeros(40, dtype=dtype)}
    assert cuda.finish(**(call | nothing))[0].isfinite() and cuda.finish(**(call | no_path))[0].isfinite()
    assert cuda.finish(**(call | nothing | no_path))[0] == -math.inf
    for place, value in itertools.product((0, 299), (math.nan, math.inf)):
        call["largest"][place] = value
        assert cuda.finish(**call)[0].isnan()
        call["largest"][place] = 1


# ---- all -------------------------------------------------------------------------------------------------------------


CHAIN_NAMES = (
    *("weight_h", "largest_h", "drive_h", "drive_h_exponents", "weight_d", "largest_d", "drive_d", "drive_d_exponents"),
    *("seq_len", "last_only", "ones_h0"),
)


def calls(dtype=F32, hidden=40):
    w = torch.randn(600, hidden, dtype=dtype)
    lost = {"lost": torch.zeros(1, dtype=torch.bool)}
    chains = dict(zip(CHAIN_NAMES, chain_arguments(hidden, 9, dtype, ones_h0=True, rows_d=9), strict=True))
    return {
        "column_sums": {"w": w, "largest": largest(w), **lost},
        "ends": {**end_arguments(hidden, 9, 2, dtype), **lost},
        "chains": {**chains, "plan": "grid", "blocks": 2, **lost},
        "finish": finish_arguments(hidden, dtype),
    }


def results(name, call):
    found = getattr(cuda, name)(**call)
    return found if isinstance(found, tuple) else (found,)


NAMES = ("column_sums", "ends", "chains", "finish")
EVERY = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize(
    "name, plan", [("chains", ("block", 1)), ("chains", ("cluster", 5)), *((name, None) for name in NAMES)]
)
def test_order_of_threads_does_not_matter(name, plan, monkeypatch):
    call = calls()[name]
    if plan is not None:
        call["plan"], call["blocks"] = plan
    wanted = results(name, call)
    for seed in "1", "2":
        monkeypatch.setenv("PATHRNN_EMULATION_SEED", seed)
        assert identical(results(name, call), wanted)


def map_tensors(function, call):
    def value_of(value):
        if isinstance(value, list):
            return [value_of(v) for v in value]
        return function(value) if isinstance(value, torch.Tensor) else value

    return {key: value_of(value) for key, value in call.items()}


@EVERY
def test_strided_tensors(name):
    call = calls()[name]
    strided = map_tensors(lambda t: t.repeat_interleave(2, -1)[..., ::2], call)
    assert identical(results(name, strided), results(name, call))


@EVERY
def test_inputs_are_left_alone(name):
    call = calls()[name]
    before = map_tensors(torch.clone, call)
    results(name, call)
    for key, value in before.items():
        for one, other in zip(value, call[key], strict=True) if isinstance(value, list) else [(value, call[key])]:
            assert torch.equal(one, other) or key == "largest" if isinstance(one, torch.Tensor) else one == other


@EVERY
@DTYPES
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.pathrnn, name), (), calls(dtype, 5)[name])


def test_opcheck_without_the_optional_tensors():
    lost = torch.zeros(1, dtype=torch.bool)
    ends = end_arguments(4, 3, 1, F32, False, False, 0)
    torch.library.opcheck(torch.ops.pathrnn.ends, (*ends.values(), lost))
    torch.library.opcheck(torch.ops.pathrnn.chains, (*chain_arguments(5, 9, F32, backward=False), "block", 1, lost))


def ones(*shape, dtype=F32):
    return torch.ones(shape, dtype=dtype)


BAD = [
    ("column_sums", {"w": ones(4)}, ValueError, r"w has shape \[4\]; it must be \[R, N\]"),
    ("column_sums", {"w": ones(4, 40, dtype=torch.float16)}, TypeError, "w has dtype Half"),
    ("column_sums", {"largest": ones(2)}, ValueError, "largest has shape"),
    ("column_sums", {"largest": ones(1, dtype=F64)}, TypeError, "largest has dtype Double, but w has Float"),
    ("column_sums", {"lost": ones(1)}, TypeError, "lost has dtype Float; use bool"),
    ("column_sums", {"lost": ones(2, dtype=torch.bool)}, ValueError, "lost has shape"),
    ("ends", {"weight_ih": ones(4)}, ValueError, "weight_ih has shape"),
    ("ends", {"layers": 0}, ValueError, "layers is 0"),
    ("ends", {"layers": 3}, ValueError, "bias_ih has 2 tensors for 3 layers"),
    ("ends", {"bias_hh": []}, ValueError, "bias_hh has 0 tensors for 2 layers"),
    ("ends", {"bias_ih": [ones(40), ones(39)]}, ValueError, "bias_ih has shape"),
    ("ends", {"bias_hh": [ones(40), ones(40, dtype=F64)]}, TypeError, "bias_hh has dtype"),
    ("ends", {"head_weight": ones(40)}, ValueError, r"head_weight has shape \[40\]; it must be \[O, H\]"),
    ("ends", {"head_weight": ones(3, 39)}, ValueError, "head_weight has shape"),
    ("ends", {"head_bias": ones(3, 1)}, ValueError, "head_bias has shape"),
    ("ends", {"head_bias": ones(4)}, ValueError, "head_bias has shape"),
    ("ends", {"inputs": ones(8)}, ValueError, "inputs has shape"),
    ("ends", {"inputs": None}, ValueError, "inputs and inputs_exponent belong together"),
    ("ends", {"inputs_exponent": ones(1)}, TypeError, "inputs_exponent has dtype Float; use int64"),
    ("ends", {"largest": ones(9)}, ValueError, "largest has 9 entries; the weights need 10"),
    ("ends", {"largest": ones(11, dtype=F64)}, TypeError, "largest has dtype"),
    ("ends", {"lost": ones(1)}, TypeError, "lost has dtype"),
    ("chains", {"weight_h": ones(40, 39)}, ValueError, "weight_h has shape"),
    ("chains", {"weight_h": ones(40, 40, dtype=I64)}, TypeError, "weight_h has dtype"),
    ("chains", {"largest_h": ones(1, 1)}, ValueError, "largest_h has shape"),
    ("chains", {"drive_h": ones(3, 40)}, ValueError, r"drive_h has shape \[3, 40\]; it must be \[9, 40\]"),
    ("chains", {"drive_h": ones(40)}, ValueError, "drive_h has shape"),
    ("chains", {"drive_h_exponents": ones(9, dtype=I64)}, ValueError, "drive_h_exponents has shape"),
    ("chains", {"weight_d": ones(40, 40, dtype=F64)}, TypeError, "weight_d has dtype"),
    ("chains", {"weight_d": None}, ValueError, "weight_d and largest_d belong together"),
    ("chains", {"drive_d": None}, ValueError, "weight_d and drive_d belong together"),
    ("chains", {"drive_d_exponents": None}, ValueError, "weight_d and drive_d_exponents belong together"),
    ("chains", {"drive_d": ones(9, 41)}, ValueError, "drive_d has shape"),
    ("chains", {"seq_len": 0}, ValueError, "seq_len is 0"),
    ("chains", {"lost": ones(1)}, TypeError, "lost has dtype"),
    ("finish", {"outputs": ones(40, 1, 1)}, ValueError, "outputs has shape"),
    ("finish", {"outputs_exponent": ones(1)}, TypeError, "outputs_exponent has dtype"),
    ("finish", {"head": ones(39)}, ValueError, "head has shape"),
    ("finish", {"head": ones(40, dtype=F64)}, TypeError, "head has dtype"),
    ("finish", {"head_exponent": ones(2, dtype=I64)}, ValueError, "head_exponent has shape"),
    ("finish", {"head_bias": ones(2)}, ValueError, "head_bias has shape"),
    ("finish", {"head_bias_exponent": ones(1)}, TypeError, "head_bias_exponent has dtype"),
    ("finish", {"largest": ones(3, dtype=F64)}, TypeError, "largest has dtype"),
]


@pytest.mark.parametrize("name, wrong, error, message", BAD, ids=lambda value: "" if isinstance(value, dict) else None)
def test_bad_input(name, wrong, error, message):
    with pytest.raises(error, match=message):
        results(name, calls()[name] | wrong)


@EVERY
def test_another_device(name):
    for key, value in calls()[name].items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(TypeError, match="move all of them to one device"):
                results(name, calls()[name] | {key: value.to("meta")})


@pytest.mark.parametrize(
    "plan, hidden, error, message",
    (
        (("gemm", 1), 5, ValueError, "chains, plan gemm: unknown"),
        (("block", 0), 5, ValueError, "chains, plan block: blocks is 0"),
        (("block", 2), 5, ValueError, "chains, plan block: blocks is 2"),
        (("cluster", 17), 5, ValueError, "chains, plan cluster: blocks is 17"),
        (("block", 1), 400, RuntimeError, "chains, plan block: 400 rows .* do not fit .* use more blocks"),
        (("cluster", 2), 700, RuntimeError, "chains, plan cluster: 350 rows .* do not fit"),
    ),
    ids=str,
)
def test_plans_that_do_not_serve(plan, hidden, error, message):
    with pytest.raises(error, match=message):
        run(cuda.chains, *chain_arguments(hidden, 2, F32), *plan)


@SOME_PLANS
@pytest.mark.parametrize("layers, rtol", ((1, 0.0), (2, 1e-3)))
@DTYPES
def test_path_chain_equals_the_cpu_kernels(layers, rtol, plan, dtype):
    """All kernels, in the order in which a GPU runs them. Those of κ⁽²⁾ are Triton's, whatever the plan: once."""
    hidden, seq_len, factor = 20, 30, 4.0 if plan[0] == "block" else 0.0
    lists = [
        [torch.randn(hidden, hidden if i else 3, dtype=dtype) / hidden**0.5 for i in range(layers)],
        [torch.randn(hidden, hidden, dtype=dtype) / hidden**0.5 for _ in range(layers)],
        *([torch.randn(hidden, dtype=dtype) for _ in range(layers)] for _ in range(2)),
    ]
    ends = torch.randn(2, hidden, dtype=dtype), torch.randn(2, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    call = (*lists, *ends, seq_len, False, False, True, factor, rtol, (), 1 << 24)
    found = ops.PathChain._make(gpu.path_chain(cuda, Plan(*plan, 0.0), *call))
    wide = [[t.double() for t in tensors] for tensors in lists], [t.double() for t in ends]
    wanted = ops.path_chain(*wide[0], *wide[1], seq_len, False, False, second_factor=factor)
    assert found.arithmetic == 0 and (found.bounds <= rtol).all()
    tolerance = rtol + tolerances.path(dtype, layers * seq_len, hidden)
    torch.testing.assert_close(found.log_path_norm, wanted.log_path_norm, rtol=0, atol=tolerance)
    for one, other in zip(oracles.parts(found), oracles.parts(wanted), strict=True):
        logs = [mantissa.log() + exponent.double() * math.log(2) for mantissa, exponent in (one, other)]
        torch.testing.assert_close(*logs, rtol=0, atol=tolerance)


def test_launches(monkeypatch):
    launches.check_pass(cuda, monkeypatch, build.launches)
