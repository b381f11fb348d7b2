"""How the tests of Triton kernels call them, and their specification."""

import gpu_model
import pytest
import torch

F32, F64 = torch.float32, torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of every module. The warnings are the interpreter's, about nan and infinity, and about numpy's future.
MARKS = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
dtypes = pytest.mark.parametrize("dtype", (F32, F64))


_LOSING = ("column_sums", "ends", "chains", "row_sums", "pair_sums")


def largest(*tensors):
    return torch.stack([t.abs().max() for t in tensors])


def widened(x):
    if isinstance(x, list):
        return [widened(entry) for entry in x]
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def moved(x):
    if isinstance(x, list):
        return [moved(entry) for entry in x]
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def flags(name):
    """What a kernel wants beside the arguments that tests give: ``lost``, for those that may lose something."""
    return [torch.zeros(1, dtype=torch.bool)] if name in _LOSING else []


def run(name, *arguments):
    """The kernel's results and, where it sets it, ``lost``; twice alike to the last bit, on the CPU."""
    from pathrnn_kernels.ops.triton import kernels

    def once():
        lost = moved(flags(name))
        found = getattr(kernels, name)(*map(moved, arguments), *lost)
        return [x.cpu() for x in (*found, *lost)]

    found, again = once(), once()
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    return found


def truth(name, *arguments):
    """By the specification, in float64."""
    return getattr(gpu_model, name)(*map(widened, arguments), *flags(name))


def same(found, wanted, rtol):
    """Assert that (rows, exponents) are what the truth is, whatever their exponents."""
    gpu_model.same((found[0].double(), found[1]), wanted, rtol)
