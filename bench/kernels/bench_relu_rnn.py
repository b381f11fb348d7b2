"""ReLURNN, forward and forward + backward, against nn.RNN."""

from collections.abc import Callable

import pytest

from bench.rows import OURS, Spec


@pytest.mark.parametrize("contender", [OURS, "baseline"])
def test_relu_rnn(contend: Callable[[Spec, str], None], spec: Spec, contender: str) -> None:
    contend(spec, contender)
