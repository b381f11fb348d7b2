"""κ and log γ² in exact arithmetic: weights are binary fractions, and so are their sums and products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor


class Dyadic:
    """m · 2^e, of Python integers."""

    __slots__ = ("e", "m")

    def __init__(self, m: int, e: int = 0) -> None:
        self.m, self.e = m, e

    @classmethod
    def of(cls, x: float) -> Dyadic:
        m, e = math.frexp(x)
        return cls(int(math.ldexp(m, 53)), e - 53)

    def __add__(self, other: Dyadic) -> Dyadic:
        e = min(self.e, other.e)
        return Dyadic((self.m << self.e - e) + (other.m << other.e - e), e)

    def __mul__(self, other: Dyadic) -> Dyadic:
        return Dyadic(self.m * other.m, self.e + other.e)

    def log(self) -> float:
        """Natural logarithm, of the leading 60 bits."""
        if self.m == 0:
            return -math.inf
        excess = max(self.m.bit_length() - 60, 0)
        return math.log(self.m >> excess) + (self.e + excess) * math.log(2)

    def error(self, mantissa: float, exponent: int) -> float:
        """Relative error of mantissa · 2^exponent; infinite unless both are zero or none."""
        if self.m == 0 or mantissa == 0:
            return 0.0 if self.m == mantissa == 0 else math.inf
        other = Dyadic.of(mantissa)
        difference = other * Dyadic(1, exponent) + Dyadic(-self.m, self.e)
        return math.exp(Dyadic(abs(difference.m), difference.e).log() - self.log())


ZERO, ONE = Dyadic(0), Dyadic(1)
Array = np.ndarray[Any, Any]


def kappa(
    parameters: dict[str, Tensor], seq_len: int, outputs: str = "all", h0: str = "zeros", factor: int = 0
) -> tuple[dict[str, Array], Dyadic]:
    """κ of every parameter, full shape or one that broadcasts to it, with f times the second term, and γ²."""
    w = {name: _elementwise(lambda x: Dyadic.of(x) * Dyadic.of(x), p) for name, p in parameters.items()}
    endings = [name.removeprefix("rnn.weight_hh_") for name in w if name.startswith("rnn.weight_hh_")]
    width = 2 if any(e.endswith("reverse") for e in endings) else 1
    layers = [endings[i : i + width] for i in range(0, len(endings), width)]
    hidden = len(w["rnn.weight_hh_l0"])

    def turn(ending: str, steps: Array) -> Array:
        return steps[::-1] if ending.endswith("reverse") else steps

    inputs = np.full(w["rnn.weight_ih_l0"].shape[1], ONE)
    if "embedding.weight" in w:
        inputs = w["embedding.weight"].sum(0)
    below, given, h = np.stack([inputs] * seq_len), {}, {}
    for layer in layers:
        for end in layer:
            given[end] = turn(end, below)
            rows = [np.full(hidden, ONE if h0 == "ones" else ZERO)]
            for x in given[end]:
                row = w[f"rnn.weight_ih_{end}"].dot(x) + w[f"rnn.weight_hh_{end}"].dot(rows[-1])
                for kind in ("bias_ih", "bias_hh"):
                    row = row + w.get(f"rnn.{kind}_{end}", ZERO)
                rows.append(row)
            h[end] = np.stack(rows)
        below = np.concatenate([turn(end, h[end][1:]) for end in layer], 1)

    first = 0 if outputs == "all" else seq_len - 1
    head = w["head.weight"].sum(0) if "head.weight" in w else np.full(width * hidden, ONE)
    own_last = np.full((seq_len, hidden), ZERO)
    own_last[first:] = ONE
    drive = np.concatenate([turn(end, own_last) for end in layers[-1]], 1) * head
    delta = {}
    for layer in reversed(layers):
        total = ZERO
        for i, end in enumerate(layer):
            rows = [np.full(hidden, ZERO)]
            for x in turn(end, drive[:, i * hidden : (i + 1) * hidden])[::-1]:
                rows.append(x + rows[-1].dot(w[f"rnn.weight_hh_{end}"]))
            delta[end] = np.stack(rows[:0:-1])
            total = turn(end, delta[end].dot(w[f"rnn.weight_ih_{end}"])) + total
        drive = total

    result = {}
    for end in endings:
        result[f"rnn.weight_ih_{end}"] = delta[end].T.dot(given[end])
        result[f"rnn.weight_hh_{end}"] = delta[end].T.dot(h[end][:-1])
        if factor:
            pairs, power = ZERO, np.where(np.eye(hidden, dtype=bool), ONE, ZERO)
            for lag in range(seq_len - 1):
                pairs = power.T * delta[end][lag + 1 :].T.dot(h[end][: seq_len - 1 - lag]) + pairs
                power = power.dot(w[f"rnn.weight_hh_{end}"])
            result[f"rnn.weight_hh_{end}"] += w[f"rnn.weight_hh_{end}"] * pairs * Dyadic(factor)
        for kind in ("bias_ih", "bias_hh"):
            result[f"rnn.{kind}_{end}"] = delta[end].sum(0)
    result["embedding.weight"] = drive.sum(0)[None]
    own = [h[end][1 + first :] for end in layers[-1]]
    result["head.weight"] = np.concatenate(own, 1).sum(0)[None]
    result["head.bias"] = np.full(1, Dyadic(seq_len - first))
    norm = (result["head.weight"][0] * head).sum()
    if "head.bias" in w:
        norm = norm + w["head.bias"].sum() * Dyadic(seq_len - first)
    return {name: result[name] for name in parameters}, norm


def _elementwise(function: Callable[[float], Dyadic], tensor: Tensor) -> Array:
    result = np.empty(tensor.shape, object)
    for index in np.ndindex(*tensor.shape):
        result[index] = function(tensor[index].item())
    return result
