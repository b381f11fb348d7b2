"""κ, γ² and log γ² through the public API, against the oracles."""

import itertools
import math

import oracles
import pytest
import tolerances
import torch
from hypothesis import given
from oracles import check_logarithms
from strategies import fill_, networks
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import PathNetwork, ReLURNN, reference
from pathrnn_kernels.rescale import node_rescale_

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
OPTIONS = list(
    itertools.product((1, 2, 3), (False, True), (None, False, True), (False, True), ("all", "last"), ("zeros", "ones"))
)


def make(
    hidden_size=3,
    num_layers=1,
    bias=True,
    head=True,
    embedding=False,
    outputs="all",
    h0="zeros",
    dtype=F64,
    input_size=2,
):
    rnn = ReLURNN(input_size, hidden_size, num_layers, bias, dtype=dtype)
    net = PathNetwork(
        rnn,
        None if head is None else nn.Linear(hidden_size, 4, bias=head, dtype=dtype),
        nn.Embedding(5, input_size, dtype=dtype) if embedding else None,
        outputs,
        h0,
    )
    return fill_(net, seed=0)


def doubles(net):
    return {name: p.detach().double() for name, p in net.named_parameters()}


def check_kappa(found, expected, rtol):
    factors = found.factors
    assert factors.keys() == expected.keys()
    for name, value in expected.items():
        assert factors[name].isfinite().all()
        torch.testing.assert_close(
            found.dense(name).double(), value, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# Against the definition.


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
def test_every_option_and_short_length(options):
    num_layers, bias, head, embedding, outputs, h0 = options
    for seq_len, dtype in itertools.product(range(1, 10), (F64, F32)):
        net = make(3, num_layers, bias, head, embedding, outputs, h0, dtype)
        p, rtol = doubles(net), tolerances.definition(dtype, seq_len)
        first = reference.kappa1(p, seq_len, outputs, h0)
        second = reference.kappa2(p, seq_len, outputs, h0)
        check_kappa(pk.kappa(net, seq_len), first, rtol)
        for convention, part in (("exact", 1), ("lemma1", 0.5), ("theorem3", 0.25)):
            expected = {name: k + part * second.get(name, 0) for name, k in first.items()}
            check_kappa(pk.kappa(net, seq_len, second_term=True, kappa2=convention), expected, rtol)
        gamma2 = reference.path_norm(p, seq_len, outputs, h0)
        assert abs(pk.path_norm(net, seq_len).item() / gamma2 - 1) <= rtol
        assert abs(pk.log_path_norm(net, seq_len).item() - gamma2.log()) <= rtol


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("hidden_size", (1, 2, 5, 16, 17, 33, 64, 100, 130))
@pytest.mark.parametrize("seq_len, num_layers", ((1, 1), (2, 2), (13, 3), (50, 1)))
def test_sizes(hidden_size, seq_len, num_layers, dtype, threads):
    embedding, outputs = num_layers == 2, "last" if num_layers == 3 else "all"
    net = make(hidden_size, num_layers, True, True, embedding, outputs, "ones", dtype, input_size=hidden_size // 2 + 1)
    p, rtol = doubles(net), tolerances.path(dtype, seq_len + num_layers, hidden_size)
    check_kappa(pk.kappa(net, seq_len), reference.kappa1(p, seq_len, outputs, "ones"), rtol)
    if threads == 2 or hidden_size in (1, 33):
        expected = reference.kappa(p, seq_len, outputs, "ones", second_term=True)
        check_kappa(pk.kappa(net, seq_len, second_term=True, rtol=0), expected, rtol)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("hidden_size, num_layers", ((512, 1), (513, 1), (530, 2)))
def test_sizes_that_no_cache_holds(hidden_size, num_layers, dtype, threads):
    seq_len = 12
    net = make(hidden_size, num_layers, outputs="last", dtype=dtype, input_size=3)
    rtol = tolerances.path(dtype, seq_len + num_layers, hidden_size)
    expected = reference.kappa1(doubles(net), seq_len, "last")
    check_kappa(pk.kappa(net, seq_len), expected, rtol)
    gamma2 = reference.path_norm(doubles(net), seq_len, "last")
    assert abs(pk.log_path_norm(net, seq_len).item() - gamma2.log()) <= rtol + 2 * tolerances.unit_roundoff(
        dtype
    ) * abs(gamma2.log())


@pytest.mark.slow
@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("seq_len, outputs", ((9, "all"), (60, "all"), (60, "last")))
def test_second_term_of_a_matrix_that_no_cache_holds(seq_len, outputs, dtype, threads):
    """With 60 steps both chains end in closed form, and the lags' sums with them."""
    net = make(513, outputs=outputs, dtype=dtype)
    expected, rtol = (
        reference.kappa(doubles(net), seq_len, outputs, second_term=True),
        tolerances.path(dtype, seq_len, 513),
    )
    if threads == 1:
        check_kappa(pk.kappa(net, seq_len, second_term=True, rtol=0), expected, rtol)
    found = pk.kappa(net, seq_len, second_term=True)
    check_kappa(found, expected, rtol + found.bound)
    if seq_len == 60:
        assert found.lags["rnn.weight_hh_l0"] <= 8


@pytest.mark.every_isa
@pytest.mark.parametrize("input_size, vocabulary, outputs", ((1, 1, 1), (37, 300, 129), (200, 7, 1), (3, 70, 65)))
@DTYPES
def test_widths_of_the_ends(input_size, vocabulary, outputs, dtype, threads):
    net = PathNetwork(
        ReLURNN(input_size, 19, dtype=dtype),
        nn.Linear(19, outputs, dtype=dtype),
        nn.Embedding(vocabulary, input_size, dtype=dtype),
    )
    rtol = tolerances.path(dtype, 6, max(19, input_size, vocabulary, outputs))
    check_kappa(pk.kappa(net, 6), reference.kappa1(doubles(net), 6), rtol)


@given(networks(rnns=("ReLURNN", "RNN")))
def test_any_network(case):
    net, seq_len = case
    p = doubles(net)
    expected = reference.kappa(p, seq_len, net.outputs, net.h0, second_term=True)
    found = pk.kappa(net, seq_len, second_term=True)
    check_kappa(found, expected, tolerances.DEFINITION)
    gamma2 = reference.path_norm(p, seq_len, net.outputs, net.h0)
    for name, kappa in expected.items():
        ratio = torch.where(kappa > 0, gamma2 / kappa, 0.0)
        relative = found.relative(name)
        assert relative.shape == found.factors[name].shape
        torch.testing.assert_close(relative.expand_as(ratio), ratio, rtol=1e-9, atol=0)


@DTYPES
def test_strided_and_expanded_parameters(dtype):
    net = make(5, 2, embedding=True, dtype=dtype)
    expected = pk.kappa(net, 6, second_term=True)
    with torch.no_grad():
        for p in net.parameters():
            apart = torch.full((*[2 * n for n in reversed(p.shape)],), math.nan, dtype=dtype)
            view = apart[tuple(slice(1, None, 2) for _ in p.shape)]
            view = view.T if p.dim() == 2 else view
            view.copy_(p)
            p.set_(view)
            assert p.numel() == 1 or not p.is_contiguous()
    found = pk.kappa(net, 6, second_term=True)
    assert all(torch.equal(found.factors[name], expected.factors[name]) for name in expected.factors)

    with torch.no_grad():
        net.rnn.weight_hh_l0.set_(torch.full((1, 1), 0.3, dtype=dtype).expand(5, 5))
        net.rnn.bias_hh_l1.set_(torch.full((1,), 0.2, dtype=dtype).expand(5))
    rtol = tolerances.definition(dtype, 6)
    check_kappa(pk.kappa(net, 6), reference.kappa1(doubles(net), 6), rtol)


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("hidden_size", (7, 100, 520))
def test_repeated_runs_are_bit_identical(hidden_size, dtype, threads):
    net = make(hidden_size, 2 if hidden_size < 500 else 1, dtype=dtype)
    runs = [pk.kappa(net, 20, second_term=hidden_size < 500) for _ in range(3)]
    for run in runs[1:]:
        assert run.log_scales == runs[0].log_scales
        assert torch.equal(run.log_path_norm, runs[0].log_path_norm)
        assert all(torch.equal(run.factors[name], factor) for name, factor in runs[0].factors.items())


# No overflow, no underflow.


def with_hh(weight, head=True, outputs="all", h0="zeros", num_layers=1, dtype=F32):
    net = make(len(weight), num_layers, True, head, outputs=outputs, h0=h0, dtype=dtype)
    with torch.no_grad():
        for i in range(num_layers):
            getattr(net.rnn, f"weight_hh_l{i}").copy_(weight)
    return net


@pytest.mark.every_isa
@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("gain", (pytest.param(3.0, marks=pytest.mark.slow), 1.0, 0.05))
def test_long_gaussian(gain, outputs):
    torch.manual_seed(0)
    net = with_hh(torch.randn(100, 100) * gain / 10, outputs=outputs)
    found, expected = check_logarithms(net, 2000)
    if gain == 3:
        assert expected.log_path_norm > 4000 and torch.isinf(pk.path_norm(net, 2000))
    assert all((found.factors[name] > 0).all() for name in found.factors)


@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("matrix", ("upper", "lower", "shift"))
@pytest.mark.parametrize("dtype, seq_len", ((F32, 300), pytest.param(F32, 2000, marks=pytest.mark.slow), (F64, 300)))
def test_transient_growth(matrix, outputs, dtype, seq_len):
    """The spectral radius of these is 1 or 0, yet they grow for H steps: entries of one h_t are 1e60 and more apart."""
    ones = torch.ones(100, 100)
    weight = {"upper": ones.triu(), "lower": ones.tril(), "shift": torch.diag(torch.full((99,), 2.0), 1)}[matrix]
    check_logarithms(with_hh(weight, outputs=outputs, dtype=dtype), seq_len)


def cyclic(n, value):
    return torch.roll(torch.eye(n), 1, 0) * value


MATRICES = {
    "triangular": lambda n: torch.triu(torch.ones(n, n)),
    "triangular, large steps": lambda n: torch.triu(torch.full((n, n), 30.0), 1) + 0.5 * torch.eye(n),
    "triangular, decaying diagonal": lambda n: torch.triu(torch.ones(n, n), 1) * 5 + 0.01 * torch.eye(n),
    "nilpotent": lambda n: torch.diag(torch.ones(n - 1), 1),
    "nilpotent, growing": lambda n: torch.diag(torch.full((n - 1,), 1e6), 1),
    "nilpotent, vanishing": lambda n: torch.diag(torch.full((n - 1,), 1e-6), 1),
    "zero": lambda n: torch.zeros(n, n),
    "identity": torch.eye,
    "twice the identity": lambda n: 2 * torch.eye(n),
    "half the identity": lambda n: 0.5 * torch.eye(n),
    "diagonal of many sizes": lambda n: torch.diag(torch.logspace(-3, 3, n)),
    "permutation": lambda n: cyclic(n, 1.0),
    "growing permutation": lambda n: cyclic(n, 4.0),
    "one entry": lambda n: torch.nn.functional.pad(torch.ones(1, 1), (2, n - 3, 1, n - 2)),
    "ones": lambda n: torch.ones(n, n),
}


@pytest.mark.parametrize("num_layers", (1, 2))
@pytest.mark.parametrize("h0, outputs", (("zeros", "all"), ("zeros", "last"), ("ones", "all"), ("ones", "last")))
@pytest.mark.parametrize("matrix", MATRICES)
def test_extreme_matrices(matrix, h0, outputs, num_layers):
    for seq_len in (1, 2, 12, 200):
        check_logarithms(with_hh(MATRICES[matrix](12), h0=h0, outputs=outputs, num_layers=num_layers), seq_len)


@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("matrix", MATRICES)
def test_second_term_of_extreme_matrices(matrix, outputs):
    for seq_len in (1, 2, 3, 40):
        check_logarithms(with_hh(MATRICES[matrix](9), h0="ones", outputs=outputs), seq_len, second_term=True)


@pytest.mark.every_isa
@pytest.mark.parametrize("gain", (3.0, 1.0, 0.05))
def test_second_term_of_a_longer_gaussian(gain):
    torch.manual_seed(0)
    net = with_hh(torch.randn(20, 20) * gain / 20**0.5, outputs="last")
    found, _ = check_logarithms(net, 120, second_term=True)
    assert (found.factors["rnn.weight_hh_l0"] > 0).all()


@pytest.mark.parametrize("hidden_size", (6, 520))
@pytest.mark.parametrize("size", (1e15, 1e-15, 1e18, 1e-18))
@pytest.mark.parametrize(
    "which", ("all", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "head.weight", "head.bias")
)
def test_extreme_weights(which, size, hidden_size):
    net = make(hidden_size, dtype=F32)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if which in ("all", name):
                p.mul_(size)
    check_logarithms(net, 30 if hidden_size < 100 else 4)


@pytest.mark.parametrize("size", (1e15, 1e-15))
def test_extreme_weights_in_every_place(size):
    for second_term in (False, True):
        net = make(4, 3, embedding=True, dtype=F32)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(size)
        check_logarithms(net, 12, second_term)


def test_extreme_weights_in_float64():
    for size in (1e150, 1e-150):
        net = make(5, 2, dtype=F64)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(size)
        check_logarithms(net, 25, second_term=True, rtol=1e-9, truncation=0)


def test_subnormal_weights_are_weights():
    net = make(3, bias=False, head=False, dtype=F32)
    with torch.no_grad():
        net.head.weight.fill_(1e-40)
    check_logarithms(net, 3)


def test_largest_and_smallest_weights_of_the_dtype():
    for dtype in (F32, F64):
        for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny):
            net = make(3, dtype=dtype)
            with torch.no_grad():
                for p in net.parameters():
                    p.fill_(value)
            check_logarithms(net, 5, second_term=True)


@pytest.mark.parametrize("num_layers", (1, 3))
def test_node_rescaled_networks(num_layers):
    torch.manual_seed(0)
    net = make(10, num_layers, dtype=F32)
    before = pk.kappa(net, 60, second_term=True)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    node_rescale_(net, [10 ** torch.empty(10).uniform_(-3, 3) for _ in range(num_layers)])
    after, _ = check_logarithms(net, 60, second_term=True)
    assert abs(after.log_path_norm - before.log_path_norm) <= tolerances.LOG_DOMAIN
    for name, p in net.named_parameters():
        # κ w² is invariant.
        ratio = before.relative(name).expand_as(p) / after.relative(name) * (p / weights[name]).square()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=tolerances.LOG_DOMAIN, atol=0)


def test_a_path_between_weights_of_very_different_size():
    # A node rescaling by 1e±20 of a network whose γ² is 2: all weights are float32 numbers.
    net = make(2, bias=False, head=False, dtype=F32, input_size=1)
    with torch.no_grad():
        net.rnn.weight_hh_l0.zero_()
        net.rnn.weight_ih_l0.copy_(torch.tensor([[1e15], [1e-15]]))
        net.head.weight.zero_()
        net.head.weight[0] = torch.tensor([1e-15, 1e15])
    assert abs(pk.log_path_norm(net, 1).item() - math.log(2)) <= 1e-5


@pytest.mark.parametrize("head", (None, False, True))
@pytest.mark.parametrize("embedding", (False, True))
@DTYPES
def test_a_network_of_zeros(dtype, embedding, head):
    net = make(4, 2, True, head, embedding, h0="ones", dtype=dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    found, _ = check_logarithms(net, 5, second_term=True)
    assert found.log_path_norm == -math.inf
    for name in found.factors:
        assert (found.relative(name) == 0).all(), name
    assert pk.path_norm(net, 5) == 0


def test_zero_parts():
    for zeroed in (name for name, _ in make(3, 2, embedding=True).named_parameters()):
        net = make(3, 2, embedding=True, dtype=F32)
        with torch.no_grad():
            net.get_parameter(zeroed).zero_()
        found, _ = check_logarithms(net, 7, second_term=True)
        for name in found.factors:
            assert found.relative(name).isfinite().all()


def test_relative_where_neither_number_fits():
    torch.manual_seed(0)
    net = with_hh(torch.randn(20, 20) * 0.7)
    found, expected = pk.kappa(net, 500), oracles.log_kappa(net, 500)
    assert expected.log_path_norm > 500
    for name in found.factors:
        # Beside head.bias, whose κ is T, γ² is far beyond float32: the quotient is float64.
        ratio = (expected.log_path_norm - expected.log_kappa[name]).exp()
        assert ratio.float().isinf().all() == (name == "head.bias")
        torch.testing.assert_close(found.relative(name).expand_as(ratio), ratio, rtol=tolerances.LOG_DOMAIN, atol=0)


def test_dense_overflows_to_infinity_only_there():
    torch.manual_seed(0)
    net = with_hh(torch.randn(20, 20) * 0.7)
    k = pk.kappa(net, 500)
    assert k.dense("rnn.weight_hh_l0").isinf().all()
    assert torch.equal(k.dense("head.bias"), torch.full((4,), 500.0))


@pytest.mark.every_isa
@DTYPES
@pytest.mark.parametrize("hidden_size, seq_len", ((3, 9), (20, 37), (33, 64), (70, 30)))
def test_workspace_budgets_agree(hidden_size, seq_len, dtype, threads):
    # Spectral radius of W̃ about 1: the last powers count as much as the first.
    net = make(hidden_size, dtype=dtype, h0="ones")
    expected = reference.kappa(doubles(net), seq_len, h0="ones", second_term=True)
    matrix = (hidden_size * (hidden_size + 15)) * dtype.itemsize
    for budget in (0, 1, 4 * matrix, 7 * matrix, 13 * matrix, 1 << 30):
        found = pk.kappa(net, seq_len, second_term=True, rtol=0, workspace_bytes=budget)
        check_kappa(found, expected, tolerances.path(dtype, seq_len, hidden_size))


# Derivatives.


@given(networks(max_layers=2, max_size=3, max_seq_len=4))
def test_gradcheck(case):
    net, seq_len = case
    values = [p.detach().clone().requires_grad_() for p in net.parameters()]

    def run(function):
        def inner(*tensors):
            holder = PathNetwork(net.rnn, net.head, net.embedding, net.outputs, net.h0)
            named = dict(zip((name for name, _ in holder.named_parameters()), tensors, strict=True))
            for name, value in named.items():
                module, _, leaf = name.rpartition(".")
                owner = holder.get_submodule(module)
                owner._parameters[leaf] = value
            return function(holder, seq_len)

        return inner

    saved = list(net.parameters())
    try:
        for function in (pk.path_norm, pk.log_path_norm):
            assert torch.autograd.gradcheck(run(function), values, atol=1e-4)
    finally:
        for (name, _), p in zip(list(net.named_parameters()), saved, strict=True):
            module, _, leaf = name.rpartition(".")
            net.get_submodule(module)._parameters[leaf] = p


@DTYPES
def test_gradients_are_the_references(dtype):
    net = make(6, 2, embedding=True, outputs="last", dtype=dtype)
    p = {name: value.requires_grad_() for name, value in doubles(net).items()}
    gamma2 = reference.path_norm(p, 8, "last")
    rtol = tolerances.definition(dtype, 8)
    for value, function in ((gamma2, pk.path_norm), (gamma2.log(), pk.log_path_norm)):
        expected = torch.autograd.grad(3 * value, list(p.values()), retain_graph=True)
        net.zero_grad()
        (3 * function(net, 8)).backward()
        for (name, q), gradient in zip(net.named_parameters(), expected, strict=True):
            torch.testing.assert_close(q.grad.double(), gradient, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_of_the_logarithm_where_gamma_overflows():
    torch.manual_seed(0)
    net = with_hh(torch.randn(20, 20) * 0.7)
    pk.log_path_norm(net, 500).backward()
    expected = oracles.log_kappa(net, 500)
    for name, p in net.named_parameters():
        gradient = 2 * p.detach().double() * (expected.log_kappa[name] - expected.log_path_norm).exp()
        torch.testing.assert_close(p.grad.double(), gradient, rtol=tolerances.LOG_DOMAIN, atol=1e-37)


def test_gradient_where_gamma_overflows():
    torch.manual_seed(0)
    net = with_hh(torch.randn(20, 20) * 0.7)
    pk.path_norm(net, 500).backward()
    for name, p in net.named_parameters():
        if name != "head.bias":  # whose gradient, 2 b T, is small
            assert p.grad.isinf().all() and (p.grad.sign() == p.sign()).all(), name
    torch.testing.assert_close(net.head.bias.grad, 2 * 500 * net.head.bias.detach())


def test_frozen_parameters_get_no_gradient():
    net = make()
    net.rnn.weight_hh_l0.requires_grad_(False)
    pk.path_norm(net, 3).backward()
    assert net.rnn.weight_hh_l0.grad is None
    assert all(p.grad is not None for name, p in net.named_parameters() if name != "rnn.weight_hh_l0")
    with torch.no_grad():
        assert not pk.path_norm(net, 3).requires_grad


def test_second_derivatives_raise():
    net = make()
    for function in (pk.path_norm, pk.log_path_norm):
        gradients = torch.autograd.grad(function(net, 3), list(net.parameters()), create_graph=True)
        # A term that has a derivative beside them: theirs must not count as zero without a word.
        penalty = sum(g.square().sum() for g in gradients) + net.head.weight.square().sum()
        with pytest.raises(RuntimeError):
            penalty.backward()


def test_kappa_is_not_part_of_the_graph():
    k = pk.kappa(make(), 3, second_term=True)
    assert not k.log_path_norm.requires_grad
    assert not any(factor.requires_grad for factor in k.factors.values())


# Contract.


def test_factors_are_broadcastable_and_not_expanded():
    k = pk.kappa(make(3, 2, embedding=False), 4)
    shapes = {name: tuple(factor.shape) for name, factor in k.factors.items()}
    assert shapes["rnn.weight_ih_l0"] == (3, 1)
    assert shapes["rnn.weight_ih_l1"] == (3, 3)
    assert shapes["head.weight"] == (1, 3)
    embedded = pk.kappa(make(3, embedding=True), 4)
    assert embedded.factors["rnn.weight_ih_l0"].shape == (3, 2)
    assert embedded.factors["embedding.weight"].shape == (1, 2)
    net = make(3, 2, embedding=True)
    k = pk.kappa(net, 4)
    assert list(k.factors) == [name for name, _ in net.named_parameters()]
    for name, p in net.named_parameters():
        assert k.dense(name).shape == p.shape
        assert torch.broadcast_shapes(k.factors[name].shape, p.shape) == p.shape


def test_lags_scales_and_bound():
    net = make(3, 2)
    k = pk.kappa(net, 7, second_term=True)
    assert k.lags == {"rnn.weight_hh_l0": 6, "rnn.weight_hh_l1": 6}
    assert pk.kappa(net, 7).lags == {"rnn.weight_hh_l0": 0, "rnn.weight_hh_l1": 0}
    assert k.bound == 0
    for scale in k.log_scales.values():
        assert math.isclose(scale / math.log(2), round(scale / math.log(2)), abs_tol=1e-9)
    assert k.log_scales["head.bias"] == 0


@DTYPES
def test_backends_agree(dtype):
    net = make(4, 2, embedding=True, dtype=dtype)
    expected = pk.kappa(net, 6, second_term=True, backend="reference")
    found = pk.kappa(net, 6, second_term=True, backend="cpu")
    rtol = tolerances.definition(dtype, 6)
    for name in expected.factors:
        torch.testing.assert_close(found.dense(name), expected.dense(name), rtol=rtol, atol=0)
    torch.testing.assert_close(found.log_path_norm, expected.log_path_norm, rtol=rtol, atol=rtol)
    for function in (pk.path_norm, pk.log_path_norm):
        torch.testing.assert_close(
            function(net, 6, backend="cpu"), function(net, 6, backend="reference"), rtol=rtol, atol=rtol
        )


# Bad input.


@pytest.mark.parametrize("function", (pk.kappa, pk.path_norm, pk.log_path_norm))
@pytest.mark.parametrize(
    "seq_len, error, message",
    (
        (0, ValueError, "seq_len is 0; .*at least 1"),
        (-3, ValueError, "seq_len is -3"),
        (2.0, TypeError, "seq_len is 2.0"),
        (True, TypeError, "seq_len is True"),
        (None, TypeError, "seq_len is None"),
        ("5", TypeError, "seq_len is '5'"),
    ),
)
def test_bad_seq_len(function, seq_len, error, message):
    with pytest.raises(error, match=message):
        function(make(), seq_len)


@pytest.mark.parametrize("seq_len", (2**40, 2**60, 2**62, 2**63 - 1, 2**64))
@pytest.mark.parametrize("function", (pk.kappa, pk.path_norm))
def test_a_length_that_no_memory_holds(function, seq_len):
    with pytest.raises((ValueError, TypeError, RuntimeError, MemoryError, OverflowError)):
        function(make(), seq_len)


@pytest.mark.parametrize("function", (pk.kappa, pk.path_norm, pk.log_path_norm))
@pytest.mark.parametrize("net", (None, ReLURNN(2, 3), nn.Linear(2, 3)), ids=("None", "ReLURNN", "Linear"))
def test_not_a_network(function, net):
    with pytest.raises(TypeError, match=f"net is a {type(net).__name__}; it must be a PathNetwork"):
        function(net, 3)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("hidden_size", (3, 40, 513))
def test_weights_that_are_not_finite(hidden_size, value):
    names = [name for name, _ in make(1, 2, embedding=True).named_parameters()]
    for name in names if hidden_size < 500 else ("rnn.weight_hh_l1", "head.weight"):
        for function in (pk.kappa, pk.path_norm, pk.log_path_norm):
            net = make(hidden_size, 2, embedding=True, dtype=F32)
            with torch.no_grad():
                net.get_parameter(name).flatten()[-1] = value
            with pytest.raises(ValueError, match=name.removeprefix("rnn.") + " has a nan or infinite entry"):
                function(net, 3)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"kappa2": "Exact"}, "kappa2 is 'Exact'; use one of 'exact', 'lemma1', 'theorem3'"),
        ({"kappa2": None}, "kappa2 is None"),
        ({"rtol": -1e-3}, "rtol is -0.001"),
        ({"rtol": math.nan}, "rtol is nan"),
        ({"rtol": math.inf}, "rtol is inf"),
        ({"rtol": "small"}, "rtol is 'small'"),
        ({"backend": "gpu"}, "backend is 'gpu'; use one of 'auto', 'cpu'"),
        ({"backend": "cuda"}, "backend 'cuda' does not serve"),
    ),
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pk.kappa(make(), 3, **options)


def test_an_unhashable_option():
    with pytest.raises((ValueError, TypeError), match="kappa2"):
        pk.kappa(make(), 3, kappa2=["exact"])


def test_unknown_names():
    k = pk.kappa(make(), 3)
    for function in (k.relative, k.dense):
        with pytest.raises(
            ValueError, match=r"'weight_hh_l0' is not a parameter of the network; it has rnn.weight_ih_l0"
        ):
            function("weight_hh_l0")


def test_networks_that_changed_after_construction():
    net = make()
    net.head.double().float()
    with pytest.raises(TypeError, match=r"head\.weight (is torch\.float32|has dtype Float).*weight_.h_l0"):
        pk.kappa(net, 3)
    with pytest.raises(ValueError, match="'cpu' does not serve this call: the tensors are on meta"):
        pk.kappa(make().to("meta"), 3, backend="cpu")
    net = make()
    net.head.weight = nn.Parameter(torch.ones(4, 5, dtype=F64))
    with pytest.raises(ValueError, match=r"head.weight has shape \[4, 5\]; it must be \[4, 3\]"):
        pk.kappa(net, 3)
    net = make()
    net.rnn.weight_hh_l0 = nn.Parameter(torch.ones(3, 5, dtype=F64))
    with pytest.raises(ValueError, match=r"weight_hh_l0 has shape \[3, 5\]"):
        pk.kappa(net, 3)


def test_powers_that_underflow_are_formed_in_float64():
    torch.manual_seed(0)
    net = with_hh(0.9 * torch.eye(6) + 0.3 * torch.randn(6, 6))
    pk.rescale.node_rescale_(net, [torch.tensor([3e-7, 1, 1, 1, 1, 1])])
    check_logarithms(net, 30, second_term=True)


@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize("seq_len", (20, 100, 1000))
def test_growth_that_reaches_no_output(seq_len, dtype):
    net = with_hh(torch.diag(torch.tensor([10.0, 0.5])), outputs="last", dtype=dtype)
    with torch.no_grad():
        net.head.weight[:, 0] = 0
        net.head.bias.zero_()
    found, expected = pk.log_path_norm(net, seq_len), oracles.log_kappa(net, seq_len, False).log_path_norm
    assert abs(found.item() - expected) <= tolerances.LOG_DOMAIN


def test_a_layer_that_passes_nothing_on():
    """The layer below grows beyond the dtype; what the layer above holds of h_0 is all there is."""
    net = with_hh(0.5 * torch.eye(3), outputs="last", h0="ones", num_layers=2, dtype=F64)
    with torch.no_grad():
        net.rnn.weight_hh_l0.fill_(3)
        for p in (net.rnn.weight_ih_l1, net.rnn.bias_ih_l1, net.rnn.bias_hh_l1, net.head.bias):
            p.zero_()
    per_step = [pk.log_path_norm(net, seq_len).item() / seq_len for seq_len in (100, 300)]
    # h_T = 0.25^T in the upper layer.
    head = net.head.weight.square().sum().log().item()
    assert all(
        abs(rate - (-2 * math.log(2) + head / seq_len)) < 1e-12
        for rate, seq_len in zip(per_step, (100, 300), strict=True)
    )


def test_zero_weights_have_no_gradient_however_large_kappa():
    net = with_hh(torch.tensor([[9.0, 0, 0], [9, 9, 9], [9, 9, 9]]))
    pk.path_norm(net, 100).backward()
    assert (net.rnn.weight_hh_l0.grad[0, 1:] == 0).all() and not net.rnn.weight_hh_l0.grad.isnan().any()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_inference_mode_and_nan_weights(backend):
    net = with_hh(torch.eye(3))
    expected = pk.kappa(net, 4).log_path_norm
    with torch.inference_mode():
        assert abs(pk.kappa(net, 4, backend=backend).log_path_norm - expected) < 1e-5
    with torch.no_grad():
        net.rnn.weight_hh_l0[0, 0] = math.nan
    for call in (pk.kappa, pk.path_norm):
        with pytest.raises(ValueError, match="weight_hh_l0 has a nan or infinite entry"):
            call(net, 4, backend=backend)


@pytest.mark.parametrize("value", ("a", None, 1.0))
def test_second_term_is_a_bool(value):
    with pytest.raises(TypeError, match="second_term is"):
        pk.kappa(with_hh(torch.eye(3)), 4, second_term=value)


def test_absurd_seq_len_is_refused():
    with pytest.raises(ValueError, match="seq_len is 1000000000000"):
        pk.kappa(with_hh(torch.eye(3)), 10**12)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_autocast_does_not_reach_kappa(backend):
    net = pk.PathNetwork(pk.ReLURNN(3, 8), torch.nn.Linear(8, 2))
    with torch.autocast("cpu"):
        found = pk.kappa(net, 5, second_term=True, backend=backend)
        norm = pk.path_norm(net, 5, backend=backend)
    wanted = pk.kappa(net, 5, second_term=True, backend=backend)
    assert torch.equal(norm, pk.path_norm(net, 5, backend=backend))
    assert all(torch.equal(found.factors[name], factor) for name, factor in wanted.factors.items())
