"""γ², log γ² and κ of a PathNetwork."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .network import PathNetwork
from .ops import update
from .ops.backend import choose, extension_problem, transformed

#: κ⁽²⁾ = factor · W̃ ⊙ S: the Hessian's factor, the paper's Lemma 1 over ordered pairs, its Theorem 3 as printed.
KAPPA2_FACTOR = {"exact": 4.0, "lemma1": 2.0, "theorem3": 1.0}

_LN2 = math.log(2)

_PLAIN = frozenset((Tensor, nn.Parameter))
_HALVES = frozenset((torch.bfloat16, torch.float16))


def precision(dtype: torch.dtype) -> torch.dtype:
    """What κ and γ² of parameters of this dtype are computed and returned in: float32 for halves."""
    return torch.float32 if dtype in _HALVES else dtype


@dataclass(slots=True)
class Kappa:
    """κ of every parameter, as broadcastable factors with logarithmic scales: true κ = factor · exp(log_scale).

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

    #: Parameter name → tensor broadcastable to the parameter, of its dtype; float32 for bfloat16 and float16.
    factors: dict[str, Tensor]
    #: Parameter name → natural logarithm of the scale, a multiple of ln 2.
    log_scales: dict[str, float]
    #: log γ² of the same pass, float64, 0-dim.
    log_path_norm: Tensor
    #: Recurrent parameter name → lags of κ⁽²⁾ that were summed explicitly; 0 without the second term.
    lags: dict[str, int]
    #: Certified relative error of κ from truncation, over all entries of all factors; 0 when every lag was summed.
    #: Rounding comes on top of it, in the dtype of the weights.
    bound: float
    _shapes: dict[str, torch.Size] = field(repr=False)

    def relative(self, name: str) -> Tensor:
        """γ²/κ of one parameter, broadcastable to it, without forming γ² or κ; 0 where κ is 0 (no path, no step)."""
        factor = self._factor(name).double()
        # Half of the scale on either side: neither alone need be representable for their quotient to be.
        half = math.exp(max(-700.0, min(700.0, (float(self.log_path_norm) - self.log_scales[name]) / 2)))
        ratio = half / factor * half
        return torch.where(factor > 0, ratio, 0.0).to(self.factors[name].dtype)

    def dense(self, name: str) -> Tensor:
        """κ of one parameter in full shape, exp(log_scale) included; inf where the dtype cannot hold it."""
        factor = self._factor(name)
        exponent = round(self.log_scales[name] / _LN2)
        for part in (exponent // 2, exponent - exponent // 2):
            factor = torch.ldexp(factor, torch.tensor(part, device=factor.device))
        return factor.expand(self._shapes[name]).clone()

    def _factor(self, name: str) -> Tensor:
        if name not in self.factors:
            raise ValueError(f"{name!r} is not a parameter of the network; it has {', '.join(self.factors)}")
        return self.factors[name]


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
        lags: the ``lags`` of a former call for similar weights: no fewer are tried, which saves tests.
        workspace_bytes: budget for the cached powers of the squared recurrent matrix, ``H²`` numbers each, at least
            eight; they are formed in chunks above it. The environment variable PATHRNN_WORKSPACE_BYTES, or 16 MiB, by
            default. Peak memory beside it: ``(2 C + 4) T H + 6 H²`` numbers for C chains, one for every layer and
            direction; ``2 C + 6`` of a bidirectional network.
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
    found = kappa_later(
        net, seq_len, second_term, kappa2, rtol, backend, lags=lags, workspace_bytes=workspace_bytes, plan=plan
    )
    return found()


def kappa_later(
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
) -> Callable[[], Kappa]:
    """:func:`kappa` in two halves: this launches it on a GPU's current stream, and what it returns waits for it.

    Before the call returns, the host waits for the second term's certificates, if those are asked for, and no more.
    """
    seq_len = _check(net, seq_len)
    if _autocasts(net):
        with torch.autocast(_device_type(net), enabled=False):
            return kappa_later(
                net, seq_len, second_term, kappa2, rtol, backend, lags=lags, workspace_bytes=workspace_bytes, plan=plan
            )
    if not isinstance(kappa2, str) or kappa2 not in KAPPA2_FACTOR:
        raise ValueError(f"kappa2 is {kappa2!r}; use one of {', '.join(map(repr, KAPPA2_FACTOR))}")
    if not isinstance(second_term, bool):
        raise TypeError(f"second_term is {second_term!r}; it must be True or False")
    if not isinstance(rtol, numbers.Real) or not 0 <= rtol < math.inf:
        raise ValueError(f"rtol is {rtol!r}; it must be a finite number, at least 0")
    if workspace_bytes is not None and (
        isinstance(workspace_bytes, bool)
        or not isinstance(workspace_bytes, numbers.Integral)
        or not 0 <= workspace_bytes < 2**63
    ):
        raise ValueError(f"workspace_bytes is {workspace_bytes!r}; it must be a whole number of bytes, or None")
    parameters = _weights(net)
    shapes = {name: p.shape for name, p in parameters.items()}
    layout = _layout(net.endings, *_options(parameters))
    first_lags = _first_lags(lags, layout.kinds[1])

    backend = _choose(net, parameters, backend)
    if backend == "reference":
        from . import reference

        # κ is made of derivatives; callers often hold no_grad or inference_mode.
        with torch.inference_mode(False), torch.enable_grad():
            copies = {name: p.detach().clone() for name, p in parameters.items()}
            factors = reference.kappa(copies, seq_len, net.outputs, net.h0, second_term, kappa2)
            log_norm = reference.path_norm(copies, seq_len, net.outputs, net.h0).double().log()
        all_lags = dict.fromkeys(layout.kinds[1], seq_len - 1 if second_term else 0)
        return lambda: Kappa(factors, dict.fromkeys(factors, 0.0), log_norm, all_lags, 0.0, shapes)

    dtype = parameters["rnn.weight_hh_l0"].dtype
    launched = _launch(
        net,
        parameters,
        layout,
        seq_len,
        backend=backend,
        plan=plan,
        second_factor=KAPPA2_FACTOR[kappa2] if second_term else 0.0,
        rtol=min(float(rtol), 1.0),
        first_lags=first_lags,
        workspace_bytes=workspace_bytes,
    )

    def collect() -> Kappa:
        chain, exponents, _ = launched()
        factors = {name: chain.kappa[place].to(dtype) for name, place in layout.places.items()}
        log_scales = {name: exponents[place] * _LN2 for name, place in layout.places.items()}
        summed = dict(zip(layout.kinds[1], chain.lags.tolist(), strict=True))
        return Kappa(factors, log_scales, chain.log_path_norm, summed, max(chain.bounds.tolist()), shapes)

    return collect


def _first_lags(lags: Mapping[str, int] | None, names: tuple[str, ...]) -> list[int]:
    if lags is None:
        return []
    if not isinstance(lags, Mapping):
        raise TypeError(f"lags is a {type(lags).__name__}; it must be a mapping from parameter names to numbers")
    for name, count in lags.items():
        if name not in names:
            raise ValueError(f"lags has {name!r}, which is not a recurrent weight; these are {', '.join(names)}")
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or not 0 <= count < 2**31:
            raise ValueError(f"lags[{name!r}] is {count!r}; it must be a whole number, at least 0")
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
    if _autocasts(net):
        with torch.autocast(_device_type(net), enabled=False):
            return _norm(net, seq_len, backend, logarithm)
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
        layout = _layout(net.endings, *_options(parameters))
        chain, exponents, ctx.log_norm = _launch(net, parameters, layout, seq_len, backend=backend, kappa1=need)()
        ctx.logarithm = logarithm
        if need:
            places = layout.places
            ctx.factors = [chain.kappa[places[name]] for name in names]
            ctx.log_scales = [exponents[places[name]] * _LN2 for name in names]
            ctx.save_for_backward(*values)
        result = chain.log_path_norm if logarithm else chain.log_path_norm.exp()
        return result.to(values[0].dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i in range(len(ctx.saved_tensors)) if ctx.needs_input_grad[5 + i]]
        weights = [ctx.saved_tensors[i] for i in wanted]
        log_scales = [ctx.log_scales[i] - (ctx.log_norm if ctx.logarithm else 0.0) for i in wanted]
        with torch.no_grad():
            found = _norm_gradients(weights, [ctx.factors[i] for i in wanted], log_scales, grad)
        gradients: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for i, p, gradient in zip(wanted, weights, found, strict=True):
            # create_graph: a second derivative would otherwise be zero without a word.
            gradients[i] = _FirstOrder.apply(gradient, p) if torch.is_grad_enabled() else gradient
        return (None, None, None, None, None, *gradients)


def _norm_gradients(weights: list[Tensor], kappas: list[Tensor], log_scales: list[float], grad: Tensor) -> list[Tensor]:
    """∂γ²/∂p = 2 p κ⁽¹⁾, times grad."""
    if weights[0].device.type == "cpu" and extension_problem() is None:
        # κ is in float64 where float32 lost something; it need not fit float32.
        wide = [p.to(kappa.dtype) for p, kappa in zip(weights, kappas, strict=True)]
        found = update.norm_gradients(wide, kappas, log_scales, grad)
        return [gradient.to(p.dtype) for gradient, p in zip(found, weights, strict=True)]
    found = []
    for p, kappa, log_scale in zip(weights, kappas, log_scales, strict=True):
        # In two halves, so that κ may be out of range where p κ is not.
        half = math.exp(max(-700.0, min(700.0, log_scale / 2)))
        gradient = (p.double() * half) * (kappa.double() * half) * (2 * grad.double())
        found.append(torch.where(p == 0, 0.0, gradient).to(p.dtype))  # zero weights have none, however large κ
    return found


class _FirstOrder(torch.autograd.Function):
    """A gradient whose own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, parameter: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            'path_norm and log_path_norm are differentiable once; for second derivatives use backend="reference"'
        )


def _weights(net: PathNetwork) -> dict[str, Tensor]:
    """The network's weights in the dtype that κ is computed in, converted differentiably."""
    parameters = net.weights()
    if parameters["rnn.weight_hh_l0"].dtype not in _HALVES:
        return parameters
    net.check_parameters()  # conversion would hide mixed dtypes
    return {name: p.float() for name, p in parameters.items()}


def _device_type(net: PathNetwork) -> str:
    weight: Tensor = net.rnn.weight_hh_l0  # type: ignore[assignment]
    return weight.device.type


def _autocasts(net: PathNetwork) -> bool:
    """Whether torch's products would come in half precision, in which κ means nothing."""
    device_type = _device_type(net)
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check(net: PathNetwork, seq_len: int) -> int:
    if not isinstance(net, PathNetwork):
        raise TypeError(f"net is a {type(net).__name__}; it must be a PathNetwork: PathNetwork(rnn, head=…)")
    if isinstance(seq_len, bool) or not isinstance(seq_len, numbers.Integral):
        raise TypeError(f"seq_len is {seq_len!r}; it must be a positive integer")
    if not 1 <= seq_len < 2**31:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1, and less than 2**31")
    return int(seq_len)


def _choose(net: PathNetwork, parameters: dict[str, Tensor], backend: str) -> str:
    weight = parameters["rnn.weight_hh_l0"]
    backend = choose(weight.device, weight.dtype, backend)
    if backend != "reference" and transformed():
        raise ValueError(
            f"backend {backend!r} does not serve κ and γ² inside torch.func's transforms (grad, vmap, jvp): call "
            "it outside of them, as both depend on weights alone, or use backend='reference'"
        )
    if backend == "reference" or not _PLAIN.issuperset(map(type, parameters.values())):
        net.check_parameters()  # the kernels check plain tensors for themselves
        _check_finite(parameters)
    return backend


class _Layout(NamedTuple):
    """Where the parameters stand in the op's arguments and results."""

    #: Names of weight_ih, weight_hh, bias_ih, bias_hh, by layers and in each layer by directions.
    kinds: tuple[tuple[str, ...], ...]
    #: Parameter name, in the order of ``named_parameters`` → index in ``PathChain.kappa1``.
    places: dict[str, int]


def _options(parameters: dict[str, Tensor]) -> tuple[bool, bool, bool, bool]:
    names = ("rnn.bias_ih_l0", "head.weight", "head.bias", "embedding.weight")
    bias, head, head_bias, embedding = (name in parameters for name in names)
    return bias, head, head_bias, embedding


@functools.cache
def _layout(endings: tuple[str, ...], bias: bool, head: bool, head_bias: bool, embedding: bool) -> _Layout:
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    names = tuple(
        tuple(f"rnn.{kind}_{ending}" for ending in endings) if bias or kind.startswith("weight") else ()
        for kind in kinds
    )
    per_chain = 3 if bias else 2  # both biases have one κ
    places = {
        f"rnn.{kind}_{ending}": per_chain * c + min(k, 2)
        for c, ending in enumerate(endings)
        for k, kind in enumerate(kinds if bias else kinds[:2])
    }
    count = per_chain * len(endings)
    for name, given in (("head.weight", head), ("head.bias", head_bias), ("embedding.weight", embedding)):
        if given:
            places[name] = count
            count += 1
    return _Layout(names, places)


def _launch(
    net: PathNetwork, parameters: dict[str, Tensor], layout: _Layout, seq_len: int, **options: Any
) -> Callable[[], tuple[ops.PathChain, list[int], float]]:
    """The pass, in float64 where float32 lost something; with its exponents and log γ² on the host."""
    weight_ih, weight_hh, bias_ih, bias_hh = ([parameters[name] for name in names] for names in layout.kinds)
    launched = ops.path_chain(
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        parameters.get("head.weight"),
        parameters.get("head.bias"),
        parameters.get("embedding.weight"),
        seq_len,
        net.outputs == "last",
        net.h0 == "ones",
        bidirectional=net.rnn.bidirectional,
        **options,
    )
    transfer = launched.to_host()

    def collect() -> tuple[ops.PathChain, list[int], float]:
        chain = launched
        exponents, log_norm, lost = transfer()
        if math.isnan(log_norm):
            _check_finite(parameters)
        if lost:
            if weight_hh[0].dtype == torch.float32:
                return _launch(net, _wide(parameters), layout, seq_len, **options)()
            if log_norm == -math.inf and (connected := _connected(net, parameters, layout)):
                # What grows beside the paths, without being on one, has hidden them.
                options.update(kappa1=False, second_factor=0.0)
                alone, _, log_norm = _launch(net, connected, layout, seq_len, **options)()
                chain = chain._replace(log_path_norm=alone.log_path_norm)
        return chain, exponents, log_norm

    return collect


def _check_finite(parameters: dict[str, Tensor]) -> None:
    for name, p in parameters.items():
        if not bool(p.detach().isfinite().all()):
            raise ValueError(
                f"{name} has a nan or infinite entry; κ and γ² need finite weights: restore them, or lower the step "
                "size"
            )


def _wide(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in parameters.items()}


def _connected(net: PathNetwork, parameters: dict[str, Tensor], layout: _Layout) -> dict[str, Tensor] | None:
    """The parameters without the units that lie on no path from an input to an output; None if all units do."""
    edges = {name: p.detach() != 0 for name, p in parameters.items()}

    def closure(units: Tensor, matrix: Tensor) -> Tensor:
        while not torch.equal(more := units | (matrix & units).any(1), units):
            units = more
        return units

    directions = net.num_directions
    chains = list(zip(layout.kinds[0], layout.kinds[1], strict=True))
    reached: list[Tensor] = []
    below = torch.ones_like(edges[layout.kinds[0][0]][0])
    if "embedding.weight" in edges:
        below = edges["embedding.weight"].any(0)
    for c, (weight_ih, weight_hh) in enumerate(chains):
        if c and c % directions == 0:
            below = torch.cat(reached[-directions:])
        driven = (edges[weight_ih] & below).any(1) | (net.h0 == "ones")
        for biases in layout.kinds[2:]:
            driven = driven | edges[biases[c]] if biases else driven
        reached.append(closure(driven, edges[weight_hh]))
    top = torch.cat(reached[-directions:])
    above = edges["head.weight"].any(0) if "head.weight" in edges else torch.ones_like(top)
    result = dict(parameters)
    for first in reversed(range(0, len(chains), directions)):
        used = []
        for c, ends in enumerate(above.chunk(directions), first):
            weight_ih, weight_hh = chains[c]
            leads = closure(ends, edges[weight_hh].T)
            keep = reached[c] & leads
            result[weight_hh] = parameters[weight_hh].detach() * (keep[:, None] & keep)
            result[weight_ih] = parameters[weight_ih].detach() * keep[:, None]
            for biases in layout.kinds[2:]:
                if biases:
                    result[biases[c]] = parameters[biases[c]].detach() * keep
            used.append((edges[weight_ih] & leads[:, None]).any(0))
            reached[c] = keep
        above = torch.stack(used).any(0)
    return None if all(bool(keep.all()) for keep in reached) else result
