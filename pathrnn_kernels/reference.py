"""The definitions in plain autograd: the oracle that every kernel is checked against.

A network is a dict of tensors named as in ``PathNetwork.named_parameters()``: ``rnn.weight_ih_l0``,
``rnn.weight_hh_l0``, ``rnn.bias_ih_l0``, ``rnn.bias_hh_l0``, …, ``head.weight``, ``head.bias``,
``embedding.weight``. Any floating dtype and device; nothing is protected from overflow, and nothing is fast.

Equation numbers are those of Neyshabur, Wu, Salakhutdinov and Srebro (2016).
"""

from __future__ import annotations

import torch
from torch import Tensor

Parameters = dict[str, Tensor]

#: kappa2 = factor * W̃ ⊙ S, S summed over unordered pairs of steps (see ``kappa2``).
KAPPA2_FACTOR = {"exact": 4.0, "lemma1": 2.0, "theorem3": 1.0}


def relu_rnn(x: Tensor, h_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None) -> Tensor:
    """Table 1: h_t = [W_ih x_t + W_hh h_{t-1} + b]_+ for x [T, B, I], h_0 [B, H]; returns [T, B, H]."""
    drive = x @ weight_ih.T if bias is None else x @ weight_ih.T + bias
    outputs, h = [], h_0
    for step in drive.unbind(0):
        h = torch.relu(step + h @ weight_hh.T)
        outputs.append(h)
    return torch.stack(outputs)


def hidden(squared: Parameters, seq_len: int, h0: str = "zeros") -> list[list[Tensor]]:
    """h^i_0 … h^i_T of the squared-weight network on all-ones input, per layer i. ReLU never clips here."""
    num_layers = sum(name.startswith("rnn.weight_hh_l") for name in squared)
    first = squared["rnn.weight_ih_l0"]
    below = squared["embedding.weight"].sum(0) if "embedding.weight" in squared else first.new_ones(first.shape[1])
    inputs = [below] * seq_len
    layers = []
    for i in range(num_layers):
        weight_ih, weight_hh = squared[f"rnn.weight_ih_l{i}"], squared[f"rnn.weight_hh_l{i}"]
        start = torch.ones if h0 == "ones" else torch.zeros
        h = [start(len(weight_hh), dtype=weight_hh.dtype, device=weight_hh.device)]
        for x in inputs:
            h.append(weight_ih @ x + weight_hh @ h[-1])
            for bias in ("bias_ih", "bias_hh"):
                if f"rnn.{bias}_l{i}" in squared:
                    h[-1] = h[-1] + squared[f"rnn.{bias}_l{i}"]
        layers.append(h)
        inputs = h[1:]
    return layers


def total(squared: Parameters, top: list[Tensor], outputs: str = "all") -> Tensor:
    """γ², eq. (3), from the top layer's h_0 … h_T: the sum of all output nodes."""
    steps = top[1:] if outputs == "all" else top[-1:]
    if "head.weight" not in squared:
        return torch.stack(steps).sum()
    out = torch.stack(steps) @ squared["head.weight"].T
    return (out + squared["head.bias"] if "head.bias" in squared else out).sum()


def path_norm(parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros") -> Tensor:
    """γ², eqs. (2) and (3): the sum over paths of the product of squared weights."""
    squared = {name: p.square() for name, p in parameters.items()}
    return total(squared, hidden(squared, seq_len, h0)[-1], outputs)


def kappa1(parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros") -> Parameters:
    """κ⁽¹⁾, eq. (11): the gradient of γ² with respect to the squared weights."""
    squared = {name: p.detach().square().requires_grad_() for name, p in parameters.items()}
    gamma2 = total(squared, hidden(squared, seq_len, h0)[-1], outputs)
    return _gradients(gamma2, squared)


def kappa2(
    parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros", convention: str = "exact"
) -> Parameters:
    """κ⁽²⁾ of each recurrent matrix: f · W̃ ⊙ S, with the corrected index and factor f (eqs. (10), (11)).

    S[j, k] = Σ_{t < t'} δ_{t'+1}[j] · (W̃^{t'-t-1})[k, j] · h_t[k]; every other κ⁽²⁾ is zero.
    """
    squared = {name: p.detach().square().requires_grad_() for name, p in parameters.items()}
    layers = hidden(squared, seq_len, h0)
    gamma2 = total(squared, layers[-1], outputs)
    result = {}
    for i, h in enumerate(layers):
        # δ_t of h_1 … h_T; h_0 is a constant. A last-step network without time dependence can leave δ undefined.
        found = torch.autograd.grad(gamma2, h[1:], retain_graph=True, allow_unused=True)
        delta = [torch.zeros_like(h[1]) if d is None else d for d in found]
        weight = squared[f"rnn.weight_hh_l{i}"].detach()
        pairs, power = torch.zeros_like(weight), torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        for lag in range(seq_len - 1):
            # delta[s] is δ_{s+1}: steps t = s and t' = s + lag + 1.
            for s in range(seq_len - 1 - lag):
                pairs += torch.outer(delta[s + lag + 1], h[s].detach()) * power.T
            power = power @ weight
        result[f"rnn.weight_hh_l{i}"] = KAPPA2_FACTOR[convention] * weight * pairs
    return result


def kappa(
    parameters: Parameters,
    seq_len: int,
    outputs: str = "all",
    h0: str = "zeros",
    second_term: bool = False,
    convention: str = "exact",
) -> Parameters:
    """κ⁽¹⁾, or κ⁽¹⁾ + κ⁽²⁾, of every parameter, full shape (Lemma 1)."""
    result = kappa1(parameters, seq_len, outputs, h0)
    if second_term:
        for name, term in kappa2(parameters, seq_len, outputs, h0, convention).items():
            result[name] = result[name] + term
    return result


def kappa_hessian(parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros") -> Parameters:
    """κ by definition (8): half the diagonal of the Hessian of γ². One backward pass an entry: small nets only."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    gamma2 = path_norm(leaves, seq_len, outputs, h0)
    first = torch.autograd.grad(gamma2, list(leaves.values()), create_graph=True)
    result = {}
    for (name, leaf), gradient in zip(leaves.items(), first, strict=True):
        entries = [torch.autograd.grad(g, leaf, retain_graph=True)[0].flatten() for g in gradient.flatten()]
        result[name] = torch.stack(entries).diagonal().reshape(leaf.shape) / 2
    return result


def _gradients(value: Tensor, leaves: Parameters) -> Parameters:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
