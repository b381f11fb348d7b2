import importlib.util

import pytest

from pathrnn_kernels.ops import triton

# These import triton before a fixture could skip them.
collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else ["test_triton_relu_rnn.py", "test_triton_step.py", "test_triton_optimisers.py"]
)


@pytest.fixture(autouse=True)
def served():
    if triton.problem() is not None:
        pytest.skip(triton.problem())
