"""Path-SGD (eq. (8)) as a preconditioner around any first-order optimiser of torch.optim."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import plain
from .bases import Step, Together, WithPath, bases_of, check_base, unchanged_unless_loaded, without_hooks
from .engine import SCALES, Moving, check_written
from .feedforward import FeedForward
from .kappa_state import raw
from .network import PathNetwork, gradients_used
from .ops.backend import without_numbers
from .ops.step import path_update_
from .path_sgd import PathSGD


def _held_by(part: str, name: str) -> Any:
    """An attribute that is a part's."""

    def change(self: PathOptimizer, value: Any) -> None:
        setattr(getattr(self, part), name, value)

    return property(operator.attrgetter(f"{part}.{name}"), change)


class PathOptimizer(WithPath):
    """Feeds a base optimiser with path-normalised gradients: g/κ (eq. (8)) in place of g.

    ``param_groups``, ``state``, ``defaults``, ``train()`` and ``eval()`` are the base optimiser's own, so that
    learning-rate schedulers, ``GradScaler`` and ``add_param_group`` work as ever. Parameters outside the network go
    through untouched, as do those without a gradient. During the base's step and its own hooks, and only then,
    ``p.grad`` holds the preconditioned gradient; torch's global hooks run once a step, around all of it.

    T is that of the gradients: of the forward passes that they came from, the longest since the last step or
    ``zero_grad()``, where calls of the RNN that pass the state on with its graph are one. In compiled code and in
    torch.func's transforms, where no hook can be, it is that of the RNN's last call with gradients enabled.

    One step commutes with every node-wise rescaling of the network (Theorem 2) for a base that is linear in gradients
    and weights: SGD with or without momentum, Nesterov's included (a rescaling between two steps would have to rescale
    its buffers too), and weight decay, because p scales as g/κ does. It does not for Adam, AdamW and RMSprop, which
    normalise each entry; nor with eps > 0, as κ of different weights scales differently but eps γ² does not; nor with
    ``PathNetwork(h0="ones")``, where γ² itself is not invariant. ``trust_radius`` keeps it.

    For bfloat16 and float16 parameters κ, the quotient and the radius are formed in float32, and the preconditioned
    gradient is rounded to their dtype, as is the shortened step; a step below the dtype's spacing is lost there as with
    any optimiser. Autocast with float32 parameters has no such limit.

    With ``trust_radius`` the base steps from copies of the weights, and each weight is written once, when the step is
    short enough: nobody sees a longer one.

    Args:
        base: an optimiser of ``torch.optim`` that takes one gradient a step and holds every trainable parameter of
            the network, and any others; or several that hold them together, say Muon for matrices and AdamW for the
            rest. Step it through this object only. With ``trust_radius`` it must not keep weights of its own; ASGD may.
        net: the network; a module without recurrence as ``FeedForward(module, input_shape)``.
        second_term: whether κ includes κ⁽²⁾ (Lemma 1).
        scale: ``"none"``, g/κ, eq. (8) as it stands; ``"path_norm"``, γ² g/κ, dimensionless, for κ and γ² of any size
            (except that κ of the head's bias does not grow with γ²: where γ² overflows, give eps as well);
            ``"first_step"``, c g/κ with one constant c, fixed at the first step, that makes the first preconditioned
            gradient of the network as long as the raw one (c depends on where training starts: with it, only later
            rescalings leave the function's path unchanged).
        eps: adds eps γ² to κ. With 0, entries of κ = 0 (on no path) get a zero step.
        trust_radius: shortens the network's step Δp to sqrt(Σ κ Δp²) = trust_radius · γ where it is longer.
        update_every: steps between two computations of κ, which is cached, in state dicts too; that a weight is no
            longer finite is noticed when it is computed.
        seq_len: T; by default that of the gradients.
        rtol: relative truncation error allowed in κ⁽¹⁾ + κ⁽²⁾, as for :func:`kappa`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), torch.nn.Linear(100, 1), outputs="last")
        >>> adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> optimizer = pk.PathOptimizer(adam, net, scale="path_norm", trust_radius=0.003)
        >>> net(torch.rand(50, 16, 2)).square().mean().backward()
        >>> optimizer.step()  # κ for T = 50, the steps that the gradient came through
    """

    divides_by_kappa = True
    #: Whether the base has been seen to step from copies.
    _tried = False
    second_term = _held_by("_preconditioner", "second_term")
    scale = _held_by("_preconditioner", "scale")
    eps = _held_by("_preconditioner", "eps")
    update_every = _held_by("_preconditioner", "update_every")
    seq_len = _held_by("_preconditioner", "seq_len")
    rtol = _held_by("_preconditioner", "rtol")
    param_groups = _held_by("base", "param_groups")
    state = _held_by("base", "state")
    defaults = _held_by("base", "defaults")

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        net: PathNetwork | FeedForward,
        second_term: bool = False,
        scale: Literal["none", "path_norm", "first_step"] = "none",
        eps: float = 0.0,
        trust_radius: float | None = None,
        update_every: int = 1,
        seq_len: int | None = None,
        rtol: float = 1e-3,
    ) -> None:
        preconditioner = _Preconditioner(
            net,
            second_term=second_term,
            scale=scale,
            eps=eps,
            trust_radius=trust_radius,
            update_every=update_every,
            seq_len=seq_len,
            rtol=rtol,
        )
        bases = list(base) if isinstance(base, Sequence) else [base]
        if not bases:
            raise ValueError("base is an empty list; give it an optimiser, or several that hold the network's weights")
        for one in bases:
            if getattr(one, "divides_by_kappa", False):
                raise ValueError(
                    f"base is a {type(one).__name__} itself: gradients would be divided by κ twice; give it a plain one"
                )
            check_base(one, trust_radius is not None)
        base = bases[0] if len(bases) == 1 else Together(bases)
        self.base = preconditioner.base = base
        self.net: Any = net  # a PathNetwork wherever steps are spoken of
        self._preconditioner = preconditioner
        parameters = list(net.named_parameters())
        held = [id(p) for group in base.param_groups for p in group["params"]]
        missing = [name for name, p in parameters if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"base does not hold {', '.join(missing)}: give it every trainable parameter of the network, or give "
                "several bases that hold them together, or freeze those (requires_grad_(False))"
            )
        twice = [name for name, p in parameters if held.count(id(p)) > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} would be stepped by two bases: give each parameter to one")
        # In place of Optimizer.__init__, which would make groups and state of its own: its hooks and its patch of step.
        self.__setstate__({})

    @property
    def trust_radius(self) -> float | None:
        return self._preconditioner.trust_radius

    @trust_radius.setter
    def trust_radius(self, radius: float | None) -> None:
        for base in bases_of(self.base) if radius is not None else ():
            check_base(base, True)
        self._preconditioner.trust_radius = radius

    def __getattr__(self, name: str) -> Any:
        # Where the base has them, and else not: callers ask by hasattr.
        bases = bases_of(self.base) if name in ("train", "eval") and "base" in self.__dict__ else []
        if switches := [getattr(base, name) for base in bases if hasattr(base, name)]:
            return lambda: [switch() for switch in switches]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)
        gradients_used(self.net)

    def __getstate__(self) -> dict[str, Any]:
        return without_hooks(self)

    # torch.compile would take the numbers on the host, which change from step to step, for constants.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, None without a closure, which is called once, gradients enabled.

        Raises:
            ValueError: no sequence length is known, a gradient is sparse, γ² is 0 where scale or radius needs it, or κ
                of a recurrent matrix is 0 for T = 1 and its gradient is not.
            FloatingPointError: a preconditioned gradient overflows though the gradient does not, or the base's step of
                such gradients does, with a trust radius.
            In every case parameters, gradients and state are untouched, but for the base's state in the last one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = self._preconditioner
        weights = own._weights()[1]  # of now: a module may have been replaced
        own._keep_for(weights)
        held = [(p, p.grad) for p in weights if p.grad is not None]
        cached, constant = own._kappa, own._constant
        lags = own._lags
        own._constant = None if constant is None else constant.clone()  # written in place
        try:
            quotients = own.quotients()
            self._base_step(held, quotients)
        except BaseException:
            own._kappa, own._constant, own._lags = cached, constant, lags
            raise
        if quotients:
            own._taken()
        return loss

    def _base_step(self, held: Sequence[tuple[Tensor, Tensor]], quotients: dict[Tensor, Tensor]) -> None:
        """The base's step with these gradients in place of those that are held, no longer than the radius."""
        bounded = self.trust_radius is not None and quotients
        after = {p: p.clone() for p in quotients} if bounded else {}
        step = Step(self.base, after)
        try:
            for p, _ in held:
                # torch's optimisers move a frozen parameter that still has a gradient.
                p.grad = quotients.get(p)
            if not bounded:
                step.run()
            else:
                before = {p: p.data for p in quotients}
                tried = self._tried or any(map(without_numbers, quotients))
                first = {} if tried else {p: p.clone() for p in quotients}
                try:
                    for p, copied in after.items():
                        p.data = copied
                    step.run()
                    for p in after:
                        after[p] = p.data  # where a base may have put another tensor
                finally:
                    for p, own in before.items():
                        p.data = own
                if first:
                    self._check_copies(first)
                try:
                    self._preconditioner.write(after)
                except FloatingPointError as error:
                    if all(bool(quotient.isfinite().all()) for quotient in quotients.values()):
                        raise FloatingPointError(
                            "the base's step leaves the range of the weights' dtype before trust_radius can shorten it "
                            "(its state has taken the gradient up): give it a smaller lr"
                        ) from error
                    for p, moved in after.items():  # as torch's optimisers take a gradient that is not finite
                        p.copy_(moved)
            step.finish()
        finally:
            for p, gradient in held:
                if p.grad is not None or p not in quotients:  # else a hook of the base's has taken it away
                    p.grad = gradient

    def _check_copies(self, first: dict[Tensor, Tensor]) -> None:
        """Of the first step: that the base has moved the copies that it was given, and not the weights."""
        if any(not torch.equal(p, was) for p, was in first.items()):
            for p, was in first.items():
                p.copy_(was)
            raise ValueError(
                f"base is {self._preconditioner.base_name}, which moves the memory where weights were (one buffer for "
                "all?) instead of what its parameters hold, so that trust_radius cannot shorten its step: leave it out"
            )
        self._tried = True

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict with an entry ``"path"``: tensors and plain Python values only."""
        return super().state_dict()

    def _saved(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "path": self._preconditioner._path()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned: bit for bit on parameters of the dtype that it was saved for.

        That of the base alone, to which torch.distributed.checkpoint cuts a state dict down, will do, except with
        ``scale="first_step"``.

        Raises:
            ValueError: the state dict is not of a like optimiser of a like network; nothing has changed then.
        """
        super().load_state_dict(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        rest, commit = self._preconditioner._parts(state_dict)
        with unchanged_unless_loaded(bases_of(self.base)):
            self.base.load_state_dict(rest)
        commit()


class _Preconditioner(PathSGD):
    """What comes before and after the step of another optimiser: the quotients that it gets, and the radius."""

    base: Optimizer
    _counts = True
    _owner = "base optimiser"
    _kind = "PathOptimizer"

    def _groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def _check_loaded(self, *_: Any) -> None:
        """The base's state is the base's."""

    def quotients(self) -> dict[Tensor, Tensor]:
        """Parameter → what eq. (8) puts in place of its gradient, of all that have one."""
        moving = self._moving()
        if moving is None:
            return {}
        weights = moving.weights
        moving.check_gradients()
        check_written([weights[i] for i in moving.places])
        written = list(weights)  # a step of -1 from zeros
        for i in moving.places:
            written[i] = torch.zeros_like(weights[i])
        # A step of no length is forbidden where γ² is 0; else a quotient may be as long as it likes.
        radius = 0.0 if self.trust_radius is None else math.inf
        self._write("sgd", (-1.0, 0.0, 0.0, 0.0, 0.0), radius, moving, written)
        return {weights[i]: written[i] for i in moving.places}

    def write(self, after: dict[Tensor, Tensor]) -> None:
        """Move the weights to where another optimiser's step ends, or towards it as far as the radius allows."""
        assert self._layout is not None and self.trust_radius is not None
        weights = self._weights()[1]
        steps = [after.get(p) for p in weights]
        places = [i for i, step in enumerate(steps) if step is not None]
        self._write("given", (), self.trust_radius, Moving(self._layout, weights, steps, places), weights)

    def _write(self, rule: str, given: tuple[float, ...], radius: float, moving: Moving, written: list[Tensor]) -> None:
        layout, weights, gradients, places = moving
        if without_numbers(weights[0]):
            return
        k = self._cached(weights)
        # A step that has been taken is no quotient to be scaled, nor one to take the constant from.
        scale = "none" if rule == "given" else self.scale
        constant = self._constant_on(weights[0]) if scale == "first_step" else None
        if self._served(layout, weights[0]) == "cpu":
            # Weights, gradients, no state; then what ops/step.py has after it.
            update = (written, gradients, [], [], [], constant, [], given, rule, *layout.structure)  # type: ignore[misc]
            status = path_update_(*update, SCALES[scale], self.eps, radius, None, None, *raw(k, self.net))
        else:
            entries = moving.entries(k, written, [given] * len(places), [-1.0] * len(places))
            if rule == "given":
                decided, commit = plain.given(entries, k.log_path_norm, radius)
            else:
                decided, commit = plain.sgd(entries, k.log_path_norm, scale, self.eps, radius, constant, 1.0)
            if not (status := int(decided)):
                commit(decided == 0)
        if status:
            self._refuse(status, layout.names, weights[0].dtype)

    @property
    def base_name(self) -> str:
        return " + ".join(type(base).__name__ for base in bases_of(self.base))

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "base": self.base_name}
