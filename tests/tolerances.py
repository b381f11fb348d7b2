"""Every tolerance of the kernel tests, with its reason. u is the unit roundoff, half of eps."""

import math

import torch

#: Issue 2: κ and γ² against the definition, small networks, float64.
DEFINITION = 1e-10

#: Issue 2: float32 against a log-domain computation, H = 100, T = 2000. u · T · sqrt(H) = 1.2e-3 is the same size.
LOG_DOMAIN = 1e-3


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def definition(dtype, seq_len):
    """Issue 2: relative error of κ and γ² of small networks."""
    return DEFINITION if dtype == torch.float64 else 1e-5 * (seq_len / 10 + 1)


def path(dtype, seq_len, size):
    """Relative error of κ and γ², entry by entry: all terms are non-negative, so nothing cancels.

    A path collects the roundings of at most seq_len + 3 dot products (the steps, layers and ends), each of at most
    4 + 2 sqrt(size) u: the squared weight, a drive, and a sum of ``size`` terms whose roundings have random signs.
    The same holds for κ⁽²⁾: its powers of W̃ take fewer products than steps.
    """
    return unit_roundoff(dtype) * (seq_len + 3) * (4 + 2 * math.sqrt(size))


def rnn(dtype, seq_len, batch, size):
    """Error of y, h_n and gradients of ReLURNN, relative to the tensor's largest entry, for contracting weights.

    Both sides round: 2 sqrt(size) u in every dot product, carried on for a few steps by weights of spectral radius
    below 1 (4: the sum of its powers), and 2 sqrt(seq_len · batch) u in the sums of the weights' gradients.
    """
    return 2 * unit_roundoff(dtype) * (4 * (4 + 2 * math.sqrt(size)) + 2 * math.sqrt(seq_len * batch))


def rounded(dtype, error):
    """Of a result that was computed with ``error`` and rounded once to a half ``dtype`` at the end."""
    return unit_roundoff(dtype) + error
