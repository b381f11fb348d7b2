"""The kernels of ``ops.gpu`` in CUDA (csrc/cuda), specified by tests/gpu_model.py; schemas: csrc/bindings.cpp.

They return new tensors, set ``lost``, run on the current stream, and never wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import fake, operator

maxima = operator("maxima")
reach = operator("reach")
canonical_ = operator("canonical_")
column_sums = operator("column_sums")
ends = operator("ends")
chains = operator("chains")
_row_sums = operator("row_sums")
pair_sums = operator("pair_sums")
finish = operator("finish")


def row_sums(
    rows: Tensor, exponents: Tensor, more_rows: Tensor | None, more_exponents: Tensor | None, lost: Tensor
) -> tuple[Tensor, ...]:
    """Of one or two sequences: two tensors each."""
    found = _row_sums(rows, exponents, more_rows, more_exponents, lost)
    return found[:2] if more_rows is None else found


def second_term(*arguments: Any) -> Tensor:
    """Triton's kernels, which serve every GPU.

    Raises:
        ValueError: they do not serve.
    """
    from . import triton

    if (problem := triton.problem()) is not None:
        raise ValueError(f"κ⁽²⁾ on a GPU is computed by Triton's kernels: {problem}")
    from .triton import kappa2

    return kappa2.second_term(*arguments)


def _exponents(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.int64)


@fake("maxima")
def _(rows, row_source, columns, column_source):  # type: ignore[no-untyped-def]
    like = columns if rows is None else rows
    sizes = (0 if rows is None else rows.shape[0], 0 if columns is None else columns.shape[1])
    return tuple(like.new_empty(n, dtype=torch.int32) for n in sizes)


@fake("reach")
def _(weight_h, start_h, bias_ih, bias_hh, weight_d, start_d):  # type: ignore[no-untyped-def]
    return torch.empty_like(start_h), torch.empty_like(start_d)


@fake("canonical_")
def _(flat, f, *rest):  # type: ignore[no-untyped-def]
    return f.new_empty(f.shape, dtype=torch.int64)


@fake("column_sums")
def _(w, *rest):  # type: ignore[no-untyped-def]
    return w.new_empty(w.shape[1]), _exponents(w, 1)


@fake("ends")
def _(weight_ih, bias_ih, bias_hh, head_weight, head_bias, inputs, inputs_exponent, layers, *rest):  # type: ignore[no-untyped-def]
    hidden = weight_ih.shape[0]
    result = []
    for shape in (layers, hidden), (hidden,), (1,):
        result += [weight_ih.new_empty(shape), _exponents(weight_ih, layers if len(shape) > 1 else 1)]
    return tuple(result)


@fake("chains")
def _(weight_h, *rest):  # type: ignore[no-untyped-def]
    weight_d, seq_len = rest[3], rest[7]
    lengths = seq_len + 1, 0 if weight_d is None else seq_len
    return tuple(t for n in lengths for t in (weight_h.new_empty(n, len(weight_h)), _exponents(weight_h, n)))


@fake("row_sums")
def _(rows, exponents, more_rows, more_exponents, lost):  # type: ignore[no-untyped-def]
    counts = 1, int(more_rows is not None)
    return tuple(t for n in counts for t in (rows.new_empty(n * rows.shape[1]), exponents.new_empty(n)))


@fake("pair_sums")
def _(d, d_exponents, *rest):  # type: ignore[no-untyped-def]
    return d.new_empty(d.shape[1], d.shape[1]), d_exponents.new_empty(1)


@fake("finish")
def _(outputs, *rest):  # type: ignore[no-untyped-def]
    empty = outputs.new_empty
    return empty((), dtype=torch.float64), empty(1), empty((), dtype=torch.int8)
