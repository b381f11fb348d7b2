"""Each kernel of both GPU backends against its specification, tests/gpu_model.py, which runs on the CPU."""

import math

import gpu_model
import pytest
import tolerances
import torch
from gpu_cases import F32, F64, KERNEL_SIZES, LARGE_KERNEL_SIZES, ON_CPU, needs_gpu, served
from gpu_model import ZERO, centre, same

from pathrnn_kernels.ops.path_chain import _kernels
from pathrnn_kernels.ops.plan import describe, plans

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
HIDDEN = pytest.mark.parametrize("hidden", [hidden for hidden, _ in KERNEL_SIZES])
STEPS = (1, 7) if ON_CPU else (1, 2, 7, 40)


@pytest.fixture
def kernels(backend):
    return _kernels(backend)


def moved(arguments, device):
    if isinstance(arguments, torch.Tensor):
        return arguments.to(device)
    if isinstance(arguments, (list, tuple)):
        return [moved(a, device) for a in arguments]
    return arguments


def flag(device="cpu"):
    return torch.zeros(1, dtype=torch.bool, device=device)


def largest(*tensors):
    return torch.stack([t.abs().max() for t in tensors])


def weight(*shape, dtype, scale=1.0):
    """Gaussian with some zero entries."""
    return torch.randn(shape, dtype=dtype) * (torch.rand(shape) > 0.1) * (scale / shape[-1] ** 0.5)


def tempered(count, hidden, dtype):
    """Rows with some zero entries, the largest near 2^centre, one zero row if there are several."""
    rows = torch.rand(count, hidden, dtype=dtype) * (torch.rand(count, hidden) > 0.1) * 2.0 ** centre(dtype)
    if count > 2:
        rows[1] = 0
    powers = torch.randint(-4, 5, (count,))
    return rows, torch.where((rows != 0).any(1), powers, ZERO)


def check(kernel, model, arguments, device, rtol, flagged=False):
    """The kernel agrees with its model on every (rows, exponents) that it returns, and with itself bit for bit.

    With ``flagged`` the last argument is a ``lost`` flag for either: conservative is allowed, a miss is not.
    """
    flags = [flag(device), flag()] if flagged else []
    found, expected = kernel(*moved(arguments, device), *flags[:1]), model(*arguments, *flags[1:])
    again = kernel(*moved(arguments, device), *flags[:1])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for i in range(0, len(expected), 2):
        if expected[i].numel():
            same((found[i], found[i + 1]), (expected[i], expected[i + 1]), rtol)
    if flagged:
        assert bool(flags[0]) or not bool(flags[1])


@HIDDEN
@DTYPES
@pytest.mark.usefixtures("poisoned")
def test_column_sums_and_ends(kernels, device, hidden, dtype):
    for scale in (1.0,) if ON_CPU else (1.0, 2.0**40, 2.0**-40):
        for rows in STEPS:
            w = weight(rows, hidden, dtype=dtype, scale=scale)
            call = (w, largest(w))
            check(kernels.column_sums, gpu_model.column_sums, call, device, tolerances.path(dtype, 1, rows), True)
        head, head_bias = weight(5, hidden, dtype=dtype), weight(5, dtype=dtype, scale=scale)
        for input_size in (5,) if ON_CPU else (1, 5, 70):
            w = weight(hidden, input_size, dtype=dtype, scale=scale)
            biases = [weight(hidden, dtype=dtype) for _ in range(6)]
            x = (torch.rand(input_size, dtype=dtype), torch.tensor([7]))
            for inputs in ((None, None), x):
                for b in ((biases[:3], biases[3:]), ([], [])):
                    for ends in ((head, head_bias), (head, None), (None, None)):
                        # weight_ih and weight_hh of three layers, of which this kernel reads the first.
                        tops = largest(*[w] * 6, *b[0], *b[1], *(t for t in ends if t is not None))
                        call = (w, *b, *ends, *inputs, 3, tops)
                        error = tolerances.path(dtype, 2, max(input_size, 5))
                        check(kernels.ends, gpu_model.ends, call, device, error, True)


@HIDDEN
@DTYPES
def test_finish(kernels, device, hidden, dtype):
    bias = (torch.rand(1, dtype=dtype), torch.tensor([5]))
    none = (torch.zeros(1, dtype=dtype), torch.tensor([ZERO]))
    outputs, head = (torch.rand(hidden, dtype=dtype) for _ in range(2))
    finite, nan = torch.ones(4, dtype=dtype), torch.tensor([1.0, math.nan], dtype=dtype)
    for exponent in (0, 900, -40_000):
        for biases in (bias, none):
            call = (outputs, torch.tensor([exponent]), head, torch.tensor([-3]), *biases, 9, finite)
            found = kernels.finish(*moved(call, device), flag(device))[0]
            expected = gpu_model.finish(*call, flag())[0]
            assert found.shape == () and found.dtype == F64
            # Relative to γ², and to the logarithm where that is long.
            error = tolerances.unit_roundoff(F64) * (8 + hidden + 4 * abs(expected.item()))
            assert abs(found.item() - expected.item()) <= error
    zero = (torch.zeros(hidden, dtype=dtype), torch.tensor([ZERO]), head, torch.tensor([0]), *none, 9)
    assert kernels.finish(*moved((*zero, finite), device), flag(device))[0].item() == -math.inf
    assert kernels.finish(*moved((*zero, nan), device), flag(device))[0].isnan()


@HIDDEN
@pytest.mark.parametrize("last_only", (False, True), ids=("all", "last"))
@pytest.mark.parametrize("both", (False, True), ids=("h", "h and d"))
@DTYPES
@pytest.mark.usefixtures("poisoned")
def test_chains(kernels, backend, device, hidden, dtype, both, last_only):
    w, v = weight(hidden, hidden, dtype=dtype, scale=1.2), weight(hidden, hidden, dtype=dtype, scale=0.7)
    for seq_len in STEPS:
        for varying in (False, True):
            drive_h, drive_d = (tempered(seq_len if varying else 1, hidden, dtype) for _ in range(2))
            down = (v, largest(v), *drive_d) if both else (None,) * 4
            once = last_only and not varying  # a drive that varies is given in full
            for plan in served(backend, describe(device), hidden, seq_len, dtype):
                call = (w, largest(w), *drive_h, *down, seq_len, once, varying, *plan)
                error = tolerances.path(dtype, seq_len, hidden)
                check(kernels.chains, gpu_model.chains, call, device, error, True)


@DTYPES
def test_chains_say_what_they_lose(kernels, backend, device, dtype):
    if dtype == F64:
        pytest.skip("the model knows what float32 loses, not what float64 does")
    hidden, seq_len = 33, 6
    for exponent in (0, 9, 18):
        scale = torch.logspace(-exponent, exponent, hidden, dtype=dtype)
        w = weight(hidden, hidden, dtype=dtype) * scale[:, None] / scale
        drive = (torch.ones(1, hidden, dtype=dtype), torch.tensor([0]))
        for plan in served(backend, describe(device), hidden, seq_len, dtype):
            call = (w, largest(w), *drive, w, largest(w), *drive, seq_len, False, False, *plan)
            found, expected = flag(device), flag()
            kernels.chains(*moved(call, device), found)
            gpu_model.chains(*call, expected)
            assert bool(found) or not bool(expected), plan


@HIDDEN
@DTYPES
@pytest.mark.usefixtures("poisoned")
def test_row_sums(kernels, device, hidden, dtype):
    for steps in STEPS:
        rows = tempered(steps, hidden, dtype)
        error = tolerances.path(dtype, steps, 1)
        for more in (None, None), tempered(steps // 2 + 1, hidden, dtype):
            check(kernels.row_sums, gpu_model.row_sums, (*rows, *more), device, error, True)


@HIDDEN
@DTYPES
@pytest.mark.usefixtures("poisoned")
def test_pair_sums(kernels, device, hidden, dtype):
    for steps in STEPS:
        d, h = tempered(steps, hidden, dtype), tempered(steps + 1, hidden, dtype)
        check(kernels.pair_sums, gpu_model.pair_sums, (*d, *h), device, tolerances.path(dtype, steps, 1), True)


@pytest.mark.parametrize("hidden, seq_len", LARGE_KERNEL_SIZES)
@DTYPES
def test_chains_of_large_matrices(kernels, backend, device, hidden, seq_len, dtype):
    w, v = (weight(hidden, hidden, dtype=dtype) for _ in range(2))
    drives = [(torch.rand(1, hidden, dtype=dtype), torch.tensor([0])) for _ in range(2)]
    call = (w, largest(w), *drives[0], v, largest(v), *drives[1], seq_len, False, False)
    # The model in float64: in float32 it rounds as much as the kernel.
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in call]
    expected = gpu_model.chains(*wide, "block", 1, flag())
    for plan in served(backend, describe(device), hidden, seq_len, dtype):
        found = kernels.chains(*moved(call, device), *plan, flag(device))
        for i in (0, 2):
            same((found[i].double(), found[i + 1]), expected[i : i + 2], tolerances.path(dtype, seq_len, hidden))


@needs_gpu
def test_offsets_beyond_32_bits(kernels, backend, device):
    """T · H > 2^31 entries in h and in d. A chain with a constant drive comes to rest: its last rows are known."""
    hidden, seq_len = 4096, 525_000
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory; {free >> 30} are free")
    w = (torch.randn(hidden, hidden) * (0.5 / hidden**0.5)).to(device)
    one = (torch.ones(1, hidden, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    top = largest(w)
    plan = plans(backend, describe(device), hidden, seq_len, 4)["grid"]
    h, h_exponents, d, d_exponents = kernels.chains(
        w, top, *one, w, top, *one, seq_len, False, False, "grid", plan.blocks, flag(device)
    )
    start = 1000  # at rest long before
    rest_h, rest_d = (h[start], h_exponents[start]), (d[-start], d_exponents[-start])
    for chain, exponents, rest in (
        (h[start:], h_exponents[start:], rest_h),
        (d[:-start], d_exponents[:-start], rest_d),
    ):
        for part in torch.arange(0, len(chain), 50_000).tolist():
            stop = part + 50_000
            scale = torch.exp2((exponents[part:stop] - rest[1]).float())[:, None]
            torch.testing.assert_close(chain[part:stop] * scale, rest[0].expand_as(chain[part:stop]), rtol=1e-5, atol=0)
    # Sums of equal terms, but for the first and last thousand: those are the second part of the tolerance.
    error = tolerances.path(F32, seq_len, 1) + 2 * start / seq_len
    total, exponent = kernels.row_sums(h, h_exponents, None, None, flag(device))
    same((total, exponent), (rest_h[0] * seq_len, rest_h[1].reshape(1)), error)
    pairs = kernels.pair_sums(d, d_exponents, h, h_exponents, flag(device))
    product = torch.outer(rest_d[0].double(), rest_h[0].double()) * seq_len
    same(pairs, (product.float() if product.max() < 3e38 else product, rest_d[1].reshape(1) + rest_h[1]), error)
