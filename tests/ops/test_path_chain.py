"""The path_chain operator without the second term (test_kappa2.py); test_kappa.py checks its values at length."""

import math

import oracles
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathrnn_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "head_weight", "head_bias", "embedding_weight")


def arguments(
    num_layers=2, bias=True, head=True, head_bias=True, embedding=True, seq_len=6, dtype=F64, hidden_size=5, **flags
):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).div_(shape[-1] ** 0.5)

    layers = range(num_layers)
    return {
        "weight_ih": [tensor(hidden_size, hidden_size if i else 3) for i in layers],
        "weight_hh": [tensor(hidden_size, hidden_size) for _ in layers],
        "bias_ih": [tensor(hidden_size) for _ in layers if bias],
        "bias_hh": [tensor(hidden_size) for _ in layers if bias],
        "head_weight": tensor(4, hidden_size) if head else None,
        "head_bias": tensor(4) if head and head_bias else None,
        "embedding_weight": tensor(7, 3) if embedding else None,
        "seq_len": seq_len,
        "last_only": False,
        "ones_h0": False,
        "kappa1": True,
        "second_factor": 0.0,
        "rtol": 0.0,
        "first_lags": (),
        "workspace_bytes": 0,
    } | flags


def parameters(call):
    named = {}
    for kind in NAMES[:4]:
        named |= {f"rnn.{kind}_l{i}": tensor for i, tensor in enumerate(call[kind])}
    for kind, name in zip(NAMES[4:], ("head.weight", "head.bias", "embedding.weight"), strict=True):
        if call[kind] is not None:
            named[name] = call[kind]
    return named


def kappa_names(call):
    """Of ``PathChain.kappa``, in its order; one κ serves both biases of a layer."""
    for i in range(len(call["weight_hh"])):
        yield from (f"rnn.weight_ih_l{i}", f"rnn.weight_hh_l{i}")
        if call["bias_ih"]:
            yield f"rnn.bias_ih_l{i}"
    names = {"head_weight": "head.weight", "head_bias": "head.bias", "embedding_weight": "embedding.weight"}
    yield from (name for kind, name in names.items() if call[kind] is not None)


@pytest.mark.parametrize(
    "options",
    (
        {"kappa1": False},
        {"second_factor": 0.0},
        {"second_factor": 4.0},
        {"second_factor": 1.0, "rtol": 1e-3, "first_lags": (2, 0), "workspace_bytes": 1 << 20},
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize("rest", (False, True))
def test_opcheck(rest, dtype, options):
    call = arguments(bias=rest, head=rest, embedding=rest, dtype=dtype, **options)
    torch.library.opcheck(torch.ops.pathrnn.path_chain, tuple(call.values()))


@pytest.mark.parametrize("kappa1", (False, True))
@pytest.mark.parametrize("rest", (False, True))
@pytest.mark.parametrize("num_layers", (1, 3))
@pytest.mark.parametrize("dtype", (F32, F64))
def test_shapes(dtype, num_layers, rest, kappa1):
    """Every result has the shape and dtype that PathChain documents."""
    chain = ops.path_chain(**arguments(num_layers, rest, rest, rest, rest, dtype=dtype, kappa1=kappa1))
    shapes = []
    for i in range(num_layers if kappa1 else 0):
        shapes += [(5, 5 if i else 3 if rest else 1), (5, 5), *[(5,)] * rest]
    shapes += [(1, 5), (1,), (1, 3)] * (rest and kappa1)
    assert [tuple(k.shape) for k in chain.kappa] == shapes
    assert all(k.dtype == dtype and k.is_contiguous() and k.isfinite().all() for k in chain.kappa)
    assert chain.exponents.shape == (len(shapes),) and chain.exponents.dtype == torch.int64
    assert chain.log_path_norm.shape == () and chain.log_path_norm.dtype == F64 and chain.log_path_norm.isfinite()
    assert chain.lags.tolist() == [0] * num_layers and chain.lags.dtype == torch.int64
    assert chain.bounds.tolist() == [0] * num_layers and chain.bounds.dtype == F64
    assert chain.unit_exponents.shape == (num_layers, 5) and chain.unit_exponents.dtype == torch.int64
    assert (chain.unit_exponents % 2 == 0).all()
    assert chain.entry_exponents == []
    assert chain.arithmetic.shape == () and chain.arithmetic.dtype == torch.int8 and chain.arithmetic == 0


@pytest.mark.every_isa
@pytest.mark.parametrize("hidden_size", (5, 33, 520))
@pytest.mark.parametrize("ones_h0, last_only", ((False, False), (True, True)))
@pytest.mark.parametrize("dtype", (F32, F64))
def test_values(dtype, ones_h0, last_only, hidden_size, threads):
    call = arguments(dtype=dtype, hidden_size=hidden_size, last_only=last_only, ones_h0=ones_h0)
    chain = ops.path_chain(**call)
    options = (6, "last" if last_only else "all", "ones" if ones_h0 else "zeros")
    doubles = {name: p.double() for name, p in parameters(call).items()}
    expected, rtol = reference.kappa1(doubles, *options), tolerances.path(dtype, 8, hidden_size)
    found = dict(zip(kappa_names(call), oracles.values(chain), strict=True))
    assert found.keys() == expected.keys() - {"rnn.bias_hh_l0", "rnn.bias_hh_l1"}
    for name, value in found.items():
        torch.testing.assert_close(
            value.expand_as(expected[name]), expected[name], rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    log_norm = reference.path_norm(doubles, *options).log()
    # The logarithm is of a number near 2^800, whose exponent, times ln 2, is taken off again.
    large = 3 * tolerances.unit_roundoff(F64) * 800 * math.log(2)
    torch.testing.assert_close(chain.log_path_norm, log_norm, rtol=0, atol=rtol + large)


@pytest.mark.every_isa
@pytest.mark.parametrize("gain", (1.0, 1e-4))  # of W_hh: h, or δ, converges within the first steps
@pytest.mark.parametrize("last_only", (False, True))
@pytest.mark.parametrize("hidden_size, seq_len", ((97, 2), (130, 23), (130, 25), (201, 40)))
@pytest.mark.parametrize("dtype", (F32, F64))
def test_chains_that_share_a_read(dtype, hidden_size, seq_len, last_only, gain):
    """One layer, one thread, a W that its first-level cache does not hold."""
    call = arguments(1, dtype=dtype, hidden_size=hidden_size, seq_len=seq_len, last_only=last_only)
    call["weight_hh"][0] *= gain
    expected = reference.kappa1(
        {name: p.double() for name, p in parameters(call).items()}, seq_len, "last" if last_only else "all", "zeros"
    )
    for name, value in zip(kappa_names(call), oracles.values(ops.path_chain(**call)), strict=True):
        rtol = tolerances.path(dtype, seq_len + 1, hidden_size)
        torch.testing.assert_close(value.expand_as(expected[name]), expected[name], rtol=rtol, atol=0)


def test_the_norm_alone_is_the_same():
    whole, norm = (ops.path_chain(**arguments(kappa1=kappa1)) for kappa1 in (True, False))
    assert torch.equal(whole.log_path_norm, norm.log_path_norm)
    assert norm.kappa == [] and norm.exponents.shape == (0,)


def test_inputs_are_left_alone():
    call = arguments()
    copies = {name: p.clone() for name, p in parameters(call).items()}
    ops.path_chain(**call)
    assert all(torch.equal(p, copies[name]) for name, p in parameters(call).items())


def test_results_are_constants():
    call = arguments()
    for p in parameters(call).values():
        p.requires_grad_()
    chain = ops.path_chain(**call)
    assert not any(t.requires_grad for t in (*chain.kappa, *chain.entry_exponents, *chain[1:3], *chain[4:]))


def changed(**changes):
    return arguments() | changes


ONES = torch.ones
BAD = {
    "no layers": (changed(weight_ih=[], weight_hh=[], bias_ih=[], bias_hh=[]), "weight_hh is empty"),
    "seq_len 0": (changed(seq_len=0), "seq_len is 0"),
    "seq_len -1": (changed(seq_len=-1), "seq_len is -1"),
    "weight_ih, one": (changed(weight_ih=[ONES(5, 3, dtype=F64)]), "weight_ih has 1 tensors for 2 layers"),
    "bias_ih, one": (changed(bias_ih=[ONES(5, dtype=F64)]), "bias_ih and bias_hh have 1 and 2 tensors"),
    "bias_hh, none": (changed(bias_hh=[]), "bias_ih and bias_hh have 2 and 0 tensors"),
    "weight_hh, flat": (changed(weight_hh=[ONES(5, dtype=F64)] * 2), r"weight_hh_l0 has shape \[5\]"),
    "weight_hh, not square": (changed(weight_hh=[ONES(5, 4, dtype=F64)] * 2), r"weight_hh_l0 has shape \[5, 4\]"),
    "weight_hh, empty": (changed(weight_hh=[ONES(0, 0, dtype=F64)] * 2), r"weight_hh_l0 has shape \[0, 0\]"),
    "weight_ih, no input": (changed(weight_ih=[ONES(5, 0, dtype=F64)] * 2), r"weight_ih_l0 has shape \[5, 0\]"),
    "weight_ih, wrong": (changed(weight_ih=[ONES(5, 3, dtype=F64)] * 2), r"weight_ih_l1 has shape \[5, 3\]"),
    "bias, wrong": (changed(bias_hh=[ONES(1, dtype=F64)] * 2), r"bias_hh_l0 has shape \[1\]"),
    "head, wrong": (changed(head_weight=ONES(4, 6, dtype=F64)), r"head.weight has shape \[4, 6\]"),
    "head, flat": (changed(head_weight=ONES(5, dtype=F64)), r"head.weight has shape \[5\]"),
    "head, empty": (changed(head_weight=ONES(0, 5, dtype=F64)), r"head.weight has shape \[0, 5\]"),
    "head bias, wrong": (changed(head_bias=ONES(5, dtype=F64)), r"head.bias has shape \[5\]"),
    "head bias alone": (changed(head_weight=None), "head.bias is given without head.weight"),
    "embedding, wrong": (changed(embedding_weight=ONES(7, 4, dtype=F64)), r"embedding.weight has shape \[7, 4\]"),
    "embedding, empty": (changed(embedding_weight=ONES(0, 3, dtype=F64)), r"embedding.weight has shape \[0, 3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ops.path_chain(**call)


@pytest.mark.parametrize("name", NAMES)
def test_bad_dtypes_and_devices(name):
    for change in (lambda t: t.float(), lambda t: t.long(), lambda t: t.half(), lambda t: t.to("meta")):
        call = arguments()
        call[name] = [change(t) for t in call[name]] if isinstance(call[name], list) else change(call[name])
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"has dtype|is on meta|meta"):
            ops.path_chain(**call)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.builds(torch.ones, shapes, dtype=st.sampled_from((F32, F64, torch.int32)))


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(NAMES[:4]), st.lists(tensors, max_size=3)),
            st.tuples(st.sampled_from(NAMES[4:]), st.one_of(st.none(), tensors)),
            st.tuples(st.just("seq_len"), st.integers(-2, 5)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_fuzz(changes):
    call = arguments(num_layers=1) | dict(changes)
    try:
        chain = ops.path_chain(**call)
    except (ValueError, TypeError, RuntimeError):
        return
    gamma2 = reference.path_norm(parameters(call), call["seq_len"])
    torch.testing.assert_close(chain.log_path_norm, gamma2.double().log(), rtol=1e-5, atol=1e-5)
