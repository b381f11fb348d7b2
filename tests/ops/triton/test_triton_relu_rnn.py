"""relu_rnn in Triton against the definition and torch.nn.RNN."""

import math

import pytest
import tolerances
import torch
from torch import nn

from pathrnn_kernels import ops, reference
from pathrnn_kernels.ops.triton.relu_rnn import limit, relu_rnn, relu_rnn_backward

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter, about nan and infinity
]

F32, F64 = torch.float32, torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((4, 3, 2, 5), (1, 1, 1, 1), (7, 2, 3, 17), (1, 5, 2, 33), (5, 1, 4, 64))


def arguments(seq_len, batch, input_size, hidden_size, h_0=True, bias=True, dtype=F64, requires_grad=False):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        drawn = torch.randn(shape, generator=generator, dtype=dtype).div_(shape[-1] ** 0.5)
        return drawn.to(DEVICE).requires_grad_(requires_grad)

    return [
        tensor(seq_len, batch, input_size),
        tensor(batch, hidden_size) if h_0 else None,
        tensor(hidden_size, input_size),
        tensor(hidden_size, hidden_size),
        tensor(hidden_size) if bias else None,
        tensor(hidden_size) if bias else None,
    ]


def definition(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):
    h_0 = x.new_zeros(x.shape[1], len(weight_hh)) if h_0 is None else h_0
    y = reference.relu_rnn(x, h_0, weight_ih, weight_hh, None if bias_ih is None else bias_ih + bias_hh)
    return y, y[-1]


def gradients(run, tensors):
    y, h_n = run(*tensors)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    loss = (y * weight).sum() + h_n.square().sum()
    return y, h_n, *torch.autograd.grad(loss, [t for t in tensors if t is not None])


@pytest.mark.parametrize("h_0, bias", ((False, False), (True, True)))
@pytest.mark.parametrize("size", SIZES[:3])
def test_gradcheck(size, h_0, bias):
    assert torch.autograd.gradcheck(relu_rnn, arguments(*size, h_0=h_0, bias=bias, requires_grad=True), fast_mode=True)


def test_backwards_in_time_and_with_lengths():
    """It runs a sequence the other way round; lengths it leaves to others."""
    tensors = arguments(*SIZES[0], requires_grad=True)

    def backwards(x, *others):
        y, h_n = definition(x.flip(0), *others)
        return y.flip(0), h_n

    results = gradients(lambda *t: ops.relu_rnn(*t, backend="triton", reverse=True), tensors)
    for found, truth in zip(results, gradients(backwards, tensors), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=tolerances.rnn(F64, 4, 3, 5) * truth.abs().max().item())
    with pytest.raises(
        ValueError, match="'triton' does not serve this call: lengths are given; it serves sequences of"
    ):
        ops.relu_rnn(*tensors, backend="triton", lengths=torch.tensor([4, 2, 1]))
    assert ops.relu_rnn(*tensors, lengths=torch.tensor([4, 2, 1]))[0].shape == (4, 3, 5)


@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize("h_0, bias", ((False, False), (True, True)))
@pytest.mark.parametrize("size", (*SIZES, (3, 2, 5, 100)))
def test_against_the_definition(size, h_0, bias, dtype):
    if size[3] > limit(dtype):
        size = (*size[:3], limit(dtype))
    tensors = arguments(*size, h_0, bias, dtype, requires_grad=True)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    again = gradients(relu_rnn, tensors)
    for found, truth, repeat in zip(gradients(relu_rnn, tensors), gradients(definition, wide), again, strict=True):
        error = tolerances.rnn(dtype, size[0], size[1], max(size[2:])) * max(truth.abs().max().item(), 1e-30)
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=error)
        assert torch.equal(found, repeat)


def test_against_torch():
    rnn = nn.RNN(3, 20, nonlinearity="relu", dtype=F64, device=DEVICE)
    x, h_0 = torch.randn(6, 2, 3, dtype=F64, device=DEVICE), torch.rand(2, 20, dtype=F64, device=DEVICE)
    y, h_n = relu_rnn(x, h_0, *rnn.parameters())
    truth, last = rnn(x, h_0[None])
    torch.testing.assert_close(y, truth, rtol=0, atol=tolerances.rnn(F64, 6, 2, 20))
    torch.testing.assert_close(h_n, last[0], rtol=0, atol=tolerances.rnn(F64, 6, 2, 20))


@pytest.mark.parametrize("wanted", range(6))
@pytest.mark.parametrize("part", (0, 1))
def test_one_gradient_alone(part, wanted):
    tensors = arguments(4, 3, 2, 5)
    tensors[wanted].requires_grad_()
    found, truth = (
        torch.autograd.grad(f(*tensors)[part].square().sum(), tensors[wanted])[0] for f in (relu_rnn, definition)
    )
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerances.rnn(F64, 4, 3, 5) * truth.abs().max().item())


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_what_is_not_finite_passes_as_in_torch(bad):
    tensors = arguments(5, 2, 2, 17, requires_grad=True)
    with torch.no_grad():
        tensors[0][1, 0, 1] = bad
    for found, truth in zip(gradients(relu_rnn, tensors), gradients(definition, tensors), strict=True):
        torch.testing.assert_close(found.isnan(), truth.isnan())
        torch.testing.assert_close(found, truth, equal_nan=True)


def test_strided_inputs():
    tensors = arguments(4, 3, 2, 5, requires_grad=True)
    strided = [
        t.detach().mT.contiguous().mT if t.dim() > 1 else torch.stack([t.detach()] * 2, 1)[:, 0] for t in tensors
    ]
    strided = [t.requires_grad_() for t in strided]
    assert not any(t.is_contiguous() for t in strided)
    for found, truth in zip(gradients(relu_rnn, strided), gradients(relu_rnn, tensors), strict=True):
        torch.testing.assert_close(found, truth)


def test_double_backward_raises():
    tensors = arguments(4, 3, 2, 5, requires_grad=True)
    first = torch.autograd.grad(relu_rnn(*tensors)[0].square().sum(), tensors, create_graph=True)
    # A term that has a derivative beside it: the missing one must not count as zero without a word.
    with pytest.raises(RuntimeError, match="relu_rnn_backward"):
        (first[0].square().sum() + tensors[2].square().sum()).backward()


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("h_0, bias", ((False, False), (True, True)))
def test_opcheck(h_0, bias, requires_grad):
    torch.library.opcheck(relu_rnn, arguments(2, 1, 2, 3, h_0, bias, requires_grad=requires_grad))


@pytest.mark.parametrize("needs", ([True] * 5, [False] * 5, [True, False, False, True, False]))
def test_opcheck_backward(needs):
    x, h_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments(2, 1, 2, 3)
    y, h_n = relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    for grads in ((torch.ones_like(y), torch.ones_like(h_n)), (None, torch.ones_like(h_n)), (torch.ones_like(y), None)):
        call = (*grads, x, h_0, weight_ih, weight_hh, y, needs)
        torch.library.opcheck(relu_rnn_backward, call)
        for gradient, need in zip(relu_rnn_backward(*call), needs, strict=True):
            assert gradient.isfinite().all() and (gradient.numel() > 0) == need


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_without_graph_breaks(dynamic):
    tensors = arguments(4, 3, 2, 5, requires_grad=True)

    def loss(*tensors):
        y, h_n = relu_rnn(*tensors)
        return y.square().sum() + h_n.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for found, truth in zip(*(torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(found, truth)


BAD = (
    (0, torch.ones(4, 3, dtype=F64), ValueError, r"x has shape \[4, 3\]; it must be \[T, B, I\]"),
    (0, torch.ones(4, 0, 2, dtype=F64), ValueError, "every size at least 1"),
    (0, torch.ones(4, 3, 2, dtype=torch.float16), TypeError, "x has dtype torch.float16; the Triton kernel serves"),
    (1, torch.ones(5, dtype=F64), ValueError, r"h_0 has shape \[5\]; it must be \[3, 5\]"),
    (2, torch.ones(5, 3, dtype=F64), ValueError, "weight_ih has shape"),
    (3, torch.ones(5, 4, dtype=F64), ValueError, r"weight_hh has shape \[5, 4\]; it must be \[5, 5\]"),
    (3, torch.ones(65, 65, dtype=F64), ValueError, "in torch.float64 the Triton kernel .* from 1 to 64"),
    (4, None, ValueError, "give both bias_ih and bias_hh, or neither"),
    (4, torch.ones(4, dtype=F64), ValueError, "bias_ih has shape"),
    (5, torch.ones(5), TypeError, "bias_hh has dtype torch.float32"),
)


@pytest.mark.parametrize("at, value, error, message", BAD)
def test_bad_arguments(at, value, error, message):
    tensors = arguments(4, 3, 2, 5)
    tensors[at] = None if value is None else value.to(DEVICE)
    with pytest.raises(error, match=message):
        relu_rnn(*tensors)


@pytest.mark.parametrize("at", range(7))
def test_bad_arguments_of_backward(at):
    x, h_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments(4, 3, 2, 5)
    y, h_n = relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    good = [torch.ones_like(y), torch.ones_like(h_n), x, h_0, weight_ih, weight_hh, y]
    for bad in (good[at][..., :-1], good[at][:-1], good[at].float(), good[at][None]):
        with pytest.raises((ValueError, TypeError), match=r"has shape|has dtype"):
            relu_rnn_backward(*good[:at], bad, *good[at + 1 :], [True] * 5)


def test_limit():
    assert (limit(F32), limit(F64), limit(torch.float16)) == (128, 64, 0)


def test_autocast_does_not_reach_the_products_inside():
    tensors = arguments(6, 2, 3, 9, dtype=F32, requires_grad=True)
    expected = gradients(relu_rnn, tensors)
    with torch.autocast(DEVICE):
        found = gradients(relu_rnn, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
