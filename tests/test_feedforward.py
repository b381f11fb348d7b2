import copy
import io
import itertools
import math
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import pathrnn_kernels as pk

#: float64, some ten layers of small width: hundreds of roundings.
TOLERANCE = {"rtol": 1e-12, "atol": 0.0}


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def dense(k):
    return {name: k.dense(name) for name in k.factors}


# --- the oracle: half the diagonal of the Hessian of γ² ---------------------------------------------------------------


class SquaredMap(nn.Module):
    """Pooling as the linear map of its squared weights: what it makes of one-hot inputs, squared."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        example = x[0, 0]
        one_hots = torch.eye(example.numel(), dtype=x.dtype).reshape(-1, 1, *example.shape)
        weights = self.pool(one_hots).square()
        return torch.tensordot(x.flatten(2), weights[:, 0], 1)


class OneHots(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x):
        return self.weight.sum(0).expand(*x.shape, -1).clone()


def squared(module):
    for name, child in module.named_children():
        if "Pool" in type(child).__name__:
            setattr(module, name, SquaredMap(child))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, OneHots(child))
        else:
            squared(child)
    return module


def hessian(net, shape):
    """γ² and half the diagonal of its Hessian, by autograd through p²."""
    net = squared(copy.deepcopy(net).eval())
    parameters, ones = values(net), torch.ones(1, *shape, dtype=torch.float64)

    def gamma2(name, p):
        return functional_call(net, {n: (p if n == name else q).square() for n, q in parameters.items()}, (ones,)).sum()

    def half_diagonal(name, p):
        matrix = torch.autograd.functional.hessian(lambda q: gamma2(name, q), p)
        return matrix.reshape(p.numel(), p.numel()).diagonal().reshape(p.shape) / 2

    return gamma2(None, None), {name: half_diagonal(name, p) for name, p in parameters.items()}


class Residual(nn.Module):
    """ResNet's block, shortcut added in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


class Branches(nn.Module):
    """One layer on both halves of the input, a weight for every channel, and one matrix by hand."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(2, 3), nn.Linear(6, 1)
        self.scale, self.matrix = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x):
        halves = torch.cat([self.layer(part).relu() for part in x.chunk(2, dim=-1)], -1)
        turned = torch.einsum("bi,oij->bj", x, self.matrix) + x @ self.matrix[0]
        return self.head(F.leaky_relu(self.scale * halves)) + turned.sum(-1, keepdim=True)


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other, self.head = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x):
        out = self.layer(x.to(self.layer.weight))
        part = out[:, 1:3]
        kept = out.relu()
        part += self.other(x)
        return self.head(out) + kept.reshape(-1, 2, 2).sum(1)


class Tokens(nn.Module):
    """Positions added in place; two matrices at once, and one behind a mask."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(5, 3), nn.Parameter(torch.randn(4, 3))
        self.first, self.second, self.head = (nn.Linear(3, 2, bias=False) for _ in range(3))
        self.register_buffer("mask", torch.ones(2, 3).tril())

    def forward(self, tokens):
        x = self.embedding(tokens.long())
        x += self.positions
        both = F.linear(x, torch.cat([self.first.weight, self.second.weight])).relu()
        return both.sum(-1) + F.linear(x, self.head.weight * self.mask).sum(-1)


def pooled(pool, dims=2):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(conv(1, 2, 2), nn.ReLU(), pool, conv(2, 1, 1))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2, bias=False)), (3,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.ReLU(True), nn.Conv1d(3, 1, 2)), (2, 7)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
        ),
        (2, 3, 5),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3, padding="same"), nn.ReLU(), nn.Conv3d(2, 1, 2)), (1, 2, 2, 3)),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 3, 2, output_padding=1), nn.ReLU()), (2, 3)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 2, 3, 2, padding=1, groups=2), (2, 3, 2)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2, dilation=2), (1, 2, 2, 1)),
    **{
        f"padding {mode}": (
            lambda mode=mode: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.Conv2d(2, 1, 2)),
            (1, 3, 4),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "average 1d": (lambda: pooled(nn.AvgPool1d(3, 2, padding=1, ceil_mode=True), 1), (1, 7)),
    "average 2d": (lambda: pooled(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)), (1, 5, 7)),
    "average of the inside": (lambda: pooled(nn.AvgPool2d((3, 2), 2, (1, 0), count_include_pad=False)), (1, 5, 7)),
    "average with a divisor": (lambda: pooled(nn.AvgPool2d(2, divisor_override=3)), (1, 5, 5)),
    "average 3d": (lambda: pooled(nn.AvgPool3d(2, 1, padding=1), 3), (1, 3, 3, 4)),
    "adaptive average 1d": (lambda: pooled(nn.AdaptiveAvgPool1d(3), 1), (1, 6)),
    "adaptive average 2d": (lambda: pooled(nn.AdaptiveAvgPool2d((2, None))), (1, 4, 3)),
    "adaptive average 3d": (lambda: pooled(nn.AdaptiveAvgPool3d((2, 1, 2)), 3), (1, 4, 3, 3)),
    "max 1d": (lambda: pooled(nn.MaxPool1d(3, 2, padding=1), 1), (1, 7)),
    "max 2d": (lambda: pooled(nn.MaxPool2d((3, 2), 2, padding=(1, 0), ceil_mode=True)), (1, 5, 6)),
    "max 3d": (lambda: pooled(nn.MaxPool3d(2, 1), 3), (1, 3, 3, 4)),
    "adaptive max 1d": (lambda: pooled(nn.AdaptiveMaxPool1d(2), 1), (1, 6)),
    "adaptive max 2d": (lambda: pooled(nn.AdaptiveMaxPool2d((2, 2))), (1, 4, 6)),
    "adaptive max 3d": (lambda: pooled(nn.AdaptiveMaxPool3d(1), 3), (1, 2, 3, 3)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 1)),
        (4,),
    ),
    "residual": (lambda: nn.Sequential(Residual(), Residual(), nn.Flatten(2), nn.Linear(9, 1)), (2, 3, 3)),
    "branches": (Branches, (4,)),
    "views": (Views, (3,)),
    "tokens": (Tokens, (4,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_kappa_is_half_the_diagonal_of_the_hessian(name):
    make, shape = NETWORKS[name]
    net = make().double()
    gamma2, expected = hessian(net, shape)
    k = pk.kappa_of_module(net, shape)
    torch.testing.assert_close(k.log_path_norm.exp(), gamma2, **TOLERANCE)
    for parameter, kappa in dense(k).items():
        torch.testing.assert_close(kappa, expected[parameter], **TOLERANCE, msg=lambda m, p=parameter: f"{p}: {m}")
    assert list(k.factors) == list(expected) and k.bound == 0


def test_kappa_is_a_sum_over_paths():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    paths = []
    for i, j, o in itertools.product((0, 1, None), (0, 1, 2, None), (0, 1)):  # None is the constant node
        if j is not None:
            first = ("0.bias", (j,)) if i is None else ("0.weight", (j, i))
            paths.append([first, ("2.weight", (o, j))])
        elif i is None:
            paths.append([("2.bias", (o,))])
    parameters = values(net)
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    gamma2 = 0.0
    for path in paths:
        squares = [parameters[name][index].item() ** 2 for name, index in path]
        gamma2 += math.prod(squares)
        for place, (name, index) in enumerate(path):
            expected[name][index] += math.prod(squares[:place] + squares[place + 1 :])
    k = pk.kappa_of_module(net, (2,))
    assert k.log_path_norm.exp().item() == pytest.approx(gamma2, rel=1e-12)
    torch.testing.assert_close(dense(k), expected, **TOLERANCE)


class Constants(nn.Module):
    def __init__(self, register):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        for name, size in (("scale", 4), ("shift", 4), ("mask", (2, 4))):
            register(self, name, torch.randn(size))

    def forward(self, x):
        h = (self.layer(x) * self.scale - self.shift).relu()
        return F.linear(h, self.head.weight, self.head.bias) + h @ self.mask.T


def test_constants_count_as_weights_would():
    def as_weight(module, name, value):
        module.register_parameter(name, nn.Parameter(value))

    torch.manual_seed(1)
    weights = Constants(as_weight).double()
    torch.manual_seed(1)
    buffers = Constants(nn.Module.register_buffer).double()
    expected, k = pk.kappa_of_module(weights, (3,)), pk.kappa_of_module(buffers, (3,))
    assert k.log_path_norm == expected.log_path_norm
    for name in k.factors:
        assert torch.equal(k.dense(name), expected.dense(name))


class Fixed(nn.Module):
    """Constants where layers have weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(3, 2, 2)
        self.register_buffer("table", torch.full((5, 3), 2.0))
        self.register_buffer("bias", torch.full((2,), 3.0))

    def forward(self, tokens):
        x = F.embedding(tokens, self.table).mT
        return F.avg_pool1d(F.conv1d(x, self.layer.weight, self.bias), 2) + F.max_pool1d(self.layer(x), 2)


def test_constant_tables_and_biases():
    net = Fixed().double()
    k = pk.kappa_of_module(net, (5,))
    # Four places of the convolution in two windows; five rows of 2², with 2 · 2 · (1/2)² and 2 · 2 of weight 1.
    kappa_weight = 5 * 4 * (1 + 4)
    assert k.dense("layer.weight").eq(kappa_weight).all() and k.dense("layer.bias").eq(4).all()
    gamma2 = sum((p.square() * factor).sum() for p, factor in zip(net.parameters(), (kappa_weight, 4), strict=True))
    torch.testing.assert_close(k.log_path_norm.exp(), (gamma2 + 2 * 3**2).detach(), **TOLERANCE)


class Arithmetic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        y = self.layer(x)
        with torch.no_grad():  # a path all the same
            mean = y.mean(1, keepdim=True)
        return torch.add(1.5 * y, y / 4, alpha=2) - y - 3 + mean + y.amax(1, keepdim=True)


def test_numbers_are_squared_too():
    net = Arithmetic().double()
    k = pk.kappa_of_module(net, (3,))
    # From y: 1.5², (2/4)², (-1)², and to both outputs the mean's (1/2)² and the largest's 1.
    expected = torch.full((2, 3), 2.25 + 0.25 + 1 + 2 * (0.25 + 1), dtype=torch.float64)
    torch.testing.assert_close(k.dense("layer.weight"), expected, **TOLERANCE)
    gamma2 = (net.layer.weight.square() * expected).sum() + 2 * 3**2
    torch.testing.assert_close(k.log_path_norm.exp(), gamma2.detach(), **TOLERANCE)


def test_compiled_modules_run_as_they_were_written():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    expected = dense(pk.kappa_of_module(net, (3,)))

    def backend(graph, inputs):
        pytest.fail("the pass has been compiled")

    k = pk.kappa_of_module(torch.compile(net, backend=backend), (3,))
    torch.testing.assert_close(dense(k), {f"_orig_mod.{name}": p for name, p in expected.items()}, rtol=0, atol=0)


def test_factors_are_not_expanded():
    net = nn.Sequential(nn.Embedding(1000, 3), nn.Linear(3, 2))
    k = pk.kappa_of_module(net, (4,))
    assert k.factors["0.weight"].shape == (1, 3)
    assert all(factor.dtype == torch.float32 for factor in k.factors.values())
    assert k.dense("0.weight").shape == (1000, 3)


def test_parameters_on_no_path_have_no_kappa():
    net = nn.Sequential(nn.Linear(3, 2))
    net.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    k = pk.kappa_of_module(net, (3,))
    assert not k.dense("unused").any() and k.dense("unused").shape == (2, 2)
    assert not k.relative("unused").any()
    net.append(nn.Linear(2, 1, bias=False))
    net[1].weight.data.zero_()
    k = pk.kappa_of_module(net, (3,))
    assert k.log_path_norm == -math.inf
    assert not k.dense("0.weight").any() and k.dense("1.weight").all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kappa_is_the_same_without_gradients(mode):
    net = nn.Linear(3, 2)
    expected = pk.kappa_of_module(net, (3,))
    with mode():
        k = pk.kappa_of_module(net, (3,))
    assert k.dense("weight").eq(1).all()
    torch.testing.assert_close(dense(k), dense(expected), rtol=0, atol=0)
    assert not k.factors["weight"].is_inference()


# --- range ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [1e-30, 1.0, 1e30])
def test_depth_and_size_do_not_overflow(entry):
    depth, width = 60, 8
    net = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())))
    for p in net.parameters():
        nn.init.constant_(p, entry)
    k = pk.kappa_of_module(net, (width,))
    log_square = 2 * math.log(net[0].weight[0, 0].item())
    log_norm = math.log(width) + depth * (math.log(width) + log_square)  # width^(depth + 1) paths
    assert k.log_path_norm.item() == pytest.approx(log_norm, rel=1e-12)
    for name, factor in k.factors.items():
        found = factor.double().log() + k.log_scales[name]
        # Σ κ p̃ over a layer is γ², and its entries are equal.
        expected = log_norm - 2 * math.log(width) - log_square
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize("entry", [2.0**-1040, 2.0**-1041, 2.0**1000])
def test_weights_at_the_ends_of_float64(entry):
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False)).double()
    for p in net.parameters():
        nn.init.constant_(p, 1.0)
    nn.init.constant_(net[1].weight, entry)
    k = pk.kappa_of_module(net, (1,))
    log_kappa = {name: k.factors[name].log().item() + k.log_scales[name] for name in k.factors}
    square = 2 * math.log(entry)
    assert log_kappa == pytest.approx({"0.weight": square, "0.bias": square, "1.weight": math.log(2)}, rel=1e-12)
    assert k.log_path_norm.item() == pytest.approx(square + math.log(2), rel=1e-12)


@pytest.mark.parametrize(("entry", "lost"), [(2.0**500, "1.bias"), (2.0**-500, "0.weight"), (2.0**-1030, "0.weight")])
def test_what_meets_paths_of_another_size_is_refused_or_right(entry, lost):
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).double()
    for p in net.parameters():
        nn.init.constant_(p, 1.0)
    nn.init.constant_(net[1].weight, entry)
    with pytest.raises(FloatingPointError, match=f"κ of {lost} underflows"):
        pk.kappa_of_module(net, (1,))
    nn.init.constant_(net[1].weight, entry ** (1 / 4))
    k = pk.kappa_of_module(net, (1,))
    square = math.sqrt(entry)
    expected = {"0.weight": square, "0.bias": square, "1.weight": 2.0, "1.bias": 1.0}
    assert {name: k.dense(name).item() for name in k.factors} == pytest.approx(expected, rel=1e-12)


def test_kappa_follows_any_rescaling():
    """κ p̃ / γ² stays, with units 2^200 apart on paths that meet."""
    make, shape = NETWORKS["residual"]
    net = make().double()
    shares = {}
    for exponent in (0, 200, -200):
        rescaled = copy.deepcopy(net)
        for block in rescaled[:2]:
            block.conv1.weight.data *= 2.0**exponent
            block.conv1.bias.data *= 2.0**exponent
            block.conv2.weight.data *= 2.0**-exponent
        k = pk.kappa_of_module(rescaled, shape)
        shares[exponent] = {name: p.detach() / k.relative(name) * p.detach() for name, p in rescaled.named_parameters()}
    assert all((share > 0).all() for share in shares[0].values())
    for exponent in (200, -200):
        torch.testing.assert_close(shares[exponent], shares[0], **TOLERANCE)


@pytest.mark.parametrize("log2", (60, 76, 80, 110))
def test_entries_far_below_the_largest_keep_theirs(log2):
    """In float32, on one scale of the tensor's, they were 0: a step of none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in (twin[0].weight, twin[0].bias):
            p[0] *= 2.0**log2
        twin[2].weight[:, 0] *= 2.0**-log2
    before, after = pk.kappa_of_module(net, (2,)), pk.kappa_of_module(twin, (2,))
    for name, factors in (("0.weight", [[4.0**log2], [1.0]]), ("2.weight", [[4.0**-log2, 1.0]])):
        expected = before.relative(name) * torch.tensor(factors, dtype=torch.float64)
        torch.testing.assert_close(after.relative(name).expand_as(expected), expected, rtol=1e-13, atol=0)
    inputs = torch.rand(5, 2)
    for n in (net, twin):
        optimizer = pk.PathSGD(pk.FeedForward(n, (2,)), lr=0.1, scale="path_norm")
        n(inputs).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(twin(inputs), net(inputs), rtol=1e-6, atol=0)


class Module(nn.Module):
    """With two linear maps of ones, and a forward of its own."""

    def __init__(self, forward):
        super().__init__()
        self.l, self.m, self.own = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), forward
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x):
        return self.own(self, x)


def dropped(self, x):
    h = self.l(x)
    y = F.dropout(h, 0.0, True)  # h itself
    y += self.m(x)
    return h + y


def copied(self, x):
    h = self.l(x)
    y = h.to(h.dtype, copy=True)
    y += self.m(x)
    return h + y


@pytest.mark.parametrize(("forward", "expected"), [(dropped, 4.0), (copied, 3.0)])
def test_tensors_share_memory_as_they_do_in_the_module(forward, expected):
    net = Module(forward)
    assert net(torch.ones(1, 1)) == expected
    assert math.isclose(pk.kappa_of_module(net, (1,)).log_path_norm, math.log(expected), rel_tol=1e-12)


def test_sums_are_of_float64_whatever_dtype_they_are_asked_for():
    net = Module(lambda self, x: self.l(x).sum(-1, dtype=torch.float32))
    nn.init.constant_(net.l.weight, 1e-25)
    assert math.isclose(pk.kappa_of_module(net, (1,)).log_path_norm, 2 * math.log(1e-25), rel_tol=1e-8)
    with pytest.raises(ValueError, match="rounds activations"):
        pk.kappa_of_module(Module(lambda self, x: self.l(x).sum(-1, dtype=torch.int64)), (1,))


def test_global_backward_hooks_are_for_gradients_of_a_loss():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    expected = dense(pk.kappa_of_module(net, (2,)))
    seen = []
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: seen.append(1))
    try:
        found = dense(pk.kappa_of_module(net, (2,)))
        assert not seen
        net(torch.rand(3, 2, requires_grad=True)).sum().backward()
        assert seen
    finally:
        handle.remove()
    assert all(torch.equal(found[name], k) for name, k in expected.items())


def test_what_float64_cannot_hold_is_refused():
    net = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(8))).double()
    for p in net.parameters():
        p.data = torch.diag(torch.tensor([1.0, 1e100], dtype=torch.float64))
    net[0].weight.data[1, 1] = 0.0  # what grows beside the paths has no entry in γ², but a κ
    with pytest.raises(FloatingPointError, match="κ of 0.weight overflows"):
        pk.kappa_of_module(net, (2,))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_every_unsupported_part_is_reported_at_once():
    net = nn.Sequential(
        nn.Linear(3, 4),
        nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()),
        nn.LayerNorm(4),
        nn.Sequential(Gate(), nn.Softmax(-1)),
        nn.RNN(4, 4, nonlinearity="relu"),
    )
    with pytest.raises(ValueError) as error:
        pk.kappa_of_module(net, (2, 3))
    first, *parts = str(error.value).splitlines()
    assert "module has 6 parts" in first
    assert [part.split(":")[0].strip() for part in parts] == [
        "1.0 (BatchNorm1d)",
        "1.1 (Tanh) calls torch.tanh",
        "2 (LayerNorm)",
        "3.0 (Gate) calls torch.Tensor.mul",
        "3.1 (Softmax) calls torch.nn.functional.softmax",
        "4 (RNN)",
    ]
    assert "PathNetwork" in parts[-1]
    net.append(nn.Tanh())  # which does not take the tuple that an RNN returns
    with pytest.raises(ValueError, match=r"4 \(RNN\): .*\nIt then fails, before all was looked at: tanh\(\)"):
        pk.kappa_of_module(net, (2, 3))


class Gate(nn.Module):
    def forward(self, x):
        return x * x


class Calls(nn.Module):
    """A layer, and a function of it and its output."""

    def __init__(self, call):
        super().__init__()
        self.layer, self.call = nn.Linear(4, 4), call
        self.loose = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        return self.call(self, self.layer(x))


REFUSED = {
    "gate": (lambda m, y: y * y, "multiplies two activations"),
    "attention": (lambda m, y: y @ y.T, "multiplies two activations"),
    "abs": (lambda m, y: y.abs(), "torch.Tensor.abs: it is not linear"),
    "division": (lambda m, y: y / y.sum(), "divides by an activation"),
    "norm": (lambda m, y: F.normalize(y), "not linear"),
    "clamp": (lambda m, y: y.clamp(max=1), "clamp"),
    "relu6": (lambda m, y: F.relu6(y), "relu6"),
    "where": (lambda m, y: torch.where(y > 0, y, 0), "__gt__|gt"),
    "branch on data": (lambda m, y: y if y.sum() > 0 else -y, "gt"),
    "item": (lambda m, y: y * y.sum().item(), "item"),
    "data": (lambda m, y: y.data, "data"),
    "detach": (lambda m, y: y.detach(), "detach"),
    "out of torch": (lambda m, y: torch.as_tensor(y.numpy()), "numpy"),
    "set": (lambda m, y: y.__setitem__(0, 0.0), "__setitem__"),
    "index": (lambda m, y: y[y.long()], "rounds activations"),
    "integers": (lambda m, y: y.to(torch.int64).to(y), "Tensor.to: it rounds activations"),
    "largest and where": (lambda m, y: torch.adaptive_max_pool1d(y, 2)[0], "adaptive_max_pool1d"),
    "pad": (lambda m, y: F.pad(y, (1, 1), value=2.0), "pads with 2.0"),
    "dilation": (lambda m, y: F.max_pool1d(y, 2, dilation=2), "dilation=2"),
    "indices": (lambda m, y: F.max_pool1d(y, 2, return_indices=True)[0], "max_pool1d_with_indices"),
    "computed tokens": (lambda m, y: F.embedding(y, m.layer.weight), "indices are computed"),
    "computed weight": (lambda m, y: F.linear(y, m.layer.weight.relu()), "by computed weights"),
    "loose weight": (lambda m, y: y * m.loose[0], "not an attribute of its module"),
    "clipped weight": (lambda m, y: y + m.layer.bias.relu_(), "changes a weight in place"),
    "changed weight": (lambda m, y: y + m.layer.bias.add_(1), "changes its input, a weight or a constant in place"),
    "layer twice": (lambda m, y: m.layer(y.relu()), r"\(Linear\) .*layer.weight lies twice on a path"),
    "matrix squared": (lambda m, y: y + (m.layer.weight @ m.layer.weight).sum(), "layer.weight lies twice"),
    "custom op": (lambda m, y: torch.ops.aten.relu.default(y), "aten.relu"),
    "to half": (lambda m, y: y.half(), "half"),
    "complex": (lambda m, y: y * 1j, "complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s)module has 1 part .*{words}"):
        pk.kappa_of_module(Calls(call), (4,))


class TwiceThroughAView(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        out = self.other(x)
        part = out[:, :2]
        part += self.layer(x)[:, :2]
        return self.layer(out)


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def recurrent():
    return nn.Sequential(nn.Linear(3, 2), pk.ReLURNN(2, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tied, r"2 \(Linear\) .* 0.weight lies twice on a path, so that κ⁽²⁾ is not 0"),
        (TwiceThroughAView, "layer.weight lies twice"),
        (recurrent, r"1 \(ReLURNN\): recurrent, .*PathNetwork"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "module has 1 part (?s:.*)_weight_norm"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.PReLU()), r"1 \(PReLU\)"),
        (lambda: nn.Bilinear(3, 3, 1), r"the module itself \(Bilinear\): it multiplies"),
        (lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm=None"),
        (lambda: nn.Conv2d(3, 3, 3), "module fails on an input of shape"),
        (lambda: nn.GRUCell(3, 3), "recurrent"),
        (nn.ReLU, "without parameters"),
        (lambda: nn.LazyLinear(2), "has no shape yet"),
    ],
)
def test_modules_that_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        pk.kappa_of_module(make(), (3,))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("net", (3,)), TypeError, "module is a str"),
        ((nn.Linear(3, 2), 3), TypeError, "input_shape is 3; it must be a tuple of sizes"),
        ((nn.Linear(3, 2), (3.0,)), TypeError, "must be positive integers"),
        ((nn.Linear(3, 2), (0,)), ValueError, "must be at least 1"),
        ((nn.Linear(3, 2), (4,)), ValueError, r"shape \(1, 4\), a batch of one: RuntimeError"),
        ((Pair(3, 2), (3,)), ValueError, "returns a tuple"),
        ((nn.Linear(3, 2).half(), (3,)), TypeError, "dtype torch.float16"),
        (
            (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double()), (3,)),
            TypeError,
            "1.weight is torch.float64 on cpu",
        ),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        pk.kappa_of_module(*arguments)


def test_weights_that_are_not_finite():
    net = nn.Linear(3, 2)
    net.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="bias has a nan or infinite entry"):
        pk.kappa_of_module(net, (3,))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)], ids=["refused", "served"])
def test_nothing_is_changed(layer):
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.inference_mode():
        try:
            pk.kappa_of_module(net, (3,))
        except ValueError:
            assert isinstance(layer, nn.BatchNorm1d)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training and all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in net)
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())


# --- PathOptimizer ----------------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2, 2),
    ).double()


TRAINED = {"mlp": (mlp, (3,)), "cnn": (cnn, (1, 4, 4))}
trained = pytest.mark.parametrize("kind", TRAINED)


def backward(net, shape, seed=0):
    x = torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    loss = net(x).sub(1).square().mean()
    loss.backward()
    return loss.item()


@trained
@pytest.mark.parametrize("scale", ["none", "path_norm", "first_step"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_path_sgd_is_equation_8(kind, scale, eps):
    make, shape = TRAINED[kind]
    net = make()
    optimizer = pk.PathSGD(pk.FeedForward(net, shape), lr=1e-4, scale=scale, eps=eps)
    constant = None
    for step in range(4):
        backward(net, shape, step)
        before, k = values(net), pk.kappa_of_module(net, shape)
        gamma2 = k.log_path_norm.exp()
        grad = {name: p.grad.clone() for name, p in net.named_parameters()}
        quotient = {name: grad[name] / (k.dense(name) + eps * gamma2) for name in grad}
        if constant is None:
            lengths = [math.sqrt(sum(t.square().sum() for t in tensors.values())) for tensors in (grad, quotient)]
            constant = lengths[0] / lengths[1]
        factor = {"none": 1.0, "path_norm": gamma2, "first_step": constant}[scale]
        optimizer.step()
        for name, p in net.named_parameters():
            expected = before[name] - 1e-4 * factor * quotient[name]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(p.grad, grad[name])


def rescale_(net):
    """Theorem 1 on the hidden units, or channels."""
    first, second, third = (layer for layer in net if hasattr(layer, "weight"))
    for before, after, size in ((first, second, first.bias.numel()), (second, third, second.bias.numel())):
        alpha = torch.rand(size, dtype=torch.float64) * 4 + 0.1
        before.weight.data *= alpha.reshape(-1, *[1] * (before.weight.dim() - 1))
        before.bias.data *= alpha
        after.weight.data /= alpha.reshape(-1, *[1] * (after.weight.dim() - 2))
    return net


@trained
@pytest.mark.parametrize("radius", [None, 1e-3])
def test_steps_commute_with_rescaling(kind, radius):
    make, shape = TRAINED[kind]
    net = make()
    rescaled = rescale_(copy.deepcopy(net))
    assert any((p - q).abs().max() > 0.1 for p, q in zip(net.parameters(), rescaled.parameters(), strict=True))
    losses = []
    for n in (net, rescaled):
        optimizer = pk.PathSGD(pk.FeedForward(n, shape), lr=1e-2, scale="path_norm", momentum=0.9, trust_radius=radius)
        losses.append([])
        for step in range(5):
            losses[-1].append(backward(n, shape, step))
            optimizer.step()
    assert abs(losses[0][0] - losses[0][-1]) > 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


@trained
def test_trust_radius(kind):
    make, shape = TRAINED[kind]
    net = make()
    before, k = values(net), pk.kappa_of_module(net, shape)
    optimizer = pk.PathSGD(pk.FeedForward(net, shape), lr=10.0, trust_radius=1e-2)
    backward(net, shape)
    optimizer.step()
    length2 = sum((k.dense(name) * (p.detach() - before[name]).square()).sum() for name, p in net.named_parameters())
    assert math.sqrt(length2 / k.log_path_norm.exp()) == pytest.approx(1e-2, rel=1e-9)


@trained
def test_state_dicts_continue_bit_for_bit(kind):
    make, shape = TRAINED[kind]
    net = make()

    def optimizer(n):
        adam = torch.optim.Adam(n.parameters(), lr=1e-3)
        return pk.PathOptimizer(adam, pk.FeedForward(n, shape), scale="first_step", trust_radius=0.1, update_every=3)

    def train(n, o, steps):
        for step in steps:
            backward(n, shape, step)
            o.step()

    first = optimizer(net)
    train(net, first, range(4))  # κ of step 3 is cached
    other = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer(other)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(net, first, range(4, 8))
    train(other, second, range(4, 8))
    torch.testing.assert_close(values(net), values(other), rtol=0, atol=0)


def test_update_every_caches_kappa(monkeypatch):
    net = mlp()
    wrapped = pk.FeedForward(net, (3,))
    calls = []
    monkeypatch.setattr(wrapped, "kappa", lambda: calls.append(1) or pk.kappa_of_module(net, (3,)))
    optimizer = pk.PathSGD(wrapped, lr=1e-4, update_every=3)
    for step in range(7):
        backward(net, (3,), step)
        optimizer.step()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seq_len": 5}, "seq_len is 5, but net is a FeedForward"), ({"second_term": True}, "second_term is True, but")],
)
def test_options_of_recurrent_networks_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        pk.PathSGD(pk.FeedForward(mlp(), (3,)), **options)


def test_a_bare_module_is_refused():
    with pytest.raises(TypeError, match=r"net is a Sequential; .*FeedForward\(module, input_shape\)"):
        pk.PathSGD(mlp())


def test_feed_forward_refuses_at_once():
    with pytest.raises(ValueError, match=r"1 \(Sigmoid\)"):
        pk.FeedForward(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), (3,))


@pytest.mark.parametrize("constant", (0.1, 1e-50, 1e40, 1e-200, 1e200))
def test_constants_are_float64(constant):
    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x):
            return self.linear(x) * constant

    kappa = pk.kappa_of_module(Times(), (2,))
    mantissa, exponent = kappa.scaled["linear.bias"].parts()
    found = mantissa.log() + exponent.double() * math.log(2)
    torch.testing.assert_close(found, torch.full_like(found, 2 * math.log(constant)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("register", ("register_full_backward_hook", "register_full_backward_pre_hook"))
def test_backward_hooks_are_for_gradients_of_a_loss(register):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    expected, seen = dense(pk.kappa_of_module(module, (4,))), []
    getattr(module[0], register)(lambda *given: seen.append(given))
    optimizer = pk.PathSGD(pk.FeedForward(module, (4,)))
    found = dense(pk.kappa_of_module(module, (4,)))
    assert all(torch.equal(found[name], value) for name, value in expected.items()) and not seen
    module(torch.ones(3, 4, requires_grad=True)).sum().backward()
    assert len(seen) == 1
    optimizer.step()
    assert len(seen) == 1


def test_entries_that_float64_does_not_hold_beside_one_another_count_or_are_refused():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    for ratio in (1e150, 1e200):
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[1.0], [1 / ratio]], dtype=torch.float64))
            net[2].weight.copy_(torch.tensor([[1.0, ratio]], dtype=torch.float64))
        if ratio == 1e150:
            assert pk.kappa_of_module(net, (1,)).log_path_norm.item() == pytest.approx(math.log(2), rel=1e-12)
            continue
        with pytest.raises(
            FloatingPointError, match=r"square of an entry of 0.weight underflows .* but paths through it"
        ):
            pk.kappa_of_module(net, (1,))
    with torch.no_grad():  # a weight that decay has all but removed
        net[2].weight.fill_(1)
    k = pk.kappa_of_module(net, (1,))
    assert k.log_path_norm.item() == 0 and k.dense("0.weight").tolist() == [[1], [1]]


class Casts(nn.Module):
    """y is h, cast there and back; in place where memory is shared, h changes with it."""

    def __init__(self, cast, dtype=torch.float32):
        super().__init__()
        self.a, self.b, self.cast = nn.Linear(3, 2, dtype=dtype), nn.Linear(3, 2, dtype=dtype), cast

    def forward(self, x):
        h = self.a(x)
        y = self.cast(h, self.b.weight)
        y += self.b(x)
        return y.to(self.a.weight.dtype) + h


@pytest.mark.parametrize(
    ("cast", "shares"),
    [
        (lambda h, w: h.double(), (False, True)),
        (lambda h, w: h.float(), (True, False)),
        (lambda h, w: h.to(w.dtype), (True, True)),
        (lambda h, w: h.to(h.dtype), (True, True)),
        (lambda h, w: h.type_as(w), (True, True)),
        (lambda h, w: h.to("cpu"), (True, True)),
        (lambda h, w: h.to(h.dtype, copy=True), (False, False)),
        (lambda h, w: h.double().to(h.dtype), (False, True)),
    ],
)
def test_a_cast_shares_memory_where_it_does_in_the_module(cast, shares):
    for dtype, shared in zip((torch.float32, torch.float64), shares, strict=True):
        k = pk.kappa_of_module(Casts(cast, dtype), (3,))
        assert k.dense("b.bias").tolist() == [2 if shared else 1] * 2 and k.dense("a.bias").tolist() == [2, 2]


@pytest.mark.parametrize("call", (torch.add, torch.sub, Tensor.add_))
def test_a_constant_is_added_so_many_times(call):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 1, bias=False)

        def forward(self, x):
            return call(self.a(x), 2.0, alpha=3)

    net = Adds()
    norm = pk.kappa_of_module(net, (3,)).log_path_norm.exp().item()
    assert norm == pytest.approx(net.a.weight.double().square().sum().item() + 36, rel=1e-12)


class Frozen(nn.Module):
    """A part that runs in inference mode, with a constant of it."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with self.mode():
            h = F.relu(self.body(x)) * torch.full((4,), 3.0)
        return self.head(h.clone())


def test_paths_through_inference_mode_are_there_all_the_same():
    one, two = Frozen(torch.inference_mode), Frozen(torch.no_grad)
    two.load_state_dict(one.state_dict())
    found, expected = (dense(pk.kappa_of_module(m, (3,))) for m in (one, two))
    assert found["body.weight"].all()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2)
        self.reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed_modules(reentrant):
    module = Checkpointed()
    expected = dense(pk.kappa_of_module(module, (3,)))
    module.reentrant = reentrant
    found = dense(pk.kappa_of_module(module, (3,)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_threads_leave_hooks_of_all_modules_in_place():
    modules = [nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(4)]
    expected = [dense(pk.kappa_of_module(module, (3,))) for module in modules]
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    found, failed = {}, []

    def run(i):
        try:
            for _ in range(40):
                found[i] = dense(pk.kappa_of_module(modules[i % 4], (3,)))
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(nn.modules.module._global_backward_hooks) == 1
    finally:
        sys.setswitchinterval(interval)
        handle.remove()
        nn.modules.module._global_backward_hooks.clear()
    assert not failed
    for i, k in found.items():
        assert all(torch.equal(k[name], expected[i % 4][name]) for name in k)


def test_parameters_that_are_one_piece_of_memory_are_refused():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight.data = one.weight.data.t()
    with pytest.raises(ValueError, match="2.weight and 0.weight are one piece of memory"):
        pk.FeedForward(nn.Sequential(one, nn.ReLU(), two), (3,))


def test_hooks_of_all_modules_see_the_modules_alone():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, output: seen.append((m, tuple(output.shape))))
    try:
        module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        pk.kappa_of_module(module, (3,))
    finally:
        handle.remove()
    assert seen == [(module[0], (1, 4)), (module[1], (1, 4)), (module[2], (1, 2)), (module, (1, 2))]


FORKED = """
import os, signal, threading
import torch
import pathrnn_kernels as pk

torch.set_num_threads(1)
within, done = threading.Event(), threading.Event()

class Waiting(torch.nn.Linear):
    def forward(self, x):
        within.set()
        done.wait(60)
        return super().forward(x)

thread = threading.Thread(target=pk.kappa_of_module, args=(Waiting(3, 2), (3,)))
thread.start()
within.wait(60)
if (child := os.fork()) == 0:
    signal.alarm(20)
    pk.kappa_of_module(torch.nn.Linear(3, 2), (3,))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
thread.join()
"""


def test_a_process_forked_from_the_middle_of_a_pass_has_passes_of_its_own():
    """In a process without other threads than that one: forks and they do not go together."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stdout + done.stderr
