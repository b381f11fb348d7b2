"""The oracle against the definitions: half the Hessian's diagonal, the sum over paths, torch's own RNN."""

import itertools

import pytest
import tolerances
import torch
from hypothesis import given
from strategies import fill_, networks
from torch import nn

from pathrnn_kernels import PathNetwork, ReLURNN, reference

DTYPE = torch.float64
OPTIONS = list(
    itertools.product((1, 2, 3), (False, True), (None, False, True), (False, True), ("all", "last"), ("zeros", "ones"))
)


def parameters(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def make(num_layers, bias, head, embedding, outputs, h0):
    rnn = ReLURNN(2, 2, num_layers, bias, dtype=DTYPE)
    net = PathNetwork(
        rnn,
        None if head is None else nn.Linear(2, 2, bias=head, dtype=DTYPE),
        nn.Embedding(3, 2, dtype=DTYPE) if embedding else None,
        outputs,
        h0,
    )
    return fill_(net, seed=0)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
def test_kappa_is_half_the_hessian_diagonal(options):
    net = make(*options)
    p = parameters(net)
    for seq_len in range(1, 10):
        expected = reference.kappa_hessian(p, seq_len, net.outputs, net.h0)
        found = reference.kappa(p, seq_len, net.outputs, net.h0, second_term=True)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerances.DEFINITION, atol=0)


@given(networks())
def test_kappa_conventions_are_fixed_multiples(case):
    net, seq_len = case
    terms = {c: reference.kappa2(parameters(net), seq_len, net.outputs, net.h0, c) for c in reference.KAPPA2_FACTOR}
    for name, exact in terms["exact"].items():
        assert torch.equal(terms["lemma1"][name], exact / 2)
        assert torch.equal(terms["theorem3"][name], exact / 4)


def test_gamma_is_the_sum_over_paths():
    """Eq. (2), path by path: input unit or bias → hidden units over time → output."""
    net, seq_len = make(1, True, True, False, "all", "zeros"), 3
    p = parameters(net)
    ih, hh, head = (p[name].square() for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"))
    sources = torch.cat([ih, p["rnn.bias_ih_l0"].square()[:, None], p["rnn.bias_hh_l0"].square()[:, None]], 1)
    total = seq_len * p["head.bias"].square().sum()
    for start, end in itertools.combinations_with_replacement(range(seq_len), 2):
        for units in itertools.product(range(2), repeat=end - start + 1):
            for source, output in itertools.product(range(sources.shape[1]), range(2)):
                weight = sources[units[0], source] * head[output, units[-1]]
                for before, after in itertools.pairwise(units):
                    weight = weight * hh[after, before]
                total = total + weight
    torch.testing.assert_close(reference.path_norm(p, seq_len), total, rtol=tolerances.DEFINITION, atol=0)


@given(networks(embeddings=(False,), h0=("zeros",)))
def test_gamma_is_the_squared_network_run_on_ones(case):
    net, seq_len = case
    expected = reference.path_norm(parameters(net), seq_len, net.outputs, net.h0)
    squared = PathNetwork(net.rnn.to_torch(), net.head, outputs=net.outputs)
    with torch.no_grad():
        for p in squared.parameters():
            p.square_()
        found = squared(torch.ones(seq_len, 1, net.rnn.input_size, dtype=DTYPE)).sum()
    torch.testing.assert_close(found, expected, rtol=tolerances.DEFINITION, atol=0)


@given(networks())
def test_kappa1_is_the_derivative_of_gamma_by_squared_weights(case):
    net, seq_len = case
    p = parameters(net)
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    gamma2 = reference.path_norm(leaves, seq_len, net.outputs, net.h0)
    gradients = torch.autograd.grad(gamma2, list(leaves.values()), materialize_grads=True)
    for (name, kappa1), gradient in zip(
        reference.kappa1(p, seq_len, net.outputs, net.h0).items(), gradients, strict=True
    ):
        torch.testing.assert_close(2 * p[name] * kappa1, gradient, rtol=tolerances.DEFINITION, atol=1e-300)


def test_relu_rnn_is_torchs():
    rnn = nn.RNN(3, 4, nonlinearity="relu", dtype=DTYPE)
    x, h_0 = torch.randn(5, 2, 3, dtype=DTYPE), torch.randn(1, 2, 4, dtype=DTYPE)
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    found = reference.relu_rnn(x, h_0[0], rnn.weight_ih_l0, rnn.weight_hh_l0, bias)
    torch.testing.assert_close(found, rnn(x, h_0)[0], rtol=tolerances.DEFINITION, atol=1e-15)
