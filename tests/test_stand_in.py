"""torch's CUDA build, this package's CUDA code and Triton's launches on a stand-in for a GPU (tests/stand_in)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_in import run

TESTS = Path(__file__).parent
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "stand_in.plugin")

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is no CUDA build"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
]


def on_stand_in(*arguments, device="H100", **environment):
    command = [sys.executable, str(TESTS / "stand_in" / "run.py"), "--device", device, *arguments]
    own = {"PYTHONPATH": f"{TESTS}:{TESTS / 'gpu'}", "PYTEST_ADDOPTS": ""}
    # Here, where no folder is named as the package that is installed.
    return subprocess.run(command, cwd=TESTS, env={**os.environ, **own, **environment}, capture_output=True, text=True)


def check(*arguments, **options):
    found = on_stand_in(*arguments, **options)
    assert found.returncode == 0, found.stdout[-10_000:] + found.stderr[-2_000:]


#: The last torch that this was tried with; a later one may ask for what the stand-in lacks, or launch other kernels.
LATEST = (2, 15)


@pytest.fixture(scope="module", autouse=True)
def torch_runs():
    if not run.headers():
        pytest.skip("no headers of CUDA here")
    if (version := tuple(map(int, torch.__version__.split(".")[:2]))) > LATEST:
        pytest.skip(f"not tried with torch {version[0]}.{version[1]} yet: set LATEST, and see")
    rnn = "torch.nn.RNN(3, 5, nonlinearity='relu').cuda()(torch.zeros(4, 2, 3, device='cuda'))[0].sum().backward()"
    kernels = "from triton.runtime import driver; driver.active.get_current_device()"
    found = on_stand_in("-c", f"import os, torch; {rnn}; torch.cuda.synchronize(); {kernels}; os._exit(0)")
    if found.returncode:
        pytest.skip(f"torch {torch.__version__} does not run on it: {found.stderr[-300:]}")


@pytest.mark.parametrize("device", run.DEVICES)
def test_what_is_asked_of_a_gpu(device):
    # Of other devices the rest is no different, and Triton's kernels would be compiled for each.
    only = [] if device == "H100" else ["-k", "(plan and cuda) or kappa1 or mistakes"]
    check("-m", "pytest", *OPTIONS, "stand_in/checks.py", *only, device=device)


@pytest.mark.slow
def test_the_tests_of_a_gpu_run_through():
    """All but their comparisons, so that the first session with a GPU compares numbers instead of mending tests.

    And but one: torch.compile's own graphs take memory from torch's allocator, which ``stand_in.plugin`` leaves out.
    """
    without = ("-k", "not compiled_into_cuda_graphs", "--assert=plain", "-W", "ignore:ASSERTIONS ARE NOT EXECUTED")
    workers = ("-n", str(os.cpu_count()))
    check("-m", "pytest", *OPTIONS, *without, *workers, "gpu", PYTHONOPTIMIZE="1")  # not -O: for workers, too
