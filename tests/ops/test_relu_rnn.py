"""The relu_rnn and relu_rnn_backward operators themselves; parity with torch.nn.RNN is in test_rnn.py."""

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathrnn_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64


def arguments(seq_len=4, batch=3, input_size=2, hidden_size=5, h_0=True, bias=True, dtype=F64, requires_grad=False):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_(requires_grad)

    return [
        tensor(seq_len, batch, input_size),
        tensor(batch, hidden_size) if h_0 else None,
        tensor(hidden_size, input_size),
        tensor(hidden_size, hidden_size),
        tensor(hidden_size) if bias else None,
        tensor(hidden_size) if bias else None,
    ]


def expected(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):
    h_0 = x.new_zeros(x.shape[1], len(weight_hh)) if h_0 is None else h_0
    y = reference.relu_rnn(x, h_0, weight_ih, weight_hh, None if bias_ih is None else bias_ih + bias_hh)
    return y, y[-1]


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("h_0", (False, True))
@pytest.mark.parametrize("size", ((4, 3, 2, 5), (1, 1, 1, 1), (3, 7, 2, 17)))
def test_gradcheck(size, h_0, bias):
    assert torch.autograd.gradcheck(ops.relu_rnn, arguments(*size, h_0=h_0, bias=bias, requires_grad=True))


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone(wanted):
    """Nothing else is computed then, whatever the plan."""
    for size in ((4, 3, 2, 5), (4, 20, 3, 20), (2, 3, 4, 530)):
        tensors = arguments(*size)
        tensors[wanted].requires_grad_()
        found, truth = (
            torch.autograd.grad(f(*tensors)[0].square().sum(), tensors[wanted])[0] for f in (ops.relu_rnn, expected)
        )
        error = tolerances.rnn(F64, size[0], size[1], max(size[2:])) * truth.abs().max()
        torch.testing.assert_close(found, truth, rtol=0, atol=error.item())


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("h_0", (False, True))
@pytest.mark.parametrize("size", ((4, 3, 2, 5), (1, 1, 1, 1), (3, 7, 2, 17)))
def test_gradgradcheck(size, h_0, bias):
    tensors = arguments(*size, h_0=h_0, bias=bias, requires_grad=True)
    for part in (0, 1, slice(2)):
        assert torch.autograd.gradgradcheck(lambda *t, part=part: ops.relu_rnn(*t)[part], tensors, fast_mode=True)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("lengths", (None, (2, 4, 1)))
def test_gradgradcheck_of_sequences(lengths, reverse):
    lengths = None if lengths is None else torch.tensor(lengths)
    tensors = arguments(requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *t: ops.relu_rnn(*t, lengths=lengths, reverse=reverse), tensors, fast_mode=True
    )


def test_the_differentiable_gradients_are_the_kernels():
    tensors = arguments(requires_grad=True)
    loss = sum(part.square().sum() for part in ops.relu_rnn(*tensors))
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    for found, kernel in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        torch.testing.assert_close(found, kernel, rtol=0, atol=tolerances.rnn(F64, 4, 3, 5) * kernel.abs().max().item())
        assert found.requires_grad and not kernel.requires_grad


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("h_0, bias", ((False, False), (True, True)))
def test_opcheck(h_0, bias, requires_grad):
    torch.library.opcheck(torch.ops.pathrnn.relu_rnn, arguments(h_0=h_0, bias=bias, requires_grad=requires_grad))


@pytest.mark.parametrize(
    "needs", ([True] * 5, [False] * 5, [False, False, True, True, True], [True, False, False, True, False])
)
def test_opcheck_backward(needs):
    x, h_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments(batch=20)
    y, h_n = ops.relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    for grads in ((torch.ones_like(y), torch.ones_like(h_n)), (None, torch.ones_like(h_n)), (torch.ones_like(y), None)):
        call = (*grads, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y, needs)
        torch.library.opcheck(torch.ops.pathrnn.relu_rnn_backward, call)
        for gradient, need in zip(torch.ops.pathrnn.relu_rnn_backward(*call), needs, strict=True):
            assert gradient.isfinite().all() and (gradient.numel() > 0) == need


# (lengths, reverse, whether x is packed)
SEQUENCES = pytest.mark.parametrize(
    "lengths, reverse, packed",
    (
        (None, True, False),
        ((2, 4, 1), False, False),
        ((2, 4, 1), True, False),
        ((3, 3, 2), True, False),
        ((4, 2, 2), False, True),
        ((4, 2, 2), True, True),
    ),
    ids=("reverse", "lengths", "lengths-reverse", "short", "packed", "packed-reverse"),
)


def sequences(lengths, reverse, packed, **options):
    """Arguments of the operator, and which of x's rows it reads."""
    tensors, lengths = arguments(**options), None if lengths is None else torch.tensor(lengths)
    if lengths is None:
        return [*tensors, None, reverse], slice(None)
    if packed:
        data = tensors[0].detach().flatten(0, 1)[: int(lengths.sum())].clone()
        tensors[0] = data.requires_grad_(tensors[0].requires_grad)
        return [*tensors, lengths, reverse], slice(None)
    return [*tensors, lengths, reverse], torch.arange(4)[:, None] < lengths


def with_sequences(*call, backend="auto"):
    *tensors, lengths, reverse = call
    return ops.relu_rnn(*tensors, backend=backend, lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("h_0, bias", ((False, False), (True, True)))
@SEQUENCES
def test_gradcheck_of_sequences(lengths, reverse, packed, h_0, bias):
    call, _ = sequences(lengths, reverse, packed, h_0=h_0, bias=bias, requires_grad=True)
    assert torch.autograd.gradcheck(with_sequences, call)


@SEQUENCES
def test_opcheck_of_sequences(lengths, reverse, packed):
    for requires_grad in (False, True):
        call, _ = sequences(lengths, reverse, packed, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.pathrnn.relu_rnn, call)
    call, _ = sequences(lengths, reverse, packed)
    y, h_n = with_sequences(*call)
    for needs in ([True] * 5, [False, True, False, True, False]):
        backward = (torch.ones_like(y), torch.ones_like(h_n), *call[:6], y, needs, *call[6:])
        torch.library.opcheck(torch.ops.pathrnn.relu_rnn_backward, backward)


@SEQUENCES
def test_sequences_through_the_reference(lengths, reverse, packed):
    """A loop of torch operations over the active rows, which serves what no kernel does."""
    results = []
    for backend in ("cpu", "reference"):
        call, read = sequences(lengths, reverse, packed, requires_grad=True)
        with torch.no_grad():
            padding = torch.ones(call[0].shape[:-1], dtype=torch.bool)
            padding[read] = False
            call[0][padding] = torch.nan
        y, h_n = with_sequences(*call, backend=backend)
        weights = torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y)
        ((y * weights).sum() + h_n.square().sum()).backward()
        assert (call[0].grad[padding] == 0).all() and (y[padding] == 0).all()
        results.append([y, h_n, *[t.grad for t in call[:6]]])
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=tolerances.rnn(F64, 4, 3, 5) * truth.abs().max().item())


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("lengths, message", (((5, 1, 1), r"lengths\[0\] is 5"), ((4, 0, 1), r"lengths\[1\] is 0")))
def test_lengths_out_of_range(backend, lengths, message):
    with pytest.raises(ValueError, match=message + "; it must be from 1 to 4, the steps of x"):
        with_sequences(*arguments(), torch.tensor(lengths), False, backend=backend)


@pytest.mark.parametrize(
    "lengths, error, message",
    (
        ((2, 4, 2), ValueError, r"lengths\[1\] is 4; it must be from 1 to 2: packed rows come longest sequence first"),
        ((4, 2, 1), ValueError, "lengths add up to 7, but x has 8 rows"),
        ((9,), ValueError, r"lengths\[0\] is 9; it must be from 1 to 8"),
        ((4.0, 2.0, 2.0), TypeError, "lengths has dtype Float; it must be of integers"),
        (((4, 2, 2),), ValueError, r"lengths has shape \[1, 3\]"),
    ),
)
def test_bad_lengths_of_packed_rows(lengths, error, message):
    call, _ = sequences((4, 2, 2), False, True)
    with pytest.raises(error, match=message):
        with_sequences(*call[:6], torch.tensor(lengths), False)
    with pytest.raises(ValueError, match=r"x has shape \[8, 2\]; it must be \[T, B, I\], or with lengths \[N, I\]"):
        with_sequences(*call[:6], None, False)


@pytest.mark.parametrize("lengths", ((2, 4, 2), (4, 2, 1), (9,)))
def test_bad_lengths_of_packed_rows_in_the_reference(lengths):
    call, _ = sequences((4, 2, 2), False, True)
    with pytest.raises(ValueError, match="for 8 packed rows they must add up to that, the longest first"):
        with_sequences(*call[:6], torch.tensor(lengths), False, backend="reference")


def test_inputs_are_left_alone():
    tensors = arguments(batch=20, requires_grad=True)
    copies = [t.detach().clone() for t in tensors]
    ops.relu_rnn(*tensors)[0].square().sum().backward()
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


NAMES = ("x", "h_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
BAD_SHAPES = {
    "x": ((4, 3), (4, 3, 7), (0, 3, 2), (4, 3, 0), ()),
    "h_0": ((3, 4), (1, 5), (5,), (1, 3, 5), ()),
    "weight_ih": ((5, 3), (2, 5), (5,), (1, 2)),
    "weight_hh": ((5, 4), (4, 4), (0, 0), (5,), ()),
    "bias_ih": ((4,), (1,), (1, 5), ()),
    "bias_hh": ((4,), (1,), (1, 5), ()),
}


@pytest.mark.parametrize("name, shape", [(name, shape) for name, shapes in BAD_SHAPES.items() for shape in shapes])
def test_bad_shapes(name, shape):
    tensors = arguments()
    tensors[NAMES.index(name)] = torch.ones(shape, dtype=F64)
    with pytest.raises(ValueError, match=r"has shape \[|and weight_hh \["):
        ops.relu_rnn(*tensors)


@pytest.mark.parametrize("name", NAMES)
def test_bad_dtypes_and_devices(name):
    at = NAMES.index(name)
    for dtype in (F32, torch.float16, torch.int64, torch.complex128):
        tensors = arguments()
        tensors[at] = tensors[at].to(dtype)
        with pytest.raises((ValueError, TypeError), match=r"has dtype|serve"):
            ops.relu_rnn(*tensors)
    tensors = arguments()
    tensors[at] = tensors[at].to("meta")
    with pytest.raises((ValueError, TypeError, RuntimeError), match="meta"):
        ops.relu_rnn(*tensors)


def test_one_bias_alone():
    for missing in (4, 5):
        tensors = arguments()
        tensors[missing] = None
        with pytest.raises(ValueError, match="give both bias_ih and bias_hh, or neither"):
            ops.relu_rnn(*tensors)


@pytest.mark.parametrize("at", range(9))
def test_bad_arguments_of_backward(at):
    x, h_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments()
    y, h_n = ops.relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    good = [torch.ones_like(y), torch.ones_like(h_n), x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y]
    for bad in (good[at][..., :-1], good[at][:-1], good[at].float(), good[at][None]):
        call = [*good[:at], bad, *good[at + 1 :], [True] * 5]
        with pytest.raises((ValueError, TypeError), match=r"has shape|has dtype"):
            torch.ops.pathrnn.relu_rnn_backward(*call)


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.builds(torch.ones, shapes, dtype=st.sampled_from((F32, F64, torch.float16, torch.int32, torch.bool)))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), tensors)), min_size=1, max_size=3))
def test_fuzz(changes):
    call = arguments()
    for at, value in changes:
        call[at] = value
    try:
        found = ops.relu_rnn(*call)
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return
    for got, truth in zip(found, expected(*call), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 8), st.one_of(st.none(), tensors)), min_size=1, max_size=3))
def test_fuzz_backward(changes):
    x, h_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments()
    y, h_n = ops.relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    call = [torch.ones_like(y), torch.ones_like(h_n), x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y]
    for at, value in changes:
        call[at] = value
    try:
        found = torch.ops.pathrnn.relu_rnn_backward(*call, [True] * 5)
    except (ValueError, TypeError, RuntimeError):
        return
    x, h_0, weight_ih, weight_hh = call[2:6]
    shapes = (x.shape, (x.shape[1], len(weight_hh)), weight_ih.shape, weight_hh.shape, (len(weight_hh),))
    assert [g.shape for g in found] == [torch.Size(s) for s in shapes]
    assert all(g.isfinite().all() for g in found)
