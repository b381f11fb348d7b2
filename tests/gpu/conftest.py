"""What the tests of a GPU share.

With PATHRNN_GPU_TESTS_ON_CPU=1 the same tests run without a GPU, on smaller sizes: Triton's kernels interpreted, CUDA's
under the emulation. Nothing here imports hypothesis: the machine with the GPU may lack it.
"""

import os

if os.environ.get("PATHRNN_GPU_TESTS_ON_CPU") == "1":
    os.environ["TRITON_INTERPRET"] = "1"  # heeded when triton is first imported

import pytest
import torch
from gpu_cases import ON_CPU


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture(scope="session")
def emulated():
    if ON_CPU:
        from emulation import build

        from pathrnn_kernels.ops import backend

        build.load()
        backend.emulated = True


@pytest.fixture(params=("cuda", "triton"))
def backend(request, device):
    """Every GPU backend that this machine has; the others are skipped with the package's own reason."""
    from pathrnn_kernels.ops.backend import refusals

    if request.param == "cuda":
        request.getfixturevalue("emulated")
    reason = refusals(device, torch.float32)[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32 on both sides: cuDNN takes TF32 by default."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.fixture(autouse=True)
def memory_given_back():
    yield
    if not ON_CPU:
        torch.cuda.empty_cache()
