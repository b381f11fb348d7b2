"""κ and log γ² by the Triton kernels in the order of ops.gpu: the C++ kernels are the truth."""

import math

import launches
import oracles
import pytest
import tolerances
import torch
from triton_cases import DEVICE, F32, F64, MARKS

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops import gpu
from pathrnn_kernels.ops.plan import Plan

pytestmark = MARKS

PLANS = {name: Plan(name, 1, 0.0) for name in ("block", "grid")}
#: layers, bias, head (1: without a bias), embedding, outputs, h0, dtype, plan, T, κ⁽²⁾'s factor and its rtol.
CASES = (
    (1, True, 2, False, "all", "zeros", F32, "block", 9, 0.0, 0.0),
    (1, False, 0, True, "last", "ones", F32, "grid", 1, 4.0, 0.0),
    (2, True, 1, False, "last", "zeros", F64, "grid", 7, 4.0, 0.0),
    (3, True, 2, True, "all", "ones", F32, "block", 4, 0.0, 0.0),
    (1, True, 2, False, "all", "zeros", F64, "block", 40, 4.0, 1e-4),
    (2, False, 0, False, "last", "ones", F32, "grid", 6, 0.0, 0.0),
)


def network(layers=1, bias=True, head=2, embedding=False, outputs="all", h0="zeros", dtype=F64, hidden=7):
    return pk.PathNetwork(
        pk.ReLURNN(3, hidden, layers, bias=bias, dtype=dtype),
        torch.nn.Linear(hidden, 4, bias=head == 2, dtype=dtype) if head else None,
        torch.nn.Embedding(5, 3, dtype=dtype) if embedding else None,
        outputs,
        h0,
    )


def arguments(net, seq_len, dtype=None, device="cpu"):
    weights = {name: p.detach().to(device, dtype) for name, p in net.named_parameters()}
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lists = [[p for name, p in weights.items() if name.startswith(f"rnn.{kind}_l")] for kind in kinds]
    ends = [weights.get(name) for name in ("head.weight", "head.bias", "embedding.weight")]
    return *lists, *ends, seq_len, net.outputs == "last", net.h0 == "ones"


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_kernel_in_its_place(case):
    from pathrnn_kernels.ops.triton import kernels

    *options, dtype, plan, seq_len, factor, rtol = case
    net = network(*options, dtype)
    call = arguments(net, seq_len, device=DEVICE)
    found = ops.PathChain._make(gpu.path_chain(kernels, PLANS[plan], *call, True, factor, rtol, (), 1 << 24))
    wanted = ops.path_chain(*arguments(net, seq_len, F64), second_factor=factor)
    tolerance = rtol + tolerances.path(dtype, net.num_layers * seq_len, 7)
    torch.testing.assert_close(found.log_path_norm.cpu(), wanted.log_path_norm, rtol=0, atol=tolerance)
    assert found.arithmetic == 0 and (found.bounds <= rtol).all() and len(found.kappa) == len(wanted.kappa)
    layout = len(net.endings) // net.num_layers, net.head is not None
    for one, other in zip(oracles.parts(found, *layout), oracles.parts(wanted, *layout), strict=True):
        logs = [mantissa.cpu().log() + exponent.cpu().double() * math.log(2) for mantissa, exponent in (one, other)]
        torch.testing.assert_close(*logs, rtol=0, atol=tolerance)


def test_launches(monkeypatch):
    from pathrnn_kernels.ops.triton import kernels

    launches.check_pass(kernels, monkeypatch)


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_public_function(dtype):
    net, seq_len, rtol = network(dtype=dtype).to(DEVICE), 40, 1e-4
    found = pk.kappa(net, seq_len, backend="triton", second_term=True, rtol=rtol, plan="block")
    wide = network()
    wide.load_state_dict(net.state_dict())
    wanted = pk.kappa(wide, seq_len, backend="cpu", second_term=True, rtol=0)
    tolerance = rtol + tolerances.path(dtype, seq_len, 7)
    assert list(found.factors) == list(wanted.factors)
    for name, factor in wanted.factors.items():
        ratio = (found.factors[name].double().cpu() / factor).log() + found.log_scales[name] - wanted.log_scales[name]
        assert ratio.abs().max() <= tolerance
    assert abs(found.log_path_norm.item() - wanted.log_path_norm.item()) <= tolerance


@pytest.mark.parametrize("gain", (1e4, 1e-6))
def test_what_leaves_the_range_of_float32(gain):
    """Grown by 2^27 a step, or faded as fast, with a drive that stays: nothing is lost but what a sum dwarfs."""
    net = network(dtype=F32)
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(gain)
    found = pk.kappa(net.to(DEVICE), 30, backend="triton", plan="block")
    wide = network()
    wide.load_state_dict(net.state_dict())
    wanted = pk.kappa(wide, 30, backend="cpu")
    tolerance = tolerances.path(F32, 30, 7)
    assert abs(found.log_path_norm.item() - wanted.log_path_norm.item()) <= tolerance
