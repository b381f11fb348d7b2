"""The second term of the path_chain operator, κ⁽²⁾ = f · W̃ ⊙ S; test_certificate.py tests what it leaves out."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathrnn_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
#: So much that κ⁽²⁾ outweighs κ⁽¹⁾ in κ: a comparison of κ is one of κ⁽²⁾.
FACTOR = 1e4
#: Two layers of this size are work for a team of threads, and odd.
TEAM = 61

#: Recurrent matrices from x ~ N(0, 1), of spectral radius about 1, with powers that float32 can hold.
MATRICES = {
    "gaussian": lambda x: x / len(x) ** 0.5,
    "near-identity": lambda x: torch.eye(len(x), dtype=x.dtype) + 0.05 * x,
    "diagonal": lambda x: torch.diag(x[0].sign() * (x[0] / 4).exp()),
    "nilpotent": lambda x: x.triu(1) / len(x) ** 0.5,
    "reducible": lambda x: x.triu(1) / len(x) ** 0.5 + torch.diag((x[0] / 8).exp()),
    "permutation": lambda x: torch.eye(len(x), dtype=x.dtype)[x[0].argsort()],
}


def network(hidden_size=5, num_layers=1, dtype=F64, matrix="gaussian", seed=0):
    """Named weights, as ``reference`` takes them."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    parameters = {}
    for i in range(num_layers):
        width = hidden_size if i else 3
        parameters[f"rnn.weight_ih_l{i}"] = tensor(hidden_size, width) / width**0.5
        parameters[f"rnn.weight_hh_l{i}"] = MATRICES[matrix](tensor(hidden_size, hidden_size))
        parameters[f"rnn.bias_ih_l{i}"] = tensor(hidden_size)
        parameters[f"rnn.bias_hh_l{i}"] = tensor(hidden_size)
    parameters["head.weight"] = tensor(2, hidden_size) / hidden_size**0.5
    return {name: p.to(dtype) for name, p in parameters.items()}


def arguments(parameters, seq_len, outputs="all", h0="zeros", **flags):
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    call = {kind: [p for name, p in parameters.items() if name.startswith(f"rnn.{kind}_l")] for kind in kinds}
    for name in ("head.weight", "head.bias", "embedding.weight"):
        call[name.replace(".", "_")] = parameters.get(name)
    call |= {"seq_len": seq_len, "last_only": outputs == "last", "ones_h0": h0 == "ones"}
    return call | {"second_factor": FACTOR, "workspace_bytes": 0} | flags


def recurrent(chain, num_layers=1, per_layer=3):
    """κ of every weight_hh in float64."""
    return oracles.values(chain)[1 : per_layer * num_layers : per_layer]


def expected(parameters, seq_len, outputs="all", h0="zeros", factor=FACTOR):
    """κ⁽¹⁾ + f · W̃ ⊙ S of every weight_hh, by definition."""
    doubles = {name: p.detach().double() for name, p in parameters.items()}
    first = reference.kappa1(doubles, seq_len, outputs, h0)
    second = reference.kappa2(doubles, seq_len, outputs, h0, convention="theorem3")
    return [first[name] + factor * term for name, term in second.items()]


def check(parameters, seq_len, outputs="all", h0="zeros", rtol=0.0, truths=None, **flags):
    """Every entry against the definition, and the counts that come with it."""
    if truths is None:
        truths = expected(parameters, seq_len, outputs, h0, flags.get("second_factor", FACTOR))
    chain = ops.path_chain(**arguments(parameters, seq_len, outputs, h0, rtol=rtol, **flags))
    dtype, hidden_size = parameters["rnn.weight_hh_l0"].dtype, len(truths[0])
    rounding = tolerances.path(dtype, seq_len + len(truths), hidden_size)
    assert chain.arithmetic == 0
    assert chain.lags.shape == chain.bounds.shape == (len(truths),)
    assert ((chain.lags >= min(1, seq_len - 1)) & (chain.lags <= seq_len - 1)).all()
    assert ((chain.bounds >= 0) & (chain.bounds <= rtol)).all()
    for found, truth, bound in zip(recurrent(chain, len(truths)), truths, chain.bounds.tolist(), strict=True):
        torch.testing.assert_close(found, truth, rtol=rounding + bound, atol=0)
    return chain


def equal(one, other):
    flat = [(*c.kappa, *c.entry_exponents, *c[1:3], *c[4:]) for c in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


# Values.


@pytest.mark.every_isa
@pytest.mark.parametrize("hidden_size", range(1, 18))
def test_small_sizes(hidden_size):
    """All lags, so many steps, units and layers that every remainder of a vector and of a panel comes up."""
    for seq_len in range(1, 18):
        outputs, h0 = (("all", "zeros"), ("last", "ones"), ("all", "ones"))[seq_len % 3]
        parameters = network(hidden_size, 1 + seq_len % 2, seed=seq_len)
        chain = check(parameters, seq_len, outputs, h0)
        assert chain.lags.eq(seq_len - 1).all() and chain.bounds.eq(0).all()
        check(parameters, seq_len, outputs, h0, rtol=1e-2)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("matrix", MATRICES)
def test_matrices(matrix, dtype):
    for hidden_size, seq_len, rtol in itertools.product((1, 7, 17), (2, 3, 17), (0.0, 1e-3)):
        check(network(hidden_size, dtype=dtype, matrix=matrix), seq_len, rtol=rtol)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("matrix", ("gaussian", "near-identity", "reducible"))
@pytest.mark.parametrize("outputs, h0", (("all", "zeros"), ("last", "ones")))
def test_teams(outputs, h0, matrix, dtype, threads):
    """Rows that the threads share unevenly."""
    parameters = network(TEAM, 2, dtype, matrix)
    for seq_len, rtol in ((2, 0.0), (17, 0.0), (17, 1e-3)):
        check(parameters, seq_len, outputs, h0, rtol)


@pytest.mark.parametrize("factor", (1e-6, 1.0, 2.0, 4.0, 1e6))
def test_factors(factor):
    check(network(num_layers=2), 9, second_factor=factor)


def test_without_a_factor_there_is_no_second_term():
    call = arguments(network(), 9)
    without = ops.path_chain(**call | {"second_factor": 0.0, "rtol": 0.5, "first_lags": (3,)})
    assert equal(without, ops.path_chain(**call | {"second_factor": 0.0}))
    assert without.lags.tolist() == [0] and without.bounds.tolist() == [0]
    (found,), (truth,) = recurrent(without), expected(network(), 9, factor=0)
    torch.testing.assert_close(found, truth, rtol=tolerances.path(F64, 10, 5), atol=0)


@pytest.mark.every_isa
@pytest.mark.parametrize("rtol", (0.0, 1e-3))
@DTYPES
def test_the_other_factors_have_none(dtype, rtol):
    call = arguments(network(17, 2, dtype), 17, rtol=rtol)
    first, both = ops.path_chain(**call | {"second_factor": 0.0}), ops.path_chain(**call)
    assert torch.equal(first.log_path_norm, both.log_path_norm)
    for place, (one, other) in enumerate(zip(first.kappa, both.kappa, strict=True)):
        same = torch.equal(one, other) and first.exponents[place] == both.exponents[place]
        assert same != (place in (1, 4))


# Chunks of powers.


def check_chunks(hidden_size, matrix, rtol, dtype):
    """39 lags: from chunks of four powers of W̃ to all of them at once."""
    seq_len, found = 40, []
    parameters = network(hidden_size, dtype=dtype, matrix=matrix)
    truths = expected(parameters, seq_len)
    row = parameters["rnn.weight_hh_l0"].element_size() * -(-hidden_size // 16) * 16
    for powers in (0, 9, 10, 37, 38, 39, 1 << 20):
        chain = check(parameters, seq_len, rtol=rtol, truths=truths, workspace_bytes=powers * hidden_size * row)
        assert rtol > 0 or chain.lags.tolist() == [seq_len - 1]
        found.append((recurrent(chain)[0], chain.bounds.item()))
    # Closer than to the definition: only W̃ⁿ differs, by the roundings of products of size H.
    rounding = tolerances.path(dtype, seq_len + 1, hidden_size)
    for (one, bound), (other, other_bound) in itertools.combinations(found, 2):
        torch.testing.assert_close(one, other, rtol=rounding + 2 * (bound + other_bound), atol=0)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("rtol", (0.0, 1e-4))
@pytest.mark.parametrize("matrix", ("gaussian", "near-identity"))
@pytest.mark.parametrize("hidden_size", (1, 5, 17))
def test_chunks(hidden_size, matrix, rtol, dtype):
    check_chunks(hidden_size, matrix, rtol, dtype)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("rtol", (0.0, 1e-4))
def test_chunks_of_a_team(rtol, dtype, threads):
    check_chunks(TEAM, "near-identity", rtol, dtype)


@pytest.mark.every_isa
@DTYPES
def test_nilpotent_in_the_middle_of_a_chunk(dtype):
    """W̃ⁿ is zero from n = H on: before the first chunk of powers ends, with it, and after."""
    for hidden_size in (2, 3, 4, 5, 6, 8, 9, 11):
        parameters = network(hidden_size, dtype=dtype, matrix="nilpotent")
        for budget in (0, 1 << 30):
            chain = check(parameters, 40, workspace_bytes=budget)
            assert hidden_size <= chain.lags.item() < 40 and chain.bounds.item() == 0


def test_the_budget_by_default():
    call = arguments(network(17), 40) | {"workspace_bytes": None}
    assert equal(ops.path_chain(**call), ops.path_chain(**call | {"workspace_bytes": 16 << 20}))


# first_lags.


@pytest.mark.parametrize("dtype, seq_len", ((F32, 150), (F64, 700)), ids=str)
def test_nothing_that_one_chain_left_out_counts_for_the_next(dtype, seq_len):
    """Powers of the first fade, chunk after chunk; those of the second end, and lose nothing."""
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(8, 8, generator=generator, dtype=F64) + 0.1) * torch.block_diag(
        torch.ones(4, 4), torch.ones(4, 4)
    )
    fades = blocks / blocks.square().sum(1, keepdim=True).sqrt() * torch.tensor([[1.0]] * 4 + [[0.5]] * 4)
    parameters = network(8, 2, dtype)
    for p in parameters.values():
        p.fill_(0.5)
    parameters["rnn.weight_hh_l0"].copy_(fades)
    parameters["rnn.weight_hh_l1"].copy_(torch.triu(torch.rand(8, 8, generator=generator, dtype=F64) + 0.1, 1))
    assert ops.path_chain(**arguments(parameters, seq_len, rtol=0.0, workspace_bytes=0)).arithmetic == 0


@DTYPES
@pytest.mark.parametrize("matrix", ("gaussian", "near-identity", "reducible"))
@pytest.mark.parametrize("workspace_bytes", (0, 1 << 30))
def test_first_lags(workspace_bytes, matrix, dtype):
    """No fewer are summed; all the rest is as without."""
    seq_len, rtol = 40, 1e-3
    parameters = network(17, 2, dtype, matrix)
    truths = expected(parameters, seq_len)

    def lags(*first_lags):
        options = {"truths": truths, "workspace_bytes": workspace_bytes, "first_lags": first_lags}
        return check(parameters, seq_len, rtol=rtol, **options).lags

    cold = lags()
    assert (cold < seq_len - 1).all() == (matrix == "gaussian")
    for same in ((0, 0), (1, 1), cold.tolist()):
        assert torch.equal(lags(*same), cold), same
    for hint in (*range(2, 20), 31, 32, 33, seq_len - 2, seq_len - 1, seq_len, 2**31, 2**63 - 1):
        for first_lags in ((hint, 0), (0, hint)):
            found, least = lags(*first_lags), torch.tensor(first_lags).clamp(max=seq_len - 1)
            assert (found >= least).all(), f"{first_lags}: {found.tolist()}"
            untouched = first_lags.index(0)
            assert found[untouched] == cold[untouched], f"{first_lags}: {found.tolist()} for {cold.tolist()}"
            # A hint can hit a number that works, but is not tried without; where each is tried, it cannot.
            assert (found >= cold.clamp(max=8)).all(), f"{first_lags}: {found.tolist()} for {cold.tolist()}"


def test_first_lags_where_all_are_summed():
    parameters = network(num_layers=2)
    for first_lags in ((3, 2**40), (0, 19), (18, 1)):
        assert check(parameters, 20, first_lags=first_lags).lags.tolist() == [19, 19]


# Memory, in and out.


@pytest.mark.every_isa
@DTYPES
def test_strided_inputs(dtype):
    parameters = network(7, 2, dtype)

    def apart(p):
        """The same numbers, transposed in memory and with nan in between."""
        view = torch.full([2 * n for n in reversed(p.shape)], math.nan, dtype=dtype)[(slice(1, None, 2),) * p.dim()]
        view = view.T if p.dim() == 2 else view
        return view.copy_(p)

    for rtol in (0.0, 1e-3):
        dense = ops.path_chain(**arguments(parameters, 17, rtol=rtol))
        strided = {name: apart(p) for name, p in parameters.items()}
        assert not any(p.is_contiguous() for p in strided.values())
        assert equal(dense, ops.path_chain(**arguments(strided, 17, rtol=rtol)))
    parameters["rnn.weight_hh_l0"] = torch.full((1, 1), 0.3, dtype=dtype).expand(7, 7)
    check(parameters, 17)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("rtol", (0.0, 1e-4))
@pytest.mark.parametrize("hidden_size", (1, 17, TEAM))
def test_repeated_runs_are_bit_identical(hidden_size, rtol, dtype, threads):
    """Whatever other calls have left in the memory that is kept between them."""
    call = arguments(network(hidden_size, 2, dtype), 40, rtol=rtol)
    first = ops.path_chain(**call)
    for matrix, size, seq_len, scale in (
        ("gaussian", 70, 50, 30.0),
        ("nilpotent", 3, 9, 1.0),
        ("diagonal", 20, 9, 9.0),
    ):
        other = {name: scale * p for name, p in network(size, 1, dtype, matrix).items()}
        ops.path_chain(**arguments(other, seq_len, rtol=rtol, workspace_bytes=1 << 22))
        assert equal(first, ops.path_chain(**call))


def test_inputs_are_left_alone():
    parameters = network(17, 2)
    copies = {name: p.clone() for name, p in parameters.items()}
    for rtol in (0.0, 1e-2):
        ops.path_chain(**arguments(parameters, 17, rtol=rtol))
        assert all(torch.equal(p, copies[name]) for name, p in parameters.items())


def test_results_are_constants():
    parameters = {name: p.requires_grad_() for name, p in network().items()}
    chain = ops.path_chain(**arguments(parameters, 9))
    assert not any(t.requires_grad for t in (*chain.kappa, *chain.entry_exponents, *chain[1:3], *chain[4:]))


@pytest.mark.parametrize("rtol", (0.0, 1e-3))
def test_opcheck(rtol):
    call = arguments(network(num_layers=2), 40, rtol=rtol, first_lags=(0, 3))
    order = [*itertools.islice(call, 10), "kappa1", "second_factor", "rtol", "first_lags", "workspace_bytes"]
    torch.library.opcheck(torch.ops.pathrnn.path_chain, tuple({"kappa1": True, **call}[name] for name in order))


MEMORY = """
import sys
import torch
from pathrnn_kernels import ops

seq_len, hidden_size, budget = map(int, sys.argv[1:])

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

def path_chain(seq_len, first_lags, weight_ih, weight_hh):
    return ops.path_chain([weight_ih], [weight_hh], [], [], None, None, None, seq_len, False, False, True, 4.0, 1e-5,
                          (first_lags,), budget)

def arguments(size):
    noise = torch.randn(size, size, dtype=torch.float64)
    return torch.ones(size, 1, dtype=torch.float64), torch.eye(size) + 0.05 * noise

path_chain(4, 0, *arguments(3))  # what any first call takes
tensors = arguments(hidden_size)
before = status("VmRSS")
chain = path_chain(seq_len, 40, *tensors)
print(chain.lags.item(), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """What path_chain documents, and that the budget is what it spends."""
    seq_len, hidden_size, matrix = 400, 512, 8 * 512**2
    peaks = {}
    for budget, powers in ((0, 8), (64 << 20, 32)):
        command = [sys.executable, "-c", MEMORY, *map(str, (seq_len, hidden_size, budget))]
        # Elsewhere than in the source tree, whose package may not be built.
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        lags, peaks[budget] = map(int, run.stdout.split())
        # All cached powers are needed, and the filtered sequence.
        assert 40 <= lags < seq_len - 1
        documented = 8 * (2 + 3 + 1) * seq_len * hidden_size + (6 + powers) * matrix
        # 2 MiB: vectors of H and of T numbers, the ends of pages, what Python needs for a call.
        assert powers * matrix < peaks[budget] <= documented + (2 << 20), f"{peaks[budget]} of {documented}"
    assert abs(peaks[64 << 20] - peaks[0] - 24 * matrix) <= 2 << 20


# Wrong arguments.


BAD = {
    "second_factor": ((-1.0, -1e-300, 2e6, math.nan, math.inf, -math.inf), "it must be a number between 0 and 1e6"),
    "rtol": ((-1e-9, 1.0000001, math.nan, math.inf, -math.inf), "it must be a number between 0 and 1"),
    "workspace_bytes": ((-2, -(2**63)), "it must be at least 0"),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, (values, _) in BAD.items() for value in values])
def test_bad_numbers(name, value):
    with pytest.raises(
        ValueError,
        match=f"^{name} is {re.escape(format(value, 'g' if isinstance(value, float) else 'd'))}; {BAD[name][1]}",
    ):
        ops.path_chain(**arguments(network(), 9) | {name: value})


def test_second_factor_needs_kappa1():
    with pytest.raises(ValueError, match="^second_factor is 4 without kappa1; ask for both"):
        ops.path_chain(**arguments(network(), 9, second_factor=4.0, kappa1=False))


@pytest.mark.parametrize("first_lags", ((1,), (1, 2, 3)))
def test_wrong_number_of_first_lags(first_lags):
    with pytest.raises(ValueError, match=f"^first_lags has {len(first_lags)} numbers for 2 layers; give one a layer"):
        ops.path_chain(**arguments(network(num_layers=2), 9, first_lags=first_lags))


@pytest.mark.parametrize("first_lags", ((-1, 2), (2, -(2**63))))
def test_negative_first_lags(first_lags):
    with pytest.raises(ValueError, match=f"^first_lags has {min(first_lags)}; its numbers must be at least 0"):
        ops.path_chain(**arguments(network(num_layers=2), 9, first_lags=first_lags))


@pytest.mark.parametrize(
    "name, value",
    (
        ("workspace_bytes", 2**63),
        ("workspace_bytes", 1.5),
        ("workspace_bytes", "many"),
        ("first_lags", (2**63,)),
        ("first_lags", (1.5,)),
        ("first_lags", None),
        ("rtol", "small"),
        ("rtol", None),
        ("second_factor", None),
    ),
)
def test_wrong_types_and_numbers_that_do_not_fit(name, value):
    """These are torch's own errors."""
    with pytest.raises(RuntimeError, match=f"for argument '{name}'"):
        ops.path_chain(**arguments(network(), 9) | {name: value})


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_weights_that_are_not_finite(value):
    for layer in (0, 1):
        parameters = network(num_layers=2)
        parameters[f"rnn.weight_hh_l{layer}"][3, 1] = value
        with pytest.raises(ValueError, match=f"^rnn.weight_hh_l{layer} has a nan or infinite entry"):
            ops.path_chain(**arguments(parameters, 9))


shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
tensors = st.builds(torch.ones, shapes, dtype=st.sampled_from((F32, F64, torch.int64, torch.int32)))
sizes = st.integers(1, 6)


@st.composite
def fitting(draw):
    """Shapes that go together, now and then one that does not."""
    hidden_size, dtype = draw(sizes), draw(st.sampled_from((F32, F64)))
    call = {
        "weight_ih": [torch.full((hidden_size, draw(sizes)), 0.5, dtype=dtype)],
        "weight_hh": [torch.full((hidden_size, hidden_size), 0.75, dtype=dtype)],
        "bias_ih": [torch.full((hidden_size,), 0.25, dtype=dtype)],
        "bias_hh": [torch.full((hidden_size,), 0.5, dtype=dtype)],
        "head_weight": draw(st.sampled_from((None, torch.ones(3, hidden_size, dtype=dtype)))),
    }
    name, change = draw(st.sampled_from((*call, None, None))), draw(tensors)
    return call | ({} if name is None else {name: change if name == "head_weight" else [change]})


@settings(max_examples=400)
@given(
    fitting(),
    st.fixed_dictionaries(
        {"seq_len": st.integers(-1, 20)},
        optional={
            "second_factor": st.sampled_from((0.0, 1.0, 4.0, -1.0, math.nan)),
            "rtol": st.one_of(st.floats(0, 1), st.sampled_from((-1.0, 2.0, math.nan))),
            "first_lags": st.lists(st.integers(-1, 30), max_size=2),
            "workspace_bytes": st.integers(-1, 1 << 13),
            "kappa1": st.booleans(),
        },
    ),
)
def test_fuzz(weights, options):
    call = arguments(network(), 9) | weights | options
    try:
        chain = ops.path_chain(**call)
    except (ValueError, TypeError):
        return
    # What it accepts must be right.
    assert call["seq_len"] >= 1 and call["second_factor"] >= 0 and 0 <= call.get("rtol", 0) <= 1
    if not call.get("kappa1", True):
        assert call["second_factor"] == 0 and chain.kappa == []
        return
    parameters = {f"rnn.{kind}_l0": call[kind][0] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    if call["head_weight"] is not None:
        parameters["head.weight"] = call["head_weight"]
    (found,), (truth,) = recurrent(chain), expected(parameters, call["seq_len"], factor=call["second_factor"])
    dtype = parameters["rnn.weight_hh_l0"].dtype
    assert chain.kappa[1].dtype == dtype and chain.arithmetic == 0
    rtol = chain.bounds.item() + tolerances.path(dtype, call["seq_len"] + 1, 6)
    torch.testing.assert_close(found, truth, rtol=rtol, atol=0)
