"""Path-SGD with a step for every entry that depends on how steady its gradient is: what solves the adding problem."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .kappa import Kappa, kappa
from .network import PathNetwork
from .optim import check_count, check_number, sequence_length

_OUTPUT_BIAS = "head.bias"


class GatedPathSGD(Optimizer):
    """Path-SGD (eq. (8)) that moves an entry as far as the sign of its gradient can be trusted.

    In path coordinates, p̃ = p sqrt(κ)/γ, the gradient is g̃ = γ g/sqrt(κ), and γ² g/κ, eq. (8) with the scale of
    ``PathOptimizer(scale="path_norm")``, is plain gradient descent. Rescaling nodes (Theorem 1) does not change them,
    so that what is done entry by entry in them keeps the invariance of Path-SGD, which Adam on g/κ loses. Here::

        m ← β₁ m + (1 - β₁) g̃/‖g̃‖        v ← β₂ v + (1 - β₂) (g̃/‖g̃‖)²
        u = sign(m) min(|m| / sqrt(v / (1 - β₂ᵗ)), 1)^power
        Δp = -lr γ u / sqrt(n κ)

    |m|/sqrt(v) is Adam's signal-to-noise ratio (Kingma, Ba, 2015). An entry whose gradient is noise has one near
    sqrt((1 - β₁) / 2), of which the power leaves next to nothing; one whose gradient keeps its sign moves at full
    length. Over long sequences the two differ by orders of magnitude, and noise in the H² entries of W_hh adds up over
    all T steps. m has no bias correction: nothing moves before it is known. n, the number of entries of the tensor,
    bounds its step's length in the path metric by lr γ. γ² is that of the paths through the RNN: paths of the output's
    bias alone (κ = 1 at one step) are left out.

    The output's bias follows eq. (8) as it stands, Δb = -bias_lr · g/κ, no entry of g/κ counting for more than 1. It
    keeps the mean of the outputs where it belongs, which W_hh would otherwise chase through T steps.

    A step whose gradient is 0 or not finite is left out, and so are entries with κ = 0 (on no path).

    Args:
        net: the network, float32 or float64; every trainable parameter is held, its output's bias in a parameter
            group of its own.
        lr: longest step of a tensor in the path metric, over γ. In practice steps are a thousandth of it.
        betas: β₁ and β₂, of the averages of the gradient and of its square.
        power: of the signal-to-noise ratio; 1 is Adam in path coordinates.
        bias_lr: learning rate of the output's bias.
        hold: steps at the beginning in which only the output's bias moves and no averages are taken; none where there
            is no such bias.
        warmup: steps after these over which lr rises linearly. Without it, early steps of long sequences now and then
            make outputs explode: training recovers, unless a loss overflows.
        second_term: whether κ includes κ⁽²⁾ (Lemma 1).
        seq_len: T; by default the length of the last forward pass before the step.
        rtol: relative truncation error allowed in κ⁽¹⁾ + κ⁽²⁾, as for :func:`kappa`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), torch.nn.Linear(100, 1), outputs="last")
        >>> optimizer = pk.GatedPathSGD(net)
        >>> net(torch.rand(50, 16, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    net: PathNetwork
    second_term: bool
    seq_len: int | None
    rtol: float

    def __init__(
        self,
        net: PathNetwork,
        lr: float = 10.0,
        betas: tuple[float, float] = (0.998, 0.999),
        power: float = 3.0,
        bias_lr: float = 0.1,
        hold: int = 100,
        warmup: int = 1000,
        second_term: bool = False,
        seq_len: int | None = None,
        rtol: float = 1e-3,
    ) -> None:
        if not isinstance(net, PathNetwork):
            raise TypeError(f"net is a {type(net).__name__}; it must be a PathNetwork, as PathNetwork(rnn, head=…)")
        net.check_parameters()
        for name, value in (("lr", lr), ("power", power), ("bias_lr", bias_lr)):
            check_number(name, value, zero=False)
        check_number("rtol", rtol, zero=True)
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_is_share, betas)):
            raise ValueError(f"betas is {betas!r}; it must be two numbers, each at least 0 and below 1")
        for name, count in (("hold", hold), ("warmup", warmup)):
            if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
                raise ValueError(f"{name} is {count!r}; it must be an integer, at least 0")
        if not isinstance(second_term, bool):
            raise TypeError(f"second_term is {second_term!r}; it must be True or False")
        if seq_len is not None:
            check_count("seq_len", seq_len)
        parameters = net.weights()
        dtype = next(iter(parameters.values())).dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the network is {dtype}; use float32 parameters, under torch.autocast for half precision")

        self.net = net
        self.second_term = second_term
        self.seq_len = seq_len
        self.rtol = rtol
        inner = {"params": [p for name, p in parameters.items() if name != _OUTPUT_BIAS]}
        groups: list[dict[str, Any]] = [inner]
        if _OUTPUT_BIAS in parameters:
            groups.append({"params": [parameters[_OUTPUT_BIAS]], "lr": bias_lr})
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "power": power, "hold": hold, "warmup": warmup})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = {id(p) for p in self.net.weights().values()}
        given = param_group["params"]
        param_group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        if any(id(p) not in own for p in param_group["params"]):
            raise ValueError(
                "these are not parameters of the network and have no κ: give them an optimiser of their own"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # As torch's optimisers are pickled, and with what they lack.
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in type(self).__annotations__}}

    # torch.compile would take the numbers on the host, which change from step to step, for constants.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss, None without a closure, which is called once, gradients enabled.

        Raises:
            ValueError: no sequence length is known, a gradient is sparse, or γ² is 0. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = {name: p for name, p in self.net.weights().items() if p.requires_grad and p.grad is not None}
        for name, p in moving.items():
            if p.grad.layout != torch.strided:  # type: ignore[union-attr]
                raise ValueError(f"the gradient of {name} is sparse; use nn.Embedding(…, sparse=False)")
        if not moving:
            return loss
        k = kappa(self.net, sequence_length(self.net, self.seq_len), self.second_term, rtol=self.rtol)
        log_norm = _log_norm(self.net, k)
        if log_norm == -math.inf:
            raise ValueError(
                "the path norm of the network is 0 (a layer or head of zeros?), so that it has no path coordinates: "
                "initialise it"
            )
        group = self.param_groups[0]
        bias = moving.pop(_OUTPUT_BIAS, None)
        if bias is not None:
            assert bias.grad is not None
            quotient = bias.grad / k.dense(_OUTPUT_BIAS)
            if quotient.isfinite().all():
                bias.sub_(quotient.clamp_(-1, 1), alpha=self.param_groups[1]["lr"])
            step = self.state[bias].get("step", 0)
            self.state[bias]["step"] = step + 1
            if step < group["hold"]:
                return loss
        if moving:
            self._move(moving, k, log_norm, group)
        return loss

    def _move(self, moving: dict[str, Tensor], k: Kappa, log_norm: float, group: dict[str, Any]) -> None:
        share = math.exp((log_norm - float(k.log_path_norm)) / 2)  # of γ, without the output's bias
        units = [k.relative(name).sqrt().mul_(share).to(p.dtype) for name, p in moving.items()]  # γ/sqrt(κ)
        parameters = list(moving.values())
        gradients = [torch.mul(p.grad, unit) for p, unit in zip(parameters, units, strict=True)]  # type: ignore[arg-type]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        length = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not 0 < length < math.inf:
            return
        beta1, beta2 = group["betas"]
        for p, g, unit in zip(parameters, gradients, units, strict=True):
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            g /= length
            state["exp_avg"].lerp_(g, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_()
            # Squares below the dtype's range belong to entries that are as good as on no path.
            ratio = torch.where(root > 0, state["exp_avg"] / root, 0.0)
            step = ratio.abs().clamp_(max=1).pow_(group["power"]).copysign_(ratio)
            rate = group["lr"] * min(1.0, state["step"] / max(group["warmup"], 1))
            p.sub_(step.mul_(unit), alpha=rate / math.sqrt(p.numel()))


def _log_norm(net: PathNetwork, k: Kappa) -> float:
    """log γ² of the paths through the RNN, which are all those that end with a weight of the head."""
    if net.head is None or net.head.bias is None:
        return float(k.log_path_norm)
    mass = float((k.factors["head.weight"].double() * net.head.weight.double().square()).sum())
    return math.log(mass) + k.log_scales["head.weight"] if mass > 0 else -math.inf


def _is_share(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < 1
