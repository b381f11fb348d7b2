"""Fig. 2's table: ‖κ⁽²⁾‖ / ‖κ⁽¹⁾‖ of the recurrent matrix over T and H, for random, identity and trained weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import init
from pathrnn_kernels.checkpoints import CHECKPOINT, load_checkpoint

from .systems import Experiment

LENGTHS, SIZES = (5, 10, 20, 40, 80, 160), (50, 100, 200, 400)
QUICK_LENGTHS, QUICK_SIZES = (3, 6), (4, 8)

#: Fig. 2's embedding and vocabulary; κ sums over them, whatever the words are.
_EMBEDDING, _VOCABULARY = 200, 10_000
_SEEDS = 3
_WEIGHT = "rnn.weight_hh_l0"


def ratio(net: pk.PathNetwork, seq_len: int) -> float:
    """‖κ⁽²⁾‖₂ / ‖κ⁽¹⁾‖₂ over the entries of W_hh, the only ones that have a κ⁽²⁾; computed in float64."""
    net = net.double()
    first = pk.kappa(net, seq_len)
    both = pk.kappa(net, seq_len, second_term=True, rtol=1e-9)
    # κ itself may overflow; with its scale taken out it does not.
    scale = math.exp(both.log_scales[_WEIGHT] - first.log_scales[_WEIGHT])
    kappa1 = first.factors[_WEIGHT]
    return float((both.factors[_WEIGHT] * scale - kappa1).norm() / kappa1.norm())


def network(hidden_size: int, embedding_size: int = _EMBEDDING, vocabulary: int = _VOCABULARY) -> pk.PathNetwork:
    embedding = nn.Embedding(vocabulary, embedding_size) if embedding_size else None
    rnn = pk.ReLURNN(embedding_size or vocabulary, hidden_size)
    return pk.PathNetwork(rnn, nn.Linear(hidden_size, vocabulary), embedding)


def trained(folder: Path) -> pk.PathNetwork:
    """The network in a run's checkpoint."""
    config, state = load_checkpoint(folder, {}, Experiment)
    weights = state["network"]
    net = network(config.hidden_size, config.embedding_size, len(weights["head.weight"]))
    net.load_state_dict(weights)
    return net


def table(folders: Iterable[Path], lengths: Sequence[int], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of weights, hidden size, and the median ratio at every T.

    Args:
        folders: of runs whose checkpoints are the trained weights.
        lengths: T.
        sizes: H of random and identity weights; trained ones have their own.
    """
    rows = []
    for size in sizes:
        nets = []
        for seed in range(_SEEDS):
            generator = torch.Generator().manual_seed(seed)
            nets.append(init.uniform_(network(size), 0.1, 0.1, generator))
        rows.append(_row("random U[-0.1, 0.1]", size, nets, lengths))
        generator = torch.Generator().manual_seed(0)
        rows.append(_row("identity", size, [init.identity_(network(size), 1.0, 0.1, generator)], lengths))
    by_size: dict[int, list[pk.PathNetwork]] = {}
    for folder in folders:
        if (folder / CHECKPOINT).is_file():
            net = trained(folder)
            by_size.setdefault(net.hidden_size, []).append(net)
    rows += [_row("trained", size, nets, lengths) for size, nets in sorted(by_size.items())]
    return rows


def _row(weights: str, size: int, nets: Sequence[pk.PathNetwork], lengths: Sequence[int]) -> dict[str, Any]:
    ratios = {str(seq_len): statistics.median(ratio(net, seq_len) for net in nets) for seq_len in lengths}
    return {"weights": weights, "hidden_size": size, "networks": len(nets), "ratios": ratios}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lengths = list(rows[0]["ratios"])
    lines = [
        "‖κ⁽²⁾‖ / ‖κ⁽¹⁾‖ of W_hh, exact factors (half the Hessian's diagonal), median over networks:",
        "",
        "| weights | H | " + " | ".join(f"T = {length}" for length in lengths) + " |",
        "|---|---" + "|---" * len(lengths) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{value:.2g}" for value in row["ratios"].values())
        lines.append(f"| {row['weights']} | {row['hidden_size']} | {cells} |")
    return "\n".join(lines) + "\n"
