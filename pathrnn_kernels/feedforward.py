"""κ of feed-forward ReLU networks: the paper's theory for any module without recurrence.

Every weight lies at most once on a path there, so that κ⁽²⁾ = 0 and κ = κ⁽¹⁾ = ∂γ²/∂p̃ (eq. (11)), which autograd takes
from one run of the module's own forward pass on squared tensors (squared.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import FULL_DTYPES, check_alike, check_finite
from .kappa import Kappa, Scaled
from .ops.backend import without_numbers
from .rnn import ReLURNN
from .squared import WEIGHT_RANGE, Kind, Run, Squared, normalised, shifted

_LN2 = math.log(2)

#: For the length of a pass squares stand for a module's parameters, and hooks of all modules are off.
_ALONE = threading.RLock()
os.register_at_fork(after_in_child=_ALONE._at_fork_reinit)  # type: ignore[attr-defined]  # the thread that has it is gone

#: Of ∂γ²/∂p̃ in the units of the run. Derivatives that are smaller by what a tensor may hold, 2^400, are denormal.
_UNDERFLOW = 2.0**-600
#: Bits below γ² at which nothing of a path is left in it.
_FAINT = 53

#: Modules that are refused whatever they are made of.
_REFUSED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (
        (nn.RNNBase, nn.RNNCellBase, ReLURNN),
        "recurrent, with its weights many times on a path: a ReLU RNN belongs into a PathNetwork, others have no κ",
    ),
    (
        (
            nn.modules.batchnorm._NormBase,
            nn.LayerNorm,
            nn.RMSNorm,
            nn.GroupNorm,
            nn.LocalResponseNorm,
            nn.CrossMapLRN2d,
        ),
        "it divides by statistics of its input, so that its paths have no weights: leave it out",
    ),
    ((nn.Bilinear,), "it multiplies two activations, so that its paths have no weights"),
)


def kappa_of_module(module: nn.Module, input_shape: Sequence[int]) -> Kappa:
    """κ (eq. (8)) of every parameter of a feed-forward ReLU network, whose κ⁽²⁾ is 0.

    γ² is the sum, over all paths from an entry of the input, or from a constant, to an entry of the output, of the
    product of squared weights (eq. (2)). Constants of the network are weights as well: an average over n has n weights
    1/n, which are squared; buffers and numbers that are added are biases. Max pooling has a path from every entry of a
    window, of weight 1, for each can be the largest: γ² depends on no data. An embedding has all its rows on paths, as
    one-hot inputs would. Dropout is the identity.

    Supported: ``nn.Linear``; convolutions and transposed convolutions of one to three dimensions with every option;
    average and max pooling, adaptive or not; ``nn.Embedding``; ReLU and LeakyReLU (whose slope below zero is on no
    path: squares are not negative); dropout; and all that reshapes, selects, adds, concatenates, averages, or
    multiplies by weights and constants, in modules of any make: the pass runs their ``forward``. It sees what that does
    on this one input; what depends on chance, as stochastic depth does, is seen as it fell.

    The pass is in float64 with a power of two beside every tensor, so that depth and the size of weights do not matter:
    κ⁽¹⁾ of a plain chain of layers is right for every γ², beyond float64 too. Where paths of unlike size meet, as at
    biases and shortcuts, it is where they are within some 1e180 of one another, and refused beyond; of one tensor,
    entries 1e150 times smaller than the largest are taken to be on no path, unless their paths count. The pass costs
    the module's forward and backward on one example, and some ten sweeps over the parameters and 20 bytes for each.

    Args:
        module: takes one tensor and returns one. Parameters of one dtype, float32 or float64, on one device.
        input_shape: of one example, without the batch dimension; a batch of one is run.

    Returns:
        Factors and scales by the names of ``module.named_parameters()``; ``bound`` is 0. Parameters on no path have
        κ = 0.

    Raises:
        ValueError: every unsupported part by its qualified name, and why, in one message; weights that lie twice on a
            path, whose κ⁽²⁾ is not 0, are among them. Nan or infinite weights; an ``input_shape`` that the module does
            not take.
        TypeError: an argument or parameter of the wrong type.
        FloatingPointError: κ over- or underflows all the same.
        Nothing has changed in any case, unless the module's own ``forward`` changes its attributes.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> k = pk.kappa_of_module(net, (3, 32, 32))
        >>> k.dense("0.bias")[0]  # each channel's bias starts a path to 30 x 30 outputs
        tensor(900.)
        >>> pk.kappa_of_module(net.append(torch.nn.Softmax(-1)), (3, 32, 32))
        Traceback (most recent call last):
        ValueError: module has 1 part for which κ is not defined or not supported...
    """
    # κ is made of derivatives; callers often hold no_grad or inference_mode.
    with _ALONE, torch.inference_mode(False), torch.enable_grad(), _uncompiled():
        run = _Pass(module, _check(module, input_shape))
        return run.kappa(run.output(tuple(input_shape)))


class FeedForward:
    """A feed-forward ReLU network for :class:`PathOptimizer` and :class:`PathSGD`.

    The module is held, not copied or wrapped: parameters keep its names, and it is called as before.

    Args:
        module, input_shape: as for :func:`kappa_of_module`.

    Raises:
        TypeError, ValueError: as :func:`kappa_of_module`, which is tried at once.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> optimizer = pk.PathSGD(pk.FeedForward(net, (4,)), lr=1.0, scale="path_norm", trust_radius=0.01)
        >>> net(torch.rand(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int]) -> None:
        kappa_of_module(module, input_shape)
        self.module = module
        self.input_shape = tuple(map(int, input_shape))

    def kappa(self) -> Kappa:
        """κ at the present weights."""
        return kappa_of_module(self.module, self.input_shape)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def __repr__(self) -> str:
        return f"FeedForward({self.module!r}, input_shape={self.input_shape})"


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Modules that torch.compile has wrapped run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _check(module: nn.Module, input_shape: Sequence[int]) -> dict[str, nn.Parameter]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; it must be a torch.nn.Module")
    if isinstance(input_shape, (str, numbers.Number)) or not isinstance(input_shape, Sequence):
        raise TypeError(f"input_shape is {input_shape!r}; it must be a tuple of sizes, such as (3, 32, 32)")
    for size in input_shape:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"input_shape is {input_shape!r}; its sizes must be positive integers")
        if size < 1:
            raise ValueError(f"input_shape is {input_shape!r}; its sizes must be at least 1")
    parameters = dict(module.named_parameters())
    if not parameters:
        raise ValueError(f"module is a {type(module).__name__} without parameters: κ has nothing to be computed for")
    first = next(iter(parameters.items()))
    places: dict[int, str] = {}
    for name, p in parameters.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet; run the lazy module once before")
        if p.dtype not in FULL_DTYPES:
            raise TypeError(f"{name} has dtype {p.dtype}; κ is computed for float32 or float64: convert the module")
        check_alike(name, p, first, "module")
        if without_numbers(p):
            raise ValueError(
                f"{name} has a shape but no numbers (meta device, or FakeTensorMode), and the pass for κ of a module "
                "depends on them: move the module to a device first, with to_empty() and initialised"
            )
        check_finite(name, p)
        if p.numel() and (other := places.setdefault(p.data_ptr() or id(p), name)) != name:
            raise ValueError(f"{name} and {other} are one piece of memory; κ couples them: make them one parameter")
    return parameters


@contextlib.contextmanager
def _without_backward_hooks(module: nn.Module) -> Iterator[None]:
    """They are for gradients of a loss, and would see κ's."""
    kinds = ("_backward_hooks", "_backward_pre_hooks")
    held = [(m, kind, getattr(m, kind)) for m in module.modules() for kind in kinds]
    held += [(nn.modules.module, name, getattr(nn.modules.module, name)) for name in map("_global{}".format, kinds)]  # type: ignore[misc]
    try:
        for m, kind, _ in held:
            setattr(m, kind, OrderedDict())
        yield
    finally:
        for m, kind, hooks in held:
            setattr(m, kind, hooks)


class _Pass:
    """One run of a module on squared parameters."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.module = module
        self.device = next(iter(parameters.values())).device
        self.parameters = parameters
        self.run = Run(self._refuse, next(iter(parameters.values())).dtype)
        self.squares: dict[str, Squared] = {}
        #: Entries whose squares underflow beside their tensor's largest, and 0.
        self.faint: dict[str, Tensor] = {}
        for name, p in parameters.items():
            root, exponent = normalised(p.detach().double().abs(), 0, WEIGHT_RANGE)
            square = root.square().requires_grad_()
            if bool((low := (root > 0) & (square < torch.finfo(torch.float64).tiny)).any()):
                self.faint[name] = torch.where(low, root, 0.0)
            self.squares[name] = Squared(square, 2 * exponent, Kind.EDGE, {name}, self.run)
        #: Qualified name of a module → what was refused in it.
        self.refusals: dict[str, str] = {}
        self._calls: list[tuple[str, nn.Module]] = [("", module)]
        #: ∂γ²/∂p̃ in the units of the run, None on no path.
        self.gradients: Sequence[Tensor | None] = [None] * len(parameters)

    def output(self, input_shape: tuple[int, ...]) -> Squared:
        ones = torch.ones((1, *input_shape), dtype=torch.float64, device=self.device)
        x = Squared(ones, 0, Kind.INPUT, set(), self.run)
        # Statistics that a refused layer would update are copies.
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        handles = []
        try:
            for name, module in self.module.named_modules():
                handles.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            handles.append(self.module.register_forward_hook(self._derive))
            with _without_backward_hooks(self.module):
                output = torch.func.functional_call(self.module, {**buffers, **self.squares}, (x,))
        except Exception as error:
            if self.refusals:
                raise self._report(f"\nIt then fails, before all was looked at: {error}") from error
            raise ValueError(
                f"module fails on an input of shape {(1, *input_shape)}, a batch of one: {type(error).__name__}: "
                f"{error}; input_shape must be that of one example, without the batch dimension"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if self.refusals:
            raise self._report()
        if not isinstance(output, Squared):
            raise ValueError(
                f"module returns a {type(output).__name__} that is no tensor computed from input or parameters; γ² "
                "needs one tensor: wrap the module in one that returns it"
            )
        return output

    def _derive(self, module: nn.Module, _: Any, output: Any) -> None:
        """While squares stand for the parameters: what is checkpointed is run again for the derivatives."""
        if isinstance(output, Squared) and (total := output.value.sum()).requires_grad:
            leaves = [square.value for square in self.squares.values()]
            self.gradients = torch.autograd.grad(total, leaves, allow_unused=True)

    def _enter(self, name: str, module: nn.Module, _: Any) -> None:
        self._calls.append((name, module))
        for types, reason in _REFUSED:
            if isinstance(module, types):
                self.refusals.setdefault(name, f"{_title(name, module)}: {reason}")

    def _leave(self, *_: Any) -> None:
        self._calls.pop()

    def _refuse(self, operation: str, reason: str) -> None:
        if not any(name in self.refusals for name, _ in self._calls):
            name, module = self._calls[-1]
            self.refusals[name] = f"{_title(name, module)} calls {operation}: {reason}"

    def _report(self, remark: str = "") -> ValueError:
        count = len(self.refusals)
        return ValueError(
            f"module has {count} part{'s' if count > 1 else ''} for which κ is not defined or not supported; a "
            "feed-forward ReLU network is made of linear maps, sums and ReLU:\n"
            + "\n".join(self.refusals.values())
            + remark
        )

    def kappa(self, output: Squared) -> Kappa:
        norm = output.value.detach().sum()
        scaled = {}
        for (name, p), gradient in zip(self.parameters.items(), self.gradients, strict=True):
            if gradient is None:  # on no path
                gradient = torch.zeros([1] * p.dim(), dtype=torch.float64, device=self.device)
            for dim, stride in enumerate(gradient.stride()):
                if stride == 0 and gradient.shape[dim] > 1:  # equal entries, which autograd has not expanded either
                    gradient = gradient.narrow(dim, 0, 1)
            largest = float(gradient.amax()) if gradient.numel() else 0.0
            if (faint := self.faint.get(name)) is not None:  # whose paths may be all the same of some weight
                share = torch.frexp(gradient)[1] + 2 * torch.frexp(faint)[1] - torch.frexp(norm)[1]
                if bool(((gradient > 0) & (faint > 0) & ((share > -_FAINT) | (norm == 0))).any()):
                    raise FloatingPointError(
                        f"the square of an entry of {name} underflows beside its tensor's largest, but paths through "
                        "it do not: rescale the units"
                    )
            if not math.isfinite(largest + float(norm)):
                raise FloatingPointError(
                    f"κ of {name} overflows: units on the same paths differ by more than float64 holds; rescale the "
                    "weights"
                )
            if self.run.aligned and name in output.weights and largest < _UNDERFLOW:
                raise FloatingPointError(
                    f"κ of {name} underflows: γ² or another path is so much larger that float64 does not hold both; "
                    "use weights of less unequal size"
                )
            shift, entries = math.frexp(largest)[1], None
            mantissa = shifted(gradient, -shift)
            if bool(((mantissa < torch.finfo(p.dtype).tiny) & (gradient > 0)).any()):  # an exponent for each entry
                mantissa, entries = torch.frexp(gradient)
                shift, entries = 0, entries.long()
            exponent = torch.tensor(output.exponent - self.squares[name].exponent + shift, device=mantissa.device)
            scaled[name] = Scaled(mantissa.to(p.dtype), exponent, entries=entries)
        log_norm = norm.log() + output.exponent * _LN2
        return Kappa.of(scaled, log_norm, {name: p.shape for name, p in self.parameters.items()})


def _title(name: str, module: nn.Module) -> str:
    return f"  {name or 'the module itself'} ({type(module).__name__})"
