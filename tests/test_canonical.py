"""Rescalings of the units by powers of two (Theorem 1): κ and log γ² follow them bit for bit."""

import itertools

import pytest
import torch
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import PathNetwork, ReLURNN
from pathrnn_kernels.kappa import ldexp

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
#: How far units are rescaled, 2^±.
FARTHEST = {F32: 60, F64: 400}


def make(num_layers, bidirectional, dtype, outputs="all", head=True, embedding=False, bias=True, hidden=7, seed=0):
    torch.manual_seed(seed)
    rnn = ReLURNN(3, hidden, num_layers, bias, bidirectional=bidirectional, dtype=dtype)
    width = hidden * (2 if bidirectional else 1)
    net = PathNetwork(
        rnn,
        nn.Linear(width, 2, dtype=dtype) if head else None,
        nn.Embedding(4, 3, dtype=dtype) if embedding else None,
        outputs,
    )
    with torch.no_grad():
        for p in net.parameters():  # none so small that it were subnormal when rescaled
            p.copy_((torch.rand_like(p) * 0.75 + 0.25) * (torch.randint(2, p.shape) * 2 - 1))
    return net


def rescaled(net, farthest, seed=1):
    """A copy with what enters unit j times 2^a_j, what leaves it over 2^a_j; and by names 2 (a_target - a_source)."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden = net.num_directions, net.hidden_size
    shifts = [torch.randint(-farthest, farthest + 1, (hidden,), generator=generator) for _ in net.endings]
    if net.head is None:
        shifts[-width:] = [torch.zeros(hidden, dtype=torch.int64)] * width
    new = PathNetwork(
        ReLURNN(
            net.rnn.input_size, hidden, net.num_layers, net.rnn.bias, bidirectional=width == 2, dtype=dtype_of(net)
        ),
        None if net.head is None else nn.Linear(width * hidden, len(net.head.weight), dtype=dtype_of(net)),
        None if net.embedding is None else nn.Embedding(*net.embedding.weight.shape, dtype=dtype_of(net)),
        net.outputs,
        net.h0,
    )
    moved = {}
    for c, ending in enumerate(net.endings):
        own, first = shifts[c], c - c % width - width
        below = torch.cat(shifts[first : first + width]) if first >= 0 else 0
        moved[f"rnn.weight_ih_{ending}"] = own[:, None] - below
        moved[f"rnn.weight_hh_{ending}"] = own[:, None] - own
        moved[f"rnn.bias_ih_{ending}"] = moved[f"rnn.bias_hh_{ending}"] = own
    moved["head.weight"] = -torch.cat(shifts[-width:])
    with torch.no_grad():
        for (name, p), q in zip(net.named_parameters(), new.parameters(), strict=True):
            shift = moved.setdefault(name, torch.zeros(1, dtype=torch.int64))
            q.copy_(ldexp(p.double(), shift.expand(p.shape)))
            back = ldexp(q.double(), -shift.expand(p.shape))
            assert torch.equal(back.to(p.dtype), p)  # nothing was rounded
    return new, {name: 2 * shift for name, shift in moved.items()}


def dtype_of(net):
    return net.rnn.weight_hh_l0.dtype


def check_follows(before, after, moved):
    assert torch.equal(before.log_path_norm, after.log_path_norm)
    assert before.lags == after.lags and before.bound == after.bound and before.arithmetic == after.arithmetic
    for name, scaled in before.scaled.items():
        (mantissa, exponent), (found, found_exponent) = scaled.parts(), after.scaled[name].parts()
        assert torch.equal(mantissa, found), name
        expected = (exponent - moved[name]).expand(torch.broadcast_shapes(exponent.shape, moved[name].shape))
        assert torch.equal(torch.where(mantissa > 0, expected, 0), torch.where(mantissa > 0, found_exponent, 0)), name


OPTIONS = list(itertools.product((1, 2, 3), (False, True), (None, "head", "embedding"), (True, False), ("all", "last")))


@pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
def test_kappa_follows(options, dtype, threads):
    num_layers, bidirectional, ends, bias, outputs = options
    net = make(num_layers, bidirectional, dtype, outputs, ends is not None, ends == "embedding", bias)
    other, moved = rescaled(net, FARTHEST[dtype])
    for seq_len, second, rtol in ((1, False, 0), (9, True, 0), (150, False, 0), (150, True, 1e-4)):
        before, after = (pk.kappa(n, seq_len, second, rtol=rtol) for n in (net, other))
        check_follows(before, after, moved)


def with_dead_units(net):
    """Most weights 0; unit 0 without any drive of its own, unit 1 read by others alone, unit 2 on no path at all."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(torch.rand_like(p) < 0.5)
        for ending in net.endings:
            ih, hh = (getattr(net.rnn, f"weight_{kind}_{ending}") for kind in ("ih", "hh"))
            for unit in (0, 2):
                ih[unit] = 0
                if net.rnn.bias:
                    getattr(net.rnn, f"bias_ih_{ending}")[unit] = getattr(net.rnn, f"bias_hh_{ending}")[unit] = 0
            hh[:, 2] = hh[2] = 0
        above = [getattr(net.rnn, f"weight_ih_{ending}") for ending in net.endings[net.num_directions :]]
        for weight in [*above, net.head.weight]:
            weight[:, 1 :: net.hidden_size] = weight[:, 2 :: net.hidden_size] = 0
    return net


@pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
@pytest.mark.parametrize("num_layers, bidirectional, bias", ((1, False, True), (2, False, False), (2, True, True)))
def test_kappa_of_dead_units_follows(num_layers, bidirectional, bias, dtype, threads):
    for seed, outputs in itertools.product(range(6), ("all", "last")):
        net = with_dead_units(make(num_layers, bidirectional, dtype, outputs, bias=bias, seed=seed))
        other, moved = rescaled(net, FARTHEST[dtype], seed)
        for seq_len, second, rtol in ((2, True, 0), (40, True, 0), (120, True, 1e-4)):
            check_follows(*(pk.kappa(n, seq_len, second, rtol=rtol) for n in (net, other)), moved)


@pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
@pytest.mark.parametrize("hidden, seq_len, second", ((520, 8, True), (1030, 12, False)))
def test_kappa_of_large_networks_follows(hidden, seq_len, second, dtype, threads):
    """Sizes at which threads read W themselves: with factors where these are mild, else a copy."""
    net = make(1, False, dtype, hidden=hidden)
    before = pk.kappa(net, seq_len, second)
    for farthest in (3, FARTHEST[dtype]):
        other, moved = rescaled(net, farthest)
        check_follows(before, pk.kappa(other, seq_len, second), moved)


@pytest.mark.parametrize("exponent", range(-64, -48))
def test_what_underflows_does_not_depend_on_the_rescaling(exponent):
    # A thread's cache does not hold W: factors of rows meet sums instead of squares, which may underflow before.
    net = make(1, False, F32, hidden=512)
    with torch.no_grad():
        net.rnn.weight_hh_l0[1:, 1:] *= 2.0**-20
        net.rnn.weight_hh_l0[5, 9] = 2.0**exponent
    before = pk.kappa(net, 3)
    assert all((scaled.parts()[0] > 0).all() for scaled in before.scaled.values())
    for seed in range(3):
        after, moved = rescaled(net, 4, seed)
        check_follows(before, pk.kappa(after, 3), moved)
