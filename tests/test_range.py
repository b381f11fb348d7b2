"""Networks whose numbers lie too far apart for one scale: units that grow beside others, die, or are rescaled."""

import copy
import math

import pytest
import torch
from oracles import check_logarithms
from step_cases import FAR, ON_A_PATH, assert_no_path_needs_no_range, assert_steps_on_a_path, delay_line
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import PathNetwork, ReLURNN
from pathrnn_kernels.rescale import node_rescale_

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
W_HH = "rnn.weight_hh_l0"


def make(hidden, dtype=F64, outputs="last", bias=True, head_bias=True, input_size=1, **weights):
    """A network of one layer with the weights that are given."""
    net = PathNetwork(
        ReLURNN(input_size, hidden, bias=bias, dtype=dtype), nn.Linear(hidden, 1, bias=head_bias, dtype=dtype),
        outputs=outputs,
    )  # fmt: skip
    places = {"ih": net.rnn.weight_ih_l0, "hh": net.rnn.weight_hh_l0, "head": net.head.weight, "out": net.head.bias}
    with torch.no_grad():
        for name, value in weights.items():
            places[name].copy_(torch.as_tensor(value, dtype=dtype).expand_as(places[name]))
    return net


# Closed forms.


@pytest.mark.parametrize("init", ("default", "normal"))
@DTYPES
def test_a_closed_form_starts_from_a_row_that_is_written(dtype, init, threads):
    """Many chains of small networks have one from step 64 on; rows of another network lie in the workspace."""
    for hidden, seed in [(h, s) for h in (2, 3, 4, 6) for s in range(12)] + [(4, 44), (4, 281), (4, 7)]:
        torch.manual_seed(seed)
        net = PathNetwork(ReLURNN(2, hidden, dtype=dtype), nn.Linear(hidden, 1, dtype=dtype), outputs="last")
        if init == "normal":
            nn.init.normal_(net.rnn.weight_hh_l0, std=hidden**-0.5)
        pk.kappa(PathNetwork(ReLURNN(2, hidden, dtype=dtype)), 70)
        check_logarithms(net, 100)


@DTYPES
def test_increments_that_die(dtype):
    """Unit 0 has no recurrent input: its increment is 0 after one step, while unit 1's goes on."""
    net = make(2, dtype, bias=False, ih=[[1e-4], [1.0]], hh=[[0.0, 0.0], [2.5, 0.0]], head=1.0, out=0.1)
    for seq_len in (64, 100):
        found, _ = check_logarithms(net, seq_len)
        assert found.log_path_norm.exp().item() == pytest.approx(1.0100000725, rel=1e-6 if dtype == F32 else 1e-12)
    families = {
        "strictly lower triangular": lambda: torch.randn(5, 5).tril(-1),
        "one unit without recurrent input": lambda: torch.cat([torch.zeros(1, 5), 0.5 * torch.randn(4, 5)]),
        "sparse": lambda: torch.randn(5, 5) * (torch.rand(5, 5) < 0.2),
    }
    for family in families.values():
        for seed in range(20):
            torch.manual_seed(seed)
            check_logarithms(make(5, dtype, hh=family(), input_size=2), 100)


@pytest.mark.parametrize("hidden, second", ((1024, False), (512, True)))
def test_a_zero_row_of_a_large_matrix(hidden, second):
    for std in (3e-4, 3e-5):
        net = make(hidden, F32, hh=torch.randn(hidden, hidden) * std * (torch.arange(hidden) > 0)[:, None])
        found, wide = pk.kappa(net, 20, second), pk.kappa(net.double(), 20, backend="reference")
        assert all(factor.isfinite().all() for factor in found.factors.values())
        assert found.log_path_norm.item() == pytest.approx(wide.log_path_norm.item(), abs=1e-5)


@DTYPES
@pytest.mark.parametrize("outputs", ("all", "last"))
def test_a_settled_unit_beside_a_growing_one(outputs, dtype):
    """h has a closed form whose increments outgrow, 2^600 and more, the row that they are added to."""
    weight = torch.zeros(3, 3, dtype=dtype)
    weight[1, 1], weight[2, 0] = 3.0, 0.5
    check_logarithms(make(3, dtype, outputs, hh=weight), 400)


# Blocks.

BLOCK = 6


def blocks(a, b, upper=None, lower=None):
    weight = torch.block_diag(a, b)
    if upper is not None:
        weight[:BLOCK, BLOCK:] = upper
    if lower is not None:
        weight[BLOCK:, :BLOCK] = lower
    return weight


def gaussian():
    return torch.randn(BLOCK, BLOCK)


BLOCKS = {
    "block diagonal": lambda: blocks(gaussian(), 0.1 * gaussian()),
    "block diagonal, slow first": lambda: blocks(0.1 * gaussian(), gaussian()),
    "lower": lambda: blocks(gaussian(), 0.1 * gaussian(), lower=gaussian()),
    "upper": lambda: blocks(gaussian(), 0.1 * gaussian(), upper=gaussian()),
    "lower, slow first": lambda: blocks(0.1 * gaussian(), gaussian(), lower=gaussian()),
    "upper, slow first": lambda: blocks(0.1 * gaussian(), gaussian(), upper=gaussian()),
    "units without recurrent input": lambda: blocks(gaussian(), 0 * gaussian(), upper=gaussian()),
    "diagonal": lambda: torch.diag(torch.logspace(0, -3, 2 * BLOCK)),
    "diagonal and gaussian": lambda: blocks(gaussian(), torch.eye(BLOCK)),
    "weakly coupled": lambda: blocks(gaussian(), 0.1 * gaussian(), 1e-8 * gaussian(), 1e-8 * gaussian()),
    "diagonal, close": lambda: torch.diag(torch.linspace(1, 0.5, 2 * BLOCK)),
}


@pytest.mark.parametrize("h0", ("zeros", pytest.param("ones", marks=pytest.mark.slow)))
@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("kind", BLOCKS)
@DTYPES
def test_blocks_of_different_growth(dtype, kind, outputs, h0, threads):
    """All rows of S of one thread may lie far below those of another."""
    for seed in range(2):
        torch.manual_seed(seed)
        net = make(2 * BLOCK, dtype, outputs, hh=BLOCKS[kind](), input_size=2)
        net.h0 = h0
        check_logarithms(net, 200, second_term=True)


@pytest.mark.parametrize("outputs", ("all", "last"))
def test_blocks_for_a_team(outputs, threads):
    """So large that two threads share them."""
    weight = torch.block_diag(torch.randn(40, 40), 0.1 * torch.randn(40, 40)) / 40**0.5
    found, _ = check_logarithms(make(80, F32, outputs, hh=weight, input_size=2), 150, second_term=True)
    assert found.bound <= 1e-5


@pytest.mark.parametrize("second_term", (False, True))
def test_powers_that_lose_what_the_second_term_needs(second_term):
    """W̃² has an entry 2^840 below its largest; what later powers may miss of it leaves float64."""
    net = PathNetwork(ReLURNN(1, 2, bias=False, dtype=F64), outputs="last", h0="ones")
    with torch.no_grad():
        net.rnn.weight_ih_l0.copy_(torch.tensor([[2.0**120], [0.0]]))
        net.rnn.weight_hh_l0.copy_(torch.tensor([[0.0, 2.0**262], [2.0**-278, 1.0]], dtype=F64))
    check_logarithms(net, 9, second_term, rtol=1e-10, truncation=0)


# Units beside the paths.


@DTYPES
@pytest.mark.parametrize("gain, outputs", ((1.5, "last"), (1.5, "all"), (4.0, "last"), (4.0, "all")))
def test_what_grows_without_being_read(gain, outputs, dtype):
    net = make(2, dtype, outputs, False, False, ih=1.0, hh=[[gain, 0.0], [0.0, 1.0]], head=[[0.0, 1.0]])
    found, _ = check_logarithms(net, 1000, second_term=False)
    steps = 1000 if outputs == "last" else 500500
    assert found.log_path_norm.exp().item() == pytest.approx(steps, rel=1e-5 if dtype == F32 else 1e-12)
    assert found.relative("head.weight")[0, 1].item() == pytest.approx(1, rel=1e-5)
    pk.log_path_norm(net, 1000).backward()
    right = 999 if outputs == "last" else 2 * sum(t * (t - 1) / 2 for t in range(1, 1001)) / 500500
    assert net.rnn.weight_hh_l0.grad[1, 1].item() == pytest.approx(right, rel=1e-5)
    assert net.head.weight.grad.tolist() == [[0.0, pytest.approx(2, rel=1e-5)]]


def test_what_grows_ahead_of_a_thin_path():
    """The only path leads by a square of 1e-400 from a unit that grows by 100 a step; unit 2 is on none."""
    weights = {"ih": [[1.0], [0.0], [1.0]], "hh": [[10.0, 0, 0], [1e-200, 0.5, 0], [0, 0, 1]], "head": [[0.0, 1.0, 0]]}
    check_logarithms(make(3, bias=False, head_bias=False, **weights), 300)
    weights["ih"][2], weights["hh"][2][1], weights["head"][0][2] = [0.0], 1.0, 1e-300
    check_logarithms(make(3, bias=False, head_bias=False, **weights), 300)


def test_no_path_has_no_gradient_however_large_the_weight():
    net = make(2, bias=False, head_bias=False, hh=[[1e5, 0.0], [0.0, 1e5]], head=[[1.0, 0.0]])
    pk.path_norm(net, 200).backward()
    assert net.rnn.weight_hh_l0.grad.tolist() == [[math.inf, 0.0], [0.0, 0.0]]
    net.zero_grad()
    pk.log_path_norm(net, 200).backward()
    assert net.rnn.weight_hh_l0.grad[0, 0].item() == pytest.approx(2 * 199 / 1e5, rel=1e-9)


# Scales of weights.


@pytest.mark.parametrize(
    "dtype, ratios", ((F32, (1e3, 1e5, 1e8)), (F64, (1e30, 1e57, 1e70))), ids=("float32", "float64")
)
def test_the_second_term_of_rescaled_units(dtype, ratios, threads):
    net = make(2, dtype, hh=[[0.7, 0.5], [0.6, 0.4]], input_size=2)
    before = pk.kappa(net, 25, second_term=True, rtol=0).relative(W_HH)
    weight = net.rnn.weight_hh_l0.detach().double().clone()
    for ratio in ratios:
        node_rescale_(net, [torch.tensor([ratio**0.5, ratio**-0.5], dtype=dtype)])
        found, _ = check_logarithms(net, 25, second_term=True, truncation=0)
        # γ²/κ goes as the weight's square.
        quotient = found.relative(W_HH) / before * (weight / net.rnn.weight_hh_l0.detach().double()).square()
        torch.testing.assert_close(quotient, torch.ones_like(quotient), rtol=1e-5 if dtype == F32 else 1e-12, atol=0)
        node_rescale_(net, [torch.tensor([ratio**-0.5, ratio**0.5], dtype=dtype)])


@pytest.mark.parametrize("second", (False, True))
@pytest.mark.parametrize("name", (W_HH, "rnn.weight_ih_l0", "head.weight"))
@pytest.mark.parametrize("dtype, value", ((F32, 1e-44), (F64, 1e-310)), ids=("float32", "float64"))
def test_a_tensor_of_subnormal_numbers(dtype, value, name, second):
    net = make(2, dtype)
    with torch.no_grad():
        net.get_parameter(name).fill_(value)
    check_logarithms(net, 10, second)


def test_inputs_of_zeros_without_biases():
    for seed in range(20):
        torch.manual_seed(seed)
        net = PathNetwork(ReLURNN(1, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Embedding(3, 1))
        with torch.no_grad():
            net.embedding.weight.zero_()
        check_logarithms(net, 3)


def test_arithmetic_is_told():
    net = make(2, F32, hh=[[0.5, 0.1], [0.2, 0.4]])
    assert pk.kappa(net, 50).arithmetic == "float32"
    net = make(2, F32, bias=False, ih=1.0, hh=[[4.0, 0.0], [0.0, 1.0]])
    assert pk.kappa(net, 60).arithmetic == "float64"
    assert pk.kappa(net, 1000).arithmetic == "extended"


@pytest.mark.parametrize(
    ("dtype", "above", "below"),
    [
        (torch.float64, -875, 100),
        (torch.float64, -1000, 300),
        (torch.float64, 300, 200),
        (torch.float64, -20, -500),
        (torch.float32, -140, 40),
        (torch.float32, 60, 20),
        (torch.float32, -20, -70),
    ],
)
def test_the_gradient_of_the_path_norm_may_lie_anywhere(dtype, above, below):
    net = pk.PathNetwork(
        pk.ReLURNN(1, 1, bias=False, dtype=dtype), nn.Linear(1, 1, bias=False, dtype=dtype), outputs="last"
    )
    with torch.no_grad():
        for p, exponent in zip(net.parameters(), (below, 0, above), strict=True):
            p.fill_(2.0**exponent)
    pk.path_norm(net, 1).backward()  # γ² = (2^above · 2^below)²
    expected = [2.0 ** (1 + below + 2 * above), 0.0, 2.0 ** (1 + above + 2 * below)]
    for p, value in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad.flatten(), torch.tensor([value], dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_step_far_below_the_others_counts_where_they_do_not(dtype):
    """Of a weight between a reverse and a forward direction both sequences are largest at one end: steps at the other,
    2^-1000 beside them, are as good as those for some entries."""
    rnn = pk.ReLURNN(1, 2, 2, bias=False, bidirectional=True, dtype=dtype)
    net = pk.PathNetwork(rnn, outputs="last")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0) if p.shape[0] != p.shape[1] else p.zero_()
        rnn.weight_hh_l0_reverse[0, 0] = 9.92
        rnn.weight_hh_l1.copy_(torch.diag(torch.tensor([1.75, 1.0])))
    for seq_len in range(2, 200):
        k = pk.kappa(net, seq_len)
        # h of the reverse unit 1 and δ of unit 1 of the layer above are 1 at every step.
        assert k.dense("rnn.weight_ih_l1")[1, 3].item() == pytest.approx(seq_len, 1e-5), k.arithmetic


@pytest.mark.parametrize("learns", (True, False))
def test_the_path_between_what_is_not_reached_and_what_is_not_read(learns):
    """Of the products of h and the head, large numbers meet zeros; those that remain are far below both."""
    ih, head = ([0, 1, 2.0**450], [2.0**200, 1, 0]) if learns else ([0, 2.0**300, 0], [1, 2.0**-350, 0])
    net = make(3, bias=False, head_bias=False)
    with torch.no_grad():
        net.rnn.weight_ih_l0.copy_(torch.tensor(ih, dtype=F64)[:, None])
        net.rnn.weight_hh_l0.zero_()[0, 1] = 2.0**700
        net.rnn.weight_hh_l0[1, 2] = 2.0**450 if learns else 0
        net.head.weight.copy_(torch.tensor(head, dtype=F64))
    net.requires_grad_(learns)
    expected = 0.0 if learns else -100 * math.log(2)
    norm = pk.log_path_norm(net, 1)
    assert norm.item() == pytest.approx(expected, abs=1e-12)
    if learns:
        norm.backward()
        assert net.rnn.weight_ih_l0.grad.flatten().tolist() == pytest.approx([0, 2, 0], rel=1e-12)


@pytest.mark.parametrize("way", ("cast", "loaded"))
def test_kappa_that_is_kept_is_cast_with_its_range(way):
    """A long sequence: κ of one unit is 2^542 times that of the other, which float32 does not hold beside it."""

    def network(dtype):
        net = make(2, dtype, outputs="all", bias=False)
        with torch.no_grad():
            net.rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([1.6, 1.0])))
            net.rnn.weight_ih_l0.fill_(0.5), net.head.weight.fill_(0.5)
        return net, pk.PathSGD(net, lr=1e5, update_every=10, seq_len=400)

    def step(net, optimizer, gradient):
        for p in net.parameters():
            p.grad = torch.full_like(p, gradient)
        before = net.rnn.weight_ih_l0.detach().clone()
        optimizer.step()
        return (net.rnn.weight_ih_l0.detach() - before).flatten()

    fresh = step(*network(torch.float32), 1e-3)
    net, optimizer = network(F64)
    step(net, optimizer, 0)  # computes κ, and moves nothing
    if way == "cast":
        net.float()
    else:
        state = optimizer.state_dict()
        net, optimizer = network(torch.float32)
        optimizer.load_state_dict(state)
    assert fresh[1] < -1e-3
    torch.testing.assert_close(step(net, optimizer, 1e-3), fresh, rtol=1e-4, atol=0)


@DTYPES
@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("kind", FAR)
def test_weights_on_no_path_between_units_far_apart(kind, fused, dtype):
    """They had been 0, infinite, or had no decay, beyond exponents of 1000: canonical coordinates do not hold them."""
    make, expected = FAR[kind]
    for link in (1e-30, 1e-3, 1e30):
        assert_no_path_needs_no_range(
            lambda net: make(net, fused=fused), expected, link, momentum=kind == "momentum", dtype=dtype
        )


def test_a_base_with_decay_on_no_path():
    for link in (1e-30, 1e30):
        net = delay_line(link)
        base = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.5)
        pk.PathOptimizer(base, net, scale="path_norm", trust_radius=1e9, seq_len=40).step()
        found = net.rnn.weight_hh_l0.detach()[:, -1]
        torch.testing.assert_close(found, torch.full_like(found, 0.995), rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
def test_decay_far_from_the_rest_in_training(fused, dtype):
    """As a user comes to it: a line of 160 units with weights of 0.01, real passes, a radius."""
    net = delay_line(0.01, 160, dtype)
    optimizer = pk.PathSGD(net, lr=0.01, scale="path_norm", trust_radius=0.1, weight_decay=1e-4, fused=fused)
    rtol = 2.5 * torch.finfo(dtype).eps  # two roundings a step, and the expected number's
    for n in (1, 2):
        optimizer.zero_grad()
        (net(torch.rand(200, 4, 1, dtype=dtype)) - 1).square().mean().backward()
        optimizer.step()
        found = net.rnn.weight_hh_l0.detach()[:, -1]
        torch.testing.assert_close(found, torch.full_like(found, (1 - 1e-6) ** n), rtol=rtol, atol=0)


@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
def test_momentum_beyond_canonical_coordinates(fused):
    net = make(1, bias=False, head_bias=False, ih=1e200, hh=0.5, head=1e-200)
    optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, scale="path_norm", seq_len=5, fused=fused)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[net.head.weight]["momentum_buffer"].fill_(1e150)
    optimizer.step()
    torch.testing.assert_close(net.head.weight.item(), -9e146)


@DTYPES
@pytest.mark.parametrize("kind", ("given", "decay", "momentum"))
@pytest.mark.parametrize("link, hidden", ((0.01, 160), (1e-30, 30), (100.0, 160), (1e30, 30)))
def test_a_radius_where_canonical_coordinates_end(link, hidden, kind, dtype):
    """What has a path may be 0 there, or infinite: its length had been 0, or the step refused."""
    rtol = 1e-3 if dtype == F32 else 1e-10  # a spacing of 1.0 beside steps of 8e-5; beside roundings of κ
    for fused in (None,) if kind == "given" else (None, False):
        net = delay_line(link, hidden, dtype)
        weight = net.rnn.weight_ih_l0
        weight.grad.zero_()
        decay, options = float(kind != "momentum"), {"scale": "path_norm", "trust_radius": 1e-3, "seq_len": 2 * hidden}
        if kind == "given":
            base = torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=decay)
            optimizer = pk.PathOptimizer(base, net, **options)
        else:
            momentum = 0.9 * (kind == "momentum")
            optimizer = pk.PathSGD(net, lr=0.5, momentum=momentum, weight_decay=decay, fused=fused, **options)
        if kind == "momentum":
            optimizer.step()
            for p in net.parameters():
                optimizer.state[p]["momentum_buffer"].copy_(p.detach())
        # Every weight on the line is on the same path: κ w² = γ², and all are shortened by the same part.
        before = weight[0, 0].item()
        optimizer.step()
        torch.testing.assert_close(before - weight[0, 0].item(), 1e-3 / hidden**0.5, rtol=rtol, atol=0)


@DTYPES
@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("link, hidden", ((0.01, 160), (0.01, 400), (1e-30, 30), (100.0, 400), (1e30, 12)))
@pytest.mark.parametrize("kind", ON_A_PATH)
def test_steps_on_a_path_between_units_far_apart(kind, link, hidden, fused, dtype):
    """They had been lost in silence, or refused, where canonical coordinates in float64 do not hold the gradient, the
    quotient, γ/sqrt(κ), or the head's weight, of which γ² is formed where the head has a bias."""
    for head_bias in (False, True):
        assert_steps_on_a_path(kind, link, hidden, dtype, head_bias, fused=fused)


@DTYPES
@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
def test_the_constant_of_a_first_step_between_units_far_apart(fused, dtype):
    # κ is below 1e-10 γ², so that g/(κ + eps γ²) = g/γ², and the constant γ².
    for link, hidden in ((2e14, 10), (3e14, 10), (1e10, 14), (2e4, 32)):
        net = delay_line(link, hidden, dtype)
        with torch.no_grad():
            net.rnn.weight_hh_l0[:, -1] = 0
            net.rnn.weight_ih_l0[0, 0] = 1e6
        net.rnn.weight_ih_l0.grad.fill_(1.0)
        before = net.rnn.weight_ih_l0.detach().clone()
        pk.PathSGD(net, lr=1.0, scale="first_step", eps=1.0, seq_len=2 * hidden, fused=fused).step()
        found = (before - net.rnn.weight_ih_l0.detach())[:, 0]
        torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6 if dtype == F32 else 1e-9, atol=0)
    # Gradients of entries whose quotient no float64 holds: the constant is small, and the step within range.
    net = delay_line(1e-24, 6, dtype)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    pk.PathSGD(net, lr=1.0, scale="first_step", seq_len=12, fused=fused).step()
    # By far the longest quotient is W_hh[0, 4]'s, from the end to the beginning; the constant makes it as long as g.
    count = sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(-net.rnn.weight_hh_l0[0, 4].item(), count**0.5, rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
def test_damping_of_what_has_no_path_between_units_far_apart(fused, dtype):
    """g/(eps γ²) was 0, as γ² in canonical coordinates is infinite."""
    for link, hidden in ((2.6e23, 10), (1.5e26, 10), (2e-24, 10), (1e30, 30), (1e-30, 30)):
        net = delay_line(link, hidden, dtype)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        net.rnn.weight_hh_l0.grad[:, -1] = 1.0
        pk.PathSGD(net, lr=1e-3, scale="path_norm", eps=0.5, seq_len=2 * hidden, fused=fused).step()
        found = net.rnn.weight_hh_l0.detach()[:, -1]
        torch.testing.assert_close(found, torch.full_like(found, 0.998), rtol=1e-6 if dtype == F32 else 1e-12, atol=0)


@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("link, hidden, gradient", ((0.01, 160, 1e-310), (0.01, 162, 5e-324), (0.0107, 166, 1e-310)))
def test_an_overflow_between_units_far_apart_is_refused(link, hidden, gradient, fused):
    """The kernels had written -inf: an exponent of 1060 was taken for 1000."""
    net = delay_line(link, hidden, F64)
    net.rnn.weight_ih_l0.grad.zero_()
    net.rnn.weight_hh_l0.grad[0, hidden - 2] = gradient
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm", seq_len=4 * hidden, fused=fused)
    with pytest.raises(FloatingPointError, match="rnn.weight_hh_l0 overflows"):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


@DTYPES
@pytest.mark.parametrize("kind", sorted(ON_A_PATH.keys() - {"first_step", "eps"}))  # which no rescaling leaves alone
def test_tiny_gradients_change_no_bit_under_a_rescaling(kind, dtype):
    """Of an input that is next to never on: steps were taken in wider arithmetic, but only in the rescaled network."""
    tiny, alpha = (1e-31, 2.0**-30) if dtype == F32 else (1e-130, 2.0**-300)
    torch.manual_seed(0)
    net = PathNetwork(ReLURNN(3, 16), nn.Linear(16, 2), outputs="last").to(dtype)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    net.rnn.weight_ih_l0.grad[0, 0] = tiny
    other = copy.deepcopy(net)
    node_rescale_(other, [torch.full((16,), alpha, dtype=dtype)])
    for name, p, q in zip(dict(net.named_parameters()), net.parameters(), other.parameters(), strict=True):
        factor = {"head.weight": alpha, "head.bias": 1.0, "rnn.weight_hh_l0": 1.0}.get(name, 1 / alpha)
        q.grad = p.grad * factor
    before = [p.detach().clone() for p in net.parameters()]
    for network in (net, other):
        ON_A_PATH[kind](network, 1, seq_len=20).step()
    assert not any(map(torch.equal, before, net.parameters()))
    node_rescale_(other, [torch.full((16,), 1 / alpha, dtype=dtype)])
    assert all(map(torch.equal, net.parameters(), other.parameters()))
