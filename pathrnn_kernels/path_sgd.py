"""Path-SGD (eq. (8))."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from . import plain
from .arguments import check_choice, check_count, check_flags, check_number, checked
from .engine import SCALES, SWITCHES, Engine, Moving, Switches, check_rate, zeros_like
from .feedforward import FeedForward
from .kappa import Kappa
from .network import PathNetwork


def _check_net(net: Any, second_term: Any, seq_len: Any) -> None:
    if isinstance(net, PathNetwork):
        net.check_parameters()
    elif not isinstance(net, FeedForward):
        raise TypeError(
            f"net is a {type(net).__name__}; it must be a PathNetwork, as PathNetwork(rnn, head=…), or a FeedForward, "
            "as FeedForward(module, input_shape)"
        )
    else:
        for name, given, absent in (("second_term", second_term, False), ("seq_len", seq_len, None)):
            if given != absent:
                raise ValueError(
                    f"{name} is {given!r}, but net is a FeedForward, which has no steps and whose κ⁽²⁾ is 0: leave it "
                    "out"
                )


class PathSGD(Engine):
    __doc__ = f"""Path-SGD (eq. (8)) on a network alone: SGD on g/κ, one call a step.

    The options of :class:`PathOptimizer` mean what they mean there, and momentum, Nesterov's and weight decay what they
    mean in ``torch.optim.SGD``. A step commutes with every node-wise rescaling of the network (Theorem 2), bit for bit
    where the factors are powers of two; a rescaling between two steps would have to rescale the momentum buffers too.

    Args:
        net: the network; a module without recurrence as ``FeedForward(module, input_shape)``.
        lr, momentum, weight_decay, nesterov: as for ``torch.optim.SGD``; lr may be a tensor.
        second_term, scale, eps, trust_radius, update_every, seq_len, rtol: as for :class:`PathOptimizer`.
        {SWITCHES}

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), torch.nn.Linear(100, 1), outputs="last")
        >>> optimizer = pk.PathSGD(net, lr=1.0, scale="path_norm", trust_radius=0.003)
        >>> net(torch.rand(50, 16, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "sgd"
    buffers = ("momentum_buffer",)
    options = ("momentum", "weight_decay", "nesterov", "maximize")
    scale = checked("scale", lambda name, value: check_choice(name, value, SCALES))
    eps = checked("eps", lambda name, value: check_number(name, value, zero=True))
    trust_radius = checked(
        "trust_radius", lambda name, value: None if value is None else check_number(name, value, zero=False)
    )
    update_every = checked("update_every", check_count, drops="_kappa")
    _without_paths = (
        "scale='path_norm' and trust_radius would forbid every step: initialise it, or use scale='none' without a "
        "radius"
    )

    def __init__(
        self,
        net: PathNetwork | FeedForward,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        second_term: bool = False,
        scale: Literal["none", "path_norm", "first_step"] = "none",
        eps: float = 0.0,
        trust_radius: float | None = None,
        update_every: int = 1,
        seq_len: int | None = None,
        rtol: float = 1e-3,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        _check_net(net, second_term, seq_len)
        check_rate("lr", lr)
        check_number("momentum", momentum, zero=True)
        check_number("weight_decay", weight_decay, zero=True)
        check_flags(nesterov=nesterov)
        if nesterov and momentum == 0:
            raise ValueError("nesterov is True without momentum: give momentum, such as 0.9")
        self.scale = scale
        self.eps = eps
        self.trust_radius = trust_radius
        self.update_every = update_every
        # In the order of a state dict, whatever the module's.
        parameters = list(net.weights().values() if isinstance(net, PathNetwork) else net.parameters())
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        switches = Switches(maximize, foreach, fused, capturable, differentiable)
        super().__init__(net, [{"params": parameters}], own, second_term, seq_len, rtol, switches)

    def _states(self, moving: Moving) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        layout, weights, _, places = moving
        states: list[dict[str, Any]] = [{}] * len(places)
        new: dict[Tensor, dict[str, Any]] = {}
        if all(group["momentum"] == 0 for group in layout.groups):
            return states, new
        for s, i in enumerate(places):
            if layout.groups[layout.owners[i]]["momentum"] != 0:
                states[s] = self.state.get(p := weights[i], {})
                if states[s].get("momentum_buffer") is None:
                    states[s] = new[p] = {**states[s], "momentum_buffer": zeros_like(p)}
        return states, new

    def _kind_of(self, groups: list[dict[str, Any]]) -> Any:
        return super()._kind_of(groups), [group["momentum"] != 0 for group in groups]

    def _own_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["momentum"], group["weight_decay"], group["nesterov"]

    def _lists(self, states: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        if not any(states):
            return [], [], []
        first = [state.get("momentum_buffer") for state in states]
        if any(buffer is None for buffer in first):  # empty for a weight that has none
            none = next(buffer for buffer in first if buffer is not None).new_empty(0)
            first = [none if buffer is None else buffer for buffer in first]
        return first, [], []  # type: ignore[return-value]

    def _decide(self, moving: Moving, k: Kappa, entries: list[plain.Weight], unscaled: Tensor | float) -> plain.Decided:
        constant = self._constant_on(moving.weights[0])
        return plain.sgd(entries, k.log_path_norm, self.scale, self.eps, self.trust_radius, constant, unscaled)

    def _settings(self) -> dict[str, Any]:
        return {"base": "SGD", "scale": self.scale, **super()._settings()}

    def _path_of(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if "path" not in state_dict and self.scale == "first_step":
            raise ValueError(
                "state_dict has no entry 'path', and with it no constant of scale='first_step': save state_dict() "
                "whole, or use scale='path_norm'"
            )
        return super()._path_of(state_dict)
