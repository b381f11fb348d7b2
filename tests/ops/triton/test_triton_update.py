"""The preconditioned update in Triton: what tests/ops/test_update.py does not ask of every backend."""

import math

import pytest
import torch

import pathrnn_kernels as pk
from pathrnn_kernels.ops.triton.update import _factor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter, about nan and infinity

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_many_programs():
    """More partial sums than are reduced at a time."""
    logs = torch.randn(2500, dtype=F64, device=DEVICE)
    factor = torch.empty(1, dtype=F64, device=DEVICE)
    _factor[(1,)](logs, factor, len(logs))
    assert factor.item() == pytest.approx(math.exp(-logs.logsumexp(0).item() / 2), rel=1e-14)


@pytest.mark.parametrize("scale, radius", (("none", 1e-3), ("path_norm", None), ("first_step", 1e3)))
def test_steps_of_path_sgd(monkeypatch, scale, radius):
    nets = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("PATHRNN_BACKEND", backend)
        torch.manual_seed(0)
        net = pk.PathNetwork(pk.ReLURNN(2, 5, 2, dtype=F64), torch.nn.Linear(5, 2, dtype=F64)).to(DEVICE)
        optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, scale=scale, trust_radius=radius)
        for seq_len in (3, 2):
            net.zero_grad()
            net(torch.ones(seq_len, 2, 2, dtype=F64, device=DEVICE)).sub(1).square().sum().backward()
            optimizer.step()
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
