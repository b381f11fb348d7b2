"""relu_rnn: one layer of a ReLU RNN over all steps. Contract: csrc/ops.h.

Autograd is registered in C++ (csrc/relu_rnn_autograd.cpp): the Python route costs more than a whole small forward pass.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .backend import BACKENDS, ENVIRONMENT, check_devices, choose, extension_problem, operator, refusals, transformed


def relu_rnn(
    x: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = [W_ih x_t + b_ih + W_hh h_{t-1} + b_hh]_+ (Table 1).

    Differentiable any number of times: derivatives of the gradients come from torch's operations, step by step. Inside
    torch.func's transforms and forward-mode differentiation, ``"auto"`` is the reference, which they go through.

    Args:
        x: ``[T, B, I]``.
        h_0: ``[B, H]``, or None for zeros.
        weight_ih, weight_hh: ``[H, I]``, ``[H, H]``.
        bias_ih, bias_hh: ``[H]``, both or neither.
        backend: ``"auto"``; ``"cpu"``; ``"cuda"``, which is cuDNN, whose float32 products are as exact as
            ``torch.backends.cudnn`` allows (TF32 by default, as in nn.RNN); ``"triton"``, for hidden sizes that one
            program holds; ``"reference"``.

    Returns:
        y ``[T, B, H]``, every h_t, and h_n ``[B, H]``, the last.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    serving = _serving(x.device, x.dtype, weight_hh.shape[0] if weight_hh.dim() else 0, backend)
    if serving in ("cpu", "cuda"):
        return _op(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if serving == "triton":
        from .triton.relu_rnn import relu_rnn as triton_relu_rnn

        return triton_relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    from ..reference import relu_rnn as reference

    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
    y = reference(x, x.new_zeros(x.shape[1], len(weight_hh)) if h_0 is None else h_0, weight_ih, weight_hh, bias)
    return y, y[-1]


def _serving(device: torch.device, dtype: torch.dtype, hidden_size: int, backend: str) -> str:
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT, "auto")
    if transformed() and backend != "reference":
        if backend != "auto":
            raise ValueError(
                f"backend {backend!r} does not serve torch.func's transforms (grad, vmap, jvp): use 'auto', which "
                "takes the reference there"
            )
        return "reference"
    if device.type == "cpu" and backend in ("auto", "cpu"):
        return choose(device, dtype, backend, "relu_rnn")
    return _choose(device, dtype, hidden_size, backend, torch.backends.cudnn.enabled)


# What torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes a second.
_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)  # a GPU is faster than a table of reasons
def _choose(device: torch.device, dtype: torch.dtype, hidden_size: int, backend: str, cudnn: bool) -> str:
    """What ``backend.choose`` says, but for limits of this op's own."""
    chosen = choose(device, dtype, backend, "relu_rnn")
    reasons = refusals(device, dtype, "relu_rnn")
    if reasons["cuda"] is None and not (cudnn and torch.backends.cudnn.is_available()):
        reasons["cuda"] = "it is cuDNN, which this torch lacks or torch.backends.cudnn.enabled forbids"
    if reasons["triton"] is None:
        from .triton.relu_rnn import limit

        if hidden_size > limit(dtype):
            reasons["triton"] = f"hidden_size is {hidden_size}; in {dtype} it serves up to {limit(dtype)}"
    if backend == "auto":
        return next(name for name in BACKENDS if reasons[name] is None)
    if reasons[chosen] is not None:
        raise ValueError(f"backend {chosen!r} does not serve this call: {reasons[chosen]}; use another, or 'auto'")
    return chosen


_op = operator("relu_rnn")

if extension_problem() is None:

    @torch.library.register_fake("pathrnn::relu_rnn")
    def _(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):  # type: ignore[no-untyped-def]
        check_devices(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
        seq_len, batch, _ = x.shape
        hidden = weight_hh.shape[0]
        return x.new_empty(seq_len, batch, hidden), x.new_empty(batch, hidden)

    @torch.library.register_fake("pathrnn::relu_rnn_backward")
    def _(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y, needs):  # type: ignore[no-untyped-def]
        check_devices(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y)
        hidden = y.shape[2]
        shapes = (x.shape, (x.shape[1], hidden), weight_ih.shape, weight_hh.shape, (hidden,))
        return tuple(y.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
