"""Initialisations of plain ReLU RNNs, in place.

Each takes a :class:`ReLURNN`, a ``torch.nn.RNN`` or a :class:`PathNetwork`. The weights of a PathNetwork's head and
embedding are initialised like the other non-recurrent weights (an embedding's padding row stays zero); biases, the
head's included, are set to zero. Each returns its argument, and repeats itself given the same ``generator``.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from .arguments import check_number, check_writable
from .kappa import precision
from .network import PathNetwork
from .ops.backend import without_numbers
from .rnn import ReLURNN

Network = TypeVar("Network", ReLURNN, nn.RNN, PathNetwork)


@torch.no_grad()
def identity_(
    net: Network, scale: float = 1.0, other_bound: float = 0.01, generator: Generator | None = None
) -> Network:
    """IRNN (Le, Jaitly, Hinton, 2015): W_hh = scale · I, other weights U[-other_bound, other_bound].

    The defaults are those of section 5.2. Le et al. draw the other weights from N(0, 0.001²) and take a scale of 0.01
    for tasks without long-range dependencies.

    Example:
        >>> pk.init.identity_(pk.ReLURNN(2, 2)).weight_hh_l0.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    scale, other_bound = _check(net, generator, scale=scale, other_bound=other_bound)
    for weight in _recurrent(net):
        weight.zero_().fill_diagonal_(scale)  # nn.init.eye_ would make its matrix on the default device
    return _others(net, other_bound, generator)


@torch.no_grad()
def np_rnn_(net: Network, generator: Generator | None = None) -> Network:
    """np-RNN (Talathi, Vartak, 2016): W_hh = (A + I) / λ_max(A + I), A = R Rᵀ / H, R standard normal.

    W_hh is positive definite with largest eigenvalue 1 and all others smaller. Input weights are N(0, α² / fan-in) with
    α = √2 exp(1.2 / (max(H, 6) - 2.4)), weights of a head or embedding N(0, 2 / (fan-in + fan-out)).

    Example:
        >>> w = pk.init.np_rnn_(pk.ReLURNN(2, 100)).weight_hh_l0.detach()
        >>> round(torch.linalg.eigvalsh(w)[-1].item(), 4)
        1.0
    """
    _check(net, generator)
    for weight in _recurrent(net):
        size = len(weight)
        r = torch.empty_like(weight).normal_(generator=generator).double()
        a = r @ r.T / size + torch.eye(size, dtype=r.dtype, device=r.device)
        weight.copy_(a / torch.linalg.eigvalsh(a)[-1])
    alpha = math.sqrt(2) * math.exp(1.2 / (max(size, 6) - 2.4))
    for name, p in _non_recurrent(net):
        if "bias" in name:
            p.zero_()
        elif "weight_ih" in name:
            p.normal_(0, alpha / math.sqrt(p.shape[1]), generator=generator)
        else:
            p.normal_(0, math.sqrt(2 / sum(p.shape)), generator=generator)
    return _zero_padding(net)


@torch.no_grad()
def uniform_(
    net: Network, recurrent_bound: float = 0.01, other_bound: float = 0.2, generator: Generator | None = None
) -> Network:
    """W_hh from U[-recurrent_bound, recurrent_bound], other weights from U[-other_bound, other_bound].

    The defaults are the paper's for character-level language models (section 5.3).

    Example:
        >>> rnn = pk.init.uniform_(pk.ReLURNN(2, 100), recurrent_bound=0.01, other_bound=0.2)
        >>> bool(rnn.weight_hh_l0.abs().max() <= 0.01)
        True
    """
    recurrent_bound, other_bound = _check(net, generator, recurrent_bound=recurrent_bound, other_bound=other_bound)
    for weight in _recurrent(net):
        weight.uniform_(-recurrent_bound, recurrent_bound, generator=generator)
    return _others(net, other_bound, generator)


@torch.no_grad()
def orthogonal_(
    net: Network, gain: float = 1.0, other_bound: float = 0.01, generator: Generator | None = None
) -> Network:
    """W_hh = gain · Q with Q orthogonal (Saxe et al., 2014), other weights U[-other_bound, other_bound].

    Example:
        >>> w = pk.init.orthogonal_(pk.ReLURNN(2, 100)).weight_hh_l0.detach()
        >>> torch.allclose(w @ w.T, torch.eye(100), atol=1e-5)
        True
    """
    gain, other_bound = _check(net, generator, gain=gain, other_bound=other_bound)
    for weight in _recurrent(net):
        wide = torch.empty_like(weight, dtype=precision(weight.dtype))  # no QR decomposition in half precision
        weight.copy_(nn.init.orthogonal_(wide, gain, generator=generator))
    return _others(net, other_bound, generator)


def _others(net: Network, bound: float, generator: Generator | None) -> Network:
    for name, p in _non_recurrent(net):
        if "bias" in name:
            p.zero_()
        else:
            p.uniform_(-bound, bound, generator=generator)
    return _zero_padding(net)


def _zero_padding(net: Network) -> Network:
    embedding = net.embedding if isinstance(net, PathNetwork) else None
    if embedding is not None and embedding.padding_idx is not None:
        embedding.weight[embedding.padding_idx] = 0
    return net


def _rnn(net: ReLURNN | nn.RNN | PathNetwork) -> ReLURNN | nn.RNN:
    rnn = net.rnn if isinstance(net, PathNetwork) else net
    if not isinstance(rnn, (ReLURNN, nn.RNN)):
        raise TypeError(f"net is a {type(net).__name__}; it must be a ReLURNN, torch.nn.RNN or PathNetwork")
    return rnn


def _recurrent(net: ReLURNN | nn.RNN | PathNetwork) -> list[Tensor]:
    return [p for name, p in _rnn(net).named_parameters() if name.startswith("weight_hh")]


def _non_recurrent(net: ReLURNN | nn.RNN | PathNetwork) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in net.named_parameters() if "weight_hh" not in name]


def _check(net: ReLURNN | nn.RNN | PathNetwork, generator: Any, **values: float) -> list[float]:
    """Before anything is written; returns the values as torch takes them, which are real numbers of any make."""
    for name, _ in _rnn(net).named_parameters():
        if not name.startswith(("weight_", "bias_")):
            raise ValueError(
                f"{name} is of a parametrization, which would be left as it is: initialise before that, or remove it"
            )
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator or None")
    for name, p in net.named_parameters():
        if generator is not None and generator.device.type != p.device.type and not without_numbers(p):
            raise ValueError(f"generator is on {generator.device}, but {name} is on {p.device}: make it there")
        check_writable(name, p)
    dtype = min((p.dtype for p in net.parameters()), key=lambda dtype: torch.finfo(dtype).max)
    for name, value in values.items():
        check_number(name, value, zero=True, error=ValueError)
        # U[-bound, bound] is as wide as two bounds.
        most = torch.finfo(dtype).max / (2 if name.endswith("bound") else 1)
        if float(value) > most:
            raise ValueError(f"{name} is {value}; in {dtype} it must be at most {most:g}")
    return [float(value) for value in values.values()]
