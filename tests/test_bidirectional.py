"""κ, γ² and the optimiser on bidirectional networks, against the oracles."""

import itertools
import math

import oracles
import pytest
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill_, inputs, networks, rescalings
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import ops, reference
from pathrnn_kernels.rescale import node_rescale_

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
OPTIONS = list(
    itertools.product((1, 2, 3), (False, True), (None, False, True), (False, True), ("all", "last"), ("zeros", "ones"))
)
# Every length with some options.
CASES = [(options, 1 + 7 * n % 9) for n, options in enumerate(OPTIONS)]
BIDIRECTIONAL = ("bidirectional",)


def make(
    hidden_size=3, num_layers=1, bias=True, head=True, embedding=False, outputs="all", h0="zeros", dtype=F64, **options
):
    net = pk.PathNetwork(
        nn.RNN(2, hidden_size, num_layers, "relu", bias, bidirectional=True, dtype=dtype, **options),
        None if head is None else nn.Linear(2 * hidden_size, 4, bias=head, dtype=dtype),
        nn.Embedding(5, 2, dtype=dtype) if embedding else None,
        outputs,
        h0,
    )
    return fill_(net, seed=0)


def doubles(net):
    return {name: p.detach().double() for name, p in net.named_parameters()}


def check(found, expected, rtol):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def dense(k):
    return {name: k.dense(name) for name in k.factors}


# The module.


@pytest.mark.parametrize("head", (None, True))
def test_the_last_outputs_are_the_final_states_of_both_directions(head):
    net = make(3, 2, head=head, outputs="last")
    x = inputs(net, 5)
    y, h_n = net.rnn(x)
    last = torch.cat((y[-1, :, :3], y[0, :, 3:]), 1)  # the reverse direction ends at step 1
    assert torch.equal(last, torch.cat((h_n[-2], h_n[-1]), 1))
    torch.testing.assert_close(net(x), last if head is None else net.head(last), rtol=0, atol=0)
    net.outputs = "all"
    torch.testing.assert_close(net(x), y if head is None else net.head(y), rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", (False, True))
def test_layouts(batch_first):
    net = make(3, outputs="last", batch_first=batch_first)
    x = torch.randn(2, 2, 2, dtype=F64)
    alone = net(x[0] if batch_first else x[:, 0])
    torch.testing.assert_close(net(x)[0], alone)
    assert alone.shape == (4,)
    assert net.num_directions == 2 and net.endings == ("l0", "l0_reverse")


# Against the definition.


@pytest.mark.parametrize("options, seq_len", CASES, ids=str)
def test_kappa_is_half_the_hessian_diagonal(options, seq_len):
    num_layers, bias, head, embedding, outputs, h0 = options
    net = make(2, num_layers, bias, head, embedding, outputs, h0)
    p, args = doubles(net), (seq_len, outputs, h0)
    expected = reference.kappa_hessian(p, *args)
    check(reference.kappa(p, *args, second_term=True), expected, tolerances.DEFINITION)
    check(dense(pk.kappa(net, seq_len, second_term=True)), expected, tolerances.DEFINITION)


@given(networks(rnns=BIDIRECTIONAL, embeddings=(False,), h0=("zeros",)))
def test_the_norm_is_the_sum_of_the_squared_networks_outputs(case):
    net, seq_len = case
    expected = reference.path_norm(doubles(net), seq_len, net.outputs)
    with torch.no_grad():
        for p in net.parameters():
            p.square_()
        total = net(torch.ones(seq_len, 1, net.rnn.input_size, dtype=F64)).sum()
    torch.testing.assert_close(total, expected, rtol=tolerances.DEFINITION, atol=0)


@pytest.mark.parametrize("options, seq_len", CASES, ids=str)
@DTYPES
def test_kernels_are_the_definition(dtype, options, seq_len):
    num_layers, bias, head, embedding, outputs, h0 = options
    net = make(3, num_layers, bias, head, embedding, outputs, h0, dtype)
    p, args, rtol = doubles(net), (seq_len, outputs, h0), tolerances.definition(dtype, seq_len)
    first, second = reference.kappa1(p, *args), reference.kappa2(p, *args)
    check(dense(pk.kappa(net, seq_len)), first, rtol)
    for convention, part in (("exact", 1), ("theorem3", 0.25)):
        expected = {name: k + part * second.get(name, 0) for name, k in first.items()}
        check(dense(pk.kappa(net, seq_len, second_term=True, kappa2=convention)), expected, rtol)
    gamma2 = reference.path_norm(p, *args)
    assert abs(pk.path_norm(net, seq_len).item() / gamma2 - 1) <= rtol
    assert abs(pk.log_path_norm(net, seq_len).item() - gamma2.log()) <= rtol


@pytest.mark.parametrize("outputs, h0", (("all", "zeros"), ("last", "ones")))
@pytest.mark.parametrize("hidden_size, num_layers", ((17, 3), (33, 2), (520, 2), (1030, 1)))
@DTYPES
def test_sizes(dtype, hidden_size, num_layers, outputs, h0, threads):
    seq_len = 12 if hidden_size < 500 else 5
    net = make(hidden_size, num_layers, outputs=outputs, h0=h0, dtype=dtype)
    found = pk.kappa(net, seq_len)
    expected = reference.kappa1(doubles(net), seq_len, outputs, h0)
    check(dense(found), expected, tolerances.path(dtype, num_layers * seq_len, 2 * hidden_size))
    again = pk.kappa(net, seq_len)
    assert all(torch.equal(factor, again.factors[name]) for name, factor in found.factors.items())


def test_weights_of_the_first_layer_stay_vectors():
    shapes = {name: tuple(factor.shape) for name, factor in pk.kappa(make(3, 2), 4).factors.items()}
    assert shapes["rnn.weight_ih_l0"] == shapes["rnn.weight_ih_l0_reverse"] == (3, 1)
    assert shapes["rnn.weight_ih_l1"] == shapes["rnn.weight_ih_l1_reverse"] == (3, 6)
    assert shapes["head.weight"] == (1, 6)


# The second term from a few lags.


@given(networks(max_size=3, max_seq_len=30, rnns=BIDIRECTIONAL))
def test_the_certified_reference_is_within_its_bound(case):
    net, seq_len = case
    p, args = doubles(net), (seq_len, net.outputs, net.h0)
    expected = reference.kappa(p, *args, second_term=True)
    terms, lags, bound = reference.kappa2_certified(p, *args, rtol=1e-3)
    assert list(lags) == [name for name in p if "weight_hh" in name]
    first = reference.kappa1(p, *args)
    check(
        {name: first[name] + terms[name] for name in terms},
        {name: expected[name] for name in terms},
        bound + tolerances.path(F64, 3 * seq_len, 3),
    )


@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("h0", ("zeros", "ones"))
@DTYPES
def test_kernels_are_within_their_bound(dtype, outputs, h0):
    net, seq_len = make(30, 2, outputs=outputs, h0=h0, dtype=dtype), 60
    wide = make(30, 2, outputs=outputs, h0=h0)
    wide.load_state_dict(net.state_dict())
    found, exact = pk.kappa(net, seq_len, True, rtol=1e-4), pk.kappa(wide, seq_len, True, rtol=0)
    assert max(found.lags.values()) < seq_len - 1 == min(exact.lags.values())
    assert found.bound <= 1e-4
    check(dense(found), dense(exact), found.bound + tolerances.path(dtype, 2 * seq_len, 60))
    warm = pk.kappa(net, seq_len, True, rtol=1e-4, lags={"rnn.weight_hh_l1_reverse": 40})
    assert warm.lags == found.lags | {"rnn.weight_hh_l1_reverse": 40}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter divides by 0 in numpy
@pytest.mark.parametrize(
    "ratio, rho, rtol, backend",
    [
        *(
            (*case, own)
            for case in ((0.9, 0.3, 0.1), (0.9, 0.3, 0.01), (0.7, 0.3, 1e-4))
            for own in ("cpu", "certified reference")
        ),
        pytest.param(0.9, 0.3, 0.01, "triton", marks=pytest.mark.slow),
    ],
)
def test_delta_below_the_top_may_grow_with_time(ratio, rho, rtol, backend):
    """The layer above looks back, so that a certificate must not take δ_t ≥ δ_{t+1} for granted."""
    if backend == "triton":
        pytest.importorskip("triton")
    net, seq_len = growing_delta(ratio, rho), 40
    p, name = doubles(net), "rnn.weight_hh_l0"
    expected = reference.kappa(p, seq_len, "all", "ones", second_term=True)[name]
    if backend != "certified reference":
        lags = {name: 32} if backend == "triton" else None  # Triton's kernels try certificates once
        k = pk.kappa(net, seq_len, True, rtol=rtol, backend=backend, lags=lags)
        found, lags, bound = k.dense(name), k.lags, k.bound
    else:
        terms, lags, bound = reference.kappa2_certified(p, seq_len, "all", "ones", rtol=rtol)
        found = reference.kappa1(p, seq_len, "all", "ones")[name] + terms[name]
    assert lags[name] < seq_len - 1
    torch.testing.assert_close(found, expected, rtol=bound + tolerances.path(F64, 2 * seq_len, 2), atol=0)


def growing_delta(ratio, rho):
    """Two layers without biases: in the lower one h decays like ρ^t, and deviations from ρ^n x uᵀ like ratio^n."""
    net = make(2, 2, bias=False, head=None, h0="ones")
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.fill_(1e-9 if "weight_ih_l0" in name else 0.1)
        net.rnn.weight_hh_l0.copy_(torch.tensor([[1 + ratio, 1 - ratio], [1 - ratio, 1 + ratio]]).mul(rho / 2).sqrt())
        net.rnn.weight_hh_l1.zero_()
        net.rnn.weight_hh_l1_reverse.copy_(2 * torch.eye(2))
    return net


# Beyond the range of any dtype.


def grown(forward, reverse, hidden_size, num_layers, outputs, dtype, triangular=False):
    """Recurrent matrices of a direction multiplied by its gain."""
    net = make(hidden_size, num_layers, embedding=True, outputs=outputs, dtype=dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "weight_hh" in name:
                p.mul_(reverse if "reverse" in name else forward)
                if triangular:
                    p.triu_()
    return net


@pytest.mark.parametrize("num_layers", (1, 2))
@pytest.mark.parametrize("outputs", ("all", "last"))
@pytest.mark.parametrize("gains", ((3, 3), (3, 2.8), (2.8, 3)), ids=str)
@DTYPES
def test_growth_beyond_every_dtype(dtype, gains, outputs, num_layers):
    net = grown(*gains, 20, num_layers, outputs, dtype)
    found, _ = oracles.check_logarithms(net, 400, rtol=tolerances.LOG_DOMAIN)
    assert found.log_path_norm > math.log(torch.finfo(F64).max)


@pytest.mark.parametrize("num_layers", (1, 2))
@pytest.mark.parametrize("gains", ((3, 0.3), (0.3, 3)), ids=str)
@pytest.mark.parametrize("seq_len", (5, 10, 15, 20, 30, 45, 100, 150, 200, 300))
@DTYPES
def test_directions_of_different_growth(dtype, seq_len, gains, num_layers):
    """κ of one direction's columns may lie far below the other's, beside which it stands."""
    oracles.check_logarithms(grown(*gains, 6, num_layers, "all", dtype), seq_len)


@DTYPES
def test_triangular_matrices(dtype):
    net = grown(4, 5, 12, 2, "last", dtype, triangular=True)
    oracles.check_logarithms(net, 50, second_term=True)


@DTYPES
def test_zero_parts(dtype):
    for zeroed in doubles(make(3, 2, embedding=True)):
        net = make(3, 2, embedding=True, dtype=dtype)
        with torch.no_grad():
            net.get_parameter(zeroed).zero_()
        oracles.check_logarithms(net, 7, second_term=True)


def test_what_grows_beside_the_paths_does_not_hide_them():
    net, seq_len = make(2, 2, bias=False), 400
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "weight_hh" in name:
                p.copy_(torch.diag(torch.tensor([0.5, 8.0])))  # of each direction unit 1 grows …
            else:
                p.fill_(1.0)
            if "weight_ih_l1" in name or name == "head.weight":
                p[:, 1::2] = 0.0  # … and nothing reads it
    alone = make(1, 2, bias=False)
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.fill_(0.5 if "weight_hh" in name else 1.0)
        alone.head.bias.copy_(net.head.bias.zero_())
        net.head.weight[:] = net.head.weight[:1]
        alone.head.bias.zero_()
    expected = oracles.log_kappa(alone, seq_len).log_path_norm
    torch.testing.assert_close(pk.log_path_norm(net, seq_len).detach(), expected, rtol=0, atol=tolerances.LOG_DOMAIN)


# Rescaling, gradients, steps.


@given(networks(h0=("zeros",), rnns=BIDIRECTIONAL), st.data())
def test_rescaling_leaves_the_function_and_the_norm(case, data):
    net, seq_len = case
    x = inputs(net, seq_len)
    y, norm = net(x), pk.log_path_norm(net, seq_len).detach()
    alphas = data.draw(rescalings(net))
    weight = net.rnn.weight_hh_l0_reverse.detach().clone()
    node_rescale_(net, alphas)
    assert torch.equal(net.rnn.weight_hh_l0_reverse, weight * alphas[1][:, None] / alphas[1])
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pk.log_path_norm(net, seq_len).detach(), norm, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", (pk.path_norm, pk.log_path_norm))
@DTYPES
def test_gradients_are_the_references(dtype, function):
    net, seq_len = make(6, 2, embedding=True, outputs="last", dtype=dtype), 8
    p = {name: value.requires_grad_() for name, value in doubles(net).items()}
    gamma2 = reference.path_norm(p, seq_len, "last")
    value = gamma2 if function is pk.path_norm else gamma2.log()
    expected = torch.autograd.grad(3 * value, list(p.values()))
    (3 * function(net, seq_len)).backward()
    found = {name: q.grad for name, q in net.named_parameters()}
    check(found, dict(zip(p, expected, strict=True)), tolerances.definition(dtype, seq_len))


@pytest.mark.parametrize("second_term", (False, True))
def test_path_sgd_is_equation_8(second_term):
    net, seq_len, lr = make(4, 2, embedding=True), 6, 1e-3
    before = {name: p.clone() for name, p in doubles(net).items()}
    kappa = reference.kappa(before, seq_len, second_term=second_term)
    optimizer = pk.PathSGD(net, lr=lr, second_term=second_term, seq_len=seq_len, rtol=0)
    net(inputs(net, seq_len)).square().mean().backward()
    expected = {name: before[name] - lr * p.grad / kappa[name] for name, p in net.named_parameters()}
    optimizer.step()
    for name, p in net.named_parameters():
        # A step may exceed the weight that it changes.
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_weights_that_are_not_finite_are_named(value):
    for name in doubles(make(3, 2, embedding=True)):
        net = make(3, 2, embedding=True)
        with torch.no_grad():
            net.get_parameter(name).flatten()[-1] = value
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError, match=f"{name.removeprefix('rnn.')} has a nan or infinite entry"):
                pk.kappa(net, 4, backend=backend)


# The operator.


def call(net, seq_len=4, **options):
    weights = net.weights()
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lists = [[p.detach() for name, p in weights.items() if name.startswith(f"rnn.{kind}")] for kind in kinds]
    ends = [weights.get(name) for name in ("head.weight", "head.bias", "embedding.weight")]
    ends = [None if p is None else p.detach() for p in ends]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "head_weight", "head_bias", "embedding_weight")
    given = dict(zip(names, [*lists, *ends], strict=True))
    return given | {"seq_len": seq_len, "last_only": False, "ones_h0": False} | options


@pytest.mark.parametrize("second_factor", (0.0, 4.0))
def test_opcheck(second_factor):
    net = make(3, 2, embedding=True, dtype=F32)
    options = {"kappa1": True, "second_factor": second_factor, "rtol": 0.0, "first_lags": (), "workspace_bytes": 0}
    arguments = call(net, **options, bidirectional=True)
    torch.library.opcheck(torch.ops.pathrnn.path_chain, tuple(arguments.values()))


@pytest.mark.parametrize(
    "change, message",
    (
        ({"bidirectional": False}, r"weight_ih_l1 has shape \[3, 2\]"),
        ({"head_weight": torch.ones(4, 3)}, r"head.weight has shape \[4, 3\]"),
        ({"weight_hh": [torch.ones(3, 3)] * 3}, "weight_hh has 3 tensors; give one a direction, two a layer"),
        ({"weight_ih": [torch.ones(3, 2)] * 2}, "weight_ih has 2 tensors for 4 directions; give one a direction"),
        ({"weight_hh": [torch.ones(3, 3)] * 3 + [torch.ones(2, 3)]}, r"weight_hh_l1_reverse has shape \[2, 3\]"),
        ({"first_lags": (1, 2)}, "first_lags has 2 numbers for 4 directions"),
    ),
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    net = make(3, 2, embedding=True, dtype=F32)
    with pytest.raises(ValueError, match=message):
        ops.path_chain(**(call(net, bidirectional=True) | change))
