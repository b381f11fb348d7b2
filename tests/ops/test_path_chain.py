"""The path_chain operator itself; its values are checked through kappa and path_norm in test_kappa.py."""

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
        "sequences": False,
    } | flags


def parameters(call):
    named = {}
    for kind in NAMES[:4]:
        named |= {f"rnn.{kind}_l{i}": tensor for i, tensor in enumerate(call[kind])}
    for kind, name in zip(NAMES[4:], ("head.weight", "head.bias", "embedding.weight"), strict=True):
        if call[kind] is not None:
            named[name] = call[kind]
    return named


@pytest.mark.parametrize("sequences", (False, True))
@pytest.mark.parametrize("kappa1", (False, True))
@pytest.mark.parametrize("rest", (False, True))
def test_opcheck(rest, kappa1, sequences):
    call = arguments(bias=rest, head=rest, embedding=rest, kappa1=kappa1, sequences=sequences)
    torch.library.opcheck(torch.ops.pathrnn.path_chain, tuple(call.values()))


@pytest.mark.every_isa
@pytest.mark.parametrize("hidden_size", (5, 33, 520))
@pytest.mark.parametrize("ones_h0, last_only", ((False, False), (True, True)))
@pytest.mark.parametrize("dtype", (F32, F64))
def test_sequences(dtype, ones_h0, last_only, hidden_size, threads):
    call = arguments(dtype=dtype, hidden_size=hidden_size, last_only=last_only, ones_h0=ones_h0, sequences=True)
    chain = ops.path_chain(**call)
    options = ("last" if last_only else "all", "ones" if ones_h0 else "zeros")
    squared = {name: p.double().square().requires_grad_() for name, p in parameters(call).items()}
    layers = reference.hidden(squared, 6, options[1])
    gamma2 = reference.total(squared, layers[-1], options[0])
    rtol = tolerances.path(dtype, 8, hidden_size)
    for i, h in enumerate(layers):
        delta = torch.autograd.grad(gamma2, h[1:], retain_graph=True, allow_unused=True)
        for rows, exponents, truth in (
            (chain.h[i], chain.h_exponents[i], h[:-1]),
            (chain.delta[i], chain.delta_exponents[i], delta),
        ):
            assert rows.shape == (6, hidden_size) and rows.isfinite().all()
            found = rows.double() * exponents.double().exp2()[:, None]
            truth = torch.stack([torch.zeros(hidden_size, dtype=F64) if t is None else t.detach() for t in truth])
            torch.testing.assert_close(found, truth, rtol=rtol, atol=0)


def test_the_norm_alone_is_the_same():
    whole, norm = (ops.path_chain(**arguments(kappa1=kappa1)) for kappa1 in (True, False))
    assert torch.equal(whole.log_path_norm, norm.log_path_norm)
    assert norm.kappa1 == [] and norm.exponents.shape == (0,)


def test_inputs_are_left_alone():
    call = arguments(sequences=True)
    copies = {name: p.clone() for name, p in parameters(call).items()}
    ops.path_chain(**call)
    assert all(torch.equal(p, copies[name]) for name, p in parameters(call).items())


def test_results_are_constants():
    call = arguments(sequences=True)
    for p in parameters(call).values():
        p.requires_grad_()
    chain = ops.path_chain(**call)
    assert not any(t.requires_grad for t in (*chain.kappa1, chain.log_path_norm, *chain.h, *chain.delta))


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
