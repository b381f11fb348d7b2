"""The optimisers that a PathOptimizer wraps: which can serve, several as one, and their step without torch's hooks."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: Of the weights that a trial steps from: what is near it after a step with a gradient of 0 is a weight.
_MARK = 1e4


class _States(MutableMapping[Any, Any]):
    """The state of several bases: of each parameter that of the base that holds it, made when it is asked for."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self._bases = bases

    def _of(self, p: Any) -> Any:
        for base in self._bases:
            if p in base.state or any(p is own for group in base.param_groups for own in group["params"]):
                return base.state
        raise KeyError(p)

    def __getitem__(self, p: Any) -> Any:
        return self._of(p)[p]

    def __setitem__(self, p: Any, state: Any) -> None:
        self._of(p)[p] = state

    def __delitem__(self, p: Any) -> None:
        del self._of(p)[p]

    def __contains__(self, p: Any) -> bool:
        return any(p in base.state for base in self._bases)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(base.state for base in self._bases)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)


class Together(Optimizer):
    """Several optimisers, each with parameters of its own, as one."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.bases = list(bases)
        self.__setstate__({})  # in place of Optimizer.__init__: hooks, but no groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for base in self.bases for group in base.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for base, own in zip(self.bases, self._split(groups), strict=True):
            base.param_groups = own

    @property
    def state(self) -> Any:  # type: ignore[override]
        return _States(self.bases)

    @state.setter
    def state(self, state: Any) -> None:
        for base in self.bases:
            own = (p for group in base.param_groups for p in group["params"])
            kept = {key: value for key, value in base.state.items() if not isinstance(key, Tensor)}
            base.state = defaultdict(dict, kept | {p: state[p] for p in own if p in state})

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """What every group of every base has, as schedulers suppose of defaults."""
        first, *others = (base.defaults for base in self.bases)
        return {key: value for key, value in first.items() if all(key in other for other in others)}

    def _split(self, groups: list[Any]) -> Iterator[list[Any]]:
        if len(groups) != len(self.param_groups):
            raise ValueError(f"there are {len(groups)} param_groups; the bases have {len(self.param_groups)}")
        rest = iter(groups)
        for base in self.bases:
            yield [next(rest) for _ in base.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ValueError("there are several bases: add the group to the one that shall hold it")

    def zero_grad(self, set_to_none: bool = True) -> None:
        for base in self.bases:
            base.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {"bases": self.bases}

    def state_dict(self) -> dict[str, Any]:
        """The bases' state dicts as that of one optimiser with all groups."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for number, base in enumerate(self.bases):
            own, first = base.state_dict(), sum(len(group["params"]) for group in groups)
            # What is no parameter's has a key of its own.
            state.update({first + i if type(i) is int else (number, i): value for i, value in own["state"].items()})
            groups += [{**group, "params": [first + i for i in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = state_dict["state"]
        for number, (base, groups) in enumerate(zip(self.bases, self._split(state_dict["param_groups"]), strict=True)):
            own = {i: state[i] for group in groups for i in group["params"] if i in state}
            own.update({i[1]: value for i, value in state.items() if type(i) is tuple and i[0] == number})
            base.load_state_dict({"state": own, "param_groups": groups})


def bases_of(base: Optimizer) -> list[Optimizer]:
    return base.bases if isinstance(base, Together) else [base]


@contextlib.contextmanager
def unchanged_unless_loaded(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Gives them back the state and the groups that they had, where loading others fails half-way.

    Raises:
        ValueError: in place of whatever torch comes upon in a damaged state.
    """
    before = [dict(vars(optimizer)) for optimizer in optimizers]
    try:
        yield
    except Exception as e:
        for optimizer, own in zip(optimizers, before, strict=True):
            vars(optimizer).clear()
            vars(optimizer).update(own)
        raise ValueError(f"state_dict does not fit this optimiser, or is damaged: {type(e).__name__}: {e}") from e


class WithPath(Optimizer):
    """Whose state dicts have an entry ``"path"``: torch's hooks see it, and come before it is checked."""

    def state_dict(self) -> dict[str, Any]:
        hooks = vars(self)
        for hook in list(hooks["_optimizer_state_dict_pre_hooks"].values()):
            hook(self)
        found = self._saved()
        for hook in list(hooks["_optimizer_state_dict_post_hooks"].values()):
            replaced = hook(self, found)
            found = found if replaced is None else replaced
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        hooks = vars(self)
        if hooks["_optimizer_load_state_dict_pre_hooks"]:
            state_dict = state_dict.copy()  # as torch gives it to them
        for hook in list(hooks["_optimizer_load_state_dict_pre_hooks"].values()):
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._load(state_dict)
        for hook in list(hooks["_optimizer_load_state_dict_post_hooks"].values()):
            hook(self)

    def _saved(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _without_state_hooks(self) -> Iterator[None]:
        own = {kind: hooks for kind, hooks in vars(self).items() if kind.endswith(_STATE_HOOKS)}
        vars(self).update({kind: {} for kind in own})
        try:
            yield
        finally:
            vars(self).update(own)


_STATE_HOOKS = "state_dict_pre_hooks", "state_dict_post_hooks"


def without_hooks(optimizer: Optimizer) -> dict[str, Any]:
    """Its attributes, but for hooks and the step that a scheduler wraps, which torch's do not pickle either."""
    return {k: v for k, v in vars(optimizer).items() if k != "step" and not isinstance(v, OrderedDict)}


class Step:
    """One step of the bases, in two halves: hooks of their own run before the first and after the second.

    Global hooks do not: they run around the step of the PathOptimizer. Between the halves the weights may be written
    anew, shorter of ``whole``, where their step has led.
    """

    def __init__(self, base: Optimizer, whole: Mapping[Tensor, Tensor] | None = None) -> None:
        self._bases = bases_of(base)
        self._called: list[tuple[Optimizer, Any, Any]] = []
        self._averages = [
            (p, whole[p], base.state, {k: v.clone() for k, v in base.state.get(p, {}).items() if k in ("mu", "ax")})
            for base in self._bases
            if whole and _averages(base)
            for group in base.param_groups
            for p in group["params"]
            if p in whole
        ]

    def run(self) -> None:
        for base in self._bases:
            own = vars(base).get("step")
            if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
                own()  # someone's replacement, which may call what it likes
                continue
            if own is not None:
                base._opt_called = True  # type: ignore[attr-defined]  # what the scheduler's wrapper is for
            arguments: Any = (base,)
            keywords: Any = {}
            for hook in list(base._optimizer_step_pre_hooks.values()):  # type: ignore[attr-defined]
                replaced = hook(base, arguments, keywords)
                if replaced is not None:
                    arguments, keywords = replaced
            _bare_step(base)(*arguments, **keywords)
            self._called.append((base, arguments, keywords))

    def finish(self) -> None:
        for p, whole, state, before in self._averages:
            average, now = state[p]["ax"], p
            if before:
                now = torch.where(before["mu"] == 1, p, before["ax"] + (p - before["ax"]) * before["mu"])
            average.copy_(torch.where(p == whole, average, now))
        for base, arguments, keywords in self._called:
            for hook in list(base._optimizer_step_post_hooks.values()):  # type: ignore[attr-defined]
                hook(base, arguments, keywords)


def _bare_step(base: Optimizer) -> Callable[..., Any]:
    step = type(base).step
    return inspect.unwrap(step, stop=lambda f: not hasattr(f, "hooked")) if hasattr(step, "hooked") else step


def _averages(base: Optimizer) -> bool:
    """Whether it is ASGD, whose own weights are an average of the parameters: of those that are written, then."""
    return inspect.unwrap(type(base).step) is inspect.unwrap(torch.optim.ASGD.step)


def check_base(base: Any, shortened: bool) -> None:
    """Refuse what no step can be taken with, and, where steps are ``shortened``, what keeps weights of its own."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; it must be a torch.optim.Optimizer, such as torch.optim.SGD")
    if not (hasattr(base, "_optimizer_step_pre_hooks") and hasattr(base, "_optimizer_state_dict_pre_hooks")):
        raise _refused(base, "which is made without torch.optim.Optimizer.__init__, perhaps around another optimiser")
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _refused(base, "which calls its closure several times a step")
    try:
        kept = _trial(base, False, False)
    except _NoTrial:
        return
    except Exception:
        # It fails here. If it would not, given more than one gradient, that is why.
        if _succeeds(base, True, False):
            raise _refused(base, "which calls its closure several times a step") from None
        if _succeeds(base, False, True):
            raise _refused(base, "which differentiates its gradients again") from None
        return
    if shortened and kept and not _averages(base):
        raise ValueError(
            f"base is {type(base).__name__}, which keeps weights of its own (state {kept!r}), and they would not be "
            "those of a step that trust_radius has shortened: leave trust_radius out, or use another base"
        )


def _refused(base: Optimizer, why: str) -> ValueError:
    return ValueError(
        f"base is {type(base).__name__}, {why}; κ divides one gradient a step: use SGD, Adam, AdamW, RMSprop or "
        "another that needs no closure"
    )


class _NoTrial(Exception):
    pass


def _succeeds(base: Optimizer, closure: bool, graph: bool) -> bool:
    try:
        _trial(base, closure, graph)
    except Exception:
        return False
    return True


def _trial(base: Optimizer, closure: bool, graph: bool) -> str | None:
    """A step of a copy of the base on a few made-up weights; the name of the state that holds weights, if any.

    Given a closure, or gradients with a graph, where these are set, and else a gradient of 0.
    """
    try:
        twin, weights = _small_copy(base)
    except Exception as e:  # it holds what cannot be copied: a process group, say
        raise _NoTrial from e
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        if hasattr(twin, "train"):
            twin.train()
        for p in weights:
            p.grad = torch.autograd.grad((p * p).sum(), p, create_graph=True)[0] if graph else torch.zeros_like(p)
        with torch.set_grad_enabled(graph):
            _bare_step(twin)(twin, *([lambda: torch.zeros(())] if closure else []))
    for p in weights:
        for key, value in twin.state.get(p, {}).items():
            # A tenth is far more than any rounding, and far less than from here to a gradient.
            if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point() and _near(value, p):
                return str(key)
    return None


def _near(value: Tensor, p: Tensor) -> bool:
    return torch.allclose(value.detach().double(), p.detach().double(), rtol=0.1)


def _small_copy(base: Optimizer) -> tuple[Any, list[nn.Parameter]]:
    small: dict[int, nn.Parameter] = {}
    memo: dict[int, Any] = {}
    for group in base.param_groups:
        for p in group["params"]:
            value = torch.full((4,) * p.dim(), _MARK, dtype=p.dtype, device=p.device)
            small[id(p)] = memo[id(p)] = nn.Parameter(value)
            for state in base.state.get(p, {}).values():
                if isinstance(state, Tensor) and state.shape == p.shape and p.dim() > 0:
                    memo[id(state)] = torch.zeros_like(value, dtype=state.dtype)
    twin: Any = object.__new__(type(base))
    hooks = {key for key in vars(base) if key.endswith("_hooks")}
    vars(twin).update({k: copy.deepcopy(v, memo) for k, v in vars(base).items() if k not in hooks | {"step"}})
    Optimizer.__setstate__(twin, {})
    for group in twin.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0  # it would bring weights into averages of gradients
    return twin, list(small.values())
