"""relu_rnn: one layer of a ReLU RNN over all steps. Contract: csrc/ops.h.

Autograd is registered in C++ (csrc/relu_rnn_autograd.cpp): the Python route costs more than a whole small forward pass.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..arguments import HALF_DTYPES
from . import flops
from .backend import (
    BACKENDS,
    check_devices,
    choose,
    constant_when_traced,
    environment,
    fake,
    operator,
    refusals,
    transformed,
)

#: What ATen asks of cuDNN before it runs an RNN in bfloat16, beside a GPU of compute capability 8.
_CUDNN_WITH_BFLOAT16 = 91300


def relu_rnn(
    x: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    backend: str = "auto",
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h_t = [W_ih x_t + b_ih + W_hh h_{t-1} + b_hh]_+ (Table 1).

    Differentiable any number of times: derivatives of the gradients come from torch's operations, step by step. Inside
    torch.func's transforms and forward-mode differentiation, ``"auto"`` is the reference, which they go through.

    Args:
        x: ``[T, B, I]``; with ``lengths`` also ``[N, I]``, the data of a PackedSequence.
        h_0: ``[B, H]``, or None for zeros.
        weight_ih, weight_hh: ``[H, I]``, ``[H, H]``.
        bias_ih, bias_hh: ``[H]``, both or neither.
        backend: ``"auto"``; ``"cpu"``; ``"cuda"``, which is cuDNN, whose float32 products are as exact as
            ``torch.backends.cudnn`` allows (TF32 by default, as in nn.RNN); ``"triton"``, for sequences of one length
            and hidden sizes that one program holds; ``"reference"``.
        lengths: integers ``[B]``, the steps of every sequence, in 1 … T, on any device (a GPU's are waited for); T of
            each by default. Of a PackedSequence, which has the longest first, they add up to N. Steps beyond a
            sequence's end are not read, y is zero there, and so is the gradient of x.
        reverse: whether every sequence runs from its own end to its start.

    Returns:
        y ``[T, B, H]`` (``[N, H]``), every h_t in x's place, and h_n ``[B, H]``, the last of every sequence; with
        ``reverse`` that is the one at its start.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    hidden_size = weight_hh.shape[0] if weight_hh.dim() else 0
    if x.dim() == 3 and x.shape[1] == 0:  # no rows for a kernel, but gradients of zero for every weight
        drive = torch.nn.functional.linear(x, weight_ih, bias_ih)
        y = torch.relu(drive + torch.nn.functional.linear(drive if h_0 is None else h_0, weight_hh, bias_hh))
        return y, y[0 if reverse else -1]
    # A graph would replay the copy of what the host found out, from memory that has gone.
    if lengths is not None and x.is_cuda and not torch.compiler.is_compiling() and _is_capturing():
        raise ValueError(
            "lengths are given while a CUDA graph is captured; pad to equal lengths there, or do not capture"
        )
    serving = _serving(x.device, x.dtype, hidden_size, backend, lengths is not None)
    if serving in ("cpu", "cuda"):
        return _op(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse)
    if lengths is not None:
        return _packed(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse)
    if reverse:
        x = x.flip(0)
    if serving == "triton":
        from .triton.relu_rnn import relu_rnn as triton_relu_rnn

        y, h_n = triton_relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    else:
        from ..reference import relu_rnn as reference

        bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
        y = reference(x, x.new_zeros(x.shape[1], len(weight_hh)) if h_0 is None else h_0, weight_ih, weight_hh, bias)
        h_n = y[-1]
    return (y.flip(0) if reverse else y), h_n


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


@constant_when_traced
def working_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which dtype tensors of ``dtype`` are computed with: float32 for half ones, except where cuDNN serves them."""
    if dtype not in HALF_DTYPES:
        return dtype
    native = environment() in ("auto", "cuda") and device.type == "cuda"
    return dtype if native and _refusal_of_cudnn(device, dtype) is None else torch.float32


def _refusal_of_cudnn(device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := refusals(device, torch.float32 if dtype in HALF_DTYPES else dtype, "relu_rnn")["cuda"]) is not None:
        return reason
    if not (torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()):
        return "it is cuDNN, which this torch lacks or torch.backends.cudnn.enabled forbids"
    if dtype == torch.bfloat16 and (
        (torch.backends.cudnn.version() or 0) < _CUDNN_WITH_BFLOAT16
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "this cuDNN or this GPU has no RNN in torch.bfloat16"
    return None


@constant_when_traced
def _serving(
    device: torch.device, dtype: torch.dtype, hidden_size: int, backend: str, has_lengths: bool = False
) -> str:
    if torch._C._len_torch_dispatch_stack() > 0:
        flops.be_counted()
    if backend == "auto":
        backend = environment()
    if transformed() and backend != "reference":
        if backend != "auto":
            raise ValueError(
                f"backend {backend!r} does not serve torch.func's transforms (grad, vmap, jvp): use 'auto', which "
                "takes the reference there"
            )
        return "reference"
    if device.type == "cpu" and backend in ("auto", "cpu"):
        return choose(device, dtype, backend, "relu_rnn")
    return _choose(device, dtype, hidden_size, backend, torch.backends.cudnn.enabled, has_lengths)


@functools.lru_cache(maxsize=1024)  # a GPU is faster than a table of reasons
def _choose(
    device: torch.device, dtype: torch.dtype, hidden_size: int, backend: str, cudnn: bool, has_lengths: bool = False
) -> str:
    """What ``backend.choose`` says, but for what this op's backends serve beyond it and for limits of their own.

    ``cudnn``, torch.backends.cudnn.enabled, is here for the cache.
    """
    reasons = refusals(device, dtype, "relu_rnn")
    if dtype in HALF_DTYPES or reasons["cuda"] is None:
        reasons["cuda"] = _refusal_of_cudnn(device, dtype)
    chosen = backend if backend == "cuda" and reasons["cuda"] is None else choose(device, dtype, backend, "relu_rnn")
    if reasons["triton"] is None:
        from .triton.relu_rnn import limit

        if has_lengths:
            reasons["triton"] = "lengths are given; it serves sequences of one length"
        elif hidden_size > limit(dtype):
            reasons["triton"] = f"hidden_size is {hidden_size}; in {dtype} it serves up to {limit(dtype)}"
    if backend == "auto":
        return next(name for name in BACKENDS if reasons[name] is None)
    if reasons[chosen] is not None:
        raise ValueError(f"backend {chosen!r} does not serve this call: {reasons[chosen]}; use another, or 'auto'")
    return chosen


def _packed(
    x: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """relu_rnn with lengths, of plain torch operations."""
    is_padded, sizes = x.dim() == 3, lengths.tolist()
    longest = x.shape[0] if is_padded else max(sizes, default=0)
    for b, size in enumerate(sizes):
        if not 1 <= size <= longest:
            raise ValueError(f"lengths[{b}] is {size}; it must be from 1 to {longest}, the steps of x")
    if not is_padded and (sizes != sorted(sizes, reverse=True) or sum(sizes) != len(x)):
        raise ValueError(f"lengths are {sizes}; for {len(x)} packed rows they must add up to that, the longest first")
    # Row of x for every step of every sequence, the longest sequence first, as in a PackedSequence.
    order = sorted(range(len(sizes)), key=lambda b: -sizes[b])
    alive = [sum(size > t for size in sizes) for t in range(longest)]
    starts = [t * len(sizes) if is_padded else sum(alive[:t]) for t in range(longest)]
    rows = [starts[sizes[b] - 1 - t if reverse else t] + b for t, count in enumerate(alive) for b in order[:count]]
    place = torch.tensor(rows, device=x.device)
    order_of_rows = torch.tensor(order, device=x.device)
    drive = torch.nn.functional.linear(x.reshape(-1, x.shape[-1])[place], weight_ih, bias_ih)
    if bias_hh is not None:
        drive = drive + bias_hh
    h = x.new_zeros(len(sizes), len(weight_hh)) if h_0 is None else h_0[order_of_rows]
    steps, finals = [], []
    for step in drive.split([count for count in alive if count]):
        finals.append(h[len(step) :])
        h = torch.relu(step + h[: len(step)] @ weight_hh.t())
        steps.append(h)
    packed = torch.cat(steps)
    y = packed.new_zeros(x[..., 0].numel(), packed.shape[-1]).index_copy(0, place, packed)
    return y.view(*x.shape[:-1], -1), torch.cat([h, *reversed(finals)])[order_of_rows.argsort()]


_op = operator("relu_rnn")


@fake("relu_rnn", check=False)  # lengths may be on any device
def _(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths=None, reverse=False):  # type: ignore[no-untyped-def]
    check_devices(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    hidden = weight_hh.shape[0]
    return x.new_empty(*x.shape[:-1], hidden), x.new_empty(_batch(x, lengths), hidden)


@fake("relu_rnn_backward", check=False)
def _(  # type: ignore[no-untyped-def]
    grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y, needs, lengths=None, reverse=False
):
    check_devices(grad_y, grad_h_n, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, y)
    hidden = y.shape[-1]
    shapes = (x.shape, (_batch(x, lengths), hidden), weight_ih.shape, weight_hh.shape, (hidden,))
    return tuple(y.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _batch(x: Tensor, lengths: Tensor | None) -> int:
    return x.shape[1] if lengths is None else lengths.shape[0]
