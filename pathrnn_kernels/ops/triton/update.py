"""The preconditioned update of many tensors at once: g/κ (eq. (8)), and the trust radius.

A kernel is launched once for all tensors. It finds them through a table on the device, int64 ``[count, fields]``, of
addresses, sizes and the bits of float64 scales; a program serves BLOCK consecutive entries of one tensor. κ,
broadcastable to its tensor, is never expanded: entry i of a tensor with C columns has κ at
(i // C) · row stride + (i % C) · column stride.

Bytes moved, for n numbers of b bytes in all and κ counted where it is dense: ``precondition`` 3 b n; ``shorten_``
3 b n for the length and, only where the step is too long, another 3 b n.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(1024)
#: Partial sums that the one program of _factor takes at a time.
_CHUNK = tl.constexpr(1024)
_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

# Columns of the table.
_START = tl.constexpr(0)  # the tensor's first program
_SIZE = tl.constexpr(1)
_COLUMNS = tl.constexpr(2)  # 0 where κ is dense
_ROW_STRIDE = tl.constexpr(3)
_COLUMN_STRIDE = tl.constexpr(4)
_SCALE = tl.constexpr(5)
_KAPPA = tl.constexpr(6)
_FIRST = tl.constexpr(7)  # gradient, or parameter
_SECOND = tl.constexpr(8)  # result, or parameter before the step
_FIELDS = tl.constexpr(9)


@triton.jit
def _entry(table, count, TABLE: tl.constexpr):
    """The table's row of this program's tensor, and which it is."""
    slots = tl.arange(0, TABLE)
    starts = tl.load(table + slots * _FIELDS + _START, mask=slots < count, other=0x7FFFFFFF)
    which = tl.sum((starts <= tl.program_id(0)).to(tl.int32)) - 1
    return table + which * _FIELDS, which


@triton.jit
def _first(entry):
    return (tl.program_id(0) - tl.load(entry + _START)) * _BLOCK


@triton.jit
def _scale(entry):
    return tl.load(entry + _SCALE).to(tl.float64, bitcast=True)


@triton.jit
def _pointer(entry, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load(pointer, i, size, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + i)
    return tl.load(pointer + i, mask=i < size, other=0)


@triton.jit
def _store(pointer, i, value, size, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + i, value)
    else:
        tl.store(pointer + i, value, mask=i < size)


@triton.jit
def _kappa(entry, first, size, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr):
    kappa = _pointer(entry, _KAPPA, DTYPE, ALIGNED)
    columns = tl.load(entry + _COLUMNS)
    if columns == 0:
        result = _load(kappa, first + tl.arange(0, _BLOCK), size, WHOLE)
    else:
        # 32 bits divide several times faster than 64; columns of one tensor fit them.
        from_row = (first % columns + tl.arange(0, _BLOCK)).to(tl.uint32)
        rows = first // columns + from_row // columns.to(tl.uint32)
        offsets = rows * tl.load(entry + _ROW_STRIDE)
        offsets += (from_row % columns.to(tl.uint32)) * tl.load(entry + _COLUMN_STRIDE)
        mask = first + tl.arange(0, _BLOCK) < size
        result = tl.load(kappa + offsets, mask=mask, other=1)
    return result


@triton.jit
def _divide(
    entry,
    first,
    size,
    before,
    after,
    overflowed,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i = first + tl.arange(0, _BLOCK)
    gradient = _load(_pointer(entry, _FIRST, DTYPE, ALIGNED), i, size, WHOLE)
    kappa = _kappa(entry, first, size, DTYPE, ALIGNED, WHOLE)
    kappa = tl.where(kappa == 0, float("inf"), kappa)  # on no path: no step
    scale = _scale(entry).to(DTYPE)
    value = gradient
    for _ in range(before):
        value *= scale
    value = tl.div_rn(value, kappa) if gradient.dtype == tl.float32 else value / kappa
    for _ in range(after):
        value *= scale
    _store(_pointer(entry, _SECOND, DTYPE, ALIGNED), i, value, size, WHOLE)
    # x - x is 0 where x is finite, else nan.
    lost = (gradient - gradient == 0) & (value - value != 0) & (i < size)
    # Whichever programs store, they store the same.
    tl.store(overflowed, 1, mask=tl.max(lost.to(tl.int32)) > 0)


@triton.jit(do_not_specialize=["count", "before", "after"])
def _precondition(
    table,
    overflowed,
    count,
    before,
    after,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE: tl.constexpr,
):
    """gradient · scale^before / κ · scale^after; overflowed [count] is set where that makes the finite infinite."""
    entry, which = _entry(table, count, TABLE)
    first, size = _first(entry), tl.load(entry + _SIZE)
    if first + _BLOCK <= size:  # without masks, that is with vector loads
        _divide(entry, first, size, before, after, overflowed + which, DTYPE, ALIGNED, True)
    else:
        _divide(entry, first, size, before, after, overflowed + which, DTYPE, ALIGNED, False)


@triton.jit
def _square(entry, first, size, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr):
    i = first + tl.arange(0, _BLOCK)
    after = _load(_pointer(entry, _FIRST, DTYPE, ALIGNED), i, size, WHOLE)
    before = _load(_pointer(entry, _SECOND, DTYPE, ALIGNED), i, size, WHOLE)
    delta = after.to(tl.float64) - before.to(tl.float64)
    return tl.sum(delta * _kappa(entry, first, size, DTYPE, ALIGNED, WHOLE).to(tl.float64) * delta)


@triton.jit(do_not_specialize=["count"])
def _length(table, logs, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TABLE: tl.constexpr):
    """logs[program] = log Σ κ Δp² + scale over the program's entries; -inf for a sum of 0."""
    entry, _ = _entry(table, count, TABLE)
    first, size = _first(entry), tl.load(entry + _SIZE)
    if first + _BLOCK <= size:
        total = _square(entry, first, size, DTYPE, ALIGNED, True)
    else:
        total = _square(entry, first, size, DTYPE, ALIGNED, False)
    still = total == 0
    value = tl.where(still, float("-inf"), tl.log(tl.where(still, 1.0, total)) + _scale(entry))
    tl.store(logs + tl.program_id(0), value)


@triton.jit(do_not_specialize=["programs"])
def _factor(logs, factor, programs):
    """factor = min(1, 1/length), length² = Σ exp(logs); 1 where that is nan. One program, in a fixed order."""
    slots = tl.arange(0, _CHUNK)
    top = tl.full([_CHUNK], float("-inf"), tl.float64)
    for start in range(0, programs, _CHUNK):
        top = tl.maximum(top, tl.load(logs + start + slots, mask=start + slots < programs, other=float("-inf")))
    largest = tl.max(top)
    largest = tl.where(largest > float("-inf"), largest, 0.0)
    total = tl.zeros([_CHUNK], tl.float64)
    for start in range(0, programs, _CHUNK):
        value = tl.load(logs + start + slots, mask=start + slots < programs, other=float("-inf"))
        total += tl.exp(value - largest)
    total = tl.sum(total)
    # nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
    log_length = (largest + tl.log(tl.where(total > 0, total, 1.0))) / 2
    tl.store(factor, tl.where((total < float("inf")) & (log_length > 0), tl.exp(-log_length), 1.0))


@triton.jit
def _move(entry, first, size, factor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr):
    i = first + tl.arange(0, _BLOCK)
    parameter = _pointer(entry, _FIRST, DTYPE, ALIGNED)
    before = _load(_pointer(entry, _SECOND, DTYPE, ALIGNED), i, size, WHOLE)
    value = before + factor * (_load(parameter, i, size, WHOLE) - before)
    _store(parameter, i, value, size, WHOLE)


@triton.jit(do_not_specialize=["count"])
def _shorten(table, factor, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TABLE: tl.constexpr):
    """parameter = before + factor · (parameter - before); with factor 1 no tensor is touched."""
    shorter = tl.load(factor)
    if shorter < 1:
        entry, _ = _entry(table, count, TABLE)
        first, size = _first(entry), tl.load(entry + _SIZE)
        if first + _BLOCK <= size:
            _move(entry, first, size, shorter.to(DTYPE), DTYPE, ALIGNED, True)
        else:
            _move(entry, first, size, shorter.to(DTYPE), DTYPE, ALIGNED, False)


def precondition(
    gradients: Sequence[Tensor], kappas: Sequence[Tensor], scales: Sequence[float], power: int
) -> tuple[list[Tensor], Tensor]:
    """scale^power g/κ, 0 where κ is 0, and per tensor whether a finite g overflowed, int32 ``[count]``.

    Args:
        gradients: of one dtype, float32 or float64, on one device.
        kappas: broadcastable to them, of their dtype.
        scales: one a tensor.
        power: how often they are multiplied with, half of it before the division, so that the result may be in range
            where scale^power, or the quotient, is not.
    """
    gradients = [g.contiguous() for g in gradients]
    results = [torch.empty_like(g) for g in gradients]
    table, programs, options = _table(gradients, results, kappas, scales)
    overflowed = torch.zeros(len(gradients), dtype=torch.int32, device=gradients[0].device)
    with on_device(table):
        _precondition[(programs,)](table, overflowed, len(gradients), power // 2, power - power // 2, **options)
    return results, overflowed


def shorten_(
    parameters: Sequence[Tensor], before: Sequence[Tensor], kappas: Sequence[Tensor], log_scales: Sequence[float]
) -> None:
    """Shorten the step Δp = parameter - before to length sqrt(Σ exp(log_scale) κ Δp²) = 1 where it is longer.

    The device decides: nothing is read back. Summed in float64, by programs first and those in a fixed order.
    """
    places = [p if p.is_contiguous() else p.contiguous() for p in parameters]
    before = [b.contiguous() for b in before]
    table, programs, options = _table(places, before, kappas, log_scales)
    logs = torch.empty(programs, dtype=torch.float64, device=table.device)
    factor = torch.empty(1, dtype=torch.float64, device=table.device)
    with on_device(table):
        _length[(programs,)](table, logs, len(places), **options)
        _factor[(1,)](logs, factor, programs, enable_fp_fusion=True)
        _shorten[(programs,)](table, factor, len(places), **options)
    # Autograd has to hear of a change behind its back.
    torch.autograd.graph.increment_version(parameters)
    for p, place in zip(parameters, places, strict=True):
        if place is not p:
            p.copy_(place)


def _table(
    first: Sequence[Tensor], second: Sequence[Tensor], kappas: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, int, dict[str, Any]]:
    """The table on the device, how many programs its tensors take, and the kernels' compile-time options."""
    bits = torch.tensor(scales, dtype=torch.float64, device="cpu").view(torch.int64).tolist()
    rows: list[list[int]] = []
    programs = 0
    for one, two, kappa, scale in zip(first, second, kappas, bits, strict=True):
        expanded = kappa.expand_as(one)
        columns = 0 if expanded.is_contiguous() else one.shape[-1]
        strides = expanded.stride() if one.dim() == 2 else (0, expanded.stride(0))
        addresses = (kappa.data_ptr(), one.data_ptr(), two.data_ptr())
        rows.append([programs, one.numel(), columns, *strides, scale, *addresses])
        programs += triton.cdiv(one.numel(), _BLOCK.value)
    device = first[0].device
    table = torch.tensor(rows, device="cpu", pin_memory=device.type != "cpu").to(device, non_blocking=True)
    options = {
        "DTYPE": _DTYPES[first[0].dtype],
        "ALIGNED": all(address % 16 == 0 for row in rows for address in row[_KAPPA.value :]),
        "TABLE": triton.next_power_of_2(len(rows)),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }
    return table, programs, options


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
