"""Optimisers that were tried (README.md, "What was tried") and are no part of the package: plain torch, H of 100."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pathrnn_kernels import GatedPathSGD, PathNetwork
from pathrnn_kernels.kappa import Kappa
from pathrnn_kernels.optim import sequence_length

_RECURRENT = "rnn.weight_hh_l0"


class SpectralGate(GatedPathSGD):
    """``GatedPathSGD`` whose step of W_hh has a bound in the spectral norm beside that of every entry.

    Near the identity a step ΔW multiplies the map over T steps by about exp(T ΔW). In path coordinates (rows and
    columns of W_hh scaled so that κ is constant) ΔW = lr √(2/(HT)) u, so that T ‖ΔW‖ = lr √(2T/H) σ₁(u) is the
    logarithm of the largest factor of any output. Noise of one sign in H² entries has σ₁(u) = H |u|, noise of all
    signs 2 √H |u|. Singular values of u are cut at the one that makes it ``growth``. Invariant, as u is.
    """

    def __init__(self, net: PathNetwork, lr: float = 10.0, growth: float = 0.1, **given: Any) -> None:
        super().__init__(net, lr, **given)
        self.growth = growth
        self.sharpest = 0.0  # the largest logarithm since it was last read, before the cut

    def _move(self, moving: dict[str, Tensor], k: Kappa, log_norm: float, group: dict[str, Any]) -> None:
        weight = moving.get(_RECURRENT)
        before = None if weight is None else weight.clone()
        super()._move(moving, k, log_norm, group)
        if weight is None or before is None or not self.state[weight]:
            return
        share = math.exp((log_norm - float(k.log_path_norm)) / 2)
        unit = k.relative(_RECURRENT).sqrt() * share  # γ/sqrt(κ)
        rate = group["lr"] * min(1.0, self.state[weight]["step"] / max(group["warmup"], 1)) / math.sqrt(weight.numel())
        u = torch.where(unit > 0, (before - weight) / (unit * rate), 0.0)
        seq_len = sequence_length(self.net, self.seq_len)
        scale = rate * math.sqrt(weight.numel()) * math.sqrt(2 * seq_len / len(weight))
        left, values, right = torch.linalg.svd(u, full_matrices=False)
        self.sharpest = max(self.sharpest, float(values[0]) * scale)
        limit = self.growth / scale
        if values[0] > limit:
            excess = (values - limit).clamp_(min=0)
            weight.add_((left * excess) @ right * unit, alpha=rate)


class PathMuon(GatedPathSGD):
    """W_hh and other matrices with more than one row and column: momentum of g̃, orthogonalised, in path coordinates."""

    def _move(self, moving: dict[str, Tensor], k: Kappa, log_norm: float, group: dict[str, Any]) -> None:
        share = math.exp((log_norm - float(k.log_path_norm)) / 2)
        for name, p in moving.items():
            unit = k.relative(name).sqrt() * share
            g = p.grad * unit  # type: ignore[operator]
            if not torch.isfinite(g).all():
                return
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p))
            state["step"] += 1
            beta = group["betas"][0]
            state["exp_avg"].lerp_(g / g.norm().clamp(min=1e-30), 1 - beta)
            m = state["exp_avg"] / (1 - beta ** state["step"])
            if p.dim() == 2 and min(p.shape) > 1:
                left, values, right = torch.linalg.svd(m, full_matrices=False)
                m = left @ right / math.sqrt(min(p.shape))
            else:
                m = m / m.norm().clamp(min=1e-30)
            rate = group["lr"] * min(1.0, state["step"] / max(group["warmup"], 1))
            p.sub_(m * unit, alpha=rate)
