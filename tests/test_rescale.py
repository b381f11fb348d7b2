"""Theorem 1: rescaled networks compute the same function; balance."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill_, inputs, networks, rescalings
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels.rescale import balance_, node_rescale_

# Rescaled weights differ by at most a few roundings each; six steps and three layers add and multiply them.
RTOL = 1e-12


def make(head=True, num_layers=2, hidden_size=3, dtype=torch.float64):
    linear = nn.Linear(hidden_size, 2, dtype=dtype) if head else None
    return fill_(pk.PathNetwork(pk.ReLURNN(2, hidden_size, num_layers, dtype=dtype), linear), seed=0)


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_untouched(net, before):
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name


@given(networks(rnns=("ReLURNN", "RNN")), st.data())
def test_theorem_1(case, data):
    net, seq_len = case
    x = inputs(net, seq_len)
    expected = net(x)
    before = values(net)
    alphas = data.draw(rescalings(net))
    assert node_rescale_(net, alphas) is net
    torch.testing.assert_close(net(x), expected, rtol=RTOL, atol=RTOL)
    for i, alpha in enumerate(alphas):  # and the rescaling did take place
        w = before[f"rnn.weight_hh_l{i}"] * alpha[:, None] / alpha
        torch.testing.assert_close(dict(net.named_parameters())[f"rnn.weight_hh_l{i}"].data, w)


@given(networks(h0=("zeros",)), st.data())
def test_path_norm_is_invariant(case, data):
    net, seq_len = case
    expected = pk.log_path_norm(net, seq_len).detach()
    node_rescale_(net, data.draw(rescalings(net)))
    torch.testing.assert_close(pk.log_path_norm(net, seq_len).detach(), expected, rtol=RTOL, atol=RTOL)


def test_path_norm_with_ones_at_time_0_is_not_invariant():
    net = make()
    net.h0 = "ones"
    before = pk.path_norm(net, 3).item()
    node_rescale_(net, [torch.full((3,), 2.0), torch.full((3,), 3.0)])
    assert abs(pk.path_norm(net, 3).item() / before - 1) > 0.01


def test_initial_states_are_in_the_units_of_the_hidden_layer():
    net = make()
    x, h_0 = inputs(net, 4), torch.rand(2, 2, 3, dtype=torch.float64)
    alphas = [torch.tensor([2.0, 0.5, 3.0]), torch.tensor([1.5, 4.0, 0.1])]
    y, h_n = net.rnn(x, h_0)
    out = net.head(y)
    node_rescale_(net, alphas)
    factor = torch.stack(alphas).double()[:, None]
    new_y, new_h_n = net.rnn(x, h_0 * factor)
    torch.testing.assert_close(net.head(new_y), out, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(new_h_n, h_n * factor, rtol=RTOL, atol=RTOL)


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("alphas", "error", "message"),
    [
        (ONES, TypeError, "alphas is a Tensor; it must be a list"),
        ([ONES], ValueError, "alphas has 1 tensors; the network has 2 layers"),
        ([ONES, 2.0], TypeError, r"alphas\[1\] is a float"),
        ([ONES, torch.ones(4)], ValueError, r"alphas\[1\] has shape \[4\]; it must be \[3\]"),
        ([-ONES, ONES], ValueError, r"alphas\[0\] is \[-1.0, -1.0, -1.0\]; every entry must be positive"),
        ([0 * ONES, ONES], ValueError, r"alphas\[0\]"),
        ([ONES, math.nan * ONES], ValueError, r"alphas\[1\]"),
        ([ONES, math.inf * ONES], ValueError, r"alphas\[1\]"),
        ([ONES, ONES * (1 + 1j)], TypeError, r"alphas\[1\] has dtype torch.complex64; it must be real"),
        ([1e200 * ONES.double(), 1e-200 * ONES.double()], ValueError, "rnn.weight_ih_l1 out of the range"),
        ([2.0**-1030 * ONES.double(), ONES], ValueError, "rnn.weight_ih_l0 out of the range"),  # rows are subnormal
    ],
)
def test_bad_alphas_are_refused_and_change_nothing(alphas, error, message):
    net = make()
    before = values(net)
    with pytest.raises(error, match=message):
        node_rescale_(net, alphas)
    assert_untouched(net, before)


@pytest.mark.parametrize("alpha", (torch.ones(3).to_sparse(), torch.ones(3, device="meta")), ids=("sparse", "meta"))
def test_alphas_that_are_no_plain_tensors_are_refused(alpha):
    net = make()
    before = values(net)
    with pytest.raises(TypeError, match=r"alphas\[1\] is sparse, or has a shape but no numbers"):
        node_rescale_(net, [ONES, alpha])
    assert_untouched(net, before)


def test_alphas_beyond_the_networks_dtype_are_named_as_given():
    with pytest.raises(ValueError, match=r"alphas\[0\] is \[1e-60, 1e-60, 1e-60\]; .* in the network's torch.float32"):
        node_rescale_(make().float(), [1e-60 * ONES.double(), ONES])


def test_outputs_of_a_network_without_head_are_not_rescaled():
    net = make(head=False)
    before = values(net)
    with pytest.raises(ValueError, match=r"alphas\[1\] rescales the top layer, whose units are the outputs"):
        node_rescale_(net, [ONES, 2 * ONES])
    assert_untouched(net, before)
    node_rescale_(net, [2 * ONES, ONES])


@pytest.mark.parametrize("function", [balance_, lambda net: node_rescale_(net, [])])
def test_only_path_networks_are_rescaled(function):
    with pytest.raises(TypeError, match="net is a ReLURNN; it must be a PathNetwork"):
        function(pk.ReLURNN(2, 3))


def sums(net):
    """Squared weights into and out of every unit, ``[L, H]`` each, without those from a unit to itself."""
    p = {name: value.square() for name, value in values(net).items()}
    entering, leaving = [], []
    for i in range(net.num_layers):
        hh = p[f"rnn.weight_hh_l{i}"].fill_diagonal_(0)
        biases = sum(p[name] for name in (f"rnn.bias_ih_l{i}", f"rnn.bias_hh_l{i}") if name in p)
        above = p.get(f"rnn.weight_ih_l{i + 1}", p.get("head.weight")) if i < net.num_layers - 1 or net.head else hh[:0]
        entering.append(p[f"rnn.weight_ih_l{i}"].sum(1) + hh.sum(1) + biases)
        leaving.append(above.sum(0) + hh.sum(0))
    return torch.stack(entering), torch.stack(leaving)


@given(networks())
def test_balance(case):
    net, seq_len = case
    x = inputs(net, seq_len)
    expected, start = net(x), values(net)
    alphas = balance_(net)
    torch.testing.assert_close(net(x), expected, rtol=RTOL, atol=RTOL)
    entering, leaving = sums(net)
    inner = slice(None) if net.head is not None else slice(-1)
    torch.testing.assert_close(entering[inner], leaving[inner], rtol=2e-6, atol=0)
    total = sum(p.square().sum() for p in net.parameters())
    assert total <= sum(p.square().sum() for p in start.values()) * (1 + 1e-12)

    again = make_like(net, start)
    node_rescale_(again, alphas)
    assert_untouched(again, values(net))


def make_like(net, parameters):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(parameters[name])
    return twin


def test_balance_leaves_units_on_no_path_alone():
    net = make(num_layers=1)
    with torch.no_grad():
        net.head.weight[:, 1] = 0  # unit 1 reaches an output through no other unit either
        net.rnn.weight_hh_l0[:, 1] = 0
        net.rnn.weight_hh_l0[2, :] = 0  # and unit 2 is reached by nothing
        for p in (net.rnn.weight_ih_l0, net.rnn.bias_ih_l0, net.rnn.bias_hh_l0):
            p[2] = 0
    (alpha,) = balance_(net)
    assert alpha[1:].tolist() == [1, 1]
    assert alpha[0] != 1
    entering, leaving = sums(net)
    torch.testing.assert_close(entering[0, 0], leaving[0, 0], rtol=2e-6, atol=0)


def test_balance_finds_weights_of_any_size():
    net = make(num_layers=1)
    alphas = [torch.tensor([1e-120, 1.0, 1e120], dtype=torch.float64)]
    balance_(net)
    balanced = values(net)
    node_rescale_(net, alphas)
    balance_(net, tol=1e-9)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.data, balanced[name], rtol=1e-5, atol=0)


def test_weights_of_units_to_themselves_do_not_hide_an_imbalance():
    net = make()
    for i in range(2):
        net.rnn.get_parameter(f"weight_hh_l{i}").data.fill_diagonal_(1e4)
    balance_(net)
    entering, leaving = sums(net)
    torch.testing.assert_close(entering, leaving, rtol=2e-6, atol=0)


def test_balance_says_when_it_stops_early():
    net = make()
    x = inputs(net, 4)
    expected = net(x)
    with pytest.warns(UserWarning, match="stopped after 1 iterations") as warned:
        balance_(net, max_iterations=1)
    assert warned[0].filename == __file__
    torch.testing.assert_close(net(x), expected, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("tol", [0, -1.0, math.nan, math.inf, True, "small"])
def test_bad_tolerances_are_refused(tol):
    with pytest.raises(ValueError, match="tol is"):
        balance_(make(), tol=tol)


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_bad_iteration_counts_are_refused(count):
    with pytest.raises(ValueError, match="max_iterations is"):
        balance_(make(), max_iterations=count)


def test_networks_that_are_not_finite_are_not_balanced():
    net = make()
    net.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"head.weight has nan or infinite entries"):
        balance_(net)


def test_no_product_leaves_the_range_on_the_way():
    net = pk.PathNetwork(pk.ReLURNN(1, 1, 2, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        net.rnn.weight_ih_l1.fill_(1e-30)
    alpha = torch.tensor([1e-15])
    node_rescale_(net, [alpha, alpha])
    assert net.rnn.weight_ih_l1.item() == pytest.approx(1e-30, rel=1e-6)
    net = pk.PathNetwork(pk.ReLURNN(1, 2, bias=False), nn.Linear(2, 1))
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.tensor([[1.0, 1e-20], [1e20, 1.0]]))
    node_rescale_(net, [torch.tensor([1e20, 1e-20])])
    torch.testing.assert_close(net.rnn.weight_hh_l0, torch.tensor([[1.0, 1e20], [1e-20, 1.0]]), rtol=1e-6, atol=0)
