"""The weights on the paths: embedding → ReLU RNN layers → head."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .arguments import check_alike, check_dtype
from .ops.backend import transformed, without_numbers
from .rnn import ReLURNN

#: Of what κ is known for: not, for example, of the tensors that a weight is computed from.
_NAMES = re.compile(r"rnn\.(weight|bias)_(ih|hh)_l\d+(_reverse)?|head\.(weight|bias)|embedding\.weight")


class Held:
    """What containers hold under some keys, and whether they still do: all that follows from it holds as long."""

    def __init__(self, places: Iterable[tuple[Any, Any]]) -> None:
        # map looks them up without a bytecode each.
        self._containers, self._keys = tuple(zip(*places, strict=True)) or ((), ())
        self._found = list(map(operator.getitem, self._containers, self._keys))

    def still(self) -> bool:
        try:
            return all(map(operator.is_, map(operator.getitem, self._containers, self._keys), self._found))
        except LookupError:
            return False


class PathNetwork(nn.Module):
    """The network whose input-output paths γ² sums over (eq. (2)), and a module that runs it.

    Args:
        rnn: a :class:`ReLURNN`, or a ``torch.nn.RNN`` with ``nonlinearity="relu"``; either may be bidirectional.
        head: ``nn.Linear`` from ``hidden_size``, twice that if bidirectional, to the outputs; without one the top
            hidden units are the outputs.
        embedding: ``nn.Embedding`` into ``input_size``; its rows are the weights of one-hot inputs.
        outputs: ``"all"``, a loss at every step, or ``"last"``, one at the last step. The last step of a reverse
            direction is step 1: with ``"last"`` the head reads both final states, ``cat(h_n[-2], h_n[-1])``.
        h0: what the squared network holds at time 0, in both directions: ``"zeros"`` (Table 1) or ``"ones"``
            (section 2, where the hidden units at time 0 are input nodes).

    The modules are held, not copied: parameters are shared with the model that they came from, under the names
    ``rnn.weight_hh_l0``, …, ``head.weight``, ``head.bias``, ``embedding.weight``.

    Raises:
        TypeError: a module of the wrong type, or parameters of mixed or unsupported dtypes or devices.
        ValueError: sizes that do not fit, tied parameters, or an unknown option.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), head=torch.nn.Linear(100, 1), outputs="last")
        >>> net(torch.rand(750, 16, 2)).shape
        torch.Size([16, 1])
        >>> [name for name, _ in net.named_parameters()][-2:]
        ['head.weight', 'head.bias']
    """

    rnn: ReLURNN | nn.RNN
    head: nn.Linear | None
    embedding: nn.Embedding | None
    #: Of kappa.py, between one call and the next.
    _known: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_known"}

    def __init__(
        self,
        rnn: ReLURNN | nn.RNN,
        head: nn.Linear | None = None,
        embedding: nn.Embedding | None = None,
        outputs: Literal["all", "last"] = "all",
        h0: Literal["zeros", "ones"] = "zeros",
    ) -> None:
        super().__init__()
        _check_modules(rnn, head, embedding)
        self.rnn = rnn
        self.register_module("head", head)
        self.register_module("embedding", embedding)
        self.outputs = outputs
        self.h0 = h0
        self.check_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("rnn", "head", "embedding") and "endings" in self.__dict__:  # in place of one that was checked
            parts = {"rnn": self.rnn, "head": self.head, "embedding": self.embedding, name: value}
            _check_modules(*parts.values())
        super().__setattr__(name, value)
        if name in ("rnn", "head", "embedding"):
            self._known = None
        if name == "rnn":
            self._name_weights(value)

    def _name_weights(self, rnn: ReLURNN | nn.RNN) -> None:
        directions = ("", "_reverse") if rnn.bidirectional else ("",)
        #: How the names of the weights of every direction of every layer end, in the order of the state dict.
        self.endings = tuple(f"l{i}{direction}" for i in range(rnn.num_layers) for direction in directions)
        self.recurrent = tuple(f"rnn.weight_hh_{ending}" for ending in self.endings)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if rnn.bias else 2]
        # In this order, whatever that of the module: what has been pruned or parametrised for a while comes last there.
        names = [f"{kind}_{ending}" for ending in self.endings for kind in kinds]
        self._rnn_names = tuple((f"rnn.{name}", name) for name in names)

    @property
    def outputs(self) -> Literal["all", "last"]:
        return self._outputs

    @outputs.setter
    def outputs(self, outputs: Literal["all", "last"]) -> None:
        if not isinstance(outputs, str) or outputs not in ("all", "last"):
            raise ValueError(f'outputs is {outputs!r}; use "all" (a loss at every step) or "last" (at the last step)')
        self._outputs = outputs

    @property
    def h0(self) -> Literal["zeros", "ones"]:
        return self._h0

    @h0.setter
    def h0(self, h0: Literal["zeros", "ones"]) -> None:
        if not isinstance(h0, str) or h0 not in ("zeros", "ones"):
            raise ValueError(f'h0 is {h0!r}; use "zeros" or "ones"')
        self._h0 = h0

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, in the order of the state dict of a new network: as the kernels want them."""
        modules = self._modules
        own = modules["rnn"]._parameters  # type: ignore[union-attr]
        try:
            found = {name: own[key] for name, key in self._rnn_names}
            if (head := modules["head"]) is not None:
                found["head.weight"] = head._parameters["weight"]
                if (bias := head._parameters["bias"]) is not None:
                    found["head.bias"] = bias
            if (embedding := modules["embedding"]) is not None:
                found["embedding.weight"] = embedding._parameters["weight"]
        except KeyError:
            self.check_parameters()  # names what has replaced a parameter since
            raise
        return found  # type: ignore[return-value]

    def holders(self) -> list[tuple[Any, str]]:
        """Where the modules and ``weights()`` are held: dictionaries with a key each."""
        held = [(self._modules, name) for name in ("rnn", "head", "embedding")]
        parts: list[tuple[Any, str]] = [(self.__dict__, "_modules"), *held]
        keys = [key for _, key in self._rnn_names], ["weight", "bias"], ["weight"]
        for (modules, name), own in zip(held, keys, strict=True):
            if (module := modules[name]) is not None:
                parts += [(module.__dict__, "_parameters"), *[(module._parameters, key) for key in own]]
        return parts

    def check_parameters(self) -> None:
        """Refuse computed, sharded, tied, mixed or unsupported parameters; they can become so after construction."""
        _check_modules(self.rnn, self.head, self.embedding)
        seen: dict[int, str] = {}
        first: tuple[str, Tensor] | None = None
        for name, p in self.named_parameters(remove_duplicate=False):
            if not _NAMES.fullmatch(name):
                raise ValueError(
                    f"{name} is no weight of an RNN, head or embedding: if a weight is computed from it "
                    "(parametrizations, weight_norm, pruning), which κ does not support, make that weight a parameter "
                    "again (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm, "
                    "torch.nn.utils.prune.remove)"
                )
            if hasattr(p, "__tensor_flatten__"):  # it holds its numbers in other tensors
                raise TypeError(
                    f"{name} is a {type(p).__name__}, perhaps a part of a matrix on another process, but κ needs whole "
                    "matrices: leave the network out of fully_shard and tensor parallelism, and train it with "
                    "DistributedDataParallel"
                )
            if (place := _place(p)) in seen:
                raise ValueError(
                    f"{name} and {seen[place]} are one tied parameter; κ of a tied parameter couples both places, "
                    "which is not supported: untie them, or leave that module out of the network"
                )
            seen[place] = name
            check_dtype(f"{name} has dtype", p.dtype)
            first = first or (name, p)
            check_alike(name, p, first, "network")

    @property
    def structure(self) -> tuple[int, bool, bool, bool, bool, bool]:
        """What there is: chains, a reverse direction, biases, a head, its bias, an embedding (ops/step.py)."""
        head = self.head
        head_bias = head is not None and head.bias is not None
        bias: bool = self.rnn.bias  # type: ignore[assignment]
        return len(self.endings), self.rnn.bidirectional, bias, head is not None, head_bias, self.embedding is not None

    @property
    def hidden_size(self) -> int:
        return self.rnn.hidden_size

    @property
    def num_layers(self) -> int:
        return self.rnn.num_layers

    @property
    def num_directions(self) -> int:
        return 2 if self.rnn.bidirectional else 1

    @property
    def last_seq_len(self) -> int | None:
        """T of the RNN's gradients, which the optimisers take; before the first, of its last forward pass; or None."""
        rnn = self._modules["rnn"]
        if not isinstance(rnn, ReLURNN):
            return None
        return rnn.steps.longest or rnn.last_seq_len

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        gradients_used(self)  # T of gradients that are 0 is nobody's

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the network.

        Args:
            x: ``[T, B, input_size]`` (``[B, T, …]`` with ``batch_first``, ``[T, …]`` unbatched); with an embedding,
                integer tokens without the last dimension.

        Returns:
            With ``outputs="all"`` the head's output at every step, ``[T, B, out_features]``; with ``"last"`` at the
            last step only (of either direction its own), ``[B, out_features]``.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        y, h_n = self.rnn(x)
        if self.outputs == "last":
            y = torch.cat((h_n[-2], h_n[-1]), -1) if self.rnn.bidirectional else h_n[-1]
        if self.head is None:
            return y
        output = self.head(y)
        if output.requires_grad and not y.requires_grad and isinstance(self.rnn, ReLURNN):
            self.rnn.count_above([output], self.head._parameters)
        return output

    def extra_repr(self) -> str:
        return f"outputs={self.outputs!r}, h0={self.h0!r}"


#: What to do where T is not that of the gradients.
WHOLE_SEQUENCES = (
    "give the optimiser seq_len=, the steps of whole sequences; where states are passed on without their graph, "
    'PathNetwork(…, h0="ones") has κ > 0'
)


def sequence_length(net: PathNetwork, seq_len: int | None) -> int | None:
    """T for a step: the optimiser's own, or that of the gradients.

    None where no T is known but every gradient is 0: it stays so, whatever T is.

    Raises:
        ValueError: no T is known; or κ of a recurrent matrix is 0, since T = 1, and its gradient is not.
    """
    if seq_len is not None:
        return seq_len
    found = net.last_seq_len
    if found is None:
        _check_zero(
            net.parameters(),
            "seq_len is None and the network's RNN has recorded no forward pass (torch.nn.RNN records none): "
            "run one before the step, or give the optimiser its seq_len",
        )
    elif found == 1 and net.h0 == "zeros":
        weights = net.weights()
        for name in net.recurrent:
            _check_zero([weights[name]], f"κ of {name} is 0, for T is 1, but its gradient is not: {WHOLE_SEQUENCES}")
    return found


def _check_zero(weights: Iterable[Tensor], error: str) -> None:
    """A ValueError unless their gradients are; a device is waited for."""
    if any(p.grad is not None and p.grad.any() for p in weights):
        raise ValueError(error)


def gradients_used(net: object) -> None:
    """T of the gradients that the network gets next has nothing to do with those that it has now."""
    if isinstance(net, PathNetwork) and isinstance(rnn := net._modules["rnn"], ReLURNN):
        rnn.steps.begin_anew()


def check_network(net: object) -> None:
    """That it is one, with parameters that κ is known of."""
    if not isinstance(net, PathNetwork):
        raise TypeError(f"net is a {type(net).__name__}; it must be a PathNetwork, as PathNetwork(rnn, head=…)")
    net.check_parameters()


def _place(p: Tensor) -> int:
    """What tied parameters share: their memory, where they have any."""
    return id(p) if transformed() or without_numbers(p) else p.data_ptr() or id(p)


def check_rnn(rnn: object) -> None:
    if isinstance(rnn, nn.RNN):
        if rnn.nonlinearity != "relu":
            raise ValueError(f'rnn has nonlinearity {rnn.nonlinearity!r}; path norms need "relu"')
    elif not isinstance(rnn, ReLURNN):
        raise TypeError(f'rnn is a {type(rnn).__name__}; it must be a ReLURNN or torch.nn.RNN(nonlinearity="relu")')


def _check_modules(rnn: Any, head: object, embedding: object) -> None:
    check_rnn(rnn)
    if head is not None:
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head is a {type(head).__name__}; it must be torch.nn.Linear or None")
        width = (2 if rnn.bidirectional else 1) * rnn.hidden_size
        if head.in_features != width:
            both = ", in two directions" if rnn.bidirectional else ""
            raise ValueError(
                f"head has in_features={head.in_features}, but the RNN's hidden_size is {rnn.hidden_size}{both}: "
                f"use nn.Linear({width}, …)"
            )
    if embedding is not None:
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding is a {type(embedding).__name__}; it must be torch.nn.Embedding or None")
        if embedding.embedding_dim != rnn.input_size:
            raise ValueError(
                f"embedding has embedding_dim={embedding.embedding_dim}, but the RNN's input_size is "
                f"{rnn.input_size}: use nn.Embedding(…, {rnn.input_size})"
            )
        if embedding.max_norm is not None:
            raise ValueError("embedding has max_norm, which rewrites weights in the forward pass; use max_norm=None")
