"""precondition and shorten_ on every backend against their formulas; norm_gradients against γ²'s definition."""

import importlib
import math

import pytest
import torch

from pathrnn_kernels.ops import update as cpu_update
from pathrnn_kernels.optim import split_scales

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter, about nan and infinity
]

F32, F64 = torch.float32, torch.float64
dtypes = pytest.mark.parametrize("dtype", (F32, F64))


@pytest.fixture(params=("cpu", "triton"))
def update(request):
    """The module of a backend."""
    if request.param == "cpu":
        return cpu_update
    from pathrnn_kernels.ops import triton

    if (problem := triton.problem()) is not None:
        pytest.skip(problem)
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the compiled kernels")
    return importlib.import_module("pathrnn_kernels.ops.triton.update")


#: Of a tensor and of its κ: every way in which κ is broadcast, one program and several, whole and partial.
SHAPES = (
    ((40, 70), (40, 1)),
    ((70, 40), (1, 40)),
    ((33, 65), (33, 65)),
    ((64, 32), (64, 32)),
    ((1024,), (1024,)),
    ((17,), (17,)),
    ((3,), (1,)),
    ((1, 1), (1, 1)),
    ((1,), (1,)),
)


def draw(dtype, shapes=SHAPES):
    tensors = [torch.randn(shape, dtype=dtype) for shape, _ in shapes]
    kappas = [torch.rand(shape, dtype=dtype).add_(0.1) for _, shape in shapes]
    return tensors, kappas


def divide(update, gradients, kappas, log_scales):
    """As PathOptimizer asks for it."""
    return update.precondition(gradients, kappas, *split_scales(log_scales, gradients[0].dtype))


def roundings(dtype, count):
    return count * torch.finfo(dtype).eps


@dtypes
@pytest.mark.parametrize("log_scale", (0.0, 1.0, -30.0, 30.0))
def test_precondition(update, dtype, log_scale):
    gradients, kappas = draw(dtype)
    gradients[2] = gradients[2].T.contiguous().T
    kappas[3] = kappas[3].T.contiguous().T
    kappas[0][3], kappas[2][0, 5] = 0, 0
    log_scales = [log_scale + i for i in range(len(gradients))]
    results, overflowed = divide(update, gradients, kappas, log_scales)
    for g, kappa, result, scale in zip(gradients, kappas, results, log_scales, strict=True):
        exact = torch.where(kappa == 0, 0, g.double() * math.exp(scale) / kappa.double())
        # The division, and as many products as the scale has factors, each with a rounded factor.
        torch.testing.assert_close(result, exact.to(dtype), rtol=roundings(dtype, 6), atol=0)
        assert result.dtype == dtype and result.shape == g.shape
    assert not overflowed.any()
    again, _ = divide(update, gradients, kappas, log_scales)
    assert all(torch.equal(x, y) for x, y in zip(results, again, strict=True))


@pytest.mark.parametrize("kappa, log_scale", ((1e-36, -82.0), (1e30, 90.0), (1e-20, -399.0), (1e20, 5e4)))
def test_scales_and_divisors_may_leave_the_range_that_their_quotient_stays_in(update, kappa, log_scale):
    gradient = torch.tensor([1e6 if log_scale < 0 else 1e-24])
    (result,), overflowed = divide(update, [gradient], [torch.tensor([kappa])], [log_scale])
    exact = gradient.item() / kappa * math.exp(min(log_scale, 400.0))
    if exact > torch.finfo(F32).max:
        assert result.item() == math.inf and overflowed.item()
    else:
        assert result.item() == pytest.approx(exact, rel=1e-5, abs=1e-44) and not overflowed.item()


@dtypes
def test_only_what_overflows_is_reported(update, dtype):
    gradients, kappas = draw(dtype)
    gradients[1][69, 39] = math.nan
    gradients[4][0] = -math.inf
    kappas[2][0, 0] = 0  # no step, however large the gradient
    gradients[5][16] = torch.finfo(dtype).max
    kappas[5][16] = 0.5
    results, overflowed = divide(update, gradients, kappas, [0.0] * len(gradients))
    assert overflowed.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert results[1][69, 39].isnan() and results[4][0] == -math.inf and results[5][16] == math.inf
    assert results[2][0, 0] == 0
    assert [int((~x.isfinite()).sum()) for x in results] == [0, 1, 0, 0, 1, 1, 0, 0, 0]


@dtypes
def test_addresses_that_are_not_aligned(update, dtype):
    whole = torch.randn(2, 65, 65, dtype=dtype)
    gradient, kappa = whole[0, 1], whole.abs()[1, 3]  # 65 numbers from the start, and 195
    assert gradient.data_ptr() % 16 or kappa.data_ptr() % 16
    (result,), _ = divide(update, [gradient], [kappa], [0.0])
    torch.testing.assert_close(result, gradient / kappa, rtol=roundings(dtype, 1), atol=0)


def length(parameters, before, kappas, log_scales):
    return math.sqrt(
        sum(
            (math.exp(scale) * kappa.double() * (p.double() - b.double()).square()).sum().item()
            for p, b, kappa, scale in zip(parameters, before, kappas, log_scales, strict=True)
        )
    )


@dtypes
@pytest.mark.parametrize("shift", (-4.0, 9.0))
def test_shorten(update, dtype, shift):
    before, kappas = draw(dtype)
    parameters = [b + 0.1 * torch.randn_like(b) for b in before]
    parameters[0] = parameters[0].T.contiguous().T
    before[1] = before[1].T.contiguous().T
    kappas[0][3] = 0
    log_scales = [shift - i for i in range(len(before))]
    factor = min(1, 1 / length(parameters, before, kappas, log_scales))
    assert (factor < 1) == (shift > 0)
    expected = [b + factor * (p - b) if factor < 1 else p.clone() for p, b in zip(parameters, before, strict=True)]
    twins, versions = [p.clone() for p in parameters], [p._version for p in parameters]
    update.shorten_(parameters, before, kappas, log_scales)
    update.shorten_(twins, before, kappas, log_scales)
    for p, twin, exact, version in zip(parameters, twins, expected, versions, strict=True):
        # The step, its product and the sum; the factor has more digits than they.
        torch.testing.assert_close(p, exact, rtol=roundings(dtype, 4), atol=roundings(dtype, 4))
        assert torch.equal(p, twin) and (p._version > version or factor == 1)
    if factor < 1:
        assert length(parameters, before, kappas, log_scales) == pytest.approx(1, rel=1e-5 if dtype == F32 else 1e-12)


@dtypes
@pytest.mark.parametrize("log_scale", (3000.0, -3000.0))
def test_lengths_out_of_range(update, dtype, log_scale):
    before, kappas = draw(dtype)
    parameters = [b + 1 for b in before]
    # exp(-3000): too short to see. exp(3000): no step is left of this one.
    expected = before if log_scale > 0 else [p.clone() for p in parameters]
    update.shorten_(parameters, before, kappas, [log_scale] * len(before))
    for p, exact in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, exact, rtol=0, atol=0)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_step_that_is_not_finite_is_left_as_it_is(update, bad):
    before, kappas = draw(F32)
    parameters = [b + 1 for b in before]
    parameters[3][5, 5] = bad
    expected = [p.clone() for p in parameters]
    update.shorten_(parameters, before, kappas, [50.0] * len(before))
    for p, exact in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, exact, rtol=0, atol=0, equal_nan=True)


def test_no_step(update):
    before, kappas = draw(F32)
    parameters = [b.clone() for b in before]
    update.shorten_(parameters, before, kappas, [50.0] * len(before))
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@dtypes
@pytest.mark.parametrize("log_scale", (0.0, -90.0, 90.0))
def test_norm_gradients(dtype, log_scale):
    weights, kappas = draw(dtype)
    weights[2] = weights[2].T.contiguous().T
    # κ beyond the dtype's range beside a weight of zero, which has no gradient.
    weights[4][7], kappas[4][7] = 0, math.inf
    log_scales = [log_scale + i for i in range(len(weights))]
    grad = torch.tensor(-0.3 * math.exp(-log_scale), dtype=dtype)
    found = cpu_update.norm_gradients(weights, kappas, log_scales, grad)
    for w, kappa, result, scale in zip(weights, kappas, found, log_scales, strict=True):
        exact = torch.where(w == 0, 0, 2 * grad.double() * w.double() * kappa.double() * math.exp(scale))
        # Four products and an exponential on either side, half an eps each.
        torch.testing.assert_close(result, exact.to(dtype), rtol=roundings(dtype, 5), atol=0)
        assert result.dtype == dtype and result.shape == w.shape


def test_large_tensors_are_shared_among_threads(threads):
    size = (1 << 15) * 2 + 77
    tensors, kappas = draw(F32, (((size,), (size,)), ((size // 3, 3), (1, 3))))
    results, overflowed = cpu_update.precondition(tensors, kappas, [1.0, 1.0], 0)
    for g, kappa, result in zip(tensors, kappas, results, strict=True):
        torch.testing.assert_close(result, g / kappa, rtol=roundings(F32, 1), atol=0)
    assert not overflowed.any()
    tensors[0][-1], kappas[0][-1] = torch.finfo(F32).max, 0.5
    assert cpu_update.precondition(tensors, kappas, [1.0, 1.0], 0)[1].tolist() == [1, 0]
    before = [torch.zeros_like(p) for p in tensors]
    tensors[0][-1] = 0
    cpu_update.shorten_(tensors, before, kappas, [0.0, 0.0])
    assert length(tensors, before, kappas, [0.0, 0.0]) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"kappas": [torch.ones(2)]}, ValueError, "there are 1 kappas for 2 gradients"),
        ({"scales": [1.0]}, ValueError, "there are 1 scales for 2 gradients"),
        ({"kappas": [torch.ones(3), torch.ones(3)]}, ValueError, r"kappa has shape \[3\], which does not broadcast"),
        ({"kappas": [torch.ones(2), torch.ones(3, dtype=F64)]}, TypeError, "kappa has dtype Double"),
        ({"gradients": [torch.ones(2), torch.ones(3, dtype=F64)]}, TypeError, "gradients has dtype Double"),
        ({"gradients": [torch.ones(2), torch.ones(1, 1, 3)]}, ValueError, "it must have two dimensions at most"),
        ({"gradients": [torch.ones(2), torch.ones(3).long()]}, TypeError, "use float32 or float64"),
    ),
)
def test_bad_arguments(change, error, message):
    arguments = {"gradients": [torch.ones(2), torch.ones(3)], "kappas": [torch.ones(2), torch.ones(3)]}
    arguments = {**arguments, "scales": [1.0, 1.0], "power": 0, **change}
    with pytest.raises(error, match=message):
        cpu_update.precondition(*arguments.values())


def test_opcheck():
    gradients, kappas = draw(F64)
    scales = [1.5] * len(gradients)
    torch.library.opcheck(cpu_update.precondition, (gradients, kappas, scales, 3))
    torch.library.opcheck(cpu_update.norm_gradients, (gradients, kappas, scales, torch.tensor(2.0, dtype=F64)))
    torch.library.opcheck(cpu_update.shorten_, ([g + 1 for g in gradients], gradients, kappas, scales))
