"""Path-SGD (eq. (8)) as a preconditioner around any first-order optimiser of torch.optim."""

from __future__ import annotations

import functools
import math
import numbers
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bases import Step, Together, check_base
from .feedforward import FeedForward
from .kappa import Kappa, kappa, precision
from .network import PathNetwork
from .ops import update as cpu_update
from .ops.backend import ENVIRONMENT, extension_problem
from .rnn import ReLURNN

#: What torch._foreach_* take and return.
_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]

SCALES = ("none", "path_norm", "first_step")

#: Of exp's argument: the limit beyond which it takes every quotient of two numbers of the dtype out of its range, and
#: how much of it fits one factor with room to spare.
_EXPONENTS = {torch.float32: (400.0, 60.0), torch.float64: (3000.0, 600.0)}


class PathOptimizer(Optimizer):
    """Feeds a base optimiser with path-normalised gradients: g/κ (eq. (8)) in place of g.

    ``param_groups``, ``state``, ``defaults``, ``train()`` and ``eval()`` are the base optimiser's own, so that
    learning-rate schedulers, ``GradScaler`` and ``add_param_group`` work as ever. Parameters outside the network go
    through untouched, as do those without a gradient. During the base's step and its own hooks, and only then,
    ``p.grad`` holds the preconditioned gradient; torch's global hooks run once a step, around all of it.

    T is that of the gradients: of the forward passes that they came from, the longest since the last step or
    ``zero_grad()``, where calls of the RNN that pass the state on with its graph are one. Evaluations do not count, nor
    does what no gradient reached. In code compiled by torch.compile and in torch.func's transforms, which have no place
    for the hook that finds it, T is that of the RNN's last call with gradients enabled.

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
            rest. Step it through this object only. With ``trust_radius`` it must not keep weights of its own.
        net: the network; a module without recurrence as ``FeedForward(module, input_shape)``.
        second_term: whether κ includes κ⁽²⁾ (Lemma 1).
        scale: ``"none"``, g/κ, eq. (8) as it stands; ``"path_norm"``, γ² g/κ, dimensionless, for κ and γ² of any size
            (except that κ of the head's bias does not grow with γ²: where γ² overflows, give eps as well);
            ``"first_step"``, c g/κ with one constant c, fixed at the first step, that makes the first preconditioned
            gradient of the network as long as the raw one (c depends on where training starts: with it, only later
            rescalings leave the function's path unchanged).
        eps: adds eps γ² to κ. With 0, entries of κ = 0 (on no path) get a zero step.
        trust_radius: shortens the network's step Δp to sqrt(Σ κ Δp²) = trust_radius · γ where it is longer.
        update_every: steps between two computations of κ, which is cached, in state dicts too.
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
        check_net(net)
        if not isinstance(second_term, bool):
            raise TypeError(f"second_term is {second_term!r}; it must be True or False")
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; use one of {', '.join(map(repr, SCALES))}")
        check_number("eps", eps, zero=True)
        check_number("rtol", rtol, zero=True)
        if trust_radius is not None:
            check_number("trust_radius", trust_radius, zero=False)
        check_count("update_every", update_every)
        if seq_len is not None:
            check_count("seq_len", seq_len)
        if isinstance(net, FeedForward):
            for name, given, absent in (("second_term", second_term, False), ("seq_len", seq_len, None)):
                if given != absent:
                    raise ValueError(
                        f"{name} is {given!r}, but net is a FeedForward, which has no steps and whose κ⁽²⁾ is 0: leave "
                        "it out"
                    )

        bases = list(base) if isinstance(base, Sequence) else [base]
        for one in bases:
            if isinstance(one, PathOptimizer):
                raise ValueError(
                    "base is a PathOptimizer itself: gradients would be divided by κ twice; give it a plain one"
                )
            check_base(one, trust_radius is not None)
        base = bases[0] if len(bases) == 1 else Together(bases)
        self.base = base
        self.net: Any = net  # a PathNetwork wherever steps are spoken of
        self.second_term = second_term
        self.scale = scale
        self.eps = eps
        self.trust_radius = trust_radius
        self.update_every = update_every
        self.seq_len = seq_len
        self.rtol = rtol
        self._parameters = list(net.named_parameters())
        held = [id(p) for group in base.param_groups for p in group["params"]]
        missing = [name for name, p in self._parameters if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"base does not hold {', '.join(missing)}: give it every trainable parameter of the network, or give "
                "several bases that hold them together, or freeze those (requires_grad_(False))"
            )
        twice = [name for name, p in self._parameters if held.count(id(p)) > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} would be stepped by two bases: give each parameter to one")
        self._steps = 0
        self._log_constant: float | None = None  # of scale="first_step"
        self._metric: _Metric | None = None
        self._lags: dict[str, int] = {}  # of the last κ
        # In place of Optimizer.__init__, which would make groups and state of its own: its hooks and its patch of step.
        self.__setstate__({})
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{kind}_hooks", getattr(base, f"_optimizer_{kind}_hooks"))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        # Where the base has them, and else not: callers ask by hasattr.
        if name in ("train", "eval") and "base" in self.__dict__:
            bases = self.base.bases if isinstance(self.base, Together) else [self.base]
            if switches := [getattr(base, name) for base in bases if hasattr(base, name)]:
                return lambda: [switch() for switch in switches]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)
        gradients_used(self.net)

    def __getstate__(self) -> dict[str, Any]:
        # Without hooks and the step that a scheduler wraps, which torch's optimisers do not pickle either.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not isinstance(v, OrderedDict)}

    # torch.compile would take the numbers on the host, which change from step to step, for constants.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, None without a closure, which is called once, gradients enabled.

        Raises:
            ValueError: no sequence length is known, a gradient is sparse, γ² is 0 where scale or radius needs it, or κ
                of a recurrent matrix is 0 for T = 1 and its gradient is not.
            FloatingPointError: a preconditioned gradient overflows though the gradient does not.
            In every case parameters, gradients and state are untouched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [(name, p, p.grad) for name, p in self._parameters if p.grad is not None]
        moving = [entry for entry in held if entry[1].requires_grad]
        if not moving:
            self._base_step(held, [])
            return loss

        names, _, gradients = zip(*moving, strict=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(f"the gradient of {name} is sparse; use nn.Embedding(…, sparse=False)")
        metric, lags = self._cached(), self._lags
        if metric is None:
            k, lags = self._kappa()
            metric = None if k is None else _Metric(k, self.eps)
            needs_norm = self.scale == "path_norm" or self.trust_radius is not None
            if metric is not None and metric.log_norm == -math.inf and needs_norm:
                _check_zero(
                    gradients,
                    "the path norm of the network is 0 (a layer or head of zeros?), so that scale='path_norm' and "
                    "trust_radius would forbid every step: initialise it, or use scale='none' without a radius",
                )
                metric = None
        if metric is None:  # all gradients are 0, and whatever they were divided by would leave them so
            self._base_step(held, gradients)
            return loss
        wide = _wide(gradients)
        constant = self._log_constant
        if self.scale == "first_step" and constant is None:
            constant = metric.first_constant(names, wide)
        log_scale = {"none": 0.0, "path_norm": metric.log_norm, "first_step": constant or 0.0}[self.scale]
        preconditioned = self._precondition(metric, names, wide, log_scale, gradients[0].dtype)
        self._base_step(held, preconditioned, None if self.trust_radius is None else metric)
        self._steps += 1
        self._log_constant, self._lags = constant, lags
        self._metric = metric if self._steps % self.update_every else None  # else its memory is of no use
        return loss

    def _base_step(
        self, held: Sequence[tuple[str, Tensor, Tensor]], gradients: _Tensors, metric: _Metric | None = None
    ) -> None:
        """The base's step with these gradients of the trainable parameters among ``held``, shortened by a metric."""
        new = iter(gradients)
        for _, p, _ in held:
            # torch's optimisers move a frozen parameter that still has a gradient.
            p.grad = next(new) if p.requires_grad else None
        step = Step(self.base)
        try:
            if metric is None:
                step.run()
            else:
                moving = [(name, p) for name, p, _ in held if p.requires_grad]
                parameters, before = [p for _, p in moving], [p.data for _, p in moving]
                after = [p.clone() for p in before]
                try:
                    for p, copied in zip(parameters, after, strict=True):
                        p.data = copied
                    step.run()
                finally:
                    for p, own in zip(parameters, before, strict=True):
                        p.data = own
                torch._foreach_copy_(parameters, self._shortened(metric, [name for name, _ in moving], after, before))
            step.finish()
        finally:
            for _, p, gradient in held:
                p.grad = gradient

    def _cached(self) -> _Metric | None:
        """The κ of a former step, in the dtype and on the device that the network has now."""
        metric = self._metric
        if metric is not None:
            gradients_used(self.net)
            p, factor = self._parameters[0][1], next(iter(metric.factors.values()))
            if (factor.dtype, factor.device) != (precision(p.dtype), p.device):
                metric = self._metric = _Metric.from_state(metric.state(), dict(self._parameters), self.eps)
        return metric

    def _kappa(self) -> tuple[Kappa | None, dict[str, int]]:
        if isinstance(self.net, FeedForward):
            return self.net.kappa(), {}
        seq_len = sequence_length(self.net, self.seq_len)
        if seq_len is None:
            return None, {}
        # What κ tries first: one lag less than it needed before, so that the number can shrink again.
        first = {name: max(count - 1, 0) for name, count in self._lags.items()} if self.second_term else None
        k = kappa(self.net, seq_len, self.second_term, rtol=self.rtol, lags=first)
        # Where all lags were summed there is nothing to start from.
        return k, {name: count for name, count in k.lags.items() if count < seq_len - 1}

    def _precondition(
        self, metric: _Metric, names: Sequence[str], gradients: _Tensors, log_scale: float, dtype: torch.dtype
    ) -> _Tensors:
        """exp(log_scale) g/κ, rounded to ``dtype`` where that is narrower than the gradients'."""
        if (fused := _fused(gradients)) is not None:
            log_scales = [log_scale - metric.log_divisors[name] for name in names]
            scalars, power = split_scales(log_scales, gradients[0].dtype)
            divisors = [metric.divisors[name] for name in names]
            result, lost = fused.precondition(gradients, divisors, scalars, power)
            overflowed = lost.tolist()
        else:
            result = metric.divide(names, gradients, log_scale)
            # The cheapest test that no nan or infinity passes, with one transfer from the device.
            if math.isfinite(torch.stack([x.sum() for x in result]).sum().item()):
                overflowed = [False] * len(names)
            else:
                metric.mask_zeros()
                result = metric.divide(names, gradients, log_scale)
                overflowed = _overflowed(gradients, result)
        if dtype != gradients[0].dtype:
            result = [x.to(dtype) for x in result]
            overflowed = _overflowed(gradients, result)
        for name, lost in zip(names, overflowed, strict=True):
            if lost:
                remedy = "a small eps, such as 1e-6" if self.scale == "path_norm" else "scale='path_norm'"
                raise FloatingPointError(
                    f"the path-normalised gradient of {name} overflows {dtype} with scale={self.scale!r}: use {remedy}"
                )
        return result

    def _shortened(self, metric: _Metric, names: Sequence[str], after: _Tensors, before: _Tensors) -> _Tensors:
        """The weights after a step that is no longer than the radius; ``after`` may be written to."""
        log_radius = math.log(self.trust_radius)  # type: ignore[arg-type]
        after, before = _wide(after), _wide(before)
        if (fused := _fused(after)) is not None:
            log_scales = [metric.log_scales[name] - metric.log_norm - 2 * log_radius for name in names]
            fused.shorten_(after, before, [metric.factors[name] for name in names], log_scales)
            return after
        deltas = torch._foreach_sub(after, before)
        # nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
        log_ratio = metric.log_length(names, deltas) - log_radius
        if not log_ratio > 0:
            return after
        torch._foreach_mul_(deltas, math.exp(-log_ratio))
        return torch._foreach_add(before, deltas)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict with an entry ``"path"``: tensors and plain Python values only."""
        path = {
            "base": self._base_name(),
            "shapes": self._shapes(),
            "scale": self.scale,
            "second_term": self.second_term,
            "steps": self._steps,
            "log_constant": self._log_constant,
            "lags": dict(self._lags),
            "kappa": None if self._metric is None else self._metric.state(),
        }
        return {**self.base.state_dict(), "path": path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned: bit for bit on parameters of the dtype that it was saved for.

        Raises:
            ValueError: the state dict is not of a like optimiser of a like network; nothing has changed then.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict is a {type(state_dict).__name__}; it must be what state_dict() returned")
        if "path" not in state_dict:
            # The base's alone, to which torch.distributed.checkpoint cuts a state dict down.
            if self.scale == "first_step":
                raise ValueError(
                    "state_dict has no entry 'path', and with it no constant of scale='first_step': save state_dict() "
                    "whole, or use scale='path_norm'"
                )
            self._load(state_dict)
            return
        path = state_dict["path"]
        if not isinstance(path, dict):
            raise ValueError("state_dict has an entry 'path' that no PathOptimizer saved: it is damaged")
        expected = {
            "base": self._base_name(),
            "scale": self.scale,
            "second_term": self.second_term,
            "shapes": self._shapes(),
        }
        for key, value in expected.items():
            if path.get(key) != value:
                raise ValueError(
                    f"state_dict was saved with {key}={path.get(key)!r}, but this PathOptimizer has {key}={value!r}: "
                    "build both alike"
                )
        steps, constant = path.get("steps"), path.get("log_constant")
        if type(steps) is not int or steps < 0:
            raise ValueError(f"state_dict has steps={steps!r}; it must be a count")
        if constant is not None and (type(constant) is not float or not math.isfinite(constant)):
            raise ValueError(f"state_dict has log_constant={constant!r}; it must be None or a finite number")
        lags = path.get("lags", {})
        if not isinstance(lags, dict) or not all(
            name in dict(self._parameters) and type(count) is int and count >= 0 for name, count in lags.items()
        ):
            raise ValueError(f"state_dict has lags={lags!r}; they must be counts by recurrent weight")
        metric = None
        if path.get("kappa") is not None:
            metric = _Metric.from_state(path["kappa"], dict(self._parameters), self.eps)
        self._load(state_dict)
        self._steps, self._log_constant, self._metric, self._lags = steps, constant, metric, dict(lags)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """The base's part; all else as if training began here."""
        groups, state = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(groups, list) or not isinstance(state, dict):
            raise ValueError("state_dict lacks the base optimiser's 'state' and 'param_groups': it is damaged")
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group.get("params", ())) if isinstance(group, dict) else -1 for group in groups] != sizes:
            raise ValueError(f"state_dict has param_groups that do not hold {sizes} parameters: it is damaged")
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "path"})
        self._steps, self._log_constant, self._metric, self._lags = 0, None, None, {}

    def _base_name(self) -> str:
        bases = self.base.bases if isinstance(self.base, Together) else [self.base]
        return " + ".join(type(base).__name__ for base in bases)

    def _shapes(self) -> list[list[list[int]]]:
        return [[list(p.shape) for p in group["params"]] for group in self.param_groups]


def sequence_length(net: PathNetwork, seq_len: int | None) -> int | None:
    """T for a step: the optimiser's own, or that of the gradients, which are taken for used from now on.

    None where no T is known but every gradient is 0: it stays so, whatever T is.

    Raises:
        ValueError: no T is known; or κ of a recurrent matrix is 0, since T = 1, and its gradient is not.
    """
    if seq_len is not None:
        return seq_len
    found = net.last_seq_len
    if found is None:
        _check_zero(
            [p.grad for p in net.parameters() if p.grad is not None],
            "seq_len is None and the network's RNN has recorded no forward pass (torch.nn.RNN records none): "
            "run one before the step, or give the optimiser its seq_len",
        )
    elif found == 1 and net.h0 == "zeros":
        weights = net.weights()
        for name in (f"rnn.weight_hh_{ending}" for ending in net.endings):
            _check_zero(
                [g for g in (weights[name].grad,) if g is not None],
                f"κ of {name} is 0, for T is 1, but its gradient is not: give the optimiser seq_len=, the steps of "
                'whole sequences; where states are passed on without their graph, PathNetwork(…, h0="ones") has κ > 0',
            )
    gradients_used(net)
    return found


def gradients_used(net: PathNetwork | FeedForward) -> None:
    """T of the gradients that the network gets next has nothing to do with those that it has now."""
    if isinstance(net, PathNetwork) and isinstance(net.rnn, ReLURNN):
        net.rnn.steps.begin_anew()


def _check_zero(gradients: Sequence[Tensor], error: str) -> None:
    """A ValueError unless they are; a device is waited for."""
    if any(gradient.any() for gradient in gradients):
        raise ValueError(error)


def _wide(tensors: _Tensors) -> _Tensors:
    """The tensors in the dtype of their κ; themselves where they have it."""
    dtype = precision(tensors[0].dtype)
    return tensors if tensors[0].dtype == dtype else [x.to(dtype) for x in tensors]


def _overflowed(gradients: _Tensors, results: _Tensors) -> list[bool]:
    lost = [(raw.isfinite() & ~new.isfinite()).any() for raw, new in zip(gradients, results, strict=True)]
    return torch.stack(lost).tolist()


def _fused(tensors: _Tensors) -> Any:
    """The kernels of the update where they serve, else None."""
    if any(not 1 <= tensor.dim() <= 2 for tensor in tensors):  # of a FeedForward, such as a convolution's
        return None
    device = tensors[0].device
    backend = os.environ.get(ENVIRONMENT, "auto")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        return _triton()
    return cpu_update if backend in ("auto", "cpu") and device.type == "cpu" and extension_problem() is None else None


@functools.cache
def _triton() -> Any:
    from .ops import triton

    if triton.problem() is not None:
        return None
    from .ops.triton import update

    return update


class _Metric:
    """κ of one time as divisors, with logarithms of all scales kept in Python floats."""

    def __init__(self, k: Kappa, eps: float) -> None:
        log_norm = float(k.log_path_norm)
        if not log_norm < math.inf:
            raise FloatingPointError(
                "γ² overflows in the reference backend, which is not protected: use backend 'cpu' (see explain)"
            )
        self._fill(k.factors, k.log_scales, log_norm, eps)

    def _fill(self, factors: dict[str, Tensor], log_scales: dict[str, float], log_norm: float, eps: float) -> None:
        self.factors, self.log_scales, self.log_norm = factors, log_scales, log_norm
        # κ + eps γ² = divisor · exp(log_divisor).
        self.divisors, self.log_divisors = {}, {}
        for name, factor in factors.items():
            log_scale = log_scales[name]
            if eps > 0 and log_norm > -math.inf:
                log_eps = math.log(eps) + log_norm
                largest = max(log_scale, log_eps)
                factor = factor * math.exp(log_scale - largest) + math.exp(log_eps - largest)
                log_scale = largest
            self.divisors[name] = factor
            self.log_divisors[name] = log_scale

    def mask_zeros(self) -> None:
        """Give entries on no path, κ = 0, a zero step. On demand, for most networks have none."""
        self.divisors = {name: divisor.masked_fill(divisor == 0, math.inf) for name, divisor in self.divisors.items()}

    def divide(self, names: Sequence[str], gradients: _Tensors, log_scale: float) -> _Tensors:
        """exp(log_scale) g/κ, the scales combined before they touch a tensor."""
        scalars, power = split_scales([log_scale - self.log_divisors[name] for name in names], gradients[0].dtype)
        for i in range(power + 1):
            if i == power // 2:  # half of the factors before it
                gradients = torch._foreach_div(gradients, [self.divisors[name] for name in names])
            else:
                gradients = torch._foreach_mul(gradients, scalars)
        return gradients

    def first_constant(self, names: Sequence[str], gradients: _Tensors) -> float | None:
        """log(‖g‖ / ‖g/κ‖); None where either is 0, for then no step is taken that could fix it."""
        self.mask_zeros()
        quotients = torch._foreach_div(gradients, [self.divisors[name] for name in names])
        raw = _log_length(gradients, [0.0] * len(names))
        divided = _log_length(quotients, [-2 * self.log_divisors[name] for name in names])
        if raw == -math.inf or divided == -math.inf:
            return None
        if not (math.isfinite(raw) and math.isfinite(divided)):
            raise FloatingPointError(
                "the gradient of the first step, from which scale='first_step' takes its constant, is not finite, or "
                "overflows when divided by κ: lower the gradient, or use scale='path_norm'"
            )
        return raw - divided

    def log_length(self, names: Sequence[str], deltas: _Tensors) -> float:
        """log of sqrt(Σ κ Δp²) / γ."""
        roots = torch._foreach_sqrt([self.factors[name] for name in names])
        return _log_length(torch._foreach_mul(deltas, roots), [self.log_scales[name] - self.log_norm for name in names])

    def state(self) -> dict[str, Any]:
        return {"factors": self.factors, "log_scales": self.log_scales, "log_path_norm": self.log_norm}

    @classmethod
    def from_state(cls, state: Any, parameters: dict[str, Tensor], eps: float) -> _Metric:
        try:
            factors, log_scales, log_norm = state["factors"], state["log_scales"], state["log_path_norm"]
            fits = set(factors) == set(log_scales) == set(parameters) and not math.isnan(log_norm)
            fits &= len({factor.dtype for factor in factors.values()}) == 1
            for name, p in parameters.items():
                factor = factors[name]
                fits &= factor.dtype.is_floating_point and factor.expand_as(p).shape == p.shape
                fits &= math.isfinite(log_scales[name])
        except (AttributeError, KeyError, RuntimeError, TypeError):
            fits = False
        if not fits:
            raise ValueError("state_dict holds a cached κ that does not fit this network: it is damaged")
        metric = cls.__new__(cls)
        # As torch's optimisers convert their state to the parameters' dtype.
        factors = {name: factors[name].to(p.device, precision(p.dtype)) for name, p in parameters.items()}
        metric._fill(factors, log_scales, log_norm, eps)
        return metric


def split_scales(log_scales: Sequence[float], dtype: torch.dtype) -> tuple[list[float], int]:
    """Scalars and one power, scalar^power = exp(log_scale).

    Several factors where one would leave the dtype's range: what is multiplied with them need not.
    """
    limit, part = _EXPONENTS[dtype]
    exponents = [max(-limit, min(limit, value)) for value in log_scales]
    power = math.ceil(max(map(abs, exponents)) / part)
    return [math.exp(exponent / max(power, 1)) for exponent in exponents], power


def _log_length(tensors: _Tensors, log_scales: list[float]) -> float:
    """log sqrt(Σ exp(log_scale) ‖tensor‖²), the norms accumulated in float64."""
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).tolist()
    logs = [scale + 2 * math.log(norm) for scale, norm in zip(log_scales, norms, strict=True) if norm != 0]
    largest = max(logs, default=-math.inf)
    if not math.isfinite(sum(logs)):  # an infinite or nan norm
        return math.nan
    return (largest + math.log(sum(math.exp(value - largest) for value in logs))) / 2 if logs else -math.inf


def check_net(net: Any) -> None:
    if isinstance(net, PathNetwork):
        net.check_parameters()
    elif not isinstance(net, FeedForward):
        raise TypeError(
            f"net is a {type(net).__name__}; it must be a PathNetwork, as PathNetwork(rnn, head=…), or a FeedForward, "
            "as FeedForward(module, input_shape)"
        )


def check_number(name: str, value: Any, zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not 0 <= float(value) < math.inf or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; it must be finite and {'at least 0' if zero else 'positive'}")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; it must be a positive integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
