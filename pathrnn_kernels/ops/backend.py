"""Which backend serves a call, and why each other one would not."""

from __future__ import annotations

import functools
import os

import torch

#: In the order in which "auto" tries them.
BACKENDS = ("cpu", "cuda", "triton", "reference")
ENVIRONMENT = "PATHRNN_BACKEND"

_REBUILD = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps pathrnn-kernels"


@functools.cache
def extension_problem() -> str | None:
    """None if the C++ extension is loaded, else one sentence that says why not and what to do."""
    try:
        from .._built_with import TORCH_VERSION
    except ImportError:
        return "the C++ extension is not built; in the source tree type: pip install --no-build-isolation ."
    # Compared before loading: a library built against another torch can crash the process while it loads.
    if torch.__version__ != TORCH_VERSION:
        return f"the C++ extension was built against torch {TORCH_VERSION}, but torch {torch.__version__} is imported; {_REBUILD}"
    try:
        from .. import _C  # noqa: F401  loading it registers torch.ops.pathrnn
    except ImportError as error:
        return f"the C++ extension does not load ({error}); {_REBUILD}"
    return None


def refusals(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For every backend, why it would not serve tensors of this device and dtype; None where it would."""
    reasons: dict[str, str | None] = dict.fromkeys(BACKENDS)
    if device.type != "cpu":
        reasons["cpu"] = f"the tensors are on {device}; it serves the CPU"
    elif dtype not in (torch.float32, torch.float64):
        reasons["cpu"] = f"the tensors are {dtype}; it serves torch.float32 and torch.float64"
    else:
        reasons["cpu"] = extension_problem()
    reasons["cuda"] = "this version has no CUDA kernels yet"
    reasons["triton"] = "this version has no Triton kernels yet"
    return reasons


def choose(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str:
    """The backend that serves a call.

    Raises:
        ValueError: an unknown backend, or one that does not serve the call, with every reason.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT, "auto")
    if backend == "auto" and device.type == "cpu" and extension_problem() is None:
        if dtype in (torch.float32, torch.float64):
            return "cpu"  # the hot path: no table of reasons is built
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(map(repr, ('auto', *BACKENDS)))}")
    reasons = refusals(device, dtype)
    if backend == "auto":
        # On a CPU a missing extension is a mistake to hear of, not a reason to run a hundred times slower.
        backend = "cpu" if device.type == "cpu" else next(name for name in BACKENDS if reasons[name] is None)
    if reasons[backend] is not None:
        others = "; ".join(f"{name}: {why or 'would serve it'}" for name, why in reasons.items() if name != backend)
        raise ValueError(f"backend {backend!r} does not serve this call: {reasons[backend]} ({others})")
    return backend
