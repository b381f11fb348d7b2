import copy
import math
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import fill_, inputs, networks, rescalings
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels.rescale import node_rescale_

SEQ_LEN = 4


def make(hidden_size=8, num_layers=1, outputs="last", dtype=torch.float64, head_bias=True):
    head = nn.Linear(hidden_size, 2, bias=head_bias, dtype=dtype)
    return fill_(pk.PathNetwork(pk.ReLURNN(2, hidden_size, num_layers, dtype=dtype), head, outputs=outputs), 0)


def backward(net, seq_len=SEQ_LEN, seed=0):
    net.zero_grad()
    net(inputs(net, seq_len, seed=seed)).sub(1).square().sum().backward()


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same(net, other, **tolerance):
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("second_term", [False, True])
@pytest.mark.parametrize("power", [1.0, 2.5])
@pytest.mark.parametrize("outputs", ["all", "last"])
def test_the_docstrings_formula(outputs, power, second_term):
    """With κ and γ² from the dense factors, step by step, the output's bias first."""
    net = make(num_layers=2, outputs=outputs)
    beta1, beta2, lr, bias_lr, hold, warmup = 0.8, 0.9, 0.05, 0.05, 2, 3
    optimizer = pk.GatedPathSGD(net, lr, (beta1, beta2), power, bias_lr, hold, warmup, second_term, rtol=0)
    p = values(net)
    inner = [name for name in p if name != "head.bias"]
    m, v = ({name: torch.zeros_like(p[name]) for name in inner} for _ in range(2))
    steps = 0
    for t in range(1, 8):
        backward(net, seed=t)
        k = pk.kappa(net, SEQ_LEN, second_term, rtol=0)
        kappa = {name: k.dense(name) for name in p}
        gamma2 = pk.path_norm(net, SEQ_LEN).item() - (kappa["head.bias"] * p["head.bias"].square()).sum().item()
        grad = {name: q.grad.clone() for name, q in net.named_parameters()}
        optimizer.step()
        p["head.bias"] -= bias_lr * (grad["head.bias"] / kappa["head.bias"]).clamp(-1, 1)
        g = {name: grad[name] * (gamma2 / kappa[name]).sqrt() for name in inner}
        length = math.sqrt(sum(x.square().sum().item() for x in g.values()))
        if t > hold and length > 0:  # no unit of the head's layer may be active
            steps += 1
            for name in inner:
                m[name] = beta1 * m[name] + (1 - beta1) * g[name] / length
                v[name] = beta2 * v[name] + (1 - beta2) * (g[name] / length) ** 2
                ratio = m[name].abs() / (v[name] / (1 - beta2**steps)).sqrt()
                u = m[name].sign() * ratio.nan_to_num().clamp(max=1) ** power
                p[name] -= lr * min(1, steps / warmup) * u * (gamma2 / kappa[name] / u.numel()).sqrt()
        for name, q in net.named_parameters():
            torch.testing.assert_close(q.detach(), p[name], rtol=1e-9, atol=1e-12, msg=lambda s, n=name: f"{n}: {s}")
            assert torch.equal(q.grad, grad[name])
    assert steps >= 3


@pytest.mark.parametrize("second_term", [False, True])
@given(networks(h0=("zeros",)), st.data())
def test_a_network_may_be_rescaled_at_any_time(second_term, case, data):
    """Theorem 2, for the averages as well: they are kept in coordinates that a rescaling does not change."""
    net, seq_len = case
    alphas = data.draw(rescalings(net))
    twin = copy.deepcopy(net)
    options = {"lr": 0.1, "betas": (0.5, 0.6), "power": 2.0, "hold": 1, "warmup": 0}
    optimizers = [pk.GatedPathSGD(n, second_term=second_term, seq_len=seq_len, rtol=0, **options) for n in (net, twin)]
    for step in range(4):
        if step == 2:
            node_rescale_(twin, alphas)
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            backward(n, seq_len, seed=step)
            # A gradient that is rounding alone has no sign to agree on.
            assume(all(x is None or x.grad is None or _has_no_noise(x.grad) for x in n.parameters()))
            optimizer.step()
        assume(all(p.isfinite().all() and p.abs().max() < 1e6 for p in net.parameters()))
    expected = node_rescale_(copy.deepcopy(net), alphas)
    for (name, p), q in zip(twin.named_parameters(), expected.parameters(), strict=True):
        # A few hundred roundings of the largest gradient are 1e-13; of the smallest that counts, 1e-7; and a few steps.
        torch.testing.assert_close(
            p, q, rtol=1e-6, atol=1e-6 * q.abs().max().item(), msg=lambda text, name=name: f"{name}: {text}"
        )


def _has_no_noise(grad):
    size = grad.abs()
    return bool(((size == 0) | (size > 1e-6 * size.max())).all())


def test_adam_in_path_coordinates_is_invariant():
    net = make()
    alphas = [torch.logspace(-1, 1, 8)]
    twin = node_rescale_(copy.deepcopy(net), alphas)
    for n in (net, twin):
        optimizer = pk.GatedPathSGD(n, 0.1, (0.9, 0.999), power=1.0, hold=0, warmup=0)
        for step in range(3):
            backward(n, seed=step)
            optimizer.step()
    assert_same(twin, node_rescale_(net, alphas), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_lr_bounds_the_length_of_every_tensors_step(num_layers):
    net = make(num_layers=num_layers, head_bias=False)
    optimizer = pk.GatedPathSGD(net, lr=0.01, betas=(0.0, 0.9), warmup=0)
    for seed in range(5):
        before, k = values(net), pk.kappa(net, SEQ_LEN)
        gamma2 = pk.path_norm(net, SEQ_LEN).item()
        backward(net, seed=seed)
        optimizer.step()
        lengths = [
            math.sqrt((k.dense(name) * (p.detach() - before[name]).square()).sum() / gamma2)
            for name, p in net.named_parameters()
        ]
        assert max(lengths) <= 0.01 * (1 + 1e-9)
        assert min(lengths) > 0
        if seed == 0:  # every ratio is 1 then, but for entries without a gradient
            assert max(lengths) == pytest.approx(0.01)


def test_noise_hardly_moves_what_a_steady_gradient_moves():
    net = make()
    optimizer = pk.GatedPathSGD(net, lr=1e-6, hold=0, seq_len=SEQ_LEN)
    before = values(net)
    generator = torch.Generator().manual_seed(0)
    steady = net.rnn.weight_hh_l0
    for _ in range(2000):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + (3.0 if p is steady else 0.0)
        optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().mean().item() for name, p in net.named_parameters()}
    assert moved["rnn.weight_hh_l0"] > 100 * moved["rnn.weight_ih_l0"]


def test_without_an_output_bias_there_is_nothing_to_hold_for():
    for net in (make(head_bias=False), fill_(pk.PathNetwork(pk.ReLURNN(2, 8, dtype=torch.float64)), 0)):
        before = net.rnn.weight_hh_l0.detach().clone()
        optimizer = pk.GatedPathSGD(net)
        assert len(optimizer.param_groups) == 1
        backward(net)
        optimizer.step()
        assert not torch.equal(net.rnn.weight_hh_l0, before)


def test_frozen_parameters_and_those_without_a_gradient_stay():
    net = make(num_layers=2)
    net.rnn.weight_ih_l0.requires_grad_(False)
    optimizer = pk.GatedPathSGD(net, hold=0)
    optimizer.step()
    before = values(net)
    backward(net)
    net.head.bias.grad = None
    optimizer.step()
    same = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert same == {"rnn.weight_ih_l0", "head.bias"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_left_out(bad):
    net = make()
    optimizer = pk.GatedPathSGD(net, hold=0)
    backward(net)
    net.rnn.weight_hh_l0.grad[0, 0] = bad
    net.head.bias.grad[0] = bad
    before = values(net)
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
    backward(net)
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_entries_on_no_path_stay():
    net = make()
    with torch.no_grad():
        net.head.weight[:, 1] = 0
        net.rnn.weight_hh_l0[:, 1] = 0
    optimizer = pk.GatedPathSGD(net, lr=0.1, hold=0, seq_len=SEQ_LEN)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    row = net.rnn.weight_ih_l0[1].detach().clone()
    optimizer.step()
    assert torch.equal(net.rnn.weight_ih_l0[1], row)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_copy_goes_on_bit_for_bit(way):
    net = make()
    optimizer = pk.GatedPathSGD(net, lr=0.1, hold=2)
    for step in range(4):
        backward(net, seed=step)
        optimizer.step()
    if way == "state_dict":
        twin = copy.deepcopy(net)
        other = pk.GatedPathSGD(twin, lr=0.1, hold=2)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
        twin = other.net
    for n, o in ((net, optimizer), (twin, other)):
        for step in range(3):
            backward(n, seed=10 + step)
            o.step()
    assert_same(twin, net, rtol=0, atol=0)


def test_a_scheduler_scales_both_rates():
    optimizer = pk.GatedPathSGD(make(), lr=2.0, bias_lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    backward(optimizer.net)
    assert optimizer.step(lambda: 7) == 7
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]


@pytest.mark.parametrize(("optimizer", "options"), [(pk.GatedPathSGD, {"hold": 0}), (pk.PathAdam, {})])
def test_rates_of_zero_gather_statistics_and_move_nothing(optimizer, options):
    """Where a scheduler's warm-up begins; torch's optimisers take it, too."""
    optimizer = optimizer(make(), lr=0.0, bias_lr=0.0, **options)
    before = values(optimizer.net)
    backward(optimizer.net)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in optimizer.net.named_parameters())
    assert optimizer.state[optimizer.net.rnn.weight_hh_l0]["exp_avg"].any()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"net": nn.Linear(2, 2)}, TypeError, "net is a Linear"),
        ({"lr": -0.1}, ValueError, "lr is -0.1"),
        ({"lr": "1"}, TypeError, "lr is '1'"),
        ({"power": math.nan}, ValueError, "power is nan"),
        ({"bias_lr": -1.0}, ValueError, "bias_lr is -1.0"),
        ({"betas": (0.9,)}, ValueError, r"betas is \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas is"),
        ({"betas": 0.9}, ValueError, "betas is 0.9"),
        ({"hold": -1}, ValueError, "hold is -1"),
        ({"hold": 0.5}, ValueError, "hold is 0.5"),
        ({"warmup": -1}, ValueError, "warmup is -1"),
        ({"second_term": 1}, TypeError, "second_term is 1"),
        ({"seq_len": 0}, ValueError, "seq_len is 0"),
        ({"rtol": -1}, ValueError, "rtol is -1"),
        ({"net": make(dtype=torch.bfloat16)}, TypeError, "float32 parameters, under torch.autocast"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        pk.GatedPathSGD(**{"net": make(), **options})


def test_other_parameters_are_refused():
    optimizer = pk.GatedPathSGD(make())
    with pytest.raises(ValueError, match="an optimiser of their own"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert len(optimizer.param_groups) == 2


def test_a_step_that_cannot_be_taken_changes_nothing():
    net = make()
    optimizer = pk.GatedPathSGD(net, hold=0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = values(net)
    with pytest.raises(ValueError, match="no forward pass"):
        optimizer.step()
    with torch.no_grad():
        net.head.weight.zero_()
    before["head.weight"].zero_()
    optimizer.seq_len = SEQ_LEN
    with pytest.raises(ValueError, match="the path norm of the network is 0"):
        optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("fused", (None, False))
def test_the_longest_hold_of_several_groups_counts(fused):
    net = make()
    ps = list(net.parameters())
    groups = [{"params": ps[:1], "hold": 0}, {"params": ps[1:3], "hold": 2}, {"params": ps[3:], "hold": 0}]
    optimizer = pk.GatedPathSGD(net, warmup=0, seq_len=4, **({} if fused is None else {"fused": fused}))
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    moved = []
    for _ in range(3):
        for p in ps:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in ps]
        optimizer.step()
        moved.append([not torch.equal(p, q) for p, q in zip(ps, before, strict=True)])
    assert moved[:2] == [[False] * (len(ps) - 1) + [True]] * 2 and all(moved[2])
