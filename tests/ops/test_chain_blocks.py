"""κ⁽¹⁾ of one layer whose chains neither converge nor have a closed form: blocks of time (chain_blocks.inl)."""

import itertools

import pytest
import tolerances
import torch
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned")

HIDDEN = 33


def near_identity(hidden_size):
    return torch.eye(hidden_size) + 0.05 * torch.randn(hidden_size, hidden_size)


def halves(hidden_size):
    """Two blocks that grow differently, one of them with units that lead nowhere."""
    weight = torch.eye(hidden_size) * 0.99
    weight[: hidden_size // 2, : hidden_size // 2] = near_identity(hidden_size // 2) * 0.96
    return weight


def cycle(hidden_size):
    return torch.eye(hidden_size).roll(1, 0) * torch.linspace(0.8, 1.2, hidden_size)


def network(weight, outputs="all", h0="zeros", bidirectional=False):
    torch.manual_seed(1)
    net = pk.PathNetwork(
        pk.ReLURNN(2, HIDDEN, bidirectional=bidirectional),
        nn.Linear((1 + bidirectional) * HIDDEN, 3),
        outputs=outputs,
        h0=h0,
    )
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "weight_hh" in name:
                p.copy_(weight(HIDDEN))
    return net


def check(net, seq_len, dtypes=(torch.float32,), teams=(1,)):
    weights = {name: p.detach().double() for name, p in net.named_parameters()}
    expected = reference.kappa1(weights, seq_len, net.outputs, net.h0)
    gamma2 = reference.path_norm(weights, seq_len, net.outputs, net.h0)
    for dtype, threads in itertools.product(dtypes, teams):
        torch.set_num_threads(threads)
        found = pk.kappa(net.to(dtype), seq_len)
        rtol = tolerances.path(dtype, seq_len, HIDDEN)
        assert found.arithmetic == str(dtype).removeprefix("torch.")
        assert abs(found.log_path_norm - gamma2.log().item()) <= rtol
        for name, kappa in expected.items():
            torch.testing.assert_close(
                found.relative(name).expand_as(kappa), gamma2 / kappa, rtol=2 * rtol, atol=0, msg=name
            )


@pytest.mark.parametrize("weight", (near_identity, halves, cycle))
@pytest.mark.parametrize("outputs, h0", (("all", "zeros"), ("last", "zeros"), ("all", "ones"), ("last", "ones")))
@pytest.mark.parametrize("seq_len", (1200, 1207))
def test_blocks_are_the_steps(seq_len, outputs, h0, weight):
    check(network(weight, outputs, h0), seq_len, (torch.float32, torch.float64), teams=(1, 2))


@pytest.mark.parametrize("outputs", ("all", "last"))
def test_both_directions(outputs):
    check(network(near_identity, outputs, bidirectional=True), 1200)


def test_powers_that_underflow_are_not_used():
    """W̃² has entries of 2^-200, where a step loses nothing: h and δ are positive everywhere."""

    def weight(hidden_size):
        scale = torch.linspace(0.99, 1.01, hidden_size)
        return torch.diag(scale) + torch.diag(torch.full((hidden_size - 1,), 2.0**-50), 1)

    check(network(weight), 1200)


def first_half_of_units(hidden_size):
    """Units that keep what they have, and units that grow slowly, neither of which drive the other."""
    half = hidden_size // 2
    weight = torch.eye(hidden_size)
    weight[half:, half:] = 0.98 * torch.eye(half) + 0.01 * torch.randn(half, half)
    return weight


@pytest.mark.every_isa
@pytest.mark.parametrize("seq_len", (784, 5000))
@pytest.mark.parametrize("ends", ("h", "δ", "both"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_one_thread_whose_first_steps_end_a_chain(dtype, ends, seq_len):
    """Where W̃ is read once for both chains; what these had not packed, blocks took as it was."""
    hidden_size, half = 100, 50
    outputs = "all" if ends == "h" else "last"
    torch.manual_seed(1)
    net = pk.PathNetwork(pk.ReLURNN(2, hidden_size, bias=False), nn.Linear(hidden_size, 1, bias=False), outputs=outputs)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.eye(hidden_size) if ends == "both" else first_half_of_units(hidden_size))
        if ends == "h":
            net.rnn.weight_ih_l0[half:] = 0
            net.rnn.weight_hh_l0[:half, :half] *= 0.1
        elif ends == "δ":
            net.head.weight[:, half:] = 0
    weights = {name: p.detach().double() for name, p in net.named_parameters()}
    expected = reference.kappa1(weights, seq_len, outputs, "zeros")
    rtol = tolerances.path(dtype, seq_len, hidden_size)
    torch.set_num_threads(1)
    net.to(dtype)
    for _ in range(20):  # as memory of former calls comes back
        found = pk.kappa(net, seq_len)
        assert found.arithmetic == str(dtype).removeprefix("torch.")
        for name, kappa in expected.items():
            own = found.dense(name).double()
            torch.testing.assert_close(own, kappa.expand_as(own), rtol=rtol, atol=0, msg=name)


@pytest.mark.every_isa
@pytest.mark.parametrize("log2", (-452, -445))
def test_squares_that_underflow_are_seen_by_blocks(log2):
    """Unit 0 grows by 2^480 and feeds one that is little driven, by a weight whose square is lost beside others."""
    hidden_size, seq_len = 32, 4096
    growth = 2.0 ** (240 / seq_len)
    net = pk.PathNetwork(pk.ReLURNN(1, hidden_size, bias=False), nn.Linear(hidden_size, 1, bias=False)).double()
    with torch.no_grad():
        weight = torch.diag(growth * (1 - 1e-5 * torch.arange(hidden_size, dtype=torch.float64)))  # no closed form
        weight[1:4] = 0
        weight[0, 1], weight[1, 0], weight[3, 2] = 1, 1.4 * 2.0**log2, 2.0**60
        net.rnn.weight_hh_l0.copy_(weight)
        for ends in (net.rnn.weight_ih_l0[:, 0], net.head.weight[0]):
            ends.fill_(1)
            ends[1], ends[2] = 2.0**-230, 2.0**-60
    torch.set_num_threads(1)
    found = pk.kappa(net, seq_len)
    expected = reference.kappa1({name: p.detach() for name, p in net.named_parameters()}, seq_len)
    assert found.arithmetic == "extended" or log2 == -445  # which float64 holds, though a guard may not know
    for name, kappa in expected.items():
        own = found.dense(name)
        torch.testing.assert_close(own, kappa.expand_as(own), rtol=tolerances.path(torch.float64, seq_len, 4), atol=0)
