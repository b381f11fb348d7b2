"""The kappa2 operator itself; its values are checked through kappa in test_kappa.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathrnn_kernels import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
NAMES = ("weight_hh", "h", "h_exponents", "delta", "delta_exponents")


def arguments(seq_len=6, hidden_size=5, dtype=F64):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype)

    zeros = torch.zeros(seq_len, dtype=torch.int64)
    return [
        tensor(hidden_size, hidden_size),
        tensor(seq_len, hidden_size),
        zeros,
        tensor(seq_len, hidden_size),
        zeros.clone(),
    ]


def definition(weight_hh, h, h_exponents, delta, delta_exponents):
    """W̃ ⊙ Σ_{t < t'} δ_{t'+1} h_tᵀ ⊙ (W̃^{t'-t-1})ᵀ."""
    weight = weight_hh.double().square()
    h = h.double() * h_exponents.double().exp2()[:, None]
    delta = delta.double() * delta_exponents.double().exp2()[:, None]
    pairs, power = torch.zeros_like(weight), torch.eye(len(weight), dtype=F64)
    for lag in range(len(h) - 1):
        pairs += (delta[lag + 1 :].T @ h[: len(h) - lag - 1]) * power.T
        power = power @ weight
    return weight * pairs


def value(found):
    term, exponent = found[:2]
    return term.double() * exponent.double().exp2()


@pytest.mark.parametrize("seq_len", (1, 2, 3, 4, 5, 9, 17))
@pytest.mark.parametrize("hidden_size", (1, 2, 5, 17))
def test_any_chains(hidden_size, seq_len):
    """h and δ need not come from path_chain; exponents of every step count."""
    call = arguments(seq_len, hidden_size)
    call[2], call[4] = torch.arange(seq_len) * 3 - 40, 25 - torch.arange(seq_len) * 2
    term, exponent, _ = ops.kappa2(*call)
    assert term.isfinite().all() and exponent.dtype == torch.int64 and exponent.shape == ()
    if seq_len == 1:
        assert (term == 0).all()
    else:
        torch.testing.assert_close(value((term, exponent)), definition(*call), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", (F32, F64))
def test_strided_inputs(dtype):
    weight_hh, h, h_exponents, delta, delta_exponents = arguments(dtype=dtype)
    dense = ops.kappa2(weight_hh, h, h_exponents, delta, delta_exponents)
    strided = ops.kappa2(
        weight_hh.T.contiguous().T,
        h.repeat_interleave(2, 1)[:, ::2],
        torch.zeros(1, dtype=torch.int64).expand(6),
        delta.T.contiguous().T,
        delta_exponents.repeat_interleave(3)[::3],
    )
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


@pytest.mark.parametrize("workspace_bytes", (0, 1 << 20))
def test_opcheck(workspace_bytes):
    torch.library.opcheck(torch.ops.pathrnn.kappa2, (*arguments(), workspace_bytes))


def test_inputs_are_left_alone():
    call = arguments()
    copies = [t.clone() for t in call]
    ops.kappa2(*call)
    assert all(torch.equal(t, c) for t, c in zip(call, copies, strict=True))


def test_results_are_constants():
    call = arguments()
    call[0].requires_grad_()
    assert not any(t.requires_grad for t in ops.kappa2(*call))


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name):
    at = NAMES.index(name)
    for change in (
        lambda t: t[:-1],
        lambda t: t[..., :-1],
        lambda t: t[None],
        lambda t: t[:0],
        lambda t: t.float(),
        lambda t: t.int(),
    ):
        call = arguments()
        call[at] = change(call[at])
        with pytest.raises((ValueError, TypeError), match=r"has shape|has dtype|must be int64"):
            ops.kappa2(*call)
    call = arguments()
    call[at] = call[at].to("meta")
    with pytest.raises((ValueError, TypeError, RuntimeError), match="meta"):
        ops.kappa2(*call)


def test_bad_budget():
    with pytest.raises(ValueError, match="workspace_bytes is -1; it must be at least 0"):
        ops.kappa2(*arguments(), workspace_bytes=-1)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.kappa2(*arguments(), workspace_bytes=1 << 70)


shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
dtypes = st.sampled_from((F32, F64, torch.int64, torch.int32))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 4), st.builds(torch.ones, shapes, dtype=dtypes)), min_size=1, max_size=5))
def test_fuzz(changes):
    call = arguments()
    for at, tensor in changes:
        call[at] = tensor
    try:
        found = ops.kappa2(*call)
    except (ValueError, TypeError, RuntimeError):
        return
    torch.testing.assert_close(value(found), definition(*call), rtol=1e-5, atol=0)
