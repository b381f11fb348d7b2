"""κ⁽²⁾ from few lags, and κ⁽¹⁾ from few steps: what is left out never exceeds the certified bound."""

import copy
import functools
import itertools
import math

import oracles
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import fill_
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import PathNetwork, ReLURNN, reference

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
NAME = "rnn.weight_hh_l0"


def blocks(n):
    """1 where row and column belong to the same half, or the row to the second."""
    half = (torch.arange(n) >= n // 2).double()
    return (half[:, None] == half).double(), (half[:, None] >= half).double()


def spiked(x):
    x = x / len(x) ** 0.5
    x.flatten()[x.argmax()] = 100
    return x


#: Recurrent matrices of spectral radius about 1, by family, from x ~ N(0, 1) [n, n].
FAMILIES = {
    "gaussian": lambda x: x / len(x) ** 0.5,
    "uniform": lambda x: torch.erf(x / 2**0.5) * (3 / len(x)) ** 0.5,
    "orthogonal": lambda x: torch.linalg.qr(x)[0],
    "sparse": lambda x: x * (x.abs() > 1) / len(x) ** 0.5,
    "block-diagonal": lambda x: x * blocks(len(x))[0] / len(x) ** 0.5,
    "nilpotent": lambda x: x.triu(1),
    "nilpotent, transposed": lambda x: x.tril(-1),
    "permutation": lambda x: torch.eye(len(x)).double()[x[0].argsort()],
    "almost a cycle": lambda x: torch.roll(torch.eye(len(x)).double(), 1, 0) + 0.05 * x,
    "near-identity": lambda x: torch.eye(len(x)) + 0.02 * x,
    "identity": lambda x: torch.eye(len(x)).double(),
    "diagonal": lambda x: torch.diag(x[0]),
    "triangular": lambda x: x.tril(-1) + torch.diag(0.3 ** torch.arange(len(x)).double()),
    "triangular, transposed": lambda x: x.triu(1) + torch.diag(0.3 ** torch.arange(len(x)).double()),
    "zero row": lambda x: x * (x[0] != x[0, 0])[:, None] / len(x) ** 0.5,
    "zero": torch.zeros_like,
    "reducible": lambda x: x * blocks(len(x))[1] / len(x) ** 0.5,
    "reducible, transposed": lambda x: x * blocks(len(x))[1].T / len(x) ** 0.5,
    "spiked": spiked,
    "almost of rank one": lambda x: (1 + 0.03 * x) / len(x) ** 0.5,
    "far from normal": lambda x: x * torch.logspace(-2, 2, len(x))[:, None] * torch.logspace(2, -2, len(x)) / 10,
    "two parts": lambda x: x * ((torch.arange(len(x))[:, None] + torch.arange(len(x))) % 2 + 0.03) / len(x) ** 0.5,
}


def network(matrices, bias=True, head=True, outputs="all", h0="zeros", gaps=False, seed=0):
    """A float64 network with these recurrent matrices and Gaussian weights elsewhere; ``gaps`` zeroes half its ends."""
    size = len(matrices[0])
    rnn = ReLURNN(2, size, len(matrices), bias, dtype=F64)
    net = fill_(PathNetwork(rnn, nn.Linear(size, 3, dtype=F64) if head else None, None, outputs, h0), seed)
    with torch.no_grad():
        for i, matrix in enumerate(matrices):
            getattr(rnn, f"weight_hh_l{i}").copy_(matrix)
        if gaps:
            rnn.weight_ih_l0[: (size + 1) // 2] = 0
            for p in (rnn.bias_ih_l0, rnn.bias_hh_l0) if bias else ():
                p.zero_()
            if head:
                net.head.weight[:, : size // 2] = 0
    return net


@st.composite
def cases(draw, max_size=12, max_seq_len=40):
    """(float64 network, seq_len, rtol)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    size, num_layers = draw(st.integers(1, max_size)), draw(st.integers(1, 2))
    matrices = []
    for _ in range(num_layers):
        x = torch.randn(size, size, generator=generator, dtype=F64)
        matrices.append(FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))](x) * draw(st.floats(0.3, 2)))
    flags = {flag: draw(st.booleans()) for flag in ("bias", "head", "gaps")}
    outputs, h0 = draw(st.sampled_from(("all", "last"))), draw(st.sampled_from(("zeros", "ones")))
    net = network(matrices, outputs=outputs, h0=h0, seed=draw(st.integers(0, 2**31 - 1)), **flags)
    return net, draw(st.integers(1, max_seq_len)), 10 ** -draw(st.floats(2, 7))


def doubles(net):
    return {name: p.detach().double() for name, p in net.named_parameters()}


def exact(net, seq_len):
    """κ⁽¹⁾ + κ⁽²⁾ of the recurrent matrices by all lags in float64: (the sum, κ⁽²⁾)."""
    p = doubles(net)
    first = reference.kappa1(p, seq_len, net.outputs, net.h0)
    second, _, _ = reference.kappa2_certified(p, seq_len, net.outputs, net.h0, rtol=0)
    return {name: first[name] + term for name, term in second.items()}, second


def rounding(net, seq_len, dtype):
    """Of a result in ``dtype`` and an oracle in float64, on top of what is left out."""
    length, size = seq_len + net.num_layers, max(net.hidden_size, 3)
    return tolerances.path(dtype, length, size) + tolerances.path(F64, length, size)


def values(k, name):
    """κ of one parameter in float64, whatever its scale."""
    factor, exponent = k.factors[name].double(), round(k.log_scales[name] / math.log(2))
    for part in (exponent // 2, exponent - exponent // 2):
        factor = torch.ldexp(factor, torch.tensor(part))
    return factor


def check_lags(lags, bound, net, seq_len, rtol):
    assert sorted(lags) == [f"rnn.weight_hh_l{i}" for i in range(net.num_layers)]
    for n in lags.values():
        assert n == 0 if seq_len == 1 else 1 <= n <= seq_len - 1
    assert 0 <= bound <= rtol
    if all(n == max(seq_len - 1, 0) for n in lags.values()):
        assert bound == 0


def check_all_lags(lags, bound, net, seq_len):
    """Every lag whose power of W̃ has an entry."""
    assert bound == 0
    for name, n in lags.items():
        edges = net.get_parameter(name).detach() != 0
        power, needed = torch.eye(len(edges)), 0
        while needed < seq_len - 1 and power.any():
            power, needed = ((power @ edges.float()) > 0).float(), needed + 1
        assert needed <= n <= seq_len - 1, name


def check_kernel(k, net, seq_len, rtol):
    """Lags, bound and every entry of κ that the dtype can hold beside its tensor's largest."""
    dtype = net.rnn.weight_hh_l0.dtype
    check_lags(k.lags, k.bound, net, seq_len, rtol)
    tolerance = k.bound + rounding(net, seq_len, dtype)
    for name, true in exact(net, seq_len)[0].items():
        assert true.isfinite().all()
        found = values(k, name)
        # Scales are powers of two, with headroom above the largest entry.
        least = 16 * true.max() * torch.finfo(dtype).tiny
        held = true >= least
        error = (found - true).abs()
        assert (error[held] <= tolerance * true[held]).all(), f"{name}: {(error / true)[held].nan_to_num().max():.3g}"
        # What is out of range may be lost, but not grow.
        assert (found[~held] <= (1 + tolerance) * least).all(), name


# The certificates, in float64.


@given(cases(max_size=6, max_seq_len=12))
def test_all_lags_of_the_certified_reference_are_the_definition(case):
    net, seq_len, _ = case
    p = doubles(net)
    for convention in reference.KAPPA2_FACTOR:
        expected = reference.kappa2(p, seq_len, net.outputs, net.h0, convention)
        terms, lags, bound = reference.kappa2_certified(p, seq_len, net.outputs, net.h0, convention, rtol=0)
        check_all_lags(lags, bound, net, seq_len)
        for name, term in expected.items():
            torch.testing.assert_close(terms[name], term, rtol=rounding(net, seq_len, F64), atol=0)


def check_reference(net, seq_len, rtol, convention="exact"):
    first = reference.kappa1(doubles(net), seq_len, net.outputs, net.h0)
    terms, lags, bound = reference.kappa2_certified(doubles(net), seq_len, net.outputs, net.h0, convention, rtol)
    check_lags(lags, bound, net, seq_len, rtol)
    factor = reference.KAPPA2_FACTOR[convention] / reference.KAPPA2_FACTOR["exact"]
    for name, second in exact(net, seq_len)[1].items():
        true = first[name] + factor * second
        assert true.isfinite().all()
        error = (terms[name] - factor * second).abs()
        assert (error <= (bound + rounding(net, seq_len, F64)) * true).all(), f"{name}: {(error / true).max():.3g}"
    return lags, bound


@pytest.mark.slow
@settings(max_examples=400)
@given(cases(), st.sampled_from(sorted(reference.KAPPA2_FACTOR)))
def test_reference_is_within_its_bound(case, convention):
    check_reference(*case, convention)


@settings(max_examples=200)
@given(cases(max_size=4, max_seq_len=12), st.floats(0, 1.5))
def test_reference_is_within_a_loose_bound(case, exponent):
    """Where hardly anything is summed explicitly, the certificates' own constants are on trial."""
    net, seq_len, _ = case
    check_reference(net, seq_len, 10**-exponent)


@settings(max_examples=800)
@given(
    st.lists(st.floats(-1.5, 0), min_size=4, max_size=4),
    st.lists(st.sampled_from((-1.0, 0.0, 1.0)), min_size=4, max_size=4),
    st.booleans(),
    st.floats(0.7, 1.1),
    st.integers(4, 12),
    st.floats(0, 3),
)
def test_reference_of_two_units(matrix, ends, driven, gain, seq_len, exponent):
    """There, Cauchy-Schwarz is an equality; without a drive, and with one output, all lags weigh alike."""
    weights = 10 ** torch.tensor(matrix + ends, dtype=F64)
    matrix = weights[:4].reshape(2, 2)
    net = network([gain * matrix / torch.linalg.matrix_norm(matrix, 2)], bias=False, outputs="last", h0="ones")
    with torch.no_grad():
        net.rnn.weight_ih_l0.copy_(driven * weights[4:6, None].expand(2, 2))
        net.head.weight.copy_(weights[6:].expand(3, 2))
    check_reference(net, seq_len, 10**-exponent)


def fixed(family, size, gain=1.0, num_layers=1, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    matrices = [
        FAMILIES[family](torch.randn(size, size, generator=generator, dtype=F64)) * gain for _ in range(num_layers)
    ]
    return network(matrices, seed=seed, **options)


#: Of the length-300 cases: 100 to the 600th power is out of float64's range, as is (2 · 40)^300.
LONG = [family for family in FAMILIES if family not in ("spiked", "far from normal")]


#: Oracles of long sequences are slow.
ENDS = pytest.mark.parametrize("outputs, h0", (("all", "zeros"), pytest.param("last", "ones", marks=pytest.mark.slow)))


@ENDS
@pytest.mark.parametrize("family", LONG)
def test_reference_of_long_sequences(family, outputs, h0):
    for gain, rtol in ((0.9, 1e-3), (1.1, 1e-6)):
        check_reference(fixed(family, 40, gain, outputs=outputs, h0=h0), 300, rtol)


@pytest.mark.parametrize("family", ("gaussian", "uniform", "orthogonal"))
def test_lags_of_the_reference_do_not_grow_with_length(family):
    net = fixed(family, 100)
    short, long = (reference.kappa2_certified(doubles(net), seq_len) for seq_len in (200, 2000))
    assert long[1][NAME] <= short[1][NAME] <= 10
    assert 0 < long[2] <= 1e-5


@pytest.mark.parametrize("seq_len", (2, 3, 50))
def test_lags_of_the_reference_in_closed_cases(seq_len):
    for family, expected in (("identity", 1), ("diagonal", 1), ("zero", 1), ("nilpotent", 5)):
        lags, bound = check_reference(fixed(family, 5), seq_len, 1e-12)
        assert lags[NAME] <= min(expected, seq_len - 1), family
        assert bound <= 1e-15


def test_bound_covers_inexact_perron_vectors():
    """Almost of rank one: two power steps meet the tolerance, and what they leave outweighs the deviation of W̃ⁿ."""
    generator = torch.Generator().manual_seed(0)
    for size, spread in itertools.product((3, 4, 8), (3e-4, 1e-3, 3e-3, 1e-2)):
        matrix = (1 + spread * torch.randn(size, size, generator=generator, dtype=F64)) / size**0.5
        for rtol in (1e-3, 1e-5):
            check_reference(network([matrix]), 150, rtol)


# The kernels.


@DTYPES
@settings(max_examples=200)
@given(case=cases())
def test_kernels_are_within_their_bound(case, dtype):
    net, seq_len, rtol = case
    net.to(dtype)
    check_kernel(pk.kappa(net, seq_len, second_term=True, rtol=rtol), net, seq_len, rtol)
    everything = pk.kappa(net, seq_len, second_term=True, rtol=0)
    check_all_lags(everything.lags, everything.bound, net, seq_len)
    check_kernel(everything, net, seq_len, 0)


@pytest.mark.slow
@DTYPES
@settings(max_examples=200)
@given(case=cases(), exponent=st.floats(0, 2))
def test_kernels_are_within_a_loose_bound(case, exponent, dtype):
    """The bound is relative to the true κ: half of an enclosure may be more than what is true."""
    net, seq_len, _ = case
    net.to(dtype)
    check_kernel(pk.kappa(net, seq_len, second_term=True, rtol=10**-exponent), net, seq_len, 10**-exponent)


@DTYPES
@ENDS
@pytest.mark.parametrize("size", (3, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 40))))
@pytest.mark.parametrize("family", LONG)
def test_kernels_of_long_sequences(family, size, outputs, h0, dtype):
    """An enclosure that overflows certifies nothing, and must leave no trace in the sum that goes on."""
    for gain, seq_len, rtol in ((0.5, 300, 1e-5), (0.9, 300, 1e-3), (1.1, 300, 1e-5), (0.8, 80, 1e-1)):
        net = fixed(family, size, gain, outputs=outputs, h0=h0, seed=size).to(dtype)
        check_kernel(pk.kappa(net, seq_len, second_term=True, rtol=rtol), net, seq_len, rtol)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("size, num_layers", ((1, 1), (2, 3), (15, 1), (16, 2), (17, 1), (33, 2), (64, 1), (130, 1)))
def test_kernels_of_odd_sizes(size, num_layers, dtype, threads):
    for family, seq_len in itertools.product(("gaussian", "near-identity"), (2, 3, 5, 60)):
        net = fixed(family, size, num_layers=num_layers, outputs="last").to(dtype)
        check_kernel(pk.kappa(net, seq_len, second_term=True, rtol=1e-4), net, seq_len, 1e-4)


@DTYPES
@pytest.mark.parametrize(
    "family", ("spiked", "far from normal", "gaussian", "near-identity", "nilpotent", "permutation")
)
def test_kernels_where_float64_overflows(family, dtype):
    net, seq_len, rtol = fixed(family, 6, gain=100, outputs="last").to(dtype), 130, 1e-4
    k = pk.kappa(net, seq_len, second_term=True, rtol=rtol)
    check_lags(k.lags, k.bound, net, seq_len, rtol)
    true = oracles.log_kappa(net, seq_len, second_term=True).log_kappa[NAME]
    assert family in ("nilpotent", "permutation") or true.max() > math.log(torch.finfo(F64).max)
    found = k.factors[NAME].double().log() + k.log_scales[NAME]
    held = true >= true.max() + math.log(16 * torch.finfo(dtype).tiny)
    tolerance = k.bound + rounding(net, seq_len, dtype) + logarithms(true[held], seq_len)
    assert held.any() and (found - true)[held].abs().max() <= tolerance


def logarithms(log_kappa, seq_len):
    """Absolute error of a logarithm from ``oracles``: each of its steps rounds a number of the result's size."""
    return 2 * tolerances.unit_roundoff(F64) * (seq_len + 3) * max(1.0, log_kappa.abs().max().item())


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("family", ("gaussian", "uniform", "orthogonal"))
def test_lags_of_the_kernels_do_not_grow_with_length(family, dtype):
    net = fixed(family, 100).to(dtype)
    short, long = (pk.kappa(net, seq_len, second_term=True) for seq_len in (200, 2000))
    assert long.lags[NAME] <= short.lags[NAME] <= 16
    assert 0 < long.bound <= 1e-5
    check_kernel(long, net, 2000, 1e-5)


@DTYPES
@pytest.mark.parametrize("size", (1, 7, 100))
def test_one_lag_of_the_identity(size, dtype):
    net = fixed("identity", size).to(dtype)
    k = pk.kappa(net, 300, second_term=True)
    assert k.lags == {NAME: 1}
    check_kernel(k, net, 300, 1e-5)


@DTYPES
def test_lags_and_bound_without_second_term(dtype):
    k = pk.kappa(fixed("gaussian", 5, num_layers=2).to(dtype), 20)
    assert set(k.lags.values()) == {0} and k.bound == 0


# lags= and workspace_bytes=.


@DTYPES
@pytest.mark.parametrize("family", ("gaussian", "identity", "near-identity", "reducible"))
def test_warm_start(family, dtype):
    net = fixed(family, 20, num_layers=2).to(dtype)
    for rtol in (1e-3, 1e-5):
        cold = pk.kappa(net, 100, second_term=True, rtol=rtol)
        warm = pk.kappa(net, 100, second_term=True, rtol=rtol, lags=cold.lags)
        assert all(warm.lags[name] >= n for name, n in cold.lags.items())
        check_kernel(warm, net, 100, rtol)


@DTYPES
@pytest.mark.parametrize("n", (1, 99, 10**6))
def test_warm_start_from_elsewhere(n, dtype):
    """Lags of another matrix, or another length, are a hint, not a claim."""
    net = fixed("near-identity", 9, num_layers=2).to(dtype)
    hint = dict.fromkeys((NAME, "rnn.weight_hh_l1"), n)
    for seq_len in (1, 2, 100):
        check_kernel(pk.kappa(net, seq_len, second_term=True, lags=hint), net, seq_len, 1e-5)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("family", ("gaussian", "near-identity"))
def test_workspaces_agree(family, dtype, threads):
    net = fixed(family, 33, outputs="last", h0="ones").to(dtype)
    for rtol in (0, 1e-5):
        for budget in (0, 1, 33 * 48 * 8, 7 * 33 * 48 * 8, 1 << 30):
            k = pk.kappa(net, 90, second_term=True, rtol=rtol, workspace_bytes=budget)
            check_kernel(k, net, 90, rtol)


@pytest.mark.parametrize("value", (-1, 2**70, 1.5, "many", True, math.nan))
def test_bad_workspace_bytes(value):
    with pytest.raises((TypeError, ValueError), match=f"workspace_bytes is {value!r}"):
        pk.kappa(fixed("gaussian", 3), 4, second_term=True, workspace_bytes=value)


@pytest.mark.parametrize(
    "value",
    (
        3,
        "many",
        [3],
        {NAME: -1},
        {NAME: 2.5},
        {NAME: "3"},
        {NAME: None},
        {NAME: math.nan},
        {"weight_hh_l0": 3},
        {"head.weight": 3},
        {0: 3},
    ),
    ids=repr,
)
def test_bad_lags(value):
    with pytest.raises((TypeError, ValueError), match=r"^lags.* (is|has) "):
        pk.kappa(fixed("gaussian", 3), 4, second_term=True, lags=value)


# κ⁽¹⁾ ends its chains early, too.


@functools.cache
@functools.cache
def long_chain(size, gain, seq_len, outputs):
    """A network whose weights float32 holds, and the oracle's answer."""
    net = fixed("gaussian", size, gain, outputs=outputs).float().double()
    return net, oracles.log_kappa(net, seq_len)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("seq_len", (70, 500, 2000))
@pytest.mark.parametrize("size", (5, 40, 100))
@pytest.mark.parametrize("gain", (0.5, 1.0, 1.5))
def test_early_end_of_the_chains(gain, size, seq_len, outputs, dtype):
    net, expected = long_chain(size, gain, seq_len, outputs)
    net = copy.deepcopy(net).to(dtype)
    found, rtol = pk.kappa(net, seq_len), rounding(net, seq_len, dtype)
    norm = expected.log_path_norm
    assert abs(found.log_path_norm - norm) <= rtol + logarithms(norm, seq_len)
    for name, true in expected.log_kappa.items():
        error = (found.factors[name].double().log() + found.log_scales[name] - true).abs().max().item()
        assert error <= rtol + logarithms(true, seq_len), f"{name}: {error:.3g}"


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("outputs", ("all", "last"))
def test_early_end_of_a_matrix_that_no_cache_holds(outputs, dtype):
    net = fixed("gaussian", 1030, outputs=outputs).to(dtype)
    found, expected = pk.kappa(net, 12), reference.kappa1(doubles(net), 12, outputs)
    for name, true in expected.items():
        torch.testing.assert_close(
            values(found, name).expand_as(true),
            true,
            rtol=rounding(net, 12, dtype),
            atol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )
