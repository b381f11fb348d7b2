"""path_chain: the squared network's forward and backward chains and κ of every weight. Contract: csrc/ops.h.

On the CPU one C++ op; on a GPU the kernels of a backend in the order of gpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import fake, operator
from .plan import choose as choose_plan
from .plan import describe

#: Bytes that the cached powers of W̃ may take where the caller does not say; csrc/cpu/path_chain.cpp has the same.
WORKSPACE_BYTES = 16 << 20


class PathChain(NamedTuple):
    """What one pass over the squared network gives.

    It runs in canonical coordinates, in which unit j of a chain is rescaled by 2^(-d_j/2), d its unit exponents. The
    true κ of entry (r, c) of tensor i is
    ``kappa[i][r, c] · 2^(exponents[i] + R[r] + C[c] + entry_exponents[i][r, c])``: R is ``-unit_exponents`` of the
    tensor's own chain for weight_ih, weight_hh and biases, C is ``unit_exponents`` of the chains that it reads, side by
    side, for weight_hh, weight_ih above the first layer and the head's weight.
    """

    #: Per chain (one a layer, or two of a bidirectional network, forward first) weight_ih, weight_hh and, with biases,
    #: one [H] for both; then head weight [1, H] or [1, 2 H], head bias [1] and embedding [1, I], those that exist.
    #: weight_ih of the first layer is [H, 1] without an embedding.
    kappa: list[Tensor]
    #: int64 [len(kappa)].
    exponents: Tensor
    #: d, int64 [chains, H], even.
    unit_exponents: Tensor
    #: int64, each of the shape of its κ, or of no elements: zeros. None at all where all are zeros.
    entry_exponents: list[Tensor]
    #: log γ², float64, 0-dim; -inf if γ² is 0. On a GPU nan where ``arithmetic`` is -1, so that it cannot be used.
    log_path_norm: Tensor
    #: Per chain, int64: lags of κ⁽²⁾ that were summed one by one.
    lags: Tensor
    #: Per chain, float64: bound of the relative error that leaving out the others causes in κ of weight_hh.
    bounds: Tensor
    #: int8, 0-dim: what the pass was computed in, 0 the weights' dtype, 1 float64, 2 extended range (an int64 exponent
    #: for every number). -1, on a GPU alone: something underflowed, and the pass must be run again in a wider one.
    arithmetic: Tensor

    def entries(self, i: int) -> Tensor | None:
        """Exponents of the entries of the i-th κ; None: zeros."""
        return self.entry_exponents[i] if self.entry_exponents and self.entry_exponents[i].numel() else None

    def to_host(self) -> tuple[float, int]:
        """log γ² and ``arithmetic``; a device is waited for."""
        if not self.log_path_norm.is_cuda:
            return float(self.log_path_norm), int(self.arithmetic)
        log_norm, arithmetic = torch.stack([self.log_path_norm, self.arithmetic.double()]).tolist()
        return log_norm, int(arithmetic)


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
    backend: str = "cpu",
    plan: str = "auto",
    bidirectional: bool = False,
) -> PathChain:
    """κ (eqs. (9), (11)) and log γ² (eq. (3)) in one pass with an exponent a vector, which never overflows.

    On the CPU a pass in which something underflows is run again in float64, and then in extended range.

    Args:
        weight_ih, weight_hh, bias_ih, bias_hh: one tensor a layer, or two of a bidirectional network: forward, reverse;
            the bias lists may be empty.
        seq_len, last_only, ones_h0: T, ``outputs="last"`` and ``h0="ones"`` of a ``PathNetwork``.
        kappa1: whether to return κ at all; log γ² comes always.
        second_factor: f > 0 adds κ⁽²⁾ = f · W̃ ⊙ S to κ of every weight_hh (``reference.kappa2``).
        first_lags: the ``lags`` of :func:`pathrnn_kernels.kappa` by chains; ``rtol``, ``workspace_bytes`` (16 MiB by
            default) and ``plan`` as there.
        backend: ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Raises:
        TypeError: tensors on different devices, or of different dtypes.
        ValueError: arguments that do not fit, a plan that does not serve, or (on the CPU; on a GPU, where nothing waits
            for an answer, log γ² is nan instead) a weight that is nan or infinite.
    """
    workspace = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, embedding_weight)
    run = (seq_len, last_only, ones_h0)
    options: tuple[Any, ...] = (kappa1, second_factor, rtol, first_lags, workspace, bidirectional)
    if backend == "cpu":
        if plan != "auto":
            raise ValueError(f"plan is {plan!r}; backend 'cpu' has none to choose from: leave it at 'auto'")
        return PathChain._make(_op(*weights, *run, *options))
    _check(*weights, 2 if bidirectional else 1)
    from . import gpu

    like = weight_hh[0]
    chosen = choose_plan(backend, describe(like.device), len(like), seq_len, like.element_size(), plan)
    return PathChain._make(gpu.path_chain(_kernels(backend), chosen, *weights, *run, *options))


def _kernels(backend: str) -> Any:
    if backend == "cuda":
        from . import cuda

        return cuda
    from .triton import kernels

    return kernels


def _check(
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    embedding_weight: Tensor | None,
    directions: int,
) -> None:
    """What csrc/cpu/path_chain.cpp checks for the CPU, before any launch."""
    like = weight_hh[0]
    hidden, inputs = len(like), weight_ih[0].shape[1]
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = []
    for c in range(len(weight_hh)):
        ending = f"l{c // directions}{'_reverse' if c % directions else ''}"
        width = inputs if c < directions else directions * hidden
        expected.append((f"weight_ih_{ending}", weight_ih[c], (hidden, width)))
        expected.append((f"weight_hh_{ending}", weight_hh[c], (hidden, hidden)))
        if bias_ih:
            expected.append((f"bias_ih_{ending}", bias_ih[c], (hidden,)))
            expected.append((f"bias_hh_{ending}", bias_hh[c], (hidden,)))
    if head_weight is not None:
        expected.append(("head.weight", head_weight, (len(head_weight), directions * hidden)))
        if head_bias is not None:
            expected.append(("head.bias", head_bias, (len(head_weight),)))
    if embedding_weight is not None:
        expected.append(("embedding.weight", embedding_weight, (len(embedding_weight), inputs)))
    for name, tensor, shape in expected:
        if tensor.device != like.device:
            raise TypeError(f"{name} is on {tensor.device}, but weight_hh_l0 is on {like.device}: move one")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but weight_hh_l0 has {like.dtype}: convert one")
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")


#: The op itself, of the CPU alone; ``workspace_bytes`` is -1 for WORKSPACE_BYTES.
_op = operator("path_chain")


@fake("path_chain")
def _(weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, embedding_weight, *rest):  # type: ignore[no-untyped-def]
    kappa1, bidirectional = rest[3], len(rest) > 8 and rest[8]
    like = weight_hh[0]
    hidden, directions = like.shape[0], 2 if bidirectional else 1
    factors = []
    if kappa1:
        for c, weight in enumerate(weight_ih):
            dense = c >= directions or embedding_weight is not None
            factors.append(like.new_empty(hidden, weight.shape[1] if dense else 1))
            factors.append(like.new_empty(hidden, hidden))
            if bias_ih:
                factors.append(like.new_empty(hidden))
        if head_weight is not None:
            factors.append(like.new_empty(1, directions * hidden))
        if head_bias is not None:
            factors.append(like.new_empty(1))
        if embedding_weight is not None:
            factors.append(like.new_empty(1, embedding_weight.shape[1]))

    def integers(*shape):  # type: ignore[no-untyped-def]
        return like.new_empty(shape, dtype=torch.int64)

    return (
        factors,
        integers(len(factors)),
        integers(len(weight_hh), hidden),
        [],
        like.new_empty((), dtype=torch.float64),
        integers(len(weight_hh)),
        like.new_empty(len(weight_hh), dtype=torch.float64),
        like.new_empty((), dtype=torch.int8),
    )
