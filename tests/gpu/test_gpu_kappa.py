"""κ, γ² and log γ² on a GPU through the public API, against the definition and, for large sizes, the CPU's kernels."""

import functools
import math

import pytest
import tolerances
import torch
from gpu_cases import (
    F32,
    F64,
    GROWTH_SIZE,
    ON_CPU,
    PLANNED_SIZES,
    assert_same_kappa,
    identical,
    needs_gpu,
    network,
    wide,
)
from gpu_cases import served as served_plans

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops.plan import describe

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
SECOND = pytest.mark.parametrize("second_term", (False, True), ids=("kappa1", "kappa2"))

# Every pair of options meets in one of these.
OPTIONS = (
    {},
    {"head": None, "outputs": "last"},
    {"bias": False, "h0": "ones"},
    {"embedding": 5, "head_bias": False, "outputs": "last", "h0": "ones"},
    {"bias": False, "head": None, "embedding": 4},
    {"bias": False, "head_bias": False, "outputs": "last"},
    {"head": None, "h0": "ones", "embedding": 3},
    {"bias": False, "embedding": 2, "outputs": "last"},
    {"bidirectional": True, "embedding": 3, "outputs": "last"},
)


def served(backend, device, hidden, seq_len, dtype):
    plans = served_plans(backend, describe(device), hidden, seq_len, dtype)
    return [name if name == "block" else f"{name}:{blocks}" for name, blocks in plans]


@SECOND
@pytest.mark.parametrize("layers", (1, 2, 3))
@DTYPES
def test_every_option(backend, device, dtype, layers, second_term):
    for seq_len, hidden in ((1, 1), (7, 17)):
        for options in OPTIONS:
            net = network(device, dtype, hidden, layers, **options)
            expected = pk.kappa(wide(net), seq_len, second_term, backend="reference")
            found = pk.kappa(net, seq_len, second_term, rtol=0, backend=backend)
            error = tolerances.path(dtype, seq_len * layers, hidden)
            assert_same_kappa(found, expected, error)
            for function in (pk.path_norm, pk.log_path_norm):
                value, truth = (function(n, seq_len, backend=b) for n, b in ((net, backend), (wide(net), "reference")))
                torch.testing.assert_close(value.double().cpu(), truth, rtol=error, atol=error)


@DTYPES
def test_path_norm_is_differentiable(backend, device, dtype):
    net, seq_len = network(device, dtype, 17, 2), 7
    truth = wide(net)
    for function in (pk.path_norm, pk.log_path_norm):
        found = torch.autograd.grad(function(net, seq_len, backend=backend), list(net.parameters()))
        expected = torch.autograd.grad(function(truth, seq_len, backend="reference"), list(truth.parameters()))
        for (name, _), a, b in zip(net.named_parameters(), found, expected, strict=True):
            error = tolerances.path(dtype, 2 * seq_len, 17)
            torch.testing.assert_close(a.double().cpu(), b, rtol=2 * error, atol=0, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("hidden, seq_len", PLANNED_SIZES)
@DTYPES
def test_every_plan(backend, device, dtype, hidden, seq_len):
    net = network(device, dtype, hidden, 2, outputs="last")
    expected = pk.kappa(wide(net), seq_len, backend="cpu")
    for plan in served(backend, device, hidden, seq_len, dtype):
        found = pk.kappa(net, seq_len, backend=backend, plan=plan)
        assert_same_kappa(found, expected, tolerances.path(dtype, 2 * seq_len, hidden))
        assert identical(found, pk.kappa(net, seq_len, backend=backend, plan=plan)), plan


@pytest.mark.parametrize("plan", ("nonsense", "grid:0", "block:2"))
def test_unknown_plans_are_refused(backend, device, plan):
    with pytest.raises(ValueError, match="plan is '" + plan):
        pk.kappa(network(device, F32, 5), 3, backend=backend, plan=plan)


LARGE = ((60, 90, False), (33, 60, True))
if not ON_CPU:
    LARGE = ((100, 4096, False), (1024, 256, False), (2048, 50, False), (4096, 24, False), (4096, 4096, False))
    LARGE += ((100, 784, True), (512, 100, True), (1500, 20, True), (64, 4096, True))


@functools.cache
def large_truth(hidden, seq_len, second_term):
    return pk.kappa(network("cpu", F64, hidden), seq_len, second_term, rtol=1e-9, backend="cpu")


@pytest.mark.parametrize("hidden, seq_len, second_term", LARGE)
@DTYPES
def test_large(backend, device, dtype, hidden, seq_len, second_term):
    net, expected = network(device, dtype, hidden), large_truth(hidden, seq_len, second_term)
    found = pk.kappa(net, seq_len, second_term, rtol=1e-5, backend=backend)
    error = tolerances.path(dtype, seq_len, hidden) + found.bound + expected.bound
    assert_same_kappa(found, expected, error)
    if second_term and hidden >= 100:
        assert max(found.lags.values()) < seq_len - 1, "the certificate did not hold for Gaussian weights"
    assert identical(found, pk.kappa(net, seq_len, second_term, rtol=1e-5, backend=backend))


def growing(net, kind):
    weight = dict(net.named_parameters())["rnn.weight_hh_l0"]
    with torch.no_grad():
        if kind == "upper triangle":
            weight.copy_(weight.triu() * 3)
        elif kind == "tiny":
            weight.mul_(1e-4)
        elif kind == "huge":
            weight.mul_(1e15)
        elif kind == "zeros":
            weight.zero_()
        elif kind == "uneven":
            # Rows and columns of every size: squares that leave float32.
            scale = torch.logspace(-18, 18, len(weight), dtype=weight.dtype, device=weight.device)
            weight.copy_(weight * scale[:, None] / scale)
        elif kind == "identity":
            weight.copy_(torch.eye(len(weight)))
        elif kind == "one path":
            weight.zero_()[1:].diagonal().fill_(2)
    return net


@pytest.mark.parametrize(
    "kind", ("growth", "upper triangle", "tiny", "huge", "zeros", "uneven", "identity", "one path")
)
@SECOND
@DTYPES
def test_overflow_and_growth(backend, device, dtype, kind, second_term):
    hidden, seq_len = GROWTH_SIZE
    net = growing(network(device, dtype, hidden, gain=3.0 if kind == "growth" else 1.0), kind)
    expected = pk.kappa(wide(net), seq_len, second_term, rtol=0, backend="cpu")
    for plan in ("auto", *served(backend, device, hidden, seq_len, dtype)):
        found = pk.kappa(net, seq_len, second_term, rtol=0, backend=backend, plan=plan)
        assert_same_kappa(found, expected, tolerances.path(dtype, seq_len, hidden))
        assert math.isfinite(found.log_path_norm.item())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where Triton is interpreted
def test_weights_that_are_not_finite_are_named(backend, device):
    for value in (math.nan, math.inf):
        net = network(device, F32, 9)
        with torch.no_grad():
            net.head.weight[1, 3] = value
        with pytest.raises(ValueError, match=r"head\.weight has a nan or infinite entry"):
            pk.kappa(net, 5, backend=backend)


def test_mixed_devices_are_refused(backend, device):
    net = network(device, F32, 9)
    other = torch.device("meta" if ON_CPU else "cpu")
    net.head.to(other)
    with pytest.raises(TypeError, match=rf"head\.weight .*{other}"):
        pk.kappa(net, 5, backend=backend)
    with pytest.raises(TypeError, match=rf"head\.weight .*{other}"):
        pk.path_norm(net, 5, backend=backend)


def test_strided_weights(backend, device):
    net = network(device, F64, 11, 2)
    expected = pk.kappa(wide(net), 6, True, rtol=0, backend="cpu")
    with torch.no_grad():
        for p in net.parameters():
            apart = torch.full([2 * n for n in reversed(p.shape)], math.nan, dtype=p.dtype, device=device)
            view = apart[tuple(slice(1, None, 2) for _ in p.shape)]
            p.set_((view.T if p.dim() == 2 else view).copy_(p))
    assert_same_kappa(pk.kappa(net, 6, True, rtol=0, backend=backend), expected, tolerances.path(F64, 12, 11))


def chain_arguments(net, seq_len):
    """The arguments of ops.path_chain for a network of one layer with biases and a head."""
    p = dict(net.named_parameters())
    lists = [[p[f"rnn.{kind}_l0"]] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return (*lists, p["head.weight"], p["head.bias"], None, seq_len, False, False)


@needs_gpu
@SECOND
def test_streams_are_heeded(backend, device, second_term):
    """Weights that the current stream is still writing, late: on another stream the kernels would read the old ones."""
    net, other = network(device, F32, 64), network(device, F32, 64, gain=0.5)
    expected = pk.kappa(other, 50, second_term, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.copy_(q)
        found = pk.kappa(net, 50, second_term, backend=backend)
    torch.cuda.synchronize()
    assert identical(found, expected)


@needs_gpu
@SECOND
def test_graph_capture_and_replay(backend, device, second_term):
    net, seq_len = network(device, F32, 64), 12
    options = {"second_factor": 4.0 if second_term else 0.0, "backend": backend}
    for plan in served(backend, device, 64, seq_len, F32):
        call = chain_arguments(net, seq_len)
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                ops.path_chain(*call, **options, plan=plan)  # compiles and loads what is not there yet
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = ops.path_chain(*call, **options, plan=plan)
            for p in net.parameters():
                p.mul_(1.01)
            graph.replay()
            expected = ops.path_chain(*call, **options, plan=plan)
        torch.cuda.synchronize()
        for a, b in zip(captured.kappa, expected.kappa, strict=True):
            assert torch.equal(a, b), plan
        assert torch.equal(captured.exponents, expected.exponents)
        assert torch.equal(captured.log_path_norm, expected.log_path_norm)


@needs_gpu
@SECOND
def test_the_second_device(backend, second_term):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    net = network("cuda:1", F32, 64)
    assert torch.cuda.current_device() == 0
    found = pk.kappa(net, 30, second_term, backend=backend)
    assert all(f.device == torch.device("cuda:1") for f in found.factors.values())
    expected = pk.kappa(wide(net), 30, second_term, backend="cpu")
    error = tolerances.path(F32, 30, 64) + found.bound + expected.bound
    assert_same_kappa(found, expected, error)
    assert torch.cuda.current_device() == 0


def test_auto_takes_a_gpu_backend(device):
    if ON_CPU:
        pytest.skip("auto is the CPU's kernels here")
    net = network(device, F32, 9)
    assert pk.explain(net).backend in ("cuda", "triton")
    assert pk.explain(net, seq_len=100).plan is not None
