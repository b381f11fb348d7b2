"""Adam in path coordinates."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import plain
from .arguments import FULL_DTYPES, check_number
from .engine import SWITCHES, Engine, Moving, Switches, check_rate, zeros_like
from .kappa import Kappa
from .network import PathNetwork, check_network

_OUTPUT_BIAS = "head.bias"


class InCoordinates(Engine):
    """Steps in path coordinates p sqrt(κ)/γ, in which the gradient's averages are kept; the output's bias apart."""

    rule = "coordinates"
    buffers = ("exp_avg", "exp_avg_sq")
    options: ClassVar[tuple[str, ...]] = ("power", "eps", "hold", "warmup", "maximize", "weight_decay")

    def __init__(
        self,
        net: PathNetwork,
        lr: float | Tensor,
        betas: tuple[float, float],
        bias_lr: float | Tensor,
        defaults: dict[str, Any],
        second_term: bool,
        seq_len: int | None,
        rtol: float,
        switches: Switches,
    ) -> None:
        check_network(net)
        for name, value in (("lr", lr), ("bias_lr", bias_lr)):
            check_rate(name, value)
        check_betas(betas)
        parameters = net.weights()
        _check_dtype(next(iter(parameters.values())).dtype)
        inner = {"params": [p for name, p in parameters.items() if name != _OUTPUT_BIAS]}
        groups: list[dict[str, Any]] = [inner]
        if _OUTPUT_BIAS in parameters:
            groups.append({"params": [parameters[_OUTPUT_BIAS]], "lr": bias_lr})
        defaults = {"lr": lr, "betas": tuple(betas), **defaults}
        super().__init__(net, groups, defaults, second_term, seq_len, rtol, switches)

    def _settings(self) -> dict[str, Any]:
        return {"rule": self._rule_of(self.defaults), **super()._settings()}

    def _path_of(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # Of the groups, which every state dict has.
        groups = state_dict.get("param_groups")
        first = groups[0] if isinstance(groups, list) and groups else None
        group = first if isinstance(first, dict) else self.defaults  # damaged, which is said later
        return {**super()._path_of(state_dict), "rule": self._rule_of(group)}

    @staticmethod
    def _rule_of(group: dict[str, Any]) -> str:
        return "GatedPathSGD" if "power" in group else "PathSOAP" if "shampoo_beta" in group else "PathAdam"

    def _states(self, moving: Moving) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        own, weights, new = self.state, moving.weights, {}
        _check_dtype(weights[0].dtype)  # they may have been cast since
        states = [own.get(weights[i]) for i in moving.places]
        for s, i in enumerate(moving.places):
            if not states[s]:
                group = moving.layout.groups[moving.layout.owners[i]]
                states[s] = new[weights[i]] = self._new_state(moving.layout.names[i], weights[i], group)
        return states, new  # type: ignore[return-value]

    def _new_state(self, name: str, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        averages = {} if name == _OUTPUT_BIAS else {key: zeros_like(p) for key in self.buffers}
        return {"step": zeros_like(p.new_empty((), dtype=torch.float32)), **averages}

    def _check_states(self, states: Iterable[tuple[str, Tensor, dict[str, Any]]], alike: bool = False) -> None:
        states = list(states)
        super()._check_states(states, alike)
        for name, _, state in states:
            needed = ("step", *(self.buffers if name != _OUTPUT_BIAS else ()))
            if missing := sorted(key for key in needed if state.get(key) is None):
                raise ValueError(f"the state of {name} lacks {', '.join(missing)}: clear it, or load it whole")

    def _own_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        shape = group.get("power", 1.0), group.get("eps", 0.0), group.get("hold", 0), group.get("warmup", 0)
        first, second = group["betas"]
        if not (0 <= first < 1 and 0 <= second < 1):  # with 1, no average is one
            check_betas(group["betas"])
        return (first, second, *shape)

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (*super()._numbers(group), group.get("weight_decay", 0.0))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        super()._check_group(group)

    def _lists(self, states: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        none = nothing(states[0]["step"])
        first, second = ([state.get(key, none) for state in states] for key in self.buffers)
        return first, second, [state["step"] for state in states]

    def _overflow(self, name: str, dtype: torch.dtype) -> str:
        return (
            f"the step of {name} in path coordinates, γ/sqrt(κ), overflows {dtype}: one of its entries is on next to "
            "no path; use a wider dtype, or lessen the growth of the other paths"
        )

    def _decide(
        self,
        moving: Moving,
        k: Kappa,
        entries: list[plain.Weight],
        unscaled: Tensor | float,
        turned: Callable[[plain.Weight, plain.Moved, Tensor], plain.Moved] | None = None,
    ) -> plain.Decided:
        names, weights = moving.layout.names, moving.weights
        bias = next((entry for entry in entries if names[entry.place] == _OUTPUT_BIAS), None)
        head = None
        if _OUTPUT_BIAS in names:
            i = names.index("head.weight")
            head = plain.Weight(i, False, weights[i], weights[i], k.scaled[names[i]], (), 0.0)
        inner = [entry for entry in entries if entry is not bias]
        return plain.coordinates(inner, head, bias, k.log_path_norm, unscaled, turned)


class PathAdam(InCoordinates):
    __doc__ = f"""Adam in path coordinates p̃ = p sqrt(κ)/γ, where a rescaling of nodes (Theorem 1) changes nothing.

    The gradient there is g̃ = γ g/sqrt(κ), and what Adam does with it entry by entry keeps the invariance of Path-SGD,
    which Adam on g/κ loses::

        m ← β₁ m + (1 - β₁) g̃/‖g̃‖        v ← β₂ v + (1 - β₂) (g̃/‖g̃‖)²
        u = sign(m) min(|m| / (sqrt(v / (1 - β₂ᵗ)) + eps), 1)
        Δp = -lr γ u / sqrt(n κ) - lr λ p

    ‖g̃‖ is over all tensors, and n the number of entries of the tensor: no tensor's step is longer than lr γ in the path
    metric. m has no bias correction: the first 1/(1 - β₁) steps grow to full length. :class:`GatedPathSGD` with
    ``power=1`` is this, and with a higher power trusts noisy gradients less; there is said what γ² is, how the output's
    bias moves, and which steps are left out.

    Args:
        net: the network, float32 or float64; every trainable parameter is held, its output's bias in a parameter
            group of its own.
        lr: longest step of a tensor in the path metric, over γ; may be a tensor.
        betas: β₁ and β₂, of the averages of the gradient and of its square.
        eps: added to the root of the second, which is at most 1.
        weight_decay: λ, of all but the output's bias, decoupled as in AdamW. Steps are relative to the weights, so that
            noise makes these grow over many steps; decay holds them.
        bias_lr: learning rate of the output's bias.
        second_term, seq_len, rtol: as for :class:`PathOptimizer`.
        {SWITCHES}

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), torch.nn.Linear(100, 1), outputs="last")
        >>> optimizer = pk.PathAdam(net, lr=0.1)
        >>> net(torch.rand(50, 16, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        net: PathNetwork,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_lr: float | Tensor = 0.1,
        second_term: bool = False,
        seq_len: int | None = None,
        rtol: float = 1e-3,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        for name, value in (("eps", eps), ("weight_decay", weight_decay)):
            check_number(name, value, zero=True)
        switches = Switches(maximize, foreach, fused, capturable, differentiable)
        own = {"eps": eps, "weight_decay": weight_decay}
        super().__init__(net, lr, betas, bias_lr, own, second_term, seq_len, rtol, switches)


_NONE = zeros_like(torch.empty(0, device="cpu"))


def nothing(like: Tensor) -> Tensor:
    """Stands for state that a weight has not."""
    return _NONE if type(like) is Tensor else like.new_empty(0)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FULL_DTYPES:
        raise TypeError(f"the network is {dtype}; use float32 parameters, under torch.autocast for half precision")


def check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(is_share, betas)):
        raise ValueError(f"betas is {betas!r}; it must be two numbers, each at least 0 and below 1")


def is_share(value: Any) -> bool:
    """Whether it can be a β."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return bool(0 <= value < 1) and float(value) < 1  # type: ignore[operator]  # of any make, and as a float
