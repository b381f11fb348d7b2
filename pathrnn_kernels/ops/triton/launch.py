"""What every launch needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
