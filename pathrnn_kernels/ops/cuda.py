"""The kernels of ``ops.gpu`` in CUDA (csrc/cuda), specified by tests/gpu_model.py; schemas: csrc/bindings.cpp.

They return new tensors, set ``lost``, run on the current stream, and never wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import check_devices, extension_problem, operator

maxima = operator("maxima")
reach = operator("reach")
canonical_ = operator("canonical_")
column_sums = operator("column_sums")
ends = operator("ends")
chains = operator("chains")
_row_sums = operator("row_sums")
pair_sums = operator("pair_sums")
filtered = operator("filtered")
finish = operator("finish")


def row_sums(
    rows: Tensor, exponents: Tensor, more_rows: Tensor | None, more_exponents: Tensor | None, lost: Tensor
) -> tuple[Tensor, ...]:
    """Of one or two sequences: two tensors each."""
    found = _row_sums(rows, exponents, more_rows, more_exponents, lost)
    return found[:2] if more_rows is None else found


def _exponents(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.int64)


if extension_problem() is None:

    @torch.library.register_fake("pathrnn::maxima")
    def _(rows, row_source, columns, column_source):  # type: ignore[no-untyped-def]
        check_devices(rows, row_source, columns, column_source)
        like = columns if rows is None else rows
        sizes = (0 if rows is None else rows.shape[0], 0 if columns is None else columns.shape[1])
        return tuple(like.new_empty(n, dtype=torch.int32) for n in sizes)

    @torch.library.register_fake("pathrnn::reach")
    def _(weight_h, start_h, bias_ih, bias_hh, weight_d, start_d):  # type: ignore[no-untyped-def]
        check_devices(weight_h, start_h, bias_ih, bias_hh, weight_d, start_d)
        return torch.empty_like(start_h), torch.empty_like(start_d)

    @torch.library.register_fake("pathrnn::canonical_")
    def _(  # type: ignore[no-untyped-def]
        flat, f, g, directions, inputs, bias, outputs, head_bias, vocabulary, balanced, largest, lost
    ):
        check_devices(flat, f, g, largest, lost)
        return f.new_empty(f.shape, dtype=torch.int64)

    @torch.library.register_fake("pathrnn::column_sums")
    def _(w, largest, lost):  # type: ignore[no-untyped-def]
        check_devices(w, largest, lost)
        return w.new_empty(w.shape[1]), _exponents(w, 1)

    @torch.library.register_fake("pathrnn::ends")
    def _(  # type: ignore[no-untyped-def]
        weight_ih, bias_ih, bias_hh, head_weight, head_bias, inputs, inputs_exponent, layers, largest, lost
    ):
        check_devices(weight_ih, *bias_ih, *bias_hh, head_weight, head_bias, inputs, inputs_exponent, largest, lost)
        hidden = weight_ih.shape[0]
        result = []
        for shape in (layers, hidden), (hidden,), (1,):
            result += [weight_ih.new_empty(shape), _exponents(weight_ih, layers if len(shape) > 1 else 1)]
        return tuple(result)

    @torch.library.register_fake("pathrnn::chains")
    def _(  # type: ignore[no-untyped-def]
        weight_h,
        largest_h,
        drive_h,
        drive_h_exponents,
        weight_d,
        largest_d,
        drive_d,
        drive_d_exponents,
        seq_len,
        last_only,
        ones_h0,
        plan,
        blocks,
        lost,
    ):
        check_devices(weight_h, largest_h, drive_h, drive_h_exponents, lost)
        check_devices(weight_h, weight_d, largest_d, drive_d, drive_d_exponents)
        hidden = weight_h.shape[0]
        steps = 0 if weight_d is None else seq_len
        return (
            weight_h.new_empty(seq_len + 1, hidden),
            _exponents(weight_h, seq_len + 1),
            weight_h.new_empty(steps, hidden),
            _exponents(weight_h, steps),
        )

    @torch.library.register_fake("pathrnn::row_sums")
    def _(rows, exponents, more_rows, more_exponents, lost):  # type: ignore[no-untyped-def]
        check_devices(rows, exponents, more_rows, more_exponents, lost)
        hidden, more = rows.shape[1], more_rows is not None
        return (
            rows.new_empty(hidden),
            exponents.new_empty(1),
            rows.new_empty(hidden if more else 0),
            exponents.new_empty(1 if more else 0),
        )

    @torch.library.register_fake("pathrnn::pair_sums")
    def _(  # type: ignore[no-untyped-def]
        d,
        d_exponents,
        h,
        h_exponents,
        offset,
        weights=None,
        weight_exponents=None,
        previous=None,
        previous_exponent=None,
        lost=None,
    ):
        check_devices(d, d_exponents, h, h_exponents, weights, weight_exponents, previous, previous_exponent, lost)
        hidden = d.shape[1]
        return d.new_empty(hidden, hidden), d_exponents.new_empty(1)

    @torch.library.register_fake("pathrnn::filtered")
    def _(rows, exponents, ratio, ratio_exponent, reverse):  # type: ignore[no-untyped-def]
        check_devices(rows, exponents, ratio, ratio_exponent)
        return torch.empty_like(rows), torch.empty_like(exponents)

    @torch.library.register_fake("pathrnn::finish")
    def _(  # type: ignore[no-untyped-def]
        outputs, outputs_exponent, head, head_exponent, head_bias, head_bias_exponent, steps, largest, lost
    ):
        check_devices(outputs, outputs_exponent, head, head_exponent, head_bias, head_bias_exponent, largest, lost)
        empty = outputs.new_empty
        return empty((), dtype=torch.float64), empty(1), empty((), dtype=torch.int8)
