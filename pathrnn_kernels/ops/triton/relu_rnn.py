"""relu_rnn: one layer of a ReLU RNN over all steps, for weights that the registers of one program hold.

A program runs one row of the batch through all steps, for rows do not wait for each other then and W_hh is read once.
Products with x, and weights' gradients, are matrix products over all steps, outside.

A step is a vector times a matrix, v M, entry (k, j) of M where j is the lane: a sum over k stays within a thread but
for one exchange between warps. Forwards M is W_hhᵀ, backwards W_hh.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scaled import on_device

#: The largest hidden size: M of twice the size would spill registers, for any number of warps.
_LIMITS = {torch.float32: 128, torch.float64: 64}
#: Bytes of M that a thread keeps: few, so that all schedulers have warps and nothing spills.
_THREAD_BYTES = 128


def limit(dtype: torch.dtype) -> int:
    """The largest hidden size that is served; 0 for a dtype that is not."""
    return _LIMITS.get(dtype, 0)


@triton.jit
def _matrix(pointer, hidden, H: tl.constexpr):
    k, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    return tl.load(pointer + k * hidden + j, mask=(k < hidden) & (j < hidden), other=0)


@triton.jit
def _product(v, matrix):
    return tl.sum(v[:, None] * matrix, 0)


@triton.jit(do_not_specialize=["seq_len", "batch", "hidden"])
def _forward(y, h_0, matrix, seq_len, batch, hidden, H: tl.constexpr):
    """y [T, B, H] holds W_ih x + b and takes h_t = [y_t + h_{t-1} M]_+; h_0 [B, H] or None; M [H, H]."""
    j = tl.arange(0, H)
    inside = j < hidden
    m = _matrix(matrix, hidden, H)
    row = tl.program_id(0).to(tl.int64) * hidden + j
    h = tl.zeros([H], y.dtype.element_ty) if h_0 is None else tl.load(h_0 + row, mask=inside, other=0)
    place = y + row
    stride = batch.to(tl.int64) * hidden
    drive = tl.load(place, mask=inside, other=0)
    for t in range(seq_len):
        # The next step's, so that memory is waited for while this one computes.
        following = tl.load(place + tl.minimum(t + 1, seq_len - 1) * stride, mask=inside, other=0)
        h = drive + _product(h, m)
        h = tl.where(h <= 0, 0, h)  # nan stays nan
        tl.store(place + t * stride, h, mask=inside)
        drive = following


@triton.jit(do_not_specialize=["seq_len", "batch", "hidden"])
def _backward(y, grad_y, grad_h_n, matrix, delta, grad_h_0, seq_len, batch, hidden, H: tl.constexpr):
    """delta_t = (grad_y_t + delta_{t+1} M) where y_t > 0, delta_{T+1} M = grad_h_n; grad_h_0 = delta_1 M.

    y, delta [T, B, H]; grad_y [T, B, H] or None; grad_h_n [B, H] or None; grad_h_0 [B, H] or None; M [H, H].
    """
    j = tl.arange(0, H)
    inside = j < hidden
    m = _matrix(matrix, hidden, H)
    row = tl.program_id(0).to(tl.int64) * hidden + j
    stride = batch.to(tl.int64) * hidden
    carry = tl.zeros([H], y.dtype.element_ty) if grad_h_n is None else tl.load(grad_h_n + row, mask=inside, other=0)
    place = row + (seq_len - 1) * stride
    h = tl.load(y + place, mask=inside, other=0)
    if grad_y is not None:
        grad = tl.load(grad_y + place, mask=inside, other=0)
    for t in range(seq_len):
        earlier = row + tl.maximum(seq_len - 2 - t, 0) * stride
        following = tl.load(y + earlier, mask=inside, other=0)
        if grad_y is not None:
            carry += grad
            grad = tl.load(grad_y + earlier, mask=inside, other=0)
        d = tl.where(h <= 0, 0, carry)
        tl.store(delta + place, d, mask=inside)
        carry = _product(d, m)
        h = following
        place = earlier
    if grad_h_0 is not None:
        tl.store(grad_h_0 + row, carry, mask=inside)


@torch.library.custom_op(
    "pathrnn_triton::relu_rnn",
    mutates_args=(),
    schema="(Tensor x, Tensor? h_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh)"
    " -> (Tensor, Tensor)",
)
def relu_rnn(
    x: Tensor, h_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y ``[T, B, H]`` and h_n ``[B, H]`` of x ``[T, B, I]``, h_0 ``[B, H]`` or None; differentiable once."""
    if (bias_ih is None) != (bias_hh is None):
        raise ValueError("give both bias_ih and bias_hh, or neither")
    _check(x, weight_hh, h_0=h_0, weight_ih=weight_ih, bias_ih=bias_ih, bias_hh=bias_hh)
    seq_len, batch, _ = x.shape
    hidden = len(weight_hh)
    rows = x.reshape(seq_len * batch, -1)
    if bias_ih is None or bias_hh is None:
        y = torch.mm(rows, weight_ih.t())
    else:
        y = torch.addmm(bias_ih + bias_hh, rows, weight_ih.t())
    y = y.view(seq_len, batch, hidden)
    h_0 = None if h_0 is None else h_0.contiguous()
    matrix = weight_hh.t().contiguous()
    with on_device(y):
        _forward[(batch,)](y, h_0, matrix, seq_len, batch, hidden, **options(hidden, y.dtype))
    return y, y[-1].clone()


@relu_rnn.register_fake
def _(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):  # type: ignore[no-untyped-def]
    seq_len, batch, _ = x.shape
    hidden = weight_hh.shape[0]
    return x.new_empty(seq_len, batch, hidden), x.new_empty(batch, hidden)


@torch.library.custom_op(
    "pathrnn_triton::relu_rnn_backward",
    mutates_args=(),
    schema="(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor? h_0, Tensor weight_ih, Tensor weight_hh, Tensor y,"
    " bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def relu_rnn_backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    y: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, h_0, weight_ih, weight_hh and of either bias; empty where not needed."""
    _check(x, weight_hh, h_0=h_0, weight_ih=weight_ih, y=y, grad_y=grad_y, grad_h_n=grad_h_n)
    seq_len, batch, hidden = y.shape
    y = y.contiguous()
    delta = torch.empty_like(y)
    grad_h_0 = y.new_empty((batch, hidden) if needs[1] else 0)
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
    matrix = weight_hh.contiguous()
    with on_device(y):
        _backward[(batch,)](
            y,
            grad_y,
            grad_h_n,
            matrix,
            delta,
            grad_h_0 if needs[1] else None,
            seq_len,
            batch,
            hidden,
            **options(hidden, y.dtype),
        )
    rows = delta.view(seq_len * batch, hidden)
    grad_x, grad_weight_ih, grad_weight_hh, grad_bias = (y.new_empty(0) for _ in range(4))
    if needs[0]:
        grad_x = (rows @ weight_ih).view(x.shape)
    if needs[2]:
        grad_weight_ih = rows.t() @ x.reshape(seq_len * batch, -1)
    if needs[3]:
        # Σ_t delta_t h_{t-1}ᵀ: one product over all steps, where autograd through the steps makes one a step.
        grad_weight_hh = rows[batch:].t() @ y[:-1].view(-1, hidden)
        if h_0 is not None:
            grad_weight_hh.addmm_(rows[:batch].t(), h_0)
    if needs[4]:
        grad_bias = rows.sum(0)
    return grad_x, grad_h_0, grad_weight_ih, grad_weight_hh, grad_bias


@relu_rnn_backward.register_fake
def _(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, y, needs):  # type: ignore[no-untyped-def]
    hidden = y.shape[2]
    shapes = (x.shape, (x.shape[1], hidden), weight_ih.shape, weight_hh.shape, (hidden,))
    return tuple(y.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, h_0, weight_ih, weight_hh, _, _ = inputs
    ctx.save_for_backward(x, h_0, weight_ih, weight_hh, output[0])
    # A loss on h_n alone, or on y alone, should not cost a tensor of zeros for the other.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_h_n is None:
        return (None,) * 6
    need = ctx.needs_input_grad
    grads = relu_rnn_backward(grad_y, grad_h_n, *ctx.saved_tensors, [*need[:4], need[4] or need[5]])
    # A gradient of its own for each bias: the two are accumulated and scaled separately.
    grads = (*grads, grads[4].clone())
    return tuple(grad if needed else None for grad, needed in zip(grads, need, strict=True))


relu_rnn.register_autograd(_differentiate, setup_context=_setup)
for _device in ("cuda", "cpu"):  # the products inside must not come in half precision
    relu_rnn.register_autocast(_device, torch.float32)
    relu_rnn_backward.register_autocast(_device, torch.float32)


def options(hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    """H, the power of two that covers hidden, and the launch's options."""
    size = max(16, triton.next_power_of_2(hidden))
    num_warps = max(1, size * size * dtype.itemsize // (32 * _THREAD_BYTES))
    return {"H": size, "num_warps": num_warps, "enable_fp_fusion": True}


_SHAPES = {
    "h_0": "BH",
    "weight_ih": "HI",
    "weight_hh": "HH",
    "bias_ih": "H",
    "bias_hh": "H",
    "y": "TBH",
    "grad_y": "TBH",
    "grad_h_n": "BH",
}


def _check(x: Tensor, weight_hh: Tensor, **others: Tensor | None) -> None:
    if x.dtype not in _LIMITS:
        raise TypeError(f"x has dtype {x.dtype}; the Triton kernel serves torch.float32 and torch.float64: convert it")
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [T, B, I], every size at least 1")
    hidden = weight_hh.shape[0] if weight_hh.dim() else 0
    if not 1 <= hidden <= limit(x.dtype):
        raise ValueError(
            f"weight_hh has shape {list(weight_hh.shape)}; in {x.dtype} the Triton kernel serves hidden sizes from 1 "
            f"to {limit(x.dtype)}: use another backend"
        )
    sizes = dict(zip("TBIH", (*x.shape, hidden), strict=True))
    for name, tensor in {"weight_hh": weight_hh, **others}.items():
        if tensor is None:
            continue
        shape = [sizes[size] for size in _SHAPES[name]]
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {shape}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}: convert one"
            )
