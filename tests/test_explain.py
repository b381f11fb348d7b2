import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pathrnn_kernels as pk
from pathrnn_kernels.ops import backend, plan


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.delenv(plan.ENVIRONMENT, raising=False)


MODULES = [pk.ReLURNN(2, 3), nn.RNN(2, 3, nonlinearity="relu"), pk.PathNetwork(pk.ReLURNN(2, 3), nn.Linear(3, 1))]


@pytest.mark.parametrize("module", MODULES)
def test_every_backend_has_a_verdict(module):
    found = pk.explain(module, backend="reference")
    assert found.backend == "reference"
    assert list(found.reasons) == list(backend.BACKENDS)
    assert found.reasons["reference"] is None
    lines = str(found).splitlines()
    assert lines[0] == "torch.float32 on cpu, backend 'reference' → reference"
    assert [line.split()[0] for line in lines[1:]] == list(backend.BACKENDS)
    assert lines[-1].split() == ["reference", "serves"]
    assert found.plan is None and found.plans == {}


def test_the_extension_serves_cpu_tensors():
    found = pk.explain(pk.ReLURNN(2, 3))
    assert found.backend == "cpu" and found.reasons["cpu"] is None
    assert found.requested == "auto"


def test_arguments_are_checked_on_every_backend():
    with pytest.raises(ValueError, match="plan is 'x'; use one of 'auto', 'block'"):
        pk.explain(pk.ReLURNN(2, 3), plan="x")
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        pk.explain(pk.PathNetwork(pk.ReLURNN(2, 3)), seq_len=0)
    with pytest.raises(TypeError, match=r"seq_len is 1.5; it must be a positive integer"):
        pk.explain(pk.PathNetwork(pk.ReLURNN(2, 3)), seq_len=1.5)


def test_where_nothing_serves_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(backend, "extension_problem", lambda: "it is not built")
    found = pk.explain(pk.ReLURNN(2, 3))
    assert found.backend is None and found.reasons["cpu"] == "it is not built"
    assert "→ none serves" in str(found) and "no: it is not built" in str(found)


def test_the_environment_is_heeded(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert pk.explain(pk.ReLURNN(2, 3)).backend == "reference"
    assert pk.explain(pk.ReLURNN(2, 3, device=torch.device("meta")), backend="triton").backend is None
    monkeypatch.setenv(backend.ENVIRONMENT, "cpuu")
    with pytest.raises(ValueError, match="PATHRNN_BACKEND is 'cpuu'"):
        pk.explain(pk.ReLURNN(2, 3))


def test_tensors_elsewhere_are_explained():
    found = pk.explain(pk.ReLURNN(2, 3, device=torch.device("meta")))
    assert "the tensors are on meta" in found.reasons["cpu"]
    assert found.backend == "reference"


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="rnn_or_net is a Linear"):
        pk.explain(nn.Linear(2, 2))


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend is 'gpu'; use one of"):
        pk.explain(pk.ReLURNN(2, 3), backend="gpu")


def test_a_gpu_backend_comes_with_its_plan(monkeypatch):
    """As on a GPU, where the backend's device is known; here, the verdicts on a CPU tensor are overruled."""
    module = sys.modules["pathrnn_kernels.explain"]  # the name in the package is the function
    monkeypatch.setattr(module, "refusals", lambda *_: dict.fromkeys(backend.BACKENDS))
    monkeypatch.setattr(module, "choose", lambda *_: "cuda")
    found = pk.explain(pk.ReLURNN(2, 100), backend="cuda", seq_len=784)
    assert found.plan == found.plans[found.plan.name]
    assert list(found.plans) == list(plan.PLANS)
    lines = str(found).splitlines()
    assert lines[5] == f"plan of its chains → {found.plan.name}"
    assert [line.split()[0] for line in lines[6:]] == list(plan.PLANS)
    assert pk.explain(pk.ReLURNN(2, 100), backend="cuda", plan="grid:4").plan.blocks == 4
    rnn = pk.ReLURNN(2, 1000)
    rnn(torch.randn(7, 1, 2))
    found = pk.explain(pk.PathNetwork(rnn), backend="cuda")
    assert found.plans == plan.plans("cuda", plan.describe(torch.device("cpu")), 1000, 7, 4)
    assert "registers of a block" in found.plans["block"] and "block      no: hidden_size is 1000" in str(found)
    with pytest.raises(ValueError, match="plan 'block' does not serve this call on backend 'cuda'"):
        pk.explain(rnn, backend="cuda", plan="block")


@pytest.mark.parametrize(
    ("noise", "steps", "words"),
    [
        (None, 3, "h by 3 steps; δ by 3 steps"),
        (None, 784, "then converged"),
        (0.02, 784, "blocks of"),
        (0.0, 784, "then converged"),
    ],
)
def test_on_the_cpu_how_the_chains_go(noise, steps, words):
    """At nn.RNN's initialisation they end early; near the identity, as in training, nothing ends them."""
    torch.manual_seed(0)
    net = pk.PathNetwork(pk.ReLURNN(2, 100), nn.Linear(100, 10), outputs="last")
    if noise is not None:
        with torch.no_grad():
            net.rnn.weight_hh_l0.copy_(torch.eye(100) + noise * torch.randn(100, 100) / 10)
    found = pk.explain(net, seq_len=steps)
    assert len(found.chains) == 2 and found.chains[0].startswith(f"T = {steps} by ")
    assert found.chains[1].startswith("l0: h by ") and words in found.chains[1]
    assert str(found).endswith(found.chains[1])


def test_without_a_length_nothing_is_said_of_the_chains():
    net = pk.PathNetwork(pk.ReLURNN(2, 3, 2, bidirectional=True), nn.Linear(6, 1))
    assert pk.explain(net).chains == ()
    net(torch.zeros(4, 1, 2))
    assert [line.split()[0] for line in pk.explain(net).chains] == ["T", "l0:", "l0_reverse:", "l1:", "l1_reverse:"]


def test_a_network_without_a_kappa_is_explained():
    net = pk.PathNetwork(pk.ReLURNN(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    found = pk.explain(net, seq_len=5)
    assert found.backend == "cpu" and found.chains == ("a weight is not finite, and κ is not to be had",)
    with FakeTensorMode():
        fake = pk.PathNetwork(pk.ReLURNN(2, 3), nn.Linear(3, 1))
    assert pk.explain(fake, seq_len=5).chains == ()


def test_an_rnn_that_is_not_of_relus_is_refused():
    with pytest.raises(ValueError, match="rnn has nonlinearity 'tanh'"):
        pk.explain(torch.nn.RNN(2, 3))
