"""κ⁽¹⁾ and the gradient of γ² against eager autograd."""

from collections.abc import Callable

import pytest

from bench.rows import OURS, Spec


@pytest.mark.parametrize("contender", [OURS, "baseline"])
def test_path_chain(contend: Callable[[Spec, str], None], spec: Spec, contender: str) -> None:
    contend(spec, contender)
