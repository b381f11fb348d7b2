"""What the kernels must give where plain floating point overflows: the definitions on logarithms, in float64."""

import math
from collections import namedtuple

import torch

#: log γ² (0-dim) and log κ of every parameter by name, in full shape.
LogKappa = namedtuple("LogKappa", "log_path_norm log_kappa")

INF = math.inf


def _multiply(weight, vector):
    return torch.logsumexp(weight + vector, -1)


def log_kappa(net, seq_len, second_term=False):
    """LogKappa of a PathNetwork by logsumexp chains: eqs. (3), (9), (11); κ⁽²⁾ exact. -inf stands for zero."""
    log = {name: p.detach().double().abs().log() * 2 for name, p in net.named_parameters()}
    layers, hidden = range(net.num_layers), net.hidden_size
    zero, one = torch.full((hidden,), -INF, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)
    weight_ih = [log[f"rnn.weight_ih_l{i}"] for i in layers]
    weight_hh = [log[f"rnn.weight_hh_l{i}"] for i in layers]

    below = torch.zeros(net.rnn.input_size, dtype=torch.float64)
    if net.embedding is not None:
        below = torch.logsumexp(log["embedding.weight"], 0)
    inputs, h = below.expand(seq_len, -1), []
    for i in layers:
        steps = [one if net.h0 == "ones" else zero]
        for x in inputs:
            step = torch.logaddexp(_multiply(weight_ih[i], x), _multiply(weight_hh[i], steps[-1]))
            for kind in ("bias_ih", "bias_hh"):
                if net.rnn.bias:
                    step = torch.logaddexp(step, log[f"rnn.{kind}_l{i}"])
            steps.append(step)
        h.append(torch.stack(steps))
        inputs = h[i][1:]

    first_output = 0 if net.outputs == "all" else seq_len - 1
    top = one if net.head is None else torch.logsumexp(log["head.weight"], 0)
    drive = torch.full((seq_len, hidden), -INF, dtype=torch.float64)
    drive[first_output:] = top
    delta = [None for _ in layers]  # δ_1 … δ_T of every layer
    for i in reversed(layers):
        steps, after = [], zero
        for d in drive.flip(0):
            after = torch.logaddexp(d, _multiply(weight_hh[i].T, after))
            steps.append(after)
        delta[i] = torch.stack(steps[::-1])
        drive = torch.stack([_multiply(weight_ih[i].T, d) for d in delta[i]])
    # `drive` is now ∂γ²/∂input.

    result = {}
    for i in layers:
        before = below.expand(seq_len, -1) if i == 0 else h[i - 1][1:]
        result[f"rnn.weight_ih_l{i}"] = _outer(delta[i], before)
        result[f"rnn.weight_hh_l{i}"] = _outer(delta[i], h[i][:-1])
        if second_term:
            term = _second_term(weight_hh[i], h[i][:-1], delta[i])
            result[f"rnn.weight_hh_l{i}"] = torch.logaddexp(result[f"rnn.weight_hh_l{i}"], term)
        for kind in ("bias_ih", "bias_hh"):
            if net.rnn.bias:
                result[f"rnn.{kind}_l{i}"] = torch.logsumexp(delta[i], 0)
    if net.embedding is not None:
        result["embedding.weight"] = torch.logsumexp(drive, 0).expand_as(log["embedding.weight"])

    outputs = h[-1][1:][first_output:]
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
    for d, x in zip(delta, h, strict=True):
        total = torch.logaddexp(total, d[:, None] + x)
    return total


def _second_term(weight, h, delta):
    """log 4 W̃ ⊙ S, S[j, k] = Σ_{t < t'} δ_{t'+1}[j] · (W̃^{t'-t-1})[k, j] · h_t[k]."""
    total = torch.full_like(weight, -INF)
    power = torch.full_like(weight, -INF).fill_diagonal_(0)
    for lag in range(len(h) - 1):
        total = torch.logaddexp(total, _outer(delta[lag + 1 :], h[: len(h) - lag - 1]) + power.T)
        power = torch.logsumexp(power[:, :, None] + weight, 1)
    return math.log(4) + weight + total
