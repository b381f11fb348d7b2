"""Training on a GPU follows the CPU: PathSGD and PathOptimizer."""

import copy
import math
import re
from pathlib import Path

import pytest
import tolerances
import torch
from gpu_cases import F64, ON_CPU, assert_close, needs_gpu
from torch import nn

import pathrnn_kernels as pk

pytestmark = pytest.mark.gpu

PAGE = Path(__file__).parents[2] / "pathrnn_kernels" / "README.md"
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
def test_halves_are_stepped_in_float32(path, device, dtype):
    half = build(device).to(dtype)
    nets = half, copy.deepcopy(half).float()
    for net in nets:
        optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm", trust_radius=1e-3, seq_len=SEQ_LEN)
        for i, p in enumerate(net.parameters()):
            p.grad = torch.linspace(-1, 1 + i, p.numel(), device=device).reshape(p.shape).to(dtype).to(p.dtype)
        optimizer.step()
        optimizer.state_dict()  # which says what could not be done
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds.
    rtol = 2.0**-7 if ON_CPU and dtype == torch.bfloat16 else 0
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=rtol, atol=0)


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


STEPPED = {
    "PathSGD": lambda net: pk.PathSGD(
        net, lr=torch.tensor(0.1), momentum=0.5, scale="path_norm", trust_radius=1e-2, seq_len=SEQ_LEN, capturable=True
    ),
    "PathAdam": lambda net: pk.PathAdam(net, lr=0.1, seq_len=SEQ_LEN, capturable=True),
    "PathSOAP": lambda net: pk.PathSOAP(
        net, lr=0.1, precondition_frequency=3, warmup=3, seq_len=SEQ_LEN, capturable=True
    ),
    "GatedPathSGD": lambda net: pk.GatedPathSGD(net, lr=0.1, hold=1, warmup=3, seq_len=SEQ_LEN, capturable=True),
}


@needs_gpu
@pytest.mark.parametrize("kind", STEPPED)
def test_a_training_step_is_recorded(path, device, kind):
    """Forward, backward, κ and update in one CUDA graph: what it does is what the steps do one by one."""
    x = torch.rand(SEQ_LEN, BATCH, 2, dtype=F64, device=device)
    nets, optimizers = [], []

    def train_step(net, optimizer):
        optimizer.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        net = build(device)
        optimizer = STEPPED[kind](net)
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=F64).to(device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and loads what is not there yet; makes the state
            for _ in range(2):
                train_step(net, optimizer)
        torch.cuda.current_stream().wait_stream(stream)
        nets.append(net)
        optimizers.append(optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(nets[0], optimizers[0])
    for step in range(4):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / (step + 1))
        graph.replay()
        train_step(nets[1], optimizers[1])
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(nets[0].rnn.weight_hh_l0, build(device).rnn.weight_hh_l0)


@needs_gpu
def test_the_pages_graph():
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(r"<!-- graph -->\n```python\n(.*?)```", text, re.S).group(1)
    names = {}
    exec(compile(block, "the pages' graph", "exec"), names)
    state = names["opt"].state[names["net"].rnn.weight_hh_l0]
    assert state["step"].item() == 103
    assert all(p.isfinite().all() for p in names["net"].parameters())


def test_an_error_is_known_at_the_next_step(path, device):
    net = build(device)
    optimizer = pk.PathSGD(net, lr=1e-2, seq_len=1)
    net(torch.ones(SEQ_LEN, BATCH, 2, dtype=F64, device=device)).square().sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    with pytest.raises(ValueError, match="κ of rnn.weight_hh_l0 is 0, but its gradient is not"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
