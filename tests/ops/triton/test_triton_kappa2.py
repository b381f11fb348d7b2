"""κ⁽²⁾ with its certificates, in Triton: the C++ kernels are the truth.

Beside it run the kernels of gpu_model, for those of Triton, interpreted, take longer than what is looked at here.
"""

import functools

import gpu_model
import pass_cases
import pytest
import tolerances
import torch
from triton_cases import F32, F64, MARKS, dtypes, moved

pytestmark = MARKS

HIDDEN, SEQ_LEN = 16, 24


class Kernels:
    """gpu_model's, on the CPU, with Triton's second term."""

    def __getattr__(self, name):
        return getattr(gpu_model, name)

    def second_term(self, *arguments):
        from pathrnn_kernels.ops.triton.kappa2 import second_term

        given = [*map(moved, arguments)]
        found = second_term(*given)
        for own, on_device in zip(arguments, given, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(on_device)  # what it sets
        return found.cpu()


def run(net, seq_len, rtol, first_lags=(), workspace=1 << 24, factor=4.0):
    return pass_cases.run(Kernels(), net, seq_len, True, factor, rtol, first_lags, workspace)


@functools.cache
def matrices():
    torch.manual_seed(0)
    return pass_cases.matrices(HIDDEN)


def network(name, outputs="all", dtype=F64):
    net = pass_cases.network(HIDDEN, outputs=outputs, dtype=dtype)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(matrices()[name])
    return net


def check(found, net, seq_len, dtype=F64, factor=4.0):
    tolerance = tolerances.path(dtype, seq_len * net.num_layers, net.hidden_size)
    pass_cases.check(found, pass_cases.truth(net, seq_len, factor), found.bounds.max().item() + tolerance, net)


#: Those that a few lags tell everything of.
CERTIFIED = (
    *("gaussian", "uniform", "orthogonal", "identity", "diagonal", "growing", "vanishing", "two blocks"),
    *("a dead row", "a dead column", "nilpotent"),  # of the last P_16 is 0
)


@pytest.mark.parametrize(
    ("dtype", "outputs"), ((F32, "all"), pytest.param(F64, "last", marks=pytest.mark.slow)), ids=str
)
@pytest.mark.parametrize("name", pass_cases.matrices(1))
def test_lags_left_out_cost_no_more_than_the_bound(name, dtype, outputs):
    net, rtol = network(name, outputs, dtype), 2e-6
    found = run(net, SEQ_LEN, rtol)
    bound, lags = found.bounds.item(), found.lags.item()
    assert 0 <= bound <= rtol and lags == (16 if name in CERTIFIED else SEQ_LEN - 1)
    check(found, net, SEQ_LEN, dtype)


@pytest.mark.parametrize("rtol", (1e-3, 1e-12))
def test_a_bound_that_is_too_wide_is_none(rtol):
    net = network("gaussian")
    found = run(net, SEQ_LEN, rtol)
    assert (found.lags.item() == 16) == (rtol == 1e-3) and found.bounds <= rtol
    check(found, net, SEQ_LEN)


@dtypes
@pytest.mark.parametrize("seq_len", (1, 2, 3, 17, 18, 33, 34))
def test_every_number_of_lags(seq_len, dtype):
    """Fewer than are tried, as many, one more, and whole and broken rounds of the others."""
    for rtol in (0.0, 1e-6) if seq_len > 17 else (0.0,):
        net = pass_cases.network(5, dtype=dtype)
        found = run(net, seq_len, rtol)
        assert found.lags.item() == seq_len - 1 or (found.lags.item() == 16 and rtol > 0)
        check(found, net, seq_len, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", (1, 16, 17, 33))
def test_sizes(hidden):
    net = pass_cases.network(hidden, dtype=F32)
    for rtol in (0.0, 1e-4):
        check(run(net, 21, rtol), net, 21, F32)


@pytest.mark.slow
def test_first_lags_are_tried_at_once():
    """As many as a former call needed, if the workspace holds their powers."""
    net = network("orthogonal")
    matrix = 8 * HIDDEN**2
    for first, workspace, wanted in ((1, 1 << 24, 16), (17, 1 << 24, 32), (17, 31 * matrix, 16), (300, 1 << 24, 39)):
        found = run(net, 40, 1e-5, [first], workspace)
        assert found.lags.item() == wanted
        check(found, net, 40)


@pytest.mark.slow
def test_layers_and_directions():
    """Each chain has a certificate of its own."""
    net = pass_cases.network(6, 2, both=True, dtype=F32)
    with torch.no_grad():
        net.rnn.weight_hh_l1.copy_(torch.eye(6) + 0.02 * torch.randn(6, 6))
    found = run(net, 24, 1e-5)
    assert 16 in found.lags.tolist() and 23 in found.lags.tolist()
    check(found, net, 24, F32)


@pytest.mark.slow
@dtypes
def test_growth_beyond_every_dtype(dtype):
    net = network("gaussian", dtype=dtype)
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(1e10)
    wanted = pass_cases.truth(net, SEQ_LEN, 4.0)
    assert wanted.log_path_norm > 1000
    for rtol in (0.0, 1e-6):
        check(run(net, SEQ_LEN, rtol), net, SEQ_LEN, dtype)


def test_dead_units_do_not_keep_others_from_a_certificate():
    net = network("gaussian", dtype=F32)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(net.rnn, name)[2] = 0
    check(run(net, SEQ_LEN, 1e-3), net, SEQ_LEN, F32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_what_is_lost_is_said(seed):
    """Weights over many orders of magnitude: float32 either equals float64 or says that it lost something."""
    net = pass_cases.network(4, outputs="all" if seed % 2 else "last", dtype=F32)
    with torch.no_grad():
        size = 10.0 ** (-torch.rand(4, 4) * (seed + 1))
        net.rnn.weight_hh_l0.copy_(torch.randn(4, 4).sign() * size * (torch.rand(4, 4) < 0.6))
    wanted = pass_cases.truth(net, 24, 4.0)
    for rtol in (0.0, 1e-4):
        found = run(net, 24, rtol)
        if found.arithmetic == 0:
            bound = found.bounds.item() + tolerances.path(F32, 24, 4)
            pass_cases.check(found, wanted, bound, net)


def test_a_power_that_underflows_is_told():
    """From unit 1 to itself 2^-14 as much a step as from 1 to 0 and on."""
    net = pass_cases.network(2, dtype=F32)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0**-7]]))
    assert run(net, 24, 0.0).arithmetic == -1
    check(run(net.double(), 24, 0.0), net, 24)


def test_repeats_are_equal_bit_for_bit():
    net = network("gaussian", dtype=F32)
    one, other = (run(net, 24, 1e-4) for _ in range(2))
    assert all(map(torch.equal, one.kappa, other.kappa)) and torch.equal(one.bounds, other.bounds)


def test_other_factors():
    net = network("gaussian")
    for factor in (1.0, 2.0, 0.1):
        found = run(net, 20, 0.0, factor=factor)
        check(found, net, 20, factor=factor)
