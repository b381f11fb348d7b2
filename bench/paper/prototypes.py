"""Optimisers that were tried (README.md, "What was tried") and are no part of the package: plain torch, H of 100."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from pathrnn_kernels import GatedPathSGD, PathAdam, PathNetwork, PathSOAP, kappa, log_path_norm, plain
from pathrnn_kernels.kappa import Kappa, Number

_RECURRENT, _OUTPUT_BIAS = "rnn.weight_hh_l0", "head.bias"


class SpectralGate(GatedPathSGD):
    """``GatedPathSGD`` with a bound on the coherent part of its step of W_hh.

    Near the identity a step ΔW multiplies the map over T steps by about exp(T ΔW), and so an output by up to
    exp(T σ₁(D ΔW D⁻¹)), where D balances rows and columns of κ, D_j = (Π_k κ_jk / κ_kj)^(1/(4H)): a node that is
    rescaled by ρ has D_j/ρ, so that D ΔW D⁻¹ is invariant. H² entries of one sign have H times the singular value of
    one, entries of random signs 2 sqrt(H) times. Singular values above growth/T are cut to that.
    """

    def __init__(self, net: PathNetwork, lr: float, seq_len: int, growth: float = 0.1, **given: Any) -> None:
        super().__init__(net, lr, seq_len=seq_len, **given)
        self.growth, self.length = growth, seq_len
        self.sharpest = 0.0  # the largest T σ₁ since it was last read, before the cut

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        weight = self.net.weights()[_RECURRENT]
        before = weight.clone()
        # log(γ²/κ); entries on no path do not move and do not count.
        logs = kappa(self.net, self.length).relative(_RECURRENT).double().log().nan_to_num(posinf=0.0, neginf=0.0)
        loss = super().step(closure)
        balance = ((logs.mean(0) - logs.mean(1)) / 4).exp()
        delta = balance[:, None] * (weight - before).double() / balance
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        self.sharpest = max(self.sharpest, float(values[0]) * self.length)
        limit = self.growth / self.length
        if values[0] > limit:
            cut = (left * values.clamp(max=limit)) @ right
            weight.copy_(before + (cut / balance[:, None] * balance).to(weight.dtype))
        return loss


class BoundedGrowth(PathAdam):
    """``PathAdam``, whose step is halved until it makes γ² no more than e^growth times what it was.

    κ is the curvature where a weight is. A self-connection of 0.9915 had little of it, and 1.0131 made γ² 900 times as
    large, T = 784: where gradients of a unit were next to nothing, Adam's quotient takes such a step at once.
    """

    def __init__(self, net: PathNetwork, lr: float, seq_len: int, growth: float = 1.0, **given: Any) -> None:
        super().__init__(net, lr, seq_len=seq_len, **given)
        self.growth, self.length = growth, seq_len
        self.sharpest = 0.0  # the largest growth since it was last read, before the step was halved

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        weights = list(self.net.weights().values())
        before, old = [p.clone() for p in weights], float(log_path_norm(self.net, self.length))
        loss = super().step(closure)
        growth = float(log_path_norm(self.net, self.length)) - old
        self.sharpest = max(self.sharpest, growth)
        for _ in range(20):
            if growth <= self.growth:
                break
            for p, former in zip(weights, before, strict=True):
                p.add_(former).mul_(0.5)
            growth = float(log_path_norm(self.net, self.length)) - old
        return loss


class SteadySOAP(PathSOAP):
    """``PathSOAP``, whose gradients keep their sizes beside one another: a small one is divided by an average of ‖g̃‖.

    Divided each by its own, the gradient of a batch that is learned counts as much as that of one that is not, and
    where steps become short weights go to where the mean of g̃/‖g̃‖ is 0, which is no minimum. ``memory`` is the decay
    of the average; without ``clip`` large ones keep their sizes, too.
    """

    def __init__(
        self, net: PathNetwork, lr: float, seq_len: int, memory: float = 0.99, clip: bool = True, **given: Any
    ) -> None:
        super().__init__(net, lr, seq_len=seq_len, fused=False, **given)
        self.memory, self.clip, self.mean, self.weight = memory, clip, 0.0, 0.0

    def _decide(self, *given: Any) -> Any:
        total = plain._total

        def divisor(squares: Any) -> Number:
            length = float(total(squares).root().value())
            self.mean += (1 - self.memory) * (length - self.mean)
            self.weight += (1 - self.memory) * (1 - self.weight)
            mean = self.mean / self.weight
            return Number.of(torch.tensor(max(length, mean) if self.clip else mean, dtype=torch.float64).square())

        plain._total = divisor  # type: ignore[assignment]
        try:
            return super()._decide(*given)
        finally:
            plain._total = total


class PathMuon(torch.optim.Optimizer):
    """Momentum of g̃ = γ g/sqrt(κ), orthogonalised where it is a matrix, as the step in path coordinates.

    The output's bias follows eq. (8), as in ``GatedPathSGD``.
    """

    def __init__(self, net: PathNetwork, lr: float, seq_len: int) -> None:
        self.net, self.length = net, seq_len
        weights = net.weights()
        groups: list[dict[str, Any]] = [{"params": [p for name, p in weights.items() if name != _OUTPUT_BIAS]}]
        if _OUTPUT_BIAS in weights:
            groups.append({"params": [weights[_OUTPUT_BIAS]], "lr": 0.1})
        super().__init__(groups, {"lr": lr, "betas": (0.95, 0.99), "hold": 0, "warmup": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group, k = self.param_groups[0], kappa(self.net, self.length)
        share = math.exp((_log_norm(self.net, k) - float(k.log_path_norm)) / 2)
        beta = group["betas"][0]
        for name, p in self.net.weights().items():
            if p.grad is None or not p.grad.isfinite().all():
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p))
            state["step"] += 1
            if name == _OUTPUT_BIAS:
                p.sub_((p.grad / k.dense(name)).clamp(-1, 1).to(p.dtype), alpha=self.param_groups[1]["lr"])
                continue
            unit = k.relative(name).sqrt() * share
            g = p.grad * unit
            state["exp_avg"].lerp_((g / g.norm().clamp(min=1e-300)).to(p.dtype), 1 - beta)
            rate = group["lr"] * min(1.0, (state["step"] - group["hold"]) / max(group["warmup"], 1))
            if rate > 0:
                p.sub_((_direction(state["exp_avg"]) * unit).to(p.dtype), alpha=rate)


def _direction(m: Tensor) -> Tensor:
    """Of length 1."""
    if m.dim() == 2 and min(m.shape) > 1:
        left, _, right = torch.linalg.svd(m, full_matrices=False)
        return left @ right / math.sqrt(min(m.shape))
    return m / m.norm().clamp(min=1e-30)


def _log_norm(net: PathNetwork, k: Kappa) -> float:
    """log γ² of the paths that end with a weight of the head: all but those of its bias alone."""
    if net.head is None or net.head.bias is None:
        return float(k.log_path_norm)
    mass = float((k.factors["head.weight"].double() * net.head.weight.double().square()).sum())
    return math.log(mass) + float(k.log_scales["head.weight"])


class PlainSOAP(torch.optim.Optimizer):
    """``PathSOAP`` without κ: the same step in the weights' own coordinates, each direction moving by up to lr.

    The output's bias follows eq. (8), as there.
    """

    def __init__(self, net: PathNetwork, lr: float, seq_len: int, frequency: int = 10, beta: float = 0.99) -> None:
        self.net, self.length, self.frequency, self.beta = net, seq_len, frequency, beta
        weights = net.weights()
        groups: list[dict[str, Any]] = [{"params": [p for name, p in weights.items() if name != _OUTPUT_BIAS]}]
        if _OUTPUT_BIAS in weights:
            groups.append({"params": [weights[_OUTPUT_BIAS]], "lr": 0.1})
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.99), "warmup": 500})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group, weights = self.param_groups[0], self.net.weights()
        first, second = group["betas"]
        if (bias := weights.get(_OUTPUT_BIAS)) is not None and bias.grad is not None:
            step = (bias.grad / kappa(self.net, self.length).dense(_OUTPUT_BIAS)).clamp(-1, 1)
            bias.sub_(step.to(bias.dtype), alpha=self.param_groups[1]["lr"])
        moving = [p for name, p in weights.items() if name != _OUTPUT_BIAS and p.grad is not None]
        slopes = [cast(Tensor, p.grad) * math.sqrt(p.numel()) for p in moving]
        length = math.sqrt(sum(float(g.double().square().sum()) for g in slopes))
        if not math.isfinite(length) or length == 0:
            return
        for p, slope in zip(moving, slopes, strict=True):
            state, g = self.state[p], slope / length
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                if p.dim() == 2 and min(p.shape) > 1:
                    state["grams"] = [torch.zeros(n, n) for n in p.shape]
                    state["bases"] = [torch.eye(n) for n in p.shape]
            state["step"] += 1
            steps, grams, bases = state["step"], state.get("grams"), state.get("bases")
            m = state["exp_avg"].lerp_(g, 1 - first)
            if bases is not None:
                for gram, product in zip(grams, (g @ g.T, g.T @ g), strict=True):
                    gram.lerp_(product, 1 - self.beta)
                g, m = (bases[0].T @ x @ bases[1] for x in (g, m))
            v = state["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second) / (1 - second**steps)
            m = torch.where(v > 0, m / v.sqrt(), 0).clamp(-1, 1)
            if bases is not None:
                m = bases[0] @ m @ bases[1].T
                if steps % self.frequency == 0 or steps < self.frequency:
                    self._turn(state)
            p.sub_(m.to(p.dtype), alpha=group["lr"] * min(1.0, steps / max(group["warmup"], 1)))

    @staticmethod
    def _turn(state: dict[str, Any]) -> None:
        for axis, (gram, q) in enumerate(zip(state["grams"], state["bases"], strict=True)):
            product = gram.double() @ q.double() + 1e-6 * gram.trace() * q
            order = (q * product).sum(0).argsort(descending=True)
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
            state["bases"][axis] = torch.linalg.qr(product[:, order])[0].to(q.dtype)
