"""γ² and κ by their definition in exact-range arithmetic, as numpy arrays: oracle.cpp, compiled at first use."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("oracle.cpp")
COMMAND = ("g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")

#: The fields of oracle.cpp's Shape. outputs, vocabulary: 0 without a head or an embedding; the rest 0 or 1.
Shape = namedtuple("Shape", "layers directions input hidden outputs vocabulary steps last ones bias head_bias")

#: Numbers mantissa · 2^exponent, 1 ≤ mantissa < 2 or 0 · 2^0.
Numbers = namedtuple("Numbers", "mantissa exponent")

_library = None


def library():
    global _library
    if _library is None:
        name = hashlib.sha256(" ".join(COMMAND).encode() + SOURCE.read_bytes()).hexdigest()[:16]
        built = Path(tempfile.gettempdir()) / f"pathrnn-oracle-{os.getuid()}-{name}.so"
        if not built.exists():
            with tempfile.NamedTemporaryFile(dir=built.parent, suffix=".so", delete=False) as new:
                subprocess.run([*COMMAND, str(SOURCE), "-o", new.name], check=True)
                os.replace(new.name, built)
        _library = ctypes.CDLL(str(built))
        _library.pathrnn_oracle_count.restype = ctypes.c_int64
    return _library


def _pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def places(shape):
    """Name in ``named_parameters`` → (first, shape) in the flat array of parameters that the oracle takes."""
    s, result, at = shape, {}, 0

    def take(name, *size):
        nonlocal at
        result[name] = (at, size)
        at += int(np.prod(size))

    for layer in range(s.layers):
        for ending in (f"l{layer}", f"l{layer}_reverse")[: s.directions]:
            take(f"rnn.weight_ih_{ending}", s.hidden, s.directions * s.hidden if layer else s.input)
            take(f"rnn.weight_hh_{ending}", s.hidden, s.hidden)
            if s.bias:
                take(f"rnn.bias_ih_{ending}", s.hidden)
                take(f"rnn.bias_hh_{ending}", s.hidden)
    if s.outputs:
        take("head.weight", s.outputs, s.directions * s.hidden)
        if s.head_bias:
            take("head.bias", s.outputs)
    if s.vocabulary:
        take("embedding.weight", s.vocabulary, s.input)
    return result


def chains(shape, parameters, first_order=True, first=0, stride=1, longer=False):
    """γ² = c0, c1, c2 of every parameter by recurrences: (Numbers [1], Numbers [n], Numbers [n]).

    c2 only in the columns k ≡ first (mod stride) of recurrent matrices; in none for stride 0. Without ``first_order``
    c1 and c2 are empty.
    """
    sizes, parameters = np.array(shape, dtype=np.int64), np.ascontiguousarray(parameters, dtype=np.float64)
    count = library().pathrnn_oracle_count(_pointer(sizes))
    assert parameters.shape == (count,), (parameters.shape, count)
    kept = count if first_order else 0
    m, e = np.empty(1 + 2 * kept), np.empty(1 + 2 * kept, dtype=np.int64)
    library().pathrnn_oracle_chains(
        *(_pointer(sizes), _pointer(parameters), ctypes.c_int64(longer), ctypes.c_int64(first_order)),
        *(ctypes.c_int64(first), ctypes.c_int64(stride), _pointer(m), _pointer(e)),
    )
    cuts = [1, 1 + kept]
    return tuple(map(Numbers, np.split(m, cuts), np.split(e, cuts)))


def definition(shape, parameters, entries, longer=False):
    """c0, c1, c2 of γ²(w̃ + ε) mod ε³ for each of these parameters (indices into the flat array): Numbers [n, 3]."""
    sizes, parameters = np.array(shape, dtype=np.int64), np.ascontiguousarray(parameters, dtype=np.float64)
    entries = np.ascontiguousarray(entries, dtype=np.int64)
    m, e = np.empty((len(entries), 3)), np.empty((len(entries), 3), dtype=np.int64)
    library().pathrnn_oracle_definition(
        *(_pointer(sizes), _pointer(parameters), ctypes.c_int64(longer), _pointer(entries)),
        *(ctypes.c_int64(len(entries)), _pointer(m), _pointer(e)),
    )
    return Numbers(m, e)


# ---- arithmetic on Numbers ------------------------------------------------------------------------------------------


def normal(mantissa, exponent=0):
    """Of float64 mantissas, any, with exponents: as Numbers should be. nan and inf stay mantissas."""
    m, e = np.frexp(mantissa)
    zero = m == 0
    return Numbers(np.where(zero, 0.0, 2 * m), np.where(zero | ~np.isfinite(m), 0, e + exponent - 1))


def product(*factors):
    m, e = 1.0, 0
    for f in factors:
        m, e = m * f.mantissa, e + f.exponent
    return normal(m, e)


def quotient(a, b):
    """0 where b is 0."""
    zero = b.mantissa == 0
    return normal(np.where(zero, 0.0, a.mantissa / np.where(zero, 1.0, b.mantissa)), a.exponent - b.exponent)


def total(a, b):
    high = np.maximum(
        np.where(a.mantissa == 0, np.iinfo(np.int64).min // 4, a.exponent),
        np.where(b.mantissa == 0, np.iinfo(np.int64).min // 4, b.exponent),
    )

    def scaled(x):
        return np.where(
            x.mantissa == 0, 0.0, np.ldexp(x.mantissa, np.clip(x.exponent - high, -2000, 0).astype(np.int32))
        )

    s = scaled(a) + scaled(b)
    return normal(s, np.where(s == 0, 0, high))


def logarithm(a):
    """Natural, -inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(a.mantissa) + a.exponent * np.log(2.0)


def relative_error(found, true):
    """|found / true - 1|; 0 where both are 0, inf where one is 0, nan or inf."""
    with np.errstate(all="ignore"):
        gap = np.clip(found.exponent - true.exponent, -2000, 2000).astype(np.int32)
        ratio = np.ldexp(found.mantissa / np.where(true.mantissa == 0, 1.0, true.mantissa), gap)
        error = np.abs(ratio - 1)
    both = (found.mantissa == 0) & (true.mantissa == 0)
    bad = ((found.mantissa == 0) | (true.mantissa == 0)) & ~both
    return np.where(both, 0.0, np.where(bad | ~np.isfinite(error), np.inf, error))
