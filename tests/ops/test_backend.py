"""Which backend serves, why others do not, and every instruction set that this machine has."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops import backend

CPU, META = torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).parents[2]


def run(*command, **environment):
    # Away from the source tree, which would hide the installed package.
    return subprocess.run(
        [sys.executable, *command],
        cwd=tempfile.gettempdir(),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("PATHRNN_BACKEND", raising=False)


def test_the_extension_is_here():
    assert backend.extension_problem() is None
    assert pk.explain(pk.ReLURNN(2, 3)).backend == "cpu"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_auto_takes_the_kernels(dtype):
    assert backend.choose(CPU, dtype) == "cpu"
    assert backend.choose(CPU, dtype, "reference") == "reference"


def test_environment(monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", "reference")
    assert backend.choose(CPU, torch.float32) == "reference"
    assert backend.choose(CPU, torch.float32, "cpu") == "cpu"
    monkeypatch.setenv("PATHRNN_BACKEND", "gpu")
    for call in (lambda: pk.ReLURNN(2, 3)(torch.ones(4, 1, 2)), lambda: pk.kappa(pk.PathNetwork(pk.ReLURNN(2, 3)), 4)):
        with pytest.raises(
            ValueError, match="PATHRNN_BACKEND is 'gpu'; use one of 'auto', 'cpu', 'cuda', 'triton', 'reference'"
        ):
            call()


@pytest.mark.parametrize("name", ("CPU", "", "cpu ", None, 3))
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"backend is .*use one of 'auto', 'cpu'"):
        backend.choose(CPU, torch.float32, name)
    with pytest.raises(ValueError, match="backend is"):
        ops.relu_rnn(torch.ones(2, 1, 2), None, torch.ones(3, 2), torch.ones(3, 3), backend=name)


@pytest.mark.parametrize(
    "name, device, dtype, why",
    (
        ("cpu", META, torch.float32, "the tensors are on meta; it serves the CPU"),
        ("cpu", CPU, torch.bfloat16, "the tensors are torch.bfloat16; it serves torch.float32 and torch.float64"),
        ("auto", CPU, torch.float16, "the tensors are torch.float16"),
        # Not on a CPU, where other tests load emulated and interpreted kernels into this process.
        ("cuda", META, torch.float32, "the tensors are on meta; it serves NVIDIA GPUs"),
        ("cuda", CPU, torch.float16, "the tensors are torch.float16"),
        ("triton", META, torch.float32, "the tensors are on meta; it serves GPUs"),
        ("triton", CPU, torch.float16, "the tensors are torch.float16"),
    ),
)
def test_refusals_list_every_reason(name, device, dtype, why):
    with pytest.raises(ValueError, match="does not serve this call: .*" + why) as error:
        backend.choose(device, dtype, name)
    for other in backend.BACKENDS:
        assert other in str(error.value)


def test_reference_serves_relu_rnn_with_gradients():
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((4, 2, 3), (2, 5), (5, 3), (5, 5), (5,), (5,))]
    for some in (tensors, [tensors[0], None, *tensors[2:4]]):
        for found, expected in zip(ops.relu_rnn(*some), ops.relu_rnn(*some, backend="reference"), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
def test_every_instruction_set(isa):
    """The tests marked every_isa again, with memory that C++ allocates filled with large numbers."""
    code = "import torch; from pathrnn_kernels import _C; print(_C.build_info()['isa_active'])"
    probe = run("-c", code, PATHRNN_CPU_ISA=isa)
    if probe.returncode != 0:
        assert "not support" in probe.stderr or "use one of" in probe.stderr, probe.stderr
        pytest.skip(f"this machine has no {isa}")
    assert probe.stdout.strip() == isa
    if isa == run("-c", code).stdout.strip():
        pytest.skip(f"all tests ran on {isa}")
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests"), "-m", "every_isa")
    few = ("-k", "not 1-threads")  # those ran on the best instruction set
    tests = run(*command, *few, PATHRNN_CPU_ISA=isa, MALLOC_PERTURB_="129")
    assert tests.returncode == 0, tests.stdout[-5000:]
    assert " passed" in tests.stdout and "failed" not in tests.stdout


def test_an_unknown_instruction_set():
    code = "import torch, pathrnn_kernels as pk; pk.ReLURNN(2, 3)(torch.ones(4, 1, 2))"
    result = run("-c", code, PATHRNN_CPU_ISA="mmx", PATHRNN_BACKEND="auto")
    assert result.returncode != 0
    assert "PATHRNN_CPU_ISA is mmx; use one of " in result.stderr.splitlines()[-1]


def test_threads_agree():
    """Teams of any size sum in another order, but compute the same."""
    net = pk.PathNetwork(pk.ReLURNN(3, 120, 2, dtype=torch.float64), torch.nn.Linear(120, 3, dtype=torch.float64))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(pk.kappa(net, 30, second_term=True))
    for name in found[0].factors:
        for other in found[1:]:
            torch.testing.assert_close(found[0].dense(name), other.dense(name), rtol=1e-13, atol=0)


def test_denormals_are_as_they_were():
    """Kernels flush denormals for themselves alone."""
    tiny = torch.full((4,), 1e-40)
    net = pk.PathNetwork(pk.ReLURNN(3, 200))
    pk.kappa(net, 10, second_term=True)
    pk.ReLURNN(3, 200)(torch.ones(9, 20, 3))[0].sum().backward()
    assert ((tiny * 0.5) > 0).all()


# ---- GPUs that CUDA code does not fit, as the driver would tell of them ----------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for which the extension has code of an architecture; returns how to set it."""
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))

    def runs(code, error=""):
        monkeypatch.setattr(backend, "_cuda_code", lambda index: (code, error))

    return runs


def test_without_code_for_the_gpu_auto_takes_triton(gpu, monkeypatch):
    from pathrnn_kernels.ops import triton

    monkeypatch.setattr(triton, "problem", lambda: None)
    gpu(80)
    assert backend.choose(GPU, torch.float32) == "cuda"
    gpu(0, "no kernel image is available for execution on the device")
    assert backend.choose(GPU, torch.float32) == "triton"
    reason = backend.refusals(GPU, torch.float32)["cuda"]
    assert reason.startswith("the extension has no code for NVIDIA T4 (no kernel image is available")
    assert "TORCH_CUDA_ARCH_LIST=7.5" in reason and reason.endswith("--no-deps .")
    with pytest.raises(ValueError, match="does not serve this call: the extension has no code for NVIDIA T4"):
        backend.choose(GPU, torch.float32, "cuda")
    assert backend.choose(GPU, torch.float32, "cuda", op="relu_rnn") == "cuda"  # which is cuDNN


def test_an_extension_without_cuda_says_why_it_is(monkeypatch):
    monkeypatch.setattr(backend, "why_without_cuda", lambda: "no nvcc was found")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    reason = backend.refusals(GPU, torch.float32)["cuda"]
    assert reason.startswith(
        "the extension was built without CUDA kernels (no nvcc was found); mend that and rebuild it"
    )


def test_the_code_of_a_device_is_asked_of_the_driver(monkeypatch):
    from pathrnn_kernels import _C

    monkeypatch.setattr(backend, "_codes", {})
    monkeypatch.setattr(_C, "cuda_code", lambda index: (0, "out of memory"), raising=False)
    assert backend.cuda_code(torch.device("cuda", 1)) == (0, "out of memory")  # of now, perhaps
    monkeypatch.setattr(_C, "cuda_code", lambda index: (80 + index, ""))
    assert backend.cuda_code(torch.device("cuda", 1)) == (81, "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert backend.cuda_code(torch.device("cuda")) == (82, "")
    monkeypatch.delattr(_C, "cuda_code")
    assert backend.cuda_code(torch.device("cuda", 1)) == (81, "")
    monkeypatch.setattr(backend, "why_without_cuda", lambda: "no nvcc was found")
    assert backend.cuda_code(torch.device("cuda", 3)) == (
        0,
        "the extension was built without CUDA kernels (no nvcc was found)",
    )
    monkeypatch.setattr(backend, "_problem", "it is not built")
    assert backend.cuda_code(torch.device("cuda", 4)) == (0, "it is not built")
