"""kappa2: W̃ ⊙ S, the second term of κ for one recurrent matrix, all lags. Contract: csrc/ops.h."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .backend import check_devices, extension_problem, operator

#: Bytes that the cached powers of W̃ may take; PATHRNN_WORKSPACE_BYTES overrides.
WORKSPACE_BYTES = 256 << 20


def kappa2(
    weight_hh: Tensor,
    h: Tensor,
    h_exponents: Tensor,
    delta: Tensor,
    delta_exponents: Tensor,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W̃ ⊙ S with S[j, k] = Σ_{t < t'} δ_{t'+1}[j] · (W̃^{t'-t-1})[k, j] · h_t[k] (eq. (11), index corrected).

    Powers of W̃ are formed in O(log T) wide products and cached, in chunks where all of them would exceed the budget;
    peak memory is the budget (at least four powers), 2 T H and 3 H² numbers.

    Args:
        weight_hh: ``[H, H]``.
        h, h_exponents: h_0 … h_{T-1}, ``[T, H]`` and int64 ``[T]`` (``PathChain``).
        delta, delta_exponents: δ_1 … δ_T, likewise.
        workspace_bytes: budget for the cached powers; PATHRNN_WORKSPACE_BYTES or 256 MiB by default.

    Returns:
        The term ``[H, H]``; its exponent, int64, 0-dim: κ⁽²⁾ is 4 · term · 2^exponent; and whether an entry of a power
        of W̃ underflowed, bool, 0-dim, so that the sum should be formed again in a wider dtype.
    """
    if workspace_bytes is None:
        workspace_bytes = _workspace_bytes()
    return _op(weight_hh, h, h_exponents, delta, delta_exponents, workspace_bytes)


def _workspace_bytes() -> int:
    text = os.environ.get("PATHRNN_WORKSPACE_BYTES")
    if text is None:
        return WORKSPACE_BYTES
    if not text.isdecimal():
        raise ValueError(f"PATHRNN_WORKSPACE_BYTES is {text!r}; it must be a whole number of bytes")
    return int(text)


_op = operator("kappa2")

if extension_problem() is None:

    @torch.library.register_fake("pathrnn::kappa2")
    def _(weight_hh, h, h_exponents, delta, delta_exponents, workspace_bytes):  # type: ignore[no-untyped-def]
        check_devices(weight_hh, h, h_exponents, delta, delta_exponents)
        return (
            weight_hh.new_empty(weight_hh.shape),
            h_exponents.new_empty(()),
            weight_hh.new_empty((), dtype=torch.bool),
        )
