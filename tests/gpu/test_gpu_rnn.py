"""ReLURNN on a GPU: parity with torch.nn.RNN, tracing, graphs, and wrong arguments."""

import copy

import pytest
import tolerances
import torch
from gpu_cases import F32, F64, ON_CPU, assert_close, needs_gpu
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops.relu_rnn import _choose

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
OTHER = "meta" if ON_CPU else "cpu"


@pytest.fixture(autouse=True)
def any_backend(monkeypatch):
    monkeypatch.delenv("PATHRNN_BACKEND", raising=False)


@pytest.fixture(params=("cuda", "triton"))
def rnn_backend(request, monkeypatch, device):
    """What serves relu_rnn: cuDNN or Triton; on the CPU its own kernels stand in for cuDNN."""
    name = "auto" if ON_CPU and request.param == "cuda" else request.param
    try:
        _choose(device, F32, 8, name, torch.backends.cudnn.enabled)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PATHRNN_BACKEND", name)
    return request.param


def fits(rnn_backend, dtype, hidden):
    from pathrnn_kernels.ops.triton.relu_rnn import limit

    return rnn_backend != "triton" or hidden <= limit(dtype)


def outcome(rnn, x, h_0, loss=("y", "h_n")):
    """y, h_n and every gradient."""
    x = x.detach().requires_grad_()
    h_0 = None if h_0 is None else h_0.detach().requires_grad_()
    rnn.zero_grad()
    y, h_n = rnn(x) if h_0 is None else rnn(x, h_0)  # a graphed one was recorded without
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=F64).to(t) for t in (y, h_n)]
    sum((t * w).sum() for t, w, part in zip((y, h_n), weights, ("y", "h_n"), strict=True) if part in loss).backward()
    results = {"y": y, "h_n": h_n, "x": x.grad}
    if h_0 is not None:
        results["h_0"] = h_0.grad
    return results | {name: p.grad for name, p in rnn.named_parameters()}


def check(ours, x, h_0=None, loss=("y", "h_n")):
    """Against nn.RNN in float64 on the CPU, which sees the same numbers."""
    theirs = nn.RNN(ours.input_size, ours.hidden_size, ours.num_layers, "relu", ours.bias, ours.batch_first, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    expected = outcome(theirs, x.cpu().double(), None if h_0 is None else h_0.cpu().double(), loss)
    found = outcome(ours, x, h_0, loss)
    seq_len, batch = (x.shape[1], x.shape[0]) if ours.batch_first else x.shape[:2]
    error = ours.num_layers * tolerances.rnn(x.dtype, seq_len, batch, max(ours.hidden_size, ours.input_size))
    for name in expected:
        # A layer's gradients sum the same deltas; one sum can cancel by chance, its rounding errors do not.
        layer = [t for other, t in expected.items() if "_l" in name and other.endswith(name[name.index("_l") :])]
        assert_close(
            found[name], expected[name], error, name, max(t.abs().max().item() for t in layer or [expected[name]])
        )


@pytest.mark.parametrize("loss", (("y",), ("h_n",), ("y", "h_n")), ids="+".join)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("layers", (1, 3))
@DTYPES
def test_every_option(rnn_backend, device, dtype, layers, bias, loss):
    for batch_first in (False, True):
        rnn = pk.ReLURNN(3, 5, layers, bias, batch_first, device=device, dtype=dtype)
        x = torch.randn(7, 2, 3, device=device, dtype=dtype)
        for h_0 in (None, torch.randn(layers, 7 if batch_first else 2, 5, device=device, dtype=dtype)):
            check(rnn, x, h_0, loss)


SIZES = ((1, 1, 1, 1), (1, 7, 2, 3), (9, 1, 1, 17), (5, 3, 40, 1), (20, 9, 40, 33), (6, 13, 31, 65), (4, 2, 5, 130))
if not ON_CPU:
    SIZES += (
        (31, 16, 2, 100),
        (784, 16, 1, 100),
        (20, 32, 1, 200),
        (3, 1, 513, 20),
        (50, 20, 50, 2048),
        (300, 4, 3, 8),
    )


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
# In float32 rounding moves a pre-activation across zero now and then, and gradients differ, rightly.
@DTYPES
def test_sizes(rnn_backend, device, dtype, size):
    seq_len, batch, input_size, hidden = size
    if not fits(rnn_backend, dtype, hidden):
        pytest.skip("more than one Triton program holds")
    rnn = pk.ReLURNN(input_size, hidden, device=device, dtype=dtype)
    x = torch.randn(seq_len, batch, input_size, device=device, dtype=dtype)
    if dtype == F64 or seq_len * batch * hidden < 10_000:
        check(rnn, x, torch.randn(1, batch, hidden, device=device, dtype=dtype))
    else:
        exact = rnn.to_torch().cpu().double()  # no backend that is forced serves it
        error = tolerances.rnn(dtype, seq_len, batch, max(hidden, input_size))
        assert_close(rnn(x)[0], exact(x.cpu().double())[0], error, "y")


@DTYPES
def test_strided_arguments(rnn_backend, device, dtype):
    rnn = pk.ReLURNN(4, 6, 2, device=device, dtype=dtype)
    with torch.no_grad():
        for p in rnn.parameters():
            apart = torch.full([2 * n for n in reversed(p.shape)], torch.nan, device=device, dtype=dtype)
            view = apart[tuple(slice(1, None, 2) for _ in p.shape)]
            p.set_((view.T if p.dim() == 2 else view).copy_(p))
    wide = torch.randn(10, 14, 12, device=device, dtype=dtype)
    for x in (wide[::2, 1::5, ::3], wide.permute(1, 2, 0)[:5, :3, :4], wide[:5, :1, :4].expand(5, 3, 4)):
        check(rnn, x, torch.randn(6, 3, 2, device=device, dtype=dtype).permute(2, 1, 0))


@pytest.mark.parametrize("h_0, bias", ((False, False), (True, True)))
def test_gradcheck_and_opcheck(rnn_backend, device, h_0, bias):
    def tensor(*shape):
        return torch.randn(shape, dtype=F64, device=device).div_(shape[-1] ** 0.5).requires_grad_()

    call = [tensor(4, 3, 2), tensor(3, 5) if h_0 else None, tensor(5, 2), tensor(5, 5)]
    call += [tensor(5), tensor(5)] if bias else [None, None]
    assert torch.autograd.gradcheck(ops.relu_rnn, call)
    if rnn_backend == "cuda":
        torch.library.opcheck(torch.ops.pathrnn.relu_rnn, call)
        y, h_n = ops.relu_rnn(*call)
        plain = [None if t is None else t.detach() for t in call]
        for grads in (
            (torch.ones_like(y), None),
            (None, torch.ones_like(h_n)),
            (torch.ones_like(y), torch.ones_like(h_n)),
        ):
            for needs in ([True] * 5, [False, False, True, True, False]):
                backward = (*(None if g is None else g.detach() for g in grads), *plain, y.detach(), needs)
                torch.library.opcheck(torch.ops.pathrnn.relu_rnn_backward, backward)


def test_backward_twice(rnn_backend, device):
    """cuDNN's backward pass writes into what the forward pass kept."""
    rnn = pk.ReLURNN(3, 9, device=device, dtype=F64)
    y, _ = rnn(torch.randn(6, 2, 3, device=device, dtype=F64))
    loss = y.square().sum()
    first = torch.autograd.grad(loss, list(rnn.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(rnn.parameters()))
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, tolerances.rnn(F64, 6, 2, 9))


def test_double_backward(rnn_backend, device):
    def curvature(rnn, x):
        (slope,) = torch.autograd.grad(rnn(x)[0].square().sum(), rnn.weight_ih_l0, create_graph=True)
        penalty = slope.square().sum() + rnn.weight_hh_l0.square().sum()
        return torch.autograd.grad(penalty, rnn.weight_hh_l0)[0].cpu()

    rnn = pk.ReLURNN(3, 9, device=device, dtype=F64)
    x = torch.randn(6, 2, 3, device=device, dtype=F64)
    if rnn_backend == "triton":
        with pytest.raises(RuntimeError, match="relu_rnn_backward"):
            curvature(rnn, x)
    else:
        assert_close(curvature(rnn, x), curvature(rnn.to_torch().cpu(), x.cpu()), 4 * tolerances.rnn(F64, 6, 2, 9))


@pytest.mark.parametrize("layers", (1, 2))
def test_compiles_without_a_graph_break(rnn_backend, device, layers):
    rnn = pk.ReLURNN(3, 9, layers, device=device, dtype=F64)
    torch._dynamo.reset()
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager" if ON_CPU else "inductor")
    for seq_len in (6, 8):
        x = torch.randn(seq_len, 2, 3, device=device, dtype=F64)
        h_0 = torch.randn(layers, 2, 9, device=device, dtype=F64)
        expected, found = outcome(rnn, x, h_0), outcome(compiled, x, h_0)
        for (name, truth), value in zip(expected.items(), found.values(), strict=True):
            assert_close(value, truth, layers * tolerances.rnn(F64, seq_len, 2, 9), name)


def test_inference_and_frozen_weights(rnn_backend, device):
    rnn = pk.ReLURNN(3, 9, device=device, dtype=F64)
    x = torch.randn(6, 2, 3, device=device, dtype=F64)
    expected = rnn(x)[0].detach()
    error = tolerances.rnn(F64, 6, 2, 9)
    with torch.inference_mode():
        assert_close(rnn(x)[0], expected, error)
    with torch.no_grad():
        assert_close(rnn(x)[0], expected, error)
    names = [name for name, _ in rnn.named_parameters()]
    truth = outcome(rnn, x, None)
    for name in names:
        rnn.requires_grad_(False)
        getattr(rnn, name).requires_grad_()
        rnn.zero_grad()
        found = outcome(rnn, x, None)
        assert_close(found[name], truth[name], error, name)
        assert all(found[other] is None for other in names if other != name)
        rnn.requires_grad_()


def test_autocast(rnn_backend, device):
    """y and h_n come in autocast's dtype, gradients in their tensors'; cuDNN also computes in it."""
    rnn = pk.ReLURNN(3, 9, device=device)
    x = torch.randn(6, 2, 3, device=device)
    expected = outcome(rnn, x, None)
    with torch.autocast(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        found = outcome(rnn, x, None)
    for name, truth in expected.items():
        assert found[name].dtype == (dtype if name in ("y", "h_n") else F32)
        # Rounded in every one of few steps at most: the error of a computation in that dtype.
        assert_close(found[name].float(), truth, tolerances.rnn(dtype, 6, 2, 9), name)


@pytest.mark.parametrize("lengths", (None, [6, 1, 4]), ids=("whole", "lengths"))
@pytest.mark.parametrize("dtype", (F32, F64, torch.bfloat16, torch.float16))
def test_sequences_and_precision(device, dtype, lengths):
    """Both directions, by any backend, against the CPU in float64."""
    rnn = pk.ReLURNN(3, 9, 2, bidirectional=True, device=device, dtype=dtype)
    x, h_0 = torch.randn(6, 3, 3, device=device, dtype=dtype), torch.randn(4, 3, 9, device=device, dtype=dtype)
    truth = copy.deepcopy(rnn).double().cpu()(x.double().cpu(), h_0.double().cpu(), lengths)
    for found, expected in zip(rnn(x, h_0, lengths), truth, strict=True):
        assert found.dtype == dtype
        assert_close(found.double().cpu(), expected, 2 * tolerances.rnn(dtype, 6, 3, 18))


NAMES = ("x", "h_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_mixed_devices_are_refused(rnn_backend, device, name):
    call = [torch.ones(s, device=device) for s in ((4, 3, 2), (3, 5), (5, 2), (5, 5), (5,), (5,))]
    call[NAMES.index(name)] = call[NAMES.index(name)].cpu()
    if name == "x":  # which tensor would be the wrong one?
        with pytest.raises(ValueError, match=f"'{rnn_backend}' does not serve this call: the tensors are on cpu"):
            ops.relu_rnn(*call)
    else:
        with pytest.raises(TypeError, match=rf"{name} (is|has) .*on cpu"):
            ops.relu_rnn(*call)


def test_mixed_devices_of_the_module(device):
    rnn = pk.ReLURNN(2, 5, device=device)
    with pytest.raises(TypeError, match=f"x is on {OTHER}"):
        rnn(torch.ones(4, 3, 2, device=OTHER))
    with pytest.raises(TypeError, match=f"h_0 is on {OTHER}"):
        rnn(torch.ones(4, 3, 2, device=device), torch.ones(1, 3, 5, device=OTHER))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.int32))
def test_other_dtypes_are_refused(rnn_backend, device, dtype):
    if rnn_backend == "cuda" and not ON_CPU and dtype != torch.int32:
        pytest.skip("cuDNN serves half precision")
    call = [torch.ones(s, device=device, dtype=dtype) for s in ((4, 3, 2), (3, 5), (5, 2), (5, 5))]
    with pytest.raises(ValueError, match=f"the tensors are {dtype}"):
        ops.relu_rnn(*call, backend=rnn_backend)


def test_what_one_program_cannot_hold_is_refused_or_routed(device):
    from pathrnn_kernels.ops.triton.relu_rnn import limit

    hidden = limit(F64) + 1
    call = [torch.ones(s, device=device, dtype=F64) for s in ((4, 3, 2), (3, hidden), (hidden, 2), (hidden, hidden))]
    with pytest.raises(ValueError, match=f"'triton' does not serve this call: hidden_size is {hidden}"):
        ops.relu_rnn(*call, backend="triton")
    assert ops.relu_rnn(*call)[0].shape == (4, 3, hidden)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own, which it records once to hold memory
def test_compiled_into_cuda_graphs(rnn_backend, device):
    """mode="reduce-overhead" warms up, records and then replays."""
    rnn = pk.ReLURNN(3, 40, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(rnn, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(12, 4, 3, device=device)
        expected, found = outcome(rnn, x, None), outcome(compiled, x, None)
        for (name, truth), value in zip(expected.items(), found.values(), strict=True):
            assert_close(value, truth, tolerances.rnn(F32, 12, 4, 40), name)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # torch records on another one
def test_graph_capture(rnn_backend, device):
    plain = pk.ReLURNN(3, 40, device=device)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(plain), (torch.randn(12, 4, 3, device=device),))
    for _ in range(2):
        x = torch.randn(12, 4, 3, device=device)
        expected, found = outcome(plain, x, None), outcome(graphed, x, None)
        for name, truth in expected.items():
            if name != "x":  # the sample input needed no gradient
                assert_close(found[name], truth, tolerances.rnn(F32, 12, 4, 40), name)
