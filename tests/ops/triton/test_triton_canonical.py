"""maxima, reach and canonical_ in Triton against their specification; powers of two."""

import canonical_cases as cases
import pytest
from triton_cases import MARKS

pytestmark = MARKS


@pytest.fixture
def kernels():
    from pathrnn_kernels.ops.triton import kernels

    return kernels


@cases.DTYPES
@cases.SHAPES
def test_maxima(kernels, shape, dtype):
    cases.check_maxima(kernels, shape, dtype)


@cases.DTYPES
@pytest.mark.parametrize("kind", cases.KINDS)
def test_reach(kernels, kind, dtype):
    cases.check_reach(kernels, kind, dtype)


@cases.DTYPES
@pytest.mark.parametrize("options", cases.NETWORKS, ids=str)
def test_canonical(kernels, options, dtype):
    cases.check_canonical(kernels, options, dtype)


@pytest.mark.parametrize("options", cases.NETWORKS[:3], ids=str)
def test_powers_of_two_are_followed(kernels, options):
    cases.check_follows(kernels, options)
