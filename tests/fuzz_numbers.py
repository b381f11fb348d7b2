"""κ, γ² and their gradients against exact-range arithmetic: python tests/fuzz_numbers.py --cases 100000 [--seed S].

A case is a network of a structured kind, a sequence length and options; tests/exact_range is the oracle. Before it, a
call of another size leaves its numbers in the kernels' workspaces. Checked are, for every parameter, κ as Kappa holds
it, Kappa.relative (γ²/κ), the factors with their log_scales, log γ², the certified bound, path_norm, log_path_norm and
their gradients; that nothing is nan, and no κ zero that is not; and that a network rescaled by powers of two has the
rescaled κ, bit for bit. A failure is made small and printed with a command that repeats it. Cases run in a child
process, so that a crash names its case.

Rounding. All terms are non-negative, so that a relative error grows by at most the unit roundoff u at each operation.
A path of T steps and L layers passes at most T + L + 2 sums of n products (n the largest fan-in), each with at most
n + 4 roundings: the products and additions, the squared weight, the drive, the conversion. Sums over the steps add T
roundings, those of κ⁽²⁾, over pairs of steps and powers, T more. Above n = 16 the roundings of one sum, with random
signs, count as 2 sqrt(n) (tolerances.path). So κ and γ² are within

    R = u (2 T + (T + L + 2)(n' + 4)),  n' = n up to 16, else min(n, 2 sqrt(n) + 8),

besides the closed forms of the two chains, which closed_form.inl allows a relative error of 2^-24 (float32) and 2^-44
(float64) each; a quotient of two such numbers is within twice that. The oracle's own roundings come on top.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import exact_range
import tolerances
from exact_range import Numbers

import pathrnn_kernels as pk

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CLOSED = {"float32": 2.0**-24, "float64": 2.0**-44}
FACTOR = {"exact": 4.0, "lemma1": 2.0, "theorem3": 1.0}


class Failure(Exception):
    """What a case must not do: (kind, details)."""


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    shape: exact_range.Shape
    dtype: str
    weights: np.ndarray = field(repr=False)  # float64, representable in dtype
    second_term: bool = False
    kappa2: str = "exact"
    rtol: float = 0.0
    threads: int = 1
    dirt: int = 0
    rescaling: list[int] | None = None  # exponents of two, of every unit of every chain
    workspace: int | None = None  # bytes for powers of W̃
    kind: str = ""

    def to_json(self):
        return json.dumps({**asdict(self), "shape": list(self.shape), "weights": self.weights.tolist()})

    @staticmethod
    def from_json(text):
        given = json.loads(text)
        return Case(
            **{
                **given,
                "shape": exact_range.Shape(*given["shape"]),
                "weights": np.array(given["weights"], dtype=np.float64),
            }
        )


def _gaussian(rng, n):
    return rng.standard_normal((n, n)) * 10 ** rng.uniform(-2, 1.5) / math.sqrt(n)


def _blocks(rng, n, above=False, below=False):
    cut = int(rng.integers(0, n + 1))
    w = np.zeros((n, n))
    w[:cut, :cut] = _gaussian(rng, n)[:cut, :cut]
    w[cut:, cut:] = _gaussian(rng, n)[cut:, cut:]
    if above:
        w[:cut, cut:] = _gaussian(rng, n)[:cut, cut:]
    if below:
        w[cut:, :cut] = _gaussian(rng, n)[cut:, :cut]
    return w


def _permutation(rng, n):
    return np.eye(n)[rng.permutation(n)]


def _cycle(rng, n):
    return np.roll(np.eye(n), 1, 0) * 10 ** rng.uniform(-1, 1) + rng.standard_normal((n, n)) * 10 ** rng.uniform(
        -12, -2
    )


def _companion(rng, n):
    w = np.eye(n, k=-1)
    w[:, -1] = rng.standard_normal(n)
    return w


def _nilpotent(rng, n):
    p = _permutation(rng, n)
    return p @ np.tril(_gaussian(rng, n), -int(rng.integers(1, 3))) @ p.T


#: Recurrent matrices [n, n] by structure.
STRUCTURES = {
    "gaussian": _gaussian,
    "default": lambda rng, n: rng.uniform(-1, 1, (n, n)) / math.sqrt(n),
    "identity": lambda rng, n: (
        np.eye(n) * rng.choice((0.5, 0.99, 1.0, 1.01, 2.0))
        + rng.choice((0.0, 1e-6, 0.02)) * rng.standard_normal((n, n))
    ),
    "sparse": lambda rng, n: _gaussian(rng, n) * (rng.random((n, n)) < rng.choice((0.1, 0.2, 0.5))),
    "block diagonal": _blocks,
    "block upper": lambda rng, n: _blocks(rng, n, above=True),
    "block lower": lambda rng, n: _blocks(rng, n, below=True),
    "weakly coupled": lambda rng, n: _blocks(rng, n) + rng.standard_normal((n, n)) * 10.0 ** -int(rng.integers(2, 20)),
    "permutation x range": lambda rng, n: (
        _permutation(rng, n) * 10 ** rng.uniform(-1, 1, (n, n)) ** int(rng.choice((1, 3)))
    ),
    "diagonal": lambda rng, n: np.diag(10 ** rng.uniform(-1, 1, n)),
    "companion": _companion,
    "nilpotent": _nilpotent,
    "two scales": lambda rng, n: _gaussian(rng, n) * np.where(rng.random((n, n)) < 0.5, 1, 10 ** rng.uniform(-18, 0)),
    "near-cyclic": _cycle,
    "rank one": lambda rng, n: np.outer(rng.standard_normal(n), rng.standard_normal(n)) * 10 ** rng.uniform(-1, 1),
    "orthogonal": lambda rng, n: np.linalg.qr(rng.standard_normal((n, n)))[0] * rng.choice((0.7, 1.0, 1.5)),
    "zero": lambda rng, n: np.zeros((n, n)),
}

#: T: mostly short, where closed forms and leaps begin (64) and beyond.
LENGTHS = ((0.42, 1, 12), (0.22, 13, 63), (0.3, 64, 140), (0.05, 141, 800), (0.01, 801, 3000))


def _pick(rng, table):
    x = rng.random()
    for share, low, high in table:
        if x < share:
            return int(rng.integers(low, high + 1))
        x -= share
    return int(rng.integers(low, high + 1))


#: So many cases in a row share their modules, whose construction would take most of the time; weights and T differ.
GROUP = 10


#: Recurrent matrices of long sequences, which end early, have a closed form, or go by blocks.
LONG = {name: STRUCTURES[name] for name in ("default", "identity", "orthogonal", "near-cyclic", "block lower")} | {
    "near identity": lambda rng, n: 0.98 * np.eye(n) + 0.01 * rng.standard_normal((n, n)),
}


def make_long_case(seed, number):
    """Sizes that are trained, T up to 5,000: mostly one layer, whose chains begin with one read of W̃ for both."""
    rng = np.random.default_rng([seed, number, 1])
    hidden = int(rng.choice((33, 64, 72, 100, 128, 200, 257, 513, 700), p=[0.17] * 5 + [0.05] * 2 + [0.03, 0.02]))
    outputs, bias = int(rng.integers(0, 3)), int(rng.random() < 0.6)
    steps = int(min(10 ** rng.uniform(2, 3.7), 4e7 / hidden**2))
    head_bias, last, ones = int(outputs > 0 and rng.random() < 0.6), int(rng.random() < 0.6), int(rng.random() < 0.1)
    layers, directions = ((1, 1), (1, 1), (1, 1), (1, 1), (2, 1), (1, 2))[int(rng.integers(6))]
    shape = exact_range.Shape(layers, directions, 2, hidden, outputs, 0, steps, last, ones, bias, head_bias)
    dtype, threads = str(rng.choice(("float32", "float64"))), int(rng.choice((1, 2), p=(0.8, 0.2)))
    second = bool(steps <= 300 and rng.random() < 0.3)
    case = Case(shape, dtype, np.zeros(0), second, threads=threads, rtol=1e-5, dirt=int(rng.integers(len(DIRT))))
    case.weights, case.kind = _weights(rng, shape, dtype, LONG)
    if layers * directions == 1 and rng.random() < 0.6:
        _keep_some(rng, shape, case)
    return case


def _keep_some(rng, shape, case):
    """Some units, or all, keep what they have, apart from the others, which nobody reads or nothing drives."""
    case.kind += ", kept"
    arrays = {
        name.removeprefix("rnn."): case.weights[at : at + math.prod(size)].reshape(size)
        for name, (at, size) in exact_range.places(shape).items()
    }
    kept, w = rng.random(shape.hidden) < rng.choice((0.1, 0.5, 1.0)), arrays["weight_hh_l0"]
    w[np.ix_(kept, ~kept)], w[np.ix_(~kept, kept)], w[np.ix_(kept, kept)] = 0, 0, np.eye(kept.sum())
    if rng.random() < 0.5:
        if shape.outputs:
            arrays["head.weight"][:, ~kept] = 0
    else:
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            if name in arrays:
                arrays[name][~kept] = 0


def make_case(seed, number):
    rng = np.random.default_rng([seed, number // GROUP])
    size = rng.random()
    if size < 0.965:
        hidden = int(rng.integers(1, 9))
    elif size < 0.997:
        hidden = int(rng.integers(9, 33))
    else:
        hidden = int(
            rng.choice(
                (33, 64, 65, 100, 129, 200, 257, 400, 512, 513, 600, 1024), p=[0.12] * 6 + [0.06] * 4 + [0.03, 0.01]
            )
        )
    small, large = hidden <= 8, hidden > 32
    layers = int(rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1))) if not large else 1
    directions = 2 if rng.random() < 0.2 and hidden < 100 else 1
    outputs, bias = int(rng.integers(0, 4)), int(rng.random() < 0.6)
    widths = (layers, directions, int(rng.integers(1, 4)), hidden, outputs)
    vocabulary = int(rng.integers(1, 4)) if rng.random() < 0.25 else 0
    head_bias = int(outputs > 0 and rng.random() < 0.6)
    dtype = str(rng.choice(("float32", "float64")))

    rng = np.random.default_rng([seed, number // GROUP, number % GROUP])
    steps = _pick(rng, LENGTHS)
    if not small:
        steps = int(rng.integers(150, 500)) if rng.random() < 0.3 else min(steps, 140)
    if large:
        steps = min(steps, 2 + 20000 // hidden, 24 if hidden >= 400 else 100)
    last, ones = int(rng.random() < 0.5), int(rng.random() < 0.25)
    shape = exact_range.Shape(*widths, vocabulary, steps, last, ones, bias, head_bias)
    second = bool(rng.random() < 0.6)
    case = Case(
        *(shape, dtype, np.zeros(0), second),
        "exact" if rng.random() < 0.9 else str(rng.choice(("lemma1", "theorem3"))),
        *(float(rng.choice((0.0, 1e-5, 1e-3))), int(rng.choice((1, 2), p=(0.6, 0.4))), int(rng.integers(len(DIRT)))),
    )
    case.weights, case.kind = _weights(rng, shape, dtype)
    case.workspace = 0 if rng.random() < 0.2 else None  # at least eight powers are held
    if rng.random() < 0.3 and not ones:  # h_0 = 1 is no unit's to rescale
        most = 60 if dtype == "float32" else 300
        exponents = rng.integers(-most, most + 1, (layers * directions, hidden))
        if rng.random() < 0.5:
            exponents = exponents // 10
        if outputs == 0:
            exponents[-directions:] = 0
        case.rescaling = [int(x) for x in exponents.ravel()]
    return case


def _weights(rng, shape, dtype, structures=STRUCTURES):
    arrays, kinds = {}, []
    places, names = exact_range.places(shape), list(structures)
    for name, (_, size) in places.items():
        if "weight_hh" in name:
            kind = names[int(rng.integers(len(names)))]
            w = structures[kind](rng, shape.hidden)
            kinds.append(kind)
        elif "bias" in name:
            w = rng.standard_normal(size) * rng.choice((0.0, 1.0, 1e-3, 1e-20))
        else:
            w = rng.standard_normal(size) / math.sqrt(size[-1])
        arrays[name] = w
    for name, w in arrays.items():
        hidden = "weight_hh" in name
        if rng.random() < 0.1:  # zero entries, rows, columns
            way = int(rng.integers(3))
            if way == 0 or w.ndim == 1:
                w[rng.random(w.shape) < 0.3] = 0
            elif way == 1:
                w[rng.random(w.shape[0]) < 0.3] = 0
            else:
                w[:, rng.random(w.shape[1]) < 0.3] = 0
        if rng.random() < 0.04:
            w[...] = np.where(rng.random(w.shape) < 0.3, w * 10 ** rng.uniform(-30, 30), w)
        if rng.random() < 0.03:  # denormal, or with a denormal square
            tiny = 10.0 ** rng.uniform(-45, -20) if dtype == "float32" else 10.0 ** rng.uniform(-323, -155)
            w[...] = np.where(rng.random(w.shape) < rng.choice((0.3, 1.0)), np.sign(w) * tiny, w)
            kinds.append("denormal")
        if hidden and rng.random() < 0.05:  # rows or columns of different sizes
            kinds.append("ranges")
            if rng.random() < 0.5:
                w *= 10 ** rng.uniform(-6, 6, (shape.hidden, 1))
            else:
                w *= 10 ** rng.uniform(-6, 6, shape.hidden)
    if rng.random() < 0.12:  # units that grow beside the paths: nobody reads them, or nothing drives them
        kinds.append("beside")
        chain = int(rng.integers(shape.layers * shape.directions))
        layer, reverse = divmod(chain, shape.directions)
        end = f"l{layer}_reverse" if reverse else f"l{layer}"
        unit = int(rng.integers(shape.hidden))
        w = arrays[f"rnn.weight_hh_{end}"]
        unread = rng.random() < 0.6
        if unread:
            w[:, unit] = 0
        else:
            w[unit] = 0
            arrays[f"rnn.weight_ih_{end}"][unit] = 0
            for kind in ("bias_ih", "bias_hh"):
                if shape.bias:
                    arrays[f"rnn.{kind}_{end}"][unit] = 0
        w[unit, unit] = 10 ** rng.uniform(0, 1.5)
        if unread:
            at = reverse * shape.hidden + unit
            if layer + 1 == shape.layers:
                if shape.outputs:
                    arrays["head.weight"][:, at] = 0
            else:
                for above in (f"l{layer + 1}", f"l{layer + 1}_reverse")[: shape.directions]:
                    arrays[f"rnn.weight_ih_{above}"][:, at] = 0
    if rng.random() < 0.25:
        way = int(rng.integers(3))
        kinds.append(f"rescaled by {('powers of two', 'reals', 'reals of few decades')[way]}")
        decades = (18, 30, 4)[way] if dtype == "float32" else (90, 30, 4)[way]
        alphas = 10 ** rng.uniform(-decades / 2, decades / 2, (shape.layers * shape.directions, shape.hidden))
        if rng.random() < 0.5:
            alphas = np.where(rng.random(alphas.shape) < 0.5, alphas, 1)
        rescale(shape, arrays, np.exp2(np.round(np.log2(alphas))) if way == 0 else alphas)
    if rng.random() < 0.1:  # whole tensors far away
        kinds.append("far tensors")
        for w in arrays.values():
            w *= 10.0 ** rng.uniform(-8, 8)
    flat = np.concatenate([w.ravel() for w in arrays.values()])
    if dtype == "float32":
        most = 1e37
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = np.clip(flat, -most, most).astype(np.float32).astype(np.float64)
    return np.clip(flat, -1e300, 1e300), ", ".join(kinds)


def rescale(shape, arrays, alphas):
    """Theorem 1, in place: incoming weights of every unit times alpha, outgoing ones divided by it."""
    d = shape.directions
    for chain, alpha in enumerate(alphas):
        layer, reverse = divmod(chain, d)
        end = f"l{layer}_reverse" if reverse else f"l{layer}"
        for kind in ("weight_ih", "weight_hh"):
            arrays[f"rnn.{kind}_{end}"] *= alpha[:, None]
        arrays[f"rnn.weight_hh_{end}"] /= alpha
        if shape.bias:
            for kind in ("bias_ih", "bias_hh"):
                arrays[f"rnn.{kind}_{end}"] *= alpha
        at = slice(reverse * shape.hidden, (reverse + 1) * shape.hidden)
        if layer + 1 < shape.layers:
            for above in (f"l{layer + 1}", f"l{layer + 1}_reverse")[:d]:
                arrays[f"rnn.weight_ih_{above}"][:, at] /= alpha
        elif shape.outputs:
            arrays["head.weight"][:, at] /= alpha


# ---- the package's side ---------------------------------------------------------------------------------------------

_networks: dict[tuple, tuple] = {}


def network(shape, dtype):
    """(PathNetwork, flat tensor that its parameters lie in, {name: (first, size)})."""
    key = (dtype, *shape._replace(steps=0, last=0, ones=0))
    if key not in _networks:
        if len(_networks) > 3000 or shape.hidden > 32:
            _networks.clear()
        t, places = DTYPES[dtype], exact_range.places(shape)
        flat = torch.zeros(sum(math.prod(size) for _, size in places.values()), dtype=t)
        bidirectional = shape.directions == 2
        with torch.device("meta"):
            net = pk.PathNetwork(
                pk.ReLURNN(
                    *(shape.input, shape.hidden, shape.layers, bool(shape.bias)), bidirectional=bidirectional, dtype=t
                ),
                nn.Linear(shape.directions * shape.hidden, shape.outputs, bias=bool(shape.head_bias), dtype=t)
                if shape.outputs
                else None,
                nn.Embedding(shape.vocabulary, shape.input, dtype=t) if shape.vocabulary else None,
            )
        for name, (first, size) in places.items():
            module, _, key_ = name.rpartition(".")
            own = nn.Parameter(flat[first : first + math.prod(size)].view(size))
            setattr(net.get_submodule(module), key_, own)
        _networks[key] = net, flat, places
    net, flat, places = _networks[key]
    net.outputs, net.h0 = ("all", "last")[shape.last], ("zeros", "ones")[shape.ones]
    return net, flat, places


def _dirt():
    """Calls that leave numbers of all sizes in the workspaces: (network, steps, second_term)."""
    result = []
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for hidden, layers, directions, steps, gain in (
            *((2, 1, 1, 70, 1.0), (11, 1, 1, 100, 3.0), (5, 2, 2, 90, 0.3), (20, 1, 1, 150, 0.2), (7, 3, 1, 300, 1.5)),
        ):
            net = pk.PathNetwork(
                pk.ReLURNN(2, hidden, layers, bidirectional=directions == 2, dtype=DTYPES[dtype]),
                nn.Linear(directions * hidden, 2, dtype=DTYPES[dtype]),
            )
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(torch.from_numpy(rng.standard_normal(p.shape) * gain / p.shape[-1] ** 0.5))
            result.append((net, steps))
    return result


DIRT = _dirt()


def make_dirty(case, other=False):
    net, steps = DIRT[case.dirt - other]
    pk.kappa(net, steps, second_term=case.second_term, rtol=1e-4)


def gather(places, tensors, dtype=torch.float64):
    return torch.cat([tensors(name).expand(size).reshape(-1).to(dtype) for name, (_, size) in places.items()]).numpy()


def held(places, k):
    """κ as Kappa holds it: Numbers, mantissas in [1, 2), nan or inf as they are."""
    parts = {name: k.scaled[name].parts() for name in places}
    mantissa = gather(places, lambda name: parts[name][0])
    return exact_range.normal(mantissa, gather(places, lambda name: parts[name][1], torch.int64))


def repeat(number, n):
    return Numbers(np.broadcast_to(number.mantissa, n), np.broadcast_to(number.exponent, n))


# ---- checks ---------------------------------------------------------------------------------------------------------


def rounding(case):
    """R of the module's docstring, with the closed forms."""
    s = case.shape
    n = max(
        s.directions * s.hidden + s.input + 2, s.outputs * s.directions * s.hidden if s.outputs else 0, s.vocabulary
    )
    n = n if n <= 16 else min(n, 2 * math.sqrt(n) + 8)
    operations = 2 * s.steps + (s.steps + s.layers + 2) * (n + 4)
    u = tolerances.unit_roundoff(DTYPES[case.dtype])
    return operations * (u + 2.0**-53) + 2 * CLOSED[case.dtype]


class Truth:
    """γ², κ⁽¹⁾, κ as Numbers over the flat array; `known`: entries whose κ is."""

    def __init__(self, case, definitions=1.0):
        s = case.shape
        count = len(case.weights)
        step_cost = s.directions * s.layers * s.hidden * (s.hidden + s.input)
        stride = 1
        if not case.second_term:
            stride = 0
        elif s.hidden > 8:
            stride = max(1, int(s.steps * s.hidden**3 / 1e6))
        first = case.dirt % stride if stride > 1 else 0
        self.norm, self.first, c2 = exact_range.chains(s, case.weights, first=first, stride=stride)
        self.known = np.ones(count, dtype=bool)
        self.kappa = self.first
        if case.second_term:
            squares = exact_range.normal(case.weights * 1.0)
            squares = exact_range.product(squares, squares)
            second = exact_range.product(Numbers(FACTOR[case.kappa2], 0), squares, c2)
            self.kappa = exact_range.total(self.first, second)
            if stride > 1:
                for name, (at, size) in exact_range.places(s).items():
                    if "weight_hh" in name:
                        column = np.arange(math.prod(size)) % s.hidden
                        self.known[at : at + math.prod(size)] = column % stride == first
        # The definition itself: all entries of small networks, some of others, none where one alone takes too long.
        budget = int(definitions * 10_000 / (step_cost * s.steps + 1))
        self.defined = min(budget, count)
        if self.defined:
            entries = np.arange(count)
            if self.defined < count:
                entries = np.random.default_rng(case.dirt + count).permutation(count)[: self.defined]
            found = exact_range.definition(s, case.weights, entries)
            for i, other in enumerate((self.norm, self.first, c2)):
                here = np.zeros(len(entries), dtype=int) if i == 0 else entries
                other = Numbers(other.mantissa[here], other.exponent[here])
                error = exact_range.relative_error(Numbers(found.mantissa[:, i], found.exponent[:, i]), other)
                if i == 2:
                    error = error[self.known[entries]] if case.second_term else error[:0]
                assert error.size == 0 or error.max() <= 1e-15 * (s.steps + 4) * (s.hidden + 8), "the oracle errs"


def _worst(error, where, places):
    i = int(np.argmax(np.where(where, error, -1)))
    for name, (at, size) in places.items():
        if at <= i < at + math.prod(size):
            return i, f"{name}{list(map(int, np.unravel_index(i - at, size))) if size else ''}"
    return i, "?"


def text_of(numbers, i):
    return f"{numbers.mantissa[i]:.17g} * 2^{int(numbers.exponent[i])}"


def compare(what, found, true, where, tolerance, places, least=None, most=None):
    """Relative errors; out of [2^least, 2^most) a float may be what it must: 0 or tiny, inf or large."""
    if np.isnan(found).any():
        i, name = _worst(np.isnan(found), np.ones(len(found), dtype=bool), places)
        raise Failure(f"{what} nan", f"{name} is nan, right {text_of(true, i)}")
    error = exact_range.relative_error(exact_range.normal(np.abs(found)), true)
    if least is not None:
        low = (true.mantissa > 0) & (true.exponent <= least)
        # Half of the spacing down there, and what rounding makes of it.
        error = np.where(low & (np.abs(found) <= 2.0 ** (least + 1) * (1 + tolerance)), 0, error)
        high = (true.mantissa > 0) & (true.exponent >= most)
        error = np.where(high & (np.abs(found) >= 2.0 ** (most - 1)), 0, error)
    bad = where & ~(error <= tolerance)
    if bad.any():
        i, name = _worst(error, bad, places)
        how = "zero" if found[i] == 0 else "inf" if np.isinf(found[i]) else "wrong"
        raise Failure(
            f"{what} {how}",
            f"{name} is {found[i]!r}, right {text_of(true, i)}: relative error {error[i]:.3g}, allowed "
            f"{tolerance:.3g}; {int(bad.sum())} of {len(bad)}",
        )
    return float(error[where].max(initial=0) / tolerance)


def compare_numbers(what, mantissa, exponent, true, where, tolerance, places):
    """As `compare`, of mantissa · 2^exponent, which has no range to leave."""
    found = exact_range.normal(mantissa, exponent)
    error = exact_range.relative_error(found, true)
    wrong = ~np.isfinite(mantissa) | (mantissa < 0)
    bad = wrong | (where & ~(error <= tolerance))
    if bad.any():
        i, name = _worst(np.where(wrong, np.inf, error), bad, places)
        how = "nan" if np.isnan(mantissa[i]) else "zero" if mantissa[i] == 0 else "wrong"
        raise Failure(
            f"{what} {how}",
            f"{name} is {text_of(found, i)}, right {text_of(true, i)}: relative error {error[i]:.3g}, allowed "
            f"{tolerance:.3g}; {int(bad.sum())} of {len(bad)}",
        )
    return float(error[where].max(initial=0) / tolerance)


def check(case, definitions=1.0, gradients=True, rescaled=True, repeated=True, thorough=True):
    """One case; the largest error over its tolerance.

    Raises:
        Failure: what is wrong.
    """
    s = case.shape
    truth = Truth(case, definitions)
    net, flat, places = network(s, case.dtype)
    flat.copy_(torch.from_numpy(case.weights))
    if torch.get_num_threads() != case.threads:
        torch.set_num_threads(case.threads)
    make_dirty(case)
    rtol = case.rtol
    options = {"second_term": case.second_term, "kappa2": case.kappa2, "rtol": rtol, "workspace_bytes": case.workspace}
    k = pk.kappa(net, s.steps, **options)
    bound, tolerance = float(k.bound), rounding(case)
    if not 0 <= bound <= rtol:
        raise Failure("bound", f"bound is {bound}, rtol {rtol}")

    # log γ²
    log_norm, true_log = float(k.log_path_norm), float(exact_range.logarithm(truth.norm)[0])
    # A logarithm in float64 knows γ² this well: half of its last bit, and as much in exp and in ln 2 times an exponent.
    of_logarithm = 2.0**-51 * abs(true_log) if math.isfinite(true_log) else 0.0

    def check_log(what, value, allowed):
        if not (value == true_log or abs(value - true_log) <= allowed < math.inf):
            raise Failure(f"{what}", f"{what} is {value!r}, right {true_log!r}, allowed {allowed:.3g}")

    check_log("log γ²", log_norm, tolerance + of_logarithm)

    # κ, every entry of it. Truncation leaves it too small or too large by the bound.
    mantissa, exponent = found = held(places, k)
    error = compare_numbers("κ", mantissa, exponent, truth.kappa, truth.known, tolerance + bound, places)
    worst = 0.0 if bound else error  # how tight a certificate is says nothing of the rounding
    for name, count in k.lags.items():
        if not 0 <= count < s.steps:
            raise Failure("lags", f"{name} has {count} lags of {s.steps} steps")
    if thorough:
        check_reading(case, k, truth, places, tolerance, bound, of_logarithm)
    if repeated:
        make_dirty(case, other=True)
        check_same("a repeat differs", k, pk.kappa(net, s.steps, **options), found, found, places)
    if rescaled and case.rescaling is not None:
        check_rescaled(case, places, net, flat, k, found, options)
        flat.copy_(torch.from_numpy(case.weights))
    if gradients:
        worst = max(worst, check_gradients(case, truth, net, places, tolerance, of_logarithm, check_log))
    return worst


def check_reading(case, k, truth, places, tolerance, bound, of_logarithm):
    """What Kappa forms on demand: the factors, γ²/κ."""
    factors = gather(places, lambda name: k.factors[name])
    scales = [np.full(math.prod(size), round(k.log_scales[n] / math.log(2))) for n, (_, size) in places.items()]
    # What their dtype cannot hold beside the largest of a tensor may be 0 there.
    lost = np.zeros(len(factors), dtype=bool)
    for at, size in places.values():
        own = slice(at, at + math.prod(size))
        here = truth.kappa.exponent[own][truth.kappa.mantissa[own] > 0]
        if here.size:
            lost[own] = truth.kappa.exponent[own] <= here.max() + np.finfo(case.dtype).minexp + 3
    where = truth.known & ~lost
    compare_numbers("factor", factors, np.concatenate(scales), truth.kappa, where, tolerance + bound, places)

    relative = gather(places, k.relative)
    if any(k.relative(name).dtype != torch.float64 for name in places):
        raise Failure("γ²/κ dtype", "relative() is not float64")
    info = np.finfo(np.float64)
    quotient = exact_range.quotient(repeat(truth.norm, len(relative)), truth.kappa)
    allowed = (2 * tolerance + bound) / (1 - min(bound, 0.5)) + of_logarithm + info.eps
    compare("γ²/κ", relative, quotient, truth.known, allowed, places, info.minexp, info.maxexp - 1)


def check_same(what, k, other, expected, found, places):
    """Two results of which one is known by the other, bit for bit."""
    for field_ in ("arithmetic", "lags", "bound"):
        if getattr(k, field_) != getattr(other, field_):
            raise Failure(what, f"{field_} is {getattr(other, field_)}, before {getattr(k, field_)}")
    if float(k.log_path_norm) != float(other.log_path_norm):
        raise Failure(what, f"log γ² is {float(other.log_path_norm)!r}, before {float(k.log_path_norm)!r}")
    if expected is found:
        found = held(places, other)
    bad = (expected.mantissa != found.mantissa) | (expected.exponent != found.exponent)
    if bad.any():
        i, name = _worst(bad, bad, places)
        raise Failure(
            what, f"{name} is {text_of(found, i)}, not {text_of(expected, i)}; {int(bad.sum())} of {len(bad)}"
        )


def check_gradients(case, truth, net, places, tolerance, of_logarithm, check_log):
    """path_norm, log_path_norm and their gradients, 2 p κ⁽¹⁾ and 2 p κ⁽¹⁾/γ²."""
    s, info = case.shape, np.finfo(case.dtype)
    squared = exact_range.normal(case.weights)
    signs = np.sign(case.weights)
    slope = exact_range.product(
        Numbers(2.0, 0), exact_range.normal(np.abs(squared.mantissa), squared.exponent), truth.first
    )
    n = len(case.weights)
    norm, everything, worst = repeat(truth.norm, n), np.ones(n, dtype=bool), 0.0
    parameters = [net.get_parameter(name) for name in places]
    for function, true in ((pk.path_norm, slope), (pk.log_path_norm, exact_range.quotient(slope, norm))):
        what = function.__name__
        value = function(net, s.steps)
        found = float(value.detach())
        if function is pk.path_norm:
            one = {"γ²": (0, ())}
            compare(
                *("path_norm", np.array([found]), truth.norm, np.ones(1, dtype=bool)),
                *(tolerance + of_logarithm + info.eps, one, info.minexp, info.maxexp - 1),
            )
        else:
            check_log(what, found, tolerance + of_logarithm + info.eps * abs(found))
        for p in parameters:
            p.grad = None
        value.backward()
        gradient = gather(places, lambda name: net.get_parameter(name).grad)
        if function is pk.log_path_norm and truth.norm.mantissa[0] == 0:
            if np.isnan(gradient).any():
                raise Failure(f"{what} gradient nan", "of a γ² of 0")
            continue
        if (gradient * signs < 0).any():
            raise Failure(f"{what} gradient sign", "a gradient points the wrong way")
        worst = max(
            worst,
            compare(
                *(f"{what} gradient", gradient, true, everything, 2 * tolerance + of_logarithm + 2 * info.eps, places),
                *(info.minexp, info.maxexp - 1),
            ),
        )
    return worst


def check_rescaled(case, places, net, flat, k, found, options):
    """κ of the network rescaled by powers of two: the same bits."""
    s, info = case.shape, np.finfo(case.dtype)
    factors = {n: np.ones(z) for n, (_, z) in places.items()}
    alphas = np.exp2(np.array(case.rescaling, dtype=np.float64)).reshape(-1, s.hidden)
    rescale(s, factors, alphas)
    factor = np.concatenate([w.ravel() for w in factors.values()])
    # At once: one of two factors could take a weight below the normal numbers and the other bring it back, worn.
    weights = np.ldexp(case.weights, np.frexp(factor)[1] - 1)
    for size in (np.abs(weights), np.abs(case.weights)):
        if ((size != 0) & (size < info.tiny)).any() or (size > info.max).any():
            return  # denormal entries lose bits
    if ((weights == 0) != (case.weights == 0)).any():
        return
    flat.copy_(torch.from_numpy(weights))
    # w² κ stays: κ goes with the inverse square.
    shift = 2 * (np.frexp(factor)[1].astype(np.int64) - 1)
    expected = Numbers(found.mantissa, np.where(found.mantissa == 0, 0, found.exponent - shift))
    other = pk.kappa(net, s.steps, **options)
    check_same("rescaled", k, other, expected, held(places, other), places)


# ---- failures made small --------------------------------------------------------------------------------------------


def fails(case):
    """The Failure of a case, None if it has none."""
    try:
        with np.errstate(all="ignore"):
            check(case)
    except Failure as failure:
        return failure
    except AssertionError:
        raise
    except Exception as error:  # any error of the package is a failure
        return Failure(type(error).__name__, str(error))
    return None


def _without_unit(case, unit):
    s = case.shape
    new = s._replace(hidden=s.hidden - 1)
    parts = []
    for name, (at, size) in exact_range.places(s).items():
        w = case.weights[at : at + math.prod(size)].reshape(size)
        both = [unit + d * s.hidden for d in range(s.directions)]
        if name.startswith("rnn."):
            w = np.delete(w, unit, 0)
            if "weight_hh" in name:
                w = np.delete(w, unit, 1)
            elif "weight_ih" in name and "_l0" not in name:
                w = np.delete(w, both, 1)
        elif name == "head.weight":
            w = np.delete(w, both, 1)
        parts.append(w.ravel())
    rescaling = None
    if case.rescaling is not None:
        rescaling = np.delete(np.reshape(case.rescaling, (-1, s.hidden)), unit, 1).ravel().tolist()
    return new, np.concatenate(parts), rescaling


def _reshaped(case, new):
    """The case with a smaller shape: what is left of every tensor."""
    old, parts = exact_range.places(case.shape), []
    for name, (_, size) in exact_range.places(new).items():
        at, before = old[name]
        w = case.weights[at : at + math.prod(before)].reshape(before)
        parts.append(w[tuple(slice(n) for n in size)].ravel())
    rescaling = case.rescaling
    if rescaling is not None:
        table = np.reshape(rescaling, (case.shape.layers, case.shape.directions, case.shape.hidden))
        rescaling = table[: new.layers, : new.directions].copy()
        if new.outputs == 0:
            rescaling[-1] = 0
        rescaling = rescaling.ravel().tolist()
    return copy.copy(case), np.concatenate(parts), rescaling


def shrink(case, kind, attempts=1500, seconds=30):
    """A smaller case whose failure is of the same kind."""
    tried, started = 0, time.monotonic()

    def better(new):
        nonlocal case, tried
        tried += 1
        if tried > attempts or time.monotonic() - started > seconds:
            return False
        failure = fails(new)
        if failure is None or failure.args[0] != kind:
            return False
        case = new
        return True

    def change(**fields):
        new = copy.copy(case)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    moved = True
    while moved and tried < attempts:
        moved = False
        s = case.shape
        for steps in (1, s.steps // 4, s.steps // 2, s.steps * 3 // 4, s.steps - 10, s.steps - 1):
            if 1 <= steps < case.shape.steps and better(change(shape=case.shape._replace(steps=steps))):
                moved = True
                break
        for smaller in (
            *({"layers": s.layers - 1}, {"directions": 1}, {"bias": 0}, {"head_bias": 0}),
            *({"vocabulary": 0}, {"outputs": 0, "head_bias": 0}, {"outputs": 1}, {"input": 1}, {"vocabulary": 1}),
        ):
            new = case.shape._replace(**smaller)
            if new == case.shape or min(new.layers, new.input) < 1 or (new.outputs, new.vocabulary) > (3, 3):
                continue
            if any(smaller.get(n, 0) > getattr(case.shape, n) for n in ("outputs", "vocabulary")):
                continue
            made, weights, rescaling = _reshaped(case, new)
            made.shape, made.weights, made.rescaling = new, weights, rescaling
            moved = better(made) or moved
        for unit in reversed(range(case.shape.hidden)):
            if case.shape.hidden > 1:
                new, weights, rescaling = _without_unit(case, unit)
                moved = better(change(shape=new, weights=weights, rescaling=rescaling)) or moved
        for fields in (
            *({"threads": 1}, {"second_term": False}, {"rtol": 0.0}, {"kappa2": "exact"}, {"workspace": None}),
            {"dirt": 0},
            *({"rescaling": None}, {"shape": case.shape._replace(ones=0)}, {"shape": case.shape._replace(last=1)}),
        ):
            if any(getattr(case, name) != value for name, value in fields.items()):
                moved = better(change(**fields)) or moved
        if len(case.weights) <= 200:
            for i, w in enumerate(case.weights):
                for simple in (0.0, 1.0, float(2.0 ** round(math.log2(abs(w)))) if w else 0.0):
                    if w != simple and w != 0 and (w != 1 or simple == 0):
                        weights = case.weights.copy()
                        weights[i] = simple
                        if better(change(weights=weights)):
                            moved = True
                            break
        if case.rescaling is not None:
            for i, x in enumerate(case.rescaling):
                if x:
                    rescaling = list(case.rescaling)
                    rescaling[i] = 0
                    moved = better(change(rescaling=rescaling)) or moved
    return case


def report(seed, number, case, failure, small=None, long=False):
    print(f"FAILURE case {number} of seed {seed}: {failure.args[0]}: {'; '.join(map(str, failure.args[1:]))}")
    options = {name: getattr(case, name) for name in ("second_term", "kappa2", "rtol", "threads")}
    print(f"  {case.dtype} {case.shape._asdict()} {options} W_hh: {case.kind}")
    if small is not None:
        again = fails(small)
        what = "; ".join(map(str, again.args)) if again else "passes alone: it depends on earlier calls"
        print(f"  smallest: H={small.shape.hidden} T={small.shape.steps}: {what}")
        text = small.to_json()
        if len(text) < 4000:
            print(f"  python tests/fuzz_numbers.py --replay '{text}'")
    print(f"  python tests/fuzz_numbers.py --seed {seed} --first {number} --cases 1{' --long' * long}", flush=True)


# ---- processes ------------------------------------------------------------------------------------------------------


def run(seed, first, last, seconds=math.inf, say=lambda number: None, most_failures=math.inf, small=True, long=False):
    """Cases [first, last): Counter of kinds of failure, with "cases" and, over all of them, "worst" error/tolerance."""
    counts, started = Counter(), time.monotonic()
    worst = 0.0
    seen = Counter()
    for number in range(first, last):
        if time.monotonic() - started > seconds:
            break
        say(number)
        case = (make_long_case if long else make_case)(seed, number)
        counts["cases"] += 1
        try:
            with np.errstate(all="ignore"):
                worst = max(
                    worst, check(case, gradients=number % 3 == 0, repeated=number % 5 == 0, thorough=number % 4 == 0)
                )
            continue
        except Failure as found:
            failure = found
        except AssertionError:
            print(f"case {number} of seed {seed}: {case.to_json() if len(case.weights) < 200 else case}", flush=True)
            raise
        except Exception as error:  # any error of the package is a failure
            failure = Failure(type(error).__name__, str(error))
        counts[f"FAILURE {failure.args[0]}"] += 1
        counts["failures"] += 1
        seen[failure.args[0]] += 1
        if seen[failure.args[0]] <= 3:
            again = fails(case) if small else None
            report(seed, number, case, failure, shrink(case, again.args[0]) if again else None, long)
        if counts["failures"] >= most_failures:
            break
    return counts, worst


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--most-failures", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--long", action="store_true", help="33 to 700 units, T up to 5,000")
    parser.add_argument("--no-shrink", action="store_true", help="report failures as they are")
    parser.add_argument("--replay", help="a case as JSON, as a failure prints it")
    parser.add_argument("--diary", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.replay:
        failure = fails(Case.from_json(given.replay))
        print("; ".join(map(str, failure.args)) if failure else "passes")
        return 1 if failure else 0
    if given.diary is not None:
        started = time.monotonic()
        with open(given.diary, "r+b", buffering=0) as file:

            def say(number):
                file.seek(0)
                file.write(b"%12d" % number)

            counts, worst = run(
                *(given.seed, given.first, given.first + given.cases, given.seconds, say, given.most_failures),
                small=not given.no_shrink,
                long=given.long,
            )
        for name, count in sorted(counts.items()):
            print(f"{name:40} {count}")
        print(
            f"{counts['cases']} cases, seed {given.seed}, from {given.first}: {counts['failures']} failures, largest "
            f"error {worst:.2f} of what is allowed, {time.monotonic() - started:.0f} s"
        )
        return 1 if counts["failures"] else 0
    with tempfile.NamedTemporaryFile() as diary:
        command = [sys.executable, __file__, "--diary", diary.name, *(sys.argv[1:] if arguments is None else arguments)]
        code = subprocess.run(command, env={**os.environ, "PYTHONFAULTHANDLER": "1"}).returncode
        if code not in (0, 1):
            print(f"the process ended with {code} in case {Path(diary.name).read_text().strip()}")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
