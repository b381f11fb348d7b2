"""``python -m bench.paper.coherent``: which measure of a step sees that entries of one sign act together."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

import pathrnn_kernels as pk

#: The step's length in the path metric, over γ.
LENGTH = 1e-3
WEIGHTS = ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight")


def network(hidden: int, seed: int = 0) -> pk.PathNetwork:
    """The adding problem's, as section 5.2 initialises it."""
    torch.manual_seed(seed)
    return pk.init.identity_(pk.PathNetwork(pk.ReLURNN(2, hidden), nn.Linear(hidden, 1), outputs="last")).double()


def inner(one: list[Tensor], other: list[Tensor], seq_len: int) -> float:
    """⟨w, w'⟩ in path space: the chain of γ² with w ⊙ w' in place of w²."""
    w_ih, w_hh, head = (a * b for a, b in zip(one, other, strict=True))
    h = torch.zeros_like(w_ih[:, 0])
    for _ in range(seq_len):
        h = w_hh @ h + w_ih.sum(1)
    return float((head @ h).sum())


def signed(weights: list[Tensor], seq_len: int) -> float:
    """The output for inputs of 1 without the ReLUs, in absolute value."""
    w_ih, w_hh, head = weights
    h = torch.zeros_like(w_ih[:, 0])
    for _ in range(seq_len):
        h = w_hh @ h + w_ih.sum(1)
    return float((head @ h).abs().sum())


def balance(kappa: Tensor) -> Tensor:
    """D of bench/paper/prototypes.py: D ΔW D⁻¹ does not change when nodes are rescaled."""
    logs = kappa.log()
    return ((logs.mean(1) - logs.mean(0)) / 4).exp()


@torch.no_grad()
def measures(net: pk.PathNetwork, pattern: Tensor, seq_len: int) -> dict[str, float]:
    """Of the step of W_hh of length ``LENGTH`` γ whose entries in path coordinates are the pattern, up to a factor."""
    w = [net.get_parameter(name).detach() for name in WEIGHTS]
    gamma2 = inner(w, w, seq_len)
    kappa = pk.kappa(net, seq_len).dense("rnn.weight_hh_l0")
    delta = LENGTH * math.sqrt(gamma2) * pattern / pattern.norm() / kappa.sqrt()
    moved = [w[0], w[1] + delta, w[2]]
    d = balance(kappa)
    after = inner(moved, moved, seq_len)
    return {
        "d/γ": math.sqrt(max(0.0, gamma2 + after - 2 * inner(w, moved, seq_len)) / gamma2),
        "γ'/γ": math.sqrt(after / gamma2),
        "T log ρ(W')": seq_len * math.log(float(torch.linalg.eigvals(moved[1]).abs().max())),
        "T σ₁(D ΔW D⁻¹)": seq_len * float(torch.linalg.matrix_norm(d[:, None] * delta / d, 2)),
        "log f'(1)/f(1)": math.log(signed(moved, seq_len) / signed(w, seq_len)),
    }


def main(hidden: int = 100) -> int:
    net = network(hidden)
    w_ih, _, head = (net.get_parameter(name).detach() for name in WEIGHTS)
    patterns = {
        "one sign": torch.ones(hidden, hidden),
        "as of the gradient for inputs of 1": torch.outer(head[0].sign(), w_ih.sum(1).sign()),
        "random signs": torch.randn(hidden, hidden).sign(),
    }
    names: list[str] = []
    for seq_len in (100, 400, 1000, 5000):
        for name, pattern in patterns.items():
            row = measures(net, pattern.double(), seq_len)
            if not names:
                names = list(row)
                print("| T | entries | " + " | ".join(names) + " |\n|" + "---|" * (2 + len(names)))
            print(f"| {seq_len} | {name} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
