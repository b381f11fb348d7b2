"""What PathSGD, PathAdam and GatedPathSGD have in common: a step is one call, from κ to the weights."""

from __future__ import annotations

import functools
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Real
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import plain
from .arguments import check_count, check_flags, check_number, check_writable, checked
from .bases import WithPath, unchanged_unless_loaded, without_hooks
from .feedforward import FeedForward
from .kappa import KAPPA2_FACTOR, Kappa, kappa, kappa_without_waiting, precision
from .kappa_state import from_state, moved, raw, to_state
from .network import WHOLE_SEQUENCES, Held, PathNetwork, gradients_used, sequence_length
from .ops.backend import at_once, choose, refusals, transformed, without_numbers
from .ops.step import NO_CONSTANT, NO_PATH, OVERFLOW, UNBOUNDED, UNREACHED, path_step_, path_update_

#: The module, whose name torch.optim has made away with.
_HOOKS = sys.modules[Optimizer.__module__]

#: Keywords that every optimiser of torch has, and what they do here.
SWITCHES = """foreach, fused: as for ``torch.optim.SGD``: by default and with ``fused=True`` a step is one call of the
            kernels where they serve (see ``explain``); ``fused=False`` takes it in plain torch, in float64.
        capturable: whether a step may be recorded in a CUDA graph. What would be an error is then a step left out, as
            is one whose κ underflows in the weights' dtype while it is recorded; without it, a GPU's kernels let an
            error be known at the next step, or at ``state_dict()``, weights and state intact.
        maximize: climb instead of descend.
        differentiable: refused, as κ is a constant of the step."""


class Switches(NamedTuple):
    """Those keywords."""

    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool

    def check(self, optimizer: str, net: object) -> None:
        check_flags(maximize=self.maximize, capturable=self.capturable, differentiable=self.differentiable)
        for name, choice in (("foreach", self.foreach), ("fused", self.fused)):
            if choice is not None and not isinstance(choice, bool):
                raise TypeError(f"{name} is {choice!r}; it must be True, False or None")
        if self.differentiable:
            raise ValueError(
                f"differentiable is True, but the step of {optimizer} takes κ and its own coordinates for constants, "
                "so that its derivative would be wrong: leave it False"
            )
        if self.foreach and self.fused:
            raise ValueError("foreach and fused are both True; give one of them")
        if self.fused and isinstance(net, FeedForward):
            raise ValueError(
                "fused is True, but net is a FeedForward, whose steps are taken in plain torch: leave it out"
            )
        if self.capturable and isinstance(net, FeedForward):
            raise ValueError(
                "capturable is True, but net is a FeedForward, whose κ takes decisions on the host: leave it out"
            )


class _Pending(NamedTuple):
    """The status of a step on a GPU, which nobody has asked for yet."""

    status: Tensor  # on the host
    done: torch.cuda.Event | None  # once it is there
    names: Sequence[str]
    dtype: torch.dtype
    read: bool  # whether κ had been read before, and was right


class Moving(NamedTuple):
    """The weights of a step, all of the network's, with their gradients; ``places``: of those that have one."""

    layout: Layout
    weights: list[Tensor]
    gradients: list[Tensor | None]
    places: list[int]

    def entries(self, k: Kappa, weights: Sequence[Tensor], *own: Sequence[Any]) -> list[plain.Weight]:
        """Of those that move, which are to be found in ``weights``: numbers, rates and what state there is."""
        layout, scaled = self.layout, k.scaled
        return [
            plain.Weight(i, layout.is_recurrent(i), weights[i], g, scaled[layout.names[i]], *of)  # type: ignore[arg-type]
            for i, of in zip(self.places, zip(*own, strict=True), strict=True)
            if (g := self.gradients[i]) is not None
        ]

    def named(self) -> tuple[list[str], list[Tensor]]:
        """Of those that move."""
        return [self.layout.names[i] for i in self.places], [self.weights[i] for i in self.places]

    def check_gradients(self) -> None:
        for i in self.places:
            if self.gradients[i].layout is not torch.strided:  # type: ignore[union-attr]
                raise ValueError(f"the gradient of {self.layout.names[i]} is sparse; use nn.Embedding(…, sparse=False)")


class _Ready(NamedTuple):
    """A step like the last one, for as long as the state is where it was."""

    weights: list[Tensor]  # that have any
    states: list[dict[str, Any]]
    held: Held  # of the states
    kind: Any  # Engine._kind_of
    moving: Tensor  # one of the weights that do
    dtype: torch.dtype
    step: Callable[..., int | None]  # of what a step gives beside


class Engine(WithPath):
    """An optimiser of a network alone, whose step is one call."""

    divides_by_kappa = True
    net: Any
    #: Of ops/step.py.
    rule: ClassVar[str]
    #: Of a weight's state: tensors of its shape.
    buffers: ClassVar[tuple[str, ...]]
    #: Numbers of a group beside the rate.
    options: ClassVar[tuple[str, ...]]
    second_term = checked("second_term", lambda name, value: check_flags(**{name: value}), drops="_kappa")
    seq_len = checked(
        "seq_len", lambda name, value: None if value is None else check_count(name, value), drops="_kappa"
    )
    rtol = checked("rtol", lambda name, value: check_number(name, value, zero=True), drops="_kappa")
    #: Options of Path-SGD's quotient; the others have none of these.
    scale: Any = property(lambda _: "none")
    eps: Any = property(lambda _: 0.0)
    trust_radius: Any = property(lambda _: None)
    update_every: Any = property(lambda _: 1)
    #: Whether steps count though κ is never kept: not where GradScaler leaves it to the kernels to leave one out.
    _counts = False
    _pending: _Pending | None = None
    _ready: _Ready | None = None
    #: On a GPU: whether the last κ that was read was right in the weights' dtype, so that the next one need not be.
    _trusted = False
    #: Whether one that was not read was wrong: from then on all are.
    _underflowed = False

    def __init__(
        self,
        net: PathNetwork | FeedForward,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        second_term: bool,
        seq_len: int | None,
        rtol: float,
        switches: Switches,
    ) -> None:
        switches.check(type(self).__name__, net)
        self.net = net
        self.second_term = second_term
        self.seq_len = seq_len
        self.rtol = rtol
        self._layout: Layout | None = None
        #: Of which κ and lags are kept.
        self._known: Sequence[Tensor] = self._weights()[1]
        self._kappa: Kappa | None = None
        self._kappa_of = self._of_network()
        self._kappa_steps: int | None = None  # T that it is of
        self._steps = 0
        #: Per chain, of the last κ: lags of κ⁽²⁾ that the next one tries first.
        self._lags: Tensor | None = None
        self._constant: Tensor | None = None  # log, of scale="first_step"; nan until a step has fixed it
        super().__init__(groups, {**defaults, **switches._asdict()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = {id(p) for p in self.net.parameters()}
        given = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(given, set) or not isinstance(given, Tensor | Iterable):
            return super().add_param_group(param_group)  # torch says what is wrong with it
        param_group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        # torch's optimisers also take pairs of a name and a parameter.
        if any(id(p[1] if isinstance(p, tuple) else p) not in own for p in param_group["params"]):
            raise ValueError(
                "these are not parameters of the network and have no κ: give them an optimiser of their own"
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        gradients_used(self.net)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves the scale, and steps that must be left out, to the kernels: unless steps count."""
        return self.update_every == 1

    def __getstate__(self) -> dict[str, Any]:
        own = without_hooks(self)
        return {key: value for key, value in own.items() if key not in _OF_A_SCALER} | {
            "_layout": None,
            "_ready": None,
            "_pending": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # of a state dict that lacks them
            for p in group["params"]:
                own = self.state.get(p, {})
                if "step" in own:  # torch leaves it on the device that it was saved on
                    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=p.device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss, None without a closure, which is called once, gradients enabled.

        Raises:
            ValueError: no sequence length is known, a gradient is sparse, γ² is 0 where the step needs it, or κ of a
                recurrent matrix is 0 and its gradient is not.
            FloatingPointError: a preconditioned gradient overflows though the gradient does not.
            In every case parameters, gradients and state are untouched. By the kernels of a GPU it is the next step
            that raises, so that none waits but the first; with ``capturable`` none raises.
        UserWarning: κ underflowed in the weights' dtype in the last step, which was left out; from then on the device
            is waited for in every step, and κ computed in a wider arithmetic where it must be.
        """
        try:
            if self._watched():
                # torch has wrapped a subclass's own step, around which hooks have run, then.
                wrapped = getattr(type(self).step, "__code__", None) is _watched_step.__code__
                given = () if closure is None else (closure,)  # as hooks see it of torch's optimisers
                return (_untraced_step if wrapped else _watched_step)(self, *given)
            return self._unwatched(closure)
        except BaseException:
            for name in _OF_A_SCALER:  # which leaves them there, and multiplies the next scale by what it finds
                self.__dict__.pop(name, None)
            raise

    # torch.optim would wrap step by what costs more than a small network's κ: here that is for those who watch.
    step.hooked = True  # type: ignore[attr-defined]

    def _watched(self) -> bool:
        """Whether anybody sees more of a step than what it does."""
        return bool(
            self._optimizer_step_pre_hooks  # type: ignore[attr-defined]
            or self._optimizer_step_post_hooks  # type: ignore[attr-defined]
            or _HOOKS._global_optimizer_pre_hooks
            or _HOOKS._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
            or torch.compiler.is_compiling()
        )

    def _unwatched(self, closure: Callable[[], Any] | None = None) -> Any:
        if _captures(self._known[0]) and (not self.param_groups[0]["capturable"] or self.update_every > 1):
            raise RuntimeError(
                "a CUDA graph is being captured, but the step is not for that: build the optimiser with "
                "capturable=True and update_every=1"
            )
        if self._pending is not None:
            self._raise_pending()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        if self._ready is not None and self._at_once(self._ready):
            return self._taken()
        self._ready = None
        moving = self._moving()
        if moving is None:
            return
        cached, lags = self._kappa, self._lags
        try:
            self._try(moving)
        except BaseException:
            self._kappa, self._lags = cached, lags
            raise
        self._taken()

    def _at_once(self, ready: _Ready) -> bool:
        """A step by the CPU's kernels, all but gradients and options held; False, and nothing is done, where something
        is out of the ordinary: ``_try`` takes it then, or says what is wrong."""
        layout, groups = self._layout, self.param_groups
        if (
            layout is None
            or not layout.fits(self.net, groups)
            or not all(map(operator.is_, map(self.state.get, ready.weights), ready.states))
            or not ready.held.still()
            or self.update_every > 1
            or ready.moving.grad is None  # nor, perhaps, any other's, and then T is nobody's to ask for
            or ready.moving.dtype != ready.dtype
            or not at_once()
        ):
            return False
        try:
            numbers = [self._numbers(group) for group in groups]
            if self._kind_of(groups) != ready.kind or layout.rates_are_tensors():
                return False
            weight = layout.weights[0]
            status = ready.step(numbers, *self._options(weight), *self._run(weight))
        except Exception:
            return False
        if status is None:  # other weights have gradients
            return False
        if status and not groups[0]["capturable"]:
            self._refuse(status, layout.names, layout.weights[0].dtype)
        return True

    def _make_ready(self, moving: Moving, states: list[dict[str, Any]]) -> None:
        from . import _C

        layout, weights, _, places = moving
        assert layout.structure is not None
        owners, chains = [layout.owners[i] for i in places], _C.Chains(*layout.structure)
        lists = *self._lists(states), self._bases(states)
        given: Any = (weights, places, layout.foreign, owners, *lists, self.rule, chains)
        kept = [(weights[i], state) for i, state in zip(places, states, strict=True) if state]
        self._ready = _Ready(
            weights=[p for p, _ in kept],
            states=[state for _, state in kept],
            held=Held((state, key) for state in states for key in state),
            kind=self._kind_of(layout.groups),
            moving=weights[places[0]],
            dtype=weights[0].dtype,
            step=functools.partial(_C.path_step_at_once, *given),
        )

    def _kind_of(self, groups: list[dict[str, Any]]) -> Any:
        """Of the options, what decides which state there is and who takes the step."""
        return groups[0]["fused"]

    def _try(self, moving: Moving) -> None:
        layout, weights = moving.layout, moving.weights
        states: list[dict[str, Any]] = []
        served = None
        try:
            states, new = self._states(moving)
            begins = bool(new) or (self.scale == "first_step" and self._constant is None)
            if begins and _captures(weights[0]):  # it would be made anew at every replay
                raise RuntimeError(
                    "a CUDA graph is being captured, but this step makes the state that later ones go on with: take "
                    "one before the capture"
                )
            if without_numbers(weights[0]) and not _recorded():
                status = 0
            elif (served := self._served(layout, weights[0])) is not None:
                status = self._call(served, moving, states)
            else:
                status = self._in_plain_torch(moving, states)
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
            moving.check_gradients()  # by name
            self._check_groups()
            if states:
                self._check_states(zip(*moving.named(), states, strict=True), alike=True)
            raise
        if status and not self.param_groups[0]["capturable"]:
            self._refuse(status, layout.names, weights[0].dtype)
        self.state.update(new)
        if served == "cpu" and self.update_every == 1 and not status:
            self._make_ready(moving, states)

    def _moving(self) -> Moving | None:
        """None if no weight has a gradient."""
        layout, groups = self._layout, self._groups()
        if layout is None or not layout.fits(self.net, groups):
            names, weights = self._weights()
            self._keep_for(weights)
            layout = self._layout = Layout(self.net, names, weights, groups)
        weights = layout.weights
        gradients = [p.grad if p.requires_grad else None for p in weights]
        for i in layout.foreign:
            gradients[i] = None
        places = [i for i, g in enumerate(gradients) if g is not None]
        return Moving(layout, weights, gradients, places) if places else None

    def _groups(self) -> list[dict[str, Any]]:
        """That hold the weights which are to be moved."""
        return self.param_groups

    def _keep_for(self, weights: Sequence[Tensor]) -> None:
        """What is kept of other weights, before a module of the network was replaced, is of no use to these."""
        if len(weights) != len(self._known) or any(map(operator.is_not, weights, self._known)):
            self._known, self._kappa, self._lags = weights, None, None
            self._trusted = self._underflowed = False

    def _taken(self) -> None:
        """A step has been: what is kept for the next."""
        gradients_used(self.net)
        if self._counts or self.update_every > 1:
            self._steps += 1
        if self._steps % self.update_every == 0:
            self._kappa = None  # its memory is of no use

    def _weights(self) -> tuple[list[str], list[Tensor]]:
        found = dict(self.net.named_parameters()) if isinstance(self.net, FeedForward) else self.net.weights()
        return list(found), list(found.values())

    def _states(self, moving: Moving) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """Of every weight that moves, and of these what is new: the optimiser's once the step is taken."""
        raise NotImplementedError

    def _served(self, layout: Layout, weight: Tensor) -> str | None:
        """Whose kernels take the step, "cpu" or "triton"; None: it is taken in plain torch."""
        fused = self.param_groups[0]["fused"]
        if fused is False or layout.structure is None:
            return None
        dtype = precision(weight.dtype)
        served = choose(weight.device, dtype)
        if served == "cuda" and weight.is_cuda and refusals(weight.device, dtype)["triton"] is None:
            served = "triton"
        if served in ("cpu", "triton"):
            return None if transformed() else served
        if fused:
            raise ValueError(
                f"fused is True, but the parameters are on {weight.device} and no kernel of this backend takes steps: "
                "leave it out, for steps in plain torch"
            )
        return None

    def _seq_len(self) -> int:
        # Without any T all gradients are 0, and so are their quotients by any κ.
        return sequence_length(self.net, self.seq_len) or 1

    def _first_lags(self, like: Tensor) -> Tensor | None:
        if not self.second_term:
            return None
        if self._lags is None:
            with torch.inference_mode(False):  # so that later steps, too, may write to it
                self._lags = torch.zeros(len(self.net.endings), dtype=torch.int64, device=like.device)
        self._lags = self._lags.to(like.device)
        return self._lags

    def _call(self, served: str, moving: Moving, states: list[dict[str, Any]]) -> int:
        layout, weights, gradients, places = moving
        groups = layout.groups
        numbers = [self._numbers(group) for group in groups]
        rates = [_tensor(group["lr"], weights[0]) for group in groups] if layout.rates_are_tensors() else []
        if len(groups) > 1:  # of every weight; else once for all
            numbers = [numbers[layout.owners[i]] for i in places]
            rates = rates and [rates[layout.owners[i]] for i in places]
        constant, *options = self._options(weights[0])
        update = (
            weights,
            gradients,
            *self._lists(states),
            constant,
            rates,
            list(chain.from_iterable(numbers)),
            self.rule,
            *layout.structure,  # type: ignore[misc]
            *options,
        )
        if served == "triton":
            return self._launch(update, moving)
        if self.update_every > 1:
            return path_update_(*update, *raw(self._cached(weights), self.net))
        *run, lags = self._run(weights[0])
        return path_step_(*update, *run, -1, lags, self._bases(states))  # workspace_bytes by default

    def _options(self, weight: Tensor) -> tuple[Any, ...]:
        """Of a step, as the op takes them: the constant; scale, eps, the radius and what GradScaler gives."""
        scaler = map(self.__dict__.get, _OF_A_SCALER)
        return (self._constant_on(weight), SCALES[self.scale], self.eps, self.trust_radius or 0.0, *scaler)

    def _run(self, weight: Tensor) -> tuple[Any, ...]:
        """Of κ, as the op takes it: T, outputs and h0, the second term's factor, its tolerance and its lags."""
        net, factor = self.net, KAPPA2_FACTOR["exact"] if self.second_term else 0.0
        ends = net.outputs == "last", net.h0 == "ones"
        return (self._seq_len(), *ends, factor, min(self.rtol, 1.0), self._first_lags(weight))

    def _bases(self, states: list[dict[str, Any]]) -> list[Tensor]:
        """Of PathSOAP (ops/step.py)."""
        return []

    def _launch(self, update: tuple[Any, ...], moving: Moving) -> int:
        """A step by Triton's kernels, whose status is asked for later."""
        from .ops.triton.step import path_update_

        weights = moving.weights
        moving.check_gradients()
        self._check_groups()
        check_written([weights[i] for i in moving.places], *update[2:5])
        update = (*update[:-2], *self._scaler(weights[0].device))
        capturable = self.param_groups[0]["capturable"]
        # A step whose status nobody asks for must not be left out in silence.
        unread = self._trusted and not capturable
        with torch.no_grad():
            k = self._cached(weights, unread)
            status = path_update_(*update, *raw(k, self.net))  # type: ignore[call-arg]
            if not capturable:
                if not unread:
                    self._trusted = not self._underflowed and int(k._chain.arithmetic) == 0
                self._pending = _Pending(*_to_host(status), moving.layout.names, weights[0].dtype, not unread)
        return 0

    def _scaler(self, device: torch.device) -> list[Tensor | None]:
        """GradScaler's numbers, which may be of another device."""
        return [None if (t := self.__dict__.get(name)) is None else t.to(device) for name in _OF_A_SCALER]

    def _raise_pending(self) -> None:
        """Raises what the last step would have raised, had it waited."""
        pending, self._pending = self._pending, None
        assert pending is not None
        if pending.done is not None:
            pending.done.synchronize()  # it has been for long, unless nothing else was to do
        status = int(pending.status)
        if status == UNBOUNDED and not pending.read:
            self._kappa, self._trusted, self._underflowed = None, False, True
            warnings.warn(
                f"the last step was left out, for κ underflowed in {pending.dtype}, or a weight is not finite: from "
                "now on every step waits for the device, and computes κ in a wider arithmetic where it must",
                stacklevel=3,
            )
        elif status:
            self._refuse(status, pending.names, pending.dtype)

    def _in_plain_torch(self, moving: Moving, states: list[dict[str, Any]]) -> int:
        layout, weights, _, places = moving
        groups = [layout.groups[layout.owners[i]] for i in places]
        moving.check_gradients()
        self._check_groups()
        check_written([weights[i] for i in places], *[state.values() for state in states])
        self._check_states(zip(*moving.named(), states, strict=True))
        with torch.no_grad():
            k = self._cached(weights)
            keys = (*self.buffers, "")[:2]
            state = [[of.get(key) for of in states] for key in (*keys, "step")]
            numbers = [tuple(map(float, self._numbers(group))) for group in groups]
            rates = [
                _tensor(lr, weights[0]).reshape(()) if isinstance(lr := group["lr"], Tensor) else float(lr)
                for group in groups
            ]
            entries = moving.entries(k, weights, numbers, rates, *state, states)
            scale, found_inf = self._scaler(weights[0].device)
            status, commit = self._decide(moving, k, entries, 1.0 if scale is None else 1 / scale)
            ok = status == 0
            if found_inf is not None:
                ok &= found_inf == 0
            skipped = found_inf is not None and not groups[0]["capturable"] and bool(found_inf)
            if not groups[0]["capturable"] and not skipped and (code := int(status)):
                return code
            commit(ok)
        return 0

    def _check_groups(self) -> None:
        """What is in the groups, where users and schedulers set it, by name; a GPU is not waited for."""
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                _check_one("lr", lr)
            if not (isinstance(lr, Tensor) and (lr.is_cuda or without_numbers(lr))) and not _is_finite(lr):
                raise ValueError(f"lr is {lr!r}; it must be a finite number, or a tensor")
            self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """The rest of one."""
        for name in self.options:
            if name in group and not _is_finite(group[name]):
                raise ValueError(f"{name} is {group[name]!r}; it must be a finite number")

    def _check_states(self, states: Iterable[tuple[str, Tensor, dict[str, Any]]], alike: bool = False) -> None:
        """By name, before anything is written, what the kernels check for themselves; ``alike``: dtypes, too."""
        for name, p, state in states:
            shapes = self._buffer_shapes(p)
            for key in (*shapes, "step"):
                if (value := state.get(key)) is None:
                    continue
                if not isinstance(value, Tensor):
                    raise TypeError(f"{key} of {name} is {value!r}; it must be a tensor: clear that state, or load it")
                if key == "step":
                    if value.numel() != 1:
                        raise ValueError(f"step of {name} has shape {tuple(value.shape)}; it must have one entry")
                    if alike and value.dtype != torch.float32:
                        raise TypeError(f"step of {name} is {value.dtype}; it must be torch.float32: convert it")
                elif value.layout is not torch.strided:
                    raise TypeError(f"{key} of {name} has layout {value.layout}; it must be strided")
                elif value.shape != shapes[key]:
                    raise ValueError(
                        f"{key} of {name} has shape {tuple(value.shape)}; it must be {tuple(shapes[key])}: it is "
                        "another network's"
                    )
                elif alike and value.dtype != p.dtype:
                    raise TypeError(
                        f"{key} of {name} is {value.dtype}, but the weight has become {p.dtype}: convert the state by "
                        "load_state_dict(optimizer.state_dict())"
                    )

    def _buffer_shapes(self, p: Tensor) -> dict[str, Sequence[int]]:
        return dict.fromkeys(self.buffers, p.shape)

    def _cached(self, weights: Sequence[Tensor], unread: bool = False) -> Kappa:
        """κ of a former step or of now; log γ² of one that is ``unread`` is nan where it is not to be used."""
        if self._kappa is not None and self._kappa_of == self._of_network():
            dtype, device = precision(weights[0].dtype), weights[0].device
            first = next(iter(self._kappa.scaled.values())).mantissa
            if (first.dtype, first.device) != (dtype, device):  # the network has been cast or moved since
                self._kappa = moved(self._kappa.scaled, self._kappa.log_path_norm, dtype, device)
            return self._kappa
        seq_len = 1 if isinstance(self.net, FeedForward) else self._seq_len()
        if isinstance(self.net, FeedForward):
            k = self.net.kappa()
        elif unread or _captures(weights[0]):
            k = kappa_without_waiting(self.net, seq_len, self.second_term, self.rtol)
        else:
            lags = self._first_lags(weights[0])
            tried: dict[str, int] | None = None
            if lags is not None:
                tried = dict(zip(self.net.recurrent, lags.sub(1).clamp_(min=0).tolist(), strict=True))
            k = kappa(self.net, seq_len, self.second_term, rtol=self.rtol, lags=tried)
            if lags is not None:
                # Where all lags were summed there is nothing to start from.
                found = k._chain.lags
                with torch.inference_mode(False):  # a new one, as the step may yet be refused
                    self._lags = torch.where(found < seq_len - 1, found, 0)
        self._kappa, self._kappa_of, self._kappa_steps = k, self._of_network(), seq_len
        return k

    def _of_network(self) -> tuple[Any, ...]:
        """Of the network, which κ depends on."""
        net = self.net
        return (net.input_shape,) if isinstance(net, FeedForward) else (net.outputs, net.h0)

    def _constant_on(self, like: Tensor) -> Tensor | None:
        if self.scale != "first_step":
            return None
        if self._constant is None or self._constant.device != like.device:
            with torch.inference_mode(False):
                self._constant = _tensor(math.nan if self._constant is None else self._constant, like)
        return self._constant

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The rule's (ops/step.py); 0 for a rate that is a tensor."""
        lr = group["lr"]
        return (0.0 if isinstance(lr, Tensor) else lr, *self._own_numbers(group), group["maximize"])

    def _own_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Between the rate and ``maximize``."""
        raise NotImplementedError

    def _lists(self, states: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        raise NotImplementedError

    def _decide(self, moving: Moving, k: Kappa, entries: list[plain.Weight], unscaled: Tensor | float) -> plain.Decided:
        raise NotImplementedError

    def _refuse(self, status: int, names: Sequence[str], dtype: torch.dtype) -> NoReturn:
        self._check_groups()  # with one that is no number, all that follows would be wrong about the cause
        if status == NO_PATH:
            raise ValueError(
                f"the path norm of the network is 0 (a layer or head of zeros?), so that {self._without_paths}"
            )
        if status == NO_CONSTANT:
            raise FloatingPointError(
                "the gradient of the first step, from which scale='first_step' takes its constant, is not finite, or "
                "overflows when divided by κ: lower the gradient, or use scale='path_norm'"
            )
        if status == UNBOUNDED:
            raise FloatingPointError(
                "γ² overflows in the reference backend, which does not rescale: use backend 'cpu' (see explain)"
            )
        name = names[(status - OVERFLOW) // 4]
        if status % 4 == UNREACHED % 4:
            raise ValueError(
                f"κ of {name} is 0, but its gradient is not: T is not that of the gradient; {WHOLE_SEQUENCES}"
            )
        raise FloatingPointError(self._overflow(name, dtype))

    def _overflow(self, name: str, dtype: torch.dtype) -> str:
        remedy = "a small eps, such as 1e-6" if self.scale == "path_norm" else "scale='path_norm'"
        return f"the path-normalised gradient of {name} overflows {dtype} with scale={self.scale!r}: use {remedy}"

    #: What follows from a path norm of 0.
    _without_paths = "it has no path coordinates: initialise it"

    # --- state dicts --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, with an entry ``"path"``: tensors and plain Python values only. May raise what ``step`` does."""
        return super().state_dict()

    def _saved(self) -> dict[str, Any]:
        if self._pending is not None:
            self._raise_pending()
        with self._without_state_hooks():
            return {**Optimizer.state_dict(self), "path": self._path()}

    def _path(self) -> dict[str, Any]:
        if self._kappa is not None or self._lags is not None:
            self._keep_for(self._weights()[1])
        lags = {} if self._lags is None else dict(zip(self.net.recurrent, self._lags.tolist(), strict=True))
        return {
            **self._settings(),
            "steps": self._steps,
            "log_constant": None if self._constant is None or self._constant.isnan() else float(self._constant),
            "lags": {name: count for name, count in lags.items() if count},
            "kappa": None if self._kappa is None else to_state(self._kappa),
            "kappa_of": None if self._kappa is None else self._kappa_depends_on(self._kappa_steps),
        }

    def _kappa_depends_on(self, seq_len: int | None) -> list[Any]:
        """What κ that is kept is of, beside weights, and for how long."""
        own = None if seq_len is None else int(seq_len)
        return [own, *map(str, self._of_network()), float(self.rtol), int(self.update_every)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned: bit for bit on parameters of the dtype that it was saved for.

        Raises:
            ValueError: the state dict is not of a like optimiser of a like network; nothing has changed then.
        """
        super().load_state_dict(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        rest, commit = self._parts(state_dict)
        with unchanged_unless_loaded([self]), self._without_state_hooks():
            Optimizer.load_state_dict(self, rest)
        commit()

    def _parts(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """What is torch's of a state dict, and what takes up the rest of it."""
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict is a {type(state_dict).__name__}; it must be what state_dict() returned")
        path = self._path_of(state_dict)
        for key, value in self._settings().items():
            if _differ(path.get(key), value):
                raise ValueError(
                    f"state_dict was saved with {key}={path.get(key)!r}, but this {self._kind} has {key}={value!r}: "
                    "build both alike"
                )
        steps, constant, lags = path.get("steps", 0), path.get("log_constant"), path.get("lags", {})
        if type(steps) is not int or steps < 0:
            raise ValueError(f"state_dict has steps={steps!r}; it must be a count")
        if constant is not None and (type(constant) is not float or not math.isfinite(constant)):
            raise ValueError(f"state_dict has log_constant={constant!r}; it must be None or a finite number")
        names, weights = self._weights()
        if not isinstance(lags, dict) or not all(
            name in names and type(count) is int and 0 <= count < 2**63 for name, count in lags.items()
        ):
            raise ValueError(f"state_dict has lags={lags!r}; they must be counts by recurrent weight")
        found = None if path.get("kappa") is None else from_state(path["kappa"], dict(zip(names, weights, strict=True)))
        kept = path.get("kappa_of")  # earlier versions did not say
        kept_steps = kept[0] if isinstance(kept, list) and kept and self.seq_len is None else self.seq_len
        if self.update_every == 1 or (kept is not None and _differ(kept, self._kappa_depends_on(kept_steps))):
            found = None
        groups, state = state_dict.get("param_groups"), state_dict.get("state")
        if (
            not isinstance(groups, list)
            or not isinstance(state, dict)
            or not all(isinstance(s, dict) for key, s in state.items() if type(key) is int)
        ):
            raise ValueError(f"state_dict lacks the {self._owner}'s 'state' and 'param_groups': it is damaged")
        held: list[Any] = [group.get("params") if isinstance(group, dict) else None for group in groups]
        if [len(part) if isinstance(part, list | tuple) else -1 for part in held] != self._sizes():
            raise ValueError(f"state_dict has param_groups that do not hold {self._sizes()} parameters: it is damaged")
        self._check_loaded(
            chain.from_iterable(held), state, {id(p): name for name, p in zip(names, weights, strict=True)}
        )

        @torch.inference_mode(False)
        def commit() -> None:
            self._steps, self._kappa, self._lags, self._constant, self._pending = steps, found, None, None, None
            self._known, self._kappa_of, self._kappa_steps = weights, self._of_network(), kept_steps
            self._trusted = self._underflowed = False
            if lags:
                counts = [lags.get(name, 0) for name in self.net.recurrent]
                self._lags = torch.tensor(counts, dtype=torch.int64, device=weights[0].device)
            if constant is not None:
                self._constant = torch.tensor(constant, dtype=torch.float64, device=weights[0].device)

        return {key: value for key, value in state_dict.items() if key != "path"}, commit

    def _check_loaded(self, numbers: Iterable[Any], state: dict[Any, Any], names: dict[int, str]) -> None:
        """ValueError if what is saved of a parameter is not what steps need."""
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        found = []
        try:
            for number, p in zip(numbers, parameters, strict=True):
                if id(p) in names and (own := state.get(number)):  # of a module that has been replaced it is never read
                    count = {"step": torch.zeros(())} if isinstance(own.get("step"), Real) else {}
                    found.append((names[id(p)], p, own | count))  # a number becomes a tensor
            self._check_states(found)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"state_dict is damaged: {error}") from error

    def _path_of(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The entry "path"; what stands for it in a state dict without one."""
        path = state_dict.get("path", self._settings())
        if not isinstance(path, dict):
            raise ValueError(f"state_dict has an entry 'path' that no {self._kind} saved: it is damaged")
        return path

    def _settings(self) -> dict[str, Any]:
        """What must be the same before and after."""
        return {"second_term": self.second_term, "shapes": self._shapes()}

    def _shapes(self) -> list[list[list[int]]]:
        return [[list(p.shape) for p in group["params"]] for group in self._groups()]

    def _sizes(self) -> list[int]:
        return [len(shapes) for shapes in self._shapes()]

    #: In the sentences about state dicts.
    _owner = "optimiser"

    @property
    def _kind(self) -> str:
        return type(self).__name__


# torch.compile has nothing to gain from one call, and would trace all that decides on it.
_untraced_step = torch._disable_dynamo(Engine._unwatched)  # type: ignore[attr-defined]
_watched_step = Optimizer.profile_hook_step(_untraced_step)


class Layout:
    """What the checks of a step came to; it serves as long as the same parameters are held in the same groups."""

    def __init__(
        self, net: PathNetwork | FeedForward, names: list[str], weights: list[Tensor], groups: list[dict[str, Any]]
    ) -> None:
        held: Iterable[tuple[Any, Any]] = ()
        if isinstance(net, PathNetwork):
            net.check_parameters()
            held = net.holders()
        self.names, self.weights = names, weights
        self.groups, self._lists = groups, [groups, *[group["params"] for group in groups]]
        owners = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        #: The place in ``groups`` of every weight's.
        self.owners = [owners.get(id(p), 0) for p in weights]
        #: Places of weights that no group holds.
        self.foreign = [i for i, p in enumerate(weights) if id(p) not in owners]
        #: What ops/step.py has of a PathNetwork.
        self.structure = net.structure if isinstance(net, PathNetwork) else None
        places = [*held, *[(group, "params") for group in groups]]
        places += [(own, i) for own in self._lists for i in range(len(own))]
        self._held = Held(places)  # all of this follows from it
        self._lengths = list(map(len, self._lists))

    def fits(self, net: PathNetwork | FeedForward, groups: list[dict[str, Any]]) -> bool:
        if groups is not self.groups or list(map(len, self._lists)) != self._lengths or not self._held.still():
            return False
        return not isinstance(net, FeedForward) or list(map(id, net.parameters())) == list(map(id, self.weights))

    def is_recurrent(self, i: int) -> bool:
        return self.structure is not None and self.names[i].startswith("rnn.weight_hh")

    def rates_are_tensors(self) -> bool:
        return any(isinstance(group["lr"], Tensor) for group in self.groups)


#: What GradScaler gives an optimiser, for the length of a step.
_OF_A_SCALER = ("grad_scale", "found_inf")
#: As the op numbers them.
SCALES = {"none": 0, "path_norm": 1, "first_step": 2}


def check_rate(name: str, value: Any) -> None:
    """Of a learning rate that an optimiser is built with."""
    if not isinstance(value, Tensor):
        return check_number(name, value, zero=True)
    _check_one(name, value)
    if not without_numbers(value):
        check_number(name, float(value.detach()), zero=True)


def _check_one(name: str, value: Tensor) -> None:
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{name} is a tensor of {value.dtype}, {list(value.shape)}; it must have one entry, and real")


def _differ(found: Any, own: Any) -> bool:
    """Whether what is found in a state dict is anything else."""
    try:
        return bool(found != own)
    except (RuntimeError, TypeError, ValueError):  # tensors among it, say
        return True


def _is_finite(value: Any) -> bool:
    value = value.detach() if isinstance(value, Tensor) else value
    try:
        return isinstance(value, Real | Tensor) and math.isfinite(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # beyond float64, complex, or several numbers
        return False


def _tensor(number: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        kept = number.dtype == torch.float32 or number.is_complex()  # the kernels refuse the latter
        return number.to(like.device, number.dtype if kept else torch.float64)
    return torch.full((), float(number), dtype=torch.float64, device=like.device)


def zeros_like(p: Tensor) -> Tensor:
    """State of a weight, which steps can write to within and without inference mode, whatever it was made in."""
    with torch.inference_mode(False):
        return torch.zeros_like(p, memory_format=torch.preserve_format)


def check_written(weights: Iterable[Tensor], *states: Iterable[Any]) -> None:
    """As the CPU's kernels do for themselves, before anything is written."""
    for p in weights:
        check_writable("a weight", p)
    for state in states:
        for t in state:
            if isinstance(t, Tensor):
                check_writable("an optimiser's state", t)


def _recorded() -> bool:
    """Whether operations on tensors without numbers are being recorded, by make_fx."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def _captures(weight: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which the host can read nothing."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _to_host(status: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not status.is_cuda:
        return status, None
    host = torch.empty((), dtype=status.dtype, device="cpu", pin_memory=True).copy_(status, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(status.device))
    return host, done
