import inspect
import math
from fractions import Fraction

import pytest
import torch
from torch import Generator, nn

import pathrnn_kernels as pk
from pathrnn_kernels.init import identity_, np_rnn_, orthogonal_, uniform_

ALL = [identity_, np_rnn_, orthogonal_, uniform_]


def seeded(seed=0):
    return Generator().manual_seed(seed)


def network(hidden_size=50, num_layers=2):
    rnn = pk.ReLURNN(7, hidden_size, num_layers)
    return pk.PathNetwork(rnn, nn.Linear(hidden_size, 5), nn.Embedding(11, 7, padding_idx=3))


def recurrent(net):
    return [p.detach() for name, p in net.named_parameters() if "weight_hh" in name]


def others(net):
    return [p.detach() for name, p in net.named_parameters() if "bias" not in name and "weight_hh" not in name]


def test_identity():
    net = identity_(network(), scale=0.5, generator=seeded())
    for w in recurrent(net):
        assert torch.equal(w, 0.5 * torch.eye(50))
    for w in others(net):
        assert 0.008 < w.abs().max() <= 0.01


def test_np_rnn():
    net = np_rnn_(network(), generator=seeded())
    for w in recurrent(net):
        values = torch.linalg.eigvalsh(w.double())
        torch.testing.assert_close(w, w.T)
        # λ_max(A) of a Wishart matrix is close to 4, so that the smallest of (A + I) / λ_max(A + I) is close to 1/5.
        assert values[-1].item() == pytest.approx(1, rel=1e-6)
        assert 0.15 < values[0] < 0.3 and values[-2] < 1
    alpha = math.sqrt(2) * math.exp(1.2 / (50 - 2.4))
    expected = {
        "rnn.weight_ih_l0": alpha / math.sqrt(7),
        "rnn.weight_ih_l1": alpha / math.sqrt(50),
        "head.weight": math.sqrt(2 / 55),
    }
    for name, p in net.named_parameters():
        if name in expected:  # 250 to 2500 draws: the standard deviation is known to a few per cent
            assert p.std().item() == pytest.approx(expected[name], rel=0.15), name


def test_uniform():
    net = uniform_(network(), recurrent_bound=0.03, other_bound=0.5, generator=seeded())
    for w in recurrent(net):
        assert 0.029 < w.abs().max() <= 0.03
    for w in others(net):
        assert 0.4 < w.abs().max() <= 0.5


def test_orthogonal():
    net = orthogonal_(network(), gain=1.5, generator=seeded())
    for w in recurrent(net):
        torch.testing.assert_close(w @ w.T, 2.25 * torch.eye(50))
    for w in others(net):
        assert 0.008 < w.abs().max() <= 0.01


@pytest.mark.parametrize("function", ALL)
def test_biases_and_padding_are_zero_and_generators_repeat(function):
    first, second, third = network(), network(), network()
    assert function(first, generator=seeded()) is first
    function(second, generator=seeded())
    function(third, generator=seeded(1))
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad and p.grad_fn is None
        if "bias" in name:
            assert not p.any()
    assert not first.embedding.weight[3].any() and first.embedding.weight[2].all()
    assert not torch.equal(first.head.weight, third.head.weight)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    "module", [pk.ReLURNN(3, 4, 2), nn.RNN(3, 4, 2, nonlinearity="relu"), nn.RNN(3, 4, bias=False)]
)
def test_bare_modules_are_accepted(function, module):
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(math.nan)
    assert function(module) is module
    for name, p in module.named_parameters():
        assert p.isfinite().all(), name


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(function, dtype):
    net = function(network().to(dtype), generator=seeded())
    assert all(p.dtype == dtype and p.isfinite().all() for p in net.parameters())
    if function is orthogonal_:
        for w in recurrent(net):
            atol = 50 * torch.finfo(dtype).eps
            torch.testing.assert_close(w.double() @ w.double().T, torch.eye(50).double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("function", "name", "value", "most"),
    [
        (identity_, "scale", 7e4, 65504),
        (orthogonal_, "gain", 7e4, 65504),
        (uniform_, "recurrent_bound", 4e4, 32752),
        (uniform_, "other_bound", 4e4, 32752),
    ],
)
def test_numbers_that_the_dtype_cannot_hold_are_refused_and_change_nothing(function, name, value, most):
    rnn = pk.ReLURNN(2, 3, dtype=torch.float16)
    before = [p.detach().clone() for p in rnn.parameters()]
    with pytest.raises(ValueError, match=f"{name} is {value}; in torch.float16 it must be at most {most}"):
        function(rnn, **{name: value})
    assert all(torch.equal(p, q) for p, q in zip(rnn.parameters(), before, strict=True))
    function(rnn, **{name: most})


@pytest.mark.parametrize("function", ALL)
def test_a_parametrized_matrix_is_refused_before_others_change(function):
    rnn = torch.nn.utils.parametrizations.weight_norm(pk.ReLURNN(2, 3), "weight_hh_l0")
    before = {name: p.clone() for name, p in rnn.named_parameters()}
    with pytest.raises(ValueError, match="parametrizations.weight_hh_l0.original0 is of a parametrization"):
        function(rnn)
    assert all(torch.equal(p, before[name]) for name, p in rnn.named_parameters())


@pytest.mark.parametrize("function", ALL)
def test_other_modules_are_refused(function):
    with pytest.raises(TypeError, match=r"net is a Linear; it must be a ReLURNN, torch.nn.RNN or PathNetwork"):
        function(nn.Linear(2, 2))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True, "1"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (identity_, "scale"),
        (identity_, "other_bound"),
        (uniform_, "recurrent_bound"),
        (uniform_, "other_bound"),
        (orthogonal_, "gain"),
        (orthogonal_, "other_bound"),
    ],
)
def test_bad_numbers_are_refused_and_change_nothing(function, name, bad):
    rnn = pk.ReLURNN(2, 3)
    before = [p.detach().clone() for p in rnn.parameters()]
    with pytest.raises(ValueError, match=f"{name} is"):
        function(rnn, **{name: bad})
    assert all(torch.equal(p, q) for p, q in zip(rnn.parameters(), before, strict=True))


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("bad", ("generator", "inference", "expanded"))
def test_what_cannot_be_written_or_drawn_is_refused_before_anything_changes(function, bad):
    net = pk.PathNetwork(pk.ReLURNN(2, 3), nn.Linear(3, 2))
    if bad == "inference":
        with torch.inference_mode():
            net.head.weight = nn.Parameter(torch.ones(2, 3))
    if bad == "expanded":
        net.head.weight.data = torch.ones(1, 1).expand(2, 3)
    before = [p.detach().clone() for p in net.parameters()]
    message = "generator is a int; it must be a torch.Generator|head.weight (was made under|has entries that share)"
    with pytest.raises((TypeError, RuntimeError, ValueError), match=message):
        function(net, generator=0 if bad == "generator" else None)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("number", (Fraction(1, 2), 2**70), ids=str)
@pytest.mark.parametrize("name", ("scale", "gain", "recurrent_bound", "other_bound"))
def test_real_numbers_of_any_make_are_as_their_float(number, name):
    for function in (f for f in ALL if name in inspect.signature(f).parameters):
        nets = [
            function(pk.ReLURNN(2, 3), **{name: value}, generator=torch.Generator().manual_seed(0))
            for value in (number, float(number))
        ]
        assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))
