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
    """``GatedPathSGD`` with a bound on the coherent part of its step of W_hh.

    Near the identity a step ΔW multiplies the map over T steps by about exp(T ΔW), and so an output by up to
    exp(T σ₁(D ΔW D⁻¹)), where D balances rows and columns of κ, D_j = (Π_k κ_jk / κ_kj)^(1/(4H)): a node that is
    rescaled by ρ has D_j/ρ, so that D ΔW D⁻¹ is invariant. H² entries of one sign have H times the singular value of
    one, entries of random signs 2 sqrt(H) times. Singular values above growth/T are cut to that.
    """

    def __init__(self, net: PathNetwork, lr: float = 10.0, growth: float = 0.1, **given: Any) -> None:
        super().__init__(net, lr, **given)
        self.growth = growth
        self.sharpest = 0.0  # the largest T σ₁ since it was last read, before the cut

    def _move(self, moving: dict[str, Tensor], k: Kappa, log_norm: float, group: dict[str, Any]) -> None:
        weight = moving.get(_RECURRENT)
        before = None if weight is None else weight.clone()
        super()._move(moving, k, log_norm, group)
        if weight is None or before is None or not self.state[weight]:
            return
        # log(γ²/κ); entries on no path do not move and do not count.
        logs = k.relative(_RECURRENT).double().log().nan_to_num(posinf=0.0, neginf=0.0)
        balance = ((logs.mean(0) - logs.mean(1)) / 4).exp()
        balance = balance / balance.mean()
        delta = balance[:, None] * (weight - before).double() / balance
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        seq_len = sequence_length(self.net, self.seq_len)
        self.sharpest = max(self.sharpest, float(values[0]) * seq_len)
        limit = self.growth / seq_len
        if values[0] > limit:
            cut = (left * values.clamp(max=limit)) @ right
            weight.copy_(before + (cut / balance[:, None] * balance).to(weight.dtype))


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
