"""Directions, lengths, PackedSequences and states passed on: ReLURNN against torch.nn.RNN."""

import math

import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from rnn_cases import DTYPES, assert_close, check, outcome, pair
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from pathrnn_kernels import ReLURNN

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
BOTH_DIRECTIONS = pytest.mark.parametrize("bidirectional", (False, True), ids=("one-way", "both-ways"))


# Two directions.


@pytest.mark.parametrize("loss", (("y",), ("h_n",), ("y", "h_n")), ids="+".join)
@pytest.mark.parametrize("batch_first, unbatched", ((False, False), (True, False), (False, True)))
@pytest.mark.parametrize("num_layers, bias", ((1, False), (1, True), (3, True)))
@DTYPES
def test_both_directions(dtype, num_layers, bias, batch_first, unbatched, loss):
    theirs, ours = pair(3, 5, num_layers, bias=bias, batch_first=batch_first, bidirectional=True, dtype=dtype)
    shape = (7,) if unbatched else (2, 7) if batch_first else (7, 2)
    x = torch.randn(*shape, 3, dtype=dtype)
    for h_0 in (None, torch.randn(2 * num_layers, *(() if unbatched else (2,)), 5, dtype=dtype)):
        check(theirs, ours, x, h_0, loss)


SIZES = (
    # seq_len, batch, input_size, hidden_size
    (1, 1, 1, 1),
    (1, 7, 2, 3),
    (2, 70, 3, 1),
    (9, 1, 1, 17),
    (20, 9, 40, 33),
    (17, 16, 2, 100),
    (3, 1, 513, 20),
    (3, 40, 530, 16),
    (4, 3, 3, 513),
    (3, 5, 700, 530),
    (300, 8, 3, 8),
)


@pytest.mark.every_isa
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sizes(size, threads):
    seq_len, batch, input_size, hidden_size = size
    theirs, ours = pair(input_size, hidden_size, bidirectional=True)
    x, h_0 = torch.randn(seq_len, batch, input_size), torch.randn(2, batch, hidden_size)
    check(theirs, ours, x, h_0)
    lengths = torch.randint(1, seq_len + 1, (batch,))
    for packed in (False, True):
        check(theirs, ours, x, h_0, lengths=lengths, packed=packed)
    check(theirs, ours, x, loss=("h_n",), lengths=lengths)


def test_one_seed_one_initialisation():
    for options in ({}, {"num_layers": 2, "bias": False}):
        torch.manual_seed(3)
        theirs = nn.RNN(4, 5, nonlinearity="relu", bidirectional=True, **options)
        torch.manual_seed(3)
        ours = ReLURNN(4, 5, bidirectional=True, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_conversions():
    theirs = nn.RNN(4, 5, 2, "relu", bidirectional=True)
    ours = ReLURNN.from_torch(theirs)
    assert repr(ours) == "ReLURNN(4, 5, num_layers=2, bidirectional=True)"
    back = ours.to_torch()
    assert ours.bidirectional and back.bidirectional
    for rnn in (ours, back):
        assert all(torch.equal(p, q) for p, q in zip(rnn.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(ReLURNN(4, 5, 2, bidirectional=True).state_dict())


# Lengths.


@pytest.mark.parametrize(
    "lengths",
    ((7, 6, 4, 1), (1, 4, 6, 7), (3, 7, 1, 7), (2, 5, 5, 3), (1, 1, 1, 1)),
    ids=lambda n: "".join(map(str, n)),
)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("num_layers, bias, batch_first", ((1, False, False), (2, True, True)))
@BOTH_DIRECTIONS
def test_lengths(bidirectional, num_layers, bias, batch_first, packed, lengths):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    theirs, ours = pair(3, 5, num_layers, dtype=F64, **options)
    x = torch.randn(*((4, 7) if batch_first else (7, 4)), 3, dtype=F64)
    for h_0 in (None, torch.randn(num_layers * (1 + bidirectional), 4, 5, dtype=F64)):
        for loss in (("y", "h_n"), ("y",), ("h_n",)):
            check(theirs, ours, x, h_0, loss, lengths=lengths, packed=packed)
    assert ours.last_seq_len == max(lengths)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), *[st.integers(1, n) for n in (40, 60)], st.booleans())
def test_any_lengths(lengths, input_size, hidden_size, bidirectional):
    theirs, ours = pair(input_size, hidden_size, bidirectional=bidirectional)
    x, h_0 = torch.randn(12, len(lengths), input_size), torch.randn(1 + bidirectional, len(lengths), hidden_size)
    check(theirs, ours, x, h_0, lengths=lengths)


def test_lengths_that_leave_nothing_out_change_nothing():
    rnn, x = ReLURNN(3, 20, bidirectional=True), torch.randn(6, 4, 3)
    dense = outcome(rnn, x, None)
    ragged = outcome(rnn, x, None, lengths=[6] * 4)
    assert all(torch.equal(dense[name], ragged[name]) for name in dense)


def test_every_kind_of_lengths():
    rnn, x, numbers = ReLURNN(3, 5), torch.randn(6, 4, 3), [3, 6, 1, 2]
    y, _ = rnn(x, lengths=numbers)
    integers = [torch.tensor(numbers, dtype=d) for d in (torch.int64, torch.int16, torch.uint8, torch.uint16)]
    for lengths in (tuple(numbers), *integers, torch.tensor(numbers).repeat_interleave(2)[::2]):
        assert torch.equal(rnn(x, lengths=lengths)[0], y)
    for lengths in ([], (), torch.tensor([], dtype=torch.int64)):
        assert rnn(x[:, :0], lengths=lengths)[0].shape == (6, 0, 5)


@pytest.mark.parametrize("value", (0.0, 1e30, math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("batch_first", (False, True))
def test_padding_is_not_read(batch_first, value):
    lengths = torch.tensor([2, 6, 5, 1])
    rnn = ReLURNN(3, 20, 2, bidirectional=True, batch_first=batch_first)
    x, h_0 = torch.randn(4, 6, 3) if batch_first else torch.randn(6, 4, 3), torch.randn(4, 4, 20)
    padding = torch.arange(6) >= lengths[:, None]
    padding = padding if batch_first else padding.T
    clean = outcome(rnn, x, h_0, lengths=lengths)
    x[padding] = value
    found = outcome(rnn, x, h_0, lengths=lengths)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert (found["y"][padding] == 0).all() and (found["x"][padding] == 0).all()
    assert found["x"][~padding].abs().min() > 0


# PackedSequences.


@pytest.mark.parametrize("is_sorted", (True, False))
@BOTH_DIRECTIONS
def test_packed_sequences(bidirectional, is_sorted):
    theirs, ours = pair(3, 5, 2, dtype=F64, bidirectional=bidirectional)
    lengths = (6, 4, 4, 1) if is_sorted else (4, 1, 6, 4)
    x = pack_sequence([torch.randn(n, 3, dtype=F64) for n in lengths], enforce_sorted=is_sorted)
    h_0 = torch.randn(2 * (1 + bidirectional), 4, 5, dtype=F64)
    for state in (None, h_0):
        (expected, expected_h_n), (found, h_n) = theirs(x, state), ours(x, state)
        assert isinstance(found, PackedSequence)
        for ours_part, theirs_part in zip(found[1:], expected[1:], strict=True):
            assert ours_part is theirs_part or torch.equal(ours_part, theirs_part)
        error = 2 * tolerances.rnn(F64, 6, 4, 10)
        assert_close(found.data, expected.data, error)
        assert_close(h_n, expected_h_n, error)
    assert ours.last_seq_len == 6


def test_lengths_may_change_before_the_backward_pass():
    rnn, lengths = ReLURNN(3, 4), torch.tensor([5, 3])
    x, gradients = torch.ones(5, 2, 3), []
    for change in (False, True):
        rnn.zero_grad()
        loss = rnn(x, lengths=lengths)[1].sum()
        if change:
            lengths.fill_(1)  # as a loader that fills one array for every batch
        loss.backward()
        gradients.append(rnn.weight_hh_l0.grad.clone())
    assert torch.equal(*gradients)


def test_a_packed_sequence_takes_no_memory_for_what_it_leaves_out():
    steps = 200_000
    batch_sizes = torch.ones(steps, dtype=torch.int64)
    batch_sizes[0] = steps  # a table of whether a step has a row would take 40 GB
    x = PackedSequence(torch.ones(2 * steps - 1, 1), batch_sizes)
    with torch.no_grad():
        y, h_n = ReLURNN(1, 2)(x)
    assert y.data.shape == (2 * steps - 1, 2) and h_n.shape == (1, steps, 2)


def test_lengths_of_tensors_without_numbers():
    with FakeTensorMode():
        y, h_n = ReLURNN(3, 4)(torch.randn(5, 2, 3), lengths=[3, 4])
    assert (y.shape, h_n.shape) == ((5, 2, 4), (1, 2, 4))


def test_packed_is_padded_bit_for_bit():
    rnn, lengths = ReLURNN(3, 20, 2, bidirectional=True), torch.tensor([2, 6, 5, 1])
    x, h_0 = torch.randn(6, 4, 3), torch.randn(4, 4, 20)
    padded, packed = (outcome(rnn, x, h_0, lengths=lengths, packed=packed) for packed in (False, True))
    assert all(torch.equal(padded[name], packed[name]) for name in padded)


@BOTH_DIRECTIONS
def test_dropout_between_layers_of_packed_sequences(bidirectional):
    theirs, ours = pair(3, 5, 3, dropout=0.5, bidirectional=bidirectional)
    x = pack_sequence([torch.randn(n, 3) for n in (6, 4, 1)])
    results = []
    for rnn in (theirs, ours):
        torch.manual_seed(7)
        results.append(rnn(x)[0].data)
    assert_close(results[1], results[0], 3 * tolerances.rnn(F32, 6, 3, 10))


# The state passed on.


@pytest.mark.parametrize("num_layers", (1, 2))
def test_two_halves_are_one_whole(num_layers):
    rnn, x = ReLURNN(3, 20, num_layers), torch.randn(40, 4, 3)
    y, h_n = rnn(x)
    first, state = rnn(x[:13])
    second, state = rnn(x[13:], state)
    assert torch.equal(torch.cat((first, second)), y) and torch.equal(state, h_n)


def test_truncated_backpropagation():
    theirs, ours = pair(3, 5, 2, dtype=F64)
    x = torch.randn(12, 4, 3, dtype=F64)
    gradients = []
    for rnn in (theirs, ours):
        h, inputs = None, x.clone().requires_grad_()
        for part in inputs.split(4):
            y, h = rnn(part, None if h is None else h.detach())
            y.square().sum().backward()
        gradients.append({"x": inputs.grad} | {name: p.grad for name, p in rnn.named_parameters()})
    whole = outcome(ours, x, None, ("y",))
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, 2 * tolerances.rnn(F64, 12, 4, 5), name)
        assert (whole[name] - expected).abs().max() > 1e-3 * expected.abs().max()


# Traced.


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_without_graph_breaks(dynamic):
    rnn = ReLURNN(3, 5, 2, bidirectional=True)

    def loss(x, h_0, lengths):
        y, h_n = rnn(x, h_0, lengths)
        return (y.square().mean() + h_n.sum()).tanh()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seq_len, lengths in ((4, [4, 2]), (7, [1, 3, 6])):
        gradients = []
        for function in (loss, compiled):
            shapes = ((seq_len, len(lengths), 3), (4, len(lengths), 5))
            x, h_0 = (torch.linspace(-1, 1, math.prod(s)).reshape(s).requires_grad_() for s in shapes)
            rnn.zero_grad()
            value = function(x, h_0, torch.tensor(lengths))
            value.backward()
            gradients.append([value.detach(), x.grad, h_0.grad, *[p.grad for p in rnn.parameters()]])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match=r"lengths\[1\] is 8; it must be from 1 to 7"):
        compiled(torch.ones(7, 3, 3), torch.ones(4, 3, 5), torch.tensor([1, 8, 2]))


# Bad input.

PACKED = pack_sequence([torch.ones(5, 4), torch.ones(2, 4)])
PADDED = torch.ones(5, 2, 4)


@pytest.mark.parametrize(
    "x, h_0, lengths, error, message",
    (
        (PADDED, None, [5, 6], ValueError, r"lengths\[1\] is 6; it must be from 1 to 5, the steps of x"),
        (PADDED, None, [0, 5], ValueError, r"lengths\[0\] is 0; it must be from 1 to 5"),
        (PADDED, None, torch.tensor([5, -1]), ValueError, r"lengths\[1\] is -1"),
        (PADDED, None, [5, 2, 1], ValueError, r"lengths has shape \[3\]; for x of shape \[5, 2, 4\] it must be \[2\]"),
        (PADDED, None, torch.tensor(5), ValueError, r"lengths has shape \[\]"),
        (PADDED, None, torch.ones(2, 1, dtype=torch.int64), ValueError, r"lengths has shape \[2, 1\]"),
        (PADDED, None, torch.ones(2), TypeError, "lengths has dtype torch.float32; it must be of integers"),
        (PADDED, None, torch.ones(2, dtype=torch.bool), TypeError, "lengths has dtype torch.bool"),
        (PADDED, None, [5.0, 2], TypeError, r"lengths is \[5.0, 2\]; it must be a tensor or a sequence of integers"),
        (PADDED, None, 5, TypeError, "lengths is 5; it must be a tensor or a sequence of integers"),
        (PADDED, None, [2**63, 1], ValueError, r"lengths is \[9223372036854775808, 1\]; every one must be from 1 to T"),
        (PADDED, None, [], ValueError, r"lengths has shape \[0\]"),
        (PADDED[:, 0], None, [5], ValueError, r"lengths are given, but x of shape \[5, 4\] is unbatched"),
        (PACKED, None, [5, 2], ValueError, "lengths are given, but x is a PackedSequence"),
        (PACKED, torch.ones(1, 3, 3), None, ValueError, r"h_0 has shape \[1, 3, 3\]; .*must be \[1, 2, 3\]"),
        (PACKED.double(), None, None, TypeError, "x has dtype torch.float64"),
        (pack_sequence([torch.ones(5, 3)]), None, None, ValueError, "x has 3 features .*input_size=4"),
        (pack_sequence([torch.ones(5)]), None, None, ValueError, r"x has shape \[5\]; it must be \[N, input_size\]"),
    ),
)
def test_bad_sequences(x, h_0, lengths, error, message):
    rnn = ReLURNN(4, 3)
    with pytest.raises(error, match=message):
        rnn(x, h_0, lengths)
    assert rnn.last_seq_len is None


def test_h_0_has_every_direction():
    with pytest.raises(ValueError, match=r"h_0 has shape \[2, 2, 3\]; .*must be \[4, 2, 3\]"):
        ReLURNN(4, 3, 2, bidirectional=True)(PADDED, torch.ones(2, 2, 3))
