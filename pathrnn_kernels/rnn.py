"""ReLURNN, a drop-in for ``torch.nn.RNN(nonlinearity="relu")``."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import ops


class ReLURNN(nn.Module):
    """Multi-layer Elman RNN with ReLU (Table 1): h^i_t = [W_ih h^{i-1}_t + b_ih + W_hh h^i_{t-1} + b_hh]_+.

    Arguments, parameter names, shapes, initialisation and state dicts are those of
    ``torch.nn.RNN(nonlinearity="relu")``; ``from_torch`` and ``to_torch`` convert.

    Args:
        input_size: features of x.
        hidden_size: units of every layer.
        num_layers: stacked layers.
        bias: whether the layers have ``bias_ih`` and ``bias_hh``.
        batch_first: x and y are ``[B, T, ·]`` instead of ``[T, B, ·]``; h_0 and h_n are not affected.
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: not supported yet.
        device, dtype: of the parameters; float32 or float64.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> rnn = pk.ReLURNN(2, 100)
        >>> y, h_n = rnn(torch.rand(750, 16, 2))
        >>> y.shape, h_n.shape
        (torch.Size([750, 16, 100]), torch.Size([1, 16, 100]))
        >>> rnn.load_state_dict(torch.nn.RNN(2, 100, nonlinearity="relu").state_dict())
        <All keys matched successfully>
    """

    nonlinearity = "relu"
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    weight_hh_l0: nn.Parameter

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
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(size, bool) or not isinstance(size, numbers.Integral):
                raise TypeError(f"{name} is {size!r}; it must be a positive integer")
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        for name, flag in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is {flag!r}; it must be True or False")
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
            raise TypeError(f"dropout is {dropout!r}; it must be a number in [0, 1]")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; it must be in [0, 1]")
        if bidirectional:
            raise ValueError("bidirectional=True is not supported yet; use torch.nn.RNN, or two ReLURNNs")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; use torch.float32 or torch.float64")
        self.input_size = int(input_size)
        self.hidden_size = int(hidden_size)
        self.num_layers = int(num_layers)
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        #: T of the last forward pass, which PathOptimizer takes for κ when it is given no seq_len.
        self.last_seq_len: int | None = None
        for i in range(self.num_layers):
            shapes = {"weight_ih": (self.hidden_size, self.input_size if i == 0 else self.hidden_size)}
            shapes["weight_hh"] = (self.hidden_size, self.hidden_size)
            if bias:
                shapes["bias_ih"] = shapes["bias_hh"] = (self.hidden_size,)  # type: ignore[assignment]
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_l{i}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-1/√H, 1/√H), drawn in nn.RNN's order, so that one seed gives both modules the same weights."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def forward(self, x: Tensor, h_0: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the RNN.

        Args:
            x: ``[T, B, input_size]``, ``[B, T, input_size]`` with ``batch_first``, or ``[T, input_size]`` unbatched.
            h_0: ``[num_layers, B, hidden_size]`` (``[num_layers, hidden_size]`` unbatched); zeros by default.
            lengths: not supported yet.

        Returns:
            y: the top layer's h_1 … h_T, in x's layout with ``hidden_size`` features.
            h_n: h_T of every layer, in h_0's layout.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        self._check(x, h_0, lengths)
        unbatched = x.dim() == 2
        if unbatched:
            x = x.unsqueeze(1)
            h_0 = None if h_0 is None else h_0.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        self.last_seq_len = x.shape[0]

        y, finals = x, []
        for i in range(self.num_layers):
            if i > 0 and self.dropout > 0:
                y = nn.functional.dropout(y, self.dropout, self.training)
            y, h_n = ops.relu_rnn(y, None if h_0 is None else h_0[i], *self._layer(i))
            finals.append(h_n)
        h_n = finals[0].unsqueeze(0) if len(finals) == 1 else torch.stack(finals)

        if unbatched:
            return y.squeeze(1), h_n.squeeze(1)
        return (y.transpose(0, 1) if self.batch_first else y), h_n

    def _layer(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weight_ih, weight_hh = getattr(self, f"weight_ih_l{i}"), getattr(self, f"weight_hh_l{i}")
        if not self.bias:
            return weight_ih, weight_hh, None, None
        return weight_ih, weight_hh, getattr(self, f"bias_ih_l{i}"), getattr(self, f"bias_hh_l{i}")

    def _check(self, x: Any, h_0: Any, lengths: Any) -> None:
        if isinstance(x, PackedSequence):
            raise TypeError("x is a PackedSequence, which is not supported yet: pad it (pad_packed_sequence)")
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
        if lengths is not None:
            raise ValueError("lengths is not supported yet; pass sequences of one length and mask the loss")
        weight = self.weight_hh_l0
        layout = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        if x.dim() not in (2, 3):
            raise ValueError(f"x has shape {list(x.shape)}; it must be {layout}, or [T, input_size] unbatched")
        if x.shape[-1] != self.input_size:
            raise ValueError(f"x has {x.shape[-1]} features (shape {list(x.shape)}), but input_size={self.input_size}")
        for size in x.shape[:-1]:
            if size == 0:
                raise ValueError(f"x has shape {list(x.shape)}; T and B must be at least 1 ({layout})")
        if x.dim() == 2:
            expected = [self.num_layers, self.hidden_size]
        else:
            expected = [self.num_layers, x.shape[0 if self.batch_first else 1], self.hidden_size]
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
            if tensor.dtype != weight.dtype:
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
        result = cls(*_sizes(rnn), bidirectional=rnn.bidirectional, **_options(rnn))
        result.load_state_dict(rnn.state_dict())
        return result.train(rnn.training)

    def to_torch(self) -> nn.RNN:
        """A ``torch.nn.RNN`` with copies of this module's weights."""
        input_size, hidden_size, num_layers, bias, batch_first, dropout = _sizes(self)
        result = nn.RNN(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity="relu",
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            **_options(self),
        )
        result.load_state_dict(self.state_dict())
        return result.train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)


def _sizes(rnn: ReLURNN | nn.RNN) -> tuple[int, int, int, bool, bool, float]:
    return rnn.input_size, rnn.hidden_size, rnn.num_layers, rnn.bias, rnn.batch_first, rnn.dropout


def _options(rnn: ReLURNN | nn.RNN) -> dict[str, Any]:
    weight = next(rnn.parameters())
    return {"device": weight.device, "dtype": weight.dtype}
