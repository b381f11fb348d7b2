"""The steps of PathSGD, PathAdam and GatedPathSGD in plain torch: any device and backend, weights of any shape.

In float64 and in coordinates of a network whose units are rescaled by powers of two (``Scaled``): what
csrc/cpu/path_step does entry by entry, in the same order. Nothing is read by the host; a step that must not be taken
has a status other than 0, and a commit that does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kappa import Scaled, ldexp, power_of_e
from .ops.step import LOST, NO_CONSTANT, NO_PATH, UNBOUNDED, UNREACHED


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

    def __post_init__(self) -> None:
        parts = (self.kappa.rows, self.kappa.columns)
        own = self.kappa._replace(exponent=torch.zeros_like(self.kappa.exponent), entries=None)
        #: Of the powers of two that bring the weight to these coordinates.
        self.shift = own.exponents() // 2 if any(part is not None for part in parts) else own.exponent
        self.exponent = self.kappa.exponent
        mantissa = self.kappa.mantissa.double()
        self.divisor = mantissa if self.kappa.entries is None else ldexp(mantissa, self.kappa.entries)

    def up(self, x: Tensor) -> Tensor:
        return ldexp(x.double(), self.shift)

    def down(self, x: Tensor) -> Tensor:
        return ldexp(x.double(), -self.shift)

    def pulled(self) -> Tensor:
        return (self.gradient != 0).any()

    def unreached(self) -> Tensor:
        return self.pulled() & ~(self.divisor > 0).any() if self.recurrent else torch.zeros_like(self.pulled())


#: What was decided, a status and how to write it, under a mask.
Decided = tuple[Tensor, Callable[[Tensor], None]]


def _sum(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Σ m 2^e of numbers that are not negative, as mantissa and exponent."""
    mantissas, more = torch.frexp(torch.stack([m for m, _ in parts]))
    exponents = torch.stack([e for _, e in parts]) + more
    most = torch.where(mantissas != 0, exponents, -(1 << 40)).amax()
    return ldexp(mantissas, (exponents - most).clamp(min=-3000)).sum(), most


def _root(mantissa: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    odd = exponent & 1
    return (mantissa * (1 + odd)).sqrt(), (exponent - odd) // 2


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
    norm, norm_exponent = power_of_e(log_path_norm)
    no_path, pulled = norm == 0, torch.stack([w.pulled() for w in weights]).any()
    bounded = bool(radius)  # 0, as the op has it, is none
    needs_paths = scale == "path_norm" or bounded
    statuses = [
        torch.where(no_path & pulled & needs_paths, NO_PATH, 0),
        torch.where(norm.isfinite(), 0, UNBOUNDED),
        _status(weights, [w.unreached() for w in weights], UNREACHED),
    ]
    factor, factor_exponent = torch.ones_like(norm), torch.zeros_like(norm_exponent)
    if scale == "path_norm":
        factor, factor_exponent = torch.where(no_path, factor, norm), norm_exponent
    fixed = constant
    if scale == "first_step":
        assert constant is not None
        quotients = [_quotient(w, unscaled, factor, factor_exponent, eps, norm, norm_exponent) for w in weights]
        raw = [(w.gradient.double() * unscaled).square().sum() for w in weights]
        zero = torch.zeros_like(norm_exponent)
        total, exponent = _sum([(r, zero) for r in raw])
        divided, divided_exponent = _sum(
            [(ldexp(q, -w.shift).square().sum(), 2 * e) for w, (q, e) in zip(weights, quotients, strict=True)]
        )
        found = (total.log() + (exponent - divided_exponent).double() * math.log(2) - divided.log()) / 2
        bad = ~(total.isfinite() & divided.isfinite())
        statuses.append(torch.where(constant.isnan() & bad, NO_CONSTANT, 0))
        none = (total == 0) | (divided == 0) | bad
        fixed = torch.where(constant.isnan() & ~none, found, constant)
        factor, factor_exponent = power_of_e(torch.where(fixed.isnan(), 0.0, fixed))

    deltas: list[Tensor] = []
    firsts: list[Tensor | None] = []
    lost: list[Tensor] = []
    for w in weights:
        _, momentum, decay, nesterov, maximize = w.numbers
        q, exponent = _quotient(w, unscaled, factor, factor_exponent, eps, norm, norm_exponent)
        d = ldexp(q, exponent)
        lost.append((w.gradient.isfinite() & ~(w.down(d).abs() <= torch.finfo(w.weight.dtype).max)).any())
        d = (-d if maximize else d) + (decay * w.up(w.weight) if decay else 0)
        if w.first is not None:
            first = momentum * w.up(w.first) + d
            d = d + momentum * first if nesterov else first
        firsts.append(None if w.first is None else first)
        deltas.append(-w.rate * d)
    statuses.append(_status(weights, lost, LOST))
    share = _share(weights, deltas, norm, norm_exponent, radius) if radius else torch.ones_like(norm)

    def commit(ok: Tensor) -> None:
        for w, delta, first in zip(weights, deltas, firsts, strict=True):
            _keep(w.weight, w.down(w.up(w.weight) + share * delta), ok)
            if first is not None:
                _keep(w.first, w.down(first), ok)  # type: ignore[arg-type]
        if constant is not None and fixed is not constant:
            _keep(constant, fixed, ok)  # type: ignore[arg-type]

    return _first(*statuses), commit


def given(weights: Sequence[Weight], log_path_norm: Tensor, radius: float) -> Decided:
    """Of a step that another optimiser has taken: ``gradient`` is the weight after it."""
    norm, norm_exponent = power_of_e(log_path_norm)
    deltas = [w.up(w.gradient) - w.up(w.weight) for w in weights]
    share = _share(weights, deltas, norm, norm_exponent, radius)

    def commit(ok: Tensor) -> None:
        for w, delta in zip(weights, deltas, strict=True):
            # To the bit, where it is not shortened.
            shortened = w.down(w.up(w.weight) + share * delta).to(w.weight.dtype)
            _keep(w.weight, torch.where(share == 1, w.gradient, shortened), ok)

    return torch.where(norm.isfinite(), 0, UNBOUNDED), commit


def _share(
    weights: Sequence[Weight], deltas: Sequence[Tensor], norm: Tensor, norm_exponent: Tensor, radius: float
) -> Tensor:
    """What the radius leaves of a step: 1 of one that is no longer, or of a network without a path."""
    squares = [((w.divisor * delta * delta).sum(), w.exponent) for w, delta in zip(weights, deltas, strict=True)]
    total, exponent = _sum(squares)
    root, root_exponent = _root(total / norm, exponent - norm_exponent)
    length = ldexp(root, root_exponent)
    # nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
    return torch.where((length > radius) & length.isfinite() & (norm != 0), radius / length, torch.ones_like(norm))


def _quotient(
    w: Weight,
    unscaled: Tensor | float,
    factor: Tensor,
    exponent: Tensor,
    eps: float,
    norm: Tensor,
    norm_exponent: Tensor,
) -> tuple[Tensor, Tensor]:
    """factor 2^exponent g/(κ + eps γ²) as numbers with a common exponent."""
    divisor, own = w.divisor, w.exponent
    if eps > 0:
        own = torch.where(norm > 0, torch.maximum(own, norm_exponent), own)
        divisor = ldexp(divisor.expand_as(w.gradient), w.exponent - own)
        divisor = divisor + ldexp(eps * norm.expand_as(w.gradient), norm_exponent - own - 2 * w.shift)
    divisor = torch.where(divisor == 0, torch.inf, divisor)  # on no path: no step
    return w.down(w.gradient) * unscaled * factor / divisor, exponent - own


def coordinates(
    weights: Sequence[Weight], head: Weight | None, bias: Weight | None, log_path_norm: Tensor, unscaled: Tensor | float
) -> Decided:
    """``head``: the head's weight, of whose paths γ² is, where it has a bias; ``bias``: that, where it moves."""
    norm, norm_exponent = power_of_e(log_path_norm)
    if head is not None:
        norm, norm_exponent = (head.divisor * head.up(head.weight).square()).sum(), head.exponent
    everything = [*weights, *([bias] if bias is not None else [])]
    pulled = torch.stack([w.pulled() for w in everything]).any()
    statuses = [
        torch.where((norm == 0) & pulled, NO_PATH, 0),
        torch.where(norm.isfinite(), 0, UNBOUNDED),
        *([_status(weights, [w.unreached() for w in weights], UNREACHED)] if weights else []),
    ]
    going = torch.ones_like(norm, dtype=torch.bool)
    if bias is not None:
        quotient = bias.gradient.double() * unscaled / ldexp(bias.divisor, bias.exponent)
        fine = quotient.isfinite().all()
        sign = -1.0 if bias.numbers[7] else 1.0
        moved = bias.weight.double() - bias.rate * sign * quotient.clamp(-1, 1)
        held = weights[0].numbers[5] if weights else 0
        assert bias.count is not None
        going = bias.count + 1 > held
    if weights:
        gradients = [_path_gradient(w) for w in weights]
        squares = [(g.square().sum(), -w.exponent) for w, g in zip(weights, gradients, strict=True)]
        length, length_exponent = _root(*_sum(squares))
        going = going & (length > 0) & length.isfinite()

    def commit(ok: Tensor) -> None:
        if bias is not None:
            _keep(bias.weight, moved, ok & fine)
            bias.count.add_(ok.to(bias.count.dtype))  # type: ignore[union-attr]
        taken = ok & going
        root, root_exponent = _root(norm, norm_exponent)
        for w, g in zip(weights, gradients if weights else [], strict=True):
            _, beta1, beta2, power, eps, _, warmup, maximize = w.numbers
            assert w.first is not None and w.second is not None and w.count is not None
            one = torch.ones_like(norm)
            own, own_exponent = _root(one, -w.exponent)
            g = ldexp(g * (own / length), own_exponent - length_exponent)
            g = -g if maximize else g
            m = w.first.double() + (1 - beta1) * (g - w.first.double())
            v = beta2 * w.second.double() + (1 - beta2) * g * g
            steps = w.count.double() + 1
            denominator = (v / (1 - beta2**steps)).sqrt()
            ratio = torch.where(denominator > 0, m.abs() / (denominator + eps), 0.0).clamp(max=1)
            unit = torch.where(w.divisor > 0, w.divisor.rsqrt(), 0.0) * ldexp(root * own, root_exponent + own_exponent)
            rate = w.rate * (steps / max(warmup, 1)).clamp(max=1) / w.weight.numel() ** 0.5
            step = rate * (ratio**power).copysign(m) * unit
            _keep(w.weight, w.down(w.up(w.weight) - step), taken)
            _keep(w.first, m, taken)
            _keep(w.second, v, taken)
            w.count.add_(taken.to(w.count.dtype))

    return _first(*statuses), commit


def _path_gradient(w: Weight) -> Tensor:
    """g/sqrt(κ), the exponent left out; 0 on no path, but for a gradient that is not finite."""
    return w.down(w.gradient) * torch.where(w.divisor > 0, w.divisor.rsqrt(), 0.0)
