"""maxima, reach and canonical_ in CUDA, emulated, against their specification; powers of two."""

import canonical_cases as cases
import pytest
import torch

from pathrnn_kernels.ops import cuda

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # a compiler runs for a minute


@cases.DTYPES
@cases.SHAPES
def test_maxima(shape, dtype):
    cases.check_maxima(cuda, shape, dtype)


@cases.DTYPES
@pytest.mark.parametrize("kind", cases.KINDS)
def test_reach(kind, dtype):
    cases.check_reach(cuda, kind, dtype)


@cases.DTYPES
@pytest.mark.parametrize("options", cases.NETWORKS, ids=str)
def test_canonical(options, dtype):
    cases.check_canonical(cuda, options, dtype)


@pytest.mark.parametrize("options", cases.NETWORKS, ids=str)
def test_powers_of_two_are_followed(options):
    cases.check_follows(cuda, options)


@pytest.mark.parametrize("flat", (torch.ones(7), torch.ones(24, dtype=torch.float64)))
def test_what_does_not_fit_is_refused(flat):
    f = torch.zeros(1, 3, dtype=torch.int32)
    call = (flat, f, f, 1, 2, True, 0, 0, 0, True, torch.zeros(4), torch.zeros(1, dtype=torch.bool))
    with pytest.raises((ValueError, TypeError), match="flat has shape|largest has"):
        cuda.canonical_(*call)
