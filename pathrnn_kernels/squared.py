"""The squared network's tensors, and what every operation of a module becomes on them.

p̃ = p² for every parameter and constant, ones for the input: all is non-negative, so that ReLU is the identity. torch
hands every call on such a tensor to a rule of this file, and there are rules for linear maps, sums and ReLU only: what
has none is reported, never guessed. A γ² made by these rules is a sum over paths with every parameter at most once on
each, because a product is refused where neither side is a weight or constant, or where both share a parameter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map

#: The largest entry of a weight stays within 2^±100, its square within 2^±200, and that of what is computed within
#: 2^±400, so that no product leaves float64. The power of two beside a tensor takes the rest.
WEIGHT_RANGE, _RANGE = 100, 400


class Kind(Enum):
    INPUT = "the input, at most reshaped"
    EDGE = "a weight or constant, at most reshaped or multiplied by constants"
    NODE = "anything computed"


class _Refused(Exception):
    """Why there is no rule for a call."""


@dataclass
class Run:
    """What the tensors of one run share."""

    #: Told of every call without a rule: the function's name, and the reason.
    report: Callable[[str, str], None]
    #: Of the module's parameters.
    dtype: torch.dtype
    #: Whether tensors of unlike exponents have met: only then can the smaller, and its derivatives, have underflowed.
    aligned: bool = False


class Squared(Tensor):
    """A tensor of the squared network, value · 2^exponent. It has no memory of its own that an operation could read."""

    value: Tensor
    exponent: int
    kind: Kind
    #: The parameters that lie on paths to it; one set for all that may share memory, which may be changed in place.
    weights: set[str]
    run: Run
    #: The dtype that the module has here.
    own: torch.dtype

    @staticmethod
    def __new__(cls, value: Tensor, *_: Any) -> Squared:
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)

    def __init__(
        self, value: Tensor, exponent: int, kind: Kind, weights: set[str], run: Run, own: torch.dtype | None = None
    ) -> None:
        self.value, self.exponent, self.kind, self.weights, self.run = value, exponent, kind, weights, run
        self.own = run.dtype if own is None else own

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # A forward pass may hold no_grad, or inference_mode: its paths are there all the same.
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.enable_grad():
            try:
                if func not in _RULES:
                    raise _Refused("it is not linear, or not known here to be")
                return _RULES[func](func, *args, **kwargs)
            except _Refused as refusal:
                reason = str(refusal)
            except TypeError as error:  # from the rule's signature
                reason = f"it is called in a way that has no rule ({error})"
            first = next(_squared_in((args, kwargs)))
            first.run.report(resolve_name(func) or getattr(func, "__name__", repr(func)), reason)
            return _substitute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise _Refused(f"{func} bypasses __torch_function__")


def _squared_in(values: Any) -> Iterator[Squared]:
    if isinstance(values, Squared):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _squared_in(value)
    elif isinstance(values, dict):
        yield from _squared_in(list(values.values()))


def shifted(value: Tensor, shift: int) -> Tensor:
    """value · 2^shift, also where 2^shift alone is out of range."""
    if shift == 0:
        return value
    part = max(-1022, min(1022, shift))
    return shifted(value * 2.0**part, max(-1022, min(1022, shift - part)))


def normalised(value: Tensor, exponent: int, limit: int = _RANGE) -> tuple[Tensor, int]:
    """value · 2^exponent as another such pair, if the largest entry is out of 2^±limit."""
    largest = float(value.detach().amax()) if value.numel() else 0.0
    shift = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    return (value, exponent) if abs(shift) <= limit else (shifted(value, -shift), exponent + shift)


def _substitute(func: Any, args: Any, kwargs: Any) -> Any:
    """Something of the right shape for what has been refused, so that the rest is looked at too."""
    sources = list(_squared_in((args, kwargs)))
    kind = Kind.EDGE if all(x.kind is Kind.EDGE for x in sources) else Kind.NODE

    def plain(value: Any) -> Any:
        return value.value.detach().to(value.own, copy=True) if isinstance(value, Squared) else value

    def squared(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.is_floating_point()
        return Squared(value.double(), 0, kind, set(), sources[0].run, sources[0].own) if fits else value

    try:
        return tree_map(squared, func(*tree_map(plain, args), **tree_map(plain, kwargs)))
    except Exception:
        return sources[0]


# --- rules: func(*args, **kwargs) of the module → the same of the squared network -------------------------------------

_Rule = Callable[..., Any]


def _operand(value: Any, beside: Squared) -> Squared:
    """Numbers and plain tensors are constants of the network, which are squared like weights."""
    if isinstance(value, Squared):
        return value
    if isinstance(value, Tensor):
        tensor = value
    else:  # as float64: torch would round a Python number to its default dtype
        tensor = torch.tensor(value, dtype=None if isinstance(value, complex) else torch.float64, device="cpu")
    if tensor.requires_grad:
        raise _Refused("it takes a weight that is not an attribute of its module")
    if tensor.is_complex():
        raise _Refused("it has a complex constant")
    weight, exponent = normalised(tensor.to(beside.value.device, torch.float64).abs(), 0, WEIGHT_RANGE)
    typed = isinstance(value, Tensor) and tensor.dim() > 0 and tensor.is_floating_point()
    own = tensor.dtype if typed else beside.own  # as torch promotes
    return Squared(weight.square(), 2 * exponent, Kind.EDGE, set(), beside.run, own)


def _operands(*values: Any) -> list[Squared]:
    beside = next(_squared_in(values))
    return [_operand(value, beside) for value in values]


def _node(value: Tensor, exponent: int, *sources: Squared) -> Squared:
    weights = set[str]().union(*(source.weights for source in sources))
    own = functools.reduce(torch.promote_types, (source.own for source in sources))
    return Squared(*normalised(value, exponent), Kind.NODE, weights, sources[0].run, own)


def _like(value: Tensor, source: Squared) -> Squared:
    return Squared(value, source.exponent, source.kind, source.weights, source.run, source.own)


def _copy(source: Squared) -> Squared:
    return Squared(source.value.clone(), source.exponent, source.kind, set(source.weights), source.run, source.own)


def _times(product: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Squared:
    a, b = _operands(first, second)
    if Kind.EDGE not in (a.kind, b.kind):
        raise _Refused("it multiplies two activations, or an activation by computed weights")
    if twice := sorted(a.weights & b.weights):
        raise _Refused(f"{', '.join(twice)} lies twice on a path, so that κ⁽²⁾ is not 0: untie what shares it")
    result = _node(product(a.value, b.value), a.exponent + b.exponent, a, b)
    if a.kind is b.kind and not (a.weights and b.weights):
        result.kind = Kind.EDGE
    return result


def _at(x: Squared, exponent: int) -> Tensor:
    x.run.aligned |= x.exponent != exponent
    return shifted(x.value, x.exponent - exponent)


def _aligned(operands: Sequence[Squared]) -> tuple[list[Tensor], int]:
    exponent = max(x.exponent for x in operands)
    return [_at(x, exponent) for x in operands], exponent


def _plus(first: Any, second: Any) -> Squared:
    operands = _operands(first, second)
    (a, b), exponent = _aligned(operands)
    return _node(a + b, exponent, *operands)


def _scaled(x: Any, factor: Any) -> Any:
    return x if factor == 1 else _times(torch.mul, x, factor)


def _add(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Squared:
    x, y = _operands(input, other)
    return _plus(x, _scaled(y, alpha))  # a difference has the weight -1, squared 1


def _add_(func: Any, input: Any, other: Any, *, alpha: Any = 1) -> Squared:
    """In memory, as the module means it: tensors that share it change too."""
    x, y = _operands(input, other)
    y = _scaled(y, alpha)
    if x is not input or x.kind is not Kind.NODE:
        raise _Refused("it changes its input, a weight or a constant in place")
    x.value.add_(_at(y, x.exponent))
    x.weights.update(y.weights)
    return x


def _multiply(func: Any, input: Any, other: Any) -> Squared:
    return _times(torch.mul, input, other)


def _divide(func: Any, input: Any, other: Any) -> Squared:
    if isinstance(other, Squared):
        raise _Refused("it divides by an activation or a weight")
    return _times(torch.mul, input, other.double().reciprocal() if isinstance(other, Tensor) else 1 / other)


def _matmul(func: Any, input: Any, other: Any) -> Squared:
    return _times(torch.matmul, input, other)


def _einsum(func: Any, equation: str, *operands: Any) -> Squared:
    if len(operands) != 2:
        raise _Refused(f"it has {len(operands)} operands: use two at a time")
    return _times(lambda a, b: torch.einsum(equation, a, b), *operands)


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Squared:
    result = _times(F.linear, input, weight)
    return result if bias is None else _plus(result, bias)


def _convolution(
    dims: int, func: Any, input: Any, weight: Any, bias: Any = None, *options: Any, **named: Any
) -> Squared:
    result = _times(lambda x, w: func(x, w, None, *options, **named), input, weight)
    if bias is None:
        return result
    b = _operand(bias, result)
    return _plus(result, _like(b.value.reshape(-1, *[1] * dims), b))


def _embedding(
    func: Any, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Squared:
    if max_norm is not None:
        raise _Refused("max_norm rewrites weights in the forward pass: use max_norm=None")
    if not isinstance(input, Squared):  # constant indices select weights
        return _like(F.embedding(input, weight.value), weight)
    if input.kind is not Kind.INPUT:
        raise _Refused("its indices are computed: only the module's input can be tokens")
    rows = _operand(weight, input)
    return _node(rows.value.sum(0).expand(*input.value.shape, -1).clone(), rows.exponent, rows)


def _relu(func: Any, input: Squared, *_: Any, inplace: bool = False, **__: Any) -> Squared:
    """The identity, for nothing is negative; a new tensor where the module makes one."""
    if inplace or func in _IN_PLACE:
        if input.kind is Kind.EDGE:
            raise _Refused("it changes a weight in place")
        return input
    return _node(input.value.clone(), input.exponent, input)


def _dropout(func: Any, input: Squared, p: float = 0.5, training: bool = True, inplace: bool = False) -> Squared:
    if inplace or not training or p == 0 or func in _IN_PLACE:
        return input
    return _copy(input)


def _move(func: Any, input: Squared, *args: Any, **kwargs: Any) -> Any:
    """Reshapes, selects or repeats: every entry of the result is one of the input."""
    if not isinstance(input, Squared) or any(True for _ in _squared_in((args, kwargs))):
        raise _Refused("its arguments are activations or weights")
    return tree_map(
        lambda value: _like(value, input) if isinstance(value, Tensor) else value, func(input.value, *args, **kwargs)
    )


def _pad(func: Any, input: Squared, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant" and value:
        raise _Refused(f"it pads with {value}: use zeros")
    return _move(func, input, pad, mode)


def _cast(func: Any, input: Squared, *args: Any, **kwargs: Any) -> Squared:
    """All is float64 here. The input may be tokens."""
    arguments = tree_map(lambda x: x.value.new_empty(0, dtype=x.own) if isinstance(x, Squared) else x, (args, kwargs))
    dtype = func(input.value.new_empty(0, dtype=input.own), *arguments[0], **arguments[1]).dtype
    if input.kind is not Kind.INPUT and not dtype.is_floating_point:
        raise _Refused("it rounds activations")
    if dtype is input.own and not kwargs.get("copy"):
        return input
    result = _copy(input)
    result.own = dtype
    return result


def _join(func: Any, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Squared:
    operands = _operands(*tensors)
    values, exponent = _aligned(operands)
    result = _node(func(values, *args, **kwargs), exponent, *operands)
    if all(x.kind is Kind.EDGE for x in operands):
        result.kind = Kind.EDGE
    return result


def _in_double(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise _Refused("it rounds activations")


def _sum(func: Any, input: Squared, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Squared:
    _in_double(dtype)
    return _node(torch.sum(input.value, *args, **kwargs), input.exponent, input)


def _mean(func: Any, input: Squared, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Squared:
    _in_double(dtype)
    mean = torch.mean(input.value, *args, **kwargs)
    return _node(mean * (mean.numel() / input.value.numel()), input.exponent, input)


def _window_sums(dims: int, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> Tensor:
    if dims == 1:  # avg_pool1d has no divisor_override

        def flat(size: Any, other: int) -> tuple[int, int]:
            return (other, *size) if isinstance(size, (list, tuple)) else (other, size)

        sums = _window_sums(2, x.unsqueeze(-2), flat(kernel, 1), flat(stride, 1), flat(padding, 0), ceil_mode)
        return sums.squeeze(-2)
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    return pool(x, kernel, stride, padding, ceil_mode, divisor_override=1)


def _average_pool(
    dims: int,
    func: Any,
    input: Squared,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Squared:
    def pool(x: Tensor) -> Tensor:
        return func(x, kernel_size, stride or kernel_size, padding, ceil_mode, *args, **kwargs)

    ones = torch.ones_like(input.value)
    sizes = _window_sums(dims, ones, kernel_size, stride or kernel_size, padding, ceil_mode)
    weight = pool(ones) / sizes  # 1/n of every window
    return _node(pool(input.value) * weight, input.exponent, input)


def _max_pool(
    dims: int,
    func: Any,
    input: Squared,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    **_: Any,  # return_indices, which is False: with indices it is another function
) -> Squared:
    if any(size != 1 for size in ([dilation] if isinstance(dilation, int) else dilation)):
        raise _Refused(f"it has dilation={dilation}: use 1")
    sums = _window_sums(dims, input.value, kernel_size, stride or kernel_size, padding, ceil_mode)
    return _node(sums, input.exponent, input)


def _adaptive_pool(dims: int, largest: bool, func: Any, input: Squared, output_size: Any, **_: Any) -> Squared:
    average: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    mean = average(input.value, output_size)
    count = torch.ones((), dtype=torch.float64, device=mean.device)
    for size, out in zip(input.value.shape[-dims:], mean.shape[-dims:], strict=True):
        # Window i is from floor(i size / out) to ceil((i + 1) size / out).
        lengths = [-(-(i + 1) * size // out) - i * size // out for i in range(out)]
        count = count.unsqueeze(-1) * torch.tensor(lengths, dtype=torch.float64, device=mean.device)
    return _node(mean * count if largest else mean / count, input.exponent, input)


def _ask(func: Any, input: Squared, *args: Any, **kwargs: Any) -> Any:
    """What depends on shapes, not on values."""
    return func(input.value, *args, **kwargs)


def _functions(*names: str) -> Iterator[Any]:
    """What torch passes to ``__torch_function__`` for them: functions, methods and getters."""
    for name, owner in itertools.product(names, (torch, F, Tensor)):
        function = getattr(owner, name, None)
        getter = getattr(function, "__get__", None)
        if callable(function) and not isinstance(function, type):
            yield function
        elif getter is not None:
            yield getter


_RULES: dict[Any, _Rule] = {}
_IN_PLACE = set(_functions("relu_", "leaky_relu_", "dropout_"))


def _register(rule: _Rule, functions: Iterable[Any]) -> None:
    _RULES.update(dict.fromkeys(functions, rule))


_register(_add, _functions("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__"))
_register(_add_, _functions("add_", "__iadd__"))
_register(_multiply, _functions("mul", "multiply", "__mul__", "__rmul__"))
_register(_divide, _functions("div", "divide", "true_divide", "__truediv__"))
_register(_matmul, _functions("matmul", "__matmul__", "mm", "bmm", "mv"))
_register(_einsum, _functions("einsum"))
_register(_linear, _functions("linear"))
_register(_embedding, [F.embedding])  # torch.embedding takes its arguments in another order
_register(_relu, _functions("relu", "relu_", "leaky_relu", "leaky_relu_"))
_register(_dropout, _functions("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"))
_register(_pad, _functions("pad"))
_register(_join, _functions("cat", "concat", "concatenate", "stack", "hstack", "vstack"))
_register(_sum, _functions("sum", "amax"))  # as for max pooling
_register(_mean, _functions("mean"))
_register(_cast, _functions("to", "type_as", "float", "double", "long", "int"))
for _dims in (1, 2, 3):
    _register(functools.partial(_convolution, _dims), _functions(f"conv{_dims}d", f"conv_transpose{_dims}d"))
    _register(functools.partial(_average_pool, _dims), _functions(f"avg_pool{_dims}d"))
    _register(functools.partial(_max_pool, _dims), _functions(f"max_pool{_dims}d"))
    for _largest, _name in ((False, "avg"), (True, "max")):
        _register(functools.partial(_adaptive_pool, _dims, _largest), [getattr(F, f"adaptive_{_name}_pool{_dims}d")])
_register(
    _move,
    _functions(
        *("reshape", "view", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "expand", "broadcast_to"),
        *("transpose", "swapaxes", "permute", "movedim", "t", "T", "mT", "flip", "roll"),
        *("clone", "contiguous"),
        *("chunk", "split", "tensor_split", "unbind", "select", "narrow", "__getitem__", "index_select"),
        *("repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold"),
    ),
)
_register(lambda func, input: input.own, _functions("dtype"))
_register(
    _ask,
    _functions(
        *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "stride"),
        *("device", "layout", "is_cuda", "is_cpu", "is_sparse", "is_nested", "requires_grad"),
        *("is_floating_point", "is_complex", "is_contiguous"),
        *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
    ),
)
