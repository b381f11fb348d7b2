"""The order of kernels that the GPU backends share, with the kernels of gpu_model.py: the C++ kernels are the truth."""

import itertools
import math

import gpu_model
import pass_cases
import pytest
import test_canonical
import tolerances
import torch
from pass_cases import PLAN, arguments, check, network, truth
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE

from pathrnn_kernels.ops import gpu

HIDDEN = 30


def run(net, seq_len, kappa1=True, factor=0.0):
    return pass_cases.run(gpu_model, net, seq_len, kappa1, factor)


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize("both", (False, True), ids=("forward", "bidirectional"))
@pytest.mark.parametrize("layers", (1, 2, 3))
def test_every_network_equals_the_cpu_kernels(layers, both, dtype):
    options = itertools.product((False, True), (0, 1, 2), (False, True), ("all", "last"), ("zeros", "ones"), (1, 2, 9))
    # All of them for one layer; a fifth, in which every option meets every other, where passes take longer.
    for bias, head, embedding, outputs, h0, seq_len in itertools.islice(
        options, 0, None, 5 if layers > 1 or both else 1
    ):
        net = network(5, layers, bias, head, embedding, outputs, h0, dtype, both)
        for factor in (0.0, 4.0):
            rtol = tolerances.path(dtype, layers * seq_len, 7)
            check(run(net, seq_len, factor=factor), truth(net, seq_len, factor), rtol, net)
        norm = run(net, seq_len, kappa1=False)
        assert norm.kappa == [] and norm.log_path_norm == run(net, seq_len).log_path_norm


@pytest.mark.parametrize("both", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("forward", "bidirectional"))
def test_growth_beyond_every_dtype(both):
    net = network(HIDDEN, dtype=torch.float32, both=both)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "weight_hh" in name:
                p.mul_(20)
    for factor in (0.0, 4.0):
        wanted = truth(net, 1000, factor)
        assert wanted.log_path_norm > 2000
        check(run(net, 1000, factor=factor), wanted, tolerances.path(torch.float32, 1000, HIDDEN), net)


def test_a_direction_that_float32_loses_beside_the_other_is_told():
    net = network(5, 2, dtype=torch.float32, both=True)
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(20)
    found = run(net, 60)
    assert found.arithmetic == -1
    net = net.double()
    check(run(net, 60), truth(net, 60), tolerances.path(torch.float64, 120, 10), net)


@pytest.mark.parametrize("where", ("weight_hh", "weight_ih", "head", "bias"))
def test_what_float32_loses_is_told(where):
    """One entry far below the others whose square vanishes in float32, on a path that matters to a unit."""
    net = network(4, dtype=torch.float32)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.eye(4))
        if where == "weight_hh":
            net.rnn.weight_hh_l0[1, 1] = 1e-30
        elif where == "weight_ih":
            net.rnn.bias_ih_l0.zero_()
            net.rnn.bias_hh_l0.zero_()
            net.rnn.weight_ih_l0[2] = 1e-30
        elif where == "head":
            net.head.weight[:, 3] = 1e-30
        else:
            net.rnn.weight_ih_l0[1] = 0
            net.rnn.bias_ih_l0[1] = 1e-30
            net.rnn.bias_hh_l0[1] = 0
    assert run(net, 6).arithmetic == -1
    assert run(network(4, dtype=torch.float32), 6).arithmetic == 0


@pytest.mark.parametrize(("weight", "read"), [(2.0**-20, 2.0**-60), (2.0**-70, 1.0)], ids=("product", "square"))
def test_what_float32_loses_of_an_embedding_is_told(weight, read):
    """One unit alone reads one input, by a weight far below the others; the product with what it is read by, or its
    square, underflows."""
    net = network(4, embedding=True, dtype=torch.float32)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.eye(4))
        net.rnn.weight_ih_l0[:, 2] = 0
        net.rnn.weight_ih_l0[1, 2] = weight
        net.head.weight[:, 1] = read
    assert run(net, 6).arithmetic == -1
    check(run(net.double(), 6), truth(net, 6), tolerances.path(torch.float64, 6, 7), net)


def test_an_outer_product_that_float32_loses_is_told():
    """κ of one weight above an embedding: of a unit that hardly anybody reads, for an input that is next to nothing."""
    net = network(2, embedding=True, bias=False, head=1, dtype=torch.float32)
    with torch.no_grad():
        net.embedding.weight.fill_(1)
        net.embedding.weight[:, 2] = 2.0**-60
        net.rnn.weight_ih_l0.fill_(1)
        net.rnn.weight_hh_l0.copy_(torch.tensor([[0, 2.0**-40], [0, 0]]))
        net.head.weight.copy_(torch.tensor([[1.0, 0]]))
    assert run(net, 5).arithmetic == -1
    check(run(net.double(), 5), truth(net, 5), tolerances.path(torch.float64, 5, 7), net)


@pytest.mark.parametrize("kappa1", (True, False))
def test_a_path_norm_that_float64_loses_is_told(kappa1):
    """Read by its last factor alone is what has next to nothing."""
    net = network(3, bias=False, head=1)
    with torch.no_grad():
        net.rnn.weight_ih_l0.copy_(torch.tensor([1.0, 2.0**-480, 0], dtype=torch.float64)[:, None])
        net.rnn.weight_hh_l0.copy_(torch.eye(3))
        net.head.weight.copy_(torch.tensor([[0, 2.0**-480, 1.0]], dtype=torch.float64))
    for seq_len in (1, 5):
        assert run(net, seq_len, kappa1).arithmetic == -1
        assert run(net, seq_len, kappa1).log_path_norm.isnan()


@pytest.mark.parametrize("both", (False, True), ids=("forward", "bidirectional"))
@pytest.mark.parametrize("layers", (1, 2, 3))
def test_powers_of_two_are_followed(layers, both):
    """Bit for bit, by the specification of the kernels: tests/test_canonical.py says what that is."""
    net = test_canonical.make(layers, both, torch.float32, embedding=layers == 2, bias=layers < 3)
    other, moved = test_canonical.rescaled(net, 60)
    for factor in (0.0, 4.0):
        before, after = run(net, 9, factor=factor), run(other, 9, factor=factor)
        assert torch.equal(before.log_path_norm, after.log_path_norm) and before.arithmetic == after.arithmetic == 0
        assert all(map(torch.equal, before.kappa, after.kappa)) and torch.equal(before.exponents, after.exponents)
        wanted = [
            -moved[f"rnn.bias_ih_{ending}" if net.rnn.bias else f"rnn.weight_hh_{ending}"] for ending in net.endings
        ]
        if net.rnn.bias:
            assert torch.equal(before.unit_exponents - after.unit_exponents, torch.stack(wanted))


def test_dead_units_are_not_taken_for_losses():
    net = network(6, dtype=torch.float32)
    with torch.no_grad():
        net.rnn.weight_hh_l0[2] = 0
        net.rnn.weight_ih_l0[2] = 0
        net.rnn.bias_ih_l0.zero_()
        net.rnn.bias_hh_l0.zero_()
        net.head.weight[:, 4] = 0
        net.rnn.weight_hh_l0[:, 4] = 0
    check(run(net, 9, factor=4.0), truth(net, 9, 4.0), tolerances.path(torch.float32, 9, 6), net)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_weight_that_is_not_finite_gives_nan(value):
    for name, _ in network(4, 2, embedding=True).named_parameters():
        net = network(4, 2, embedding=True)
        with torch.no_grad():
            dict(net.named_parameters())[name].view(-1)[1] = value
        assert run(net, 3).log_path_norm.isnan()


@pytest.mark.parametrize("transposed", (False, True))
def test_a_product_is_that_of_float64_where_the_user_allows_tf32(transposed):
    """Rounded once."""
    own = object.__new__(gpu._Pass)
    own.dtype, own.underflows = torch.float32, []
    rows, weight = (torch.rand(HIDDEN, HIDDEN, device=DEVICE) for _ in range(2))
    squares, exponent = own.squares(weight, weight.max().reshape(1))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = own.product(gpu.Rows(rows, exponent), weight, weight.max().reshape(1), transposed)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    wanted = rows.double() @ (squares if transposed else squares.T).double()
    assert found.data.dtype == torch.float32 and torch.equal(found.exponents, 2 * exponent)
    torch.testing.assert_close(found.data.double(), wanted, rtol=tolerances.unit_roundoff(torch.float32), atol=0)


@pytest.mark.parametrize("warn_only", (False, True))
def test_products_serve_deterministic_algorithms_without_an_environment_variable(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with gpu._repeatable_products():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_powers_of_two_are_exact():
    for dtype, least in ((torch.float32, -126), (torch.float64, -1022)):
        exponents = torch.tensor([least - 1, least, -1, 0, 1, 1 - least, 5000, -(1 << 41)])
        wanted = [0.0, 2.0**least, 0.5, 1.0, 2.0, 2.0 ** (1 - least), 2.0 ** (1 - least), 0.0]
        assert gpu.power_of_two(exponents, dtype).tolist() == wanted


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_factors_are_near_their_values(dtype):
    """The scale of a sum is guessed from the exponents of its rows alone; users divide by its factor as it comes."""
    for outputs in ("all", "last"):
        found = run(network(5, 2, embedding=True, outputs=outputs, dtype=dtype), 9, factor=4.0)
        assert all(abs(exponent) <= 20 for exponent in found.exponents.tolist())
        assert all(2**-20 < factor.max() < 2**40 for factor in found.kappa)


class Counting(TorchDispatchMode):
    """Counts operations that compute or allocate; a kernel counts once, whatever its model is made of."""

    VIEWS = ("view", "slice", "split", "select", "detach", "unsqueeze", "expand", "alias", "as_strided", "empty")

    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not self.inside and not any(view in str(op) for view in self.VIEWS):
            self.count += 1
        return op(*args, **(kwargs or {}))

    def __getattr__(self, name):
        kernel = getattr(gpu_model, name)

        def counted(*arguments):
            self.count, self.inside = self.count + 1, True
            try:
                return kernel(*arguments)
            finally:
                self.inside = False

        return counted


def test_kappa1_of_one_layer_is_few_operations():
    """On a GPU, host time is what a small κ costs. tests/launches.py counts launches."""
    call = arguments(network(20, head=2, outputs="last", dtype=torch.float32), 60)
    with Counting() as counting:
        gpu.path_chain(counting, PLAN, *call, True, 0.0, 0.0, (), 1 << 24)
    assert 7 <= counting.count <= 11
