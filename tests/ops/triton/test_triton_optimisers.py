"""PathSGD, PathAdam and GatedPathSGD by Triton's kernels: launches, waits, and errors that are known a step later."""

import copy
import math

import pytest
import torch
from launches import Launches
from step_cases import Launched
from test_optim import SEQ_LEN, backward, make, through_a_file, values
from triton_cases import DEVICE, F32, F64, MARKS

import pathrnn_kernels as pk
from pathrnn_kernels import engine, plain
from pathrnn_kernels.kappa import kappa_without_waiting
from pathrnn_kernels.ops.triton import step as triton_step
from pathrnn_kernels.rescale import node_rescale_

# Backends are chosen by the environment, and the interpreter sums where nothing was initialised.
# Interpreted they take minutes; test_triton_step.py has the kernels one by one.
pytestmark = [pytest.mark.slow, *(mark for mark in MARKS if mark.name != "usefixtures")]

KINDS = {
    "sgd": lambda net, **o: pk.PathSGD(net, lr=0.1, scale="path_norm", trust_radius=0.1, **o),
    "momentum": lambda net, **o: pk.PathSGD(net, lr=1e-3, momentum=0.9, weight_decay=0.1, scale="first_step", **o),
    "adam": lambda net, **o: pk.PathAdam(net, lr=0.1, **o),
    "gated": lambda net, **o: pk.GatedPathSGD(net, lr=0.1, betas=(0.8, 0.9), hold=1, warmup=3, **o),
}
kinds = pytest.mark.parametrize("kind", KINDS)
THREE = ["_measure", "_decide", "_apply"]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", "triton")
    yield monkeypatch


def build(**options):
    return make(**options).to(DEVICE)


def step(net, optimizer, seed=0, seq_len=SEQ_LEN):
    optimizer.zero_grad()
    backward(net, seq_len, seed)
    optimizer.step()


def assert_equal(net, twin):
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@kinds
def test_steps_are_those_of_the_cpu(by_triton, kind):
    net = build(num_layers=2, seed=1)
    optimizer = KINDS[kind](net)
    for seed in range(3):
        step(net, optimizer, seed)
    by_triton.setenv("PATHRNN_BACKEND", "cpu")
    twin = make(num_layers=2, seed=1)
    optimizer = KINDS[kind](twin)
    for seed in range(3):
        step(twin, optimizer, seed)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("radius", (None, 1e-3))
@pytest.mark.parametrize("scale", ("path_norm", "first_step"))
def test_a_step_around_another_optimiser_is_that_of_the_cpu(by_triton, scale, radius):
    nets = []
    for backend in ("triton", "cpu"):
        by_triton.setenv("PATHRNN_BACKEND", backend)
        net = build(seed=1) if backend == "triton" else make(seed=1)
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        optimizer = pk.PathOptimizer(adam, net, scale=scale, trust_radius=radius)
        for seed in range(3):
            step(net, optimizer, seed)
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-11)


@kinds
def test_three_launches_and_nothing_is_read(by_triton, kind):
    net = build()
    optimizer = KINDS[kind](net)
    step(net, optimizer)
    backward(net)
    k = pk.kappa(net, SEQ_LEN)
    for name in ("kappa", "kappa_without_waiting"):
        by_triton.setattr(engine, name, lambda *arguments, **options: k)
    with Launched(by_triton, triton_step) as launched:
        for _ in range(2):
            optimizer.step()
    first = ["_measure_first", "_decide_first"] if kind == "momentum" else []
    assert launched.kernels == 2 * (first + THREE)
    # No more than the status of the step before, which is on the host when it is asked for.
    reads = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::item", "aten::equal", "aten::nonzero"}
    assert [name for name in launched.calls if name in reads] == 2 * ["aten::_local_scalar_dense"]


@pytest.mark.parametrize("second_term", (False, True))
@pytest.mark.parametrize("kind", ("sgd", "gated"))
def test_a_step_takes_few_launches_and_waits_for_nothing(by_triton, kind, second_term):
    net = build(hidden_size=4, seed=1)
    optimizer = KINDS[kind](net, second_term=second_term)
    step(net, optimizer, seq_len=20)  # the first reads κ
    backward(net, 20)
    launches = Launches(by_triton)
    with launches:
        optimizer.step()
    # Of the head's bias, in a group of its own, the rate becomes a tensor.
    assert len(launches.names) <= (25 if second_term else 12) + 3, launches.names
    # The status of the step before, which is on the host when it is asked for.
    assert launches.reads == ["__int__", "_local_scalar_dense"]
    optimizer.state_dict()


def test_lr_may_be_a_tensor_and_groups_differ():
    nets = [build() for _ in range(2)]
    for net, tensors in zip(nets, (False, True), strict=True):
        optimizer = KINDS["gated"](net)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.05, dtype=F64) if tensors else 0.05
        for seed in range(3):
            step(net, optimizer, seed)
    assert_equal(*nets)


def test_a_step_commutes_with_powers_of_two_bit_for_bit():
    net = build(hidden_size=4, dtype=F32)
    alphas = [torch.pow(2.0, torch.tensor([60.0, -60.0, 7.0, 0.0], dtype=F64, device=DEVICE))]
    twin = node_rescale_(copy.deepcopy(net), alphas)
    for kind in ("sgd", "adam"):
        for n in (net, twin):
            step(n, KINDS[kind](n))
        before = values(net)
        node_rescale_(net, alphas)
        assert_equal(net, twin)
        net.load_state_dict(before)
    assert all(p.isfinite().all() for p in net.parameters())


@kinds
def test_a_saved_run_continues_bit_for_bit(kind):
    net = build()
    optimizer = KINDS[kind](net)
    for seed in range(2):
        step(net, optimizer, seed)
    twin = copy.deepcopy(net)
    other = KINDS[kind](twin)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for n, o in ((net, optimizer), (twin, other)):
        step(n, o, 2)
    assert_equal(net, twin)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("exp_avg", torch.zeros(7, dtype=F64), "has shape"),
        ("exp_avg", torch.zeros(2, 3, dtype=F32), "is torch.float32"),
        ("exp_avg_sq", None, "lacks exp_avg_sq"),
        ("step", torch.tensor(3.0, dtype=F64), "must be torch.float32"),
        ("step", torch.zeros(2), "one entry"),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(key, value, words):
    net = build()
    optimizer = KINDS["adam"](net)
    step(net, optimizer)
    optimizer.state[net.head.weight][key] = value if value is None else value.to(DEVICE)
    before = values(net)
    with pytest.raises((KeyError, TypeError, ValueError), match=f"head.weight .*{words}"):
        step(net, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_grad_scaler_leaves_a_step_out():
    net = build()
    optimizer = KINDS["gated"](net)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    before = values(net)
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(net(torch.rand(SEQ_LEN, 2, 2, dtype=F64, device=DEVICE)).square().sum()).backward()
        if seed == 1:
            before = values(net)
            net.head.bias.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if seed == 1:
            assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert scaler.get_scale() == 512.0
    assert float(optimizer.state[net.head.bias]["step"]) == 2
    optimizer.state_dict()


def fail(net, optimizer, how):
    """A step that may not be."""
    backward(net)
    if how == "γ² is 0":
        with torch.no_grad():
            net.head.weight.zero_()
            net.head.bias.zero_()
    elif how == "κ is 0":
        optimizer.seq_len = 1
    else:
        for p in net.parameters():
            p.grad.fill_(1e300)
    before = values(net)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    optimizer.seq_len = None


FAILURES = {
    "γ² is 0": (ValueError, "the path norm of the network is 0"),
    "κ is 0": (ValueError, "κ of rnn.weight_hh_l0 is 0, but its gradient is not"),
    "overflow": (FloatingPointError, "the path-normalised gradient of rnn.weight_ih_l0 overflows torch.float64"),
}


@pytest.mark.parametrize("asked", ("step", "state_dict"))
@pytest.mark.parametrize("how", FAILURES)
def test_an_error_is_known_at_the_next_step(how, asked):
    net = build()
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(1e-4)
    optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.5, scale="none" if how == "overflow" else "path_norm")
    if how == "overflow":
        with torch.no_grad():
            net.head.weight.mul_(1e-10)
    fail(net, optimizer, how)
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
    called, before = [], values(net)
    with pytest.raises(FAILURES[how][0], match=FAILURES[how][1]):
        optimizer.step(lambda: called.append(0)) if asked == "step" else optimizer.state_dict()
    assert not called
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    net.load_state_dict(build().state_dict())
    optimizer.state_dict()  # it has been said once
    step(net, optimizer)
    optimizer.state_dict()
    assert not all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("how", FAILURES)
def test_a_capturable_step_that_may_not_be_is_left_out(how):
    net = build()
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(1e-4)
        net.head.weight.mul_(1e-10)
    optimizer = pk.PathSGD(net, lr=1e-3, scale="none" if how == "overflow" else "path_norm", capturable=True)
    fail(net, optimizer, how)
    net.load_state_dict(build().state_dict())
    before = values(net)
    step(net, optimizer)
    optimizer.state_dict()
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_an_error_is_forgotten_with_another_state():
    net = build()
    optimizer = KINDS["sgd"](net)
    saved = through_a_file(optimizer.state_dict())
    fail(net, optimizer, "κ is 0")
    assert copy.deepcopy(optimizer)._pending is None
    optimizer.load_state_dict(saved)
    step(net, optimizer)


def test_fused_and_plain_torch(monkeypatch):
    net = build()
    step(net, pk.PathSGD(net, fused=True))
    monkeypatch.setattr(plain, "sgd", None)
    with pytest.raises(TypeError):
        step(net, pk.PathSGD(net, fused=False))


# --- what is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_term", (False, True))
def test_kappa_without_waiting(second_term):
    net = build()
    found, wanted = kappa_without_waiting(net, 6, second_term, 0.0), pk.kappa(net, 6, second_term, rtol=0.0)
    assert torch.equal(found.log_path_norm, wanted.log_path_norm)
    for name, p in net.named_parameters():
        assert torch.equal(found.relative(name), wanted.relative(name)) and found.dense(name).shape == p.shape


def lossy():
    """A network of which float32 loses something in 16 steps."""
    net = pk.PathNetwork(pk.ReLURNN(1, 2, bias=False), torch.nn.Linear(2, 1))
    with torch.no_grad():
        net.rnn.weight_ih_l0.fill_(1.0)
        net.rnn.weight_hh_l0.copy_(torch.tensor([[256.0, 0.0], [0.0, 1.0]]))
    return net.to(DEVICE)


def ordinary():
    net = lossy()
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(0.5 * torch.eye(2))
    return net


def pull(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize("every", (1, 2))
@pytest.mark.parametrize("kind", (pk.PathSGD, pk.PathAdam))
def test_a_step_whose_kappa_underflows_later_is_left_out_and_the_next_is_right(by_triton, kind, every):
    """κ of the first step is read, later ones are not until one underflows."""
    first, then, nets = ordinary(), lossy(), []
    for backend in ("triton", "cpu"):
        by_triton.setenv("PATHRNN_BACKEND", backend)
        net = copy.deepcopy(first if backend == "triton" else first.cpu())
        optimizer = kind(net, lr=1e-3, seq_len=16, **({"update_every": every} if kind is pk.PathSGD else {}))
        for _ in range(every):
            pull(net)
            optimizer.step()
        net.load_state_dict(then.state_dict())
        before = values(net)
        pull(net)
        optimizer.step()
        if backend == "triton":
            assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
            with pytest.warns(UserWarning, match=r"the last step was left out, for κ underflowed in torch.float32"):
                optimizer.step()
        assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)


def test_a_network_whose_kappa_underflows_from_the_start_loses_no_step(by_triton):
    net = lossy()
    optimizer = pk.PathSGD(net, lr=1e-3, seq_len=16)
    for _ in range(2):
        before = values(net)
        pull(net)
        optimizer.step()
        assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_weight_that_is_not_finite_is_named_where_kappa_is_read_again():
    net = build()
    optimizer = KINDS["sgd"](net)
    step(net, optimizer)
    with torch.no_grad():
        net.rnn.weight_hh_l0[0, 0] = math.nan
    before = values(net)
    pull(net)
    optimizer.step()
    with pytest.warns(UserWarning, match="or a weight is not finite"), pytest.raises(ValueError, match="weight_hh_l0"):
        optimizer.step()
    assert all(p.equal(before[name]) or name.endswith("hh_l0") for name, p in net.named_parameters())


@pytest.mark.parametrize("kind", (pk.PathSGD, pk.PathAdam))
def test_a_recorded_step_whose_kappa_underflows_is_left_out(monkeypatch, kind):
    net = lossy()
    assert (
        pk.kappa(net, 16).arithmetic == "float64" and kappa_without_waiting(net, 16, False, 0.0).log_path_norm.isnan()
    )
    optimizer = kind(net, lr=1.0, seq_len=16, capturable=True)
    before = values(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.state.update(optimizer._states(optimizer._moving())[1])  # what a step before the capture makes
    monkeypatch.setattr(engine, "_captures", lambda weight: True)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    monkeypatch.setattr(engine, "_captures", lambda weight: False)
    optimizer.step()
    assert not all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_step_that_cannot_be_recorded_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "_captures", lambda weight: True)
    for options in ({}, {"capturable": True, "update_every": 2}):
        net = build()
        before = values(net)
        with pytest.raises(RuntimeError, match="build the optimiser with capturable=True and update_every=1"):
            step(net, pk.PathSGD(net, **options))
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
