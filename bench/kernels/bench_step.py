"""Whole training steps against nn.RNN and SGD."""

from collections.abc import Callable

import pytest

from bench.rows import OURS, Spec


@pytest.mark.parametrize("contender", [OURS, "baseline"])
def test_step(contend: Callable[[Spec, str], None], spec: Spec, contender: str) -> None:
    contend(spec, contender)
