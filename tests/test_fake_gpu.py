"""What the host does in a step on a GPU: with FakeTensors of a CUDA device, where there need be none.

Interpreted and emulated kernels are given the CPU's tensors, which cannot show that one was left on the host. Of these
torch refuses operations on two devices, and every number that is read. Kernels do not run; what they are given is
looked at. Indexing such a tensor takes a CUDA build of torch.
"""

import contextlib
import importlib
import itertools
import pkgutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import pathrnn_kernels as pk
from pathrnn_kernels import engine
from pathrnn_kernels.ops import backend, plan, triton

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is no CUDA build")

NETWORKS = {
    "one layer": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no biases, an embedding": {"bias": False, "embedded": True},
}
OPTIMIZERS = {
    "PathSGD": lambda net, **options: pk.PathSGD(net, **options),
    "PathSGD, all options": lambda net, **options: pk.PathSGD(
        net, momentum=0.9, nesterov=True, weight_decay=0.1, scale="first_step", eps=0.1, trust_radius=0.1, **options
    ),
    "PathAdam": lambda net, **options: pk.PathAdam(net, **options),
    "GatedPathSGD": lambda net, **options: pk.GatedPathSGD(net, **options),
    "PathSOAP": lambda net, **options: pk.PathSOAP(net, precondition_frequency=1, **options),
}


class Launches:
    """Stands for a Triton kernel."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        assert 1 <= len(grid) <= 3 and all(type(n) is int and n > 0 for n in grid), (self.name, grid)

        def launch(*arguments, **options):
            for given in (*arguments, *options.values()):
                assert not isinstance(given, torch.Tensor) or given.is_cuda, (self.name, given)
            self.launched.append(self.name)

        return launch


class NoCopies(TorchDispatchMode):
    """Refuses what a capture does: copies from the host's memory, for which it waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if given and not any(t.is_cuda for t in given):
            assert not any(isinstance(t, torch.Tensor) and t.is_cuda for t in tree_iter(found)), func
        return found


@pytest.fixture
def launched(monkeypatch):
    """Triton's kernels, as they are launched."""
    found = []
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        own = importlib.import_module(module.name)
        for name, value in list(vars(own).items()):
            if type(value).__name__ in ("InterpretedFunction", "JITFunction"):
                monkeypatch.setattr(own, name, Launches(name, found))
    monkeypatch.setattr(backend, "_cuda_code", lambda index: (90, ""))
    monkeypatch.setattr(sys.modules["pathrnn_kernels.ops.path_chain"], "describe", lambda device: plan.Device())
    monkeypatch.setattr(engine, "without_numbers", lambda tensor: False)
    monkeypatch.setattr(engine, "_to_host", lambda status: (status, None))
    # Of copies from memory of the host that is pinned, which takes a driver.
    monkeypatch.setattr(
        sys.modules["pathrnn_kernels.ops.triton.step"],
        "_on_device",
        lambda values, device, capturing: torch.zeros(len(values), dtype=torch.int64, device=device),
    )
    places = itertools.count(1 << 20, 1 << 10)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: tensor.__dict__.setdefault("place", next(places)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        yield found


@pytest.fixture(params=("cuda", "triton"))
def served(request, monkeypatch, launched):
    """The backend of κ, where it is built."""
    if (reason := backend.refusals(torch.device("cuda", 0), torch.float32)[request.param]) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("PATHRNN_BACKEND", request.param)
    return request.param


def network(hidden=8, embedded=False, **options):
    net = pk.PathNetwork(
        pk.ReLURNN(3, hidden, **options),
        nn.Linear(hidden * (2 if options.get("bidirectional") else 1), 2),
        nn.Embedding(5, 3) if embedded else None,
    )
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
    return net


def give_gradients(net):
    for p in net.parameters():
        p.grad = torch.empty_like(p)


def begin(optimizer):
    """What a first step makes, without its numbers."""
    optimizer.state.update(optimizer._states(optimizer._moving())[1])
    if optimizer.scale == "first_step":
        optimizer._constant_on(optimizer._known[0])


@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("second_term", (False, True))
@pytest.mark.parametrize("shape", NETWORKS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_captured_step(monkeypatch, launched, kind, shape, second_term, fused, served):
    net = network(**NETWORKS[shape])
    optimizer = OPTIMIZERS[kind](net, seq_len=7, capturable=True, second_term=second_term, fused=fused)
    give_gradients(net)
    begin(optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with NoCopies():
        for _ in range(2):
            give_gradients(net)
            optimizer.step()
    assert served == "cuda" or launched
    state = [t for own in optimizer.state.values() for t in own.values()]
    assert all(t.is_cuda for t in state)


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "PathSOAP"])
def test_a_step_that_the_host_does_not_wait_for(launched, kind):
    net = network()
    optimizer = OPTIMIZERS[kind](net, seq_len=7)
    optimizer._trusted = True  # a first step has been, and was waited for
    for rate in (0.1, torch.full((), 0.1, device="cuda")):
        for group in optimizer.param_groups:
            group["lr"] = rate
        # GradScaler's, of another device than the network.
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        give_gradients(net)
        optimizer.step()
        optimizer._pending = None
    assert launched


@pytest.mark.parametrize("shape", NETWORKS)
def test_path_norm(served, shape):
    """With its gradient, formed here as backward does: torch's engine would look for a driver."""
    net = network(**NETWORKS[shape])
    norm = pk.log_path_norm(net, 7)
    gradients = norm.grad_fn.apply(torch.empty_like(norm))
    assert norm.is_cuda and all(g.is_cuda for g in gradients if g is not None)


@pytest.mark.parametrize("shape", NETWORKS)
def test_forward(launched, shape):
    """Without lengths, which some backends read."""
    y, h_n = network(**NETWORKS[shape]).rnn(torch.empty(7, 2, 3, device="cuda"))
    assert y.is_cuda and h_n.is_cuda


def test_planted_mistakes_are_found(monkeypatch, launched):
    """A number that is read, and a tensor that is left on the host."""
    net = network()
    give_gradients(net)
    with pytest.raises(DataDependentOutputException):
        pk.PathSGD(net, seq_len=7).step()  # the first step without capturable
    optimizer = pk.PathAdam(net, seq_len=7, capturable=True)
    monkeypatch.setattr(sys.modules["pathrnn_kernels.path_adam"], "zeros_like", lambda p: torch.zeros(p.shape))
    begin(optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises((TypeError, RuntimeError, AssertionError), match="cpu"):
        optimizer.step()
    with pytest.raises(AssertionError), NoCopies():
        torch.as_tensor(0.1, device="cuda")


def test_what_may_not_be_captured_is_refused(monkeypatch, launched):
    net = network()
    give_gradients(net)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def optimizer(begun=True, **options):
        found = pk.PathSGD(net, momentum=0.9, seq_len=7, **options)
        if begun:
            begin(found)
        found._pending = object()  # of a step before the capture, which may not be waited for in it
        return found

    optimizers = [optimizer(), optimizer(capturable=True, update_every=2, fused=False)]
    first = optimizer(begun=False, capturable=True), optimizer(begun=False, capturable=True, fused=False)
    reference = optimizer(capturable=True)
    for other in (*first, reference):
        other._pending = None
    capturing = True
    for one in optimizers:
        with pytest.raises(RuntimeError, match="build the optimiser with capturable=True and update_every=1"):
            one.step()
    for one in first:
        with pytest.raises(RuntimeError, match="take one before the capture"):
            one.step()
        assert not one.state
    monkeypatch.setenv("PATHRNN_BACKEND", "reference")
    with pytest.raises(ValueError, match="no kernel serves κ"):
        reference.step()
