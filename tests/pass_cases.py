"""Networks for a pass by the kernels of a GPU, and what the pass must give: the C++ kernels are the truth."""

import math

import oracles
import torch

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops import gpu
from pathrnn_kernels.ops.plan import Plan

PLAN = Plan("block", 1, 0.0)


def network(
    hidden, layers=1, bias=True, head=2, embedding=False, outputs="all", h0="zeros", dtype=torch.float64, both=False
):
    """head: 0 for none, 1 without a bias, 2 with one; both: directions."""
    if both:
        rnn = torch.nn.RNN(3, hidden, layers, "relu", bias, bidirectional=True, dtype=dtype)
    else:
        rnn = pk.ReLURNN(3, hidden, layers, bias=bias, dtype=dtype)
    return pk.PathNetwork(
        rnn,
        torch.nn.Linear(2 * hidden if both else hidden, 2, bias=head == 2, dtype=dtype) if head else None,
        torch.nn.Embedding(7, 3, dtype=dtype) if embedding else None,
        outputs,
        h0,
    )


def arguments(net, seq_len):
    weights = {name: p.detach() for name, p in net.named_parameters()}
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lists = [[p for name, p in weights.items() if name.startswith(f"rnn.{kind}_l")] for kind in kinds]
    ends = [weights.get(name) for name in ("head.weight", "head.bias", "embedding.weight")]
    return *lists, *ends, seq_len, net.outputs == "last", net.h0 == "ones"


def run(kernels, net, seq_len, kappa1=True, factor=0.0, rtol=0.0, first_lags=(), workspace=1 << 24):
    options = (kappa1, factor, rtol, first_lags, workspace, net.rnn.bidirectional)
    return ops.PathChain._make(gpu.path_chain(kernels, PLAN, *arguments(net, seq_len), *options))


def truth(net, seq_len, factor=0.0):
    wide = network(
        net.hidden_size, net.num_layers, net.rnn.bias, 0 if net.head is None else 1 + (net.head.bias is not None),
        net.embedding is not None, net.outputs, net.h0, both=net.rnn.bidirectional,
    )  # fmt: skip
    wide.load_state_dict(net.state_dict())
    return ops.path_chain(*arguments(wide, seq_len), second_factor=factor, bidirectional=net.rnn.bidirectional)


def check(found, wanted, rtol, net):
    assert found.arithmetic == 0
    torch.testing.assert_close(found.log_path_norm, wanted.log_path_norm, rtol=0, atol=rtol)
    assert len(found.kappa) == len(wanted.kappa) == len(found.exponents)
    layout = len(net.endings) // net.num_layers, net.head is not None
    for one, other in zip(oracles.parts(found, *layout), oracles.parts(wanted, *layout), strict=True):
        assert one[0].shape == other[0].shape
        # Zeros are zeros in both: -inf equals itself.
        logs = [mantissa.log() + exponent.double() * math.log(2) for mantissa, exponent in (one, other)]
        torch.testing.assert_close(*logs, rtol=0, atol=rtol)


def matrices(hidden):
    """Recurrent matrices, by what is special about them."""
    gaussian = torch.randn(hidden, hidden) / math.sqrt(hidden)
    half = hidden // 2
    return {
        "gaussian": gaussian,
        "uniform": (torch.rand(hidden, hidden) * 2 - 1) / math.sqrt(hidden),
        "orthogonal": torch.linalg.qr(gaussian)[0],
        "identity": torch.eye(hidden),
        "near the identity": torch.eye(hidden) + 0.02 * torch.randn(hidden, hidden),
        "diagonal": torch.diag(torch.rand(hidden) + 0.5),
        "nilpotent": torch.triu(gaussian, 1),
        "permutation": torch.eye(hidden)[torch.randperm(hidden)],
        "sparse": gaussian * (torch.rand(hidden, hidden) < 0.1),
        "growing": gaussian * 9,
        "vanishing": gaussian * 1e-3,
        "two blocks": torch.block_diag(gaussian[:half, :half], 1.5 * gaussian[half:, half:]),
        "a dead row": gaussian * (torch.arange(hidden) != 3)[:, None],
        "a dead column": gaussian * (torch.arange(hidden) != 3),
    }
