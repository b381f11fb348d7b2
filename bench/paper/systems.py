"""What the paper's tables compare: one name, one network, one optimiser each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathrnn_kernels import ReLURNN, init
from pathrnn_kernels.tasks import Task
from pathrnn_kernels.tasks.text import LanguageModel
from pathrnn_kernels.training import BOUNDS, Config, Record, Run, evaluate, make_network, wake_

from .cells import NormStabilised, SmoothReLU, UnitaryRNN

#: Of language models where the paper's task does not say.
_BOUNDS = (0.01, 0.2)


class System(NamedTuple):
    """How one row of a table trains."""

    optimizer: str
    #: Makes the network from the configuration and the task.
    network: Callable[[Config, Task], nn.Module]
    #: Options of ``Config`` that belong to the system.
    options: dict[str, bool] = {}  # noqa: RUF012 - never written to


class Network(nn.Module):
    """Embedding, recurrent layer and head, where the layer is no ReLU RNN."""

    def __init__(self, config: Config, task: Task, rnn: nn.Module, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.input_size, config.embedding_size) if config.embedding_size else None
        self.rnn = rnn
        self.head = nn.Linear(features, task.output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs at the last step."""
        y, _ = self.rnn(x if self.embedding is None else self.embedding(x))
        return self.head(y[-1])  # type: ignore[no-any-return]


def _relu(config: Config, task: Task) -> nn.Module:
    """The network of ``pathrnn train``: identity for long sequences, uniform for language models."""
    return make_network(config, task)


def _identity(config: Config, task: Task) -> nn.Module:
    return wake_(init.identity_(make_network(config, task)), config)


def _np(config: Config, task: Task) -> nn.Module:
    return wake_(init.np_rnn_(make_network(config, task)), config)


def _uniform(rnn_type: type[ReLURNN]) -> Callable[[Config, Task], nn.Module]:
    return lambda config, task: init.uniform_(make_network(config, task, rnn_type), *BOUNDS.get(config.task, _BOUNDS))


def _inputs(config: Config, task: Task) -> int:
    return config.embedding_size or task.input_size


@torch.no_grad()
def _tanh(config: Config, task: Task) -> nn.Module:
    """As the ReLU RNN it stands beside."""
    net = Network(config, task, nn.RNN(_inputs(config, task), config.hidden_size), config.hidden_size)
    recurrent, other = BOUNDS.get(config.task, _BOUNDS)
    for name, p in net.named_parameters():
        bound = 0.0 if "bias" in name else recurrent if "weight_hh" in name else other
        p.uniform_(-bound, bound)
    return net


@torch.no_grad()
def _lstm(config: Config, task: Task) -> nn.Module:
    """Orthogonal recurrent matrices, a forget bias of 1, other weights U[-0.01, 0.01] (section 5.3)."""
    size = config.hidden_size
    net = Network(config, task, nn.LSTM(_inputs(config, task), size), size)
    for name, p in net.named_parameters():
        if "bias" in name:
            p.zero_()
        elif "weight_hh" in name:
            for gate in p.split(size):
                nn.init.orthogonal_(gate)
        else:
            p.uniform_(-0.01, 0.01)
        if "bias_ih" in name:
            p[size : 2 * size] = 1  # torch's order of the gates: input, forget, cell, output
    return net


def _unitary(config: Config, task: Task) -> nn.Module:
    rnn = UnitaryRNN(_inputs(config, task), config.hidden_size)
    return Network(config, task, rnn, 2 * config.hidden_size)


SYSTEMS = {
    "rnn-path": System("path-sgd", _relu),
    "rnn-path2": System("path-sgd", _relu, {"second_term": True}),
    "path-adam": System("path-adam", _relu),
    "irnn": System("sgd", _identity),
    "irnn-adam": System("adam", _identity),
    "irnn-rmsprop": System("rmsprop", _identity),
    "np-rnn": System("sgd", _np),
    "urnn": System("rmsprop", _unitary),
    "lstm": System("adam", _lstm),
    "rnn-relu": System("adam", _uniform(ReLURNN)),
    "rnn-relu-sgd": System("sgd", _uniform(ReLURNN)),
    "rnn-tanh": System("adam", _tanh),
    "trec": System("adam", _uniform(NormStabilised)),
    "smooth-relu": System("adam", _uniform(SmoothReLU)),
}


@dataclass(frozen=True)
class Experiment(Config):
    """A run of one system."""

    system: str = ""
    #: β of TRec's penalty.
    beta: float = 500.0

    @classmethod
    def on(cls, task: str, system: str, optimizer: str | None = None, **given: object) -> Experiment:
        """The system on the task, with its own optimizer by default; what else is not given is as for ``Config.of``."""
        if system not in SYSTEMS:
            raise ValueError(f"system is {system!r}; use one of {', '.join(SYSTEMS)}")
        own = SYSTEMS[system]
        found = cls.of(task, optimizer or own.optimizer, **{**own.options, "system": system, **given})
        assert isinstance(found, cls)
        return found


class SystemRun(Run):
    """A run of one system; a language model is tested where it is validated."""

    config: Experiment

    def make_network(self) -> nn.Module:
        return SYSTEMS[self.config.system].network(self.config, self.task)

    def objective(self, loss: Tensor) -> Tensor:
        rnn = self.net.rnn
        return loss + self.config.beta * rnn.penalty if isinstance(rnn, NormStabilised) else loss

    def evaluate(self) -> Record:
        record = super().evaluate()
        if isinstance(self.task, LanguageModel):
            record["test"] = evaluate(self.net, self.task, self.task.held_out_test())
            self._check("test error", record["test"])
        return record
