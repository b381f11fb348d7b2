"""κ and PathOptimizer on bfloat16 and float16 networks, under autocast and with GradScaler."""

import copy
import io
import math

import pytest
import torch
from strategies import fill_, inputs
from torch import nn
from torch.utils._pytree import tree_leaves

import pathrnn_kernels as pk

F32 = torch.float32
HALVES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
#: "cpu" has the update's kernels; with "reference" it runs in plain torch.
BACKENDS = pytest.mark.parametrize("backend", ("cpu", "reference"))
SEQ_LEN = 6


def make(dtype=F32, seed=0):
    rnn = nn.RNN(2, 3, 2, nonlinearity="relu")
    return fill_(pk.PathNetwork(rnn, nn.Linear(3, 2)), seed).to(dtype)


def fill_gradients_(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return net


def wide_copy(net):
    """The same numbers in float32, gradients included."""
    twin = copy.deepcopy(net).float()
    for p, q in zip(twin.parameters(), net.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.float()
    return twin


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- κ and γ² ---------------------------------------------------------------------------------------------------------


@HALVES
@BACKENDS
@pytest.mark.parametrize("second_term", (False, True))
def test_kappa_is_that_of_the_weights_in_float32(second_term, backend, dtype):
    net = make(dtype)
    found, expected = (pk.kappa(n, SEQ_LEN, second_term, backend=backend) for n in (net, wide_copy(net)))
    assert found.log_scales == expected.log_scales and found.lags == expected.lags
    assert found.log_path_norm == expected.log_path_norm
    for name, factor in expected.factors.items():
        assert found.factors[name].dtype == F32 and torch.equal(found.factors[name], factor)
        assert found.relative(name).dtype == torch.float64 and found.dense(name).dtype == F32
    assert pk.explain(net).backend == "cpu"


@HALVES
@BACKENDS
@pytest.mark.parametrize("norm", (pk.path_norm, pk.log_path_norm))
def test_gradients_of_gamma2_are_rounded_once(norm, backend, dtype):
    net = make(dtype)
    twin = wide_copy(net)
    found, expected = (norm(n, SEQ_LEN, backend=backend) for n in (net, twin))
    assert found.dtype == F32 and torch.equal(found, expected)
    for value in (found, expected):
        value.backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == dtype and torch.equal(p.grad, q.grad.to(dtype))


def test_gamma2_beyond_float16():
    net = make(torch.float16)
    with torch.no_grad():
        net.head.weight.fill_(60_000.0)
    assert torch.finfo(torch.float16).max < pk.path_norm(net, SEQ_LEN) < math.inf


def test_mixed_dtypes_are_refused():
    net = make(torch.bfloat16)
    net.head.float()
    for call in (pk.kappa, pk.path_norm):
        with pytest.raises(TypeError, match="head.weight is torch.float32 .* but rnn.weight_ih_l0 is torch.bfloat16"):
            call(net, SEQ_LEN)


# --- the optimiser on halves ------------------------------------------------------------------------------------------


@HALVES
@BACKENDS
@pytest.mark.parametrize("options", ({}, {"scale": "path_norm", "eps": 1e-6}, {"scale": "first_step"}), ids=str)
def test_the_base_gets_the_quotient_of_float32_rounded_once(options, backend, dtype, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    net = fill_gradients_(make(dtype))
    seen = []
    for module in (net, wide_copy(net)):
        base = torch.optim.SGD(module.parameters(), lr=1e-3)
        optimizer = pk.PathOptimizer(base, module, seq_len=SEQ_LEN, **options)
        parameters = list(module.parameters())
        base.register_step_pre_hook(lambda *_, parameters=parameters: seen.append([p.grad for p in parameters]))
        optimizer.step()
    for found, expected in zip(*seen, strict=True):
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    assert all(p.grad.dtype == dtype for p in net.parameters())


@HALVES
@BACKENDS
def test_the_trust_radius_is_measured_in_float32(backend, dtype, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    net = fill_gradients_(make(dtype))
    before, free = values(net), wide_copy(net)
    k = pk.kappa(net, SEQ_LEN)
    pk.PathSGD(free, lr=0.1, scale="path_norm", seq_len=SEQ_LEN).step()
    pk.PathSGD(net, lr=0.1, scale="path_norm", seq_len=SEQ_LEN, trust_radius=0.1).step()
    deltas = {name: p.detach().double() - before[name].double() for name, p in free.named_parameters()}
    length = sum((k.dense(name).double() * delta.square()).sum() for name, delta in deltas.items()).sqrt()
    shorter = 0.1 * (k.log_path_norm / 2).exp() / length
    assert shorter < 0.5  # else nothing is tested
    for name, p in net.named_parameters():
        # One rounding, to the parameter's dtype.
        expected = before[name].double() + shorter * deltas[name]
        torch.testing.assert_close(p.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@BACKENDS
def test_what_overflows_float16_alone_is_refused(backend, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    net = make(torch.float16)
    with torch.no_grad():
        net.head.weight.mul_(1e-3)
    fill_gradients_(net)
    before = values(net)
    pk.PathSGD(wide_copy(net), seq_len=SEQ_LEN).step()
    optimizer = pk.PathSGD(net, momentum=0.9, seq_len=SEQ_LEN)
    with pytest.raises(FloatingPointError, match="gradient of .* overflows torch.float16 with scale='none'"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert not optimizer.state and optimizer.state_dict()["path"]["steps"] == 0


@HALVES
def test_gradients_that_are_not_finite_pass_through(dtype):
    net = fill_gradients_(make(dtype))
    net.head.bias.grad[0] = math.inf
    pk.PathSGD(net, seq_len=SEQ_LEN, trust_radius=0.1).step()
    assert not net.head.bias[0].isfinite() and net.head.bias[1].isfinite()


@HALVES
def test_a_saved_run_continues_bit_for_bit(dtype):
    def build():
        net = make(dtype)
        base = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
        return net, pk.PathOptimizer(base, net, scale="path_norm", update_every=3, seq_len=SEQ_LEN, trust_radius=0.2)

    def train(net, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            net(inputs(net, SEQ_LEN, seed=step)).float().sub(1).square().mean().backward()
            optimizer.step()

    net, optimizer = build()
    train(net, optimizer, range(4))  # κ is of step 3, and serves two more
    state = through_a_file((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(4, 7))
    again, resumed = build()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(again, resumed, range(4, 7))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


# --- autocast and GradScaler ------------------------------------------------------------------------------------------


@BACKENDS
def test_a_step_inside_autocast_is_one_outside(backend, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    nets = []
    for autocast in (False, True):
        net = fill_gradients_(make())
        optimizer = pk.PathSGD(net, second_term=True, scale="path_norm", trust_radius=0.01, seq_len=SEQ_LEN)
        with torch.autocast("cpu", enabled=autocast):
            optimizer.step()
        nets.append(net)
    assert all(torch.equal(p, q) for p, q in zip(*(n.parameters() for n in nets), strict=True))


def backward(net, scaler=None, seed=0):
    with torch.autocast("cpu", enabled=scaler is not None):
        y = net.rnn(inputs(net, SEQ_LEN, seed=seed))[0]
    loss = nn.functional.linear(y.float(), net.head.weight, net.head.bias).sub(1).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def make_scaled(**options):
    net = fill_(pk.PathNetwork(pk.ReLURNN(2, 3, 2), nn.Linear(3, 2)), seed=0)
    options = {"scale": "path_norm", "trust_radius": 0.05, "update_every": 2, "momentum": 0.9} | options
    return net, pk.PathSGD(net, lr=0.01, **options)


@pytest.mark.parametrize("clip", (False, True))
def test_scaled_training_is_the_unscaled(clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    trained = []
    for use in (scaler, torch.amp.GradScaler("cpu", enabled=False)):
        net, optimizer = make_scaled()
        for step in range(5):
            optimizer.zero_grad()
            backward(net, use, seed=step)
            if clip:
                use.unscale_(optimizer)
                assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            use.step(optimizer)
            use.update()
        trained.append(net)
    # The scale is a power of two, and doubles after every two steps.
    assert scaler.get_scale() == 4096.0
    assert all(torch.equal(p, q) for p, q in zip(*(n.parameters() for n in trained), strict=True))


@pytest.mark.parametrize("first", (0, 1), ids=("at-once", "after-a-skipped-step"))
@pytest.mark.parametrize("fused", (None, False))
def test_the_constant_of_the_first_step_is_that_of_the_unscaled_gradient(fused, first):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trained = []
    for use in (scaler, torch.amp.GradScaler("cpu", enabled=False)):
        net, optimizer = make_scaled(scale="first_step", trust_radius=None, update_every=1, fused=fused)
        for step in range(3):
            optimizer.zero_grad()
            backward(net, use, seed=step)
            if step < first:
                if use is not scaler:
                    continue
                net.head.bias.grad[0] = math.inf
            use.step(optimizer)
            use.update()
        trained.append((net, optimizer.state_dict()["path"]["log_constant"]))
    (net, constant), (twin, expected) = trained
    assert constant == expected
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("fused", (None, False))
def test_a_step_that_raises_keeps_nothing_of_the_scaler(fused):
    """Which multiplies the next scale by what it finds."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net, optimizer = make_scaled(update_every=1, fused=fused)
    twin, other = make_scaled(update_every=1, fused=fused)
    for n in (net, twin):
        backward(n, scaler)
    length, optimizer.seq_len = optimizer.seq_len, 1
    with pytest.raises(ValueError, match="is 0, but its gradient is not"):
        scaler.step(optimizer)
    optimizer.seq_len = length
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    for o in (optimizer, other):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(1))  # which makes its scale
        scaler.step(o)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("register", ("register_step_pre_hook", "register_step_post_hook"))
def test_a_hook_that_raises_keeps_nothing_of_the_scaler(register):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net, optimizer = make_scaled(update_every=1)

    def boom(*_):
        raise RuntimeError("boom")

    getattr(optimizer, register)(boom)
    backward(net, scaler)
    with pytest.raises(RuntimeError, match="boom"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


def test_a_skipped_step_leaves_no_trace():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net, optimizer = make_scaled()
    backward(net, scaler)
    scaler.step(optimizer)  # κ is cached now, and momentum begun
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    assert before[1]["path"]["kappa"] is not None
    scaler.update()
    optimizer.zero_grad()
    backward(net, scaler)
    net.head.bias.grad[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    after = net.state_dict(), optimizer.state_dict(), torch.get_rng_state()
    for found, expected in zip(tree_leaves(after), tree_leaves(before), strict=True):
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    assert scaler.get_scale() == 512.0
    optimizer.zero_grad()
    backward(net, scaler)
    scaler.step(optimizer)
    assert optimizer.state_dict()["path"]["steps"] == 2
