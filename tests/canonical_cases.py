"""What the tests of canonical coordinates share between the GPU backends; gpu_model.py is the specification."""

import gpu_model
import pytest
import test_canonical
import torch

from pathrnn_kernels.ops import gpu
from pathrnn_kernels.ops.plan import Plan

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
SHAPES = pytest.mark.parametrize("shape", ((1, 1), (3, 17), (40, 33), (130, 5)), ids=str)
NONE = gpu_model.NONE


def weight(*shape, dtype):
    """Of every size, subnormal ones included, with zeros."""
    least, most = (-148, 127) if dtype == torch.float32 else (-1073, 1023)
    exponents = torch.randint(least, most, shape)
    return gpu_model.ldexp((1 + torch.rand(shape, dtype=dtype)) * torch.randn(shape).sign(), exponents) * (
        torch.rand(shape) > 0.2
    )


def sources(count):
    return torch.where(torch.rand(count) > 0.2, 2 * torch.randint(-200, 200, (count,)), NONE).int()


def check_maxima(kernels, shape, dtype):
    rows, columns = weight(*shape, dtype=dtype), weight(*shape, dtype=dtype)
    for call in (
        (rows, None, columns, None),
        (rows, sources(shape[1]), columns, sources(shape[0])),
        (None, None, columns, sources(shape[0])),
        (rows, sources(shape[1]), None, None),
    ):
        found, wanted = kernels.maxima(*call), gpu_model.maxima(*call)
        assert all(map(torch.equal, found, wanted))


#: Recurrent matrices: whom a drive of the first unit and a head of the last reach, and after how many steps.
KINDS = ("dense", "shift", "nobody", "blocks", "random")


def check_reach(kernels, kind, dtype):
    for hidden in (1, 6, 33):
        w = weight(2, hidden, hidden, dtype=dtype)
        if kind == "shift":
            w *= torch.diag(torch.ones(hidden - 1), -1)
        elif kind == "nobody":
            w.zero_()
        elif kind == "blocks":
            w[:, : hidden // 2, hidden // 2 :] = 0
        elif kind == "random":
            w *= torch.rand(w.shape) < 1.5 / hidden
        starts = [torch.full((2, hidden), NONE, dtype=torch.int32) for _ in range(2)]
        starts[0][:, 0], starts[1][:, -1] = 6, -8
        if kind == "dense":
            starts = [torch.stack([sources(hidden), sources(hidden)]) for _ in range(2)]
        biases = [weight(2, hidden, dtype=dtype) * (torch.rand(2, hidden) < 0.2) for _ in range(2)]
        for bias in ((None, None), biases):
            call = (w, starts[0], *bias, w.flip(0), starts[1])
            assert all(map(torch.equal, kernels.reach(*call), gpu_model.reach(*call)))


#: layers, bidirectional, outputs, head, embedding, bias
NETWORKS = (
    (1, False, "all", True, False, True),
    (1, True, "last", True, True, False),
    (2, False, "all", False, False, True),
    (2, True, "all", True, True, True),
    (3, False, "last", True, False, False),
)


def arguments(net):
    weights = {name: p.detach() for name, p in net.named_parameters()}
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lists = [[p for name, p in weights.items() if name.startswith(f"rnn.{kind}_l")] for kind in kinds]
    return *lists, *(weights.get(name) for name in ("head.weight", "head.bias", "embedding.weight"))


def check_canonical(kernels, options, dtype):
    """Against the specification, with units that nothing reaches or that reach nothing, and exponents out of range."""
    net = test_canonical.make(*options[:2], dtype, *options[2:])
    layers, directions = options[0], 1 + options[1]
    weights = [t for x in arguments(net) if x is not None for t in (x if isinstance(x, list) else [x])]
    flat = torch.cat([t.reshape(-1) for t in weights])
    chains, hidden = layers * directions, net.hidden_size
    counts = [0 if t is None else len(t) for t in arguments(net)[4:]]
    f, g = (2 * torch.randint(-30, 30, (chains, hidden)).int() for _ in range(2))
    f[:, 1], g[:, 2], f[-1, 3], g[-1, 3] = NONE, NONE, NONE, NONE
    for balanced, far in ((True, False), (False, False), (True, True)):
        if far:
            f[0, 4] = 4 * (1 if dtype == torch.float32 else 8) * 150
        both = []
        for kernel in (kernels.canonical_, gpu_model.canonical_):
            copy, largest, lost = flat.clone(), torch.zeros(len(weights), dtype=dtype), torch.zeros(1, dtype=torch.bool)
            call = (directions, net.rnn.input_size, net.rnn.bias, *counts, balanced, largest, lost)
            both.append((kernel(copy, f, g, *call), copy, largest, lost))
        found, wanted = both
        assert torch.equal(found[0], wanted[0]) and found[3] >= wanted[3] and found[3] == far
        if not far:  # what is out of range is not to be used
            assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    for value in (float("inf"), float("nan"), -float("nan")):
        copy, largest = flat.clone(), torch.zeros(len(weights), dtype=dtype)
        copy[-1] = value
        kernels.canonical_(copy, f, g, *call[:-2], largest, torch.zeros(1, dtype=torch.bool))
        assert not largest[-1].isfinite() and largest[:-1].isfinite().all()


def check_follows(kernels, options):
    """κ in canonical coordinates and log γ² are bit for bit those of a network rescaled by powers of two."""
    net = test_canonical.make(*options[:2], torch.float32, *options[2:])
    other, _ = test_canonical.rescaled(net, test_canonical.FARTHEST[torch.float32])
    for factor, rtol in ((0.0, 0.0), (4.0, 1e-4)):
        call = (12, net.outputs == "last", False, True, factor, rtol, (), 1 << 24, options[1])
        before, after = (gpu.path_chain(kernels, Plan("block", 1, 0.0), *arguments(n), *call) for n in (net, other))
        assert before[7] == after[7] == 0
        assert all(map(torch.equal, before[0], after[0]))
        for i in (1, 4, 5, 6):
            assert torch.equal(before[i], after[i])
        assert (before[2] != after[2]).any() or (options[0] == 1 and net.head is None)
