"""The steps of this package's optimisers in plain torch: any device and backend, weights of any shape.

In float64 and in coordinates of a network whose units are rescaled by powers of two (``Scaled``): what
csrc/cpu/path_step.inl does entry by entry, in the same order. Nothing is read by the host; a step that must not be
taken has a status other than 0, and a commit that does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kappa import Number, Scaled, ldexp, power_of_e
from .ops.step import NO_CONSTANT, NO_PATH, OVERFLOW, UNBOUNDED, UNREACHED


def _total(parts: Sequence[Number]) -> Number:
    return Number(torch.stack([part.m for part in parts]), torch.stack([part.e for part in parts])).sum()


@dataclass
class Weight:
    """One weight that moves: its κ, its place among all, and its optimiser's state and numbers (ops/step.py)."""

    place: int
    recurrent: bool
    weight: Tensor
    gradient: Tensor
    kappa: Scaled
    numbers: Sequence[float]
    rate: Tensor | float
    first: Tensor | None = None
    second: Tensor | None = None
    count: Tensor | None = None
    #: All of it.
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = (self.kappa.rows, self.kappa.columns)
        own = self.kappa._replace(exponent=torch.zeros_like(self.kappa.exponent), entries=None)
        #: Of the powers of two that bring the weight to these coordinates.
        self.shift = own.exponents() // 2 if any(part is not None for part in parts) else own.exponent
        entries = 0 if self.kappa.entries is None else self.kappa.entries
        #: κ in these coordinates.
        self.divisor = Number(self.kappa.mantissa.double(), self.kappa.exponent + entries).normal()

    def to_canonical(self, x: Number) -> Number:
        return Number(x.m, x.e + self.shift)

    def from_canonical(self, x: Number) -> Number:
        return Number(x.m, x.e - self.shift)

    def to_bases(self, x: Tensor) -> Tensor:
        """Qᵀ x P, of those bases that the state has (PathSOAP)."""
        q, p = self.state.get("row_basis"), self.state.get("column_basis")
        x = x if q is None else q.double().mT @ x
        return x if p is None else x @ p.double()

    def from_bases(self, x: Tensor, g: Tensor) -> Tensor:
        """Q x Pᵀ, without the rounding of Q and P where there has never been a gradient, ``g`` being this step's."""
        if (q := self.state.get("row_basis")) is not None:
            seen = (self.state["row_gram"].diagonal() != 0) | (g != 0).any(1)
            x = torch.where(seen[:, None], q.double() @ x, 0.0)
        if (p := self.state.get("column_basis")) is not None:
            seen = (self.state["column_gram"].diagonal() != 0) | (g != 0).any(0)
            x = torch.where(seen, x @ p.double().mT, 0.0)
        return x

    def has_gradient(self) -> Tensor:
        return (self.gradient != 0).any()

    def unreached(self) -> Tensor:
        return self.has_gradient() & ~(self.divisor.m > 0).any() & self.recurrent

    def overflows(self, x: Tensor, of: Tensor | bool = True) -> Tensor:
        """Whether a finite gradient's entry of ``x``, of those that are asked about, leaves the weight's dtype."""
        return (self.gradient.isfinite() & of & ~(x.abs() <= torch.finfo(self.weight.dtype).max)).any()

    def unit(self) -> Number:
        """1/sqrt(κ); 0 on no path."""
        root = self.divisor.root()
        return Number(torch.where(root.m > 0, 1 / root.m, 0.0), -root.e)

    def quotient(self, unscaled: Tensor | float, factor: Number, eps: float, norm: Number) -> Number:
        """factor g/(κ + eps γ²)."""
        kappa, exponents = self.divisor.m, self.divisor.e
        if eps > 0:
            damping = torch.where(norm.m > 0, eps * norm.m, 0.0)
            own = norm.e - 2 * self.shift  # γ² is one number, whatever the coordinates
            most = torch.where(damping > 0, torch.where(kappa > 0, torch.maximum(exponents, own), own), exponents)
            kappa, exponents = ldexp(kappa, exponents - most) + ldexp(damping, own - most), most
        kappa = torch.where(kappa == 0, torch.inf, kappa)  # on no path: no step
        # A gradient scales as 1/weight does.
        gradient = self.from_canonical(Number.of(self.gradient.double()))
        return Number(gradient.m * unscaled, gradient.e) * factor / Number(kappa, exponents)


#: What was decided, a status and how to write it, under a mask.
Decided = tuple[Tensor, Callable[[Tensor], None]]


def _first(*statuses: Tensor) -> Tensor:
    result = torch.zeros_like(statuses[0])
    for status in statuses:
        result = torch.where(result == 0, status, result)
    return result


def _status(weights: Sequence[Weight], flags: Sequence[Tensor], kind: int) -> Tensor:
    found = [torch.where(flag, kind + 4 * w.place, 0) for w, flag in zip(weights, flags, strict=True)]
    return _first(*found)


def _keep(target: Tensor, value: Tensor, ok: Tensor) -> None:
    target.copy_(torch.where(ok, value.to(target.dtype), target))


def sgd(
    weights: Sequence[Weight],
    log_path_norm: Tensor,
    scale: str,
    eps: float,
    radius: float | None,
    constant: Tensor | None,
    unscaled: Tensor | float,
) -> Decided:
    norm = Number(*power_of_e(log_path_norm))
    no_path, any_gradient = norm.m == 0, torch.stack([w.has_gradient() for w in weights]).any()
    bounded = bool(radius)  # 0, as the op has it, is none
    needs_paths = scale == "path_norm" or bounded
    statuses = [
        torch.where(no_path & any_gradient & needs_paths, NO_PATH, 0),
        torch.where(norm.m.isfinite(), 0, UNBOUNDED),
        _status(weights, [w.unreached() for w in weights], UNREACHED),
    ]
    factor = one = Number(torch.ones_like(norm.m), torch.zeros_like(norm.e))
    if scale == "path_norm":
        factor = Number(torch.where(no_path, one.m, norm.m), norm.e)
    fixed = constant
    if scale == "first_step":
        assert constant is not None
        fixed, status = _first_constant(weights, norm, one, eps, constant, unscaled)
        statuses.append(status)
        factor = Number(*power_of_e(torch.where(fixed.isnan(), 0.0, fixed)))

    found = [_descent(w, norm, factor, eps, unscaled) for w in weights]
    steps, firsts, overflows = map(list, zip(*found, strict=True))
    share = one
    if bounded:
        squares = [w.to_canonical(step).squares(w.divisor) for step, w in zip(steps, weights, strict=True)]
        # No length, though the gradients are finite.
        for i, w in enumerate(weights):
            overflows[i] |= ~squares[i].m.isfinite() & w.gradient.isfinite().all()
        share = _share(squares, norm, radius)  # type: ignore[arg-type]
    statuses.append(_status(weights, overflows, OVERFLOW))

    def commit(ok: Tensor) -> None:
        for w, step, first in zip(weights, steps, firsts, strict=True):
            _keep(w.weight, w.weight.double() + (step * share).value(), ok)
            if first is not None:
                _keep(w.first, first, ok)  # type: ignore[arg-type]
        if constant is not None and fixed is not constant:
            _keep(constant, fixed, ok)  # type: ignore[arg-type]

    return _first(*statuses), commit


def _first_constant(
    weights: Sequence[Weight], norm: Number, one: Number, eps: float, constant: Tensor, unscaled: Tensor | float
) -> tuple[Tensor, Tensor]:
    """log(‖g‖ / ‖g/κ‖), if ``constant`` is nan yet; it stays so where either is 0. And a status."""
    quotients = [w.quotient(unscaled, one, eps, norm) for w in weights]
    total = _total([Number.of(w.gradient.double() * unscaled).squares() for w in weights])
    divided = _total([w.from_canonical(q).squares() for w, q in zip(weights, quotients, strict=True)])
    found = (total.m.log() + (total.e - divided.e).double() * math.log(2) - divided.m.log()) / 2
    bad = ~(total.m.isfinite() & divided.m.isfinite())
    none = (total.m == 0) | (divided.m == 0) | bad
    return torch.where(constant.isnan() & ~none, found, constant), torch.where(constant.isnan() & bad, NO_CONSTANT, 0)


def _descent(
    w: Weight, norm: Number, factor: Number, eps: float, unscaled: Tensor | float
) -> tuple[Number, Tensor | None, Tensor]:
    """The step before it is shortened, the new momentum, and whether a finite gradient's quotient is out of range.

    All in the weight's own coordinates: an entry on no path, whose units may lie beyond float64 of each other, has
    decay and momentum, too.
    """
    _, momentum, decay, nesterov, maximize = w.numbers
    d = w.from_canonical(w.quotient(unscaled, factor, eps, norm))
    overflows = w.overflows(d.value())
    d = Number(-d.m, d.e) if maximize else d
    if decay:
        d = d + Number.of(decay * w.weight.double())
    first = None if w.first is None else momentum * w.first.double() + d.value()
    if first is not None:
        d = d + Number.of(momentum * first) if nesterov else Number.of(first)
    rate = w.rate if isinstance(w.rate, Tensor) else norm.m.new_full((), w.rate)  # filled there: a copy would wait
    return d * Number.of(-rate.double()), first, overflows


def given(weights: Sequence[Weight], log_path_norm: Tensor, radius: float) -> Decided:
    """Of a step that another optimiser has taken: ``gradient`` is the weight after it."""
    norm = Number(*power_of_e(log_path_norm))
    steps = [Number.of(w.gradient.double() - w.weight.double()) for w in weights]
    squares = [w.to_canonical(step).squares(w.divisor) for step, w in zip(steps, weights, strict=True)]
    share = _share(squares, norm, radius)

    def commit(ok: Tensor) -> None:
        for w, step in zip(weights, steps, strict=True):
            # To the bit, where it is not shortened.
            shortened = (w.weight.double() + (step * share).value()).to(w.weight.dtype)
            _keep(w.weight, torch.where(share.value() == 1, w.gradient, shortened), ok)

    unbounded = torch.where(norm.m.isfinite(), 0, UNBOUNDED)
    return _first(unbounded, _status(weights, [~square.m.isfinite() for square in squares], OVERFLOW)), commit


def _share(squares: Sequence[Number], norm: Number, radius: float) -> Number:
    """What the radius leaves of a step: 1 of one that is no longer, or of a network without a path."""
    root = (_total(squares) / norm).normal().root()
    # nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
    longer = (ldexp(root.m / radius, root.e) > 1) & root.m.isfinite() & (norm.m != 0)
    return Number(torch.where(longer, radius / root.m, 1.0), torch.where(longer, -root.e, 0))


class Moved(NamedTuple):
    """A weight and its averages after the step, and what other tensors become."""

    weight: Tensor
    first: Tensor
    second: Tensor
    more: Sequence[tuple[Tensor, Tensor]] = ()


def coordinates(
    weights: Sequence[Weight],
    head: Weight | None,
    bias: Weight | None,
    log_path_norm: Tensor,
    unscaled: Tensor | float,
    turned: Callable[[Weight, Moved, Tensor], Moved] | None = None,
) -> Decided:
    """``head``: the head's weight, of whose paths γ² is, where it has a bias; ``bias``: that, where it moves.

    ``turned`` has the last word on what is written beside the weight; it is given g̃/‖g̃‖, too, 0 where nothing moves.
    """
    norm = Number(*power_of_e(log_path_norm))
    if head is not None:
        norm = head.to_canonical(Number.of(head.weight.double())).squares(head.divisor)
    everything = [*weights, *([bias] if bias is not None else [])]
    any_gradient = torch.stack([w.has_gradient() for w in everything]).any()
    statuses = [
        torch.where((norm.m == 0) & any_gradient, NO_PATH, 0),
        torch.where(norm.m.isfinite(), 0, UNBOUNDED),
        *([_status(weights, [w.unreached() for w in weights], UNREACHED)] if weights else []),
    ]
    going = torch.ones_like(norm.m, dtype=torch.bool)
    if bias is not None:
        moved, fine = _move_bias(bias, unscaled)
        held = max((w.numbers[5] for w in weights), default=0)
        assert bias.count is not None
        going = bias.count + 1 > held
    moves: list[Moved] = []
    if weights:
        units = [w.unit() for w in weights]
        gradients = [
            w.from_canonical(Number.of(w.gradient.double())) * unit for w, unit in zip(weights, units, strict=True)
        ]
        length = _total([g.squares() for g in gradients]).root()
        going = going & (length.m > 0) & length.m.isfinite()
        root = norm.root()
        for w, gradient, unit in zip(weights, gradients, units, strict=True):
            g = (gradient / length).value()
            moved_to = _move(w, g, unit, root)
            moves.append(moved_to if turned is None else turned(w, moved_to, torch.where(going, g, 0.0)))
        overflows = [w.overflows(to.weight, w.weight.isfinite()) for w, to in zip(weights, moves, strict=True)]
        statuses.append(_status(weights, [going & flag for flag in overflows], OVERFLOW))

    def commit(ok: Tensor) -> None:
        if bias is not None:
            _keep(bias.weight, moved, ok & fine)
            # Without paths there is no step, not of it either.
            bias.count.add_((ok & (norm.m != 0)).to(bias.count.dtype))  # type: ignore[union-attr]
        taken = ok & going
        for w, to in zip(weights, moves, strict=True):
            _keep(w.weight, to.weight, taken)
            _keep(w.first, to.first, taken)  # type: ignore[arg-type]
            _keep(w.second, to.second, taken)  # type: ignore[arg-type]
            w.count.add_(taken.to(w.count.dtype))  # type: ignore[union-attr]
            for target, value in to.more:
                _keep(target, value, taken)

    return _first(*statuses), commit


def _move_bias(bias: Weight, unscaled: Tensor | float) -> tuple[Tensor, Tensor]:
    """By eq. (8) as it stands, no entry of g/κ counting for more than 1; and whether all of them are finite."""
    quotient = bias.gradient.double() * unscaled / bias.divisor.value()
    sign = -1.0 if bias.numbers[7] else 1.0
    return bias.weight.double() - bias.rate * sign * quotient.clamp(-1, 1), quotient.isfinite().all()


def _move(w: Weight, g: Tensor, unit: Number, root: Number) -> Moved:
    """From g̃/‖g̃‖, 1/sqrt(κ) and γ."""
    _, beta1, beta2, power, eps, _, warmup, maximize, decay = w.numbers[:9]
    assert w.first is not None and w.second is not None and w.count is not None
    there = w.to_bases(-g if maximize else g)
    m = beta1 * w.first.double() + (1 - beta1) * there  # nothing of a former m is left where β₁ is 0
    v = beta2 * w.second.double() + (1 - beta2) * there * there
    steps = w.count.double() + 1
    denominator = (v / (1 - beta2**steps)).sqrt()
    ratio = torch.where(denominator > 0, m.abs() / (denominator + eps), 0.0).clamp(max=1)
    rate = w.rate * (steps / max(warmup, 1)).clamp(max=1)
    direction = w.from_bases((ratio**power).copysign(m), g)
    step = w.from_canonical(Number.of(rate / w.weight.numel() ** 0.5 * direction) * unit * root)
    return Moved((1 - rate * decay) * w.weight.double() - step.value(), m, v)
