"""Networks, truths and comparisons of the GPU tests."""

import copy
import math
import os

import pytest
import torch
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels.ops.plan import Device, cluster_sizes, plans

ON_CPU = os.environ.get("PATHRNN_GPU_TESTS_ON_CPU") == "1"
needs_gpu = pytest.mark.skipif(ON_CPU, reason="streams, graphs, devices and large memory need a GPU")

F32, F64 = torch.float32, torch.float64

#: (hidden, seq_len) of every test that asks for plans by name.
KERNEL_SIZES = [(n, 40) for n in ((1, 3, 17, 130) if ON_CPU else (1, 3, 17, 100, 130, 513))]
LARGE_KERNEL_SIZES = [(70, 5)] if ON_CPU else [(700, 20), (1500, 20)]
PLANNED_SIZES = [(17, 40), (60, 7)] if ON_CPU else [(17, 40), (100, 784), (130, 7), (257, 60), (1000, 33)]
GROWTH_SIZE = (12, 40) if ON_CPU else (60, 2000)


def served(backend: str, device: Device, hidden: int, seq_len: int, dtype: torch.dtype) -> list[tuple[str, int]]:
    """(plan, blocks) of every plan that serves; clusters of every size, grids of more blocks than rows, and of numbers
    that do not divide the rows."""
    found = plans(backend, device, hidden, seq_len, dtype.itemsize)
    result = [(name, plan.blocks) for name, plan in found.items() if not isinstance(plan, str) and name != "cluster"]
    if backend == "cuda":
        result += [("cluster", n) for n in cluster_sizes(device, hidden, dtype.itemsize)]
        return [*result, ("grid", 1), ("grid", 3), ("grid", 5)]
    # Interpreted, the programs of a grid cannot wait for each other.
    return [(name, 1) for name, _ in result] if ON_CPU else [*result, ("grid", 1), ("grid", 3)]


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
