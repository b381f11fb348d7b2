"""maxima, reach and canonical_ in Triton against their specification; launches of a whole κ⁽¹⁾; powers of two."""

import canonical_cases as cases
import pytest
from torch.utils._python_dispatch import _disable_current_modes
from triton_cases import MARKS

pytestmark = MARKS


@pytest.fixture
def kernels():
    from pathrnn_kernels.ops import triton

    return triton


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


def test_kappa1_of_one_layer_takes_fourteen_launches(kernels, monkeypatch):
    from triton.runtime import interpreter

    launched = []
    run = interpreter.InterpretedFunction.run

    def counted(self, *arguments, **options):
        launched.append(self)
        with _disable_current_modes():  # what interprets a kernel is no launch
            return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    assert cases.launches_of_kappa1(kernels, lambda: len(launched)) <= 14  # W̃ᵀ is made by two of them
