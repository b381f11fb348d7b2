"""γ², log γ² and κ of a PathNetwork."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .arguments import FULL_DTYPES, HALF_DTYPES, check_choice, check_count, check_finite, check_flags, check_number
from .network import Held, PathNetwork
from .ops.backend import at_once, choose, extension_problem, transformed, without_numbers
from .ops.step import path_norm_gradients

#: κ⁽²⁾ = factor · W̃ ⊙ S: the Hessian's factor, the paper's Lemma 1 over ordered pairs, its Theorem 3 as printed.
KAPPA2_FACTOR = {"exact": 4.0, "lemma1": 2.0, "theorem3": 1.0}

_LN2 = math.log(2)
#: Below minus this there is no exponent.
_FAR = 1 << 60

_UNCHANGED = contextlib.nullcontext()  # one for all: making it takes longer than entering it
_PLAIN = frozenset((Tensor, nn.Parameter))


def precision(dtype: torch.dtype) -> torch.dtype:
    """What κ and γ² of parameters of this dtype are computed and returned in: float32 for halves."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


class Scaled(NamedTuple):
    """A tensor of any range: entry (r, c) is ``mantissa[r, c] · 2^(exponent + rows[r] + columns[c] + entries[r, c])``.

    All exponents are int64, on the mantissa's device; None stands for zeros.
    """

    mantissa: Tensor
    exponent: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    entries: Tensor | None = None

    def exponents(self) -> Tensor:
        """Their sum, broadcastable to the mantissa."""
        total = self.exponent
        if self.rows is not None:
            total = total + (self.rows[:, None] if self.mantissa.dim() == 2 else self.rows)
        for part in (self.columns, self.entries):
            total = total if part is None else total + part
        return total

    def parts(self) -> tuple[Tensor, Tensor]:
        """The same as float64 mantissas, 0 or in [1/2, 1), with one int64 exponent each."""
        mantissa, exponent = torch.frexp(self.mantissa.double())
        return mantissa, exponent.long() + self.exponents()


def ldexp(x: Tensor, n: Tensor) -> Tensor:
    """x · 2^n of a float64 tensor and an int64 one, whatever n: 0 stays 0."""
    for _ in range(3):
        part = n.clamp(-1000, 1000)
        x = x * ((part + 1023) << 52).view(torch.float64)
        n = n - part
    return x


@dataclass(frozen=True)
class Number:
    """Numbers m 2^e of any size, as csrc/cpu/number.h has them."""

    m: Tensor
    e: Tensor

    @staticmethod
    def of(x: Tensor) -> Number:
        """Mantissas in [1/2, 1), 0, or not finite."""
        mantissa, exponent = torch.frexp(x)
        usual = x.isfinite()
        return Number(torch.where(usual, mantissa, x), torch.where(usual, exponent.long(), 0))

    def __mul__(self, other: Number) -> Number:
        return Number(self.m * other.m, self.e + other.e)

    def __add__(self, other: Number) -> Number:
        parts = [Number(x.m, torch.where(x.m != 0, x.e, -(1 << 40))) for x in (self, other)]
        most = torch.maximum(*[x.e for x in parts])
        return Number(ldexp(parts[0].m, parts[0].e - most) + ldexp(parts[1].m, parts[1].e - most), most)

    def __truediv__(self, other: Number) -> Number:
        return Number(self.m / other.m, self.e - other.e)

    def normal(self) -> Number:
        own = Number.of(self.m)
        return Number(own.m, own.e + self.e)

    def root(self) -> Number:
        odd = self.e & 1
        return Number((self.m * (1 + odd)).sqrt(), (self.e - odd) // 2)

    def sum(self) -> Number:
        own = self.normal()
        most = torch.where(own.m != 0, own.e, -(1 << 40)).amax()
        return Number(ldexp(own.m, (own.e - most).clamp(min=-3000)).sum(), most)

    def squares(self, factor: Number | None = None) -> Number:
        """Σ factor x²."""
        own = self.normal()
        return (own * own if factor is None else own * own * factor).sum()

    def value(self) -> Tensor:
        return ldexp(self.m, self.e)


class Kappa:
    """κ of every parameter. It holds numbers on the weights' device; what is read of it is formed on demand.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 3), torch.nn.Linear(3, 1))
        >>> k = pk.kappa(net, seq_len=50)
        >>> k.factors["rnn.weight_ih_l0"].shape  # of a weight [3, 2]: its columns are equal
        torch.Size([3, 1])
        >>> k.dense("head.bias")  # on one path a step
        tensor([50.])
        >>> k.relative("rnn.weight_hh_l0").shape  # γ²/κ
        torch.Size([3, 3])
    """

    __slots__ = ("_factors", "_found", "_log_scales", "_recurrent", "_scaled", "_shapes")

    def __init__(
        self,
        found: Any,
        scaled: dict[str, Scaled] | Layout,
        recurrent: tuple[str, ...],
        shapes: Mapping[str, torch.Size] | Iterable[torch.Size],
    ) -> None:
        #: A PathChain, or the extension's PathChainPass, which becomes one when it is asked for; without κ where that
        #: is given by name.
        self._found = found
        #: By name, or where it stands in what was found.
        self._scaled = scaled
        self._recurrent = recurrent
        self._shapes = shapes
        self._factors: dict[str, Tensor] | None = None
        self._log_scales: dict[str, float] = {}

    @classmethod
    def of(
        cls,
        scaled: dict[str, Scaled],
        log_path_norm: Tensor,
        shapes: Mapping[str, torch.Size],
        lags: Mapping[str, int] | None = None,
    ) -> Kappa:
        """κ that is exact but for rounding."""
        lags, device = lags or {}, log_path_norm.device
        counts = torch.tensor(list(lags.values()), dtype=torch.int64, device=device)
        bounds = torch.zeros(1, dtype=torch.float64, device=device)
        own = torch.zeros((), dtype=torch.int8, device=device)
        none = counts.new_empty(0)
        chain = ops.PathChain([], none, none, [], log_path_norm, counts, bounds, own)
        return cls(chain, scaled, tuple(lags), shapes)

    @property
    def _chain(self) -> ops.PathChain:
        found = self._found  # once, for other threads' sake
        if not isinstance(found, ops.PathChain):
            found = self._found = ops.PathChain._make(found.tensors())
        return found

    def __getstate__(self) -> Any:
        self._found = self._chain  # a pass is no object that can be copied
        return None, {name: getattr(self, name) for name in self.__slots__}

    def __repr__(self) -> str:
        shown = ("log_path_norm", "lags", "bound", "arithmetic")
        return f"Kappa({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def log_path_norm(self) -> Tensor:
        """log γ² of the same pass, float64, 0-dim."""
        return self._chain.log_path_norm

    @property
    def scaled(self) -> dict[str, Scaled]:
        """Parameter name → κ, broadcastable to the parameter, its mantissas of the parameter's dtype; float32 for
        bfloat16 and float16. This alone holds every entry, whatever its size.
        """
        if not isinstance(self._scaled, dict):
            self._scaled = _scaled(self._chain, self._scaled)
        return self._scaled

    @property
    def factors(self) -> dict[str, Tensor]:
        """Parameter name → κ on one scale a tensor: true κ = factor · exp(log_scale).

        An entry below the range of the dtype is 0 here, though not in :meth:`relative`.
        """
        if self._factors is None:
            factors = {}
            for name, s in self.scaled.items():
                mantissa, exponents = s.parts()
                most = torch.where(mantissa > 0, exponents - 1, -_FAR).amax()
                # The factor is κ itself where that is at home in the dtype.
                scale = torch.where(((most >= 0) & (most <= 60)) | (most == -_FAR), 0, most)
                factors[name] = ldexp(mantissa, exponents - scale).to(s.mantissa.dtype)
                self._log_scales[name] = int(scale) * _LN2
            self._factors = factors
        return self._factors

    @property
    def log_scales(self) -> dict[str, float]:
        """Parameter name → natural logarithm of the factor's scale, a multiple of ln 2."""
        self.factors  # noqa: B018
        return self._log_scales

    @property
    def lags(self) -> dict[str, int]:
        """Recurrent parameter name → lags of κ⁽²⁾ that were summed explicitly; 0 without the second term."""
        return dict(zip(self._recurrent, self._chain.lags.tolist(), strict=True))

    @property
    def bound(self) -> float:
        """Certified relative error of κ from truncation, over all entries of all tensors; 0 when every lag was summed.

        Rounding comes on top of it, in the dtype of the weights.
        """
        return max(self._chain.bounds.tolist())

    @property
    def arithmetic(self) -> str:
        """What κ was computed in: the weights' dtype; "float64", where something underflows in that; "extended", with
        an exponent of 64 bits for every number, where something underflows in that, too. The last takes longer.
        """
        own = str(next(iter(self.scaled.values())).mantissa.dtype).removeprefix("torch.")
        return (own, "float64", "extended")[int(self._chain.arithmetic)]

    def relative(self, name: str) -> Tensor:
        """γ²/κ of one parameter, float64, broadcastable to it; 0 where κ is 0 (no path, no step), and, as inf, where
        the quotient itself leaves float64's range.
        """
        mantissa, exponents = self._of(name).parts()
        norm, exponent = power_of_e(self.log_path_norm)
        return torch.where(mantissa > 0, ldexp(norm / mantissa, exponent - exponents), 0.0)

    def dense(self, name: str) -> Tensor:
        """κ of one parameter in full shape; inf where its dtype cannot hold it."""
        mantissa, exponents = self._of(name).parts()
        return ldexp(mantissa, exponents).to(self.scaled[name].mantissa.dtype).expand(self._shape(name)).clone()

    def _shape(self, name: str) -> torch.Size:
        if not isinstance(self._shapes, Mapping):
            self._shapes = dict(zip(self.scaled, self._shapes, strict=True))
        return self._shapes[name]

    def _of(self, name: str) -> Scaled:
        if name not in self.scaled:
            raise ValueError(f"{name!r} is not a parameter of the network; it has {', '.join(self.scaled)}")
        return self.scaled[name]


def power_of_e(log: Tensor) -> tuple[Tensor, Tensor]:
    """exp(log) of a float64 tensor as a mantissa in [1, 2) and an int64 exponent; (0, 0) for -inf."""
    exponent = torch.where(log.isfinite(), (log / _LN2).floor(), 0.0)
    return torch.exp(log - exponent * _LN2), exponent.long()


def kappa(
    net: PathNetwork,
    seq_len: int,
    second_term: bool = False,
    kappa2: str = "exact",
    rtol: float = 1e-5,
    backend: str = "auto",
    *,
    lags: Mapping[str, int] | None = None,
    workspace_bytes: int | None = None,
    plan: str = "auto",
) -> Kappa:
    """κ, half the diagonal of the Hessian of γ² (eq. (8)), of every parameter of the network.

    bfloat16 and float16 weights are converted to float32, in which κ is computed and returned.

    Args:
        net: the network.
        seq_len: T ≥ 1, the steps that it is unrolled for.
        second_term: whether to add κ⁽²⁾ to κ⁽¹⁾ (Lemma 1). It is nonzero for recurrent matrices only.
        kappa2: ``"exact"`` is definition (8); ``"lemma1"`` and ``"theorem3"`` are the paper's printed factors, one
            half and one quarter of it.
        rtol: truncation error allowed in κ⁽¹⁾ + κ⁽²⁾, relative, entry by entry; the ``bound`` that was certified is
            no larger, nor than 1. 0 sums all lags. ``reference.kappa2_certified`` says how and proves it.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, or ``"reference"`` (autograd, all lags, not protected
            from overflow).
        lags: the ``lags`` of a former call for similar weights: no fewer are tried, which saves tests. On a GPU as
            many, but no fewer than sixteen, eight for H > 512, are tried once.
        workspace_bytes: budget for the cached powers of the squared recurrent matrix, ``H²`` numbers each, at least
            eight (16 MiB); they are formed in chunks above it. Peak memory beside it: ``(2 C + 4) T H + 6 H²`` numbers
            for C chains, one for every layer and direction; ``2 C + 6`` of a bidirectional network. On a GPU
            ``(2 C + 6) T H + 53 H²``; 29 for H > 512.
        plan: on a GPU, how the chains run: ``"auto"``, or one that :func:`explain` lists; PATHRNN_PLAN by default.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy; also for nan or infinite weights.

    Example:
        >>> net = pk.PathNetwork(pk.init.identity_(pk.ReLURNN(2, 100)), torch.nn.Linear(100, 1), outputs="last")
        >>> k = pk.kappa(net, seq_len=750, second_term=True)
        >>> k.lags  # W̃ⁿ is the same for every n: the sum over 749 lags is known after one
        {'rnn.weight_hh_l0': 1}
        >>> k.bound <= 1e-5
        True
    """
    if lags is None and workspace_bytes is None and plan == "auto" and backend == "auto" and kappa2 == "exact":
        found = _at_once(net, seq_len, second_term, rtol)
        if found is not None:
            return found
    seq_len = _check(net, seq_len)
    check_choice("kappa2", kappa2, KAPPA2_FACTOR)
    check_flags(second_term=second_term)
    check_number("rtol", rtol, zero=True, error=ValueError)
    if workspace_bytes is not None:
        check_count("workspace_bytes", workspace_bytes, 0, 2**63)
    with _without_autocast(net):
        parameters = _weights(net)
        layout = layout_of(net.recurrent, tuple(parameters))
        first_lags = _first_lags(lags, layout.recurrent)
        backend = _choose(net, parameters, backend)
        if backend == "reference":
            return _by_reference(net, parameters, seq_len, second_term, kappa2)
        chain = _launch(
            net,
            parameters,
            seq_len,
            backend=backend,
            plan=plan,
            second_factor=KAPPA2_FACTOR[kappa2] if second_term else 0.0,
            rtol=min(float(rtol), 1.0),
            first_lags=first_lags,
            workspace_bytes=workspace_bytes,
        )
    return Kappa(chain, layout, layout.recurrent, [p.shape for p in parameters.values()])


def _by_reference(
    net: PathNetwork, parameters: dict[str, Tensor], seq_len: int, second_term: bool, kappa2: str
) -> Kappa:
    from . import reference

    # κ is made of derivatives; callers often hold no_grad or inference_mode.
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: p.detach().clone() for name, p in parameters.items()}
        factors = reference.kappa(copies, seq_len, net.outputs, net.h0, second_term, kappa2)
        log_norm = reference.path_norm(copies, seq_len, net.outputs, net.h0).double().log()
    one = torch.tensor(0, device=log_norm.device)
    scaled = {name: Scaled(factor, one) for name, factor in factors.items()}
    all_lags = dict.fromkeys(net.recurrent, seq_len - 1 if second_term else 0)
    return Kappa.of(scaled, log_norm, {name: p.shape for name, p in parameters.items()}, all_lags)


def kappa_without_waiting(net: PathNetwork, seq_len: int, second_term: bool, rtol: float) -> Kappa:
    """κ as :func:`kappa` launches it on a GPU, of which nothing is read.

    log γ² is nan where a weight is not finite, or where something underflowed in the weights' dtype.
    """
    seq_len = _check(net, seq_len)
    with _without_autocast(net):
        parameters = _weights(net)
        factor = KAPPA2_FACTOR["exact"] if second_term else 0.0
        backend = _choose(net, parameters, "auto")
        if backend == "reference":
            raise ValueError(
                "a CUDA graph is being captured, but no kernel serves κ (see explain), and the reference reads numbers"
            )
        chain = _pass(net, parameters, seq_len, backend=backend, second_factor=factor, rtol=min(float(rtol), 1.0))
    layout = layout_of(net.recurrent, tuple(parameters))
    return Kappa(chain, layout, layout.recurrent, [p.shape for p in parameters.values()])


class Known(NamedTuple):
    """What κ of a network on the CPU's kernel begins with, for as long as it holds the same parameters."""

    held: Held
    weights: list[Tensor]
    layout: Layout
    call: Callable[..., Any]  # of what a call gives beside


def _know(net: PathNetwork) -> Known | None:
    """None where there is no kernel, or a parameter is of no usual type."""
    parameters = net.weights()
    weights = [*parameters.values()]
    if extension_problem() is not None or not _PLAIN.issuperset(map(type, weights)):
        return None
    from . import _C

    layout = layout_of(net.recurrent, tuple(parameters))
    call = functools.partial(_C.path_chain, weights, _C.Chains(*net.structure))
    net._known = Known(Held(net.holders()), weights, layout, call)
    return net._known


def _at_once(net: PathNetwork, seq_len: int, second_term: bool, rtol: float) -> Kappa | None:
    """κ where nothing is out of the ordinary and the CPU's kernel serves; else None. The same as by way of ``_launch``,
    without what takes longer than the pass of a small network."""
    if (
        type(net) is not PathNetwork
        or type(seq_len) is not int
        or type(second_term) is not bool
        or type(rtol) is not float
        or not 0 <= rtol < math.inf
        or not 1 <= seq_len < 2**31
        or torch.is_autocast_enabled("cpu")
        or not at_once()
    ):
        return None
    known: Known | None = net._known
    if known is None or not known.held.still():
        known = _know(net)
        if known is None:
            return None
    weight = known.weights[0]
    if not weight.is_cpu or weight.dtype not in FULL_DTYPES:
        return None
    ends = net._outputs == "last", net._h0 == "ones"
    factor = KAPPA2_FACTOR["exact"] if second_term else 0.0
    found = known.call(seq_len, *ends, factor, min(rtol, 1.0))
    if found is None:  # tied since, or of several dtypes
        return None
    return Kappa(found, known.layout, known.layout.recurrent, [p.shape for p in known.weights])


def _first_lags(lags: Mapping[str, int] | None, names: tuple[str, ...]) -> list[int]:
    if lags is None:
        return []
    if not isinstance(lags, Mapping):
        raise TypeError(f"lags is a {type(lags).__name__}; it must be a mapping from parameter names to numbers")
    for name, count in lags.items():
        if name not in names:
            raise ValueError(f"lags has {name!r}, which is not a recurrent weight; these are {', '.join(names)}")
        check_count(f"lags[{name!r}]", count, 0, 2**31)
    return [int(lags.get(name, 0)) for name in names]


def path_norm(net: PathNetwork, seq_len: int, backend: str = "auto") -> Tensor:
    """γ² (eqs. (2), (3)), a 0-dim tensor of the network's dtype; inf only if γ² itself overflows it.

    Of a bfloat16 or float16 network it is float32, and its gradients are rounded to the parameters' dtype.
    Differentiable once: ∂γ²/∂p = 2 p κ⁽¹⁾(p). Arguments and errors as for :func:`kappa`.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 3), torch.nn.Linear(3, 1), outputs="last")
        >>> loss = 1e-3 * pk.path_norm(net, seq_len=50)  # a regulariser
        >>> loss.backward()
        >>> net.rnn.weight_hh_l0.grad.shape
        torch.Size([3, 3])
    """
    return _norm(net, seq_len, backend, logarithm=False)


def log_path_norm(net: PathNetwork, seq_len: int, backend: str = "auto") -> Tensor:
    """log γ², finite for every finite network whose γ² is not 0 (then -inf). Differentiable once.

    Example:
        >>> net = pk.PathNetwork(pk.init.identity_(pk.ReLURNN(2, 3), scale=2.0))
        >>> pk.path_norm(net, seq_len=1000).item()
        inf
        >>> 1370 < pk.log_path_norm(net, seq_len=1000).item() < 1390  # 4^1000 is exp(1386)
        True
    """
    return _norm(net, seq_len, backend, logarithm=True)


def _norm(net: PathNetwork, seq_len: int, backend: str, logarithm: bool) -> Tensor:
    seq_len = _check(net, seq_len)
    with _without_autocast(net):
        parameters = _weights(net)
        backend = _choose(net, parameters, backend)
        if backend == "reference":
            from . import reference

            norm = reference.path_norm(parameters, seq_len, net.outputs, net.h0)
            return norm.log() if logarithm else norm
        return _Norm.apply(net, seq_len, backend, logarithm, list(parameters), *parameters.values())


class _Norm(torch.autograd.Function):
    """γ² or its logarithm, with the κ⁽¹⁾ kernel as backward: ∂γ²/∂p = 2 p κ⁽¹⁾."""

    @staticmethod
    def forward(
        ctx: Any, net: PathNetwork, seq_len: int, backend: str, logarithm: bool, names: list[str], *values: Tensor
    ) -> Tensor:
        need = any(ctx.needs_input_grad)
        parameters = dict(zip(names, values, strict=True))
        chain = _launch(net, parameters, seq_len, backend=backend, kappa1=need)
        if need:
            ctx.chain, ctx.layout, ctx.logarithm = chain, layout_of(net.recurrent, tuple(parameters)), logarithm
            ctx.structure = net.structure
            ctx.save_for_backward(*values)
        result = chain.log_path_norm if logarithm else chain.log_path_norm.exp()
        return result.to(values[0].dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, chain, logarithm = ctx.saved_tensors, ctx.chain, ctx.logarithm
        gradients: list[Tensor | None]
        # Batched, by is_grads_batched or vmap, grad is none that the kernel can read.
        batched = transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)
        if weights[0].is_cpu and extension_problem() is None and not batched:
            gradients = path_norm_gradients(
                list(weights), *ctx.structure, grad, logarithm, *chain[:4], chain.log_path_norm
            )
        else:
            scaled = _scaled(chain, ctx.layout)
            log_norm = chain.log_path_norm if logarithm else None
            with torch.no_grad():
                gradients = [
                    _norm_gradient(p, kappa, grad, log_norm) for p, kappa in zip(weights, scaled.values(), strict=True)
                ]
        for i, p in enumerate(weights):
            if not ctx.needs_input_grad[5 + i]:
                gradients[i] = None
            elif torch.is_grad_enabled():  # create_graph: a second derivative would otherwise be zero without a word
                # A batched tensor has the graph of what it is made of.
                own = torch.zeros_like(p) if batched else gradients[i]
                marked = _FirstOrder.apply(own, p)
                gradients[i] = gradients[i] + marked if batched else marked
        return (None, None, None, None, None, *gradients)


def _norm_gradient(p: Tensor, kappa: Scaled, grad: Tensor, log_norm: Tensor | None) -> Tensor:
    """∂γ²/∂p = 2 p κ⁽¹⁾, times grad, over γ² if its logarithm is given."""
    product = Number.of(p.double()) * Number(*kappa.parts())
    twice = Number(grad.double(), torch.ones_like(product.e))  # as it is: batched, it has no exponents
    if log_norm is not None:
        twice /= Number(*power_of_e(log_norm))
    # Without a path, or of a zero, it is 0, whatever grad is.
    return torch.where(product.m == 0, 0.0, (product * twice).value()).to(p.dtype)


class _FirstOrder(torch.autograd.Function):
    """A gradient whose own derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, parameter: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            'path_norm and log_path_norm are differentiable once; for second derivatives use backend="reference"'
        )


def _weights(net: PathNetwork) -> dict[str, Tensor]:
    """The network's weights in the dtype that κ is computed in, converted differentiably."""
    parameters = net.weights()
    if parameters["rnn.weight_hh_l0"].dtype not in HALF_DTYPES:
        return parameters
    net.check_parameters()  # conversion would hide mixed dtypes
    return {name: p.float() for name, p in parameters.items()}


def _without_autocast(net: PathNetwork) -> contextlib.AbstractContextManager[Any]:
    """Torch's products would come in half precision, in which κ means nothing."""
    weight: Tensor = net.rnn.weight_hh_l0  # type: ignore[assignment]
    device_type = weight.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _UNCHANGED


def _check(net: PathNetwork, seq_len: int) -> int:
    if not isinstance(net, PathNetwork):
        raise TypeError(f"net is a {type(net).__name__}; it must be a PathNetwork: PathNetwork(rnn, head=…)")
    check_count("seq_len", seq_len, below=2**31)
    return int(seq_len)


def _choose(net: PathNetwork, parameters: dict[str, Tensor], backend: str) -> str:
    weight = parameters["rnn.weight_hh_l0"]
    backend = choose(weight.device, weight.dtype, backend)
    if backend != "reference" and transformed():
        raise ValueError(
            f"backend {backend!r} does not serve κ and γ² inside torch.func's transforms (grad, vmap, jvp): call "
            "it outside of them, as both depend on weights alone, or use backend='reference'"
        )
    plain = _PLAIN.issuperset(map(type, parameters.values()))
    if backend == "reference" or not plain or _tied(parameters.values()):
        net.check_parameters()  # the kernels check the rest of plain tensors for themselves
    if backend == "reference" or not plain:
        _check_finite(parameters)
    return backend


def _tied(weights: Collection[Tensor]) -> bool:
    """Whether some of these plain tensors may be one: network.check_parameters knows."""
    return len({p.data_ptr() for p in weights}) < len(weights)


_Lists = list[Tensor]
_ByKind = tuple[_Lists, _Lists, _Lists, _Lists, Tensor | None, Tensor | None, Tensor | None]


class Layout(NamedTuple):
    """Where the weights of a network stand in the op's arguments and results."""

    recurrent: tuple[str, ...]
    #: Parameter name → the place of its κ, the chain whose units its rows are, and the chains whose units its columns
    #: are; None where they are no units.
    places: dict[str, tuple[int, int | None, slice | None]]
    #: Weights of a chain.
    per_chain: int
    #: Places of the head's weight and bias and of the embedding among the weights; None where there is none.
    boundary: tuple[int | None, ...]

    def by_kind(self, weights: list[Tensor]) -> _ByKind:
        """weight_ih, weight_hh, bias_ih and bias_hh of all chains; the head's weight and bias and the embedding."""
        step = self.per_chain
        n = step * len(self.recurrent)
        head, bias, embedding = (None if i is None else weights[i] for i in self.boundary)
        kinds = [weights[kind:n:step] if kind < step else [] for kind in range(4)]
        return kinds[0], kinds[1], kinds[2], kinds[3], head, bias, embedding


@functools.cache
def layout_of(recurrent: tuple[str, ...], names: tuple[str, ...]) -> Layout:
    chains, directions = len(recurrent), 2 if recurrent[-1].endswith("_reverse") else 1
    per_chain = 4 if "rnn.bias_ih_l0" in names else 2
    biases = per_chain // 4  # both have one κ
    places: dict[str, tuple[int, int | None, slice | None]] = {}
    for i, name in enumerate(names):
        c, kind = divmod(i, per_chain)
        layer = c - c % directions  # its first chain; of the head, beyond the last
        below = slice(layer - directions, layer) if layer > 0 else None
        if c < chains:
            places[name] = i - c * biases - (kind == 3), c, (below, slice(c, c + 1), None, None)[kind]
        else:
            places[name] = (
                i - chains * biases,
                None,
                slice(chains - directions, chains) if name == "head.weight" else None,
            )
    outer = ("head.weight", "head.bias", "embedding.weight")
    boundary = tuple(names.index(name) if name in places else None for name in outer)
    return Layout(recurrent, places, per_chain, boundary)


def _launch(net: PathNetwork, parameters: dict[str, Tensor], seq_len: int, **options: Any) -> ops.PathChain:
    """The pass, in a wider arithmetic where one loses something."""
    found = _pass(net, parameters, seq_len, **options)
    weight = parameters["rnn.weight_hh_l0"]
    if without_numbers(weight) or options["backend"] == "cpu":  # whose op takes the wider one itself
        return found
    log_norm, arithmetic = found.to_host()
    if math.isnan(log_norm):
        _check_finite(parameters)
    if arithmetic >= 0:
        return found
    wide = {name: p.detach().double() for name, p in parameters.items()}
    if weight.dtype == torch.float32:
        found = _pass(net, wide, seq_len, **options)
        if found.to_host()[1] >= 0:
            return _narrowed(found, weight)._replace(arithmetic=torch.ones_like(found.arithmetic))
    # What float64 loses, the CPU alone can compute.
    host = {name: p.cpu() for name, p in wide.items()}
    return _narrowed(_pass(net, host, seq_len, **options | {"backend": "cpu", "plan": "auto"}), weight)


def _pass(net: PathNetwork, parameters: dict[str, Tensor], seq_len: int, **options: Any) -> ops.PathChain:
    own = layout_of(net.recurrent, tuple(parameters)).by_kind([*parameters.values()])
    ends = net.outputs == "last", net.h0 == "ones"
    return ops.path_chain(*own, seq_len, *ends, bidirectional=net.rnn.bidirectional, **options)


def _narrowed(chain: ops.PathChain, like: Tensor) -> ops.PathChain:
    """The results of a wider pass, on the device and in the dtype of ``like``, with an exponent for every entry."""
    kappa, entries = [], []
    for i, factor in enumerate(chain.kappa):
        mantissa, exponent = torch.frexp(factor)
        own = chain.entries(i)
        kappa.append(mantissa.to(like.dtype))
        entries.append(exponent.long() if own is None else exponent.long() + own)

    def move(x: Any) -> Any:
        return [t.to(like.device) for t in x] if isinstance(x, list) else x.to(like.device)

    return ops.PathChain(*map(move, chain._replace(kappa=kappa, entry_exponents=entries)))


def _scaled(chain: ops.PathChain, layout: Layout) -> dict[str, Scaled]:
    """κ of every parameter with its exponents."""
    exponents, units = chain.exponents.unbind(), chain.unit_exponents
    return {
        name: Scaled(
            chain.kappa[place],
            exponents[place],
            None if chain_of_rows is None else -units[chain_of_rows],
            None if columns is None else units[columns].reshape(-1),
            chain.entries(place),
        )
        for name, (place, chain_of_rows, columns) in layout.places.items()
    }


def _check_finite(parameters: dict[str, Tensor]) -> None:
    for name, p in parameters.items():
        if not without_numbers(p):
            check_finite(name, p)
