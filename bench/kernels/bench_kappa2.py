"""κ⁽¹⁾ + κ⁽²⁾ against the paper's sum."""

from collections.abc import Callable

import pytest

from bench.rows import OURS, Spec


@pytest.mark.parametrize("contender", [OURS, "baseline"])
def test_kappa2(contend: Callable[[Spec, str], None], spec: Spec, contender: str) -> None:
    contend(spec, contender)
