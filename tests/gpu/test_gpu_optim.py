"""Training on a GPU follows the CPU: PathSGD and PathOptimizer."""

import copy
import math

import pytest
import tolerances
import torch
from gpu_cases import F64, ON_CPU, assert_close
from torch import nn

import pathrnn_kernels as pk

pytestmark = pytest.mark.gpu

STEPS, SEQ_LEN, BATCH, HIDDEN = 5, 8, 4, 19

CASES = {
    "kappa1": {},
    "kappa2": {"second_term": True},
    "path_norm": {"scale": "path_norm"},
    "first_step": {"scale": "first_step", "update_every": 2},
    "eps": {"scale": "path_norm", "eps": 1e-3},
    "trust_radius": {"scale": "path_norm", "trust_radius": 1e-3},
}
#: The path-normalised step of each case moves the weights by about a thousandth of their size.
LEARNING_RATE = {
    "kappa1": 1e-2,
    "kappa2": 1e-2,
    "path_norm": 1e-4,
    "first_step": 1e-3,
    "eps": 1e-4,
    "trust_radius": 1e-2,
}


@pytest.fixture(params=("cuda", "triton"))
def path(request, device, monkeypatch):
    """What computes κ and the update on the GPU: by default, or Triton alone. On the CPU Triton stands for both."""
    from pathrnn_kernels.ops.backend import refusals

    name = "triton" if ON_CPU else request.param
    if (reason := refusals(device, F64)[name]) is not None:
        pytest.skip(f"{name}: {reason}")
    if request.param == "triton" or ON_CPU:
        monkeypatch.setenv("PATHRNN_BACKEND", "triton")
    else:
        monkeypatch.delenv("PATHRNN_BACKEND", raising=False)
    return request.param


def build(device):
    generator = torch.Generator().manual_seed(0)
    net = pk.PathNetwork(pk.ReLURNN(2, HIDDEN, 2, dtype=F64), nn.Linear(HIDDEN, 1, dtype=F64), outputs="last")
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator).div_(p.shape[-1] ** 0.5)
    return net.to(device)


def train(net, optimizer):
    """The weights before the first step and after each."""
    generator = torch.Generator().manual_seed(1)
    device = next(net.parameters()).device
    history = [[p.detach().clone() for p in net.parameters()]]
    for _ in range(STEPS):
        x = torch.rand(SEQ_LEN, BATCH, 2, generator=generator, dtype=F64).to(device)
        target = torch.rand(BATCH, 1, generator=generator, dtype=F64).to(device)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
        history.append([p.detach().clone() for p in net.parameters()])
    return history


def assert_same_history(found, expected):
    """Relative to the way that a weight has come; each step adds a few roundings of κ and of the gradient."""
    error = tolerances.path(F64, 2 * SEQ_LEN, HIDDEN) + 2 * tolerances.rnn(F64, SEQ_LEN, BATCH, HIDDEN)
    start = expected[0]
    for step in range(1, STEPS + 1):
        for i, (a, b) in enumerate(zip(found[step], expected[step], strict=True)):
            way = (b - start[i]).abs().max().item()
            assert way > 0
            # Differences in the weights grow with the loss's curvature: tenfold over these few small steps is ample.
            rounding = step * tolerances.unit_roundoff(F64) * b.abs().max().item()
            assert_close(a, b, 1.0, f"step {step}, parameter {i}", scale=10 * step * error * way + 10 * rounding)


def optimizer_of(net, base, case):
    lr = LEARNING_RATE[case]
    if base == "PathSGD":
        return pk.PathSGD(net, lr=lr, momentum=0.5, **CASES[case])
    return pk.PathOptimizer(torch.optim.SGD(net.parameters(), lr=lr, nesterov=True, momentum=0.9), net, **CASES[case])


@pytest.mark.parametrize("base", ("PathSGD", "PathOptimizer"))
@pytest.mark.parametrize("case", CASES)
def test_training_follows_the_cpu(path, device, monkeypatch, case, base):
    net = build(device)
    found = train(net, optimizer_of(net, base, case))
    monkeypatch.delenv("PATHRNN_BACKEND", raising=False)
    truth = build("cpu")
    assert_same_history(found, train(truth, optimizer_of(truth, base, case)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_halves_are_divided_in_float32(path, device, dtype):
    half = build(device).to(dtype)
    seen = []
    for net in (half, copy.deepcopy(half).float()):
        optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm", trust_radius=1e-3, seq_len=SEQ_LEN)
        parameters = list(net.parameters())
        for i, p in enumerate(parameters):
            p.grad = torch.linspace(-1, 1 + i, p.numel(), device=device).reshape(p.shape).to(dtype).to(p.dtype)
        optimizer.base.register_step_pre_hook(
            lambda *_, parameters=parameters: seen.append([p.grad for p in parameters])
        )
        optimizer.step()
    for found, expected in zip(*seen, strict=True):
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_grad_scaler(path, device):
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    nets = []
    for use in (scaler, torch.amp.GradScaler(device.type, enabled=False)):
        net = build(device)
        optimizer = optimizer_of(net, "PathSGD", "trust_radius")
        for step in range(3):
            optimizer.zero_grad()
            use.scale(net(torch.ones(SEQ_LEN, BATCH, 2, dtype=F64, device=device)).square().sum()).backward()
            if step == 1:  # skipped
                if use is not scaler:
                    continue
                net.head.bias.grad[0] = math.inf
            use.step(optimizer)
            use.update()
        nets.append(net)
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))
