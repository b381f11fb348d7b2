"""The paper's data sets, as a training loop sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Generator, Tensor

from .adding import Adding
from .smnist import DataError, SequentialDigits

__all__ = ["Adding", "DataError", "SequentialDigits", "Task"]


class Task(Protocol):
    """Sequences with one target each, and what counts as an error."""

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

    def batch(self, batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Training sequences ``[T, B, input_size]`` and targets ``[B]``, drawn from the generator alone."""

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out sequences, the same ones on every call, in batches of bounded size."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of outputs ``[B, output_size]``, 0-dim."""

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """The error of every sequence, ``[B]``; its mean over ``held_out`` is the held-out error."""
