"""relu_rnn: one layer of a ReLU RNN over all steps. Contract: csrc/ops.h.

Autograd is registered in C++ (csrc/cpu/relu_rnn.cpp): the Python route costs more than a whole small forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import check_devices, choose, extension_problem, operator


def relu_rnn(
    x: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = [W_ih x_t + b_ih + W_hh h_{t-1} + b_hh]_+ (Table 1), differentiable once.

    Args:
        x: ``[T, B, I]``.
        h_0: ``[B, H]``, or None for zeros.
        weight_ih, weight_hh: ``[H, I]``, ``[H, H]``.
        bias_ih, bias_hh: ``[H]``, both or neither.

    Returns:
        y ``[T, B, H]``, every h_t, and h_n ``[B, H]``, the last.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    if choose(x.device, x.dtype, backend) == "cpu":
        return _op(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    from ..reference import relu_rnn as reference

    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
    y = reference(x, x.new_zeros(x.shape[1], len(weight_hh)) if h_0 is None else h_0, weight_ih, weight_hh, bias)
    return y, y[-1]


_op = operator("relu_rnn")

if extension_problem() is None:

    @torch.library.register_fake("pathrnn::relu_rnn")
    def _(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):  # type: ignore[no-untyped-def]
        check_devices(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
        seq_len, batch, _ = x.shape
        hidden = weight_hh.shape[0]
        return x.new_empty(seq_len, batch, hidden), x.new_empty(batch, hidden)

    @torch.library.register_fake("pathrnn::relu_rnn_backward")
    def _(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, y, needs):  # type: ignore[no-untyped-def]
        check_devices(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, y)
        hidden = y.shape[2]
        shapes = (x.shape, (x.shape[1], hidden), weight_ih.shape, weight_hh.shape, (hidden,))
        return tuple(y.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
