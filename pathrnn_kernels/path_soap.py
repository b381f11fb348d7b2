"""SOAP in path coordinates: Adam in the eigenbases of the gradients there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain
from .arguments import check_count, check_number
from .engine import SWITCHES, Layout, Moving, Switches
from .kappa import Kappa
from .network import PathNetwork
from .path_adam import InCoordinates, is_share, nothing

#: Of a side of a matrix: the average of g̃ g̃ᵀ or g̃ᵀ g̃, and an orthogonal matrix that nearly diagonalises it.
SIDES = (("row_gram", "row_basis"), ("column_gram", "column_basis"))

#: Of an average's trace: beyond what float32 holds of a small eigenvalue beside the largest.
_NOISE = 1e-6


class PathSOAP(InCoordinates):
    __doc__ = f"""SOAP (Vyas et al., 2024) in path coordinates p̃ = p sqrt(κ)/γ, where rescaling nodes changes nothing.

    The path metric is diagonal. It does not see that near the identity the H² entries of W_hh, moved with one sign, act
    together through all T steps, while most other directions hardly matter. Eigenbases of the gradient's second moments
    tell these apart: :class:`PathAdam`'s step is taken in them, where each direction has a variance of its own. With
    g = g̃/‖g̃‖, g̃ = γ G/sqrt(κ) of a matrix's gradient G::

        L ← β L + (1 - β) g gᵀ        R ← β R + (1 - β) gᵀ g        L ≈ Q Λ Qᵀ        R ≈ P Λ' Pᵀ
        m ← β₁ m + (1 - β₁) Qᵀ g P    v ← β₂ v + (1 - β₂) (Qᵀ g P)²
        u = sign(m) min(|m| / (sqrt(v / (1 - β₂ᵗ)) + eps), 1)
        Δp = -lr γ (Q u Pᵀ) / sqrt(n κ) - lr λ p

    Q and P begin as identities. Every ``precondition_frequency`` steps they become the Q factor of L Q and R P, a step
    of orthogonal iteration, columns in the order of their eigenvalues; m is turned with them, and v reordered. Vectors,
    matrices of one row or column, and sides longer than ``max_precond_dim`` keep the identity, and so
    :class:`PathAdam`'s step. Rows and columns that have never had a gradient do not move. What ‖g̃‖, n and γ are, how
    the output's bias moves, and which steps are left out, is said there and at :class:`GatedPathSGD`.

    Beside Adam's state it keeps four square matrices, two of either side's length. A step costs six products of
    matrices more, and a turn a QR factorisation in float64 of either side, some 16 n³ operations: where H is in the
    thousands let them turn less often. On a GPU it is taken in plain torch, in float64, from κ of the kernels.

    Args:
        net: the network, float32 or float64; every trainable parameter is held, its output's bias in a parameter
            group of its own.
        lr: longest step of a tensor in the path metric, over γ; may be a tensor.
        betas: β₁ and β₂, of the averages of the gradient and of its square.
        eps: added to the root of the second, which is at most 1.
        weight_decay: λ, as there.
        shampoo_beta: β, of the averages L and R.
        precondition_frequency: steps between two turns of the bases.
        max_precond_dim: longest side that has a basis, when the state is made.
        bias_lr: learning rate of the output's bias.
        warmup: steps over which lr rises linearly, while the bases are found.
        second_term, seq_len, rtol: as for :class:`PathOptimizer`.
        {SWITCHES}
            With ``capturable`` in plain torch the bases are computed in every step, and kept where they turn.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), torch.nn.Linear(100, 1), outputs="last")
        >>> optimizer = pk.PathSOAP(net)
        >>> net(torch.rand(50, 16, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "eigenbases"
    options = ("eps", "warmup", "maximize", "weight_decay", "shampoo_beta", "precondition_frequency", "max_precond_dim")

    def __init__(
        self,
        net: PathNetwork,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        shampoo_beta: float = 0.99,
        precondition_frequency: int = 10,
        max_precond_dim: int = 1024,
        bias_lr: float | Tensor = 0.1,
        warmup: int = 200,
        second_term: bool = False,
        seq_len: int | None = None,
        rtol: float = 1e-3,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        for name, value in (("eps", eps), ("weight_decay", weight_decay)):
            check_number(name, value, zero=True)
        check_count("warmup", warmup, 0, error=ValueError)
        switches = Switches(maximize, foreach, fused, capturable, differentiable)
        own = {
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "shampoo_beta": shampoo_beta,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        _check_own(own)
        super().__init__(net, lr, betas, bias_lr, own, second_term, seq_len, rtol, switches)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_own(group)

    def _new_state(self, name: str, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        _check_own(group)
        state = super()._new_state(name, p, group)
        if "exp_avg" in state and p.dim() == 2 and min(p.shape) > 1:
            with torch.inference_mode(False):  # as zeros_like
                for size, (gram, basis) in zip(p.shape, SIDES, strict=True):
                    if size <= group["max_precond_dim"]:
                        state[gram] = p.new_zeros(size, size)
                        state[basis] = torch.zeros_like(state[gram]).fill_diagonal_(1)
        return state

    def _served(self, layout: Layout, weight: Tensor) -> str | None:
        served = super()._served(layout, weight)
        if served == "triton" and self.param_groups[0]["fused"]:
            raise ValueError(f"fused is True, but no kernel takes steps of PathSOAP on {weight.device}: leave it out")
        return served if served == "cpu" else None

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta, frequency = group["shampoo_beta"], group["precondition_frequency"]
        if not (type(beta) is float and 0 <= beta < 1 and type(frequency) is int and frequency >= 1):  # the usual ones
            _check_own(group)
        return (*super()._numbers(group), beta, frequency)

    def _bases(self, states: list[dict[str, Any]]) -> list[Tensor]:
        none = nothing(states[0]["step"])
        return [state.get(key, none) for state in states for side in SIDES for key in side]

    def _buffer_shapes(self, p: Tensor) -> dict[str, Sequence[int]]:
        sides = {key: (size, size) for size, keys in zip(p.shape, SIDES, strict=False) for key in keys}
        return {**super()._buffer_shapes(p), **sides}

    def _check_states(self, states: Iterable[tuple[str, Tensor, dict[str, Any]]], alike: bool = False) -> None:
        states = list(states)
        super()._check_states(states, alike)
        for name, p, state in states:
            for keys in SIDES:
                own = [state.get(key) for key in keys if key in state]
                if own and (len(own) < len(keys) or any(t is None or (alike and t.dtype != p.dtype) for t in own)):
                    raise ValueError(
                        f"the state of {name} lacks one of {', '.join(keys)}, or has it of another "
                        "dtype: clear it, or load it whole"
                    )

    def _decide(  # type: ignore[override]
        self, moving: Moving, k: Kappa, entries: list[plain.Weight], unscaled: Tensor | float
    ) -> plain.Decided:
        due = {w.place: _is_due(w) for w in entries if any(basis in w.state for _, basis in SIDES)}
        # An orthogonalisation costs more than waiting for one number.
        turns = self.param_groups[0]["capturable"] or (bool(due) and bool(torch.stack([*due.values()]).any()))

        def turned(w: plain.Weight, to: plain.Moved, g: Tensor) -> plain.Moved:
            for axis in range(len(SIDES) if w.place in due else 0):
                to = _turned(w, axis, g, due[w.place] if turns else None, to)
            return to

        return super()._decide(moving, k, entries, unscaled, turned)


def _is_due(w: plain.Weight) -> Tensor:
    """Whether the bases turn in this step."""
    assert w.count is not None
    return (w.count + 1) % w.numbers[-1] == 0


def _turned(w: plain.Weight, axis: int, g: Tensor, due: Tensor | None, to: plain.Moved) -> plain.Moved:
    """With the average of one side and, where that is ``due``, another basis, to which Adam's averages are turned."""
    gram, basis = (w.state.get(key) for key in SIDES[axis])
    if gram is None or basis is None:
        return to
    rows, beta = (g, g.mT)[axis], w.numbers[-2]
    average = gram.double() + (1 - beta) * (rows @ rows.mT - gram.double())
    to = to._replace(more=[*to.more, (gram, average)])
    if due is None:
        return to
    q = basis.double()
    # The shift moves no eigenvector, and keeps columns where they were for which the average has nothing but rounding;
    # nor are these to be sorted by it.
    shift = _NOISE * average.trace()
    product = average @ q + shift * q
    order = (q * product).sum(0).clamp(min=2 * shift).argsort(descending=True, stable=True)
    now = torch.linalg.qr(product[:, order])[0]
    first = now.mT @ (q @ to.first) if axis == 0 else (to.first @ q.mT) @ now
    return to._replace(
        first=torch.where(due, first, to.first),
        second=torch.where(due, to.second.index_select(axis, order), to.second),
        more=[*to.more, (basis, torch.where(due, now, q))],
    )


def _check_own(group: dict[str, Any]) -> None:
    beta = group["shampoo_beta"]
    if not is_share(beta):
        raise ValueError(f"shampoo_beta is {beta!r}; it must be a number, at least 0 and below 1")
    for name in ("precondition_frequency", "max_precond_dim"):
        check_count(name, group[name], error=ValueError)
