"""The order of kernels that the GPU backends share, with the kernels of gpu_model.py: the C++ kernels are the truth."""

import itertools
import math

import gpu_model
import oracles
import pytest
import test_canonical
import tolerances
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops import gpu
from pathrnn_kernels.ops.plan import Plan

PLAN = Plan("block", 1, 0.0)


def network(
    hidden, layers=1, bias=True, head=2, embedding=False, outputs="all", h0="zeros", dtype=torch.float64, both=False
):
    """head: 0 for none, 1 without a bias, 2 with one; both: directions."""
    if both:
        rnn = torch.nn.RNN(3, hidden, layers, "relu", bias, bidirectional=True, dtype=dtype)
    else:
        rnn = pk.ReLURNN(3, hidden, layers, bias=bias, dtype=dtype)
    return pk.PathNetwork(
        rnn,
        torch.nn.Linear(2 * hidden if both else hidden, 2, bias=head == 2, dtype=dtype) if head else None,
        torch.nn.Embedding(7, 3, dtype=dtype) if embedding else None,
        outputs,
        h0,
    )


def arguments(net, seq_len):
    weights = {name: p.detach() for name, p in net.named_parameters()}
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lists = [[p for name, p in weights.items() if name.startswith(f"rnn.{kind}_l")] for kind in kinds]
    ends = [weights.get(name) for name in ("head.weight", "head.bias", "embedding.weight")]
    return *lists, *ends, seq_len, net.outputs == "last", net.h0 == "ones"


def run(net, seq_len, kappa1=True, factor=0.0, rtol=0.0, first_lags=(), workspace=1 << 24):
    options = (kappa1, factor, rtol, first_lags, workspace, net.rnn.bidirectional)
    found = gpu.path_chain(gpu_model, PLAN, *arguments(net, seq_len), *options)
    return ops.PathChain._make(found)


def truth(net, seq_len, factor=0.0):
    wide = network(
        net.hidden_size, net.num_layers, net.rnn.bias, 0 if net.head is None else 1 + (net.head.bias is not None),
        net.embedding is not None, net.outputs, net.h0, both=net.rnn.bidirectional,
    )  # fmt: skip
    wide.load_state_dict(net.state_dict())
    return ops.path_chain(*arguments(wide, seq_len), second_factor=factor, bidirectional=net.rnn.bidirectional)


def check(found, wanted, rtol, net):
    assert found.arithmetic == 0
    torch.testing.assert_close(found.log_path_norm, wanted.log_path_norm, rtol=0, atol=rtol)
    assert len(found.kappa) == len(wanted.kappa) == len(found.exponents)
    layout = len(net.endings) // net.num_layers, net.head is not None
    for one, other in zip(oracles.parts(found, *layout), oracles.parts(wanted, *layout), strict=True):
        assert one[0].shape == other[0].shape
        # Zeros are zeros in both: -inf equals itself.
        logs = [mantissa.log() + exponent.double() * math.log(2) for mantissa, exponent in (one, other)]
        torch.testing.assert_close(*logs, rtol=0, atol=rtol)


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


HIDDEN, SEQ_LEN = 30, 150


def matrices():
    gaussian = torch.randn(HIDDEN, HIDDEN) / math.sqrt(HIDDEN)
    half = HIDDEN // 2
    return {
        "gaussian": gaussian,
        "uniform": (torch.rand(HIDDEN, HIDDEN) * 2 - 1) / math.sqrt(HIDDEN),
        "orthogonal": torch.linalg.qr(gaussian)[0],
        "identity": torch.eye(HIDDEN),
        "near the identity": torch.eye(HIDDEN) + 0.02 * torch.randn(HIDDEN, HIDDEN),
        "diagonal": torch.diag(torch.rand(HIDDEN) + 0.5),
        "nilpotent": torch.triu(gaussian, 1),
        "permutation": torch.eye(HIDDEN)[torch.randperm(HIDDEN)],
        "sparse": gaussian * (torch.rand(HIDDEN, HIDDEN) < 0.1),
        "growing": gaussian * 9,
        "vanishing": gaussian * 1e-3,
        "two blocks": torch.block_diag(gaussian[:half, :half], 1.5 * gaussian[half:, half:]),
        "a dead row": gaussian * (torch.arange(HIDDEN) != 3)[:, None],
        "a dead column": gaussian * (torch.arange(HIDDEN) != 3),
    }


@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("name", matrices())
def test_lags_left_out_cost_no_more_than_the_bound(name, outputs):
    net = network(HIDDEN, outputs=outputs)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(matrices()[name])
    wanted = truth(net, SEQ_LEN, 4.0)
    for rtol in (1e-3, 1e-6):
        found = run(net, SEQ_LEN, factor=4.0, rtol=rtol)
        bound, lags = found.bounds.item(), found.lags.item()
        assert 0 <= bound <= rtol and 1 <= lags <= SEQ_LEN - 1
        assert bound == 0 or lags < SEQ_LEN - 1
        check(found, wanted, bound + tolerances.path(torch.float64, SEQ_LEN, HIDDEN), net)
    if name in ("gaussian", "uniform", "orthogonal", "identity", "diagonal", "growing", "vanishing"):
        assert lags <= 32


def test_the_budget_cuts_the_powers_into_blocks_and_changes_nothing_else():
    net = network(HIDDEN, outputs="last")
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(matrices()["near the identity"])
    found = [run(net, SEQ_LEN, factor=4.0, rtol=1e-6, workspace=w) for w in (0, 20 * 8 * HIDDEN**2, 1 << 30)]
    for other in found:
        assert other.lags == SEQ_LEN - 1 and other.bounds == 0
        check(other, truth(net, SEQ_LEN, 4.0), tolerances.path(torch.float64, SEQ_LEN, HIDDEN), net)


def test_first_lags_start_where_a_former_call_ended():
    net = network(HIDDEN)
    for first in (1, 20, 70, 1000):
        found = run(net, SEQ_LEN, factor=4.0, rtol=1e-5, first_lags=[first])
        assert min(first, SEQ_LEN - 1) <= found.lags <= SEQ_LEN - 1
        check(found, truth(net, SEQ_LEN, 4.0), 1e-5 + tolerances.path(torch.float64, SEQ_LEN, HIDDEN), net)


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
        check(run(net, 1000, factor=factor, rtol=0.0), wanted, tolerances.path(torch.float32, 1000, HIDDEN), net)


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


PRECISIONS = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")]


def precisions():
    return [torch._C._get_fp32_precision_getter(*key) for key in PRECISIONS]


@pytest.mark.parametrize("chosen", list(itertools.product(("none", "ieee", "tf32"), repeat=3)), ids="-".join)
def test_products_keep_full_precision_whatever_the_user_chose_and_chooses_later(chosen):
    before = precisions()

    def choose(general, of_cuda, own):
        torch.backends.fp32_precision = general
        torch.backends.cudnn.fp32_precision = of_cuda
        torch.backends.cuda.matmul.fp32_precision = own

    def seen():
        """What holds now, and what would if a general setting changed: inherited values are not pinned."""
        found = [precisions()]
        for general in ("ieee", "tf32"):
            torch.backends.fp32_precision = general
            found.append(precisions())
        torch.backends.fp32_precision = chosen[0]
        return found

    try:
        choose(*chosen)
        wanted = seen()
        with gpu._exact_products():
            assert torch.backends.cuda.matmul.fp32_precision != "tf32"
            with gpu._exact_products():
                pass
            assert torch.backends.cuda.matmul.fp32_precision != "tf32"
        assert seen() == wanted
    finally:
        choose("none", "none", "none")
    assert precisions() == before


@pytest.mark.parametrize("warn_only", (False, True))
def test_products_serve_deterministic_algorithms_without_an_environment_variable(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with gpu._exact_products():
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
    """On a GPU, host time is what a small κ costs. tests/cuda and tests/ops/triton count launches."""
    call = arguments(network(20, head=2, outputs="last", dtype=torch.float32), 60)
    with Counting() as counting:
        gpu.path_chain(counting, PLAN, *call, True, 0.0, 0.0, (), 1 << 24)
    assert 7 <= counting.count <= 11
