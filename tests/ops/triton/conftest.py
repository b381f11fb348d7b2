import importlib.util
import os

import pytest
import torch

# Triton decides when it is imported, which torch does early, whether kernels are interpreted. With a GPU the same tests
# run compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from pathrnn_kernels.ops import triton

# These import triton before a fixture could skip them.
collect_ignore = [] if importlib.util.find_spec("triton") else ["test_triton_update.py", "test_triton_relu_rnn.py"]


@pytest.fixture(autouse=True)
def served():
    if triton.problem() is not None:
        pytest.skip(triton.problem())
