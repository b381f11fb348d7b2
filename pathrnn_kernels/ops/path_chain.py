"""path_chain: the squared network's forward and backward chains and κ of every weight. Contract: csrc/ops.h."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import check_devices, extension_problem, operator

#: Bytes that the cached powers of W̃ may take; PATHRNN_WORKSPACE_BYTES overrides.
WORKSPACE_BYTES = 16 << 20


class PathChain(NamedTuple):
    """What one pass over the squared network gives. A true value is its tensor times 2^exponent."""

    #: Per layer weight_ih, weight_hh and, with biases, one [H] for both; then head weight [1, H], head bias [1] and
    #: embedding [1, I], those that exist. weight_ih of the first layer is [H, 1] without an embedding.
    kappa: list[Tensor]
    #: int64 [len(kappa)].
    exponents: Tensor
    #: log γ², float64, 0-dim; -inf if γ² is 0.
    log_path_norm: Tensor
    #: Per layer, int64 [L]: lags of κ⁽²⁾ that were summed one by one.
    lags: Tensor
    #: Per layer, float64 [L]: bound of the relative error that leaving out the others causes in κ of weight_hh.
    bounds: Tensor
    #: bool, 0-dim: whether a square, an h, a δ or a power of W̃ underflowed, so that the pass should be run again in a
    #: wider dtype.
    lost: Tensor


def path_chain(
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    embedding_weight: Tensor | None,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    kappa1: bool = True,
    second_factor: float = 0.0,
    rtol: float = 0.0,
    first_lags: Sequence[int] = (),
    workspace_bytes: int | None = None,
) -> PathChain:
    """κ (eqs. (9), (11)) and log γ² (eq. (3)) in one tempered pass, which never overflows.

    Peak memory, in numbers of the weights' dtype: ``(2 L + 3) T H`` for the chains; with the second term another
    ``T H``, ``6 H²`` and the cached powers of W̃, ``H²`` each, as many as the budget holds, at least eight.

    Args:
        weight_ih, weight_hh, bias_ih, bias_hh: one tensor a layer; the bias lists may be empty.
        head_weight, head_bias, embedding_weight: ``[O, H]``, ``[O]``, ``[V, I]``.
        seq_len: T.
        last_only: outputs at step T alone, instead of at every step.
        ones_h0: h_0 = 1 instead of 0.
        kappa1: whether to return κ at all; log γ² comes always.
        second_factor: f > 0 adds κ⁽²⁾ = f · W̃ ⊙ S to κ of every weight_hh (``reference.kappa2``).
        rtol: truncation error allowed in κ, relative, entry by entry; 0 sums all lags.
        first_lags: per layer, how many lags a former call needed: no fewer are tried.
        workspace_bytes: budget for cached powers of W̃; PATHRNN_WORKSPACE_BYTES or 16 MiB by default.

    Raises:
        ValueError: a weight that is nan or infinite, or arguments that do not fit.
    """
    if workspace_bytes is None:
        workspace_bytes = _workspace_bytes()
    return PathChain._make(
        _op(
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            head_weight,
            head_bias,
            embedding_weight,
            seq_len,
            last_only,
            ones_h0,
            kappa1,
            second_factor,
            rtol,
            first_lags,
            workspace_bytes,
        )
    )


def _workspace_bytes() -> int:
    text = os.environ.get("PATHRNN_WORKSPACE_BYTES")
    if text is None:
        return WORKSPACE_BYTES
    if not text.isdecimal():
        raise ValueError(f"PATHRNN_WORKSPACE_BYTES is {text!r}; it must be a whole number of bytes")
    return int(text)


_op = operator("path_chain")

if extension_problem() is None:

    @torch.library.register_fake("pathrnn::path_chain")
    def _(  # type: ignore[no-untyped-def]
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        head_weight,
        head_bias,
        embedding_weight,
        seq_len,
        last_only,
        ones_h0,
        kappa1,
        second_factor,
        rtol,
        first_lags,
        workspace_bytes,
    ):
        check_devices(*weight_ih, *weight_hh, *bias_ih, *bias_hh, head_weight, head_bias, embedding_weight)
        like = weight_hh[0]
        hidden = like.shape[0]
        factors = []
        if kappa1:
            for i, weight in enumerate(weight_ih):
                dense = i > 0 or embedding_weight is not None
                factors.append(like.new_empty(hidden, weight.shape[1] if dense else 1))
                factors.append(like.new_empty(hidden, hidden))
                if bias_ih:
                    factors.append(like.new_empty(hidden))
            if head_weight is not None:
                factors.append(like.new_empty(1, hidden))
            if head_bias is not None:
                factors.append(like.new_empty(1))
            if embedding_weight is not None:
                factors.append(like.new_empty(1, embedding_weight.shape[1]))
        return (
            factors,
            like.new_empty(len(factors), dtype=torch.int64),
            like.new_empty((), dtype=torch.float64),
            like.new_empty(len(weight_hh), dtype=torch.int64),
            like.new_empty(len(weight_hh), dtype=torch.float64),
            like.new_empty((), dtype=torch.bool),
        )
