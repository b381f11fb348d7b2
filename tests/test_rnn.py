"""ReLURNN against torch.nn.RNN(nonlinearity="relu")."""

import copy
import inspect
import math

import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from rnn_cases import DTYPES, assert_close, check, outcome, pair
from torch import nn

from pathrnn_kernels import ReLURNN

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("loss", (("y",), ("h_n",), ("y", "h_n")), ids="+".join)
@pytest.mark.parametrize("batch_first, unbatched", ((False, False), (True, False), (False, True), (True, True)))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("num_layers", (1, 2, 3))
@DTYPES
def test_every_option(dtype, num_layers, bias, batch_first, unbatched, loss):
    theirs, ours = pair(3, 5, num_layers, bias=bias, batch_first=batch_first, dtype=dtype)
    shape = (7,) if unbatched else (2, 7) if batch_first else (7, 2)
    x = torch.randn(*shape, 3, dtype=dtype)
    for h_0 in (None, torch.randn(num_layers, *(() if unbatched else (2,)), 5, dtype=dtype)):
        check(theirs, ours, x, h_0, loss)
    assert ours.last_seq_len == 7


SIZES = (
    # seq_len, batch, input_size, hidden_size
    (1, 1, 1, 1),
    (1, 7, 2, 3),
    (9, 1, 1, 17),
    (5, 3, 40, 1),
    (20, 9, 40, 33),
    (31, 16, 2, 100),
    (6, 13, 31, 65),
    (4, 2, 5, 130),
    (3, 1, 513, 20),
    (3, 40, 530, 16),
    (3, 50, 33, 47),
    (4, 1, 3, 513),
    (3, 5, 700, 600),
    (2, 3, 3, 1030),
    (300, 4, 3, 8),
    (100, 70, 1, 12),
)


@pytest.mark.every_isa
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@DTYPES
def test_sizes(dtype, size, threads):
    seq_len, batch, input_size, hidden_size = size
    theirs, ours = pair(input_size, hidden_size, 2 if hidden_size < 64 else 1, dtype=dtype)
    x = torch.randn(seq_len, batch, input_size, dtype=dtype)
    h_0 = torch.randn(theirs.num_layers, batch, hidden_size, dtype=dtype)
    check(theirs, ours, x, h_0)
    check(theirs, ours, x, loss=("h_n",))


@given(*[st.integers(1, n) for n in (12, 20, 40, 80)], st.booleans())
def test_any_size(seq_len, batch, input_size, hidden_size, bias):
    theirs, ours = pair(input_size, hidden_size, bias=bias)
    check(theirs, ours, torch.randn(seq_len, batch, input_size), torch.randn(1, batch, hidden_size))


@DTYPES
def test_strided_and_expanded_inputs(dtype):
    theirs, ours = pair(4, 6, 2, dtype=dtype)
    wide = torch.randn(10, 14, 12, dtype=dtype)
    views = (
        wide[::2, 1::5, ::3],
        wide.permute(1, 2, 0)[:5, :3, :4],
        torch.randn(5, 1, 4, dtype=dtype).expand(5, 3, 4),
        torch.randn(1, 1, 1, dtype=dtype).expand(5, 3, 4),
    )
    for x in views:
        assert not x.is_contiguous()
        h_0 = torch.randn(6, 3, 2, dtype=dtype).permute(2, 1, 0)[:, : x.shape[1]]
        check(theirs, ours, x, h_0)
        # outcome() makes dense copies of leaves; this one enters as it is.
        for ours_out, theirs_out in zip(ours(x, h_0), theirs(x, h_0), strict=True):
            assert_close(ours_out, theirs_out, tolerances.rnn(dtype, 5, 3, 6))


@DTYPES
def test_strided_parameters_and_gradients(dtype):
    theirs, ours = pair(4, 6, dtype=dtype)
    with torch.no_grad():
        for p in ours.parameters():
            apart = torch.full([2 * n for n in reversed(p.shape)], math.nan, dtype=dtype)
            view = apart[tuple(slice(1, None, 2) for _ in p.shape)]
            view = view.T if p.dim() == 2 else view
            p.set_(view.copy_(p))
    check(theirs, ours, torch.randn(5, 3, 4, dtype=dtype))
    # The gradient of a sum is an expanded scalar.
    x = torch.randn(5, 3, 4, dtype=dtype)
    for rnn in (theirs, ours):
        rnn.zero_grad()
        rnn(x)[0].sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad, tolerances.rnn(dtype, 5, 3, 6))


@pytest.mark.every_isa
@pytest.mark.parametrize("size", ((40, 16, 3, 50), (6, 2, 3, 300), (5, 33, 600, 530)))
def test_repeated_runs_are_bit_identical(size, threads):
    seq_len, batch, input_size, hidden_size = size
    rnn = ReLURNN(input_size, hidden_size)
    x, h_0 = torch.randn(seq_len, batch, input_size), torch.randn(1, batch, hidden_size)
    first = outcome(rnn, x, h_0, ("y", "h_n"))
    for _ in range(3):
        again = outcome(rnn, x, h_0, ("y", "h_n"))
        assert all(torch.equal(first[name], again[name]) for name in first)


@DTYPES
def test_identity_weights_over_a_long_sequence(dtype):
    theirs, ours = pair(2, 20, dtype=dtype)
    with torch.no_grad():
        for rnn in (theirs, ours):
            nn.init.eye_(rnn.weight_hh_l0)
    x = torch.randn(200, 4, 2, dtype=dtype) / 10
    expected, found = (outcome(rnn, x, None, ("h_n",)) for rnn in (theirs, ours))
    # Roundings of up to 200 steps add up undamped here.
    error = 200 * 8 * tolerances.unit_roundoff(dtype)
    for name in expected:
        assert_close(found[name], expected[name], error, name)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("place", ("x", "h_0", "weight_hh_l0", "bias_ih_l0"))
@pytest.mark.parametrize("size", ((5, 3, 4, 6), (3, 8, 600, 530)))
def test_not_finite_in_not_finite_out(size, place, value):
    seq_len, batch, input_size, hidden_size = size
    theirs, ours = pair(input_size, hidden_size)
    tensors = {"x": torch.randn(seq_len, batch, input_size), "h_0": torch.randn(1, batch, hidden_size)}
    for rnn in (theirs, ours):
        target = tensors[place] if place in tensors else getattr(rnn, place).data
        target.view(-1)[target.numel() // 2] = value
    expected, found = (outcome(rnn, **tensors, loss=("y", "h_n")) for rnn in (theirs, ours))
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name
        assert torch.equal(found[name].isinf(), expected[name].isinf()), name


def test_dropout_of_one_layer_is_warned_of_as_by_torch():
    for kind in (nn.RNN, ReLURNN):
        with pytest.warns(UserWarning, match="dropout") as caught:
            kind(2, 3, dropout=0.5)
        assert len(caught) == 1
    assert caught[0].filename == __file__


def test_dropout_in_evaluation_is_none():
    theirs, ours = pair(3, 5, 3, dropout=0.5)
    check(theirs.eval(), ours.eval(), torch.randn(6, 2, 3))


@pytest.mark.parametrize("batch_first", (False, True))
def test_dropout_lies_between_layers(batch_first):
    rnn = ReLURNN(3, 5, 3, dropout=0.5, batch_first=batch_first)
    x, h_0 = torch.randn(6, 2, 3), torch.randn(3, 2, 5)
    singles = [ReLURNN(3 if i == 0 else 5, 5) for i in range(3)]
    torch.manual_seed(7)
    y, h_n = rnn(x.transpose(0, 1) if batch_first else x, h_0)
    torch.manual_seed(7)
    below, finals = x, []
    for i, single in enumerate(singles):
        single.load_state_dict({name[:-1] + "0": p for name, p in rnn.state_dict().items() if name.endswith(f"l{i}")})
        below, final = single(below if i == 0 else nn.functional.dropout(below, 0.5), h_0[i : i + 1])
        finals.append(final)
    assert torch.equal(y.transpose(0, 1) if batch_first else y, below)
    assert torch.equal(h_n, torch.cat(finals))


def test_dropout_rate():
    rnn = ReLURNN(1, 1, 2, bias=False, dropout=0.3)
    with torch.no_grad():
        for p in rnn.parameters():
            p.fill_(1)
        rnn.weight_hh_l0.zero_()
        rnn.weight_hh_l1.zero_()
        y, _ = rnn(torch.ones(100, 400, 1))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    # 40,000 draws: six standard deviations.
    assert abs(kept.double().mean() - 0.7) < 6 * math.sqrt(0.3 * 0.7 / 40_000)
    rnn.dropout = 1.0
    with torch.no_grad():
        assert (rnn(torch.ones(3, 2, 1))[0] == 0).all()


@pytest.mark.parametrize("num_layers, bias", ((1, False), (1, True), (3, False), (3, True)))
@DTYPES
def test_one_seed_one_initialisation(num_layers, bias, dtype):
    torch.manual_seed(3)
    theirs = nn.RNN(4, 5, num_layers, nonlinearity="relu", bias=bias, dtype=dtype)
    torch.manual_seed(3)
    ours = ReLURNN(4, 5, num_layers, bias, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@DTYPES
def test_state_dicts_interchange(dtype):
    for bias in (False, True):
        theirs = nn.RNN(4, 5, 2, nonlinearity="relu", bias=bias, dtype=dtype)
        ours = ReLURNN(4, 5, 2, bias, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
        other = nn.RNN(4, 5, 2, nonlinearity="relu", bias=bias, dtype=dtype)
        other.load_state_dict(ours.state_dict())
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ReLURNN(4, 6, 2).load_state_dict(theirs.state_dict())


def test_conversion_keeps_what_is_frozen():
    theirs = nn.RNN(2, 3, nonlinearity="relu").requires_grad_(False)
    theirs.bias_ih_l0.requires_grad_(True)
    ours = ReLURNN.from_torch(theirs)
    for module in (ours, ours.to_torch()):
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias_ih_l0"]


def test_the_signature_is_that_of_the_options():
    assert list(inspect.signature(ReLURNN).parameters)[:3] == ["input_size", "hidden_size", "num_layers"]
    with pytest.raises(TypeError, match=r"ReLURNN.__init__\(\) got an unexpected keyword argument 'foo'"):
        ReLURNN(2, 3, foo=1)


def test_conversions_copy():
    theirs = nn.RNN(4, 5, 2, "relu", bias=False, batch_first=True, dropout=0.25, dtype=torch.float64).eval()
    ours = ReLURNN.from_torch(theirs)
    back = ours.to_torch()
    for rnn in (ours, back):
        assert not rnn.training
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
            assert getattr(rnn, name) == getattr(theirs, name)
        for p, q in zip(rnn.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    assert back.nonlinearity == "relu"
    with pytest.raises(TypeError, match=r"rnn is a GRU; it must be a torch.nn.RNN"):
        ReLURNN.from_torch(nn.GRU(2, 3))
    with pytest.raises(ValueError, match="rnn has nonlinearity 'tanh'"):
        ReLURNN.from_torch(nn.RNN(2, 3))


def test_a_module_of_computed_weights_is_not_converted():
    for make, convert in ((nn.RNN, ReLURNN.from_torch), (ReLURNN, ReLURNN.to_torch)):
        rnn = make(2, 3, nonlinearity="relu")
        nn.utils.parametrizations.orthogonal(rnn, "weight_hh_l0")
        with pytest.raises(ValueError, match=r"weight_hh_l0.* is a weight of one of the two modules alone"):
            convert(rnn)


def test_two_nonlinearities_are_one_too_many():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'nonlinearity'"):
        ReLURNN(2, 4, 1, "relu", nonlinearity="tanh")


def test_module_habits():
    rnn = ReLURNN(4, 5, 2, batch_first=True)
    assert repr(rnn) == "ReLURNN(4, 5, num_layers=2, batch_first=True)"
    twin = copy.deepcopy(rnn)
    x = torch.randn(2, 3, 4)
    assert torch.equal(twin(x)[0], rnn(x)[0])
    assert rnn.double()(x.double())[0].dtype == torch.float64
    assert rnn.to("meta")(x.double().to("meta"))[0].shape == (2, 3, 5)


def test_frozen_parts():
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "x", "h_0"):
        theirs, ours = pair(3, 20)
        gradients = []
        for rnn in (theirs, ours):
            tensors = {"x": torch.ones(4, 5, 3), "h_0": torch.ones(1, 5, 20)} | dict(rnn.named_parameters())
            for other, tensor in tensors.items():
                tensor.requires_grad_(other == name)
            rnn(tensors["x"], tensors["h_0"])[0].square().sum().backward()
            assert [other for other, tensor in tensors.items() if tensor.grad is not None] == [name]
            gradients.append(tensors[name].grad)
        assert_close(gradients[1], gradients[0], tolerances.rnn(torch.float32, 4, 5, 20), name)


def test_bias_gradients_are_separate_tensors():
    rnn = ReLURNN(3, 20)
    rnn(torch.randn(4, 5, 3))[0].sum().backward()
    assert torch.equal(rnn.bias_ih_l0.grad, rnn.bias_hh_l0.grad)
    rnn.bias_ih_l0.grad.zero_()
    assert rnn.bias_hh_l0.grad.abs().sum() > 0


def test_gradients_accumulate():
    rnn, x = ReLURNN(3, 20), torch.randn(4, 5, 3)
    rnn(x)[0].sum().backward()
    once = [p.grad.clone() for p in rnn.parameters()]
    rnn(x)[0].sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(rnn.parameters(), once, strict=True))


def test_results_changed_in_place_are_noticed():
    rnn = ReLURNN(3, 5)
    y, _ = rnn(torch.randn(4, 2, 3))
    loss = y.sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_biases_may_change_before_the_backward_pass():
    gradients = []
    for rnn in pair(3, 5):
        loss = rnn(torch.ones(4, 2, 3))[0].sum()
        with torch.no_grad():
            rnn.bias_hh_l0.add_(1)
        loss.backward()
        gradients.append(rnn.weight_hh_l0.grad)
    assert_close(gradients[1], gradients[0], tolerances.rnn(torch.float32, 4, 2, 5), "weight_hh")


def test_h_n_is_memory_of_its_own():
    with torch.no_grad():
        y, h_n = ReLURNN(3, 5)(torch.randn(4, 2, 3))
        h_n.fill_(-1)
    assert (y >= 0).all()


def test_without_gradients():
    rnn = ReLURNN(3, 5)
    with torch.no_grad():
        assert not rnn(torch.randn(4, 2, 3))[0].requires_grad
    with torch.inference_mode():
        assert rnn(torch.randn(4, 2, 3))[0].is_inference()


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_without_graph_breaks(dynamic):
    torch.manual_seed(0)
    rnn = ReLURNN(3, 5, 2)

    def loss(x, h_0):
        y, h_n = rnn(x, h_0)
        return (y.square().mean() + h_n.sum()).tanh()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seq_len, batch in ((4, 2), (7, 3)):
        gradients = []
        for function in (loss, compiled):
            shapes = ((seq_len, batch, 3), (2, batch, 5))
            x, h_0 = (torch.linspace(-1, 1, math.prod(s)).reshape(s).requires_grad_() for s in shapes)
            rnn.zero_grad()
            value = function(x, h_0)
            value.backward()
            gradients.append([value.detach(), x.grad, h_0.grad, *[p.grad for p in rnn.parameters()]])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Bad input.


@pytest.mark.parametrize(
    "options, error, message",
    (
        ({"input_size": 0}, ValueError, "input_size is 0; it must be at least 1"),
        ({"hidden_size": -4}, ValueError, "hidden_size is -4"),
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"input_size": 2.0}, TypeError, "input_size is 2.0; it must be a positive integer"),
        ({"hidden_size": None}, TypeError, "hidden_size is None"),
        ({"num_layers": True}, TypeError, "num_layers is True"),
        ({"bias": 1}, TypeError, "bias is 1; it must be True or False"),
        ({"batch_first": None}, TypeError, "batch_first is None"),
        ({"dropout": 1.5}, ValueError, "dropout is 1.5; it must be in"),
        ({"dropout": -0.1}, ValueError, "dropout is -0.1"),
        ({"dropout": math.nan}, ValueError, "dropout is nan"),
        ({"dropout": "0.5"}, TypeError, "dropout is '0.5'"),
        ({"bidirectional": 2}, TypeError, "bidirectional is 2; it must be True or False"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64; use one of torch.float32, torch.float64, torch.b"),
        ({"dtype": "float32"}, TypeError, "dtype is float32"),
    ),
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ReLURNN(**{"input_size": 2, "hidden_size": 3} | options)


@pytest.mark.parametrize(
    "x, h_0, error, message",
    (
        (None, None, TypeError, "x is a NoneType; it must be a tensor"),
        ([[1.0]], None, TypeError, "x is a list"),
        (torch.ones(4), None, ValueError, r"x has shape \[4\]"),
        (torch.ones(()), None, ValueError, r"x has shape \[\]"),
        (torch.ones(1, 2, 3, 4), None, ValueError, r"x has shape \[1, 2, 3, 4\]"),
        (torch.ones(5, 2, 3), None, ValueError, r"x has 3 features .*input_size=4"),
        (torch.ones(0, 2, 4), None, ValueError, r"x has shape \[0, 2, 4\]; T must be at least 1"),
        (torch.ones(0, 0, 4), None, ValueError, r"x has shape \[0, 0, 4\]; T must be at least 1"),
        (torch.ones(0, 4), None, ValueError, r"x has shape \[0, 4\]"),
        (torch.ones(5, 2, 4).double(), None, TypeError, "x has dtype torch.float64, but the weights are torch.float32"),
        (torch.ones(5, 2, 4).long(), None, TypeError, "x has dtype torch.int64"),
        (torch.ones(5, 2, 4).bfloat16(), None, TypeError, "x has dtype torch.bfloat16"),
        (torch.ones(5, 2, 4, device="meta"), None, TypeError, "x is on meta, but the weights are on cpu"),
        (torch.ones(5, 2, 4), torch.ones(2, 3), ValueError, r"h_0 has shape \[2, 3\]; .*it must be \[1, 2, 3\]"),
        (torch.ones(5, 2, 4), torch.ones(1, 5, 3), ValueError, r"h_0 has shape \[1, 5, 3\]"),
        (torch.ones(5, 4), torch.ones(1, 1, 3), ValueError, r"h_0 has shape \[1, 1, 3\]; .*it must be \[1, 3\]"),
        (torch.ones(5, 2, 4), torch.ones(1, 2, 3).double(), TypeError, "h_0 has dtype torch.float64"),
        (torch.ones(5, 2, 4), torch.ones(1, 2, 3, device="meta"), TypeError, "h_0 is on meta"),
        (torch.ones(5, 2, 4), 0, TypeError, "h_0 is a int; it must be a tensor or None"),
        (torch.ones(5, 2, 4).to_sparse(), None, (TypeError, NotImplementedError), "(?i)sparse"),
    ),
)
def test_bad_inputs(x, h_0, error, message):
    with pytest.raises(error, match=message):
        ReLURNN(4, 3)(x, h_0)


def test_layouts_are_named():
    with pytest.raises(ValueError, match=r"must be \[B, T, input_size\]"):
        ReLURNN(4, 3, batch_first=True)(torch.ones(4))
    rnn = ReLURNN(4, 3, batch_first=True)
    rnn(torch.ones(2, 5, 4))
    assert rnn.last_seq_len == 5


def test_weights_that_do_not_fit_any_more():
    rnn = ReLURNN(4, 3)
    rnn.weight_ih_l0 = nn.Parameter(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"weight_ih has shape \[3, 5\]; it must be \[3, 4\]"):
        rnn(torch.ones(5, 2, 4))
    rnn = ReLURNN(4, 3)
    rnn.bias_hh_l0 = nn.Parameter(torch.ones(3).double())
    with pytest.raises(TypeError, match="bias_hh has dtype Double, but x has Float"):
        rnn(torch.ones(5, 2, 4))
