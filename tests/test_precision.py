"""ReLURNN in half precision and under autocast, against torch.nn.RNN in float64."""

import pytest
import tolerances
import torch
from rnn_cases import largest, outcome, pair, run
from torch import nn

from pathrnn_kernels import ReLURNN, ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALF = pytest.mark.parametrize("dtype", (BF16, F16), ids=("bfloat16", "float16"))


class Wide:
    """nn.RNN in float64 behind tensors of another dtype."""

    def __init__(self, rnn):
        rnn = rnn.double()
        self.rnn, self.batch_first = rnn, rnn.batch_first
        self.zero_grad, self.named_parameters = rnn.zero_grad, rnn.named_parameters

    def __call__(self, x, h_0):
        y, h_n = self.rnn(x.to(F64), None if h_0 is None else h_0.to(F64))
        dtype = x.data.dtype
        return y.to(dtype), h_n.to(dtype)


def check(theirs, ours, x, h_0=None, **options):
    """Every result is rounded once to x's dtype, and is else as exact as in float32."""
    seq_len, batch, _ = x.shape
    size = max(ours.hidden_size * (1 + ours.bidirectional), ours.input_size)
    error = tolerances.rounded(x.dtype, ours.num_layers * tolerances.rnn(F32, seq_len, batch, size))
    expected, found = outcome(Wide(theirs), x, h_0, **options), outcome(ours, x, h_0, **options)
    for name, truth in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == truth.shape, name
        # The truth's y, h_n and gradients of x and h_0 were rounded as well.
        allowed = (2 * error if truth.dtype == x.dtype else error) * largest(expected, name)
        assert (found[name].double() - truth.double()).abs().max() <= allowed, name


@pytest.mark.parametrize("lengths", (None, [40, 3, 17]), ids=("whole", "lengths"))
@pytest.mark.parametrize("num_layers, bidirectional", ((1, False), (3, False), (2, True)))
@HALF
def test_half_modules(dtype, num_layers, bidirectional, lengths):
    theirs, ours = pair(5, 30, num_layers, bidirectional=bidirectional, dtype=dtype)
    x, h_0 = torch.randn(40, 3, 5, dtype=dtype), torch.randn(num_layers * (1 + bidirectional), 3, 30, dtype=dtype)
    check(theirs, ours, x, h_0, lengths=lengths)
    check(theirs, ours, x, lengths=lengths, packed=lengths is not None)


@HALF
def test_the_state_is_not_rounded(dtype):
    """Each step adds less than half a unit in the last place of what they come to."""
    rnn = ReLURNN(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        for p in rnn.parameters():
            p.fill_(1)
        y, h_n = rnn(torch.full((8192, 1, 1), 2**-11, dtype=dtype))
    assert h_n.item() == 4
    assert torch.equal(y.flatten(), (torch.arange(1, 8193) * 2**-11).to(dtype))


@HALF
def test_one_seed_one_initialisation(dtype):
    torch.manual_seed(3)
    theirs = nn.RNN(4, 5, 2, "relu", dtype=dtype)
    torch.manual_seed(3)
    ours = ReLURNN(4, 5, 2, dtype=dtype)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert {p.dtype for p in ours.to_torch().parameters()} == {dtype}
    assert {p.dtype for p in ReLURNN(4, 5).to(dtype).parameters()} == {dtype}


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("h_0_dtype", (None, F32, "autocast"))
@pytest.mark.parametrize("x_dtype", (F32, "autocast"))
@pytest.mark.parametrize("lengths", (None, [6, 2, 4]), ids=("whole", "lengths"))
@HALF
def test_autocast_is_float32_with_its_results_rounded(dtype, lengths, x_dtype, h_0_dtype):
    rnn = ReLURNN(3, 9, 2, bidirectional=True)
    x = torch.randn(6, 3, 3).to(dtype)
    h_0 = None if h_0_dtype is None else torch.randn(4, 3, 9).to(dtype)

    def converted(x, h_0, lengths):
        return tuple(t.to(dtype) for t in rnn(x.float(), None if h_0 is None else h_0.float(), lengths))

    results = []
    for function in (converted, rnn):
        arguments = [x.float() if x_dtype == F32 else x, h_0 if h_0_dtype != F32 else h_0.float()]
        arguments = [None if t is None else t.detach().clone().requires_grad_() for t in arguments]
        rnn.zero_grad()
        if function is rnn:
            with autocast(dtype):
                y, h_n = rnn(*arguments, lengths)
        else:
            y, h_n = function(*arguments, lengths)
        assert y.dtype == h_n.dtype == dtype
        (y.float().square().sum() + h_n.float().sum()).backward()
        given = [t for t in arguments if t is not None]
        assert all(t.grad.dtype == t.dtype for t in given)
        results.append([y, h_n, *[t.grad for t in given], *[p.grad for p in rnn.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@HALF
def test_autocast_gives_the_dtype_that_torch_gives(dtype):
    theirs, ours = pair(3, 9)
    for x in (torch.randn(6, 2, 3), torch.randn(6, 2, 3, dtype=dtype)):
        with autocast(dtype):
            expected, found = theirs(x), ours(x)
        assert [t.dtype for t in found] == [t.dtype for t in expected] == [dtype, dtype]


def test_autocast_of_other_modules():
    x = torch.randn(6, 2, 3, dtype=F64)
    with autocast(BF16):
        rnn = ReLURNN(3, 9, dtype=F64)
        assert [t.dtype for t in rnn(x)] == [F64, F64]
        with pytest.raises(TypeError, match="x has dtype torch.bfloat16, but the weights are torch.float64"):
            rnn(x.to(BF16))
        assert ReLURNN(3, 9, dtype=F16)(x.to(F16))[0].dtype == BF16
        with pytest.raises(TypeError, match="x has dtype torch.float64, but the weights are torch.float32"):
            ReLURNN(3, 9)(x)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_autocast_reaches_no_backend(monkeypatch, backend):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    rnn, x = ReLURNN(3, 30), torch.randn(20, 2, 3)
    for lengths in (None, [20, 7]):
        expected = outcome(rnn, x, None, lengths=lengths)
        with autocast(BF16):
            assert torch.equal(run(rnn, x, None, lengths)[0], expected["y"].to(BF16))


@pytest.mark.parametrize("under_autocast", (False, True))
def test_compile_without_graph_breaks(under_autocast):
    rnn = ReLURNN(3, 5, 2, dtype=F32 if under_autocast else BF16)
    x = torch.randn(4, 2, 3, dtype=BF16)

    def loss(x):
        with torch.autocast("cpu", BF16, enabled=under_autocast):
            y, h_n = rnn(x)
        return y.float().square().mean() + h_n.float().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        rnn.zero_grad()
        value = function(x)
        value.backward()
        gradients.append([value.detach(), *[p.grad for p in rnn.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@HALF
def test_states_of_another_dtype(dtype):
    rnn, x = ReLURNN(3, 9, dtype=dtype), torch.randn(6, 2, 3, dtype=dtype)
    with pytest.raises(TypeError, match=f"h_0 has dtype torch.float32, but the weights are {dtype}"):
        rnn(x, torch.zeros(1, 2, 9))
    with pytest.raises(TypeError, match=f"h_0 has dtype {dtype}, but the weights are torch.float32"):
        ReLURNN(3, 9)(x.float(), torch.zeros(1, 2, 9, dtype=dtype))


def test_where_half_precision_is_computed_in(monkeypatch):
    """On the CPU in float32; on a GPU natively where cuDNN, its version and the GPU serve it."""
    gpu = torch.device("cuda", 0)
    monkeypatch.delenv("PATHRNN_BACKEND", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for version, capability, native in ((91300, (8, 0), True), (91200, (8, 0), False), (91300, (7, 5), False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert ops.working_dtype(gpu, BF16) == (BF16 if native else F32)
        assert ops.working_dtype(gpu, F16) == F16
    for name in ("triton", "reference"):
        monkeypatch.setenv("PATHRNN_BACKEND", name)
        assert ops.working_dtype(gpu, F16) == F32
    for dtype in (F32, F64):
        assert ops.working_dtype(gpu, dtype) == dtype
    assert ops.working_dtype(torch.device("cpu"), BF16) == F32
