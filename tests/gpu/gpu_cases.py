"""Networks, truths and comparisons of the GPU tests."""

import copy
import math
import os

import pytest
import torch
from torch import nn

import pathrnn_kernels as pk

ON_CPU = os.environ.get("PATHRNN_GPU_TESTS_ON_CPU") == "1"
needs_gpu = pytest.mark.skipif(ON_CPU, reason="streams, graphs, devices and large memory need a GPU")

F32, F64 = torch.float32, torch.float64


def network(
    device,
    dtype,
    hidden,
    layers=1,
    input_size=3,
    bias=True,
    head=2,
    head_bias=True,
    embedding=None,
    outputs="all",
    h0="zeros",
    gain=1.0,
    bidirectional=False,
):
    """Gaussian weights from a fixed seed, the same in either dtype; W̃_hh of spectral radius gain²."""
    if bidirectional:
        rnn = nn.RNN(input_size, hidden, layers, "relu", bias, bidirectional=True, dtype=dtype)
    else:
        rnn = pk.ReLURNN(input_size, hidden, layers, bias, dtype=dtype)
    width = 2 * hidden if bidirectional else hidden
    net = pk.PathNetwork(
        rnn,
        None if head is None else nn.Linear(width, head, bias=head_bias, dtype=dtype),
        None if embedding is None else nn.Embedding(embedding, input_size, dtype=dtype),
        outputs,
        h0,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            scale = (gain if "weight_hh" in name else 1) / p.shape[-1] ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return net.to(device)


def wide(net):
    """The same weights on the CPU in float64."""
    return copy.deepcopy(net).cpu().double()


def assert_same_kappa(found, expected, rtol):
    """Entry by entry, whatever the scales; ``expected`` is in float64 on the CPU."""
    assert list(found.factors) == list(expected.factors)
    for name, truth in expected.factors.items():
        factor = found.factors[name]
        assert factor.isfinite().all(), name
        steps = round((found.log_scales[name] - expected.log_scales[name]) / math.log(2))
        scaled = torch.ldexp(truth, torch.tensor(-steps))
        torch.testing.assert_close(
            factor.double().cpu().expand(truth.shape),
            scaled,
            rtol=rtol,
            atol=torch.finfo(factor.dtype).tiny,  # what the factor's dtype cannot hold
            msg=lambda text, name=name: f"{name}: {text}",
        )
    difference = abs(found.log_path_norm.item() - expected.log_path_norm.item())
    assert difference <= rtol or found.log_path_norm.item() == expected.log_path_norm.item()


def identical(first, second):
    """Whether two Kappa agree bit for bit."""
    return (
        first.log_scales == second.log_scales
        and torch.equal(first.log_path_norm, second.log_path_norm)
        and all(torch.equal(first.factors[name], second.factors[name]) for name in first.factors)
    )


def assert_close(found, expected, error, name="", scale=None):
    """Relative to the largest entry; ``expected`` may be on another device and in another dtype."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape, name
    assert found.isfinite().all(), name
    scale = expected.abs().max().item() if scale is None else scale
    worst = (found - expected).abs().max().item()
    assert worst <= error * scale, f"{name}: {worst / scale if scale else worst} > {error}"
