"""Which backend serves a call, and why each other one would not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..arguments import FULL_DTYPES

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: In the order in which "auto" tries them.
BACKENDS = ("cpu", "cuda", "triton", "reference")
ENVIRONMENT = "PATHRNN_BACKEND"
_AT_ONCE = frozenset(("auto", "cpu"))

#: Set by tests that have loaded an emulation of CUDA (tests/emulation), which then serves κ of CPU tensors.
emulated = False

# os.environ.get, which converts a name that is absent and raises on the way, takes a microsecond; where the mapping
# behind it is open, as CPython's is, it can be asked.
_variables: Any = getattr(os.environ, "_data", None)
_name: Any = os.environ.encodekey(ENVIRONMENT) if hasattr(os.environ, "encodekey") else None


def environment() -> str:
    """The backend that PATHRNN_BACKEND names, "auto" by default."""
    if _variables is not None and _name not in _variables:
        return "auto"
    backend = os.environ.get(ENVIRONMENT, "auto")
    _check_name(ENVIRONMENT, backend)
    return backend


def _check_name(what: str, backend: object) -> None:
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise ValueError(f"{what} is {backend!r}; use one of {', '.join(map(repr, ('auto', *BACKENDS)))}")


_REBUILD = "rebuild it, in the source tree: pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> str | None:
    try:
        from .._built_with import TORCH_VERSION
    except ImportError:
        return "the C++ extension is not built; in the source tree type: pip install --no-build-isolation ."
    # Compared before loading: a library built against another torch can crash the process while it loads.
    if torch.__version__ != TORCH_VERSION:
        return (
            f"the C++ extension was built against torch {TORCH_VERSION}, but torch {torch.__version__} is imported; "
            f"{_REBUILD}"
        )
    try:
        from .. import _C  # noqa: F401  loading it registers torch.ops.pathrnn
    except (ImportError, ValueError) as error:
        wrong_option = "PATHRNN_CPU_ISA" in str(error)
        return str(error) if wrong_option else f"the C++ extension does not load ({error}); {_REBUILD}"
    return None


_problem = _load()


def extension_problem() -> str | None:
    """None if the C++ extension is loaded, else one sentence that says why not and what to do."""
    return _problem


def operator(name: str) -> Callable[..., Any]:
    """torch.ops.pathrnn.name, resolved once; without the extension, a function that raises what is wrong with it."""
    if _problem is None:
        return getattr(torch.ops.pathrnn, name).default

    def unavailable(*_: object) -> None:
        raise ValueError(f"{name}: {_problem}")

    return unavailable


def at_once() -> bool:
    """Whether ops of the CPU may be called past torch's dispatcher, which takes as long as a small network's κ.

    Not where another backend is named, a transform is under way, or somebody looks on: a mode of torch's, the profiler.
    """
    watched = torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return not watched and environment() in _AT_ONCE and not transformed()


def why_without_cuda() -> str:
    """Why the extension has no CUDA kernels, as setup.py recorded it."""
    from .. import _built_with

    return getattr(_built_with, "WITHOUT_CUDA", None) or "setup.py left no reason"


def cuda_code(device: torch.device) -> tuple[int, str]:
    """The architecture of the CUDA code that a GPU would run, 90 for compute_90; 0 and the reason if there is none.

    PTX of an older architecture, which the driver compiles when it is first run, lacks what newer ones have.
    """
    return _cuda_code(torch.cuda.current_device() if device.index is None else device.index)


_codes: dict[int, tuple[int, str]] = {}


def _cuda_code(index: int) -> tuple[int, str]:
    if index in _codes:
        return _codes[index]
    if _problem is not None:
        return 0, _problem
    from .. import _C  # type: ignore[attr-defined]

    if not hasattr(_C, "cuda_code"):
        return 0, f"the extension was built without CUDA kernels ({why_without_cuda()})"
    code: tuple[int, str] = _C.cuda_code(index)
    if code[0] > 0:  # else there may have been no memory to load it
        _codes[index] = code
    return code


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way: no kernel serves those."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def without_numbers(tensor: Tensor) -> bool:
    """Whether it has a shape and nothing else: on the meta device, or a FakeTensor."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # there are none before it is imported
    return tensor.is_meta or (fakes is not None and isinstance(tensor, fakes.FakeTensor))


def constant_when_traced(function: _Function) -> _Function:
    """What torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_devices(*arguments: Any) -> None:
    """TypeError if tensors among an op's arguments, or in lists of them, are on different devices."""
    parts = [part for given in arguments for part in (given if isinstance(given, (list, tuple)) else (given,))]
    devices = {part.device for part in parts if isinstance(part, Tensor)}
    if len(devices) > 1:
        raise TypeError(f"the tensors are on {', '.join(sorted(map(str, devices)))}: move all of them to one device")


def fake(name: str, check: bool = True) -> Callable[[_Function], _Function]:
    """Registers an op's fake kernel, which a meta tensor among others calls instead of the real one; devices are
    compared before it, unless it does so itself."""

    def register(function: _Function) -> _Function:
        def checked(*arguments: Any, **named: Any) -> Any:
            check_devices(*arguments, *named.values())
            return function(*arguments, **named)

        if _problem is None:
            torch.library.register_fake(f"pathrnn::{name}")(checked if check else function)
        return function

    return register


def _refusal_of_cuda(device: torch.device, op: str) -> str | None:
    if (problem := extension_problem()) is not None:
        return problem
    if device.type == "cpu" and op == "path_chain" and emulated:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}; it serves NVIDIA GPUs"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs; it serves NVIDIA's"
    kernel = "chains" if op == "path_chain" else op
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pathrnn::{kernel}", "CUDA"):
        return f"the extension was built without CUDA kernels ({why_without_cuda()}); mend that and {_REBUILD}"
    if op == "relu_rnn":
        return None  # it is cuDNN
    code, error = cuda_code(device)
    if code == 0:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return (
            f"the extension has no code for {torch.cuda.get_device_name(device)} ({error}): for compute capability "
            f"{capability}, with TORCH_CUDA_ARCH_LIST={capability} in the environment, {_REBUILD}"
        )
    return None


def _refusal_of_triton(device: torch.device) -> str | None:
    from . import triton

    if (problem := triton.problem()) is not None:
        return problem
    if device.type == "cpu" and triton.interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}; it serves GPUs (and, with TRITON_INTERPRET=1 in the environment, the CPU)"
    return None


def refusals(device: torch.device, dtype: torch.dtype, op: str = "path_chain") -> dict[str, str | None]:
    """For every backend, why it would not serve tensors of this device and dtype; None where it would."""
    reasons: dict[str, str | None] = dict.fromkeys(BACKENDS)
    wrong_dtype = None
    if dtype not in FULL_DTYPES:
        wrong_dtype = f"the tensors are {dtype}; it serves torch.float32 and torch.float64"
    wrong_device = None if device.type == "cpu" else f"the tensors are on {device}; it serves the CPU"
    reasons["cpu"] = wrong_device or wrong_dtype or extension_problem()
    reasons["cuda"] = wrong_dtype or _refusal_of_cuda(device, op)
    reasons["triton"] = wrong_dtype or _refusal_of_triton(device)
    return reasons


def choose(device: torch.device, dtype: torch.dtype, backend: str = "auto", op: str = "path_chain") -> str:
    """The backend that serves a call of an op.

    Raises:
        ValueError: an unknown backend, or one that does not serve the call, with every reason.
    """
    _check_name("backend", backend)
    if backend == "auto":
        backend = environment()
    served = device.type == "cpu" and dtype in FULL_DTYPES
    if backend == "auto" and served and extension_problem() is None:
        return "cpu"  # the hot path: no table of reasons is built
    reasons = refusals(device, dtype, op)
    if backend == "auto":
        # On a CPU a missing extension is a mistake to hear of, not a reason to run a hundred times slower.
        backend = "cpu" if device.type == "cpu" else next(name for name in BACKENDS if reasons[name] is None)
    if reasons[backend] is not None:
        others = "; ".join(f"{name}: {why or 'would serve it'}" for name, why in reasons.items() if name != backend)
        raise ValueError(f"backend {backend!r} does not serve this call: {reasons[backend]} ({others})")
    return backend
