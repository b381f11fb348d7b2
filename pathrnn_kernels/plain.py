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

#: Tensors m and e of numbers m 2^e, of any size.
Numbers = tuple[Tensor, Tensor]


def _split(x: Tensor) -> Numbers:
    """Mantissas in [1/2, 1), 0, or not finite."""
    mantissa, exponent = torch.frexp(x)
    usual = x.isfinite()
    return torch.where(usual, mantissa, x), torch.where(usual, exponent.long(), 0)


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
        mantissa, exponents = _split(self.kappa.mantissa.double())
        if self.kappa.entries is not None:
            exponents = exponents + self.kappa.entries
        #: In these coordinates.
        self.divisor: Numbers = mantissa, exponents + self.kappa.exponent

    def up(self, x: Tensor) -> Tensor:
        return ldexp(x.double(), self.shift)

    def down(self, x: Tensor) -> Tensor:
        return ldexp(x.double(), -self.shift)

    def pulled(self) -> Tensor:
        return (self.gradient != 0).any()

    def unreached(self) -> Tensor:
        return self.pulled() & ~(self.divisor[0] > 0).any() if self.recurrent else torch.zeros_like(self.pulled())


#: What was decided, a status and how to write it, under a mask.
Decided = tuple[Tensor, Callable[[Tensor], None]]


def _sum(numbers: Numbers) -> Numbers:
    mantissas, more = _split(numbers[0])
    exponents = numbers[1] + more
    most = torch.where(mantissas != 0, exponents, -(1 << 40)).amax()
    return ldexp(mantissas, (exponents - most).clamp(min=-3000)).sum(), most


def _total(parts: Sequence[Numbers]) -> Numbers:
    return _sum((torch.stack([m for m, _ in parts]), torch.stack([e for _, e in parts])))


def _squares(x: Tensor, factor: Numbers | None = None) -> Numbers:
    """Σ factor x²."""
    mantissas, exponents = _split(x)
    squares, exponents = mantissas.square(), 2 * exponents
    if factor is not None:
        squares, exponents = squares * factor[0], exponents + factor[1]
    return _sum((squares, exponents))


def _root(mantissa: Tensor, exponent: Tensor) -> Numbers:
    odd = exponent & 1
    return (mantissa * (1 + odd)).sqrt(), (exponent - odd) // 2


def _unit(w: Weight) -> Numbers:
    """1/sqrt(κ); 0 on no path."""
    mantissa, exponent = _root(*w.divisor)
    return torch.where(mantissa > 0, 1 / mantissa, 0.0), -exponent


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
        one = torch.ones_like(norm), torch.zeros_like(norm_exponent)
        quotients = [_quotient(w, unscaled, one, eps, (norm, norm_exponent)) for w in weights]
        total, exponent = _total([_squares(w.gradient.double() * unscaled) for w in weights])
        scales = [(torch.ones_like(q), 2 * (e - w.shift)) for w, (q, e) in zip(weights, quotients, strict=True)]
        divided, divided_exponent = _total([_squares(q, s) for (q, _), s in zip(quotients, scales, strict=True)])
        found = (total.log() + (exponent - divided_exponent).double() * math.log(2) - divided.log()) / 2
        bad = ~(total.isfinite() & divided.isfinite())
        statuses.append(torch.where(constant.isnan() & bad, NO_CONSTANT, 0))
        none = (total == 0) | (divided == 0) | bad
        fixed = torch.where(constant.isnan() & ~none, found, constant)
        factor, factor_exponent = power_of_e(torch.where(fixed.isnan(), 0.0, fixed))

    deltas: list[Tensor] = []
    rates: list[Tensor] = []  # that are not in delta yet
    firsts: list[Tensor | None] = []
    lost: list[Tensor] = []
    for w in weights:
        _, momentum, decay, nesterov, maximize = w.numbers
        q, exponents = _quotient(w, unscaled, (factor, factor_exponent), eps, (norm, norm_exponent))
        d = ldexp(q, exponents)
        lost.append((w.gradient.isfinite() & ~(w.down(d).abs() <= torch.finfo(w.weight.dtype).max)).any())
        d = (-d if maximize else d) + (decay * w.up(w.weight) if decay else 0)
        rate = torch.as_tensor(-w.rate, dtype=torch.float64, device=norm.device)
        if w.first is not None:
            first = momentum * w.up(w.first) + d
            d = rate * (d + momentum * first if nesterov else first)
            rate = torch.ones_like(norm)
        firsts.append(None if w.first is None else first)
        deltas.append(d)
        rates.append(rate)
    share = torch.ones_like(norm), torch.zeros_like(norm_exponent)
    if bounded:
        squares = [_squares(d, w.divisor) for d, w in zip(deltas, weights, strict=True)]
        # No length, though the gradients are finite.
        for i, w in enumerate(weights):
            lost[i] |= ~squares[i][0].isfinite() & w.gradient.isfinite().all()
        share = _share(squares, rates, (norm, norm_exponent), radius)  # type: ignore[arg-type]
    statuses.append(_status(weights, lost, LOST))

    def commit(ok: Tensor) -> None:
        for w, delta, rate, first in zip(weights, deltas, rates, firsts, strict=True):
            _keep(w.weight, w.down(w.up(w.weight) + _shortened(delta, rate, share)), ok)
            if first is not None:
                _keep(w.first, w.down(first), ok)  # type: ignore[arg-type]
        if constant is not None and fixed is not constant:
            _keep(constant, fixed, ok)  # type: ignore[arg-type]

    return _first(*statuses), commit


def given(weights: Sequence[Weight], log_path_norm: Tensor, radius: float) -> Decided:
    """Of a step that another optimiser has taken: ``gradient`` is the weight after it."""
    norm = power_of_e(log_path_norm)
    deltas = [w.up(w.gradient) - w.up(w.weight) for w in weights]
    one = torch.ones_like(norm[0])
    squares = [_squares(d, w.divisor) for d, w in zip(deltas, weights, strict=True)]
    share = _share(squares, [one for _ in weights], norm, radius)
    whole = (share[0] == 1) & (share[1] == 0)

    def commit(ok: Tensor) -> None:
        for w, delta in zip(weights, deltas, strict=True):
            # To the bit, where it is not shortened.
            shortened = w.down(w.up(w.weight) + _shortened(delta, one, share)).to(w.weight.dtype)
            _keep(w.weight, torch.where(whole, w.gradient, shortened), ok)

    return torch.where(norm[0].isfinite(), 0, UNBOUNDED), commit


def _share(squares: Sequence[Numbers], rates: Sequence[Tensor], norm: Numbers, radius: float) -> Numbers:
    """What the radius leaves of a step: 1 of one that is no longer, or of a network without a path."""
    one, zero = torch.ones_like(norm[0]), torch.zeros_like(norm[1])
    split = [_split(rate) for rate in rates]
    total, exponent = _total([(m * r * r, e + 2 * x) for (m, e), (r, x) in zip(squares, split, strict=True)])
    root, root_exponent = _root(*_normal(total / norm[0], exponent - norm[1]))
    # nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
    longer = (ldexp(root / radius, root_exponent) > 1) & root.isfinite() & (norm[0] != 0)
    return torch.where(longer, radius / root, one), torch.where(longer, -root_exponent, zero)


def _normal(mantissa: Tensor, exponent: Tensor) -> Numbers:
    mantissa, more = _split(mantissa)
    return mantissa, exponent + more


def _shortened(delta: Tensor, rate: Tensor, share: Numbers) -> Tensor:
    mantissas, exponents = _split(delta)
    own, more = _split(rate)
    return ldexp(mantissas * (own * share[0]), exponents + more + share[1])


def _quotient(w: Weight, unscaled: Tensor | float, factor: Numbers, eps: float, norm: Numbers) -> Numbers:
    """factor g/(κ + eps γ²)."""
    divisor, own = w.divisor
    if eps > 0:
        share = torch.where(norm[0] > 0, eps * norm[0], 0.0)
        exponents = norm[1] - 2 * w.shift  # γ² is one number, whatever the coordinates
        most = torch.where(share > 0, torch.where(divisor > 0, torch.maximum(own, exponents), exponents), own)
        divisor, own = ldexp(divisor, own - most) + ldexp(share, exponents - most), most
    divisor = torch.where(divisor == 0, torch.inf, divisor)  # on no path: no step
    gradient, exponents = _split(w.gradient.double())
    return gradient * unscaled * factor[0] / divisor, exponents - w.shift + factor[1] - own


def coordinates(
    weights: Sequence[Weight], head: Weight | None, bias: Weight | None, log_path_norm: Tensor, unscaled: Tensor | float
) -> Decided:
    """``head``: the head's weight, of whose paths γ² is, where it has a bias; ``bias``: that, where it moves."""
    norm, norm_exponent = power_of_e(log_path_norm)
    if head is not None:
        norm, norm_exponent = _squares(head.up(head.weight), head.divisor)
    everything = [*weights, *([bias] if bias is not None else [])]
    pulled = torch.stack([w.pulled() for w in everything]).any()
    statuses = [
        torch.where((norm == 0) & pulled, NO_PATH, 0),
        torch.where(norm.isfinite(), 0, UNBOUNDED),
        *([_status(weights, [w.unreached() for w in weights], UNREACHED)] if weights else []),
    ]
    going = torch.ones_like(norm, dtype=torch.bool)
    if bias is not None:
        quotient = bias.gradient.double() * unscaled / ldexp(*bias.divisor)
        fine = quotient.isfinite().all()
        sign = -1.0 if bias.numbers[7] else 1.0
        moved = bias.weight.double() - bias.rate * sign * quotient.clamp(-1, 1)
        held = weights[0].numbers[5] if weights else 0
        assert bias.count is not None
        going = bias.count + 1 > held
    moves: list[tuple[Tensor, Tensor, Tensor]] = []
    if weights:
        units = [_unit(w) for w in weights]
        gradients = [w.down(w.gradient) * unit[0] for w, unit in zip(weights, units, strict=True)]
        length, length_exponent = _root(
            *_total([_squares(g, (torch.ones_like(g), 2 * u[1])) for g, u in zip(gradients, units, strict=True)])
        )
        going = going & (length > 0) & length.isfinite()
        root, root_exponent = _root(norm, norm_exponent)
        for w, g, (unit, exponents) in zip(weights, gradients, units, strict=True):
            _, beta1, beta2, power, eps, _, warmup, maximize = w.numbers
            assert w.first is not None and w.second is not None and w.count is not None
            g = ldexp(g / length, exponents - length_exponent)
            g = -g if maximize else g
            m = w.first.double() + (1 - beta1) * (g - w.first.double())
            v = beta2 * w.second.double() + (1 - beta2) * g * g
            steps = w.count.double() + 1
            denominator = (v / (1 - beta2**steps)).sqrt()
            ratio = torch.where(denominator > 0, m.abs() / (denominator + eps), 0.0).clamp(max=1)
            rate = w.rate * (steps / max(warmup, 1)).clamp(max=1) / w.weight.numel() ** 0.5
            step = ldexp(rate * (ratio**power).copysign(m) * unit * root, exponents + root_exponent)
            moves.append((w.down(w.up(w.weight) - step), m, v))
        lost = [
            going
            & (w.gradient.isfinite() & w.weight.isfinite() & ~(new.abs() <= torch.finfo(w.weight.dtype).max)).any()
            for w, (new, _, _) in zip(weights, moves, strict=True)
        ]
        statuses.append(_status(weights, lost, LOST))

    def commit(ok: Tensor) -> None:
        if bias is not None:
            _keep(bias.weight, moved, ok & fine)
            bias.count.add_(ok.to(bias.count.dtype))  # type: ignore[union-attr]
        taken = ok & going
        for w, (new, m, v) in zip(weights, moves, strict=True):
            _keep(w.weight, new, taken)
            _keep(w.first, m, taken)  # type: ignore[arg-type]
            _keep(w.second, v, taken)  # type: ignore[arg-type]
            w.count.add_(taken.to(w.count.dtype))  # type: ignore[union-attr]

    return _first(*statuses), commit
