"""The paper's data sets, as a training loop sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Generator, Tensor

from .adding import Adding
from .charlm import Characters
from .data import DataError
from .smnist import SequentialDigits
from .wordlm import Words

__all__ = ["Adding", "Characters", "DataError", "SequentialDigits", "Task", "Words"]


class Task(Protocol):
    """Sequences with a target each, or a target at every step, and what counts as an error."""

    #: Whether every step has a target and every batch continues the one before it, so that the hidden state is
    #: carried on. Targets are then ``[T, B]``, outputs ``[T, B, output_size]``.
    carries: bool
    #: For plots: the task and its size.
    title: str
    seq_len: int
    input_size: int
    output_size: int
    #: Names with units, for plots and reports.
    loss_name: str
    error_name: str
    #: What the best constant answer reaches, as training loss and as held-out error, and that answer in words.
    trivial_loss: float
    trivial_error: float
    trivial_answer: str
    held_out_size: int

    def batch(self, batch_size: int, generator: Generator, step: int = 0) -> tuple[Tensor, Tensor]:
        """Training sequences ``[T, B, input_size]`` and targets ``[B]``, drawn from the generator alone.

        Where the task ``carries``, they follow from the step alone, and x may be symbols ``[T, B]``.
        """

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out sequences, the same ones on every call, in batches of bounded size."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of outputs ``[B, output_size]``, 0-dim."""

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """The error of every target."""

    def held_out_error(self, mean: float) -> float:
        """The held-out error, in its unit, from the mean of ``errors`` over ``held_out``."""
