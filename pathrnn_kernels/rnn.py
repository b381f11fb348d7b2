"""ReLURNN, a drop-in for ``torch.nn.RNN(nonlinearity="relu")``."""

from __future__ import annotations

import contextlib
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .arguments import check_count, check_dtype, check_flags
from .ops.backend import constant_when_traced, transformed, without_numbers
from .steps import Steps

_Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

#: Far beyond any network. A number mistaken for one of layers would fill the memory, layer by layer.
_MOST = {"input_size": 2**31 - 1, "hidden_size": 2**31 - 1, "num_layers": 10_000}


class ReLURNN(nn.RNNBase):
    """Multi-layer Elman RNN with ReLU (Table 1): h^i_t = [W_ih h^{i-1}_t + b_ih + W_hh h^i_{t-1} + b_hh]_+.

    Arguments, parameter names, shapes, initialisation and state dicts are those of
    ``torch.nn.RNN(nonlinearity="relu")``; ``from_torch`` and ``to_torch`` convert (ONNX: export ``rnn.to_torch()``).

    Args:
        input_size: features of x.
        hidden_size: units of every layer, H; of every direction.
        num_layers: stacked layers.
        nonlinearity: ``"relu"``, which may stand fourth, as in nn.RNN, or be left out.
        bias: whether the layers have ``bias_ih`` and ``bias_hh``.
        batch_first: x and y are ``[B, T, ·]`` instead of ``[T, B, ·]``; h_0 and h_n are not affected.
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether every layer has a second direction, which runs from the sequence's end to its start, with
            parameters ``…_reverse``. Both read both directions of the layer below, ``[2H]``.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Precision: the dtype of x, y, h_0, h_n and gradients is the parameters'. In bfloat16 and float16 all layers are
    computed in float32, the state between layers and steps included, and y, h_n and the gradients are rounded once at
    the end; but a GPU whose cuDNN serves the dtype computes in it, as in nn.RNN. Under ``torch.autocast`` a module that
    is not float64 takes x and h_0 in its own dtype, float32 or autocast's, and returns y and h_n in autocast's, as
    nn.RNN does on a CPU and on a GPU; it computes what a module of that dtype would, but with the parameters as they
    are where that is in float32, and their gradients keep their dtype.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> rnn = pk.ReLURNN(2, 100)
        >>> y, h_n = rnn(torch.rand(750, 16, 2))
        >>> y.shape, h_n.shape
        (torch.Size([750, 16, 100]), torch.Size([1, 16, 100]))
        >>> rnn.load_state_dict(torch.nn.RNN(2, 100, nonlinearity="relu").state_dict())
        <All keys matched successfully>
        >>> y, h_n = rnn(torch.rand(750, 3, 2), lengths=[750, 20, 400])
        >>> torch.equal(h_n[0, 1], y[19, 1]), y[20:, 1].any().item()
        (True, False)
    """

    mode, nonlinearity, proj_size = "RNN_RELU", "relu", 0
    weight_hh_l0: nn.Parameter
    steps: Steps

    # An RNNBase for isinstance alone: what that does beyond nn.Module serves its list of weights for cuDNN.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    __setstate__ = nn.Module.__setstate__
    _apply = nn.Module._apply
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: str = "relu",
    ) -> None: ...

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        nonlinearity: str,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        if len(arguments) > 3 and isinstance(arguments[3], str):
            self._init(*arguments[:3], *arguments[4:], nonlinearity=arguments[3], **keywords)  # type: ignore[misc]
        else:
            self._init(*arguments, **keywords)

    def _init(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        nonlinearity: str = "relu",
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(nonlinearity, str) or nonlinearity != "relu":
            raise ValueError(f'nonlinearity is {nonlinearity!r}; it can only be "relu", for others use torch.nn.RNN')
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            check_count(name, size)
            if size > _MOST[name]:
                raise ValueError(f"{name} is {size}; it must be at most {_MOST[name]}")
        check_flags(bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
            raise TypeError(f"dropout is {dropout!r}; it must be a number in [0, 1]")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; it must be in [0, 1]")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout is {dropout} with num_layers=1, where it does nothing, for it lies between layers: leave it "
                "out, or give more layers",
                stacklevel=3,
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_dtype("dtype is", dtype)
        self.input_size = int(input_size)
        self.hidden_size = int(hidden_size)
        self.num_layers = int(num_layers)
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        #: T of the last forward pass, whoever made it.
        self.last_seq_len: int | None = None
        #: T of the gradients, which the optimisers take for κ when they are given no seq_len.
        self.steps = Steps()
        for i in range(self.num_layers):
            below = self.input_size if i == 0 else self.hidden_size * len(self._directions)
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (self.hidden_size, below)}
            shapes["weight_hh"] = (self.hidden_size, self.hidden_size)
            if bias:
                shapes["bias_ih"] = shapes["bias_hh"] = (self.hidden_size,)
            for direction in self._directions:
                for name, shape in shapes.items():
                    p = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{i}{direction}", p)
        self.reset_parameters()

    # What help and errors say of the class.
    __init__.__wrapped__ = _init  # type: ignore[attr-defined]
    _init.__qualname__ = __init__.__qualname__

    def reset_parameters(self) -> None:
        """U(-1/√H, 1/√H), drawn in nn.RNN's order, so that one seed gives both modules the same weights."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    @overload
    def forward(
        self, x: Tensor, h_0: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, x: PackedSequence, h_0: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(self, *, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, x: Tensor, *, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor | PackedSequence | None = None,
        h_0: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        input: Tensor | PackedSequence | None = None,
        hx: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the RNN. L is ``num_layers``, twice that with ``bidirectional``.

        Args:
            x: ``[T, B, input_size]``, ``[B, T, input_size]`` with ``batch_first``, ``[T, input_size]`` unbatched, or a
                PackedSequence.
            h_0: ``[L, B, hidden_size]`` (``[L, hidden_size]`` unbatched), the two directions of a layer side by side;
                zeros by default, which are not multiplied: what is not finite in W_hh shows from the second step on. Of
                a PackedSequence, in the order before it was sorted.
            lengths: the steps of every sequence of a padded x, integers ``[B]`` in 1 … T in any order and on any device
                (on a GPU they are waited for); T of each by default. Padding is never read, and finished sequences cost
                nothing. In compiled code a tensor: every list would be compiled anew.
            input, hx: nn.RNN's names of x and h_0.

        Returns:
            y: the top layer's h_1 … h_T, in x's layout with ``hidden_size`` features, ``2 hidden_size`` with
                ``bidirectional``, the direction from the start first. Zero in the padding; a PackedSequence for one.
            h_n: in h_0's layout, the state of every layer at each sequence's own end; of the other direction, which
                begins with h_0 at that end, at the start.

        y is kept for the backward pass: changed in place before it, torch raises a RuntimeError, as on a GPU.
        The gradient of x is exactly zero in the padding. ``last_seq_len`` becomes T, or the longest of the lengths; in
        compiled code T alone.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        if (x is not None and input is not None) or (h_0 is not None and hx is not None):
            raise TypeError("x and input, or h_0 and hx, are given: they are two names of one argument, use one")
        x, h_0 = input if x is None else x, hx if h_0 is None else h_0
        weight = self.weight_hh_l0
        autocast = _autocast_dtype(weight)
        self._check(x, h_0, lengths, autocast)
        if isinstance(x, PackedSequence):
            data, batch_sizes, order, position = x
            h_0 = h_0 if h_0 is None or order is None else h_0.index_select(1, order)
            steps = len(batch_sizes)
            sequences = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
            # Of every sequence, the steps that have more rows than there are sequences before it.
            packed_lengths = steps - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)
            y, h_n = self._run(data, steps, h_0, packed_lengths, weight.dtype, autocast)
            h_n = h_n if position is None else h_n.index_select(1, position)
            return PackedSequence(y, batch_sizes, order, position), h_n

        assert isinstance(x, Tensor)
        if x.dim() == 2:
            state = None if h_0 is None else h_0.unsqueeze(1)
            y, h_n = self._run(x.unsqueeze(1), x.shape[0], state, None, weight.dtype, autocast)
            return y.squeeze(1), h_n.squeeze(1)
        steps_first = x.transpose(0, 1) if self.batch_first else x
        seq_len = steps_first.shape[0]
        if lengths is not None:
            # On the CPU once, not in every layer and direction: that is where they are read. A copy: the backward pass
            # reads them again, and a loader may have written the next batch's there by then.
            lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu").clone()
            if not torch.compiler.is_compiling() and lengths.numel() > 0 and not without_numbers(lengths):
                seq_len = min(seq_len, max(1, int(lengths.max())))
        y, h_n = self._run(steps_first, seq_len, h_0, lengths, weight.dtype, autocast)
        return (y.transpose(0, 1) if self.batch_first else y), h_n

    def _run(
        self,
        x: Tensor,
        seq_len: int,
        h_0: Tensor | None,
        lengths: Tensor | None,
        own: torch.dtype,
        autocast: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """y and h_n of x ``[T, B, I]``, or of packed rows ``[N, I]`` with their lengths, of ``seq_len`` at most."""
        given, lowest = h_0, None
        dtype = ops.working_dtype(x.device, autocast or own)
        y, h_0 = _to(x, dtype), _to(h_0, dtype)
        finals: list[Tensor] = []
        # Nothing inside is autocast's to choose.
        with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
            for i in range(self.num_layers):
                if i > 0 and self.dropout > 0:
                    y = nn.functional.dropout(y, self.dropout, self.training)
                outputs = []
                for direction in self._directions:
                    state = None if h_0 is None else h_0[len(finals)]
                    weights = self._layer(i, direction)
                    if autocast or own != dtype:
                        ih, hh, bias_ih, bias_hh = weights
                        weights = _to(ih, dtype), _to(hh, dtype), _to(bias_ih, dtype), _to(bias_hh, dtype)
                    output, h_n = ops.relu_rnn(y, state, *weights, lengths=lengths, reverse=direction == "_reverse")
                    outputs.append(output)
                    finals.append(h_n)
                if lowest is None and (i + 1 == self.num_layers or outputs[0].requires_grad):
                    lowest = [*outputs, *finals[-len(outputs) :]]  # every gradient passes through these
                y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        assert lowest is not None
        self._count(seq_len, given, lowest)
        h_n = torch.stack(finals)  # of one, too: no view, for callers detach it, or change it, in place
        return _to(y, autocast or own), _to(h_n, autocast or own)

    def _count(self, seq_len: int, h_0: Tensor | None, outputs: list[Tensor]) -> None:
        """Have the steps of a forward pass that has gone well counted once a gradient reaches its outputs."""
        self.last_seq_len = seq_len
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return
        if torch.compiler.is_compiling() or transformed():  # no hooks there
            self.steps.trace(seq_len, goes_on=h_0 is not None and h_0.requires_grad and not h_0.is_leaf)
        else:
            self.steps.watch(outputs, seq_len, h_0, self._parameters)

    def count_above(self, outputs: list[Tensor], weights: Mapping[str, Tensor | None]) -> None:
        """Have the last forward pass, of a frozen RNN, counted once a gradient reaches what was made of it."""
        if not (torch.compiler.is_compiling() or torch.compiler.is_exporting() or transformed()):
            assert self.last_seq_len is not None
            self.steps.watch(outputs, self.last_seq_len, None, weights)

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:  # type: ignore[override]
        """The parameters, a list for every direction of every layer, as nn.RNN gives them."""
        layers = [self._layer(i, direction) for i in range(self.num_layers) for direction in self._directions]
        return [[p for p in layer if p is not None] for layer in layers]  # type: ignore[misc]

    def flatten_parameters(self) -> None:
        """Does nothing, for there is no flat copy of the weights; code written for nn.RNN calls it."""

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _layer(self, i: int, direction: str) -> _Weights:
        end = f"_l{i}{direction}"
        weight_ih, weight_hh = getattr(self, "weight_ih" + end), getattr(self, "weight_hh" + end)
        if not self.bias:
            return weight_ih, weight_hh, None, None
        return weight_ih, weight_hh, getattr(self, "bias_ih" + end), getattr(self, "bias_hh" + end)

    def _check(self, x: Any, h_0: Any, lengths: Any, autocast: torch.dtype | None) -> None:
        is_packed = isinstance(x, PackedSequence)
        if is_packed and lengths is not None:
            raise ValueError("lengths are given, but x is a PackedSequence, which has its own: leave them out")
        batch = int(x.batch_sizes[0]) if is_packed else None
        x = x.data if is_packed else x
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor or a PackedSequence")
        weight = self.weight_hh_l0
        layout = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        if x.dim() != 2 and (is_packed or x.dim() != 3):
            allowed = "[N, input_size] in a PackedSequence" if is_packed else f"{layout}, or [T, input_size] unbatched"
            raise ValueError(f"x has shape {list(x.shape)}; it must be {allowed}")
        if x.shape[-1] != self.input_size:
            raise ValueError(f"x has {x.shape[-1]} features (shape {list(x.shape)}), but input_size={self.input_size}")
        if x.shape[1 if self.batch_first and x.dim() == 3 else 0] == 0:
            raise ValueError(f"x has shape {list(x.shape)}; T must be at least 1 ({layout})")
        if x.dim() == 3:
            batch = x.shape[0 if self.batch_first else 1]
        if lengths is not None:
            _check_lengths(lengths, x, batch)
        layers = self.num_layers * len(self._directions)
        expected = [layers, self.hidden_size] if batch is None else [layers, batch, self.hidden_size]
        tensors = [("x", x)]
        if h_0 is not None:
            if not isinstance(h_0, Tensor):
                raise TypeError(f"h_0 is a {type(h_0).__name__}; it must be a tensor or None")
            if list(h_0.shape) != expected:
                raise ValueError(
                    f"h_0 has shape {list(h_0.shape)}; for x of shape {list(x.shape)} it must be {expected}"
                )
            tensors.append(("h_0", h_0))
        for name, tensor in tensors:
            if tensor.dtype != weight.dtype and (autocast is None or tensor.dtype not in (autocast, torch.float32)):
                raise TypeError(f"{name} has dtype {tensor.dtype}, but the weights are {weight.dtype}: convert one")
            if tensor.device != weight.device:
                raise TypeError(f"{name} is on {tensor.device}, but the weights are on {weight.device}: move one")

    @classmethod
    def from_torch(cls, rnn: nn.RNN) -> ReLURNN:
        """A ReLURNN with copies of the weights of a ``torch.nn.RNN(nonlinearity="relu")``."""
        if not isinstance(rnn, nn.RNN):
            raise TypeError(f"rnn is a {type(rnn).__name__}; it must be a torch.nn.RNN")
        if rnn.nonlinearity != "relu":
            raise ValueError(f'rnn has nonlinearity {rnn.nonlinearity!r}; only "relu" converts')
        result = cls(*_sizes(rnn), **_options(rnn))
        return _like(rnn, result)

    def to_torch(self) -> nn.RNN:
        """A ``torch.nn.RNN`` with copies of this module's weights."""
        input_size, hidden_size, num_layers, *options = _sizes(self)
        result = nn.RNN(input_size, hidden_size, num_layers, "relu", *options, **_options(self))
        return _like(self, result)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)


_Module = TypeVar("_Module", bound=nn.Module)


def _like(source: nn.Module, result: _Module) -> _Module:
    """``result`` with the weights of a module of the same parameters, frozen where they are, and in its mode."""
    weights = source.state_dict()
    if alone := sorted(weights.keys() ^ result.state_dict().keys()):
        raise ValueError(
            f"{alone[0]} is a weight of one of the two modules alone: where weights are computed from others "
            "(parametrizations, weight_norm, pruning), make them parameters again before the module is converted"
        )
    result.load_state_dict(weights)
    for name, own in source.named_parameters():  # whose order may be another
        result.get_parameter(name).requires_grad_(own.requires_grad)
    return result.train(source.training)


_Optional = TypeVar("_Optional", Tensor, Tensor | None)


def _to(tensor: _Optional, dtype: torch.dtype) -> _Optional:
    """Tensor.to, which takes a microsecond also where there is nothing to convert."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, makes of a computation with this weight; like torch's own it leaves float64."""
    device_type = weight.device.type
    if weight.dtype == torch.float64 or not _has_autocast(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@constant_when_traced  # torch 2.11 cannot trace into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _check_lengths(lengths: Any, x: Tensor, batch: int | None) -> None:
    """All but their values, which the op checks: it may be traced here."""
    if batch is None:
        raise ValueError(f"lengths are given, but x of shape {list(x.shape)} is unbatched: pass its first steps alone")
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or not all(isinstance(n, numbers.Integral) for n in lengths):
            raise TypeError(f"lengths is {lengths!r}; it must be a tensor or a sequence of integers")
        if not all(-(2**63) <= n < 2**63 for n in lengths):  # or there is no tensor to check
            raise ValueError(f"lengths is {lengths!r}; every one must be from 1 to T, the steps of x")
        lengths = torch.tensor(lengths, dtype=None if lengths else torch.int64, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must be of integers")
    if list(lengths.shape) != [batch]:
        raise ValueError(
            f"lengths has shape {list(lengths.shape)}; for x of shape {list(x.shape)} it must be [{batch}]"
        )


def _sizes(rnn: ReLURNN | nn.RNN) -> tuple[int, int, int, bool, bool, float, bool]:
    sizes = rnn.input_size, rnn.hidden_size, rnn.num_layers
    return *sizes, rnn.bias, rnn.batch_first, rnn.dropout, rnn.bidirectional


def _options(rnn: ReLURNN | nn.RNN) -> dict[str, Any]:
    weight = next(rnn.parameters())
    return {"device": weight.device, "dtype": weight.dtype}
