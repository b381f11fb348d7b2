"""path_chain: the squared network's forward and backward chains and κ⁽¹⁾ of every weight. Contract: csrc/ops.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import check_devices, extension_problem, operator


class PathChain(NamedTuple):
    """What one pass over the squared network gives. A true value is its tensor times 2^exponent."""

    #: Per layer weight_ih, weight_hh and, with biases, one [H] for both; then head weight [1, H], head bias [1] and
    #: embedding [1, I], those that exist. weight_ih of the first layer is [H, 1] without an embedding.
    kappa1: list[Tensor]
    #: int64 [len(kappa1)].
    exponents: Tensor
    #: log γ², float64, 0-dim; -inf if γ² is 0.
    log_path_norm: Tensor
    #: With ``sequences``, per layer rows h_0 … h_{T-1} and δ_1 … δ_T, [T, H], and their exponents, int64 [L, T].
    h: list[Tensor]
    delta: list[Tensor]
    h_exponents: Tensor
    delta_exponents: Tensor
    #: bool, 0-dim: whether a square, an h or a δ underflowed, so that the pass should be run again in a wider dtype.
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
    sequences: bool = False,
) -> PathChain:
    """κ⁽¹⁾ (eqs. (9), (11)) and log γ² (eq. (3)) in one tempered pass, which never overflows.

    Args:
        weight_ih, weight_hh, bias_ih, bias_hh: one tensor a layer; the bias lists may be empty.
        head_weight, head_bias, embedding_weight: ``[O, H]``, ``[O]``, ``[V, I]``.
        seq_len: T.
        last_only: outputs at step T alone, instead of at every step.
        ones_h0: h_0 = 1 instead of 0.
        kappa1, sequences: whether to return κ⁽¹⁾ and the chains; log γ² comes always.

    Raises:
        ValueError: a weight that is nan or infinite, or shapes that do not fit.
    """
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
            sequences,
        )
    )


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
        sequences,
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
        layers = len(weight_hh) if sequences else 0
        chains = [[like.new_empty(seq_len, hidden) for _ in range(layers)] for _ in range(2)]
        exponents = [like.new_empty(layers, seq_len, dtype=torch.int64) for _ in range(2)]
        return (
            factors,
            like.new_empty(len(factors), dtype=torch.int64),
            like.new_empty((), dtype=torch.float64),
            *chains,
            *exponents,
            like.new_empty((), dtype=torch.bool),
        )
