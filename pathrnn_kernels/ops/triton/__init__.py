"""The Triton backend: kernels that need nothing but torch and triton, for NVIDIA and AMD GPUs.

They take contiguous tensors on a GPU, or on the CPU where TRITON_INTERPRET=1 stood in the environment when triton was
first imported, which importing this alone does not do.
"""

from __future__ import annotations

import importlib.util


def problem() -> str | None:
    """None if the kernels can run, else one sentence that says what to do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; type: pip install triton (it comes with torch's CUDA and ROCm builds)"
    import triton

    if not interpreted():
        if triton.knobs.runtime.interpret:
            return "TRITON_INTERPRET=1 came after triton was imported; set it before Python starts"
        return None
    import numpy

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if versions[0] < (3, 8) and versions[1] >= (2, 4):
        return f"triton {triton.__version__} interprets only with numpy below 2.4; type: pip install 'numpy<2.4'"
    return None


def interpreted() -> bool:
    """Whether kernels run interpreted, on the CPU."""
    import triton

    return not isinstance(triton.language.sum, triton.JITFunction)
