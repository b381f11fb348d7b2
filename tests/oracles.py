"""What the kernels must give where plain floating point overflows: the definitions on logarithms, in float64."""

import functools
import math
from collections import namedtuple

import tolerances
import torch

import pathrnn_kernels as pk
from pathrnn_kernels.kappa import ldexp

#: log γ² (0-dim) and log κ of every parameter by name, in full shape.
LogKappa = namedtuple("LogKappa", "log_path_norm log_kappa")

INF = math.inf


def _multiply(weight, vector):
    return torch.logsumexp(weight + vector, -1)


def one_thread(oracle):
    """Its operations are many and small; a team would wait for itself most of the time."""

    @functools.wraps(oracle)
    def alone(*args, **kwargs):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return oracle(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return alone


@one_thread
def log_kappa(net, seq_len, second_term=False):
    """LogKappa of a PathNetwork by logsumexp chains: eqs. (3), (9), (11); κ⁽²⁾ exact. -inf stands for zero."""
    log = {name: p.detach().double().abs().log() * 2 for name, p in net.named_parameters()}
    hidden, width = net.hidden_size, net.num_directions
    zero, one = torch.full((hidden,), -INF, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)
    weight_ih, weight_hh = ([log[f"rnn.weight_{kind}_{end}"] for end in net.endings] for kind in ("ih", "hh"))
    # Chains in their own time, forward and reverse by turns: what a layer gives another must be turned for the reverse.
    layers = [range(first, first + width) for first in range(0, len(net.endings), width)]

    def times(chain, steps):
        return steps.flip(0) if chain % width else steps

    below = torch.zeros(net.rnn.input_size, dtype=torch.float64)
    if net.embedding is not None:
        below = torch.logsumexp(log["embedding.weight"], 0)
    inputs, h, given = below.expand(seq_len, -1), [], []
    for layer in layers:
        for c in layer:
            given.append(times(c, inputs))
            steps = [one if net.h0 == "ones" else zero]
            for x in given[c]:
                step = torch.logaddexp(_multiply(weight_ih[c], x), _multiply(weight_hh[c], steps[-1]))
                for kind in ("bias_ih", "bias_hh"):
                    if net.rnn.bias:
                        step = torch.logaddexp(step, log[f"rnn.{kind}_{net.endings[c]}"])
                steps.append(step)
            h.append(torch.stack(steps))
        inputs = torch.cat([times(c, h[c][1:]) for c in layer], 1)

    first_output = 0 if net.outputs == "all" else seq_len - 1
    top = torch.zeros(width * hidden, dtype=torch.float64)
    if net.head is not None:
        top = torch.logsumexp(log["head.weight"], 0)
    own_last = torch.full((seq_len, hidden), -INF, dtype=torch.float64)
    own_last[first_output:] = 0
    drive = top + torch.cat([times(c, own_last) for c in layers[-1]], 1)  # ∂γ²/∂ what a layer gives, by steps
    delta = {}  # δ_1 … δ_T of every chain
    for layer in reversed(layers):
        total = torch.tensor(-INF, dtype=torch.float64)
        for c, own in zip(layer, drive.chunk(width, 1), strict=True):
            steps, after = [], zero
            for d in times(c, own).flip(0):
                after = torch.logaddexp(d, _multiply(weight_hh[c].T, after))
                steps.append(after)
            delta[c] = torch.stack(steps[::-1])
            down = torch.stack([_multiply(weight_ih[c].T, d) for d in delta[c]])
            total = torch.logaddexp(total, times(c, down))
        drive = total
    # `drive` is now ∂γ²/∂input.

    result = {}
    for c, end in enumerate(net.endings):
        result[f"rnn.weight_ih_{end}"] = _outer(delta[c], given[c])
        result[f"rnn.weight_hh_{end}"] = _outer(delta[c], h[c][:-1])
        if second_term:
            term = _second_term(weight_hh[c], h[c][:-1], delta[c])
            result[f"rnn.weight_hh_{end}"] = torch.logaddexp(result[f"rnn.weight_hh_{end}"], term)
        for kind in ("bias_ih", "bias_hh"):
            if net.rnn.bias:
                result[f"rnn.{kind}_{end}"] = torch.logsumexp(delta[c], 0)
    if net.embedding is not None:
        result["embedding.weight"] = torch.logsumexp(drive, 0).expand_as(log["embedding.weight"])

    outputs = torch.cat([h[c][1:] for c in layers[-1]], 1)[first_output:]
    log_norm = torch.logsumexp(outputs + top, (0, 1))
    if net.head is not None:
        result["head.weight"] = torch.logsumexp(outputs, 0).expand_as(log["head.weight"])
        if net.head.bias is not None:
            result["head.bias"] = torch.full_like(log["head.bias"], math.log(len(outputs)))
            log_norm = torch.logaddexp(log_norm, torch.logsumexp(log["head.bias"], 0) + math.log(len(outputs)))
    return LogKappa(log_norm, result)


def _outer(delta, h):
    """log Σ_t δ_t h_tᵀ."""
    total = torch.full((delta.shape[1], h.shape[1]), -INF, dtype=torch.float64)
    steps = max(1, 2**20 // total.numel())  # at once, of a memory that stays in cache
    for d, x in zip(delta.split(steps), h.split(steps), strict=True):
        total = torch.logaddexp(total, torch.logsumexp(d[:, :, None] + x[:, None, :], 0))
    return total


def _second_term(weight, h, delta):
    """log 4 W̃ ⊙ S, S[j, k] = Σ_{t < t'} δ_{t'+1}[j] · (W̃^{t'-t-1})[k, j] · h_t[k]."""
    total = torch.full_like(weight, -INF)
    power = torch.full_like(weight, -INF).fill_diagonal_(0)
    for lag in range(len(h) - 1):
        total = torch.logaddexp(total, _outer(delta[lag + 1 :], h[: len(h) - lag - 1]) + power.T)
        power = torch.logsumexp(power[:, :, None] + weight, 1)
    return math.log(4) + weight + total


def check_logarithms(net, seq_len, second_term=False, rtol=tolerances.LOG_DOMAIN, truncation=1e-5):
    """γ² and every entry of κ, whatever its size; nothing is inf or nan."""
    found, expected = pk.kappa(net, seq_len, second_term, rtol=truncation), log_kappa(net, seq_len, second_term)
    if expected.log_path_norm == -math.inf:
        assert found.log_path_norm == -math.inf
    else:
        assert abs(found.log_path_norm - expected.log_path_norm) <= rtol
    for name, scaled in found.scaled.items():
        true = expected.log_kappa[name]
        mantissa, exponent = (part.expand_as(true) for part in scaled.parts())
        assert mantissa.isfinite().all() and torch.equal(mantissa > 0, true > -math.inf), name
        positive = mantissa > 0
        error = mantissa.log() + exponent.double() * math.log(2) - true
        assert not positive.any() or error[positive].abs().max() <= rtol, name
        assert found.factors[name].isfinite().all() and (found.factors[name] >= 0).all(), name
    return found, expected


def parts(chain, directions=1, head=True):
    """κ as an ``ops.PathChain`` holds it: float64 mantissas, 0 or in [1/2, 1), and int64 exponents, by tensors."""
    units, per_chain = chain.unit_exponents, 3 if len(chain.kappa) > 2 and chain.kappa[2].dim() == 1 else 2
    layers = units.reshape(-1, directions * units.shape[1])
    result = []
    for i, kappa in enumerate(chain.kappa):
        (c, kind), shift = divmod(i, per_chain), chain.exponents[i]
        if c < len(units):
            shift = shift - (units[c] if kind == 2 else units[c][:, None])
            if kind == 1:
                shift = shift + units[c]
            elif kind == 0 and c >= directions:
                shift = shift + layers[c // directions - 1]
        elif head and i == per_chain * len(units):
            shift = shift + layers[-1]
        mantissa, exponent = torch.frexp(kappa.double())
        own = chain.entries(i)
        result.append((mantissa, exponent.long() + shift + (0 if own is None else own)))
    return result


def values(chain, directions=1, head=True):
    """The same in plain float64."""
    return [ldexp(*pair) for pair in parts(chain, directions, head)]
