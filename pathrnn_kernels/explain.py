"""Which backend serves a network, and why each other one would not."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from .network import PathNetwork
from .ops.backend import ENVIRONMENT, choose, refusals
from .rnn import ReLURNN


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` of it is a table."""

    #: The backend that serves calls on this module; None if none does.
    backend: str | None
    #: For every backend why it would not serve; None where it would.
    reasons: dict[str, str | None]
    #: The backend asked for, ``"auto"`` by default.
    requested: str
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [f"{self.dtype} on {self.device}, backend {self.requested!r} → {self.backend or 'none serves'}"]
        for name, reason in self.reasons.items():
            verdict = f"no: {reason}" if reason else "serves" if name == self.backend else "would serve"
            lines.append(f"  {name:<{width}}  {verdict}")
        return "\n".join(lines)


def explain(rnn_or_net: ReLURNN | nn.RNN | PathNetwork, backend: str = "auto") -> Explanation:
    """Which backend serves κ and the forward pass of a module, and why each other one would not.

    Args:
        rnn_or_net: a ReLURNN, a ``torch.nn.RNN`` (whose forward pass is torch's own) or a PathNetwork.
        backend: as for :func:`kappa`; with ``"auto"`` the environment variable PATHRNN_BACKEND is heeded.

    Raises:
        TypeError: ``rnn_or_net`` is none of these.
        ValueError: ``backend``, or PATHRNN_BACKEND, is not a backend's name.
    """
    if not isinstance(rnn_or_net, (ReLURNN, nn.RNN, PathNetwork)):
        raise TypeError(
            f"rnn_or_net is a {type(rnn_or_net).__name__}; it must be a ReLURNN, torch.nn.RNN or PathNetwork"
        )
    weight = next(rnn_or_net.parameters())
    reasons = refusals(weight.device, weight.dtype)
    requested = os.environ.get(ENVIRONMENT, "auto") if backend == "auto" else backend
    try:
        chosen = choose(weight.device, weight.dtype, backend)
    except ValueError:
        if requested not in ("auto", *reasons):
            raise
        chosen = None
    return Explanation(chosen, reasons, requested, weight.device, weight.dtype)
