"""Hostile arguments for every op and for the public API: python tests/fuzz.py --cases 100000 [--seed S].

A case starts from good arguments and spoils up to three of them. It must end in a result that equals the oracle's, or
in a TypeError, ValueError, RuntimeError, MemoryError or FloatingPointError whose text is a sentence; only harmless
changes (strides, offsets, negation bits) must end in a result. Arguments are unchanged unless the op says that it
writes to them, and after a refusal in any case. Cases run in a child process, which tells each before it runs it: a
crash names its case.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

import pathrnn_kernels as pk
from pathrnn_kernels import ops, reference

sys.path.insert(0, str(Path(__file__).parent))
import oracles
import tolerances

NAN, INF = math.nan, math.inf
HUGE = 2**40  # of numbers: no machine has that much memory, and none must try
REFUSALS = (TypeError, ValueError, RuntimeError, MemoryError, FloatingPointError)
#: No part of a sentence.
NOISE = ("INTERNAL ASSERT", "report a bug", "std::", "_M_", "enforce fail", "basic_string")


class Failure(Exception):
    """What a case must not do."""


class Impossible(Exception):
    """The contract does not cover these arguments."""


# ---- arguments ------------------------------------------------------------------------------------------------------


def tensor(rng, *shape, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)), dtype=torch.float64)
    return (values / max(1, shape[-1] if shape else 1) ** 0.5).to(dtype)


def _offset(rng, t):
    storage = torch.full((t.numel() + 5,), NAN, dtype=t.dtype)
    storage[3 : 3 + t.numel()] = t.reshape(-1)
    return storage[3 : 3 + t.numel()].view(t.shape)


def _strided(rng, t):
    wide = torch.full((*t.shape, 3), NAN, dtype=t.dtype)
    wide[..., 1] = t
    return wide[..., 1]


def _permuted(rng, t):
    order = rng.sample(range(t.dim()), t.dim())
    back = [order.index(i) for i in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def _expanded(rng, t):
    if not t.numel() or not t.dim():
        return t
    return t.narrow(rng.randrange(t.dim()), 0, 1).expand_as(t)


#: Other values or layouts, as valid as before: (rng, dense tensor) → tensor.
HARMLESS = {
    "offset": _offset,
    "strided": _strided,
    "permuted": _permuted,
    "expanded": _expanded,
    "negated": lambda rng, t: torch._neg_view(-t),
    "reversed": lambda rng, t: t.flip(list(range(t.dim()))),
    "zero": lambda rng, t: torch.zeros_like(t),
    "parameter": lambda rng, t: nn.Parameter(t.clone()),
}


def _spoiled(value):
    def spoil(rng, t):
        result = t.clone()
        if t.numel():
            result.view(-1)[rng.randrange(t.numel())] = value
        return result

    return spoil


def _resized(rng, t):
    shape = list(t.shape)
    if not shape or rng.random() < 0.3:
        shape.insert(rng.randint(0, len(shape)), rng.choice((0, 1, 2)))
    elif rng.random() < 0.3:
        shape.pop(rng.randrange(len(shape)))
    else:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 5, 9))
    return tensor(rng, *shape).to(t.dtype)


def _huge(rng, t):
    shape = list(t.shape) or [1]
    shape[rng.randrange(len(shape))] = HUGE
    return t.new_ones(()).expand(shape)


def _overlapping(rng, t):
    storage = tensor(rng, t.numel() + 1).to(t.dtype)
    return storage.as_strided(t.shape, [1] * t.dim())


HOSTILE = {
    **{f"with {value}": _spoiled(value) for value in (NAN, INF, -INF, 1e-42, -0.0, 3e38)},
    **{
        str(dtype)[6:]: lambda rng, t, dtype=dtype: t.to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.bool,
            torch.complex64,
        )
    },
    "resized": _resized,
    "huge": _huge,
    "overlapping": _overlapping,
    "meta": lambda rng, t: t.to("meta"),
    "sparse": lambda rng, t: t.to_sparse() if t.dim() else t.to("meta"),
    "csr": lambda rng, t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda rng, t: t.to_mkldnn() if t.dtype == torch.float32 and t.numel() else t.to("meta"),
    "quantised": lambda rng, t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "conjugated": lambda rng, t: t.to(torch.complex64).conj(),
}

#: In the place of anything.
OBJECTS = (
    *(None, True, False, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 1.5, -0.0, NAN, INF, 1e400, 1e-320),
    *("", "3", "auto", "cpu", "κ", b"x", (), [], {}, [None], [1.5, "x"], {"x": 1}, object(), int, len),
    *(torch.tensor(2), torch.tensor(2.5), torch.ones(0), [torch.ones(1)], nn.Linear(1, 1)),
)


def spoil(rng, value, harmful=()):
    """Another value in an argument's place, what it is, and whether it is as good as the old one."""
    if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and rng.random() < 0.9:
        plain = value.detach()
        dense = plain.layout == torch.strided and plain.device.type == "cpu" and plain.numel() <= 10**6
        if dense and rng.random() < 0.4 and plain.is_floating_point() and not plain.is_neg():
            name, make = rng.choice(list(HARMLESS.items()))
            return make(rng, plain), name, name not in harmful
        name, make = rng.choice(list(HOSTILE.items()))
        # torch writes to overlapping memory, but for strides of 0, without a word.
        if dense and not plain.is_quantized and not (name == "overlapping" and harmful):
            try:
                return make(rng, plain), name, False
            except RuntimeError:  # torch has no such tensor of these values
                pass
    if isinstance(value, list) and value and rng.random() < 0.8:
        at, result = rng.randrange(len(value)), list(value)
        if rng.random() < 0.3:
            change = rng.choice(("short", "long"))
            return (result[:-1] if change == "short" else [*result, result[at]]), change, False
        result[at], name, harmless = spoil(rng, value[at], harmful)
        return result, f"[{at}] {name}", harmless
    made = rng.choice(OBJECTS)
    return made, f"= {_short(made)}", False


def _short(value):
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)} {value.device.type} {str(value.layout)[6:]}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)[:60]


# ---- what is called, and the truth ----------------------------------------------------------------------------------


def wide(value):
    """As plain float64, where the contract covers it."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [wide(v) for v in value]
    require(isinstance(value, Tensor))
    require(value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized)
    require(value.is_floating_point() and value.numel() <= 10**6)
    return value.detach().resolve_neg().double()


def require(condition):
    if not condition:
        raise Impossible


def one_dtype(*values):
    found = {v.dtype for v in values if isinstance(v, Tensor)}
    require(len(found) == 1)
    dtype = found.pop()
    require(dtype.is_floating_point)
    return dtype


def close(name, found, expected, rtol, atol=0.0):
    """Entries agree; where the truth is not finite, the result is not either."""
    if found.device.type == "meta":
        return
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        raise Failure(f"{name} has shape {list(found.shape)}; the oracle has {list(expected.shape)}")
    good = expected.isfinite()
    wrong = torch.where(good, ~((found - expected).abs() <= atol + rtol * expected.abs()), found.isfinite())
    if wrong.any():
        raise Failure(f"{name} is {found[wrong][:3].tolist()}; the oracle has {expected[wrong][:3].tolist()}")


def near(name, found, expected, dtype, seq_len, batch, size):
    """Agreement relative to the largest entry, in which float32 must not have overflowed."""
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    if largest < 1e30 or dtype == torch.float64:
        close(name, found, expected, 0.0, tolerances.rnn(dtype, seq_len, batch, size) * max(largest, 1.0))


def operator(name):
    return getattr(torch.ops.pathrnn, name).default


def complete(op, arguments):
    """With something harmless for arguments that are younger than this file."""
    result = dict(arguments)
    for argument in op._schema.arguments:
        if argument.name not in result and not argument.has_default_value():
            kind = str(argument.type)
            result[argument.name] = [] if kind.startswith("List") else False if kind == "bool" else None
    return result


def call_op(name, arguments):
    op = operator(name)
    return op(**complete(op, arguments))


def recur(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):
    require(x.dim() == 3 and weight_hh.dim() == 2 and min(x.shape) > 0 and len(weight_hh) > 0)
    hidden = len(weight_hh)
    require(weight_ih.shape == (hidden, x.shape[2]) and weight_hh.shape == (hidden, hidden))
    require((bias_ih is None) == (bias_hh is None))
    require(bias_ih is None or bias_ih.shape == bias_hh.shape == (hidden,))
    require(h_0 is None or h_0.shape == (x.shape[1], hidden))
    h, rows = h_0, []
    for step in x:
        z = step @ weight_ih.T
        if bias_ih is not None:
            z = z + bias_ih + bias_hh
        if h is not None:
            z = z + h @ weight_hh.T
        h = torch.where(z <= 0, 0.0, z)  # a nan passes through
        rows.append(h)
    return torch.stack(rows)


RNN = ("x", "h_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


def rnn_arguments(rng):
    seq_len, batch, size, hidden = (rng.randint(1, n) for n in (4, 5, 4, 20))
    dtype = rng.choice((torch.float32, torch.float64))
    bias = rng.random() < 0.5
    shapes = ((seq_len, batch, size), (batch, hidden), (hidden, size), (hidden, hidden), (hidden,), (hidden,))
    given = (True, rng.random() < 0.5, True, True, bias, bias)
    return {
        name: tensor(rng, *shape, dtype=dtype) if wanted else None
        for name, shape, wanted in zip(RNN, shapes, given, strict=True)
    }


def check_rnn(a, found):
    y, h_n = found[:2]
    dtype = one_dtype(*(a[name] for name in RNN))
    expected = recur(*(wide(a[name]) for name in RNN))
    sizes = (*expected.shape[:2], max(expected.shape[2], a["x"].shape[2]))
    near("y", y, expected, dtype, *sizes)
    near("h_n", h_n, expected[-1], dtype, *sizes)


def backward_arguments(rng):
    result = rnn_arguments(rng)
    with torch.no_grad():
        y = recur(*result.values())
    result |= {
        "y": y,
        "grad_y": tensor(rng, *y.shape, dtype=y.dtype) if rng.random() < 0.8 else None,
        "grad_h_n": tensor(rng, *y.shape[1:], dtype=y.dtype) if rng.random() < 0.5 else None,
        "needs": [rng.random() < 0.7 for _ in range(5)],
    }
    return result


def check_backward(a, found):
    dtype = one_dtype(*(a[name] for name in (*RNN, "y", "grad_y", "grad_h_n")))
    x, h_0, weight_ih, weight_hh, *_ = (wide(a[name]) for name in RNN)
    y, grad_y, grad_h_n = (wide(a[name]) for name in ("y", "grad_y", "grad_h_n"))
    recur(*(wide(a[name]) for name in RNN))
    y = torch.where(y.abs() < torch.finfo(dtype).tiny, 0.0, y)  # denormal numbers count as zero
    hidden, needs = len(weight_hh), a["needs"]
    require(isinstance(needs, list) and len(needs) == 5)
    require(y.shape == (*x.shape[:2], hidden))
    require(grad_y is None or grad_y.shape == y.shape)
    require(grad_h_n is None or grad_h_n.shape == y.shape[1:])
    after, rows = torch.zeros_like(y[0]) if grad_h_n is None else grad_h_n, []
    for t in reversed(range(len(y))):
        incoming = after if t == len(y) - 1 else after @ weight_hh
        after = torch.where(y[t] <= 0, 0.0, incoming if grad_y is None else incoming + grad_y[t])
        rows.append(after)
    delta = torch.stack(rows[::-1])
    before = y[:-1] if h_0 is None else torch.cat([h_0[None], y[:-1]])
    used = delta[1:] if h_0 is None else delta
    expected = (
        delta @ weight_ih,
        delta[0] @ weight_hh,
        torch.einsum("tbj,tbk->jk", delta, x),
        torch.einsum("tbj,tbk->jk", used, before),
        delta.sum((0, 1)),
    )
    sizes = (*y.shape[:2], max(hidden, x.shape[2]))
    for i, (result, truth, need) in enumerate(zip(found, expected, needs, strict=True)):
        if need:
            # Entries are sums of products of inputs that may be large: relative to those.
            near(f"gradient {i}", result, truth, dtype, *sizes)
        elif result.numel():
            raise Failure(f"gradient {i} was not asked for and has shape {list(result.shape)}")


CHAIN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "head_weight", "head_bias", "embedding_weight")


def chain_arguments(rng):
    layers, hidden, size = rng.randint(1, 2), rng.randint(1, 6), rng.randint(1, 3)
    dtype = rng.choice((torch.float32, torch.float64))
    bias, head, embedding = (rng.random() < 0.5 for _ in range(3))
    outputs, factor = rng.randint(1, 3), rng.choice((0.0, 0.0, 1.0, 4.0))
    kappa1 = rng.random() < 0.8

    def make(*shape):
        return tensor(rng, *shape, dtype=dtype)

    return {
        "weight_ih": [make(hidden, hidden if i else size) for i in range(layers)],
        "weight_hh": [make(hidden, hidden) for _ in range(layers)],
        "bias_ih": [make(hidden) for _ in range(layers)] if bias else [],
        "bias_hh": [make(hidden) for _ in range(layers)] if bias else [],
        "head_weight": make(outputs, hidden) if head else None,
        "head_bias": make(outputs) if head and rng.random() < 0.5 else None,
        "embedding_weight": make(rng.randint(1, 3), size) if embedding else None,
        "seq_len": rng.randint(1, 7),
        "last_only": rng.random() < 0.5,
        "ones_h0": rng.random() < 0.5,
        "kappa1": kappa1,
        "second_factor": factor if kappa1 else 0.0,
        "rtol": rng.choice((0.0, 1e-5, 0.5)),
        "first_lags": [rng.randint(0, 9) for _ in range(layers)] if rng.random() < 0.3 else [],
        "workspace_bytes": rng.choice((0, 1 << 12, 1 << 24, 2**62)),
    }


def named(a):
    """reference.py's parameters, in float64."""
    result = {}
    for name in CHAIN:
        value = wide(a[name])
        if isinstance(value, list):
            require(name.startswith("weight") or len(value) in (0, len(a["weight_hh"])))
            result |= {f"rnn.{name}_l{i}": v for i, v in enumerate(value)}
        elif value is not None:
            result[name.replace("_", ".")] = value
    return result


def check_chain(a, found):
    one_dtype(*(v for name in CHAIN for v in (a[name] if isinstance(a[name], list) else [a[name]])))
    parameters, seq_len = named(a), a["seq_len"]
    if isinstance(seq_len, Tensor):
        seq_len = int(seq_len.item().real)  # as torch does
    require(isinstance(seq_len, int) and 1 <= seq_len < 100 and all(p.isfinite().all() for p in parameters.values()))
    require(all(p.numel() for p in parameters.values()) and len(a["weight_hh"]) > 0)
    check_kappas(parameters, seq_len, bool(a["last_only"]), bool(a["ones_h0"]), a["second_factor"], a["rtol"], found)


def check_kappas(parameters, seq_len, last_only, ones_h0, factor, rtol, found):
    chain = ops.PathChain._make(found)
    factors, log_norm, lags, bounds = chain.kappa, chain.log_path_norm, chain.lags, chain.bounds
    if log_norm.device.type == "meta":
        return
    options = ("last" if last_only else "all", "ones" if ones_h0 else "zeros")
    size = max(p.shape[-1] for p in parameters.values())
    dtype = factors[0].dtype if factors else torch.float32
    tolerance = tolerances.path(dtype, seq_len, size) + (rtol if factor else 0.0)
    truth = reference.path_norm(parameters, seq_len, *options).log()
    close("log γ²", log_norm, truth, tolerances.path(torch.float32, seq_len, size), tolerance)
    if not (bounds <= max(rtol, 0)).all() or not (lags <= seq_len - 1).all():
        raise Failure(f"bounds are {bounds.tolist()} and lags {lags.tolist()} with rtol={rtol}, seq_len={seq_len}")
    if not factors:
        return
    expected = reference.kappa1(parameters, seq_len, *options)
    if factor:
        for name, term in reference.kappa2(parameters, seq_len, *options).items():
            expected[name] = expected[name] + term * (factor / 4)
    kinds = ("weight_ih", "weight_hh", "bias_ih")
    order = [f"rnn.{kind}_l{i}" for i in range(len(lags)) for kind in kinds]
    order = [name for name in (*order, "head.weight", "head.bias", "embedding.weight") if name in expected]
    for name, true in zip(order, oracles.values(chain, head="head.weight" in expected), strict=True):
        close(f"κ({name})", true.expand_as(expected[name]), expected[name], tolerance)


STRUCTURE = ("chains", "bidirectional", "bias", "head", "head_bias", "embedding")
FOUND = ("kappas", "exponents", "unit_exponents", "entry_exponents", "log_path_norm")


def update_arguments(rng):
    """A network's weights with its κ, as path_chain gives it."""
    a = chain_arguments(rng) | {"kappa1": True, "second_factor": 0.0}
    if a["head_weight"] is None:
        a["head_weight"] = tensor(rng, 3, len(a["weight_hh"][0]), dtype=a["weight_hh"][0].dtype)
    found = call_op("path_chain", a)
    weights = [t for kinds in zip(*(a[name] for name in CHAIN[:4] if a[name]), strict=True) for t in kinds]
    weights += [t for t in (a[name] for name in CHAIN[4:]) if t is not None]
    given = (len(a["weight_hh"]), False, bool(a["bias_ih"]), True, *(a[name] is not None for name in CHAIN[5:]))
    return {"weights": weights, **dict(zip(STRUCTURE, given, strict=True)), **dict(zip(FOUND, found, strict=False))}


def dense(a):
    """κ of every weight, float64, from the op's arguments."""
    scalar = isinstance(a["chains"], Tensor) and a["chains"].numel() == 1 and not a["chains"].is_complex()
    require((isinstance(a["chains"], int) or scalar) and not takes_more("", a))  # torch takes such tensors for an int
    require(all(isinstance(a[name], list) for name in ("weights", "kappas", "entry_exponents")))
    places, count = [], int(a["chains"])
    per_chain = 3 if a["bias"] else 2
    for c in range(count):
        places += [per_chain * c + min(kind, 2) for kind in range(4 if a["bias"] else 2)]
    places += range(per_chain * count, per_chain * count + sum(bool(a[name]) for name in STRUCTURE[3:]))
    require(len(places) == len(a["weights"]) and len(a["kappas"]) == max(places) + 1)
    result, units = [], a["unit_exponents"]
    for i, (place, w) in enumerate(zip(places, a["weights"], strict=True)):
        chain, kind = divmod(i, 4 if a["bias"] else 2)
        exponents, kappa = a["exponents"][place], wide(a["kappas"][place])
        if chain < count:
            exponents = exponents - (units[chain][:, None] if kind < 2 else units[chain])
            if kind == 1 or (kind == 0 and chain > 0):
                exponents = exponents + units[chain - (kind == 0)]
        elif a["head"] and i == (4 if a["bias"] else 2) * count:
            exponents = exponents + units[-1]
        if a["entry_exponents"] and a["entry_exponents"][place].numel():
            exponents = exponents + a["entry_exponents"][place]
        result.append(torch.ldexp(kappa, exponents.expand(torch.broadcast_shapes(exponents.shape, kappa.shape))))
        require(torch.broadcast_shapes(result[-1].shape, w.shape) == w.shape)
    return result


def within(*tensors):
    """Far from both ends of float32."""
    return functools.reduce(torch.logical_and, (((x == 0) | (x.abs() > 1e-30)) & ~(x.abs() > 1e30) for x in tensors))


def norm_arguments(rng):
    a = update_arguments(rng)
    return {**a, "grad": tensor(rng, dtype=a["weights"][0].dtype), "logarithm": False}


def check_norm(a, found):
    kappas, grad = dense(a), a["grad"]
    require(isinstance(grad, Tensor) and grad.numel() == 1)
    share = math.exp(-a["log_path_norm"].item()) if a["logarithm"] else 1.0
    for w, kappa, result in zip(a["weights"], kappas, found, strict=True):
        expected = torch.where(w == 0, 0.0, 2.0 * grad.item() * wide(w) * kappa * share)
        usual = within(expected, kappa.expand_as(expected))
        if result.device.type != "meta":
            close("2 p κ", result[usual], expected[usual], 64 * tolerances.unit_roundoff(w.dtype))


def step_arguments(rng):
    a = update_arguments(rng)
    rule = rng.choice(("sgd", "given", "coordinates"))
    numbers = {
        "sgd": [0.5, 0.0, 0.0, 0.0, 0.0],
        "given": [],
        "coordinates": [0.1, 0.9, 0.99, 2.0, 1e-8, 0.0, 1.0, 0.0, 0.1],
    }
    gradients, first, second = ([tensor(rng, *w.shape, dtype=w.dtype) for w in a["weights"]] for _ in range(3))
    nothing = {"first": [], "second": [], "counts": [], "constant": None, "rates": []}
    if rule == "coordinates":
        counts = [torch.zeros(()) for _ in gradients]
        nothing |= {"first": first, "second": [s.square() for s in second], "counts": counts}
    options = {"scale": 0, "eps": 0.0, "radius": 1.0 if rule == "given" else 0.0, "grad_scale": None, "found_inf": None}
    return {**a, "gradients": gradients, **nothing, "numbers": numbers[rule], "rule": rule, **options}


def call_step(**a):
    before = [w.detach().clone() if plain(w) else None for w in a["weights"]]
    status = call_op("path_update_", a)
    if status and not all(b is None or same(b, w) for b, w in zip(before, a["weights"], strict=True)):
        raise Failure(f"status {status}, and a weight has changed")
    return status, [w.detach().clone() for w in a["weights"]]


def check_step(a, found):
    kappas, (status, after) = dense(a), found
    radius = float(a["radius"])  # of a tensor, too
    default = {"rates": [], "scale": 0, "eps": 0.0, "grad_scale": None, "found_inf": None}
    usual_call = all(a[name] == value for name, value in default.items()) and all(g is not None for g in a["gradients"])
    if status or not usual_call or not all(w.isfinite().all() for w in [*a["weights"], *a["gradients"], *kappas]):
        return
    weights, gradients = ([wide(t) for t in a[name]] for name in ("weights", "gradients"))
    if a["rule"] == "coordinates":  # tests/test_engine.py
        return
    if a["rule"] == "sgd":
        steps = [torch.where(k == 0, 0.0, -a["numbers"][0] * g / k) for g, k in zip(gradients, kappas, strict=True)]
        if a["numbers"][1:] != [0.0] * 4 or radius != 0:
            return
    else:
        steps = [g - w for g, w in zip(gradients, weights, strict=True)]
        squares = sum((k * d * d).sum().item() for k, d in zip(kappas, steps, strict=True))
        norm = math.exp(min(a["log_path_norm"].item(), 700))
        if not 1e-30 < squares < 1e30 or not 1e-30 < norm < 1e30:
            return
        share = min(1.0, radius * math.sqrt(norm / squares)) if radius > 0 else 1.0
        steps = [share * d for d in steps]
    for p, w, d in zip(after, weights, steps, strict=True):
        size = w.abs() + d.abs()
        usual = within(size)
        error = 64 * tolerances.unit_roundoff(p.dtype) * size[usual]
        if ((p.double() - w - d)[usual].abs() > error).any():
            raise Failure(f"a weight is {p.tolist()}; the oracle has {(w + d).tolist()}")


# ---- the public API -------------------------------------------------------------------------------------------------


def network(rng, spoiled=False):
    hidden, size, dtype = rng.randint(1, 4), rng.randint(1, 3), rng.choice((torch.float32, torch.float64))
    torch.manual_seed(rng.getrandbits(32))
    return pk.PathNetwork(
        pk.ReLURNN(size, hidden, rng.randint(1, 2), rng.random() < 0.5, dtype=dtype),
        nn.Linear(hidden, 2, rng.random() < 0.5, dtype=dtype) if rng.random() < 0.5 else None,
        nn.Embedding(3, size, dtype=dtype) if rng.random() < 0.3 else None,
        rng.choice(("all", "last")),
        rng.choice(("zeros", "ones")),
    )


class Spoiled:
    """A module whose parameters are arguments, so that they can be spoiled: set before the call by ``.data``."""

    @staticmethod
    def set(module, values):
        for name, p in module.named_parameters():
            if values[name] is not p and values[name] is not None:
                p.data = values[name].detach() if isinstance(values[name], Tensor) else values[name]


def api_arguments(*options):
    def make(rng):
        net = network(rng)
        arguments = {name: p.detach().clone() for name, p in net.named_parameters()}
        arguments |= {name: values(rng) if callable(values) else values for name, values in options}
        return {**arguments, "net": net}

    return make


def with_weights(call):
    def run(**arguments):
        net = arguments.pop("net")
        if isinstance(net, pk.PathNetwork):
            own = [name for name, _ in net.named_parameters()]
            Spoiled.set(net, {name: arguments.pop(name) for name in own})
            return call(net, **arguments)
        return call(net, **{k: v for k, v in arguments.items() if "." not in k})

    return run


def check_api(a, kappa=None, norm=None):
    net, seq_len = a["net"], a["seq_len"]
    require(isinstance(net, pk.PathNetwork))
    parameters = {name: wide(p) for name, p in net.named_parameters()}
    require(isinstance(seq_len, int) and 1 <= seq_len < 100 and all(p.isfinite().all() for p in parameters.values()))
    dtype = one_dtype(*(p.detach() for p in net.parameters()))
    options = (net.outputs, net.h0)
    size = max(p.shape[-1] for p in parameters.values())
    tolerance = tolerances.path(dtype, seq_len, size)
    truth = reference.path_norm(parameters, seq_len, *options)
    if norm is not None:
        usual = 1e-30 < truth.item() < 1e30 or dtype == torch.float64
        rounding = 4 * abs(truth.clamp(min=1e-300).log().item()) * 2**-52  # of the logarithm, which γ² is made from
        close("γ²", norm, truth, tolerance + rounding) if usual else None
        return
    if any((p.abs() > 1e10).any() for p in parameters.values()):
        return  # beside paths 1e300 times above them, small entries are lost, as pathrnn_kernels/README.md says
    if a.get("second_term"):
        tolerance += max(float(a["rtol"]), 0.0)
    expected = reference.kappa(parameters, seq_len, *options, bool(a["second_term"]), a["kappa2"])
    for name, value in expected.items():
        usual = within(value) | (value > 1e30 if dtype == torch.float64 else torch.zeros_like(value, dtype=torch.bool))
        close(f"κ({name})", kappa.dense(name)[usual], value[usual], tolerance)
    if not kappa.bound <= a["rtol"]:
        raise Failure(f"the bound is {kappa.bound}, with rtol={a['rtol']}")


def module_arguments(rng):
    batch_first, layers, unbatched = rng.random() < 0.3, rng.randint(1, 2), rng.random() < 0.2
    seq_len, batch, size, hidden = (rng.randint(1, n) for n in (4, 3, 3, 5))
    dtype = rng.choice((torch.float32, torch.float64))
    torch.manual_seed(rng.getrandbits(32))
    module = pk.ReLURNN(size, hidden, layers, rng.random() < 0.5, batch_first, dtype=dtype)
    x = (seq_len, size) if unbatched else (batch, seq_len, size) if batch_first else (seq_len, batch, size)
    h_0 = (layers, hidden) if unbatched else (layers, batch, hidden)
    result = {name: p.detach().clone() for name, p in module.named_parameters()}
    result |= {"module": module, "x": tensor(rng, *x, dtype=dtype)}
    return {**result, "h_0": tensor(rng, *h_0, dtype=dtype) if rng.random() < 0.5 else None}


def call_module(**a):
    module = a["module"]
    require(isinstance(module, pk.ReLURNN))
    Spoiled.set(module, {name: a[name] for name, _ in module.named_parameters()})
    return module(a["x"], a["h_0"])


def check_module(a, found):
    module, x, h_0 = a["module"], a["x"], a["h_0"]
    require(isinstance(module, pk.ReLURNN) and isinstance(x, Tensor))
    dtype = one_dtype(x, h_0, *(p.detach() for p in module.parameters()))
    if any((p.abs() > 1e10).any() for p in module.parameters()):
        return  # what cancels leaves errors that are not small beside the result
    rows, state = wide(x), wide(h_0)
    if rows.dim() == 2:
        rows, state = rows[:, None], None if state is None else state[:, None]
    elif module.batch_first:
        rows = rows.transpose(0, 1)
    finals = []
    for i in range(module.num_layers):
        weights = [wide(t) for t in module._layer(i, "")]
        rows = recur(rows, None if state is None else state[i], *weights)
        finals.append(rows[-1])
    h_n = torch.stack(finals)
    sizes = (*rows.shape[:2], max(module.hidden_size, module.input_size))
    if x.dim() == 2:
        rows, h_n = rows[:, 0], h_n[:, 0]
    elif module.batch_first:
        rows = rows.transpose(0, 1)
    near("y", found[0], rows, dtype, *sizes)
    near("h_n", found[1], h_n, dtype, *sizes)


def constructor_arguments(rng):
    return {
        **{"input_size": rng.randint(1, 3), "hidden_size": rng.randint(1, 3), "num_layers": 1, "bias": True},
        **{"batch_first": False, "dropout": 0.0, "bidirectional": False, "device": None, "dtype": None},
    }


def call_constructor(**a):
    # Sizes that this machine may have memory for are not for a test to fill.
    require(not any(isinstance(a[name], int) and 2**20 < a[name] < HUGE for name in ("input_size", "hidden_size")))
    return pk.ReLURNN(**a)


def check_constructor(a, found):
    truth = nn.RNN(nonlinearity="relu", **a)
    if {k: v.shape for k, v in found.state_dict().items()} != {k: v.shape for k, v in truth.state_dict().items()}:
        raise Failure("parameters differ from those of nn.RNN")


def network_arguments(rng):
    net = network(rng)
    return {name: getattr(net, name) for name in ("rnn", "head", "embedding", "outputs", "h0")}


def optimizer_arguments(rng):
    result = api_arguments()(rng)
    for name, p in result["net"].named_parameters():
        result[f"grad of {name}"] = tensor(rng, *p.shape, dtype=p.dtype)
    return {**result, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "second_term": rng.random() < 0.3,
            "scale": rng.choice(("none", "path_norm")), "eps": 0.0, "trust_radius": None, "update_every": 1,
            "seq_len": rng.randint(2, 5), "rtol": 1e-3}  # fmt: skip


def call_optimizer(**a):
    net = a.pop("net")
    require(isinstance(net, pk.PathNetwork))
    Spoiled.set(net, {name: a.pop(name) for name, _ in net.named_parameters()})
    gradients = {name: a.pop(f"grad of {name}") for name, _ in net.named_parameters()}
    optimizer = pk.PathSGD(net, **a)
    for name, p in net.named_parameters():
        p.grad = gradients[name]
    before = {name: copy(p) for name, p in net.named_parameters()}
    try:
        optimizer.step()
    except REFUSALS as error:
        for name, p in net.named_parameters():
            if not unchanged(p, before[name]):
                raise Failure(f"{name} has changed in a refused step") from error
        raise
    return before


def check_optimizer(a, before):
    net, plain = a["net"], (a["momentum"], a["weight_decay"], a["eps"], a["trust_radius"]) == (0, 0, 0, None)
    parameters = {name: wide(p) for name, p in before.items()}
    require(all(p.isfinite().all() for p in parameters.values()))
    gradients = {name: wide(a[f"grad of {name}"]) for name in parameters}
    if not plain or any(g is not None and not g.isfinite().all() for g in gradients.values()):
        return
    options, seq_len = (net.outputs, net.h0), a["seq_len"]
    require(isinstance(seq_len, int) and 1 <= seq_len < 100)
    kappa = reference.kappa(parameters, seq_len, *options, bool(a["second_term"]))
    norm = reference.path_norm(parameters, seq_len, *options) if a["scale"] == "path_norm" else 1.0
    dtype = one_dtype(*before.values())
    tolerance = 8 * tolerances.path(dtype, seq_len, 4) + (a["rtol"] if a["second_term"] else 0.0)
    for name, p in net.named_parameters():
        if gradients[name] is None:
            continue
        delta = torch.where(kappa[name] == 0, 0.0, norm * gradients[name] / kappa[name]) * a["lr"]
        usual = within(kappa[name]) & within(delta)
        size = delta.abs() * tolerance + parameters[name].abs() * tolerances.unit_roundoff(dtype) * 8
        found = p.detach().double() - (parameters[name] - delta)
        if (found.abs() > size + 1e-35)[usual].any():
            raise Failure(f"the step of {name} is wrong by {found.abs().max().item():.3g}")


def rescale_arguments(rng):
    result = api_arguments()(rng)
    net = result["net"]
    dtype = next(net.parameters()).dtype
    result["alphas"] = [tensor(rng, net.hidden_size, dtype=dtype).exp() for _ in range(net.num_layers)]
    if net.head is None:
        result["alphas"][-1] = torch.ones(net.hidden_size, dtype=dtype)
    return result


def module_like(net):
    """A network of the sizes that ``net`` was made with."""
    rnn, head, embedding = net.rnn, net.head, net.embedding
    return pk.PathNetwork(
        pk.ReLURNN(rnn.input_size, rnn.hidden_size, rnn.num_layers, rnn.bias),
        None if head is None else nn.Linear(head.in_features, head.out_features, head.bias is not None),
        None if embedding is None else nn.Embedding(embedding.num_embeddings, embedding.embedding_dim),
    )


def call_rescale(net, alphas):
    require(isinstance(net, pk.PathNetwork) and all(p.numel() < 10**6 for p in net.parameters()))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    try:
        pk.rescale.node_rescale_(net, alphas)
    except REFUSALS as error:
        for name, p in net.named_parameters():
            if not same(p.detach(), before[name]):
                raise Failure(f"{name} has changed in a refused rescaling") from error
        raise
    return before


def check_rescale(a, before):
    net = a["net"]
    after = {name: wide(p) for name, p in net.named_parameters()}
    parameters = {name: wide(p) for name, p in before.items()}
    alphas = [alpha.double() for alpha in a["alphas"]]
    if net.h0 == "ones" or any(not ((t > 1e-6) & (t < 1e6)).all() for t in alphas):
        return
    if any(parameters[name].shape != p.shape for name, p in module_like(net).named_parameters()):
        return  # nobody has looked at these shapes yet
    norms = [reference.path_norm(p, 3, net.outputs, net.h0) for p in (parameters, after)]
    if all(p.isfinite().all() and (p.abs() < 1e6).all() for p in parameters.values()):
        close("γ²", norms[1], norms[0], 8 * tolerances.path(next(net.parameters()).dtype, 3, 4), 1e-30)


OPS = {
    "relu_rnn": (rnn_arguments, check_rnn),
    "relu_rnn_backward": (backward_arguments, check_backward),
    "path_chain": (chain_arguments, check_chain),
    "path_norm_gradients": (norm_arguments, check_norm),
}


def writes(target, name):
    """Whether the target writes to that argument."""
    if target == "path_update_":
        return name in ("weights", "first", "second", "counts", "constant")
    return target in ("PathSGD.step", "node_rescale_") and "." in name and not name.startswith("grad of")


def harmful(target, name):
    """What of HARMLESS is not so for that argument: torch writes to no such tensor, alphas must be positive."""
    if writes(target, name):
        return ("expanded", "negated", "parameter", *(["zero"] if target == "PathSGD.step" else []))
    # Without a path there is no gradient, and those of a step are made up.
    return ("zero",) if name == "alphas" or target == "PathSGD.step" else ()


KAPPA = (
    ("seq_len", lambda rng: rng.randint(1, 6)),
    ("second_term", lambda rng: rng.random() < 0.5),
    ("kappa2", lambda rng: rng.choice(("exact", "lemma1", "theorem3"))),
    ("rtol", lambda rng: rng.choice((0.0, 1e-5, 0.1))),
    ("backend", "auto"),
    ("lags", None),
    ("workspace_bytes", lambda rng: rng.choice((None, 0, 2**62))),
    ("plan", "auto"),
)
NORM = (("seq_len", lambda rng: rng.randint(1, 6)), ("backend", "auto"))
#: name → (arguments, call, check).
TARGETS = {
    **{name: (make, lambda name=name, **a: call_op(name, a), check) for name, (make, check) in OPS.items()},
    "path_update_": (step_arguments, call_step, check_step),
    "ReLURNN()": (constructor_arguments, call_constructor, check_constructor),
    "ReLURNN.forward": (module_arguments, call_module, check_module),
    "PathNetwork()": (network_arguments, pk.PathNetwork, lambda a, found: found.check_parameters()),
    "kappa": (api_arguments(*KAPPA), with_weights(pk.kappa), lambda a, found: check_api(a, kappa=found)),
    "path_norm": (api_arguments(*NORM), with_weights(pk.path_norm), lambda a, found: check_api(a, norm=found)),
    "log_path_norm": (
        api_arguments(*NORM),
        with_weights(pk.log_path_norm),
        lambda a, found: check_api(a, norm=found.exp()),
    ),
    "PathSGD.step": (optimizer_arguments, call_optimizer, check_optimizer),
    "node_rescale_": (rescale_arguments, with_weights(call_rescale), check_rescale),
}


# ---- a case ---------------------------------------------------------------------------------------------------------


def same(a, b):
    """Bit for bit, but for the bits of a nan."""
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a, 7.5), torch.nan_to_num(b, 7.5))


def plain(value):
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not (
        value.is_quantized or value.is_complex() or value.numel() > 10**6
    )  # fmt: skip


def copy(value):
    """What can be compared after the call."""
    if isinstance(value, list):
        return [copy(v) for v in value]
    return value.detach().clone() if plain(value) else value


def unchanged(now, before):
    if isinstance(now, list) and isinstance(before, list):
        return len(now) == len(before) and all(map(unchanged, now, before))
    return same(now.detach(), before) if plain(now) and isinstance(before, Tensor) else True


def case(seed, number, say=lambda text: None):
    """One case; returns its target and how it ended: "result" or the name of the exception.

    Raises:
        Failure: it ended otherwise.
    """
    rng = random.Random(f"{seed} {number}")
    target = rng.choice(list(TARGETS))
    make, call, check = TARGETS[target]
    arguments, spoilt, harmless = make(rng), [], True
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        name = rng.choice(list(arguments))
        arguments[name], change, good = spoil(rng, arguments[name], harmful(target, name))
        spoilt.append(f"{name}: {change}")
        harmless = harmless and good
    if rng.random() < 0.05 and not any(
        writes(target, name) for name in arguments
    ):  # one piece of memory for two arguments
        tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        if len(tensors) > 1:
            one, other = rng.sample(tensors, 2)
            arguments[other], harmless = arguments[one], False
            spoilt.append(f"{other} is {one}")
    text = f"case {number} of seed {seed}: {target}; {'; '.join(spoilt) or 'as it should be'}"
    say(text)
    torch.set_num_threads(rng.choice((1, 2)))
    original = copy_all(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, about sparse and quantised tensors
            found = call(**arguments)
    except Impossible:
        return target, "nothing to call"
    except REFUSALS as error:
        message = str(error)
        if (
            isinstance(error, (UnicodeError, RecursionError))
            or any(noise in message for noise in NOISE)
            or len(message.split()) < 4
        ):
            raise Failure(f"{text}: {type(error).__name__} is no sentence: {message!r}") from error
        if harmless:
            raise Failure(f"{text}: refused, though it is valid: {message}") from error
        # call_optimizer and call_rescale look after their own.
        kept = [name for name in arguments if not writes(target, name)]
        if not all(unchanged(arguments[name], original[name]) for name in kept):
            raise Failure(f"{text}: an argument has changed in a refused call") from error
        return target, type(error).__name__
    except (Failure, Exception) as error:
        raise Failure(f"{text}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}") from error
    try:
        if not all(unchanged(arguments[name], original[name]) for name in arguments if not writes(target, name)):
            raise Failure("an argument has changed")
        check(original, found)
    except Impossible as error:
        if not takes_more(target, arguments):
            raise Failure(f"{text}: accepted, though the contract does not cover it") from error
    except Exception as error:
        raise Failure(f"{text}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}") from error
    return target, "result"


def copy_all(arguments):
    return {name: copy(value) for name, value in arguments.items()}


def takes_more(target, arguments):
    """On the meta device ops give shapes for whatever they are given."""
    flat = [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])]
    flat += [p for v in flat if isinstance(v, nn.Module) for p in v.parameters()]
    return any(isinstance(t, Tensor) and t.device.type == "meta" for t in flat)


# ---- processes ------------------------------------------------------------------------------------------------------


def run(seed, first, last, seconds, diary):
    """Cases [first, last) in this process, what is tried next written to the diary beforehand."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # with the above: memory that nothing has written holds nan
    counts, started = Counter(), time.monotonic()
    with open(diary, "r+b", buffering=0) as file:

        def say(text):
            file.seek(0)
            file.write(text.encode()[:4000].ljust(4000))

        for number in range(first, last):
            if time.monotonic() - started > seconds:
                break
            try:
                counts[case(seed, number, say)] += 1
            except Failure as failure:
                print(failure, flush=True)
                counts["any", "FAILURE"] += 1
    return counts


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--seconds", type=float, default=INF, help="stop after so long")
    parser.add_argument("--diary", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    last = given.first + given.cases
    if given.diary is not None:
        counts = run(given.seed, given.first, last, given.seconds, given.diary)
        ends = Counter()
        for (target, end), count in sorted(counts.items()):
            ends[end] += count
            print(f"{target:20} {end:20} {count}")
        print(
            f"{sum(ends.values())} cases, seed {given.seed}: {', '.join(f'{n} {end}' for end, n in ends.most_common())}"
        )
        return 1 if ends["FAILURE"] else 0

    with tempfile.NamedTemporaryFile() as diary:
        command = [sys.executable, __file__, "--diary", diary.name, "--seed", str(given.seed)]
        command += ["--first", str(given.first), "--cases", str(given.cases), "--seconds", str(given.seconds)]
        code = subprocess.run(command, env={**os.environ, "PYTHONFAULTHANDLER": "1"}).returncode
        if code not in (0, 1):
            print(f"the process ended with {code} in {Path(diary.name).read_text(errors='replace').strip()}")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
