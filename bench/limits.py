"""The table of limits (pathrnn_kernels/README.md): each line is tried, and a refusal is quoted as the code says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import pathrnn_kernels as pk

SEQ_LEN, BATCH, INPUTS, HIDDEN = 5, 4, 2, 3
CPU = torch.device("cpu")


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(SEQ_LEN, BATCH, INPUTS, dtype=dtype)


def _net(dtype: torch.dtype = torch.float32, bidirectional: bool = False) -> pk.PathNetwork:
    head = nn.Linear(HIDDEN * (2 if bidirectional else 1), 1, dtype=dtype)
    return pk.PathNetwork(pk.ReLURNN(INPUTS, HIDDEN, dtype=dtype, bidirectional=bidirectional), head)


def _learn(module: nn.Module, *inputs: Tensor) -> None:
    found = module(*inputs)
    (found[0] if isinstance(found, tuple) else found).float().sum().backward()


def _lengths() -> None:
    pk.ReLURNN(INPUTS, HIDDEN)(_x(), lengths=torch.tensor([5, 1, 3, 2]))[0].sum().backward()


def _packed() -> None:
    pk.ReLURNN(INPUTS, HIDDEN)(pack_sequence([torch.rand(n, INPUTS) for n in (5, 3, 2, 1)]))[0].data.sum().backward()


def _autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _learn(nn.Sequential(nn.Linear(7, INPUTS), pk.ReLURNN(INPUTS, HIDDEN)), torch.rand(SEQ_LEN, BATCH, 7))


def _parametrised() -> nn.Module:
    return parametrizations.orthogonal(pk.ReLURNN(INPUTS, HIDDEN), "weight_hh_l0")


def _twice() -> None:
    rnn = pk.ReLURNN(INPUTS, HIDDEN)
    loss = rnn(_x())[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, rnn.weight_hh_l0, create_graph=True)
    gradient.sum().backward()


def _per_sample() -> None:
    rnn = pk.ReLURNN(INPUTS, HIDDEN)
    weights: dict[str, Any] = dict(rnn.named_parameters())

    def loss(weights: dict[str, Any], x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(rnn, weights, (x,))[0]
        return found.sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, _x())


def _norm_twice() -> None:
    net = _net()
    (gradient,) = torch.autograd.grad(pk.path_norm(net, SEQ_LEN), [next(net.parameters())], create_graph=True)
    gradient.sum().backward()


def _tied() -> None:
    net = _net()
    net.rnn.register_parameter("bias_hh_l0", net.rnn.get_parameter("bias_ih_l0"))
    pk.PathNetwork(net.rnn)


def _sparse() -> None:
    net = pk.PathNetwork(pk.ReLURNN(INPUTS, HIDDEN), embedding=nn.Embedding(7, INPUTS, sparse=True))
    optimizer = pk.PathSGD(net)
    _learn(net, torch.zeros(SEQ_LEN, BATCH, dtype=torch.long))
    optimizer.step()


def _update(net: pk.PathNetwork) -> None:
    optimizer = pk.PathSGD(net, lr=1e-6)
    _learn(net, _x(next(net.parameters()).dtype))
    optimizer.step()


#: What a user might try, in the order of the table.
TRIALS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("`ReLURNN(bidirectional=True)`", lambda: _learn(pk.ReLURNN(INPUTS, HIDDEN, bidirectional=True), _x())),
    ("`rnn(x, lengths=…)`", _lengths),
    ("PackedSequence", _packed),
    (
        "`ReLURNN(dtype=torch.bfloat16)`, float16",
        lambda: _learn(pk.ReLURNN(2, 3, dtype=torch.bfloat16), _x(torch.bfloat16)),
    ),
    ("`ReLURNN(dtype=torch.complex64)`", lambda: pk.ReLURNN(INPUTS, HIDDEN, dtype=torch.complex64)),
    ("`ReLURNN` under autocast", _autocast),
    ("`ReLURNN` with parametrised weights", lambda: _learn(_parametrised(), _x())),
    ("a second derivative of `ReLURNN`", _twice),
    ("per-sample gradients of `ReLURNN` by `torch.func.vmap`", _per_sample),
    (
        'κ of a `torch.nn.RNN(nonlinearity="relu")`',
        lambda: pk.kappa(pk.PathNetwork(nn.RNN(2, 3, nonlinearity="relu")), 5),
    ),
    ("κ of a tanh RNN", lambda: pk.PathNetwork(nn.RNN(INPUTS, HIDDEN))),
    ("κ of an LSTM", lambda: pk.PathNetwork(nn.LSTM(INPUTS, HIDDEN))),  # type: ignore[arg-type]
    (
        "κ, both terms, of a bidirectional network",
        lambda: pk.kappa(_net(bidirectional=True), SEQ_LEN, second_term=True),
    ),
    ("κ of a bfloat16 or float16 network", lambda: pk.kappa(_net(torch.bfloat16), SEQ_LEN)),
    ("κ of parametrised weights", lambda: pk.PathNetwork(_parametrised())),  # type: ignore[arg-type]
    ("κ of tied parameters", _tied),
    (
        "κ with `nn.Embedding(max_norm=…)`",
        lambda: pk.PathNetwork(pk.ReLURNN(2, 3), embedding=nn.Embedding(7, 2, max_norm=1.0)),
    ),
    ("κ of a feed-forward module", lambda: pk.kappa_of_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (2,))),
    ("… with a part that is neither linear nor ReLU", lambda: pk.kappa_of_module(nn.BatchNorm1d(2), (2,))),
    ("a second derivative of `path_norm`", _norm_twice),
    ("`PathOptimizer` on bfloat16 parameters", lambda: _update(_net(torch.bfloat16))),
    ("`PathOptimizer` on LBFGS", lambda: pk.PathOptimizer(torch.optim.LBFGS(_net().parameters()), _net())),
    ("`PathOptimizer` with sparse gradients", _sparse),
)


def table() -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {answer} |" for name, answer in answers()]
    return "\n".join([*lines, ""])


def answers() -> Iterator[tuple[str, str]]:
    """Of every trial its name, and "yes" or how it was refused."""
    for name, trial in TRIALS:
        try:
            trial()
        except (TypeError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split()).replace("|", "\\|")
            yield name, f"{type(error).__name__}: {text}"
        else:
            yield name, "yes"
