"""row_sums and pair_sums in CUDA, emulated, against their specification."""

import gpu_model
import pytest
import tolerances
import torch
from gpu_model import ZERO, centre, same

from pathrnn_kernels.ops import cuda

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # a compiler runs for a minute

F32, F64, I64 = torch.float32, torch.float64, torch.int64
DTYPES = pytest.mark.parametrize("dtype", (F32, F64), ids=("float32", "float64"))
SIZES = pytest.mark.parametrize(
    "hidden, steps", ((1, 1), (1, 7), (3, 2), (17, 40), pytest.param(100, 7, marks=pytest.mark.slow), (130, 2))
)
#: Exponents: of the same size, so that every row counts, or so far apart that only the rows with the largest do.
NEAR, FAR = (-3, 0, 2, 5), (-(10**6), 0, 10**6)


def tempered(count, hidden, dtype, exponents=NEAR, zeros=True):
    """Rows with some zero entries, the largest near 2^centre, and some zero rows."""
    rows = torch.rand(count, hidden, dtype=dtype) * 2.0 ** centre(dtype)
    powers = torch.tensor(exponents)[torch.randint(len(exponents), (count,))]
    if zeros:
        rows *= torch.rand(count, hidden) > 0.1
        rows[torch.rand(count) < 0.1] = 0
    return rows, torch.where((rows != 0).any(1), powers, ZERO)


def identical(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- row_sums --------------------------------------------------------------------------------------------------------


@DTYPES
@SIZES
@pytest.mark.parametrize("exponents", (NEAR, FAR), ids=("near", "far"))
def test_row_sums(hidden, steps, dtype, exponents):
    rows = tempered(steps, hidden, dtype, exponents)
    more, lost = tempered(steps // 2 + 1, hidden, dtype, exponents), torch.zeros(1, dtype=torch.bool)
    wanted = gpu_model.row_sums(*rows, *more, lost.clone())
    for second in (None, None), more:
        found = cuda.row_sums(*rows, *second, lost)
        for i in range(0, len(found), 2):
            same(found[i : i + 2], wanted[i : i + 2], tolerances.path(dtype, steps, 1))
            assert torch.equal(found[i + 1], wanted[i + 1])
        assert identical(found, cuda.row_sums(*rows, *second, lost))


@DTYPES
def test_what_fades_in_a_sum_is_told(dtype):
    """A column, or a pair of units, far below the others; not one that is zero, and not pairs that never meet."""
    at = torch.full((40,), 100, dtype=I64)  # so that the largest sum is scaled to the dtype's range
    for value, told in ((0.0, False), (torch.finfo(dtype).tiny, True)):
        rows = torch.full((40, 9), 2.0 ** centre(dtype), dtype=dtype)
        rows[:, 4] = value
        for kernels in (cuda, gpu_model):
            lost = torch.zeros(1, dtype=torch.bool)
            kernels.row_sums(rows, at, None, None, lost)
            assert lost == told
            lost = torch.zeros(1, dtype=torch.bool)
            kernels.pair_sums(rows, at, rows, at, lost)
            assert lost == told
    early, late = torch.zeros(40, 9, dtype=dtype), torch.zeros(40, 9, dtype=dtype)
    early[:20], late[20:] = 1, 1
    lost = torch.zeros(1, dtype=torch.bool)
    sums, _ = cuda.pair_sums(early, at, late, at, lost)
    assert not sums.any() and not lost


@DTYPES
@pytest.mark.parametrize("exponent", (-1, 0, 60, 61))
def test_sums_come_on_a_natural_scale(exponent, dtype):
    """Entries of about 2^0 to 2^60 as they are, others as about 1."""
    row, at = torch.full((1, 3), 2.0 ** centre(dtype), dtype=dtype), torch.tensor([exponent - centre(dtype)])
    one = row, torch.tensor([-centre(dtype)])
    scale = 0 if 0 <= exponent <= 60 else exponent
    lost = torch.zeros(1, dtype=torch.bool)
    for total, found in cuda.row_sums(row, at, None, None, lost), cuda.pair_sums(row, at, *one, lost):
        assert found == scale and (total == 2.0 ** (exponent - scale)).all()


def test_row_sums_of_zeros():
    total, exponent = cuda.row_sums(torch.zeros(5, 3), torch.full((5,), ZERO), None, None, torch.zeros(1).bool())
    assert not total.any() and exponent == 0


@pytest.mark.parametrize("case", ((0,), (20,), (30, True)), ids=str)
@pytest.mark.parametrize("kernels", (cuda, gpu_model), ids=("cuda", "model"))
def test_what_underflows_before_it_meets_a_large_number_is_told(kernels, case):
    rows, wanted = gpu_model.dropped(*case)
    lost = torch.zeros(1, dtype=torch.bool)
    sums, exponent = kernels.pair_sums(*rows, lost)
    found, rtol = float(sums[1, 1]) * 2.0 ** int(exponent), tolerances.path(F32, 1, 400)
    assert lost or found == pytest.approx(wanted, rel=rtol, abs=0)


# ---- pair_sums -------------------------------------------------------------------------------------------------------


def pair_arguments(hidden, steps, dtype, exponents=NEAR, more_h=1):
    """d of ``steps`` rows, h of ``more_h`` more."""
    return [*tempered(steps, hidden, dtype, exponents), *tempered(steps + more_h, hidden, dtype, exponents)]


def check_pairs(hidden, steps, dtype, **options):
    call = pair_arguments(hidden, steps, dtype, **options)
    lost, more = (torch.zeros(1, dtype=torch.bool) for _ in range(2))
    found, wanted = cuda.pair_sums(*call, lost), gpu_model.pair_sums(*call, more)
    assert lost or not more
    same(found, wanted, tolerances.path(dtype, steps, 1))
    assert identical(found, cuda.pair_sums(*call, lost)) and torch.equal(found[1], wanted[1])


@DTYPES
@SIZES
def test_pair_sums(hidden, steps, dtype):
    check_pairs(hidden, steps, dtype)


@DTYPES
@pytest.mark.parametrize("more_h", (-40, -33, -7, 1))
def test_pair_sums_of_sequences_of_other_lengths(more_h, dtype):
    check_pairs(5, 40, dtype, more_h=more_h)


@DTYPES
@pytest.mark.parametrize("seed", range(6))
def test_pair_sums_of_extreme_exponents(seed, dtype):
    torch.manual_seed(seed)
    check_pairs(17, 20, dtype, exponents=FAR)


@pytest.mark.parametrize("steps", (1, 19, 70))
def test_pair_sums_in_wide_tiles(steps):
    """Enough rows and columns for the tiles of large matrices, in a device as small as the emulated one."""
    check_pairs(257, steps, F32)


def test_pair_sums_of_zeros():
    zeros = torch.zeros(4, 3), torch.full((4,), ZERO)
    lost = torch.zeros(1, dtype=torch.bool)
    total, exponent = cuda.pair_sums(*zeros, *zeros, lost)
    assert not total.any() and exponent == 0 and not lost


def test_pair_sums_that_differ_much_within_a_lag():
    """Entries that only rows of small exponents have are not lost beside larger ones."""
    d = torch.tensor([[2.0**30, 0.0], [0.0, 2.0**30]])
    exponents = torch.tensor([0, -100])
    total, exponent = cuda.pair_sums(
        d, exponents, torch.ones(2, 2), torch.zeros(2, dtype=I64), torch.zeros(1, dtype=torch.bool)
    )
    assert torch.equal(gpu_model.true(total, exponent), torch.tensor([[2.0**30] * 2, [2.0**-70] * 2], dtype=F64))


# ---- all -------------------------------------------------------------------------------------------------------------


def calls(dtype=F32, hidden=40):
    sequences = pair_arguments(hidden, 9, dtype)
    lost = {"lost": torch.zeros(1, dtype=torch.bool)}
    return {
        "row_sums": dict(zip(("rows", "exponents"), sequences[:2], strict=True))
        | {"more_rows": None, "more_exponents": None}
        | lost,
        "pair_sums": dict(zip(("d", "d_exponents", "h", "h_exponents"), sequences, strict=True)) | lost,
    }


NAMES = pytest.mark.parametrize("name", ("row_sums", "pair_sums"))


@NAMES
def test_order_of_threads_does_not_matter(name, monkeypatch):
    call = calls()[name]
    wanted = getattr(cuda, name)(**call)
    for seed in "1", "2":
        monkeypatch.setenv("PATHRNN_EMULATION_SEED", seed)
        assert identical(getattr(cuda, name)(**call), wanted)


@NAMES
def test_strided_tensors(name):
    call = calls()[name]
    strided = {
        key: value.repeat_interleave(2, -1)[..., ::2] if isinstance(value, torch.Tensor) else value
        for key, value in call.items()
    }
    assert identical(getattr(cuda, name)(**strided), getattr(cuda, name)(**call))


@NAMES
def test_inputs_are_left_alone(name):
    call = calls()[name]
    before = {key: value.clone() for key, value in call.items() if isinstance(value, torch.Tensor)}
    getattr(cuda, name)(**call)
    assert all(torch.equal(call[key], value) for key, value in before.items())


@NAMES
@DTYPES
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.pathrnn, name), (), calls(dtype, 5)[name])


BAD = [
    ("row_sums", {"rows": torch.ones(9, 40, dtype=I64)}, TypeError, "rows has dtype Long"),
    ("row_sums", {"rows": torch.ones(9)}, ValueError, r"rows has shape \[9\]; it must be \[n, H\]"),
    ("row_sums", {"rows": torch.ones(9, 0)}, ValueError, "rows has shape"),
    ("row_sums", {"exponents": torch.ones(9)}, TypeError, "exponents has dtype Float; use int64"),
    ("row_sums", {"exponents": torch.ones(8, dtype=I64)}, ValueError, "exponents has shape"),
    ("pair_sums", {"d": torch.ones(9, 40, dtype=torch.float16)}, TypeError, "d has dtype Half"),
    ("pair_sums", {"d": torch.ones(9, 3, 40)}, ValueError, "d has shape"),
    ("pair_sums", {"d_exponents": torch.ones(9, dtype=torch.int32)}, TypeError, "d_exponents has dtype Int"),
    ("pair_sums", {"d_exponents": torch.ones(1, dtype=I64)}, ValueError, "d_exponents has shape"),
    ("pair_sums", {"h": torch.ones(10, 40, dtype=F64)}, TypeError, "h has dtype Double, but d has Float"),
    ("pair_sums", {"h": torch.ones(10, 41)}, ValueError, "h has shape"),
    ("pair_sums", {"h": torch.ones(40)}, ValueError, "h has shape"),
    ("pair_sums", {"lost": torch.ones(1)}, TypeError, "lost has dtype Float; use bool"),
    ("pair_sums", {"h_exponents": torch.ones(9, dtype=I64)}, ValueError, "h_exponents has shape"),
]


@pytest.mark.parametrize("name, wrong, error, message", BAD, ids=lambda value: "" if isinstance(value, dict) else None)
def test_bad_input(name, wrong, error, message):
    with pytest.raises(error, match=message):
        getattr(cuda, name)(**(calls()[name] | wrong))


@NAMES
def test_another_device(name):
    for key, value in calls()[name].items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(TypeError, match="move all of them to one device"):
                getattr(cuda, name)(**(calls()[name] | {key: value.to("meta")}))
