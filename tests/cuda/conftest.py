import pytest


@pytest.fixture(scope="session", autouse=True)
def emulated():
    """The CUDA kernels, run on the host (tests/emulation), behind torch.ops.pathrnn for CPU tensors."""
    from emulation import build

    build.load()
